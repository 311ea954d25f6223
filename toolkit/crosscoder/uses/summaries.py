"""From tokens to prompts: mean, firing rate, maximum and histogram of every feature on every prompt."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.crosscoder.model.sparse import SparseCode

HISTOGRAM_EDGES: Final = tuple(2.0**power for power in range(-6, 7))
"""Bins of contributions f ||d||: silent, below 2^-6, twelve doublings, 2^6 and above; one grid for all models."""


class PromptSummaries:
    """Mean, share of firing tokens and maximum of features over each prompt's tokens, merged block by block.

    Parameters
    ----------
    n_prompts, n_features
        Size of the table.
    device
        Where blocks are reduced.
    histogram_scale
        [feature] ||d||; if given, tokens are also counted in bins of f ||d|| (``HISTOGRAM_EDGES``).

    Notes
    -----
    Sums are float64 and counts exact, so results do not depend on how tokens are cut into blocks (beyond float64
    rounding). A prompt's tokens may come in any number of pieces. Features are non-negative.
    """

    def __init__(
        self,
        n_prompts: int,
        n_features: int,
        device: torch.device | str = "cpu",
        histogram_scale: Tensor | None = None,
    ) -> None:
        self._sum = torch.zeros(n_prompts, n_features, dtype=torch.float64, device=device)
        self._fired = torch.zeros(n_prompts, n_features, dtype=torch.int32, device=device)
        self._max = torch.zeros(n_prompts, n_features, dtype=torch.float32, device=device)
        self._n = torch.zeros(n_prompts, dtype=torch.int64, device=device)
        self._histogram_scale = histogram_scale
        if histogram_scale is not None:
            self._edges = torch.tensor(HISTOGRAM_EDGES, device=device)
            n_bins = len(HISTOGRAM_EDGES) + 2
            self._histogram = torch.zeros(n_prompts, n_features, n_bins, dtype=torch.int32, device=device)

    def update(self, prompt: NDArray[np.integer], f: Tensor | SparseCode) -> None:
        """Merge a block: prompt index of each token [n], features [n, feature]."""
        if not len(prompt):
            return
        codes = torch.as_tensor(np.asarray(prompt, dtype=np.int64), device=self._n.device)
        rows, place = torch.unique(codes, return_inverse=True)
        if isinstance(f, SparseCode):
            total, fired, largest = _sparse(place, len(rows), f)
        else:
            total, fired, largest = _dense(place, len(rows), f)
        self._sum[rows] += total
        self._fired[rows] += fired.to(torch.int32)
        self._max[rows] = torch.maximum(self._max[rows], largest)
        self._n += torch.bincount(codes, minlength=len(self._n))
        if self._histogram_scale is not None:
            self._count(codes, f.dense() if isinstance(f, SparseCode) else f)

    def _count(self, codes: Tensor, f: Tensor) -> None:
        assert self._histogram_scale is not None  # noqa: S101 - by the caller
        _, n_features, n_bins = self._histogram.shape
        # bin 0 counts the silent tokens, so that the bins of firing ones start at 1
        bins = torch.bucketize((f * self._histogram_scale).contiguous(), self._edges, right=True) + 1
        cell = codes[:, None] * n_features + torch.arange(n_features, device=f.device)
        flat = cell * n_bins + torch.where(f > 0, bins, 0)
        self._histogram.view(-1).index_add_(0, flat.ravel(), torch.ones_like(flat, dtype=torch.int32).ravel())

    def histogram(self) -> NDArray[np.int32]:
        """Tokens in each bin, [prompt, feature, bin].

        Raises
        ------
        InputError
            If no histograms were asked for.
        """
        if self._histogram_scale is None:
            raise InputError("these summaries count no histograms; give histogram_scale.")
        return np.asarray(self._histogram.cpu().numpy())

    def n_tokens(self) -> NDArray[np.int64]:
        """Tokens of each prompt."""
        return np.asarray(self._n.cpu().numpy())

    def result(self, scale: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """(mean, firing, max), each [prompt, feature] float32, mean and max times ``scale`` [feature].

        NaN for prompts without tokens.
        """
        n = self._n[:, None].double()
        empty = self._n == 0
        factor = scale.double()
        table = (self._sum / n * factor, self._fired / n, self._max.double() * factor)
        mean, firing, largest = (
            values.masked_fill(empty[:, None], float("nan")).float().cpu().numpy() for values in table
        )
        return mean, firing, largest


def _dense(place: Tensor, n: int, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum (float64), number firing and maximum of the rows of ``f`` by place, 0 to n - 1: [place, feature]."""
    shape = (n, f.shape[1])
    total = torch.zeros(shape, dtype=torch.float64, device=f.device).index_add_(0, place, f.double())
    fired = torch.zeros(shape, dtype=torch.float32, device=f.device).index_add_(0, place, (f > 0).float())
    largest = torch.zeros(shape, dtype=torch.float32, device=f.device)
    return total, fired, largest.scatter_reduce_(0, place[:, None].expand_as(f), f.float(), "amax")


def _sparse(place: Tensor, n: int, code: SparseCode) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the nonzero entries."""
    n_features = code.shape[1]
    cell = place[code.rows] * n_features + code.columns
    total = torch.zeros(n * n_features, dtype=torch.float64).index_add_(0, cell, code.values.double())
    fired = torch.zeros(n * n_features).index_add_(0, cell, (code.values > 0).float())
    largest = torch.zeros(n * n_features).scatter_reduce_(0, cell, code.values.float(), "amax")
    return total.view(n, -1), fired.view(n, -1), largest.view(n, -1)
