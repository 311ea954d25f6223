"""Forward and backward pass of one batch: the matrix products of a training step, in buffers allocated once.

Gradients are written by hand instead of by autograd, which spent a third of a step on a CPU on fresh temporaries: two
matrix products forward, three backward. On a CPU all but the first use only the nonzero entries where these are few.
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from rlgen_stats.toolkit.crosscoder.model.crosscoder import Crosscoder
from rlgen_stats.toolkit.crosscoder.model.sparse import SparseCode
from rlgen_stats.toolkit.crosscoder.training.ranks import Ranks

Precision = Literal["float32", "bfloat16"]

WEIGHTS: Final = ("encoder", "encoder_bias", "decoder", "decoder_bias")


class Workspace:
    """Weights as flat matrices that share memory with a crosscoder, their gradients, and the buffers of one batch.

    Parameters
    ----------
    crosscoder
        Its parameters are changed through this object.
    batch_size
        Tokens per batch, over all processes.
    precision
        Type of the matrix products; weights, gradients and sums are float32 whatever it is.
    ranks
        Processes that share a batch; default this one alone.

    Attributes
    ----------
    encoder, encoder_bias, decoder, decoder_bias : Tensor
        [D, feature], [feature], [feature, D], [D], with D the channels of all views; ``.grad`` holds gradients.
    x : Tensor [row, D]
        Normalised activations of this process's rows.
    features : Tensor [row, feature]
        Pre-activations, then the features that the sparsity rule keeps.
    back : Tensor [row, feature]
        Gradient of the loss with respect to the pre-activations; scratch memory before it is computed.
    error : Tensor [row, D]
        Reconstruction minus data.
    active : Tensor [feature]
        Sum of the features over this process's rows.
    """

    def __init__(
        self,
        crosscoder: Crosscoder,
        batch_size: int,
        *,
        precision: Precision = "float32",
        ranks: Ranks | None = None,
    ) -> None:
        self.encoder = crosscoder.encoder_matrix.detach()
        self.encoder_bias = crosscoder.encoder_bias.detach()
        self.decoder = crosscoder.decoder_matrix.detach()
        self.decoder_bias = crosscoder.decoder_offset.detach()
        for weight in self.weights().values():
            weight.grad = torch.zeros_like(weight)
        self.ranks, self.batch_size = ranks or Ranks(), batch_size
        self._widths = list(crosscoder.widths)
        self._zero_blocks = [
            (features, channels)
            for view, features in crosscoder.exclusive.items()
            for other, channels in zip(crosscoder.views, crosscoder.slots(), strict=True)
            if other != view
        ]
        self.scale = crosscoder.channel_scale()
        device, (flat, n_features) = self.encoder.device, self.encoder.shape
        rows = len(range(self.ranks.rank, batch_size, self.ranks.world))
        self.x = torch.empty(rows, flat, device=device)
        self.features = torch.empty(rows, n_features, device=device)
        self.back = torch.empty(rows, n_features, device=device)
        self.error = torch.empty(rows, flat, device=device)
        self.active = torch.empty(n_features, device=device)
        self._code: SparseCode | None = None
        self._low = torch.bfloat16 if precision == "bfloat16" else None

    def weights(self) -> dict[str, Tensor]:
        """The trained tensors by name."""
        return {name: getattr(self, name) for name in WEIGHTS}

    def decoder_norms(self) -> Tensor:
        """||d_mk||: [feature, view]."""
        if len(set(self._widths)) == 1:
            rows = self.decoder.view(len(self.decoder), len(self._widths), -1)
            norms: Tensor = torch.linalg.vector_norm(rows, dim=-1)
            return norms
        return torch.stack([torch.linalg.vector_norm(rows, dim=1) for rows in self.by_view(self.decoder)], dim=1)

    def by_view(self, flat: Tensor) -> tuple[Tensor, ...]:
        """The columns of each view."""
        return torch.split(flat, self._widths, dim=1)

    def multiply(self, a: Tensor, b: Tensor, *, out: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> None:
        """``out`` = bias + scale * a @ b, the product in the declared precision."""
        if self._low is None:
            target = out if bias is None else bias
            torch.addmm(target, a, b, beta=0 if bias is None else 1, alpha=scale, out=out)
            return
        # Scale and bias come after the return to float32: bfloat16 would round them to three digits.
        out.copy_(torch.mm(a.to(self._low), b.to(self._low)))
        if scale != 1.0:
            out.mul_(scale)
        if bias is not None:
            out.add_(bias)

    def encode(self, raw: Tensor) -> None:
        """Raw joint activations [batch, D] of the whole batch -> ``x`` and pre-activations in ``features``."""
        torch.mul(self.ranks.share(raw), self.scale, out=self.x)
        self.multiply(self.x, self.encoder, bias=self.encoder_bias, out=self.features)

    def decode(self) -> None:
        """``features`` -> ``error`` and ``active``."""
        self._code = SparseCode.of(self.features)
        if self._code is None:
            self.multiply(self.features, self.decoder, bias=self.decoder_bias, out=self.error)
        else:
            torch.add(self._code.times(self.decoder), self.decoder_bias, out=self.error)
        self.error.sub_(self.x)
        torch.sum(self.features, dim=0, out=self.active)

    def mean_over_tokens(self, sums: Tensor) -> Tensor:
        """Sums over this process's rows as means over the batch, float64."""
        return self.ranks.sum_(sums.double()) / self.batch_size

    def squared_error(self) -> Tensor:
        """Mean over tokens of the squared error summed over views and channels."""
        return self.mean_over_tokens(self.error.square().sum())

    def backward(self, penalty: Tensor | None = None) -> None:
        """Gradients of :meth:`squared_error` plus sum_bk ``penalty``_k f_bk, in ``.grad`` of every weight.

        Only entries of features that fire have a gradient; where the code is sparse ``back`` is not written.
        """
        if self._code is not None:
            self._sparse_backward(self._code, penalty)
            return
        self.decoder_backward()
        if penalty is not None:
            self.back.add_(penalty)
        keep_where(self.back, self.features, 0.0, out=self.back)
        self.encoder_backward()

    def _sparse_backward(self, code: SparseCode, penalty: Tensor | None) -> None:
        scale = 2.0 / self.batch_size  # of the mean squared error; slopes are its derivatives by the active features
        self.decoder.grad = code.with_values(code.values * scale).transposed_times(self.error)
        torch.sum(self.error, dim=0, out=grad(self.decoder_bias)).mul_(scale)
        slopes = code.sampled(self.error, self.decoder).mul_(scale)
        back = code.with_values(slopes if penalty is None else slopes.add_(penalty[code.columns]))
        grad(self.encoder).copy_(back.transposed_times(self.x).T)
        grad(self.encoder_bias).copy_(back.column_sums())

    def decoder_backward(self) -> None:
        """Gradients of the decoder, and with respect to the features in ``back``."""
        scale = 2.0 / self.batch_size
        self.multiply(self.features.T, self.error, scale=scale, out=grad(self.decoder))
        torch.sum(self.error, dim=0, out=grad(self.decoder_bias)).mul_(scale)
        self.multiply(self.error, self.decoder.T, scale=scale, out=self.back)

    def encoder_backward(self) -> None:
        """Gradients of the encoder from those with respect to the pre-activations in ``back``."""
        self.multiply(self.x.T, self.back, out=grad(self.encoder))
        torch.sum(self.back, dim=0, out=grad(self.encoder_bias))

    def finish_gradients(self) -> None:
        """Zero the gradients of exclusive features in all other views, and sum over processes.

        A weight whose gradient is always zero keeps Adam's moments, and itself, at exactly zero.
        """
        for features, channels in self._zero_blocks:
            grad(self.decoder)[features, channels] = 0.0
            grad(self.encoder)[channels, features] = 0.0
        for weight in self.weights().values():
            self.ranks.sum_(grad(weight))


def keep_where(values: Tensor, criterion: Tensor, limit: float, *, out: Tensor) -> Tensor:
    """``values`` where ``criterion`` > ``limit``, else 0, in one pass and without a temporary.

    PyTorch has no such public operation with ``out``; ReLU's backward pass computes exactly this.
    """
    kept: Tensor = torch.ops.aten.threshold_backward.grad_input(values, criterion, limit, grad_input=out)
    return kept


def grad(weight: Tensor) -> Tensor:
    """A weight's gradient, zeros if there is none yet."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def just_below(value: float) -> float:
    """The float32 before ``value``: "above it" is then "at least ``value``"."""
    return float(np.nextafter(np.float32(value), np.float32(0)))
