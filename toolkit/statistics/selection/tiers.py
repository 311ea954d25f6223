"""From p-values to tiers: candidates on the selection part, confirmation on the verification part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import FEATURE, SELECTION, VERIFICATION
from rlgen_stats.toolkit.statistics.kernels import adjust, partial_conjunction
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray
from rlgen_stats.toolkit.statistics.selection.discordance import SplitTests
from rlgen_stats.toolkit.statistics.selection.options import SelectionRule, SelectionTests
from rlgen_stats.toolkit.statistics.selection.paper_rule import PaperSelection

CONFIRMED, CANDIDATE, REJECTED, UNTESTED = "CONFIRMED", "CANDIDATE", "REJECTED", "UNTESTED"


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """One hypothesis about every feature, tested on the selection part and, of candidates, on the verification part."""

    p: FloatArray
    """[feature]: partial conjunction over tasks, selection part."""
    q: FloatArray
    """``p`` corrected by BH over all testable features."""
    verification_p: FloatArray
    """Partial conjunction over tasks, verification part, of candidates (q at most alpha) only."""
    verification_q: FloatArray
    """``verification_p`` corrected by Holm over the candidates."""
    tier: NDArray[np.str_]
    u: tuple[int, int]
    """Tasks that had to show the effect, in the selection and in the verification part."""

    @property
    def confirmed(self) -> NDArray[np.bool_]:
        """[feature]."""
        return np.asarray(self.tier == CONFIRMED)

    @property
    def candidate(self) -> NDArray[np.bool_]:
        """[feature], confirmed or not."""
        return np.isin(self.tier, (CONFIRMED, CANDIDATE))

    def leading(self, most: int) -> IntArray:
        """Positions of at most ``most`` candidates, by p-value on the selection part, then by position."""
        chosen = np.flatnonzero(self.candidate)
        return chosen[np.argsort(self.p[chosen], kind="stable")][:most]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is decided of every feature; arrays are [feature]."""

    paper_selected: NDArray[np.bool_]
    """Kept by the paper's rule in every task."""
    rises: Confirmation
    """The target exceeds base where it gained: what ``tier`` and the selected set say."""
    specific: Confirmation
    """It also does so by more than where both models are right: what claim C3 says."""
    rank: FloatArray
    selected: NDArray[np.bool_]
    flag: NDArray[np.str_]
    rule: str
    """Which features form the selected set."""
    n_tested: int

    def variables(self, verification: SplitTests) -> dict[str, tuple[str, NDArray[Any]]]:
        """Per-feature variables of the layout."""
        arrays = {
            "paper_selected": self.paper_selected,
            "p_value": self.rises.p,
            "q_value": self.rises.q,
            "rank": self.rank,
            "tier": self.rises.tier,
            "verification_p": self.rises.verification_p,
            "verification_q": self.rises.verification_q,
            "specific_p": self.specific.p,
            "specific_tier": self.specific.tier,
            "verification_specific_q": self.specific.verification_q,
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
        Tests of both parts of the split.
    testable
        [feature]; the others are in no family.
    paper
        Outcome of the paper's rule, None if no task could be scored.
    rule, options
        As in ``select_features``. Ranks and selection do not depend on the verification part except through the tier.
    ranks
        [feature]: ranks of the labels, which break ties.
    """
    n = len(testable)
    first, second = tests[SELECTION], tests[VERIFICATION]
    rises = _confirm(first.p_task[first.tested], second.p_task[second.tested], testable, options)
    specific = _confirm(
        np.maximum(first.p_task, first.excess_p)[first.excess_tested],
        np.maximum(second.p_task, second.excess_p)[second.excess_tested],
        testable,
        options,
    )
    tested = np.isfinite(rises.p)
    in_paper = np.zeros(n, dtype=bool) if paper is None else paper.selected
    sets = [
        ("CONFIRMED", rises.confirmed),
        ("CANDIDATE (none confirmed)", rises.candidate),
        ("paper (no candidate)", in_paper),
    ]
    if rule.kind == "paper":
        sets = [("paper (as requested)", in_paper)]
    name, members = next(((name, s) for name, s in sets if s.any()), ("nothing selected", np.zeros(n, dtype=bool)))
    # By p-value, then by the smallest score over tasks (the paper's set by that alone), then by label.
    by_paper = name.startswith("paper")
    smallest_score = np.full(n, -np.inf) if paper is None else paper.scores.min(axis=0)
    order = np.lexsort((ranks, -smallest_score, np.zeros(n) if by_paper else np.where(tested, rises.p, np.inf)))
    rank = np.full(n, np.nan)
    ranked = order[(tested | in_paper)[order]]
    rank[ranked] = np.arange(1, len(ranked) + 1)
    selected = np.zeros(n, dtype=bool)
    selected[order[members[order]][: rule.max_features]] = True
    return Decision(
        paper_selected=in_paper,
        rises=rises,
        specific=specific,
        rank=rank,
        selected=selected,
        flag=np.select([~testable, ~tested], ["untestable", "not_estimable"], "ok"),
        rule=name,
        n_tested=int(tested.sum()),
    )


def _confirm(
    selection: FloatArray, verification: FloatArray, testable: NDArray[np.bool_], options: SelectionTests
) -> Confirmation:
    """BH on the selection part, Holm on the verification part, of [task, feature] p-values of estimable tasks."""
    p = np.where(testable, _conjunction(selection, options), np.nan)
    q = np.asarray(adjust(p, method="bh"))
    candidate = np.nan_to_num(q, nan=1.0) <= options.alpha
    verification_p = np.where(candidate, _conjunction(verification, options), np.nan)
    verification_q = np.asarray(adjust(verification_p, method="holm"))
    confirmed = candidate & (np.nan_to_num(verification_q, nan=1.0) <= options.alpha)
    return Confirmation(
        p=p,
        q=q,
        verification_p=verification_p,
        verification_q=verification_q,
        tier=np.select([confirmed, candidate, np.isfinite(p)], [CONFIRMED, CANDIDATE, REJECTED], UNTESTED),
        u=(tasks_needed(len(selection), options), tasks_needed(len(verification), options)),
    )


def tasks_needed(n_tasks: int, options: SelectionTests) -> int:
    """Tasks that must show the effect: as asked, else every task estimable on this half."""
    return options.u if options.u is not None else n_tasks


def _conjunction(p_task: FloatArray, options: SelectionTests) -> FloatArray:
    """Partial conjunction p-value per feature of [task, feature]; NaN with fewer than u tasks."""
    u = tasks_needed(len(p_task), options)
    if not 1 <= u <= len(p_task):
        return np.full(p_task.shape[1], np.nan)
    return np.asarray(partial_conjunction(p_task.T, u=u, combine=options.combine), dtype=np.float64)
