"""AuxK loss for dead features: those that stopped firing are trained to reconstruct the residual of the others."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from rlgen_stats.schemas.study import CrosscoderSpec
from rlgen_stats.toolkit.crosscoder.model.sparse import SparseCode
from rlgen_stats.toolkit.crosscoder.training.workspace import Workspace, grad, just_below, keep_where

DEAD_SHARE: Final = 0.01
"""A feature counts as dead when it has not fired for this share of the training tokens ..."""

DEAD_TOKENS: Final = 10_000_000
"""... but never for more than this many (Gao et al. 2024, arXiv:2406.04093, section 2.4)."""

AUX_WEIGHT: Final = 1.0
"""Weight of the AuxK loss. Gao et al. take 1/32 and d/2 features per token, over billions of tokens; in 1,500 steps on
a planted dictionary, weight 1 and k features per token recovered 91% of it, their setting 83%, no such loss 60%."""

AUX_SHARE: Final = 0.5
"""Largest share of the dictionary in the AuxK loss at once: bounds the cost of a step when most features are dead."""

DeadActivations = tuple[Tensor, Tensor]
"""Activations of dead features for the AuxK loss [row, dead], and these features' indices [dead]."""


class AuxK:
    """Dead features and their loss: the squared error of reconstructing the residual with the k largest of them.

    Parameters
    ----------
    spec
        ``k``, ``steps``, ``batch_size`` and ``n_features`` are used.
    device
        Where the state lives.

    References
    ----------
    Gao et al. (2024), arXiv:2406.04093, appendix A.2.
    """

    def __init__(self, spec: CrosscoderSpec, device: torch.device) -> None:
        self._k, self._n_features = spec.k, spec.n_features
        tokens = min(DEAD_TOKENS, DEAD_SHARE * spec.steps * spec.batch_size)
        self._patience = max(1, math.ceil(tokens / spec.batch_size))
        self._last_fired = torch.zeros(spec.n_features, dtype=torch.int64, device=device)
        self._smallest = math.nan

    def select_dead(self, work: Workspace, norms: Tensor, step: int) -> DeadActivations | None:
        """The dead features' largest contributions, k per token on average; reads pre-activations from ``work``."""
        dead = self._dead(step)
        if not len(dead):
            return None
        pre = work.features[:, dead]
        contribution = pre * norms[dead]
        n_keep = min(self._k, len(dead)) * work.batch_size
        self._smallest = work.ranks.smallest_kept(contribution, n_keep, hint=self._smallest)
        return keep_where(pre, contribution, just_below(self._smallest), out=pre), dead

    def _dead(self, step: int) -> Tensor:
        if step < self._patience:
            return self._last_fired[:0]
        dead = torch.nonzero(step - self._last_fired >= self._patience).flatten()
        most = max(1, int(AUX_SHARE * self._n_features))
        if len(dead) > most:  # take turns, one patience each, so that every dead feature gets a gradient
            dead = dead.roll(-(step // self._patience) * most % len(dead))[:most]
        return dead

    def finish_step(self, work: Workspace, step: int, dead: DeadActivations | None) -> None:
        """Note which features fired, and add the AuxK loss's gradient to the step's."""
        fired = work.active if work.ranks.world == 1 else work.ranks.sum_(work.active.clone())
        self._last_fired.masked_fill_(fired > 0, step)
        if dead is not None:
            add_auxk_gradient(work, *dead)

    def state(self) -> dict[str, Tensor]:
        """Steps at which features last fired."""
        return {"last_fired": self._last_fired}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state`."""
        self._last_fired = state["last_fired"].to(self._last_fired.device)


def add_auxk_gradient(work: Workspace, activations: Tensor, dead: Tensor) -> None:
    """Add the gradient of AUX_WEIGHT * ||residual - reconstruction of it by dead features||^2, mean over tokens.

    Parameters
    ----------
    work
        After :meth:`Workspace.backward`.
    activations
        Of dead features, zero where not among the largest: [row, dead].
    dead
        Indices of these features: [dead].

    Notes
    -----
    The residual counts as data: no gradient reaches the other features.

    References
    ----------
    Gao et al. (2024), arXiv:2406.04093, appendix A.2.
    """
    rows = work.decoder[dead]
    scale = 2.0 * AUX_WEIGHT / work.batch_size
    # work.error is minus the residual, so adding the dead features' reconstruction to it gives the error of the latter
    code = SparseCode.of(activations)
    if code is not None:
        error = code.times(rows).add_(work.error)
        grad(work.decoder).index_add_(0, dead, code.transposed_times(error), alpha=scale)
        slopes = code.with_values(code.sampled(error, rows).mul_(scale))
        grad(work.encoder).index_add_(1, dead, slopes.transposed_times(work.x).T)
        grad(work.encoder_bias).index_add_(0, dead, slopes.column_sums())
        return
    error = torch.addmm(work.error, activations, rows)
    grad(work.decoder).index_add_(0, dead, activations.T @ error, alpha=scale)
    back = (error @ rows.T).mul_(scale)
    keep_where(back, activations, 0.0, out=back)
    grad(work.encoder).index_add_(1, dead, work.x.T @ back)
    grad(work.encoder_bias).index_add_(0, dead, back.sum(dim=0))
