"""Training losses and their gradients, one class a sparsity rule.

A new rule is a new class with the same methods; the loop in ``training`` does not change.
"""

from __future__ import annotations

import math
from typing import Final, Protocol

import torch
from torch import Tensor

from rlgen_stats.schemas.study import CrosscoderSpec
from rlgen_stats.toolkit.crosscoder.model.crosscoder import Crosscoder
from rlgen_stats.toolkit.crosscoder.model.readout import smallest_of_each
from rlgen_stats.toolkit.crosscoder.training.revival import Revival
from rlgen_stats.toolkit.crosscoder.training.workspace import Workspace, grad, just_below, keep_where

SPARSITY_WARMUP: Final = 0.1
"""Share of the steps over which sparsity is brought in; imposed at once it kills features before they mean anything."""

WARMUP_K: Final = 2
"""Rules that aim at k start with this multiple of it."""

THRESHOLD_MEMORY: Final = 0.04
"""Share of the steps that the running mean behind the inference threshold remembers: a fifth of the final decay, during
which weights hardly move. A memory that reaches further back lags and gives an L0 below k."""
THRESHOLD_STEPS: Final = 100
"""Longest memory in steps; averaging over more batches gains nothing."""

JUMP_START: Final = 0.3
"""Share of the steps during which jumprelu's thresholds are one, the batch's: contributions grow severalfold there,
faster than trained thresholds follow."""

JUMP_BANDWIDTH: Final = 0.5
"""Width of the window around a jumprelu threshold, relative to it, whose tokens tell which way to move it."""


class Objective(Protocol):
    """A loss with whatever it must remember between steps."""

    def step(self, work: Workspace, step: int) -> None:
        """From pre-activations in ``work.features`` to gradients of every weight; steps count from 0."""

    def loss(self, work: Workspace, step: int) -> float:
        """Loss of the batch whose step was just computed, before the weights move."""

    def weights(self) -> dict[str, Tensor]:
        """Trained tensors that only the objective has."""

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state`."""

    def finish(self, crosscoder: Crosscoder) -> None:
        """Put what was learned beside the gradient into the crosscoder."""


def make_objective(spec: CrosscoderSpec, device: torch.device, *, variance: float = 1.0) -> Objective:
    """The objective of a spec; ``variance`` is the data's, summed over channels of all views, normalised units."""
    if spec.sparsity == "l1":
        return L1Objective(spec)
    if spec.sparsity == "jumprelu":
        return JumpReLUObjective(spec, device, variance=variance)
    return TopKObjective(spec, device)


def warmed(step: int, total: int, share: float = SPARSITY_WARMUP) -> float:
    """0 at the first step, 1 from ``share`` of the steps on, linear between."""
    length = share * total
    return 1.0 if step >= length else step / length


def k_at(step: int, spec: CrosscoderSpec) -> float:
    """The k aimed at: falls from ``WARMUP_K`` times the declared one."""
    start = min(WARMUP_K * spec.k, spec.n_features)
    return start + (spec.k - start) * warmed(step, spec.steps)


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
        pull = (weight * work.active)[:, None] / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        parts = zip(work.by_view(grad(work.decoder)), work.by_view(work.decoder), pull.T, strict=True)
        for gradient, rows, factor in parts:
            gradient.addcmul_(factor[:, None], rows)

    def loss(self, work: Workspace, step: int) -> float:
        """Squared error plus penalty."""
        penalty = work.mean_over_tokens(work.active @ work.decoder_norms().sum(dim=1))
        return float(work.squared_error() + self._coefficient * warmed(step, self._steps) * penalty)

    def weights(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing."""

    def finish(self, crosscoder: Crosscoder) -> None:
        """Nothing."""


class TopKObjective:
    """Squared error under the largest contributions f_k sum_m ||d_mk||, plus a loss that revives the dead.

    Parameters
    ----------
    spec
        Kept are a batch's B * k largest (``batchtopk``, ``dfc``) or each token's k largest (``topk``).
    device
        Where the state lives.

    Notes
    -----
    The inference threshold of batchtopk is a running mean (float64) of the smallest contribution kept.

    References
    ----------
    Bussmann et al. (2024), arXiv:2412.06410, eqs. 3-5; Gao et al. (2024), arXiv:2406.04093, section 2.3.
    """

    def __init__(self, spec: CrosscoderSpec, device: torch.device) -> None:
        self._spec, self._revival = spec, Revival(spec, device)
        self._threshold = self._smallest = math.nan

    def step(self, work: Workspace, step: int) -> None:
        """Gradients with k as warmed up at this step."""
        norms = work.decoder_norms().sum(dim=1)
        contribution = torch.mul(work.features, norms, out=work.back)
        revived = self._revival.candidates(work, norms, step)
        if self._spec.sparsity == "topk":
            kept = contribution >= smallest_of_each(contribution, round(k_at(step, self._spec)))
            work.features.mul_(kept)
        else:
            n_keep = round(k_at(step, self._spec) * work.batch_size)
            self._smallest = work.ranks.smallest_kept(contribution, n_keep, hint=self._smallest)
            self._follow(step)
            keep_where(work.features, contribution, just_below(self._smallest), out=work.features)
        work.decode()
        work.backward()
        self._revival.after(work, step, revived)

    def _follow(self, step: int) -> None:
        if warmed(step, self._spec.steps) < 1.0:
            return  # batches that keep more than k teach nothing about the threshold
        if math.isnan(self._threshold):
            self._threshold = self._smallest
        memory = min(THRESHOLD_STEPS, max(1.0, THRESHOLD_MEMORY * self._spec.steps))
        self._threshold += (self._smallest - self._threshold) / memory

    def loss(self, work: Workspace, step: int) -> float:
        """Squared error; the auxiliary loss is a means, not a measure."""
        return float(work.squared_error())

    def weights(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Steps at which features last fired and the running threshold; the last batch's are only hints."""
        return self._revival.state() | {"running": torch.tensor(self._threshold, dtype=torch.float64)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state`."""
        self._revival.load_state(state)
        self._threshold = float(state["running"])

    def finish(self, crosscoder: Crosscoder) -> None:
        """Fix the inference threshold; topk has none."""
        if self._spec.sparsity != "topk":
            crosscoder.threshold.fill_(self._smallest if math.isnan(self._threshold) else self._threshold)


class JumpReLUObjective:
    """Squared error + weight * (L0 / k - 1)^2, f_k staying where its contribution exceeds a threshold of its own.

    Parameters
    ----------
    spec
        ``k`` is the L0 aimed at, ``l0_coefficient`` the weight relative to ``variance``.
    device
        Where the state lives.
    variance
        Of the data, summed over channels of all views, normalised units: the scale of the squared error.

    Notes
    -----
    Thresholds theta_k (on f_k sum_m ||d_mk||, so that they are gauge free) are trained as logarithms. A step has no
    slope, so their gradient is a straight-through estimate: tokens whose contribution lies within ``JUMP_BANDWIDTH``
    theta_k around theta_k say what moving it would cost (rectangular kernel, arXiv:2407.14435 eq. 11 in log theta).
    For the first ``JUMP_START`` of the steps all thresholds are the one at which the batch keeps what is aimed at. The
    dead are revived as under batchtopk.

    References
    ----------
    Rajamanoharan et al. (2024), arXiv:2407.14435, eqs. 9-12 and appendix G (aiming at an L0).
    """

    def __init__(self, spec: CrosscoderSpec, device: torch.device, *, variance: float) -> None:
        self._spec, self._revival = spec, Revival(spec, device)
        self._weight = spec.l0_coefficient * variance
        self._log_threshold = torch.full((spec.n_features,), math.nan, device=device)
        self._l0 = self._smallest = math.nan

    def step(self, work: Workspace, step: int) -> None:
        """Gradients with k as warmed up at this step."""
        norms = work.decoder_norms().sum(dim=1)
        contribution = torch.mul(work.features, norms, out=work.back)
        k = k_at(step, self._spec)
        free = step >= JUMP_START * self._spec.steps and step > 0
        if not free:
            self._smallest = work.ranks.smallest_kept(contribution, round(k * work.batch_size), hint=self._smallest)
            self._log_threshold.fill_(math.log(just_below(self._smallest)))
        revived = self._revival.candidates(work, norms, step)
        theta = self._log_threshold.exp()
        near = contribution.sub(theta).abs_() < (JUMP_BANDWIDTH / 2) * theta
        work.features.mul_(contribution > theta)
        work.decode()
        self._l0 = float(work.mean_over_tokens((work.features > 0).sum()))
        work.decoder_backward()
        toll = 2.0 * self._weight * (self._l0 / k - 1.0) / (k * work.batch_size)
        price = (near * work.back).sum(dim=0) * (theta / norms.clamp_min(torch.finfo(norms.dtype).tiny))
        if free:
            grad(self._log_threshold).copy_((price + toll * near.sum(dim=0)) / -JUMP_BANDWIDTH)
        work.ranks.sum_(grad(self._log_threshold))
        keep_where(work.back, work.features, 0.0, out=work.back)
        work.encoder_backward()
        self._revival.after(work, step, revived)

    def loss(self, work: Workspace, step: int) -> float:
        """Squared error plus what missing the L0 costs."""
        return float(work.squared_error() + self._weight * (self._l0 / k_at(step, self._spec) - 1.0) ** 2)

    def weights(self) -> dict[str, Tensor]:
        """The logarithms of the thresholds."""
        return {"log_threshold": self._log_threshold}

    def state(self) -> dict[str, Tensor]:
        """Thresholds and steps at which features last fired."""
        return self._revival.state() | self.weights()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state`."""
        self._revival.load_state(state)
        self._log_threshold.copy_(state["log_threshold"])

    def finish(self, crosscoder: Crosscoder) -> None:
        """Fix the thresholds."""
        crosscoder.threshold.copy_(self._log_threshold.double().exp())
