"""Which stored tokens are used: those with the declared labels, without attention sinks."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import BASE_MODEL
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder, open_activations, open_tokens
from rlgen_stats.toolkit.extraction.activations import site_name, token_mask

BLOCK: Final = 8192
"""Tokens whose norms are computed at once: one shard of the store."""


def usable_tokens(
    spec: StudySpec, folder: StudyFolder, purpose: Literal["train", "summary"] = "train"
) -> NDArray[np.bool_]:
    """Tokens a study's crosscoders train on, or tokens a prompt's summary averages over.

    Parameters
    ----------
    spec, folder
        The study, with base's activations stored.
    purpose
        ``"train"`` or ``"summary"``.

    Returns
    -------
    ndarray [token] bool
        Those of :func:`token_mask` that are no attention sinks: the residual norm of a few tokens that all others
        attend to is many times larger than the rest (arXiv:2402.17762), so they would dominate means and squared
        errors. A token is a sink where base's activation norm exceeds ``extraction.max_norm_ratio`` times base's median
        over the tokens trained on; the same tokens for all models, so that they stay comparable.

    Raises
    ------
    StoreError
        If base's activations are not complete.
    InputError
        If nothing is left.
    """
    tokens, ratio = open_tokens(folder.activations), spec.extraction.max_norm_ratio
    mask = token_mask(tokens, spec.extraction, purpose)
    if ratio is None:
        return mask
    norms = _base_norms(folder.activations, spec.extraction.layer)
    trained = mask if purpose == "train" else token_mask(tokens, spec.extraction, "train")
    mask &= norms <= ratio * np.median(norms[trained])
    if not mask.any():
        raise InputError(
            f"no token is left whose base activation is at most {ratio} times the median long; raise "
            "extraction.max_norm_ratio."
        )
    return mask


def _base_norms(store: Path, layer: int) -> NDArray[np.float64]:
    """Euclidean norm of base's activation of every token, in float64: squares of float16 overflow from 256 on."""
    stored = open_activations(store, models=[BASE_MODEL], site=site_name(layer))
    activation = stored["activation"][0]
    norms = np.empty(len(activation))
    for start in range(0, len(norms), BLOCK):
        norms[start : start + BLOCK] = np.linalg.norm(
            activation[start : start + BLOCK].values.astype(np.float64), axis=1
        )
    return norms
