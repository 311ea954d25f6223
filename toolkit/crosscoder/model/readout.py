"""From pre-activations to features: the sparsity rules at inference, and the readout of a single model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlgen_stats.toolkit.crosscoder.model.sparse import SparseCode

Sparsity = Literal["l1", "batchtopk", "topk", "jumprelu", "dfc"]


@dataclass(frozen=True)
class Gate:
    """Which features stay active: all positive ones, those above a limit, or the largest of a token."""

    limit: Tensor | None = None
    """[feature], not negative: f_k stays if it exceeds this (a threshold on f_k sum_m ||d_mk||, divided by the sum)."""
    k: int | None = None
    """Features kept per token, by contribution f_k sum_m ||d_mk||."""
    norm: Tensor | None = None
    """[feature]: sum_m ||d_mk||, by which ``k`` ranks."""

    def sparse(self, pre: Tensor) -> SparseCode | None:
        """The same as entries where few features stay active; None where many do, or the rule needs whole rows."""
        return SparseCode.above(pre, 0.0 if self.limit is None else self.limit) if self.k is None else None

    def __call__(self, pre: Tensor) -> Tensor:
        """Features [..., feature] of pre-activations of all features."""
        if self.limit is not None:
            return torch.where(pre <= self.limit, 0.0, pre)  # one pass, no mask to multiply; NaN stays visible
        active = torch.relu(pre)
        if self.k is not None and self.norm is not None:
            contribution = active * self.norm
            return active * (contribution >= smallest_of_each(contribution, self.k))
        return active


def smallest_of_each(contribution: Tensor, k: int) -> Tensor:
    """[..., 1]: the k-th largest entry of each row, or the smallest positive float if that is not positive."""
    smallest: Tensor = torch.topk(contribution, k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    return smallest.clamp_min(torch.finfo(contribution.dtype).tiny)


@dataclass(frozen=True)
class FeatureReadout:
    """One model's raw activations to its features, as one affine map and a gate.

    Attributes
    ----------
    weight : Tensor [channel, feature]
        From raw activations.
    bias : Tensor [feature]
        Added to it.
    gate : Gate
        Which of them stay active.
    columns : Tensor [n] or None
        Features returned of those the gate saw; None for all.
    """

    weight: Tensor
    bias: Tensor
    gate: Gate
    columns: Tensor | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        """Features [..., feature] of raw activations [..., channel]."""
        flat = raw.reshape(-1, raw.shape[-1]).to(self.weight.dtype)
        f = self.gate(self.pre_activation(flat))
        f = f if self.columns is None else f[:, self.columns]
        return f.reshape(*raw.shape[:-1], f.shape[-1])

    def pre_activation(self, raw: Tensor, *, out: Tensor | None = None) -> Tensor:
        """[token, feature] of raw activations [token, channel], before the gate."""
        return torch.addmm(self.bias, raw, self.weight, out=out)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> FeatureReadout:
        """The same on another device and in another type."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, dtype)

        gate = Gate(moved(self.gate.limit), self.gate.k, moved(self.gate.norm))
        columns = None if self.columns is None else self.columns.to(device)
        return FeatureReadout(self.weight.to(device, dtype), self.bias.to(device, dtype), gate, columns)
