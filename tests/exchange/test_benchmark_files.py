from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.exchange import benchmark_files
from rlgen_stats.toolkit.exchange.benchmark_files import read_benchmark
from rlgen_stats.toolkit.exchange.benchmark_layouts import BENCHMARKS
from tests.exchange.published_rows import LAYOUTS

ROWS = LAYOUTS["arc_challenge", "allenai/ai2_arc"]
ARC = BENCHMARKS["arc_challenge"]


def snapshot(folder: Path) -> Path:
    """A clone of a Hub repository: a folder a configuration, a file a split."""
    for config, rows in (("ARC-Challenge", ROWS), ("ARC-Easy", ROWS[:1])):
        (folder / config).mkdir(parents=True)
        pd.DataFrame(rows).to_parquet(folder / config / "test-00000-of-00001.parquet")
        pd.DataFrame(rows[:1]).to_parquet(folder / config / "train-00000-of-00001.parquet")
    return folder


def described_snapshot(folder: Path) -> Path:
    snapshot(folder)
    configs = [
        {"config_name": name, "data_files": [{"split": "test", "path": f"{name}/test-*"}]}
        for name in ("ARC-Challenge", "ARC-Easy")
    ]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    return folder


def saved(folder: Path) -> Path:
    datasets.DatasetDict(test=datasets.Dataset.from_list(ROWS)).save_to_disk(folder)
    return folder


def saved_split(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    return folder


def parquet(folder: Path) -> Path:
    pd.DataFrame(ROWS).to_parquet(folder.with_suffix(".parquet"))
    return folder.with_suffix(".parquet")


def jsonl(folder: Path) -> Path:
    folder.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder.with_suffix(".jsonl")


def json_list(folder: Path) -> Path:
    folder.with_suffix(".json").write_text(json.dumps(ROWS))
    return folder.with_suffix(".json")


@pytest.mark.parametrize("write", [snapshot, described_snapshot, saved, saved_split, parquet, jsonl, json_list])
def test_every_kind_of_file_gives_the_same_table(write: Any, tmp_path: Path) -> None:
    table = read_benchmark(ARC, str(write(tmp_path / "arc")))
    assert table.to_dict("records") == [
        {
            "prompt_id": "arc_challenge-Own_1",
            "text": "Which of these melts first in the sun?",
            "answer": "D",
            "choices": '["a brick", "a coin", "a spoon", "an ice cube"]',
            "cluster": "arc_challenge-Own_1",
        },
        {
            "prompt_id": "arc_challenge-Own_2",
            "text": "Which planet do we live on?",
            "answer": "C",
            "choices": '["Mars", "Venus", "Earth"]',
            "cluster": "arc_challenge-Own_2",
        },
    ]


def test_flat_layouts_may_be_csv(tmp_path: Path) -> None:
    file = tmp_path / "piqa.csv"
    pd.DataFrame(LAYOUTS["piqa", "ybisk/piqa"]).to_csv(file, index=False)
    assert list(read_benchmark(BENCHMARKS["piqa"], str(file))["answer"]) == ["A", "B"]


def as_jsonl(tmp_path: Path, name: str, layout: str, rows: Any = None) -> str:
    file = tmp_path / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows or LAYOUTS[name, layout]))
    return str(file)


def test_questions_on_one_passage_or_goal_share_a_cluster(tmp_path: Path) -> None:
    for name, layout in (("logiqa", "EleutherAI/logiqa"), ("piqa", "ybisk/piqa")):
        table = read_benchmark(BENCHMARKS[name], as_jsonl(tmp_path, name, layout))
        assert table["prompt_id"].is_unique
        assert list(table["cluster"]) == [table["prompt_id"][0]] * 2
    sciq = read_benchmark(BENCHMARKS["sciq"], as_jsonl(tmp_path, "sciq", "allenai/sciq"))
    assert list(sciq["cluster"]) == list(sciq["prompt_id"])
    assert list(sciq["text"]) == [
        "Iron is drawn to magnets.\nQuestion: What do magnets attract?",
        "Question: What do bees make?",
    ]


def test_ids_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    rows = LAYOUTS["logiqa", "EleutherAI/logiqa"]
    forward = read_benchmark(BENCHMARKS["logiqa"], as_jsonl(tmp_path, "logiqa", "", rows))
    backward = read_benchmark(BENCHMARKS["logiqa"], as_jsonl(tmp_path, "logiqa", "", rows[::-1]))
    assert list(forward["prompt_id"]) == list(backward["prompt_id"])[::-1]


def test_published_ids_that_repeat_are_not_used(tmp_path: Path) -> None:
    rows = [row | {"id": "same"} for row in ROWS] + [ROWS[0] | {"id": "same"}]
    ids = list(read_benchmark(ARC, as_jsonl(tmp_path, "arc", "", rows))["prompt_id"])
    assert len(set(ids)) == 3
    assert ids[2] == f"{ids[0]}-2"


def test_sources_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in (tmp_path / "none", "none/arc.jsonl", "./arc", "downloads", "downloads/tasks/arc"):
        with pytest.raises(InputError, match=r"no file or folder at .*; correct the path, or give a Hub id"):
            read_benchmark(ARC, str(missing))
    monkeypatch.setattr(benchmark_files, "_loaded", lambda *asked: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(InputError, match=r"no file or folder is at .*/downloads/arc, and on the Hub .* \(no route\)"):
        read_benchmark(ARC, "downloads/arc")  # it may be OWNER/NAME
    monkeypatch.undo()
    folder = saved(tmp_path / "arc")
    with pytest.raises(InputError, match=r"split 'dev' \(it has the splits test\); give .* another --split"):
        read_benchmark(ARC, str(folder), split="dev")
    with pytest.raises(InputError, match=r"split 'dev' \(Unknown split .dev.*\); give"):
        read_benchmark(ARC, str(snapshot(tmp_path / "hub")), split="dev")
    (tmp_path / "arc.txt").write_text("x")
    with pytest.raises(InputError, match=r"arc.txt: tables are \.parquet, .* got '\.txt'"):
        read_benchmark(ARC, str(tmp_path / "arc.txt"))
    (tmp_path / "one.json").write_text("{}")
    with pytest.raises(InputError, match=r"one.json cannot be read .*expected a list of objects"):
        read_benchmark(ARC, str(tmp_path / "one.json"))
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"none.jsonl has no rows for arc_challenge"):
        read_benchmark(ARC, str(tmp_path / "none.jsonl"))
