from __future__ import annotations

import sys

import numpy as np
import pytest
import xarray as xr
from scipy.stats import t
from statsmodels.stats.weightstats import ttost_paired

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics import stabilization_test
from rlgen_stats.toolkit.statistics.kernels import bootstrap_weights

STEPS = [10, 20, 30, 40, 50, 60]
MODELS = ["base@0", *(f"{run}@{s}" for run in ("sft", "rl") for s in STEPS)]


@pytest.fixture
def world(make_features):
    """sft: features 0-9 jump at step 20 and stay; rl: they climb to the end. 10-19 stay, 20 is dead, 21 constant."""
    rng = np.random.default_rng(0)
    base = rng.normal(5, 1, (80, 22))
    early = np.array([0.3, 1, 1, 1, 1, 1])
    late = np.array([1, 2, 3, 4, 5, 6]) / 6
    stack = [base]
    for path in (early, late):
        for level in path:
            x = base + rng.normal(0, 0.2, base.shape)
            x[:, :10] += level
            stack.append(x)
    mean = np.stack(stack)
    mean[:, :, 20] = 0
    mean[:, :, 21] = 3
    return lambda chunk=None, **options: make_features(mean, MODELS, chunk=chunk, **options)


def run(features, **options):
    return stabilization_test(features, **({"runs": ["sft", "rl"], "n_bootstrap": 99, "seed": 1} | options))


def test_layout_and_planted_truth(world):
    out = validate(run(world(), persist=0.5), "stabilization")
    sft, rl = (out.sel(trained_run=name) for name in ("sft", "rl"))
    assert np.mean(sft.stabilized_at.values[:10] == 20) >= 0.9
    assert np.all(rl.flag.values[:10] == "EVOLVING")
    assert np.isnan(rl.stabilized_at.values[:10]).all()
    assert np.mean(sft.flag.values[10:20] == "UNCHANGED") >= 0.9
    assert sft.flag.values[20:].tolist() == ["UNTESTABLE", "NO_MARGIN"]
    assert sft.total_effect.values[:10] == pytest.approx(1.0, abs=0.1)
    assert out.n_testable.values.tolist() == [20, 20]
    share = out.share.values.reshape(2, 6)
    assert share[0, 1] >= 0.9
    assert share[1, -1] <= 0.6  # a feature that only just arrived never counts, not even at the end


def test_p_values_and_chain_against_statsmodels(world):
    features = world()
    out = run(features, runs=["sft"], margin=0.2, persist=0.3)
    mean = features["mean"].values[:7]
    for k in (0, 5, 12):
        delta = 0.2 * mean[0, :, k].std(ddof=1)
        p = [ttost_paired(mean[c, :, k], mean[6, :, k], -delta, delta)[0] for c in range(6)]
        assert out.p_reference.values[0, k] == pytest.approx(p[0])
        assert out.p_value.values[:5, k] == pytest.approx(p[1:], rel=1e-9)
        first = 6
        while first > 0 and p[first - 1] <= 0.05:
            first -= 1
        expected = [0, *STEPS][first] if first <= 4 else np.nan
        assert out.stabilized_at.values[0, k] == pytest.approx(expected, nan_ok=True)
    assert np.isnan(out.p_value.values[5]).all()


def test_expected_share_against_a_slow_loop(world):
    """In every draw of prompts: whose mean stays within the margin of the end, until enough checkpoints are left."""
    features = world()
    # Features 10-19 pass near the edge of the margin, so that draws disagree.
    features["mean"][3, :, 10:20] += np.linspace(0.16, 0.24, 10)
    out = run(features, runs=["sft"], n_bootstrap=60, seed=5)
    mean = features["mean"].values[:7, :, :20]
    margin = 0.2 * mean[0].std(axis=0, ddof=1)
    weights = bootstrap_weights(80, 60, seed=derive_seed(5, "stabilization_test")).astype(int)
    first, stratum = np.full((60, 20), 99), np.empty((60, 20), dtype=int)
    for draw, row in enumerate(weights):
        means = mean[:, np.repeat(np.arange(80), row)].mean(axis=1)
        away = np.abs(means - means[6])
        for k in range(20):
            c = 6
            while c > 0 and away[c - 1, k] < margin[k]:
                c -= 1
            first[draw, k] = c if c <= 5 else 99
            stratum[draw, k] = sum(away[0, k] >= edge * margin[k] for edge in (1.0, 2.5))
    for c in range(1, 7):
        settled = first <= c
        assert out.share.values[c - 1] == pytest.approx(settled.mean())
        for s, name in enumerate(("unchanged", "moderate", "large")):
            inside = stratum == s
            with np.errstate(invalid="ignore"):
                expected = np.mean((settled & inside).sum(axis=1) / inside.sum(axis=1))
            got = float(out.share_in_stratum.sel(stratum=name)[c - 1])
            assert got == pytest.approx(np.clip(expected, 0, 1), nan_ok=True)
    assert 0.05 < out.share.values[0] < 0.95
    assert out.n_in_stratum.values.tolist() == [[10, 0, 10]]
    assert np.all(out.share_low <= out.share + 1e-12)
    assert np.all(out.share_high >= out.share - 1e-12)


def test_band_is_that_of_leaving_out_groups_of_prompts(world):
    """Replicates are a first-order guess of what is left without a group: beside deleting it and drawing anew."""
    features = world()
    features["mean"][3, :, 10:20] += np.linspace(0.16, 0.24, 10)
    options = {"runs": ["sft"], "n_bootstrap": 4000, "n_min": 1}
    out = run(features, **options)
    width = float((out.share_high - out.share_low)[1])
    deleted = [
        float(run(features.isel(prompt=np.flatnonzero(np.arange(80) % 20 != g)), **options).share[1]) for g in range(20)
    ]
    error = np.sqrt(19 / 20 * np.sum((np.array(deleted) - np.mean(deleted)) ** 2))
    assert width == pytest.approx(2 * t.isf(0.025, 19) * error, rel=0.5)
    assert width > 0.02


@pytest.mark.parametrize(
    ("persist", "n_checkpoints", "settles"),
    [(0.2, 5, True), (0.29, 5, True), (0.31, 5, False), (0.5, 4, False), (0.3, 4, True)],
)
def test_persist_is_a_share_of_the_checkpoints(make_features, persist, n_checkpoints, settles):
    """A feature that arrives two checkpoints before the end; three last checkpoints of five left nothing to move."""
    base = np.random.default_rng(0).normal(5, 1, (60, 12))
    levels = [0.0] * (n_checkpoints - 2) + [1.0, 1.0]
    models = ["base@0", *(f"rl@{10 * c}" for c in range(1, n_checkpoints + 1))]
    noise = np.random.default_rng(1).normal(0, 0.1, (n_checkpoints, *base.shape))
    features = make_features(np.stack([base, *(base + x + e for x, e in zip(levels, noise, strict=True))]), models)
    out = run(features, runs=["rl"], persist=persist)
    assert np.all((out.flag.values == "STABILISED") == settles)
    assert np.all(out.share.values[-1] == (1.0 if settles else 0.0))


def test_checkpoints_left_out_count_in_what_must_persist(make_features):
    """Of ten checkpoints a feature must stay for the last three (two do not count), whether the first are described."""
    base = np.random.default_rng(0).normal(5, 1, (60, 12))
    models = ["base@0", *(f"rl@{10 * c}" for c in range(1, 11))]
    noise = np.random.default_rng(1).normal(0, 0.1, (10, *base.shape))
    levels = [0.0] * 8 + [1.0, 1.0]
    features = make_features(np.stack([base, *(base + x + e for x, e in zip(levels, noise, strict=True))]), models)
    early = models[1:4]
    whole, fewer = run(features, runs=["rl"]), run(features, runs=["rl"], left_out=early)
    assert whole.flag.values.tolist() == fewer.flag.values.tolist()
    assert np.all(fewer.flag.values != "STABILISED")
    assert set(early).isdisjoint(fewer.model.values.tolist())
    unknown = run(features.sel(model=[model for model in models if model not in early]), runs=["rl"])
    assert np.all(unknown.flag.values == "STABILISED"), "of seven checkpoints one does not count"
    with pytest.raises(InputError, match="has 1 checkpoint"):
        run(features, runs=["rl"], left_out=models[1:10])


def test_error_of_early_stabilisation_is_alpha(make_features):
    """Features that sit exactly at the margin before the last checkpoints are declared settled at most alpha often."""
    rng = np.random.default_rng(3)
    base = rng.normal(5, 1, (60, 1500))
    sd = base.std(axis=0, ddof=1)
    final = base + rng.normal(0, 0.4, base.shape)
    stack = [base]
    for c in range(6):
        x = final + rng.normal(0, 0.4, base.shape)
        if c == 1:
            # exactly delta away from the end in expectation, whatever came before
            x += 0.2 * sd
        stack.append(final if c == 5 else x)
    out = run(make_features(np.stack(stack), MODELS[:7]), runs=["sft"], persist=0.2, n_bootstrap=9)
    early = (out.stabilized_at.values[0] <= 20).mean()
    assert early <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1500)
    assert (out.stabilized_at.values[0] <= 30).mean() > 0.5


@pytest.mark.parametrize("chunk", [4, 9])
def test_lazy_and_the_same_for_any_chunking(world, chunk, no_compute):
    features = world(chunk)
    with no_compute():
        out = run(features)
    assert all(out[name].chunks is not None for name in out.data_vars)
    xr.testing.assert_allclose(out.compute(), run(world()), rtol=1e-9)


def test_every_block_is_tested_once(world, monkeypatch):
    calls = []
    module = sys.modules["rlgen_stats.toolkit.statistics.timing.stabilization"]
    block = module.stabilization_block
    monkeypatch.setattr(module, "stabilization_block", lambda *a, **k: calls.append(a[0].shape) or block(*a, **k))
    run(world(11)).compute()
    assert calls == [(7, 80, 11)] * 4  # two runs of two blocks


def test_clusters_and_relative_margin(world):
    out = run(world(per_cluster=4), clusters="cluster", relative=True, margin=0.25)
    assert out.attrs["unit"] == "cluster"
    assert out.attrs["margin_unit"] == "share of the total change"
    sft = out.isel(trained_run=0)
    assert np.mean(sft.stabilized_at.values[:10] == 20) >= 0.9


def test_errors(world):
    with pytest.raises(RefusedError, match="unit='token'"):
        run(world(), unit="token")
    with pytest.raises(InputError, match="run 'dpo' has no checkpoint"):
        run(world(), runs=["dpo"])
    with pytest.raises(InputError, match="margin=0"):
        run(world(), margin=0)
    for persist in (0, 1, 3):
        with pytest.raises(InputError, match=f"a share of the checkpoints.*persist={persist}"):
            run(world(), persist=persist)
    with pytest.raises(InputError, match="run 'sft' has 1 checkpoint"):
        run(world().sel(model=["base@0", "sft@10"]), runs=["sft"])
