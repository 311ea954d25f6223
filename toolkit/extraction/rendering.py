"""How models read texts: the one place where a prompt becomes token ids, and what models must agree on there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, Final, NoReturn

from rlgen_stats.schemas.dims import PROMPT, TASK
from rlgen_stats.schemas.errors import InputError, ModelError
from rlgen_stats.schemas.study import ChatSpec, StudySpec
from rlgen_stats.stores.folder import StudyFolder
from rlgen_stats.stores.prompts import TEXT, chat_messages, load_prompts
from rlgen_stats.stores.study_models import ModelRef, one_of_each
from rlgen_stats.toolkit.extraction.batching import encode, encode_prompts
from rlgen_stats.toolkit.extraction.checkpoints import load_tokenizer

N_CHECKED: Final = 1000
"""Texts, evenly spread over all, that every tokenizer must read alike."""
_PROBE: Final = "What is 12 + 30? The answer: x_1 = 4.5\n\nSo  it's  42."
"""Read too: digits, spaces, punctuation and newlines, which other merges split differently."""
_ANSWER: Final = "Forty-two"
"""A turn after which the template's end of turn is looked for."""
_TODAY: Final = "<today's date>"
_UNDATED: Final = f"{{% macro strftime_now(format) %}}{_TODAY}{{% endmacro %}}"
"""Put before a template, it shows where the template writes today's date."""


class PromptReader:
    """How one model reads prompts: with its tokenizer, by its chat template if it has one.

    Parameters
    ----------
    tokenizer
        The model's.
    chat
        Its chat template and what goes with it; a file's path is absolute.
    name
        The model, for errors.

    Raises
    ------
    ModelError
        If the template is missing, or reads no argument of a given name.
    """

    def __init__(self, tokenizer: Any, chat: ChatSpec, name: str) -> None:
        self.tokenizer, self.chat, self.name = tokenizer, chat, name
        self.template = self._template() if chat.rendered else None
        unknown = [
            key for key in chat.chat_template_kwargs if not re.search(rf"\b{re.escape(key)}\b", self.template or "")
        ]
        if unknown:
            raise ModelError(
                f"{name}: the chat template reads no {unknown[0]!r}; chat_template_kwargs take the names that it reads."
            )

    @cached_property
    def _special(self) -> list[str]:
        return [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]

    def _template(self) -> str:
        file = self.chat.template_file
        if file is not None:
            if not Path(file).is_file():
                raise ModelError(f"{self.name}: no chat template at {file}; correct chat_template in the study file.")
            return Path(file).read_text(encoding="utf-8")
        try:
            return str(self.tokenizer.get_chat_template())
        except ValueError as error:
            raise ModelError(
                f"{self.name}: chat_template is 'checkpoint', but its tokenizer has none; name a file with the "
                "template of its training, or write chat_template: none."
            ) from error

    def render(self, prompt: str) -> str:
        """A prompt as the text that the model completes.

        Raises
        ------
        InputError
            If the prompt is rendered already, or the template refuses it, or renders it otherwise on another day.
        """
        if self.template is None:
            return prompt
        messages = chat_messages(prompt) or [{"role": "user", "content": prompt}]
        special = next((token for token in self._special if prompt.startswith(token)), None)
        if special is not None:
            raise InputError(
                f"{self.name}: prompt {prompt[:60]!r} begins with the special token {special!r}, so a chat template "
                "has rendered it already; write chat_template: none, or give the user's words alone."
            )
        if messages[-1]["role"] == "assistant":
            raise InputError(
                f"the chat messages of prompt {prompt[:60]!r} end with the assistant's, which a model cannot answer; "
                "end them with the user's."
            )
        written = self._apply(messages)
        if _TODAY in written:
            raise InputError(
                f"{self.name}: the chat template writes today's date into the prompt, so that results would differ "
                "tomorrow; fix it under chat_template_kwargs (date_string: 26 Jul 2024), or name a file that does not."
            )
        return written

    def _apply(self, messages: list[dict[str, str]], *, ask: bool = True) -> str:
        if self.chat.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.chat.system}, *messages]
        template = f"{_UNDATED if 'strftime_now' in str(self.template) else ''}{self.template}"
        arguments = {"chat_template": template, "add_generation_prompt": ask, "tokenize": False}
        try:
            return str(self.tokenizer.apply_chat_template(messages, **arguments, **self.chat.chat_template_kwargs))
        except Exception as error:  # templates raise what they like
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{self.name}: its chat template refuses the messages {str(messages)[:100]} ({reason})."
            ) from error

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts as the model reads them: rendered, and with one BOS token at most."""
        # a template writes its own special tokens: what it does not write, the model was not trained with
        return encode_prompts(
            self.tokenizer, [self.render(prompt) for prompt in prompts], special=not self.chat.rendered
        )

    @cached_property
    def end_of_turn(self) -> int | None:
        """The special token with which the chat template ends an answer; None without a template, or if there is none.

        A model that reads a template stops at it, whatever its tokenizer's end token is.
        """
        if self.template is None:
            return None
        turn = [{"role": "user", "content": "2 + 40?"}, {"role": "assistant", "content": _ANSWER}]
        try:
            _, found, after = self._apply(turn, ask=False).rpartition(_ANSWER)
        except InputError:
            return None
        ids = self.tokenizer(after.strip(), add_special_tokens=False)["input_ids"] if found else []
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return int(ids[0]) if ids and ids[0] in special else None


def load_reader(ref: ModelRef) -> PromptReader:
    """How a model of the study reads prompts.

    Raises
    ------
    ModelError
        If it has no tokenizer or no chat template, though it should.
    """
    return PromptReader(load_tokenizer(ref), ref.chat, ref.model)


# -- what models must agree on


def check_tokenizers(refs: Sequence[ModelRef], texts: Sequence[str]) -> None:
    """Refuse models that read these texts as other tokens than the first one; they could not be compared on them.

    Parameters
    ----------
    refs
        Models, the base first.
    texts
        What they read: up to ``N_CHECKED`` of these texts and a probe are encoded by every model's tokenizer, as each
        of the models renders them.

    Raises
    ------
    ModelError
        Naming the model, the text and the first token that differs.

    Notes
    -----
    Vocabularies may differ in what no text holds: pad and special tokens added to some of them, another end token.
    """
    readers = [load_reader(ref) for ref in refs]
    sample = [_PROBE, *texts[:: max(1, -(-len(texts) // N_CHECKED))]]
    # models of one template render alike, but for the special tokens that a template asks of the tokenizer
    renderings = {(reader.template, reader.render(_PROBE)): reader for reader in reversed(readers)}
    for reader in renderings.values():
        written, special = [reader.render(text) for text in sample], reader.template is None
        expected = encode(reader.tokenizer, written, special=special)
        for other in readers:
            got = encode(other.tokenizer, written, special=special)
            for text, ids, others in zip(written, expected, got, strict=True):
                if ids != others:
                    _refuse(reader, ids, other, others, text)


def _refuse(one: PromptReader, ids: list[int], other: PromptReader, others: list[int], text: str) -> NoReturn:
    at = next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))

    def token(reader: PromptReader, of: list[int]) -> str:
        return f"{reader.tokenizer.convert_ids_to_tokens(of[at])!r} ({of[at]})" if at < len(of) else "nothing"

    raise ModelError(
        f"{other.name} has another tokenizer than {one.name}: token {at + 1} of {text[:60]!r} is {token(one, ids)} "
        f"there and {token(other, others)} here; all models of a study must read its texts as the same tokens: use "
        "runs of this base, correct the tokenizer's files, or name a chat template made of tokens that all have."
    )


def shared_tokens(refs: Sequence[ModelRef]) -> frozenset[int] | None:
    """Ids that are the same token in every model's vocabulary; None if the vocabularies are equal."""
    vocabularies = [set(load_tokenizer(ref).get_vocab().items()) for ref in refs]
    if all(one == vocabularies[0] for one in vocabularies):
        return None
    return frozenset(index for _, index in set.intersection(*vocabularies))


def read_by_all(ids: Iterable[int], shared: frozenset[int] | None) -> list[int]:
    """A completion up to its first token that is not the same in all models, such as an end token added to one."""
    known = (int(token) for token in ids)
    return list(known if shared is None else takewhile(shared.__contains__, known))


# -- what is shown


@dataclass(frozen=True)
class RenderedExample:
    """One prompt as models read it."""

    models: tuple[str, ...]
    """``base`` and names of runs."""
    task: str
    prompt: str
    """Id of the prompt, the task's first."""
    text: str
    """Its tokens, decoded with special tokens."""
    n_tokens: int


def rendered_examples(spec: StudySpec, folder: StudyFolder) -> list[RenderedExample]:
    """The first prompt of every task as base and runs read it; those that read alike together. Loads no weights.

    Parameters
    ----------
    spec, folder
        The study; of a run that is not trained yet, base's tokenizer is used.

    Raises
    ------
    InputError, ModelError
        If the prompts or a tokenizer cannot be read, or a chat template is missing or refuses a prompt.
    """
    prompts = load_prompts(spec, folder).drop_duplicates(TASK)
    names: dict[tuple[str, str, str, int], list[str]] = {}
    for ref in one_of_each(spec, folder):
        reader = load_reader(ref)
        encoded = reader.encode(list(prompts[TEXT]))
        for task, prompt, ids in zip(prompts[TASK], prompts[PROMPT], encoded, strict=True):
            names.setdefault((task, prompt, reader.tokenizer.decode(ids), len(ids)), []).append(ref.run)
    return [RenderedExample(tuple(models), *example) for example, models in names.items()]
