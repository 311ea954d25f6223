"""One post-training run: TRL trains, checkpoints land in models/<run>/step-N, a record closes the run."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import datasets
import numpy as np
import pandas as pd
import torch
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOTrainer, SFTTrainer

from rlgen_stats.schemas.dims import PROMPT, TASK
from rlgen_stats.schemas.errors import SpecError
from rlgen_stats.schemas.seeds import content_hash, derive_seed
from rlgen_stats.schemas.study import RunSpec, StudySpec
from rlgen_stats.stores import StudyFolder, package_versions, write_json
from rlgen_stats.stores.atomic import explain_damage, read_object
from rlgen_stats.stores.digests import file_sha256
from rlgen_stats.stores.prompts import ANSWER, CHOICES
from rlgen_stats.stores.study_models import POSTTRAIN_RECORD, ModelRef, base_ref, chat_of
from rlgen_stats.toolkit.extraction.checkpoints import load_model, load_tokenizer, resolve_device
from rlgen_stats.toolkit.extraction.generation import stop_ids
from rlgen_stats.toolkit.extraction.grading import check_answers, graders_of, make_grader
from rlgen_stats.toolkit.extraction.rendering import PromptReader
from rlgen_stats.toolkit.posttrain.arguments import adapter_config, trainer_arguments
from rlgen_stats.toolkit.posttrain.launcher import train_elsewhere
from rlgen_stats.toolkit.posttrain.rewards import GradedReward
from rlgen_stats.toolkit.posttrain.schedule import (
    RESUME_FOLDER,
    RESUME_NOTE,
    CheckpointSchedule,
    ProgressReport,
    step_folder,
)
from rlgen_stats.toolkit.posttrain.training_prompts import (
    check_lengths,
    encode_training,
    load_training_table,
    table_hash,
)
from rlgen_stats.toolkit.progress import SILENT, Progress

PARTIAL: Final = ".*.partial"
"""Checkpoints that were being written when the process died."""


@dataclass(frozen=True, kw_only=True)
class _Training:
    """One run that is to be trained: what decides its weights, and where they go."""

    run: RunSpec
    spec: StudySpec
    base: ModelRef
    """Read with the run's chat template."""
    table: pd.DataFrame
    arguments: Any
    """trl.SFTConfig or trl.GRPOConfig."""
    identity: str
    """Hash of everything that decides the run's weights, the base's bytes aside."""
    target: Path


def train_run(
    spec: StudySpec, run: RunSpec, folder: StudyFolder, *, launcher: str | None = None, progress: Progress = SILENT
) -> tuple[int, ...]:
    """Train one run from the base with TRL, unless it is finished; an interrupted one resumes at its last checkpoint.

    SFT is cross-entropy on the completions of ``data.train`` (the prompt carries no loss); GRPO's only reward is the
    study's graders, each on its task's rows; ``pretrain`` reads the prompts alone, every token of them under the
    language-model loss and no end token after them, so that nothing is taught about answers. All parameters are trained
    unless ``trainer`` has a ``peft`` section.

    Parameters
    ----------
    spec
        The study.
    run
        One of its runs, method sft, grpo or pretrain.
    folder
        The study's folder; checkpoints go to ``models/<run>/step-N``, the record to ``models/<run>/posttrain.json``.
    launcher
        Command line that starts the processes which train, such as ``accelerate launch --num_processes 4``; default
        this process alone.
    progress
        Receiver of progress: steps, loss, reward.

    Returns
    -------
    tuple of int
        Optimiser steps of the checkpoints, by the run's schedule, the last one the end of training.

    Raises
    ------
    SpecError
        For unknown, refused or impossible trainer arguments, or a missing table.
    InputError
        For an unusable table.
    ModelError
        If the base cannot be loaded.
    StageError
        If processes that a launcher started fail.

    Notes
    -----
    Of several processes (those of a launcher, where this runs in each of them) the first one writes. A step then sees
    ``per_device_train_batch_size`` times as many rows as there are processes, which the record counts; a run that was
    interrupted begins again if their number changed.

    On a CPU the same seed and number of threads give the same weights bit for bit, and so does a run that was
    interrupted and resumed. Files from any earlier, different run of the same name are removed, never mixed in.
    GRPO: DeepSeekMath, arXiv 2402.03300, equation 3, with the variants TRL offers under ``loss_type`` and
    ``scale_rewards``.
    """
    if run.method == "checkpoints":
        raise SpecError(
            f"run {run.name!r} brings its own checkpoints; only methods sft, grpo and pretrain are trained here."
        )
    target = folder.run(run.name)
    table = load_training_table(spec, run, folder)
    device = resolve_device(spec.device)
    seed = derive_seed(spec.seed, "posttrain", run.method, run.seed)
    with _quiet():
        arguments = trainer_arguments(
            run,
            output=target / RESUME_FOLDER,
            seed=seed,
            device=device,
            max_new_tokens=spec.generation.max_new_tokens,
        )
    base = replace(base_ref(spec, folder), loading=spec.training_models(run), chat=chat_of(run, folder))
    identity = _identity(spec, run, table, base, seed)
    record = target / POSTTRAIN_RECORD
    if record.exists() and read_object(record).get("identity") == identity:
        shutil.rmtree(target / RESUME_FOLDER, ignore_errors=True)  # killed just after the record
        return _steps_in(record)
    remark = check_lengths(spec, run, table, _make_reader(base, run.name), arguments)
    if remark:
        progress.log(f"warning: {remark}.")
    if run.method == "grpo":
        _check_answers(spec, table)
    if launcher is not None:
        record.unlink(missing_ok=True)  # of other settings
        train_elsewhere(launcher, spec, run, folder, progress=progress)
        return _steps_in(record)
    training = _Training(
        run=run,
        spec=spec,
        base=base,
        table=table,
        arguments=arguments,
        identity=identity,
        target=target,
    )
    return _train_here(training, progress)


def _train_here(training: _Training, progress: Progress) -> tuple[int, ...]:
    """Train in this process, or in this and others that a launcher started; the first one writes."""
    run, target, arguments = training.run, training.target, training.arguments
    is_first, n_processes = arguments.process_index == 0, arguments.world_size
    with arguments.main_process_first(local=False):
        resume = _prepare_folder(target, {"identity": training.identity, "n_processes": n_processes})
    with _quiet(), _preserved_generators():
        schedule, log = _train(training, resume, progress if is_first else SILENT)
    if is_first:
        content = {
            "run": run.name,
            "method": run.method,
            "steps": list(schedule.steps),
            "log": log,
            "trainer": _json_safe(arguments.to_dict()),
            "peft": run.trainer.get("peft"),
            "data_hash": table_hash(training.table),
            "n_prompts": len(training.table),
            "n_processes": n_processes,
            "seed": arguments.seed,
            "versions": package_versions(),
            "identity": training.identity,
        }
        write_json(target / POSTTRAIN_RECORD, content)
        shutil.rmtree(target / RESUME_FOLDER, ignore_errors=True)
    return schedule.steps


def _identity(spec: StudySpec, run: RunSpec, table: pd.DataFrame, base: ModelRef, seed: int) -> str:
    """Hash of everything that decides the run's weights, the base's bytes aside."""
    parts = [run.model_dump(mode="json"), spec.grader.model_dump(mode="json"), spec.base.path, spec.device, seed]
    reward = spec.reward_settings() if run.method == "grpo" else []
    template = [] if base.chat.template_file is None else [file_sha256(Path(base.chat.template_file))]
    return content_hash([*parts, table_hash(table), *reward, *spec.training_settings(run), *template])


def _check_answers(spec: StudySpec, table: pd.DataFrame) -> None:
    """Refuse answers that no completion could be rewarded for."""
    rows = pd.DataFrame({PROMPT: [f"row {row}" for row in range(1, len(table) + 1)], TASK: "", CHOICES: ""})
    rows = rows.assign(**{name: table[name].to_numpy() for name in (ANSWER, TASK, CHOICES) if name in table})
    graders = graders_of(spec, rows[TASK])
    unwritten = [task for task, grader in graders.items() if not grader.needs_generation]
    if unwritten:
        raise SpecError(
            f"GRPO rewards what a model writes, but rows of task {unwritten[0]!r} in data.train are graded by the "
            "log-likelihoods of their choices; give them a task with another grader, such as 'choice'."
        )
    check_answers(graders, rows, where="data.train")


def _steps_in(record: Path) -> tuple[int, ...]:
    """The checkpoints that a finished run lists."""
    with explain_damage(record):
        return tuple(int(step) for step in read_object(record)["steps"])


def _prepare_folder(target: Path, identity: Mapping[str, Any]) -> Path | None:
    """Remove files of an earlier run; return the trainer state to resume from, if it is this run's and complete."""
    target.mkdir(parents=True, exist_ok=True)
    note_file = target / RESUME_FOLDER / RESUME_NOTE
    note: Mapping[str, Any] = {"n_processes": 1} | (read_object(note_file) if note_file.exists() else {})
    state = target / RESUME_FOLDER / str(note.get("checkpoint"))
    step = int(note.get("step", 0)) if note.items() >= identity.items() and state.is_dir() else 0
    (target / POSTTRAIN_RECORD).unlink(missing_ok=True)
    for leftover in (*target.glob("step-*"), *target.glob(PARTIAL)):
        leftover_step = leftover.name.removeprefix("step-")
        if leftover.is_dir() and not (leftover_step.isdecimal() and int(leftover_step) <= step):
            shutil.rmtree(leftover)
    if not step:
        shutil.rmtree(target / RESUME_FOLDER, ignore_errors=True)
        return None
    return state


def _train(
    training: _Training, resume: Path | None, progress: Progress
) -> tuple[CheckpointSchedule, list[dict[str, Any]]]:
    """Train to the end; the schedule whose checkpoints were written, and the trainer's log."""
    run, target = training.run, training.target
    model = load_model(training.base, device=training.arguments.device)
    model.requires_grad_(True)
    trainer = _make_trainer(training, model)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise SpecError(
            f"run {run.name!r} is launched with its model split over processes (FSDP or DeepSpeed), none of which can "
            "write a whole checkpoint; launch it with a copy of the model in each process (--multi_gpu)."
        )
    schedule = CheckpointSchedule(
        target,
        run,
        _make_reader(training.base, run.name).tokenizer,  # not the trainer's, to which TRL may add a pad token
        {"identity": training.identity, "n_processes": training.arguments.world_size},
        keep_state=not training.arguments.save_only_model,
    )
    report = ProgressReport(progress, f"train {run.name} ({run.method})")
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(schedule)
    trainer.add_callback(report)
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        report.close()
    missing = [step for step in schedule.steps if not step_folder(target, step).is_dir()]
    if missing and trainer.is_world_process_zero():
        raise SpecError(
            f"run {run.name!r} ended at step {trainer.state.global_step} without its checkpoints {missing}; "
            "training stopped early: remove the option that stops it."
        )
    return schedule, [_json_safe(entry) for entry in trainer.state.log_history]


def _make_reader(base: ModelRef, name: str) -> PromptReader:
    """How the run reads prompts: with base's tokenizer, which under a chat template ends texts as that ends a turn."""
    reader = PromptReader(load_tokenizer(base), base.chat, name)
    if reader.template is not None:
        reader.tokenizer.chat_template = reader.template
    if reader.end_of_turn is not None:
        reader.tokenizer.eos_token = reader.tokenizer.convert_ids_to_tokens(reader.end_of_turn)
    return reader


class _ReadingGRPOTrainer(GRPOTrainer):  # type: ignore[misc]  # TRL is untyped
    """TRL's, but that prompts become tokens as everywhere in a study: TRL would add a BOS to one that has one."""

    def __init__(self, *, reader: PromptReader, **how: Any) -> None:
        self._reader = reader
        super().__init__(**how)

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return self._reader.encode(prompts), None, {}


def _make_trainer(training: _Training, model: Any) -> Any:
    reader = _make_reader(training.base, training.run.name)
    columns = training.table.rename(columns={"text": "prompt"})
    common: dict[str, Any] = {
        "model": model,
        "args": training.arguments,
        "processing_class": reader.tokenizer,
        "peft_config": adapter_config(training.run),
    }
    if training.run.method == "pretrain":
        return SFTTrainer(train_dataset=datasets.Dataset.from_dict(encode_training(training.table, reader)), **common)
    if training.run.method == "sft":  # with the texts, by which TRL knows that completions alone are learned
        texts: dict[Any, Any] = columns[["prompt", "completion"]].to_dict("list")
        data = datasets.Dataset.from_dict(texts | encode_training(training.table, reader))
        return SFTTrainer(train_dataset=data, **common)
    asked = [name for name in ("prompt", ANSWER, TASK, CHOICES) if name in columns]
    data = datasets.Dataset.from_pandas(columns[asked], preserve_index=False)
    graders = make_grader(training.spec.grader), graders_of(training.spec, training.spec.tasks)
    reward = GradedReward(*graders, stop_ids(model, reader.tokenizer))
    return _ReadingGRPOTrainer(reader=reader, reward_funcs=reward, train_dataset=data, **common)


def _json_safe(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that JSON can hold, without this machine's paths."""
    return {
        name: value
        for name, value in values.items()
        if name not in ("output_dir", "logging_dir") and json.loads(json.dumps(value, default=lambda _: None)) == value
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence TRL, transformers and datasets but for errors; progress is shown by the toolkit alone."""
    verbosity = transformers_logging.get_verbosity()
    shown = datasets.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown[0]:
            datasets.enable_progress_bars()
        if shown[1]:
            transformers_logging.enable_progress_bar()


@contextmanager
def _preserved_generators() -> Iterator[None]:
    """Restore the process's random generators, which trainers seed, when they are done."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002  # not used here, only restored
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002
