"""Stages that read stores and compute statistics: no models, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final

import numpy as np
import xarray as xr

from rlgen_stats.schemas.dims import BASE_MODEL, CLUSTER, FEATURE, MODEL, RUN, STEP, TASK, of_dictionary, split_model_id
from rlgen_stats.schemas.null_views import floor_name, floor_run_name, noise_source
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.schemas.study import RunSpec, SelectionSpec
from rlgen_stats.stores import Provenance, open_features, open_outcomes, open_results, write_results
from rlgen_stats.toolkit.progress import Progress
from rlgen_stats.toolkit.reporting import write_report
from rlgen_stats.toolkit.statistics import (
    attribution_contrast,
    behaviour,
    drift_test,
    select_features,
    set_stability,
    stabilization_test,
)
from rlgen_stats.toolkit.statistics.selection.options import SelectionRule, SelectionTests
from rlgen_stats.toolkit.statistics.timing.run_contrast import timing_contrast, undescribed_checkpoints
from rlgen_stats.toolkit.study.stage_graph import Study

MIN_CHECKPOINTS: Final = 2
"""Checkpoints, the last among them, that a run's timing needs."""

Facts = dict[str, Any]
"""What a stage's record says about its output."""


def drift(study: Study, key: str, progress: Progress) -> Facts:
    """Which features' activation differs from base, at every checkpoint of every run compared, in every dictionary."""
    spec, settings = study.spec, study.spec.statistics
    provenance, n_drifting = study.provenance("drift", key), {}
    with progress.task("drift tests", total=len(spec.primary_crosscoder.names), unit="dictionaries") as task:
        for number, features in features_by_dictionary(study):
            changes = drift_test(
                features,
                models=compared_models(features, spec.runs),
                clusters=clusters_of(features),
                alpha=settings.alpha,
                n_resamples=settings.n_resamples,
                n_bootstrap=settings.n_bootstrap,
                n_min=settings.n_min,
                margin=settings.margin,
                seed=derive_seed(spec.seed, "drift"),
            ).compute()
            _write_with_dfve(study, "drift", number, changes, provenance)
            drifting = (changes["call"].astype(str) == "DRIFT").sum(FEATURE)
            n_drifting[str(number)] = dict(zip(drifting[MODEL].values.tolist(), drifting.values.tolist(), strict=True))
            task.advance(1)
    return {"drifting": n_drifting}


def compared_models(labelled: xr.Dataset, runs: Sequence[RunSpec]) -> list[str]:
    """Checkpoints of the runs that are no floors: what a floor run changes is no discovery of the family."""
    floors = {run.name for run in runs if run.is_floor}
    checkpoints = zip(labelled[MODEL].values.tolist(), labelled[RUN].values.tolist(), strict=True)
    return [model for model, run in checkpoints if model != BASE_MODEL and run not in floors]


def stabilize(study: Study, key: str, progress: Progress) -> Facts:
    """When features and top sets stop changing, run by run, in every dictionary, and which of two runs settles later.

    Checkpoints whose change from base the features do not describe are left out, in every dictionary.
    """
    spec, settings = study.spec, study.spec.statistics
    provenance, verdicts = study.provenance("stabilize", key), {}
    runs = [run.name for run in spec.runs if not run.is_floor]
    left_out, too_few = _left_out(study)
    chains, all_sets = [], []
    for number, features in features_by_dictionary(study):
        chain = stabilization_test(
            features,
            runs=runs,
            margin=settings.margin,
            persist=settings.persist,
            left_out=left_out,
            clusters=clusters_of(features),
            n_min=settings.n_min,
            alpha=settings.alpha,
            seed=derive_seed(spec.seed, "stabilize"),
            n_bootstrap=settings.n_bootstrap,
        ).compute()
        _write_with_dfve(study, "stabilization", number, chain, provenance)
        sets = set_stability(
            features.sel({MODEL: [model for model in features[MODEL].values if model not in left_out]}),
            runs=runs,
            k=settings.top_k,
            n_halvings=settings.n_halvings,
            clusters=clusters_of(features),
            n_min=settings.n_min,
            alpha=settings.alpha,
            seed=derive_seed(spec.seed, "sets"),
            progress=progress,
        )
        _write_with_dfve(study, "set_stability", number, sets, provenance)
        verdicts[str(number)] = dict(zip(runs, sets["verdict"].values.astype(str).tolist(), strict=True))
        chains.append(chain)
        all_sets.append(sets)
    first, second = (run.name for run in spec.contrasted)
    if {first, second} & too_few:
        progress.log("  the features describe fewer than two checkpoints of one of the two runs: no contrast of timing")
        return {"verdicts": verdicts, "left_out": left_out, "contrast": "not estimable: too few described checkpoints"}
    contrast = timing_contrast(chains, all_sets, first=first, second=second, alpha=settings.alpha)
    write_results(study.folder.results, "timing_contrast", contrast, provenance=provenance)
    return {"verdicts": verdicts, "left_out": left_out}


def _left_out(study: Study) -> tuple[list[str], set[str]]:
    """Checkpoints that the features of some dictionary do not describe, and runs with too few others.

    Of such a run nothing is left out: its own results remain, to be looked at, and are compared with no other run's.
    """
    crosscoder, runs = study.spec.primary_crosscoder, {run.name for run in study.spec.runs}
    health = open_results(study.folder.results, "health").load()
    undescribed = {} if crosscoder.accept_unhealthy else undescribed_checkpoints(health, crosscoder.names)
    models = [str(model) for model in open_features(study.folder.features_of(1))[MODEL].values]
    described = Counter(split_model_id(model)[0] for model in models if model not in undescribed)
    too_few = {run for run in runs if described[run] < MIN_CHECKPOINTS}
    return [model for model in models if model in undescribed and split_model_id(model)[0] in runs - too_few], too_few


def features_by_dictionary(study: Study) -> Iterator[tuple[int, xr.Dataset]]:
    """The features of each dictionary of the primary crosscoder, and its number from 1 on."""
    for number in range(1, len(study.spec.primary_crosscoder.names) + 1):
        yield number, open_features(study.folder.features_of(number))


def significance(study: Study, key: str, progress: Progress) -> Facts:
    """Accuracy and transitions of every model; the share of model-specific features, SFT arm against RL arm."""
    spec, folder, settings = study.spec, study.folder, study.spec.statistics
    provenance = study.provenance("significance", key)
    outcomes = open_outcomes(folder.outcomes)
    transitions = behaviour(
        outcomes,
        roles=task_roles(spec.selection, outcomes),
        family=compared_models(outcomes, spec.runs),
        clusters=clusters_of(outcomes),
        alpha=settings.alpha,
        seed=derive_seed(spec.seed, "behaviour"),
        n_bootstrap=settings.n_bootstrap,
    )
    write_results(folder.results, "behaviour", transitions, provenance=provenance)
    accuracy = transitions["accuracy"].transpose(MODEL, TASK)
    facts: Facts = {
        "accuracy": {
            str(model): dict(zip(accuracy[TASK].values.tolist(), row.tolist(), strict=True))
            for model, row in zip(accuracy[MODEL].values, accuracy.values, strict=True)
        }
    }
    table = open_results(folder.results, "attribution").load()
    names = [str(name) for name in table["crosscoder"].values]
    sft, rl = (_runs_of_arm(spec.runs, run, table) for run in spec.contrasted)
    if not sft or not rl:
        progress.log("  no pairwise crosscoder for one of the two runs: the contrast of specific features is skipped")
        return facts | {"contrast": "not estimable: a pairwise crosscoder is missing"}
    contrast = attribution_contrast(
        table,
        {name: table["cluster"].sel(crosscoder=name).values for name in names},
        sft=sft,
        rl=rl,
        floors=floors_of(table, {*sft, *rl}, {run.name for run in spec.runs if run.is_floor}),
        taus=tuple(sorted({settings.tau, 0.9})),
        movement=open_results(folder.results, "movement").load(),
        health=open_results(folder.results, "health").load(),
        alpha=settings.alpha,
        seed=derive_seed(spec.seed, "contrast"),
        n_bootstrap=settings.n_bootstrap,
    )
    write_results(folder.results, "attribution_contrast", contrast, provenance=provenance)
    return facts


def select(study: Study, key: str, progress: Progress) -> Facts:
    """Choose generalisation features on the selection prompts, confirm them on the verification prompts."""
    spec, folder = study.spec, study.folder
    provenance, outcomes, selected = study.provenance("select", key), open_outcomes(folder.outcomes), {}
    settings, rules = spec.statistics, spec.selection
    for number, features in features_by_dictionary(study):
        chosen = select_features(
            features,
            outcomes,
            target=final_step(features, spec.contrasted[1].name),
            held_out=[task for task in rules.held_out_tasks if task in features[TASK].values],
            controls=[task for task in rules.control_tasks if task in features[TASK].values],
            rule=SelectionRule(score_fraction=rules.score_fraction, max_features=rules.max_features),
            tests=SelectionTests(
                alpha=settings.alpha,
                n_resamples=settings.n_resamples,
                n_bootstrap=settings.n_bootstrap,
                min_discordant=rules.min_discordant,
                n_min=settings.n_min,
            ),
            clusters=clusters_of(features),
            seed=derive_seed(spec.seed, "select"),
        )
        write_results(study.folder.results, of_dictionary("selection", number), chosen, provenance=provenance)
        selected[str(number)] = chosen[FEATURE].values[chosen["selected"].values].tolist()
    return {"selected": selected}


def report(study: Study, key: str, progress: Progress) -> Facts:
    """Write the report."""
    linked = [(one.folder, one.spec) for one in study.linked]
    provenance = study.provenance("report", key)
    path = write_report(study.folder, study.spec, linked=linked, provenance=provenance, progress=progress)
    return {"path": str(path)}


def _write_with_dfve(study: Study, group: str, dictionary: int, data: xr.Dataset, provenance: Provenance) -> None:
    """Write a dictionary's result with ``dfve[model]``: the share of each model's change from base that it describes.

    From the health of that dictionary; left out where its readout was not judged.
    """
    health = open_results(study.folder.results, "health").load()
    if "dfve" in health:
        name = study.spec.primary_crosscoder.names[dictionary - 1]
        of_models = health["dfve"].sel(crosscoder=name).reindex({MODEL: data[MODEL].values})
        data = data.assign(dfve=(MODEL, np.asarray(of_models.values, dtype=float)))
    write_results(study.folder.results, of_dictionary(group, dictionary), data, provenance=provenance)


def clusters_of(dataset: xr.Dataset) -> str | None:
    """The cluster label, if some prompts share one; None where every prompt is its own cluster."""
    return CLUSTER if len(np.unique(dataset[CLUSTER].values)) < dataset.sizes["prompt"] else None


def task_roles(selection: SelectionSpec, outcomes: xr.Dataset) -> dict[str, str]:
    """Task -> in_domain, out_of_domain, held_out or control."""
    domain = dict(zip(outcomes[TASK].values.tolist(), outcomes["domain"].values.tolist(), strict=True))
    roles = {task: "in_domain" if side == "in" else "out_of_domain" for task, side in domain.items()}
    roles |= {task: "held_out" for task in selection.held_out_tasks if task in roles}
    return roles | {task: "control" for task in selection.control_tasks if task in roles}


def final_step(dataset: xr.Dataset, run: str) -> str:
    """Model id of a run's last checkpoint in a store."""
    checkpoints = dataset[MODEL].values[dataset[RUN].values == run]
    return str(checkpoints[np.argmax(dataset[STEP].sel({MODEL: checkpoints}).values)])


def _runs_of_arm(runs: Sequence[RunSpec], contrasted: RunSpec, table: xr.Dataset) -> list[str]:
    """Runs of the contrasted run's arm of which a checkpoint has a crosscoder with base, the contrasted run first."""
    targets = table["target"].values[table["original"].values == BASE_MODEL]
    paired = {split_model_id(str(target))[0] for target in targets}
    others = [run.name for run in runs if run.arm == contrasted.arm and run.name != contrasted.name]
    return [name for name in (contrasted.name, *others) if name in paired]


def floors_of(table: xr.Dataset, runs: Collection[str], floor_runs: Collection[str] = ()) -> dict[str, list[str]]:
    """What a crosscoder of base with itself is the floor of -> its dictionaries; noise only as large as these runs.

    Crosscoders of base with a checkpoint of ``floor_runs`` are floors too.
    """
    floors: dict[str, list[str]] = {}
    for name, target, original in zip(*(table[x].values for x in ("crosscoder", "target", "original")), strict=True):
        model = str(target)
        floor, source = floor_name(model), noise_source(model)
        if original == BASE_MODEL and split_model_id(model)[0] in floor_runs:
            floor = floor_run_name(model)
        if floor is not None and (source is None or split_model_id(source)[0] in runs):
            floors.setdefault(floor, []).append(str(name))
    return floors
