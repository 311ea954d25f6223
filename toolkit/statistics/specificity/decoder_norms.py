"""Model specificity by decoder norm: NRN and MAS, shares of norms among the views of a crosscoder; decoder clusters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from rlgen_stats.schemas.dims import BASE_MODEL, CHANNEL, FEATURE, VIEW
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.numerics import IntArray

CROSSCODER: Final = "crosscoder"
MAS_CROSSCODER: Final = "mas_crosscoder"
OTHER_VIEW: Final = "other_view"
ONE_DECODER: Final = "one_decoder"
"""Attribute of decoders that all views share: of an SAE of one model, and after objective ``paired``."""

CLUSTER_COSINE: Final = 0.7
"""Decoder cosine above which two features count as one piece of evidence (as in docs/method.md 4d)."""

COSINE_BLOCK: Final = 2048
"""Features per block of the cosine matrix; memory holds two blocks and their product."""


def attribution(
    decoders: xr.Dataset, *, original: str | None = None, target: str | None = None, min_firing: float = 0.0
) -> xr.Dataset:
    """Decoder-norm attribution of every feature of one crosscoder: NRN, log ratio and MAS.

    Parameters
    ----------
    decoders
        ``decoder[view, feature, channel]`` in the crosscoder's normalised units and ``firing[feature]`` (share of
        tokens), lazy or not. Views of several widths: ``width[view]``, and NaN in ``decoder`` beyond it.
    original, target
        The two views NRN compares; default the first and the last of a two-view crosscoder.
    min_firing
        A feature is alive when ``firing`` exceeds this.

    Returns
    -------
    xr.Dataset
        ``mas_l1``, ``mas_l2`` [view, feature]; ``view_cosine`` [view, other_view, feature]; ``firing``, ``alive``
        [feature]; for two views (or when both are named) ``nrn_l1``, ``nrn_l2``, ``log_ratio``, ``cosine`` [feature].
        Lazy where the input is.

    Raises
    ------
    InputError
        If a variable is missing, a view is unknown, or only one of ``original`` and ``target`` is named.

    Notes
    -----
    NRN_k = ||d_T,k|| / (||d_O,k|| + ||d_T,k||): 0 original only, .5 shared, 1 target only. log_ratio = log||d_T,k||_2 -
    log||d_O,k||_2, the scale for inference. MAS_k,m = share of ||d_m,k||/sqrt(d_m) among views, sums to 1. Where widths
    differ, the L2 norm is taken per sqrt(d_m) and the L1 norm per d_m throughout (one width cancels). The cosine of two
    views' decoder rows says whether a feature writes the same direction in both; NaN where one of them is zero or their
    widths differ. All are scale-invariant: (f_k, d_k) -> (c f_k, d_k / c) changes none. A decoder that is zero in every
    compared view gives NaN. So does everything for a dictionary whose views share one decoder (attribute
    ``one_decoder``): its norms are equal whatever the models are, no feature counts as alive, and latent scaling alone
    speaks. A norm share alone does not make a feature specific; latent scaling must agree (arXiv:2504.02922).

    References
    ----------
    Shi et al. 2026, arXiv:2604.25011.

    Examples
    --------
    >>> decoders = xr.Dataset(
    ...     {"decoder": (("view", "feature", "channel"), [[[3.0, 4.0]], [[0.0, 5.0]]]), "firing": ("feature", [0.1])},
    ...     coords={"view": ["base@0", "rl@80"]},
    ... )
    >>> attribution(decoders).nrn_l2.values.tolist()
    [0.5]
    """
    _check_decoders(decoders)
    if decoders.attrs.get(ONE_DECODER):
        decoders = decoders.assign(decoder=decoders["decoder"] * np.nan)
    views = [str(view) for view in decoders[VIEW].values]
    pair = _pair(views, original, target)
    decoder = decoders["decoder"].astype(np.float64)
    width = decoders["width"] if "width" in decoders else xr.DataArray(float(decoders.sizes[CHANNEL]))
    l1 = abs(decoder).sum(CHANNEL) / width
    l2 = (decoder**2).sum(CHANNEL) ** 0.5 / width**0.5
    out = xr.Dataset(
        {
            "mas_l1": _share(l1).transpose(VIEW, FEATURE),
            "mas_l2": _share(l2).transpose(VIEW, FEATURE),
            "firing": decoders["firing"].astype(np.float64),
            "alive": (decoders["firing"] > min_firing) & (not decoders.attrs.get(ONE_DECODER)),
            "view_cosine": _view_cosine(decoder, decoders.get("width")),
        },
        attrs={"min_firing": min_firing, "unit": "feature", "norms": "decoder rows in normalised units"},
    )
    if pair is None:
        return out
    original, target = pair
    with np.errstate(divide="ignore"):
        log_ratio = np.log(l2.sel({VIEW: target}, drop=True)) - np.log(l2.sel({VIEW: original}, drop=True))
    nrn = {
        name: _share(norm.sel({VIEW: [original, target]})).sel({VIEW: target}, drop=True)
        for name, norm in (("nrn_l1", l1), ("nrn_l2", l2))
    }
    cosine = out["view_cosine"].sel({VIEW: original, OTHER_VIEW: target}, drop=True)
    return out.assign(nrn | {"log_ratio": log_ratio, "cosine": cosine}).assign_attrs(original=original, target=target)


def _check_decoders(decoders: xr.Dataset) -> None:
    required = {"decoder": {VIEW, FEATURE, CHANNEL}, "firing": {FEATURE}}
    for name, dims in required.items():
        if name not in decoders or set(map(str, decoders[name].dims)) != dims:
            raise InputError(
                f"decoders need the variable {name!r} with dimensions {sorted(dims)}, "
                f"got {sorted(map(str, decoders[name].dims)) if name in decoders else 'no such variable'}."
            )
    if VIEW not in decoders.coords:
        raise InputError("decoders need the coordinate 'view' with the model id of each slot, for example 'rl@80'.")


def _pair(views: list[str], original: str | None, target: str | None) -> tuple[str, str] | None:
    if original is None and target is None:
        return (views[0], views[1]) if len(views) == 2 else None
    if original is None or target is None:
        raise InputError(f"name both original= and target=, or neither; got {original!r} and {target!r}.")
    for view in (original, target):
        if view not in views:
            raise InputError(f"view {view!r} is not in this crosscoder; expected one of {views}.")
    return original, target


def _view_cosine(decoder: xr.DataArray, width: xr.DataArray | None) -> xr.DataArray:
    """Cosine of every two views' decoder rows: [view, other_view, feature]."""
    norm = ((decoder**2).sum(CHANNEL)) ** 0.5
    unit = decoder.fillna(0.0) / norm.where(norm > 0)
    cosine: xr.DataArray = xr.dot(unit, unit.rename({VIEW: OTHER_VIEW}), dim=CHANNEL)
    if width is not None:
        cosine = cosine.where(width == width.rename({VIEW: OTHER_VIEW}))
    return cosine.clip(-1.0, 1.0).transpose(VIEW, OTHER_VIEW, FEATURE)


def _share(norm: xr.DataArray) -> xr.DataArray:
    total = norm.sum(VIEW)
    return norm / total.where(total > 0)


def attribution_table(
    pairwise: Mapping[str, xr.Dataset], *, multiview: Mapping[str, xr.Dataset] | None = None, min_firing: float = 0.0
) -> xr.Dataset:
    """Collect the attribution of several crosscoders in the result layout ``attribution``.

    Parameters
    ----------
    pairwise
        Name -> decoders (see :func:`attribution`) of two views each: base and a checkpoint of a run, or base and base
        itself as a floor. The original is base, or the first view where base is none of them.
    multiview
        Name -> decoders of any number of views, for MAS.
    min_firing
        See :func:`attribution`.

    Returns
    -------
    xr.Dataset
        ``nrn_l1``, ``nrn_l2``, ``log_ratio``, ``cosine``, ``firing``, ``alive`` [crosscoder, feature]; ``mas_l1``,
        ``mas_l2`` [mas_crosscoder, view, feature]; ``view_cosine`` [mas_crosscoder, view, other_view, feature];
        coordinates ``original`` and ``target`` [crosscoder]. Dictionaries smaller than the largest are padded with NaN
        (``alive`` False), views a crosscoder lacks are NaN.

    Raises
    ------
    InputError
        If no crosscoder is given or a pairwise one has not two views.

    Notes
    -----
    Features of different crosscoders with the same index are unrelated.
    """
    multiview = multiview or {}
    if not pairwise:
        raise InputError("attribution_table needs at least one pairwise crosscoder, got none.")
    for name, decoders in pairwise.items():
        _check_decoders(decoders)
        if decoders.sizes[VIEW] != 2:
            raise InputError(f"crosscoder {name!r} has {decoders.sizes[VIEW]} views; a pairwise one has two.")
    pairs = {name: attribution(d, **_base_first(d), min_firing=min_firing).compute() for name, d in pairwise.items()}
    many = {name: attribution(d, min_firing=min_firing).compute() for name, d in multiview.items()}
    specificity = _joined(pairs, CROSSCODER, ["nrn_l1", "nrn_l2", "log_ratio", "cosine", "firing", "alive"])
    mas = _joined(many or pairs, MAS_CROSSCODER, ["mas_l1", "mas_l2", "view_cosine"])
    if not many:  # the layout wants the variables, empty
        mas = mas.isel({dim: slice(0) for dim in (MAS_CROSSCODER, VIEW, OTHER_VIEW)})
    width = max(table.sizes[FEATURE] for table in (specificity, mas))
    every = {FEATURE: np.arange(width)}
    table = xr.merge([specificity.reindex(every, fill_value={"alive": False}), mas.reindex(every)])
    for role in ("original", "target"):
        views = np.array([pair.attrs[role] for pair in pairs.values()], dtype=np.str_)
        table = table.assign_coords({role: (CROSSCODER, views)})
    return table.assign_attrs(unit="feature", min_firing=min_firing, norms="decoder rows in normalised units")


def _base_first(decoders: xr.Dataset) -> dict[str, str]:
    first, second = (str(view) for view in decoders[VIEW].values)
    return {"original": second, "target": first} if second == BASE_MODEL else {"original": first, "target": second}


def _joined(tables: Mapping[str, xr.Dataset], dim: str, names: list[str]) -> xr.Dataset:
    """Variables of several crosscoders along ``dim``; NaN, or not alive, where one lacks a view or a feature."""
    joined: xr.Dataset = xr.concat(
        [table[names].assign_coords({FEATURE: np.arange(table.sizes[FEATURE])}) for table in tables.values()],
        dim,
        join="outer",
        fill_value={"alive": False},
        combine_attrs="drop",
    )
    # The outer join sorts views; the order in which crosscoders name them is base first.
    views = list(dict.fromkeys(str(view) for table in tables.values() for view in table[VIEW].values))
    joined = joined.reindex(
        {name: np.array(views, dtype=np.str_) for name in (VIEW, OTHER_VIEW) if name in joined.dims}
    )
    return joined.assign_coords({dim: np.array(list(tables), dtype=np.str_)})


def decoder_clusters(
    decoders: xr.Dataset, *, cosine: float = CLUSTER_COSINE, alive: NDArray[np.bool_] | None = None
) -> IntArray:
    """Cluster of every feature: connected components of decoder cosine above ``cosine``; -1 for features left out.

    Parameters
    ----------
    decoders
        ``decoder[view, feature, channel]``; a feature's direction is its rows of all views side by side.
    cosine
        Edge threshold.
    alive
        Features to cluster, default all with a decoder that is not zero.

    Returns
    -------
    ndarray of int, shape (F,)

    Notes
    -----
    Blockwise: memory is two blocks of features plus the edges. Time F^2 x views x channels / 2.
    """
    values = decoders["decoder"].transpose(FEATURE, VIEW, CHANNEL).values
    rows = np.nan_to_num(np.asarray(values, dtype=np.float32).reshape(len(values), -1))
    norms = np.linalg.norm(rows, axis=1)
    chosen = np.flatnonzero((norms > 0) if alive is None else (norms > 0) & np.asarray(alive, dtype=bool))
    unit = rows[chosen] / norms[chosen, None]
    n = len(chosen)
    edges: list[NDArray[Any]] = [np.empty((2, 0), dtype=np.int64)]
    for a in range(0, n, COSINE_BLOCK):
        for b in range(a, n, COSINE_BLOCK):
            i, j = np.nonzero(unit[a : a + COSINE_BLOCK] @ unit[b : b + COSINE_BLOCK].T > cosine)
            # each pair once, and no feature with itself
            upper = i + a < j + b
            edges.append(np.stack([i[upper] + a, j[upper] + b]))
    i, j = np.concatenate(edges, axis=1)
    graph = coo_array((np.ones(len(i), dtype=np.int8), (i, j)), shape=(n, n))
    labels = np.full(len(rows), -1, dtype=np.int64)
    labels[chosen] = connected_components(graph, directed=False)[1]
    return labels
