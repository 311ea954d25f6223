"""Log-likelihoods of given choices: multiple choice without generation.

Prompt and choice are split into tokens as lm-evaluation-harness does it: the prompt alone, then prompt, a space and
choice as one text, whose tokens after the prompt's are the choice's. A prompt that ends in white space (a line feed, a
chat template) gets no space more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError, ModelError
from rlgen_stats.toolkit.extraction.batching import encode_prompts, left_pad, pad_id
from rlgen_stats.toolkit.extraction.next_token import logits_at, positions_at_once
from rlgen_stats.toolkit.progress import SILENT, Progress


class PromptLengths(Protocol):
    """What must be told where prompts end: the handle of an edit in force (``toolkit.edits.ActiveEdit``)."""

    prompt_lengths: torch.Tensor | None


@dataclass(frozen=True)
class ChoiceScores:
    """The choices of one prompt and how likely the model finds them."""

    choices: tuple[str, ...]
    """As they were given, without the space before them."""
    token_ids: tuple[tuple[int, ...], ...]
    """Tokens of each choice after the prompt's."""
    log_likelihood: NDArray[np.float64]
    """[choice] sum of the log-probabilities of its tokens, nats."""

    def normalized(self, normalize: str) -> NDArray[np.float64]:
        """[choice] log-likelihood as it is (``none``), or per token (``tokens``) or character (``characters``).

        Notes
        -----
        The largest value decides lm-evaluation-harness's ``acc`` (none) and ``acc_norm`` (characters).
        """
        match normalize:
            case "none":
                return self.log_likelihood
            case "tokens":
                lengths = [len(ids) for ids in self.token_ids]
            case "characters":
                lengths = [len(choice) for choice in self.choices]
            case _:
                raise InputError(f"normalize is none, tokens or characters, got {normalize!r}.")
        return self.log_likelihood / np.array(lengths, dtype=np.float64)

    def best(self, normalize: str) -> int:
        """Index of the most likely choice, the first one among equals."""
        return int(self.normalized(normalize).argmax())


@dataclass(frozen=True)
class _Row:
    """One text to be read, and the choices that its logits score: a choice may end where another goes on."""

    ids: tuple[int, ...]
    prompt_length: int
    scored: dict[tuple[int, int], tuple[int, ...]]
    """(prompt, choice) -> the choice's tokens."""

    @property
    def n_kept(self) -> int:
        """Positions whose logits are needed: the prompt's last token and all after it."""
        return len(self.ids) - self.prompt_length + 1


def score_choices(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    *,
    special: bool = True,
    batch_size: int = 64,
    active: PromptLengths | None = None,
    progress: Progress = SILENT,
    description: str = "score choices",
) -> list[ChoiceScores]:
    """Log-likelihood of every choice of every prompt, given the prompt.

    Parameters
    ----------
    model, tokenizer
        Causal language model and its tokenizer. The model may carry hooks: only its ordinary forward pass is used.
    prompts
        Texts, one per row.
    choices
        Of each prompt, one text or more.
    special
        Whether prompts get the tokenizer's leading special tokens; those that a chat template rendered have their own.
    batch_size
        Texts per forward pass; fewer where their logits would take more than ``next_token.LOGIT_BYTES``.
    active
        Handle of the edit in force, which needs to know where prompts end.
    progress, description
        Receiver and title of progress, counted in prompts.

    Returns
    -------
    list of ChoiceScores
        In the order of ``prompts``.

    Raises
    ------
    InputError
        If a choice is empty; if the tokenizer joins the end of a prompt with a choice; or if a prompt and its choice do
        not fit the model's context.
    ModelError
        If the model's logits are NaN.

    Notes
    -----
    Log-probabilities are computed in float32, of one text at a time, and summed in float64. A choice whose tokens but
    the last begin another choice of the prompt is read along with it: single letters cost one text a prompt.
    """
    encoded = encode_choices(tokenizer, prompts, choices, special=special)
    rows = [row for index, (ids, ends) in enumerate(encoded) for row in _rows(index, ids, ends)]
    _check_context(model, rows)
    scores = [np.zeros(len(ends)) for _, ends in encoded]
    unread = [len(ends) for _, ends in encoded]
    with progress.task(description, total=len(prompts), unit="prompts") as task:
        for batch in _batches(rows, batch_size, positions_at_once(model)):
            for (prompt, choice), log_likelihood in _read(model, batch, pad_id(tokenizer), active).items():
                if np.isnan(log_likelihood):
                    raise ModelError(
                        f"{description}: the model's logits are NaN; load it in a type that holds its values, or leave "
                        "it out."
                    )
                scores[prompt][choice] = log_likelihood
                unread[prompt] -= 1
                task.advance(int(unread[prompt] == 0))
    return [
        ChoiceScores(tuple(texts), tuple(ends), values)
        for texts, (_, ends), values in zip(choices, encoded, scores, strict=True)
    ]


def encode_choices(
    tokenizer: Any, prompts: Sequence[str], choices: Sequence[Sequence[str]], *, special: bool = True
) -> list[tuple[list[int], list[tuple[int, ...]]]]:
    """Of every prompt its token ids, as for generation, and those that each choice adds; see the module for the rule.

    Raises
    ------
    InputError
        As :func:`score_choices`.
    """
    contexts = encode_prompts(tokenizer, prompts, special=special)
    pairs = [(prompt, choice) for prompt, texts in zip(prompts, choices, strict=True) for choice in texts]
    blank = [prompt for prompt, choice in pairs if not choice.strip()]
    if blank:
        raise InputError(f"{len(blank)} choice(s) are empty, the first of prompt {blank[0][:60]!r}; give them a text.")
    spaces = ["" if prompt[-1:].isspace() else " " for prompt, _ in pairs]
    joined = [prompt + space + choice for (prompt, choice), space in zip(pairs, spaces, strict=True)]
    wholes = iter(encode_prompts(tokenizer, joined, special=special))
    encoded = []
    for prompt, ids, texts in zip(prompts, contexts, choices, strict=True):
        ends = []
        for choice, whole in zip(texts, wholes, strict=False):
            if whole[: len(ids)] != ids or len(whole) == len(ids):
                raise InputError(
                    f"the tokenizer joins the end of prompt ...{prompt[-30:]!r} with its choice {choice[:30]!r}, which "
                    "then has no tokens of its own; end the prompt without a space, one is put before the choice."
                )
            ends.append(tuple(whole[len(ids) :]))
        encoded.append((ids, ends))
    return encoded


def _rows(prompt: int, ids: Sequence[int], ends: Sequence[tuple[int, ...]]) -> list[_Row]:
    """The fewest texts that score all choices of a prompt; the last token of a choice is predicted, never read."""
    rows: list[_Row] = []
    for choice in sorted(range(len(ends)), key=lambda c: -len(ends[c])):
        read = (*ids, *ends[choice][:-1])
        row = next((row for row in rows if row.ids[: len(read)] == read), None)
        if row is None:
            row = _Row(read, len(ids), {})
            rows.append(row)
        row.scored[prompt, choice] = ends[choice]
    return rows


def _check_context(model: Any, rows: Sequence[_Row]) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(row.ids) for row in rows), default=0)
    if limit is not None and longest > limit:
        raise InputError(
            f"the longest prompt and its choice have {longest} tokens, but the model's context is {limit}; shorten the "
            "prompts."
        )


def _batches(rows: Sequence[_Row], batch_size: int, n_positions: int) -> Iterator[list[_Row]]:
    """Rows in batches of similar length, none with more positions that need logits unless it is a single row."""
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        n_kept = sum(other.n_kept for other in (*batch, row))
        if batch and (len(batch) == batch_size or n_kept > n_positions):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _read(model: Any, batch: Sequence[_Row], pad: int, active: PromptLengths | None) -> dict[tuple[int, int], float]:
    """Log-likelihood of each (prompt, choice) that the texts of a batch score."""
    ids, mask, positions = left_pad([row.ids for row in batch], pad, model.device)
    n_kept = [row.n_kept for row in batch]
    kept = torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(n_kept)[:, None]
    if active is not None:
        active.prompt_lengths = torch.tensor([row.prompt_length for row in batch], device=ids.device)
    try:
        logits = logits_at(model, kept, input_ids=ids, attention_mask=mask, position_ids=positions)
    finally:
        if active is not None:
            active.prompt_lengths = None
    scores = {}
    for row, of_row in zip(batch, torch.split(logits, n_kept), strict=True):
        log_p = torch.log_softmax(of_row.float(), dim=-1)
        for key, tokens in row.scored.items():
            chosen = log_p[torch.arange(len(tokens)), torch.tensor(tokens)]
            scores[key] = float(chosen.cpu().double().sum())
    return scores
