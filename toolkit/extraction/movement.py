"""How far each model moved from base: in its weights and in its next-token distributions."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from tempfile import TemporaryFile
from typing import IO, Any, Final

import numpy as np
import torch
import xarray as xr

from rlgen_stats.schemas.dims import BASE_MODEL, MODEL
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder
from rlgen_stats.stores.prompts import load_prompts
from rlgen_stats.stores.study_models import ModelRef, find_model, list_models, ref_coords
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
from rlgen_stats.toolkit.workers import kept, run_tasks

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
    distances, divergences = [], []
    with (
        progress.task("distance from base", total=len(refs), unit="models") as task,
        run_tasks(_distances, [(spec, folder, ref) for ref in refs]) as measured,
    ):
        for ref, (distance, divergence) in zip(refs, measured, strict=True):
            distances.append(distance)
            divergences.append(divergence)
            task.advance(1, model=ref.model, kl=divergence)
    return xr.Dataset(
        {"weight_distance": (MODEL, distances), "kl_from_base": (MODEL, divergences, {"units": "nats per token"})},
        coords=ref_coords(refs),
    )


def _distances(spec: StudySpec, folder: StudyFolder, ref: ModelRef, progress: Progress = SILENT) -> tuple[float, float]:
    """One model's distance from base in weights, and its divergence."""
    device = resolve_device(spec.device)
    base = kept("base logits", folder, lambda: _base_logits(spec, folder, device))
    model = base.base if ref.model == BASE_MODEL else load_model(ref, device=device)
    return weight_distance(base.base, model), mean_divergence(base, model)


def _base_logits(spec: StudySpec, folder: StudyFolder, device: torch.device) -> BaseLogits:
    texts = forced_texts(spec, folder, [BASE_MODEL], load_prompts(spec, folder))
    ref = find_model(BASE_MODEL, spec, folder)
    file = TemporaryFile(dir=folder.root)  # noqa: SIM115 - closed with what reads it
    return BaseLogits(load_model(ref, device=device), texts, pad_id(load_tokenizer(ref)), file)


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


class BaseLogits:
    """Base's logits at the completion tokens of some texts, batch after batch, for any number of models.

    Parameters
    ----------
    base
        Causal language model.
    texts
        What it reads, once: what enters its output head is kept, one vector a token, and the head makes the same
        logits of it again. Where it does not to the bit, as where logits are scaled or capped after the head, base
        reads the texts again for every model.
    pad
        Id put into pad positions.
    file
        Where the vectors are kept; closed when these are not needed any more.
    """

    def __init__(self, base: Any, texts: Sequence[Text], pad: int, file: IO[bytes]) -> None:
        self.base, self._head, self._file = base, base.get_output_embeddings(), file
        weakref.finalize(self, file.close)
        batches = by_length([len(text.ids) for text in texts], max(1, len(texts)), positions_at_once(base))
        self._batches = [_Batch([texts[i] for i in batch], pad) for batch in batches]
        self._is_kept = self._head is not None and all(self._keep(batch) for batch in self._batches)

    @torch.inference_mode()
    def _keep(self, batch: _Batch) -> bool:
        """Write what enters the head; false if the head does not make the model's logits of it."""
        inputs: list[torch.Tensor] = []
        handle = self._head.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
        try:
            logits = batch.logits(self.base)
        finally:
            handle.remove()
        again = self._head(inputs[0])[0] if len(inputs) == 1 else None
        if again is None or again.dtype != logits.dtype or not torch.equal(again, logits):
            return False
        self._type = inputs[0].dtype
        np.save(self._file, inputs[0].contiguous().view(torch.uint8).cpu().numpy())
        return True

    @torch.inference_mode()
    def _kept(self) -> torch.Tensor:
        inputs = torch.from_numpy(np.load(self._file)).view(self._type)
        logits: torch.Tensor = self._head(inputs.to(self.base.device))[0]
        return logits

    def __iter__(self) -> Iterator[tuple[_Batch, torch.Tensor]]:
        self._file.seek(0)
        for batch in self._batches:
            yield batch, self._kept() if self._is_kept else batch.logits(self.base)


class _Batch:
    """Texts in one left-padded batch."""

    def __init__(self, texts: Sequence[Text], pad: int) -> None:
        self._inputs = left_pad([text.ids for text in texts], pad, "cpu")
        length = self._inputs[0].shape[1]
        self._predicts = torch.zeros(len(texts), length, dtype=torch.bool)  # whose next token is of the completion
        for row, text in enumerate(texts):
            self._predicts[row, length - 1 - len(text.completion_ids) : length - 1] = True

    def logits(self, model: Any) -> torch.Tensor:
        """A model's logits [token, vocabulary] at every completion token, text after text."""
        ids, mask, positions = (values.to(model.device) for values in self._inputs)
        return logits_at(model, self._predicts, input_ids=ids, attention_mask=mask, position_ids=positions)


def mean_divergence(base: BaseLogits, model: Any) -> float:
    """Mean KL(base || model) of next-token distributions over the texts' completion tokens, in nats per token."""
    total, n_tokens = 0.0, 0
    for divergence in token_divergences(base, model):
        total, n_tokens = total + float(divergence.sum()), n_tokens + len(divergence)
    return total / n_tokens if n_tokens else float("nan")


@torch.inference_mode()
def token_divergences(base: BaseLogits, model: Any) -> Iterator[torch.Tensor]:
    """KL(base || model) at every completion token, [token] float64, batch after batch of texts of growing length."""
    for batch, reference in base:
        other = reference if model is base.base else batch.logits(model).to(reference.device)
        # rounding may give a tiny negative sum
        divergence = [kl_divergence(p, q).clamp_min(0.0) for p, q in log_probability_blocks(reference, other)]
        yield torch.cat(divergence).cpu()
