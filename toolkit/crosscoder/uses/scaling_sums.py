"""Sums behind latent scaling: how strongly each feature's direction is present in a model's activations.

Tokens are read once and only their active features are used, so no array of the size features x tokens or features x
tokens x channels exists.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from rlgen_stats.schemas.dims import CLUSTER, FEATURE, GROUP, PROMPT, TOKEN, VIEW
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.stores import open_activations
from rlgen_stats.stores.labels import LabelBlocks, TokenLabels
from rlgen_stats.toolkit.crosscoder.model.crosscoder import Crosscoder
from rlgen_stats.toolkit.progress import SILENT, Progress

BLOCK_TOKENS: Final = 8192
"""Tokens read at once."""

GATHER_BYTES: Final = 1 << 26
"""Decoder rows gathered at once for the active features of some tokens."""

GROUP_BYTES: Final = 1 << 28
"""Memory of the sums by group; where there are more clusters of prompts than fit, clusters share groups."""

LEAST_GROUPS: Final = 100
"""Fewest groups, whatever memory they take: a standard error from 100 groups is itself known to 7%."""


@torch.no_grad()
def scaling_sums(
    crosscoder: Crosscoder, blocks: Iterable[tuple[Tensor, NDArray[np.integer]]], *, n_groups: int
) -> xr.Dataset:
    """Sums from which :func:`rlgen_stats.toolkit.statistics.latent_scaling` computes betas, ratios and standard errors.

    Parameters
    ----------
    crosscoder
        Trained model.
    blocks
        Pairs of raw joint activations [token, D] (see ``Crosscoder.join``) and each token's group, 0 to ``n_groups`` -
        1: tokens of one prompt, or of prompts that depend on each other, are in one group.
    n_groups
        Number of groups, the units of the standard errors.

    Returns
    -------
    Dataset
        ``squares[group, feature]``: sum of f^2. ``error``, ``reconstruction`` [group, view, feature]: sums of
        f <d*, y> / ||d*||^2 with d* the feature's decoder row in its strongest view, normalised units, and y a view's
        residual error plus the feature's own contribution f d_m, or its reconstruction without bias.
        ``strongest[feature]``: slot of that view. ``n_active[feature]``: tokens with f > 0.

    Raises
    ------
    InputError
        If a group is out of range.

    References
    ----------
    Minder et al. (2025), arXiv:2504.02922, section 3.2 and appendix (closed form).
    """
    device, n_views = crosscoder.encoder_matrix.device, len(crosscoder.views)
    norms = crosscoder.decoder_norm()
    strongest = norms.argmax(dim=0)
    sums = _Sums(crosscoder, strongest, n_groups)
    for raw, group in blocks:
        codes = np.asarray(group)
        if len(codes) and not 0 <= codes.min() <= codes.max() < n_groups:
            raise InputError(f"groups run from 0 to {n_groups - 1}, got {codes.min()} to {codes.max()}.")
        x = crosscoder.normalise(raw.to(device))
        f = crosscoder.encode(x)
        reconstruction = f @ crosscoder.decoder_matrix
        error = x - reconstruction - crosscoder.decoder_offset
        sums.add(f, error, reconstruction, torch.as_tensor(codes.astype(np.int64), device=device))
    shape = (n_groups, n_views, crosscoder.n_features)
    return xr.Dataset(
        {
            "squares": ((GROUP, FEATURE), sums.squares.view(shape[0], shape[2]).cpu().numpy()),
            "error": ((GROUP, VIEW, FEATURE), sums.error.view(shape).cpu().numpy()),
            "reconstruction": ((GROUP, VIEW, FEATURE), sums.reconstruction.view(shape).cpu().numpy()),
            "strongest": (FEATURE, strongest.cpu().numpy()),
            "n_active": (FEATURE, sums.n_active.cpu().numpy()),
        },
        coords={VIEW: list(crosscoder.views), FEATURE: np.arange(crosscoder.n_features)},
        attrs={"crosscoder": crosscoder.weights_sha256, "name": crosscoder.name},
    )


class _Sums:
    """Running sums over active (token, feature) pairs, float64."""

    def __init__(self, crosscoder: Crosscoder, strongest: Tensor, n_groups: int) -> None:
        device, n_views, n_features = strongest.device, len(crosscoder.views), crosscoder.n_features
        self._rows = list(crosscoder.split(crosscoder.decoder_matrix))
        self._slots, self._n_views, self._n_features = crosscoder.slots(), n_views, n_features
        widths = set(crosscoder.widths)
        if len(widths) > 1:
            raise InputError(
                f"latent scaling compares a feature's direction across views of one width, got {crosscoder.widths}; "
                "views of other widths share no directions."
            )
        stacked = torch.stack(self._rows)
        self._direction = stacked[strongest, torch.arange(n_features, device=device)]
        square = self._direction.double().square().sum(dim=1)
        overlap = torch.stack([(self._direction.double() * rows.double()).sum(dim=1) for rows in self._rows])
        self._inverse = torch.where(square > 0, 1.0 / square, 0.0)
        self._overlap = overlap * self._inverse
        self.squares = torch.zeros(n_groups * n_features, dtype=torch.float64, device=device)
        self.error = torch.zeros(n_groups * n_views * n_features, dtype=torch.float64, device=device)
        self.reconstruction = torch.zeros_like(self.error)
        self.n_active = torch.zeros(n_features, dtype=torch.int64, device=device)

    def add(self, f: Tensor, error: Tensor, reconstruction: Tensor, group: Tensor) -> None:
        """One block: features [token, feature], residuals and reconstructions [token, D], groups [token]."""
        token, feature = torch.nonzero(f, as_tuple=True)
        self.n_active += torch.bincount(feature, minlength=self._n_features)
        width = self._direction.shape[1]
        step = max(1, GATHER_BYTES // (4 * width))
        for start in range(0, len(token), step):
            t, k = token[start : start + step], feature[start : start + step]
            value = f[t, k].double()
            direction = self._direction[k]
            self.squares.index_add_(0, group[t] * self._n_features + k, value.square())
            for view, channels in enumerate(self._slots):
                cell = (group[t] * self._n_views + view) * self._n_features + k
                residual = (error[t, channels] * direction).sum(dim=1).double() * self._inverse[k]
                # the error without this feature: the residual plus the feature's own contribution f d_m
                without_feature = residual + value * self._overlap[view, k]
                self.error.index_add_(0, cell, value * without_feature)
                projection = (reconstruction[t, channels] * direction).sum(dim=1).double() * self._inverse[k]
                self.reconstruction.index_add_(0, cell, value * projection)


def stored_scaling_sums(
    crosscoder: Crosscoder,
    path: Path,
    site: str,
    mask: NDArray[np.bool_],
    *,
    seed: int,
    progress: Progress = SILENT,
) -> xr.Dataset:
    """:func:`scaling_sums` over an activation store, prompt clusters as groups.

    Parameters
    ----------
    crosscoder
        Its views are read.
    path, site
        Activation store and site.
    mask
        [token]: tokens that count.
    seed
        Decides which clusters share a group where there are too many for one each.
    progress
        Receiver of progress, in tokens.
    """
    stored = TokenLabels(path)
    blocks = LabelBlocks(stored)
    _, cluster = np.unique(np.asarray(stored.legend(CLUSTER)), return_inverse=True)
    n_fitting = GROUP_BYTES // (8 * crosscoder.n_features * (2 * len(crosscoder.views) + 1))
    n_clusters = int(cluster.max()) + 1
    n_groups = min(n_clusters, max(LEAST_GROUPS, int(n_fitting)))
    group_of = np.random.default_rng(seed).permutation(n_clusters) % n_groups
    parts = [open_activations(path, models=[view], site=site)["activation"][0] for view in crosscoder.views]

    def read() -> Iterable[tuple[Tensor, NDArray[np.integer]]]:
        with progress.task(f"latent scaling {crosscoder.name}", total=len(mask), unit="tokens") as task:
            for start in range(0, len(mask), BLOCK_TOKENS):
                kept = mask[start : start + BLOCK_TOKENS]
                if kept.any():
                    prompt = blocks.read(PROMPT, start, min(start + BLOCK_TOKENS, len(mask)))[kept]
                    raw = [part.isel({TOKEN: slice(start, start + BLOCK_TOKENS)}).values[kept] for part in parts]
                    joint = np.concatenate(raw, axis=1).astype(np.float32, copy=False)
                    yield torch.from_numpy(joint), group_of[cluster[prompt]]
                task.advance(len(kept))

    return scaling_sums(crosscoder, read(), n_groups=n_groups)
