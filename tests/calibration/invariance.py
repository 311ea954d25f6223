"""Experiments whose nominal value is zero: cells of a result that depend on the order of computation."""

from __future__ import annotations

from typing import Any
from unittest import mock

import dask
import numpy as np
import xarray as xr

from rlgen_stats.toolkit.statistics.drift.feature_drift import drift_test
from rlgen_stats.toolkit.statistics.kernels import max_t
from rlgen_stats.toolkit.statistics.kernels.flips import maxt
from rlgen_stats.toolkit.statistics.planning.planted_truth import Simulation
from rlgen_stats.toolkit.statistics.planning.simulate import simulate_features
from tests.calibration.rows import Row

RTOL = 1e-12
NUMBERS = ("statistic", "effect", "effect_low", "effect_high", "p_value", "q_value", "p_max_t")
COUNTS = ("n", "n_nonzero", "fired", "call", "flag")


def invariance(scale: int, seed: int) -> list[Row]:
    """One drift test, computed in other chunks, with other workers, prompts in another order, and without sparsity."""
    simulation = Simulation(n_prompts=80, n_features=512 * scale, runs=1, checkpoints=1, density=0.1, seed=seed)
    features = simulate_features(simulation).features.compute()
    size = f"{simulation.n_features:,} features, {simulation.n_prompts} prompts, {len(NUMBERS) + len(COUNTS)} variables"
    expected = _drift(features, 512)
    naive = _flips_per_block(features, 64) != _flips_per_block(features, 512)
    naive_options: dict[str, Any] = {"naive": float(naive.sum()), "naive_name": "p-values, flips drawn block by block"}
    order = np.random.default_rng(seed).permutation(simulation.n_prompts)
    rows = [
        _row("chunks of 64 features", expected, _drift(features, 64), size, **naive_options),
        _row("one chunk", expected, _drift(features, simulation.n_features), size),
        _row("4 threads", expected, _drift(features, 64, scheduler="threads", num_workers=4), size),
        _row("prompts in another order", expected, _drift(features.isel(prompt=order), 512), size),
    ]
    d = (features["mean"][1] - features["mean"][0]).values.astype(np.float64)
    sparse = max_t(d, n_resamples=255, seed=seed)
    with mock.patch.object(maxt, "SPARSE_DENSITY", 0.0):
        dense = max_t(d, n_resamples=255, seed=seed)
    differ = sum(
        int((~np.isclose(getattr(sparse, name), getattr(dense, name), rtol=RTOL, atol=0, equal_nan=True)).sum())
        for name in ("statistic", "p_single_step", "p_step_down", "p_raw")
    )
    return [*rows, Row("cells that differ: dense and sparse max-T", 0, differ, 0, 0, np.nan, "", size)]


def _drift(features: xr.Dataset, width: int, **scheduler: Any) -> xr.Dataset:
    lazy = features.chunk({"model": 1, "feature": width}).assign_coords(features.coords)
    with dask.config.set(**(scheduler or {"scheduler": "synchronous"})):
        models = ["sft1@20", "rl1@20"]
        return drift_test(lazy, models=models, n_resamples=255, n_bootstrap=99, seed=3).compute()


def _row(what: str, a: xr.Dataset, b: xr.Dataset, size: str, naive: float = np.nan, naive_name: str = "") -> Row:
    differ = sum(
        int((~np.isclose(a[name].values, b[name].values, rtol=RTOL, atol=0, equal_nan=True)).sum()) for name in NUMBERS
    )
    differ += sum(int((a[name].values != b[name].values).sum()) for name in COUNTS)
    return Row(f"cells that differ: {what}", 0, differ, 0, 0, naive, naive_name, size)


def _flips_per_block(features: xr.Dataset, width: int) -> np.ndarray:
    """Monte-Carlo p-values of a plain implementation: one generator that advances from block to block."""
    d = (features["mean"][1] - features["mean"][0]).values.astype(np.float64)
    random = np.random.default_rng(0)
    p = []
    for start in range(0, d.shape[1], width):
        part = d[:, start : start + width]
        flips = random.choice([-1.0, 1.0], (255, len(d)))
        p.append((1 + (np.abs(flips @ part) >= np.abs(part.sum(axis=0))).sum(axis=0)) / 256)
    return np.concatenate(p)
