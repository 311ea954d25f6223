"""Graded completions from tables, studies and the logs of evaluation frameworks, in the shapes these are written in."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from click.testing import CliRunner

from rlgen_stats.cli import main
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.stores import Provenance, append_model
from rlgen_stats.toolkit.exchange import read_graded
from rlgen_stats.toolkit.statistics import Simulation, compare_outcomes, simulate_features

RIGHT = [1, 0, 1, 1, 0, 0, 1, 0]


def lm_eval_sample(i: int, right: float, metric: str = "exact_match", **changes: Any) -> dict[str, Any]:
    """One line of what ``lm_eval --log_samples`` writes."""
    text = f"question {i} \u2028 with a line separator"
    return {
        "doc_id": i,
        "doc": {"question": text, "passage_id": i // 2},
        "target": "4",
        "arguments": {"gen_args_0": {"arg_0": text, "arg_1": {"until": ["\n"]}}},
        "resps": [["4"]],
        "filtered_resps": ["4"],
        "filter": "none",
        "metrics": [metric],
        "doc_hash": f"hash of {i}",
        "prompt_hash": "x",
        "target_hash": "y",
        metric: right,
    } | changes


def write_lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def inspect_sample(i: int, value: Any, epoch: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "id": i,
        "epoch": epoch,
        "input": f"question {i}",
        "target": "4",
        "metadata": {"topic": f"t{i // 2}"},
        "scores": {"match": {"value": value, "answer": "4"}},
    } | changes


def eval_archive(file: Path, samples: list[dict[str, Any]], *, task: str = "sums", summaries: bool = True) -> Path:
    with zipfile.ZipFile(file, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("_journal/start.json", json.dumps({"version": 2, "eval": {"task": task}, "plan": {}}))
        for sample in samples:
            archive.writestr(f"samples/{sample['id']}_epoch_{sample['epoch']}.json", json.dumps(sample))
        if summaries:
            archive.writestr("summaries.json", json.dumps(samples))
            archive.writestr("header.json", json.dumps({"version": 2, "status": "success", "eval": {"task": task}}))
    return file


def test_lm_eval_samples(tmp_path):
    file = write_lines(
        tmp_path / "samples_gsm8k_2025-01-02T03-04-05.678901.jsonl",
        [lm_eval_sample(i, float(r)) for i, r in enumerate(RIGHT)],
    )
    got = read_graded(file, cluster="doc.passage_id")
    assert got.correct.tolist() == RIGHT
    assert got.prompt.tolist() == [str(i) for i in range(8)]
    assert set(got.task) == {"gsm8k"}
    assert set(got.metric) == {"exact_match,none"}
    assert got.cluster.tolist() == ["0", "0", "1", "1", "2", "2", "3", "3"]
    assert got.content[3] == "hash of 3"
    assert read_graded(tmp_path).equals(got.drop(columns="cluster"))


def test_lm_eval_filters_and_metrics_must_be_named(tmp_path):
    rows = [
        lm_eval_sample(i, r * strict, filter=name)
        for i, r in enumerate(RIGHT)
        for name, strict in (("strict-match", i % 4 == 0), ("flexible-extract", 1))
    ]
    file = write_lines(tmp_path / "samples_gsm8k_2025-01-02T03-04-05.jsonl", rows)
    with pytest.raises(InputError, match=r"graded by exact_match,strict-match, exact_match,flexible-extract; name one"):
        read_graded(file)
    with pytest.raises(InputError, match=r"graded by exact_match,strict-match, exact_match,flexible-extract; name one"):
        read_graded(file, metric="exact_match")
    assert read_graded(file, metric="exact_match,flexible-extract").correct.tolist() == RIGHT
    assert read_graded(file, metric="exact_match,strict-match").correct.sum() == 1
    with pytest.raises(InputError, match=r"none of the metrics acc; it has exact_match,strict-match, exact"):
        read_graded(file, metric="acc")


def test_lm_eval_folder_of_several_tasks(tmp_path):
    """Multiple choice has acc and acc_norm; generation has exact_match; perplexities are no scores."""
    folder = tmp_path / "out" / "org__model"
    choice = {"metrics": ["acc", "acc_norm", "bits"], "acc_norm": 0.0, "bits": [-3.1, 12]}
    write_lines(folder / "samples_arc_2025-01-02T03-04-05.jsonl", [lm_eval_sample(0, 1.0, "acc", **choice)])
    write_lines(folder / "samples_gsm8k_2025-01-02T03-04-05.jsonl", [lm_eval_sample(0, 0.0)])
    (folder / "results_2025-01-02T03-04-05.json").write_text("{}")
    with pytest.raises(InputError, match=r"task 'arc' of .* is graded by acc,none, acc_norm,none; name one"):
        read_graded(tmp_path / "out")
    got = read_graded(tmp_path / "out", metric=["acc", "exact_match"])
    assert got.set_index("task").correct.to_dict() == {"arc": 1.0, "gsm8k": 0.0}
    write_lines(folder / "samples_gsm8k_2025-03-02T03-04-05.jsonl", [lm_eval_sample(0, 1.0)])
    with pytest.raises(InputError, match="has the task 'gsm8k' twice, in samples_gsm8k_2025-01"):
        read_graded(tmp_path / "out", metric=["acc", "exact_match"])


def test_lm_eval_of_other_releases(tmp_path):
    """Without filter and list of metrics; and all tasks in one JSON file."""
    rows = [lm_eval_sample(i, bool(r)) for i, r in enumerate(RIGHT)]
    old = [{k: v for k, v in row.items() if k not in ("filter", "metrics", "doc_hash")} for row in rows]
    file = write_lines(tmp_path / "model_gsm8k.jsonl", old)
    got = read_graded(file)
    assert got.correct.tolist() == RIGHT
    assert set(got.task) == {"all"}
    assert set(got.metric) == {"exact_match"}
    assert "content" not in got
    (tmp_path / "results.json").write_text(json.dumps({"results": {}, "samples": {"gsm8k": rows}}))
    assert read_graded(tmp_path / "results.json").correct.tolist() == RIGHT


@pytest.mark.parametrize("summaries", [True, False])
def test_inspect_archives(tmp_path, summaries):
    samples = [inspect_sample(i, "C" if r else "I", epoch) for epoch in (1, 2) for i, r in enumerate(RIGHT)]
    samples[0]["scores"]["match"]["value"] = "P"
    samples[1] |= {"scores": None, "error": "timed out"}
    got = read_graded(eval_archive(tmp_path / "x.eval", samples, summaries=summaries), cluster="metadata.topic")
    got = got.sort_values(["sample", "prompt"]).reset_index(drop=True)
    assert got["sample"].tolist() == [1] * 8 + [2] * 8
    assert got.correct[8:].tolist() == RIGHT
    assert got.correct[0] == 0.5
    assert np.isnan(got.correct[1])
    assert set(got.task) == {"sums"}
    assert got.cluster[:4].tolist() == ["t0", "t0", "t1", "t1"]
    assert got.content.nunique() == 8


def test_inspect_archive_compressed_with_zstandard(tmp_path):
    """As Inspect writes since 2026; made here from an archive of stored entries whose content is packed already."""
    file = tmp_path / "z.eval"
    contents = {"header.json": {"eval": {"task": "sums"}}, "summaries.json": [inspect_sample(i, 1) for i in range(50)]}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, pa.Codec("zstd").compress(json.dumps(content).encode(), asbytes=True))
        directory = archive.start_dir
    raw = bytearray(file.read_bytes())
    at = raw.index(b"PK\x01\x02", directory)
    while at >= 0:
        struct.pack_into("<H", raw, at + 10, 93)
        struct.pack_into("<H", raw, struct.unpack_from("<I", raw, at + 42)[0] + 8, 93)
        at = raw.find(b"PK\x01\x02", at + 1)
    file.write_bytes(raw)
    with zipfile.ZipFile(file) as archive:
        assert {entry.compress_type for entry in archive.infolist()} == {93}
    assert read_graded(file).correct.tolist() == [1] * 50


def test_a_summary_that_cuts_a_long_prompt_pairs_with_the_whole_one(tmp_path):
    """Summaries keep 5,120 characters; an unfinished log has none and is read from its samples."""
    whole = [inspect_sample(i, "C", input=f"{i}\n\n" + "word " * 3000) for i in range(8)]
    cut = [sample | {"input": sample["input"][:5117] + "..."} for sample in whole]
    a = read_graded(eval_archive(tmp_path / "a.eval", whole, summaries=False))
    b = read_graded(eval_archive(tmp_path / "b.eval", cut))
    assert int(compare_outcomes(a, b).n_prompts.item()) == 8
    others = [sample | {"input": "other " + sample["input"]} for sample in whole]
    with pytest.raises(InputError, match="8 prompts have another content"):
        compare_outcomes(a, read_graded(eval_archive(tmp_path / "c.eval", others)))


def test_inspect_json_values_and_scorers(tmp_path):
    values = ["C", "I", "N", "P", True, 0, 0.25, "yes", "False", "0.75", float("nan")]
    samples = [inspect_sample(i, value) for i, value in enumerate(values)]
    content = {"version": 2, "status": "success", "eval": {"task": "sums", "model": "m"}, "samples": samples}
    file = tmp_path / "x.json"
    file.write_text(json.dumps(content))
    got = read_graded(file).correct.tolist()
    assert got[:-1] == [1, 0, 0, 0.5, 1, 0, 0.25, 1, 0, 0.75]
    assert np.isnan(got[-1])
    for sample in samples:
        sample["scores"]["judge"] = {"value": {"clear": 1, "kind": 0}}
        sample["scores"]["essay"] = {"value": "words"}
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="graded by match, judge/clear, judge/kind; name one"):
        read_graded(file)
    assert read_graded(file, metric="judge/clear").correct.tolist() == [1] * 11
    with pytest.raises(InputError, match="has the score 'words'"):
        compare_outcomes(*[read_graded(file, metric="essay")] * 2)
    for sample in samples:
        sample["score"] = sample.pop("scores")["match"]
    file.write_text(json.dumps(content))
    assert set(read_graded(file).metric) == {"score"}


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_tables(tmp_path, kind):
    table = pd.DataFrame({"prompt": ["01", "02"], "correct": [True, False], "strict": [0, 1], "cluster": ["a", "a"]})
    file = tmp_path / f"t.{kind}"
    {
        "csv": lambda: table.to_csv(file, index=False),
        "parquet": lambda: table.to_parquet(file),
        "jsonl": lambda: table.to_json(file, orient="records", lines=True),
    }[kind]()
    got = read_graded(file)
    assert got.prompt.tolist() == ["01", "02"]
    assert [float(value) for value in got.correct] == [1, 0]
    assert got.cluster.tolist() == ["a", "a"]
    assert [float(value) for value in read_graded(file, metric="strict").correct] == [0, 1]
    assert compare_outcomes(got, got).attrs["unit"] == "cluster"
    with pytest.raises(InputError, match=r"lacks the column 'acc'; it has prompt, correct, strict, cluster"):
        read_graded(file, metric="acc")


def test_a_file_without_a_header_is_empty(tmp_path: Path) -> None:
    (tmp_path / "t.csv").touch()
    with pytest.raises(InputError, match=r"t.csv is empty; expected the columns prompt and correct"):
        read_graded(tmp_path / "t.csv")


@pytest.fixture
def study(tmp_path) -> Path:
    plan = Simulation(n_prompts=24, n_features=8, samples=3, cluster_size=2, runs=1, checkpoints=1, gain=0.5)
    outcomes = simulate_features(plan).outcomes.load()
    outcomes["correct"][0, 0, 0] = -1
    for i in range(outcomes.sizes["model"]):
        one = outcomes.isel(model=[i])
        append_model(tmp_path / "study" / "outcomes.zarr", "outcomes", one, provenance=Provenance("s", "h", {}))
    return tmp_path / "study"


def test_studies(study):
    got = read_graded(study, model="base@0", metric="sampled")
    assert len(got) == 72
    assert np.isnan(got.correct[0])
    assert got.groupby("prompt").cluster.nunique().eq(1).all()
    assert len(read_graded(study / "outcomes.zarr", model="rl1@20", metric="greedy")) == 24
    last = read_graded(study, model="rl1@final", metric="greedy")
    pd.testing.assert_frame_equal(last, read_graded(study, model="rl1@20", metric="greedy"))
    with pytest.raises(InputError, match=r"holds the models base@0, .*, got 'rl@20'"):
        read_graded(study, model="rl@20", metric="greedy")
    with pytest.raises(InputError, match="is graded by greedy, sampled; name one"):
        read_graded(study, model="rl1@20")


def test_what_is_no_source(tmp_path):
    for name, text, message in (
        ("a.json", "[1]", r"not a readable json table \(expected a list of objects"),
        ("b.json", "{", r"b.json cannot be read \(JSONDecodeError"),
        ("c.eval", "no archive", r"c.eval cannot be read \(BadZipFile"),
        ("d.txt", "x", r"tables are .*\.jsonl, .* files, got '.txt'"),
        ("e.jsonl", '{"doc_id": 1, "resps": []}\n{"resps": []}\n', r"e.jsonl cannot be read \(KeyError: 'doc_id'\)"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=message):
            read_graded(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no graded completions; expected a study"):
        read_graded(tmp_path / "empty")
    with pytest.raises(InputError, match="there is nothing at"):
        read_graded(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is no study, so it has no model 'rl@1'"):
        read_graded(tmp_path / "empty", model="rl@1")
    with zipfile.ZipFile(tmp_path / "f.eval", "w") as archive:
        archive.writestr("x", "")
    with pytest.raises(InputError, match=r"is no log of Inspect: it lacks header\.json"):
        read_graded(tmp_path / "f.eval")
    file = write_lines(tmp_path / "samples_a.jsonl", [lm_eval_sample(0, 1.0)])
    with pytest.raises(InputError, match=r"a sample of task 'a' in .* has no 'doc.topic'; name a field"):
        read_graded(file, cluster="doc.topic")


def run(*arguments: Any) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["compare-outcomes", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_command_on_logs(tmp_path):
    """Planted: base wins 33 prompts, rl 59 (docs/method.md O8)."""
    base, rl = [1] * 33 + [0] * 59 + [1] * 10, [0] * 33 + [1] * 59 + [1] * 10
    for name, right in (("base", base), ("rl", rl)):
        rows = [lm_eval_sample(i, float(r)) for i, r in enumerate(right)]
        write_lines(tmp_path / name / "samples_gsm8k_2025-01-02T03-04-05.jsonl", rows)
        eval_archive(tmp_path / f"{name}.eval", [inspect_sample(i, "C" if r else "I") for i, r in enumerate(right)])
    for ending in ("", ".eval"):
        code, out, _ = run(tmp_path / f"base{ending}", tmp_path / f"rl{ending}")
        assert code == 0
        assert "42.2%" in out
        assert "67.6%" in out
        assert "0.009" in out
        assert "exact McNemar" in out
        code, out, _ = run(tmp_path / f"base{ending}", tmp_path / f"rl{ending}", "--json")
        data = json.loads(out)
        assert data["p_value"]["data"] == [pytest.approx(0.00878093080698)]
        assert (data["a_better"]["data"], data["b_better"]["data"]) == ([33], [59])
    write_lines(
        tmp_path / "other" / "samples_gsm8k_2025-01-02T03-04-05.jsonl",
        [lm_eval_sample(i, 1.0, doc_hash="of another release") for i in range(102)],
    )
    code, _, err = run(tmp_path / "base", tmp_path / "other")
    assert code == 2
    assert "102 prompts have another content in" in err


def test_command_on_a_study(study):
    code, out, _ = run(f"{study}:base@0", f"{study}:rl1@20", "--metric", "sampled")
    assert code == 0
    assert "graded by sampled; 95% intervals over clusters" in out
    assert "Left out, completions without a score: 1 of A (e.g. '" in out
    assert "), 0 of B." in out
    assert "pass@k" in out
    code, _, err = run(f"{study}:base@0", f"{study}:rl@20", "--metric", "greedy")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "holds the models" in err


def test_command_says_what_does_not_pair(tmp_path):
    for name, n in (("a", 10), ("b", 13)):
        pd.DataFrame({"prompt": range(n), "correct": [1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 1, 1][:n]}).to_csv(
            tmp_path / f"{name}.csv", index=False
        )
    code, _, err = run(tmp_path / "a.csv", tmp_path / "b.csv")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "10 prompts pair, 0 are graded only in" in err
    code, out, _ = run(tmp_path / "a.csv", tmp_path / "b.csv", "--common")
    assert code == 0
    assert "Left out, graded in one only: 0 prompts of A, 3 of B." in out
