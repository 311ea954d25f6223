"""Drift tests of one block of features: everything that needs no other feature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rlgen_stats.toolkit.statistics.core.feature_blocks import Block
from rlgen_stats.toolkit.statistics.core.units import unit_means
from rlgen_stats.toolkit.statistics.kernels import bootstrap_t, max_t, sign_flip_test
from rlgen_stats.toolkit.statistics.kernels.effects import hurdle, paired_wasserstein
from rlgen_stats.toolkit.statistics.kernels.flips.histogram import histogram_flip_test
from rlgen_stats.toolkit.statistics.kernels.flips.wild import wild_cluster_bootstrap
from rlgen_stats.toolkit.statistics.kernels.numerics import ROUNDING, FloatArray, IntArray
from rlgen_stats.toolkit.statistics.kernels.unit_tables import feature_blocks

THRESHOLDS: Final = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0)
"""Statistics beyond which false discoveries are bounded; fixed beforehand, about normal quantiles (p = .05 to 1e-9)."""

WILD_RESAMPLES: Final = 9999
"""Draws of the wild bootstrap: they are of few clusters, and set its smallest p-value."""

COUNTS: Final = ("n", "n_nonzero", "fired")
PARTS: Final = ("from_firing", "from_magnitude", "magnitude_change")
HISTOGRAM: Final = ("token_distance", "p_wasserstein")


@dataclass(frozen=True)
class Settings:
    """What a block needs to know."""

    alpha: float
    margin: float
    n_min: int
    n_resamples: int
    n_bootstrap: int
    codes: IntArray | None
    seed: int
    wild: bool
    """Whether the p-value is that of the wild bootstrap over clusters."""
    parts: bool
    """Whether changes are split into firing and magnitude."""
    histograms: bool

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the results per model and feature."""
        return (
            *("statistic", "effect", "effect_low", "effect_high", "p_value", "p_equivalence", "d_z"),
            *("firing_change", "wasserstein", *COUNTS),
            *(PARTS if self.parts else ()),
            *(HISTOGRAM if self.histograms else ()),
        )


def drift_block(
    values: NDArray[Any], firing: NDArray[Any], histogram: NDArray[Any] | None = None, *, settings: Settings
) -> Block:
    """All results of one block; ``values`` [reference + models, prompt, feature], ``histogram`` with bins last.

    A few features at a time, so that memory is that of the block as stored and no multiple of it.
    """
    parts = [
        _part(values[..., part], firing[..., part], None if histogram is None else histogram[..., part, :], settings)
        for part in feature_blocks(*values.shape[1:])
    ]
    joined = {name: np.concatenate([part[name] for part in parts], axis=-1) for name in settings.outputs}
    return joined | {
        "maxima": np.max([part["maxima"] for part in parts], axis=0),
        "exceedances": np.sum([part["exceedances"] for part in parts], axis=0),
    }


def _part(values: NDArray[Any], firing: NDArray[Any], histogram: NDArray[Any] | None, settings: Settings) -> Block:
    there = np.isfinite(values).all(axis=(0, 2))
    codes = settings.codes
    units = np.arange(len(there)) if codes is None else codes
    # Units without a summary take no part, but keep their place so that flips do not depend on them.
    present = np.isin(np.arange(units.max() + 1), units[there])
    kept = None if codes is None else codes[there]
    reference = unit_means(values[0, there].astype(np.float64), kept)
    spread = reference.std(axis=0, ddof=1)
    fires = unit_means(firing[0, there].astype(np.float64), kept).mean(axis=0)
    pooled = (firing[0, there] > 0).sum(axis=0)
    rows: dict[str, list[Any]] = {name: [] for name in (*settings.outputs, "maxima", "exceedances")}
    for model in range(1, len(values)):
        x = unit_means(values[model, there].astype(np.float64), kept)
        fired = pooled + (firing[model, there] > 0).sum(axis=0)
        testable = fired >= settings.n_min
        row = _tests(_difference(x, reference), spread, testable, present, settings)
        now = unit_means(firing[model, there].astype(np.float64), kept).mean(axis=0)
        row |= {
            "firing_change": 100.0 * (now - fires),
            "fired": fired,
            "n": np.full(len(testable), len(x)),
            "wasserstein": np.where(testable, paired_wasserstein(reference, x), np.nan),
        }
        if settings.parts:
            split = hurdle(reference.mean(axis=0), x.mean(axis=0), fires, now)
            row |= {name: getattr(split, name) for name in PARTS}
        if histogram is not None:
            pair = histogram[[0, model]][:, there]
            row |= _histograms(pair, kept, testable, settings)
        for name in rows:
            rows[name].append(row[name])
    return {name: np.array(value, dtype=np.float64) for name, value in rows.items()}


def _difference(values: FloatArray, reference: FloatArray) -> FloatArray:
    """Differences of unit means; what only rounding of the means left is zero, not a tiny difference of one sign."""
    d = values - reference
    scale = np.maximum(np.abs(values).max(axis=0, initial=0.0), np.abs(reference).max(axis=0, initial=0.0))
    d[np.abs(d) <= ROUNDING * scale] = 0.0
    return d


def _tests(
    d: FloatArray,
    spread: FloatArray,
    testable: NDArray[np.bool_],
    present: NDArray[np.bool_],
    settings: Settings,
) -> dict[str, NDArray[Any]]:
    """Tests and intervals of one model; ``d`` [present unit, feature], ``present`` [unit]."""
    d[:, ~testable] = 0.0
    placed = d
    if not present.all():
        placed = np.zeros((len(present), d.shape[1]))
        placed[present] = d
    nonzero = np.count_nonzero(d, axis=0)
    identical = testable & (nonzero == 0)
    if settings.wild:
        p = wild_cluster_bootstrap(d, n_resamples=WILD_RESAMPLES, seed=settings.seed).p_value
    else:
        p = sign_flip_test(placed, seed=settings.seed).p_value
    joint = max_t(
        placed, n_resamples=settings.n_resamples, seed=settings.seed, step_down=False, thresholds=THRESHOLDS,
        unadjusted=False
    )  # fmt: skip
    boot = bootstrap_t(d, alpha=settings.alpha, n_resamples=settings.n_bootstrap, seed=settings.seed)
    mean, sd = d.mean(axis=0), d.std(axis=0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        room = settings.margin * spread - np.abs(mean)
        tested = {
            "statistic": np.where(nonzero > 0, joint.statistic * np.sign(mean), 0.0),
            "effect": mean,
            "effect_low": boot.low,
            "effect_high": boot.high,
            "p_value": np.where(identical, 1.0, np.asarray(p)),
            # The larger of the two one-sided p-values belongs to the nearer bound of the margin.
            "p_equivalence": np.where(identical, np.nan, stats.t.sf(room / (sd / np.sqrt(len(d))), len(d) - 1)),
            "d_z": np.where(nonzero > 0, mean / sd, 0.0),
        }
    blank = {name: np.where(testable, value, np.nan) for name, value in tested.items()}
    return blank | {"n_nonzero": nonzero, "maxima": joint.maxima, "exceedances": joint.exceedances}


def _histograms(
    pair: NDArray[Any], codes: IntArray | None, testable: NDArray[np.bool_], settings: Settings
) -> dict[str, NDArray[Any]]:
    """Distance of token histograms [2, prompt, feature, bin] and its sign-flip p-value."""
    counts = pair.astype(np.float64)
    shares = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1.0)
    before, after = (unit_means(one, codes) for one in shares)
    found = histogram_flip_test(
        before, after, statistic="wasserstein", n_resamples=settings.n_resamples, seed=settings.seed
    )
    values = {"token_distance": found.statistic, "p_wasserstein": found.p_value}
    return {name: np.where(testable, value, np.nan) for name, value in values.items()}
