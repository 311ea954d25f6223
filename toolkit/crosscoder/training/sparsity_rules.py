"""Sparsity rules in training: which entries of the pre-activations stay, and the penalty on them.

A new rule is a subclass of :class:`SparsityRule` and a line in :func:`make_rule`; gradients follow by autograd.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from rlgen_stats.schemas.study import CrosscoderSpec
from rlgen_stats.toolkit.crosscoder.model.crosscoder import Crosscoder
from rlgen_stats.toolkit.crosscoder.model.readout import smallest_of_each
from rlgen_stats.toolkit.crosscoder.training.products import Step
from rlgen_stats.toolkit.crosscoder.training.ranks import Ranks, just_below
from rlgen_stats.toolkit.crosscoder.training.rows import Columns, Places

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


def make_rule(spec: CrosscoderSpec, crosscoder: Crosscoder, ranks: Ranks, *, variance: float = 1.0) -> SparsityRule:
    """The rule of a spec; ``variance`` is the data's, summed over channels of all views, normalised units."""
    if spec.sparsity == "l1":
        return L1(spec, crosscoder, ranks)
    if spec.sparsity == "jumprelu":
        return JumpReLU(spec, crosscoder, ranks, variance=variance)
    return TopK(spec, crosscoder, ranks)


def warmed(step: int, total: int, share: float = SPARSITY_WARMUP) -> float:
    """0 at the first step, 1 from ``share`` of the steps on, linear between."""
    length = share * total
    return 1.0 if step >= length else step / length


def k_at(step: int, spec: CrosscoderSpec) -> float:
    """Target L0 at a step: falls from ``WARMUP_K`` times the declared k to k."""
    start = min(WARMUP_K * spec.k, spec.n_features)
    return start + (spec.k - start) * warmed(step, spec.steps)


class SparsityRule:
    """What all rules share; a contribution is a pre-activation times sum_m ||d_mk||, over all rows of a batch.

    Parameters
    ----------
    spec
        ``k``, ``steps`` and the coefficients are used.
    crosscoder
        The one in training.
    ranks
        Processes that share a batch.
    """

    revives_dead = True
    """Whether dead features have an AuxK loss."""

    def __init__(self, spec: CrosscoderSpec, crosscoder: Crosscoder, ranks: Ranks) -> None:
        self._spec, self._crosscoder, self._ranks = spec, crosscoder, ranks

    def choose(self, contribution: Tensor, n_rows: int, step: int) -> Places:
        """Where there is a gradient, all active features included; may change ``contribution``.

        Parameters
        ----------
        contribution
            [row, feature], of this process's rows.
        n_rows
            Rows of all processes.
        step
            Counted from 0.
        """
        raise NotImplementedError

    def activate(self, pre: Tensor, columns: Columns) -> Tensor:
        """Features from pre-activations at the chosen places."""
        return pre

    def penalty(self, sums: Tensor, n_rows: int, step: int) -> Tensor:
        """What is added to the squared error, this process's share of it; ``sums`` [feature] are over tokens."""
        return sums.new_zeros(())

    def weights(self) -> dict[str, Tensor]:
        """Trained tensors that only the rule has."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Tensors that a resumed run needs."""
        return self.weights()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state`."""
        for name, tensor in self.weights().items():
            tensor.detach().copy_(state[name])

    def finish(self) -> None:
        """Store inference thresholds in the crosscoder."""


class L1(SparsityRule):
    """All positive entries stay; penalty ``l1_coefficient`` * sum_k f_k sum_m ||d_mk||, mean over tokens."""

    revives_dead = False

    def choose(self, contribution: Tensor, n_rows: int, step: int) -> Places:
        """All positive ones."""
        return Places(contribution, 0.0)

    def penalty(self, sums: Tensor, n_rows: int, step: int) -> Tensor:
        """With the coefficient as warmed up at this step; it moves decoder rows too."""
        coefficient = self._spec.l1_coefficient * warmed(step, self._spec.steps)
        return coefficient / self._spec.batch_size * (sums @ self._crosscoder.selection_norm())


class TopK(SparsityRule):
    """The largest contributions of the batch stay, k a row on average (batchtopk, dfc), or the k largest of each row.

    Notes
    -----
    The inference threshold of batchtopk is a running mean (float64) of the smallest contribution kept.

    References
    ----------
    Bussmann et al. (2024), arXiv:2412.06410, eqs. 3-5; Gao et al. (2024), arXiv:2406.04093, section 2.3.
    """

    _threshold = _smallest = math.nan

    def choose(self, contribution: Tensor, n_rows: int, step: int) -> Places:
        """With k as warmed up at this step."""
        k = k_at(step, self._spec)
        if self._spec.sparsity == "topk":
            smallest = smallest_of_each(contribution, round(k))
            return Places(contribution.sub_(torch.nextafter(smallest, torch.zeros_like(smallest))), 0.0)
        self._smallest = self._ranks.smallest_kept(contribution, round(k * n_rows), hint=self._smallest)
        if warmed(step, self._spec.steps) == 1.0:  # before, batches keep more than k, and their threshold is lower
            if math.isnan(self._threshold):
                self._threshold = self._smallest
            memory = min(THRESHOLD_STEPS, max(1.0, THRESHOLD_MEMORY * self._spec.steps))
            self._threshold += (self._smallest - self._threshold) / memory
        return Places(contribution, just_below(self._smallest))

    def state(self) -> dict[str, Tensor]:
        """The running threshold; the last batch's is only a hint."""
        return {"running": torch.tensor(self._threshold, dtype=torch.float64)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state`."""
        self._threshold = float(state["running"])

    def finish(self) -> None:
        """Fix the inference threshold; topk has none."""
        if self._spec.sparsity != "topk":
            self._crosscoder.threshold.fill_(self._smallest if math.isnan(self._threshold) else self._threshold)


class JumpReLU(SparsityRule):
    """Contributions above a feature's own threshold stay; penalty ``l0_coefficient`` * variance * (L0 / k - 1)^2.

    Notes
    -----
    Thresholds theta_k (on f_k sum_m ||d_mk||, hence scale-invariant) are trained as logarithms, with the
    straight-through gradient of ``products.Step``. For the first ``JUMP_START`` of the steps all thresholds are the one
    at which the batch has the target L0.

    References
    ----------
    Rajamanoharan et al. (2024), arXiv:2407.14435, eqs. 9-12 and appendix G (target L0).
    """

    def __init__(self, spec: CrosscoderSpec, crosscoder: Crosscoder, ranks: Ranks, *, variance: float) -> None:
        super().__init__(spec, crosscoder, ranks)
        self._weight = spec.l0_coefficient * variance
        device = crosscoder.encoder_bias.device
        self._log_threshold = torch.full((spec.n_features,), math.nan, device=device, requires_grad=True)
        self._smallest, self._trained = math.nan, False
        self._active: list[Tensor] = []

    def choose(self, contribution: Tensor, n_rows: int, step: int) -> Places:
        """Those above the threshold or in its window."""
        self._active, self._trained = [], step > 0 and step >= JUMP_START * self._spec.steps
        if not self._trained:
            n_keep = round(k_at(step, self._spec) * n_rows)
            self._smallest = self._ranks.smallest_kept(contribution, n_keep, hint=self._smallest)
            self._log_threshold.detach().fill_(math.log(just_below(self._smallest)))
        return Places(contribution.sub_((1 - JUMP_BANDWIDTH / 2) * self._log_threshold.detach().exp()), 0.0)

    def activate(self, pre: Tensor, columns: Columns) -> Tensor:
        """Zero at or below the threshold."""
        norm = self._crosscoder.selection_norm().detach()[columns]
        log_threshold = (self._log_threshold if self._trained else self._log_threshold.detach())[columns]
        active: Tensor = Step.apply(pre.detach() * norm, log_threshold, JUMP_BANDWIDTH)  # type: ignore[no-untyped-call]
        self._active.append(active.sum())
        # the jump at the threshold is theta / norm high: its slope in theta, of a value that does not change
        jump = log_threshold.detach().exp() / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        return pre * active.detach() + jump * (active - active.detach())

    def penalty(self, sums: Tensor, n_rows: int, step: int) -> Tensor:
        """Its value is known from all processes, its gradient is made from the rows of this one."""
        n_active = torch.stack(self._active).sum()
        k = k_at(step, self._spec)
        excess = self._ranks.sum_(n_active.detach().clone()) / (n_rows * k) - 1.0
        slope = 2.0 * self._weight * excess / (n_rows * k)
        return self._weight * excess.square() / self._ranks.world + slope * (n_active - n_active.detach())

    def weights(self) -> dict[str, Tensor]:
        """The logarithms of the thresholds."""
        return {"log_threshold": self._log_threshold}

    def finish(self) -> None:
        """Fix the thresholds."""
        self._crosscoder.threshold.copy_(self._log_threshold.detach().double().exp())
