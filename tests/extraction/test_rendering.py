"""Chat templates, one BOS, and tokenizers that must agree on the study's texts and on nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers

from rlgen_stats.schemas.errors import InputError, ModelError
from rlgen_stats.schemas.study import ChatSpec
from rlgen_stats.stores import Provenance
from rlgen_stats.stores.study_models import ModelRef
from rlgen_stats.toolkit.extraction import (
    PromptReader,
    check_tokenizers,
    generate,
)
from tests.extraction.bpe import bpe_model, chatml_tokenizer, llama_tokenizer

PROVENANCE = Provenance("chat-study", "chat-key")
QUESTION = "What is 2 + 3?"
PLAIN, CHAT = ChatSpec(), ChatSpec(chat_template="checkpoint")


def reader(tokenizer: Any, chat: ChatSpec = CHAT) -> PromptReader:
    return PromptReader(tokenizer, chat, "rl@1")


def template(tmp_path: Path, text: str) -> ChatSpec:
    (tmp_path / "chat.jinja").write_text(text)
    return ChatSpec(chat_template=str(tmp_path / "chat.jinja"))


@pytest.mark.parametrize("tokenizer", [chatml_tokenizer(), llama_tokenizer()])
def test_prompts_are_encoded_as_apply_chat_template_does(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
    assert reader(tokenizer).encode([QUESTION]) == [expected]
    assert reader(tokenizer).encode([json.dumps(messages)]) == [expected]
    assert reader(tokenizer, PLAIN).encode([QUESTION]) == [tokenizer(QUESTION)["input_ids"]]


@pytest.mark.parametrize("tokenizer", [chatml_tokenizer(), llama_tokenizer()])
def test_a_prompt_that_is_rendered_already_is_not_rendered_again(tokenizer: Any) -> None:
    written = reader(tokenizer).render(QUESTION)
    with pytest.raises(InputError, match=r"rl@1: prompt .* begins with the special token .* rendered it already"):
        reader(tokenizer).render(written)
    assert reader(tokenizer, PLAIN).render(written) == written


@pytest.mark.parametrize("chat", [PLAIN, CHAT])
def test_bos_comes_once(chat: ChatSpec) -> None:
    tokenizer = llama_tokenizer()
    bos, written = tokenizer.bos_token_id, reader(tokenizer).render(QUESTION)
    assert tokenizer(written)["input_ids"][:2] == [bos, bos]  # what is guarded against
    plain = reader(tokenizer, PLAIN)
    once = reader(tokenizer).encode([QUESTION])[0]
    assert once.count(bos) == 1
    assert plain.encode([written, QUESTION]) == [once, tokenizer(QUESTION)["input_ids"]]
    assert plain.encode([QUESTION])[0].count(bos) == 1
    seen: list[Any] = []
    model = bpe_model(tokenizer)
    model.register_forward_pre_hook(lambda *args: seen.append(args[2]["input_ids"][0].tolist()), with_kwargs=True)
    generate(model, tokenizer, [written], max_new_tokens=1, greedy=True)
    assert seen == [once]


def test_a_template_decides_about_its_own_special_tokens(tmp_path: Path) -> None:
    """The tokenizer would put a BOS before a text; the model was not trained with one."""
    tokenizer, chat = llama_tokenizer(), template(tmp_path, "Q: {{ messages[0]['content'] }}\nA:")
    ids = reader(tokenizer, chat).encode([QUESTION])[0]
    assert ids == tokenizer(f"Q: {QUESTION}\nA:", add_special_tokens=False)["input_ids"]
    assert tokenizer.bos_token_id not in ids


def test_a_pad_token_that_the_model_has_no_row_for_is_not_used() -> None:
    tokenizer = with_added(chatml_tokenizer(), pad_token="<pad>")
    model, prompts = bpe_model(tokenizer, n_rows=len(tokenizer) - 1), [QUESTION, "q"]
    together = generate(model, tokenizer, prompts, max_new_tokens=4, greedy=True, batch_size=2)
    assert together == [generate(model, tokenizer, [one], max_new_tokens=4, greedy=True)[0] for one in prompts]


def test_an_end_that_is_no_special_token_is_no_part_of_the_text(tmp_path: Path) -> None:
    tokenizer = chatml_tokenizer()
    tokenizer.add_tokens(["<turn>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<turn>{% endfor %}"
    model, turn = bpe_model(tokenizer), reader(tokenizer).end_of_turn
    assert turn == len(tokenizer) - 1
    model.lm_head.weight[turn] *= 4  # drawn often
    drawn = generate(model, tokenizer, [QUESTION] * 8, max_new_tokens=6, seeds=range(8), end_of_turn=turn)
    assert any(one.token_ids[-1] == turn for one in drawn)
    assert not any("<turn>" in one.text for one in drawn)


def test_a_system_message_template_arguments_and_a_file_are_used(tmp_path: Path) -> None:
    tokenizer = chatml_tokenizer()
    asked = CHAT.model_copy(update={"system": "Be brief.", "chat_template_kwargs": {"enable_thinking": False}})
    text = reader(tokenizer, asked).render(QUESTION)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n" + QUESTION)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    own = [{"role": "system", "content": "Be long."}, {"role": "user", "content": QUESTION}]
    assert "Be brief" not in reader(tokenizer, asked).render(json.dumps(own))
    from_file = template(tmp_path, "Q: {{ messages[0]['content'] }}\nA:")
    assert reader(tokenizer, from_file).render(QUESTION) == f"Q: {QUESTION}\nA:"


def test_what_cannot_be_rendered_is_refused_in_a_sentence(tmp_path: Path) -> None:
    tokenizer = chatml_tokenizer()
    with pytest.raises(ModelError, match="the chat template reads no 'enable_thinkin'"):
        reader(tokenizer, CHAT.model_copy(update={"chat_template_kwargs": {"enable_thinkin": False}}))
    ends = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    with pytest.raises(InputError, match="end with the assistant's"):
        reader(tokenizer).render(ends)
    refusing = template(tmp_path, "{{ raise_exception('no system message here') }}")
    with pytest.raises(InputError, match=r"rl@1: its chat template refuses .*no system message here"):
        reader(tokenizer, refusing).render(QUESTION)
    with pytest.raises(ModelError, match=r"no chat template at .*none\.jinja"):
        reader(tokenizer, ChatSpec(chat_template=str(tmp_path / "none.jinja")))
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="chat_template is 'checkpoint', but its tokenizer has none"):
        reader(tokenizer)


def test_a_template_that_writes_todays_date_is_refused_until_the_date_is_fixed(tmp_path: Path) -> None:
    """Llama 3.2's does: results would differ tomorrow."""
    dated = template(
        tmp_path,
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "Today: {{ date_string }}. {{ messages[0]['content'] }}",
    )
    tokenizer = chatml_tokenizer()
    with pytest.raises(InputError, match="writes today's date into the prompt"):
        reader(tokenizer, dated).render(QUESTION)
    fixed = dated.model_copy(update={"chat_template_kwargs": {"date_string": "26 Jul 2024"}})
    assert reader(tokenizer, fixed).render(QUESTION) == f"Today: 26 Jul 2024. {QUESTION}"


@pytest.mark.parametrize(("tokenizer", "end"), [(chatml_tokenizer(), "<|im_end|>"), (llama_tokenizer(), "<|eot_id|>")])
def test_a_model_that_reads_a_template_stops_at_its_end_of_turn(tokenizer: Any, end: str, tmp_path: Path) -> None:
    turn = reader(tokenizer).end_of_turn
    assert turn == tokenizer.convert_tokens_to_ids(end) != tokenizer.eos_token_id
    assert reader(tokenizer, PLAIN).end_of_turn is None
    assert reader(tokenizer, template(tmp_path, "{{ messages[-1]['content'] }}\n")).end_of_turn is None
    model = bpe_model(tokenizer)
    model.lm_head.weight[turn] *= 4  # drawn often
    free = generate(model, tokenizer, [QUESTION] * 8, max_new_tokens=6, seeds=range(8))
    stopped = generate(model, tokenizer, [QUESTION] * 8, max_new_tokens=6, seeds=range(8), end_of_turn=turn)
    assert any(turn in one.token_ids for one in free)
    for before, after in zip(free, stopped, strict=True):
        ids = list(before.token_ids)
        assert list(after.token_ids) == (ids[: ids.index(turn) + 1] if turn in ids else ids)
        assert after.terminated == (after.token_ids[-1] in (turn, tokenizer.eos_token_id))
        assert end not in after.text


# -- agreement of tokenizers


def refs_of(tmp_path: Path, *tokenizers: Any, chat: ChatSpec = PLAIN) -> list[ModelRef]:
    """The first is base's, which reads plain text."""
    refs = []
    for number, tokenizer in enumerate(tokenizers):
        tokenizer.save_pretrained(tmp_path / str(number))
        name = "rl" if number else "base"
        how = {"base": tmp_path / "0", "chat": chat if number else PLAIN}
        refs.append(
            ModelRef(model=f"{name}@{number}", run=name, step=number, arm=name, path=tmp_path / str(number), **how)
        )
    return refs


def with_added(tokenizer: Any, *tokens: str, **special: str) -> Any:
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)} | special)
    return tokenizer


@pytest.mark.parametrize(
    "other",
    [
        with_added(chatml_tokenizer(), pad_token="<pad>"),
        with_added(chatml_tokenizer(), "<|tool|>", "<|image|>"),
        chatml_tokenizer(eos="<|im_end|>"),
        with_added(chatml_tokenizer(), eos_token="<|end|>"),
    ],
    ids=["pad", "special", "other eos", "added eos"],
)
def test_what_no_text_holds_may_differ(tmp_path: Path, other: Any) -> None:
    check_tokenizers(refs_of(tmp_path, chatml_tokenizer(), other, chat=CHAT), [QUESTION])


def swapped(tokenizer: Any, first: str, second: str) -> Any:
    """The same tokenizer with two ids exchanged."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    return type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer.from_str(json.dumps(content)),
        eos_token=tokenizer.eos_token,
        chat_template=tokenizer.chat_template,
    )


def lowered() -> Any:
    other = chatml_tokenizer()
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    return other


@pytest.mark.parametrize(
    ("base", "other", "message"),
    [
        (
            chatml_tokenizer,
            lambda: swapped(chatml_tokenizer(), "q", "Z"),
            r"token 1 of 'q' is 'q' \(83\) there and 'q' \(60\) here",
        ),
        (chatml_tokenizer, lowered, r"token 1 of .What is 12 \+ 30.* is 'Wh'"),
        (llama_tokenizer, lambda: no_bos(llama_tokenizer()), r"token 1 of .* is '<\|begin_of_text\|>' \(0\) there"),
    ],
    ids=["other ids", "other reading", "other BOS"],
)
def test_what_a_text_holds_must_not_differ(tmp_path: Path, base: Any, other: Any, message: str) -> None:
    refs = refs_of(tmp_path, base(), other())
    with pytest.raises(ModelError, match=rf"rl@1 has another tokenizer than base@0: .*{message}"):
        check_tokenizers(refs, ["q"])


def no_bos(tokenizer: Any) -> Any:
    content = json.loads(tokenizer.backend_tokenizer.to_str()) | {"post_processor": None}
    raw = tokenizer.backend_tokenizer.from_str(json.dumps(content))
    return type(tokenizer)(tokenizer_object=raw, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)


def test_ids_that_the_texts_do_not_use_may_differ(tmp_path: Path) -> None:
    refs = refs_of(tmp_path, chatml_tokenizer(), swapped(chatml_tokenizer(), "q", "Z"))
    check_tokenizers(refs, [QUESTION])


def test_all_texts_up_to_a_bound_are_looked_at(tmp_path: Path) -> None:
    """One text in a thousand is enough; of more, an even sample."""
    refs = refs_of(tmp_path, chatml_tokenizer(), swapped(chatml_tokenizer(), "q", "Z"))
    with pytest.raises(ModelError, match="rl@1 has another tokenizer"):
        check_tokenizers(refs, [QUESTION] * 999 + ["q"])
    check_tokenizers(refs, [QUESTION] * 1001 + ["q"])  # every second one is read


def test_a_template_of_tokens_that_base_lacks_is_refused(tmp_path: Path) -> None:
    base, other = chatml_tokenizer(), with_added(chatml_tokenizer(), "<|turn|>")
    other.chat_template = "<|turn|>{{ messages[0]['content'] }}<|turn|>\n"
    check_tokenizers(refs_of(tmp_path, base, other), [QUESTION])
    with pytest.raises(ModelError, match=r"base@0 has another tokenizer than rl@1: token 1 of .<\|turn\|>"):
        check_tokenizers(refs_of(tmp_path, base, other, chat=CHAT), [QUESTION])
