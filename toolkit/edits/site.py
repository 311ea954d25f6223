"""Where an edit reads and writes, and the columns of the crosscoder that it needs.

Shapes: d channels, F features, K features of the set. Raw units are those of the model's residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.study import Readout
from rlgen_stats.toolkit.crosscoder import Crosscoder


@dataclass(frozen=True)
class EditSite:
    """Where an edit reads and writes: the crosscoder, its slot for this model, and the block whose output it reads."""

    crosscoder: Crosscoder
    view: str
    """View that stands for the edited model."""
    layer: int
    """Decoder block whose output (residual stream) is edited, counted from 0."""
    readout: Readout = "swap"
    """How this model's features are read from the shared code."""


class FeatureColumns:
    """The share of a crosscoder that an edit of K features needs: O(K d) work a token instead of O(F d).

    Parameters
    ----------
    site
        Crosscoder, view and readout.
    features
        Ids, or None for all.
    device
        Torch device of the model.

    Attributes
    ----------
    directions : Tensor [feature, channel]
        What a unit of each feature adds to this model's residual, raw units.
    offset : Tensor [channel]
        What a reconstruction of this model is without any feature, raw units.

    Raises
    ------
    InputError
        If a feature id is out of range, the view is unknown, the readout is not one of a single model, or the
        crosscoder carries no usable normalisation or threshold.
    """

    def __init__(
        self, site: EditSite, features: Sequence[int] | None = None, *, device: torch.device | str = "cpu"
    ) -> None:
        crosscoder = site.crosscoder
        chosen = list(range(crosscoder.n_features)) if features is None else [int(k) for k in features]
        unknown = [k for k in chosen if not 0 <= k < crosscoder.n_features]
        if unknown:
            raise InputError(f"feature ids run from 0 to {crosscoder.n_features - 1}, got {unknown[:5]}.")
        scale = crosscoder.scale.detach()
        if not bool(torch.isfinite(scale).all() and (scale > 0).all()):
            raise InputError(f"the crosscoder's scales must be positive, got {scale.tolist()}; train it again.")
        columns = torch.tensor(chosen, dtype=torch.int64, device=scale.device)
        with torch.no_grad():
            readout = crosscoder.readout_map(view=site.view, kind=site.readout, features=columns, dtype=torch.float64)
        self._readout = readout.to(device, torch.float32)
        self.directions = crosscoder.feature_direction(site.view).detach()[columns].to(device, torch.float32)
        self.offset = crosscoder.offset(site.view).detach().to(device, torch.float32)

    def to(self, device: torch.device) -> FeatureColumns:
        """The same on the device of the activations; itself if it is there already."""
        if self.directions.device != device:
            self._readout = self._readout.to(device, torch.float32)
            self.directions, self.offset = self.directions.to(device), self.offset.to(device)
        return self

    def read(self, activation: Tensor) -> Tensor:
        """Features [..., feature] of raw activations [..., channel] of one model."""
        return self._readout(activation)

    def write(self, change: Tensor) -> Tensor:
        """Raw residual [..., channel] that a change of features [..., feature] adds."""
        return change @ self.directions
