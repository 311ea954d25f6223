from __future__ import annotations

import sys
from itertools import product

import numpy as np
import pytest
import xarray as xr
from scipy.stats import false_discovery_control, wasserstein_distance
from statsmodels.stats.weightstats import ttost_paired

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.toolkit.statistics import drift_test
from rlgen_stats.toolkit.statistics.kernels import adjust, minimum_effect_test

MODELS = ["base@0", "sft@10", "rl@10"]


@pytest.fixture
def world(make_features):
    """40 features, 60 prompts: 0-4 shifted in rl, 5 dead, 6 fires on three prompts, 7 identical, others noise."""
    rng = np.random.default_rng(1)
    mean = rng.gamma(2.0, 1.0, (1, 60, 40)) + rng.normal(0, 0.3, (3, 60, 40))
    mean[2, :, :5] += 1.0
    mean[:, :, 5] = 0
    mean[:, :, 6] = 0
    mean[1:, :3, 6] = 2.0
    mean[:, :, 7] = mean[0, :, 7]
    return lambda chunk=None, **options: make_features(mean, MODELS, chunk=chunk, **options)


def run(features, **options):
    defaults = {"models": ["sft@10", "rl@10"], "n_resamples": 199, "n_bootstrap": 199, "seed": 3}
    return drift_test(features, **(defaults | options))


def test_layout_and_planted_truth(world):
    out = validate(run(world()), "drift")
    rl = out.sel(model="rl@10")
    assert list(rl.call.values[:5]) == ["DRIFT"] * 5
    assert np.all(rl.effect.values[:5] > 0.7)
    assert ((rl.effect_low < 1.0) & (rl.effect_high > 1.0)).values[:5].sum() >= 4
    assert (out.sel(model="sft@10").call == "DRIFT").sum() <= 1
    assert (rl.call.values[8:] == "NO_DRIFT").mean() > 0.8  # noise of .3 against a margin of .2 x 1.4
    assert list(rl.flag.values[5:8]) == ["untestable", "untestable", "identical"]
    assert list(rl.call.values[5:8]) == ["UNTESTABLE", "UNTESTABLE", "NO_DRIFT"]
    assert np.isnan(rl.p_value.values[5:7]).all()
    assert rl.p_value.values[7] == 1.0
    assert out.n_tested.values.tolist() == [38, 38]
    assert out.attrs["family_size"] == 80


def test_numbers_against_a_slow_loop(make_features):
    rng = np.random.default_rng(2)
    mean = np.abs(rng.normal(1, 1, (2, 12, 4)))
    out = run(make_features(mean, ["base@0", "rl@5"]), models=["rl@5"], n_resamples=1999)
    d = mean[1] - mean[0]
    flips = np.array(list(product([-1, 1], repeat=12)))
    u = np.abs(flips @ d) / np.sqrt((d**2).sum(0))
    for k in range(4):
        exact = np.mean(np.abs(flips @ d[:, k]) >= abs(d[:, k].sum()) - 1e-9)
        assert out.p_value.values[0, k] == pytest.approx(exact, rel=1e-9)
        joint = np.mean(u.max(1) >= abs(d[:, k].sum()) / np.sqrt((d[:, k] ** 2).sum()) - 1e-9)
        assert out.p_max_t.values[0, k] == pytest.approx(joint, abs=3 * np.sqrt(joint * (1 - joint) / 1999) + 1e-3)
        assert out.d_z.values[0, k] == pytest.approx(d[:, k].mean() / d[:, k].std(ddof=1))
        assert out.statistic.values[0, k] == pytest.approx(d[:, k].sum() / np.sqrt((d[:, k] ** 2).sum()))


def test_drift_is_a_difference_and_one_beyond_the_margin(make_features):
    """Every feature differs significantly: by .1, .2 and .4 standard deviations of base; the last fires only in rl."""
    rng = np.random.default_rng(11)
    base = 9 + np.repeat(rng.normal(0, 1, (1, 400, 40)), 2, axis=0)
    base[1] += rng.normal(0, 0.1, (400, 40)) + np.repeat([0.1, 0.2, 0.4, 0], [15, 10, 14, 1])
    base[:, :, 39] = 0
    base[1, :40, 39] = rng.uniform(1, 2, 40)
    out = run(make_features(base, ["base@0", "rl@5"]), models=["rl@5"]).isel(model=0)
    assert (out.q_value <= 1e-4).all()
    assert list(out.call.values[:15]) == ["NO_DRIFT"] * 15
    assert list(out.call.values[25:]) == ["DRIFT"] * 15
    assert (out.call.values[15:25] == "UNDETERMINED").sum() >= 8  # at the margin
    np.testing.assert_array_equal(out.flag.values == "below_margin", out.call.values != "DRIFT")
    assert out.effect_sd.values[:25] == pytest.approx(np.repeat([0.1, 0.2], [15, 10]), abs=0.03)
    assert (out.q_minimum >= out.q_value).all()


def test_the_minimum_effect_is_corrected_with_the_sign_flips(world):
    features = world()
    out = run(features)
    x, base = features["mean"].values[1:], features["mean"].values[0]
    beyond = np.stack([minimum_effect_test(one, base, margin=0.2).p_value for one in x])
    p = np.maximum(out.p_value.values, beyond)
    p[:, 7] = 1.0  # identical
    ok = np.isfinite(out.p_value.values)
    np.testing.assert_allclose(out.p_minimum.values[ok], p[ok], rtol=1e-9)
    np.testing.assert_allclose(out.q_minimum.values[ok], false_discovery_control(p[ok]), rtol=1e-9)
    assert np.isnan(out.q_minimum.values[~ok]).all()
    assert out.effect_sd.values[1, 7] == 0
    assert out.typical_effect.values == pytest.approx([np.nanmedian(np.abs(row)) for row in out.effect_sd.values])


def test_equivalence_is_schuirmanns_on_the_reference_scale(make_features):
    rng = np.random.default_rng(4)
    base = rng.normal(5, 2, (40, 3))
    other = base + rng.normal(0.1, 0.5, (40, 3))
    out = run(make_features(np.stack([base, other]), ["base@0", "rl@5"]), models=["rl@5"], margin=0.2)
    for k in range(3):
        delta = 0.2 * base[:, k].std(ddof=1)
        p = ttost_paired(other[:, k], base[:, k], -delta, delta)[0]
        assert out.p_equivalence.values[0, k] == pytest.approx(p)


def test_q_corrects_the_declared_family(world):
    both, each = run(world()), run(world(), family=("feature",))
    p = both.p_value.values
    ok = np.isfinite(p)
    assert both.q_value.values[ok] == pytest.approx(false_discovery_control(p[ok]))
    assert each.q_value.values[1][ok[1]] == pytest.approx(false_discovery_control(p[1][ok[1]]))
    assert not np.allclose(both.q_value.values[ok], p[ok])
    # Bonferroni over models belongs to the family that spans them.
    assert both.p_max_t.values[ok] == pytest.approx(np.minimum(1, 2 * each.p_max_t.values[ok]))


def test_a_dead_feature_changes_no_other_number(world):
    features = world()
    features["mean"][2, :9, 6] = 2.0  # fires on nine prompts only, all one way: it would rule the joint maximum
    features["mean"][1, :, 6] = 0
    features["firing"][:, :, 6] = features["mean"][:, :, 6] > 0
    without = run(features.isel(feature=[k for k in range(40) if k not in (5, 6)]))
    with_dead = run(features).isel(feature=[k for k in range(40) if k not in (5, 6)])
    for name in ("p_value", "p_max_t", "q_value", "effect_low"):
        np.testing.assert_array_equal(with_dead[name].values, without[name].values)


@pytest.mark.parametrize("chunk", [9, 40])
def test_any_chunking_and_order_gives_the_same_numbers(world, chunk):
    whole, parts = run(world()), run(world(chunk)).compute()
    xr.testing.assert_allclose(parts, whole, rtol=1e-12)
    np.testing.assert_array_equal(parts.p_max_t.values, whole.p_max_t.values)
    reverse = run(world().isel(feature=slice(None, None, -1))).isel(feature=slice(None, None, -1))
    np.testing.assert_array_equal(reverse.p_max_t.values, whole.p_max_t.values)
    np.testing.assert_allclose(reverse.q_value.values, whole.q_value.values, rtol=1e-12)


def test_nothing_is_computed_until_asked(world, no_compute):
    features = world(8)
    with no_compute():
        out = run(features)
    assert all(out[name].chunks is not None for name in out.data_vars)
    out.load()


def test_every_block_is_read_and_tested_once(world, monkeypatch):
    calls = []
    module = sys.modules["rlgen_stats.toolkit.statistics.drift.feature_drift"]
    block = module.drift_block
    monkeypatch.setattr(module, "drift_block", lambda *a, **k: calls.append(a[0].shape) or block(*a, **k))
    run(world(10)).compute()
    assert calls == [(3, 60, 10)] * 4


def test_clusters_become_units(world):
    out = run(world(per_cluster=4), clusters="cluster")
    assert out.attrs["unit"] == "cluster"
    assert set(out.n.values.ravel()) == {15}
    features = world(per_cluster=4)
    mean = features["mean"].values.reshape(3, 15, 4, 40).mean(axis=2)
    assert out.effect.values[1][8:] == pytest.approx((mean[2] - mean[0]).mean(axis=0)[8:])


def test_dependent_prompts_need_clusters(make_features):
    """With everything shared inside a template the prompt-level test rejects far too often, the clustered one not."""
    rng = np.random.default_rng(8)
    templates = rng.normal(0, 1, (2, 12, 1, 300))
    mean = 5 + np.broadcast_to(templates, (2, 12, 6, 300)) + rng.normal(0, 0.5, (2, 12, 6, 300))
    features = make_features(mean.reshape(2, 72, 300), ["base@0", "rl@5"], per_cluster=6)
    naive = run(features, models=["rl@5"])
    guarded = run(features, models=["rl@5"], clusters="cluster")
    assert (naive.p_value <= 0.05).mean() > 0.25
    assert (guarded.p_value <= 0.05).mean() < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 300)


def test_cluster_means_that_differ_by_rounding_alone_do_not_drift(make_features):
    """The means of (.1, .2, .3) and (.3, .2, .1) differ in the last bit, always with one sign."""
    values = np.zeros((2, 120, 1))
    values[0, :, 0], values[1, :, 0] = np.tile([0.1, 0.2, 0.3], 40), np.tile([0.3, 0.2, 0.1], 40)
    out = run(make_features(values, ["base@0", "rl@1"], per_cluster=3), models=["rl@1"], clusters="cluster")
    assert out["call"].values.item() != "DRIFT"
    assert not out["p_value"].values.item() < 0.5


def test_null_calibration_with_sparse_features(make_features):
    rng = np.random.default_rng(5)
    mean = rng.gamma(1, 1, (2, 40, 2000)) * (rng.random((2, 40, 2000)) < 0.4)
    out = run(make_features(mean, ["base@0", "rl@5"]), models=["rl@5"])
    p = out.p_value.values.ravel()
    for level in (0.01, 0.05, 0.2):
        assert (p <= level).mean() <= level + 3 * np.sqrt(level * (1 - level) / 2000)
    assert (p <= 0.2).mean() > 0.15
    assert p.min() > 0
    assert (out.call == "DRIFT").sum() <= 1


def test_prompts_without_tokens_take_no_part(world):
    features = world()
    holed = features.copy(deep=True)
    holed["mean"][:, 10:14] = np.nan
    holed["firing"][:, 10:14] = 0
    a, b = run(holed), run(features.isel(prompt=[i for i in range(60) if not 10 <= i < 14]))
    for name in ("p_value", "effect", "d_z", "firing_change", "p_equivalence", "n"):
        # Sums run in another order; near p = 1 the saddlepoint turns rounding into the fourth digit.
        np.testing.assert_allclose(a[name].values, b[name].values, rtol=1e-3)
    assert set(a.n.values.ravel()) == {56}


def test_firing_change_is_in_points(make_features):
    mean = np.ones((2, 20, 2))
    firing = np.stack([np.full((20, 2), 0.25), np.full((20, 2), 0.5)])
    out = run(make_features(mean, ["base@0", "rl@5"], firing=firing), models=["rl@5"])
    assert out.firing_change.values == pytest.approx(25.0)


def test_changes_are_split_into_firing_and_magnitude(make_features):
    rng = np.random.default_rng(6)
    firing = rng.uniform(0.2, 0.4, (2, 30, 3))
    firing[1, :, 0] *= 2  # fires twice as often
    strength = np.full((2, 30, 3), 1.5)
    strength[1, :, 1] = 3  # fires twice as strongly
    out = run(make_features(firing * strength, ["base@0", "rl@5"], firing=firing), models=["rl@5"])
    np.testing.assert_allclose(out.from_firing + out.from_magnitude, out.effect, rtol=1e-12)
    assert abs(out.from_magnitude.values[0, 0]) < 1e-12
    assert out.from_firing.values[0, 0] == pytest.approx(1.5 * (firing[1] - firing[0])[:, 0].mean())
    assert out.magnitude_change.values[0, 1] == pytest.approx(1.5)
    by_max = run(make_features(firing * strength, ["base@0", "rl@5"], firing=firing), models=["rl@5"], variable="max")
    assert "from_firing" not in by_max


def test_wasserstein_sees_a_change_of_spread(make_features):
    rng = np.random.default_rng(7)
    base = rng.normal(5, 0.5, (50, 2))
    other = base.copy()
    other[:, 1] = 5 + 4 * (base[:, 1] - base[:, 1].mean())
    out = run(make_features(np.stack([base, other]), ["base@0", "rl@5"]), models=["rl@5"])
    assert out.wasserstein.values[0, 0] == 0
    expected = wasserstein_distance(base[:, 1], other[:, 1])
    assert out.wasserstein.values[0, 1] == pytest.approx(expected)
    assert abs(out.effect.values[0, 1]) < expected / 3


@pytest.mark.slow
def test_the_share_of_false_discoveries_is_bounded_beyond_every_threshold(world):
    out = run(world(7))
    rl = out.sel(model="rl@10")
    assert rl.n_beyond.values.tolist() == [int((abs(rl.statistic) >= t).sum()) for t in out.threshold.values]
    assert rl.fdp_upper.sel(threshold=4.0) == 0
    assert int(rl.n_beyond.sel(threshold=4.0)) == 5
    assert (out.fdp_upper.sel(model="sft@10").where(out.n_beyond.sel(model="sft@10") > 0, 1) == 1).all()
    np.testing.assert_array_equal(out.fdp_upper.values, run(world(40)).fdp_upper.values)


@pytest.mark.parametrize("method", ["by", "storey", "bky"])
def test_other_corrections(world, method):
    out = run(world(), correction=method)
    expected = adjust(out.p_value.values, method=method, alpha=0.05)
    np.testing.assert_allclose(out.q_value.values, expected, rtol=1e-12)
    assert method.upper() in out.attrs["test"]


def test_few_clusters_can_be_bootstrapped_instead(make_features):
    """Flips of seven clusters end at p = 1/64, with which nothing survives a family of 200 features."""
    rng = np.random.default_rng(8)
    mean = 9 + rng.normal(0, 1, (1, 7, 1, 200)) + rng.normal(0, 0.3, (2, 7, 6, 200))
    mean[1, ..., :20] += 2.0
    features = make_features(mean.reshape(2, 42, 200), ["base@0", "rl@5"], per_cluster=6)
    flips, wild = (run(features, models=["rl@5"], clusters="cluster", null=null) for null in ("exchangeable", "mean"))
    assert (flips.call == "DRIFT").sum() == 0
    assert flips.attrs["p_floor"] == 2**-6
    assert (wild.call == "DRIFT").values[0, :20].mean() > 0.9
    assert (wild.call == "DRIFT").values[0, 20:].mean() < 0.05
    np.testing.assert_array_equal(flips.p_max_t.values, wild.p_max_t.values)
    with pytest.raises(InputError, match=r"null='mean' is for 6 to 11 clusters.*got 42 prompts without clusters"):
        run(features, models=["rl@5"], null="mean")


def test_the_order_of_prompts_does_not_matter(world):
    features = world(per_cluster=4)
    order = np.random.default_rng(9).permutation(60)
    for clusters in (None, "cluster"):
        expected, shuffled = (run(f, clusters=clusters) for f in (features, features.isel(prompt=order)))
        xr.testing.assert_identical(shuffled, expected)


def test_tokens_as_units_only_if_allowed_and_recorded(world):
    features = world()
    features = features.assign_coords(prompt=[f"p{i // 2}" for i in range(60)])
    with pytest.raises(RefusedError, match="'p0' has several rows"):
        run(features)
    out = run(features, unit="token", allow_token_unit=True)
    assert out.attrs["unit"] == "token"
    assert "a nominal 5% test rejects 32%" in out.attrs["warning"]
    assert "warning" not in run(world()).attrs


def test_refusals(world):
    with pytest.raises(RefusedError, match=r"unit='token'.*clusters='cluster'"):
        run(world(), unit="token")
    with pytest.raises(RefusedError, match="uncorrected"):
        run(world(), family=("model",))
    with pytest.raises(RefusedError, match="uncorrected"):
        run(world(), family=())
    with pytest.raises(InputError, match=r"model 'rl@99' is not in the data; expected one of"):
        run(world(), models=["rl@99"])
    with pytest.raises(RefusedError, match="4 clusters cannot carry a test"):
        run(world(per_cluster=15), clusters="cluster")
    with pytest.raises(InputError, match="clusters='template' is not a coordinate of the prompts"):
        run(world(), clusters="template")
    with pytest.raises(InputError, match="no variable 'median'"):
        run(world(), variable="median")
    with pytest.raises(InputError, match=r"expected a correction of .*; got 'fdr', 'mean'"):
        run(world(), correction="fdr", null="mean")


def test_token_histograms_find_what_means_do_not(world):
    """Feature 9 of rl keeps its mean but fires at 1/2 and 4 instead of always at 1.5 or so: two bins for one."""
    features = world()
    rng = np.random.default_rng(10)
    counts = rng.multinomial(8, [0.5, 0, 0.25, 0.25, 0], size=(3, 60, 40))
    counts[2, :, 9] = rng.multinomial(8, [0.5, 0.25, 0, 0, 0.25], size=60)
    features["histogram"] = (("model", "prompt", "feature", "bin"), counts)
    out = run(features, histograms=True, n_resamples=4095)
    assert int(np.nanargmin(out.p_wasserstein.values[1])) == 9
    assert out.q_wasserstein.values[1, 9] <= 0.05
    assert (out.p_wasserstein.sel(model="sft@10") <= 0.05).mean() < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 38)
    assert np.isnan(out.p_wasserstein.values[:, 5]).all()
    lazy = run(features.chunk({"feature": 9}).assign_coords(features.coords), histograms=True, n_resamples=4095)
    np.testing.assert_array_equal(lazy.p_wasserstein.compute(), out.p_wasserstein)
    with pytest.raises(InputError, match=r"hold no histograms; encode them with summaries: \{histograms: true\}"):
        run(world(), histograms=True)
