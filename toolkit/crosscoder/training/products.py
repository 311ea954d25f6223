"""Matrix products of a training step in autograd: dense ones, and those of sparse codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from rlgen_stats.toolkit.crosscoder.model.sparse import SparseCode


def multiply(a: Tensor, b: Tensor, bias: Tensor | None = None, *, low: torch.dtype | None) -> Tensor:
    """``a`` @ ``b`` + ``bias`` in float32; with ``low``, multiplied in that type, forward and backward."""
    if low is None:
        return a @ b if bias is None else torch.addmm(bias, a, b)
    whole = (a.to(low) @ b.to(low)).to(a.dtype)
    return whole if bias is None else whole.add_(bias)  # after the return to float32: bfloat16 rounds to three digits


class EncodedEntries(Function):
    """Some entries of x @ encoder + bias, whose gradients are then made from these entries alone.

    ``apply(encoder, bias, x, pre, code)``: ``pre`` [row, feature] is that product, computed without gradient to choose
    the entries, and ``code`` tells which they are (its values do not count). Returns [entry].
    """

    @staticmethod
    def forward(ctx: Any, encoder: Tensor, bias: Tensor, x: Tensor, pre: Tensor, code: SparseCode) -> Tensor:
        """The entries."""
        ctx.save_for_backward(x)
        ctx.code = code
        return pre[code.rows, code.columns]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of encoder and bias."""
        code = ctx.code.with_values(slopes)
        return code.transposed_times(*ctx.saved_tensors).T, code.column_sums(), None, None, None


class DecodedEntries(Function):
    """A sparse code times a matrix: ``apply(values, matrix, code)``, where ``code`` tells the places of the values."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, matrix: Tensor, code: SparseCode) -> Tensor:
        """[row, channel]."""
        ctx.save_for_backward(values, matrix)
        ctx.code = code
        return code.with_values(values).times(matrix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of values and matrix."""
        values, matrix = ctx.saved_tensors
        code, slopes = ctx.code.with_values(values), slopes.contiguous()
        return code.sampled(slopes, matrix), code.transposed_times(slopes), None


class Step(Function):
    """1 where a contribution exceeds theta, else 0, with a straight-through gradient for log theta.

    ``apply(contribution, log_theta, bandwidth)``, shapes that broadcast. A step has no slope: the gradient is estimated
    from entries in a window of width ``bandwidth`` * theta around theta (rectangular kernel, arXiv:2407.14435 eq. 11,
    here in log theta). None reaches the contribution.
    """

    @staticmethod
    def forward(ctx: Any, contribution: Tensor, log_theta: Tensor, bandwidth: float) -> Tensor:
        """0 or 1."""
        theta = log_theta.exp()
        ctx.save_for_backward((contribution - theta).abs_() < (bandwidth / 2) * theta)
        ctx.shape, ctx.bandwidth = log_theta.shape, bandwidth
        return (contribution > theta).to(contribution.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of log theta: negative, as a higher threshold turns the entries of its window off."""
        (in_window,) = ctx.saved_tensors
        return None, ((slopes * in_window) / -ctx.bandwidth).sum_to_size(ctx.shape), None
