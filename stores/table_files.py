"""Tables in files: one reader for every place that takes a table, whatever its suffix."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import content_hash
from rlgen_stats.stores.atomic import explain_damage
from rlgen_stats.stores.digests import file_sha256

SAVED: Final = "state.json"
"""What makes a folder a data set that ``datasets`` saved (``save_to_disk``)."""
SAVED_SPLITS: Final = "dataset_dict.json"
"""What makes it one of several splits, each in a folder of its name."""
SHARD: Final = re.compile(r"-\d+-of-\d+\.\w+$")
"""End of the name of one of several files that are one table."""


def read_table(path: Path) -> pd.DataFrame:
    """A table as a data frame; cells of csv and tsv stay text, so that an answer ``05`` stays ``05``.

    Parameters
    ----------
    path
        A .parquet, .csv, .tsv, .jsonl, .json (a list of objects, or one a line) or .arrow file; a folder that
        ``datasets`` saved; a folder with the files of one table, or what its shards are called (``data/test`` of
        data/test-00000-of-00002.parquet and its like).

    Raises
    ------
    InputError
        If it is missing, of another kind, or malformed, or a folder holds several tables.
    """
    if (path / SAVED).is_file():
        return _read("a data set of datasets", _read_saved, path)
    files = table_files(path)
    tables = [_read(f"a readable {file.suffix[1:]} table", _READERS[file.suffix], file) for file in files]
    return tables[0] if len(tables) == 1 else pd.concat(tables, ignore_index=True)


def read_parquet(path: Path, **options: Any) -> pd.DataFrame:
    """A parquet file that this package wrote; options are those of pandas.

    Raises
    ------
    StoreCorruptError
        If it is damaged.
    """
    with explain_damage(path):
        return pd.read_parquet(path, **options)


def table_sha256(path: Path) -> str:
    """Hash of a table's bytes; of one in several files, of their names and bytes.

    Raises
    ------
    InputError
        As :func:`read_table`.
    """
    files = table_files(path)
    if files == [path]:
        return file_sha256(path)
    return content_hash([(file.name, file_sha256(file)) for file in files])


def is_table_folder(path: Path) -> bool:
    """Whether a folder is a data set that ``datasets`` saved."""
    return (path / SAVED).is_file() or (path / SAVED_SPLITS).is_file()


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file with one JSON object a line; only a line feed ends a line, a text may hold U+2028 or U+0085.

    Raises
    ------
    ValueError
        If a line is no JSON object, has a name twice in one object, or nests deeper than Python reads.
    """
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line, object_pairs_hook=_once)
                except RecursionError:
                    raise ValueError(f"line {number} nests too deep") from None
                except _GivenTwiceError as error:
                    raise ValueError(f"line {number}: {error}") from None
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is no JSON object")
                yield row


def json_rows(path: Path) -> list[dict[str, Any]]:
    """Objects of a .json file: a list of them, or one a line.

    Raises
    ------
    ValueError
        If it is anything else, has a name twice in one object, or nests deeper than Python reads.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it nests too deep") from None
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":  # after the object of the first line
            raise
        return list(json_lines(path))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected a list of objects, or one a line")
    return rows


class _GivenTwiceError(ValueError):
    """An object of JSON with the same name twice, of which json would keep the last."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _GivenTwiceError(f"an object has {twice!r} {names.count(twice)} times; keep one")
    return row


def table_files(path: Path) -> list[Path]:
    """The files that are one table.

    Raises
    ------
    InputError
        If there is none or there are several tables.
    """
    if (path / SAVED).is_file():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if path.is_file():
        if path.suffix not in _READERS:
            raise InputError(f"{path}: tables are {', '.join(_READERS)} files, got {path.suffix or 'no suffix'!r}.")
        return [path]
    if (path / SAVED_SPLITS).is_file():
        splits = sorted(child.name for child in path.iterdir() if (child / SAVED).is_file())
        raise InputError(f"{path} has the splits {', '.join(splits)}; name one: {path / (splits or ['SPLIT'])[0]}.")
    inside = sorted(path.iterdir()) if path.is_dir() else sorted(path.parent.glob(f"{path.name}-*-of-*"))
    files = [file for file in inside if file.suffix in _READERS]
    names = sorted({SHARD.sub("", file.name) for file in files})
    if len(names) > 1:
        raise InputError(f"{path} holds several tables, {', '.join(names[:6])}; name one of them.")
    if files:
        return files
    if path.is_dir():
        raise InputError(f"{path} holds no table; expected {', '.join(_READERS)} files, or what datasets saved.")
    if path.suffix and path.suffix not in _READERS:
        raise InputError(f"{path}: tables are {', '.join(_READERS)} files, got {path.suffix!r}.")
    raise InputError(f"no table at {path}; correct the path.")


def _read(what: str, reader: Callable[[Path], pd.DataFrame], path: Path) -> pd.DataFrame:
    try:
        frame = reader(path)
        frame = frame.reset_index(drop=not any(frame.index.names))  # a named one of pandas is a column
        _check_names(list(frame.columns))
        return frame
    except (ValueError, OSError, csv.Error, pa.ArrowException) as error:
        first = (str(error).splitlines() or [""])[0]
        raise InputError(f"{path} is not {what} ({first}).") from error


def _check_names(columns: list[str]) -> None:
    twice = [name for name in dict.fromkeys(columns) if columns.count(name) > 1 and name != ""]
    if twice:
        raise ValueError(f"it has the column {twice[0]!r} {columns.count(twice[0])} times; rename or drop all but one")


def _read_delimited(path: Path, delimiter: str) -> pd.DataFrame:
    try:
        frame = pd.read_csv(path, sep=delimiter, dtype=str, keep_default_na=False)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    header = pd.read_csv(path, sep=delimiter, dtype=str, keep_default_na=False, header=None, nrows=1)
    _check_names(header.iloc[0].tolist())  # pandas renames those that come twice
    if len(frame) and not isinstance(frame.index, pd.RangeIndex):  # pandas takes surplus first cells as an index
        raise ValueError(
            f"rows have more than the {len(frame.columns)} cells of the header; quote texts with {delimiter!r}"
        )
    return frame


def _read_parquet(path: Path) -> pd.DataFrame:
    _check_names(pq.read_schema(path).names)  # which pandas cannot tell apart
    return pd.read_parquet(path)


def _read_arrow(path: Path) -> pd.DataFrame:
    """What ``datasets`` caches, a stream; or a file of Arrow."""
    with pa.memory_map(str(path)) as source:
        try:
            table = pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            table = pa.ipc.open_stream(source).read_all()
    frame: pd.DataFrame = table.to_pandas(ignore_metadata=True)
    return frame


def _read_saved(path: Path) -> pd.DataFrame:
    import datasets  # seconds to import

    frame: pd.DataFrame = datasets.load_from_disk(str(path)).to_pandas()
    return frame


_READERS: Final[dict[str, Callable[[Path], pd.DataFrame]]] = {
    ".parquet": _read_parquet,
    ".csv": partial(_read_delimited, delimiter=","),
    ".tsv": partial(_read_delimited, delimiter="\t"),
    ".jsonl": lambda path: pd.DataFrame(json_lines(path), dtype=object),
    ".json": lambda path: pd.DataFrame(json_rows(path), dtype=object),
    ".arrow": _read_arrow,
}
SUFFIXES: Final = tuple(_READERS)
"""Kinds of tables."""
