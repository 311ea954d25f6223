"""The sign-flip test of differences symmetric about zero."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.flips.exact import (
    MAX_ENUMERATED,
    enumerated_tail,
    lattice_step,
    lattice_tail,
)
from rlgen_stats.toolkit.statistics.kernels.flips.flip_table import FlipTable, Workspace, flip_table
from rlgen_stats.toolkit.statistics.kernels.flips.flip_units import FlipUnits, flip_units, packed
from rlgen_stats.toolkit.statistics.kernels.flips.maxt import max_t
from rlgen_stats.toolkit.statistics.kernels.flips.saddlepoint import flip_tail
from rlgen_stats.toolkit.statistics.kernels.numerics import TIE_SLACK, FloatArray, column_sums
from rlgen_stats.toolkit.statistics.kernels.unit_tables import as_table, cluster_codes, feature_blocks

Alternative = Literal["two-sided", "greater", "less"]
Method = Literal["auto", "exact", "saddlepoint", "monte-carlo"]

SADDLEPOINT_FEATURES: Final = 256
"""Features per saddlepoint block, in order of their nonzeros: sparse features share short columns."""
TESTED, UNTESTABLE, MISSING = "", "untestable: no nonzero difference", "untestable: no value"


@dataclass(frozen=True)
class _Options:
    alternative: Alternative
    method: Method
    n_resamples: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class SignFlipResult:
    """Sign-flip test of every feature; scalars in shape when one feature was given."""

    statistic: Any
    """t statistic of the mean [feature]; NaN for untestable features."""
    p_value: Any
    """P-value [feature]; NaN for untestable features, never 0."""
    n_nonzero: Any
    """Units with a nonzero difference [feature]."""
    method: Any
    """exact, lattice, saddlepoint or monte-carlo [feature]; empty for untestable features."""
    flag: Any
    """Empty, or why a feature was not tested [feature]."""
    _differences: FloatArray = field(repr=False, compare=False)
    _clusters: NDArray[np.int64] | None = field(repr=False, compare=False)
    _options: _Options = field(repr=False)

    @cached_property
    def p_max_t(self) -> Any:
        """Joint (family-wise) p-value of each feature from the same flips for all, computed on first access."""
        joint = max_t(
            self._differences,
            n_resamples=self._options.n_resamples,
            seed=self._options.seed,
            step_down=False,
            clusters=self._clusters,
            alternative=self._options.alternative,
        ).p_single_step
        return joint if np.ndim(self.p_value) else joint[0]


def sign_flip_test(
    differences: Any,
    *,
    alternative: Alternative = "two-sided",
    method: Method = "auto",
    n_resamples: int = 9999,
    seed: int = 0,
    clusters: Any = None,
) -> SignFlipResult:
    """Test that paired differences are symmetric about zero, feature by feature.

    Parameters
    ----------
    differences
        [unit] or [unit, feature]. A feature that is NaN in every unit is untestable.
    alternative
        ``two-sided``, ``greater`` or ``less``.
    method
        ``auto``: all flips where at most 20 differences are nonzero, exact convolution where they lie on a narrow
        lattice, else saddlepoint; or one of ``exact`` (enumeration or lattice), ``saddlepoint``, ``monte-carlo``.
    n_resamples, seed
        Monte-Carlo flips and their seed; also those of ``p_max_t``.
    clusters
        Labels [unit]; whole clusters are flipped.

    Raises
    ------
    InputError
        If differences are not finite, an option is unknown, or ``method="exact"`` where no exact method applies.
    RefusedError
        If there are fewer than six clusters.

    Notes
    -----
    Null: given the unit, the two labels are exchangeable, so D is symmetric: exact for any N and sparsity. It is not
    exact for E[D] = 0 with skewed D. Zeros carry no evidence: an all-zero feature is untestable (NaN and a flag) and
    changes no other feature. Monte-Carlo p = (1 + #{T_b >= T}) / (P + 1). The saddlepoint enumerates the flips of up to
    six dominant differences first, because it is wrong where a few of them carry the sum.

    Examples
    --------
    >>> float(sign_flip_test([1.1, -0.4, 2.3, 0.7, -1.2, 3.1, 0.2, 1.9]).p_value)
    0.109375
    """
    _check(alternative, method)
    d, single = as_table(differences)
    codes = None if clusters is None else cluster_codes(clusters, len(d))
    options = _Options(alternative, method, n_resamples, seed)
    parts = [_tested(flip_units(d[:, part], codes), options) for part in feature_blocks(*d.shape)]
    features: Any = 0 if single else slice(None)
    statistic, p, n_nonzero, used, flag = (np.concatenate(blocks)[features] for blocks in zip(*parts, strict=True))
    return SignFlipResult(
        statistic=statistic,
        p_value=p,
        n_nonzero=n_nonzero,
        method=used,
        flag=flag,
        _differences=d,
        _clusters=codes,
        _options=options,
    )


def _tested(units: FlipUnits, options: _Options) -> tuple[NDArray[Any], ...]:
    """Statistic, p-value, nonzeros, method and flag of a block of features."""
    n = len(units.values)
    whole = -units.values if options.alternative == "less" else units.values
    d = packed(whole)  # zeros change neither sums nor tails
    n_nonzero = np.count_nonzero(d, axis=0)
    used, step = _methods(d, n_nonzero, options.method)
    total = column_sums(d)
    two_sided = options.alternative == "two-sided"
    target = np.abs(total) if two_sided else total
    p = np.full(d.shape[1], np.nan)
    for name in ("exact", "lattice", "saddlepoint"):
        part = np.flatnonzero(used == name)
        if not len(part):
            continue
        block, goal = np.take(d, part, axis=1), target[part]
        if name == "exact":
            tail = enumerated_tail(block, goal)
        elif name == "lattice":
            tail = lattice_tail(block, goal, step[part])
        else:
            tail = _saddlepoint(block, goal, n_nonzero[part])
        p[part] = np.minimum(1.0, 2 * tail) if two_sided else tail
    part = np.flatnonzero(used == "monte-carlo")
    if len(part):
        table = flip_table(n, options.n_resamples, seed=options.seed, exact=False)
        p[part] = _monte_carlo(np.take(whole, part, axis=1), target[part], two_sided, table)
    mean = total / n
    with np.errstate(divide="ignore", invalid="ignore"):
        # Zeros were packed away; each contributes the square of the mean.
        squares = column_sums(np.where(d != 0, np.square(d - mean), 0.0)) + (n - n_nonzero) * np.square(mean)
        statistic = mean / np.sqrt(squares / (n - 1) / n)
    statistic = np.where(n_nonzero > 0, -statistic if options.alternative == "less" else statistic, np.nan)
    flag = np.where(units.missing, MISSING, np.where(n_nonzero > 0, TESTED, UNTESTABLE))
    return statistic, p, n_nonzero, used, flag


def _check(alternative: str, method: str) -> None:
    if alternative not in ("two-sided", "greater", "less"):
        raise InputError(f"alternative must be two-sided, greater or less, got {alternative!r}.")
    if method not in ("auto", "exact", "saddlepoint", "monte-carlo"):
        raise InputError(f"method must be auto, exact, saddlepoint or monte-carlo, got {method!r}.")


def _methods(d: FloatArray, n_nonzero: NDArray[np.int64], method: Method) -> tuple[NDArray[np.str_], FloatArray]:
    """Method by which each feature is tested, and its lattice step (NaN where it has none)."""
    testable = n_nonzero > 0
    step = np.full(d.shape[1], np.nan)
    if method in ("saddlepoint", "monte-carlo"):
        return np.where(testable, method, ""), step
    few = n_nonzero <= MAX_ENUMERATED
    many = np.flatnonzero(testable & ~few)
    step[many] = lattice_step(np.take(d, many, axis=1))
    lattice = np.isfinite(step)
    if method == "exact" and (testable & ~few & ~lattice).any():
        raise InputError(
            f"exact p-values need at most {MAX_ENUMERATED} nonzero differences or a lattice, got "
            f"{int(n_nonzero.max())} nonzeros; use method='auto'."
        )
    return np.select([~testable, few, lattice], ["", "exact", "lattice"], "saddlepoint"), step


def _saddlepoint(d: FloatArray, target: FloatArray, n_nonzero: NDArray[np.int64]) -> FloatArray:
    tail = np.empty(len(target))
    order = np.argsort(n_nonzero, kind="stable")
    for start in range(0, len(order), SADDLEPOINT_FEATURES):
        part = order[start : start + SADDLEPOINT_FEATURES]
        tail[part] = flip_tail(np.abs(np.take(d, part, axis=1)), target[part])
    return tail


def _monte_carlo(d: FloatArray, target: FloatArray, two_sided: bool, table: FlipTable) -> FloatArray:
    needed = target - TIE_SLACK * column_sums(np.abs(d))
    reached, work = np.zeros(d.shape[1]), Workspace(len(table))
    for part in table.feature_blocks(d.shape[1]):
        sums = table.sums(d[:, part], work)
        reached[part] = np.count_nonzero((np.abs(sums) if two_sided else sums) >= needed[part], axis=0)
    return table.p_value(reached)
