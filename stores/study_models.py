"""Which models a study has and where their checkpoints are; what loads them is in the toolkit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from rlgen_stats.schemas.dims import ARM, BASE_MODEL, BASE_RUN, MODEL, RUN, STEP, model_id, split_model_id
from rlgen_stats.schemas.errors import ModelError
from rlgen_stats.schemas.null_views import BASE_VIEWS, floor_name, noise_model
from rlgen_stats.schemas.study import ChatSpec, ModelsSpec, RunSpec, StudySpec
from rlgen_stats.stores.atomic import read_json
from rlgen_stats.stores.folder import StudyFolder
from rlgen_stats.stores.hub import HubFolder, hub_folder, is_on_hub, locate_checkpoint

POSTTRAIN_RECORD: Final = "posttrain.json"
"""Written by post-training into a run's folder; its ``steps`` are the checkpoints that are complete."""
PLAIN_TEXT: Final = ChatSpec()
"""Prompts are read as they are."""


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """One checkpoint of a study: its label and where its weights are."""

    model: str
    """``run@step``."""
    run: str
    step: int
    arm: str
    path: Path
    base: Path | None = None
    """Folder of the base model; LoRA adapters are loaded on it, and its tokenizer stands in where there is none."""
    blocks: str | None = None
    """Dotted path of the decoder blocks, where they are not found."""
    loading: ModelsSpec = field(default_factory=ModelsSpec)
    """In which type and where it is loaded."""
    chat: ChatSpec = field(default_factory=ChatSpec)
    """How it reads prompts; a template file's path is absolute."""
    n_samples: int = 0
    """Sampled completions of every prompt, beside the greedy one."""
    hub: tuple[HubFolder, ...] = ()
    """Folders of the Hub, its own and base's, of which the weights are downloaded before it is loaded."""


def base_ref(spec: StudySpec, folder: StudyFolder) -> ModelRef:
    """The model that everything is compared with, as it is before any training."""
    path = locate_checkpoint(spec.base.path, folder)
    return ModelRef(
        model=BASE_MODEL,
        run=BASE_RUN,
        step=0,
        arm=BASE_RUN,
        path=path,
        base=path,
        blocks=spec.extraction.blocks,
        loading=spec.models,
        chat=chat_of(spec.base, folder),
        n_samples=spec.generation.n_samples.final,
        hub=_on_hub(spec.base.path, folder),
    )


def chat_of(spec: ChatSpec, folder: StudyFolder) -> ChatSpec:
    """How the base or a run reads prompts, its template's file found from the study folder."""
    chat = spec.chat
    if chat.template_file is None:
        return chat
    return chat.model_copy(update={"chat_template": str(folder.resolve(chat.template_file))})


def ref_coords(refs: Sequence[ModelRef]) -> dict[str, tuple[str, list[Any]]]:
    """Coordinates model, run, step and arm of checkpoints, for datasets over models."""
    return {
        MODEL: (MODEL, [ref.model for ref in refs]),
        RUN: (MODEL, [ref.run for ref in refs]),
        STEP: (MODEL, [ref.step for ref in refs]),
        ARM: (MODEL, [ref.arm for ref in refs]),
    }


def list_models(spec: StudySpec, folder: StudyFolder) -> tuple[ModelRef, ...]:
    """All models of a study: base first, then every run's checkpoints by step, runs in the order of the spec.

    Raises
    ------
    ModelError
        If a run that is trained here has not been trained yet.
    """
    base = base_ref(spec, folder)
    refs = [base]
    for run in spec.runs:
        chat = chat_of(run, folder)
        for step, path, hub in _checkpoints(run, folder):
            ref = replace(base, model=model_id(run.name, step), run=run.name, step=step, arm=run.arm, path=path)
            refs.append(replace(ref, chat=chat, hub=(*hub, *base.hub), n_samples=spec.generation.n_samples.others))
        refs[-1] = replace(refs[-1], n_samples=base.n_samples)
    return tuple(refs)


def one_of_each(spec: StudySpec, folder: StudyFolder) -> tuple[ModelRef, ...]:
    """Base and every run's last checkpoint; base's folder stands in for a run that is to be trained here."""
    trained = [
        run for run in spec.runs if run.method == "checkpoints" or (folder.run(run.name) / POSTTRAIN_RECORD).exists()
    ]
    known = {ref.run: ref for ref in list_models(spec.model_copy(update={"runs": tuple(trained)}), folder)}
    base = known[BASE_RUN]
    untrained = {
        run.name: replace(base, model=run.name, run=run.name, arm=run.arm, chat=chat_of(run, folder))
        for run in spec.runs
        if run not in trained
    }
    return tuple((known | untrained)[name] for name in (BASE_RUN, *(run.name for run in spec.runs)))


def _on_hub(path: str, folder: StudyFolder) -> tuple[HubFolder, ...]:
    return (hub_folder(path, folder),) if is_on_hub(path) else ()


def _checkpoints(run: RunSpec, folder: StudyFolder) -> list[tuple[int, Path, tuple[HubFolder, ...]]]:
    if run.method == "checkpoints":
        named = sorted(run.checkpoints.items())
        return [(step, locate_checkpoint(path, folder), _on_hub(path, folder)) for step, path in named]
    record = folder.run(run.name) / POSTTRAIN_RECORD
    if not record.exists():
        raise ModelError(
            f"run {run.name!r} has no {record}; expected one written by training: run the posttrain stage."
        )
    content = read_json(record)
    steps = content.get("steps") if isinstance(content, dict) else None
    if not isinstance(steps, list) or not steps or not all(isinstance(step, int) and step > 0 for step in steps):
        raise ModelError(f"{record} must list the checkpoint 'steps', got {steps!r}; run the posttrain stage again.")
    return [(step, folder.run(run.name) / f"step-{step}", ()) for step in sorted(steps)]


def imported_models(folder: StudyFolder) -> dict[str, Path]:
    """Model -> file of its completions, of the models that were sampled elsewhere."""
    return {file.stem: file for file in sorted(folder.imported.glob("*.parquet"))} if folder.imported.is_dir() else {}


def final_model(spec: StudySpec, folder: StudyFolder, run_name: str) -> ModelRef:
    """The last checkpoint of a run, or the base for ``"base"``.

    Raises
    ------
    ModelError
        If the study has no such run.
    """
    refs = [ref for ref in list_models(spec, folder) if ref.run == run_name]
    if not refs:
        raise ModelError(f"no run is called {run_name!r}; the runs are {[run.name for run in spec.runs]}.")
    return refs[-1]


def resolve_view(view: str, spec: StudySpec, folder: StudyFolder) -> str:
    """Model id of a view: ``rl@final`` is ``rl@80``, ``rl@noise`` ``rl.noise@80``, ``base@repeat`` ``base.repeat@0``.

    Raises
    ------
    ModelError
        If there is no such run or checkpoint.
    """
    if view in BASE_VIEWS:
        return BASE_VIEWS[view]
    run, _, step = view.rpartition("@")
    if step in ("final", "noise"):
        final = final_model(spec, folder, run).model
        return noise_model(final) if step == "noise" else final
    return find_model(view, spec, folder).model


def find_model(model: str, spec: StudySpec, folder: StudyFolder) -> ModelRef:
    """The model labelled ``run@step``; views that are base itself (``base.repeat@0``) have base's checkpoint.

    Raises
    ------
    ModelError
        If the study has no such model; the message lists the run's steps.
    """
    run, step = split_model_id(BASE_MODEL if floor_name(model) else model)
    refs = list_models(spec, folder)
    for ref in refs:
        if (ref.run, ref.step) == (run, step):
            return ref
    raise ModelError(f"no model is called {model!r}; the models are {[ref.model for ref in refs]}.")
