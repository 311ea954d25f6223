"""Options of a selection: how prompts are tested, which features form the set, how stability is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.core.feature_blocks import DEFAULT_MIN_FIRING

RuleKind = Literal["confirmed", "paper"]

DEFAULT_PAIRS: Final = 50
"""Complementary pairs B (docs/method.md 4c); with 50 the standard error of a share is about .05."""

DEFAULT_THRESHOLD: Final = 0.9
"""Share of half-samples from which a feature is called stable, the strict end of the customary .6 to .9."""


@dataclass(frozen=True, kw_only=True)
class SelectionTests:
    """How features are tested, task by task, and how errors are controlled.

    Raises
    ------
    InputError
        If ``alpha`` is not in (0, 1).
    """

    alpha: float = 0.05
    """Level of BH on the selection part and Holm on the verification part; intervals cover 1 - alpha."""
    n_resamples: int = 999
    """Draws of the nulls of the paper's rule."""
    n_bootstrap: int = 999
    """Draws of the bootstrap-t interval."""
    min_discordant: int = 20
    """Gains and losses (units) that the contrast of a task needs, each."""
    n_min: int = DEFAULT_MIN_FIRING
    """Selection prompts, pooled over both models, on which a testable feature fires."""
    u: int | None = None
    """Tasks in which a feature must show the effect; default all estimable ones."""
    combine: str = "simes"
    """How p-values of tasks are combined: bonferroni, simes or fisher."""

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise InputError(f"expected 0 < alpha < 1, got {self.alpha}.")


@dataclass(frozen=True, kw_only=True)
class SelectionRule:
    """Which features form the selected set.

    Raises
    ------
    InputError
        If the kind is unknown or ``score_fraction`` is not in (0, 1].
    """

    kind: RuleKind = "confirmed"
    """``confirmed``: the CONFIRMED features, else the CANDIDATEs, else the paper's set. ``paper``: the paper's set."""
    score_fraction: float = 0.2
    """Paper's rule: share of the task's largest score that a feature needs."""
    max_features: int = 50
    """Largest set selected; the highest ranked are kept."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(RuleKind) or not 0 < self.score_fraction <= 1:
            raise InputError(
                f"expected rule 'confirmed' or 'paper' and 0 < score_fraction <= 1; got {self.kind!r} and "
                f"{self.score_fraction}."
            )


@dataclass(frozen=True, kw_only=True)
class StabilityOptions:
    """Settings of stability selection.

    Raises
    ------
    InputError
        If no bound covers the settings: no pair, no feature per half, or a threshold not in (1/2, 1].
    """

    n_pairs: int = DEFAULT_PAIRS
    """Complementary pairs B of half-samples."""
    n_per_half: int | None = None
    """Features q kept per half-sample; default ``stability_selection.default_per_half``."""
    threshold: float = DEFAULT_THRESHOLD
    """Share of half-samples from which a feature is stable."""

    def __post_init__(self) -> None:
        if self.n_pairs < 1 or (self.n_per_half is not None and self.n_per_half < 1) or not 0.5 < self.threshold <= 1:
            raise InputError(
                f"expected n_pairs >= 1, n_per_half >= 1 and 1/2 < threshold <= 1 (the bounds hold there only), got "
                f"{self.n_pairs}, {self.n_per_half} and {self.threshold}."
            )
