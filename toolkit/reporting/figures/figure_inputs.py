"""What figures take from results: the group they need, the models they show, and the colours of these."""

from __future__ import annotations

from collections.abc import Sequence

import xarray as xr

from rlgen_stats.schemas.dims import ARM, BASE_RUN, RUN
from rlgen_stats.schemas.errors import NotEstimableError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.figures.plotting import BASE, MARKERS, MUTED, RL, SFT
from rlgen_stats.toolkit.reporting.result_lookup import Results, final_models, labels_of


def needed(results: Results, group: str) -> xr.Dataset:
    """A results group, or the reason why there is no figure.

    Raises
    ------
    NotEstimableError
        If the group is missing.
    """
    if group not in results:
        raise NotEstimableError(f"the analysis '{group}' has not been computed")
    return results[group]


def contrasted_finals(results: Results, spec: StudySpec, group: str) -> dict[str, str]:
    """``run -> final model`` of the two contrasted runs in a group.

    Raises
    ------
    NotEstimableError
        If the group has neither.
    """
    finals = final_models(spec, needed(results, group))
    contrasted = {run.name: finals[run.name] for run in spec.contrasted if run.name in finals}
    if not contrasted:
        raise NotEstimableError(
            f"the analysis '{group}' has no checkpoint of {spec.contrasted[0].name} or {spec.contrasted[1].name}"
        )
    return contrasted


def run_colours(spec: StudySpec) -> dict[str, str]:
    """Colour of base and of the two contrasted runs."""
    sft, rl = spec.contrasted
    return {"base": BASE, sft.name: SFT, rl.name: RL}


def styles_of(data: xr.Dataset, runs: Sequence[str] | None = None) -> dict[str, tuple[str, str]]:
    """Colour and marker of base and of runs: the first run looks like SFT, the second like RL, others are grey.

    Runs are those named, or all that the dataset has, those of an arm ``sft`` first.
    """
    if runs is None:
        arms = dict(zip(labels_of(data, RUN), labels_of(data, ARM) or labels_of(data, RUN), strict=True))
        runs = sorted((run for run in arms if run != BASE_RUN), key=lambda run: arms[run] != "sft")
    looks = [(SFT, MARKERS["sft"]), (RL, MARKERS["rl"])]
    of_runs = {run: looks[i] if i < len(looks) else (MUTED, "o") for i, run in enumerate(runs)}
    return {BASE_RUN: (BASE, MARKERS["base"])} | of_runs


def task_groups(data: xr.Dataset) -> list[tuple[str, list[str]]]:
    """Tasks by kind, in reading order: in-domain, out-of-domain, held out from selection, negative control."""
    kinds: dict[str, list[str]] = {name: [] for name in ("In-domain", "Out-of-domain", "Held out", "Control")}
    roles = {"held_out": "Held out", "control": "Control"}
    for task, domain, role in zip(
        labels_of(data, "task"), labels_of(data, "domain"), labels_of(data, "role"), strict=True
    ):
        if role != "pooled":
            kinds[roles.get(role, "In-domain" if domain == "in" else "Out-of-domain")].append(task)
    return [(kind, tasks) for kind, tasks in kinds.items() if tasks]
