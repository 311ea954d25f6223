"""The rows of a batch that are encoded and decoded: one a token for the joint code, one a token and view for pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from rlgen_stats.toolkit.crosscoder.model.crosscoder import Crosscoder, shared_directions, shared_offset
from rlgen_stats.toolkit.crosscoder.model.sparse import SparseCode
from rlgen_stats.toolkit.crosscoder.training.products import DecodedEntries, EncodedEntries, multiply

Columns = Tensor | slice
"""Which features some values belong to: one index a value, or all features, values then being [row, feature]."""

Activate = Callable[[Tensor, Columns], Tensor]
"""Features from pre-activations at the places a sparsity rule chose."""


@dataclass(frozen=True)
class Places:
    """Where pre-activations have a gradient."""

    criterion: Tensor
    """[row, feature]."""
    limit: float
    """Chosen is what lies above it."""

    def split(self, sizes: list[int]) -> list[Self]:
        """The same by parts of the rows."""
        return [replace(self, criterion=part) for part in torch.split(self.criterion, sizes)]

    def keep(self, values: Tensor) -> Tensor:
        """``values`` [row, feature] there, else 0; in autograd.

        ReLU's backward pass computes exactly this, on a CPU several times faster than ``torch.where``.
        """
        kept: Tensor = torch.ops.aten.threshold_backward(values, self.criterion, self.limit)
        return kept


@dataclass(frozen=True)
class Revived(Places):
    """Dead features whose AuxK loss is computed, and their largest contributions."""

    features: Tensor
    """[dead]: which features the columns of ``criterion`` are."""


@dataclass(frozen=True)
class Decoded:
    """What became of some rows; all but ``features`` in normalised units."""

    features: Tensor
    """[entry], or [row, feature]."""
    columns: Columns
    error: Tensor
    """Reconstruction minus data: [row, channel]."""
    revived_error: Tensor | None
    """The residual's reconstruction by dead features minus the residual, which counts as data: [row, channel]."""

    def sums(self, n_features: int) -> Tensor:
        """Sum of every feature over rows: [feature]."""
        if isinstance(self.columns, slice):
            return self.features.sum(dim=0)
        return self.features.new_zeros(n_features).index_add(0, self.columns, self.features)


class Rows:
    """Activations of some tokens, encoded; ``n_slots`` rows a token, slot after slot.

    Attributes
    ----------
    x, target : Tensor [row, channel]
        What is encoded, and, in normalised units, what is to be reconstructed.
    pre : Tensor [row, feature]
        Pre-activations, in autograd.
    n_slots : int
        Parts of the decoder's channels; a row's code is decoded with its own slot's.
    weight : Tensor [row, channel] or None
        Factor of each error; 0 where a row does not count for a view.
    """

    def __init__(
        self,
        crosscoder: Crosscoder,
        x: Tensor,
        target: Tensor,
        encoder: Tensor,
        decoder: Tensor,
        *,
        offset: Tensor,
        low: torch.dtype | None,
        weight: Tensor | None = None,
    ) -> None:
        self.x, self.target, self.n_slots, self.weight = x, target, len(offset), weight
        self._encoder, self._bias, self._low = encoder, crosscoder.encoder_bias, low
        self._decoder, self._offset = decoder, offset
        self.pre = multiply(x, encoder, self._bias, low=low)

    def __len__(self) -> int:
        return len(self.x)

    def decode(self, chosen: Places, activate: Activate, revived: Revived | None) -> Decoded:
        """Features at the ``chosen`` places and the errors that they leave; ``revived``: places of dead features."""
        code = SparseCode.above(chosen.criterion, chosen.limit)
        return self._dense(chosen, activate, revived) if code is None else self._sparse(code, activate, revived)

    def _sparse(self, code: SparseCode, activate: Activate, revived: Revived | None) -> Decoded:
        """One product for live and dead features: the latter's entries are those of as many rows more."""
        n_rows, n_features = code.shape
        n_live, live = len(code.rows), code.columns
        if revived is not None:
            rows, columns = (revived.criterion > revived.limit).nonzero(as_tuple=True)
            rows, columns = torch.cat([code.rows, rows + n_rows]), torch.cat([live, revived.features[columns]])
            code = SparseCode(rows, columns, rows, (2 * n_rows, n_features))
        here = code.with_rows(code.rows % n_rows, n_rows)
        pre = EncodedEntries.apply(self._encoder, self._bias, self.x, self.pre.detach(), here)  # type: ignore[no-untyped-call]
        features = activate(pre[:n_live], live)
        decoded = DecodedEntries.apply(  # type: ignore[no-untyped-call]
            torch.cat([features, pre[n_live:]]), self._decoder.flatten(0, 1), self._in_slots(code, here.rows)
        )
        error = self._weighted(decoded[:n_rows] + self._minus_target())
        again = None if revived is None else self._weighted(decoded[n_rows:]) + error.detach()
        return Decoded(features, live, error, again)

    def _weighted(self, error: Tensor) -> Tensor:
        return error if self.weight is None else error * self.weight

    def _in_slots(self, code: SparseCode, rows: Tensor) -> SparseCode:
        """The code by which the rows of ``_decoder`` [feature, slot] are multiplied."""
        if self.n_slots == 1:
            return code
        slot = rows // (len(self) // self.n_slots)
        n_rows, n_features = code.shape
        return SparseCode(
            code.rows, code.columns * self.n_slots + slot, code.values, (n_rows, n_features * self.n_slots)
        )

    def _dense(self, chosen: Places, activate: Activate, revived: Revived | None) -> Decoded:
        features = activate(chosen.keep(self.pre), slice(None))
        error = self._weighted(self._times(features, self._decoder) + self._minus_target())
        if revived is None:
            return Decoded(features, slice(None), error, None)
        pre = revived.keep(self.pre.index_select(1, revived.features))
        again = self._weighted(self._times(pre, self._decoder.index_select(0, revived.features)))
        return Decoded(features, slice(None), error, again + error.detach())

    def _times(self, code: Tensor, decoder: Tensor) -> Tensor:
        """Rows [row, feature] @ their slots' parts of ``decoder`` [feature, slot, channel]."""
        if self.n_slots == 1:
            return multiply(code, decoder.flatten(0, 1), low=self._low)
        slots = zip(code.chunk(self.n_slots), decoder.unbind(1), strict=True)
        return torch.cat([multiply(part, matrix, low=self._low) for part, matrix in slots])

    def _minus_target(self) -> Tensor:
        return self._offset.repeat_interleave(len(self) // self.n_slots, dim=0) - self.target


def joint_rows(crosscoder: Crosscoder, raw: Tensor, *, low: torch.dtype | None, weight: Tensor | None = None) -> Rows:
    """One row a token: all views' activations, encoded together; raw and weight [token, D]."""
    x, offset = raw * crosscoder.channel_scale(), crosscoder.decoder_offset[None]
    decoder = crosscoder.decoder_matrix[:, None]
    return Rows(crosscoder, x, x, crosscoder.encoder_matrix, decoder, offset=offset, low=low, weight=weight)


def paired_rows(crosscoder: Crosscoder, raw: Tensor, *, low: torch.dtype | None) -> Rows:
    """One row a view and token, as readout swap reads it: its raw activation in every slot; raw [token, D].

    Equal activations of two models thus have equal features. All models have one decoder and one offset in raw units,
    the means of those that the joint rows train, so that what changed must be in the features. With a decoder each, a
    real model's change went into the decoders' differences (benchmarks: a real model); with an offset each, 92 to 98%
    of a planted shift of all tokens went into the offsets.
    """
    n_views, width = len(crosscoder.views), crosscoder.width
    by_view = raw.view(-1, n_views, width).transpose(0, 1)
    target = (by_view * crosscoder.scale[:, None, None]).reshape(-1, width)
    encoder = (crosscoder.scale @ crosscoder.encoder_matrix.view(n_views, -1)).view(width, -1)
    decoder = shared_directions(crosscoder)[:, None] * crosscoder.scale[:, None]
    offset = shared_offset(crosscoder) * crosscoder.scale[:, None]
    return Rows(crosscoder, by_view.reshape(-1, width), target, encoder, decoder, offset=offset, low=low)
