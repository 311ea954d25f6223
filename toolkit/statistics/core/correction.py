"""Correction of p-values over a declared family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast, overload

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.toolkit.statistics.core.comparability import check_comparable
from rlgen_stats.toolkit.statistics.kernels import adjust
from rlgen_stats.toolkit.statistics.kernels.multiplicity.adjust import METHODS

Tables = Mapping[str, xr.DataArray | xr.Dataset]

FAMILY_KEYS: Final = ("readout", "text_mode")
"""Must agree within one family (docs/method.md section 3, rule 2); studies and dictionaries may differ."""


@overload
def adjust_pvalues(
    data: xr.DataArray, *, dims: Sequence[str], method: str = ..., alpha: float = ...
) -> xr.DataArray: ...
@overload
def adjust_pvalues(  # type: ignore[overload-overlap]  # a dataset is a mapping too
    data: xr.Dataset, *, dims: Sequence[str], method: str = ..., alpha: float = ...
) -> xr.Dataset: ...
@overload
def adjust_pvalues(
    data: Tables, *, dims: Sequence[str], method: str = ..., alpha: float = ...
) -> dict[str, xr.DataArray]: ...


def adjust_pvalues(
    data: xr.DataArray | xr.Dataset | Tables, *, dims: Sequence[str], method: str = "bh", alpha: float = 0.05
) -> xr.DataArray | xr.Dataset | dict[str, xr.DataArray]:
    """Adjust p-values over the whole family spanned by ``dims``; each position along the other dims is its own family.

    Parameters
    ----------
    data
        P-values; NaN (untestable) is left out of the family and stays NaN. A mapping of names to p-values, or to
        results with a ``p_value``, is one family: dimensions beyond ``dims`` must be shared, with the same labels.
    dims
        Dimensions of one family, e.g. ``("model", "feature")``; in a mapping each entry needs at least one of them.
    method
        bonferroni, holm, hommel, bh, by, bky or storey.
    alpha
        Level of the first stage of bky; the other methods do not use it.

    Returns
    -------
    xr.DataArray, xr.Dataset, or dict of xr.DataArray
        Adjusted values with the shape and labels of ``data`` (each variable of a dataset separately; the p-values of
        all entries of a mapping together), lazy where ``data`` is lazy; attributes ``family``, ``family_size``
        (cells of one family, untestable ones included) and ``adjustment``.

    Raises
    ------
    RefusedError
        If the family is not named (no dimension, or datasets without names), or mixes readouts or text modes.
    InputError
        If a named dimension is missing, labels do not match, or the method is unknown.

    Notes
    -----
    Correcting an array equals correcting its ravel (docs/method.md O4); nothing is corrected one scalar at a time.

    References
    ----------
    Benjamini and Hochberg 1995, doi:10.1111/j.2517-6161.1995.tb02031.x.

    Examples
    --------
    >>> p = xr.DataArray([[0.01, 0.04], [0.03, 0.5]], dims=("model", "feature"))
    >>> adjust_pvalues(p, dims=("model", "feature")).values.round(4).tolist()
    [[0.04, 0.0533], [0.0533, 0.5]]
    >>> adjust_pvalues({"a": p[0], "b": p[1]}, dims=("feature",))["a"].values.round(4).tolist()
    [0.04, 0.0533]
    """
    names = [dims] if isinstance(dims, str) else list(dims)
    if not names:
        raise RefusedError(
            "adjust_pvalues needs the family the p-values belong to; name its dimensions, "
            "for example dims=('model', 'feature')."
        )
    if method not in METHODS:
        raise InputError(f"no correction is called {method!r}; expected one of {list(METHODS)}.")
    if isinstance(data, xr.DataArray | xr.Dataset):
        return _adjust_one(data, names, method, alpha)
    if not isinstance(data, Mapping):
        raise RefusedError(
            f"a family of several datasets names its members; give a mapping of names to p-values, got "
            f"{type(data).__name__}."
        )
    return _adjust_together(cast(Tables, data), names, method, alpha)


def _adjust_one(
    data: xr.DataArray | xr.Dataset, names: list[str], method: str, alpha: float
) -> xr.DataArray | xr.Dataset:
    unknown = [name for name in names if name not in data.dims]
    if unknown:
        raise InputError(f"dimension {unknown[0]!r} is not in the data; it has {list(map(str, data.dims))}.")
    adjusted = xr.apply_ufunc(
        _adjust_last,
        data,
        kwargs={"n_dims": len(names), "method": method, "alpha": alpha},
        input_core_dims=[names],
        output_core_dims=[names],
        dask="parallelized",
        dask_gufunc_kwargs={"allow_rechunk": True},
        output_dtypes=[np.float64],
    )
    size = int(np.prod([data.sizes[name] for name in names]))
    out: xr.DataArray | xr.Dataset = adjusted.transpose(*data.dims).assign_attrs(
        _attrs(" x ".join(names), size, method)
    )
    return out


def _attrs(family: str, size: int, method: str) -> dict[str, Any]:
    return {"family": family, "family_size": size, "adjustment": method}


def _adjust_last(p: NDArray[Any], *, n_dims: int, method: str, alpha: float) -> NDArray[np.float64]:
    """Adjust over the last ``n_dims`` axes; families along the axes before."""
    shape = p.shape
    families = np.asarray(p, dtype=np.float64).reshape(-1, int(np.prod(shape[len(shape) - n_dims :])))
    out = np.stack([adjust(f, method=method, alpha=alpha) for f in families]) if families.size else families
    return np.asarray(out.reshape(shape))


def _adjust_together(tables: Tables, names: list[str], method: str, alpha: float) -> dict[str, xr.DataArray]:
    """One family over all tables: every table becomes [shared dims, cells], and the cells are concatenated."""
    if not tables:
        raise InputError("a family needs at least one dataset, got an empty mapping.")
    check_comparable(*tables.values(), keys=FAMILY_KEYS)
    arrays = {name: _p_values(name, table) for name, table in tables.items()}
    first, head = next(iter(arrays.items()))
    shared = [str(dim) for dim in head.dims if dim not in names]
    family_dims = {name: [dim for dim in names if dim in array.dims] for name, array in arrays.items()}
    blocks, sizes, lazy = [], [], False
    for name, array in arrays.items():
        others = [str(dim) for dim in array.dims if dim not in family_dims[name]]
        if not family_dims[name] or set(others) != set(shared):
            raise InputError(
                f"{name!r} has dimensions {list(map(str, array.dims))}; expected some of the family's {names} and, "
                f"like {first!r}, {shared}."
            )
        for dim in shared:
            if not head[dim].equals(array[dim]):
                raise InputError(f"{first!r} and {name!r} differ in their labels of {dim!r}; select the same ones.")
        lazy = lazy or array.chunks is not None
        ordered = array.transpose(*shared, *family_dims[name])
        size = int(np.prod([array.sizes[dim] for dim in family_dims[name]]))
        blocks.append(da.asarray(ordered.data).rechunk(-1).reshape(*(array.sizes[dim] for dim in shared), size))
        sizes.append(size)
    joined = da.concatenate(blocks, axis=-1)
    options: dict[str, Any] = {"n_dims": 1, "method": method, "alpha": alpha}
    adjusted = da.map_blocks(_adjust_last, joined.rechunk({-1: -1}), dtype=np.float64, **options)
    attrs = _attrs(f"({' + '.join(arrays)}) x {' x '.join(names)}", sum(sizes), method)
    out, start = {}, 0
    for (name, array), size in zip(arrays.items(), sizes, strict=True):
        ordered = array.transpose(*shared, *family_dims[name])
        part = ordered.copy(data=adjusted[..., start : start + size].reshape(ordered.shape)).transpose(*array.dims)
        out[name] = (part if lazy else part.compute()).assign_attrs(attrs)
        start += size
    return out


def _p_values(name: str, table: xr.DataArray | xr.Dataset) -> xr.DataArray:
    if isinstance(table, xr.DataArray):
        return table
    if "p_value" not in table:
        raise InputError(f"{name!r} has no variable 'p_value'; it has {sorted(map(str, table.data_vars))}.")
    return table["p_value"]
