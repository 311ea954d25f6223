"""Which features of a set carry its effect: each alone, each left out, and a smaller set that suffices; no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import CLUSTER, FEATURE
from rlgen_stats.schemas.errors import NotEstimableError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.statistics.causal.outcome_table import (
    N_RESAMPLES,
    Direction,
    Floats,
    PairedEffect,
    paired_effect,
)
from rlgen_stats.toolkit.statistics.causal.subset_search import Search, lazy_greedy
from rlgen_stats.toolkit.statistics.kernels import adjust
from rlgen_stats.toolkit.trial.arms import UNEDITED, Arm, part_arm
from rlgen_stats.toolkit.trial.plan import SEARCH_BUDGET, DirectionPlan, TrialPlan

SUFFICIENT: Final = 0.8
"""Share of the whole set's effect that a smaller set must reach on the search prompts."""
_EFFECT: Final = ("mean", "low", "high", "p_value")

ShareCorrect = Callable[[Direction, Arm], Floats]
"""Runs an arm of a direction: [prompt] share of its completions that are right."""


def measure_parts(plan: TrialPlan, share_correct: ShareCorrect, *, progress: Progress = SILENT) -> xr.Dataset:
    """Effects of a set's features and of a smaller set.

    Parameters
    ----------
    plan
        The trial whose set it is; prompts, seeds and stored arms are shared with it.
    share_correct
        Runs an arm, see :meth:`~rlgen_stats.toolkit.trial.run_trial.LiveTrial.share_correct`.
    progress
        Receiver of progress, in arms.

    Returns
    -------
    Dataset
        [direction, feature]: ``alone``, the effect of editing only this feature, and ``left_out``, what the set's
        effect loses without it, each with ``_low``, ``_high``, ``_p_value``, ``_q_value``; ``order``, the place of a
        feature in the greedy search on the search prompts; ``in_subset``. [direction, size]: ``search_effect`` of the
        first ``size`` features, NaN beyond where the search stopped or where there was none. [direction]:
        ``subset_size``; ``subset_effect``, ``set_effect`` and ``set_minus_subset`` with intervals and p-values on the
        other prompts.

    Raises
    ------
    NotEstimableError
        If the trial cannot be held.

    Notes
    -----
    Effects are changes of accuracy on target prompts, paired by prompt and seed, the unit being the cluster. The family
    of the q-values (Benjamini-Hochberg) is all features, both ways and both directions. The subset is searched on one
    half of the clusters (by a hash) and its effect reported on the other, which took no part: a search over sets finds
    the luckiest one, and only unused prompts say how good it is.
    """
    if not plan.directions:
        raise NotEstimableError(f"effects of single features cannot be measured ({plan.why_not}).")
    parts = [_Parts(plan, one, share_correct).measure(progress) for one in plan.directions]
    effects = xr.concat(parts, dim=pd.Index([one.direction for one in plan.directions], name="direction"))
    p_values = np.stack([effects["alone_p_value"].values, effects["left_out_p_value"].values])
    q_values = np.asarray(adjust(p_values, method="bh"))
    effects["alone_q_value"], effects["left_out_q_value"] = (effects["alone_p_value"].copy(data=q) for q in q_values)
    return effects.assign_attrs(
        test="sign-flip over prompt clusters (exact McNemar for one sample a prompt)",
        null="the edit changes no completion's chance of being right",
        unit="prompt cluster",
        family="features x (alone, left out) x directions",
        family_size=int(p_values.size),
        seed=plan.sampling.seed,
        alpha=plan.declared.alpha,
        sufficient=SUFFICIENT,
    )


class _Parts:
    """One direction; accuracies are [target prompt]."""

    def __init__(self, plan: TrialPlan, direction: DirectionPlan, share_correct: ShareCorrect) -> None:
        self._plan, self._direction, self._share_correct = plan, direction.direction, share_correct
        self._set_arm = direction.set_arm
        self._clusters = plan.prompts.table[CLUSTER].to_numpy(np.str_)[plan.prompts.target]
        seed, labels = plan.sampling.seed, sorted(set(self._clusters.tolist()))
        searched = {cluster: derive_seed(seed, "subset search", cluster) % 2 == 0 for cluster in labels}
        self._search = np.array([searched[str(cluster)] for cluster in self._clusters])
        self._sign = 1.0 if self._direction == "amplify" else -1.0

    def measure(self, progress: Progress) -> xr.Dataset:
        """All effects of this direction."""
        features = self._plan.features
        with progress.task(f"{self._direction}: features", total=2 * len(features) + 2, unit="arms") as task:
            unedited, whole = self._accuracy_of(UNEDITED), self._accuracy(features)
            task.advance(2)
            alone, without = [], []
            for k in features:
                alone.append(self._accuracy((k,)))
                rest = tuple(other for other in features if other != k)
                without.append(self._accuracy(rest) if rest else unedited)
                task.advance(2)
        columns: dict[str, Any] = {}
        for label, changes in (
            ("alone", np.stack(alone, axis=1) - unedited[:, None]),
            ("left_out", whole[:, None] - np.stack(without, axis=1)),
        ):
            effect = self._effect(changes, np.ones(len(changes), dtype=bool))
            columns |= {
                label if part == "mean" else f"{label}_{part}": (FEATURE, getattr(effect, part)) for part in _EFFECT
            }
        columns |= self._subset(dict(zip(features, alone, strict=True)), unedited, whole, progress)
        return xr.Dataset(columns, coords={FEATURE: np.array(features), "size": np.arange(1, len(features) + 1)})

    def _subset(self, alone: dict[int, Floats], unedited: Floats, whole: Floats, progress: Progress) -> dict[str, Any]:
        """Add features until the search prompts show enough; then measure the set on the others."""
        features = self._plan.features
        search = self._subset_search(alone, unedited, whole, progress)
        size = len(search.order)
        place = {k: i for i, k in enumerate((*search.order, *search.left), start=1)}
        subset = self._accuracy(search.order)
        columns: dict[str, Any] = {
            "order": (FEATURE, np.array([place[k] for k in features])),
            "in_subset": (FEATURE, np.array([k in search.order for k in features])),
            "search_effect": ("size", self._sign * np.array([*search.values, *[np.nan] * (len(features) - size)])),
            "subset_size": ((), size),
        }
        effect = self._effect(np.stack([subset - unedited, whole - unedited, whole - subset], axis=1), ~self._search)
        for i, label in enumerate(("subset_effect", "set_effect", "set_minus_subset")):
            columns |= {
                label if part == "mean" else f"{label}_{part}": ((), float(getattr(effect, part)[i]))
                for part in _EFFECT
            }
        return columns

    def _subset_search(self, alone: dict[int, Floats], unedited: Floats, whole: Floats, progress: Progress) -> Search:
        """The search; without an effect to reach on the search prompts, the whole set as it is."""

        def strength(accuracy: Floats) -> float:
            if not self._search.any():
                return float("nan")
            return self._sign * float((accuracy - unedited)[self._search].mean())

        features = self._plan.features
        threshold = SUFFICIENT * strength(whole)
        if not threshold > 0:
            return Search(features, (*[float("nan")] * (len(features) - 1), strength(whole)), ())
        with progress.task(f"{self._direction}: smaller sets", unit="sets") as task:

            def value(members: tuple[int, ...]) -> float:
                reached = strength(self._accuracy(members))
                task.advance(1, features=len(members), share=round(reached / strength(whole), 2))
                return reached

            single = {k: strength(accuracy) for k, accuracy in alone.items()}
            return lazy_greedy(single, value, threshold=threshold, budget=SEARCH_BUDGET * len(features))

    def _accuracy(self, features: Sequence[int]) -> Floats:
        return self._accuracy_of(part_arm(self._set_arm, features))

    def _accuracy_of(self, arm: Arm) -> Floats:
        return np.asarray(self._share_correct(self._direction, arm)[self._plan.prompts.target])

    def _effect(self, changes: Floats, rows: NDArray[np.bool_]) -> PairedEffect:
        if not rows.any():
            unknown = np.full(changes.shape[1], np.nan)
            return PairedEffect(unknown, unknown, unknown, np.ones(changes.shape[1]))
        return paired_effect(
            changes[rows],
            self._clusters[rows],
            alpha=self._plan.declared.alpha,
            seed=derive_seed(self._plan.sampling.seed, "intervention", "parts", self._direction),
            n_resamples=N_RESAMPLES,
        )
