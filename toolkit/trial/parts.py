"""Which features of a set carry its effect: each alone, each left out, and a smaller set that suffices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import CLUSTER, FEATURE
from rlgen_stats.schemas.errors import NotEstimableError
from rlgen_stats.schemas.seeds import content_hash, derive_seed
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import Provenance, StudyFolder
from rlgen_stats.toolkit.extraction.checkpoints import find_model, load_model, load_tokenizer, resolve_device
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.statistics.causal.outcome_table import (
    Condition,
    Direction,
    Floats,
    PairedEffect,
    paired_effect,
)
from rlgen_stats.toolkit.statistics.kernels import adjust
from rlgen_stats.toolkit.trial.arms import (
    DIRECTIONS,
    UNEDITED,
    Arm,
    main_dose,
    scaled_edit,
    target_prompts,
)
from rlgen_stats.toolkit.trial.run_arm import Bench, Subject, run_arm
from rlgen_stats.toolkit.trial.subset import Search, lazy_greedy
from rlgen_stats.toolkit.trial.verify_causally import N_RESAMPLES, Trial, edit_site, make_bench, prepare

SUFFICIENT: Final = 0.8
"""Share of the whole set's effect that a smaller set must reach on the search prompts."""
SEARCH_BUDGET: Final = 2
"""Sets measured only to choose the next member of the smaller set, in multiples of the set's size."""
_EFFECT: Final = ("mean", "low", "high", "p_value")


def feature_effects(
    spec: StudySpec,
    folder: StudyFolder,
    features: Sequence[int],
    *,
    provenance: Provenance,
    directions: Sequence[Direction] = DIRECTIONS,
    name: str = "",
    progress: Progress = SILENT,
) -> xr.Dataset:
    """Edit every feature of a set alone, leave each out of the set, and look for a smaller set that suffices.

    Parameters
    ----------
    spec, folder, features, provenance, directions, name
        As in :func:`verify_causally`, with whose arms these are kept and whose prompts and seeds they share.
    progress
        Receiver of progress, in completions.

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
    InputError
        If a feature does not exist.

    Notes
    -----
    Effects are changes of accuracy on target prompts, paired by prompt and seed, the unit being the cluster. The family
    of the q-values (Benjamini-Hochberg) is all features, both ways and both directions. The subset is searched on one
    half of the clusters (by a hash) and its effect reported on the other, which took no part: a search over sets finds
    the luckiest one, and only unused prompts say how good it is.
    """
    trial = prepare(spec, folder, features)
    if isinstance(trial, str):
        raise NotEstimableError(f"effects of single features cannot be measured ({trial}).")
    parts = []
    for direction in directions:
        with torch.no_grad():
            parts.append(_Parts(trial, folder, provenance, direction, name).measure(progress))
    found = xr.concat(parts, dim=pd.Index(list(directions), name="direction"))
    p_values = np.stack([found["alone_p_value"].values, found["left_out_p_value"].values])
    q_values = np.asarray(adjust(p_values, method="bh"))
    found["alone_q_value"], found["left_out_q_value"] = (found["alone_p_value"].copy(data=q) for q in q_values)
    return found.assign_attrs(
        test="sign-flip over prompt clusters (exact McNemar for one sample a prompt)",
        null="the edit changes no completion's chance of being right",
        unit="prompt cluster",
        family="features x (alone, left out) x directions",
        family_size=int(p_values.size),
        seed=spec.seed,
        alpha=spec.statistics.alpha,
        sufficient=SUFFICIENT,
    )


def part_arm(trial: Trial, direction: Direction, features: Sequence[int]) -> Arm:
    """The arm that edits some features of a trial's set; an edit has one name however it came about."""
    chosen, spec = trial.chosen, trial.spec
    kept = tuple(k for k in chosen if k in features)
    left = [k for k in chosen if k not in features]
    if not left:
        label = "set"
    elif len(kept) == 1:
        label = f"single-{kept[0]}"
    else:
        label = f"without-{left[0]}" if len(left) == 1 else f"subset-{content_hash(list(kept))[:12]}"
    dose = main_dose(direction, spec.intervention)
    edit = scaled_edit(kept, dose, spec, trial.levels_of(direction))
    return Arm(Condition(label, "part" if left else "set", dose), edit)


def part_arms(trial: Trial, direction: Direction) -> tuple[Arm, ...]:
    """Every feature alone and every feature left out, without what is one arm twice."""
    chosen = trial.chosen
    arms = [part_arm(trial, direction, (k,)) for k in chosen]
    arms += [part_arm(trial, direction, [other for other in chosen if other != k]) for k in chosen if len(chosen) > 1]
    return tuple({arm.name: arm for arm in arms if arm.condition.kind == "part"}.values())


def n_search_sets(n_features: int) -> int:
    """Sets that the search for a smaller set measures at most, beside those of :func:`part_arms`."""
    return max((SEARCH_BUDGET + 1) * n_features - 2, 0) if n_features > 2 else 0


@dataclass
class _Parts:
    """One direction."""

    trial: Trial
    folder: StudyFolder
    provenance: Provenance
    direction: Direction
    name: str

    def __post_init__(self) -> None:
        spec = self.trial.spec
        site = edit_site(self.trial, self.direction)
        reference = find_model(site.view, spec, self.folder)
        model = load_model(reference, device=resolve_device(spec.device))
        tokenizer = load_tokenizer(reference)
        self._bench: Bench = make_bench(self.trial, self.folder, self.provenance, tokenizer, self.name)
        self._subject = Subject(self.direction, model, site, None)
        self._target, _ = target_prompts(self.trial.prompts, spec)
        self._clusters = self.trial.prompts[CLUSTER].to_numpy(np.str_)[self._target]
        halves = {c: derive_seed(spec.seed, "subset search", c) % 2 == 0 for c in sorted(set(self._clusters.tolist()))}
        self._search = np.array([halves[str(cluster)] for cluster in self._clusters])
        self._sign = 1.0 if self.direction == "amplify" else -1.0

    def measure(self, progress: Progress) -> xr.Dataset:
        """All effects of this direction."""
        chosen = self.trial.chosen
        with progress.task(f"{self.direction}: features", total=2 * len(chosen) + 2, unit="arms") as task:
            unedited, whole = self._right(UNEDITED), self._right(self._arm(chosen))
            task.advance(2)
            alone, without = [], []
            for k in chosen:
                alone.append(self._right(self._arm((k,))))
                rest = tuple(other for other in chosen if other != k)
                without.append(self._right(self._arm(rest)) if rest else unedited)
                task.advance(2)
        found: dict[str, Any] = {}
        for label, changes in (
            ("alone", np.stack(alone, axis=1) - unedited[:, None]),
            ("left_out", whole[:, None] - np.stack(without, axis=1)),
        ):
            effect = self._effect(changes, np.ones(len(changes), dtype=bool))
            found |= {
                label if part == "mean" else f"{label}_{part}": (FEATURE, getattr(effect, part)) for part in _EFFECT
            }
        found |= self._subset(dict(zip(chosen, alone, strict=True)), unedited, whole, progress)
        return xr.Dataset(found, coords={FEATURE: np.array(chosen), "size": np.arange(1, len(chosen) + 1)})

    def _subset(self, alone: dict[int, Floats], unedited: Floats, whole: Floats, progress: Progress) -> dict[str, Any]:
        """Add features until the search prompts show enough; then look at the others."""
        chosen = self.trial.chosen
        search = self._subset_search(alone, unedited, whole, progress)
        size = len(search.order)
        place = {k: i for i, k in enumerate((*search.order, *search.left), start=1)}
        right = self._right(self._arm(search.order))
        told: dict[str, Any] = {
            "order": (FEATURE, np.array([place[k] for k in chosen])),
            "in_subset": (FEATURE, np.array([k in search.order for k in chosen])),
            "search_effect": ("size", self._sign * np.array([*search.values, *[np.nan] * (len(chosen) - size)])),
            "subset_size": ((), size),
        }
        columns = np.stack([right - unedited, whole - unedited, whole - right], axis=1)
        effect = self._effect(columns, ~self._search)
        for i, label in enumerate(("subset_effect", "set_effect", "set_minus_subset")):
            told |= {
                label if part == "mean" else f"{label}_{part}": ((), float(getattr(effect, part)[i]))
                for part in _EFFECT
            }
        return told

    def _subset_search(self, alone: dict[int, Floats], unedited: Floats, whole: Floats, progress: Progress) -> Search:
        """The search; without an effect to reach on the search prompts, the whole set as it is."""

        def strength(right: Floats) -> float:
            return self._sign * float((right - unedited)[self._search].mean()) if self._search.any() else float("nan")

        chosen = self.trial.chosen
        wanted = SUFFICIENT * strength(whole)
        if not wanted > 0:
            return Search(chosen, (*[float("nan")] * (len(chosen) - 1), strength(whole)), ())
        with progress.task(f"{self.direction}: smaller sets", unit="sets") as task:

            def value(features: tuple[int, ...]) -> float:
                found = strength(self._right(self._arm(features)))
                task.advance(1, features=len(features), share=round(found / strength(whole), 2))
                return found

            each = {k: strength(right) for k, right in alone.items()}
            return lazy_greedy(each, value, wanted=wanted, budget=SEARCH_BUDGET * len(chosen))

    def _arm(self, features: Sequence[int]) -> Arm:
        return part_arm(self.trial, self.direction, features)

    def _right(self, arm: Arm) -> Floats:
        """[target prompt] share of right completions of an arm."""
        frame = run_arm(self._bench, self._subject, arm, None)
        right = frame["correct"].to_numpy(np.float64).reshape(-1, len(self.trial.prompts)).mean(axis=0)
        return np.asarray(right[self._target])

    def _effect(self, changes: Floats, rows: NDArray[np.bool_]) -> PairedEffect:
        spec = self.trial.spec
        if not rows.any():
            nothing = np.full(changes.shape[1], np.nan)
            return PairedEffect(nothing, nothing, nothing, np.ones(changes.shape[1]))
        seed = derive_seed(spec.seed, "intervention", "parts", self.direction)
        return paired_effect(
            changes[rows], self._clusters[rows], alpha=spec.statistics.alpha, seed=seed, n_resamples=N_RESAMPLES
        )
