import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pydantic import ValidationError

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder
from rlgen_stats.stores.prompts import chat_messages, plain_text
from rlgen_stats.toolkit.extraction import load_prompts, read_table
from tests.extraction.conftest import prompt_table, study_spec


def load(tmp_path: Path, table: pd.DataFrame, **spec: Any) -> pd.DataFrame:
    table.to_parquet(tmp_path / "prompts.parquet")
    changes = {"data": {"prompts": "prompts.parquet"}} | spec
    return load_prompts(study_spec(**changes), StudyFolder(tmp_path))


def wide_table(n: int = 120, cluster_size: int = 3) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "prompt_id": [f"p{i}" for i in range(n)],
            "text": "what",
            "answer": "1",
            "task": ["big" if i < 90 else "small" for i in range(n)],
            "domain": ["in" if i < 90 else "out" for i in range(n)],
            "cluster": [f"c{i // cluster_size}" for i in range(n)],
        }
    )


def test_prompts_come_in_order_with_cluster_and_split(tmp_path: Path) -> None:
    prompts = load(tmp_path, prompt_table())
    assert list(prompts.columns) == ["prompt", "text", "answer", "task", "domain", "split", "cluster", "choices"]
    assert list(prompts.prompt) == list(prompt_table().prompt_id)
    assert list(prompts.cluster) == list(prompts.prompt)
    assert prompts.groupby("task").split.value_counts().to_dict() == {
        (task, split): 2 for task in ("sum", "other") for split in ("selection", "verification", "trial")
    }


def test_the_split_keeps_clusters_whole_and_its_shares_in_each_task(tmp_path: Path) -> None:
    prompts = load(tmp_path, wide_table(), selection={"verification_share": 0.3, "trial_share": 0.2})
    assert prompts.groupby("cluster").split.nunique().max() == 1
    for split, expected in (("selection", 0.5), ("verification", 0.3), ("trial", 0.2)):
        share = (prompts.split == split).groupby(prompts.task).mean()
        assert share.to_dict() == {"big": pytest.approx(expected), "small": pytest.approx(expected)}


def test_the_split_depends_on_seed_and_clusters_not_on_row_order(tmp_path: Path) -> None:
    table = wide_table()
    split = load(tmp_path, table).set_index("prompt").split
    shuffled = load(tmp_path, table.sample(frac=1, random_state=0)).set_index("prompt").split
    assert split.to_dict() == shuffled.to_dict()
    assert split.to_dict() != load(tmp_path, table, seed=8).set_index("prompt").split.to_dict()


def test_the_hash_that_splits_is_that_of_earlier_releases(tmp_path: Path) -> None:
    table = wide_table()
    prompts = load(tmp_path, table, seed=8)
    for task, n_verified, n_tried in (("big", 9, 9), ("small", 3, 3)):
        clusters = sorted(set(table.cluster[table.task == task]), key=lambda c: derive_seed(8, "split", c))
        of_task = prompts[prompts.task == task]
        assert set(of_task.cluster[of_task.split == "verification"]) == set(clusters[:n_verified])
        assert set(of_task.cluster[of_task.split == "trial"]) == set(clusters[n_verified : n_verified + n_tried])


def test_every_part_sees_every_task_of_three_clusters_and_trials_come_last(tmp_path: Path) -> None:
    parts = ["selection", "verification", "trial"]
    for n_clusters in (1, 2, 3, 4):
        table = wide_table(n_clusters * 3, cluster_size=3)
        table["task"], table["domain"] = "big", "in"
        for shares in ((0.01, 0.01), (0.49, 0.5), (0.01, 0.98)):
            prompts = load(tmp_path, table, selection={"verification_share": shares[0], "trial_share": shares[1]})
            assert set(prompts.split) == set(parts[:n_clusters])
    with pytest.raises(ValidationError, match=r"must leave some prompts for selection, got 0\.5 and 0\.5; lower one"):
        load(tmp_path, table, selection={"verification_share": 0.5, "trial_share": 0.5})


def test_a_given_split_is_kept_and_a_cluster_in_two_refused(tmp_path: Path) -> None:
    names = ("selection", "verification", "trial")
    table = wide_table().assign(split=lambda t: [names[int(c[1:]) % 3] for c in t.cluster])
    assert list(load(tmp_path, table).split) == list(table.split)
    table.loc[0, "split"] = "verification"
    with pytest.raises(InputError, match=r"1 cluster\(s\) have prompts in several splits, e\.g\. 'c0'"):
        load(tmp_path, table)
    with pytest.raises(InputError, match=r"split must be one of \['selection', 'verification', 'trial'\], got 'test'"):
        load(tmp_path, table.assign(split="test"))
    with pytest.raises(InputError, match=r"split must be one of .*got '' for prompt 'p0'"):
        load(tmp_path, table.assign(split=None))


def test_a_given_split_without_trial_prompts_gives_up_part_of_verification(tmp_path: Path) -> None:
    table = wide_table().assign(split=lambda t: ["selection" if int(c[1:]) % 2 else "verification" for c in t.cluster])
    prompts = load(tmp_path, table)
    given = table.split == "verification"
    assert (prompts.split[~given.to_numpy()] == "selection").all()
    assert prompts.groupby("cluster").split.nunique().max() == 1
    tried = (prompts.split[given.to_numpy()] == "trial").groupby(prompts.task).mean()
    assert tried.between(0.4, 0.6).all()
    more = load(tmp_path, table, selection={"verification_share": 0.1, "trial_share": 0.4})
    assert set(prompts.cluster[prompts.split == "trial"]) < set(more.cluster[more.split == "trial"])


def test_csv_jsonl_and_parquet_read_the_same_text(tmp_path: Path) -> None:
    table = prompt_table().assign(answer=["05", "NA", "1e3", *["7"] * 9], prompt_id=range(12))
    table.to_csv(tmp_path / "p.csv", index=False)
    table.astype(object).to_json(tmp_path / "p.jsonl", orient="records", lines=True)
    table.to_parquet(tmp_path / "p.parquet")
    read = [
        load_prompts(study_spec(data={"prompts": f"p.{kind}"}), StudyFolder(tmp_path))
        for kind in ("csv", "jsonl", "parquet")
    ]
    assert list(read[0].answer[:3]) == ["05", "NA", "1e3"]
    assert list(read[0].prompt[:2]) == ["0", "1"]
    pd.testing.assert_frame_equal(read[0], read[1])
    pd.testing.assert_frame_equal(read[0], read[2])


def test_csv_cells_stay_text_where_a_whole_column_is_numbers(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("answer,cluster\n05,1\n7,\n")
    assert read_table(tmp_path / "p.csv").to_dict("list") == {"answer": ["05", "7"], "cluster": ["1", ""]}


@pytest.mark.parametrize("text", ["\u2028", "\u2029", "\x85", "\x0b", "\ufeff"])
def test_only_a_line_feed_ends_a_jsonl_line(tmp_path: Path, text: str) -> None:
    rows = [{"text": f"one{text}two"}, {"text": "three"}]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "p.jsonl").write_bytes(("\ufeff" + lines).encode())
    assert read_table(tmp_path / "p.jsonl").text.tolist() == [f"one{text}two", "three"]


def test_jsonl_numbers_beside_nulls_stay_whole(tmp_path: Path) -> None:
    rows = [{"answer": 5, "split": None}, {"answer": 12}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert [str(value) for value in read_table(tmp_path / "p.jsonl").answer] == ["5", "12"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns=["answer", "task"]), r"lacks the column\(s\) \['answer', 'task'\]; it has"),
        (lambda t: t.drop(columns="prompt_id"), r"lacks the column\(s\) \['prompt_id'\]"),
        (lambda t: t.head(0), "has no prompts; expected at least one row"),
        (lambda t: t.assign(prompt_id=["p0", *t.prompt_id[:-1]]), r"must be unique, 'p0' comes more than once"),
        (lambda t: t.assign(text=["a", " ", *t.text[2:]]), r"1 row\(s\) have an empty text, the first is row 2"),
        (lambda t: t.assign(task=[None, *t.task[1:]]), r"1 row\(s\) have an empty task"),
        (lambda t: t.assign(domain="near"), r"domain must be one of \['in', 'out'\], got 'near' for prompt 'p0'"),
        (
            lambda t: t.assign(answer=t.answer.where(t.task == "sum", "")),
            r"no prompt of task\(s\) \['other'\] has an answer; nothing could be graded",
        ),
        (lambda t: t.assign(answer=["", *t.answer[1:]]), r"1 prompt\(s\) have no answer, e\.g\. 'p0'"),
        (lambda t: t.assign(task="sum"), r"task 'sum' has prompts in both domains"),
    ],
)
def test_unusable_tables_are_refused_by_name(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(tmp_path, change(prompt_table()))


def test_tasks_named_by_the_spec_must_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"names \['logiqa'\], but the tasks of .* are \['other', 'sum'\]"):
        load(tmp_path, prompt_table(), selection={"held_out_tasks": ["logiqa"], "control_tasks": ["sum"]})


def test_missing_and_malformed_files_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no table at .*none\.csv; correct the path\.$"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(InputError, match=r"tables are \.parquet, .* \.jsonl, \.json, \.arrow files, got '\.txt'"):
        read_table(tmp_path / "prompts.txt")
    for name, content in (("a.parquet", "no"), ("a.jsonl", '{"a": 1}\n{"a"'), ("b.jsonl", "[1]"), ("a.csv", '"a')):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=rf"{name} is not a readable"):
            read_table(tmp_path / name)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(InputError, match="has no prompts"):
        load_prompts(study_spec(data={"prompts": "empty.csv"}), StudyFolder(tmp_path))


@pytest.mark.parametrize(
    ("column", "value", "kind"),
    [
        ("answer", ["12"], "ndarray"),
        ("text", ["12"], "ndarray"),
        ("text", b"12", "bytes"),
    ],
)
def test_cells_that_are_no_text_are_refused_not_printed(tmp_path: Path, column: str, value: Any, kind: str) -> None:
    """Their Python text, ['12'] or b'12', was taken for the prompt or the answer."""
    table = prompt_table()
    table[column] = [value] * len(table)
    with pytest.raises(InputError, match=rf"prompts\.parquet: {column} of row 1 is a {kind}, expected text"):
        load(tmp_path, table)


def chat_spec(**changes: Any) -> StudySpec:
    """Every model reads a chat template."""
    content = study_spec(**changes).model_dump(mode="json")
    for one in (content["base"], *content["runs"]):
        one["chat_template"] = "checkpoint"
    return StudySpec.model_validate(content)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_chat_messages_are_read_where_a_template_renders_them(tmp_path: Path, suffix: str) -> None:
    table = prompt_table()
    cells = [[{"role": "user", "content": f"\u00bd of {i}?"}] for i in range(len(table))]
    cells[0] = [{"role": "system", "content": "Be brief.", "name": "s"}, *cells[0]]  # a struct has all keys of a column
    table["text"] = cells if suffix != "csv" else list(map(json.dumps, cells))
    file = tmp_path / f"prompts.{suffix}"
    match suffix:
        case "parquet":
            table.to_parquet(file)
        case "jsonl":
            table.to_json(file, orient="records", lines=True)
        case "csv":
            table.to_csv(file, index=False)
    data = {"prompts": file.name}
    read = load_prompts(chat_spec(data=data), StudyFolder(tmp_path))
    assert [chat_messages(text) for text in read.text] == cells
    assert plain_text(read.text[0]) == "Be brief.\n\n½ of 0?"
    with pytest.raises(
        InputError, match=r"text of row 1 is a list of chat messages, which no chat template renders: wri"
    ):
        load_prompts(study_spec(data=data), StudyFolder(tmp_path))


def test_messages_do_not_go_into_a_text_of_a_tasks_template(tmp_path: Path) -> None:
    table = prompt_table()
    table["text"] = [[{"role": "user", "content": "1 + 1"}]] * len(table)
    table.to_parquet(tmp_path / "prompts.parquet")
    spec = chat_spec(data={"prompts": "prompts.parquet"}, tasks={"sum": {"template": "Question: {text}"}})
    with pytest.raises(InputError, match=r"is a list of chat messages.*and no words around it in the task's template"):
        load_prompts(spec, StudyFolder(tmp_path))


def test_messages_that_hold_no_text_are_refused(tmp_path: Path) -> None:
    table = prompt_table()
    table["text"] = [json.dumps([{"role": "user", "content": [{"type": "image"}]}])] * len(table)
    table.to_csv(tmp_path / "prompts.csv", index=False)
    with pytest.raises(InputError, match="text of row 1 has a message whose role or content is no text"):
        load_prompts(chat_spec(data={"prompts": "prompts.csv"}), StudyFolder(tmp_path))


def test_a_text_in_brackets_is_no_list_of_messages() -> None:
    for text in ("[0, 1) is an interval", "[1, 2]", '[{"role": "user"}]', "[]", "plain"):
        assert chat_messages(text) is None
        assert plain_text(text) == text


def test_whole_numbers_read_as_floats_are_whole_numbers(tmp_path: Path) -> None:
    table = prompt_table()
    table["answer"] = [12.0, 2.5] * (len(table) // 2)
    assert load(tmp_path, table).answer.tolist() == ["12", "2.5"] * (len(table) // 2)
    table["answer"] = table["answer"].astype("float32")
    assert load(tmp_path, table).answer.tolist() == ["12", "2.5"] * (len(table) // 2)


@pytest.mark.parametrize("column", ["prompt_id", "task", "cluster"])
def test_labels_with_a_nul_are_refused(tmp_path: Path, column: str) -> None:
    table = prompt_table().assign(cluster="c")
    table.loc[1, column] = "a\0"
    with pytest.raises(InputError, match=r"'a\\x00' holds a NUL character; expected plain text: rename it"):
        load(tmp_path, table)


def test_lines_that_nest_too_deep_are_refused(tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text('{"prompt_id": "a"}\n' + "[" * 200_000)
    with pytest.raises(InputError, match=r"deep\.jsonl is not a readable jsonl table \(line 2 nests too deep\)"):
        read_table(tmp_path / "deep.jsonl")


def test_a_column_called_prompt_beside_prompt_id_is_no_id(tmp_path: Path) -> None:
    table = prompt_table().assign(prompt="the same words")
    assert load(tmp_path, table).prompt.tolist() == prompt_table().prompt_id.tolist()
