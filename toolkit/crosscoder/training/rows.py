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
    """Reconstruction minus data, times the rows' weights: [row, channel]."""
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
    x : Tensor [row, channel]
        What is encoded.
    pre : Tensor [row, feature]
        Pre-activations, in autograd.
    n_slots : int
        Rows of a token.
    """

    def __init__(
        self,
        x: Tensor,
        target: Tensor,
        *,
        encoder: Tensor,
        bias: Tensor,
        decoder: Tensor,
        offset: Tensor,
        low: torch.dtype | None,
        n_slots: int = 1,
        weight: Tensor | None = None,
    ) -> None:
        self.x, self.n_slots = x, n_slots
        self._encoder, self._bias, self._decoder, self._low = encoder, bias, decoder, low
        self._target, self._offset, self._weight = target, offset, weight
        self.pre = multiply(x, encoder, bias, low=low)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def target(self) -> Tensor:
        """What is to be reconstructed, in the units of errors: [row, channel]."""
        return self._weighted(self._target)

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
        decoded = DecodedEntries.apply(torch.cat([features, pre[n_live:]]), self._decoder, code)  # type: ignore[no-untyped-call]
        error = self._error(decoded[:n_rows])
        again = None if revived is None else self._weighted(decoded[n_rows:]) + error.detach()
        return Decoded(features, live, error, again)

    def _dense(self, chosen: Places, activate: Activate, revived: Revived | None) -> Decoded:
        features = activate(chosen.keep(self.pre), slice(None))
        error = self._error(multiply(features, self._decoder, low=self._low))
        if revived is None:
            return Decoded(features, slice(None), error, None)
        pre = revived.keep(self.pre.index_select(1, revived.features))
        again = multiply(pre, self._decoder.index_select(0, revived.features), low=self._low)
        return Decoded(features, slice(None), error, self._weighted(again) + error.detach())

    def _error(self, decoded: Tensor) -> Tensor:
        return self._weighted(decoded + (self._offset - self._target))

    def _weighted(self, values: Tensor) -> Tensor:
        return values if self._weight is None else values * self._weight


def joint_rows(crosscoder: Crosscoder, raw: Tensor, *, low: torch.dtype | None, weight: Tensor | None = None) -> Rows:
    """One row a token: all views' activations, encoded together; raw and weight, of each error, [token, D]."""
    x = raw * crosscoder.channel_scale()
    return Rows(
        x,
        x,
        encoder=crosscoder.encoder_matrix,
        bias=crosscoder.encoder_bias,
        decoder=crosscoder.decoder_matrix,
        offset=crosscoder.decoder_offset,
        low=low,
        weight=weight,
    )


def paired_rows(crosscoder: Crosscoder, raw: Tensor, *, low: torch.dtype | None) -> Rows:
    """One row a view and token, as readout swap reads it: its raw activation in every slot; raw [token, D].

    Equal activations of two models thus have equal features. All models have one decoder and one offset in raw units,
    the means of those that the joint rows train, so that what changed must be in the features. With a decoder each, a
    real model's change went into the decoders' differences (benchmarks: a real model); with an offset each, 92 to 98%
    of a planted shift of all tokens went into the offsets.
    """
    n_views, width = len(crosscoder.views), crosscoder.width
    by_view = raw.view(-1, n_views, width).transpose(0, 1)
    x = by_view.reshape(-1, width)
    return Rows(
        x,
        x,
        encoder=(crosscoder.scale @ crosscoder.encoder_matrix.view(n_views, -1)).view(width, -1),
        bias=crosscoder.encoder_bias,
        decoder=shared_directions(crosscoder),
        offset=shared_offset(crosscoder),
        low=low,
        n_slots=n_views,
        weight=crosscoder.scale.repeat_interleave(by_view.shape[1])[:, None],
    )
