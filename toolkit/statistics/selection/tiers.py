"""From p-values to tiers: candidates on the selection half, confirmation on the verification half."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import FEATURE
from rlgen_stats.toolkit.statistics.kernels import adjust, partial_conjunction
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray
from rlgen_stats.toolkit.statistics.selection.discordance import SplitTests
from rlgen_stats.toolkit.statistics.selection.paper_rule import PaperRule

CONFIRMED, CANDIDATE, REJECTED, UNTESTED = "CONFIRMED", "CANDIDATE", "REJECTED", "UNTESTED"

Rule = Literal["confirmed", "paper"]


@dataclass(frozen=True)
class Options:
    """Settings of a selection, as named in ``select_features``."""

    score_fraction: float
    u: int | None
    combine: str
    alpha: float
    n_resamples: int
    n_bootstrap: int
    min_discordant: int
    n_min: int
    seed: int
    n_pairs: int
    n_per_half: int | None
    stability_threshold: float


@dataclass(frozen=True)
class Found:
    """The decision per feature."""

    paper_selected: NDArray[np.bool_]
    p_value: FloatArray
    q_value: FloatArray
    rank: FloatArray
    tier: NDArray[np.str_]
    verification_p: FloatArray
    verification_q: FloatArray
    selected: NDArray[np.bool_]
    flag: NDArray[np.str_]
    rule: str
    n_tested: int
    u: tuple[int, int]

    def variables(self, verification: SplitTests) -> dict[str, tuple[str, NDArray[Any]]]:
        """Per-feature variables of the layout."""
        own = {
            name: (FEATURE, getattr(self, name))
            for name in ("paper_selected", "p_value", "q_value", "rank", "tier", "verification_p", "verification_q",
                         "selected", "flag")
        }  # fmt: skip
        return own | {
            "verification_effect": (FEATURE, verification.effect[0]),
            "verification_low": (FEATURE, verification.effect[1]),
            "verification_high": (FEATURE, verification.effect[2]),
            "verification_score": (FEATURE, verification.score),
        }


def decide(
    tests: dict[str, SplitTests],
    testable: NDArray[np.bool_],
    paper: PaperRule | None,
    rule: Rule,
    max_features: int,
    options: Options,
    ranks: IntArray,
) -> Found:
    """Tier, rank and selection of every feature.

    Parameters
    ----------
    tests
        Tests of both splits.
    testable
        [feature]; the others are in no family.
    paper
        The paper's rule, None if no task could be scored.
    rule, max_features, options
        As in ``select_features``. Ranks and selection never look at the verification half beyond the tier itself.
    ranks
        [feature]: ranks of the labels, which break ties.
    """
    n = len(testable)
    p = np.where(testable, _conjunction(tests["selection"], options), np.nan)
    q = np.asarray(adjust(p, method="bh"))
    candidate = np.nan_to_num(q, nan=1.0) <= options.alpha
    fresh = np.where(candidate, _conjunction(tests["verification"], options), np.nan)
    fresh_q = np.asarray(adjust(fresh, method="holm"))
    confirmed = candidate & (np.nan_to_num(fresh_q, nan=1.0) <= options.alpha)
    tier = np.select([confirmed, candidate, np.isfinite(p)], [CONFIRMED, CANDIDATE, REJECTED], UNTESTED)
    in_paper = np.zeros(n, dtype=bool) if paper is None else paper.selected
    least = np.full(n, -np.inf) if paper is None else paper.scores.min(axis=0)
    sets = [("CONFIRMED", confirmed), ("CANDIDATE (none confirmed)", candidate), ("paper (no candidate)", in_paper)]
    if rule == "paper":
        sets = [("paper (as requested)", in_paper)]
    name, members = next(((name, s) for name, s in sets if s.any()), ("nothing selected", np.zeros(n, dtype=bool)))
    key = np.where(np.isfinite(p), p, np.inf) if not name.startswith("paper") else np.zeros(n)
    order = np.lexsort((ranks, -least, key))
    ranked = np.full(n, np.nan)
    placed = order[(np.isfinite(p) | in_paper)[order]]
    ranked[placed] = np.arange(1, len(placed) + 1)
    selected = np.zeros(n, dtype=bool)
    selected[[k for k in order if members[k]][:max_features]] = True
    flag = np.select([~testable, ~np.isfinite(p)], ["untestable", "not_estimable"], "ok")
    u = tasks_needed(tests["selection"], options), tasks_needed(tests["verification"], options)
    return Found(
        in_paper, p, q, ranked, tier, fresh, fresh_q, selected, flag, name, int(np.isfinite(p).sum()), u
    )  # fmt: skip


def tasks_needed(tests: SplitTests, options: Options) -> int:
    """Tasks that must show the effect: as asked, else every task estimable on this half."""
    return options.u if options.u is not None else int(np.isfinite(tests.p_task).any(axis=1).sum())


def _conjunction(tests: SplitTests, options: Options) -> FloatArray:
    """Partial conjunction p-value per feature over the estimable tasks; NaN where fewer than u are estimable."""
    estimable = np.isfinite(tests.p_task).any(axis=1)
    u = tasks_needed(tests, options)
    if u < 1 or estimable.sum() < u:
        return np.full(tests.p_task.shape[1], np.nan)
    return np.asarray(partial_conjunction(tests.p_task[estimable].T, u=u, combine=options.combine), dtype=np.float64)
