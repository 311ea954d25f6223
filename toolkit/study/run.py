"""Running a study: stage after stage, skipping what is up to date, refusing stores of other studies."""

from __future__ import annotations

import os
import pkgutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from rlgen_stats.schemas.errors import InputError, StoreError
from rlgen_stats.stores.atomic import ZARR_JSON, explain_full_disk, remove_folder
from rlgen_stats.stores.owners import models_in, of_other_dictionaries, owner
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.study.linked_studies import link_shared, open_for_run, owners
from rlgen_stats.toolkit.study.spec_checks import check_stages
from rlgen_stats.toolkit.study.stage_graph import STAGES, Stage, Study, stage_named, with_needs
from rlgen_stats.toolkit.tracking import check_trackers
from rlgen_stats.toolkit.trial.plan import check_size
from rlgen_stats.toolkit.workers import tasks_on

COSTLY: Final = 600.0
"""Seconds a stage took above which its results are not deleted without a question."""
PARALLEL_STAGE: Final = "crosscoder"
"""The stage that several processes (torchrun) may run together."""


def run_study(
    path: Path | str,
    *,
    stages: Sequence[str] | None = None,
    force: Sequence[str] = (),
    replace: Callable[[str], bool] = lambda costs: False,
    workers: Any = None,
    launcher: str | None = None,
    progress: Progress = SILENT,
    report_to: Sequence[str] = (),
) -> Study:
    """Bring stages of a study up to date, with everything they need.

    Parameters
    ----------
    path
        Study folder with a study.yaml.
    stages
        Names; default all.
    force
        Stages to run again although they are up to date; their old output is removed first, and whatever read it runs
        again too, in this run or in a later one. ``encode`` and ``align`` then use crosscoders that failed their health
        checks, which is noted.
    replace
        Asked with one sentence, before anything runs, where a change of the study or a forced stage makes results stale
        that took more than ``COSTLY`` seconds and would be deleted; False keeps them and ends the run.
    workers
        A ``distributed.Client`` on whose workers models run; None: in this process. Which stages those are is in
        docs/models.md.
    launcher
        Command line that starts the processes of a training run, such as ``accelerate launch --num_processes 4``; None:
        runs are trained in this process.
    progress
        Receiver of progress.
    report_to
        Trackers that the training curves of crosscoders go to: wandb, tensorboard, trackio. No result depends on them.

    Returns
    -------
    Study
        The study after the run.

    Raises
    ------
    SpecError
        If the spec says something that one of the stages must refuse, or names a file that is not there; nothing has
        run then.
    InputError, ModelError, StoreError, OutOfSpaceError
        One sentence each; whatever was committed stays and the next run continues from it.

    Examples
    --------
    >>> run_study("runs/demo", stages=["drift"])  # doctest: +SKIP
    """
    # workers run in other folders
    study = open_for_run(path if workers is None else Path(path).resolve(), progress=progress)
    if study.folder.study is not None:
        raise InputError(f"{path} is part of the study in {study.folder.study}; run that.")
    if workers is not None and study.spec.device.startswith("cuda:"):
        raise InputError(
            f"'device' is {study.spec.device!r}, one device of one machine, but every worker has one of its own; use "
            "'auto' or 'cuda'."
        )
    check_trackers(report_to)
    study.launcher = launcher
    studies = [study, *study.linked]
    for one in studies:
        one.report_to = tuple(report_to)
    plan = with_needs(stages if stages is not None else [stage.name for stage in STAGES])
    study.force({stage_named(name).name for name in force} & {stage.name for stage in plan})
    check_stages(study.spec, plan)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        to_train = _check_parallel(studies, plan)
        if int(os.environ.get("RANK", "0")) > 0:  # the first process keeps the records
            for one in to_train:
                pkgutil.resolve_name(stage_named(PARALLEL_STAGE).function)(one, one.key(PARALLEL_STAGE), SILENT)
            return study
    study.folder.stages.mkdir(parents=True, exist_ok=True)
    for stage in plan:
        study.key(stage.name)  # hashes the files the stage reads: one that is missing is named before anything runs
    costs = [cost for one in studies for cost in _costs(one, plan)]
    changed = f"{'; '.join(costs)} would be deleted and made anew, because the study has changed or a stage was forced"
    if costs and not replace(changed):
        raise InputError(
            f"{changed}; nothing was deleted. Take the change back or leave --force out, or agree with --yes "
            "(in Python: replace=lambda costs: True)."
        )
    if any(stage.name == "intervene" and study.state(stage.name) != "done" for stage in plan):
        check_size(study.spec, study.folder)
    # locked by this process, for its workers too
    with study.being_written(), explain_full_disk(study.folder.root), tasks_on(workers, study.folder.spec):
        study.write_times_forced()
        _run_plan(study, plan, progress, later=study.linked)
        for number, one in enumerate(study.linked, start=1):
            own = link_shared(one, studies[:number])
            _run_plan(one, [stage for stage in plan if stage.name in own], progress, later=studies[number + 1 :])
        study.forget_keys()  # its report shows the verdicts of the linked ones
        shown = [stage for stage in plan if stage.name == "report" and study.state("report") != "done"]
        _run_plan(study, shown, progress)
    return study


def _costs(study: Study, plan: Sequence[Stage]) -> list[str]:
    """What a run would delete that took long to make: of another key, finished or not, and not forced."""
    costs = []
    for stage in plan:
        record = {} if study.file(stage.name).is_symlink() else study.record(stage.name)
        seconds = float(record.get("seconds") or 0)
        changed = record.get("key") != study.key(stage.name) and stage.name not in study.forced
        if changed and seconds > COSTLY:
            costs.append(f"{study.folder.root / stage.name} ({_spoken(seconds)})")
    return costs


def _spoken(seconds: float) -> str:
    """Examples: 12 minutes of work, 5.0 hours of work."""
    minutes = seconds / 60
    return f"{minutes:.0f} minutes of work" if minutes < 100 else f"{minutes / 60:.1f} hours of work"


def _run_plan(study: Study, plan: Sequence[Stage], progress: Progress, later: Sequence[Study] = ()) -> None:
    of_linked = study.folder.linked_as and f"{study.folder.linked_as} "
    for number, stage in enumerate(plan, start=1):
        place = f"{of_linked}[{number}/{len(plan)}] {stage.name}"
        if study.state(stage.name) == "done":
            progress.log(f"{place}: up to date")
            continue
        progress.log(place)
        study.beside = _beside(study, stage, later) if stage.all_layers else ()
        _run_stage(study, stage, progress=progress)


def _beside(study: Study, stage: Stage, later: Sequence[Study]) -> tuple[Study, ...]:
    """Studies at other layers whose work of a stage is to be done too."""
    others = owners([study, *later], stage.name)[1:]
    return tuple(one for one in others if one.state(stage.name) != "done")


def _check_parallel(studies: Sequence[Study], plan: Sequence[Stage]) -> list[Study]:
    """Several processes (torchrun) train crosscoders, those of the studies returned; all else is one process's work."""
    before = [stage.name for stage in plan if stage.name != PARALLEL_STAGE]
    unfinished = [name for name in before if any(one.state(name) != "done" for one in owners(studies, name))]
    if unfinished or plan[-1].name != PARALLEL_STAGE:
        refused = unfinished or [plan[-1].name]
        raise InputError(
            f"several processes together run the {PARALLEL_STAGE} stage only, and {', '.join(refused)} is asked for or "
            f"not done yet; run it in one process first, then torchrun ... -m rlgen_stats.cli {PARALLEL_STAGE}."
        )
    to_train = [one for one in owners(studies, PARALLEL_STAGE) if one.state(PARALLEL_STAGE) != "done"]
    if not to_train:
        raise InputError(f"the {PARALLEL_STAGE} stage is up to date; add --force to run it again.")
    return to_train


def _run_stage(study: Study, stage: Stage, *, progress: Progress) -> None:
    with ExitStack() as stack:
        for one in study.beside:
            stack.enter_context(_recorded(one, stage))
        facts = stack.enter_context(_recorded(study, stage))
        facts.update(pkgutil.resolve_name(stage.function)(study, study.key(stage.name), progress) or {})


@contextmanager
def _recorded(study: Study, stage: Stage) -> Iterator[dict[str, Any]]:
    """Clear what a stage superseded, and keep its record while it runs; yields the facts that the record is to name."""
    key, previous, dictionaries = study.key(stage.name), study.record(stage.name), study.dictionaries(stage)
    if previous.get("key") == key:
        faults = of_other_dictionaries(study.folder.root, dictionaries, stage=stage.name)
        if faults:
            raise StoreError(f"{'; '.join(faults)}. Nothing was changed.")
    own_keys = {str(previous.get("key")), *map(str, previous.get("earlier", []))}
    for store in study.stores(stage):
        _clear_superseded(study, store, key=key, own_keys=own_keys)
    for name in stage.owned:
        _clear_owned(study.folder.root / name, keep=previous.get("key") == key, known=bool(previous))
    resumed = previous.get("key") == key and not previous.get("finished")
    before = float(previous.get("seconds") or 0) if resumed else 0.0
    # Written before the stage runs: after a crash the record tells which half-written stores are this study's.
    times = {"forced": study.times_forced[stage.name]} if stage.name in study.times_forced else {}
    begun: dict[str, Any] = {"key": key, "finished": False, "earlier": sorted(own_keys - {"None"})} | times
    study.write_record(stage.name, **begun, seconds=before)
    began = time.perf_counter()
    facts: dict[str, Any] = {}
    try:
        yield facts
    except BaseException:
        study.write_record(stage.name, **begun, seconds=round(before + time.perf_counter() - began, 2))
        raise
    seconds = round(before + time.perf_counter() - began, 2)
    written = [path for path in study.stores(stage) if owner(path) is not None]
    stores = {path.relative_to(study.folder.root).as_posix(): models_in(path) for path in written}
    needs = {one.name: study.key(one.name) for one in with_needs(stage.needs)}
    record = {"seconds": seconds, "earlier": [key], "facts": facts, "stores": stores, "needs": needs} | times
    study.write_record(stage.name, key=key, finished=True, **record, dictionaries=dictionaries)


def _clear_superseded(study: Study, path: Path, *, key: str, own_keys: set[str]) -> None:
    """Keep a store of this key (to resume), drop one this study superseded, refuse any other."""
    if not (path / ZARR_JSON).exists():
        return
    study_id, spec_hash = owner(path) or ("", "")
    if study_id != study.study_id or spec_hash not in own_keys | {key}:
        raise StoreError(
            f"{path} was written by another study or by other settings (study {study_id[:12]}, key "
            f"{spec_hash[:12]}; this one is {study.study_id[:12]}, {key[:12]}); "
            "it is left untouched: use another folder or move it away."
        )
    if spec_hash != key:
        remove_folder(path)


def _clear_owned(path: Path, *, keep: bool, known: bool) -> None:
    """Keep a folder of this key, drop one of an earlier key; refuse one that no run of the stage recorded."""
    if keep or not path.exists():
        return
    if not known:
        raise StoreError(
            f"{path} exists but no stage of this study made it; it is left untouched: "
            "use another folder or move it away."
        )
    remove_folder(path)
