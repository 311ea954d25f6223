"""Causal trials of other feature sets than the one a study selected, beside its own.

Planning one needs no torch; running it does.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import xarray as xr

from rlgen_stats.schemas.dims import FEATURE, NOT_SAMPLED, of_dictionary
from rlgen_stats.schemas.errors import InputError, StageError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.schemas.seeds import content_hash
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import Provenance, open_outcomes, open_results, write_results
from rlgen_stats.stores.prompts import load_prompts
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.statistics.causal.causal_equivalence import causal_equivalence
from rlgen_stats.toolkit.statistics.causal.mediated_share import mediated_share
from rlgen_stats.toolkit.statistics.causal.outcome_table import DIRECTIONS, Direction
from rlgen_stats.toolkit.statistics.causal.result_datasets import judge_trial
from rlgen_stats.toolkit.study.costs import arms_at_most, token_limits
from rlgen_stats.toolkit.study.linked_studies import open_for_run
from rlgen_stats.toolkit.study.stage_graph import Study
from rlgen_stats.toolkit.trial.arms import choose_prompts
from rlgen_stats.toolkit.trial.plan import TrialPlan, curves_of, plan_trial
from rlgen_stats.toolkit.workers import tasks_on

LARGEST_DOSE: Final = 1000.0
"""Beyond it an edit is no dose of anything, and numbers overflow."""
SETS: Final = ("selected", "rising", "confirmed", "candidate", "paper")
"""Sets by name: what the study edits, features shown to rise where RL gained, those of them that do so by more than
elsewhere (which C3 counts), candidates, and what the paper's rule keeps."""
NEEDS: Final = ("posttrain", "outcomes", "extract", "encode", "align", "select")
"""Stages that a trial reads."""
_RUN_STEP: Final = "rlgen_stats.toolkit.trial.run_trial"
"""The step of a trial that imports torch; loaded only when something is run."""
SPELLED_OUT: Final = 6
"""Features that a trial's name spells out; more are hashed."""


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


@dataclass(frozen=True, kw_only=True)
class TrialEstimate:
    """What a trial in one dictionary would take at most, by the settings alone: its features are not known yet."""

    waiting_for: tuple[str, ...]
    """Stages that it needs and that are not done."""
    arms: Mapping[Direction, int]
    n_prompts: int
    n_samples: int
    n_controls: int
    completions: int
    max_new_tokens: int
    """Of the longest completions."""


def estimate_set(
    path: Path | str,
    *,
    features: Sequence[int] = (),
    set_name: str | None = None,
    dictionary: int = 1,
    directions: Sequence[Direction] = DIRECTIONS,
    doses: Sequence[float] = (),
    level: Literal["own", "rl"] | None = None,
) -> TrialEstimate | None:
    """What :func:`verify_set` would take at most, before the stages that it needs have run; None once they have.

    Parameters
    ----------
    path
        Study folder.
    features, set_name, dictionary, directions, doses, level
        As :func:`verify_set`.

    Raises
    ------
    InputError
        As :func:`verify_set`.
    """
    study = open_for_run(path, exact=False)
    waiting = tuple(name for name in NEEDS if study.state(name) != "done")
    if not waiting:
        return None
    _check_asked(study.spec, features, set_name, dictionary, doses)
    spec, _ = _changed(study.spec, directions, doses, level)
    prompts, arms = choose_prompts(load_prompts(spec, study.folder), spec), arms_at_most(spec, directions)
    limits = token_limits(spec, prompts)
    generated = sum(limit > 0 for limit in limits)
    return TrialEstimate(
        waiting_for=waiting,
        arms=arms,
        n_prompts=len(prompts),
        n_samples=spec.intervention.n_samples,
        n_controls=spec.intervention.n_controls,
        completions=sum(arms.values()) * spec.intervention.n_samples * generated,
        max_new_tokens=max(limits, default=0),
    )


def verify_set(
    path: Path | str,
    *,
    features: Sequence[int] = (),
    set_name: str | None = None,
    dictionary: int = 1,
    directions: Sequence[Direction] = DIRECTIONS,
    doses: Sequence[float] = (),
    level: Literal["own", "rl"] | None = None,
    by_feature: bool = False,
    dry_run: bool = False,
    workers: Any = None,
    progress: Progress = SILENT,
) -> TrialRun:
    """Verify any feature set of a study causally, as its own is.

    Parameters
    ----------
    path
        Study folder, run up to the align and select stages.
    features
        Ids in the encoded crosscoder's dictionary; or
    set_name
        one of ``SETS``.
    dictionary
        Number of the dictionary, from 1 on.
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
    workers
        As in :func:`run_study`.
    progress
        Receiver of progress.

    Returns
    -------
    TrialRun
        The result is also written to results.zarr as ``trial-NAME`` (``trial-NAME-features`` for single features,
        ``trial-NAME-equivalence`` for whether it does the same in both models), its completions below
        intervention/NAME.

    Raises
    ------
    StageError
        If the study has not come to the align and select stages, or is stale.
    InputError
        If a feature, set or dictionary does not exist, a feature never fires, both or neither of features and set are
        named, a dose is negative or beyond ``LARGEST_DOSE``, or a level is given without amplification.
    """
    study = open_for_run(path if workers is None else Path(path).resolve())
    missing = [name for name in NEEDS if study.state(name) != "done"]
    if missing:
        todo = " and ".join(f"rlgen-stats {name} {path}" for name in ("align", "select") if name in missing)
        raise StageError(f"a trial needs the stage(s) {', '.join(missing)} done; run: {todo}")
    _check_asked(study.spec, features, set_name, dictionary, doses)
    chosen = (
        _named(study, set_name, dictionary) if set_name is not None else tuple(dict.fromkeys(int(k) for k in features))
    )
    spec, label = _changed(study.spec, directions, doses, level)
    name = (set_name or _name(chosen)) + (f"-in-{dictionary}" if dictionary > 1 else "") + label
    provenance = study.provenance("intervene", study.key("intervene"))
    plan = plan_trial(
        spec,
        study.folder,
        chosen,
        provenance=provenance,
        directions=directions,
        dictionary=dictionary,
        name=""
        if set_name == "selected" and not label
        else name,  # the study's own set has arms where the stage puts them
        by_feature=by_feature,
    )
    seconds = _seconds(study, plan)
    if dry_run:
        return TrialRun(name, plan, seconds, None)
    with study.being_written(), tasks_on(workers, study.folder.spec):
        result, parts = _run(study, name, plan, provenance, by_feature=by_feature, progress=progress)
    return TrialRun(name, plan, seconds, result, parts)


def _run(
    study: Study, name: str, plan: TrialPlan, provenance: Provenance, *, by_feature: bool, progress: Progress
) -> tuple[xr.Dataset, xr.Dataset | None]:
    """Run and judge a plan, store what it shows."""

    def write(group: str, dataset: xr.Dataset) -> None:
        write_results(study.folder.results, group, dataset, provenance=provenance)

    step = pkgutil.resolve_name(_RUN_STEP)
    live = step.LiveTrial(plan)
    outcomes = step.run_trial(plan, live=live, progress=progress)
    result, balance = judge_trial(outcomes, plan.declared)
    validate(result, "intervention")
    write(f"trial-{name}", result)
    write(f"trial-{name}-balance", balance)
    curves = {plan.files.dictionary: curves_of(plan, outcomes)} if outcomes else {}
    shares = mediated_share(curves, alpha=plan.declared.alpha)
    if shares is not None:
        write(f"trial-{name}-mediated", shares)
    of_set = curves.get(plan.files.dictionary, [])
    same = causal_equivalence(of_set, alpha=plan.declared.alpha, margin=plan.declared.margin)
    if same is not None:
        write(f"trial-{name}-equivalence", same)
    if not by_feature:
        return result, None
    parts = step.run_parts(live, progress=progress)
    write(f"trial-{name}-features", parts)
    return result, parts


def _check_asked(
    spec: StudySpec, features: Sequence[int], set_name: str | None, dictionary: int, doses: Sequence[float]
) -> None:
    if bool(features) == (set_name is not None):
        raise InputError("name a set or features, one of the two; e.g. --set paper, or --features 3,12,407.")
    if set_name is not None and set_name not in SETS:
        raise InputError(f"the sets are {', '.join(SETS)}, got {set_name!r}; or name features.")
    encoded = spec.primary_crosscoder
    if not 1 <= dictionary <= len(encoded.names):
        raise InputError(f"this study's dictionaries are numbered 1 to {len(encoded.names)}, got {dictionary}.")
    unknown = [feature for feature in features if not 0 <= feature < encoded.n_features]
    if unknown:
        raise InputError(f"feature ids run from 0 to {encoded.n_features - 1}, got {unknown[0]}.")
    wrong = [dose for dose in doses if not 0 <= dose <= LARGEST_DOSE]
    if wrong:
        raise InputError(f"a dose multiplies activations by 0 to {LARGEST_DOSE:g}, got {wrong[0]:g}.")


def _changed(
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


def _named(study: Study, name: str, dictionary: int) -> tuple[int, ...]:
    selection = open_results(study.folder.results, of_dictionary("selection", dictionary)).load()
    masks = {
        "selected": selection["selected"].values,
        "rising": selection["tier"].values == "CONFIRMED",
        "confirmed": selection["specific_tier"].values == "CONFIRMED",
        "candidate": np.isin(selection["tier"].values, ["CONFIRMED", "CANDIDATE"]),
        "paper": selection["paper_selected"].values,
    }
    in_set = selection.isel({FEATURE: np.flatnonzero(masks[name])})
    chosen = tuple(int(k) for k in in_set[FEATURE].values[np.argsort(in_set["rank"].values, kind="stable")])
    if not chosen and name != SETS[0]:
        raise InputError(
            f"the set {name!r} of this study is empty in dictionary {dictionary}; name features, or see "
            "results.zarr/selection."
        )
    return chosen


def _name(features: tuple[int, ...]) -> str:
    if len(features) <= SPELLED_OUT:
        return "features-" + "-".join(map(str, features))
    return f"features-{len(features)}-{content_hash(list(features))[:8]}"


def _seconds(study: Study, plan: TrialPlan) -> float | None:
    spent = study.record("outcomes").get("seconds")
    outcomes = open_outcomes(study.folder.outcomes)
    sampled = sum(int((outcomes[name] != NOT_SAMPLED).sum()) for name in ("greedy_tokens", "completion_tokens"))
    return None if not spent else float(spent) * plan.completions / sampled
