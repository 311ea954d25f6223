"""The rules, on numbers chosen by hand."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from rlgen_stats.toolkit.reporting.claims.scope import smallest_p
from rlgen_stats.toolkit.reporting.claims.verdicts import (
    SetStatus,
    Verdict,
    causal_verdict,
    interval_verdict,
    mover_difference,
    p_from_interval,
    selection_verdict,
    set_status,
    timing_verdict,
)

NAN = math.nan
EARLY, LATE, EVOLVING, OPEN = (
    SetStatus.EARLY_STABLE,
    SetStatus.LATE_STABLE,
    SetStatus.EVOLVING,
    SetStatus.UNDETERMINED,
)


@pytest.mark.parametrize(
    ("low", "high", "p", "claimed", "expected"),
    [
        (0.02, 0.08, 0.001, 1, Verdict.SUPPORTED),
        (0.02, 0.08, 0.05, 1, Verdict.SUPPORTED),  # p equal to alpha counts
        (0.02, 0.08, 0.051, 1, Verdict.UNDETERMINED),  # interval says yes, test says no
        (0.02, 0.08, NAN, 1, Verdict.UNDETERMINED),
        (0.0, 0.08, 0.001, 1, Verdict.UNDETERMINED),  # touches zero
        (-0.08, -0.02, 0.001, 1, Verdict.CONTRADICTED),
        (-0.08, -0.02, 0.2, 1, Verdict.NOT_SUPPORTED),  # not shown to be negative, but the claimed effect is excluded
        (-0.02, 0.009, 0.7, 1, Verdict.NOT_SUPPORTED),
        (-0.02, 0.01, 0.7, 1, Verdict.UNDETERMINED),  # an effect of the negligible size is not excluded
        (-0.05, 0.30, 0.3, 1, Verdict.UNDETERMINED),
        (-0.08, -0.02, 0.001, -1, Verdict.SUPPORTED),
        (0.02, 0.08, 0.001, -1, Verdict.CONTRADICTED),
        (-0.009, 0.02, 0.7, -1, Verdict.NOT_SUPPORTED),
        (NAN, 0.1, 0.001, 1, Verdict.NOT_ESTIMABLE),
        (0.1, NAN, 0.001, 1, Verdict.NOT_ESTIMABLE),
    ],
)
def test_interval_verdict(low: float, high: float, p: float, claimed: int, expected: Verdict) -> None:
    assert interval_verdict(low, high, p, alpha=0.05, claimed=claimed, negligible=0.01) is expected


def test_the_level_is_the_one_given() -> None:
    assert interval_verdict(0.02, 0.08, 0.03, alpha=0.05, negligible=0.01) is Verdict.SUPPORTED
    assert interval_verdict(0.02, 0.08, 0.03, alpha=0.01, negligible=0.01) is Verdict.UNDETERMINED


def test_mover_is_the_usual_interval_for_symmetric_ends() -> None:
    difference, low, high = mover_difference((0.5, 0.2, 0.8), (0.1, -0.3, 0.5))
    assert difference == pytest.approx(0.4)
    assert (low, high) == (pytest.approx(0.4 - 0.5), pytest.approx(0.4 + 0.5))  # sqrt(.3^2 + .4^2) = .5


def test_mover_takes_the_ends_that_face_each_other() -> None:
    _, low, high = mover_difference((0.9, 0.6, 1.0), (0.2, 0.0, 0.6))
    assert low == pytest.approx(0.7 - math.hypot(0.3, 0.4))
    assert high == pytest.approx(0.7 + math.hypot(0.1, 0.2))


@pytest.mark.parametrize(("z", "alpha"), [(0.3, 0.05), (1.9, 0.05), (-3.2, 0.01)])
def test_p_from_interval_inverts_a_normal_interval(z: float, alpha: float) -> None:
    half = stats.norm.ppf(1 - alpha / 2)
    assert p_from_interval(z, z - half, z + half, alpha=alpha) == pytest.approx(2 * stats.norm.sf(abs(z)))


def test_p_from_interval_agrees_with_its_interval_when_asymmetric() -> None:
    assert p_from_interval(0.3, 0.0, 2.0, alpha=0.05) == pytest.approx(0.05)
    assert p_from_interval(0.3, 0.01, 2.0, alpha=0.05) < 0.05
    assert p_from_interval(-0.3, -2.0, 0.01, alpha=0.05) > 0.05
    assert math.isnan(p_from_interval(NAN, 0.0, 1.0, alpha=0.05))
    assert math.isnan(p_from_interval(0.3, 0.3, 0.3, alpha=0.05))
    assert p_from_interval(0.0, 0.0, 0.0, alpha=0.05) == 1.0


@pytest.mark.parametrize(
    ("verdict", "fraction", "ceiling", "expected"),
    [
        ("SET_STABLE", 0.4, 0.8, EARLY),
        ("SET_STABLE", 0.5, 0.8, EARLY),
        ("SET_STABLE", 0.6, 0.8, LATE),
        ("SET_STABLE", NAN, 0.8, OPEN),
        ("EVOLVING", NAN, 0.8, EVOLVING),
        ("UNDETERMINED", NAN, 0.8, OPEN),
        ("SET_STABLE", 0.4, 0.49, OPEN),
        ("EVOLVING", NAN, NAN, OPEN),
    ],
)
def test_set_status(verdict: str, fraction: float, ceiling: float, expected: SetStatus) -> None:
    assert set_status(verdict, fraction, ceiling) is expected


@pytest.mark.parametrize(
    ("sft", "rl", "low", "high", "expected"),
    [
        (EARLY, EVOLVING, 0.1, 0.3, Verdict.SUPPORTED),
        (EARLY, LATE, 0.1, 0.3, Verdict.SUPPORTED),
        (EARLY, EVOLVING, -0.1, 0.3, Verdict.UNDETERMINED),
        (EVOLVING, EARLY, -0.3, -0.1, Verdict.CONTRADICTED),
        (LATE, EARLY, -0.3, -0.1, Verdict.CONTRADICTED),
        (EVOLVING, EARLY, -0.3, 0.1, Verdict.UNDETERMINED),
        (EARLY, EARLY, 0.1, 0.3, Verdict.NOT_SUPPORTED),  # a difference in turnover alone is not enough
        (EVOLVING, EVOLVING, 0.1, 0.3, Verdict.NOT_SUPPORTED),
        (LATE, EVOLVING, 0.1, 0.3, Verdict.NOT_SUPPORTED),
        (OPEN, EVOLVING, 0.1, 0.3, Verdict.UNDETERMINED),
        (EARLY, OPEN, 0.1, 0.3, Verdict.UNDETERMINED),
    ],
)
def test_timing_verdict(sft: SetStatus, rl: SetStatus, low: float, high: float, expected: Verdict) -> None:
    assert timing_verdict(sft, rl, low, high) is expected


@pytest.mark.parametrize(
    ("tasks", "confirmed", "testable", "guarded", "expected"),
    [
        (4, 5, 210, True, Verdict.SUPPORTED),
        (4, 21, 210, True, Verdict.SUPPORTED),  # exactly a tenth
        (4, 22, 210, True, Verdict.NOT_SUPPORTED),  # real, not compact
        (4, 0, 210, True, Verdict.NOT_SUPPORTED),
        (1, 5, 210, True, Verdict.UNDETERMINED),  # one task is not task-agnostic
        (4, 5, 210, False, Verdict.UNDETERMINED),
        (0, 0, 210, True, Verdict.NOT_ESTIMABLE),
        (4, 0, 0, True, Verdict.NOT_ESTIMABLE),
    ],
)
def test_selection_verdict(tasks: int, confirmed: int, testable: int, guarded: bool, expected: Verdict) -> None:
    found = selection_verdict(n_estimable=tasks, n_confirmed=confirmed, n_testable=testable, guarded=guarded)
    assert found is expected


@pytest.mark.parametrize(
    ("causal", "effect", "p", "claimed", "expected"),
    [
        ("CAUSAL_SPECIFIC", -0.3, 0.001, -1, Verdict.SUPPORTED),
        ("CAUSAL_SPECIFIC", 0.3, 0.001, 1, Verdict.SUPPORTED),
        ("CAUSAL_SPECIFIC", 0.3, 0.001, -1, Verdict.CONTRADICTED),
        ("CAUSAL_SPECIFIC", -0.3, 0.2, -1, Verdict.UNDETERMINED),  # verdict and numbers disagree: neither is believed
        ("CAUSAL_NONSPECIFIC", -0.3, 0.001, -1, Verdict.NOT_SUPPORTED),
        ("DESTRUCTIVE", -0.3, 0.001, -1, Verdict.NOT_SUPPORTED),
        ("DESTRUCTIVE", 0.3, 0.001, -1, Verdict.CONTRADICTED),
        ("NO_EFFECT", -0.01, 0.9, -1, Verdict.NOT_SUPPORTED),
        ("INCONCLUSIVE", -0.3, 0.2, -1, Verdict.UNDETERMINED),
        ("SOMETHING_NEW", -0.3, 0.001, -1, Verdict.UNDETERMINED),
        ("NOT_ESTIMABLE", -0.3, 0.001, -1, Verdict.NOT_ESTIMABLE),
        ("CAUSAL_SPECIFIC", NAN, 0.001, -1, Verdict.NOT_ESTIMABLE),
    ],
)
def test_causal_verdict(causal: str, effect: float, p: float, claimed: int, expected: Verdict) -> None:
    found = causal_verdict(causal, effect, effect - 0.1, effect + 0.1, p, alpha=0.05, claimed=claimed)
    assert found is expected


@pytest.mark.parametrize(("first", "second", "expected"), [(1, 1, 1.0), (3, 3, 0.10), (4, 4, 2 / 70), (3, 4, 1 / 35)])
def test_smallest_p_of_permuted_runs(first: int, second: int, expected: float) -> None:
    assert smallest_p(first, second) == pytest.approx(expected)


def test_every_verdict_has_words_a_sign_and_a_meaning() -> None:
    assert len({v.symbol for v in Verdict}) == len({v.label for v in Verdict}) == len(Verdict) == 5
    assert all(v.meaning.endswith(".") for v in Verdict)
