"""The align stage: model specificity of features by decoder norms and latent scaling, and which features reappear."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import FEATURE, SPLIT
from rlgen_stats.schemas.errors import StageError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.schemas.study import CrosscoderSpec, StudySpec
from rlgen_stats.stores import StudyFolder, open_tokens, write_results
from rlgen_stats.toolkit.crosscoder import (
    decoder_dataset,
    load_crosscoder,
    require_healthy,
    stored_scaling_sums,
    summarise_prompts,
)
from rlgen_stats.toolkit.extraction import resolve_device, site_name, usable_tokens
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.statistics import (
    attribution,
    attribution_table,
    classify_features,
    decoder_clusters,
    latent_scaling,
    match_features,
    reappearance,
    scaling_table,
)
from rlgen_stats.toolkit.study.stage_graph import Study
from rlgen_stats.toolkit.workers import kept, run_tasks

LOWEST_TAU: Final = 0.5
"""Norm share above which ``scaling_agrees`` is judged, whatever tau is: the view with most of a feature's norm."""


def align(study: Study, key: str, progress: Progress) -> dict[str, Any]:
    """Attribute features to models by NRN, MAS and latent scaling; cluster decoders; match replicates."""
    spec, folder = study.spec, study.folder
    provenance = study.provenance("align", key)
    require_healthy(
        folder,
        {name: c.accept_unhealthy for c in spec.crosscoders for name in c.names},
        stage="align",
        force="align" in study.forced,
        progress=progress,
    )
    pairwise: dict[str, xr.Dataset] = {}
    multiview: dict[str, xr.Dataset] = {}
    for crosscoder in spec.crosscoders:
        is_pair = len(crosscoder.views) == 2
        for name in crosscoder.names if is_pair else crosscoder.names[:1]:
            (pairwise if is_pair else multiview)[name] = decoder_dataset(load_crosscoder(folder.crosscoder(name)))
    if not pairwise:
        raise StageError(
            "no crosscoder has exactly two views, so no feature can be attributed by NRN; "
            "add crosscoders with views [base@0, RUN@final] and [base@0, base@halves] to study.yaml."
        )
    scaling, agrees = _scaling(study, pairwise | multiview, progress)
    table = attribution_table(pairwise, multiview=multiview)
    width = table.sizes[FEATURE]
    numbers = [number for c in spec.crosscoders if len(c.views) == 2 for number, _ in enumerate(c.names, start=1)]
    table = table.assign_coords(dictionary=("crosscoder", np.array(numbers)))
    clusters = {name: decoder_clusters(decoders) for name, decoders in pairwise.items()}
    table["cluster"] = (("crosscoder", FEATURE), _padded(clusters, width, -1))
    table["scaling_agrees"] = (
        ("crosscoder", FEATURE),
        _padded({name: agrees[name] for name in pairwise}, width, False),
    )
    write_results(folder.results, "latent_scaling", scaling, provenance=provenance)
    replicated = [crosscoder for crosscoder in spec.crosscoders if len(crosscoder.names) > 1]
    if replicated:
        write_results(folder.results, "matching", _matching(study, replicated, progress), provenance=provenance)
    write_results(folder.results, "attribution", table, provenance=provenance)
    return {"pairwise": sorted(pairwise), "multiview": sorted(multiview), "replicated": [c.name for c in replicated]}


def _padded(rows: dict[str, Any], width: int, fill: Any) -> NDArray[Any]:
    """One row a crosscoder, filled up to ``width`` features."""
    table = np.full((len(rows), width), fill)
    for row, values in zip(table, rows.values(), strict=True):
        row[: len(values)] = values
    return table


def _scaling(
    study: Study, decoders: dict[str, xr.Dataset], progress: Progress
) -> tuple[xr.Dataset, dict[str, NDArray[np.bool_]]]:
    """Latent scaling and feature classes of every crosscoder; whether scaling agrees with the largest norm share."""
    spec = study.spec
    tables, classes, agrees = {}, {}, {}
    with run_tasks(_scaled, [(spec, study.folder, name) for name in decoders], progress=progress) as results:
        for name, scaled in zip(decoders, results, strict=True):
            share = attribution(decoders[name])["mas_l1"]
            tables[name] = scaled
            classify = partial(
                classify_features, share, tables[name], alpha=spec.statistics.alpha, min_active=spec.statistics.n_min
            )
            classes[name] = classify(tau=spec.statistics.tau)
            agrees[name] = np.asarray(classify(tau=LOWEST_TAU)["feature_class"].values == "specific")
    return scaling_table(tables, classes), agrees


def _scaled(spec: StudySpec, folder: StudyFolder, name: str, progress: Progress = SILENT) -> xr.Dataset:
    sums = stored_scaling_sums(
        load_crosscoder(folder.crosscoder(name), device=resolve_device(spec.device)),
        folder.activations,
        site_name(spec.extraction.layer),
        kept("tokens trained on", folder, lambda: usable_tokens(spec, folder)),
        seed=derive_seed(spec.seed, "latent_scaling"),
        progress=progress,
    )
    return latent_scaling(sums)


def _matching(study: Study, replicated: list[CrosscoderSpec], progress: Progress) -> xr.Dataset:
    """Each replicated dictionary against its other seeds; activations on held-out prompts as independent evidence."""
    by_crosscoder = []
    dictionaries = [(study.spec, study.folder, one, name) for one in replicated for name in one.names]
    with (
        progress.task("matching", total=sum(len(c.names) - 1 for c in replicated), unit="pairs") as task,
        run_tasks(_decoders_and_activity, dictionaries) as described,
    ):
        for crosscoder in replicated:
            first, *others = crosscoder.names
            decoders, activity = next(described)
            matches = {}
            for name in others:
                other, other_activity = next(described)
                matches[name] = match_features(
                    decoders,
                    other,
                    activations_a=activity,
                    activations_b=other_activity,
                    alpha=study.spec.statistics.alpha,
                    seed=derive_seed(study.spec.seed, "match", name),
                )
                task.advance(1, matched=int(matches[name]["matched"].sum()))
            by_crosscoder.append(reappearance(matches).expand_dims({"crosscoder": [first]}))
    merged = xr.concat(by_crosscoder, "crosscoder", join="outer", combine_attrs="drop_conflicts")
    merged["matched"] = merged["matched"].fillna(False).astype(bool)
    merged["match"] = merged["match"].fillna(-1).astype(np.int64)
    return merged.transpose("crosscoder", "replicate", FEATURE)


def _decoders_and_activity(
    spec: StudySpec, folder: StudyFolder, crosscoder: CrosscoderSpec, name: str, progress: Progress = SILENT
) -> tuple[xr.Dataset, xr.DataArray]:
    """Decoders of one dictionary, and its mean activations [prompt, feature] on verification prompts."""
    dictionary = load_crosscoder(folder.crosscoder(name), device=resolve_device(spec.device))
    run = spec.contrasted[1].name
    model = next((view for view in dictionary.views if view.startswith(f"{run}@")), dictionary.views[-1])
    tokens = open_tokens(folder.activations)
    mask = usable_tokens(spec, folder, "summary") & (tokens[SPLIT].values == "verification")
    means = summarise_prompts(
        dictionary, folder.activations, site_name(spec.extraction.layer), mask, model=model, readout=crosscoder.readout
    )["mean"]
    return decoder_dataset(dictionary), means
