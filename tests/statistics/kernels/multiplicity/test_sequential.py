"""Early stopping: a loop over single flips, planted truth, calibration, blocks, refusals."""

import numpy as np
import pytest

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.toolkit.statistics.kernels.flips.resampling import sign_flips
from rlgen_stats.toolkit.statistics.kernels.flips.signflip import sign_flip_test
from rlgen_stats.toolkit.statistics.kernels.multiplicity import sequential as module
from rlgen_stats.toolkit.statistics.kernels.multiplicity.sequential import besag_clifford, sequential_flip_test


def one_by_one(d: np.ndarray, h: int, most: int, seed: int) -> tuple[float, int, int]:
    """The rule of Besag and Clifford for one feature: draw a flip, compare, stop at the h-th that reaches."""
    reached = 0
    for draw, signs in enumerate(sign_flips(len(d), 0, most, seed=seed), start=1):
        reached += abs(float(signs @ d)) >= abs(d.sum()) - 1e-9 * np.abs(d).sum()
        if reached == h:
            return h / draw, draw, reached
    return (reached + 1) / (most + 1), most, reached


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_every_feature_stops_where_a_loop_stops(alternative: str) -> None:
    random = np.random.default_rng(1)
    d = random.normal(size=(25, 30)) + np.linspace(0, 1, 30)
    d[:, 3] = 0
    d[:, 4] = np.nan
    found = sequential_flip_test(d, max_resamples=700, exceedances=7, seed=2, alternative=alternative)
    for k in set(range(30)) - {3, 4}:
        if alternative == "two-sided":
            p, drawn, reached = one_by_one(d[:, k], 7, 700, seed=2)
            assert (found.p_value[k], found.n_resamples[k], found.n_exceeded[k]) == (p, drawn, reached)
        assert found.stopped[k] == (found.n_exceeded[k] == 7)
    assert np.isnan(found.p_value[3:5]).all()
    assert not found.n_resamples[3:5].any()
    assert not found.stopped[3:5].any()
    turned = sequential_flip_test(-d, max_resamples=700, exceedances=7, seed=2, alternative=alternative)
    if alternative == "two-sided":
        np.testing.assert_array_equal(turned.p_value, found.p_value)


def test_the_p_value_is_that_of_all_flips_within_its_error() -> None:
    d = np.random.default_rng(3).normal(size=(60, 40))
    full = sign_flip_test(d, method="saddlepoint").p_value
    found = sequential_flip_test(d, exceedances=100, seed=4)
    assert (np.abs(np.log(found.p_value / full)) < 4 / np.sqrt(100)).all()
    planted = sequential_flip_test(d + 1, exceedances=10, max_resamples=999)
    assert (planted.p_value == 1 / 1000).all()
    assert not planted.stopped.any()


def test_null_p_values_are_valid_and_cheap() -> None:
    """P(p <= a) is a at the attainable levels; stopping at the first extreme count without the rule is not."""
    d = np.random.default_rng(5).standard_normal((40, 4000))
    found = sequential_flip_test(d, max_resamples=499, exceedances=5, seed=6)
    for level in (0.01, 0.05, 0.2):
        rate = (found.p_value <= level).mean()
        assert rate <= level + 3 * np.sqrt(level * (1 - level) / 4000)
    assert (found.p_value <= 0.2).mean() >= 0.2 - 3 * np.sqrt(0.16 / 4000)
    assert found.n_resamples.mean() < 499 / 10
    sums = np.abs(sign_flips(40, 0, 499, seed=6) @ d)
    running = np.cumsum(sums >= np.abs(d.sum(axis=0)), axis=0)
    naive = ((running + 1) / (np.arange(499)[:, None] + 2)).min(axis=0)  # stop when it looks best
    assert (naive <= 0.05).mean() > 0.08


def test_neither_blocks_nor_order_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    d = np.random.default_rng(7).normal(size=(20, 50)) + 0.2
    whole = sequential_flip_test(d, max_resamples=300, exceedances=4, seed=8)
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 20 * 7)
    monkeypatch.setattr(module, "FIRST_DRAWS", 5)
    for name in ("p_value", "n_resamples", "n_exceeded", "stopped"):
        parts = getattr(sequential_flip_test(d, max_resamples=300, exceedances=4, seed=8), name)
        np.testing.assert_array_equal(parts, getattr(whole, name))
        back = getattr(sequential_flip_test(d[:, ::-1], max_resamples=300, exceedances=4, seed=8), name)
        np.testing.assert_array_equal(back[::-1], getattr(whole, name))
    alone = sequential_flip_test(d[:, 11], max_resamples=300, exceedances=4, seed=8)
    assert (alone.p_value, alone.n_resamples) == (whole.p_value[11], whole.n_resamples[11])


def test_clusters_flip_as_wholes() -> None:
    d = np.random.default_rng(9).normal(size=(24, 6))
    clusters = np.repeat(np.arange(8), 3)
    found = sequential_flip_test(d, clusters=clusters, max_resamples=200, exceedances=5)
    same = sequential_flip_test(d.reshape(8, 3, 6).sum(axis=1), max_resamples=200, exceedances=5)
    np.testing.assert_array_equal(found.p_value, same.p_value)
    with pytest.raises(RefusedError, match="at least 6, got 4"):
        sequential_flip_test(d, clusters=np.repeat(np.arange(4), 6))


def test_counts_decide_or_wait() -> None:
    p = besag_clifford([10, 3, 3], [40, 9999, 500])
    np.testing.assert_array_equal(p, [0.25, 4 / 10000, np.nan])
    assert besag_clifford(0, 99, exceedances=1, max_resamples=99) == 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: sequential_flip_test(d, exceedances=0), "1 <= exceedances <= max_resamples"),
        (lambda d: sequential_flip_test(d, max_resamples=5), "1 <= exceedances <= max_resamples"),
        (lambda d: sequential_flip_test(d, alternative="both"), "two-sided, greater or less, got 'both'"),
        (lambda d: sequential_flip_test(np.where(d > 1, np.inf, d)), "differences must be finite"),
        (lambda d: besag_clifford(11, 40), "the test ends at exceedance 10, got 11"),
        (lambda d: besag_clifford(5, 4), "exceeded <= drawn"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(np.random.default_rng(0).normal(size=(30, 5)))
