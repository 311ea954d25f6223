"""Label tables: the same from parquet and csv, ids as text, and every fault named."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.exchange import read_labels
from tests.exchange.conftest import label_table


def write(table: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix in (".jsonl", ".json"):
        table.to_json(path, orient="records", lines=path.suffix == ".jsonl")
    elif path.name == "saved":
        datasets.Dataset.from_pandas(table).save_to_disk(str(path))
    else:
        table.to_csv(path, index=False, sep="\t" if ".tsv" in path.name else ",")
    return path


KINDS = [f"labels.{kind}" for kind in ("parquet", "csv", "csv.gz", "tsv", "tsv.gz", "jsonl", "json")]


@pytest.mark.parametrize("name", [*KINDS, "saved"])
def test_tokens_and_prompts_come_back_from_every_kind_of_table(tmp_path: Path, name: str) -> None:
    table = label_table()
    tokens, prompts = read_labels(write(table[sorted(table.columns)], tmp_path / name))
    assert list(tokens.columns) == ["prompt", "source", "position", "token_id", "segment"]
    for column in tokens:
        np.testing.assert_array_equal(tokens[column].to_numpy(), table[column].to_numpy())
    expected = table.drop_duplicates("prompt")[["prompt", "task", "domain", "split", "cluster"]]
    assert prompts.to_numpy().tolist() == expected.to_numpy().tolist()
    assert list(prompts.columns) == list(expected.columns)
    assert prompts["prompt"][7] == "007"


@pytest.mark.parametrize("name", ["labels.parquet", "labels.csv", "labels.jsonl"])
def test_source_is_optional_and_numbers_become_text(tmp_path: Path, name: str) -> None:
    table = label_table().drop(columns="source").assign(prompt=lambda t: t["prompt"].astype(int))
    tokens, prompts = read_labels(write(table, tmp_path / name))
    assert set(tokens["source"]) == {"imported"}
    assert prompts["prompt"].tolist() == [str(i) for i in range(30)]
    assert tokens["prompt"].iloc[-1] == "29"


def test_prompts_keep_the_order_of_first_appearance(tmp_path: Path) -> None:
    table = label_table()
    table = pd.concat([table[400:], table[:400]], ignore_index=True)
    _, prompts = read_labels(write(table, tmp_path / "labels.parquet"))
    assert prompts["prompt"].tolist() == list(dict.fromkeys(table["prompt"]))
    assert prompts["task"].tolist() == ["math" if int(p) % 2 else "sciq" for p in prompts["prompt"]]


def test_words_for_nothing_are_names(tmp_path: Path) -> None:
    table = label_table(80).assign(prompt=["NA"] * 40 + ["null"] * 40)
    assert read_labels(write(table, tmp_path / "labels.csv"))[1]["prompt"].tolist() == ["NA", "null"]


@pytest.mark.parametrize("name", ["labels.parquet", "labels.csv"])
def test_unknown_columns_are_refused_unless_ignored(tmp_path: Path, name: str) -> None:
    path = write(label_table().assign(text="a", more=1), tmp_path / name)
    with pytest.raises(InputError, match=r"has the unknown column\(s\) 'text', 'more'; expected prompt, .*--ignore"):
        read_labels(path)
    with pytest.raises(InputError, match=r"has the unknown column\(s\) 'more';"):
        read_labels(path, ignore=["text"])
    tokens, _ = read_labels(path, ignore=["text", "more", "source"])
    assert set(tokens["source"]) == {"imported"}
    with pytest.raises(InputError, match="has no column 'typo' to ignore; it has prompt,"):
        read_labels(path, ignore=["typo"])


def change(column: str, row: int, value: Any) -> pd.DataFrame:
    table = label_table()
    table[column] = table[column].astype(object)
    table.loc[row, column] = value
    return table if isinstance(value, str) or value is None else table.infer_objects()


@pytest.mark.parametrize("name", ["labels.parquet", "labels.csv"])
@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            label_table().drop(columns=["task", "position"]),
            r"lacks the column\(s\) position, task; expected prompt, pos",
        ),
        (label_table()[:0], "has no rows; expected one a token"),
        (change("segment", 5, None), "has no segment in row 5; every token needs every label"),
        (change("token_id", 5, None), "has no token_id in row 5; every token needs every label"),
        (change("position", 5, 1.5), "position in labels.* must be integers, got float64"),
        (change("position", 5, -1), "position in labels.* must lie in 0 to 2147483647, got -1"),
        (change("token_id", 5, 2**31), "token_id in labels.* must lie in 0 to 2147483647, got 2147483648"),
        (change("cluster", 5, "c0\0"), r"cluster 'c0\\x00' holds a NUL character; expected plain text"),
        (change("domain", 5, "inside"), "domain in labels.* must be in or out, got 'inside'"),
        (change("split", 5, "test"), "split in labels.* must be selection or verification or trial, got 'test'"),
        (
            change("task", 5, "math"),
            "prompt '000' of labels.* has the task 'sciq' and, in row 5, 'math'; expected one task a prompt",
        ),
        (
            change("domain", 45, "out"),
            "prompt '001' of labels.* has the domain 'in' and, in row 45, 'out'; expected one",
        ),
        (
            change("split", 45, "verification"),
            "prompt '001' .* has the split 'selection' and, in row 45, 'verification'",
        ),
        (
            change("cluster", 45, "c9"),
            "prompt '001' of labels.* has the cluster 'c0' and, in row 45, 'c9'; expected on",
        ),
    ],
)
def test_wrong_tables_are_refused_in_one_sentence(tmp_path: Path, name: str, table: pd.DataFrame, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_labels(write(table, tmp_path / name))


@pytest.mark.parametrize("column", ["prompt", "segment", "cluster"])
@pytest.mark.parametrize(
    ("cell", "kind"), [(["p0"], "list<.*string>"), ({"id": "p0"}, "struct<id: string>"), (b"p0", "binary")]
)
def test_cells_that_are_no_text_are_refused(tmp_path: Path, column: str, cell: Any, kind: str) -> None:
    table = label_table()
    table[column] = pd.Series([cell] * len(table), dtype=object)
    with pytest.raises(InputError, match=rf"holds {kind} in the column '{column}', expected text or numbers"):
        read_labels(write(table, tmp_path / "labels.parquet"))


def test_whole_numbers_have_no_decimal_point(tmp_path: Path) -> None:
    table = label_table()
    _, prompts = read_labels(write(table.assign(cluster=7.0), tmp_path / "labels.parquet"))
    assert set(prompts["cluster"]) == {"7"}


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no label table at .*nowhere\.csv; expected a \.parquet"):
        read_labels(tmp_path / "nowhere.csv")
    with pytest.raises(InputError, match="label tables are read from local files, got memory://x"):
        read_labels("memory://x.csv")
    for name, content, message in (
        ("labels.json", b"{}", r"labels\.json is not a readable json table \(expected a list of objects"),
        ("labels.pkl", b"x", r"labels\.pkl: tables are \.parquet, \.csv, .* files, got '\.pkl'"),
        ("labels.parquet", b"PAR1 no", r"labels\.parquet cannot be read as parquet \(.*\); write it again"),
        ("labels.csv", b"", r"labels\.csv cannot be read as csv \(.*\); write it again"),
        ("labels.csv", b"\xff\xfe\x00", r"labels\.csv cannot be read as csv"),
        ("labels.csv.gz", b"no gzip", r"labels\.csv\.gz cannot be read as gz"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_labels(tmp_path / name)


def test_a_column_that_comes_twice_is_refused(tmp_path: Path) -> None:
    table = label_table()
    table.assign(again=table["task"]).rename(columns={"again": "task"}).to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(InputError, match="has the column 'task' twice; drop one"):
        read_labels(tmp_path / "labels.csv")


def test_an_index_left_in_the_file_is_an_unknown_column(tmp_path: Path) -> None:
    label_table().to_csv(tmp_path / "labels.csv")
    with pytest.raises(InputError, match=r"has the unknown column\(s\) '';"):
        read_labels(tmp_path / "labels.csv")


def positions(tmp_path: Path, *columns: list[Any]) -> Path:
    """Labels of one task: prompt, source, position and segment of each token."""
    names = ("prompt", "source", "position", "segment")
    table = pd.DataFrame(dict(zip(names, columns, strict=True)))
    fixed = {"token_id": 1, "task": "sum", "domain": "in", "split": "selection", "cluster": "c"}
    table.assign(**fixed).to_parquet(tmp_path / "labels.parquet")
    return tmp_path / "labels.parquet"


@pytest.mark.parametrize("position", [[3, 2, 1, 0], [0, 1, 1, 2], [0, 2, 1, 3], [5, 6, 2, 3]])
def test_positions_that_do_not_ascend_are_refused(tmp_path: Path, position: list[int]) -> None:
    file = positions(tmp_path, ["p"] * 4, ["a"] * 4, position, ["completion"] * 4)
    with pytest.raises(InputError, match=r"position of row \d in labels.parquet is \d after \d of the same text"):
        read_labels(file)


@pytest.mark.parametrize(
    ("prompt", "source", "position", "segment"),
    [
        ("pppp", "aaaa", [0, 1, 0, 1], "cccc"),  # the same prompt and source twice
        ("ppqq", "aaaa", [1, 2, 1, 2], "cccc"),  # texts without their first token
        ("pppp", "aabb", [1, 2, 1, 2], "cccc"),
        ("pppp", "aaaa", [7, 7, 0, 1], "ppcc"),  # padding has no place in a text
        ("pppp", "aaaa", [0, 1, 7, 7], "ccpp"),
    ],
)
def test_texts_begin_anew(tmp_path: Path, prompt: str, source: str, position: list[int], segment: str) -> None:
    words = {"p": "pad", "c": "completion"}
    file = positions(tmp_path, list(prompt), list(source), position, [words[letter] for letter in segment])
    assert list(read_labels(file)[0].position) == position
