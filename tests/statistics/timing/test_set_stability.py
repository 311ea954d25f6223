from __future__ import annotations

import warnings

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from scipy.stats import hypergeom

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.toolkit.statistics import set_stability
from rlgen_stats.toolkit.statistics.timing.set_stability import (
    ADDED_NOISE,
    COLUMNS,
    Scored,
    _rbo,
    _verdict,
    half_scores,
    make_design,
    top_sets,
)

STEPS = [10, 20, 30, 40]
MODELS = ["base@0", *(f"rl@{s}" for s in STEPS)]


def static(rng, n, f, size, noise=1.0):
    """The same true change at every checkpoint: sizes differ over features, noise is new each time."""
    base = 10 + rng.normal(0, 1, (n, f))
    truth = size * rng.exponential(1, f)
    return np.stack([base, *(base + truth + rng.normal(0, noise, (n, f)) for _ in STEPS)])


def run(features, **options):
    return set_stability(features, **({"runs": ["rl"], "k": 10, "n_halvings": 20, "seed": 4} | options))


def test_scores_against_a_slow_loop():
    rng = np.random.default_rng(0)
    d = rng.normal(0.2, 1, (23, 5))
    scale = rng.uniform(0.5, 2, 5)
    codes = np.repeat(np.arange(12), 2)[:23]
    design = make_design(23, codes, 2, 3, 4, seed=1)
    got = half_scores(d, scale, design)
    assert got[0] == pytest.approx(np.abs(d.mean(0)) / scale)
    row = 1
    for replicate in range(5):
        for h in range(3):
            for half in (1, 0):
                rows = (design.halves[h] == half) & (design.groups != replicate - 1)
                assert got[row] == pytest.approx(np.abs(d[rows].mean(0)) / scale)
                row += 1
    # clusters are never torn apart
    assert all(len(np.unique(design.halves[:, codes == c], axis=1).T) == 1 for c in range(12))
    assert all(len(np.unique(design.groups[codes == c])) == 1 for c in range(12))
    assert all(np.ptp(design.noise[..., codes == c], axis=-1).max() == 0 for c in range(12))


def top(scores, k=10):
    return set(np.argsort(-scores)[:k].tolist())


def shared(first, second, k=10):
    return np.mean([len(a & b) / k for a, b in zip(first, second, strict=True)])


def test_overlaps_against_python_sets(make_features):
    rng = np.random.default_rng(1)
    truth = rng.exponential(0.5, 80)
    base = 10 + rng.normal(0, 1, (60, 80))
    mean = np.stack([base, *(base + size * truth + rng.normal(0, 1, base.shape) for size in (0.3, 0.6, 0.8, 1))])
    features = make_features(mean, MODELS)
    out = validate(run(features), "set_stability")
    d = mean[1:] - mean[0]
    spread = np.sqrt((d.std(axis=1, ddof=1) ** 2).mean(axis=0))  # one scale for all checkpoints
    scale = spread + np.median(spread)
    design = make_design(60, None, 10, 20, 20, seed=4)
    halves = [[half, ~half] for half in design.halves == 1]

    def tops(means):
        """Two sets a halving, from the means of both halves [halving][half]."""
        return [[top(np.abs(x) / scale) for x in pair] for pair in means]

    def cross(one, other):
        pairs = [(a[i], b[1 - i]) for a, b in zip(one, other, strict=True) for i in (0, 1)]
        return shared(*zip(*pairs, strict=True))

    of_halves = [[[x[rows].mean(0) for rows in pair] for pair in halves] for x in d]
    sets = [tops(means) for means in of_halves]
    for c in range(4):
        both = len(top(np.abs(d[c].mean(0)) / scale) & top(np.abs(d[3].mean(0)) / scale))
        assert out.overlap.values[c] == both / 10
        assert out.overlap_p.values[c] == pytest.approx(hypergeom.sf(both - 1, 80, 10, 10))
        assert out.noise_ceiling.values[c] == pytest.approx(cross(sets[c], sets[c]))
        assert out.cross.values[c] == pytest.approx(cross(sets[c], sets[3]))
    # attainable: the last checkpoint is better determined than the first; add the first one's noise to its halves
    residuals = d[0] - d[0].mean(0)
    own, mixed = [cross(sets[3], sets[3])], [cross(sets[3], sets[3])]
    for added in ADDED_NOISE:
        noisy = [
            [means + added * design.noise[i, h] @ residuals / np.sqrt(60 * 30) for i, means in enumerate(pair)]
            for h, pair in enumerate(of_halves[3])
        ]
        own.append(cross(tops(noisy), tops(noisy)))
        mixed.append(cross(tops(noisy), sets[3]))
    own = np.minimum.accumulate(own)
    low, high = out.noise_ceiling.values[[0, 3]]
    assert low < high - 0.1
    kappa = np.interp(low, own[::-1], (np.array(mixed) / np.sqrt(own * high))[::-1])
    assert kappa < 0.99
    assert out.attainable.values[0] == pytest.approx(kappa * np.sqrt(low * high))
    assert out.chance.values == pytest.approx(10 / 80)
    assert out.delta.values == pytest.approx((out.attainable - out.cross).values)
    assert out.overlap.values[-1] == 1
    assert out.delta.values[-1] == pytest.approx(0)


@pytest.mark.parametrize("size", [0.3, *(pytest.param(size, marks=pytest.mark.slow) for size in (0.1, 1.0))])
def test_delta_is_unbiased_under_a_static_truth_and_plain_overlap_is_not(make_features, size):
    """docs/method.md 4b: E[delta] = 0 at every signal-to-noise level, the paper's overlap falls with the signal."""
    rng = np.random.default_rng(int(size * 100))
    deltas, plain = [], []
    for s in range(40):
        features = make_features(static(rng, 40, 120, size)[:3], MODELS[:3])
        out = run(features, n_groups=5, n_halvings=10, seed=s)
        deltas.append(float(out.delta[0]))
        plain.append(float(out.overlap[0]))
    assert abs(np.mean(deltas)) < 3 * np.std(deltas, ddof=1) / np.sqrt(40) + 1e-9
    ceiling = {0.1: 0.5, 0.3: 0.85, 1.0: 1.0}[size]
    assert np.mean(plain) < ceiling


@pytest.mark.parametrize(
    "sizes", [(0.25, 1.0), pytest.param((3.0, 0.3), marks=pytest.mark.slow)], ids=["growing", "shrinking"]
)
def test_delta_is_unbiased_where_only_sizes_differ(make_features, sizes):
    """One true ranking. The old rule, ceilings' arithmetic mean less the overlap, finds turnover."""
    rng = np.random.default_rng(17)
    new, old = [], []
    for s in range(40):
        base = 10 + rng.normal(0, 1, (60, 120))
        truth = 0.5 * rng.exponential(1, 120)
        stack = np.stack([base, *(base + size * truth + rng.normal(0, 0.7, base.shape) for size in sizes)])
        out = run(make_features(stack, MODELS[:3]), n_groups=2, n_halvings=10, seed=s)
        new.append(float(out.delta[0]))
        old.append(float(((out.noise_ceiling + out.final_ceiling) / 2 - out.cross)[0]))
    assert abs(np.mean(new)) <= 0.03
    assert np.mean(old) > 0.04


def test_the_papers_overlap_ranks_by_share_of_the_contribution(make_features):
    mean = np.abs(static(np.random.default_rng(2), 60, 80, 0.5))
    mean[1:, :, 5] += 3.0  # changed most, but from a base so active that its share is small
    mean[:, :, 5] += 100.0
    out = run(make_features(mean, MODELS))
    m = mean.mean(axis=1)
    sets = [top(m[c] / (m[c] + m[0])) for c in range(1, 5)]
    assert out.paper_overlap.values == pytest.approx([len(one & sets[3]) / 10 for one in sets])
    assert all(5 not in one for one in sets)


def test_planted_truth(make_features):
    rng = np.random.default_rng(3)
    base = 10 + rng.normal(0, 1, (120, 150))
    early, late = np.zeros(150), np.zeros(150)
    early[:10], late[10:20] = 2.0, 2.0
    stable = [base + 2 * early + rng.normal(0, 0.5, base.shape) for _ in STEPS]
    moving = [base + (1 - w) * 3 * early + w * 3 * late + rng.normal(0, 0.5, base.shape) for w in (0, 0.3, 0.35, 1)]
    models = [*MODELS, *(f"sft@{s}" for s in STEPS)]
    out = run(make_features(np.stack([base, *moving, *stable]), models), runs=["rl", "sft"])
    assert out.verdict.values.tolist() == ["EVOLVING", "SET_STABLE"]
    assert out.stable_from.values[1] == 10
    assert np.isnan(out.stable_from.values[0])
    assert out.overlap.values[0] < 0.2
    assert out.nogueira.values[1] > 0.9 > out.nogueira.values[0]
    assert out.rbo.values[4:].min() > 0.3


def test_too_little_signal_is_undetermined(make_features):
    rng = np.random.default_rng(4)
    out = run(make_features(static(rng, 30, 200, 0.02), MODELS))
    assert out.verdict.values.tolist() == ["UNDETERMINED"]
    assert "agree on" in str(out.reason.values[0])


def test_too_few_features_are_not_estimable(make_features):
    rng = np.random.default_rng(4)
    out = run(make_features(static(rng, 30, 8, 1.0), MODELS))
    validate(out, "set_stability")
    assert out.verdict.values.tolist() == ["UNDETERMINED"]
    assert np.isnan(out.delta).all()
    assert "8 testable features" in str(out.reason.values[0])


def test_untestable_features_are_in_no_set(make_features):
    """Features that fire on one prompt are left out, however large."""
    rng = np.random.default_rng(5)
    mean = static(rng, 40, 60, 0.5)
    more = np.concatenate([mean, 50.0 * mean[:, :, :30]], axis=2)
    firing = np.ones(more.shape)
    firing[:, 1:, 60:] = 0
    firing[1:, :, 60:] = 0
    xr.testing.assert_allclose(run(make_features(more, MODELS, firing=firing)), run(make_features(mean, MODELS)))


@pytest.mark.parametrize("chunk", [7, 13])
def test_chunks_change_nothing(make_features, chunk):
    rng = np.random.default_rng(6)
    mean = static(rng, 40, 60, 0.5)
    xr.testing.assert_allclose(run(make_features(mean, MODELS, chunk=chunk)), run(make_features(mean, MODELS)))


def test_upper_bound_covers_zero(make_features):
    """One-sided 95% bound of a delta that is truly zero lies above zero about 95% of the time."""
    rng = np.random.default_rng(7)
    above = 0
    for s in range(40):
        out = run(make_features(static(rng, 60, 100, 0.3)[:3], MODELS[:3]), n_halvings=10, n_groups=10, seed=s)
        above += float(out.delta_upper[0]) >= 0
    assert above / 40 > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 40)


def test_ties_do_not_depend_on_where_features_stand(make_features):
    """Fifteen copies of one feature compete for the last places of a set of ten; the first labels win."""
    rng = np.random.default_rng(8)
    mean = static(rng, 60, 40, 1.0)
    mean[1:, :, 20] += 4
    mean[:, :, 20:35] = mean[:, :, 20:21]
    features = make_features(mean, MODELS).assign_coords(feature=np.arange(40))
    whole = run(features, k=10)
    assert float(whole.overlap[0]) == 1  # the same ten copies everywhere
    design = make_design(60, None, 10, 5, 4, seed=1)
    for places, chunk in ((np.arange(40), 7), (rng.permutation(40), 9), (rng.permutation(40), 40)):
        values = da.from_array(mean[:2, :, places], chunks=(-1, -1, chunk))
        of_features = (places, np.ones(40, dtype=bool), np.ones(40))
        (tops,) = top_sets(Scored(values, *(da.from_array(x, chunks=chunk) for x in of_features), design), 1)
        assert tops.full.tolist() == list(range(20, 30))
        assert np.all(tops.halves == np.arange(20, 30))
    order = rng.permutation(40)
    other = features.isel(feature=order, prompt=rng.permutation(60))
    xr.testing.assert_allclose(run(other, k=10), whole, rtol=1e-12)
    chunked = other.chunk({"feature": 7}).assign_coords(other.coords)
    xr.testing.assert_allclose(run(chunked, k=10), whole, rtol=1e-12)


def test_chance_is_hypergeometric(make_features):
    out = run(make_features(static(np.random.default_rng(9), 60, 40, 1.0), MODELS), k=10)
    rng = np.random.default_rng(0)
    drawn = np.array([np.intersect1d(rng.permutation(40)[:10], np.arange(10)).size for _ in range(20000)]) / 10
    assert float(out.chance[0]) == pytest.approx(drawn.mean(), abs=0.005)
    assert float(out.chance_high[0]) == pytest.approx(np.quantile(drawn, 0.95), abs=1e-9)


def test_a_checkpoint_that_is_base_has_no_set_and_warns_of_nothing(make_features):
    mean = static(np.random.default_rng(9), 60, 40, 1.0)
    mean[1] = mean[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = run(make_features(mean, MODELS), k=10)
    assert [float(out[name][0]) for name in ("chance", "chance_high", "overlap")] == [0, 0, 0]
    assert float(out.chance[1]) == 10 / 40


@pytest.mark.parametrize("k", [10, 13])  # P(X <= 4) = .9502 of ten, P(X <= 6) = .9480 of thirteen
def test_chance_reaches_chance_high_one_time_in_twenty(make_features, k):
    out = run(make_features(static(np.random.default_rng(9), 20, 40, 1.0), MODELS), k=k)
    n_high = round(float(out.chance_high[0]) * k)
    assert hypergeom.cdf(n_high - 1, 40, k, k) < 0.95 <= hypergeom.cdf(n_high, 40, k, k)


def test_rank_biased_overlap_has_persistence_nine_tenths():
    """Webber, Moffat and Zobel 2010, eq. 32, by hand: 1, 1 and 2 of the first 1, 2 and 3 are shared."""
    agreement = {1: 1 / 1, 2: 1 / 2, 3: 2 / 3}
    by_hand = agreement[3] * 0.9**3 + (0.1 / 0.9) * sum(share * 0.9**depth for depth, share in agreement.items())
    assert _rbo(np.array([0, 1, 2, -1]), np.array([0, 2, 5])) == pytest.approx(by_hand)


@pytest.mark.parametrize(("n", "n_groups", "known"), [(7, 3, False), (8, 4, True), (39, 19, True), (60, 20, True)])
def test_eight_units_and_two_a_group_are_the_fewest_and_twenty_groups_the_most(make_features, n, n_groups, known):
    features = make_features(static(np.random.default_rng(9), n, 30, 1.0)[:3], MODELS[:3])
    out = set_stability(features, runs=["rl"], k=5, n_halvings=2, n_min=0, seed=4)
    assert out.sizes["replicate"] == n_groups
    assert bool(np.isfinite(out.delta[0])) is known


def test_tokens_are_units_only_if_allowed(make_features):
    features = make_features(static(np.random.default_rng(9), 60, 40, 1.0), MODELS)
    out = run(features, k=10, unit="token", allow_token_unit=True)
    assert (out.attrs["unit"], out.attrs["readout"]) == ("token", "swap")
    assert "rejects 32%" in out.attrs["warning"]


def test_errors(make_features):
    features = make_features(np.ones((5, 20, 30)), MODELS)
    with pytest.raises(RefusedError, match="unit='token'"):
        run(features, unit="token")
    with pytest.raises(InputError, match="k=0"):
        run(features, k=0)
    with pytest.raises(InputError, match="run 'sft' has no checkpoint"):
        run(features, runs=["sft"])
    lacking = make_features(static(np.random.default_rng(9), 60, 40, 1.0), MODELS)
    lacking["mean"][2, 7] = np.nan
    with pytest.raises(InputError, match=r"some prompts have no 'mean' .* run 'rl'; .* select the complete prompts"):
        run(lacking, k=10)


@pytest.mark.parametrize(
    ("changes", "verdict", "stable_from"),
    [
        ({}, "SET_STABLE", 20),
        ({"delta_upper": [0.3, 0.1, 0.05, 0.0]}, "SET_STABLE", 30),  # .10 is not below .10
        ({"attainable": [0.9, 0.49, 0.9, 0.9]}, "SET_STABLE", 30),
        ({"attainable": [0.9, 0.9, 0.49, 0.9]}, "UNDETERMINED", np.nan),
        ({"attainable": [0.9, 0.5, 0.5, 0.9]}, "SET_STABLE", 20),
        ({"final_ceiling": [0.49] * 4}, "UNDETERMINED", np.nan),
        ({"delta_upper": [0.3, 0.3, 0.3, 0.0], "delta_lower": [0.0, 0.0, 0.01, 0.0]}, "EVOLVING", np.nan),
        ({"delta_upper": [0.3, 0.3, 0.3, 0.0]}, "UNDETERMINED", np.nan),
    ],
)
def test_verdicts_of_one_run(changes, verdict, stable_from):
    table = {name: np.zeros(4) for name in COLUMNS} | {
        "attainable": np.full(4, 0.9),
        "final_ceiling": np.full(4, 0.5),
        "delta_upper": np.array([0.3, 0.09, 0.05, 0.0]),
    }
    got, step, _ = _verdict(table | {name: np.array(values) for name, values in changes.items()}, MODELS[1:])
    assert got == verdict
    assert step == pytest.approx(stable_from, nan_ok=True)
