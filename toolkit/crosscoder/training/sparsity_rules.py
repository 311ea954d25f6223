"""Training losses and their gradients, one class per sparsity rule.

A new rule is a new class with the methods of :class:`Objective`, and a line in :func:`make_objective`; the loop in
``train.py`` does not change.
"""

from __future__ import annotations

import math
from typing import Final, Protocol

import torch
from torch import Tensor

from rlgen_stats.schemas.study import CrosscoderSpec
from rlgen_stats.toolkit.crosscoder.model.crosscoder import Crosscoder
from rlgen_stats.toolkit.crosscoder.model.readout import smallest_of_each
from rlgen_stats.toolkit.crosscoder.training.auxk import AuxK
from rlgen_stats.toolkit.crosscoder.training.workspace import Workspace, grad, just_below, keep_where

SPARSITY_WARMUP: Final = 0.1
"""Share of the steps over which sparsity rises to full strength: at once, it kills features before they are learned."""

WARMUP_K: Final = 2
"""Rules with a target L0 of k start at this multiple of it."""

THRESHOLD_MEMORY: Final = 0.04
"""Share of the steps that the running mean behind the inference threshold remembers: a fifth of the final decay, during
which weights hardly move. A memory that reaches further back lags and gives an L0 below k."""
THRESHOLD_STEPS: Final = 100
"""Longest memory in steps; averaging over more batches gains nothing."""

JUMP_START: Final = 0.3
"""Share of the steps during which all jumprelu thresholds equal the batch's: contributions grow severalfold meanwhile,
faster than trained thresholds can."""

JUMP_BANDWIDTH: Final = 0.5
"""Width of the window around a jumprelu threshold, relative to it; tokens inside estimate the threshold's gradient."""


class Objective(Protocol):
    """A training loss and the state it keeps between steps."""

    def step(self, work: Workspace, step: int) -> None:
        """From pre-activations in ``work.features`` to gradients of every weight; steps count from 0."""

    def loss(self, work: Workspace, step: int) -> float:
        """Loss of the batch whose gradients were just computed, before the optimiser's step."""

    def weights(self) -> dict[str, Tensor]:
        """Trained tensors that only the objective has."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that a resumed run needs."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state`."""

    def finish(self, crosscoder: Crosscoder) -> None:
        """Store inference thresholds in the crosscoder."""


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
    """Target L0 at a step: falls from ``WARMUP_K`` times the declared k to k."""
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
        coefficient = self._coefficient * warmed(step, self._steps) / work.batch_size
        work.features.relu_()
        work.decode()
        norms = work.decoder_norms()
        work.backward(coefficient * norms.sum(dim=1))
        # the penalty moves decoder rows too: d||d_mk|| / d d_mk = d_mk / ||d_mk||, weighted by the summed activations
        shrinkage = (coefficient * work.active)[:, None] / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        views = zip(work.by_view(grad(work.decoder)), work.by_view(work.decoder), shrinkage.T, strict=True)
        for gradient, rows, factor in views:
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
    """Squared error with only the largest contributions f_k sum_m ||d_mk|| active, plus AuxK loss for dead features.

    Parameters
    ----------
    spec
        Active are a batch's B * k largest (``batchtopk``, ``dfc``) or each token's k largest (``topk``).
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
        self._spec, self._auxk = spec, AuxK(spec, device)
        self._threshold = self._smallest = math.nan

    def step(self, work: Workspace, step: int) -> None:
        """Gradients with k as warmed up at this step."""
        norms = work.decoder_norms().sum(dim=1)
        contribution = torch.mul(work.features, norms, out=work.back)
        dead = self._auxk.select_dead(work, norms, step)  # before the sparsity rule overwrites the pre-activations
        if self._spec.sparsity == "topk":
            kept = contribution >= smallest_of_each(contribution, round(k_at(step, self._spec)))
            work.features.mul_(kept)
        else:
            n_keep = round(k_at(step, self._spec) * work.batch_size)
            self._smallest = work.ranks.smallest_kept(contribution, n_keep, hint=self._smallest)
            self._update_threshold(step)
            keep_where(work.features, contribution, just_below(self._smallest), out=work.features)
        work.decode()
        work.backward()
        self._auxk.finish_step(work, step, dead)

    def _update_threshold(self, step: int) -> None:
        """Running mean of the batches' smallest contribution kept."""
        if warmed(step, self._spec.steps) < 1.0:
            return  # during warm-up batches keep more than k, and their threshold is lower than the one at inference
        if math.isnan(self._threshold):
            self._threshold = self._smallest
        memory = min(THRESHOLD_STEPS, max(1.0, THRESHOLD_MEMORY * self._spec.steps))
        self._threshold += (self._smallest - self._threshold) / memory

    def loss(self, work: Workspace, step: int) -> float:
        """Squared error; the AuxK loss is left out, as it says nothing about the fit."""
        return float(work.squared_error())

    def weights(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Steps at which features last fired and the running threshold; the last batch's threshold is only a hint."""
        return self._auxk.state() | {"running": torch.tensor(self._threshold, dtype=torch.float64)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state`."""
        self._auxk.load_state(state)
        self._threshold = float(state["running"])

    def finish(self, crosscoder: Crosscoder) -> None:
        """Fix the inference threshold; topk has none."""
        if self._spec.sparsity != "topk":
            crosscoder.threshold.fill_(self._smallest if math.isnan(self._threshold) else self._threshold)


class JumpReLUObjective:
    """Squared error + weight * (L0 / k - 1)^2; f_k is active where its contribution exceeds its own threshold.

    Parameters
    ----------
    spec
        ``k`` is the target L0, ``l0_coefficient`` the weight relative to ``variance``.
    device
        Where the state lives.
    variance
        Of the data, summed over channels of all views, normalised units: the scale of the squared error.

    Notes
    -----
    Thresholds theta_k (on f_k sum_m ||d_mk||, hence scale-invariant) are trained as logarithms. A step function has no
    slope, so their gradient is a straight-through estimate from the tokens whose contribution lies in a window of
    width ``JUMP_BANDWIDTH`` theta_k around theta_k (rectangular kernel, arXiv:2407.14435 eq. 11 in log theta). For the
    first ``JUMP_START`` of the steps all thresholds are the one at which the batch has the target L0. Dead features
    have the AuxK loss of batchtopk.

    References
    ----------
    Rajamanoharan et al. (2024), arXiv:2407.14435, eqs. 9-12 and appendix G (target L0).
    """

    def __init__(self, spec: CrosscoderSpec, device: torch.device, *, variance: float) -> None:
        self._spec, self._auxk = spec, AuxK(spec, device)
        self._weight = spec.l0_coefficient * variance
        self._log_threshold = torch.full((spec.n_features,), math.nan, device=device)
        self._l0 = self._smallest = math.nan

    def step(self, work: Workspace, step: int) -> None:
        """Gradients with k as warmed up at this step."""
        norms = work.decoder_norms().sum(dim=1)
        contribution = torch.mul(work.features, norms, out=work.back)
        k = k_at(step, self._spec)
        trained = step >= JUMP_START * self._spec.steps and step > 0  # whether thresholds have gradients yet
        if not trained:
            self._smallest = work.ranks.smallest_kept(contribution, round(k * work.batch_size), hint=self._smallest)
            self._log_threshold.fill_(math.log(just_below(self._smallest)))
        dead = self._auxk.select_dead(work, norms, step)
        theta = self._log_threshold.exp()
        in_window = contribution.sub(theta).abs_() < (JUMP_BANDWIDTH / 2) * theta
        work.features.mul_(contribution > theta)
        work.decode()
        self._l0 = float(work.mean_over_tokens((work.features > 0).sum()))
        work.decoder_backward()  # overwrites `contribution`: both live in work.back
        # what one more active entry would change: the L0 term the same for all, the squared error entry by entry
        l0_gradient = 2.0 * self._weight * (self._l0 / k - 1.0) / (k * work.batch_size)
        theta_per_norm = theta / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        reconstruction_gradient = (in_window * work.back).sum(dim=0) * theta_per_norm
        if trained:
            # negative: a higher threshold turns the entries of its window off, the opposite of one more active entry
            gradient = (reconstruction_gradient + l0_gradient * in_window.sum(dim=0)) / -JUMP_BANDWIDTH
            grad(self._log_threshold).copy_(gradient)
        work.ranks.sum_(grad(self._log_threshold))
        keep_where(work.back, work.features, 0.0, out=work.back)
        work.encoder_backward()
        self._auxk.finish_step(work, step, dead)

    def loss(self, work: Workspace, step: int) -> float:
        """Squared error plus the penalty on the L0."""
        return float(work.squared_error() + self._weight * (self._l0 / k_at(step, self._spec) - 1.0) ** 2)

    def weights(self) -> dict[str, Tensor]:
        """The logarithms of the thresholds."""
        return {"log_threshold": self._log_threshold}

    def state(self) -> dict[str, Tensor]:
        """Thresholds and steps at which features last fired."""
        return self._auxk.state() | self.weights()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state`."""
        self._auxk.load_state(state)
        self._log_threshold.copy_(state["log_threshold"])

    def finish(self, crosscoder: Crosscoder) -> None:
        """Fix the thresholds."""
        crosscoder.threshold.copy_(self._log_threshold.double().exp())
