"""How far an edit moves next-token distributions, on fixed texts and positions."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.edits.hooks import ActiveEdit
from rlgen_stats.toolkit.extraction.batching import by_length, left_pad
from rlgen_stats.toolkit.extraction.residual_stream import read_residual
from rlgen_stats.toolkit.extraction.token_divergence import kl_divergence

MAX_NUMBERS: Final = 2**26
"""Log-probabilities kept of one reference model on one probe (256 MB): limits how many positions are compared."""


@dataclass(frozen=True)
class Batch:
    """Left-padded texts and, counted from the end, the positions compared."""

    rows: NDArray[np.int64]
    ids: Tensor
    mask: Tensor
    positions: Tensor
    prompt_lengths: Tensor
    weight: Tensor
    """[row, kept position] 1 where compared; the kept positions are the last ones."""


@dataclass(frozen=True)
class Probe:
    """Texts on which distributions are compared; row r belongs to prompt ``owner[r]``."""

    owner: NDArray[np.int64]
    batches: tuple[Batch, ...]

    @property
    def n_tokens(self) -> int:
        """Positions compared."""
        return int(sum(float(batch.weight.sum()) for batch in self.batches))


@dataclass(frozen=True)
class Probes:
    """Fixed texts, and both unedited models' distributions on them."""

    first: Probe
    forced: Probe
    neutral: Probe
    references: dict[str, dict[str, list[Tensor]]]
    """probe name -> view -> log-probabilities."""


def make_probe(
    texts: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    owner: Sequence[int],
    *,
    first: Sequence[int],
    last: Sequence[int],
    pad: int,
    batch_size: int,
    device: torch.device | str,
) -> Probe:
    """Probe of token sequences at positions ``first[r]`` to ``last[r]`` (both included) of row r.

    Position p of a text predicts its token p + 1.
    """
    batches = []
    for rows in by_length([len(text) for text in texts], batch_size):
        ids, mask, positions = left_pad([texts[r] for r in rows], pad, device)
        kept = max(len(texts[r]) - first[r] for r in rows)
        weight = torch.zeros(len(rows), kept)
        for i, r in enumerate(rows):
            start = kept - (len(texts[r]) - first[r])
            weight[i, start : start + last[r] - first[r] + 1] = 1.0
        lengths = torch.tensor([prompt_lengths[r] for r in rows], device=ids.device)
        batches.append(Batch(np.array(rows), ids, mask, positions, lengths, weight.to(device)))
    return Probe(np.asarray(owner, dtype=np.int64), tuple(batches))


@torch.inference_mode()
def log_probabilities(model: Any, probe: Probe, active: ActiveEdit | None = None) -> list[Tensor]:
    """Next-token log-probabilities [row, kept position, vocabulary] of each batch of a probe.

    Parameters
    ----------
    model
        Causal language model, with or without an edit in force.
    probe
        Texts and positions.
    active
        Handle of the edit in force; it is told where prompts end.
    """
    found = []
    has_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
    try:
        for batch in probe.batches:
            if active is not None:
                active.prompt_lengths = batch.prompt_lengths
            kept = batch.weight.shape[1]
            output = model(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                position_ids=batch.positions,
                use_cache=False,
                **({"logits_to_keep": kept} if has_keep else {}),
            )
            found.append(torch.log_softmax(output.logits[:, -kept:].float(), dim=-1))
    finally:
        if active is not None:
            active.prompt_lengths = None
    return found


def divergences(p: Sequence[Tensor], q: Sequence[Tensor], probe: Probe, n_prompts: int) -> NDArray[np.float64]:
    """[prompt] KL(p || q) in nats, averaged over a prompt's compared positions; NaN for prompts without any."""
    total, weight = np.zeros(n_prompts), np.zeros(n_prompts)
    for batch, log_p, log_q in zip(probe.batches, p, q, strict=True):
        kl = kl_divergence(log_p, log_q)
        kl = torch.where(torch.isfinite(log_p).all(dim=-1), kl, torch.full_like(kl, torch.nan))
        summed = torch.where(batch.weight > 0, kl, torch.zeros_like(kl)).sum(dim=1)
        owner = probe.owner[batch.rows]
        np.add.at(total, owner, summed.double().cpu().numpy())
        np.add.at(weight, owner, batch.weight.sum(dim=1).double().cpu().numpy())
    with np.errstate(invalid="ignore"):
        return np.where(weight > 0, total / np.where(weight > 0, weight, 1.0), np.nan)


def finite_mean(values: NDArray[np.float64]) -> float:
    """Mean of the finite values, NaN without any."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def mean_residual(model: Any, layer: int, probe: Probe) -> Tensor:
    """[channel] mean residual stream after a block over the compared positions of a probe.

    Raises
    ------
    InputError
        If there are none.
    """
    total: Tensor | None = None
    for batch in probe.batches:
        residual = read_residual(model, layer, batch.ids, batch.mask, batch.positions)
        summed = residual[:, -batch.weight.shape[1] :][batch.weight > 0].double().sum(dim=0)
        total = summed if total is None else total + summed
    if total is None:
        raise InputError("a mean activation needs tokens, got none; no completion has any.")
    return total / probe.n_tokens
