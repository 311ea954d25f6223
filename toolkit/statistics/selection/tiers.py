"""From p-values to tiers: candidates on the selection half, confirmation on the verification half."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import FEATURE
from rlgen_stats.toolkit.statistics.kernels import adjust, partial_conjunction
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray
from rlgen_stats.toolkit.statistics.selection.discordance import SplitTests
from rlgen_stats.toolkit.statistics.selection.options import SelectionRule, SelectionTests
from rlgen_stats.toolkit.statistics.selection.paper_rule import PaperSelection

CONFIRMED, CANDIDATE, REJECTED, UNTESTED = "CONFIRMED", "CANDIDATE", "REJECTED", "UNTESTED"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is decided of every feature; arrays are [feature]."""

    paper_selected: NDArray[np.bool_]
    """Kept by the paper's rule in every task."""
    p_value: FloatArray
    """Partial conjunction over tasks, selection half."""
    q_value: FloatArray
    """``p_value`` corrected by BH over all testable features."""
    rank: FloatArray
    tier: NDArray[np.str_]
    verification_p: FloatArray
    """Partial conjunction over tasks on the verification half, of candidates only."""
    verification_q: FloatArray
    """``verification_p`` corrected by Holm over the candidates."""
    selected: NDArray[np.bool_]
    flag: NDArray[np.str_]
    rule: str
    """Which features form the selected set."""
    n_tested: int
    u: tuple[int, int]
    """Tasks that had to show the effect, in the selection and in the verification half."""

    @property
    def candidates(self) -> IntArray:
        """Positions of the candidates, confirmed or not, by p-value on the selection half."""
        chosen = np.flatnonzero(np.isin(self.tier, (CONFIRMED, CANDIDATE)))
        return chosen[np.argsort(self.rank[chosen], kind="stable")]

    def variables(self, verification: SplitTests) -> dict[str, tuple[str, NDArray[Any]]]:
        """Per-feature variables of the layout."""
        arrays = {
            "paper_selected": self.paper_selected,
            "p_value": self.p_value,
            "q_value": self.q_value,
            "rank": self.rank,
            "tier": self.tier,
            "verification_p": self.verification_p,
            "verification_q": self.verification_q,
            "selected": self.selected,
            "flag": self.flag,
            "verification_effect": verification.effect[0],
            "verification_low": verification.effect[1],
            "verification_high": verification.effect[2],
            "verification_score": verification.score,
        }
        return {name: (FEATURE, array) for name, array in arrays.items()}


def decide(
    tests: dict[str, SplitTests],
    testable: NDArray[np.bool_],
    paper: PaperSelection | None,
    rule: SelectionRule,
    options: SelectionTests,
    ranks: IntArray,
) -> Decision:
    """Tier, rank and selection of every feature.

    Parameters
    ----------
    tests
        Tests of both halves of the split.
    testable
        [feature]; the others are in no family.
    paper
        Outcome of the paper's rule, None if no task could be scored.
    rule, options
        As in ``select_features``. Ranks and selection do not depend on the verification half except through the tier.
    ranks
        [feature]: ranks of the labels, which break ties.
    """
    n = len(testable)
    p = np.where(testable, _conjunction(tests["selection"], options), np.nan)
    q = np.asarray(adjust(p, method="bh"))
    candidate = np.nan_to_num(q, nan=1.0) <= options.alpha
    verification_p = np.where(candidate, _conjunction(tests["verification"], options), np.nan)
    verification_q = np.asarray(adjust(verification_p, method="holm"))
    confirmed = candidate & (np.nan_to_num(verification_q, nan=1.0) <= options.alpha)
    tested = np.isfinite(p)
    in_paper = np.zeros(n, dtype=bool) if paper is None else paper.selected
    sets = [("CONFIRMED", confirmed), ("CANDIDATE (none confirmed)", candidate), ("paper (no candidate)", in_paper)]
    if rule.kind == "paper":
        sets = [("paper (as requested)", in_paper)]
    name, members = next(((name, s) for name, s in sets if s.any()), ("nothing selected", np.zeros(n, dtype=bool)))
    # By p-value, then by the smallest score over tasks (the paper's set by that alone), then by label.
    by_paper = name.startswith("paper")
    smallest_score = np.full(n, -np.inf) if paper is None else paper.scores.min(axis=0)
    order = np.lexsort((ranks, -smallest_score, np.zeros(n) if by_paper else np.where(tested, p, np.inf)))
    rank = np.full(n, np.nan)
    ranked = order[(tested | in_paper)[order]]
    rank[ranked] = np.arange(1, len(ranked) + 1)
    selected = np.zeros(n, dtype=bool)
    selected[order[members[order]][: rule.max_features]] = True
    return Decision(
        paper_selected=in_paper,
        p_value=p,
        q_value=q,
        rank=rank,
        tier=np.select([confirmed, candidate, tested], [CONFIRMED, CANDIDATE, REJECTED], UNTESTED),
        verification_p=verification_p,
        verification_q=verification_q,
        selected=selected,
        flag=np.select([~testable, ~tested], ["untestable", "not_estimable"], "ok"),
        rule=name,
        n_tested=int(tested.sum()),
        u=(tasks_needed(tests["selection"], options), tasks_needed(tests["verification"], options)),
    )


def tasks_needed(tests: SplitTests, options: SelectionTests) -> int:
    """Tasks that must show the effect: as asked, else every task estimable on this half."""
    return options.u if options.u is not None else int(tests.tested.sum())


def _conjunction(tests: SplitTests, options: SelectionTests) -> FloatArray:
    """Partial conjunction p-value per feature over the estimable tasks; NaN where fewer than u are estimable."""
    u = tasks_needed(tests, options)
    if u < 1 or tests.tested.sum() < u:
        return np.full(tests.p_task.shape[1], np.nan)
    p_task = tests.p_task[tests.tested].T
    return np.asarray(partial_conjunction(p_task, u=u, combine=options.combine), dtype=np.float64)
