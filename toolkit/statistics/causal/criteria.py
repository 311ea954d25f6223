"""The criteria V1 to V6 of a causal trial, one function each (docs/method.md 4d)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.isotonic import IsotonicRegression

from rlgen_stats.toolkit.statistics.causal.outcome_table import (
    OUTCOME_CLASSES,
    Direction,
    Floats,
    OutcomeTable,
    PairedEffect,
    class_shares,
    paired_effect,
)
from rlgen_stats.toolkit.statistics.kernels import adjust, dictionaries_needed, same_direction
from rlgen_stats.toolkit.statistics.kernels.numerics import TIE_SLACK

MIN_EFFECT: Final = 0.02
"""Accuracy change that the interval must exclude before an effect counts (docs/method.md 4d, V1)."""
NEUTRAL_KL: Final = 0.1
"""Nats per token on neutral text called harmless: perplexity changes by at most 10%."""
RANDOM_QUANTILE: Final = 0.95
"""A larger divergence on neutral text is still harmless below this quantile of the matched random sets."""
NEW_FAILURE_SHARE: Final = 0.5
"""If failures that neither model shows make up more than half of the effect, the edit broke the model."""
NOOP_CHANGE: Final = 0.05
"""Share of completions that a passthrough may change through rounding before the machinery is not trusted."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Declared before the trial."""

    alpha: float
    """Level of every test."""
    margin: float
    """Accuracy change called harmless: non-inferiority on unrelated tasks, equivalence for NO_EFFECT."""
    n_resamples: int
    """Sign flips where enumeration is too long."""
    seed: int
    """Seed of the sign flips."""
    comparable: bool = True
    """Whether the random sets match the set well enough to be its controls."""
    control_flags: tuple[str, ...] = ()
    """What the matching fell short of."""
    noop_changed: float = 0.0
    """Share of completions that the passthrough arm changed."""
    n_planned: int = 0
    """Random sets planned, where they were stopped by the :class:`FutilityRule`; 0: all were run."""
    ranks: tuple[float, ...] = ()
    """Rank p-values of the set in each dictionary, where outcomes of several are judged together."""
    missing: tuple[int, ...] = ()
    """Numbers of the dictionaries that have no set, where several are judged together."""


@dataclass(frozen=True)
class Criterion:
    """Whether one of V1 to V6 holds, and what speaks for or against it."""

    passed: bool
    reasons: tuple[str, ...]


def _paired(differences: Floats, clusters: NDArray[np.str_], settings: Settings) -> PairedEffect:
    """Paired effects at the declared level, with the declared sign flips."""
    return paired_effect(
        differences, clusters, alpha=settings.alpha, seed=settings.seed, n_resamples=settings.n_resamples
    )


def interval(
    table: OutcomeTable, settings: Settings, condition: int, mask: NDArray[np.bool_], alpha: float
) -> tuple[float, float]:
    """Interval at level 1 - alpha of one arm's effect on the masked prompts."""
    column = table.change(mask)[..., [condition]]
    effect = paired_effect(
        column, table.cluster[mask], alpha=alpha, seed=settings.seed, n_resamples=settings.n_resamples
    )
    return float(effect.low[0]), float(effect.high[0])


# -- V1, V2


def effect_shown(table: OutcomeTable, effects: PairedEffect, settings: Settings) -> Criterion:
    """V1: the set's arm differs from the unedited one as predicted, by more than MIN_EFFECT, in every dictionary."""
    i = table.chosen
    bound = effects.low[i] if table.sign > 0 else -effects.high[i]
    passed = bool(effects.p_value[i] <= settings.alpha and bound > MIN_EFFECT)
    text = f"{effects.mean[i]:+.3f} [{effects.low[i]:+.3f}, {effects.high[i]:+.3f}], p={effects.p_value[i]:.3g}"
    reasons = [f"v1_effect: {text}"]
    each = table.change(table.target)[:, :, i].mean(axis=1)
    if len(each) > 1 and each.any() and not same_direction(each, effects.mean[i]):
        passed = False
        reasons.append(f"v1_dictionaries: they disagree on the direction, {', '.join(f'{one:+.3f}' for one in each)}")
    opposite = effects.high[i] if table.sign > 0 else -effects.low[i]
    if effects.p_value[i] <= settings.alpha and opposite < 0:
        reasons.append(f"v1_opposite: accuracy changed against the prediction of '{table.direction}'")
    return Criterion(passed, tuple(reasons))


def is_futile(n_as_large: int, n_planned: int, alpha: float) -> bool:
    """Whether the rank p-value must exceed alpha, however the random sets that are still to come turn out.

    Examples
    --------
    >>> is_futile(4, 99, 0.05), is_futile(5, 99, 0.05)
    (False, True)
    """
    return (1 + n_as_large) / (n_planned + 1) > alpha


class FutilityRule:
    """When the random sets of a direction may stop: they are run in random order, after the set.

    Parameters
    ----------
    direction
        Sign of the predicted effect.
    n_planned
        Random sets to be run at most.
    alpha
        Level of the rank test.

    Attributes
    ----------
    n_run, n_as_large
        Random sets run so far, and those with at least as large an effect as the set.
    """

    def __init__(self, direction: Direction, *, n_planned: int, alpha: float) -> None:
        self._sign = 1.0 if direction == "amplify" else -1.0
        self._n_planned, self._alpha = n_planned, alpha
        self._set_accuracy = np.inf
        self.n_run = self.n_as_large = 0

    def add(self, kind: str, accuracy: float) -> None:
        """Count an arm of a kind with its accuracy on target prompts; effects rank as accuracies do."""
        if kind == "set":
            self._set_accuracy = self._sign * accuracy
        elif kind == "random":
            self.n_run += 1
            self.n_as_large += int(self._sign * accuracy >= self._set_accuracy - TIE_SLACK)

    @property
    def stop(self) -> bool:
        """Whether no further random set can make the set special; not before one had as large an effect as the set.

        Where so few are planned that even the best rank exceeds alpha, stopping at none would make the rank p-value 0.
        """
        return self.n_as_large > 0 and is_futile(self.n_as_large, self._n_planned, self._alpha)

    @property
    def reason(self) -> str:
        """Why, in words."""
        return (
            f"{self.n_as_large} had at least as large an effect as the set, so that its rank p-value must exceed "
            f"{self._alpha}"
        )


def specificity(table: OutcomeTable, effects: PairedEffect, settings: Settings) -> tuple[Criterion, float]:
    """V2: rank of the set's effect among the random sets'.

    p = (1 + as large) / (1 + all) (Phipson & Smyth 2010, doi:10.2202/1544-6115.1585); where the sets were stopped at
    the h-th that is as large, p = h / sets run (Besag & Clifford 1991, doi:10.1093/biomet/78.2.301), also exact.
    """
    random = table.where("random")
    flags = tuple(f"v2_controls: {flag}" for flag in settings.control_flags)
    if settings.ranks:
        rank_p = combined_rank_p(settings.ranks)
        each = ", ".join(f"{p:.3g}" for p in settings.ranks)
        text = f"v2_specificity: p={rank_p:.3g}, combined from the rank p of each dictionary: {each}"
        return Criterion(bool(rank_p <= settings.alpha and settings.comparable), (text, *flags)), rank_p
    if not len(random):
        return Criterion(False, (*flags, "v2_no_controls: no random sets")), float("nan")
    signed = table.sign * effects.mean
    n_as_large = int((signed[random] >= signed[table.chosen] - TIE_SLACK).sum())
    stopped = len(random) < settings.n_planned
    rank_p = n_as_large / len(random) if stopped and n_as_large else (1 + n_as_large) / (len(random) + 1)
    text = (
        f"v2_specificity: rank p={rank_p:.3g} among {len(random)} random sets, whose effects are "
        f"{effects.mean[random].min():+.3f} to {effects.mean[random].max():+.3f}"
    )
    if stopped:
        first = f"{n_as_large} of the first {len(random)} of {settings.n_planned} sets"
        flags += (f"v2_stopped: {first} had at least as large an effect",)
    return Criterion(bool(rank_p <= settings.alpha and settings.comparable), (text, *flags)), rank_p


def combined_rank_p(ranks: Sequence[float]) -> float:
    """One p-value of several dictionaries' rank p-values, however these depend on each other; NaN if one is.

    The p-value of their mean normal score. Sets of different dictionaries have much in common, so that their ranks do
    too: Stouffer's rule, which takes them to be independent, rejects .16 of true nulls at .05 where three agree wholly.
    The mean of jointly normal scores never has a variance above 1, so this is exact where they agree and conservative
    elsewhere.

    Examples
    --------
    >>> round(combined_rank_p([0.03, 0.05, 0.4]), 3), combined_rank_p([0.01, 0.01, 0.01])
    (0.104, 0.01)
    """
    if len(ranks) == 1:
        return float(ranks[0])
    # a set that is last of all says no more than that: its score would be minus infinity
    return float(round(stats.norm.sf(np.mean(stats.norm.isf(np.minimum(ranks, 0.99)))), 12))


# -- V3


def dose_order(table: OutcomeTable) -> tuple[list[int], list[int]]:
    """Arms between no edit (dose 1) and the main dose in rising order of dose, and arms beyond the main dose."""
    main = table.conditions[table.chosen].dose
    doses = {i: table.conditions[i].dose for i in table.where("dose").tolist()}
    low, high = min(main, 1.0), max(main, 1.0)
    within = [i for i, dose in doses.items() if low < dose < high]
    beyond = [i for i, dose in doses.items() if (dose - main) * (main - 1.0) > 0]
    dose_of = {**doses, table.chosen: main, table.unedited: 1.0}
    return sorted([*within, table.chosen, table.unedited], key=lambda i: dose_of[i]), sorted(
        beyond, key=doses.__getitem__
    )


def isotonic_fit(table: OutcomeTable) -> Floats:
    """[condition] accuracy on target prompts fitted to rise with the dose, from no edit to the main dose; else NaN."""
    order, _ = dose_order(table)
    doses = [1.0 if i == table.unedited else table.conditions[i].dose for i in order]
    accuracy = table.accuracy(table.target)
    fitted = np.full(len(accuracy), np.nan)
    fitted[order] = IsotonicRegression(increasing=True).fit(doses, accuracy[order]).predict(doses)
    return fitted


def dose_response(table: OutcomeTable, settings: Settings) -> Criterion:
    """V3: accuracy rises with the dose: centred-rank contrast per prompt, and no significant step down."""
    order, _ = dose_order(table)
    if len(order) < 3:
        return Criterion(False, ("v3_not_estimable: no dose between no edit and the main dose",))
    per_prompt = table.per_prompt(table.target)[:, order]
    ranks = np.arange(len(order)) - (len(order) - 1) / 2
    columns = np.stack([np.tensordot(per_prompt, ranks, (1, 0)), *np.diff(per_prompt, axis=1).swapaxes(0, 1)], axis=-1)
    effect = _paired(columns, table.cluster[table.target], settings)
    down = np.where(effect.mean[1:] < 0, effect.p_value[1:], 1.0)
    falls = bool(down.min() <= settings.alpha / len(down))  # Holm rejects any if it rejects the smallest
    doses = [1.0 if i == table.unedited else table.conditions[i].dose for i in order]
    rows = zip(doses, per_prompt.mean(axis=(0, 2)), isotonic_fit(table)[order], strict=True)
    points = ", ".join(f"{d:g}: {a:.3f} ({f:.3f})" for d, a, f in rows)
    reasons = [f"v3_dose: contrast p={effect.p_value[0]:.3g}, dose: accuracy (isotonic fit) {points}"]
    if falls:
        reasons.append("v3_not_monotone: accuracy falls between two rising doses")
    return Criterion(bool(effect.p_value[0] <= settings.alpha and effect.mean[0] > 0 and not falls), tuple(reasons))


def over_steered(table: OutcomeTable, effects: PairedEffect, settings: Settings) -> NDArray[np.bool_]:
    """[condition] doses beyond the main one that do worse than it, or break the format."""
    _, beyond = dose_order(table)
    shares = table.broken(table.target)
    flagged = np.zeros(len(shares), dtype=np.bool_)
    for i in beyond:
        worse = table.sign * (effects.mean[i] - effects.mean[table.chosen]) < -MIN_EFFECT
        flagged[i] = worse or shares[i] - shares[table.unedited] > settings.margin
    return flagged


def over_steering(table: OutcomeTable, effects: PairedEffect, settings: Settings) -> tuple[str, ...]:
    """One note a dose that :func:`over_steered` finds."""
    shares = table.broken(table.target)
    return tuple(
        f"over_steering: dose {table.conditions[i].dose:g} has effect {effects.mean[i]:+.3f} and {shares[i]:.1%} "
        "broken completions"
        for i in np.flatnonzero(over_steered(table, effects, settings))
    )


# -- V4


def side_effects(table: OutcomeTable, settings: Settings) -> Criterion:
    """V4: unrelated tasks keep their accuracy and format, and neutral text its distribution."""
    if not table.unrelated.any():
        return Criterion(False, ("v4_not_estimable: no unrelated tasks; name some under selection.control_tasks",))
    i, unedited = table.chosen, table.unedited
    low, _ = interval(table, settings, i, table.unrelated, 2 * settings.alpha)  # one-sided at alpha
    kept = low > -settings.margin
    broken = table.broken(table.unrelated)
    rise = float(broken[i] - broken[unedited])
    length = table.n_tokens[:, table.unrelated].mean(axis=(1, 2))
    kl = float(table.neutral_kl[i])
    random = table.neutral_kl[table.where("random")]
    random = random[np.isfinite(random)]
    limit = max(NEUTRAL_KL, float(np.quantile(random, RANDOM_QUANTILE)) if len(random) else 0.0)
    text_unchanged = bool(kl <= limit)
    n = int(table.unrelated.sum())
    reasons = (
        f"v4_{'kept' if kept else 'not_shown'}: accuracy on {n} unrelated prompts changes by no less than {low:+.3f} "
        f"(margin {settings.margin})",
        f"v4_format: broken completions on unrelated tasks {rise:+.1%}",
        f"v4_neutral_kl: {kl:.3g} nats a token (limit {limit:.3g})"
        if np.isfinite(kl)
        else "v4_neutral_kl_not_estimable: the prompts have no text before their last token",
        f"v4_length: completions on unrelated tasks {length[unedited]:.1f} -> {length[i]:.1f} tokens, reported only",
    )
    return Criterion(bool(kept and rise <= settings.margin and text_unchanged), reasons)


# -- V5, V6


def replication(table: OutcomeTable, settings: Settings) -> str:
    """V5: in how many target tasks, and in how many dictionaries, the effect appears on its own.

    Holm-adjusted over tasks, and over dictionaries.
    """
    change, tasks = table.change(table.target)[..., [table.chosen]], table.task[table.target]
    alone = {str(task): change[:, tasks == task] for task in np.unique(tasks)}
    clusters = {task: table.cluster[table.target & (table.task == task)] for task in alone}
    words = _shown_in(table, settings, alone, clusters, "tasks on their own (Holm)")
    if table.n_dictionaries < 2:
        return f"{words}. One dictionary: not replicated in another"
    numbers = [n for n in range(1, table.n_dictionaries + len(settings.missing) + 1) if n not in settings.missing]
    each = {f"dictionary {number}": of_one for number, of_one in zip(numbers, change, strict=True)}
    everywhere = dict.fromkeys(each, table.cluster[table.target])
    return f"{words}. {_shown_in(table, settings, each, everywhere, 'dictionaries on their own (Holm)')}"


def _shown_in(
    table: OutcomeTable,
    settings: Settings,
    changes: dict[str, Floats],
    clusters: dict[str, NDArray[np.str_]],
    what: str,
) -> str:
    """In how many places the set's effect is significant and as predicted, from its changes of accuracy there."""
    effects = [_paired(change, clusters[place], settings) for place, change in changes.items()]
    adjusted = np.atleast_1d(np.asarray(adjust(np.array([float(e.p_value[0]) for e in effects]), method="holm")))
    means = [float(effect.mean[0]) for effect in effects]
    n_shown = sum(table.sign * m > 0 and p <= settings.alpha for m, p in zip(means, adjusted, strict=True))
    every = ", ".join(f"{place} {m:+.3f}" for place, m in zip(changes, means, strict=True))
    return f"{n_shown} of {len(changes)} {what}: {every}"


def failure_mode_match(table: OutcomeTable, settings: Settings) -> tuple[Criterion, bool]:
    """V6: the edited model moves toward the other model, in distribution and in how it fails; and whether it broke.

    Of several dictionaries, as a whole and in as many as must agree.
    """
    whole, broke = _failure_mode(table, settings)
    if not table.parts:
        return whole, broke
    each = [_failure_mode(part, settings) for part in table.parts]
    n_match, n_broke = sum(one.passed for one, _ in each), sum(breaks for _, breaks in each)
    needed = dictionaries_needed(len(each))
    text = f"v6_dictionaries: it holds in {n_match} of {len(each)}, and {n_broke} break the model"
    passed = whole.passed and n_match >= needed
    return Criterion(passed, (*whole.reasons, text)), broke or n_broke > len(each) - needed


def _failure_mode(table: OutcomeTable, settings: Settings) -> tuple[Criterion, bool]:
    i, unedited, target = table.chosen, table.unedited, table.target
    kl = table.kl_to_base if table.direction == "disable" else table.kl_to_rl
    paired = target & np.isfinite(kl[i]) & np.isfinite(kl[unedited])
    reasons, nearer = [], False
    if paired.any():
        effect = _paired((kl[i] - kl[unedited])[paired][:, None], table.cluster[paired], settings)
        nearer = bool(effect.mean[0] < 0 and effect.p_value[0] <= settings.alpha)
        reasons.append(
            f"v6_kl: divergence from the other model {kl[unedited][paired].mean():.3f} -> {kl[i][paired].mean():.3f} "
            f"nats, p={effect.p_value[0]:.3g}"
        )
    else:
        reasons.append("v6_kl_not_estimable: no divergences")
    other = class_shares(table.other_ending[target])
    before, after = (class_shares(table.ending[c][target]) for c in (unedited, i))
    # Total variation: the share of completions that would have to end otherwise.
    distance = [0.5 * float(np.abs(shares - other).sum()) for shares in (before, after)]
    excess = np.maximum(after - np.maximum(before, other), 0.0)[1:]  # every ending but 'right'
    new = float(excess.sum())
    broke = new > NEW_FAILURE_SHARE * abs(float(table.change(target)[..., i].mean()))
    worst = OUTCOME_CLASSES[1 + int(np.argmax(excess))] if new > 0 else "none"
    reasons.append(
        f"v6_endings: distance to the other model {distance[0]:.3f} -> {distance[1]:.3f}, "
        f"{new:.1%} new failures (most: {worst})"
    )
    return Criterion(bool(nearer and distance[1] < distance[0] and not broke), tuple(reasons)), broke


# -- notes


def fresh_seeds(table: OutcomeTable, effects: PairedEffect, settings: Settings) -> tuple[str, ...]:
    """A warning if other seeds alone already change accuracy."""
    fresh = table.index("fresh")
    if fresh is not None and effects.p_value[fresh] <= settings.alpha:
        return (f"fresh_differs: other seeds alone change accuracy by {effects.mean[fresh]:+.3f}",)
    return ()


def baselines(table: OutcomeTable, settings: Settings) -> tuple[str, ...]:
    """Whether the set beats one mean-shift vector and a random vector of equal norm, paired over prompts."""
    notes = []
    per_prompt = table.per_prompt(table.target)
    for kind in ("steering", "random_direction"):
        i = table.index(kind)
        if i is None:
            continue
        effect = _paired(
            table.sign * (per_prompt[:, table.chosen] - per_prompt[:, i])[..., None],
            table.cluster[table.target],
            settings,
        )
        beats = bool(effect.mean[0] > 0 and effect.p_value[0] <= settings.alpha)
        notes.append(
            f"{'beats' if beats else 'does_not_beat'}_{kind}: set minus {kind.replace('_', ' ')} "
            f"{effect.mean[0]:+.3f} [{effect.low[0]:+.3f}, {effect.high[0]:+.3f}], p={effect.p_value[0]:.3g}"
        )
    return tuple(notes)
