"""Parts of a model's completions: the prompts that it completes at once, graded and kept in a file of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rlgen_stats.schemas.dims import GREEDY, PROMPT, SAMPLE, TASK
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import replacing
from rlgen_stats.stores.atomic import explain_damage
from rlgen_stats.stores.prompts import TEXT
from rlgen_stats.stores.study_models import ModelRef
from rlgen_stats.toolkit.extraction.answering import answer_prompts
from rlgen_stats.toolkit.extraction.checkpoints import load_model, resolve_device
from rlgen_stats.toolkit.extraction.generation import Completion
from rlgen_stats.toolkit.extraction.grading import Grade, grade_all, graders_of
from rlgen_stats.toolkit.extraction.rendering import load_reader
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.workers import kept

PARTS: Final = "parts"
"""Folder of the parts of models that are not whole yet, below that of the completions."""
BATCHES: Final = 16
"""Batches of completions in a part: the last one runs emptier and emptier."""
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


@dataclass(frozen=True)
class Part:
    """Prompts that one model completes at once."""

    ref: ModelRef
    prompts: pd.DataFrame
    file: Path
    """Where the completions are kept until the model has all of its own."""

    @property
    def n_completions(self) -> int:
        """The greedy ones included."""
        return (1 + self.ref.n_samples) * len(self.prompts)


def split_prompts(ref: ModelRef, prompts: pd.DataFrame, spec: StudySpec, folder: Path) -> list[Part]:
    """A model's parts: runs of prompts, by the settings alone, each with its file below ``folder``."""
    size = -(-BATCHES * spec.generation.batch_size // (1 + ref.n_samples))
    cuts = [(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)]
    return [Part(ref, prompts[start:stop], folder / ref.model / f"{start}-{stop}.parquet") for start, stop in cuts]


def sample_seeds(seed: int, prompts: Sequence[str], n_samples: int) -> list[int]:
    """Seeds of all completions, ordered by sample, each a function of (study seed, prompt id, sample) alone."""
    return [derive_seed(seed, "sample", prompt, sample) for sample in range(n_samples) for prompt in prompts]


def answer_part(part: Part, spec: StudySpec, progress: Progress = SILENT) -> None:
    """Complete a part's prompts, greedily and by sampling, grade that, and keep it in the part's file."""
    ref, prompts, device = part.ref, part.prompts, resolve_device(spec.device)
    completions = answer_prompts(
        kept("model", (ref, device), lambda: load_model(ref, device=device)),
        load_reader(ref),
        prompts,
        spec,
        n_samples=ref.n_samples,
        seeds=sample_seeds(spec.seed, list(prompts[PROMPT]), ref.n_samples),
        greedy=True,
        progress=progress,
        description=ref.model,
    )
    graders = graders_of(spec, prompts[TASK])
    grades = [grade_all(graders, row, prompts) for row in completions]
    with replacing(part.file) as temporary:
        pq.write_table(completion_table(completions, grades, prompts), temporary)


def completion_table(completions: list[list[Completion]], grades: list[list[Grade]], prompts: pd.DataFrame) -> pa.Table:
    """Rows of completions [1 + K][prompt], greedy first."""
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
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def joined(parts: Sequence[Part]) -> pa.Table:
    """Rows of all parts of a model, sample after sample."""
    tables = []
    for part in parts:
        with explain_damage(part.file):
            tables.append(pq.read_table(part.file))
    table = pa.concat_tables(tables)
    order = np.argsort(table[SAMPLE].to_numpy(), kind="stable")  # prompts stay in order: parts follow one another
    return table.take(order).combine_chunks()
