"""Experiments on causal verdicts: simulated trials whose truth is known, and the interval they rest on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rlgen_stats.toolkit.intervention import OutcomeTable, Settings, judge
from rlgen_stats.toolkit.statistics.causal.criteria import (
    MANY_RANDOM,
    MIN_CLOSED,
    dose_response,
    failure_mode_match,
    no_effect,
    random_sets_do_as_much,
)
from rlgen_stats.toolkit.statistics.causal.findings import Check, holds, passed
from rlgen_stats.toolkit.statistics.causal.outcome_table import paired_effect
from rlgen_stats.toolkit.statistics.causal.verdict import Verdict
from rlgen_stats.toolkit.statistics.kernels import bounded_interval, cluster_se
from tests.calibration.rows import Row, rate_row
from tests.statistics.causal.old_rules import invented_clusters, matching_shares
from tests.statistics.causal.worlds import EMPTY, RIGHT, SILENT, with_endings, world

ALPHA = 0.05
STUDIES = 4
"""Simulated trials of one truth at the small size."""
TRIAL: dict[str, Any] = {"n_target": 150, "n_unrelated": 100, "n_random": 19, "unrelated": 0.9}
CAUSE: dict[str, Any] = {"right": {"set": 0.6}, "kl": {"set": 0.4}}
"""Without the set the RL model fails where and as base does, on three tenths of the prompts of base's four."""

Trial = Callable[[int], OutcomeTable]


def trials(scale: int, seed: int) -> list[Row]:
    """Whole trials of five truths: how often each is called what it is not."""
    rows = []
    for name, trial, wrong, old, old_name, nominal in (
        ("no effect, sampled anew, called more", _nothing, _something, None, "", ALPHA),
        ("an edit that changes nothing not called NO_EFFECT", _unchanged, _not("NO_EFFECT"), None, "", ALPHA),
        ("a true cause not called CAUSAL_SPECIFIC", _cause, _not("CAUSAL_SPECIFIC"), None, "", 0.1),
        ("a true cause called DESTRUCTIVE", _cause, _is("DESTRUCTIVE"), None, "", ALPHA),
        ("new failures called CAUSAL_SPECIFIC", _new_class, _is("CAUSAL_SPECIFIC"), _without_v6, "without V6", ALPHA),
        (
            "base's failures where base is right called CAUSAL_SPECIFIC",
            _failing(where_base_fails=False),
            _is("CAUSAL_SPECIFIC"),
            lambda table, verdict: matching_shares(table, _settings(0)) and _without_v6(table, verdict),
            "V6 by the divergence and shares of endings",
            ALPHA,
        ),
        (
            "base's failures at random called CAUSAL_SPECIFIC",
            _failing(where_base_fails=None),
            _is("CAUSAL_SPECIFIC"),
            lambda table, verdict: matching_shares(table, _settings(0)) and _without_v6(table, verdict),
            "V6 by the divergence and shares of endings",
            ALPHA,
        ),
    ):
        n, hits, old_hits = STUDIES * scale, 0, 0
        for study in range(n):
            table = trial(seed + study)
            verdict = judge(table, _settings(seed))
            hits += wrong(verdict)
            old_hits += old is not None and old(table, verdict)
        naive = old_hits / n if old is not None else float("nan")
        size = f"{n} trials, 150 + 100 prompts, 19 random sets"
        rows.append(rate_row(name, nominal, hits, n, size, at_most=True, naive=naive, naive_name=old_name))
    return rows


def borders(scale: int, seed: int) -> list[Row]:
    """Single criteria where the truth lies at their bound, or just on the wrong side."""
    n, counts = 10 * scale, Counter[str]()
    settings = _settings(seed)
    for study in range(n):
        draw = np.random.default_rng([seed, 31, study])
        table = world(seed=seed + study, **TRIAL, **CAUSE)
        counts["one_above"] += ALPHA < (1 + 1) / 20
        few = _doing_as_much(table, draw.permutation(19)[:1])  # rank p = .1, one of nineteen
        counts["as_much"] += passed(random_sets_do_as_much(few, settings), Check.V2_RANDOM_SETS)
        which = np.flatnonzero(draw.random(19) < MANY_RANDOM)
        counts["many_above"] += (1 + len(which)) / 20 > ALPHA
        many = _doing_as_much(table, which)
        counts["many"] += passed(random_sets_do_as_much(many, settings), Check.V2_RANDOM_SETS)
        step = world(seed=seed + study, **TRIAL, right={"set": 0.6, "dose": 0.9}, kl={"set": 0.4})
        counts["step"] += holds(dose_response(step, settings), "v3")
        counts["ends"] += _trend_with_the_ends(step, settings)
        at_margin = _changing(table, lost=settings.margin + 0.02, gained=0.02, draw=draw)
        counts["equal"] += passed(no_effect(at_margin, settings), Check.NO_EFFECT)
        kl = table.kl_to_base.copy()
        kl[table.chosen] = (1 - MIN_CLOSED) * kl[table.unedited] + 0.3 * draw.standard_normal(kl.shape[1])
        v6 = failure_mode_match(replace(table, kl_to_base=kl), settings)
        counts["closed"] += holds(v6, "v6") or passed(v6, Check.V6_AWAY)
    size = f"{n} trials, 150 prompts, 19 random sets"

    def row(name: str, count: str, old: str = "", naive_name: str = "") -> Row:
        naive = counts[old] / n if old else float("nan")
        return rate_row(name, ALPHA, counts[count], n, size, at_most=True, naive=naive, naive_name=naive_name)

    above = "rank p above alpha"
    return [
        row("one of 19 random sets does as much, called CAUSAL_NONSPECIFIC", "as_much", "one_above", above),
        row("a quarter of 19 random sets do as much, called CAUSAL_NONSPECIFIC", "many", "many_above", above),
        row("an effect of the whole edit alone called a dose response", "step", "ends", "trend with both ends"),
        row("a loss of the margin called NO_EFFECT", "equal"),
        row("a tenth of the divergence closed, decided either way", "closed"),
    ]


def changed_answers(scale: int, seed: int) -> list[Row]:
    """Interval of a mean change of answers: misses, where few clusters changed; and what it leaves undecided."""
    n, rows = 100 * scale, []
    for n_clusters in (10, 28, 60, 200):
        for size, icc in ((1, 0.0), (5, 0.05)):
            worst, few = {"interval": 0.0, "t": 0.0}, n_clusters < 60 and size == 1
            for changed in (0.05, 0.1, 0.3):
                for gaining in (0.0, 0.25):
                    draw = np.random.default_rng([seed, 32, n_clusters, size, round(100 * changed), round(4 * gaining)])
                    x, codes = _changes(n, n_clusters, size, icc, (1 - gaining) * changed, gaining * changed, draw)
                    truth = (2 * gaining - 1) * changed
                    _, low, high = bounded_interval(x, codes, alpha=ALPHA)
                    error = cluster_se(x, codes).standard_error
                    missed = np.abs(x.mean(axis=0) - truth) > stats.t.ppf(1 - ALPHA / 2, n_clusters - 1) * error
                    worst["interval"] = max(worst["interval"], float(((low > truth) | (high < truth)).mean()))
                    worst["t"] = max(worst["t"], float(missed.mean()))
            rows.append(
                rate_row(
                    f"interval of changed answers misses, {n_clusters} clusters of {size}",
                    ALPHA,
                    round(worst["interval"] * n),
                    n,
                    f"worst of 5, 10, 30% changed, a quarter or none to the better; {n:,} tables each",
                    at_most=True,
                    naive=worst["t"] if few else float("nan"),
                    naive_name="t-interval, CR1" if few else "",
                    known="few clusters changed, some to the better" if (n_clusters, size) == (28, 1) else "",
                )
            )
    x, codes = _changes(n, 28, 5, 0.05, 0.1, 0.0, np.random.default_rng([seed, 33]))
    effect = paired_effect(x, codes.astype(np.str_), alpha=ALPHA, seed=seed, n_resamples=199)
    shown = (effect.p_value <= ALPHA) & (effect.high < -0.02)
    old = [invented_clusters(column, codes, alpha=ALPHA)[1] >= -0.02 for column in x.T]
    rows.append(
        rate_row(
            "a true loss of .10 not shown by V1, 28 clusters of 5",
            0.2,
            int((~shown).sum()),
            n,
            f"{n:,} tables, intracluster correlation .05",
            at_most=True,
            naive=float(np.mean(old)),
            naive_name="two invented clusters at +-1",
        )
    )
    return rows


# -- truths


def _settings(seed: int) -> Settings:
    return Settings(alpha=ALPHA, margin=0.05, n_resamples=199, seed=seed)


def _nothing(seed: int) -> OutcomeTable:
    return world(seed=seed, **TRIAL)


def _unchanged(seed: int) -> OutcomeTable:
    return world(seed=seed, fresh_noise=False, **TRIAL)


def _cause(seed: int) -> OutcomeTable:
    return world(seed=seed, **CAUSE, **TRIAL)


def _new_class(seed: int) -> OutcomeTable:
    return world(seed=seed, set_fails=EMPTY, **CAUSE, **TRIAL)


def _failing(*, where_base_fails: bool | None) -> Trial:
    """A third of right answers are lost as base loses them: where it fails, where it is right, or anywhere."""

    def trial(seed: int) -> OutcomeTable:
        table = world(seed=seed, **CAUSE, **TRIAL)
        draw, ending = np.random.default_rng([seed, 34]), table.ending.copy()
        right = table.target & (ending[table.unedited, :, 0] == RIGHT)
        if where_base_fails is not None:
            right &= (table.other_ending[:, 0] != RIGHT) == where_base_fails
        lost = draw.permutation(np.flatnonzero(right))[:45]
        for arm in (table.chosen, *table.where("dose").tolist()):
            ending[arm] = ending[table.unedited]
            ending[arm, lost[: round(45 * (1 - table.conditions[arm].dose))], 0] = SILENT
        return with_endings(table, ending)

    return trial


def _doing_as_much(table: OutcomeTable, which: NDArray[np.int64]) -> OutcomeTable:
    """Some random sets have the set's outcomes, the others the unedited model's."""
    ending, random = table.ending.copy(), table.where("random")
    ending[random] = ending[table.unedited]
    ending[random[which]] = ending[table.chosen]
    return with_endings(table, ending)


def _changing(table: OutcomeTable, *, lost: float, gained: float, draw: np.random.Generator) -> OutcomeTable:
    """Each target prompt is lost or gained with these probabilities, whatever it was."""
    u, correct = draw.random(len(table.target)), table.correct.copy()
    correct[table.unedited, :, 0] = np.where(u < lost, 1.0, 0.0)
    correct[table.chosen, :, 0] = np.where(u > 1 - gained, 1.0, 0.0)
    return replace(table, correct=correct)


def _changes(
    n: int, n_clusters: int, size: int, icc: float, lost: float, gained: float, draw: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """[prompt, table] changes of answers, of which clusters lose more or fewer (beta), and codes of the clusters."""
    shape = (n_clusters, n)
    rate = np.full(shape, lost) if icc == 0 else draw.beta(lost * (1 / icc - 1), (1 - lost) * (1 / icc - 1), shape)
    u, codes = draw.random((n_clusters * size, n)), np.repeat(np.arange(n_clusters), size)
    return np.where(u < rate[codes], -1.0, np.where(u > 1 - gained, 1.0, 0.0)), codes


# -- what counts as wrong, and what older rules said


def _is(name: str) -> Callable[[Verdict], bool]:
    return lambda verdict: verdict.verdict == name


def _not(name: str) -> Callable[[Verdict], bool]:
    return lambda verdict: verdict.verdict != name


def _something(verdict: Verdict) -> bool:
    return verdict.verdict not in ("NO_EFFECT", "INCONCLUSIVE")


def _without_v6(_: OutcomeTable, verdict: Verdict) -> bool:
    return all(held for name, held in verdict.requirements.items() if name != "v6")


def _trend_with_the_ends(table: OutcomeTable, settings: Settings) -> bool:
    """A contrast of ranks from no edit to the whole one, which mostly compares these two."""
    arms = sorted([table.unedited, table.chosen, *table.where("dose")], key=lambda i: table.conditions[i].dose)
    ranks = np.arange(len(arms)) - (len(arms) - 1) / 2
    trend = np.tensordot(ranks / ranks[ranks > 0].sum(), table.per_prompt(table.target)[0][arms], (0, 0))[:, None]
    effect = paired_effect(trend, table.cluster[table.target], alpha=ALPHA, seed=settings.seed, n_resamples=199)
    return bool(effect.mean[0] > 0 and effect.p_value[0] <= ALPHA)
