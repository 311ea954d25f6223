"""Crosscoder decoders as labelled arrays, for the statistics, which are torch-free."""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import CHANNEL, FEATURE, VIEW
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.stores.health_records import read_health
from rlgen_stats.toolkit.crosscoder.model.crosscoder import Crosscoder
from rlgen_stats.toolkit.statistics.specificity.decoder_norms import ONE_DECODER


def decoder_dataset(crosscoder: Crosscoder, firing: NDArray[np.floating] | None = None) -> xr.Dataset:
    """Decoder rows and firing rates of a crosscoder.

    Parameters
    ----------
    crosscoder
        Trained model.
    firing
        [feature] share of tokens with f > 0; default what health.json beside the weights says.

    Returns
    -------
    Dataset
        ``decoder[view, feature, channel]`` and ``decoder_norm[view, feature]`` (L2) in normalised units,
        ``width[view]`` channels (NaN in ``decoder`` beyond them), ``firing[feature]``, coordinates ``view`` and
        ``feature``; attribute ``one_decoder`` where all views share one, so that its rows say nothing about them: of an
        SAE of one model, and after objective ``paired``.

    Raises
    ------
    InputError
        If ``firing`` has another length, or is not given and the crosscoder was never saved.
    StageError
        If it is not given and there is no health.json.
    """
    if firing is None:
        if crosscoder.folder is None:
            raise InputError(
                f"crosscoder {crosscoder.name!r} was never saved; pass firing= or load it from its folder."
            )
        firing = np.asarray(read_health(crosscoder.folder)["firing"])
    if firing.shape != (crosscoder.n_features,):
        raise InputError(f"firing must have one rate per feature, {crosscoder.n_features}, got shape {firing.shape}.")
    rows = [part.cpu() for part in crosscoder.split(crosscoder.decoder_matrix.detach())]
    decoder = np.full((len(rows), crosscoder.n_features, max(crosscoder.widths)), np.nan, dtype=np.float32)
    for padded, part in zip(decoder, rows, strict=True):
        padded[:, : part.shape[1]] = part.numpy()
    return xr.Dataset(
        {
            "decoder": ((VIEW, FEATURE, CHANNEL), decoder),
            "decoder_norm": ((VIEW, FEATURE), torch.stack([part.double().norm(dim=1) for part in rows]).numpy()),
            "width": (VIEW, np.array(crosscoder.widths)),
            "firing": (FEATURE, np.asarray(firing, dtype=np.float64)),
        },
        coords={VIEW: list(crosscoder.views), FEATURE: np.arange(crosscoder.n_features)},
        attrs={
            "crosscoder": crosscoder.weights_sha256,
            "name": crosscoder.name,
            "sparsity": crosscoder.sparsity,
            "units": "normalised",
        }
        | ({} if crosscoder.has_joint_code else {ONE_DECODER: True}),
    )
