"""Several processes that train one crosscoder on shares of the same batches (torchrun, ``torch.distributed``)."""

from __future__ import annotations

import atexit
import importlib
import math
import os
from typing import Final

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

WINDOW: Final = 0.1
"""A batch's threshold is first looked for within this share of the last batch's; it seldom moves by more."""

SPARE: Final = 1.25
"""A rank sends this multiple of its even share of the entries kept, and twice as many again while that is too few."""


class Ranks:
    """Rank of this process among those that train together; 0 of 1 unless a process group exists."""

    def __init__(self) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world = dist.get_world_size() if distributed else 1

    def share(self, rows: Tensor) -> Tensor:
        """Rows of a whole batch that belong to this process."""
        return rows[self.rank :: self.world]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def smallest_kept(self, contribution: Tensor, n_keep: int, *, hint: float = math.nan) -> float:
        """The ``n_keep``-th largest entry over all processes; see :func:`smallest_kept`."""
        if self.world == 1:
            return smallest_kept(contribution, n_keep, hint=hint)
        flat = contribution.reshape(-1)
        n_sent = math.ceil(SPARE * n_keep / self.world)
        while True:
            top, complete = self._gather_top(flat, min(n_sent, n_keep))
            smallest = float(torch.topk(top.flatten(), min(n_keep, top.numel()), sorted=False).values.min())
            # right once no rank can still hold an entry above it: each sent entries down to it or below, or all it has
            if complete or n_sent >= n_keep or bool((top.amin(dim=1) <= smallest).all()):
                return max(smallest, torch.finfo(flat.dtype).tiny)
            n_sent *= 2

    def _gather_top(self, flat: Tensor, n: int) -> tuple[Tensor, bool]:
        """The n largest of every process [rank, n], padded with -inf; whether every process sent all it has."""
        sent = torch.full((n,), -math.inf, dtype=flat.dtype, device=flat.device)
        n_here = min(n, flat.numel())
        sent[:n_here] = torch.topk(flat, n_here, sorted=False).values
        gathered = [torch.empty_like(sent) for _ in range(self.world)]
        dist.all_gather(gathered, sent)
        sizes = self.sum_(torch.tensor([float(flat.numel() <= n)], device=flat.device))
        return torch.stack(gathered), int(sizes.item()) == self.world


def rank_of_process() -> int:
    """Number of the process among those torchrun started; 0 if it did not."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def world_size() -> int:
    """How many processes torchrun started; 1 if it did not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def smallest_kept(contribution: Tensor, n_keep: int, *, hint: float = math.nan) -> float:
    """The ``n_keep``-th largest entry, or the smallest positive float if that entry is not positive.

    Parameters
    ----------
    contribution
        Any shape.
    n_keep
        Entries to keep.
    hint
        A guess, NaN for none. On a CPU only entries near a good guess are sorted, which gives the same number some
        twenty times faster than sorting all.
    """
    flat = contribution.reshape(-1)
    smallest = _smallest_near_hint(flat.numpy(), n_keep, hint) if flat.device.type == "cpu" and hint > 0 else None
    if smallest is None:
        smallest = float(torch.topk(flat, n_keep, sorted=False).values.min())
    return max(smallest, torch.finfo(flat.dtype).tiny)


def just_below(value: float) -> float:
    """The float32 before ``value``: "above it" is then "at least ``value``"."""
    return float(np.nextafter(np.float32(value), np.float32(0)))


def _smallest_near_hint(values: NDArray[np.float32], n_keep: int, hint: float) -> float | None:
    """The ``n_keep``-th largest of ``values`` if it lies within ``WINDOW`` of ``hint``, else None."""
    above = np.count_nonzero(values > hint * (1 + WINDOW))
    if above >= n_keep:
        return None
    window = values[np.flatnonzero((values > hint * (1 - WINDOW)) & (values <= hint * (1 + WINDOW)))]
    place = len(window) - (n_keep - above)
    return None if place < 0 else float(np.partition(window, place)[place])


def join_ranks(device: torch.device) -> Ranks:
    """Join the process group that torchrun set up, if it did, for the rest of the process's life."""
    if world_size() > 1 and not dist.is_initialized():
        # Imported after the group exists, this module takes it as a default argument and keeps it, and with it its
        # threads, past destroy_process_group: one that then lets go of a tensor aborts the interpreter at its end.
        importlib.import_module("torch.distributed.nn.functional")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return Ranks()
