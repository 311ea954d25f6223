"""The rules that turn estimates, intervals and p-values into the verdict on one of the paper's five claims.

Every rule is a pure function of numbers and the study's alpha, so that a reader can redo each verdict by hand. The
report prints them in words as its glossary and decides nothing itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import numpy as np
import xarray as xr

from rlgen_stats.toolkit.statistics.causal.criteria import MIN_EFFECT
from rlgen_stats.toolkit.statistics.causal.findings import Decision
from rlgen_stats.toolkit.statistics.causal.mediated_share import CompactShare, compact_share
from rlgen_stats.toolkit.statistics.kernels import agreed, dictionaries_needed, pooled_intervals, same_direction
from rlgen_stats.toolkit.statistics.selection.compactness import CARRIED, MIN_TASKS
from rlgen_stats.toolkit.statistics.selection.discordance import CONTRAST
from rlgen_stats.toolkit.statistics.specificity import compared_arms
from rlgen_stats.toolkit.statistics.specificity.arm_contrast import AGREED
from rlgen_stats.toolkit.statistics.timing.run_contrast import MEASURES


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
        Largest effect, in either direction, that is too small to matter, in the effect's unit.

    Returns
    -------
    Verdict
        NOT_ESTIMABLE without an interval; SUPPORTED if p <= alpha and every effect in the interval is in the claimed
        direction and exceeds ``negligible``; CONTRADICTED if the same holds in the other direction; NOT_SUPPORTED if
        the interval excludes every effect of at least ``negligible`` in the claimed direction; else UNDETERMINED.

    Notes
    -----
    A minimum-effect test and a test for non-inferiority at one margin: an effect known to be tiny is NOT_SUPPORTED,
    however small its p-value.

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
    if low > negligible and significant:
        return Verdict.SUPPORTED
    if high < -negligible and significant:
        return Verdict.CONTRADICTED
    return Verdict.NOT_SUPPORTED if high < negligible else Verdict.UNDETERMINED


def agreed_verdict(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict that enough dictionaries give (:func:`dictionaries_needed`); UNDETERMINED if none is."""
    return agreed(verdicts, Verdict.UNDETERMINED)


def verdicts_agree(verdicts: Sequence[Verdict]) -> bool:
    """Whether enough dictionaries give the same verdict, whichever it is."""
    return agreed([str(verdict) for verdict in verdicts], "") != ""


# -- C1 ----------------------------------------------------------------------------------------------------------------
NEGLIGIBLE_TAIL: Final = 0.01
"""A difference of less than one alive feature in a hundred does not count as "more specific features"."""
NOT_COMPARABLE: Final = "not_comparable"
"""Failed guard: the models moved unequally far, or their crosscoders fit unequally well."""
BELOW_NULL: Final = "below_null"
"""Failed guard: the larger share does not exceed the largest of base against itself."""
NO_NULL: Final = "no_null"
"""Failed guard: nothing of base against itself was measured that the larger share could exceed."""
DICTIONARIES_DISAGREE: Final = "dictionaries_disagree"
"""Failed guard: too few dictionaries have the direction of the pooled difference."""
RANKS: Final = "superiority"
"""Failed guard: the ranks of all features say the opposite of the shares."""
EQUAL_KL: Final = "matched_kl"
"""Failed guard, and the comparison: at equal KL divergence from base the shares say the opposite."""
TAU: Final = 0.7
"""Norm ratio above which a feature counts as specific, unless a study says another."""


def specificity_verdict(
    interval: tuple[float, float, float],
    p_value: float,
    shares: tuple[float, float, float],
    *,
    alpha: float,
    comparable: bool,
    each: Sequence[float] = (),
    beside: Mapping[str, tuple[float, float]] | None = None,
) -> tuple[Verdict, tuple[str, ...]]:
    """Verdict on "SFT introduces more model-specific features than RL", and the guards that failed.

    Parameters
    ----------
    interval
        Difference of shares (SFT minus RL) with low and high.
    p_value
        p-value of "no difference".
    shares
        Share of alive features that are specific: SFT, RL, and the largest of base against itself, NaN without one.
    alpha
        Level of test and interval.
    comparable
        Whether the counts of the two models can be compared (movement from base, fit of the crosscoders).
    each
        The difference in each dictionary.
    beside
        Name -> interval of the difference by another measure, 0 being none, which must not say the opposite.

    Returns
    -------
    Verdict
        As :func:`interval_verdict` with ``NEGLIGIBLE_TAIL``; UNDETERMINED if a guard failed.
    tuple of str
        ``NOT_COMPARABLE``, ``BELOW_NULL``, ``NO_NULL``, ``DICTIONARIES_DISAGREE`` and names of ``beside`` where they
        apply.
    """
    effect, low, high = interval
    verdict = interval_verdict(low, high, p_value, alpha=alpha, negligible=NEGLIGIBLE_TAIL)
    if verdict is Verdict.NOT_ESTIMABLE or math.isnan(effect):
        return Verdict.NOT_ESTIMABLE, ()
    sft, rl, null = shares
    failed = [] if comparable else [NOT_COMPARABLE]
    if verdict in (Verdict.SUPPORTED, Verdict.CONTRADICTED):
        if not (sft if effect > 0 else rl) > null:
            failed.append(NO_NULL if math.isnan(null) else BELOW_NULL)
        if each and not same_direction(each, float(np.mean(each))):
            failed.append(DICTIONARIES_DISAGREE)
        for name, (lowest, highest) in (beside or {}).items():
            if (highest if effect > 0 else -lowest) < 0:
                failed.append(name)
    return (Verdict.UNDETERMINED if failed else verdict), tuple(failed)


def specificity_claim(contrast: xr.Dataset, *, tau: float = TAU, alpha: float) -> tuple[Verdict, tuple[str, ...]]:
    """:func:`specificity_verdict` on a contrast of two arms.

    Parameters
    ----------
    contrast
        Layout ``attribution_contrast`` (:func:`~rlgen_stats.toolkit.statistics.attribution_contrast`).
    tau
        The nearest of its thresholds decides.
    alpha
        Level of the verdict, that of the contrast's intervals.

    Returns
    -------
    Verdict
    tuple of str
        Guards that failed.

    Notes
    -----
    Features count as specific by latent scaling too where the contrast has it. The ranks of all features, and the
    shares at equal KL from base where these are comparable, must not say the opposite.

    Examples
    --------
    >>> specificity_claim(attribution_contrast(table, decoders, sft="sft", rl="rl"), alpha=0.05)  # doctest: +SKIP
    """
    prefix = AGREED if f"{AGREED}effect" in contrast else ""
    at_tau = contrast.sel(tau=tau, method="nearest")
    decided_by = str(contrast.attrs["decided_by"])
    row = at_tau.sel(comparison=decided_by)
    low, high = (float(row[f"superiority{end}"]) - 0.5 for end in ("_low", "_high"))
    beside = {RANKS: (low, high)}
    if EQUAL_KL in contrast["comparison"]:
        by_kl = at_tau.sel(comparison=EQUAL_KL)
        if str(by_kl["comparable"].item()).startswith(compared_arms.COMPARABLE):
            beside[EQUAL_KL] = (float(by_kl[f"{prefix}effect_low"]), float(by_kl[f"{prefix}effect_high"]))
    each = row[f"{prefix}effect_each"].values
    return specificity_verdict(
        (float(row[f"{prefix}effect"]), float(row[f"{prefix}effect_low"]), float(row[f"{prefix}effect_high"])),
        float(row[f"{prefix}p_value"]),
        (float(row[f"{prefix}tail_sft"]), float(row[f"{prefix}tail_rl"]), float(row[f"{prefix}tail_null"])),
        alpha=alpha,
        comparable=not str(row["comparable"].item()).startswith(compared_arms.NOT_COMPARABLE),
        each=each[np.isfinite(each)].tolist(),
        beside=beside,
    )


# -- C2 ----------------------------------------------------------------------------------------------------------------
NEGLIGIBLE_TIME: Final = 0.05
"""A difference in mean time to stability of less than a twentieth of training: neither "early" nor "keeps evolving"."""
NEGLIGIBLE_TURNOVER: Final = 0.02
"""A difference in mean excess turnover of less than one feature in fifty: the paper's sets hold fifty."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A difference of two runs, the second less the first."""

    low: float
    """Lower end of its 1 - alpha interval."""
    high: float
    p_value: float
    """Of no difference, two-sided."""
    each: Sequence[float]
    """In every dictionary."""


def difference_verdict(difference: Difference, *, alpha: float, negligible: float) -> Verdict:
    """Verdict on "the difference is above zero", where only a difference shown to be small counts as none.

    Parameters
    ----------
    difference
        With its interval and p-value.
    alpha
        Level of test and interval.
    negligible
        Size below which a difference does not matter.

    Returns
    -------
    Verdict
        NOT_ESTIMABLE without an interval; NOT_SUPPORTED if it lies wholly within ``negligible`` on both sides;
        SUPPORTED or CONTRADICTED if it lies wholly beyond ``negligible`` on one side, p <= alpha, and as many
        dictionaries as must agree have its direction; else UNDETERMINED. More data then never turn a verdict.

    Examples
    --------
    >>> small = Difference(low=0.01, high=0.04, p_value=1e-4, each=[0.02])
    >>> difference_verdict(small, alpha=0.05, negligible=0.05)
    <Verdict.NOT_SUPPORTED: 'NOT_SUPPORTED'>
    """
    low, high = difference.low, difference.high
    if math.isnan(low) or math.isnan(high):
        return Verdict.NOT_ESTIMABLE
    if -negligible < low and high < negligible:
        return Verdict.NOT_SUPPORTED
    beyond = low > negligible or high < -negligible
    if beyond and difference.p_value <= alpha and same_direction(difference.each, low + high):
        return Verdict.SUPPORTED if low > 0 else Verdict.CONTRADICTED
    return Verdict.UNDETERMINED


def timing_verdict(
    time: Difference, turnover: Difference, *, alpha: float, strata: Sequence[Difference] = ()
) -> tuple[Verdict, Verdict, Verdict]:
    """Verdict on "SFT stabilises early, RL keeps evolving", and what either difference (RL minus SFT) says alone.

    Parameters
    ----------
    time
        In mean time to stability, as a share of training.
    turnover
        In mean excess turnover of the top set, as a share of it.
    alpha
        Level of the verdict.
    strata
        The differences in time within the strata that ``time`` is averaged over.

    Returns
    -------
    verdict, by_time, by_turnover : Verdict
        NOT_ESTIMABLE without a time; else what both say, and UNDETERMINED where they say different things, or nothing.
        The time says nothing (UNDETERMINED) where a stratum shows the opposite of another one or of the mean: features
        that changed little and features that changed much disagree, and their mean is that of neither.

    Notes
    -----
    An intersection-union test: both must reject, so that either alone bounds the error rate.
    """
    by_time = difference_verdict(time, alpha=alpha, negligible=NEGLIGIBLE_TIME)
    if times_oppose(time, strata, alpha=alpha):
        by_time = Verdict.UNDETERMINED
    by_turnover = difference_verdict(turnover, alpha=alpha, negligible=NEGLIGIBLE_TURNOVER)
    same = by_time is by_turnover or by_time is Verdict.NOT_ESTIMABLE
    return by_time if same else Verdict.UNDETERMINED, by_time, by_turnover


def timing_claim(contrast: xr.Dataset, *, alpha: float) -> tuple[Verdict, Verdict, Verdict]:
    """:func:`timing_verdict` on a contrast of two runs.

    Parameters
    ----------
    contrast
        Layout ``timing_contrast`` (:func:`~rlgen_stats.toolkit.statistics.timing_contrast`), SFT's run first.
    alpha
        Level of the verdict.

    Returns
    -------
    verdict, by_time, by_turnover : Verdict

    Examples
    --------
    >>> timing_claim(timing_contrast([chains], [sets], first="sft", second="rl"), alpha=0.05)  # doctest: +SKIP
    """
    time, turnover, strata = timing_differences(contrast)
    return timing_verdict(time, turnover, alpha=alpha, strata=strata)


def timing_differences(contrast: xr.Dataset) -> tuple[Difference, Difference, list[Difference]]:
    """In time, in turnover, and in time within every stratum that counts; strata are not kept by dictionary."""
    names = {"low": "_low", "high": "_high", "p_value": "_p"}
    time, turnover = (
        Difference(**{name: float(row[name]) for name in names}, each=row["dictionary_difference"].values.tolist())
        for row in (contrast.sel(measure=measure) for measure in MEASURES)
    )
    strata = [
        Difference(
            **{name: float(row[f"stratum_difference{end}"]) for name, end in names.items()},
            each=[float(row["stratum_difference"])],
        )
        for row in (contrast.isel(stratum=i) for i in np.flatnonzero(contrast["weight"].values > 0))
    ]
    return time, turnover, strata


def times_oppose(time: Difference, strata: Sequence[Difference], *, alpha: float) -> bool:
    """Whether a stratum shows the opposite of another one or of the mean, or shows what the mean is shown not to be."""
    mean, *each = (difference_verdict(one, alpha=alpha, negligible=NEGLIGIBLE_TIME) for one in (time, *strata))
    both = {Verdict.SUPPORTED, Verdict.CONTRADICTED}
    return both <= {mean, *each} or (mean is Verdict.NOT_SUPPORTED and not both.isdisjoint(each))


# -- C3 ----------------------------------------------------------------------------------------------------------------
class SelectionReason(StrEnum):
    """What the verdict on C3 rests on; given the evidence there is one."""

    NO_TASK = "no_task"
    """No task could be tested."""
    FEW_TASKS = "few_tasks"
    """Too few tasks for "task-agnostic"."""
    NO_RISE = "no_rise"
    """Every feature's rise is shown to be too small to matter."""
    FEW_CONFIRMING = "few_confirming"
    """Too few tasks could be tested on the prompts that confirm."""
    NONE_CONFIRMED = "none_confirmed"
    """No feature is confirmed, which does not show that there is none."""
    SPREAD_OUT = "spread_out"
    """Features are confirmed, and no compact set carries enough."""
    TOO_MANY = "too_many"
    """Features are confirmed, and the set whose share is known is not compact."""
    SHARE_UNKNOWN = "share_unknown"
    """Features are confirmed, and what they carry cannot be estimated."""
    SHARE_OPEN = "share_open"
    """Features are confirmed, and whether a compact set carries enough is neither shown nor excluded."""
    LIKE_RANDOM = "like_random"
    """The set carries enough, and is not shown to carry more than comparable random sets."""
    ACCOMPANYING = "accompanying"
    """The features may merely accompany right answers, in base and RL alike."""
    COMPACT = "compact"
    """Confirmed features, and a compact set that carries enough."""


def selection_verdict(
    *,
    n_estimable: int,
    n_confirming: int,
    n_confirmed: int,
    carried_low: float,
    best_high: float,
    no_rise_p: float,
    accompanying_p: float,
    alpha: float,
    is_compact: bool = True,
    beyond_random_low: float = math.inf,
) -> tuple[Verdict, SelectionReason]:
    """Verdict on "a compact, task-agnostic feature set separates RL from base".

    Parameters
    ----------
    n_estimable
        Tasks with enough base-wrong/RL-right prompts, and enough that both get right, for all guarded tests.
    n_confirming
        Likewise on verification prompts alone, which confirm.
    n_confirmed
        Features confirmed on verification prompts (Holm), each by its guarded p-value (docs/method.md 4c).
    carried_low
        Lower end of the interval of what the set carries, NaN where that is not estimable: of the full patch's effect
        in base, where the set has been lifted there; else the leading candidates' share of the rise.
    best_high
        Upper end of the interval of what any set as small carries; NaN likewise.
    no_rise_p
        p-value of "some feature's rise is large enough to matter in as many tasks as make it task-agnostic", two.
    accompanying_p
        p-value of "these features merely accompany right answers, in base and RL alike"; NaN where losses suffice for
        the RL-specific contrast, which each confirmed feature has passed then.
    alpha
        Level of the tests.
    is_compact
        Whether the set whose share is given is compact itself.
    beyond_random_low
        Lower end of the interval of that share less the share of comparable random sets, NaN where there are none;
        infinite where the share is one of the rise, which is measured against no random sets.

    Returns
    -------
    Verdict
        NOT_ESTIMABLE without an estimable task; UNDETERMINED with fewer than two, to choose or to confirm.
        NOT_SUPPORTED if every feature's rise is shown to be too small, or if features are confirmed and no set as small
        carries ``CARRIED``; SUPPORTED if features are confirmed, a compact set carries that much and more than random
        sets do, and the features do not merely accompany right answers; else UNDETERMINED, for absence of evidence is
        no evidence of absence.
    SelectionReason
        What decided.
    """
    if n_estimable == 0:
        return Verdict.NOT_ESTIMABLE, SelectionReason.NO_TASK
    if n_estimable < MIN_TASKS:
        return Verdict.UNDETERMINED, SelectionReason.FEW_TASKS
    if no_rise_p <= alpha:  # NaN compares false
        return Verdict.NOT_SUPPORTED, SelectionReason.NO_RISE
    if n_confirming < MIN_TASKS:
        return Verdict.UNDETERMINED, SelectionReason.FEW_CONFIRMING
    if n_confirmed == 0:
        return Verdict.UNDETERMINED, SelectionReason.NONE_CONFIRMED
    if best_high < CARRIED:
        return Verdict.NOT_SUPPORTED, SelectionReason.SPREAD_OUT
    for open_question, reason in (
        (not is_compact, SelectionReason.TOO_MANY),
        (math.isnan(carried_low), SelectionReason.SHARE_UNKNOWN),
        (carried_low < CARRIED, SelectionReason.SHARE_OPEN),
        (not beyond_random_low > 0, SelectionReason.LIKE_RANDOM),
        (accompanying_p > alpha, SelectionReason.ACCOMPANYING),
    ):
        if open_question:
            return Verdict.UNDETERMINED, reason
    return Verdict.SUPPORTED, SelectionReason.COMPACT


def selection_claim(
    selections: Sequence[xr.Dataset], shares: xr.Dataset | None = None, *, alpha: float
) -> tuple[Verdict, tuple[tuple[Verdict, SelectionReason], ...]]:
    """:func:`selection_verdict` on the selection of every dictionary, whose verdicts must agree.

    Parameters
    ----------
    selections
        Layout ``selection`` (:func:`~rlgen_stats.toolkit.statistics.select_features`), one a dictionary.
    shares
        Layout ``mediated_share``, of a trial: what of the full patch's effect the sets carry, all dictionaries
        together. Without it, or where the patch has no shown effect, the share of the rise decides.
    alpha
        Level of the tests.

    Returns
    -------
    Verdict
    tuple of (Verdict, SelectionReason)
        Of every dictionary.

    Examples
    --------
    >>> selection_claim([select_features(features, outcomes, target="rl@80")], alpha=0.05)  # doctest: +SKIP
    """
    lifted = compact_share(shares, min(float(one.attrs["most_features"]) for one in selections))
    each = tuple(_selection_of_one(one, lifted, alpha) for one in selections)
    return agreed_verdict([verdict for verdict, _ in each]), each


def tested_tasks(selection: xr.Dataset) -> tuple[list[str], list[str] | None]:
    """Tasks whose guarded tests could be made on selection and on verification prompts.

    None for the latter of results made before it was stored: then they are taken to be the same.

    Examples
    --------
    >>> tasks = {"task": ["math", "quiz"], "role": ("task", ["in_domain", "control"])}
    >>> tested_tasks(xr.Dataset({"excess_estimable": ("task", ["yes", "yes"])}, tasks))
    (['math'], None)
    """
    chosen = ~np.isin(selection["role"].values.astype(str), ("held_out", "control"))
    by_part = [
        [str(task) for task in selection["task"].values[chosen & (selection[name].values.astype(str) == "yes")]]
        for name in ("excess_estimable", "verification_excess_estimable")
        if name in selection
    ]
    return by_part[0], by_part[1] if len(by_part) > 1 else None


def _selection_of_one(
    selection: xr.Dataset, lifted: CompactShare | None, alpha: float
) -> tuple[Verdict, SelectionReason]:
    chosen_by, confirmed_by = tested_tasks(selection)
    estimable = np.isin(selection["task"].values.astype(str), chosen_by)
    accompanying = float(selection.attrs["accompanying_p"])
    if math.isnan(accompanying) and (selection["guard"].values[estimable] != CONTRAST).any():
        accompanying = 1.0  # neither each feature nor all together could be tested
    carried = {name: float(selection.attrs[f"carried_{name}"]) for name in ("low", "best_high")}
    return selection_verdict(
        n_estimable=len(chosen_by) if np.isfinite(selection["specific_p"].values).any() else 0,
        n_confirming=len(chosen_by if confirmed_by is None else confirmed_by),
        n_confirmed=int((selection["specific_tier"] == "CONFIRMED").sum()),
        carried_low=carried["low"] if lifted is None else lifted.of_set.low,
        best_high=carried["best_high"] if lifted is None else lifted.best_high,
        no_rise_p=float(selection.attrs["no_rise_p"]),
        accompanying_p=accompanying,
        alpha=alpha,
        is_compact=lifted is None or lifted.is_compact,
        beyond_random_low=math.inf if lifted is None else lifted.of_set.above_low,
    )


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
    """Mean over dictionaries of numbers of features, with its interval over them.

    Where they do not differ, or there is one, nothing is known of how they vary: then that number, each of which is a
    lower bound of the truth (Holm), and no upper end; of no feature at all no lower end either.
    """
    mean, low, high = (float(x) for x in pooled_intervals(counts, counts, counts, alpha=alpha))
    if len(set(counts)) == 1:
        return mean, mean or math.nan, math.nan
    return mean, max(low, 0.0), high


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
    causal: str,
    effect: float,
    low: float,
    high: float,
    p_value: float,
    *,
    alpha: float,
    claimed: int,
    decision: str = "",
    each: Sequence[float] = (),
) -> Verdict:
    """Verdict on "editing the set changes accuracy in the claimed direction" from the causal verification.

    An effect in the other direction, significant and beyond V1's ``MIN_EFFECT``, is CONTRADICTED unless it is shown to
    be within the margin (NO_EFFECT); UNDETERMINED where the trial's ``decision`` is that its machinery fails or a
    dictionary had no set to try, or where too few of the dictionaries (the effect in ``each``) have its sign.
    CAUSAL_SPECIFIC with an effect that is not so in the claimed direction is UNDETERMINED; a verdict this release does
    not know is too.
    """
    verdict = CAUSAL.get(causal, Verdict.UNDETERMINED)
    if verdict is Verdict.NOT_ESTIMABLE or math.isnan(effect):
        return Verdict.NOT_ESTIMABLE
    direction = interval_verdict(low, high, p_value, alpha=alpha, claimed=claimed, negligible=MIN_EFFECT)
    if direction is Verdict.CONTRADICTED and causal != "NO_EFFECT":
        untrusted = decision in (Decision.V5_DICTIONARIES, Decision.PASSTHROUGH_NOT_NOOP)
        agreed = len(each) < 2 or same_direction(each, effect)
        return Verdict.CONTRADICTED if agreed and not untrusted else Verdict.UNDETERMINED
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
