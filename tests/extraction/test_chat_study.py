"""A base that reads plain text beside runs that read their chat templates, from outcomes to movement."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner

from rlgen_stats.cli.main import main
from rlgen_stats.schemas.dims import MODEL
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import Provenance, StudyFolder, open_activations
from rlgen_stats.stores.tables import rendered_prompts
from rlgen_stats.toolkit.extraction import (
    extract_activations,
    measure_movement,
    read_completions,
    rendered_examples,
    sample_outcomes,
)
from rlgen_stats.toolkit.progress import SILENT
from tests.extraction.bpe import bpe_model, chatml_tokenizer, llama_tokenizer, save_bpe

PROVENANCE = Provenance("chat-study", "chat-key")
QUESTIONS = ("What is 2 + 3?", "Which gas do plants take in?", "What is 12 + 30?")


def spec_of(*, base: dict[str, Any] | None = None, runs: dict[str, Any] | None = None) -> StudySpec:
    chat = {"chat_template": "checkpoint"} if runs is None else runs
    return StudySpec.model_validate(
        {
            "name": "chat",
            "seed": 3,
            "device": "cpu",
            "base": {"path": "base", **(base or {})},
            "runs": [
                {"name": "sft", "arm": "sft", "checkpoints": {1: "sft"}, **chat},
                {"name": "rl", "arm": "rl", "checkpoints": {1: "rl"}, **chat},
            ],
            "generation": {"max_new_tokens": 5, "n_samples": 1, "batch_size": 4},
            "extraction": {"layer": 0, "batch_size": 2},
            "crosscoders": [{"name": "main", "views": ["base@0", "sft@final", "rl@final"], "n_features": 8, "k": 2}],
        }
    )


def write_study(root: Path, tokenizers: dict[str, Any], texts: list[Any] | None = None) -> StudyFolder:
    for seed, (name, tokenizer) in enumerate(tokenizers.items()):
        save_bpe(root / name, tokenizer, seed)
    table = pd.DataFrame({"prompt_id": ["a", "b", "c"], "text": texts or list(QUESTIONS), "answer": ["5", "x", "42"]})
    (root / "data").mkdir()
    table.assign(task=["sum", "gas", "sum"], domain=["in", "out", "in"]).to_parquet(root / "data/prompts.parquet")
    return StudyFolder(root)


def chatml(root: Path) -> StudyFolder:
    """Qwen's case: the chat-tuned models end at another token than base."""
    tuned = chatml_tokenizer(eos="<|im_end|>")
    return write_study(root, {"base": chatml_tokenizer(), "sft": tuned, "rl": tuned})


class Told(type(SILENT)):  # type: ignore[misc]
    """Progress that keeps what is logged."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def log(self, message: str) -> None:
        self.messages.append(message)


def asked(tokenizer: Any, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"])


@pytest.mark.parametrize("make", [chatml_tokenizer, llama_tokenizer])
def test_every_model_reads_each_text_as_its_writer_read_and_wrote_it(make: Any, tmp_path: Path) -> None:
    folder = write_study(tmp_path, dict.fromkeys(("base", "sft", "rl"), make()))
    spec = spec_of()
    sample_outcomes(spec, folder, provenance=PROVENANCE)
    extract_activations(spec, folder, provenance=PROVENANCE)
    stored = open_activations(folder.activations).load()
    assert sorted(stored[MODEL].values) == ["base.repeat@0", "base@0", "rl@1", "sft@1"]
    tokenizer = make()
    for source, read in (
        ("base@0", lambda text: tokenizer(text)["input_ids"]),
        ("rl@1", lambda t: asked(tokenizer, t)),
    ):
        written = read_completions(folder, source).set_index(["prompt", "sample"])["token_ids"]
        for prompt, text in zip("abc", QUESTIONS, strict=True):
            here = stored.isel(token=np.flatnonzero((stored.source == source) & (stored.prompt == prompt)))
            assert here.token_id.values.tolist() == [*read(text), *written[prompt, 0]]
            assert (here.segment == "prompt").sum() == len(read(text))
            if tokenizer.bos_token is not None:
                assert here.token_id.values.tolist().count(tokenizer.bos_token_id) == 1
    assert np.isfinite(measure_movement(spec, folder)["kl_from_base"]).all()


def test_the_template_is_what_completions_are_drawn_with(tmp_path: Path) -> None:
    folder = chatml(tmp_path / "chat")
    plain = StudyFolder(Path(shutil.copytree(folder.root, tmp_path / "plain")))
    sample_outcomes(spec_of(), folder, provenance=PROVENANCE)
    sample_outcomes(spec_of(runs={}), plain, provenance=PROVENANCE)
    assert read_completions(folder, "base@0").equals(read_completions(plain, "base@0"))
    assert not read_completions(folder, "rl@1").equals(read_completions(plain, "rl@1"))


def test_the_templates_end_of_turn_ends_completions_of_those_that_read_it(tmp_path: Path) -> None:
    folder = write_study(tmp_path, dict.fromkeys(("base", "sft", "rl"), chatml_tokenizer()))
    turn = chatml_tokenizer().convert_tokens_to_ids("<|im_end|>")
    for name in ("base", "rl"):
        model = bpe_model(chatml_tokenizer(), 1)
        model.lm_head.weight[turn] *= 4  # drawn often
        model.save_pretrained(tmp_path / name)
    sample_outcomes(spec_of(), folder, provenance=PROVENANCE)
    base, tuned = (read_completions(folder, name) for name in ("base@0", "rl@1"))
    assert any(turn in ids[:-1] for ids in base["token_ids"])  # no end to a model that reads plain text
    assert not any(turn in ids[:-1] for ids in tuned["token_ids"])
    assert tuned["terminated"][[ids[-1] == turn for ids in tuned["token_ids"]]].all()
    assert any(ids[-1] == turn for ids in tuned["token_ids"])


def test_an_end_token_that_base_lacks_ends_the_text_that_all_read(tmp_path: Path) -> None:
    tuned = chatml_tokenizer()
    tuned.add_special_tokens({"eos_token": "<|end|>"})  # a row more than base has
    folder = write_study(tmp_path, {"base": chatml_tokenizer(), "sft": chatml_tokenizer(), "rl": tuned})
    spec = spec_of()
    sample_outcomes(spec, folder, provenance=PROVENANCE)
    file = folder.completions / "rl@1.parquet"
    drawn, end = pd.read_parquet(file), len(tuned) - 1
    drawn["token_ids"] = [[5, 6, end]] * (len(drawn) - 1) + [[5, 6, end, 7]]
    drawn.to_parquet(file)
    told = Told()
    extract_activations(spec, folder, provenance=PROVENANCE, progress=told)
    assert told.messages == [
        "warning: 1 of 3 completions of rl@1 hold a token that not every model has; models read them up to there."
    ]
    stored = open_activations(folder.activations).load()
    completion = stored.isel(token=np.flatnonzero((stored.source == "rl@1") & (stored.segment == "completion")))
    assert completion.token_id.values.tolist() == [5, 6] * 3
    moved = measure_movement(spec, folder)
    assert (moved["kl_from_base"][1:] > 0).all()
    assert np.isfinite(moved["weight_distance"]).all()


def test_the_first_prompt_of_every_task_is_shown_as_it_is_read(tmp_path: Path) -> None:
    folder = write_study(tmp_path, dict.fromkeys(("base", "sft", "rl"), llama_tokenizer()))
    examples = rendered_examples(spec_of(), folder)
    assert [(one.task, one.prompt, one.models) for one in examples] == [
        ("sum", "a", ("base",)),
        ("gas", "b", ("base",)),
        ("sum", "a", ("sft", "rl")),
        ("gas", "b", ("sft", "rl")),
    ]
    assert examples[0].text == "<|begin_of_text|>What is 2 + 3?"
    assert examples[2].text.startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 3?")
    assert examples[2].text.count("<|begin_of_text|>") == 1
    assert examples[2].n_tokens == len(asked(llama_tokenizer(), QUESTIONS[0]))
    assert rendered_prompts(folder.outcomes) == []
    sample_outcomes(spec_of(), folder, provenance=PROVENANCE)
    assert [one["text"] for one in rendered_prompts(folder.outcomes)] == [one.text for one in examples]
    folder.spec.write_text(yaml.safe_dump(spec_of().model_dump(mode="json")))
    shown = CliRunner().invoke(main, ["status", str(tmp_path)]).output
    assert f"  sum, a, base ({examples[0].n_tokens} tokens): '<|begin_of_text|>What is 2 + 3?'\n" in shown
    assert f"  gas, b, sft rl ({examples[3].n_tokens} tokens): '<|begin_of_text|><|start_header_id|>user" in shown


def test_a_run_that_is_not_trained_yet_is_shown_with_bases_tokenizer(tmp_path: Path) -> None:
    folder = chatml(tmp_path)
    content = spec_of().model_dump(mode="json")
    content["runs"][0] |= {"method": "sft", "checkpoints": {}}
    examples = rendered_examples(StudySpec.model_validate(content), folder)
    assert [one.models for one in examples] == [("base",), ("base",), ("sft", "rl"), ("sft", "rl")]


MESSAGES = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}] for text in QUESTIONS]


def test_prompts_may_be_lists_of_messages_where_every_model_reads_a_template(tmp_path: Path) -> None:
    folder = write_study(tmp_path, dict.fromkeys(("base", "sft", "rl"), chatml_tokenizer()), MESSAGES)
    spec = spec_of(base={"chat_template": "checkpoint"})
    examples = rendered_examples(spec, folder)
    assert examples[0].models == ("base", "sft", "rl")
    assert examples[0].text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(InputError, match=r"text of row \d is a list of chat messages, which no chat template renders"):
        sample_outcomes(spec_of(), folder, provenance=PROVENANCE)
