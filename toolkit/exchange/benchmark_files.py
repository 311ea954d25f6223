"""Rows of a published benchmark, from a file, a ``datasets`` folder or the Hub."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rlgen_stats.schemas.dims import CLUSTER
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import content_hash
from rlgen_stats.stores.hub import is_on_hub, locate_table
from rlgen_stats.stores.prompts import ANSWER, FILE_ID, TEXT
from rlgen_stats.stores.table_files import SAVED, SAVED_SPLITS, SUFFIXES, json_lines, json_rows, read_table
from rlgen_stats.toolkit.exchange.benchmark_layouts import Benchmark, Question, Row, questions

_NO_FILE: Final = "".join(f"(?<!{re.escape(suffix)})" for suffix in SUFFIXES)
_HUB_ID: Final = re.compile(rf"\w[\w.-]*/\w[\w.-]*{_NO_FILE}(@.+)?")
"""OWNER/NAME of a data set, with or without its revision; no file's name."""


def read_benchmark(
    benchmark: Benchmark,
    source: str | None = None,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """A benchmark's questions as a table of a study's own.

    Parameters
    ----------
    benchmark
        What to read.
    source
        File (see :func:`~rlgen_stats.stores.table_files.read_table`) in one of the published layouts, folder that
        ``datasets`` reads or has saved, one file of the Hub (``hf://datasets/OWNER/NAME/PATH``), or Hub id with or
        without ``@revision``; default: where the benchmark is published.
    split
        Of a folder or Hub id; default: the one the benchmark is tested on.
    columns
        Published name -> name in this source, where they differ.

    Returns
    -------
    DataFrame
        prompt_id, text, answer, cluster and, for multiple choice, choices (a JSON list); the answer is a letter then.
        Ids are the published ones, or else a hash of the question. Questions on the same passage (or with the same
        text) share a cluster.

    Raises
    ------
    InputError
        If the source cannot be read or a row has another layout.
    """
    rows = _rows(benchmark, source or benchmark.dataset, split or benchmark.split)
    if not rows:
        raise InputError(f"{source or benchmark.dataset} has no rows for {benchmark.name}; expected one or more.")
    read = questions(benchmark, rows, columns or {})
    table = pd.DataFrame(
        {
            FILE_ID: _ids(benchmark.name, read),
            TEXT: [question.text for question in read],
            ANSWER: [question.answer for question in read],
        }
    )
    if benchmark.options is not None:
        table["choices"] = [json.dumps(question.choices, ensure_ascii=False) for question in read]
    about = pd.Series([" ".join((question.about or question.text).lower().split()) for question in read])
    table[CLUSTER] = table[FILE_ID].groupby(about).transform("first")
    return table


def _ids(name: str, read: list[Question]) -> list[str]:
    """Published ids where every row has one of its own, else a hash of the question; twins are numbered."""
    published = [question.id for question in read]
    if all(published) and len(set(published)) == len(published):
        return [f"{name}-{own}" for own in published]
    hashes = pd.Series([content_hash([question.text, question.choices])[:12] for question in read])
    twins = hashes.groupby(hashes).cumcount()
    return [f"{name}-{own}" + (f"-{twin + 1}" if twin else "") for own, twin in zip(hashes, twins, strict=True)]


def _rows(benchmark: Benchmark, source: str, split: str) -> list[Row]:
    if is_on_hub(source):
        return _file_rows(locate_table(source))
    path = Path(source).expanduser()
    if not path.exists() and not _HUB_ID.fullmatch(source):
        raise InputError(
            f"no file or folder at {path.absolute()}; correct the path, or give a Hub id such as {benchmark.dataset}."
        )
    try:
        if path.is_file():
            return _file_rows(path)
        return _dataset_rows(path if path.is_dir() else source, benchmark.config, split)
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        named = path.exists() or source == benchmark.dataset
        missing = "" if named else f"no file or folder is at {path.absolute()}, and on the Hub "
        raise InputError(
            f"{missing}{source} cannot be read as {benchmark.name}, split {split!r} ({first}); give a file or folder "
            "with --from, or another --split."
        ) from error


def _file_rows(path: Path) -> list[Row]:
    match path.suffix:
        case ".parquet":
            rows: list[Row] = pq.read_table(path).to_pylist()
        case ".jsonl":
            rows = list(json_lines(path))
        case ".json":
            rows = [*json_rows(path)]
        case _:
            rows = pa.Table.from_pandas(read_table(path), preserve_index=False).to_pylist()
    return rows


def _dataset_rows(source: Path | str, config: str | None, split: str) -> list[Row]:
    import datasets  # seconds to import

    datasets.disable_progress_bars()
    if isinstance(source, Path) and any((source / name).exists() for name in (SAVED_SPLITS, SAVED)):
        saved = datasets.load_from_disk(str(source))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise ValueError(f"it has the splits {', '.join(saved)}")
            saved = saved[split]
        return list(saved)
    if isinstance(source, Path):
        source = source / config if config and (source / config).is_dir() else source
        with tempfile.TemporaryDirectory() as cache:  # a copy in the user's cache would outlive a corrected file
            return _loaded(str(source), None, config, split, cache)
    name, _, revision = source.partition("@")
    return _loaded(name, revision or None, config, split, None)


def _loaded(name: str, revision: str | None, config: str | None, split: str, cache: str | None) -> list[Row]:
    import datasets

    configs: list[Any] = datasets.get_dataset_config_names(name, revision=revision)
    chosen = config if config in configs else None
    return list(datasets.load_dataset(name, chosen, revision=revision, split=split, cache_dir=cache))
