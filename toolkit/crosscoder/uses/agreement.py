"""Sums that say how far dictionaries of other seeds decode the same change of a model, and miss the same of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from rlgen_stats.schemas.dims import CHANNEL, MODEL
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.study import Readout
from rlgen_stats.toolkit.crosscoder.data.paired import PairedActivations, batches_of, views_of
from rlgen_stats.toolkit.crosscoder.model.crosscoder import Crosscoder
from rlgen_stats.toolkit.crosscoder.uses.encode import view_of

AGREEMENT_TOKENS: Final = 1 << 18
"""Tokens on which errors of dictionaries are compared."""
PIECE_TOKENS: Final = 1024
"""Tokens decoded at once: the changes of all dictionaries are held together, in float64."""


@torch.no_grad()
def agreement_sums(
    crosscoders: Sequence[Crosscoder],
    reader: PairedActivations,
    models: Sequence[str],
    *,
    readout: Readout | None = None,
    max_tokens: int = AGREEMENT_TOKENS,
) -> xr.Dataset:
    """Products of the true change a_M - a_base with what each dictionary decodes of it, and with what it misses.

    Parameters
    ----------
    crosscoders
        Dictionaries of the same models, in order.
    reader
        Raw activations of ``models`` on the same tokens, base first: a ``PairedReader``, or an ``ArrayReader``.
    models
        Model ids of the reader's slots; they need not be views.
    readout
        A readout of one model; default the first crosscoder's declared one.
    max_tokens
        All tokens are read, or a shuffled sample of about this many.

    Returns
    -------
    Dataset
        ``products[model, part, other_part]``, sums over tokens and channels, and ``totals[model, part, channel]``, sums
        over tokens, raw units; ``n_tokens[]``. Parts, in order: ``change``; ``decoded.1``, ``decoded.2``, ...: (D_M f^M
        + c_M) - (D_base f^base + c_base); ``error.1``, ...: change minus decoded.

    Raises
    ------
    InputError
        If there is no dictionary or no model beside base, or the models' widths differ from the crosscoders'.

    Notes
    -----
    Features are encoded as in the stored summaries; changes, errors and sums are float64. Each block of tokens is read
    once and goes through all dictionaries, so that none holds more than a block. Errors are formed token by token: from
    the products alone, those of good dictionaries would be differences of nearly equal numbers.
    """
    if not crosscoders or len(models) < 2:
        raise InputError(f"give a dictionary and a model beside base, got {len(crosscoders)} and {list(models)}.")
    kind = readout or crosscoders[0].default_readout
    readings = [_Reading(crosscoder, models, kind) for crosscoder in crosscoders]
    n_parts, width = 1 + 2 * len(readings), readings[0].width
    products = np.zeros((len(models) - 1, n_parts, n_parts))
    totals = np.zeros((len(models) - 1, n_parts, width))
    n_tokens = 0
    for batch in batches_of(reader, max_tokens=max_tokens):
        raw = [torch.from_numpy(np.ascontiguousarray(part)) for part in views_of(batch)]
        if {part.shape[1] for part in raw} | {reading.width for reading in readings} != {width}:
            raise InputError(
                f"activations of {list(models)} must have the crosscoders' width {width}, got "
                f"{[part.shape[1] for part in raw]}."
            )
        for piece in zip(*(torch.split(part, PIECE_TOKENS) for part in raw), strict=True):
            for slot, parts in enumerate(_changes(readings, piece)):
                flat = parts.flatten(start_dim=1)
                products[slot] += (flat @ flat.T).cpu().numpy()
                totals[slot] += parts.sum(dim=1).cpu().numpy()
            n_tokens += len(piece[0])
    numbers = range(1, len(readings) + 1)
    labels = ["change", *(f"decoded.{n}" for n in numbers), *(f"error.{n}" for n in numbers)]
    return xr.Dataset(
        {
            "products": ((MODEL, "part", "other_part"), products),
            "totals": ((MODEL, "part", CHANNEL), totals),
            "n_tokens": ((), n_tokens),
        },
        coords={MODEL: list(models[1:]), "part": labels, "other_part": labels},
        attrs={"readout": kind},
    )


class _Reading:
    """What one dictionary decodes of each model, read from its own activations."""

    def __init__(self, crosscoder: Crosscoder, models: Sequence[str], kind: Readout) -> None:
        self._crosscoder = crosscoder
        self._views = [view_of(model, crosscoder.views) for model in models]
        self._maps = {view: crosscoder.readout_map(view=view, kind=kind) for view in self._views}
        self.width = crosscoder.widths[crosscoder.view_index(self._views[0])]

    def changes(self, piece: Sequence[Tensor]) -> Iterator[Tensor]:
        """Decoded change of each model but base: [token, channel], float64."""
        device = self._crosscoder.encoder_matrix.device
        base, *others = (
            self._crosscoder.reconstruct(self._maps[view](raw.to(device)), view).double()
            for raw, view in zip(piece, self._views, strict=True)
        )
        yield from (other - base for other in others)


def _changes(readings: Sequence[_Reading], piece: Sequence[Tensor]) -> Iterator[Tensor]:
    """All parts of each model but base: [part, token, channel]."""
    base = piece[0].double()
    for raw, *decoded in zip(piece[1:], *(reading.changes(piece) for reading in readings), strict=True):
        of_all = torch.stack(decoded)
        change = (raw.double() - base).to(of_all.device)
        yield torch.cat([change[None], of_all, change - of_all])
