"""Stabilisation of one block of features: the chain of tests, trends, and how many settle in every bootstrap draw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rlgen_stats.toolkit.statistics.core.feature_blocks import Block
from rlgen_stats.toolkit.statistics.core.units import unit_means
from rlgen_stats.toolkit.statistics.kernels import tost_chain, trend_test
from rlgen_stats.toolkit.statistics.kernels.intervals.bootstrap import bootstrap_blocks
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray
from rlgen_stats.toolkit.statistics.kernels.unit_tables import feature_blocks

FLAGS: Final = ("STABILISED", "UNCHANGED", "NOT_STABILISED", "UNTESTABLE", "NO_MARGIN", "EVOLVING")
"""Per feature and run: settled at ``stabilized_at``; base itself equivalent to the end; neither settled before the last
``persist`` checkpoints nor evolving; fires on too few prompts; no margin (base without spread, or no total change);
shown to differ from the end by more than the margin within the last ``persist`` checkpoints."""

STRATA_EDGES: Final = (0.0, 0.2, 0.5, np.inf)
"""Total change in base standard deviations: below the default margin, moderate, large. Arms are compared within."""

STRATA: Final = ("total < 0.2 sd", "0.2 to 0.5 sd", "total >= 0.5 sd")

BY_CHECKPOINT: Final = ("p_value", "effect", "effect_sd")
BY_FEATURE: Final = (
    "stabilized_at", "flag", "total_effect", "total_effect_sd", "p_reference", "p_evolving", "trend_tau", "trend_p",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Options of one call, as every block needs them."""

    margin: float
    relative: bool
    persist: int
    alpha: float
    n_min: int
    codes: IntArray | None
    seed: int
    n_bootstrap: int


def stabilization_block(values: NDArray[Any], firing: NDArray[Any], *, settings: Settings, steps: list[int]) -> Block:
    """All results of a block, a few features at a time; ``values`` [reference + checkpoints, prompt, feature]."""
    widest = max(values.shape[0] * values.shape[1], settings.n_bootstrap)
    parts = [
        _part(values[..., part].astype(np.float64), firing[..., part], settings, steps)
        for part in feature_blocks(widest, values.shape[2])
    ]
    joined = {name: np.concatenate([p[name] for p in parts], axis=-1) for name in (*BY_CHECKPOINT, *BY_FEATURE)}
    return joined | {name: np.sum([p[name] for p in parts], axis=0) for name in ("settled", "in_stratum")}


def _part(values: FloatArray, firing: NDArray[Any], settings: Settings, steps: list[int]) -> Block:
    last = len(steps) - 1
    fired = (firing > 0).sum(axis=(0, 1))
    x, present = _units(values, settings.codes)
    spread = x[0].std(axis=0, ddof=1)
    total = x[-1].mean(axis=0) - x[0].mean(axis=0)
    room = np.abs(total) if settings.relative else spread
    tested = (fired >= settings.n_min) & (room > 0)
    p, beyond = _chain(x, np.where(tested, 1.0 if settings.relative else spread, np.nan), settings)
    evolving = _evolving(beyond, settings)
    first = _first_accepted(p[:-1] <= settings.alpha)
    late = first > last - settings.persist
    moving = late & (evolving <= settings.alpha)
    flag = np.select([fired < settings.n_min, ~tested, moving, late, first == 0], [3, 4, 5, 2, 1], 0)
    settled = np.where(tested & ~late, first, last + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        total_sd = total / spread
        effect = x[1:].mean(axis=1) - x[-1].mean(axis=0)
        effect_sd = effect / spread
    stratum = np.where(tested, np.digitize(np.abs(total_sd), STRATA_EDGES[1:-1]), len(STRATA))
    counts = [_counted(settled, stratum, last)]
    for drawn in _resampled(x, present, settings.margin * spread, settings):
        counts.append(_counted(np.where(drawn > last - settings.persist, last + 1, drawn), stratum, last))
    p = np.where(tested, p, np.nan)
    p[-1] = np.nan
    trend = trend_test(np.where(tested, np.moveaxis(x, 0, 1), np.nan), seed=settings.seed)
    return {
        "p_value": p[1:],
        "effect": effect,
        "effect_sd": effect_sd,
        "stabilized_at": np.where(settled <= last, np.array([*steps, np.nan])[settled], np.nan),
        "flag": flag.astype(np.float64),
        "total_effect": total,
        "total_effect_sd": total_sd,
        "p_reference": p[0],
        "p_evolving": np.where(tested, evolving, np.nan),
        "trend_tau": trend.tau,
        "trend_p": trend.p_value,
        "settled": np.array(counts, dtype=np.float64),
        "in_stratum": np.bincount(stratum, minlength=len(STRATA) + 1)[:-1].astype(np.float64),
    }


def _units(x: FloatArray, codes: IntArray | None) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Values [model, unit, feature]: prompts without missing summaries, averaged within clusters; and who is left."""
    there = np.asarray(np.isfinite(x).all(axis=(0, 2)))
    units = np.arange(len(there)) if codes is None else codes
    kept = None if codes is None else codes[there]
    return np.stack([unit_means(one, kept) for one in x[:, there]]), np.isin(np.arange(units.max() + 1), units[there])


def _chain(x: FloatArray, scale: FloatArray, settings: Settings) -> tuple[FloatArray, FloatArray]:
    """P-values of equivalence with the end and of lying beyond the margin, [reference + checkpoints, feature]."""
    found = tost_chain(
        np.moveaxis(x, 0, 1) / scale, margin=settings.margin, alpha=settings.alpha, relative=settings.relative
    )
    return np.asarray(found.p_value), np.asarray(found.p_beyond)


def _evolving(beyond: FloatArray, settings: Settings) -> FloatArray:
    """Smallest Holm-adjusted p-value over the last ``persist`` checkpoints before the end; the reference is none."""
    window = beyond[max(1, len(beyond) - 1 - max(1, settings.persist)) : -1]
    return np.asarray(np.minimum(len(window) * window.min(axis=0), 1.0))


def _first_accepted(accepted: NDArray[np.bool_]) -> IntArray:
    """Index of the earliest checkpoint from which all later ones are accepted; the last index + 1 is the final itself.

    ``accepted`` is [checkpoint 0..C-1, feature]; the final checkpoint C equals itself.
    """
    chain = np.cumprod(accepted[::-1], axis=0).sum(axis=0)
    return np.asarray(len(accepted) - chain, dtype=np.int64)


def _counted(settled: IntArray, stratum: IntArray, last: int) -> FloatArray:
    """How many features of each stratum are settled at the reference or checkpoint c, [0..last, stratum]."""
    width = len(STRATA) + 1
    cells = np.bincount(settled * width + stratum, minlength=(last + 2) * width).reshape(last + 2, width)
    return np.cumsum(cells[:-1, :-1], axis=0).astype(np.float64)


def _resampled(x: FloatArray, present: NDArray[np.bool_], margin: FloatArray, settings: Settings) -> Iterator[IntArray]:
    """First accepted index per feature in each bootstrap draw of units; absolute margins fixed, moments by products.

    Accepted is where both m +- mean(D_c) are t errors above 0, m the margin or, if relative, r |D_0|. Units are drawn
    among all, so that runs that lack some share the draws of the others.
    """
    n, last = x.shape[1], len(x) - 1
    critical = float(stats.t.ppf(1 - settings.alpha, n - 1)) / np.sqrt(n - 1)
    bound = x[0] - x[-1]
    bound = settings.margin * bound * np.sign(bound.mean(axis=0)) if settings.relative else margin[None]
    sides = [[_centred(bound + turn * (x[c] - x[-1])) for turn in (-1.0, 1.0)] for c in range(last)]
    for _, weights in bootstrap_blocks(len(present), settings.n_bootstrap, seed=settings.seed):
        weights = weights[:, present]
        weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1.0)
        going = np.ones((len(weights), x.shape[2]), dtype=bool)
        first = np.full(going.shape, last)
        for pair in reversed(sides):
            for centre, side, squares in pair:
                shift = weights @ side
                mean = centre + shift
                variance = weights @ squares - np.square(shift)
                going &= (mean > 0) & (np.square(mean) >= critical**2 * variance)
            first -= going
        yield from first


def _centred(y: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Mean over units, differences from it and their squares."""
    centre = y.mean(axis=0)
    return centre, y - centre, np.square(y - centre)
