from __future__ import annotations

import sys

import numpy as np
import pytest
import xarray as xr
from statsmodels.stats.weightstats import ttost_paired

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.toolkit.statistics import stabilization_test

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
    out = validate(run(world()), "stabilization")
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
    out = run(features, runs=["sft"], margin=0.2, persist=2)
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


def test_share_counts_features(world):
    out = run(world())
    for r in range(2):
        settled, tested = out.stabilized_at.values[r], ~np.isin(out.flag.values[r], ["UNTESTABLE", "NO_MARGIN"])
        for c, step in enumerate(STEPS):
            expected = np.sum(settled[tested] <= step) / tested.sum()
            assert out.share.values[6 * r + c] == pytest.approx(expected)
            size = np.abs(out.total_effect_sd.values[r])
            large = tested & (size >= 0.5)
            assert out.n_in_stratum.values[r, 2] == large.sum()
            assert out.share_in_stratum.values[6 * r + c, 2] == pytest.approx(np.mean(settled[large] <= step))
    assert np.all(out.share_low <= out.share + 1e-12)
    assert np.all(out.share_high >= out.share - 1e-12)


def test_bootstrap_band_against_a_slow_loop(world):
    """The band's draws redo the whole chain on resampled prompts."""
    features = world()
    # Features 10-19 end near the edge of the margin, so that draws disagree.
    features["mean"][6, :, 10:20] += np.linspace(0.12, 0.18, 10)
    out = run(features, runs=["sft"], n_bootstrap=400, seed=5)
    mean = features["mean"].values[:7, :, :20]
    margin = 0.2 * mean[0].std(axis=0, ddof=1)
    rng = np.random.default_rng(99)
    shares = []
    for _ in range(400):
        x = mean[:, rng.integers(0, 80, 80)]
        first = np.full(20, 6)
        for k in range(20):
            while first[k] > 0:
                d = x[first[k] - 1, :, k] - x[6, :, k]
                se = d.std(ddof=1) / np.sqrt(80)
                if (margin[k] - abs(d.mean())) / se < 1.6643714:  # t(.95, 79)
                    break
                first[k] -= 1
        first = np.where(first > 3, 99, first)
        shares.append([(first <= c).mean() for c in range(1, 7)])
    shares = np.array(shares)
    q = np.quantile(shares, [0.025, 0.975], axis=0) - shares.mean(axis=0)
    q = np.stack([np.minimum(q[0], 0), np.maximum(q[1], 0)])
    expected = np.clip(out.share.values + q, 0, 1)
    assert np.max(out.share_high - out.share_low) > 0.15
    assert out.share_low.values == pytest.approx(expected[0], abs=0.051)
    assert out.share_high.values == pytest.approx(expected[1], abs=0.051)


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
    out = run(make_features(np.stack(stack), MODELS[:7]), runs=["sft"], persist=1, n_bootstrap=9)
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
    with pytest.raises(InputError, match="run 'sft' has 1 checkpoint"):
        run(world().sel(model=["base@0", "sft@10"]), runs=["sft"])
