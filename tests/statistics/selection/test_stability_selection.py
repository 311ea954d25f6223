"""Stability selection: loops over half-samples, planted truth, the bounds under the null, order, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics import SelectionTests, StabilityOptions, select_features
from rlgen_stats.toolkit.statistics.kernels import cpss_bound, partial_conjunction
from rlgen_stats.toolkit.statistics.selection import stability_selection as module
from rlgen_stats.toolkit.statistics.selection.stability_selection import (
    complementary_halves,
    conjunction_order,
    default_per_half,
    flip_z,
)


def run(features, outcomes, *, clusters=None, min_discordant=20, **stability):
    return select_features(
        features,
        outcomes,
        target="rl@10",
        controls=["noise"],
        clusters=clusters,
        tests=SelectionTests(n_resamples=99, n_bootstrap=1, min_discordant=min_discordant),
        stability=StabilityOptions(**stability),
        seed=2,
    )


def test_halves_split_every_stratum() -> None:
    strata = np.array([0] * 7 + [2] * 10 + [-1] * 3 + [5])
    halves = complementary_halves(strata, 40, seed=3)
    first, second = halves[::2], halves[1::2]
    assert set(np.unique(halves)) == {0, 1}
    assert not (first * second).any()
    for rows in (first, second):
        assert np.all(rows[:, strata == 0].sum(axis=1) == 3)
        assert np.all(rows[:, strata == 2].sum(axis=1) == 5)
        assert not rows[:, (strata == -1) | (strata == 5)].any()
    np.testing.assert_allclose(halves[:, strata == 2].mean(axis=0), 0.5, atol=3 * 0.5 / np.sqrt(40))
    assert len({row.tobytes() for row in first}) == 40
    np.testing.assert_array_equal(complementary_halves(strata, 5, seed=3), halves[:10])


def test_scores_are_the_normal_limits_of_the_tests() -> None:
    random = np.random.default_rng(1)
    x = random.normal(size=(90, 4)) + 0.2
    half = np.ones((1, 90))
    np.testing.assert_allclose(flip_z(x, half)[0], x.sum(axis=0) / np.sqrt((x**2).sum(axis=0)), rtol=1e-12)
    z = random.normal(size=(200, 5))
    for combine in ("bonferroni", "simes", "fisher"):
        for u in (1, 3, 5):
            p = partial_conjunction(stats.norm.sf(z), u=u, combine=combine)
            inside = np.flatnonzero(p < 1)
            order = conjunction_order(z, u, combine)[inside]
            assert np.all(np.diff(p[inside][np.argsort(order)]) >= -1e-12)
    with pytest.raises(InputError, match="bonferroni, simes or fisher, got 'tippett'"):
        conjunction_order(z, 1, "tippett")


def test_shares_equal_loops_over_half_samples(gain_world) -> None:
    """Three tasks, three pairs, four features a half: every step written out."""
    features, outcomes = gain_world(n=400)
    out = run(features, outcomes, n_pairs=3, n_per_half=4, min_discordant=5)
    d = (features["mean"][1] - features["mean"][0]).values
    base, rl = outcomes.greedy_correct.values
    sides = {"gain": (base == 0) & (rl == 1), "loss": (base == 1) & (rl == 0), "kept": (base == 1) & (rl == 1)}
    task, selection = features.task.values, features.split.values == "selection"
    assert out.guard.values[:3].tolist() == ["contrast"] * 3
    strata = np.full(400, -1)
    used = ["math", "quiz", "facts"]
    for number, name in enumerate(used):
        strata[selection & (task == name)] = 3 * number + 1
        for side, sign in (("gain", 1), ("loss", -1)):
            strata[selection & (task == name) & sides[side]] += sign
    halves = complementary_halves(strata, 3, seed=module.derive_seed(2, "selection", "halves"))
    contributions = {}
    for name in used:
        rows = [np.flatnonzero(selection & (task == name) & inside) for inside in sides.values()]
        for weights in ((1, 1, 0),):
            parts = [(w, r) for w, r in zip(weights, rows, strict=True) if w]
            estimate = sum(w * d[r].mean(axis=0) for w, r in parts)
            spread = sum(w * w / len(r) for w, r in parts)
            contributions[name, weights] = np.zeros_like(d)
            for w, r in parts:  # residuals from the group means that have no contrast
                null_mean = d[r].mean(axis=0) - w / len(r) * estimate / spread
                contributions[name, weights][r] = w / len(r) * (d[r] - null_mean)
    count = np.zeros(30)
    for half in halves:
        weakest = np.full(30, -np.inf)
        for k in range(30):
            p = []
            for name in used:
                gain = d[(task == name) & (half == 1) & sides["gain"], k]
                z = [gain.sum() / np.sqrt((gain**2).sum())]
                for weights in ((1, 1, 0),):
                    c = contributions[name, weights][half == 1, k]
                    z.append(c.sum() / np.sqrt((c**2).sum()))
                p.append(stats.norm.logsf(min(z)))
            weakest[k] = max(p)  # all three tasks
        count[np.argsort(weakest)[:4]] += 1
    np.testing.assert_allclose(out.stability.values, count / 6)
    assert count.sum() == 24


def test_planted_features_are_stable_and_confounded_ones_are_not(gain_world) -> None:
    out = run(*gain_world(), n_per_half=6)
    assert np.flatnonzero(out.stable).tolist() == [0, 1, 2, 3, 4]
    assert out.stability.values[10:15].max() < 0.6
    facts = out.attrs
    assert (facts["n_stable"], facts["stability_q"], facts["stability_pairs"]) == (5, 6, 50)
    assert facts["stability_bound_mb"] == pytest.approx(36 / (0.8 * 30))
    assert facts["stability_bound_ss"] == pytest.approx(cpss_bound(6, 30, 50, 0.9, "unimodal"))
    tests = SelectionTests(n_resamples=99, n_bootstrap=1)
    without = select_features(*gain_world(), target="rl@10", controls=["noise"], tests=tests, stability=None, seed=2)
    assert "stability" not in without
    np.testing.assert_array_equal(without.tier, out.tier)


@pytest.mark.slow
def test_noise_is_stable_less_often_than_bounded(gain_world) -> None:
    """Beside it the naive set, the leading features of one half, which is all noise every time."""
    n_stable, bound, naive = [], [], []
    for seed in range(12):
        out = run(*gain_world(n=320, planted=False, seed=seed), min_discordant=5, n_per_half=8, threshold=0.6)
        n_stable.append(out.attrs["n_stable"])
        bound.append(out.attrs["stability_bound_mb"])
        naive.append(8)
        assert np.nanmean(out.stability) == pytest.approx(8 / 30)
    assert np.mean(n_stable) <= bound[0] == pytest.approx(64 / (0.2 * 30))
    assert np.mean(n_stable) < 0.5 * np.mean(naive)


def test_neither_chunks_nor_order_matter(gain_world) -> None:
    features, outcomes = gain_world(n=400)
    mean = features["mean"].values
    mean[:, :, 20:25] = mean[:, :, 20:21]  # ties, broken by label
    whole = run(features, outcomes)
    shuffled = features.isel(feature=np.random.default_rng(0).permutation(30)).isel(prompt=slice(None, None, -1))
    for other in (features.chunk({"feature": 7}).assign_coords(features.coords), shuffled):
        out = run(other, outcomes).sortby("feature")
        np.testing.assert_array_equal(out.stability.values, whole.stability.values)
        assert out.attrs["stability_bound_mb"] == whole.attrs["stability_bound_mb"]


def test_clusters_stay_whole(gain_world) -> None:
    features, outcomes = gain_world(n=1600, per_cluster=8)
    out = run(features, outcomes, clusters="cluster", n_per_half=6)
    assert set(np.flatnonzero(out.stable)) >= {0, 1, 2, 3, 4}
    assert out.attrs["stability_min_gain"] < run(features, outcomes, n_per_half=6).attrs["stability_min_gain"]


def test_the_default_keeps_what_the_bound_allows() -> None:
    for n in (10, 300, 2048, 32768):
        q = default_per_half(n)
        assert q == 50 or cpss_bound(q, n, 50, 0.9) <= 1 < cpss_bound(q + 1, n, 50, 0.9)
    assert default_per_half(32768) == 50


def test_nothing_to_rank_is_a_result(gain_world) -> None:
    out = run(*gain_world(gains=False))
    assert np.isnan(out.stability).all()
    assert not out.stable.any()
    assert out.attrs["stability_q"] == 0


@pytest.mark.parametrize("options", [{"n_pairs": 0}, {"n_per_half": 0}, {"threshold": 0.5}])
def test_settings_out_of_range_are_refused(options) -> None:
    with pytest.raises(InputError, match="n_pairs >= 1, n_per_half >= 1 and 1/2 < threshold <= 1"):
        StabilityOptions(**options)
