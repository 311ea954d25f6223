"""Multiple-comparison correction over a whole family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from statsmodels.stats.multitest import multipletests

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.resampling import FloatArray

AdjustMethod = Literal["bonferroni", "holm", "hommel", "bh", "by", "bky", "storey"]

_STATSMODELS: Final = {
    "bonferroni": "bonferroni",
    "holm": "holm",
    "hommel": "hommel",
    "bh": "fdr_bh",
    "by": "fdr_by",
    "bky": "fdr_tsbky",
}
DEFAULT_LAMBDA: Final = 0.5
"""P-values above it are taken as null by Storey's estimate; the middle trades bias for variance."""


@dataclass(frozen=True)
class StoreyResult:
    """Storey's q-values."""

    pi0: float
    """Estimated share of true nulls."""
    q_value: FloatArray
    """Same shape as the p-values; NaN where they are."""


def adjust(p: Any, *, method: AdjustMethod | str, alpha: float = 0.05) -> FloatArray:
    """Adjusted p-values (or q-values) over all finite entries of ``p`` as one family, whatever its shape.

    Parameters
    ----------
    p
        P-values; NaN is outside the family and stays NaN.
    method
        bonferroni, holm, hommel (family-wise); bh, by, bky, storey (false discovery rate).
    alpha
        Level of the first stage of bky.

    Raises
    ------
    InputError
        If a p-value lies outside [0, 1] or the method is unknown.

    References
    ----------
    Benjamini and Hochberg 1995; Benjamini and Yekutieli 2001; Benjamini, Krieger and Yekutieli 2006; Hommel 1988;
    Storey 2002, doi:10.1111/1467-9868.00346.
    """
    if method == "storey":
        return storey(p).q_value
    if method not in _STATSMODELS:
        raise InputError(f"no correction is called {method!r}; expected one of {[*_STATSMODELS, 'storey']}.")
    p = _checked(p)
    finite = np.isfinite(p)
    adjusted = np.full(p.shape, np.nan)
    if finite.any():
        adjusted[finite] = multipletests(p[finite], alpha=alpha, method=_STATSMODELS[method])[1]
    return adjusted


def storey(p: Any, *, threshold: float = DEFAULT_LAMBDA) -> StoreyResult:
    """Storey's estimate of the null share at ``threshold`` and q = pi0 * BH (never above 1).

    References
    ----------
    Storey 2002, doi:10.1111/1467-9868.00346, equations 4 and 11.
    """
    p = _checked(p)
    finite = p[np.isfinite(p)]
    if not len(finite):
        return StoreyResult(float("nan"), np.full(p.shape, np.nan))
    pi0 = min(1.0, float((finite > threshold).sum()) / (len(finite) * (1 - threshold)))
    return StoreyResult(pi0, np.asarray(pi0 * adjust(p, method="bh")))


def _checked(p: Any) -> FloatArray:
    array = np.asarray(p, dtype=np.float64)
    if (array < 0).any() or (array > 1).any():
        raise InputError(f"p-values lie in [0, 1], got {np.nanmin(array):g} to {np.nanmax(array):g}.")
    return array
