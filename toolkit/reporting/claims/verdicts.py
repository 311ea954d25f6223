"""What a claim's answer looks like, and the rules that turn intervals and p-values into a verdict.

Every rule is a pure function of numbers and the study's alpha; the report prints their docstrings' content as its
glossary, so a reader can redo each verdict by hand.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from statistics import NormalDist
from typing import Any, Final


class Verdict(StrEnum):
    """The five answers a claim can get."""

    SUPPORTED = "SUPPORTED"
    CONTRADICTED = "CONTRADICTED"
    NOT_SUPPORTED = "NOT_SUPPORTED"
    UNDETERMINED = "UNDETERMINED"
    NOT_ESTIMABLE = "NOT_ESTIMABLE"

    @property
    def label(self) -> str:
        """The verdict in words for a badge."""
        return self.value.replace("_", " ").lower()

    @property
    def symbol(self) -> str:
        """A sign beside the colour, so that the badge does not rely on colour."""
        return _SYMBOLS[self.value]

    @property
    def meaning(self) -> str:
        """One sentence for the glossary."""
        return _MEANINGS[self.value]


_SYMBOLS: Final = {
    "SUPPORTED": "✓",
    "CONTRADICTED": "✕",
    "NOT_SUPPORTED": "–",
    "UNDETERMINED": "?",
    "NOT_ESTIMABLE": "○",
}
_MEANINGS: Final = {
    "SUPPORTED": "The effect has the claimed direction at level alpha, and every guard named in the claim's rule held.",
    "CONTRADICTED": "The effect has the opposite direction at level alpha, with the same guards.",
    "NOT_SUPPORTED": (
        "The question was asked with enough precision, and the claimed effect is not there, is too small to matter, "
        "or has another explanation than the claim's."
    ),
    "UNDETERMINED": (
        "The data neither show nor exclude the claimed effect, or a guard failed so that the number cannot be trusted."
    ),
    "NOT_ESTIMABLE": "The number that would answer the claim could not be computed in this study; the reason is given.",
}

NOTHING: Final = math.nan
"""A number that could not be computed."""


@dataclass(frozen=True)
class Claim:
    """One claim of the paper and this study's answer; numbers are in ``unit``, NaN where not estimable."""

    id: str
    """C1 to C5."""
    statement: str
    """What the paper says."""
    estimate: float
    """Point estimate, in ``unit``."""
    low: float
    """Lower end of the 1 - alpha interval."""
    high: float
    """Upper end of the 1 - alpha interval."""
    p_value: float
    """p-value of the test named in ``details['test']``."""
    unit: str
    """Unit of estimate, low and high."""
    verdict: Verdict
    """Answer."""
    answer: str
    """The answer in one sentence."""
    caveats: tuple[str, ...]
    """What limits the answer."""
    paper_figure: str
    """What the paper reports for this claim (METHOD.md section 1)."""
    details: dict[str, Any] = field(default_factory=dict)
    """Everything the verdict was made from, JSON-able."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"verdict": self.verdict.value, "caveats": list(self.caveats)}


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


def mover_difference(
    first: tuple[float, float, float], second: tuple[float, float, float]
) -> tuple[float, float, float]:
    """Difference ``first - second`` of two (estimate, low, high) with its interval recovered from theirs.

    Treats the two as independent, which is conservative when they share prompts and so correlate positively.

    References
    ----------
    Zou & Donner (2008), doi:10.1002/sim.3095, eq. 5.
    """
    (a, a_low, a_high), (b, b_low, b_high) = first, second
    return a - b, a - b - math.hypot(a - a_low, b_high - b), a - b + math.hypot(a_high - a, b - b_low)


def p_from_interval(estimate: float, low: float, high: float, *, alpha: float) -> float:
    """Two-sided p-value of "zero" implied by a 1 - alpha interval (normal approximation).

    The half-width on the side of zero gives the standard error, so asymmetric intervals keep p <= alpha exactly
    when they exclude zero.

    References
    ----------
    Altman & Bland (2011), doi:10.1136/bmj.d2304.
    """
    half = estimate - low if estimate > 0 else high - estimate
    if math.isnan(estimate) or math.isnan(half):
        return NOTHING
    if half <= 0:
        return 1.0 if estimate == 0 else NOTHING
    normal = NormalDist()
    error = half / normal.inv_cdf(1 - alpha / 2)
    return 2 * normal.cdf(-abs(estimate) / error)


class SetStatus(StrEnum):
    """How a run's top-k feature set behaved over its training."""

    EARLY_STABLE = "EARLY_STABLE"
    """Stable, beyond noise, from a checkpoint in the first half of training on."""
    LATE_STABLE = "LATE_STABLE"
    """Stable only from a checkpoint in the second half on."""
    EVOLVING = "EVOLVING"
    """Shown to differ from the final set, beyond noise, up to the last checkpoint but one."""
    UNDETERMINED = "UNDETERMINED"
    """The noise ceiling is too low, or the interval too wide, to say."""


EARLY: Final = 0.5
"""Share of a run's training that counts as early: the first half, fixed before looking."""
SET_MARGIN: Final = 0.10
"""Excess turnover that still counts as the same set: one feature in ten (METHOD.md 4b)."""
MIN_CEILING: Final = 0.5
"""Final noise ceiling below which half of a top-k list is noise and comparing lists means little (METHOD.md 4b)."""


def set_status(verdict: str, stable_fraction: float, final_ceiling: float) -> SetStatus:
    """Status of one run's top-k set from its set test; a plain overlap is never looked at.

    Parameters
    ----------
    verdict
        SET_STABLE, EVOLVING or UNDETERMINED, as the set test gives it.
    stable_fraction
        Share of training from which the set is stable, NaN if it is not.
    final_ceiling
        Noise ceiling at the last checkpoint; below ``MIN_CEILING`` nothing is determined.
    """
    if math.isnan(final_ceiling) or final_ceiling < MIN_CEILING:
        return SetStatus.UNDETERMINED
    if verdict == "SET_STABLE" and not math.isnan(stable_fraction):
        return SetStatus.EARLY_STABLE if stable_fraction <= EARLY else SetStatus.LATE_STABLE
    return SetStatus.EVOLVING if verdict == "EVOLVING" else SetStatus.UNDETERMINED


def timing_verdict(sft: SetStatus, rl: SetStatus, low: float, high: float) -> Verdict:
    """Verdict on "SFT stabilises early, RL keeps evolving" from both runs' status and the difference's interval.

    SUPPORTED needs SFT early and stable, RL evolving or stable only late, and a difference in excess turnover (RL
    minus SFT, at half of training) above zero; CONTRADICTED the mirror image; NOT_SUPPORTED any other determined
    pair; UNDETERMINED if either run is, or if the pattern is there and the difference is not.
    """
    if SetStatus.UNDETERMINED in (sft, rl):
        return Verdict.UNDETERMINED
    later = (SetStatus.EVOLVING, SetStatus.LATE_STABLE)
    if sft is SetStatus.EARLY_STABLE and rl in later:
        return Verdict.SUPPORTED if low > 0 else Verdict.UNDETERMINED
    if rl is SetStatus.EARLY_STABLE and sft in later:
        return Verdict.CONTRADICTED if high < 0 else Verdict.UNDETERMINED
    return Verdict.NOT_SUPPORTED


COMPACT_SHARE: Final = 0.10
"""Largest share of the testable features a set may be and still be called compact (the paper's were below 0.2%)."""
MIN_TASKS: Final = 2
"""Estimable tasks below which "task-agnostic" says nothing."""


def selection_verdict(*, n_estimable: int, n_confirmed: int, n_testable: int, guarded: bool) -> Verdict:
    """Verdict on "a compact, task-agnostic feature set separates RL from base".

    Parameters
    ----------
    n_estimable
        Tasks with enough base-wrong/RL-right prompts.
    n_confirmed
        Features confirmed on verification prompts (Holm).
    n_testable
        Features that could have been confirmed.
    guarded
        Whether p-values carry a guard against having chosen prompts by their outcome (the RL-specific contrast, or a
        test on all prompts); without one, "separating" features appear when models do not differ (METHOD.md 4c).

    Returns
    -------
    Verdict
        NOT_ESTIMABLE without an estimable task; UNDETERMINED with fewer than two, or without a
        guard; NOT_SUPPORTED if nothing is confirmed or the confirmed set is no small part of the dictionary;
        else SUPPORTED.
    """
    if n_estimable == 0 or n_testable == 0:
        return Verdict.NOT_ESTIMABLE
    if n_estimable < MIN_TASKS or not guarded:
        return Verdict.UNDETERMINED
    if n_confirmed == 0 or n_confirmed > COMPACT_SHARE * n_testable:
        return Verdict.NOT_SUPPORTED
    return Verdict.SUPPORTED


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
