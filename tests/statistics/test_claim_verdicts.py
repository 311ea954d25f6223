"""The rules, on numbers chosen by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlgen_stats.toolkit.statistics.causal.findings import Decision
from rlgen_stats.toolkit.statistics.claim_verdicts import (
    BELOW_NULL,
    DICTIONARIES_DISAGREE,
    NO_NULL,
    NOT_COMPARABLE,
    Difference,
    Verdict,
    any_feature_p,
    causal_verdict,
    difference_verdict,
    interval_verdict,
    mean_count,
    mostly_token_detectors,
    selection_verdict,
    smallest_permutation_p,
    smallest_rank_p,
    specificity_verdict,
    timing_verdict,
    verdicts_agree,
    within_minimum,
)

NAN = math.nan


@pytest.mark.parametrize(
    ("low", "high", "p", "claimed", "expected"),
    [
        (0.02, 0.08, 0.001, 1, Verdict.SUPPORTED),
        (0.02, 0.08, 0.05, 1, Verdict.SUPPORTED),  # p equal to alpha counts
        (0.02, 0.08, 0.051, 1, Verdict.UNDETERMINED),  # interval says yes, test says no
        (0.02, 0.08, NAN, 1, Verdict.UNDETERMINED),
        (0.01, 0.08, 0.001, 1, Verdict.UNDETERMINED),  # touches the negligible
        (0.0101, 0.08, 0.001, 1, Verdict.SUPPORTED),
        (0.0002, 0.0008, 0.001, 1, Verdict.NOT_SUPPORTED),  # certain, and too small to matter
        (-0.0008, -0.0002, 0.001, 1, Verdict.NOT_SUPPORTED),  # not the opposite either
        (-0.08, -0.01, 0.001, 1, Verdict.NOT_SUPPORTED),
        (-0.08, -0.0101, 0.001, 1, Verdict.CONTRADICTED),
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


SHARES = (0.13, 0.03, 0.01)


@pytest.mark.parametrize(
    ("effect", "p", "shares", "comparable", "expected", "guards"),
    [
        (0.10, 0.001, SHARES, True, Verdict.SUPPORTED, ()),
        (-0.10, 0.001, (0.03, 0.13, 0.01), True, Verdict.CONTRADICTED, ()),
        (0.10, 0.001, (0.13, 0.03, 0.13), True, Verdict.UNDETERMINED, (BELOW_NULL,)),  # equal to the null is not above
        (-0.10, 0.001, (0.03, 0.13, 0.2), True, Verdict.UNDETERMINED, (BELOW_NULL,)),
        (0.10, 0.001, (0.13, 0.03, NAN), True, Verdict.UNDETERMINED, (NO_NULL,)),  # nothing to exceed
        (0.10, 0.001, (0.13, 0.005, 0.01), True, Verdict.SUPPORTED, ()),  # only the larger share need exceed the null
        (-0.10, 0.001, (0.005, 0.13, 0.01), True, Verdict.CONTRADICTED, ()),
        (0.10, 0.001, SHARES, False, Verdict.UNDETERMINED, (NOT_COMPARABLE,)),
        (0.10, 0.001, (0.13, 0.03, 0.2), False, Verdict.UNDETERMINED, (NOT_COMPARABLE, BELOW_NULL)),
        (-0.06, 0.9, (0.0, 0.0, NAN), True, Verdict.NOT_SUPPORTED, ()),
        (-0.06, 0.9, (0.0, 0.0, 0.2), True, Verdict.NOT_SUPPORTED, ()),  # the null matters only to a difference
        (NAN, 0.001, SHARES, True, Verdict.NOT_ESTIMABLE, ()),
    ],
)
def test_specificity_verdict(
    effect: float,
    p: float,
    shares: tuple[float, float, float],
    comparable: bool,
    expected: Verdict,
    guards: tuple[str, ...],
) -> None:
    interval = (effect, -0.05 + (0.1 if effect > 0 else -0.1), 0.05 + (0.1 if effect > 0 else -0.1))
    assert specificity_verdict(interval, p, shares, alpha=0.05, comparable=comparable) == (expected, guards)


@pytest.mark.parametrize(
    ("high", "expected"), [(0.0099, Verdict.NOT_SUPPORTED), (0.01, Verdict.UNDETERMINED), (0.015, Verdict.UNDETERMINED)]
)
def test_one_alive_feature_in_a_hundred_more_is_not_more(high: float, expected: Verdict) -> None:
    verdict = specificity_verdict((0.0, -0.01, high), 0.9, (0.1, 0.1, 0.01), alpha=0.05, comparable=True)
    assert verdict == (expected, ())


@pytest.mark.parametrize(
    ("effect", "each", "beside", "guards"),
    [
        (0.10, (0.2, 0.09, 0.001), {"ranks": (-0.2, 0.0)}, ()),  # 0 is not the opposite
        (0.10, (0.2, 0.09, 0.001), {"ranks": (-0.2, -0.001)}, ("ranks",)),
        (0.10, (0.2, 0.09, -0.001), {}, (DICTIONARIES_DISAGREE,)),
        (0.10, (0.2, 0.2, 0.2, 0.2, -0.1), {}, ()),  # four of five are enough
        (-0.10, (-0.2, -0.1), {"ranks": (0.0, 0.2)}, ()),
        (-0.10, (-0.2, 0.1), {"ranks": (0.001, 0.2)}, (DICTIONARIES_DISAGREE, "ranks")),
    ],
)
def test_a_direction_needs_all_dictionaries_and_no_measure_against_it(
    effect: float, each: tuple[float, ...], beside: dict[str, tuple[float, float]], guards: tuple[str, ...]
) -> None:
    shares = (0.13, 0.03, 0.0) if effect > 0 else (0.03, 0.13, 0.0)
    interval = (effect, effect - 0.05, effect + 0.05)
    verdict, failed = specificity_verdict(
        interval, 0.001, shares, alpha=0.05, comparable=True, each=each, beside=beside
    )
    assert failed == guards
    directed = Verdict.SUPPORTED if effect > 0 else Verdict.CONTRADICTED
    assert verdict is (Verdict.UNDETERMINED if guards else directed)


def difference(low: float, high: float, p: float, *each: float) -> Difference:
    return Difference(low=low, high=high, p_value=p, each=each or (low + high,))


LATER, EARLIER = difference(0.06, 0.12, 0.001), difference(-0.12, -0.06, 0.001)
MORE, FEWER = difference(0.03, 0.07, 0.01), difference(-0.07, -0.03, 0.01)
SAME_TIME, SAME_SET = difference(-0.04, 0.03, 0.8), difference(-0.015, 0.01, 0.8)
WIDE, NOTHING = difference(-0.2, 0.3, 0.7), difference(NAN, NAN, NAN)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (LATER, Verdict.SUPPORTED),
        (EARLIER, Verdict.CONTRADICTED),
        (difference(0.06, 0.12, 0.05), Verdict.SUPPORTED),
        (difference(0.06, 0.12, 0.051), Verdict.UNDETERMINED),
        (difference(0.06, 0.12, NAN), Verdict.UNDETERMINED),
        (difference(0.06, 0.12, 0.001, 0.05, 0.06, -0.01), Verdict.UNDETERMINED),  # a dictionary says the opposite
        (difference(0.06, 0.12, 0.001, 0.05, 0.06, 0.05, 0.06, -0.01), Verdict.SUPPORTED),
        (difference(0.0501, 0.12, 0.001), Verdict.SUPPORTED),
        (difference(0.05, 0.12, 0.001), Verdict.UNDETERMINED),  # perhaps too small to matter
        (difference(-0.12, -0.0501, 0.001), Verdict.CONTRADICTED),
        (difference(-0.12, -0.05, 0.001), Verdict.UNDETERMINED),
        (difference(-0.0499, 0.0499, 0.9), Verdict.NOT_SUPPORTED),
        (difference(-0.0499, 0.05, 0.9), Verdict.UNDETERMINED),
        (difference(-0.05, 0.0499, 0.9), Verdict.UNDETERMINED),
        (difference(0.01, 0.0499, 0.001), Verdict.NOT_SUPPORTED),  # significant, and shown to be small
        (difference(0.01, 0.05, 0.001), Verdict.UNDETERMINED),  # it was SUPPORTED, which more prompts turned
        (NOTHING, Verdict.NOT_ESTIMABLE),
    ],
)
def test_a_difference_counts_as_none_only_if_shown_to_be_small(given: Difference, expected: Verdict) -> None:
    assert difference_verdict(given, alpha=0.05, negligible=0.05) is expected


@pytest.mark.parametrize(
    ("time", "turnover", "expected"),
    [
        (LATER, MORE, Verdict.SUPPORTED),
        (EARLIER, FEWER, Verdict.CONTRADICTED),
        (SAME_TIME, SAME_SET, Verdict.NOT_SUPPORTED),
        (LATER, SAME_SET, Verdict.UNDETERMINED),  # conflicts
        (SAME_TIME, MORE, Verdict.UNDETERMINED),
        (LATER, FEWER, Verdict.UNDETERMINED),
        (LATER, WIDE, Verdict.UNDETERMINED),  # one of two is not both
        (WIDE, MORE, Verdict.UNDETERMINED),
        (SAME_TIME, WIDE, Verdict.UNDETERMINED),
        (WIDE, WIDE, Verdict.UNDETERMINED),
        (LATER, NOTHING, Verdict.UNDETERMINED),
        (NOTHING, MORE, Verdict.NOT_ESTIMABLE),
        (LATER, difference(0.0201, 0.05, 0.05), Verdict.SUPPORTED),
        (LATER, difference(0.02, 0.05, 0.05), Verdict.UNDETERMINED),
        (LATER, difference(0.0201, 0.05, 0.051), Verdict.UNDETERMINED),
        (difference(-0.001, 0.09, 0.06), MORE, Verdict.UNDETERMINED),
        (difference(-0.049, 0.049, 0.9), difference(-0.019, 0.019, 0.9), Verdict.NOT_SUPPORTED),
        (difference(-0.051, 0.049, 0.9), difference(-0.019, 0.019, 0.9), Verdict.UNDETERMINED),
        (difference(-0.049, 0.049, 0.9), difference(-0.019, 0.021, 0.9), Verdict.UNDETERMINED),
    ],
)
def test_timing_needs_both_differences(time: Difference, turnover: Difference, expected: Verdict) -> None:
    assert timing_verdict(time, turnover, alpha=0.05)[0] is expected


@pytest.mark.parametrize(
    ("strata", "expected"),
    [
        ([LATER, LATER], Verdict.SUPPORTED),
        ([LATER, WIDE], Verdict.SUPPORTED),  # a stratum need not show it alone
        ([LATER, SAME_TIME], Verdict.SUPPORTED),
        ([LATER, EARLIER], Verdict.UNDETERMINED),  # their mean is that of neither
        ([WIDE, EARLIER], Verdict.UNDETERMINED),
        ([LATER, difference(-0.12, -0.05, 0.001)], Verdict.SUPPORTED),  # the opposite, but perhaps negligible
        ([LATER, difference(-0.12, -0.0501, 0.05)], Verdict.UNDETERMINED),
        ([LATER, difference(-0.12, -0.0501, 0.051)], Verdict.SUPPORTED),
    ],
)
def test_a_stratum_that_shows_the_opposite_leaves_the_time_open(strata: list[Difference], expected: Verdict) -> None:
    assert timing_verdict(LATER, MORE, alpha=0.05, strata=strata)[:2] == (expected, expected)


@pytest.mark.parametrize(
    ("strata", "expected"),
    [
        ([LATER, EARLIER], Verdict.UNDETERMINED),  # it was "do not differ"
        ([WIDE, LATER, EARLIER], Verdict.UNDETERMINED),
        ([WIDE, EARLIER], Verdict.UNDETERMINED),  # the mean is within .05, those that changed as far are not
        ([WIDE, LATER], Verdict.UNDETERMINED),
        ([WIDE, SAME_TIME], Verdict.NOT_SUPPORTED),
        ([WIDE, difference(0.05, 0.12, 0.001)], Verdict.NOT_SUPPORTED),
    ],
)
def test_opposite_strata_are_not_no_difference(strata: list[Difference], expected: Verdict) -> None:
    assert timing_verdict(SAME_TIME, SAME_SET, alpha=0.05, strata=strata)[0] is expected


def test_mostly_token_detectors_is_more_than_half_in_as_many_dictionaries_as_must_agree() -> None:
    assert mostly_token_detectors([3], [5])
    assert not mostly_token_detectors([2], [4])
    assert not mostly_token_detectors([5, 5, 2], [5, 5, 5])
    assert mostly_token_detectors([5, 5, 5, 5, 2], [5] * 5)
    assert not mostly_token_detectors([], [])
    assert not mostly_token_detectors([0], [0])


def test_the_number_of_features_of_one_dictionary_has_no_upper_bound_and_of_two_has_one() -> None:
    assert mean_count([7], alpha=0.05)[:2] == (7.0, 7.0)
    for counts, low in (([7], 7.0), ([4, 4, 4], 4.0), ([0], NAN), ([0, 0, 0], NAN)):
        mean, *ends = mean_count(counts, alpha=0.05)
        assert mean == counts[0]
        np.testing.assert_equal(ends, [low, NAN], err_msg="dictionaries that do not differ tell no upper end")
    mean, low, high = mean_count([4, 8], alpha=0.05)
    assert (mean, low) == (6.0, 0.0), "no fewer than none"
    assert 8 < high < math.inf


def test_dictionaries_agree_on_undetermined_too() -> None:
    yes, open_ = Verdict.SUPPORTED, Verdict.UNDETERMINED
    assert [verdicts_agree(each) for each in ([yes], [open_] * 3, [yes, yes, open_], [yes] * 4 + [open_])] == [
        *(True, True, False, True)
    ]


TRUE_SET = {
    "n_estimable": 4,
    "n_confirming": 4,
    "n_confirmed": 5,
    "carried_low": 0.6,
    "best_high": 0.9,
    "no_rise_p": 1.0,
    "accompanying_p": 0.01,
    "alpha": 0.05,
}


@pytest.mark.parametrize(
    ("changed", "expected", "because"),
    [
        ({}, Verdict.SUPPORTED, "compact"),
        ({"n_confirmed": 900}, Verdict.SUPPORTED, "compact"),  # more power is no evidence against a compact set
        ({"carried_low": 0.5}, Verdict.SUPPORTED, "compact"),
        ({"carried_low": 0.4999}, Verdict.UNDETERMINED, "share_open"),
        ({"carried_low": 0.1, "best_high": 0.5}, Verdict.UNDETERMINED, "share_open"),
        ({"carried_low": 0.1, "best_high": 0.4999}, Verdict.NOT_SUPPORTED, "spread_out"),
        ({"carried_low": NAN, "best_high": NAN}, Verdict.UNDETERMINED, "share_unknown"),
        # absence of evidence
        ({"n_confirmed": 0, "carried_low": 0.1, "best_high": 0.2}, Verdict.UNDETERMINED, "none_confirmed"),
        ({"n_confirmed": 0, "no_rise_p": 0.05}, Verdict.NOT_SUPPORTED, "no_rise"),
        ({"n_confirmed": 0, "no_rise_p": 0.051}, Verdict.UNDETERMINED, "none_confirmed"),
        ({"no_rise_p": 0.05}, Verdict.NOT_SUPPORTED, "no_rise"),  # confirmed, and too small to matter
        ({"is_compact": False}, Verdict.UNDETERMINED, "too_many"),
        ({"is_compact": False, "best_high": 0.4}, Verdict.NOT_SUPPORTED, "spread_out"),
        ({"beyond_random_low": 1e-9}, Verdict.SUPPORTED, "compact"),
        ({"beyond_random_low": 0.0}, Verdict.UNDETERMINED, "like_random"),
        ({"beyond_random_low": NAN}, Verdict.UNDETERMINED, "like_random"),  # no random set is comparable
        ({"accompanying_p": 0.05}, Verdict.SUPPORTED, "compact"),
        ({"accompanying_p": 0.051}, Verdict.UNDETERMINED, "accompanying"),
        ({"accompanying_p": NAN}, Verdict.SUPPORTED, "compact"),  # each feature passed the contrast with losses
        ({"n_estimable": 2}, Verdict.SUPPORTED, "compact"),  # two tasks are the fewest that say something
        ({"n_estimable": 1}, Verdict.UNDETERMINED, "few_tasks"),  # one task is not task-agnostic
        ({"n_estimable": 0}, Verdict.NOT_ESTIMABLE, "no_task"),
        ({"n_confirming": 2}, Verdict.SUPPORTED, "compact"),
        ({"n_confirming": 1}, Verdict.UNDETERMINED, "few_confirming"),  # chosen by four tasks, confirmed in one
        ({"n_confirming": 0, "n_confirmed": 0}, Verdict.UNDETERMINED, "few_confirming"),
        ({"n_confirming": 0, "no_rise_p": 0.05}, Verdict.NOT_SUPPORTED, "no_rise"),  # which both halves show
    ],
)
def test_selection_verdict(changed: dict[str, float], expected: Verdict, because: str) -> None:
    verdict, reason = selection_verdict(**TRUE_SET | changed)  # type: ignore[arg-type]
    assert (verdict, reason.value) == (expected, because)


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
        ("NO_EFFECT", 0.13, 0.001, -1, Verdict.NOT_SUPPORTED),  # the opposite, and within a wide margin
        ("INCONCLUSIVE", 0.3, 0.001, -1, Verdict.CONTRADICTED),
        ("INCONCLUSIVE", -0.3, 0.2, -1, Verdict.UNDETERMINED),
        ("SOMETHING_NEW", -0.3, 0.001, -1, Verdict.UNDETERMINED),
        ("NOT_ESTIMABLE", -0.3, 0.001, -1, Verdict.NOT_ESTIMABLE),
        ("CAUSAL_SPECIFIC", NAN, 0.001, -1, Verdict.NOT_ESTIMABLE),
    ],
)
def test_causal_verdict(causal: str, effect: float, p: float, claimed: int, expected: Verdict) -> None:
    verdict = causal_verdict(causal, effect, effect - 0.1, effect + 0.1, p, alpha=0.05, claimed=claimed)
    assert verdict is expected


@pytest.mark.parametrize(
    ("decision", "each", "expected"),
    [
        (Decision.V1_FAILED, [0.3, 0.4, 0.2], Verdict.CONTRADICTED),
        (Decision.V1_FAILED, [0.6, 0.4, -0.1], Verdict.UNDETERMINED),  # one of three says otherwise
        (Decision.V1_FAILED, [0.5] * 8 + [-0.1] * 2, Verdict.CONTRADICTED),
        (Decision.V1_FAILED, [0.5] * 7 + [-0.1] * 3, Verdict.UNDETERMINED),
        (Decision.PASSTHROUGH_NOT_NOOP, [0.3, 0.4, 0.2], Verdict.UNDETERMINED),
        (Decision.V5_DICTIONARIES, [0.3, 0.4], Verdict.UNDETERMINED),
    ],
)
def test_the_opposite_needs_a_trial_that_works_and_dictionaries_that_agree(
    decision: str, each: list[float], expected: Verdict
) -> None:
    found = causal_verdict("INCONCLUSIVE", 0.3, 0.2, 0.4, 0.001, alpha=0.05, claimed=-1, decision=decision, each=each)
    assert found is expected


@pytest.mark.parametrize(("first", "second", "expected"), [(1, 1, 1.0), (3, 3, 0.10), (4, 4, 2 / 70), (3, 4, 1 / 35)])
def test_smallest_p_of_permuted_runs(first: int, second: int, expected: float) -> None:
    assert smallest_permutation_p(first, second) == pytest.approx(expected)


def test_smallest_p_of_a_rank_among_random_sets() -> None:
    assert [smallest_rank_p(n) for n in (0, 1, 19)] == [1.0, 0.5, 0.05]


def test_any_feature_has_the_smallest_adjusted_p() -> None:
    assert any_feature_p([0.2, NAN, 0.03]) == 0.03
    assert math.isnan(any_feature_p([NAN, NAN]))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.01, 0.3, True), (0.02, 0.3, True), (0.03, 0.3, False), (-0.3, -0.01, True), (-0.01, 0.3, False)],
)
def test_within_minimum_is_for_intervals_off_zero(low: float, high: float, expected: bool) -> None:
    assert within_minimum(low, high) is expected


@pytest.mark.parametrize(
    ("low", "high", "claimed", "expected"),
    [
        (0.0201, 0.2, 1, Verdict.SUPPORTED),
        (0.02, 0.2, 1, Verdict.UNDETERMINED),  # V1 asks for more than .02, and so does the claim
        (-0.2, -0.0201, 1, Verdict.CONTRADICTED),
        (-0.2, -0.02, 1, Verdict.UNDETERMINED),
        (-0.2, -0.0201, -1, Verdict.SUPPORTED),
    ],
)
def test_a_causal_claim_needs_the_minimum_effect(low: float, high: float, claimed: int, expected: Verdict) -> None:
    verdict = causal_verdict("CAUSAL_SPECIFIC", (low + high) / 2, low, high, 0.001, alpha=0.05, claimed=claimed)
    assert verdict is expected
