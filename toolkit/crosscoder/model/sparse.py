"""Products with sparse codes, used where they are faster than dense ones."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

SPARSE_SHARE: Final = 0.02
"""Largest share of nonzero entries at which a code counts as sparse. On a CPU with 2 cores, sparse products take a
tenth of the time of dense ones at .4% nonzero, and about as long at 4%."""


@dataclass(frozen=True)
class SparseCode:
    """The nonzero entries of a code [row, feature], in row-major order.

    Parameters
    ----------
    rows, columns, values
        [entry].
    shape
        Rows and features of the code.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor
    shape: tuple[int, int]
    _order: list[Tensor] = field(default_factory=list, repr=False, compare=False)
    """The entries' order by column and where each column starts in it, once known; shared by codes at equal places."""

    @classmethod
    def of(cls, f: Tensor) -> SparseCode | None:
        """The nonzero entries of ``f`` [row, feature]; None where dense products are as fast, always so on a GPU."""
        return None if f.device.type != "cpu" else cls._where(f != 0, f)

    @classmethod
    def above(cls, values: Tensor, limit: Tensor | float) -> SparseCode | None:
        """The entries of ``values`` [row, feature] above ``limit``, the others counting as zero; NaN is kept."""
        return None if values.device.type != "cpu" else cls._where((values <= limit).logical_not_(), values)

    @classmethod
    def _where(cls, mask: Tensor, values: Tensor) -> SparseCode | None:
        n_rows, n_features = mask.shape
        most = SPARSE_SHARE * mask.numel()
        if n_features % 8:
            if int(torch.count_nonzero(mask)) > most:
                return None
            rows, columns = mask.nonzero(as_tuple=True)
        else:  # test eight booleans as one int64: in a sparse code nearly all such words are zero
            rows, words = mask.view(torch.int64).nonzero(as_tuple=True)
            if len(rows) > most:
                return None
            entry, bits = mask.view(n_rows, n_features // 8, 8)[rows, words].nonzero(as_tuple=True)
            if len(entry) > most:
                return None
            rows, columns = rows[entry], words[entry] * 8 + bits
        return cls(rows, columns, values[rows, columns], (n_rows, n_features))

    def with_values(self, values: Tensor) -> SparseCode:
        """Other values at the same places: [entry]."""
        return replace(self, values=values)

    def with_rows(self, rows: Tensor, n_rows: int) -> SparseCode:
        """The same entries in other rows: [entry]."""
        return replace(self, rows=rows, shape=(n_rows, self.shape[1]))

    def dense(self) -> Tensor:
        """The code itself: [row, feature]."""
        f = torch.zeros(self.shape, dtype=self.values.dtype)
        f[self.rows, self.columns] = self.values
        return f

    def times(self, matrix: Tensor) -> Tensor:
        """Code @ ``matrix`` [feature, channel]: [row, channel]."""
        return _bags(self.columns, self.values, _starts(self.rows, self.shape[0]), matrix)

    def transposed_times(self, matrix: Tensor) -> Tensor:
        """Code.T @ ``matrix`` [row, channel]: [feature, channel]."""
        if not self._order:
            order = torch.argsort(self.columns, stable=True)
            self._order.extend([order, _starts(self.columns[order], self.shape[1])])
        order, starts = self._order
        return _bags(self.rows[order], self.values[order], starts, matrix)

    def sampled(self, left: Tensor, right: Tensor) -> Tensor:
        """``left`` [row, channel] @ ``right`` [feature, channel].T at the entries alone: [entry]."""
        starts = torch.searchsorted(self.rows, torch.arange(self.shape[0] + 1))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            entries = torch.sparse_csr_tensor(starts, self.columns, self.values, self.shape, check_invariants=False)
        # beta=0: the code says at which entries to multiply, its values do not count
        products: Tensor = torch.sparse.sampled_addmm(entries, left, right.T, beta=0.0).values()
        return products

    def column_sums(self) -> Tensor:
        """Sum of the values of every feature: [feature]."""
        return torch.zeros(self.shape[1], dtype=self.values.dtype).index_add_(0, self.columns, self.values)


def matmul(f: Tensor | SparseCode, matrix: Tensor) -> Tensor:
    """``f`` [row, feature] @ ``matrix`` [feature, channel], the faster way."""
    if isinstance(f, SparseCode):
        return f.times(matrix)
    code = SparseCode.of(f)
    return f @ matrix if code is None else code.times(matrix)


def _starts(sorted_: Tensor, n: int) -> Tensor:
    """Where each of 0 to n - 1 begins in a sorted tensor."""
    return torch.searchsorted(sorted_, torch.arange(n))


def _bags(indices: Tensor, weights: Tensor, starts: Tensor, matrix: Tensor) -> Tensor:
    """Weighted sums of rows of ``matrix``, one per bag: the fastest sparse-times-dense product PyTorch has on a CPU."""
    summed: Tensor = embedding_bag(indices, matrix, starts, mode="sum", per_sample_weights=weights)
    return summed
