"""The training loss of a crosscoder: joint rows, paired rows or both, under any sparsity rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from rlgen_stats.schemas.dims import BASE_MODEL
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.null_views import HALVES_MODEL
from rlgen_stats.schemas.study import CrosscoderSpec
from rlgen_stats.toolkit.crosscoder.data.halves import halves_weight
from rlgen_stats.toolkit.crosscoder.data.paired import ViewMoments
from rlgen_stats.toolkit.crosscoder.model.crosscoder import Crosscoder
from rlgen_stats.toolkit.crosscoder.training.auxk import AUX_WEIGHT, DeadFeatures
from rlgen_stats.toolkit.crosscoder.training.ranks import Ranks
from rlgen_stats.toolkit.crosscoder.training.rows import Decoded, Rows, joint_rows, paired_rows
from rlgen_stats.toolkit.crosscoder.training.sparsity_rules import make_rule

LEAST_CHANGE: Final = 1e-5
"""Mean square of a change, relative to base's variance, below which it may be rounding (of bfloat16 values: 1e-6)."""


@dataclass(frozen=True)
class Fit:
    """How the weights fit this process's share of a batch; sums over processes are the batch's."""

    loss: Tensor
    """Without the AuxK loss, which says nothing about the fit."""
    revival: Tensor
    """The AuxK loss."""
    fired: Tensor
    """Sum of each feature over the rows of all processes: [feature]."""
    groups: list[tuple[Rows, Decoded]]
    """The joint rows, the paired rows, or both."""


def reference_view(views: Sequence[str]) -> int:
    """Slot of the view from which differences are taken: base, or the first."""
    return views.index(BASE_MODEL) if BASE_MODEL in views else 0


def difference_weights(spec: CrosscoderSpec, views: Sequence[str], moments: ViewMoments) -> Tensor:
    """Of each view, ``difference_weight`` var(a_ref) / mean |a_m - a_ref|^2, so that small changes count too.

    0 for the reference itself. A change below ``LEAST_CHANGE`` weighs as if it were as large.
    """
    base = moments.variance[reference_view(views)]
    weights = spec.difference_weight * base / np.maximum(moments.change, LEAST_CHANGE * base)
    weights[reference_view(views)] = 0.0
    return torch.from_numpy(weights)


class Objective:
    """The loss of a batch, and what it keeps between steps.

    Parameters
    ----------
    spec
        ``objective``, ``difference_weight``, and what the sparsity rule and the AuxK loss use.
    crosscoder
        The one in training.
    variance
        Of each view, normalised units: [view].
    difference_weights
        lambda of each view: [view].
    ranks
        Processes that share a batch: each takes its share of the joint and of the paired tokens.

    Raises
    ------
    InputError
        If paired rows meet views of several widths.

    Notes
    -----
    Joint rows: f from all views, sum_m ||e_m||^2. Paired rows: f^m from view m's activation in every slot, as readout
    swap, e_m = (D f^m + c) s_m - x_m with the scales s_m and D and c, the means of the views' decoders and offsets in
    raw units, and sum_m ||e_m||^2 + sum_{m != ref} lambda_m ||e_m s_ref / s_m - e_ref||^2: the last term is the error
    of the difference between two models. One sparsity rule holds for all rows. With the view of halves, rows are joint
    and each counts for one of the two views (:func:`~rlgen_stats.toolkit.crosscoder.data.halves.halves_weight`).
    """

    def __init__(
        self,
        spec: CrosscoderSpec,
        crosscoder: Crosscoder,
        *,
        variance: Tensor,
        difference_weights: Tensor,
        ranks: Ranks | None = None,
    ) -> None:
        self._spec, self._crosscoder, self.ranks = spec, crosscoder, ranks or Ranks()
        kind = spec.objective or "joint"
        if kind != "joint" and len(set(crosscoder.widths)) > 1:
            raise InputError(
                f"crosscoder {spec.name!r}: objective {kind!r} puts one view's activation into every slot, but "
                f"the views have the widths {list(crosscoder.widths)}; write objective: joint."
            )
        self._n_joint = {"joint": spec.batch_size, "both": spec.batch_size // 2, "paired": 0}[kind]
        self._n_rows = self._n_joint + (spec.batch_size - self._n_joint) * len(crosscoder.views)
        self._reference = reference_view(crosscoder.views)
        self._difference_weights = difference_weights.to(crosscoder.encoder_bias)
        self._low = torch.bfloat16 if spec.precision == "bfloat16" else None
        self._variance = variance
        self._weight: Tensor | None = None
        if HALVES_MODEL in crosscoder.views:
            weight = halves_weight(crosscoder.widths, spec.batch_size)
            self._weight = self.ranks.share(weight).to(crosscoder.encoder_bias.device)
        self._buffer: Tensor | None = None
        self._rule = make_rule(spec, crosscoder, self.ranks, variance=float(variance.sum()))
        self._dead = DeadFeatures(spec, self.ranks, crosscoder.encoder_bias.device)
        self.weights, self.finish = self._rule.weights, self._rule.finish

    def fit(self, raw: Tensor, step: int) -> Fit:
        """The loss of a whole batch of raw joint activations [token, D]; steps count from 0."""
        rows = self._rows(raw)
        sizes = [len(some) for some in rows]
        contribution = self._contribution(rows)
        dead = self._dead.revive(contribution, self._n_rows, step) if self._rule.revives_dead else None
        chosen = self._rule.choose(contribution, self._n_rows, step)
        decoded = [
            some.decode(places, self._rule.activate, revived)
            for some, places, revived in zip(
                rows, chosen.split(sizes), dead.split(sizes) if dead else [None] * len(rows), strict=True
            )
        ]
        groups = list(zip(rows, decoded, strict=True))
        # a token's features are the mean of its rows'
        sums = torch.stack([found.sums(self._spec.n_features) / some.n_slots for some, found in groups]).sum(dim=0)
        squared = torch.stack([self._squared_error(*group) for group in groups]).sum()
        revival = [found.revived_error.square().sum() for found in decoded if found.revived_error is not None]
        fired = self.ranks.sum_(sums.detach().clone())
        self._dead.note(fired, step)
        return Fit(
            loss=squared / self._spec.batch_size + self._rule.penalty(sums, self._n_rows, step),
            revival=AUX_WEIGHT / self._spec.batch_size * torch.stack([*revival, squared.new_zeros(())]).sum(),
            fired=fired,
            groups=groups,
        )

    def _rows(self, raw: Tensor) -> list[Rows]:
        joint, paired = (self.ranks.share(part) for part in (raw[: self._n_joint], raw[self._n_joint :]))
        rows = [joint_rows(self._crosscoder, joint, low=self._low, weight=self._weight)] if len(joint) else []
        return [*rows, paired_rows(self._crosscoder, paired, low=self._low)] if len(paired) else rows

    @torch.no_grad()
    def _contribution(self, rows: list[Rows]) -> Tensor:
        """Pre-activations times the sum of decoder norms: [row, feature]."""
        norms, sizes = self._crosscoder.selection_norm(), [len(some) for some in rows]
        if self._buffer is None:  # kept: fresh memory of this size costs a CPU more than the product
            self._buffer = norms.new_empty(sum(sizes), len(norms))
        for some, part in zip(rows, torch.split(self._buffer, sizes), strict=True):
            torch.mul(some.pre, norms, out=part)
        return self._buffer

    def _squared_error(self, rows: Rows, decoded: Decoded) -> Tensor:
        error = decoded.error
        if rows.n_slots == 1:
            return error.square().sum()
        differences = self._differences(error.view(rows.n_slots, -1, error.shape[1]))
        return error.square().sum() + self._difference_weights @ differences.square().sum(dim=(1, 2))

    def _differences(self, by_view: Tensor) -> Tensor:
        """Of every view from the reference, in its units: [view, token, channel]."""
        scale = self._crosscoder.scale
        ratio = (scale[self._reference] / scale)[:, None, None]
        return by_view * ratio - by_view[self._reference]

    @torch.no_grad()
    def describe(self, fit: Fit) -> dict[str, Any]:
        """A point of the curve: loss, L0 over all rows, fve and dfve by view, share of features that fired nowhere."""
        n_active = torch.stack([(found.features > 0).sum() for _, found in fit.groups]).sum()
        views = self._crosscoder.views
        point = {
            "loss": float(self._total(fit.loss)),
            "l0": float(self._total(n_active)) / self._n_rows,
            "fve": dict(zip(views, self._fve(*fit.groups[0]).tolist(), strict=True)),
            "dead": float((fit.fired <= 0).double().mean()),
        }
        if self._n_joint < self._spec.batch_size:
            point["dfve"] = self._dfve(*fit.groups[-1])
        return point

    def _fve(self, rows: Rows, decoded: Decoded) -> Tensor:
        joint = rows.n_slots == 1
        parts = self._crosscoder.split(decoded.error) if joint else decoded.error.chunk(rows.n_slots)
        squares = self._total(torch.stack([part.double().square().sum() for part in parts]))
        n_tokens = self._n_joint if joint else self._spec.batch_size - self._n_joint
        return 1.0 - squares.cpu() / (n_tokens * self._variance)

    def _dfve(self, rows: Rows, decoded: Decoded) -> dict[str, float]:
        """1 - squared error of a view's difference from the reference / its variance over the batch."""
        shape = (rows.n_slots, -1, rows.x.shape[1])
        error = self._total(self._differences(decoded.error.view(shape)).double().square().sum(dim=(1, 2)))
        data = self._differences(rows.target.view(shape)).double()
        mean = self._total(data.sum(dim=1)) / (self._spec.batch_size - self._n_joint)
        variance = self._total((data - mean[:, None]).square().sum(dim=(1, 2)))
        fve = (1.0 - error / variance).tolist()
        return {view: fve[i] for i, view in enumerate(self._crosscoder.views) if i != self._reference}

    def _total(self, tensor: Tensor) -> Tensor:
        """Sum over processes, float64."""
        return self.ranks.sum_(tensor.detach().double().clone())

    def state(self) -> dict[str, Tensor]:
        """Tensors that a resumed run needs."""
        return self._rule.state() | {"last_fired": self._dead.last_fired}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state`."""
        self._rule.load_state(state)
        self._dead.last_fired.copy_(state["last_fired"])
