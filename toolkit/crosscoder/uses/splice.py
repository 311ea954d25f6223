"""Splicing: a model's next-token loss when reconstructions replace its activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.extraction.batching import by_length, left_pad
from rlgen_stats.toolkit.extraction.next_token_kl import kl_divergence
from rlgen_stats.toolkit.extraction.residual_stream import block_output, locate_layer


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
    model: Any, layer: int, texts: Sequence[SplicedText], *, constant: NDArray[np.floating], batch_size: int = 32
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

    Returns
    -------
    SpliceCE
        Loss of predicting token t + 1 from a replaced token t, averaged over all such t.

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
    sums, n_tokens = np.zeros(5), 0
    for rows in by_length([len(text.token_ids) for text in texts], batch_size):
        losses = _batch_losses(model, layer, [texts[row] for row in rows], constant)
        sums, n_tokens = sums + losses.sum(axis=1), n_tokens + losses.shape[1]
    if not n_tokens:
        raise InputError("no replaced token is followed by another; give longer texts or a wider mask.")
    clean, spliced, ablated, kl, kl_ablated = (sums / n_tokens).tolist()
    return SpliceCE(clean, spliced, ablated, n_tokens, kl, kl_ablated)


@torch.inference_mode()
def _batch_losses(
    model: Any, layer: int, texts: Sequence[SplicedText], constant: NDArray[np.floating]
) -> NDArray[np.float64]:
    """[clean | spliced | ablated | KL spliced | KL ablated, token] of one left-padded batch."""
    ids, attention, positions = left_pad([text.token_ids.tolist() for text in texts], 0, model.device)
    length = ids.shape[1]
    replacement = torch.zeros(*ids.shape, len(constant))
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, text in enumerate(texts):
        start = length - len(text.token_ids)
        replacement[row, start:] = torch.from_numpy(text.replacement)
        mask[row, start:] = torch.from_numpy(text.mask)
    replacement, mask = replacement.to(model.device), mask.to(model.device)
    mean = torch.as_tensor(constant, dtype=torch.float32, device=model.device)
    scored = mask.clone()
    scored[:, -1] = False  # the last token has no successor to be scored on

    def log_probabilities(replace: Callable[[Tensor], Tensor]) -> Tensor:
        with replaced_residual(model, layer, replace):
            out = model(input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False)
        log_p: Tensor = out.logits[scored].double().log_softmax(dim=-1)
        return log_p

    clean = log_probabilities(lambda hidden: hidden)
    target = ids.roll(-1, dims=1)[scored][:, None]
    losses, divergences = [-clean.gather(1, target)[:, 0]], []
    for vector in (replacement, mean):
        log_p = log_probabilities(
            lambda hidden, vector=vector: torch.where(mask[..., None], vector.to(hidden.dtype), hidden)  # type: ignore[misc]
        )
        losses.append(-log_p.gather(1, target)[:, 0])
        divergences.append(kl_divergence(clean, log_p))
    return np.asarray(torch.stack([*losses, *divergences]).cpu().numpy(), dtype=np.float64)


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
