"""Completions sampled elsewhere: every layout comes in as if sampled here, and what does not fit is refused."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner

from rlgen_stats.cli import main
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.stores import StudyFolder, open_outcomes, open_tokens, verify
from rlgen_stats.toolkit.exchange.sampled_files import read_sampled
from rlgen_stats.toolkit.extraction import completion_parts, read_completions
from rlgen_stats.toolkit.reporting.facts import _measurement_facts, read_study_data
from rlgen_stats.toolkit.study import open_for_run, read_spec, run_study
from rlgen_stats.toolkit.study.check_study import check_study
from rlgen_stats.toolkit.study.outcome_imports import ImportedOutcomes, import_outcomes
from tests.extraction.conftest import PROMPTS, prompt_table, save_model

DECLARED = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 6}
MODELS = ("base@0", "sft@3", "rl@4")
SPEC = {
    "name": "tiny",
    "seed": 7,
    "device": "cpu",
    "base": {"path": "models/base"},
    "runs": [
        {"name": "sft", "arm": "sft", "checkpoints": {3: "models/sft-3"}},
        {"name": "rl", "arm": "rl", "checkpoints": {4: "models/rl-4"}},
    ],
    "data": {"prompts": "data/prompts.parquet", "train": None},
    "generation": {"max_new_tokens": 6, "n_samples": 2, "batch_size": 12},
    "extraction": {"layer": 1},
    "crosscoders": [{"name": "main", "views": ["base@0", "sft@final", "rl@final"], "n_features": 64}],
}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of three models, sampled here."""
    root = tmp_path_factory.mktemp("imports") / "study"
    for seed, name in enumerate(("base", "sft-3", "rl-4")):
        save_model(root / "models" / name, seed)
    (root / "data").mkdir()
    prompt_table().to_parquet(root / "data/prompts.parquet")
    (root / "study.yaml").write_text(yaml.safe_dump(SPEC))
    run_study(root, stages=["outcomes"])
    return root


@pytest.fixture
def study(world: Path, tmp_path: Path) -> Path:
    """The same study, nothing sampled."""
    root = tmp_path / "study"
    shutil.copytree(world, root, ignore=shutil.ignore_patterns("outcomes.zarr", "completions", "outcomes.json"))
    return root


def take(study: Path, model: str, files: Any, **how: Any) -> ImportedOutcomes:
    """Import what this toolkit has sampled, so that it may stand beside models sampled here."""
    return import_outcomes(study, model, files, **{"engine": "here"} | how)


def rows_of(world: Path, model: str = "rl@4") -> list[dict[str, Any]]:
    """Completions sampled here, as rows of a table."""
    table = read_completions(StudyFolder(world), model)
    return [
        {"prompt_id": row.prompt, "sample": int(row.sample), "text": row.text, "token_ids": row.token_ids.tolist()}
        for row in table.itertuples()
    ]


def write_lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def nested(rows: list[dict[str, Any]], *, greedy: bool) -> list[dict[str, Any]]:
    """vLLM's request outputs: a line a prompt, its samples in order."""
    lines = []
    for prompt in dict.fromkeys(row["prompt_id"] for row in rows):
        chosen = [row for row in rows if row["prompt_id"] == prompt and (row["sample"] < 0) == greedy]
        outputs = [
            {"index": i, "text": row["text"], "token_ids": row["token_ids"], "finish_reason": reason(row)}
            for i, row in enumerate(chosen)
        ]
        lines.append({"prompt_id": prompt, "prompt": text_of(prompt), "outputs": outputs})
    return lines


def reason(row: dict[str, Any]) -> str:
    return "stop" if row["token_ids"][-1] == 1 else "length"


def text_of(prompt: str) -> str:
    return PROMPTS[int(prompt[1:])]


def as_table(world: Path, folder: Path) -> dict[str, Any]:
    file = folder / "rl.parquet"
    pd.DataFrame(rows_of(world)).to_parquet(file)
    return {"files": [file], "declared": DECLARED}


def as_tokens(world: Path, folder: Path) -> dict[str, Any]:
    rows = [{name: row[name] for name in ("prompt_id", "sample", "token_ids")} for row in rows_of(world)]
    return {"files": [write_lines(folder / "rl.jsonl", rows)], "declared": DECLARED}


def as_vllm(world: Path, folder: Path) -> dict[str, Any]:
    rows = rows_of(world)
    sampled = write_lines(folder / "sampled.jsonl", nested(rows, greedy=False))
    greedy = write_lines(folder / "greedy.jsonl", nested(rows, greedy=True))
    return {"files": [sampled], "greedy": [greedy], "declared": DECLARED}


def as_batch(world: Path, folder: Path) -> dict[str, Any]:
    """Responses of vLLM's batch runner: chat messages in choices, the prompt's id in custom_id."""
    files = {}
    for greedy in (False, True):
        lines = []
        for line in nested(rows_of(world), greedy=greedy):
            choices = [
                {"index": o["index"], "message": {"content": o["text"]}, "finish_reason": o["finish_reason"]}
                for o in line["outputs"]
            ]
            lines.append({"custom_id": line["prompt_id"], "response": {"body": {"choices": choices}}, "error": None})
        files[greedy] = write_lines(folder / f"{greedy}.jsonl", lines)
    return {"files": [files[False]], "greedy": [files[True]], "declared": DECLARED}


def as_sglang(world: Path, folder: Path) -> dict[str, Any]:
    files = {}
    for greedy in (False, True):
        rows = [row for row in rows_of(world) if (row["sample"] < 0) == greedy]
        lines = [
            {"prompt_id": row["prompt_id"], "text": row["text"], "output_ids": row["token_ids"]}
            | {"meta_info": {"finish_reason": {"type": reason(row)}}}
            for row in rows
        ]
        files[greedy] = write_lines(folder / f"{greedy}.jsonl", lines)
    return {"files": [files[False]], "greedy": [files[True]], "declared": DECLARED}


def as_verl(world: Path, folder: Path) -> dict[str, Any]:
    """verl knows no ids: prompts are found by their text, samples by their order."""
    files = {}
    for greedy in (False, True):
        rows = [row for row in rows_of(world) if (row["sample"] < 0) == greedy]
        lines = [
            {"input": text_of(row["prompt_id"]), "output": row["text"], "gts": "x", "score": 1.0, "step": 4}
            for row in rows
        ]
        files[greedy] = write_lines(folder / str(greedy) / "4.jsonl", lines)
    return {"files": [files[False]], "greedy": [files[True]], "declared": DECLARED}


def as_inspect(world: Path, folder: Path) -> dict[str, Any]:
    """Two logs of Inspect, whose record says how they were drawn; greedy is temperature 0."""
    files = []
    for greedy in (False, True):
        samples = [
            {
                "id": row["prompt_id"],
                "epoch": row["sample"] + 1 + greedy,
                "input": [{"role": "system", "content": "s"}, {"role": "user", "content": text_of(row["prompt_id"])}],
                "target": "x",
                "output": {
                    "choices": [
                        {
                            "message": {"content": [{"type": "reasoning", "reasoning": "h"}, part(row)]},
                            "stop_reason": {"stop": "stop", "length": "max_tokens"}[reason(row)],
                        }
                    ]
                },
                "scores": {"match": {"value": "C"}},
            }
            for row in rows_of(world)
            if (row["sample"] < 0) == greedy
        ]
        config = {"temperature": 0.0 if greedy else 1.0, "top_p": 1.0, "max_tokens": 6}
        content = {"eval": {"task": "sums"}, "plan": {"config": config}, "samples": samples}
        files.append(folder / f"{greedy}.json")
        files[-1].write_text(json.dumps(content))
    return {"files": files}


def part(row: dict[str, Any]) -> dict[str, str]:
    return {"type": "text", "text": row["text"]}


def as_lm_eval(world: Path, folder: Path) -> dict[str, Any]:
    """Every filter logs a document again; the greedy run and the sampled one are two files."""
    files = []
    for greedy in (False, True):
        lines = []
        settings = {"until": ["\n"], "max_gen_toks": 6, "do_sample": not greedy}
        settings |= {} if greedy else {"temperature": 1.0, "top_p": 1.0}
        for number, line in enumerate(nested(rows_of(world), greedy=greedy)):
            for name in ("strict-match", "flexible-extract"):
                lines.append(
                    {
                        "doc_id": number,
                        "doc": {},
                        "target": "x",
                        "arguments": {"gen_args_0": {"arg_0": line["prompt"], "arg_1": settings}},
                        "resps": [[output["text"] for output in line["outputs"]]],
                        "filtered_resps": ["x"],
                        "filter": name,
                        "metrics": ["exact_match"],
                        "exact_match": 1.0,
                        "doc_hash": f"{number}",
                    }
                )
        files.append(write_lines(folder / f"samples_sums{greedy}_2026-01-02T03-04-05.jsonl", lines))
    return {"files": files}


@pytest.mark.parametrize(
    ("layout", "engine", "own_tokens"),
    [
        (as_table, "table", True),
        (as_tokens, "table", True),
        pytest.param(as_vllm, "vllm", True, marks=pytest.mark.slow),
        (as_batch, "vllm", False),
        pytest.param(as_sglang, "sglang", True, marks=pytest.mark.slow),
        pytest.param(as_verl, "verl", False, marks=pytest.mark.slow),
        (as_inspect, "inspect", False),
        (as_lm_eval, "lm-eval", False),
    ],
)
def test_every_layout_gives_the_outcomes_of_sampling_here(
    world: Path,
    study: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: Any,
    engine: str,
    own_tokens: bool,
) -> None:
    (tmp_path / "files").mkdir()
    given = layout(world, tmp_path / "files")
    assert read_sampled([*given["files"], *given.get("greedy", ())]).engine == engine
    done = take(study, "rl@4", **given)
    assert (done.origin.engine, done.origin.graded_by, done.changed) == ("here", "here", True)
    sampled = []
    load = completion_parts.load_model
    monkeypatch.setattr(completion_parts, "load_model", lambda ref, **k: sampled.append(ref.model) or load(ref, **k))
    run_study(study, stages=["outcomes"])
    assert sampled == ["base@0", "sft@3"]
    got, expected = (open_outcomes(root / "outcomes.zarr").load() for root in (study, world))
    assert list(got.engine.values) == ["here"] * 3
    assert list(got.graded_by.values) == ["here"] * 3
    assert "engine" not in expected
    # a text alone lacks the special tokens of these random models: whether it was cut off is inferred from its length
    for name in ("answered", *(("correct", "greedy_correct", "terminated", "format_class") if own_tokens else ())):
        np.testing.assert_array_equal(got[name].values, expected[name].values)
    texts = [read_completions(StudyFolder(root), "rl@4") for root in (study, world)]
    assert list(texts[0].text) == list(texts[1].text)
    if own_tokens:
        assert texts[0].drop(columns="n_tokens").equals(texts[1].drop(columns="n_tokens"))
    else:
        assert all(ids[-1] == 1 for ids in texts[0].token_ids[texts[0].terminated & (engine != "lm-eval")])


def test_later_stages_read_imported_texts_and_the_store_is_sound(world: Path, study: Path, tmp_path: Path) -> None:
    """The text that all models read of an imported model is its first sample, token for token."""
    rows = rows_of(world)
    for row in rows:
        if row["sample"] == 0:
            row["token_ids"], row["text"] = [3, 5, 8, 1], None
    take(study, "rl@4", [write_lines(tmp_path / "rl.jsonl", rows)], declared=DECLARED)
    run_study(study, stages=["extract"])
    tokens = open_tokens(study / "activations.zarr")
    of_rl = tokens.token_id.values[(tokens.source.values == "rl@4") & (tokens.segment.values == "completion")]
    assert of_rl.tolist() == [3, 5, 8, 1] * 12
    assert verify(study / "outcomes.zarr").ok


def test_others_completions_stay_when_one_is_imported(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into a finished study: only with --yes, nothing is sampled again, and later stages know that it changed."""
    root = tmp_path / "study"
    shutil.copytree(world, root)
    before = open_for_run(root).key("extract")
    rows = [row | {"text": "so ans 3", "token_ids": None} for row in rows_of(world)]
    file = write_lines(tmp_path / "rl.jsonl", rows)
    with pytest.raises(InputError, match=r"has completions of rl@4, sampled here; they are kept: add --yes"):
        take(root, "rl@4", [file], declared=DECLARED)
    assert open_for_run(root).state("outcomes") == "done"
    assert not StudyFolder(root).imported.exists()
    asked: list[str] = []
    take(root, "rl@4", [file], declared=DECLARED, replace=lambda question: not asked.append(question))
    assert asked == ["completions of rl@4, sampled here, would be replaced, and what was computed from them anew"]
    after = open_for_run(root)
    assert after.state("outcomes") == "interrupted"
    assert after.key("extract") != before
    monkeypatch.setattr(completion_parts, "load_model", lambda *a, **k: pytest.fail("nothing is left to sample"))
    run_study(root, stages=["outcomes"])
    got, expected = (open_outcomes(one / "outcomes.zarr").load() for one in (root, world))
    for name in expected.data_vars:
        np.testing.assert_array_equal(got[name].values[:2], expected[name].values[:2])
    assert list(got.engine.values) == ["here"] * 3
    assert set(read_completions(StudyFolder(root), "rl@4").text) == {"so ans 3"}
    again = take(root, "rl@4", [file], declared=DECLARED)
    assert not again.changed
    assert open_for_run(root).state("outcomes") == "done"


def change(rows: list[dict[str, Any]], chosen: slice, **cells: Any) -> list[dict[str, Any]]:
    return [row | cells if row in rows[chosen] else row for row in rows]


@pytest.mark.parametrize(
    ("edit", "declared", "message"),
    [
        (
            lambda rows: [row for row in rows if row["prompt_id"] != "p11"],
            DECLARED,
            r"1 of the study's 12 prompts have no completion in the files, e.g. 'p",
        ),
        (
            lambda rows: [*rows, rows[0] | {"prompt_id": "q1"}],
            DECLARED,
            r"1 prompt\(s\) of the files are none of the study's, e.g. 'q1', whose ids look like 'p0'",
        ),
        (
            lambda rows: change(rows, slice(0, 1), prompt="what is 1"),
            DECLARED,
            r"prompt 'p0' had another text where it was sampled: 'what is 1' \(hash \w{12}\), here it is 'what is 0",
        ),
        (
            lambda rows: change(rows, slice(0, 1), token_ids=[3, 4]),
            DECLARED,
            r"tokens of a completion of prompt 'p0' are not of the study's tokenizer: they read 'ans plus', the file",
        ),
        (
            lambda rows: change(rows, slice(0, 1), token_ids=[99]),
            DECLARED,
            r"not of the study's tokenizer: token 99 is none of its 20",
        ),
        (
            lambda rows: change(rows, slice(0, 1), token_ids=[3] * 7, text=None),
            DECLARED,
            r"prompt 'p0' has 7 tokens, more than the limit of 6 .max_new_tokens",
        ),
        (
            lambda rows: [row for row in rows if row["sample"] >= 0],
            DECLARED,
            r"prompt 'p0' has 0 greedy and 2 sampled completions, expected 1 and 2 .*--greedy.*--no-greedy",
        ),
        (
            lambda rows: [row for row in rows if row["sample"] < 0],
            DECLARED,
            r"prompt 'p0' has 1 greedy and 0 sampled completions, expected 1 and 2 .*--no-samples",
        ),
        (
            lambda rows: [row for row in rows if row["sample"] < 1],
            DECLARED,
            r"has 1 greedy and 1 sampled completions, expected 1 and 2 .*set generation.n_samples",
        ),
        (lambda rows: [*rows, rows[0]], DECLARED, r"prompt 'p0' has its greedy completion twice \(1 such"),
        (lambda rows: [*rows, rows[12]], DECLARED, r"prompt 'p0' has its sample 0 twice"),
        (
            lambda rows: rows,
            {"temperature": 1.0},
            r"do not say with which top_p and max_new_tokens .*--top-p 1, --max-new-tokens 6",
        ),
        (lambda rows: rows, DECLARED | {"temperature": 0.7}, r"completed with temperature 0.7, expected 1, as"),
        (
            lambda rows: [row | {"temperature": 0.7, "top_p": 1.0} for row in rows],
            {"temperature": 1.0, "max_new_tokens": 6},
            r"was completed with temperature 0.7, expected 1, as of",
        ),
        (
            lambda rows: change(rows, slice(0, 1), correct=True),
            DECLARED,
            r"has no correct; expected a verdict of every completion, or of none",
        ),
        (
            lambda rows: [row | {"correct": 0.5} for row in rows],
            DECLARED,
            r"correct of .* must be true or false \(or 1, 0\), got 0.5",
        ),
        (
            lambda rows: [row | {"text": None, "token_ids": None} for row in rows],
            DECLARED,
            r"prompt 'p0' has neither text nor tokens nor a verdict",
        ),
        (
            lambda rows: [row | {"text": None, "token_ids": None, "correct": 1} for row in rows],
            DECLARED,
            r"is a verdict without its text, and all models read the texts of rl@4",
        ),
        (lambda rows: [{"input": 1}], DECLARED, r"1 prompt\(s\) of the files are none of the study's"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(
    world: Path, study: Path, tmp_path: Path, edit: Any, declared: Any, message: str
) -> None:
    file = write_lines(tmp_path / "rl.jsonl", edit(rows_of(world)))
    with pytest.raises(InputError, match=message) as error:
        take(study, "rl@4", [file], declared=declared)
    assert "\n" not in str(error.value)
    assert not StudyFolder(study).imported.exists()


def test_verdicts_that_come_along_are_kept_and_named(world: Path, study: Path, tmp_path: Path) -> None:
    rows = [row | {"correct": i % 2 == 0} for i, row in enumerate(rows_of(world))]
    done = take(study, "rl@4", [write_lines(tmp_path / "rl.jsonl", rows)], declared=DECLARED)
    assert done.origin.graded_by == "correct"
    run_study(study, stages=["outcomes"])
    stored = open_outcomes(study / "outcomes.zarr").load()
    verdicts = {(row["prompt_id"], row["sample"]): row["correct"] for row in rows}
    at = stored.sel(model="rl@4")
    for prompt in stored.prompt.values:
        assert at.greedy_correct.sel(prompt=prompt) == verdicts[prompt, -1]
        assert [bool(v) for v in at.correct.sel(prompt=prompt)] == [verdicts[prompt, s] for s in (0, 1)]
    assert list(stored.graded_by.values) == ["here", "here", "correct"]
    assert (at.format_class.values[at.correct.values == 1] == "answer").all()
    folder, spec = StudyFolder(study), read_spec(study)
    facts = {fact.question: fact.answer for fact in _measurement_facts(read_study_data(folder, spec), spec)}
    assert facts["Which engine sampled each model?"] == "rlgen-stats: base@0, sft@3 and rl@4."
    assert facts["What graded each model's answers?"] == "rlgen-stats: base@0 and sft@3; correct: rl@4."
    assert "Which completions were not drawn?" not in facts
    elsewhere = StudyFolder(world)
    assert not [
        fact for fact in _measurement_facts(read_study_data(elsewhere, spec), spec) if "engine" in fact.question
    ]


def test_verdicts_can_be_left_to_the_studys_graders(world: Path, study: Path, tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "rl.jsonl", [row | {"correct": True} for row in rows_of(world)])
    assert take(study, "rl@4", [rows], declared=DECLARED, grade_here=True).origin.graded_by == "here"
    assert pd.read_parquet(StudyFolder(study).imported / "rl@4.parquet").correct.isna().all()


def test_cells_of_a_csv_are_text_and_mean_the_same(world: Path, study: Path, tmp_path: Path) -> None:
    table = pd.DataFrame(rows_of(world))
    table = table.assign(token_ids=table.token_ids.map(json.dumps), terminated="False", max_tokens=6, temperature="1.0")
    table.assign(top_p=1, finish_reason="").to_csv(tmp_path / "rl.csv", index=False)
    done = take(study, "rl@4", [tmp_path / "rl.csv"])
    assert done.n_truncated == len(table)
    table.assign(top_p="", terminated="maybe").to_csv(tmp_path / "rl.csv", index=False)
    with pytest.raises(InputError, match=r"terminated of .*rl.csv must be true or false"):
        take(study, "rl@4", [tmp_path / "rl.csv"])


def lm_eval_choice(number: int, prompt: str, right: float) -> dict[str, Any]:
    """A multiple-choice document: a request a choice, each answered by its log-likelihood."""
    return {
        "doc_id": number,
        "doc": {},
        "target": "1",
        "arguments": {f"gen_args_{i}": {"arg_0": text_of(prompt), "arg_1": f" {i}"} for i in range(2)},
        "resps": [[["-3.1", "False"]], [["-2.0", "True"]]],
        "filtered_resps": [["-3.1", "False"], ["-2.0", "True"]],
        "filter": "none",
        "metrics": ["acc", "acc_norm"],
        "acc": right,
        "acc_norm": 1.0,
        "doc_hash": str(number),
    }


def test_choices_scored_by_log_likelihood_come_as_verdicts(study: Path, tmp_path: Path) -> None:
    """One verdict a document, greedy; of a model whose texts nobody reads."""
    spec = SPEC | {"runs": [*SPEC["runs"], {"name": "dpo", "arm": "dpo", "checkpoints": {2: "models/rl-4"}}]}
    (study / "study.yaml").write_text(yaml.safe_dump(spec))
    file = tmp_path / "samples_arc_2026-01-02T03-04-05.jsonl"
    ids = list(prompt_table().prompt_id)
    write_lines(file, [lm_eval_choice(i, prompt, float(i % 3 == 0)) for i, prompt in enumerate(ids)])
    options: dict[str, Any] = {"stand_in": "samples", "declared": {"max_new_tokens": 6}}
    with pytest.raises(InputError, match=r"neither text nor tokens nor a verdict; .* name the verdict with --metric"):
        take(study, "dpo@2", [file], **options)
    with pytest.raises(InputError, match=r"has none of the metrics f1, expected one; it has acc,none, acc"):
        take(study, "dpo@2", [file], metrics=["f1"], **options)
    with pytest.raises(InputError, match="is a verdict without its text, and all models read the texts of rl@4"):
        take(study, "rl@4", [file], metrics=["exact_match,none", "acc,none"], **options)
    done = take(study, "dpo@2", [file], metrics=["exact_match,none", "acc,none"], **options)
    assert done.n_truncated == 0
    assert done.origin.graded_by == "exact_match,none and acc,none"
    kept = pd.read_parquet(done.file).query("sample == -1").set_index("prompt")
    assert list(kept.correct[ids]) == [i % 3 == 0 for i in range(len(ids))]


def test_files_of_two_engines_and_of_none_are_refused(world: Path, study: Path, tmp_path: Path) -> None:
    (tmp_path / "verl").mkdir()
    verl = as_verl(world, tmp_path / "verl")["files"]
    table = as_table(world, tmp_path)["files"]
    with pytest.raises(InputError, match=r"the files are of verl and table \(4.jsonl, rl.parquet\); expected the"):
        take(study, "rl@4", [*verl, *table], declared=DECLARED)
    with pytest.raises(InputError, match=r"there is no file .*nothing\.jsonl"):
        take(study, "rl@4", [tmp_path / "nothing.jsonl"], declared=DECLARED)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(InputError, match=r"x\.json is not a readable json table"):
        take(study, "rl@4", [tmp_path / "x.json"], declared=DECLARED)
    two = write_lines(tmp_path / "5.jsonl", [{"input": "a", "output": "b", "score": 1, "step": i} for i in (4, 5)])
    with pytest.raises(InputError, match=r"holds rollouts of the steps \[4, 5\]; expected those of one model"):
        take(study, "rl@4", [two], declared=DECLARED)


def test_eval_files_are_read_by_inspect_itself(
    world: Path, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = as_inspect(world, tmp_path)
    contents = {f"{file.stem}.eval": json.loads(file.read_text()) for file in given["files"]}
    files = [tmp_path / name for name in contents]
    for file in files:
        file.touch()
    monkeypatch.setitem(sys.modules, "inspect_ai.log", None)
    with pytest.raises(InputError, match=r"needs Inspect, which is not installed; pip install inspect-ai, or write"):
        take(study, "rl@4", files)

    def read_eval_log(path: str, *, resolve_attachments: bool) -> SimpleNamespace:
        assert resolve_attachments
        return SimpleNamespace(model_dump=lambda mode: contents[Path(path).name])

    monkeypatch.setitem(sys.modules, "inspect_ai", ModuleType("inspect_ai"))
    monkeypatch.setitem(sys.modules, "inspect_ai.log", SimpleNamespace(read_eval_log=read_eval_log))
    assert import_outcomes(study, "rl@4", files).origin.engine == "inspect"
    graded = import_outcomes(study, "sft@3", files, metrics=["match"]).origin
    assert graded.graded_by == "match"


def test_limits_and_stop_strings_are_the_tasks(world: Path, study: Path, tmp_path: Path) -> None:
    rows = [row | {"text": "so ans 3", "token_ids": None, "max_new_tokens": 6} for row in rows_of(world)]
    of_sum = set(prompt_table().prompt_id[prompt_table().task == "sum"])

    def settings(**task: Any) -> None:
        (study / "study.yaml").write_text(yaml.safe_dump(SPEC | {"tasks": {"sum": task}}))

    declared = {"temperature": 1.0, "top_p": 1.0}
    settings(max_new_tokens=9)
    with pytest.raises(InputError, match=r"was completed with max_new_tokens 6, expected 9, as of the study's other"):
        take(study, "rl@4", [write_lines(tmp_path / "a.jsonl", rows)], declared=declared)
    own = [row | {"max_new_tokens": 9 if row["prompt_id"] in of_sum else 6} for row in rows]
    assert take(study, "rl@4", [write_lines(tmp_path / "b.jsonl", own)], declared=declared).changed
    settings(stop=["so"])
    with pytest.raises(InputError, match=r"goes on after the stop string 'so' of its task; sample with it, or cut"):
        take(study, "sft@3", [write_lines(tmp_path / "a.jsonl", rows)], declared=declared)
    settings(stop=["zz"])
    done = take(study, "sft@3", [write_lines(tmp_path / "a.jsonl", rows)], declared=declared)
    ends = pd.read_parquet(done.file).set_index("prompt").token_ids.map(lambda ids: ids[-1] == 1).groupby(level=0).all()
    assert {prompt for prompt, ended in ends.items() if not ended} == of_sum
    settings(grader={"name": "choice_loglik"}, choices="answers")
    prompt_table().assign(answers=[["0", "1"]] * 12).to_parquet(study / "data/prompts.parquet")
    with pytest.raises(InputError, match=r"task 'sum' is graded by the log-likelihood of its choices, which compl"):
        take(study, "base@0", [write_lines(tmp_path / "a.jsonl", rows)], declared=declared)


@pytest.mark.parametrize("kind", ["greedy", "samples"])
def test_what_was_not_drawn_is_stood_in_for_in_all_models_or_in_none(
    world: Path, study: Path, tmp_path: Path, kind: Any
) -> None:
    for model in MODELS:
        rows = [row for row in rows_of(world, model) if (row["sample"] < 0) == (kind == "samples")]
        file = write_lines(tmp_path / f"{model}.jsonl", rows)
        if model == "rl@4":
            message = r"sft@3 was imported without (greedy|sampled) completions, and rl@4 was not; expected the same"
            with pytest.raises(InputError, match=message.replace("sft@3", "base@0")):
                run_study(study, stages=["outcomes"])
        take(study, model, [file], declared=DECLARED, stand_in=kind)
    run_study(study, stages=["outcomes"])
    stored = open_outcomes(study / "outcomes.zarr").load()
    assert stored.sizes["sample"] == 2
    assert list(stored.stand_in.values) == [kind] * 3
    twin = stored.correct.isel(sample=0 if kind == "greedy" else 1)
    np.testing.assert_array_equal(stored.greedy_correct.values, twin.values)


def test_the_command_says_what_it_took(world: Path, study: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rl.jsonl", rows_of(world))
    options = ["--temperature", "1", "--top-p", "1", "--max-new-tokens", "6", "--engine", "vllm 1"]
    command = ["import-outcomes", str(study), str(file), "--model", "rl@4", *options]
    done = CliRunner().invoke(main, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "rl@4, 12 prompts, 1 greedy and 2 sampled completions of each, from vllm 1, to be graded" in done.output
    assert "To be imported from vllm 1 too, before 'run': base@0, sft@3." in done.output
    assert "nothing changed" in CliRunner().invoke(main, command).output
    write_lines(file, change(rows_of(world), slice(0, 1), text="3", token_ids=[11]))
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 2
    assert "completions of rl@4, imported before; they are kept: add --yes" in refused.output
    assert CliRunner().invoke(main, [*command, "--yes"]).exit_code == 0
    other = CliRunner().invoke(main, [*command, "--model", "rl@9"])
    assert other.exit_code == 2
    assert "no model is called 'rl@9'" in other.output


def test_a_study_may_be_named_by_a_relative_path(
    world: Path, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(study.parent)
    take(Path(study.name), "rl@4", **as_table(world, tmp_path))
    run_study(Path(study.name), stages=["outcomes"])
    assert open_outcomes(StudyFolder(study).outcomes).engine.sel(model="rl@4") == "here"
    assert {s.name: s.state for s in open_for_run(study).status()}["outcomes"] == "done"  # whatever the path is called


def test_one_engine_samples_all_models_of_a_study(
    world: Path, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused where models of two engines would be compared, before anything is sampled, and where one is imported."""
    files = {model: write_lines(tmp_path / f"{model}.jsonl", rows_of(world, model)) for model in MODELS}
    with pytest.raises(InputError, match=r"do not say what sampled them; expected one engine .* name it with --engine"):
        import_outcomes(study, "rl@4", [files["rl@4"]], declared=DECLARED)
    done = take(study, "rl@4", [files["rl@4"]], declared=DECLARED, engine="vllm 1")
    assert done.missing == ("base@0", "sft@3")
    monkeypatch.setattr(completion_parts, "load_model", lambda *a, **k: pytest.fail("nothing may be sampled here"))
    message = (
        r"^rl@4 was sampled by vllm 1 and base@0 here; expected one engine for all models of a study, which are all "
        r"compared with base: import base@0 of vllm 1 too \(export-requests writes what to run\), or delete "
        r"imported/rl@4.parquet\.$"
    )
    with pytest.raises(InputError, match=message):
        run_study(study, stages=["outcomes"])
    assert message[1:60] in " ".join(problem.message for problem in check_study(study).problems)
    with pytest.raises(
        InputError, match=r"rl@4 was sampled by vllm 1 and base@0 by vllm 2; .*: import base@0 of vllm 1"
    ):
        take(study, "base@0", [files["base@0"]], declared=DECLARED, engine="vllm 2")
    with pytest.raises(InputError, match="rl@4 was sampled by vllm 1 and base@0 here"):
        take(study, "base@0", [files["base@0"]], declared=DECLARED)
    for model in ("base@0", "sft@3"):
        done = take(study, model, [files[model]], declared=DECLARED, engine="vllm 1")
    assert done.missing == ()
    run_study(study, stages=["outcomes"])
    assert list(open_outcomes(study / "outcomes.zarr").engine.values) == ["vllm 1"] * 3
    spec = SPEC | {"runs": [*SPEC["runs"], {"name": "dpo", "arm": "dpo", "checkpoints": {2: "models/rl-4"}}]}
    (study / "study.yaml").write_text(yaml.safe_dump(spec))
    with pytest.raises(InputError, match="base@0 was sampled by vllm 1 and dpo@2 by vllm 2"):
        take(study, "dpo@2", [files["rl@4"]], declared=DECLARED, engine="vllm 2")
    (study / "study.yaml").write_text(yaml.safe_dump(SPEC))
    shutil.copy(study / "imported/rl@4.parquet", study / "imported/dpo@2.parquet")
    for model in MODELS:  # all are replaced, one after the other; dpo@2 is no model by now
        (study / f"imported/{model}.parquet").unlink()
    again = take(study, "rl@4", [files["rl@4"]], declared=DECLARED, engine="vllm 2", replace=lambda question: True)
    assert again.changed


def test_engines_are_read_from_the_rows(world: Path, study: Path, tmp_path: Path) -> None:
    rows = [row | {"engine": "vllm 0.11.0"} for row in rows_of(world)]
    file = write_lines(tmp_path / "rl.jsonl", rows)
    assert import_outcomes(study, "rl@4", [file], declared=DECLARED).origin.engine == "vllm 0.11.0"
    nested_rows = [line | {"engine": "vllm 0.11.0"} for line in nested(rows_of(world), greedy=False)]
    assert read_sampled([write_lines(tmp_path / "n.jsonl", nested_rows)]).engine == "vllm 0.11.0"
    write_lines(file, [*rows[:-1], rows[-1] | {"engine": "sglang"}])
    with pytest.raises(InputError, match=r"rl.jsonl has completions of sglang and vllm 0.11.0; expected those of one"):
        import_outcomes(study, "rl@4", [file], declared=DECLARED)


def test_tokens_of_the_stop_string_are_cut_as_here(world: Path, study: Path, tmp_path: Path) -> None:
    """Engines cut the stop string from the text and leave its tokens; this toolkit keeps neither."""
    settings = {"tasks": {task: {"stop": ["plus is"]} for task in ("sum", "other")}}
    (study / "study.yaml").write_text(yaml.safe_dump(SPEC | settings))
    ended = {"text": "so 3", "token_ids": [7, 11, 4, 6], "finish_reason": "stop"}  # so 3 plus is
    rows = [{"prompt_id": row["prompt_id"], "sample": row["sample"]} | ended for row in rows_of(world)]
    done = take(study, "rl@4", [write_lines(tmp_path / "rl.jsonl", rows)], declared=DECLARED)
    kept = pd.read_parquet(done.file)
    assert {(row.text, tuple(row.token_ids), row.terminated) for row in kept.itertuples()} == {
        ("so 3", (7, 11, 4), True)
    }
    onwards = [row | {"token_ids": [7, 11, 4, 6, 8]} for row in rows]
    with pytest.raises(InputError, match=r"they read 'so 3 plus is 0', the file says 'so 3'"):
        take(study, "rl@4", [write_lines(tmp_path / "rl.jsonl", onwards)], declared=DECLARED)
    without_text = [{name: value for name, value in row.items() if name != "text"} for row in onwards]
    with pytest.raises(InputError, match=r"goes on after the stop string 'plus is' of its task"):
        take(study, "rl@4", [write_lines(tmp_path / "rl.jsonl", without_text)], declared=DECLARED)


def test_a_stop_string_in_the_last_token_ends_a_completion(world: Path, study: Path, tmp_path: Path) -> None:
    tasks = {task: {"stop": ["is"]} for task in ("sum", "other")}
    (study / "study.yaml").write_text(yaml.safe_dump(SPEC | {"tasks": tasks}))
    rows = [
        {
            "prompt_id": row["prompt_id"],
            "sample": row["sample"],
            "token_ids": [7, 7, 7, 7, 4, 6 if row["sample"] else 4],
        }
        for row in rows_of(world)
    ]
    done = take(study, "rl@4", [write_lines(tmp_path / "rl.jsonl", rows)], declared=DECLARED)
    assert done.n_truncated == len(rows) // 3


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("sample", 0.5, "0.5 is no whole number"),
        ("sample", True, "True is no whole number"),
        ("sample", "１", "'１' is no whole number"),
        ("token_ids", [3, 4.5], "4.5 is no whole number"),
        ("temperature", math.inf, "inf is no finite number"),
        ("top_p", True, "True is no finite number"),
        ("max_tokens", "6.5", "'6.5' is no whole number"),
    ],
)
def test_numbers_of_completions_are_numbers(study: Path, tmp_path: Path, column: str, value: Any, message: str) -> None:
    row = {"prompt_id": "p0", "sample": 0, "text": "so"} | {column: value}
    with pytest.raises(
        InputError, match=rf"cannot be read as completions \(ValueError: {message}\); expected rows with"
    ):
        take(study, "rl@4", [write_lines(tmp_path / "rl.jsonl", [row])], declared=DECLARED)
