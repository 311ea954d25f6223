"""What a drift test needs the whole family for: corrected p-values, calls, and bounds of false discoveries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import dask.array as da
import numpy as np
from numpy.typing import NDArray

from rlgen_stats.toolkit.statistics.drift.drift_blocks import THRESHOLDS
from rlgen_stats.toolkit.statistics.kernels import adjust, max_t_p_value
from rlgen_stats.toolkit.statistics.kernels.multiplicity.fdp import fdp_bound
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray

CALLS: Final = ("DRIFT", "NO_DRIFT", "UNDETERMINED", "UNTESTABLE")
FLAGS: Final = ("ok", "untestable", "identical", "below_margin")
"""ok; fires on too few prompts; not one difference between the models; drift shown, and shown to be small."""

CORRECTIONS: Final = ("bh", "by", "storey", "bky")

_FINAL: Final = ("p_max_t", "q_value", "q_equivalence", "call", "flag")


@dataclass(frozen=True)
class Family:
    """How a family is corrected."""

    by_model: bool
    """Whether it spans the models, or each model is a family of its own."""
    correction: str
    alpha: float
    n_min: int

    def adjust(self, p: FloatArray) -> FloatArray:
        """P-values [model, feature] corrected over the family."""
        if self.by_model:
            return np.asarray(adjust(p, method=self.correction, alpha=self.alpha))
        return np.stack([adjust(row, method=self.correction, alpha=self.alpha) for row in p])


def decisions(own: dict[str, da.Array], maxima: da.Array, family: Family) -> dict[str, da.Array]:
    """Corrected p-values and calls, lazily; ``own`` [model, feature], ``maxima`` [model, flip].

    Written as array operations, not delayed calls: those would read and test every block once per argument.
    """
    arrays = [own[name] for name in ("p_value", "p_equivalence", "statistic", "fired", "n_nonzero")]
    pairs = [part for array in arrays for part in (array.rechunk(-1), "mf")]
    final = da.blockwise(
        _decide, "kmf", *pairs, maxima.rechunk(-1), "mp",
        new_axes={"k": len(_FINAL)}, concatenate=True, dtype=np.float64, family=family,
    )  # fmt: skip
    found = dict(zip(_FINAL, final, strict=True))
    for name, table in (("call", np.array(CALLS)), ("flag", np.array(FLAGS))):
        found[name] = da.map_blocks(_look_up, found[name].astype(np.int64), table=table, dtype=table.dtype)
    return found


def correct(p: da.Array, family: Family) -> da.Array:
    """``p`` [model, feature] corrected over the family, lazily."""
    return da.map_blocks(family.adjust, p.rechunk(-1), dtype=np.float64)


def false_discoveries(exceedances: da.Array, alpha: float) -> dict[str, da.Array]:
    """Features beyond each threshold and the bound of the false share among them, [model, threshold], lazily."""
    both = da.map_blocks(
        _bounds, exceedances.rechunk(-1), dtype=np.float64, alpha=alpha,
        chunks=((2,), (exceedances.shape[0],), (len(THRESHOLDS),)),
    )  # fmt: skip
    return {"n_beyond": both[0].astype(np.int64), "fdp_upper": both[1]}


def _bounds(exceedances: FloatArray, *, alpha: float) -> FloatArray:
    found = [fdp_bound(model, THRESHOLDS, alpha=alpha) for model in exceedances]
    return np.stack([[one.n_beyond for one in found], [one.fdp_upper for one in found]])


def _decide(
    p: FloatArray,
    p_equivalence: FloatArray,
    statistic: FloatArray,
    fired: FloatArray,
    nonzero: FloatArray,
    maxima: FloatArray,
    *,
    family: Family,
) -> FloatArray:
    """In the order of ``_FINAL``."""
    p_max_t = np.stack([max_t_p_value(np.abs(s), m) for s, m in zip(statistic, maxima, strict=True)])
    q, q_equivalence = (family.adjust(x) for x in (p, p_equivalence))
    untestable = fired < family.n_min
    identical = ~untestable & (nonzero == 0)
    drift = np.nan_to_num(q, nan=1.0) <= family.alpha
    same = identical | (np.nan_to_num(q_equivalence, nan=1.0) <= family.alpha)
    rows = {
        "p_max_t": np.minimum(1.0, p_max_t * len(p)) if family.by_model else p_max_t,
        "q_value": q,
        "q_equivalence": q_equivalence,
        "call": np.select([untestable, drift, same], [3, 0, 1], 2),
        "flag": np.select([untestable, identical, drift & same], [1, 2, 3], 0),
    }
    return np.stack([np.asarray(rows[name], dtype=np.float64) for name in _FINAL])


def _look_up(codes: IntArray, *, table: NDArray[np.str_]) -> NDArray[np.str_]:
    return table[codes]
