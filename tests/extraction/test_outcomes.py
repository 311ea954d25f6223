import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rlgen_stats.schemas.errors import InputError, ModelError, StageError, StoreError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import Provenance, StudyFolder, committed_models, open_outcomes
from rlgen_stats.stores.prompts import load_prompts
from rlgen_stats.stores.study_models import list_models
from rlgen_stats.toolkit.exchange import read_graded
from rlgen_stats.toolkit.exchange.sampled_files import Sampled
from rlgen_stats.toolkit.extraction import (
    Completion,
    completion_parts,
    load_model,
    load_tokenizer,
    outcomes,
    read_completions,
    sample_outcomes,
)
from rlgen_stats.toolkit.extraction.activations import contrasted_models, forced_texts
from rlgen_stats.toolkit.extraction.graders.texts import FinalAnswerGrader, RegexGrader
from rlgen_stats.toolkit.extraction.import_checks import complete_set
from rlgen_stats.toolkit.progress import _Silent
from rlgen_stats.toolkit.statistics.task_accuracy import behaviour
from tests.extraction.conftest import WORDS, prompt_table, save_model, study_spec, word_tokenizer
from tests.oracles.slow_generation import completed

Study = tuple[StudySpec, StudyFolder]


def test_every_model_is_completed_graded_and_stored(sampled: Study) -> None:
    _, folder = sampled
    stored = open_outcomes(folder.outcomes).load()
    assert list(stored.model.values) == ["base@0", "sft@3", "sft@6", "rl@4", "rl@8"]
    assert dict(stored.sizes) == {"model": 5, "prompt": 12, "sample": 2}
    assert list(stored.arm.values) == ["base", "sft", "sft", "rl", "rl"]
    for model in stored.model.values:
        table = read_completions(folder, model)
        assert len(table) == 36
        assert (table.n_tokens == table.token_ids.map(len)).all()
        for sample in (-1, 0, 1):
            rows = table[table["sample"] == sample].set_index("prompt").loc[stored.prompt.values]
            here = stored.sel(model=model)
            got = (
                (here.greedy_correct, here.greedy_tokens, here.greedy_class, here.greedy_terminated)
                if sample == -1
                else (
                    here.correct[:, sample],
                    here.completion_tokens[:, sample],
                    here.format_class[:, sample],
                    here.terminated[:, sample],
                )
            )
            for column, values in zip(("correct", "n_tokens", "format_class", "terminated"), got, strict=True):
                assert list(rows[column]) == list(values.values)
    assert stored.greedy_tokens.values.std() > 0


def test_completions_are_the_models_own_and_paired_by_seed(study: Study, provenance: Provenance) -> None:
    """Redraw one completion with a plain loop over full forward passes; identical models answer identically."""
    spec, folder = study
    save_model(folder.root / "own/rl-4", 0)  # the same weights as base
    sample_outcomes(spec, folder, provenance=provenance)
    assert read_completions(folder, "rl@4").equals(read_completions(folder, "base@0"))
    assert not read_completions(folder, "rl@8").equals(read_completions(folder, "base@0"))
    table = read_completions(folder, "sft@3").set_index(["prompt", "sample"])
    ref = list_models(spec, folder)[1]
    model, tokenizer = load_model(ref), load_tokenizer(ref)
    for prompt, text in list(zip(prompt_table().prompt_id, prompt_table().text, strict=True))[:4]:
        ids = tokenizer(text)["input_ids"]
        seed = derive_seed(7, "sample", prompt, 1)
        assert tuple(table.loc[(prompt, 1), "token_ids"]) == completed(model, ids, 6, ends={1}, seed=seed)


def test_checkpoints_before_the_last_may_have_their_greedy_completion_alone(
    sampled: Study, tmp_path: Path, provenance: Provenance
) -> None:
    """All that is sampled is what the study with one number samples; what reads samples says so or does without."""
    whole = sampled[1]
    folder = StudyFolder(Path(shutil.copytree(whole.root, tmp_path / "spared")))
    shutil.rmtree(folder.outcomes)
    shutil.rmtree(folder.completions)
    spec = study_spec(generation={"max_new_tokens": 6, "n_samples": {"final": 2}, "batch_size": 5})
    sample_outcomes(spec, folder, provenance=provenance)
    for model in ("base@0", "sft@3", "sft@6", "rl@4", "rl@8"):
        expected = read_completions(whole, model)
        if model in ("sft@3", "rl@4"):
            expected = expected[expected["sample"] == -1]
        assert read_completions(folder, model).equals(expected)
    stored, before = open_outcomes(folder.outcomes).load(), open_outcomes(whole.outcomes).load()
    last, spared = ["base@0", "sft@6", "rl@8"], ["sft@3", "rl@4"]
    assert stored.sel(model=last).equals(before.sel(model=last))
    assert (stored.correct.sel(model=spared) == -1).all()
    assert (stored.completion_tokens.sel(model=spared) == -1).all()
    assert stored.greedy_correct.equals(before.greedy_correct)
    table = behaviour(stored)
    assert np.isnan(table.sampled_accuracy.sel(model=spared)).all()
    assert table.accuracy.equals(behaviour(before).accuracy)
    greedy = stored.greedy_terminated.sel(model=spared).groupby("task").mean()
    assert table.terminated.sel(model=spared, task=["other", "sum"]).values.tolist() == greedy.values.tolist()
    assert table.terminated.sel(model=last).equals(behaviour(before).terminated.sel(model=last))
    assert read_graded(folder.outcomes, model="sft@3", metric="greedy").correct.notna().all()
    with pytest.raises(InputError, match=r"sft@3 has its greedy completions alone .*by the metric greedy"):
        read_graded(folder.outcomes, model="sft@3", metric="sampled")
    assert len(forced_texts(spec, folder, contrasted_models(spec, folder), load_prompts(spec, folder))) == 36


def test_some_samples_are_spared(study: Study, provenance: Provenance) -> None:
    spec, folder = study
    spec = study_spec(generation={"max_new_tokens": 3, "n_samples": {"final": 2, "others": 1}, "batch_size": 5})
    sample_outcomes(spec, folder, provenance=provenance)
    stored = open_outcomes(folder.outcomes).load()
    assert (stored.completion_tokens.sel(model="sft@3") != -1).values.all(axis=0).tolist() == [True, False]
    assert np.isfinite(behaviour(stored).sampled_accuracy.sel(task="sum")).all()
    assert len(read_graded(folder.outcomes, model="sft@3", metric="sampled")) == 12
    assert len(read_graded(folder.outcomes, model="sft@6", metric="sampled")) == 24


def test_imported_samples_of_a_spared_checkpoint_are_refused() -> None:
    prompts, one = pd.DataFrame({"prompt": ["p0"]}), Sampled(prompt="p0", text="7")
    greedy = replace(one, sample=-1)
    assert complete_set([greedy], ["p0"], prompts, n_samples=0, stand_in="") == {("p0", -1): greedy}
    with pytest.raises(
        InputError, match=r"1 greedy and 1 sampled completions, expected 1 and 0 .*leave its samples out"
    ):
        complete_set([greedy, replace(one, sample=0)], ["p0", "p0"], prompts, n_samples=0, stand_in="")


def test_a_killed_stage_goes_on_with_the_next_model(
    study: Study, provenance: Provenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, folder = study
    loads: list[str] = []

    def counting(ref: Any, **how: Any) -> Any:
        loads.append(ref.model)
        if len(loads) == 3:
            raise KeyboardInterrupt
        return load_model(ref, **how)

    monkeypatch.setattr(completion_parts, "load_model", counting)
    with pytest.raises(KeyboardInterrupt):
        sample_outcomes(spec, folder, provenance=provenance)
    assert committed_models(folder.outcomes) == ["base@0", "sft@3"]
    assert not list(folder.completions.glob(".*"))
    sample_outcomes(spec, folder, provenance=provenance)
    assert loads == ["base@0", "sft@3", "sft@6", "sft@6", "rl@4", "rl@8"]
    sample_outcomes(spec, folder, provenance=provenance)
    assert len(loads) == 6
    assert len(open_outcomes(folder.outcomes).model) == 5


def test_a_commit_without_its_parquet_cannot_happen(
    study: Study, provenance: Provenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, folder = study

    def killed(*args: Any, **how: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(outcomes, "append_model", killed)
    with pytest.raises(KeyboardInterrupt):
        sample_outcomes(spec, folder, provenance=provenance)
    assert len(read_completions(folder, "base@0")) == 36
    assert committed_models(folder.outcomes) == []


def test_unusable_models_are_found_before_anything_is_sampled(study: Study, provenance: Provenance) -> None:
    spec, folder = study
    save_model(folder.root / "own/rl-8", 4, tokenizer=word_tokenizer((*WORDS[:3], *reversed(WORDS[3:]))))
    with pytest.raises(ModelError, match="rl@8 has another tokenizer"):
        sample_outcomes(spec, folder, provenance=provenance)
    (folder.root / "own/rl-8/model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"rl@8: .* has no weights"):
        sample_outcomes(spec, folder, provenance=provenance)
    assert not folder.outcomes.exists()
    with pytest.raises(StageError, match=r"no completions of base@0 at .*run the outcomes stage"):
        read_completions(folder, "base@0")


def test_another_studys_store_is_refused_before_sampling(sampled: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, folder = sampled
    monkeypatch.setattr(completion_parts, "load_model", None)
    with pytest.raises(StoreError, match="written for another study or settings"):
        sample_outcomes(spec, folder, provenance=Provenance("tiny-study", "other-key"))


class Log(_Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, message: str) -> None:
        self.lines.append(message)


def test_tasks_have_graders_stop_strings_and_limits_of_their_own(study: Study, provenance: Provenance) -> None:
    spec, folder = study
    tasks = {"sum": {"grader": {"name": "regex", "pattern": "so (.*)"}, "max_new_tokens": 3}, "other": {"stop": ["4"]}}
    spec, log = study_spec(tasks=tasks), Log()
    sample_outcomes(spec, folder, provenance=provenance, progress=log)
    free = study[0]
    free_folder = StudyFolder(Path(shutil.copytree(folder.root, folder.root.parent / "free")))
    for path in (free_folder.outcomes, free_folder.completions):
        shutil.rmtree(path)
    sample_outcomes(free, free_folder, provenance=provenance)
    task = dict(zip(prompt_table().prompt_id, prompt_table().task, strict=True))
    table, before = (read_completions(one, "rl@8").set_index(["prompt", "sample"]) for one in (folder, free_folder))
    sums = table.index.get_level_values("prompt").map(task) == "sum"
    assert table.n_tokens[sums].max() == 3
    assert before.n_tokens[sums].max() > 3
    assert not table.text[~sums].str.contains("4").any()
    assert (table.text[~sums] == before.text[~sums].str.split("4").str[0]).all()
    assert (table.terminated[~sums] == (before.terminated | before.text.str.contains("4"))[~sums]).all()
    graders = {"sum": RegexGrader(pattern="so (.*)"), "other": FinalAnswerGrader()}
    answers = dict(zip(prompt_table().prompt_id, prompt_table().answer, strict=True))
    for (prompt, _), row in table.iterrows():
        completion = Completion(tuple(row.token_ids), row.text, row.terminated)
        grade = graders[task[prompt]].grade(completion, answers[prompt])
        assert (row.correct, row.answered) == (grade.correct, grade.answered)
    stored = open_outcomes(folder.outcomes).sel(model="rl@8").load()
    assert stored.answered.values.tolist() == table.answered.unstack().loc[stored.prompt.values, [0, 1]].values.tolist()
    assert any(re.search(r"% of (rl@8's completions of task )?sum\b.* have no answer", line) for line in log.lines)
    assert sum(line.startswith("  sum p1: ") for line in log.lines) >= 1


def test_expected_answers_are_checked_before_anything_is_sampled(study: Study, provenance: Provenance) -> None:
    _, folder = study
    spec = study_spec(tasks={"sum": {"grader": "choice"}})
    with pytest.raises(InputError, match=r"task 'sum': the grader cannot read 6 of 6 expected answer\(s\): p1 \('1'\)"):
        sample_outcomes(spec, folder, provenance=provenance)
    assert not folder.outcomes.exists()
