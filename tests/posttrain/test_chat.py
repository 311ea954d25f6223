"""Training prompts are read as the run's chat template and the rest of the study read them, with one BOS."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder
from rlgen_stats.toolkit.extraction import load_tokenizer
from rlgen_stats.toolkit.extraction.checkpoints import load_model
from rlgen_stats.toolkit.posttrain import load_training_table, train_run
from tests.extraction.bpe import llama_tokenizer, save_bpe
from tests.posttrain.conftest import GRPO, SFT

QUESTION, ANSWER = "What is 2 + 3?", "The answer is 5."


def spec_of(method: str, **run: Any) -> StudySpec:
    trainer = {"sft": SFT, "grpo": GRPO}[method] | {"max_steps": 1, "per_device_train_batch_size": 4}
    own = {"name": "here", "arm": "a", "method": method, "n_checkpoints": 1, "trainer": trainer, **run}
    return StudySpec.model_validate(
        {
            "name": "chat",
            "device": "cpu",
            "base": {"path": "base"},
            "runs": [own, {"name": "there", "arm": "b", "checkpoints": {1: "there"}}],
            "crosscoders": [{"name": "main", "views": ["base@0", "here@final", "there@final"]}],
        }
    )


def study(root: Path, text: Any = QUESTION, completion: Any = ANSWER) -> StudyFolder:
    save_bpe(root / "base", llama_tokenizer())
    (root / "data").mkdir()
    rows = [{"text": text, "answer": "5", "completion": completion}] * 4
    pd.DataFrame(rows).to_parquet(root / "data/train.parquet")
    return StudyFolder(root)


def trained(spec: StudySpec, folder: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Every row of tokens that the model read in training, without padding on the left."""
    rows: list[list[int]] = []

    def spied(*args: Any, **how: Any) -> Any:
        model = load_model(*args, **how)

        def note(module: Any, given: Any, named: dict[str, torch.Tensor]) -> None:
            if named.get("attention_mask") is not None and named["input_ids"].shape[1] > 1:
                for ids, mask in zip(named["input_ids"], named["attention_mask"], strict=True):
                    rows.append(ids[mask[-len(ids) :].bool()].tolist())

        model.register_forward_pre_hook(note, with_kwargs=True)
        return model

    # by its module: the package has a function of the module's name
    monkeypatch.setattr(import_module("rlgen_stats.toolkit.posttrain.train_run"), "load_model", spied)
    train_run(spec, spec.runs[0], folder)
    return rows


MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.mark.parametrize("method", ["sft", "grpo"])
@pytest.mark.parametrize("form", ["rendered before", "text", "messages"])
def test_the_model_is_trained_on_one_bos(
    method: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = llama_tokenizer()
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    expected = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    texts = {"rendered before": prompt, "text": QUESTION, "messages": MESSAGES}
    folder = study(tmp_path, texts[form], [{"role": "assistant", "content": ANSWER}] if form == "messages" else ANSWER)
    chat = {} if form == "rendered before" else {"chat_template": "checkpoint"}
    rows = trained(spec_of(method, **chat), folder, monkeypatch)
    assert rows
    for row in rows:
        assert row[: len(expected)] == expected
        assert row.count(tokenizer.bos_token_id) == 1
    if method == "sft":  # ends as the template ends a turn, or as the tokenizer ends a text
        end = "<|end_of_text|>" if form == "rendered before" else "<|eot_id|>"
        assert rows[0] == [*expected, *tokenizer(ANSWER + end, add_special_tokens=False)["input_ids"]]


def test_a_run_trained_under_a_template_keeps_it_and_its_end(tmp_path: Path) -> None:
    folder = study(tmp_path)
    (tmp_path / "chat.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|eot_id|>{% endfor %}"
    )
    spec = spec_of("sft", chat_template="chat.jinja")
    train_run(spec, spec.runs[0], folder)
    saved = load_tokenizer(folder.run("here") / "step-1")
    assert saved.eos_token == "<|eot_id|>"
    assert saved.chat_template == (tmp_path / "chat.jinja").read_text()
    before = (folder.run("here") / "step-1/model.safetensors").stat().st_mtime_ns
    train_run(spec, spec.runs[0], folder)
    assert (folder.run("here") / "step-1/model.safetensors").stat().st_mtime_ns == before
    (tmp_path / "chat.jinja").write_text("{{ bos_token }}{{ messages[0]['content'] }}<|eot_id|>")
    train_run(spec, spec.runs[0], folder)  # another template is another training
    assert (folder.run("here") / "step-1/model.safetensors").stat().st_mtime_ns != before


def test_messages_are_refused_without_a_template_and_where_they_are_not_the_assistants(tmp_path: Path) -> None:
    folder = study(tmp_path, MESSAGES, MESSAGES)
    spec = spec_of("sft")
    with pytest.raises(InputError, match=r"train\.parquet: text of row 1 is a list of chat messages, which no chat"):
        load_training_table(spec, spec.runs[0], folder)
    spec = spec_of("sft", chat_template="checkpoint")
    with pytest.raises(InputError, match="completion of row 1 holds 1 chat messages; expected one, of the assistant"):
        load_training_table(spec, spec.runs[0], folder)
