"""E-values: the product in loops, mean one over every flip, Ville's inequality, e-BH, order, refusals."""

import math

import numpy as np
import pytest

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.toolkit.statistics.kernels.flips import resampling
from rlgen_stats.toolkit.statistics.kernels.flips.resampling import all_flips
from rlgen_stats.toolkit.statistics.kernels.multiplicity.evalues import anytime_p, e_bh, flip_e_value

SIDES = ("two-sided", "greater", "less")


def product(d: list[float], turn: int) -> list[float]:
    """Wealth after every unit of one who bets on ``turn``, from the definition."""
    wealth, path = 1.0, []
    for i, x in enumerate(d):
        squares = sum(y * y for y in d[:i])
        stake = max(0.0, turn * sum(d[:i]) / squares) if squares else 0.0
        largest = max(abs(y) for y in d[: i + 1])
        stake = turn * min(stake, 1 / largest) if largest else 0.0
        wealth *= math.exp(stake * x) / math.cosh(stake * x)
        path.append(wealth)
    return path


def test_paths_equal_the_definition() -> None:
    d = np.random.default_rng(1).normal(size=(20, 4)) + np.array([0, 0.5, -0.5, 2])
    d[:2, 0] = 0
    up, down = (np.array([product(column.tolist(), turn) for column in d.T]).T for turn in (1, -1))
    for side, expected in zip(SIDES, ((up + down) / 2, up, down), strict=True):
        path = flip_e_value(d, alternative=side, running=True)
        np.testing.assert_allclose(path, expected, rtol=1e-10)
        np.testing.assert_allclose(flip_e_value(d, alternative=side), expected[-1], rtol=1e-10)
        np.testing.assert_allclose(flip_e_value(d[:, 1], alternative=side), expected[-1, 1], rtol=1e-10)


@pytest.mark.parametrize("side", SIDES)
def test_the_mean_over_every_flip_is_one_at_every_unit(side: str) -> None:
    """What makes it an e-value, whatever the magnitudes: enumerated, not simulated."""
    magnitudes = np.random.default_rng(2).gamma(0.5, size=11)
    path = flip_e_value(all_flips(11).T * magnitudes[:, None], alternative=side, running=True)
    np.testing.assert_allclose(path.mean(axis=1), 1.0, rtol=1e-12)


def test_looking_after_every_unit_keeps_the_level_where_a_repeated_test_does_not() -> None:
    d = np.random.default_rng(3).standard_t(3, size=(150, 3000))
    assert (anytime_p(flip_e_value(d, running=True))[-1] <= 0.05).mean() <= 0.05
    z = np.abs(np.cumsum(d, axis=0)) / np.sqrt(np.cumsum(d**2, axis=0))
    assert (z[10:].max(axis=0) >= 1.96).mean() > 0.2
    planted = flip_e_value(np.random.default_rng(4).normal(0.4, 1, (150, 400)))
    assert (planted >= 20).mean() > 0.9


def test_ebh_is_the_definition_and_controls_dependent_families() -> None:
    random = np.random.default_rng(5)
    e = random.gamma(0.3, 400, size=60)
    ordered = sorted(e)[::-1]
    most = max([k for k in range(1, 61) if ordered[k - 1] >= 60 / (0.1 * k)], default=0)
    found = e_bh(e, alpha=0.1)
    assert found.sum() == most > 0
    assert found[np.argsort(e)[::-1][:most]].all()
    with_missing = e_bh(np.append(e, [np.nan] * 40), alpha=0.1)
    np.testing.assert_array_equal(with_missing, np.append(found, [False] * 40))
    assert not e_bh(np.full(5, 1.0), alpha=0.5).any()
    shares = []
    for _ in range(150):
        common = random.normal(size=(100, 1))  # all features share a factor
        d = (random.normal(size=(100, 40)) + 2 * common) / np.sqrt(5)
        d[:, :8] += 0.7
        rejected = e_bh(flip_e_value(d), alpha=0.1)
        shares.append(rejected[8:].sum() / max(1, rejected.sum()))
    assert np.mean(shares) <= 0.1


def test_neither_blocks_nor_feature_order_matter_but_unit_order_may(monkeypatch: pytest.MonkeyPatch) -> None:
    d = np.random.default_rng(6).normal(0.2, 1, (30, 200))
    whole = flip_e_value(d)
    np.testing.assert_array_equal(flip_e_value(d[:, ::-1])[::-1], whole)
    monkeypatch.setattr(resampling, "BLOCK_UNITS", 30 * 70)
    np.testing.assert_array_equal(flip_e_value(d), whole)
    assert (flip_e_value(d[::-1]) != whole).all()  # a martingale in the order given


def test_clusters_are_bet_on_as_wholes() -> None:
    d = np.random.default_rng(7).normal(size=(24, 3))
    d[:, 2] = 0
    names = np.repeat(list("zyxwvutsr"[:8]), 3)  # sorted order is not the order they came
    found = flip_e_value(d, clusters=names)
    np.testing.assert_allclose(found[:2], flip_e_value(d.reshape(8, 3, 3).sum(axis=1))[:2], rtol=1e-12)
    assert np.isnan(found[2])
    with pytest.raises(RefusedError, match="at least 6, got 4"):
        flip_e_value(d, clusters=np.repeat(np.arange(4), 6))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flip_e_value([1.0, np.nan]), "must be finite"),
        (lambda: flip_e_value([1.0, 2.0], alternative="up"), "two-sided, greater or less, got 'up'"),
        (lambda: e_bh([1.0, -2.0], alpha=0.1), "not negative, got -2.0; pass e-values, not their logs"),
        (lambda: e_bh([1.0], alpha=1), "between 0 and 1, got 1"),
        (lambda: anytime_p(3.0), "expected running e-values"),
        (lambda: anytime_p([-1.0]), "not negative"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_anytime_p_never_rises() -> None:
    p = anytime_p([[0.5, np.nan], [4.0, np.nan], [2.0, np.nan], [np.inf, np.nan]])
    np.testing.assert_array_equal(p[:3, 0], [1, 0.25, 0.25])
    assert 0 < p[3, 0] < 1e-300
    assert np.isnan(p[:, 1]).all()
