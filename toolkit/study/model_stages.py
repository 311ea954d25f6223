"""Stages that need models: each calls the toolkit and returns facts for the stage's record."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from rlgen_stats.schemas.dims import ARM, CLUSTER, FEATURE, MODEL, PROMPT, RUN, of_dictionary
from rlgen_stats.schemas.errors import StageError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.schemas.study import RunSpec, StudySpec
from rlgen_stats.stores import (
    StudyFolder,
    open_activations,
    open_by_dictionary,
    open_outcomes,
    open_results,
    write_json,
    write_results,
)
from rlgen_stats.stores.atomic import is_leftover, read_object, remove_folder
from rlgen_stats.stores.crosscoder_weights import weights_hash
from rlgen_stats.toolkit.crosscoder import (
    encode_features,
    forget_crosscoders,
    health_dataset,
    rank_of_process,
    require_healthy,
    train_crosscoders,
    write_contexts,
    write_logits,
)
from rlgen_stats.toolkit.extraction import (
    LayerStore,
    extract_activations,
    measure_movement,
    sample_outcomes,
    usable_tokens,
)
from rlgen_stats.toolkit.intervention import verify_in_dictionaries
from rlgen_stats.toolkit.posttrain import train_run
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.statistics import representation_drift
from rlgen_stats.toolkit.study.stage_graph import Study
from rlgen_stats.toolkit.workers import run_tasks

Facts = dict[str, Any]
"""Facts about a stage's output, kept in its record."""


def posttrain(study: Study, key: str, progress: Progress) -> Facts:
    """Train every run that is trained here; a run whose settings did not change is kept."""
    spec, folder = study.spec, study.folder
    folder.run("base").parent.mkdir(parents=True, exist_ok=True)
    trained = [run for run in spec.runs if run.method != "checkpoints"]
    for run in trained:
        _claim_run(study, run)
    if study.launcher is not None:  # whose processes have all devices, so that workers have nothing to do
        how: dict[str, Any] = {"launcher": study.launcher, "progress": progress}
        ends = [train_run(spec, run, folder, **how) for run in trained]
    else:
        with run_tasks(train_run, [(spec, run, folder) for run in trained], progress=progress) as results:
            ends = list(results)
    steps = dict(zip((run.name for run in trained), map(list, ends), strict=True))
    return {"steps": {run.name: steps.get(run.name) or sorted(run.checkpoints) for run in spec.runs}}


def _claim_run(study: Study, run: RunSpec) -> None:
    """Reserve the run's folder: keep it if its key matches, clear it if this study made it under another key."""
    folder = study.folder.run(run.name)
    note = folder / "key.json"
    key = study.training_key(run)
    if folder.exists() and any(not is_leftover(file) for file in folder.iterdir()):
        owner = read_object(note) if note.exists() else {}
        if owner.get("key") == key:
            return
        if owner.get("study_id") != study.study_id:
            raise StageError(
                f"{folder} holds checkpoints that this study did not train; they are left untouched: "
                f"rename run {run.name!r}, use another folder, or move them away."
            )
        remove_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(note, {"key": key, "study_id": study.study_id})


def outcomes(study: Study, key: str, progress: Progress) -> Facts:
    """Sample and grade completions of every model."""
    provenance = study.provenance("outcomes", key)
    sample_outcomes(study.spec, study.folder, provenance=provenance, progress=progress)
    right = open_outcomes(study.folder.outcomes)["greedy_correct"].load()
    return {"greedy_accuracy": _by_model(right.mean(PROMPT))}


def _by_model(values: xr.DataArray) -> dict[str, float | None]:
    """A number of each model; None where there is none."""
    pairs = zip(values[MODEL].values.tolist(), values.values.tolist(), strict=True)
    return {str(model): None if np.isnan(value) else float(value) for model, value in pairs}


def extract(study: Study, key: str, progress: Progress) -> Facts:
    """Store residual activations of the same texts in every model, at all layers that are still to be read."""
    provenance = study.provenance("extract", key)
    beside = [
        LayerStore(one.spec.extraction.layer, one.folder.activations, one.provenance("extract", one.key("extract")))
        for one in study.beside
    ]
    extract_activations(study.spec, study.folder, provenance=provenance, beside=beside, progress=progress)
    return {}


def crosscoder(study: Study, key: str, progress: Progress) -> Facts:
    """Train every crosscoder and record its health."""
    provenance = study.provenance("crosscoder", key)
    if "crosscoder" in study.forced:
        forget_crosscoders(study.spec, study.folder)
    train_crosscoders(study.spec, study.folder, provenance=provenance, progress=progress, report_to=study.report_to)
    if rank_of_process():
        return {}
    health = _write_health(study)
    verdicts = zip(health["crosscoder"].values, health["healthy"].values, strict=True)
    return {"healthy": {str(name): bool(healthy) for name, healthy in verdicts}}


def _write_health(study: Study) -> xr.Dataset:
    health = health_dataset(study.folder, [name for c in study.spec.crosscoders for name in c.names])
    provenance = study.provenance("crosscoder", study.key("crosscoder"))
    write_results(study.folder.results, "health", health, provenance=provenance)
    return health


def encode(study: Study, key: str, progress: Progress) -> Facts:
    """Summarise every checkpoint's features per prompt, and collect their contexts and promoted tokens."""
    primary = study.spec.primary_crosscoder
    require_healthy(
        study.folder,
        dict.fromkeys(primary.names, primary.accept_unhealthy),
        stage="encode",
        force="encode" in study.forced,
        progress=progress,
    )
    if "encode" in study.forced:  # what was accepted now decides what later stages answer
        study.forget_keys()
        _write_health(study)
    encode_features(study.spec, study.folder, provenance=study.provenance("encode", key), progress=progress)
    n = study.spec.summaries.contexts
    if n:
        tasks = [(write, study.spec, study.folder, n) for write in (write_contexts, write_logits)]
        with run_tasks(_describe, tasks, progress=progress) as described:
            deque(described, maxlen=0)
    return {}


def _describe(
    write: Callable[..., None], spec: StudySpec, folder: StudyFolder, n: int, progress: Progress = SILENT
) -> None:
    """One of the descriptions of the features of the first dictionary."""
    write(spec, folder, n=n, progress=progress)


def movement(study: Study, key: str, progress: Progress) -> Facts:
    """Measure how far each model moved from base: weights, next-token distribution, activations."""
    spec, folder = study.spec, study.folder
    weights = _movement_of_study(study, progress)
    activations = open_activations(folder.activations)
    arms = {run.name: run.arm for run in spec.runs}
    activations = activations.assign_coords(
        {ARM: (MODEL, np.array([arms.get(str(run), str(run)) for run in activations[RUN].values]))}
    )
    shift = representation_drift(
        activations,
        models=[str(model) for model in weights[MODEL].values],
        mask=usable_tokens(spec, folder),
        clusters=CLUSTER,
        alpha=spec.statistics.alpha,
        seed=derive_seed(spec.seed, "movement"),
        progress=progress,
    )
    dataset = weights.merge(shift, compat="override", join="exact", combine_attrs="drop_conflicts")
    write_results(folder.results, "movement", dataset, provenance=study.provenance("movement", key))
    return {name: _by_model(dataset[name]) for name in ("weight_distance", "kl_from_base", "activation_shift")}


def _movement_of_study(study: Study, progress: Progress) -> xr.Dataset:
    """What is the same at every layer; at further ones, as the study's own stage measured it before."""
    if study.folder.study is None:
        return measure_movement(study.spec, study.folder, progress=progress)
    measured = open_results(StudyFolder(study.folder.study).results, "movement")
    return measured[["weight_distance", "kl_from_base"]].load().drop_attrs(deep=False)


def intervene(study: Study, key: str, progress: Progress) -> Facts:
    """Edit each dictionary's selected features in the live models and judge, with controls, each and all together."""
    results = study.folder.results
    sets = {number: ranked_features(chosen) for number, chosen in open_by_dictionary(results, "selection").items()}
    provenance = study.provenance("intervene", key)
    found = verify_in_dictionaries(study.spec, study.folder, sets, provenance=provenance, progress=progress)
    for number, of_trial in found.trials.items():
        weights = weights_hash(study.folder.crosscoder(study.spec.primary_crosscoder.names[number - 1]))
        for group, data in zip(("trial-dictionary", "trial-dictionary-balance"), of_trial, strict=True):
            data = data.assign_attrs(crosscoder=weights)
            write_results(results, of_dictionary(group, number), data, provenance=provenance)
    write_results(results, "intervention", found.intervention, provenance=provenance)
    write_results(results, "control_balance", found.balance, provenance=provenance)
    if found.mediated is not None:
        write_results(results, "mediated_share", found.mediated, provenance=provenance)
    return {"features": sets, "verdicts": [str(verdict) for verdict in found.intervention["verdict"].values]}


def ranked_features(selection: xr.Dataset) -> list[int]:
    """Selected feature ids, best first."""
    chosen = selection[["selected", "rank"]].load()
    chosen = chosen.isel({FEATURE: np.flatnonzero(chosen["selected"].values)})
    return [int(k) for k in chosen[FEATURE].values[np.argsort(chosen["rank"].values, kind="stable")]]
