"""Log-likelihoods of choices against a reference that reads one token after the other, alone and without padding."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rlgen_stats.schemas.errors import InputError, ModelError
from rlgen_stats.toolkit.edits.edit import FeatureEdit
from rlgen_stats.toolkit.edits.hooks import SourceModel, editing
from rlgen_stats.toolkit.edits.site import EditSite
from rlgen_stats.toolkit.extraction import choice_scoring
from rlgen_stats.toolkit.extraction.choice_scoring import ChoiceScores, encode_choices, score_choices
from tests.edits.tiny import BASE, CONFIGS, RL, tiny_crosscoder

PROMPTS = (
    "Question: Which metal is liquid at room temperature?\nAnswer:",
    "Which animal lays eggs?\nA. the hen\nB. the horse\nC. the whale\nAnswer:",
    "A candle goes out under a glass because\n",
    "What is 3 plus 4?",
)
CHOICES = (
    ("mercury", "iron", "iron and tin", "iron and tin and copper"),
    ("A", "B", "C"),
    ("the oxygen is used up", "the air gets cold"),
    ("7", "77", "12"),
)
VOCABULARY = 300


@pytest.fixture(scope="module")
def bpe() -> Any:
    """A byte-level BPE tokenizer, whose tokens begin with the space before a word."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet)
    raw.train_from_iterator([*PROMPTS, *(f" {choice}" for texts in CHOICES for choice in texts)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")


def tiny(kind: str, seed: int = 0) -> Any:
    config = copy.deepcopy(CONFIGS[kind])
    config.vocab_size = VOCABULARY
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)


def token_by_token(model: Any, tokenizer: Any, prompt: str, choice: str) -> float:
    """Written as generation would: the prompt is read, then each token on top of the cache, without padding."""
    space = "" if prompt.endswith("\n") else " "
    context, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + space + choice)["input_ids"]
    output = model(input_ids=torch.tensor([context]), use_cache=True)
    total = 0.0
    for token in whole[len(context) :]:
        total += float(torch.log_softmax(output.logits[0, -1].double(), -1)[token])
        output = model(input_ids=torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
    return total


def reference(model: Any, tokenizer: Any) -> list[list[float]]:
    return [
        [token_by_token(model, tokenizer, prompt, choice) for choice in texts]
        for prompt, texts in zip(PROMPTS, CHOICES, strict=True)
    ]


def assert_equal(scores: list[ChoiceScores], expected: list[list[float]]) -> None:
    for prompt, values in zip(scores, expected, strict=True):
        np.testing.assert_allclose(prompt.log_likelihood, values, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "qwen2", "qwen3"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_equal_to_reading_token_by_token(kind: str, batch_size: int, bpe: Any) -> None:
    model = tiny(kind)
    expected = reference(model, bpe)
    assert_equal(score_choices(model, bpe, PROMPTS, CHOICES, batch_size=batch_size), expected)
    assert len({round(value, 1) for values in expected for value in values}) > 8


@pytest.mark.parametrize("positions", ["all", "prompt", "last_prompt", "completion"])
@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "llama"])
def test_an_edit_in_force_acts_as_it_does_in_generation(kind: str, positions: Any, bpe: Any) -> None:
    model, site = tiny(kind), EditSite(tiny_crosscoder(), RL, 1)
    edit = FeatureEdit((0, 3, 4, 9, 17), "amplify", 3.0, positions=positions)
    unedited = reference(model, bpe)
    with editing(model, edit, site):
        expected = reference(model, bpe)
    with editing(model, edit, site) as active:
        assert_equal(score_choices(model, bpe, PROMPTS, CHOICES, active=active), expected)
        assert active.prompt_lengths is None
    moved = [abs(a - b) for x, y in zip(expected, unedited, strict=True) for a, b in zip(x, y, strict=True)]
    assert np.median(moved) > 1e-2


def test_copying_from_a_source_model_acts_as_in_generation(bpe: Any) -> None:
    model, site = tiny("llama"), EditSite(tiny_crosscoder(), RL, 1)
    source = SourceModel(tiny("llama", seed=1), BASE)
    edit = FeatureEdit((), "patch")
    with editing(model, edit, site, source=source):
        expected = reference(model, bpe)
    with editing(model, edit, site, source=source) as active:
        assert_equal(score_choices(model, bpe, PROMPTS, CHOICES, active=active), expected)


def test_few_logits_at_once_change_nothing(bpe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny("llama"), []
    model.register_forward_hook(lambda module, args, output: seen.append(output.logits.shape[-2]))
    whole = score_choices(model, bpe, PROMPTS, CHOICES)
    longest = max(len(ends) for _, texts in encode_choices(bpe, PROMPTS, CHOICES) for ends in texts)
    assert seen[0] > longest
    monkeypatch.setattr(choice_scoring, "positions_at_once", lambda model: longest)
    seen.clear()
    assert_equal(score_choices(model, bpe, PROMPTS, CHOICES), [list(scores.log_likelihood) for scores in whole])
    assert longest in seen
    assert max(seen) <= longest


def test_choices_that_begin_alike_are_read_as_one_text(bpe: Any) -> None:
    model, positions = tiny("llama"), []
    model.register_forward_hook(lambda module, args, output: positions.append(output.logits.shape[-2]))
    letters = [("A", "B", "C", "D"), ("A", "B")]
    score_choices(model, bpe, PROMPTS[:2], letters)
    assert positions == [sum(max(map(len, ends)) for _, ends in encode_choices(bpe, PROMPTS[:2], letters))]


def test_tokens_of_a_choice_continue_the_prompts(bpe: Any) -> None:
    for prompt, texts, (ids, ends) in zip(PROMPTS, CHOICES, encode_choices(bpe, PROMPTS, CHOICES), strict=True):
        assert ids == bpe(prompt)["input_ids"]
        for choice, end in zip(texts, ends, strict=True):
            space = "" if prompt.endswith("\n") else " "
            assert bpe.decode(end) == space + choice
            assert [*ids, *end] == bpe(prompt + space + choice)["input_ids"]


def test_conventions() -> None:
    scores = ChoiceScores(("ab", "abcdefgh"), ((1,), (2, 3, 4)), np.array([-3.0, -6.0]))
    assert [scores.best(n) for n in ("none", "tokens", "characters")] == [0, 1, 1]
    np.testing.assert_allclose(scores.normalized("tokens"), [-3.0, -2.0])
    np.testing.assert_allclose(scores.normalized("characters"), [-1.5, -0.75])
    with pytest.raises(InputError, match=r"none, tokens or characters, got 'bytes'"):
        scores.normalized("bytes")


def test_refusals(bpe: Any) -> None:
    model = tiny("llama")
    with pytest.raises(InputError, match=r"joins the end of prompt .*'Answer: ' with its choice 'the hen'"):
        score_choices(model, bpe, ["Answer: "], [["the hen"]])
    with pytest.raises(InputError, match=r"1 choice\(s\) are empty, the first of prompt 'Answer:'"):
        score_choices(model, bpe, ["Answer:"], [["a", " "]])
    with pytest.raises(InputError, match=r"the model's context is 128; shorten"):
        score_choices(model, bpe, ["so" + " it goes" * 60], [["a", "b"]])
    model.lm_head.weight.data[:] = torch.nan
    with pytest.raises(ModelError, match=r"score choices: the model's logits are NaN"):
        score_choices(model, bpe, PROMPTS, CHOICES)
