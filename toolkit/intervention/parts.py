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
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import Provenance, StudyFolder
from rlgen_stats.toolkit.extraction.checkpoints import find_model, load_model, load_tokenizer, resolve_device
from rlgen_stats.toolkit.intervention.arms import (
    DIRECTIONS,
    UNEDITED,
    Arm,
    edited_positions,
    main_dose,
    target_prompts,
)
from rlgen_stats.toolkit.intervention.edit import FeatureEdit
from rlgen_stats.toolkit.intervention.outcomes import Condition, Direction, Floats, PairedEffect, paired_effect
from rlgen_stats.toolkit.intervention.trial import Bench, Subject, run_arm
from rlgen_stats.toolkit.intervention.verify import N_RESAMPLES, Trial, edit_site, make_bench, prepare
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.statistics.kernels import adjust

SUFFICIENT: Final = 0.8
"""Share of the whole set's effect that a smaller set must reach on the search prompts."""
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
        feature when they are added from the strongest alone on the search prompts; ``in_subset``. [direction, size]:
        ``search_effect`` of the first ``size`` features, NaN beyond where the search stopped. [direction]:
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
            unedited, whole = self._right(UNEDITED), self._right(self._arm("set", chosen))
            task.advance(2)
            alone, without = [], []
            for k in chosen:
                alone.append(self._right(self._arm(f"single-{k}", (k,))))
                rest = tuple(other for other in chosen if other != k)
                without.append(self._right(self._arm(f"without-{k}", rest)) if rest else unedited)
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
        strength = self._sign * (np.stack(alone, axis=1) - unedited[:, None])[self._search].mean(axis=0)
        order = np.argsort(-strength, kind="stable")
        found |= self._subset(order, unedited, whole, progress)
        return xr.Dataset(found, coords={FEATURE: np.array(chosen), "size": np.arange(1, len(chosen) + 1)})

    def _subset(self, order: NDArray[np.int64], unedited: Floats, whole: Floats, progress: Progress) -> dict[str, Any]:
        """Add features, strongest first, until the search prompts show enough; then look at the others."""
        chosen, search = np.array(self.trial.chosen), self._search
        wanted = SUFFICIENT * self._sign * float((whole - unedited)[search].mean()) if search.any() else np.nan
        effects, right, size = np.full(len(chosen), np.nan), whole, len(chosen)
        with progress.task(f"{self.direction}: smaller sets", total=len(chosen), unit="sets") as task:
            for n in range(1, len(chosen) + 1):
                kept = tuple(int(k) for k in chosen[order[:n]])
                right = self._right(self._arm(f"first-{n:03d}", kept)) if n < len(chosen) else whole
                effects[n - 1] = (right - unedited)[search].mean() if search.any() else np.nan
                task.advance(1)
                if wanted > 0 and self._sign * effects[n - 1] >= wanted:
                    size = n
                    break
        place = np.empty(len(chosen), dtype=np.int64)
        place[order] = np.arange(1, len(chosen) + 1)
        told: dict[str, Any] = {
            "order": (FEATURE, place),
            "in_subset": (FEATURE, place <= size),
            "search_effect": ("size", effects),
            "subset_size": ((), size),
        }
        columns = np.stack([right - unedited, whole - unedited, whole - right], axis=1)
        effect = self._effect(columns, ~search)
        for i, label in enumerate(("subset_effect", "set_effect", "set_minus_subset")):
            told |= {
                label if part == "mean" else f"{label}_{part}": ((), float(getattr(effect, part)[i]))
                for part in _EFFECT
            }
        return told

    def _arm(self, label: str, features: tuple[int, ...]) -> Arm:
        spec = self.trial.spec
        dose = main_dose(self.direction, spec.intervention)
        where: dict[str, Any] = {
            "positions": edited_positions(spec.extraction),
            "skip_first": spec.extraction.skip_first,
        }
        edit = (
            FeatureEdit(features, "disable", **where) if dose == 0 else FeatureEdit(features, "amplify", dose, **where)
        )
        return Arm(Condition(label, "set" if label == "set" else "part", dose), edit)

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
