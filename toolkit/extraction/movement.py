"""How far each model moved from base: in its weights and in its next-token distributions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
import xarray as xr

from rlgen_stats.schemas.dims import BASE_MODEL, MODEL
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder
from rlgen_stats.stores.prompts import load_prompts
from rlgen_stats.stores.study_models import list_models, ref_coords
from rlgen_stats.toolkit.extraction.activations import Text, forced_texts
from rlgen_stats.toolkit.extraction.batching import by_length, left_pad, pad_id
from rlgen_stats.toolkit.extraction.checkpoints import load_model, load_tokenizer, resolve_device
from rlgen_stats.toolkit.extraction.next_token import (
    kl_divergence,
    log_probability_blocks,
    logits_at,
    positions_at_once,
)
from rlgen_stats.toolkit.progress import SILENT, Progress

_WEIGHTS: Final = 1 << 24
"""Weights held in float64 at once (128 MB)."""


def measure_movement(spec: StudySpec, folder: StudyFolder, *, progress: Progress = SILENT) -> xr.Dataset:
    """Distance of every model from base.

    Parameters
    ----------
    spec, folder
        The study, with its outcomes sampled.
    progress
        Receiver of progress, in models.

    Returns
    -------
    Dataset
        ``weight_distance[model]``: L2 norm of the weight change over the L2 norm of base's weights, over floating
        parameters of the same name and shape, adapters merged; of embeddings with rows for added tokens, the common
        rows. ``kl_from_base[model]``: mean over completion tokens of the texts base wrote of KL(base || model), in nats
        per token, over the tokens that both predict; NaN if base wrote none.

    Raises
    ------
    StageError, ModelError
        If completions or a checkpoint are missing.

    Notes
    -----
    The divergence is exact over the vocabulary at each position, not estimated from the sampled token. Positions are
    those of base's texts, so it is the KL rate per token of the two models as sources of text, from base to model.
    """
    refs = list_models(spec, folder)
    device, tokenizer = resolve_device(spec.device), load_tokenizer(refs[0])
    texts = forced_texts(spec, folder, [BASE_MODEL], load_prompts(spec, folder))
    base = load_model(refs[0], device=device)
    distances, divergences = [], []
    with progress.task("distance from base", total=len(refs), unit="models") as task:
        for ref in refs:
            model = base if ref is refs[0] else load_model(ref, device=device)
            distances.append(weight_distance(base, model))
            divergences.append(mean_divergence(base, model, texts, pad_id(tokenizer)))
            task.advance(1, model=ref.model, kl=divergences[-1])
    return xr.Dataset(
        {"weight_distance": (MODEL, distances), "kl_from_base": (MODEL, divergences, {"units": "nats per token"})},
        coords=ref_coords(refs),
    )


def weight_distance(base: torch.nn.Module, model: torch.nn.Module) -> float:
    """L2 norm of the weight difference relative to base, over floating parameters of the same name and shape.

    Of those that differ in their number of rows alone, the common rows count.
    """
    parameters = dict(model.named_parameters())
    change = norm = 0.0
    for name, reference in base.named_parameters():
        other = parameters.get(name)
        if other is not None and other.shape[1:] == reference.shape[1:] and reference.is_floating_point():
            rows = slice(min(len(other), len(reference)) if other.ndim else None)
            chunks = zip(_chunks(other[rows], reference.device), _chunks(reference[rows]), strict=True)
            for values, of_base in chunks:
                change += float((values - of_base).square().sum())
                norm += float(of_base.square().sum())
    return float(np.sqrt(change / norm)) if norm else float("nan")


def _chunks(weight: torch.Tensor, device: torch.device | None = None) -> Iterator[torch.Tensor]:
    """A parameter's values in float64, some at a time: differences of half types are not exact in these types."""
    return (part.to(device, torch.float64) for part in torch.split(weight.detach().flatten(), _WEIGHTS))


def mean_divergence(base: Any, model: Any, texts: Sequence[Text], pad: int) -> float:
    """Mean KL(base || model) of next-token distributions over the texts' completion tokens, in nats per token."""
    total, n_tokens = 0.0, 0
    for batch in _batches(texts, positions_at_once(base)):
        divergence = token_divergence(base, model, batch, pad)
        total, n_tokens = total + float(divergence.sum()), n_tokens + len(divergence)
    return total / n_tokens if n_tokens else float("nan")


@torch.inference_mode()
def token_divergence(base: Any, model: Any, texts: Sequence[Text], pad: int) -> torch.Tensor:
    """KL(base || model) at every completion token of one batch, [token] float64, text after text."""
    ids, mask, positions = left_pad([text.ids for text in texts], pad, base.device)
    inputs = {"attention_mask": mask, "position_ids": positions}
    predicts = torch.zeros_like(mask, dtype=torch.bool)  # positions whose next token belongs to the completion
    for row, text in enumerate(texts):
        predicts[row, ids.shape[1] - 1 - len(text.completion_ids) : ids.shape[1] - 1] = True
    reference = logits_at(base, predicts, input_ids=ids, **inputs)
    other = reference if model is base else logits_at(model, predicts, input_ids=ids, **inputs).to(reference.device)
    # rounding may give a tiny negative sum
    divergence = [kl_divergence(p, q).clamp_min(0.0) for p, q in log_probability_blocks(reference, other)]
    return torch.cat(divergence).cpu() if divergence else torch.empty(0, dtype=torch.float64)


def _batches(texts: Sequence[Text], tokens_at_once: int) -> Iterator[list[Text]]:
    """Texts of similar length in batches of at most ``tokens_at_once`` padded tokens (one text at least)."""
    batch: list[Text] = []
    for (index,) in by_length([len(text.ids) for text in texts], 1):
        text = texts[index]
        if batch and (len(batch) + 1) * len(text.ids) > tokens_at_once:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch
