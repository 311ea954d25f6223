"""Stages that read stores and compute statistics: no models, no torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import xarray as xr

from rlgen_stats.schemas.dims import BASE_MODEL, CLUSTER, FEATURE, MODEL, RUN, STEP, TASK
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.schemas.study import CrosscoderSpec, RunSpec, SelectionSpec
from rlgen_stats.stores import open_features, open_outcomes, open_results, write_results
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
from rlgen_stats.toolkit.study.stage_graph import Study

Facts = dict[str, Any]
"""What a stage's record says about its output."""


def drift(study: Study, key: str, progress: Progress) -> Facts:
    """Which features' activation differs from base, at every checkpoint of every run."""
    spec, features = study.spec, open_features(study.folder.features)
    settings = spec.statistics
    models = [str(model) for model in features[MODEL].values if model != BASE_MODEL]
    with progress.task("drift tests", total=len(models), unit="models") as task:
        changes = drift_test(
            features,
            models=models,
            clusters=clusters_of(features),
            alpha=settings.alpha,
            n_resamples=settings.n_resamples,
            n_bootstrap=settings.n_bootstrap,
            n_min=settings.n_min,
            seed=derive_seed(spec.seed, "drift"),
        ).compute()
        task.advance(len(models))
    changes = _with_dfve(study, changes)
    write_results(study.folder.results, "drift", changes, provenance=study.provenance("drift", key))
    calls = changes["call"].astype(str)
    return {"drifting": {str(m): int((calls.sel({MODEL: m}) == "DRIFT").sum()) for m in changes[MODEL].values}}


def stabilize(study: Study, key: str, progress: Progress) -> Facts:
    """When features and top sets stop changing, run by run."""
    spec, features = study.spec, open_features(study.folder.features)
    settings, provenance = spec.statistics, study.provenance("stabilize", key)
    runs = [run.name for run in spec.runs]
    clusters = clusters_of(features)
    chain = stabilization_test(
        features,
        runs=runs,
        margin=settings.margin,
        persist=settings.persist,
        clusters=clusters,
        n_min=settings.n_min,
        alpha=settings.alpha,
        seed=derive_seed(spec.seed, "stabilize"),
        n_bootstrap=settings.n_bootstrap,
    )
    write_results(study.folder.results, "stabilization", _with_dfve(study, chain), provenance=provenance)
    sets = set_stability(
        features,
        runs=runs,
        k=settings.top_k,
        n_halvings=settings.n_halvings,
        clusters=clusters,
        n_min=settings.n_min,
        alpha=settings.alpha,
        seed=derive_seed(spec.seed, "sets"),
        progress=progress,
    )
    write_results(study.folder.results, "set_stability", _with_dfve(study, sets), provenance=provenance)
    return {"verdicts": dict(zip(runs, sets["verdict"].values.astype(str).tolist(), strict=True))}


def significance(study: Study, key: str, progress: Progress) -> Facts:
    """Accuracy and transitions of every model; the share of model-specific features, SFT arm against RL arm."""
    spec, folder, settings = study.spec, study.folder, study.spec.statistics
    provenance = study.provenance("significance", key)
    outcomes = open_outcomes(folder.outcomes)
    transitions = behaviour(
        outcomes,
        roles=task_roles(spec.selection, outcomes),
        clusters=clusters_of(outcomes),
        alpha=settings.alpha,
        seed=derive_seed(spec.seed, "behaviour"),
        n_bootstrap=settings.n_bootstrap,
    )
    write_results(folder.results, "behaviour", transitions, provenance=provenance)
    table = open_results(folder.results, "attribution").load()
    names = [str(name) for name in table["crosscoder"].values]
    sft, rl = (_pairs_of_arm(spec.runs, run, names) for run in spec.contrasted)
    if not sft or not rl:
        progress.log("  no pairwise crosscoder for one of the two runs: the contrast of specific features is skipped")
        return {"contrast": "not estimable: a pairwise crosscoder is missing"}
    contrast = attribution_contrast(
        table,
        {name: table["cluster"].sel(crosscoder=name).values for name in names},
        sft=sft,
        rl=rl,
        null="null" if "null" in names else None,
        taus=tuple(sorted({settings.tau, 0.9})),
        movement=open_results(folder.results, "movement").load(),
        health=_health_by_pair(spec.crosscoders, open_results(folder.results, "health").load()),
        alpha=settings.alpha,
        seed=derive_seed(spec.seed, "contrast"),
        n_bootstrap=settings.n_bootstrap,
    )
    write_results(folder.results, "attribution_contrast", contrast, provenance=provenance)
    return {}


def select(study: Study, key: str, progress: Progress) -> Facts:
    """Choose generalisation features on the selection prompts and confirm them on the verification prompts."""
    spec, folder = study.spec, study.folder
    features, outcomes = open_features(folder.features), open_outcomes(folder.outcomes)
    settings, rules = spec.statistics, spec.selection
    target = final_step(features, spec.contrasted[1].name)
    chosen = select_features(
        features,
        outcomes,
        target=target,
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
    write_results(folder.results, "selection", chosen, provenance=study.provenance("select", key))
    return {"rule": str(chosen.attrs["rule"]), "selected": chosen[FEATURE].values[chosen["selected"].values].tolist()}


def report(study: Study, key: str, progress: Progress) -> Facts:
    """Write the report."""
    provenance = study.provenance("report", key)
    return {"path": str(write_report(study.folder, study.spec, provenance=provenance, progress=progress))}


def _with_dfve(study: Study, data: xr.Dataset) -> xr.Dataset:
    """The result with ``dfve[model]``: the share of each model's change from base that the features describe.

    From the health of the encoded crosscoder; left out where its readout was not judged.
    """
    health = open_results(study.folder.results, "health")
    if "dfve" not in health:
        return data
    of_models = health["dfve"].sel(crosscoder=study.spec.primary_crosscoder.name).reindex({MODEL: data[MODEL].values})
    return data.assign(dfve=(MODEL, np.asarray(of_models.values, dtype=float)))


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


def _pairs_of_arm(runs: Sequence[RunSpec], contrasted: RunSpec, pairs: Collection[str]) -> list[str]:
    """Runs of the contrasted run's arm that have a pairwise crosscoder, the contrasted run first."""
    others = [run.name for run in runs if run.arm == contrasted.arm and run.name != contrasted.name]
    return [name for name in (contrasted.name, *others) if name in pairs]


def _health_by_pair(crosscoders: Sequence[CrosscoderSpec], health: xr.Dataset) -> xr.Dataset:
    """Health with crosscoders named as in the attribution table."""
    names = {c.name: pair_name(c.name, c.views) or c.name for c in crosscoders}
    labels = np.array([names.get(str(name), str(name)) for name in health["crosscoder"].values])
    return health.assign_coords(crosscoder=labels)


def pair_name(name: str, views: tuple[str, ...]) -> str | None:
    """Label of a pairwise crosscoder in the attribution table: the run it compares with base, or ``null``.

    None for crosscoders of three or more views.
    """
    if len(views) != 2:
        return None
    others = [view for view in views if not view.startswith("base@")]
    if not others:
        return "null"
    return others[0].rpartition("@")[0] if len(others) == 1 else name
