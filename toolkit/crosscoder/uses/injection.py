"""Activations of features on tokens put into the middle of texts, read in a live model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlgen_stats.toolkit.crosscoder.model.readout import FeatureReadout
from rlgen_stats.toolkit.extraction.batching import by_length, left_pad
from rlgen_stats.toolkit.extraction.residual_stream import read_residual


@dataclass(frozen=True)
class Injection:
    """A text with tokens put into it."""

    ids: tuple[int, ...]
    """Token ids of the whole."""
    start: int
    """Where the inserted tokens begin."""
    stop: int
    """Where they end."""
    column: int
    """Feature that is read, as a column of the readout."""


@torch.inference_mode()
def injected_peaks(
    model: Any, layer: int, readout: FeatureReadout, injections: Sequence[Injection], *, pad: int, batch_size: int
) -> NDArray[np.float64]:
    """Largest activation of each injection's feature over the inserted tokens, [injection]; 0 where there are none.

    Parameters
    ----------
    model, layer
        Causal language model, and the block whose output is read.
    readout
        From raw activations to features.
    injections
        Texts, read in batches of similar length.
    pad, batch_size
        Pad id, and texts per batch.
    """
    device = next(model.parameters()).device
    peaks = np.zeros(len(injections))
    for batch in by_length([len(injection.ids) for injection in injections], batch_size):
        ids, mask, positions = left_pad([injections[i].ids for i in batch], pad, device)
        raw = read_residual(model, layer, ids, mask, positions).to(readout.weight.device)
        for row, i in enumerate(batch):
            one = injections[i]
            shift = raw.shape[1] - len(one.ids)
            f = readout(raw[row, shift + one.start : shift + one.stop].float())
            peaks[i] = float(f[:, one.column].max()) if len(f) else 0.0
    return peaks
