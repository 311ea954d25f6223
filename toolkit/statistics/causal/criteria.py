"""The criteria V1 to V6 of a causal trial, one function each (docs/method.md 4d)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.isotonic import IsotonicRegression
from statsmodels.stats.proportion import proportion_confint

from rlgen_stats.toolkit.statistics.causal.failure_modes import UNLIKE, Agreement, agreement_of, kinds_of_endings
from rlgen_stats.toolkit.statistics.causal.findings import Check, Finding, Findings
from rlgen_stats.toolkit.statistics.causal.outcome_table import (
    N_RESAMPLES,
    OUTCOME_CLASSES,
    Direction,
    Floats,
    OutcomeTable,
    PairedEffect,
    paired_effect,
)
from rlgen_stats.toolkit.statistics.causal.telling_words import telling_words, with_any_of
from rlgen_stats.toolkit.statistics.kernels import adjust, dictionaries_needed, same_direction
from rlgen_stats.toolkit.statistics.kernels.numerics import TIE_SLACK

MIN_EFFECT: Final = 0.02
"""Accuracy change that the interval must exclude before an effect counts (docs/method.md 4d, V1)."""
AS_MUCH: Final = 0.5
"""A random set with at least this share of the set's effect does as much as the set."""
MANY_RANDOM: Final = 0.25
"""Shown to be exceeded by the share of random sets that do as much, the effect is not specific to the set."""
FEWEST_RANDOM: Final = 19
"""Random sets that are run before futility stops them, where as many are planned: of 19, nine that do as much show that
more than ``MANY_RANDOM`` do."""
MIN_DOSES: Final = 3
"""Doses strictly between no edit and the main one that a dose response is tested on, both end points left out."""
MIN_ACCURACY: Final = 0.2
"""Unedited accuracy below which an unrelated task has nothing to lose and says nothing about side effects."""
NEUTRAL_KL: Final = 0.1
"""Nats per token on neutral text called harmless: perplexity changes by at most 10%."""
RANDOM_QUANTILE: Final = 0.95
"""A larger divergence on neutral text is still harmless below this quantile of the matched random sets."""
NOT_NEUTRAL: Final = 0.05
"""Share of neutral texts that may hold words that go with where the two models differ: an edit that undoes what one of
them learned changes such texts rightly, so that a divergence there is no side effect, nor is it shown to be none."""
MIN_CLOSED: Final = 0.1
"""Share of the way to the other model that an edit must be shown to go, in divergence and in agreement prompt by
prompt: damage that hits hard prompts first goes a little of it too."""
NEW_FAILURE_SHARE: Final = 0.5
"""If failures that neither model shows make up more than half of the effect, the edit broke the model."""
NOOP_CHANGE: Final = 0.05
"""Share of completions that a passthrough may change through rounding before the machinery is not trusted."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Declared before the trial."""

    alpha: float = 0.05
    """Level of every test."""
    margin: float = 0.05
    """Accuracy change called harmless: non-inferiority on unrelated tasks, equivalence for NO_EFFECT."""
    n_resamples: int = N_RESAMPLES
    """Sign flips where enumeration is too long."""
    seed: int = 0
    """Seed of the sign flips."""
    comparable: bool = True
    """Whether the random sets match the set well enough to be its controls."""
    control_flags: tuple[str, ...] = ()
    """What the matching fell short of."""
    noop_changed: float = 0.0
    """Share of completions that the passthrough arm changed."""
    non_finite: tuple[str, ...] = ()
    """Arms in which some logits were not finite."""
    n_planned: int = 0
    """Random sets planned, where they were stopped by the :class:`FutilityRule`; 0: all were run."""
    ranks: tuple[float, ...] = ()
    """Rank p-values of the set in each dictionary, where outcomes of several are judged together."""
    missing: tuple[int, ...] = ()
    """Numbers of the dictionaries that have no set, where several are judged together."""


def _paired(
    differences: Floats,
    clusters: NDArray[np.str_],
    settings: Settings,
    *,
    alpha: float | None = None,
    limit: float = 1.0,
) -> PairedEffect:
    """Paired effects at the declared level, or another, with the declared sign flips."""
    return paired_effect(
        differences,
        clusters,
        alpha=settings.alpha if alpha is None else alpha,
        seed=settings.seed,
        n_resamples=settings.n_resamples,
        limit=limit,
    )


def _row(check: Check, effect: PairedEffect, passed: bool | None, i: int = 0, **numbers: float) -> Finding:
    """A row of one effect's numbers."""
    low, high, p = float(effect.low[i]), float(effect.high[i]), float(effect.p_value[i])
    known: dict[str, Any] = {"statistic": float(effect.mean[i]), "low": low, "high": high, "p_value": p}
    return Finding(check=check, passed=passed, **known | numbers)


# -- the machinery


def machinery(settings: Settings) -> Findings:
    """Whether hooks that edit nothing change nothing, and logits were finite."""
    changed, broken = settings.noop_changed, settings.non_finite
    return (
        Finding(check=Check.PASSTHROUGH, passed=changed <= NOOP_CHANGE, statistic=changed, bound=NOOP_CHANGE),
        Finding(check=Check.NON_FINITE, passed=not broken, statistic=len(broken), bound=0, detail=", ".join(broken)),
    )


# -- V1


def effect_shown(table: OutcomeTable, effects: PairedEffect, settings: Settings) -> Findings:
    """V1: the set's arm differs from the unedited one as predicted, by more than MIN_EFFECT, in every dictionary."""
    i = table.chosen
    bound = effects.low[i] if table.sign > 0 else -effects.high[i]
    passed = bool(effects.p_value[i] <= settings.alpha and bound > MIN_EFFECT)
    findings = [_row(Check.V1_EFFECT, effects, passed, i, bound=table.sign * MIN_EFFECT)]
    each = table.change(table.target)[:, :, i].mean(axis=1)
    if len(each) > 1 and each.any():
        agree = bool(same_direction(each, effects.mean[i]))
        alike = int((np.sign(each) == np.sign(effects.mean[i])).sum())
        words = ", ".join(f"{100 * one:+.1f}" for one in each)
        findings.append(
            Finding(
                check=Check.V1_DICTIONARIES,
                passed=agree,
                statistic=alike,
                bound=dictionaries_needed(len(each)),
                n=len(each),
                detail=words,
            )
        )
    opposite = effects.high[i] if table.sign > 0 else -effects.low[i]
    if effects.p_value[i] <= settings.alpha and opposite < 0:
        findings.append(_row(Check.V1_OPPOSITE, effects, False, i))
    return tuple(findings)


def no_effect(table: OutcomeTable, settings: Settings) -> Findings:
    """Equivalence to zero on target prompts: two one-sided tests, as the interval of level 1 - 2 alpha."""
    change = table.change(table.target)[..., [table.chosen]]
    effect = _paired(change, table.cluster[table.target], settings, alpha=2 * settings.alpha)
    inside = bool(-settings.margin < effect.low[0] and effect.high[0] < settings.margin)
    return (_row(Check.NO_EFFECT, effect, inside, bound=settings.margin),)


# -- V2


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
        """Whether no further random set can make the set special, and ``FEWEST_RANDOM`` have been run."""
        return self.n_run >= FEWEST_RANDOM and is_futile(self.n_as_large, self._n_planned, self._alpha)

    @property
    def reason(self) -> str:
        """Why, in words."""
        return (
            f"{self.n_as_large} had at least as large an effect as the set, so that its rank p-value must exceed "
            f"{self._alpha}"
        )


def specificity(table: OutcomeTable, effects: PairedEffect, settings: Settings) -> Findings:
    """V2: rank of the set's effect among the random sets', and whether these match it.

    p = (1 + as large) / (1 + all) (Phipson & Smyth 2010, doi:10.2202/1544-6115.1585); where the sets were stopped at
    the h-th that is as large, p = h / sets run (Besag & Clifford 1991, doi:10.1093/biomet/78.2.301), also exact. Sets
    stopped at ``FEWEST_RANDOM`` were not stopped by the last of them, so that the first formula holds.
    """
    controls = Finding(
        check=Check.V2_CONTROLS,
        passed=settings.comparable,
        detail=", ".join(settings.control_flags) or ("" if settings.comparable else "not comparable"),
    )
    rank = _combined_rank(settings) if settings.ranks else _rank(table, effects, settings)
    smallest = 1 / (max(len(table.where("random")), settings.n_planned) + 1)
    known = np.isfinite(rank.p_value) and smallest <= settings.alpha
    return replace(rank, passed=bool(rank.p_value <= settings.alpha) if known else None), controls


def _combined_rank(settings: Settings) -> Finding:
    ranks = ", ".join(f"{p:.3g}" for p in settings.ranks)
    each = f" planned in each dictionary (fewer where more could not help), combined over dictionaries: {ranks}"
    p_value = combined_rank_p(settings.ranks)
    return Finding(
        check=Check.V2_RANK, passed=None, p_value=p_value, bound=settings.alpha, n=settings.n_planned, detail=each
    )


def _rank(table: OutcomeTable, effects: PairedEffect, settings: Settings) -> Finding:
    random = table.where("random")
    if not len(random):
        return Finding(check=Check.V2_RANK, passed=None, bound=settings.alpha, n=0)
    signed = table.sign * effects.mean
    n_as_large = int((signed[random] >= signed[table.chosen] - TIE_SLACK).sum())
    stopped = len(random) < settings.n_planned
    at_last = stopped and len(random) > FEWEST_RANDOM
    rank_p = n_as_large / len(random) if at_last else (1 + n_as_large) / (len(random) + 1)
    detail = (
        f", whose effects are {100 * effects.mean[random].min():+.1f} to {100 * effects.mean[random].max():+.1f} points"
    )
    if stopped:
        detail += f", stopped at {len(random)} of {settings.n_planned}: {n_as_large} had at least as large an effect"
    return Finding(
        check=Check.V2_RANK,
        passed=None,
        statistic=n_as_large,
        p_value=rank_p,
        bound=settings.alpha,
        n=len(random),
        detail=detail,
    )


def random_sets_do_as_much(table: OutcomeTable, settings: Settings) -> Findings:
    """Whether many random sets have at least half of the set's effect, and the set's effect thus is nothing special.

    The share with its exact interval (Clopper and Pearson) must exceed ``MANY_RANDOM``; of several dictionaries' sets
    together, and in as many dictionaries as must agree.
    """
    counts = [_as_much(part) for part in table.parts or (table,)]
    n_sets, n_as_much = (sum(column) for column in zip(*counts, strict=True))
    if not n_sets:
        return (Finding(check=Check.V2_RANDOM_SETS, passed=None),)
    low, high = proportion_confint(n_as_much, n_sets, alpha=2 * settings.alpha, method="beta")
    agree = sum(k > MANY_RANDOM * n for n, k in counts) >= dictionaries_needed(len(counts))
    row = Finding(
        check=Check.V2_RANDOM_SETS,
        passed=bool(low > MANY_RANDOM and agree),
        statistic=n_as_much / n_sets,
        low=low,
        high=high,
        bound=MANY_RANDOM,
        n=n_sets,
    )
    return (row,)


def _as_much(table: OutcomeTable) -> tuple[int, int]:
    """Random sets, and those of them with at least ``AS_MUCH`` of the set's effect."""
    accuracy = table.sign * table.accuracy(table.target)
    effects = accuracy - accuracy[table.unedited]
    random = effects[table.where("random")]
    return len(random), int((random >= AS_MUCH * effects[table.chosen] - TIE_SLACK).sum())


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


def dose_response(table: OutcomeTable, settings: Settings) -> Findings:
    """V3: accuracy rises with the dose between no edit and the main one, and never significantly falls.

    The contrast of centred ranks leaves both end points out, which V1 has compared already; its weights make it a
    difference of two weighted means of accuracy.
    """
    order, _ = dose_order(table)
    within = [i for i in order if i not in (table.chosen, table.unedited)]
    if len(within) < MIN_DOSES:
        return (Finding(check=Check.V3_DOSE, passed=None, n=len(within), bound=MIN_DOSES),)
    per_prompt, clusters = table.per_prompt(table.target), table.cluster[table.target]
    ranks = np.arange(len(within)) - (len(within) - 1) / 2
    trend = _paired(
        np.tensordot(per_prompt[:, within], ranks / ranks[ranks > 0].sum(), (1, 0))[..., None], clusters, settings
    )
    steps = _paired(np.diff(per_prompt[:, order], axis=1).transpose(0, 2, 1), clusters, settings)
    down = np.where(steps.mean < 0, steps.p_value, 1.0)
    deepest = int(np.argmin(down))
    p_fall = min(1.0, float(down[deepest]) * len(down))  # Holm rejects any if it rejects the smallest
    rises = bool(trend.p_value[0] <= settings.alpha and trend.mean[0] > 0)
    doses = [1.0 if i == table.unedited else table.conditions[i].dose for i in order]
    rows = zip(doses, per_prompt[:, order].mean(axis=(0, 2)), isotonic_fit(table)[order], strict=True)
    points = ", ".join(f"{d:g}: {a:.3f} ({f:.3f})" for d, a, f in rows)
    return (
        replace(_row(Check.V3_DOSE, trend, rises, n=len(within), bound=0.0), detail=points),
        _row(Check.V3_FALL, steps, p_fall > settings.alpha, deepest, p_value=p_fall, bound=settings.alpha),
    )


def over_steered(table: OutcomeTable, effects: PairedEffect, settings: Settings) -> NDArray[np.bool_]:
    """[condition] doses beyond the main one that do worse than it, or break the format."""
    _, beyond = dose_order(table)
    shares = table.broken(table.target)
    flagged = np.zeros(len(shares), dtype=np.bool_)
    for i in beyond:
        worse = table.sign * (effects.mean[i] - effects.mean[table.chosen]) < -MIN_EFFECT
        flagged[i] = worse or shares[i] - shares[table.unedited] > settings.margin
    return flagged


def over_steering(table: OutcomeTable, effects: PairedEffect, settings: Settings) -> Findings:
    """What :func:`over_steered` finds, where there are doses beyond the main one."""
    if not dose_order(table)[1]:
        return ()
    shares, flagged = table.broken(table.target), np.flatnonzero(over_steered(table, effects, settings))
    detail = ", ".join(
        f"dose {table.conditions[i].dose:g} has effect {100 * effects.mean[i]:+.1f} points and {shares[i]:.1%} broken "
        "completions"
        for i in flagged
    )
    return (
        Finding(check=Check.OVER_STEERING, passed=not len(flagged), statistic=len(flagged), bound=0, detail=detail),
    )


# -- V4


def side_effects(table: OutcomeTable, settings: Settings) -> Findings:
    """V4: unrelated tasks keep their accuracy and format, and neutral text its distribution.

    Unrelated tasks that the unedited model rarely gets right (``MIN_ACCURACY``) have nothing to lose and say nothing
    about accuracy.
    """
    i, unedited = table.chosen, table.unedited
    spared = {task: table.accuracy(table.task == task)[unedited] for task in np.unique(table.task[table.unrelated])}
    mute = {str(task): accuracy for task, accuracy in spared.items() if accuracy < MIN_ACCURACY}
    counted = table.unrelated & ~np.isin(table.task, list(mute))
    findings = [_kept(table, settings, counted)]
    if mute:
        worst = max(mute.values())
        names = ", ".join(mute)
        findings.append(Finding(check=Check.V4_TASKS, passed=False, statistic=worst, bound=MIN_ACCURACY, detail=names))
    if table.unrelated.any():
        broken = table.broken(table.unrelated)
        rise = float(broken[i] - broken[unedited])
        held = rise <= settings.margin
        findings.append(Finding(check=Check.V4_FORMAT, passed=held, statistic=rise, bound=settings.margin))
        length = table.n_tokens[:, table.unrelated].mean(axis=(1, 2))
        findings.append(Finding(check=Check.V4_LENGTH, passed=True, statistic=length[i], bound=length[unedited]))
    return (*findings, *_neutral_text(table, settings))


def _neutral_text(table: OutcomeTable, settings: Settings) -> Findings:
    """Whether neutral text keeps its distribution; a large divergence decides only where the text is neutral."""
    kl = float(table.neutral_kl[table.chosen])
    random = table.neutral_kl[table.where("random")]
    random = random[np.isfinite(random)]
    limit = max(NEUTRAL_KL, float(np.quantile(random, RANDOM_QUANTILE)) if len(random) else 0.0)
    neutral: tuple[Finding, ...] = ()
    if table.texts is not None and table.texts.neutral:
        differs = np.abs(table.correct[table.unedited] - table.other_correct).mean(axis=1)[table.target]
        words = telling_words(table.texts.prompts[table.target], differs, alpha=settings.alpha)
        share = with_any_of(table.texts.neutral, words)
        row = Finding(check=Check.V4_NEUTRAL_TEXT, passed=share <= NOT_NEUTRAL, statistic=share, bound=NOT_NEUTRAL)
        neutral = (replace(row, detail=", ".join(words) or "none"),)
    unchanged: bool | None = kl <= limit
    if not np.isfinite(kl) or (not unchanged and any(not row.passed for row in neutral)):
        unchanged = None
    return Finding(check=Check.V4_NEUTRAL_KL, passed=unchanged, statistic=kl, bound=limit), *neutral


def _kept(table: OutcomeTable, settings: Settings, counted: NDArray[np.bool_]) -> Finding:
    """Non-inferiority of accuracy on the unrelated prompts that count, one-sided at alpha."""
    if not counted.any():
        return Finding(check=Check.V4_ACCURACY, passed=None, bound=-settings.margin, n=0)
    change = table.change(counted)[..., [table.chosen]]
    effect = _paired(change, table.cluster[counted], settings, alpha=2 * settings.alpha)
    kept = bool(effect.low[0] > -settings.margin)
    return _row(Check.V4_ACCURACY, effect, kept, bound=-settings.margin, n=int(counted.sum()))


# -- V5


def replication(table: OutcomeTable, settings: Settings) -> Findings:
    """V5: in how many target tasks, and in how many dictionaries, the effect appears on its own.

    Holm-adjusted over tasks, and over dictionaries.
    """
    change, tasks = table.change(table.target)[..., [table.chosen]], table.task[table.target]
    alone = {str(task): change[:, tasks == task] for task in np.unique(tasks)}
    clusters = {task: table.cluster[table.target & (table.task == task)] for task in alone}
    findings = [_shown_in(table, settings, alone, clusters, Check.V5_TASKS)]
    n, n_missing = table.n_dictionaries + len(settings.missing), len(settings.missing)
    if table.n_dictionaries > 1:
        numbers = [number for number in range(1, n + 1) if number not in settings.missing]
        each = {f"dictionary {number}": of_one for number, of_one in zip(numbers, change, strict=True)}
        everywhere = dict.fromkeys(each, table.cluster[table.target])
        findings.append(_shown_in(table, settings, each, everywhere, Check.V5_DICTIONARIES))
    if n > 1:
        lacking = ", ".join(f"dictionary {number}" for number in settings.missing)
        detail = f"none in {lacking}" if lacking else ""
        row = Finding(check=Check.V5_SETS, passed=not n_missing, statistic=n - n_missing, bound=n, n=n, detail=detail)
        findings.append(row)
    return tuple(findings)


def _shown_in(
    table: OutcomeTable,
    settings: Settings,
    changes: dict[str, Floats],
    clusters: dict[str, NDArray[np.str_]],
    check: Check,
) -> Finding:
    """In how many places the set's effect is significant and as predicted, from its changes of accuracy there."""
    effects = [_paired(change, clusters[place], settings) for place, change in changes.items()]
    adjusted = np.atleast_1d(np.asarray(adjust(np.array([float(e.p_value[0]) for e in effects]), method="holm")))
    means = [float(effect.mean[0]) for effect in effects]
    n_shown = sum(table.sign * m > 0 and p <= settings.alpha for m, p in zip(means, adjusted, strict=True))
    every = ", ".join(f"{place} {100 * m:+.1f}" for place, m in zip(changes, means, strict=True))
    return Finding(check=check, passed=n_shown == len(changes), statistic=n_shown, n=len(changes), detail=every)


# -- V6


def failure_mode_match(table: OutcomeTable, settings: Settings) -> Findings:
    """V6: the edited model moves toward the other model, in distribution and prompt by prompt, and does not break.

    Of several dictionaries their mean, with the variance between them in its interval, and the estimates of as many as
    must agree on the same side. What speaks against it is to be shown in as many of them, each by itself: a mean with
    an interval would let one that fails badly speak for all, or one that fails worse than the others hide them.
    """
    findings = _failure_mode(table, settings)
    if not table.parts:
        return findings
    each = [_failure_mode(part, settings) for part in table.parts]
    n, needed = len(each), dictionaries_needed(len(each))
    n_match = sum(map(_meets, each))
    n_broken = sum(_row_of(one, Check.V6_BROKEN).passed is True for one in each)
    n_shown = Counter(name for one in each for name in _row_of(one, Check.V6_AWAY).detail.split(", ") if name)
    shown = [name for name, count in n_shown.items() if count >= needed]
    highest = np.sort([_row_of(one, Check.V6_KL).high for one in each])[needed - 1]
    broken, away = (_row_of(findings, check) for check in (Check.V6_BROKEN, Check.V6_AWAY))
    together = (
        Finding(check=Check.V6_DICTIONARIES, passed=n_match >= needed, statistic=n_match, bound=needed, n=n),
        replace(broken, passed=n_broken >= needed, n=n_broken),
        replace(
            away,
            passed=bool(shown),
            statistic=len(shown),
            high=float(highest),
            n=max(n_shown.values(), default=0),
            detail=", ".join(shown),
        ),
    )
    return (*(row for row in findings if row not in (broken, away)), *together)


def _meets(findings: Findings) -> bool:
    """Whether the estimates of one dictionary are on the side of V6, significant or not."""
    shares = (_row_of(findings, check) for check in (Check.V6_KL, Check.V6_AGREEMENT))
    return all(row.statistic > row.bound for row in shares) and bool(_row_of(findings, Check.V6_NEW_FAILURES).passed)


def _row_of(findings: Findings, check: Check) -> Finding:
    return next(finding for finding in findings if finding.check is check)


def _failure_mode(table: OutcomeTable, settings: Settings) -> Findings:
    endings = kinds_of_endings(table)
    closed = _divergence_closed(table, settings)
    parts = [agreement_of(part, kinds_of_endings(part)) for part in table.parts] or [agreement_of(table, endings)]
    agreed, opposite = _agreement([one for one in parts if len(one.prompts)], table.cluster, settings)
    against = {
        "the divergence": _short_of_its_bound(closed, settings),
        "the agreement": _short_of_its_bound(agreed[0], settings),
        "being right less in agreement than by chance": opposite,
    }
    shown = [name for name, holds in against.items() if holds]
    away = Finding(
        check=Check.V6_AWAY, passed=bool(shown), statistic=len(shown), high=closed.high, detail=", ".join(shown)
    )
    return (closed, *agreed, *_new_failures(table, *endings, settings), away)


def _short_of_its_bound(row: Finding, settings: Settings) -> bool:
    """Whether a share is shown to be smaller than what is needed."""
    return bool(row.p_value <= settings.alpha and row.statistic < row.bound)


def _divergence_closed(table: OutcomeTable, settings: Settings) -> Finding:
    """Whether the edit closes a share of the divergence from the other model.

    Of several dictionaries the geometric mean of the ratios of divergence, which differ by factors.
    """
    kl, *each = (one.kl_to_base if table.direction == "disable" else one.kl_to_rl for one in (table, *table.parts))
    i, unedited = table.chosen, table.unedited
    paired = table.target & np.isfinite(kl[i]) & np.isfinite(kl[unedited])
    before, after = kl[unedited][paired], np.stack([one[i][paired] for one in each or [kl]])
    if not paired.any() or before.mean() <= 0 or (each and not after.mean(axis=1).all()):
        return Finding(check=Check.V6_KL, passed=None, bound=MIN_CLOSED)
    clusters = table.cluster[paired]
    if not each:
        beyond = ((1 - MIN_CLOSED) * before - after[0])[:, None]  # what is closed beyond the least share
        effect = _paired(beyond, clusters, settings, limit=np.inf)
        share = 1 - float(after.mean() / before.mean())
        low, high = (MIN_CLOSED + float(end[0] / before.mean()) for end in (effect.low, effect.high))
    else:  # linear in each prompt, with the log ratio of the means as its mean
        mean = after.mean(axis=1, keepdims=True)
        log_ratio = np.log(mean / before.mean()) + after / mean - before / before.mean()
        effect = _paired((np.log(1 - MIN_CLOSED) - log_ratio)[..., None], clusters, settings, limit=np.inf)
        share, low, high = (
            1 - (1 - MIN_CLOSED) * math.exp(-float(one[0])) for one in (effect.mean, effect.low, effect.high)
        )
    return _row(
        Check.V6_KL,
        effect,
        bool(effect.p_value[0] <= settings.alpha and effect.mean[0] > 0),
        statistic=share,
        low=low,
        high=high,
        bound=MIN_CLOSED,
        n=int(paired.sum()),
    )


def _agreement(each: Sequence[Agreement], cluster: NDArray[np.str_], settings: Settings) -> tuple[Findings, bool]:
    """Whether completions that changed became the other model's beyond chance; and whether being right did the reverse.

    Being right less in agreement than by chance, even if endings and words agree, is no move toward the other model.

    Parameters
    ----------
    each
        Of every dictionary that changed a completion.
    """
    if not each:
        return (Finding(check=Check.V6_AGREEMENT, passed=None, n=0),), False
    prompts = np.unique(np.concatenate([one.prompts for one in each]))

    def effect_of(values: Sequence[Floats], limit: float = 1.0) -> PairedEffect:
        if len(each) == 1:
            return _paired(values[0][:, None], cluster[prompts], settings, limit=limit)
        # each dictionary's mean over the completions that it changed, and what every prompt adds to it
        table = np.repeat([[one.mean()] for one in values], len(prompts), axis=1)
        for row, one, of_one in zip(table, values, each, strict=True):
            row[np.isin(prompts, of_one.prompts)] += len(prompts) / len(one) * (one - one.mean())
        return _paired(table[..., None], cluster[prompts], settings, limit=np.inf)

    least = [MIN_CLOSED * np.maximum(one.attainable, 0.0) for one in each]
    means = [one.mean for one in each]
    enough = effect_of([mean - bound for mean, bound in zip(means, least, strict=True)], 1 + MIN_CLOSED)
    gained = effect_of(means)
    checks = {"outcome": Check.V6_OUTCOME, "ending": Check.V6_ENDING, "text": Check.V6_TEXT}
    aspects = {}
    for name in each[0].beyond_chance:
        effect = effect_of([one.beyond_chance[name] for one in each])
        opposite = bool(effect.mean[0] < 0 and effect.p_value[0] <= settings.alpha)
        aspects[name] = _row(checks[name], effect, not opposite)
    opposite = not aspects["outcome"].passed
    row = _row(
        Check.V6_AGREEMENT,
        gained,
        bool(enough.p_value[0] <= settings.alpha and enough.mean[0] > 0 and not opposite),
        bound=float(np.mean([bound.mean() for bound in least])),
        p_value=float(enough.p_value[0]),
        n=len(prompts),
    )
    return (row, *aspects.values()), opposite


def _new_failures(
    table: OutcomeTable, before: NDArray[np.int64], after: NDArray[np.int64], settings: Settings
) -> Findings:
    """Failing endings that are more frequent than in either model; and whether they are shown to be most of the effect.

    Their excess over the model that has more of an ending, minus ``NEW_FAILURE_SHARE`` of the effect, is a mean over
    prompts and dictionaries, whose interval decides.
    """
    target, n_classes = table.target, UNLIKE + 1
    models = (before, after, table.other_ending)
    shares = [np.bincount(one[target].ravel(), minlength=n_classes) / one[target].size for one in models]
    excess = np.maximum(shares[1] - np.maximum(shares[0], shares[2]), 0.0)
    excess[0] = 0.0  # being right is no failure
    effect = table.change(target)[..., table.chosen]  # [dictionary, prompt]
    beyond = -NEW_FAILURE_SHARE * np.sign(effect.mean()) * effect
    written = after.reshape(len(after), len(effect), -1)[target]  # [prompt, dictionary, sample]
    for ending in np.flatnonzero(excess):
        more = before if shares[0][ending] >= shares[2][ending] else table.other_ending
        beyond = beyond + (written == ending).mean(axis=2).T - (more == ending).mean(axis=1)[target]
    limit = 1 + NEW_FAILURE_SHARE
    whole = _paired(beyond[..., None], table.cluster[target], settings, alpha=2 * settings.alpha, limit=limit)
    mean, low, high = (float(one[0]) for one in (whole.mean, whole.low, whole.high))
    names = (*OUTCOME_CLASSES, "no_answer of a new kind")
    return (
        Finding(
            check=Check.V6_NEW_FAILURES,
            passed=mean <= TIE_SLACK,
            statistic=excess.sum(),
            bound=NEW_FAILURE_SHARE * abs(effect.mean()),
            detail=names[int(np.argmax(excess))] if excess.any() else "none",
        ),
        Finding(check=Check.V6_BROKEN, passed=low > 0, statistic=mean, low=low, high=high, bound=0.0),
    )


# -- notes


def fresh_seeds(table: OutcomeTable, effects: PairedEffect, settings: Settings) -> Findings:
    """Whether other seeds alone change accuracy."""
    i = table.index("fresh")
    return () if i is None else (_row(Check.FRESH, effects, bool(effects.p_value[i] > settings.alpha), i),)


def baselines(table: OutcomeTable, settings: Settings) -> Findings:
    """Whether the set beats one mean-shift vector and a random vector of equal norm, paired over prompts."""
    findings = []
    per_prompt = table.per_prompt(table.target)
    for kind, check in (("steering", Check.STEERING), ("random_direction", Check.RANDOM_DIRECTION)):
        i = table.index(kind)
        if i is None:
            continue
        lead = table.sign * (per_prompt[:, table.chosen] - per_prompt[:, i])[..., None]
        effect = _paired(lead, table.cluster[table.target], settings)
        findings.append(_row(check, effect, bool(effect.mean[0] > 0 and effect.p_value[0] <= settings.alpha)))
    return tuple(findings)
