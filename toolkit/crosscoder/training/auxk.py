"""Dead features: those that stopped firing are trained to reconstruct the residual of the others (AuxK loss)."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from rlgen_stats.schemas.study import CrosscoderSpec
from rlgen_stats.toolkit.crosscoder.training.ranks import Ranks, just_below
from rlgen_stats.toolkit.crosscoder.training.rows import Revived

DEAD_SHARE: Final = 0.01
"""A feature counts as dead when it has not fired for this share of the training tokens ..."""

DEAD_TOKENS: Final = 10_000_000
"""... but never for more than this many (Gao et al. 2024, arXiv:2406.04093, section 2.4)."""

AUX_WEIGHT: Final = 1.0
"""Weight of the AuxK loss. Gao et al. take 1/32 and d/2 features per token, over billions of tokens; in 1,500 steps on
a planted dictionary, weight 1 and k features per token recovered 91% of it, their setting 83%, no such loss 60%."""

AUX_SHARE: Final = 0.5
"""Largest share of the dictionary in the AuxK loss at once: bounds the cost of a step when most features are dead."""


class DeadFeatures:
    """When features last fired, and which of the dead ones take part in the AuxK loss: the k largest of a row.

    Parameters
    ----------
    spec
        ``k``, ``steps``, ``batch_size`` and ``n_features`` are used.
    ranks
        Processes that share a batch.
    device
        Where the state lives.

    References
    ----------
    Gao et al. (2024), arXiv:2406.04093, appendix A.2.
    """

    def __init__(self, spec: CrosscoderSpec, ranks: Ranks, device: torch.device) -> None:
        self._k, self._n_features, self._ranks = spec.k, spec.n_features, ranks
        tokens = min(DEAD_TOKENS, DEAD_SHARE * spec.steps * spec.batch_size)
        self._patience = max(1, math.ceil(tokens / spec.batch_size))
        self.last_fired = torch.zeros(spec.n_features, dtype=torch.int64, device=device)
        self._smallest = math.nan

    def revive(self, contribution: Tensor, n_rows: int, step: int) -> Revived | None:
        """The dead features' largest contributions [row, feature], k a row on average of all processes' ``n_rows``."""
        dead = self._dead(step)
        if not len(dead):
            return None
        theirs = contribution[:, dead]
        n_keep = min(self._k, len(dead)) * n_rows
        self._smallest = self._ranks.smallest_kept(theirs, n_keep, hint=self._smallest)
        return Revived(theirs, just_below(self._smallest), dead)

    def _dead(self, step: int) -> Tensor:
        if step < self._patience:
            return self.last_fired[:0]
        dead = torch.nonzero(step - self.last_fired >= self._patience).flatten()
        most = max(1, int(AUX_SHARE * self._n_features))
        if len(dead) > most:  # take turns, one patience each, so that every dead feature gets a gradient
            dead = dead.roll(-(step // self._patience) * most % len(dead))[:most]
        return dead

    def note(self, sums: Tensor, step: int) -> None:
        """Note which features fired, from their sums over all processes' rows: [feature]."""
        self.last_fired.masked_fill_(sums > 0, step)
