"""Completions sampled elsewhere, kept in a study's folder for its outcomes: one file a model, with its origin."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import GREEDY, MODEL, PROMPT, SAMPLE
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import content_hash
from rlgen_stats.stores import replacing
from rlgen_stats.stores.prompts import TEXT
from rlgen_stats.toolkit.extraction.generation import Completion
from rlgen_stats.toolkit.extraction.grading import Grade

HERE: Final = "here"
"""Engine and grader of what this toolkit sampled and graded itself."""
StandIn = Literal["", "greedy", "samples"]
"""What was not sampled and is stood in for: the greedy completion by the first sample, or the samples by the greedy
one."""
_ORIGIN: Final = b"rlgen_stats.origin"
_SCHEMA: Final = pa.schema(
    [
        (PROMPT, pa.string()),
        (SAMPLE, pa.int32()),
        (TEXT, pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("terminated", pa.bool_()),
        ("correct", pa.bool_()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where one model's completions come from."""

    engine: str
    graded_by: str
    """``"here"`` by the study's grader, else what the verdicts are that came along."""
    stand_in: StandIn = ""
    settings: Mapping[str, float]
    """temperature, top_p and max_new_tokens."""
    files: Mapping[str, str]
    """SHA-256 -> name."""
    prompts: str
    """Hash of the ids and texts of the prompts."""


@dataclass(frozen=True)
class Imported:
    """One model's completions, as if sampled here."""

    origin: Origin
    completions: list[list[Completion]]
    """[1 + K][prompt], greedy first."""
    verdicts: NDArray[np.bool_] | None
    """[1 + K, prompt]; None where the study's grader decides."""

    def graded(self, grades: list[list[Grade]]) -> list[list[Grade]]:
        """The study's own grades, with the verdicts in place of its grader's where they came along."""
        if self.verdicts is None:
            return grades
        return [
            [_with_verdict(grade, bool(right), c) for grade, right, c in zip(row, verdicts, completions, strict=True)]
            for row, verdicts, completions in zip(grades, self.verdicts, self.completions, strict=True)
        ]


def _with_verdict(grade: Grade, right: bool, completion: Completion) -> Grade:
    if right or not completion.text:  # a verdict without its text says that there was an answer
        return Grade(right, "answer", True)
    return replace(grade, correct=False)


def prompts_hash(prompts: pd.DataFrame) -> str:
    """Hash of the ids and texts of a study's prompts."""
    return content_hash([list(prompts[PROMPT]), list(prompts[TEXT])])


def write_import(file: Path, found: Mapping[tuple[str, int], tuple[Completion, bool | None]], origin: Origin) -> None:
    """Write one model's completions, atomically."""
    rows = [
        {
            PROMPT: prompt,
            SAMPLE: sample,
            TEXT: completion.text,
            "token_ids": list(completion.token_ids),
            "terminated": completion.terminated,
            "correct": correct,
        }
        for (prompt, sample), (completion, correct) in sorted(found.items())
    ]
    schema = _SCHEMA.with_metadata({_ORIGIN: json.dumps(asdict(origin), sort_keys=True).encode()})
    with replacing(file) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary)


def read_origin(file: Path) -> Origin:
    """Where imported completions come from.

    Raises
    ------
    InputError
        If the file is none that an import wrote.
    """
    try:
        return Origin(**json.loads((pq.read_schema(file).metadata or {})[_ORIGIN]))
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(f"{file} was not written by import-outcomes; import the completions again.") from error


def read_import(file: Path, prompts: pd.DataFrame, n_samples: int) -> Imported:
    """One model's imported completions, in the order of the study's prompts.

    Raises
    ------
    InputError
        If they were imported for other prompts or another number of samples.
    """
    origin = read_origin(file)
    table = pd.read_parquet(file).set_index([SAMPLE, PROMPT])
    samples = range(GREEDY, n_samples)
    if origin.prompts != prompts_hash(prompts) or len(table) != len(samples) * len(prompts):
        raise InputError(f"{file} was imported for other prompts or samples than the study's; import it again.")
    ordered = table.loc[[(sample, prompt) for sample in samples for prompt in prompts[PROMPT]]]
    columns = zip(ordered["token_ids"], ordered[TEXT], ordered["terminated"], strict=True)
    drawn = [Completion(tuple(map(int, ids)), text, bool(terminated)) for ids, text, terminated in columns]
    n = len(prompts)
    completions = [drawn[start : start + n] for start in range(0, len(drawn), n)]
    verdicts = None
    if origin.graded_by != HERE:
        verdicts = ordered["correct"].to_numpy(dtype=bool).reshape(len(samples), n)
    return Imported(origin, completions, verdicts)


def check_origins(models: Sequence[str], imported: Mapping[str, Origin]) -> None:
    """Refuse to compare models that different engines sampled, or greedy completions with sampled ones.

    Parameters
    ----------
    models
        All models of a study.
    imported
        Of those among them that were not sampled here, where they come from.

    Raises
    ------
    InputError
        If an engine, or a completion that stands in for another kind, is that of some models only.

    Notes
    -----
    Every model of a study is compared with base. Engines differ in kernels, numeric types and random numbers: between
    two of them the same weights give other completions, which would count as an effect of training.
    """
    _check_engines({model: imported[model].engine if model in imported else HERE for model in models})
    kinds = {model: imported[model].stand_in if model in imported else "" for model in models}
    if len(set(kinds.values())) > 1:
        odd = next(model for model, kind in kinds.items() if kind)
        other = next(model for model, kind in kinds.items() if kind != kinds[odd])
        missing = "greedy completions" if kinds[odd] == "greedy" else "sampled completions"
        raise InputError(
            f"{odd} was imported without {missing}, and {other} was not; expected the same kinds of all models: import "
            f"{odd} with its {missing}, or all models without."
        )


def _check_engines(engines: Mapping[str, str]) -> None:
    odd = next((model for model, engine in engines.items() if engine != HERE), None)
    other = next((model for model, engine in engines.items() if odd is not None and engine != engines[odd]), None)
    if odd is None or other is None:
        return
    one = engines[odd]
    also, fix = f"by {engines[other]}", f"import {other} of {one} too"
    if engines[other] == HERE:
        also, fix = "here", f"{fix} (export-requests writes what to run), or delete imported/{odd}.parquet"
    raise InputError(
        f"{odd} was sampled by {one} and {other} {also}; expected one engine for all models of a study, which are all "
        f"compared with base: {fix}."
    )


def with_origin(outcomes: xr.Dataset, origin: Origin | None) -> xr.Dataset:
    """Outcomes that say by which engine models were sampled, who graded and what was stood in for; None: here."""
    said = ("engine", HERE), ("graded_by", HERE), ("stand_in", "")
    words = {name: here if origin is None else getattr(origin, name) for name, here in said}
    return outcomes.assign({name: (MODEL, np.full(outcomes.sizes[MODEL], word)) for name, word in words.items()})
