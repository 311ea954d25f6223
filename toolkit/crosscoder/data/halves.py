"""Two views of the same tokens, each trained on its own half of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.crosscoder.data.paired import Batch, PairedActivations


class HalvesReader:
    """Batches whose first half of rows comes from one reader and whose second half from another.

    Parameters
    ----------
    first, second
        The same views on disjoint tokens.
    """

    def __init__(self, first: PairedActivations, second: PairedActivations) -> None:
        self._readers = (first, second)

    @property
    def n_tokens(self) -> int:
        """Tokens of both."""
        return sum(reader.n_tokens for reader in self._readers)

    @property
    def n_batches(self) -> int:
        """Whole batches in one epoch, which ends with the shorter half."""
        return min(reader.n_batches for reader in self._readers)

    def epoch(self, epoch: int, *, start_batch: int = 0) -> Iterator[Batch]:
        """Shuffled batches, [first half of rows; second half of rows]."""
        halves = (reader.epoch(epoch, start_batch=start_batch) for reader in self._readers)
        for first, second in zip(*halves, strict=False):
            yield np.concatenate([first, second])

    def sequential(self, batch_size: int) -> Iterator[Batch]:
        """All tokens of the first, then all of the second."""
        for reader in self._readers:
            yield from reader.sequential(batch_size)


def halves_weight(widths: tuple[int, ...], batch_size: int) -> torch.Tensor:
    """Weights of the errors of such a batch: [row, channel of both views].

    The first half of rows counts for the first view alone, the second for the second; by sqrt(2), so that the expected
    squared error is that of a whole batch.

    Raises
    ------
    InputError
        If there are not two views.
    """
    if len(widths) != 2:
        raise InputError(f"halves of the prompts are for two views, got {len(widths)}.")
    weight = torch.zeros(batch_size, sum(widths))
    weight[: batch_size // 2, : widths[0]] = 2**0.5
    weight[batch_size // 2 :, widths[0] :] = 2**0.5
    return weight
