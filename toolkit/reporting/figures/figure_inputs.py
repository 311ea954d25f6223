"""What figures take from results: the group they need, the models they show, and the colours of these."""

from __future__ import annotations

import xarray as xr

from rlgen_stats.schemas.errors import NotEstimableError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.figures.plotting import BASE, MARKERS, RL, SFT
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


def run_markers(spec: StudySpec) -> dict[str, str]:
    """Marker of base and of the two contrasted runs."""
    sft, rl = spec.contrasted
    return {"base": MARKERS["base"], sft.name: MARKERS["sft"], rl.name: MARKERS["rl"]}


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
