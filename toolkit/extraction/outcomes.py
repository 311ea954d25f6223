"""Graded completions of every model: greedy and sampled, with seeds shared by all models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xarray as xr

from rlgen_stats.schemas.dims import GREEDY, MODEL, PROMPT, PROMPT_LABELS, SAMPLE, TASK
from rlgen_stats.schemas.errors import StageError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import Provenance, StudyFolder, append_model, committed_models, replacing
from rlgen_stats.stores.prompts import TEXT, load_prompts
from rlgen_stats.stores.study_models import ModelRef, imported_models, list_models, ref_coords
from rlgen_stats.stores.tables import RENDERED_PROMPTS, check_owner
from rlgen_stats.toolkit.extraction.answering import answer_prompts
from rlgen_stats.toolkit.extraction.checkpoints import check_weights, load_model, resolve_device
from rlgen_stats.toolkit.extraction.generation import Completion
from rlgen_stats.toolkit.extraction.grading import Grade, check_answers, check_letters, grade_all, graders_of
from rlgen_stats.toolkit.extraction.imported import check_origins, read_import, with_origin
from rlgen_stats.toolkit.extraction.rendering import check_tokenizers, load_reader, rendered_examples
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.statistics.completion_shares import (
    completion_shares,
    share_warnings,
    too_often_unread,
    unread_examples,
)

_SCHEMA: Final = pa.schema(
    [
        (PROMPT, pa.string()),
        (SAMPLE, pa.int32()),
        (TEXT, pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("n_tokens", pa.int32()),
        ("terminated", pa.bool_()),
        ("correct", pa.bool_()),
        ("answered", pa.bool_()),
        ("format_class", pa.string()),
        ("choice_log_likelihoods", pa.list_(pa.float64())),
    ]
)


def completions_file(folder: StudyFolder, model: str) -> Path:
    """Parquet file with one model's completions."""
    return folder.completions / f"{model}.parquet"


def read_completions(folder: StudyFolder, model: str) -> pd.DataFrame:
    """One model's completions, a row each: prompt, sample (-1 is greedy), text, token_ids, terminated and grades;
    the log-likelihoods of the choices where those were scored.

    Raises
    ------
    StageError
        If they have not been sampled yet.
    """
    file = completions_file(folder, model)
    if not file.exists():
        raise StageError(f"no completions of {model} at {file}; run the outcomes stage first.")
    return pd.read_parquet(file)


def sample_outcomes(
    spec: StudySpec, folder: StudyFolder, *, provenance: Provenance, progress: Progress = SILENT
) -> None:
    """Complete and grade every prompt with every model, greedily and K times by sampling.

    Models whose completions were imported are not sampled.

    Parameters
    ----------
    spec, folder
        The study; generation, tasks, graders and prompts are taken from it.
    provenance
        Origin of the store.
    progress
        Receiver of progress.

    Raises
    ------
    ModelError, InputError
        If a checkpoint, tokenizer, prompt table or expected answer cannot be used; checked before any completion is
        drawn.
    StoreError
        If the folder holds another study's outcomes.

    Notes
    -----
    Sample s of prompt i has the same seed in every model, hence the same uniform numbers: models differ by their
    distributions alone, and identical models give identical completions. Each model reads prompts by its own chat
    template; the first prompt of every task as models read it is an attribute of the store. Where choices are scored,
    every sample is the most likely choice. Models already committed are skipped; a model's parquet is written,
    atomically, before its outcomes are committed.
    """
    prompts = load_prompts(spec, folder)
    graders = graders_of(spec, prompts[TASK])
    check_answers(graders, prompts)
    check_letters(spec, prompts)
    refs = list_models(spec, folder)
    for ref in refs:
        check_weights(ref)
    check_tokenizers(refs, list(prompts[TEXT]))
    rendered = json.dumps([asdict(example) for example in rendered_examples(spec, folder)], ensure_ascii=False)
    done = set(committed_models(folder.outcomes))
    if done:  # refuse another study's store before hours of sampling, not after
        check_owner(folder.outcomes, provenance)
    device = resolve_device(spec.device)
    n_samples = spec.generation.n_samples
    imported = {model: read_import(file, prompts, n_samples) for model, file in imported_models(folder).items()}
    check_origins([ref.model for ref in refs], {model: one.origin for model, one in imported.items()})
    for ref in refs:
        if ref.model not in done:
            given = imported.get(ref.model)
            if given is None:
                completions = _complete(ref, prompts, spec, device=device, progress=progress)
            else:
                completions = given.completions
            grades = [grade_all(graders, row, prompts) for row in completions]
            if given is not None:
                grades = given.graded(grades)
            _write_completions(completions_file(folder, ref.model), completions, grades, prompts)
            outcomes = _outcomes(ref, completions, grades, prompts).assign_attrs({RENDERED_PROMPTS: rendered})
            if imported:
                outcomes = with_origin(outcomes, None if given is None else given.origin)
            append_model(folder.outcomes, "outcomes", outcomes, provenance=provenance)
            _warn(outcomes, read_completions(folder, ref.model), progress)


def _warn(outcomes: xr.Dataset, completions: pd.DataFrame, progress: Progress) -> None:
    shares = completion_shares(outcomes)
    for warning in share_warnings(shares):
        progress.log(f"warning: {warning}")
    for task in too_often_unread(shares)[str(outcomes[MODEL].item())]:
        of_task = outcomes[PROMPT].values[outcomes[TASK].values == task].tolist()
        for prompt, text in unread_examples(completions, of_task):
            progress.log(f"  {task} {prompt}: {text!r}")


def sample_seeds(seed: int, prompts: Sequence[str], n_samples: int) -> list[int]:
    """Seeds of all completions, ordered by sample, each a function of (study seed, prompt id, sample) alone."""
    return [derive_seed(seed, "sample", prompt, sample) for sample in range(n_samples) for prompt in prompts]


def _complete(
    ref: ModelRef, prompts: pd.DataFrame, spec: StudySpec, *, device: torch.device, progress: Progress
) -> list[list[Completion]]:
    """Completions [1 + K][prompt]: greedy first, then the samples."""
    n_samples = spec.generation.n_samples
    return answer_prompts(
        load_model(ref, device=device),
        load_reader(ref),
        prompts,
        spec,
        n_samples=n_samples,
        seeds=sample_seeds(spec.seed, list(prompts[PROMPT]), n_samples),
        greedy=True,
        progress=progress,
        description=ref.model,
    )


def _write_completions(
    file: Path, completions: list[list[Completion]], grades: list[list[Grade]], prompts: pd.DataFrame
) -> None:
    ids = list(prompts[PROMPT])
    rows = [
        {
            PROMPT: ids[index],
            SAMPLE: sample,
            TEXT: completion.text,
            "token_ids": list(completion.token_ids),
            "n_tokens": len(completion.token_ids),
            "terminated": completion.terminated,
            "correct": grades[sample + 1][index].correct,
            "answered": grades[sample + 1][index].answered,
            "format_class": grades[sample + 1][index].format_class,
            "choice_log_likelihoods": list(completion.choice_log_likelihoods) or None,
        }
        for sample, row in enumerate(completions, start=GREEDY)
        for index, completion in enumerate(row)
    ]
    with replacing(file) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), temporary)


def _outcomes(
    ref: ModelRef, completions: list[list[Completion]], grades: list[list[Grade]], prompts: pd.DataFrame
) -> xr.Dataset:
    """One model's outcomes in the declared layout."""
    # [prompt, 1 + K], in C order: Zarr's variable-length text codec scrambles transposed arrays
    correct = np.array([[grade.correct for grade in row] for row in zip(*grades, strict=True)], dtype=np.int8)
    answered = np.array([[grade.answered for grade in row] for row in zip(*grades, strict=True)])
    terminated = np.array([[c.terminated for c in row] for row in zip(*completions, strict=True)])
    tokens = np.array([[len(c.token_ids) for c in row] for row in zip(*completions, strict=True)], dtype=np.int32)
    classes = np.array([[grade.format_class for grade in row] for row in zip(*grades, strict=True)], dtype=np.str_)
    sampled, greedy = (MODEL, PROMPT, SAMPLE), (MODEL, PROMPT)
    labels = {name: (PROMPT, prompts[name].to_numpy(dtype=np.str_)) for name in (PROMPT, *PROMPT_LABELS)}
    return xr.Dataset(
        {
            "correct": (sampled, correct[None, :, 1:]),
            "completion_tokens": (sampled, tokens[None, :, 1:]),
            "format_class": (sampled, classes[None, :, 1:]),
            "terminated": (sampled, terminated[None, :, 1:]),
            "answered": (sampled, answered[None, :, 1:]),
            "greedy_correct": (greedy, correct[None, :, 0]),
            "greedy_tokens": (greedy, tokens[None, :, 0]),
            "greedy_class": (greedy, classes[None, :, 0]),
            "greedy_terminated": (greedy, terminated[None, :, 0]),
            "greedy_answered": (greedy, answered[None, :, 0]),
        },
        coords=ref_coords([ref]) | {SAMPLE: (SAMPLE, np.arange(correct.shape[1] - 1))} | labels,
    )
