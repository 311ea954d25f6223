"""Tasks whose choices are scored, beside tasks whose answers are written, in one study."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.study import ChatSpec, StudySpec
from rlgen_stats.schemas.tasks import GraderSpec
from rlgen_stats.stores import Provenance, StudyFolder, open_activations, open_outcomes
from rlgen_stats.stores.prompts import load_prompts
from rlgen_stats.toolkit.extraction import (
    PromptReader,
    completion_parts,
    extract_activations,
    read_completions,
    sample_outcomes,
)
from rlgen_stats.toolkit.extraction.answering import answer_prompts
from rlgen_stats.toolkit.extraction.generation import Completion
from rlgen_stats.toolkit.extraction.grading import make_grader
from tests.extraction.bpe import bpe_model, chatml_tokenizer, llama_tokenizer
from tests.extraction.conftest import PROMPTS, prompt_table, tiny_model, word_tokenizer

Study = tuple[StudySpec, StudyFolder]
CHOICES = ("5", "3", "is so plus")


@pytest.fixture
def mixed(study: Study) -> Study:
    """The tiny study, the choices of its task ``other`` scored; what is right there is its second choice."""
    spec, folder = study
    table = prompt_table()
    scored = table["task"] == "other"
    table["choices"] = [list(CHOICES) if own else None for own in scored]
    table.loc[scored, "answer"] = "B"
    table.to_parquet(folder.root / "data/prompts.parquet")
    return spec.model_copy(update={"tasks": tasks()}), folder


def tasks(**how: Any) -> Any:
    return StudySpec.model_validate(
        {
            "name": "s",
            "base": {"path": "b"},
            "runs": [{"name": "sft", "arm": "sft", "method": "sft"}, {"name": "rl", "arm": "rl", "method": "grpo"}],
            "crosscoders": [{"name": "main", "views": ["base@0", "sft@final", "rl@final"], "n_features": 64}],
            "tasks": {"other": {"grader": {"name": "choice_loglik", **how}}},
        }
    ).tasks


def slow_scores(model: Any, tokenizer: Any, prompt: str) -> list[float]:
    scores = []
    for choice in CHOICES:
        ids, total = tokenizer(prompt)["input_ids"], 0.0
        for token in tokenizer(choice)["input_ids"]:
            total += float(torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1)[token])
            ids = [*ids, token]
        scores.append(total)
    return scores


PLAIN = PromptReader(word_tokenizer(), ChatSpec(), "base@0")


def answered(spec: StudySpec, folder: StudyFolder, **how: Any) -> tuple[pd.DataFrame, list[list[Completion]]]:
    prompts = load_prompts(spec, folder)
    seeds = range(2 * len(prompts))
    arguments: dict[str, Any] = {"n_samples": 2, "seeds": seeds, "greedy": True} | how
    return prompts, answer_prompts(tiny_model(), PLAIN, prompts, spec, **arguments)


@pytest.mark.parametrize(
    ("normalize", "lengths"), [(None, (1, 1, 1)), ("tokens", (1, 1, 3)), ("characters", (1, 1, 10))]
)
def test_the_best_choice_is_the_completion(mixed: Study, normalize: Any, lengths: Any) -> None:
    spec, folder = mixed
    spec = spec.model_copy(update={"tasks": tasks(**({"normalize": normalize} if normalize else {}))})
    prompts, draws = answered(spec, folder)
    assert len(draws) == 3
    model, tokenizer = tiny_model(), word_tokenizer()
    for row in np.flatnonzero(prompts["task"] == "other"):
        scores = slow_scores(model, tokenizer, prompts["text"][row])
        best = int(np.argmax(np.divide(scores, lengths)))
        assert {draw[row] for draw in draws} == {draws[0][row]}
        first = draws[0][row]
        assert (first.choice, first.text, first.terminated) == (best, CHOICES[best], True)
        assert list(first.token_ids) == tokenizer(CHOICES[best])["input_ids"]
        np.testing.assert_allclose(first.choice_log_likelihoods, scores, atol=1e-4)


def test_letters(mixed: Study) -> None:
    spec, folder = mixed
    _, draws = answered(spec.model_copy(update={"tasks": tasks(options="letters")}), folder)
    assert draws[0][0].text in "ABC"
    assert len(draws[0][0].choice_log_likelihoods) == 3


def test_written_tasks_are_as_they_are_alone(mixed: Study, study: Study) -> None:
    prompts, draws = answered(*mixed)
    _, written = answered(study[0], mixed[1])
    kept = np.flatnonzero(prompts["task"] == "sum")
    assert [[draw[row] for row in kept] for draw in draws] == [[draw[row] for row in kept] for draw in written]
    assert len({draw[kept[0]] for draw in draws}) > 1
    assert all(draw[row].choice is None for draw in draws for row in kept)


def test_outcomes_and_activations_of_chosen_answers(mixed: Study, provenance: Provenance) -> None:
    spec, folder = mixed
    sample_outcomes(spec, folder, provenance=provenance)
    extract_activations(spec, folder, provenance=provenance)
    stored = open_outcomes(folder.outcomes).load()
    rows = read_completions(folder, "base@0").set_index("prompt")
    chosen = rows[rows["choice_log_likelihoods"].notna()]
    assert set(chosen.index) == {f"p{i}" for i in range(0, len(PROMPTS), 2)}
    assert len(chosen) == 3 * len(PROMPTS) / 2
    best = chosen["choice_log_likelihoods"].map(np.argmax)
    assert list(chosen["text"]) == [CHOICES[i] for i in best]
    assert list(chosen["correct"]) == list(best == 1)
    assert 0 < chosen["correct"].mean() < 1
    assert chosen["answered"].all()
    assert chosen["terminated"].all()
    here = stored.sel(model="base@0", prompt=stored["task"] == "other")
    assert (here["correct"] == here["greedy_correct"]).all()
    store = open_activations(folder.activations)
    of_prompt = (store["prompt"] == "p0") & (store["source"] == "base@0") & (store["segment"] == "completion")
    assert list(store["token_id"].values[of_prompt.values]) == list(chosen.loc["p0", "token_ids"].iloc[0])


def test_prompts_without_choices_are_refused_before_a_model_is_loaded(
    mixed: Study, provenance: Provenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, folder = mixed
    monkeypatch.setattr(completion_parts, "load_model", None)
    table = pd.read_parquet(folder.root / "data/prompts.parquet")
    table.at[2, "choices"] = None
    table.to_parquet(folder.root / "data/prompts.parquet")
    with pytest.raises(InputError, match=r"task 'other': 1 prompt\(s\) have no choices to be scored, .* 'p2'; add"):
        sample_outcomes(spec, folder, provenance=provenance)


def test_a_choice_is_compared_by_its_number() -> None:
    grader = make_grader(GraderSpec(name="choice_loglik"))

    def right(best: int, answer: str, *choices: str) -> bool:
        return grader.grade(Completion((1,), choices[best], True, best, (0.0,)), answer, choices).correct

    assert right(1, "B", "x", "y")
    assert not right(0, "B", "x", "y")
    assert right(0, "B", "same", "same")
    assert not right(0, "B", "1", "-1")
    assert right(1, "A", "B", "B")


@pytest.mark.parametrize("make", [chatml_tokenizer, llama_tokenizer])
def test_choices_follow_the_prompt_as_the_chat_template_renders_it(mixed: Study, make: Any) -> None:
    """Read token by token after the template's text, which has the BOS token once."""
    spec, folder = mixed
    prompts = load_prompts(spec, folder).iloc[:1]
    assert spec.grader_of(prompts["task"][0]).name == "choice_loglik"
    tokenizer = make()
    model, reader = bpe_model(tokenizer), PromptReader(tokenizer, ChatSpec(chat_template="checkpoint"), "m")
    draws = answer_prompts(model, reader, prompts, spec, n_samples=1, seeds=[0])
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompts["text"][0]}], add_generation_prompt=True, tokenize=False
    )
    scores = []
    for choice in CHOICES:
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        total = 0.0
        for token in tokenizer(choice, add_special_tokens=False)["input_ids"]:
            total += float(torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1)[token])
            ids = [*ids, token]
        scores.append(total)
    np.testing.assert_allclose(draws[0][0].choice_log_likelihoods, scores, atol=1e-4)


def test_settings_are_of_this_grader() -> None:
    assert tasks(options="letters", normalize="tokens")["other"].grader.normalize == "tokens"
    for wrong in ({"options": "letters"}, {"normalize": "none"}):
        with pytest.raises(
            ValueError, match=r"options and normalize are for grader 'choice_loglik'; got grader 'math'"
        ):
            GraderSpec(name="math", **wrong)
    assert "normalize" not in GraderSpec(name="math").model_dump()
