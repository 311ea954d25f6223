"""What a trial's design cannot show whatever its outcomes, and how many prompts would: known before sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlgen_stats.toolkit.statistics.causal.criteria import MIN_DOSES
from rlgen_stats.toolkit.statistics.causal.findings import Check


@dataclass(frozen=True)
class Shortfall:
    """A criterion that cannot pass."""

    check: Check
    needed: int
    got: int

    @property
    def rules_out_a_cause(self) -> bool:
        """Whether nothing can be CAUSAL_SPECIFIC; else only the absence of an effect cannot be shown."""
        return self.check is not Check.NO_EFFECT

    def __str__(self) -> str:
        """What is missing, in words."""
        what, outcome = _WORDS[self.check]
        return f"{self.check}: {outcome} with {self.got} {what}, {self.needed} are needed"


_WORDS = {
    Check.V1_EFFECT: ("clusters of target prompts", "no effect can be significant"),
    Check.NO_EFFECT: ("clusters of target prompts", "the absence of an effect cannot be shown"),
    Check.V2_RANK: ("random sets", "no rank can be significant"),
    Check.V3_DOSE: ("intermediate doses", "no dose response can be shown"),
    Check.V4_ACCURACY: ("clusters of unrelated prompts", "side effects cannot be shown to be small"),
}


def clusters_to_exclude(margin: float, *, alpha: float) -> int:
    """Fewest clusters from which a change beyond the margin is excluded one-sided at alpha, if none of them changes.

    Examples
    --------
    >>> clusters_to_exclude(0.05, alpha=0.05)
    59
    """
    return math.floor(math.log(alpha) / math.log1p(-margin)) + 1


def clusters_for_a_sign_flip(*, alpha: float) -> int:
    """Fewest clusters whose sign flips can give a two-sided p-value of alpha, if all change in one direction.

    Examples
    --------
    >>> clusters_for_a_sign_flip(alpha=0.05)
    6
    """
    return math.ceil(1 - math.log2(alpha))


def shortfalls(
    *, n_target: int, n_unrelated: int, n_random: int, n_doses: int, alpha: float, margin: float
) -> tuple[Shortfall, ...]:
    """Criteria that a trial of this size cannot pass.

    Parameters
    ----------
    n_target, n_unrelated
        Clusters of prompts on which the effect and side effects are measured.
    n_random
        Random sets planned.
    n_doses
        Doses strictly between no edit and the main one.
    alpha, margin
        Level of the tests, accuracy change called harmless.
    """
    to_exclude = clusters_to_exclude(margin, alpha=alpha)
    designed = (
        (Check.V1_EFFECT, clusters_for_a_sign_flip(alpha=alpha), n_target),
        (Check.V2_RANK, math.ceil(1 / alpha - 1e-9) - 1, n_random),
        (Check.V3_DOSE, MIN_DOSES, n_doses),
        (Check.V4_ACCURACY, to_exclude, n_unrelated),
        (Check.NO_EFFECT, to_exclude, n_target),
    )
    return tuple(Shortfall(check, needed, got) for check, needed, got in designed if got < needed)
