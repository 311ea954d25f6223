"""What control features are matched on, from decoder rows and the stored feature summaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import FEATURE, MODEL, PROMPT, SPLIT, TRIAL
from rlgen_stats.schemas.errors import InputError, NotEstimableError
from rlgen_stats.stores.crosscoder_weights import Decoder
from rlgen_stats.toolkit.statistics.causal.controls import NEAR_DUPLICATE, TINY

BIN_EDGES: Final = (0.5, 0.8, 1.25, 2.0)
"""Bins of a view's share of the decoder norms, in multiples of the even share 1/V: nearly absent, weaker, shared,
stronger, mostly this view's."""
_BLOCK: Final = 1024
"""Features per block of cosines."""


class LoadedCrosscoder(Protocol):
    """What is read of a crosscoder that a caller has loaded with torch; this module imports none."""

    name: str
    views: tuple[str, ...]
    widths: tuple[int, ...]
    weights_sha256: str
    decoder_matrix: Any


def decoder_of(crosscoder: Decoder | LoadedCrosscoder) -> Decoder:
    """Decoder rows of a loaded crosscoder as an array; a :class:`Decoder` as it is."""
    if isinstance(crosscoder, Decoder):
        return crosscoder
    rows = np.asarray(crosscoder.decoder_matrix.detach().cpu().numpy(), dtype=np.float32)
    return Decoder(crosscoder.name, crosscoder.views, crosscoder.widths, rows, crosscoder.weights_sha256)


def feature_covariates(
    crosscoder: Decoder | LoadedCrosscoder, summaries: xr.Dataset, *, models: Sequence[str], view: str
) -> xr.Dataset:
    """Firing rate, decoder norm, contribution energy and attribution bin of every feature.

    Parameters
    ----------
    crosscoder
        Decoder geometry.
    summaries
        Layout ``features``: ``mean`` (contribution scale), ``firing`` and ``n_tokens`` per model and prompt.
    models
        Models over whose tokens firing and energy are pooled.
    view
        View whose share of the decoder norms makes the bin.

    Returns
    -------
    Dataset over ``feature``
        ``log_firing``: natural log of the share of tokens that fire (-inf: never). ``decoder_norm``: L2 over all views,
        normalised units. ``contribution_energy``: natural log of the mean square, over prompts, of the prompt's mean
        contribution f_k ||d_k|| (-inf: none). ``mas_bin``: 0 to 4, the view's share by ``BIN_EDGES``.

    Raises
    ------
    InputError
        If the summaries have other features or lack a model.
    """
    decoder = decoder_of(crosscoder)
    if summaries.sizes[FEATURE] != decoder.n_features:
        raise InputError(
            f"the feature summaries have {summaries.sizes[FEATURE]} features, the crosscoder {decoder.n_features}; "
            "encode with this crosscoder."
        )
    _check_models(summaries, models)
    pooled = summaries.sel({MODEL: list(models)})
    tokens = pooled["n_tokens"].astype("float64")
    firing = ((pooled["firing"] * tokens).sum([MODEL, PROMPT]) / tokens.sum()).compute()
    energy = (pooled["mean"].astype("float64") ** 2).mean([MODEL, PROMPT]).compute()
    norms = decoder.view_norms()
    share = norms[decoder.view_index(view)] / np.maximum(norms.sum(axis=0), TINY) * len(decoder.views)
    with np.errstate(divide="ignore"):
        return xr.Dataset(
            {
                "log_firing": (FEATURE, np.log(np.asarray(firing.values, dtype=np.float64))),
                "decoder_norm": (FEATURE, decoder.norms()),
                "contribution_energy": (FEATURE, np.log(np.asarray(energy.values, dtype=np.float64))),
                "mas_bin": (FEATURE, np.digitize(share, BIN_EDGES)),
            },
            coords={FEATURE: np.arange(decoder.n_features)},
        )


def mean_levels(crosscoder: Decoder | LoadedCrosscoder, summaries: xr.Dataset, *, model: str) -> NDArray[np.float64]:
    """[feature] mean activation f_k of a model over all tokens of the prompts that no trial uses.

    Parameters
    ----------
    crosscoder
        Whose decoder norms turn contributions f_k ||d_k|| back into activations.
    summaries
        Layout ``features``.
    model
        Model id.

    Raises
    ------
    InputError
        If the summaries lack the model.
    NotEstimableError
        If every prompt is kept for trials.
    """
    unused = _without_trial_prompts(summaries, [model]).sel({MODEL: model})
    tokens = unused["n_tokens"].astype("float64")
    if not float(tokens.sum()):
        raise NotEstimableError(
            "levels of features are measured on prompts not kept for trials, and there are none; leave some in the "
            "selection split, or set intervention.level to own."
        )
    total = (unused["mean"].astype("float64") * tokens).sum(PROMPT).compute()
    norms = decoder_of(crosscoder).norms()
    return np.asarray(total.values / float(tokens.sum()) / np.maximum(norms, TINY), dtype=np.float64)


def drift_ranking(summaries: xr.Dataset, *, base: str, target: str) -> NDArray[np.int64]:
    """Features that differ in contribution between two models, by size of the mean difference, largest first.

    Parameters
    ----------
    summaries
        Layout ``features``.
    base, target
        Model ids.

    Returns
    -------
    ndarray
        Ids of features with any difference, by |mean over the prompts that no trial uses of target minus base|.

    Raises
    ------
    InputError
        If the summaries lack a model.
    """
    unused = _without_trial_prompts(summaries, [base, target])["mean"].astype("float64")
    change = (unused.sel({MODEL: target}) - unused.sel({MODEL: base})).mean(PROMPT).compute().values
    order = np.argsort(-np.abs(change), kind="stable")
    return np.asarray(order[np.abs(change[order]) > 0], dtype=np.int64)


def _without_trial_prompts(summaries: xr.Dataset, models: Sequence[str]) -> xr.Dataset:
    """Prompts that no trial uses."""
    _check_models(summaries, models)
    return summaries.isel({PROMPT: np.flatnonzero(summaries[SPLIT].values != TRIAL)})


def _check_models(summaries: xr.Dataset, models: Sequence[str]) -> None:
    present = [str(model) for model in summaries[MODEL].values]
    missing = [model for model in models if model not in present]
    if missing:
        raise InputError(f"the feature summaries lack {missing}; they have {present}: run the encode stage.")


def near_duplicates(
    crosscoder: Decoder | LoadedCrosscoder, features: Sequence[int], *, threshold: float = NEAR_DUPLICATE
) -> NDArray[np.bool_]:
    """[feature] True where the decoder cosine with a member of the set exceeds ``threshold``; members included.

    The cosine is the largest over single views and over all views' rows taken together.
    """
    decoder = decoder_of(crosscoder)
    near = np.zeros(decoder.n_features, dtype=np.bool_)
    members = list(features)
    for matrix in (*decoder.by_view(), decoder.rows):
        unit = matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), np.float32(TINY))
        for start in range(0, decoder.n_features, _BLOCK):
            cosines = unit[start : start + _BLOCK] @ unit[members].T
            near[start : start + _BLOCK] |= (cosines > threshold).any(axis=1)
    return near
