"""A label table of one row a token, split into the tables of tokens and prompts that a store keeps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from rlgen_stats.schemas.dims import (
    DOMAIN,
    DOMAINS,
    POSITION,
    PROMPT,
    PROMPT_LABELS,
    SEGMENT,
    SOURCE,
    SPLIT,
    SPLITS,
    TOKEN_ID,
)
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.stores.hub import is_on_hub, locate_table
from rlgen_stats.stores.locations import is_remote, place
from rlgen_stats.stores.prompts import check_label, text_cells
from rlgen_stats.stores.table_files import read_table

REQUIRED: Final = (PROMPT, POSITION, TOKEN_ID, SEGMENT, *PROMPT_LABELS)
"""Columns of a label table."""
COLUMNS: Final = (*REQUIRED, SOURCE)
"""Columns of a label table; the last may be absent."""
IMPORTED: Final = "imported"
"""Source of tokens whose table names none."""
LABEL_ROWS: Final = 1 << 18
"""Tokens whose labels are read from a store at once."""

_DELIMITED: Final = {".csv": ",", ".tsv": "\t"}
_NUMBERS: Final = (POSITION, TOKEN_ID)
_LARGEST: Final = int(np.iinfo(np.int32).max)


def read_labels(path: Path | str, *, ignore: Collection[str] = ()) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read one row a token and split it into tokens and prompts.

    Parameters
    ----------
    path
        ``.parquet``, ``.csv``, ``.tsv`` (``.gz`` too), or any other table (``hf://datasets/...`` too) that
        :func:`~rlgen_stats.stores.table_files.read_table` reads, whole into memory, with the columns prompt, position,
        token_id, segment, task, domain, split, cluster, and source if known (the model that wrote the text).
    ignore
        Other columns of the file that are to be left out.

    Returns
    -------
    tokens
        prompt, source, position, token_id, segment; in the order of the file; text as categories.
    prompts
        prompt, task, domain, split, cluster; in the order of first appearance. Prompt ids are text: 007 stays 007.

    Raises
    ------
    InputError
        If the file cannot be read, a column is missing, unknown, of lists or bytes, or has missing values or NUL
        characters, positions or token ids are no 32-bit counts, a domain or split is none of the declared ones, or a
        prompt has two tasks, domains, splits or clusters.

    Examples
    --------
    >>> tokens, prompts = read_labels("labels.parquet", ignore=["text"])  # doctest: +SKIP
    """
    path = locate_table(path) if is_on_hub(str(path)) else place(path)
    if is_remote(path):
        raise InputError(f"label tables are read from local files, got {path}; copy the file to this machine first.")
    reader = _reader_of(path)
    if reader is not _read_other and not path.is_file():
        raise InputError(f"there is no label table at {path}; expected a .parquet, .csv or other table.")
    try:
        table = reader(path, ignore)
    except InputError:
        raise
    except (pa.ArrowException, ValueError, EOFError, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        raise InputError(
            f"{path.name} cannot be read as {path.suffix.lstrip('.')} ({str(error).splitlines()[0][:120]}); write it "
            "again."
        ) from error
    if SOURCE not in table:
        table[SOURCE] = pd.Categorical.from_codes(np.zeros(len(table), np.int8), categories=pd.Index([IMPORTED]))
    _check_values(path, table)
    return table[[PROMPT, SOURCE, POSITION, TOKEN_ID, SEGMENT]], _prompts(path, table)


def _reader_of(path: Path) -> Any:
    name = path.name.lower()
    if name.endswith((".parquet", ".pq")):
        return _read_parquet
    if name.endswith((*_DELIMITED, *(f"{suffix}.gz" for suffix in _DELIMITED))):
        return _read_csv
    return _read_other


def _check_columns(path: Path, names: Sequence[str], ignore: Collection[str]) -> list[str]:
    """Columns to read, after naming what is missing or unknown."""
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise InputError(f"{path.name} lacks the column(s) {', '.join(missing)}; expected {', '.join(REQUIRED)}.")
    absent = [name for name in ignore if name not in names]
    if absent:
        raise InputError(f"{path.name} has no column {absent[0]!r} to ignore; it has {', '.join(names)}.")
    extra = [name for name in names if name not in COLUMNS and name not in ignore]
    if extra:
        raise InputError(
            f"{path.name} has the unknown column(s) {', '.join(map(repr, extra))}; expected {', '.join(COLUMNS)}: drop "
            "the others or name them with ignore= (--ignore)."
        )
    repeated = [name for name in COLUMNS if list(names).count(name) > 1]
    if repeated:
        raise InputError(f"{path.name} has the column {repeated[0]!r} twice; drop one.")
    return [name for name in COLUMNS if name in names and name not in ignore]


def _read_parquet(path: Path, ignore: Collection[str]) -> pd.DataFrame:
    columns, text = _columns_of(path, pq.read_schema(path), ignore)
    table = pq.read_table(path, columns=columns, read_dictionary=text)
    frame: pd.DataFrame = table.to_pandas(ignore_metadata=True, strings_to_categorical=True)
    return frame


def _read_other(path: Path, ignore: Collection[str]) -> pd.DataFrame:
    """Tables whose columns are not read one by one."""
    table = pa.Table.from_pandas(read_table(path), preserve_index=False)
    columns, _ = _columns_of(path, table.schema, ignore)
    frame: pd.DataFrame = table.select(columns).to_pandas(ignore_metadata=True, strings_to_categorical=True)
    return frame


def _columns_of(path: Path, schema: pa.Schema, ignore: Collection[str]) -> tuple[list[str], list[str]]:
    """Columns to read, and those of them that are text."""
    columns = _check_columns(path, schema.names, ignore)
    text = [name for name in columns if name not in _NUMBERS]
    for name in text:
        if not _is_text(schema.field(name).type):
            raise InputError(
                f"{path.name} holds {schema.field(name).type} in the column {name!r}, expected text or numbers, one "
                "value a token; write it as text."
            )
    return columns, text


def _is_text(kind: pa.DataType) -> bool:
    """Whether values of an Arrow type have one spelling as text: not lists, structs or bytes."""
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    tests = (
        *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
        *(pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null),
    )
    return any(test(kind) for test in tests)


def _read_csv(path: Path, ignore: Collection[str]) -> pd.DataFrame:
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    parsing = csv.ParseOptions(newlines_in_values=True, delimiter=_DELIMITED[suffix.lower()])
    with csv.open_csv(path, parse_options=parsing) as reader:
        columns = _check_columns(path, reader.schema.names, ignore)
    text = pa.dictionary(pa.int32(), pa.string())
    options = csv.ConvertOptions(
        include_columns=columns,
        column_types={name: text for name in columns if name not in _NUMBERS},
        null_values=[""],  # only an empty field is missing: NA or null may be the name of a prompt
        strings_can_be_null=True,
    )
    frame: pd.DataFrame = csv.read_csv(path, parse_options=parsing, convert_options=options).to_pandas()
    return frame


def _check_values(path: Path, table: pd.DataFrame) -> None:
    """Check every column in place; texts become categories of text."""
    if table.empty:
        raise InputError(f"{path.name} has no rows; expected one a token.")
    for name in table.columns:
        if table[name].isna().any():
            row = int(table[name].isna().to_numpy().argmax())
            raise InputError(f"{path.name} has no {name} in row {row}; every token needs every label: fill it in.")
    for name in _NUMBERS:
        if table[name].dtype.kind not in "iu":
            raise InputError(f"{name} in {path.name} must be integers, got {table[name].dtype}; convert the column.")
        low, high = int(table[name].min()), int(table[name].max())
        if low < 0 or high > _LARGEST:
            raise InputError(f"{name} in {path.name} must lie in 0 to {_LARGEST}, got {low if low < 0 else high}.")
    for name in set(table.columns) - set(_NUMBERS):
        table[name] = _as_text(path, table[name])
    for name, known in ((DOMAIN, DOMAINS), (SPLIT, SPLITS)):
        unknown = [value for value in table[name].cat.categories if value not in known]
        if unknown:
            raise InputError(f"{name} in {path.name} must be {' or '.join(known)}, got {unknown[0]!r}; rename it.")
    _check_positions(path, table)


def _check_positions(path: Path, table: pd.DataFrame) -> None:
    """Refuse positions that do not ascend within a text; one of 0, or of another prompt or source, begins the next."""
    position, padding = table[POSITION].to_numpy(), (table[SEGMENT] == "pad").to_numpy()
    same = ~(padding[1:] | padding[:-1]) & (position[1:] > 0)
    for name in (PROMPT, SOURCE):
        codes = table[name].cat.codes.to_numpy()
        same &= codes[1:] == codes[:-1]
    wrong = same & (position[1:] <= position[:-1])
    if wrong.any():
        row = int(wrong.argmax()) + 1
        raise InputError(
            f"position of row {row} in {path.name} is {position[row]} after {position[row - 1]} of the same text, "
            "expected positions that ascend within a text, the first token's 0: write the rows in the texts' order."
        )


def _as_text(path: Path, column: pd.Series[Any]) -> pd.Series[Any]:
    """Categories of text in order of appearance, only those in use."""
    codes, values = pd.factorize(column)
    texts = text_cells(pd.DataFrame({column.name: values}), str(column.name), path)
    check_label(texts, str(column.name), path)
    names = pd.Index(np.array(texts, dtype=object))
    if names.has_duplicates:  # 1 and "1"
        codes, names = names.factorize()[0][codes], names.unique()
    return pd.Series(pd.Categorical.from_codes(codes, categories=names), index=column.index)


def _prompts(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """One row a prompt; each has one task, domain, split and cluster."""
    ids = table[PROMPT].cat.categories
    codes = table[PROMPT].cat.codes.to_numpy()
    first = np.empty(len(ids), dtype=np.int64)
    first[codes[::-1]] = np.arange(len(codes))[::-1]  # of repeated indices the last assignment stays: the first row
    prompts = {PROMPT: np.asarray(ids, dtype=object)}
    for name in PROMPT_LABELS:
        labels, legend = table[name].cat.codes.to_numpy(), np.asarray(table[name].cat.categories, dtype=object)
        wrong = labels != labels[first][codes]
        if wrong.any():
            row = int(wrong.argmax())
            raise InputError(
                f"prompt {ids[codes[row]]!r} of {path.name} has the {name} {legend[labels[first][codes[row]]]!r} and, "
                f"in row {row}, {legend[labels[row]]!r}; expected one {name} a prompt: correct it or rename the prompt."
            )
        prompts[name] = legend[labels[first]]
    return pd.DataFrame(prompts)
