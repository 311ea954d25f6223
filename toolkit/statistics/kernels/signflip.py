"""The sign-flip test of differences symmetric about zero."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.toolkit.statistics.kernels.maxt import max_t
from rlgen_stats.toolkit.statistics.kernels.resampling import (
    BLOCK_FEATURES,
    TIE_SLACK,
    FloatArray,
    all_flips,
    as_units,
    cluster_totals,
    sign_flips,
)
from rlgen_stats.toolkit.statistics.kernels.saddlepoint import saddlepoint_tail

Alternative = Literal["two-sided", "greater", "less"]
Method = Literal["auto", "exact", "saddlepoint", "monte-carlo"]

MAX_ENUMERATED: Final = 20
"""Nonzeros up to which all 2**nz flips are counted (two halves of 2**10 sums each)."""
MAX_LATTICE: Final = 4096
"""Width in steps up to which a lattice distribution is convolved exactly."""
MIN_CLUSTERS: Final = 6
"""Fewest clusters: with five the smallest two-sided p-value is 1/16, so nothing can be found at .05."""
FEATURES_AT_ONCE: Final = 256
"""Features enumerated together: 256 x 2,048 sums are 4 MB."""
TESTED, UNTESTABLE = "", "untestable: no nonzero difference"


@dataclass(frozen=True)
class SignFlipResult:
    """Sign-flip test of every feature; scalars in shape when one feature was given."""

    statistic: Any
    """t statistic of the mean [feature]; NaN for untestable features."""
    p_value: Any
    """P-value [feature]; NaN for untestable features."""
    n_nonzero: Any
    """Units with a nonzero difference [feature]."""
    method: Any
    """exact, lattice, saddlepoint or monte-carlo [feature]."""
    flag: Any
    """Empty, or why a feature was not tested [feature]."""
    _differences: FloatArray = field(repr=False, compare=False)
    _n_resamples: int = field(repr=False)
    _seed: int = field(repr=False)

    @cached_property
    def p_max_t(self) -> Any:
        """Joint (family-wise) p-value of each feature from the same flips for all, computed when asked for."""
        found = max_t(self._differences, n_resamples=self._n_resamples, seed=self._seed).p_single_step
        return found if np.ndim(self.p_value) else found[0]


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
        [unit] or [unit, feature].
    alternative
        ``two-sided``, ``greater`` or ``less``.
    method
        ``auto``: all flips where at most 20 differences are nonzero, exact convolution where they lie on a narrow
        lattice, else saddlepoint; or one of ``exact`` (enumeration or lattice), ``saddlepoint``, ``monte-carlo``.
    n_resamples, seed
        Monte-Carlo flips and their seed.
    clusters
        Labels [unit]; whole clusters are flipped.

    Raises
    ------
    InputError
        If differences are not finite, or ``exact`` is asked for where neither exact method applies.
    RefusedError
        If there are fewer than six clusters.

    Notes
    -----
    Null: given the unit, the two labels are exchangeable, so D is symmetric: exact for any N and sparsity. It is not
    exact for E[D] = 0 with skewed D. Zeros do not enter: an all-zero feature is untestable (NaN and a flag) and
    changes no other feature. Monte-Carlo p = (1 + #{T_b >= T}) / (P + 1), never 0.

    Examples
    --------
    >>> float(sign_flip_test([1.1, -0.4, 2.3, 0.7, -1.2, 3.1, 0.2, 1.9]).p_value)
    0.109375
    """
    d, single = as_units(differences)
    if not np.isfinite(d).all():
        raise InputError(
            f"differences must be finite, got {int((~np.isfinite(d)).sum())} NaN or infinite; drop those units."
        )
    if clusters is not None:
        d = cluster_totals(d, clusters)
        if len(d) < MIN_CLUSTERS:
            raise RefusedError(
                f"a sign-flip test over clusters needs at least {MIN_CLUSTERS}, got {len(d)}; flip a lower level, "
                "or use more clusters."
            )
    if alternative == "less":
        d = -d
    n_nonzero = np.count_nonzero(d, axis=0)
    used = _methods(d, n_nonzero, method)
    p = np.full(d.shape[1], np.nan)
    two_sided = alternative == "two-sided"
    for name, tail in (("exact", _enumerated), ("lattice", _lattice), ("saddlepoint", _saddlepoint)):
        chosen = np.flatnonzero(used == name)
        for start in range(0, len(chosen), FEATURES_AT_ONCE):
            part = chosen[start : start + FEATURES_AT_ONCE]
            p[part] = tail(d[:, part], two_sided)
    chosen = np.flatnonzero(used == "monte-carlo")
    p[chosen] = _monte_carlo(d[:, chosen], two_sided, n_resamples, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = d.mean(axis=0) / (d.std(axis=0, ddof=1) / np.sqrt(len(d)))
    statistic = np.where(n_nonzero > 0, -statistic if alternative == "less" else statistic, np.nan)
    flag = np.where(n_nonzero > 0, TESTED, UNTESTABLE)
    at: Any = 0 if single else slice(None)
    return SignFlipResult(statistic[at], p[at], n_nonzero[at], used[at], flag[at], d, n_resamples, seed)


def _methods(d: FloatArray, n_nonzero: NDArray[np.int64], method: Method) -> NDArray[np.str_]:
    testable = n_nonzero > 0
    if method in ("saddlepoint", "monte-carlo"):
        return np.where(testable, method, "")
    few = n_nonzero <= MAX_ENUMERATED
    lattice = np.zeros_like(few)
    many = np.flatnonzero(testable & ~few)
    lattice[many] = np.isfinite(_lattice_step(d[:, many]))
    if method == "exact" and (testable & ~few & ~lattice).any():
        raise InputError(
            f"exact p-values need at most {MAX_ENUMERATED} nonzero differences or a lattice, got "
            f"{int(n_nonzero.max())} nonzeros; use method='auto'."
        )
    return np.select([~testable, few, lattice], ["", "exact", "lattice"], "saddlepoint")


def _lattice_step(d: FloatArray) -> FloatArray:
    """Step of the lattice each feature lies on, NaN where it lies on none narrow enough."""
    magnitude = np.abs(d)
    step = np.where(magnitude > 0, magnitude, np.inf).min(axis=0, initial=np.inf)
    with np.errstate(invalid="ignore"):
        multiple = magnitude / step
    on = (np.abs(multiple - np.round(multiple)) < TIE_SLACK).all(axis=0)
    narrow = np.round(multiple).sum(axis=0) <= MAX_LATTICE
    return np.asarray(np.where(on & narrow, step, np.nan))


def _two(tail: FloatArray, two_sided: bool) -> FloatArray:
    """P-value from P(S >= |s|), S symmetric."""
    return np.asarray(np.minimum(1.0, 2 * tail) if two_sided else tail)


def _target(d: FloatArray, two_sided: bool) -> FloatArray:
    total = d.sum(axis=0)
    return np.asarray(np.abs(total) if two_sided else total)


def _enumerated(d: FloatArray, two_sided: bool) -> FloatArray:
    """Exact tail over all flips of the nonzeros: sums of two halves, sorted together and counted."""
    order = np.argsort(d == 0, axis=0, kind="stable")
    packed = np.take_along_axis(np.abs(d), order, axis=0)[:MAX_ENUMERATED]
    if len(packed) < MAX_ENUMERATED:
        packed = np.vstack([packed, np.zeros((MAX_ENUMERATED - len(packed), d.shape[1]))])
    width = max(2, int(np.count_nonzero(packed, axis=0).max()))
    half = width // 2
    first = (all_flips(half) @ packed[:half]).T
    second = (all_flips(width - half) @ packed[half:width]).T
    slack = TIE_SLACK * np.maximum(packed.sum(axis=0), np.finfo(float).tiny)
    needed = (_target(d, two_sided) - slack)[:, None] - first
    together = np.concatenate([needed, second], axis=1)
    ranked = np.argsort(together, axis=1, kind="stable")
    is_sum = ranked >= needed.shape[1]
    below = np.cumsum(is_sum, axis=1)
    reached = np.where(is_sum, 0, second.shape[1] - below).sum(axis=1)
    return _two(reached / float(2**width), two_sided)


def _lattice(d: FloatArray, two_sided: bool) -> FloatArray:
    """Exact tail by convolving the lattice distribution; one pass a feature, because every lattice is another."""
    steps = np.round(np.abs(d) / _lattice_step(d)).astype(np.int64)
    target = np.round(_target(d, two_sided) / _lattice_step(d)).astype(np.int64)
    tails = np.empty(d.shape[1])
    for feature in range(d.shape[1]):
        # S = sum(k) - 2 * (sum of the k that were flipped down)
        moves = steps[:, feature][steps[:, feature] > 0]
        mass = np.zeros(int(moves.sum()) + 1)
        mass[0] = 1.0
        for move in moves:
            shifted = np.zeros_like(mass)
            shifted[move:] = mass[: len(mass) - move]
            mass = 0.5 * (mass + shifted)
        tails[feature] = mass[: (int(moves.sum()) - int(target[feature])) // 2 + 1].sum()
    return _two(tails, two_sided)


def _saddlepoint(d: FloatArray, two_sided: bool) -> FloatArray:
    total = d.sum(axis=0)
    tail = saddlepoint_tail(np.abs(d), np.abs(total))
    if two_sided:
        return _two(tail, two_sided)
    return np.where(total >= 0, tail, 1 - tail)


def _monte_carlo(d: FloatArray, two_sided: bool, n_resamples: int, seed: int) -> FloatArray:
    if not d.shape[1]:
        return np.empty(0)
    flips = sign_flips(len(d), 0, n_resamples, seed=seed)
    slack = TIE_SLACK * np.abs(d).sum(axis=0)
    observed = _target(d, two_sided) - slack
    reached = np.zeros(d.shape[1])
    for start in range(0, d.shape[1], BLOCK_FEATURES):
        part = slice(start, start + BLOCK_FEATURES)
        sums = flips @ d[:, part]
        reached[part] = ((np.abs(sums) if two_sided else sums) >= observed[part]).sum(axis=0)
    return (1 + reached) / (n_resamples + 1)
