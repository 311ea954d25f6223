"""Splicing: a model's next-token loss when reconstructions replace its activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.crosscoder.data.text_bounds import spread
from rlgen_stats.toolkit.extraction.batching import left_pad
from rlgen_stats.toolkit.extraction.next_token import (
    kl_divergence,
    log_probability_blocks,
    logits_at,
    positions_at_once,
)
from rlgen_stats.toolkit.extraction.residual_stream import block_output, locate_layer

SCORED_TOKENS: Final = 4096
"""Tokens at which losses are compared: a mean loss of a few nats with a spread as large is then known to 2 or 3%."""


@dataclass(frozen=True)
class SplicedText:
    """One text with what replaces the residual stream in it."""

    token_ids: NDArray[np.integer]
    """[token]."""
    replacement: NDArray[np.float32]
    """[token, channel], raw units of the model."""
    mask: NDArray[np.bool_]
    """[token]: where the activation is replaced."""


@dataclass(frozen=True)
class SpliceCE:
    """Mean next-token cross-entropy, in nats, at the replaced tokens."""

    clean: float
    """Of the untouched model."""
    spliced: float
    """With the replacements."""
    ablated: float
    """With one constant vector in their place: mean ablation, the reference for ``recovered``."""
    n_tokens: int
    """Tokens averaged over."""
    kl: float = float("nan")
    """Mean KL divergence of the spliced model's next-token distribution from the untouched one's, in nats."""
    kl_ablated: float = float("nan")
    """The same with the constant vector."""

    @property
    def kl_recovered(self) -> float:
        """Share of the constant's divergence that the replacement avoids: 1 is perfect."""
        return 1.0 - self.kl / self.kl_ablated if self.kl_ablated > 0 else float("nan")

    @property
    def increase(self) -> float:
        """Nats lost to the replacement."""
        return self.spliced - self.clean

    @property
    def recovered(self) -> float:
        """Share of the loss of mean ablation that the replacement avoids: 1 is perfect, 0 as bad as the mean.

        NaN where the constant loses nothing.
        """
        lost = self.ablated - self.clean
        return 1.0 - self.increase / lost if lost > 0 else float("nan")


def splice_ce(
    model: Any,
    layer: int,
    texts: Sequence[SplicedText],
    *,
    constant: NDArray[np.floating],
    batch_size: int = 32,
    max_tokens: int = SCORED_TOKENS,
) -> SpliceCE:
    """Cross-entropy of forced texts with the residual stream after block ``layer`` replaced.

    Parameters
    ----------
    model
        Causal language model of Hugging Face.
    layer
        Decoder block whose output is replaced, counted from 0.
    texts
        Tokens, replacements and where they go.
    constant
        [channel], raw units: the reference for ``ablated``, usually the mean activation.
    batch_size
        Texts per forward pass.
    max_tokens
        Of more replaced tokens than this, an evenly spread sample is scored; all are replaced.

    Returns
    -------
    SpliceCE
        Loss of predicting token t + 1 from a replaced token t, averaged over such t.

    Raises
    ------
    InputError
        If no replaced token has a successor, or a replacement has another shape than its text.
    """
    for text in texts:
        if text.replacement.shape != (len(text.token_ids), len(constant)) or text.mask.shape != text.token_ids.shape:
            raise InputError(
                f"a text of {len(text.token_ids)} tokens needs replacements [{len(text.token_ids)}, {len(constant)}] "
                f"and a mask of its length, got {text.replacement.shape} and {text.mask.shape}."
            )
    at_once = positions_at_once(model)
    scored = _scored_tokens(texts, max_tokens, at_once)
    if not scored:
        raise InputError("no replaced token is followed by another; give longer texts or a wider mask.")
    sums, n_tokens = np.zeros(5), 0
    for rows in _batches(texts, scored, batch_size, at_once):
        losses = _batch_losses(model, layer, [texts[row] for row in rows], [scored[row] for row in rows], constant)
        sums, n_tokens = sums + losses.sum(axis=1), n_tokens + losses.shape[1]
    clean, spliced, ablated, kl, kl_ablated = (sums / n_tokens).tolist()
    return SpliceCE(clean, spliced, ablated, n_tokens, kl, kl_ablated)


def _scored_tokens(texts: Sequence[SplicedText], most: int, most_of_one: int) -> dict[int, NDArray[np.int64]]:
    """Text -> positions at which it is scored: replaced tokens with a successor, evenly spread if too many."""
    candidates = [np.flatnonzero(text.mask[:-1]) for text in texts]
    candidates = [places[spread(len(places), most_of_one)] for places in candidates]
    row = np.repeat(np.arange(len(texts)), [len(places) for places in candidates])
    kept = spread(len(row), most)
    row, places = row[kept], np.concatenate([*candidates, np.empty(0, np.int64)])[kept]
    return {int(one): places[row == one] for one in np.unique(row)}


def _batches(
    texts: Sequence[SplicedText], scored: Mapping[int, NDArray[np.int64]], batch_size: int, most: int
) -> Iterator[list[int]]:
    """Scored texts of similar length in batches with at most ``most`` scored tokens (one text at least)."""
    batch: list[int] = []
    for row in sorted(scored, key=lambda row: len(texts[row].token_ids)):
        if batch and (len(batch) == batch_size or sum(len(scored[other]) for other in (*batch, row)) > most):
            yield batch
            batch = []
        batch.append(row)
    yield batch


@torch.inference_mode()
def _batch_losses(
    model: Any,
    layer: int,
    texts: Sequence[SplicedText],
    scored: Sequence[NDArray[np.int64]],
    constant: NDArray[np.floating],
) -> NDArray[np.float64]:
    """[clean | spliced | ablated | KL spliced | KL ablated, token] of one left-padded batch."""
    ids, attention, positions = left_pad([text.token_ids.tolist() for text in texts], 0, model.device)
    replacement = torch.zeros(*ids.shape, len(constant))
    mask, chosen = torch.zeros(ids.shape, dtype=torch.bool), torch.zeros(ids.shape, dtype=torch.bool)
    for row, text in enumerate(texts):
        start = ids.shape[1] - len(text.token_ids)
        replacement[row, start:] = torch.from_numpy(text.replacement)
        mask[row, start:] = torch.from_numpy(text.mask)
        chosen[row, start + torch.from_numpy(scored[row])] = True
    mean = torch.as_tensor(constant, dtype=torch.float32)

    def logits(vector: Tensor | None) -> Tensor:
        def replace(hidden: Tensor) -> Tensor:
            if vector is None:
                return hidden
            where = mask.to(hidden.device)[..., None]
            return torch.where(where, vector.to(hidden.device, hidden.dtype), hidden)

        with replaced_residual(model, layer, replace):
            return logits_at(model, chosen, input_ids=ids, attention_mask=attention, position_ids=positions)

    clean, target = logits(None), ids.roll(-1, dims=1)[chosen.to(ids.device)][:, None]
    of_texts, of_mean = (_compare(clean, logits(vector), target.to(clean.device)) for vector in (replacement, mean))
    losses = [of_texts[0], of_texts[1], of_mean[1], of_texts[2], of_mean[2]]
    return np.asarray(torch.stack(losses).cpu().numpy(), dtype=np.float64)


def _compare(clean: Tensor, edited: Tensor, target: Tensor) -> Tensor:
    """[loss of clean | loss of edited | KL(clean || edited), token] in float64."""
    done, blocks = 0, []
    for p, q in log_probability_blocks(clean, edited):
        token = target[done : done + len(p)]
        blocks.append(torch.stack([-p.gather(1, token)[:, 0], -q.gather(1, token)[:, 0], kl_divergence(p, q)]))
        done += len(p)
    return torch.cat(blocks, dim=1)


@contextmanager
def replaced_residual(model: torch.nn.Module, layer: int, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let ``replace`` rewrite the output [batch, token, channel] of decoder block ``layer`` inside the context."""

    def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
        hidden = replace(block_output(output))
        if isinstance(output, tuple | list):
            return type(output)((hidden, *output[1:]))
        return hidden

    handle = locate_layer(model, layer).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
