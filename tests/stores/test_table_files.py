"""Every kind of table gives the same rows, and what is none or several is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.stores.digests import file_sha256
from rlgen_stats.stores.table_files import is_table_folder, read_table, table_sha256

ROWS = [
    {"prompt_id": "007", "text": "one\u2028two, “three”\tfour", "answer": "05"},
    {"prompt_id": "8", "text": 'a "quote"', "answer": "-1"},
    {"prompt_id": "9", "text": "ünï", "answer": "NA"},
]


def saved(path: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    return path


def stream(path: Path) -> Path:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(path, table.schema) as sink:
        sink.write_table(table)
    return path


def file(path: Path) -> Path:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(path, table.schema) as sink:
        sink.write_table(table)
    return path


def text(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def frame() -> pd.DataFrame:
    return pd.DataFrame(ROWS)


def shards(path: Path) -> Path:
    path.parent.mkdir()
    for number in range(2):
        frame().iloc[2 * number : 2 * number + 2].to_parquet(path.parent / f"{path.name}-0000{number}-of-00002.parquet")
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    frame().to_csv(path / "test.csv", index=False)
    (path / "README.md").touch()
    return path


KINDS: dict[str, Callable[[Path], Path]] = {
    "parquet": lambda p: frame().to_parquet(p / "a.parquet") or p / "a.parquet",
    "csv": lambda p: frame().to_csv(p / "a.csv", index=False) or p / "a.csv",
    "tsv": lambda p: frame().to_csv(p / "a.tsv", index=False, sep="\t") or p / "a.tsv",
    "jsonl": lambda p: text(p / "a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
    "json": lambda p: text(p / "a.json", json.dumps(ROWS, ensure_ascii=False, indent=1)),
    "json, an object a line": lambda p: text(p / "a.json", "\n".join(map(json.dumps, ROWS))),
    "arrow stream": lambda p: stream(p / "a.arrow"),
    "arrow file": lambda p: file(p / "a.arrow"),
    "saved by datasets": lambda p: saved(p / "saved"),
    "shards": lambda p: shards(p / "data" / "test"),
    "folder of shards": lambda p: shards(p / "data" / "test").parent,
    "folder of one": lambda p: folder(p / "data"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    path = KINDS[kind](tmp_path)
    assert read_table(path).to_dict("records") == ROWS
    assert is_table_folder(path) == (kind == "saved by datasets")


def test_the_hash_of_a_table_is_that_of_its_bytes_and_follows_every_file(tmp_path: Path) -> None:
    one = KINDS["csv"](tmp_path)
    assert table_sha256(one) == file_sha256(one)  # the keys of finished studies stay
    for path, changed in ((saved(tmp_path / "saved"), "*.arrow"), (shards(tmp_path / "data" / "test"), "")):
        before = table_sha256(path)
        target = next(path.glob(changed)) if changed else path.parent / "test-00001-of-00002.parquet"
        target.write_bytes(target.read_bytes() + b"x")
        assert table_sha256(path) != before


def test_what_is_no_table_or_several_is_named(tmp_path: Path) -> None:
    def refused(path: Path, match: str) -> None:
        with pytest.raises(InputError, match=match):
            read_table(path)

    splits = datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS), "train": datasets.Dataset.from_list(ROWS)})
    splits.save_to_disk(str(tmp_path / "splits"))
    assert is_table_folder(tmp_path / "splits")
    refused(tmp_path / "splits", r"has the splits test, train; name one: .*splits/test")
    assert len(read_table(tmp_path / "splits" / "train")) == 3
    shards(tmp_path / "data" / "test")
    frame().to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    refused(tmp_path / "data", "holds several tables, test, train; name one of them")
    assert len(read_table(tmp_path / "data" / "test")) == 3
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no table; expected .parquet,")
    for name, content in (("a.json", '{"a": 1}'), ("b.json", "[1]"), ("c.json", '{"a": 1}\n[2]'), ("d.json", "{")):
        refused(text(tmp_path / name, content), rf"{name} is not a readable json table")
    refused(text(tmp_path / "deep.json", "[" * 100_000), "it nests too deep")
    refused(text(tmp_path / "e.arrow", "no"), "e.arrow is not a readable arrow table")
    (tmp_path / "saved").mkdir()
    refused(text(tmp_path / "saved" / "state.json", "{}").parent, "saved is not a data set of datasets")


@pytest.mark.parametrize(("name", "tab"), [("a.csv", ","), ("a.tsv", "\t")])
@pytest.mark.parametrize("rows", [["one, two"], ["one, two", "three"], ["one,"]])
def test_a_text_that_is_not_quoted_shifts_no_cell(tmp_path: Path, name: str, tab: str, rows: list[str]) -> None:
    lines = ["text,answer", *(f"{row},05" for row in rows)]
    with pytest.raises(InputError, match="rows have more than the 2 cells of the header; quote texts"):
        read_table(text(tmp_path / name, "\n".join(lines).replace(",", tab)))
    quoted = ["text,answer", *(f'"{row}",05' for row in rows)]
    frame = read_table(text(tmp_path / name, "\n".join(quoted).replace(",", tab)))
    assert frame["text"].tolist() == [row.replace(",", tab) for row in rows]
    assert frame["answer"].tolist() == ["05"] * len(rows)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.arrow", "a.parquet"])
def test_a_column_that_comes_twice_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("sv"):
        text(path, "prompt,correct,correct\n1,0,1\n".replace(",", "," if name == "a.csv" else "\t"))
    else:
        table = pa.table([["1"], [0], [1]], names=["prompt", "correct", "correct"])
        if name == "a.parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_file(path, table.schema) as sink:
                sink.write_table(table)
    with pytest.raises(
        InputError, match=r"is not a readable .* table .*it has the column 'correct' 2 times"
    ) as refused:
        read_table(path)
    assert str(refused.value).count("\n") == 0


def test_the_index_that_pandas_wrote_is_a_column_where_it_has_a_name(tmp_path: Path) -> None:
    frame = pd.DataFrame({"prompt_id": ["a", "b"], "text": ["x", "y"]})
    frame.set_index("prompt_id").to_parquet(tmp_path / "named.parquet")
    assert read_table(tmp_path / "named.parquet").to_dict("list") == frame.to_dict("list")
    frame.set_index(pd.Index([7, 9])).to_parquet(tmp_path / "numbered.parquet")
    assert read_table(tmp_path / "numbered.parquet").to_dict("list") == frame.to_dict("list")
    frame.rename_axis("text").to_parquet(tmp_path / "both.parquet")
    with pytest.raises(InputError, match=r"both.parquet is not a readable parquet table .*text"):
        read_table(tmp_path / "both.parquet")


@pytest.mark.parametrize(
    ("name", "rows", "where"),
    [
        ("a.jsonl", '{"text": "a", "answer": "1"}\n{"text": "a", "answer": "1", "answer": "2"}', "line 2: "),
        ("a.json", '{"text": "a", "answer": "1"}\n{"text": "a", "answer": "1", "answer": "2"}', "line 2: "),
        ("a.json", '[{"text": "a", "answer": "1", "answer": "2"}]', ""),
        ("a.json", '[{"text": {"answer": "1", "answer": "2"}}]', ""),
    ],
)
def test_a_name_that_an_object_has_twice_is_refused(tmp_path: Path, name: str, rows: str, where: str) -> None:
    with pytest.raises(InputError, match=rf"\({where}an object has 'answer' 2 times; keep one\)"):
        read_table(text(tmp_path / name, rows))


def test_columns_without_a_name_may_be_several(tmp_path: Path) -> None:
    """Index columns of other programs."""
    assert read_table(text(tmp_path / "a.csv", ",,answer\n0,0,05\n"))["answer"].tolist() == ["05"]


def test_a_header_alone_is_a_table_without_rows(tmp_path: Path) -> None:
    frame = read_table(text(tmp_path / "a.csv", "text,answer\n"))
    assert (list(frame.columns), len(frame)) == (["text", "answer"], 0)
