"""How often the verdict is wrong or stops early, over many simulated trials: slower than what one table shows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from rlgen_stats.toolkit.intervention import OutcomeTable, judge
from rlgen_stats.toolkit.statistics.causal.criteria import FutilityRule, Settings
from tests.statistics.causal.worlds import SETTINGS, causal, world


def random_only(seed: int, n_random: int = 19) -> OutcomeTable:
    """All edits hurt at random, the set no differently from its controls, and look like base when they do."""
    draw = np.random.default_rng([seed, 7])
    levels = 0.9 - 0.3 * draw.random(2)
    return world(
        right={"set": levels[0]},
        random_right=lambda draw: 0.9 - 0.3 * draw.random(),
        kl={"set": 0.3},
        n_random=n_random,
        seed=seed,
    )


@pytest.mark.slow
def test_random_sets_are_not_called_causal_more_often_than_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # statsmodels collects garbage at every Holm adjustment
    n = 60
    verdicts = Counter(judge(random_only(seed), replace(SETTINGS, n_resamples=199)).verdict for seed in range(n))
    limit = 0.05 + 3 * np.sqrt(0.05 * 0.95 / n)
    assert verdicts["CAUSAL_SPECIFIC"] / n <= limit, verdicts
    assert verdicts["CAUSAL_NONSPECIFIC"] > n / 2, "the world must have effects for this test to say something"


def stopped_early(table: OutcomeTable, settings: Settings) -> tuple[OutcomeTable, Settings]:
    """The table with only the random sets that are run when those are stopped for futility."""
    rule, kept = FutilityRule("disable", n_planned=len(table.where("random")), alpha=settings.alpha), []
    for condition, accuracy in zip(table.conditions, table.accuracy(table.target), strict=True):
        if rule.stop:
            break
        rule.add(condition.kind, accuracy)
        kept.append(condition.name)
    return table.keep(kept), replace(settings, n_planned=len(table.where("random")))


@pytest.mark.slow
def test_stopping_for_futility_saves_most_random_sets_and_reverses_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gc.collect", lambda *_: 0)
    settings, run, pairs = replace(SETTINGS, n_resamples=99), [], Counter[tuple[str, str]]()
    for seed in range(20):
        table = random_only(seed, n_random=99)
        shorter, stopped = stopped_early(table, settings)
        whole, early = judge(table, settings), judge(shorter, stopped)
        pairs[whole.verdict, early.verdict] += 1
        assert early.requirements["v2"] == whole.requirements["v2"]
        run.append(len(shorter.where("random")))
        if run[-1] < 99:
            assert early.rank_p > settings.alpha
            assert any("stopped at" in reason for reason in early.reasons)
    assert np.mean(run) < 50
    assert {pair for pair in pairs if pair[0] != pair[1]} <= {("CAUSAL_NONSPECIFIC", "INCONCLUSIVE")}
    assert pairs["CAUSAL_NONSPECIFIC", "CAUSAL_NONSPECIFIC"] > 10
    shorter, stopped = stopped_early(causal(), SETTINGS)
    assert len(shorter.where("random")) == 39
    assert judge(shorter, stopped).rank_p == pytest.approx(1 / 40)
