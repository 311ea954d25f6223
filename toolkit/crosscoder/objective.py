"""Training losses and their gradients, one class a sparsity rule.

Gradients are written out instead of taped: two matrix products forward, three back, all into buffers that are
allocated once. (Taped, a third of a step on a CPU went into fresh temporaries.) A new rule is a new class with the
same methods; the loop in ``training`` does not change.
"""

from __future__ import annotations

import math
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlgen_stats.schemas.study import CrosscoderSpec
from rlgen_stats.toolkit.crosscoder.model import Crosscoder

SPARSITY_WARMUP: Final = 0.1
"""Share of the steps over which sparsity is brought in; imposed at once it kills features before they mean anything."""

WARMUP_K: Final = 2
"""batchtopk starts with this multiple of k."""

DEAD_SHARE: Final = 0.01
"""A feature is dead for the auxiliary loss when silent for this share of the training tokens ..."""

DEAD_TOKENS: Final = 10_000_000
"""... but never for more than this many (Gao et al. 2024, arXiv:2406.04093, section 2.4)."""

AUX_WEIGHT: Final = 1.0
"""Weight of the auxiliary loss. Gao et al. take 1/32 and d/2 features a token, over billions of tokens; in 1,500 steps
on a planted dictionary, weight 1 and k features a token recovered 91% of it, theirs 83%, no such loss 60%."""

REVIVED_SHARE: Final = 0.5
"""Features revived at once, as a share of the dictionary: bounds the cost of a step when most features are dead."""

THRESHOLD_MEMORY: Final = 0.04
"""Share of the steps that the running mean behind the inference threshold remembers: a fifth of the final decay, during
which weights hardly move. A memory that reaches further back lags and gives an L0 below k."""
THRESHOLD_STEPS: Final = 100
"""Longest memory in steps; averaging over more batches gains nothing."""

WINDOW: Final = 0.1
"""A batch's threshold is first looked for within this share of the last batch's; it seldom moves by more."""


class Workspace:
    """Weights as flat matrices that share memory with a crosscoder, their gradients, and the buffers of one batch.

    Parameters
    ----------
    crosscoder
        Its parameters are changed through this object.
    batch_size
        Tokens per batch.

    Attributes
    ----------
    encoder, encoder_bias, decoder, decoder_bias : Tensor
        [view * channel, feature], [feature], [feature, view * channel], [view * channel]; ``.grad`` holds gradients.
    x : Tensor [batch, view * channel]
        Normalised activations.
    features : Tensor [batch, feature]
        Pre-activations, then the features kept.
    back : Tensor [batch, feature]
        Gradient of the loss with respect to the pre-activations; scratch before.
    error : Tensor [batch, view * channel]
        Reconstruction minus data.
    active : Tensor [feature]
        Sum of the features over the batch.
    """

    def __init__(self, crosscoder: Crosscoder, batch_size: int) -> None:
        n_features, flat = crosscoder.n_features, len(crosscoder.views) * crosscoder.width
        self.encoder = crosscoder.encoder.detach().view(flat, n_features)
        self.encoder_bias = crosscoder.encoder_bias.detach()
        self.decoder = crosscoder.decoder.detach().transpose(0, 1).view(n_features, flat)
        self.decoder_bias = crosscoder.decoder_bias.detach().view(flat)
        for weight in self.weights().values():
            weight.grad = torch.zeros_like(weight)
        device = self.encoder.device
        self.n_views, self.batch_size = len(crosscoder.views), batch_size
        self.scale = crosscoder.scale.repeat_interleave(crosscoder.width)
        self.x = torch.empty(batch_size, flat, device=device)
        self.features = torch.empty(batch_size, n_features, device=device)
        self.back = torch.empty(batch_size, n_features, device=device)
        self.error = torch.empty(batch_size, flat, device=device)
        self.active = torch.empty(n_features, device=device)

    def weights(self) -> dict[str, Tensor]:
        """The trained tensors by name."""
        names = ("encoder", "encoder_bias", "decoder", "decoder_bias")
        return {name: getattr(self, name) for name in names}

    def decoder_norms(self) -> Tensor:
        """||d_mk||: [feature, view]."""
        norms: Tensor = torch.linalg.vector_norm(self.decoder.view(len(self.decoder), self.n_views, -1), dim=-1)
        return norms

    def encode(self, raw: Tensor) -> None:
        """Raw activations [batch, view, channel] -> ``x`` and pre-activations in ``features``."""
        torch.mul(raw.reshape(len(raw), -1), self.scale, out=self.x)
        torch.addmm(self.encoder_bias, self.x, self.encoder, out=self.features)

    def decode(self) -> None:
        """``features`` -> ``error`` and ``active``."""
        torch.addmm(self.decoder_bias, self.features, self.decoder, out=self.error).sub_(self.x)
        torch.sum(self.features, dim=0, out=self.active)

    def squared_error(self) -> Tensor:
        """Mean over tokens of the squared error summed over views and channels."""
        return self.error.square().sum() / self.batch_size

    def backward(self, penalty: Tensor | None = None) -> None:
        """Gradients of :meth:`squared_error` plus sum_bk ``penalty``_k f_bk, in ``.grad`` of every weight."""
        scale = 2.0 / self.batch_size
        grads = {name: _grad(weight) for name, weight in self.weights().items()}
        torch.addmm(grads["decoder"], self.features.T, self.error, beta=0, alpha=scale, out=grads["decoder"])
        torch.sum(self.error, dim=0, out=grads["decoder_bias"]).mul_(scale)
        torch.addmm(self.back, self.error, self.decoder.T, beta=0, alpha=scale, out=self.back)
        if penalty is not None:
            self.back.add_(penalty)
        keep_where(self.back, self.features, 0.0, out=self.back)
        torch.mm(self.x.T, self.back, out=grads["encoder"])
        torch.sum(self.back, dim=0, out=grads["encoder_bias"])


def keep_where(values: Tensor, criterion: Tensor, limit: float, *, out: Tensor) -> Tensor:
    """``values`` where ``criterion`` > ``limit``, else 0, in one pass and without a temporary."""
    kept: Tensor = torch.ops.aten.threshold_backward.grad_input(values, criterion, limit, grad_input=out)
    return kept


def _grad(weight: Tensor) -> Tensor:
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def just_below(value: float) -> float:
    """The float32 before ``value``: "above it" is then "at least ``value``"."""
    return float(np.nextafter(np.float32(value), np.float32(0)))


class Objective(Protocol):
    """A loss with whatever it must remember between steps."""

    def step(self, work: Workspace, step: int) -> None:
        """From pre-activations in ``work.features`` to gradients of every weight; steps count from 0."""

    def loss(self, work: Workspace, step: int) -> float:
        """Loss of the batch whose step was just computed, before the weights move."""

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state`."""

    def finish(self, crosscoder: Crosscoder) -> None:
        """Put what was learned beside the gradient into the crosscoder."""


def make_objective(spec: CrosscoderSpec, device: torch.device) -> Objective:
    """The objective of a spec."""
    return L1Objective(spec) if spec.sparsity == "l1" else BatchTopKObjective(spec, device)


def warmed(step: int, total: int, share: float = SPARSITY_WARMUP) -> float:
    """0 at the first step, 1 from ``share`` of the steps on, linear between."""
    length = share * total
    return 1.0 if step >= length else step / length


class L1Objective:
    """sum_m ||a_hat_m - a_m||^2 + coefficient * sum_k f_k sum_m ||d_mk||, mean over tokens, normalised units.

    Parameters
    ----------
    spec
        ``l1_coefficient`` and ``steps`` are used.
    """

    def __init__(self, spec: CrosscoderSpec) -> None:
        self._coefficient, self._steps = spec.l1_coefficient, spec.steps

    def step(self, work: Workspace, step: int) -> None:
        """Gradients with the coefficient as warmed up at this step."""
        weight = self._coefficient * warmed(step, self._steps) / work.batch_size
        work.features.relu_()
        work.decode()
        norms = work.decoder_norms()
        work.backward(weight * norms.sum(dim=1))
        rows = work.decoder.view(*norms.shape, -1)
        pull = (weight * work.active)[:, None] / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        _grad(work.decoder).add_((pull[:, :, None] * rows).view_as(work.decoder))

    def loss(self, work: Workspace, step: int) -> float:
        """Squared error plus penalty."""
        penalty = work.active @ work.decoder_norms().sum(dim=1) / work.batch_size
        return float(work.squared_error() + self._coefficient * warmed(step, self._steps) * penalty)

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing."""

    def finish(self, crosscoder: Crosscoder) -> None:
        """Nothing."""


class BatchTopKObjective:
    """Squared error under a batch's B * k largest contributions f_k sum_m ||d_mk||, plus a loss that revives the dead.

    Parameters
    ----------
    spec
        ``k``, ``steps``, ``batch_size`` and ``n_features`` are used.
    device
        Where the state lives.

    Notes
    -----
    The inference threshold is a running mean (float64) of the smallest contribution kept. Auxiliary loss: features
    silent for long reconstruct the residual, with as many contributions as the living have.

    References
    ----------
    Bussmann et al. (2024), arXiv:2412.06410, eqs. 3-5; Gao et al. (2024), arXiv:2406.04093, appendix A.2.
    """

    def __init__(self, spec: CrosscoderSpec, device: torch.device) -> None:
        self._k, self._steps, self._n_features = spec.k, spec.steps, spec.n_features
        tokens = min(DEAD_TOKENS, DEAD_SHARE * spec.steps * spec.batch_size)
        self._patience = max(1, math.ceil(tokens / spec.batch_size))
        self._last_fired = torch.zeros(spec.n_features, dtype=torch.int64, device=device)
        self._threshold = self._smallest = self._smallest_dead = math.nan

    def _k_now(self, step: int) -> float:
        start = min(WARMUP_K * self._k, self._n_features)
        return start + (self._k - start) * warmed(step, self._steps)

    def step(self, work: Workspace, step: int) -> None:
        """Gradients with k as warmed up at this step."""
        norms = work.decoder_norms().sum(dim=1)
        contribution = torch.mul(work.features, norms, out=work.back)
        self._smallest = smallest_kept(contribution, round(self._k_now(step) * work.batch_size), hint=self._smallest)
        self._follow(step)
        dead = self._dead(step)
        revived = self._revived(work.features[:, dead], norms[dead]) if len(dead) else None
        keep_where(work.features, contribution, just_below(self._smallest), out=work.features)
        work.decode()
        work.backward()
        self._last_fired.masked_fill_(work.active > 0, step)
        if revived is not None:
            add_revival(work, revived, dead)

    def _revived(self, pre: Tensor, norms: Tensor) -> Tensor:
        """The dead features' largest k contributions a token, as features [batch, dead]; ``pre`` is changed."""
        contribution = pre * norms
        n_keep = min(self._k * len(pre), pre.numel())
        self._smallest_dead = smallest_kept(contribution, n_keep, hint=self._smallest_dead)
        return keep_where(pre, contribution, just_below(self._smallest_dead), out=pre)

    def _dead(self, step: int) -> Tensor:
        if step < self._patience:
            return self._last_fired[:0]
        dead = torch.nonzero(step - self._last_fired >= self._patience).flatten()
        most = max(1, int(REVIVED_SHARE * self._n_features))
        if len(dead) > most:  # in turns of one patience each
            dead = dead.roll(-(step // self._patience) * most % len(dead))[:most]
        return dead

    def _follow(self, step: int) -> None:
        if warmed(step, self._steps) < 1.0:
            return  # batches that keep more than k teach nothing about the threshold
        if math.isnan(self._threshold):
            self._threshold = self._smallest
        memory = min(THRESHOLD_STEPS, max(1.0, THRESHOLD_MEMORY * self._steps))
        self._threshold += (self._smallest - self._threshold) / memory

    def loss(self, work: Workspace, step: int) -> float:
        """Squared error; the auxiliary loss is a means, not a measure."""
        return float(work.squared_error())

    def state(self) -> dict[str, Tensor]:
        """Steps at which features last fired and the running threshold; the last batch's are only hints."""
        running = torch.tensor(self._threshold, dtype=torch.float64)
        return {"last_fired": self._last_fired, "running": running}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state`."""
        self._last_fired = state["last_fired"].to(self._last_fired.device)
        self._threshold = float(state["running"])

    def finish(self, crosscoder: Crosscoder) -> None:
        """Fix the inference threshold."""
        crosscoder.threshold.fill_(self._smallest if math.isnan(self._threshold) else self._threshold)


def smallest_kept(contribution: Tensor, n_keep: int, *, hint: float = math.nan) -> float:
    """The ``n_keep``-th largest entry, or the smallest positive float if that entry is not positive.

    Parameters
    ----------
    contribution
        Any shape.
    n_keep
        Entries to keep.
    hint
        A guess, NaN for none. On a CPU, entries near it are counted first, which finds the same number some twenty
        times faster than sorting everything when the guess is good.
    """
    flat = contribution.reshape(-1)
    found = _near(flat.numpy(), n_keep, hint) if flat.device.type == "cpu" and hint > 0 else None
    if found is None:
        found = float(torch.topk(flat, n_keep, sorted=False).values.min())
    return max(found, torch.finfo(flat.dtype).tiny)


def _near(values: NDArray[np.float32], n_keep: int, hint: float) -> float | None:
    """The ``n_keep``-th largest of ``values`` if it lies within ``WINDOW`` of ``hint``, else None."""
    above = np.count_nonzero(values > hint * (1 + WINDOW))
    if above >= n_keep:
        return None
    window = values[np.flatnonzero((values > hint * (1 - WINDOW)) & (values <= hint * (1 + WINDOW)))]
    place = len(window) - (n_keep - above)
    return None if place < 0 else float(np.partition(window, place)[place])


def add_revival(work: Workspace, revived: Tensor, dead: Tensor) -> None:
    """Add the gradient of AUX_WEIGHT * ||residual - reconstruction of it by dead features||^2, mean over tokens.

    Parameters
    ----------
    work
        After :meth:`Workspace.backward`.
    revived
        Dead features that take part [batch, dead].
    dead
        Their indices.

    Notes
    -----
    The residual counts as data: no gradient reaches the living features.

    References
    ----------
    Gao et al. (2024), arXiv:2406.04093, appendix A.2.
    """
    rows = work.decoder[dead]
    left = torch.addmm(work.error, revived, rows)
    scale = 2.0 * AUX_WEIGHT / work.batch_size
    _grad(work.decoder).index_add_(0, dead, revived.T @ left, alpha=scale)
    back = (left @ rows.T).mul_(scale)
    keep_where(back, revived, 0.0, out=back)
    _grad(work.encoder).index_add_(1, dead, work.x.T @ back)
    _grad(work.encoder_bias).index_add_(0, dead, back.sum(dim=0))
