"""Stabilisation beyond the chain: relative margins, evolving features, trends, arms compared at equal change."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics import stabilization_test
from rlgen_stats.toolkit.statistics.kernels import bootstrap_weights, trend_test
from rlgen_stats.toolkit.statistics.timing.stabilization import mean_time

STEPS = [10, 20, 30, 40]
EARLY, LATE = np.array([1.0, 1, 1, 1]), np.array([0.25, 0.5, 0.75, 1])


def stack(paths: list[np.ndarray], n: int, f: int, *, noise: float = 0.2, seed: int = 0) -> np.ndarray:
    """Base, then every checkpoint of every path: each feature at its share of a total change of 1 sd."""
    rng = np.random.default_rng(seed)
    base = rng.normal(5, 1, (n, f))
    return np.stack([base, *(base + level + rng.normal(0, noise, base.shape) for path in paths for level in path)])


def world(make_features, paths: dict[str, np.ndarray], n: int = 60, f: int = 12, **options) -> xr.Dataset:
    models = ["base@0", *(f"{run}@{s}" for run in paths for s in STEPS)]
    features = make_features(stack(list(paths.values()), n, f, **options), models)
    arms = np.array(["base", *(run.rstrip("0123456789") for run in paths for _ in STEPS)])
    return features.assign_coords(arm=("model", arms))


def run(features, runs, **options):
    return stabilization_test(features, **({"runs": runs, "n_bootstrap": 99, "seed": 1} | options))


def test_a_relative_margin_keeps_its_level_where_a_plugged_in_one_does_not(make_features) -> None:
    """Checkpoint 20 lies exactly half of the total change away from the end."""
    paths = {"rl": np.array([0.5, 0.5, 1.0, 1.0]) * 0.5}
    features = world(make_features, paths, n=40, f=4000, noise=0.3)
    features["mean"].values[0] += np.random.default_rng(1).normal(0, 1.2, (40, 4000))  # the total is known least
    out = run(features, ["rl"], relative=True, margin=0.5)
    band = 3 * np.sqrt(0.05 * 0.95 / 4000)
    assert (out.stabilized_at.values[0] <= 20).mean() <= 0.05 + band
    x = features["mean"].values
    d, room = x[2] - x[4], 0.5 * np.abs((x[4] - x[0]).mean(axis=0))
    naive = (room - np.abs(d.mean(axis=0))) / stats.sem(d, axis=0) > stats.t.isf(0.05, 39)
    assert naive.mean() > 0.05 + band
    assert out.attrs["margin_unit"] == "share of the total change"
    assert run(features, ["rl"], relative=True).attrs["margin"] == 0.25
    assert run(features, ["rl"]).attrs["margin"] == 0.2


def test_evolving_is_what_still_moves_near_the_end(make_features) -> None:
    out = run(world(make_features, {"sft": EARLY, "rl": LATE}), ["sft", "rl"], persist=0.5)
    assert np.all(out.flag.values[0] == "STABILISED")
    assert np.all(out.flag.values[1] == "EVOLVING")
    assert np.all(out.p_evolving.values[1] < 1e-3)
    assert np.all(out.p_evolving.values[0] > 0.5)
    moved = run(world(make_features, {"rl": np.array([0.0, 0.0, 1, 1])}), ["rl"])  # moved, but long before the end
    assert not (moved.flag == "EVOLVING").any()


def test_evolving_keeps_its_level_at_the_margin_and_excludes_stabilised(make_features) -> None:
    """Both checkpoints before the last lie at the margin itself: Holm over two."""
    rng = np.random.default_rng(3)
    n, f = 50, 4000
    base = rng.normal(5, 1, (n, f))
    end = base + 0.5
    at_margin = [end + 0.2 * base.std(axis=0, ddof=1) + rng.normal(0, 0.5, (n, f)) for _ in range(3)]
    features = make_features(np.stack([base, *at_margin, end]), ["base@0", *(f"rl@{s}" for s in STEPS)])
    out = run(features, ["rl"], persist=0.5, n_bootstrap=9)
    share = (out.flag == "EVOLVING").mean()
    assert 0.03 < share <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / f)
    p = out.p_value.values[1:3]
    assert not ((out.p_evolving.values[0] <= 0.05) & (p <= 0.05).all(axis=0)).any()


def test_evolving_is_holm_over_shifted_t_tests(make_features) -> None:
    features = world(make_features, {"rl": LATE}, noise=1.0)
    out = run(features, ["rl"], persist=0.75)
    x = features["mean"].values
    for k in range(12):
        margin, p = 0.2 * x[0, :, k].std(ddof=1), []
        for c in (1, 2, 3):
            d = (x[c, :, k] - x[4, :, k]) * np.sign((x[c, :, k] - x[4, :, k]).mean())
            p.append(sum(stats.ttest_1samp(d, side, alternative="greater").pvalue for side in (margin, -margin)))
        assert float(out.p_evolving[0, k]) == pytest.approx(min(1, 3 * min(p)))


def test_trends_are_those_of_the_kernel_corrected_over_the_run(make_features) -> None:
    features = world(make_features, {"sft": EARLY * 0, "rl": LATE}, noise=0.5)
    features["mean"][:, :, 11] = 0
    out = validate(run(features, ["sft", "rl"]), "stabilization")
    x = np.moveaxis(features["mean"].values[[0, 5, 6, 7, 8]], 0, 1)
    kernel = trend_test(x[:, :, :11])
    np.testing.assert_allclose(out.trend_tau.values[1, :11], kernel.tau)
    np.testing.assert_allclose(out.trend_p.values[1, :11], kernel.p_value)
    np.testing.assert_allclose(out.trend_q.values[1, :11], stats.false_discovery_control(kernel.p_value))
    assert np.isnan([out.trend_tau.values[:, 11], out.trend_p.values[:, 11], out.trend_q.values[:, 11]]).all()
    assert np.all(out.trend_q.values[1, :11] < 0.01)
    assert np.all(out.trend_tau.values[1, :11] > 0.3)
    assert out.trend_p.values[0, :11].min() > 0.001


def slow_time(x: np.ndarray, margin: np.ndarray) -> float:
    """Mean time to stability of all features by the definition: ``x`` [reference + checkpoints, prompt, feature]."""
    means, last = x.mean(axis=1), len(x) - 1
    settled = []
    for k in range(x.shape[2]):
        first = last
        while first > 0 and abs(means[first - 1, k] - means[last, k]) < margin[k]:
            first -= 1
        settled.append(first if first < last else np.inf)
    shares = [0.0, *((np.array(settled) <= c).mean() for c in range(1, last + 1))]
    return 1 - sum((a + b) / 2 / last for a, b in pairwise(shares))


def test_the_difference_of_arms_is_that_of_their_mean_times_on_the_same_draws(make_features) -> None:
    rng = np.random.default_rng(5)
    features = world(make_features, {"sft": EARLY, "rl": LATE}, n=40, noise=0.3)
    features["mean"].values[1:] += rng.normal(0, 0.12, (8, 1, 12))  # some are near the edge, so that draws disagree
    out = run(features, ["sft", "rl"], n_bootstrap=40, seed=7)
    x = features["mean"].values
    margin = 0.2 * x[0].std(axis=0, ddof=1)
    assert out.n_in_stratum.values.tolist() == [[0, 0, 12], [0, 0, 12]]
    assert np.isnan(out.difference_in_stratum.values[:2]).all()
    weights = bootstrap_weights(40, 40, seed=derive_seed(7, "stabilization_test")).astype(int)
    draws = []
    for row in weights:
        drawn = x[:, np.repeat(np.arange(40), row)]
        draws.append(slow_time(drawn[:5], margin) - slow_time(drawn[[0, 5, 6, 7, 8]], margin))
    assert float(out.difference_in_stratum[2]) == pytest.approx(np.mean(draws))
    assert -1 < np.mean(draws) < -0.3, "sft settles first"
    assert np.std(draws) > 0
    low, high = (float(out[f"difference_in_stratum_{end}"][2]) for end in ("low", "high"))
    assert low < np.mean(draws) < high
    assert out.attrs["comparison"].startswith("sft less rl, these two runs")


def test_a_relative_margin_is_drawn_too(make_features) -> None:
    features = world(make_features, {"rl": np.array([0.6, 0.7, 0.8, 1.0])}, n=40, noise=0.5)
    out = run(features, ["rl"], relative=True, margin=0.4, n_bootstrap=40, seed=7)
    x = features["mean"].values
    weights = bootstrap_weights(40, 40, seed=derive_seed(7, "stabilization_test")).astype(int)
    shares = []
    for row in weights:
        means = x[:, np.repeat(np.arange(40), row)].mean(axis=1)
        shares.append((np.abs(means[1:4] - means[4]) < 0.4 * np.abs(means[0] - means[4])).all(axis=0).mean())
    assert float(out.share[0]) == pytest.approx(np.mean(shares))
    assert 0.1 < np.mean(shares) < 0.9


@pytest.mark.parametrize(
    ("shares", "settled", "expected"),
    [
        ([0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 0.0, 0.0], 1.0),
        ([0.25, 0.5, 0.75, 1.0], [1.0, 1.0, 1.0, 1.0], 0.125),
        ([0.5, 1.0], [0.0, 1.0], 0.75),
        ([0.1, 1.0], [1.0, 1.0], 0.05),
    ],
)
def test_mean_time_is_the_area_over_the_curve(shares: list[float], settled: list[float], expected: float) -> None:
    assert mean_time(np.array(shares), np.array(settled)) == pytest.approx(expected)


def test_arms_are_runs_averaged_and_tested_over_runs(make_features) -> None:
    paths = {f"sft{i}": EARLY for i in range(4)} | {f"rl{i}": LATE for i in range(4)}
    features = world(make_features, paths)
    out = run(features, list(paths))
    times = mean_time(np.array(STEPS) / 40, out.share_in_stratum.values.reshape(8, 4, 3)[:, :, 2])
    expected = times[:4].mean() - times[4:].mean()
    assert float(out.difference_in_stratum[2]) == pytest.approx(expected)
    assert expected < -0.3
    assert float(out.difference_in_stratum_p[2]) == pytest.approx(2 / 70)
    assert "4 and 4 runs" in out.attrs["comparison"]
    three = run(features, list(paths)[:7])
    assert np.isnan(three.difference_in_stratum_p).all()
    assert "difference_in_stratum" not in run(features, list(paths)[:4])


def test_runs_that_lack_prompts_share_the_draws_of_the_others(make_features) -> None:
    """A run that equals another but for a lost prompt: their difference hardly moves between draws."""
    features = world(make_features, {"sft": LATE, "rl": LATE}, n=60, f=40, noise=0.6)
    x = features["mean"].values
    x[5:] = x[1:5]
    alike = run(features, ["sft", "rl"], margin=0.5)
    assert float(alike.difference_in_stratum_low[1]) == 0
    x[5:, 17] = np.nan
    lost = run(features, ["sft", "rl"], margin=0.5)
    x[5:, :] = stack([LATE], 60, 40, noise=0.6, seed=9)[1:]
    apart = run(features, ["sft", "rl"], margin=0.5)
    width, free = (float((out.difference_in_stratum_high - out.difference_in_stratum_low)[1]) for out in (lost, apart))
    assert 0 < width < 0.5 * free


def test_order_of_prompts_and_features_does_not_matter(make_features) -> None:
    features = world(make_features, {"sft": EARLY, "rl": LATE}, noise=0.6).assign_coords(feature=np.arange(12))
    whole = run(features, ["sft", "rl"])
    shuffled = features.isel(feature=slice(None, None, -1), prompt=np.random.default_rng(0).permutation(60))
    xr.testing.assert_allclose(run(shuffled, ["sft", "rl"]).sortby("feature"), whole, rtol=1e-9)


def test_tokens_are_refused_unless_allowed(make_features) -> None:
    features = world(make_features, {"rl": LATE})
    with pytest.raises(RefusedError, match="allow_token_unit=True"):
        run(features, ["rl"], unit="token")
    out = run(features, ["rl"], unit="token", allow_token_unit=True)
    assert out.attrs["unit"] == "token"
    assert "rejects 32%" in out.attrs["warning"]
    with pytest.raises(InputError, match="below 1 if relative"):
        run(features, ["rl"], relative=True, margin=1.0)
