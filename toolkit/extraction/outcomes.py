"""Graded completions of every model: greedy and sampled, with seeds shared by all models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import MODEL, NOT_SAMPLED, PROMPT, PROMPT_LABELS, SAMPLE, TASK
from rlgen_stats.schemas.errors import StageError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import Provenance, StudyFolder, append_model, committed_models, replacing
from rlgen_stats.stores.prompts import TEXT, load_prompts
from rlgen_stats.stores.study_models import ModelRef, imported_models, list_models, ref_coords
from rlgen_stats.stores.table_files import read_parquet
from rlgen_stats.stores.tables import RENDERED_PROMPTS, check_owner
from rlgen_stats.toolkit.extraction.checkpoints import check_weights
from rlgen_stats.toolkit.extraction.completion_parts import (
    PARTS,
    Part,
    answer_part,
    completion_table,
    joined,
    split_prompts,
)
from rlgen_stats.toolkit.extraction.grading import check_answers, check_letters, grade_all, graders_of
from rlgen_stats.toolkit.extraction.imported import Imported, check_origins, read_import, with_origin
from rlgen_stats.toolkit.extraction.rendering import check_tokenizers, rendered_examples
from rlgen_stats.toolkit.progress import SILENT, Progress, Within
from rlgen_stats.toolkit.statistics.completion_shares import (
    completion_shares,
    share_warnings,
    too_often_unread,
    unread_examples,
)
from rlgen_stats.toolkit.workers import run_tasks


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
    StoreCorruptError
        If they are damaged.
    """
    file = completions_file(folder, model)
    if not file.exists():
        raise StageError(f"no completions of {model} at {file}; run the outcomes stage first.")
    return read_parquet(file)


def sample_outcomes(
    spec: StudySpec, folder: StudyFolder, *, provenance: Provenance, progress: Progress = SILENT
) -> None:
    """Complete and grade every prompt with every model, greedily and by sampling as often as the study says.

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
    every sample is the most likely choice.

    Each model completes its prompts in parts, which are graded and kept (``completions/parts``) as they come, and which
    are tasks of a cluster's workers where there is one. A run that was killed goes on with the first part that is
    missing. A model's parquet is written, atomically, before its outcomes are committed.
    """
    prompts = load_prompts(spec, folder)
    check_answers(graders_of(spec, prompts[TASK]), prompts)
    check_letters(spec, prompts)
    refs = list_models(spec, folder)
    for ref in refs:
        check_weights(ref)
    check_tokenizers(refs, list(prompts[TEXT]))
    rendered = json.dumps([asdict(example) for example in rendered_examples(spec, folder)], ensure_ascii=False)
    n_samples = {ref.model: ref.n_samples for ref in refs}
    done = set(committed_models(folder.outcomes))
    if done:  # refuse another study's store before hours of sampling, not after
        check_owner(folder.outcomes, provenance)
    imported = {
        model: read_import(file, prompts, n_samples[model])
        for model, file in imported_models(folder).items()
        if model in n_samples
    }
    check_origins([ref.model for ref in refs], {model: one.origin for model, one in imported.items()})
    todo = [ref for ref in refs if ref.model not in done]
    parts = folder.completions / PARTS / provenance.spec_hash[:16]
    sampled = {ref.model: split_prompts(ref, prompts, spec, parts) for ref in todo if ref.model not in imported}
    with closing(_tables(todo, imported, sampled, prompts, spec, progress)) as tables:
        for ref, table in tables:
            with replacing(completions_file(folder, ref.model)) as temporary:
                pq.write_table(table, temporary)
            outcomes = _outcomes(ref, table, prompts, max(n_samples.values()))
            outcomes = outcomes.assign_attrs({RENDERED_PROMPTS: rendered})
            if imported:
                given = imported.get(ref.model)
                outcomes = with_origin(outcomes, None if given is None else given.origin)
            append_model(folder.outcomes, "outcomes", outcomes, provenance=provenance)
            _warn(outcomes, table.to_pandas(), spec, progress)
    shutil.rmtree(folder.completions / PARTS, ignore_errors=True)


def _tables(
    refs: Sequence[ModelRef],
    imported: Mapping[str, Imported],
    sampled: Mapping[str, list[Part]],
    prompts: pd.DataFrame,
    spec: StudySpec,
    progress: Progress,
) -> Generator[tuple[ModelRef, pa.Table]]:
    """Every model's graded completions, in order of the models; what an earlier run kept is not sampled again."""
    parts = [part for of_model in sampled.values() for part in of_model]
    missing = {part.file for part in parts if not part.file.exists()}
    tasks = [(part, spec) for part in parts if part.file in missing]
    total = sum(part.n_completions for part in parts)
    with progress.task("outcomes", total=total, unit="completions") as task:
        within, expected = Within(task), 0
        with run_tasks(answer_part, tasks, progress=within) as answered:
            for ref in refs:
                if ref.model in imported:
                    yield ref, _imported_table(imported[ref.model], prompts, spec)
                    continue
                for part in sampled[ref.model]:
                    if part.file in missing:
                        next(answered)
                        expected += part.n_completions
                        within.reach(expected, model=ref.model)
                    else:
                        task.skip(part.n_completions, model=ref.model)
                yield ref, joined(sampled[ref.model])


def _imported_table(given: Imported, prompts: pd.DataFrame, spec: StudySpec) -> pa.Table:
    graders = graders_of(spec, prompts[TASK])
    grades = [grade_all(graders, row, prompts) for row in given.completions]
    return completion_table(given.completions, given.graded(grades), prompts)


def _warn(outcomes: xr.Dataset, completions: pd.DataFrame, spec: StudySpec, progress: Progress) -> None:
    shares = completion_shares(outcomes)
    for warning in share_warnings(shares, may_be_cut=spec.may_be_cut(outcomes[TASK].values.tolist())):
        progress.log(f"warning: {warning}")
    for task in too_often_unread(shares)[str(outcomes[MODEL].item())]:
        of_task = outcomes[PROMPT].values[outcomes[TASK].values == task].tolist()
        for prompt, text in unread_examples(completions, of_task):
            progress.log(f"  {task} {prompt}: {text!r}")


def _outcomes(ref: ModelRef, table: pa.Table, prompts: pd.DataFrame, n_samples: int) -> xr.Dataset:
    """One model's outcomes in the declared layout; samples that it has fewer than others are -1."""

    def read(name: str, dtype: Any) -> NDArray[Any]:
        # [prompt, 1 + K], in C order: Zarr's variable-length text codec scrambles transposed arrays
        return np.ascontiguousarray(table[name].to_numpy().reshape(-1, len(prompts)).T.astype(dtype))

    correct, answered, terminated = read("correct", np.int8), read("answered", bool), read("terminated", bool)
    tokens, classes = read("n_tokens", np.int32), read("format_class", np.str_)

    def sampled(values: NDArray[Any], missing: Any) -> tuple[tuple[str, ...], NDArray[Any]]:
        room = ((0, 0), (0, n_samples - ref.n_samples))
        return (MODEL, PROMPT, SAMPLE), np.pad(values[:, 1:], room, constant_values=missing)[None]

    greedy = (MODEL, PROMPT)
    labels = {name: (PROMPT, prompts[name].to_numpy(dtype=np.str_)) for name in (PROMPT, *PROMPT_LABELS)}
    return xr.Dataset(
        {
            "correct": sampled(correct, NOT_SAMPLED),
            "completion_tokens": sampled(tokens, NOT_SAMPLED),
            "format_class": sampled(classes, ""),
            "terminated": sampled(terminated, False),
            "answered": sampled(answered, False),
            "greedy_correct": (greedy, correct[None, :, 0]),
            "greedy_tokens": (greedy, tokens[None, :, 0]),
            "greedy_class": (greedy, classes[None, :, 0]),
            "greedy_terminated": (greedy, terminated[None, :, 0]),
            "greedy_answered": (greedy, answered[None, :, 0]),
        },
        coords=ref_coords([ref]) | {SAMPLE: (SAMPLE, np.arange(n_samples))} | labels,
    )
