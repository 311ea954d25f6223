"""Facts on sample, measurement, exclusions and origin, shown before any claim."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
import xarray as xr

from rlgen_stats.schemas.errors import InputError, ModelError, StoreError
from rlgen_stats.schemas.study import GenerationSpec, StudySpec
from rlgen_stats.stores import Provenance, StudyFolder, committed_models, open_features, open_outcomes
from rlgen_stats.stores.hub import locate_table
from rlgen_stats.stores.prompts import prompt_files
from rlgen_stats.stores.table_files import table_files
from rlgen_stats.toolkit.reporting.claims.c3_selection import unusable_tasks
from rlgen_stats.toolkit.reporting.claims.replication import runs_per_arm
from rlgen_stats.toolkit.reporting.formatting import DASH, count, listed
from rlgen_stats.toolkit.reporting.result_lookup import Results, final_models, flag_counts, labels_of, per_run

NOT_RECORDED: Final = "not recorded"


@dataclass(frozen=True)
class Fact:
    """One question and its answer."""

    topic: str
    question: str
    answer: str


@dataclass(frozen=True)
class StudyData:
    """Labels and settings read from the stores around the results; None where a store is missing."""

    prompts: pd.DataFrame | None
    """One row per prompt: prompt, task, domain, split, cluster."""
    features: xr.Dataset | None
    """features.zarr, not loaded."""
    prompts_hash: str
    """SHA-256 of the prompt table."""
    sampling: pd.DataFrame | None = None
    """Where models were imported, one row a model: engine that sampled it, what graded it, what was stood in for."""


def read_study_data(folder: StudyFolder, spec: StudySpec) -> StudyData:
    """Labels and settings of a study folder's stores; a missing store gives None."""
    features = open_features(folder.features) if _has_models(folder.features) else None
    outcomes = open_outcomes(folder.outcomes) if _has_models(folder.outcomes) else None
    source = outcomes if features is None else features
    prompts = None
    if source is not None:
        names = ("prompt", "task", "domain", "split", "cluster")
        prompts = pd.DataFrame({name: labels_of(source, name) for name in names})
    content = b""
    for table in prompt_files(spec).values():
        with suppress(InputError, ModelError):  # no longer there
            content += b"".join(file.read_bytes() for file in table_files(locate_table(table, folder)))
    digest = hashlib.sha256(content).hexdigest() if content else NOT_RECORDED
    sampling = None
    if outcomes is not None and "engine" in outcomes:
        said = ("engine", "graded_by", "stand_in")
        sampling = pd.DataFrame({name: outcomes[name].values for name in said}, outcomes["model"].values, dtype=str)
    return StudyData(prompts, features, digest, sampling)


def _has_models(path: Any) -> bool:
    try:
        return bool(committed_models(path))
    except StoreError:
        return False


def glance(data: StudyData, results: Results, spec: StudySpec) -> list[tuple[str, str, str]]:
    """The few facts shown in the header: name, value, and what the name means."""
    attrs = data.features.attrs if data.features is not None else {}
    prompts = data.prompts
    mode, readout = (str(attrs.get(name, DASH)) for name in ("text_mode", "readout"))
    return [
        ("Prompts", DASH if prompts is None else f"{len(prompts):,}", "of all tasks; every number says how many"),
        (
            "Clusters",
            DASH if prompts is None else f"{prompts['cluster'].nunique():,}",
            "prompts made from the same item; resampled together",
        ),
        ("Unit", str(_first_attr(results, "unit") or "prompt"), "what a test counts as one; never the token"),
        (
            "Runs per arm",
            ", ".join(f"{n} {arm}" for arm, n in runs_per_arm(spec).items()),
            "trainings of each kind that were compared",
        ),
        ("Text", mode, _TEXT_MODES.get(mode, "what the models read").partition(": ")[2].rstrip(".") or "not recorded"),
        ("Readout", readout, _READOUT_MEANINGS.get(readout, "how one model’s features are computed")),
        ("Level α", f"{spec.statistics.alpha:g}", "rate of false alarms that tests and intervals allow"),
    ]


_READOUT_MEANINGS: Final = {
    "swap": "one model’s activation is put in every model’s place",
    "fit": "one linear map for all models, fitted to the joint code",
    "own": "one model’s activation alone, the others at their mean",
}
"""How one model's features are read from the shared dictionary, in a few words."""


def _first_attr(results: Results, name: str) -> Any:
    return next(
        (
            data.attrs[name]
            for group in ("drift", "selection", "behaviour")
            if (data := results.get(group)) is not None and name in data.attrs
        ),
        None,
    )


def collect_facts(data: StudyData, results: Results, spec: StudySpec, provenance: Provenance) -> list[Fact]:
    """Every fact of the header, in reading order."""
    return [
        *_sample_facts(data, results, spec),
        *_measurement_facts(data, spec),
        *_untestable_facts(results, spec),
        *_origin_facts(data, results, spec, provenance),
    ]


def _facts(topic: str, answers: dict[str, str]) -> list[Fact]:
    return [Fact(topic, question, answer) for question, answer in answers.items()]


def _sample_facts(data: StudyData, results: Results, spec: StudySpec) -> list[Fact]:
    selection, prompts = results.get("selection"), data.prompts
    size = split = NOT_RECORDED
    if prompts is not None:
        is_control = prompts["task"].isin(spec.selection.control_tasks)
        domains, splits = Counter(prompts["domain"].mask(is_control, "control")), Counter(prompts["split"])
        clusters, tasks = (prompts[name].nunique() for name in ("cluster", "task"))
        size = (
            f"{count(len(prompts), 'prompt')} in {count(clusters, 'cluster')} and {count(tasks, 'task')} "
            f"({domains['in']:,} in domain, {domains['out']:,} out"
            f"{', {:,} of negative controls'.format(domains['control']) if domains['control'] else ''})."
        )
        split = ", ".join(f"{n:,} {name}" for name, n in splits.items()) + "."
    sft, rl = spec.contrasted
    runs = listed(f"{n} {arm}" for arm, n in runs_per_arm(spec).items())
    held_out, control = spec.selection.held_out_tasks, spec.selection.control_tasks
    return _facts(
        "Sample",
        {
            "What is the unit of every test?": f"The {_first_attr(results, 'unit') or 'prompt'}; never the token.",
            "How many prompts and clusters?": size,
            "How are prompts split?": split,
            "Hash of the split": str(selection.attrs.get("split_hash", NOT_RECORDED))
            if selection is not None
            else NOT_RECORDED,
            "How many runs per arm?": f"{runs}; compared are {sft.name} and {rl.name}.",
            "Which tasks were kept out of selection?": (
                f"Held out: {listed(held_out) or 'none'}; negative controls: {listed(control) or 'none'}."
            ),
        },
    )


_TEXT_MODES: Final = {
    "forced": "Forced: every model reads the same tokens.",
    "onpolicy": "On-policy: each model reads its own completions.",
}
_READOUTS: Final = {
    "swap": "Swap: a model's activation is the input of every view.",
    "fit": "Fit: one linear map for all models, fitted to the joint code by least squares.",
    "own": "Own: a model's activation is the input of its own view, the other views are at their mean.",
}


def _measurement_facts(data: StudyData, spec: StudySpec) -> list[Fact]:
    attrs = data.features.attrs if data.features is not None else {}
    mode, readout, scale = (str(attrs.get(name, NOT_RECORDED)) for name in ("text_mode", "readout", "scale"))
    crosscoder, generation = spec.primary_crosscoder, spec.generation
    tokens = listed(spec.extraction.summary_segments).replace("_", " ")
    return _facts(
        "Measurement",
        {
            "Which text do the models read?": _TEXT_MODES.get(mode, mode),
            "How is one model's activation of a feature computed?": _READOUTS.get(readout, readout),
            "Where in the model?": (
                f"Residual stream after decoder block {spec.extraction.layer}; a prompt's summary averages over its "
                f"{tokens} tokens."
            ),
            "In which type were the models read?": (
                "The one base is stored in." if spec.models.dtype == "auto" else f"{spec.models.dtype}."
            ),
            "On which scale are features compared?": scale,
            "Which dictionary?": (
                f"{crosscoder.name}: {crosscoder.n_features:,} features, {crosscoder.sparsity}, views "
                f"{listed(crosscoder.views)}."
            ),
            "How were completions drawn?": (
                f"{_drawn(generation)} and one greedy per prompt and model; the greedy one decides who is right."
            ),
        }
        | _sampling(data),
    )


_SAMPLING: Final = {
    "engine": "Which engine sampled each model?",
    "graded_by": "What graded each model's answers?",
    "stand_in": "Which completions were not drawn?",
}
_SAMPLING_WORDS: Final = {
    "here": "rlgen-stats",
    "greedy": "greedy ones, for which the first sample stands in",
    "samples": "samples, for which the greedy one stands in",
}


def _drawn(generation: GenerationSpec) -> str:
    n, temperature = generation.n_samples, f"(temperature {generation.temperature:g})"
    if n.others == n.final:
        return f"{n.final} sampled {temperature}"
    return (
        f"{n.final} sampled {temperature} of base and each run's last checkpoint, {n.others} of the other checkpoints,"
    )


def _sampling(data: StudyData) -> dict[str, str]:
    """Where models were imported: by which engine each was sampled, who graded, what stands in; else nothing."""
    if data.sampling is None:
        return {}
    answers: dict[str, str] = {}
    for column, question in _SAMPLING.items():
        groups = data.sampling[data.sampling[column] != ""].groupby(column, sort=False).groups
        said = [
            f"{_SAMPLING_WORDS.get(str(name), name)}: {listed(map(str, models))}" for name, models in groups.items()
        ]
        answers |= {question: f"{'; '.join(said)}."} if said else {}
    return answers


def _untestable_facts(results: Results, spec: StudySpec) -> list[Fact]:
    answers: dict[str, str] = {}
    drift, stabilization, selection = (results.get(name) for name in ("drift", "stabilization", "selection"))
    for run, model in final_models(spec, drift).items():
        if drift is not None:
            final = drift.sel(model=model)
            p = final["p_value"].values
            flags = ", ".join(f"{flag.replace('_', ' ')} {n:,}" for flag, n in flag_counts(final["flag"]).items())
            untestable = f"{int(np.isnan(p).sum()):,} of {p.size:,} features"
            answers[f"Features untestable in the drift of {run} (base and final model together)"] = (
                f"{untestable} ({flags})." if flags else untestable
            )
    for run in (trained.name for trained in spec.runs):
        row = per_run(stabilization, "flag", run)
        if row is not None:
            counts = Counter(str(flag).lower().replace("_", " ") for flag in row)
            flags = ", ".join(f"{flag} {n:,}" for flag, n in counts.most_common())
            answers[f"Stabilisation of {run} (all its checkpoints and base together)"] = f"{flags}."
    if selection is not None:
        p = selection["p_value"].values
        answers["Features untestable in selection"] = f"{int(np.isnan(p).sum()):,} of {p.size:,} features."
        answers["Tasks that selection could not use"] = unusable_tasks(selection) or "none"
    return _facts("Not testable", answers or {"Counts": NOT_RECORDED})


def _origin_facts(data: StudyData, results: Results, spec: StudySpec, provenance: Provenance) -> list[Fact]:
    recorded = json.loads(str(provenance.attrs()["provenance"]))
    versions = ", ".join(f"{name} {version}" for name, version in sorted(recorded.get("packages", {}).items()))
    crosscoder = data.features.attrs.get("crosscoder", NOT_RECORDED) if data.features is not None else NOT_RECORDED
    seeds = [f"{group} {result.attrs['seed']}" for group, result in results.items() if "seed" in result.attrs]
    return _facts(
        "Origin",
        {
            "Seeds": f"study {spec.seed}; derived: {', '.join(seeds) or NOT_RECORDED}",
            "Versions": versions or NOT_RECORDED,
            "Source commit": str(recorded.get("git_commit", "unknown")),
            "Study hash (name, seed, base, data)": provenance.study_id,
            "Report hash (all it was computed from)": provenance.spec_hash,
            "Prompt table, SHA-256": data.prompts_hash,
            "Crosscoder hash": str(crosscoder),
        },
    )


def families(results: Results) -> list[dict[str, str]]:
    """One row per analysis: test, null, unit, family and its size, level, seed, hash of what it was computed from."""
    names = ("test", "null", "unit", "family", "family_size", "alpha", "seed", "spec_hash")
    return [
        {"analysis": group} | {name: str(data.attrs.get(name, DASH)) for name in names}
        for group, data in results.items()
        if "test" in data.attrs
    ]
