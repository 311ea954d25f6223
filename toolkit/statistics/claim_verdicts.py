"""The rules that turn estimates, intervals and p-values into the verdict on one of the paper's five claims.

Every rule is a pure function of numbers and the study's alpha, so that a reader can redo each verdict by hand. The
report prints them in words as its glossary and decides nothing itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any, Final

import numpy as np

from rlgen_stats.toolkit.statistics.causal.criteria import MIN_EFFECT
from rlgen_stats.toolkit.statistics.kernels import agreed, dictionaries_needed, pooled_intervals, same_direction
from rlgen_stats.toolkit.statistics.selection.compactness import CARRIED
from rlgen_stats.toolkit.statistics.specificity.arm_contrast import MATCHED_SHIFT_RATIO
from rlgen_stats.toolkit.statistics.timing.run_contrast import SetStatus


class Verdict(StrEnum):
    """The five answers a claim can get."""

    SUPPORTED = "SUPPORTED"
    """The effect has the claimed direction at level alpha, and every guard of the claim's rule held."""
    CONTRADICTED = "CONTRADICTED"
    """The effect has the opposite direction at level alpha, with the same guards."""
    NOT_SUPPORTED = "NOT_SUPPORTED"
    """The claimed effect is excluded, is too small to matter, or has another explanation than the claim's."""
    UNDETERMINED = "UNDETERMINED"
    """The claimed effect is neither shown nor excluded, or a guard failed so that the number cannot be trusted."""
    NOT_ESTIMABLE = "NOT_ESTIMABLE"
    """The number that would answer the claim could not be computed."""


def interval_verdict(
    low: float, high: float, p_value: float, *, alpha: float, claimed: int = 1, negligible: float
) -> Verdict:
    """Verdict on a signed effect from its 1 - alpha interval and p-value.

    Parameters
    ----------
    low, high
        Interval of the effect.
    p_value
        p-value of "no effect".
    alpha
        Level of test and interval.
    claimed
        Sign the claim gives the effect, +1 or -1.
    negligible
        Effect (in the claimed direction) too small to be the claimed one, in the effect's unit.

    Returns
    -------
    Verdict
        NOT_ESTIMABLE without an interval; SUPPORTED if the interval lies wholly on the claimed side of zero and
        p <= alpha; CONTRADICTED if wholly on the other side and p <= alpha; NOT_SUPPORTED if the interval excludes
        every effect of at least ``negligible`` in the claimed direction; else UNDETERMINED.

    Examples
    --------
    >>> interval_verdict(0.02, 0.08, 0.001, alpha=0.05, negligible=0.01)
    <Verdict.SUPPORTED: 'SUPPORTED'>
    """
    if math.isnan(low) or math.isnan(high):
        return Verdict.NOT_ESTIMABLE
    if claimed < 0:
        low, high = -high, -low
    significant = p_value <= alpha  # NaN compares false: no p-value, no verdict for either side
    if low > 0 and significant:
        return Verdict.SUPPORTED
    if high < 0 and significant:
        return Verdict.CONTRADICTED
    return Verdict.NOT_SUPPORTED if high < negligible else Verdict.UNDETERMINED


def agreed_verdict(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict that enough dictionaries give (:func:`dictionaries_needed`); UNDETERMINED if none is."""
    return agreed(verdicts, Verdict.UNDETERMINED)


def in_every_dictionary(verdict: Verdict, differences: Sequence[float]) -> bool:
    """Whether enough dictionaries have the direction of a directed verdict; True for any other verdict."""
    if verdict not in (Verdict.SUPPORTED, Verdict.CONTRADICTED):
        return True
    return bool(same_direction(differences, float(np.mean(differences))))


# -- C1 ----------------------------------------------------------------------------------------------------------------
NEGLIGIBLE_TAIL: Final = 0.01
"""A difference of less than one alive feature in a hundred does not count as "more specific features"."""
NOT_COMPARABLE: Final = "not_comparable"
"""Failed guard: the models moved unequally far, or their crosscoders fit unequally well."""
BELOW_NULL: Final = "below_null"
"""Failed guard: the larger share does not exceed that of the base-base null crosscoder."""


def specificity_verdict(
    interval: tuple[float, float, float],
    p_value: float,
    shares: tuple[float, float, float],
    *,
    alpha: float,
    comparable: bool,
) -> tuple[Verdict, tuple[str, ...]]:
    """Verdict on "SFT introduces more model-specific features than RL", and the guards that failed.

    Parameters
    ----------
    interval
        Difference of shares (SFT minus RL) with low and high.
    p_value
        p-value of "no difference".
    shares
        Share of alive features that are specific: SFT, RL, base-base null crosscoder.
    alpha
        Level of test and interval.
    comparable
        Whether the counts of the two models can be compared (movement from base, fit of the crosscoders).

    Returns
    -------
    Verdict
        As :func:`interval_verdict` with ``NEGLIGIBLE_TAIL``; UNDETERMINED if a guard failed.
    tuple of str
        ``NOT_COMPARABLE`` and ``BELOW_NULL`` where they apply.
    """
    effect, low, high = interval
    verdict = interval_verdict(low, high, p_value, alpha=alpha, negligible=NEGLIGIBLE_TAIL)
    if verdict is Verdict.NOT_ESTIMABLE or math.isnan(effect):
        return Verdict.NOT_ESTIMABLE, ()
    sft, rl, null = shares
    failed = [] if comparable else [NOT_COMPARABLE]
    directed = verdict in (Verdict.SUPPORTED, Verdict.CONTRADICTED)
    if directed and (sft if effect > 0 else rl) <= null:
        failed.append(BELOW_NULL)
    return (Verdict.UNDETERMINED if failed else verdict), tuple(failed)


def shifts_match(shifts: Iterable[float]) -> bool | None:
    """Whether models moved about equally far from base; None if fewer than two activation shifts are known."""
    known = [shift for shift in shifts if math.isfinite(shift)]
    if len(known) < 2:
        return None
    return min(known) > 0 and max(known) / min(known) <= MATCHED_SHIFT_RATIO


# -- C2 ----------------------------------------------------------------------------------------------------------------
def timing_verdict(sft: SetStatus, rl: SetStatus, low: float, high: float) -> Verdict:
    """Verdict on "SFT stabilises early, RL keeps evolving" from both runs' status and the difference's interval.

    SUPPORTED needs SFT early and stable, RL evolving or stable only late, and a difference in excess turnover (RL
    minus SFT, at half of training) above zero; CONTRADICTED the mirror image; NOT_SUPPORTED any other determined
    pair; UNDETERMINED if either run is, or if the statuses are as described and the interval includes zero.
    """
    if SetStatus.UNDETERMINED in (sft, rl):
        return Verdict.UNDETERMINED
    later = (SetStatus.EVOLVING, SetStatus.LATE_STABLE)
    if sft is SetStatus.EARLY_STABLE and rl in later:
        return Verdict.SUPPORTED if low > 0 else Verdict.UNDETERMINED
    if rl is SetStatus.EARLY_STABLE and sft in later:
        return Verdict.CONTRADICTED if high < 0 else Verdict.UNDETERMINED
    return Verdict.NOT_SUPPORTED


# -- C3 ----------------------------------------------------------------------------------------------------------------
MIN_TASKS: Final = 2
"""Estimable tasks below which "task-agnostic" says nothing."""


def selection_verdict(
    *,
    n_estimable: int,
    n_confirmed: int,
    carried_low: float,
    best_high: float,
    no_rise_p: float,
    accompanying_p: float,
    alpha: float,
) -> Verdict:
    """Verdict on "a compact, task-agnostic feature set separates RL from base".

    Parameters
    ----------
    n_estimable
        Tasks with enough base-wrong/RL-right prompts, and enough that both get right, for all guarded tests.
    n_confirmed
        Features confirmed on verification prompts (Holm), each by its guarded p-value (docs/method.md 4c).
    carried_low
        Lower end of the interval of the share of the rise that the leading candidates carry, a compact set; NaN where
        it is not estimable.
    best_high
        Upper end of the interval of the share that any set as small carries; NaN likewise.
    no_rise_p
        p-value of "some feature's rise is large enough to matter in every task".
    accompanying_p
        p-value of "these features merely accompany right answers, in base and RL alike"; NaN where losses suffice for
        the RL-specific contrast, which each confirmed feature has passed then.
    alpha
        Level of the tests.

    Returns
    -------
    Verdict
        NOT_ESTIMABLE without an estimable task; UNDETERMINED with fewer than two. NOT_SUPPORTED if every feature's rise
        is shown to be too small, or if features are confirmed and no set as small carries ``CARRIED`` of the rise;
        SUPPORTED if features are confirmed, the leading candidates carry that much, and they do not merely accompany
        right answers; else UNDETERMINED, for absence of evidence is no evidence of absence.
    """
    if n_estimable == 0:
        return Verdict.NOT_ESTIMABLE
    if n_estimable < MIN_TASKS:
        return Verdict.UNDETERMINED
    if no_rise_p <= alpha:  # NaN compares false
        return Verdict.NOT_SUPPORTED
    if n_confirmed == 0:
        return Verdict.UNDETERMINED
    if best_high < CARRIED:
        return Verdict.NOT_SUPPORTED
    specific = not accompanying_p > alpha
    return Verdict.SUPPORTED if carried_low >= CARRIED and specific else Verdict.UNDETERMINED


def mostly_token_detectors(n_detectors: Sequence[int], n_features: Sequence[int]) -> bool:
    """Whether more than half of the features respond to tokens alone in as many dictionaries as must agree."""
    return bool(n_features) and agreed([2 * n > of for n, of in zip(n_detectors, n_features, strict=True)], False)


def agreed_p(p_values: Sequence[float]) -> float:
    """The p-value that as many dictionaries reach as must agree; NaN if so many have none.

    Examples
    --------
    >>> agreed_p([0.01, 0.2, 0.04]), agreed_p([0.01, 0.02, 0.03, 0.04, 0.9])
    (0.2, 0.04)
    """
    return float(np.sort(np.asarray(p_values, dtype=float))[dictionaries_needed(len(p_values)) - 1])


def mean_count(counts: Sequence[int], *, alpha: float) -> tuple[float, float, float]:
    """Mean over dictionaries of a number of features, with its interval over them; of one, that number and no more."""
    mean, low, high = (float(x) for x in pooled_intervals(counts, counts, counts, alpha=alpha))
    return mean, max(low, 0.0), high if len(counts) > 1 else math.nan


def mean_share(
    shares: Sequence[float], lows: Sequence[float], highs: Sequence[float], *, alpha: float
) -> tuple[float, float, float]:
    """Mean over dictionaries of a share that comes with an interval each, and its interval."""
    mean, low, high = (float(x) for x in pooled_intervals(shares, lows, highs, alpha=alpha))
    return mean, low, high


def any_feature_p(holm_p: Any) -> float:
    """p-value of "no feature separates the models": the smallest Holm-adjusted one; NaN if none was tested."""
    holm_p = np.asarray(holm_p, dtype=float)
    return float(np.nanmin(holm_p)) if np.isfinite(holm_p).any() else math.nan


# -- C4, C5 ------------------------------------------------------------------------------------------------------------
CAUSAL: Final = {
    "CAUSAL_SPECIFIC": Verdict.SUPPORTED,
    "CAUSAL_NONSPECIFIC": Verdict.NOT_SUPPORTED,
    "DESTRUCTIVE": Verdict.NOT_SUPPORTED,
    "NO_EFFECT": Verdict.NOT_SUPPORTED,
    "INCONCLUSIVE": Verdict.UNDETERMINED,
    "NOT_ESTIMABLE": Verdict.NOT_ESTIMABLE,
}
"""Claim verdict for each causal verdict, before the direction of the effect is looked at."""


def causal_verdict(
    causal: str, effect: float, low: float, high: float, p_value: float, *, alpha: float, claimed: int
) -> Verdict:
    """Verdict on "editing the set changes accuracy in the claimed direction" from the causal verification.

    An effect significant in the other direction is CONTRADICTED whatever the causal verdict; CAUSAL_SPECIFIC with an
    effect of the wrong sign that is not significant is UNDETERMINED; a verdict this release does not know is too.
    """
    verdict = CAUSAL.get(causal, Verdict.UNDETERMINED)
    if verdict is Verdict.NOT_ESTIMABLE or math.isnan(effect):
        return Verdict.NOT_ESTIMABLE
    direction = interval_verdict(low, high, p_value, alpha=alpha, claimed=claimed, negligible=0.0)
    if direction is Verdict.CONTRADICTED:
        return Verdict.CONTRADICTED
    if verdict is Verdict.SUPPORTED and direction is not Verdict.SUPPORTED:
        return Verdict.UNDETERMINED
    return verdict


def within_minimum(low: float, high: float) -> bool:
    """Whether an interval excludes zero but not every effect below V1's ``MIN_EFFECT``."""
    return 0 < max(low, -high) <= MIN_EFFECT


# -- how small a p-value can get ---------------------------------------------------------------------------------------
def smallest_permutation_p(n_first: int, n_second: int) -> float:
    """Smallest two-sided p-value an exact permutation of run labels can give.

    Examples
    --------
    >>> smallest_permutation_p(3, 3)
    0.1
    """
    arrangements = math.comb(n_first + n_second, n_first)
    both_sides = 2 if n_first == n_second else 1  # only equal groups have a mirror image as extreme as itself
    return min(1.0, both_sides / arrangements)


def smallest_rank_p(n_controls: int) -> float:
    """Smallest p-value that the rank of one set among ``n_controls`` random ones can give."""
    return 1 / (n_controls + 1)
