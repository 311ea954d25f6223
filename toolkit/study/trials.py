"""Causal trials of other feature sets than the one a study selected, beside its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import xarray as xr

from rlgen_stats.schemas.dims import FEATURE
from rlgen_stats.schemas.errors import InputError, StageError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.schemas.seeds import content_hash
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import open_outcomes, open_results, write_results
from rlgen_stats.stores.locks import exclusive
from rlgen_stats.toolkit.intervention import TrialPlan, feature_effects, plan_trial, verify_causally
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.study.run import open_for_run
from rlgen_stats.toolkit.study.stage_graph import Study

SETS: Final = ("selected", "confirmed", "candidate", "paper")
"""Sets by name: what the study edits, its confirmed features, its candidates, and what the paper's rule keeps."""
DIRECTIONS: Final = ("disable", "amplify")
NEEDS: Final = ("posttrain", "outcomes", "extract", "encode", "align", "select")
"""Stages that a trial reads."""
SPELLED_OUT: Final = 6
"""Features that a trial's name spells out; more are hashed."""

Direction = Literal["disable", "amplify"]


@dataclass(frozen=True)
class TrialRun:
    """A trial that was run, or would be."""

    name: str
    plan: TrialPlan
    seconds: float | None
    """Roughly how long the plan takes at the speed of the outcomes stage; None where that is not known."""
    result: xr.Dataset | None
    """Layout ``intervention``; None for a dry run."""
    parts: xr.Dataset | None = None
    """Effects of single features, if asked for."""


def run_trial(
    path: Path | str,
    *,
    features: Sequence[int] = (),
    set_name: str | None = None,
    directions: Sequence[Direction] = DIRECTIONS,
    doses: Sequence[float] = (),
    level: Literal["own", "rl"] | None = None,
    by_feature: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> TrialRun:
    """Verify any feature set of a study causally, as its own is.

    Parameters
    ----------
    path
        Study folder, run up to the align and select stages.
    features
        Ids of the primary crosscoder; or
    set_name
        one of ``SETS``.
    directions
        Disable in the RL model, amplify in base, or both.
    doses
        Multipliers of the dose curve instead of the study's; the first above 1 is the amplification that is tested
        against random sets.
    level
        What amplification multiplies (``intervention.level``) instead of the study's.
    by_feature
        Whether to edit every feature alone and leave each out too, and look for a smaller set that suffices.
    dry_run
        Only say what it would cost.
    progress
        Receiver of progress.

    Returns
    -------
    TrialRun
        The result is also written to results.zarr as ``trial-NAME`` (``trial-NAME-features`` for single
        features), its completions below intervention/NAME.

    Raises
    ------
    StageError
        If the study has not come to the align and select stages, or is stale.
    InputError
        If a feature or set does not exist, a feature never fires, both or neither are named, or a level is given
        without amplification.
    """
    study = open_for_run(path)
    open_ = [name for name in NEEDS if study.state(name) != "done"]
    if open_:
        todo = " and ".join(f"rlgen-stats {name} {path}" for name in ("align", "select") if name in open_)
        raise StageError(f"a trial needs the stage(s) {', '.join(open_)} done; run: {todo}")
    if bool(features) == (set_name is not None):
        raise InputError("name a set or features, one of the two; e.g. --set paper, or --features 12,407.")
    chosen = _named(study, set_name) if set_name is not None else tuple(dict.fromkeys(int(k) for k in features))
    spec, label = _asked(study.spec, directions, doses, level)
    name = (set_name or _name(chosen)) + label
    provenance = study.provenance("intervene", study.key("intervene"))
    own = "" if name == "selected" else name  # the study's own set has its arms where the stage puts them
    how: dict[str, Any] = {"provenance": provenance, "directions": directions, "name": own}
    plan = plan_trial(spec, study.folder, chosen, by_feature=by_feature, **how)
    seconds = _seconds(study, spec, plan)
    if dry_run:
        return TrialRun(name, plan, seconds, None)
    with exclusive(study.folder.stages / "run"):
        result, balance = verify_causally(spec, study.folder, chosen, progress=progress, **how)
        validate(result, "intervention")
        write_results(study.folder.results, f"trial-{name}", result, provenance=provenance)
        write_results(study.folder.results, f"trial-{name}-balance", balance, provenance=provenance)
        parts = None
        if by_feature:
            parts = feature_effects(spec, study.folder, chosen, progress=progress, **how)
            write_results(study.folder.results, f"trial-{name}-features", parts, provenance=provenance)
    return TrialRun(name, plan, seconds, result, parts)


def _asked(
    spec: StudySpec, directions: Sequence[Direction], doses: Sequence[float], level: Literal["own", "rl"] | None
) -> tuple[StudySpec, str]:
    """The spec of a trial, and what in its name tells it from the study's own."""
    if level is not None and "amplify" not in directions:
        raise InputError("a level is what amplification adds; leave --level out, or amplify.")
    before, label = spec.intervention, ""
    changes: dict[str, Any] = {"doses": tuple(doses)} if doses else {}
    main = next((dose for dose in doses if dose > 1), before.amplify)
    if "amplify" in directions and main != before.amplify:
        changes["amplify"] = main
        label += f"-x{main:g}"
    if level is not None and level != before.level:
        changes["level"] = level
        label += f"-{level}-level"
    return spec.model_copy(update={"intervention": before.model_copy(update=changes)}), label


def _named(study: Study, name: str) -> tuple[int, ...]:
    selection = open_results(study.folder.results, "selection").load()
    masks = {
        "selected": selection["selected"].values,
        "confirmed": selection["tier"].values == "CONFIRMED",
        "candidate": np.isin(selection["tier"].values, ["CONFIRMED", "CANDIDATE"]),
        "paper": selection["paper_selected"].values,
    }
    if name not in masks:
        raise InputError(f"the sets are {', '.join(SETS)}, got {name!r}; or name features.")
    in_set = selection.isel({FEATURE: np.flatnonzero(masks[name])})
    chosen = tuple(int(k) for k in in_set[FEATURE].values[np.argsort(in_set["rank"].values, kind="stable")])
    if not chosen:
        raise InputError(f"the set {name!r} of this study is empty; name features, or see results.zarr/selection.")
    return chosen


def _name(features: tuple[int, ...]) -> str:
    if len(features) <= SPELLED_OUT:
        return "features-" + "-".join(map(str, features))
    return f"features-{len(features)}-{content_hash(list(features))[:8]}"


def _seconds(study: Study, spec: StudySpec, plan: TrialPlan) -> float | None:
    spent = study.record("outcomes").get("seconds")
    sizes = open_outcomes(study.folder.outcomes).sizes
    sampled = sizes["model"] * sizes["prompt"] * (1 + spec.generation.n_samples)
    return None if not spent else float(spent) * plan.completions / sampled
