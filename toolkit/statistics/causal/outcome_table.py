"""What a causal trial yields: graded completions of every arm on the same prompts, and paired effects on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import FORMAT_CLASSES
from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.toolkit.statistics.kernels import bounded_interval, pooled_mean, sign_flip_test

Direction = Literal["disable", "amplify"]
Floats = NDArray[np.float64]

DIRECTIONS: Final[tuple[Direction, ...]] = ("disable", "amplify")
"""The set is disabled in the RL model, and amplified in base."""
N_RESAMPLES: Final = 9999
"""Sign flips where enumeration is too long: the Monte-Carlo error of p = .05 is then .002."""

OUTCOME_CLASSES: Final = ("right", "wrong", "no_answer", "empty", "degenerate", "truncated")
"""How a completion ended: right; an answer, but a wrong one; or a format class without an answer."""
CURVE_KINDS: Final = ("curve", "curve_random", "lift_random")
"""Kinds of arm that are run for the curve of mediated shares alone: they have no row among the arms that are judged."""
BROKEN_CLASSES: Final = ("empty", "degenerate", "truncated")
"""Endings of a model that no longer works, as opposed to one that answers wrongly or not at all."""


@dataclass(frozen=True)
class Condition:
    """One arm.

    Its ``kind`` is unedited, fresh, passthrough, set, dose, steering, random_direction, patch, lift, lower or part; of
    random sets, random or rescaled; or one of ``CURVE_KINDS``.
    """

    name: str
    kind: str
    dose: float


@dataclass(frozen=True)
class Texts:
    """Completions that V6 compares word by word, [prompt, sample] each, and what V4 needs to know of prompts."""

    unedited: NDArray[np.object_]
    """Of the model that is edited, as it is."""
    edited: NDArray[np.object_]
    """Of the set's arm."""
    other: NDArray[np.object_]
    """Of the other model, unedited, with the same seeds."""
    prompts: NDArray[np.object_]
    """[prompt] the prompts themselves."""
    neutral: tuple[str, ...] = ()
    """Neutral texts."""


@dataclass(frozen=True, kw_only=True)
class OutcomeTable:
    """Outcomes of one direction on the same prompts and samples in every arm.

    Attributes
    ----------
    direction
        ``disable`` (the RL model is edited) or ``amplify`` (base is edited).
    conditions
        Arms; exactly one of kind ``unedited`` and one of kind ``set``.
    correct
        [condition, prompt, sample] 0 or 1.
    ending
        [condition, prompt, sample] index into ``OUTCOME_CLASSES``.
    other_ending
        [prompt, sample] the same for the other model, unedited: base when disabling, RL when amplifying.
    kl_to_base, kl_to_rl
        [condition, prompt] KL(arm || model) of next-token distributions in nats, averaged over the positions that
        predict a forced completion; NaN where not computed.
    n_tokens
        [condition, prompt, sample] length of the completion.
    neutral_kl
        [condition] KL(unedited || arm) per token on text that neither model wrote; NaN where not computed.
    task, cluster
        [prompt] labels.
    target, unrelated
        [prompt] whether the effect is measured there, or side effects are.
    texts
        Completions of the set's arm and both unedited models, prompts and neutral texts; None where not known.
    parts
        Of several dictionaries: the table of each, with the same conditions. Samples are then dictionary by dictionary,
        and divergences their means.
    """

    direction: Direction
    conditions: tuple[Condition, ...]
    correct: Floats
    ending: NDArray[np.int64]
    other_ending: NDArray[np.int64]
    kl_to_base: Floats
    kl_to_rl: Floats
    neutral_kl: Floats
    n_tokens: Floats
    task: NDArray[np.str_]
    cluster: NDArray[np.str_]
    target: NDArray[np.bool_]
    unrelated: NDArray[np.bool_]
    texts: Texts | None = None
    parts: tuple[OutcomeTable, ...] = ()

    def __post_init__(self) -> None:
        n_conditions, n_prompts = len(self.conditions), len(self.task)
        if self.correct.shape[:2] != (n_conditions, n_prompts) or self.ending.shape != self.correct.shape:
            raise InputError(
                f"outcomes must be [{n_conditions} conditions, {n_prompts} prompts, sample], got {self.correct.shape} "
                f"and {self.ending.shape}."
            )
        for kind in ("unedited", "set"):
            if sum(c.kind == kind for c in self.conditions) != 1:
                raise InputError(
                    f"a trial has exactly one arm of kind {kind!r}, got {[c.kind for c in self.conditions]}."
                )
        if not self.target.any():
            raise InputError("a trial needs prompts on which its effect is measured, got none.")

    @property
    def sign(self) -> float:
        """Sign of the effect that the hypothesis predicts: -1 when disabling, +1 when amplifying."""
        return -1.0 if self.direction == "disable" else 1.0

    def index(self, kind: str) -> int | None:
        """Position of the first arm of a kind, None if there is none."""
        return next((i for i, condition in enumerate(self.conditions) if condition.kind == kind), None)

    def where(self, kind: str) -> NDArray[np.int64]:
        """Positions of all arms of a kind."""
        return np.array([i for i, condition in enumerate(self.conditions) if condition.kind == kind], dtype=np.int64)

    @property
    def unedited(self) -> int:
        """Position of the unedited arm."""
        return next(i for i, condition in enumerate(self.conditions) if condition.kind == "unedited")

    @property
    def chosen(self) -> int:
        """Position of the set's arm."""
        return next(i for i, condition in enumerate(self.conditions) if condition.kind == "set")

    @property
    def other_correct(self) -> Floats:
        """[prompt, sample] 1 where the other model, unedited, is right."""
        return np.asarray(self.other_ending == OUTCOME_CLASSES.index("right"), dtype=np.float64)

    def accuracy(self, mask: NDArray[np.bool_]) -> Floats:
        """[condition] accuracy over the masked prompts; NaN without any."""
        if not mask.any():
            return np.full(len(self.conditions), np.nan)
        return np.asarray(self.correct[:, mask].mean(axis=(1, 2)), dtype=np.float64)

    @property
    def n_dictionaries(self) -> int:
        """Dictionaries whose sets were edited."""
        return len(self.parts) or 1

    def keep(self, names: Sequence[str]) -> OutcomeTable:
        """The same with these conditions alone, in this order."""
        rows = [[condition.name for condition in self.conditions].index(name) for name in names]
        by_condition = ("correct", "ending", "kl_to_base", "kl_to_rl", "neutral_kl", "n_tokens")
        return replace(
            self,
            conditions=tuple(self.conditions[row] for row in rows),
            **{name: getattr(self, name)[rows] for name in by_condition},
        )

    def per_prompt(self, mask: NDArray[np.bool_]) -> Floats:
        """[dictionary, condition, prompt] share of right completions of the masked prompts."""
        n_conditions, n_prompts = len(self.conditions), int(mask.sum())
        by_dictionary = self.correct[:, mask].reshape(n_conditions, n_prompts, self.n_dictionaries, -1)
        return np.asarray(by_dictionary.mean(axis=3).transpose(2, 0, 1), dtype=np.float64)

    def change(self, mask: NDArray[np.bool_]) -> Floats:
        """[dictionary, prompt, condition] per-prompt accuracy of every arm minus the unedited one's."""
        per_prompt = self.per_prompt(mask)
        return (per_prompt - per_prompt[:, [self.unedited]]).transpose(0, 2, 1)

    def shares(self, mask: NDArray[np.bool_]) -> Floats:
        """[condition, class] share of each ending over the masked prompts."""
        return np.stack([class_shares(self.ending[i][mask]) for i in range(len(self.conditions))])

    def broken(self, mask: NDArray[np.bool_]) -> Floats:
        """[condition] share of completions of a model that no longer works, over the masked prompts."""
        columns = [OUTCOME_CLASSES.index(name) for name in BROKEN_CLASSES]
        return np.asarray(self.shares(mask)[:, columns].sum(axis=1), dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class DirectionOutcomes:
    """Everything that running one direction of a trial yields, and all that its verdict is judged from.

    Attributes
    ----------
    table
        Graded completions of every arm that was run.
    divergences
        Name -> [condition, prompt], nats: ``kl_to_base``, ``kl_to_rl`` at the first completion position,
        ``forced_kl_to_base``, ``forced_kl_to_rl`` over forced completions; NaN where not computed.
    passthrough_changed
        Share of completions that the passthrough arm changed: above 0 only by rounding.
    non_finite
        Arms in which some logits were not finite.
    curve_correct
        Name of an arm of ``CURVE_KINDS`` -> [prompt] its share of right completions.
    """

    table: OutcomeTable
    divergences: Mapping[str, Floats]
    passthrough_changed: float
    non_finite: tuple[str, ...]
    curve_correct: Mapping[str, Floats] = field(default_factory=dict)


@dataclass(frozen=True)
class PairedEffect:
    """Mean paired differences with cluster intervals and sign-flip p-values, one entry a column.

    Attributes
    ----------
    mean, low, high
        Estimate and two-sided interval.
    p_value
        Two-sided sign-flip p; 1 where no unit differs or the clusters are too few.
    """

    mean: Floats
    low: Floats
    high: Floats
    p_value: Floats


def paired_effect(
    differences: Floats, clusters: NDArray[np.str_], *, alpha: float, seed: int, n_resamples: int, limit: float = 1.0
) -> PairedEffect:
    """Effects of arms from per-prompt differences; the unit is the cluster, and the dictionary where there are several.

    Parameters
    ----------
    differences
        [prompt, column], or [dictionary, prompt, column].
    clusters
        [prompt] labels; prompts of one cluster flip together.
    alpha
        1 - coverage.
    seed, n_resamples
        Of the Monte-Carlo sign flips, where enumeration is too long.
    limit
        Largest absolute difference possible; infinite for divergences, whose intervals are plain t-intervals.

    Returns
    -------
    PairedEffect
        Of several dictionaries: their mean, with the variance between them in interval and p-value
        (:func:`pooled_mean`).
    """
    codes = np.unique(clusters, return_inverse=True)[1]
    if differences.ndim == 3:
        if len(differences) > 1 and codes.any():
            return _pooled_effect(differences, codes, alpha, limit)
        differences = differences.mean(axis=0)
    try:
        test = sign_flip_test(differences, n_resamples=n_resamples, seed=seed, clusters=codes)
        p_value = np.atleast_1d(np.asarray(test.p_value, dtype=np.float64))
    except RefusedError:  # too few clusters to find anything
        p_value = np.full(differences.shape[1], np.nan)
    mean, low, high = bounded_interval(differences, codes, alpha=alpha, limit=limit)
    return PairedEffect(mean, low, high, np.where(np.isnan(p_value), 1.0, p_value))


def _pooled_effect(differences: Floats, codes: NDArray[np.int64], alpha: float, limit: float) -> PairedEffect:
    _, low, high = bounded_interval(differences.mean(axis=0), codes, alpha=alpha, limit=limit)
    pooled = pooled_mean(differences, codes, alpha=alpha, within=(low, high))
    p_value = np.where(np.isnan(pooled.p_value), 1.0, pooled.p_value)
    return PairedEffect(pooled.mean, np.maximum(pooled.low, -limit), np.minimum(pooled.high, limit), p_value)


def finite_mean(values: Floats) -> float:
    """Mean of the finite values, NaN without any."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def class_shares(ending: NDArray[np.int64]) -> Floats:
    """Share of each of ``OUTCOME_CLASSES`` among endings."""
    return np.bincount(ending.ravel(), minlength=len(OUTCOME_CLASSES)) / max(ending.size, 1)


def ending_of(correct: NDArray[np.bool_], format_class: NDArray[np.str_]) -> NDArray[np.int64]:
    """Index into ``OUTCOME_CLASSES`` of graded completions.

    Raises
    ------
    InputError
        If a format class is unknown.
    """
    unknown = sorted(set(np.unique(format_class).tolist()) - set(FORMAT_CLASSES))
    if unknown:
        raise InputError(f"format classes are {', '.join(FORMAT_CLASSES)}; got {', '.join(unknown)}.")
    names = np.where(correct, "right", np.where(format_class == "answer", "wrong", format_class))
    lookup = {name: i for i, name in enumerate(OUTCOME_CLASSES)}
    return np.array([lookup[str(name)] for name in names.ravel()], dtype=np.int64).reshape(names.shape)
