"""Correction of p-values over a declared family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.toolkit.statistics.kernels import adjust

Labelled = TypeVar("Labelled", xr.DataArray, xr.Dataset)


def adjust_pvalues(data: Labelled, *, dims: Sequence[str], method: str = "bh") -> Labelled:
    """Adjust p-values over the whole family spanned by ``dims``; each position along the other dims is its own family.

    Parameters
    ----------
    data
        P-values; NaN (untestable) is left out of the family and stays NaN.
    dims
        Dimensions of one family, e.g. ``("model", "feature")``.
    method
        bonferroni, holm, hommel, bh, by, bky or storey.

    Returns
    -------
    xr.DataArray or xr.Dataset
        Adjusted values with the shape and labels of ``data``, lazy where ``data`` is lazy; attributes ``family`` and
        ``family_size`` (cells of one family, untestable ones included) and ``adjustment``.

    Raises
    ------
    RefusedError
        If no dimension is named: p-values without a family cannot be corrected.
    InputError
        If a named dimension is not there, or the method is unknown.

    Notes
    -----
    Correcting an array equals correcting its ravel (METHOD.md O4); nothing is corrected one scalar at a time.

    References
    ----------
    Benjamini and Hochberg 1995, doi:10.1111/j.2517-6161.1995.tb02031.x.

    Examples
    --------
    >>> p = xr.DataArray([[0.01, 0.04], [0.03, 0.5]], dims=("model", "feature"))
    >>> adjust_pvalues(p, dims=("model", "feature")).values.round(4).tolist()
    [[0.04, 0.0533], [0.0533, 0.5]]
    """
    names = [dims] if isinstance(dims, str) else list(dims)
    if not names:
        raise RefusedError(
            "adjust_pvalues needs the family the p-values belong to; name its dimensions, "
            "for example dims=('model', 'feature')."
        )
    unknown = [name for name in names if name not in data.dims]
    if unknown:
        raise InputError(f"dimension {unknown[0]!r} is not in the data; it has {list(map(str, data.dims))}.")
    adjusted = xr.apply_ufunc(
        _adjust_last,
        data,
        kwargs={"n_dims": len(names), "method": method},
        input_core_dims=[names],
        output_core_dims=[names],
        dask="parallelized",
        dask_gufunc_kwargs={"allow_rechunk": True},
        output_dtypes=[np.float64],
    )
    size = int(np.prod([data.sizes[name] for name in names]))
    attrs = {"family": " x ".join(names), "family_size": size, "adjustment": method}
    out: Labelled = adjusted.transpose(*data.dims).assign_attrs(attrs)
    return out


def _adjust_last(p: NDArray[Any], *, n_dims: int, method: str) -> NDArray[np.float64]:
    """Adjust over the last ``n_dims`` axes; families along the axes before."""
    shape = p.shape
    families = np.asarray(p, dtype=np.float64).reshape(-1, int(np.prod(shape[len(shape) - n_dims :])))
    out = np.stack([adjust(family, method=method) for family in families]) if families.size else families
    return np.asarray(out.reshape(shape))
