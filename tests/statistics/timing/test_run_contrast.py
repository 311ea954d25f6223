"""Timing of runs and their contrast, on hand-made results of the set test."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import xarray as xr

from rlgen_stats.toolkit.statistics.timing.run_contrast import (
    SetStatus,
    checkpoints_of,
    contrast_runs,
    half_checkpoint,
    pool_contrasts,
    run_timing,
    set_status,
    training_share,
)

NAN = math.nan
EARLY, LATE, EVOLVING, OPEN = (
    SetStatus.EARLY_STABLE,
    SetStatus.LATE_STABLE,
    SetStatus.EVOLVING,
    SetStatus.UNDETERMINED,
)
STEPS = {"sft": [40, 10, 20, 30], "rl": [8, 2, 4, 6]}
"""Out of order on purpose: checkpoints are taken by step."""


@pytest.fixture
def sets() -> xr.Dataset:
    """RL changes at 6 of 8 steps (excess turnover .3), SFT does not (.02)."""
    rows = [(run, step) for run, steps in STEPS.items() for step in steps]
    run = [name for name, _ in rows]
    delta = np.array([0.0, 0.2, 0.02, 0.01, 0.0, 0.5, 0.3, 0.2])
    return xr.Dataset(
        {
            "delta": ("model", delta),
            "delta_low": ("model", delta - 0.03),
            "delta_high": ("model", delta + 0.04),
            "overlap": ("model", 1 - delta),
            "final_ceiling": ("model", np.where(np.array(run) == "sft", 0.9, 0.8)),
            "verdict": ("trained_run", ["EVOLVING", "SET_STABLE"]),
            "stable_from": ("trained_run", [NAN, 20.0]),
            "reason": ("trained_run", ["delta above 0", "upper bound of delta below 0.1"]),
        },
        coords={
            "model": [f"{name}@{step}" for name, step in rows],
            "run": ("model", run),
            "step": ("model", [step for _, step in rows]),
            "trained_run": ["rl", "sft"],
        },
    )


@pytest.mark.parametrize(
    ("verdict", "stable_share", "ceiling", "expected"),
    [
        ("SET_STABLE", 0.4, 0.8, EARLY),
        ("SET_STABLE", 0.5, 0.8, EARLY),
        ("SET_STABLE", 0.6, 0.8, LATE),
        ("SET_STABLE", NAN, 0.8, OPEN),
        ("EVOLVING", NAN, 0.8, EVOLVING),
        ("UNDETERMINED", NAN, 0.8, OPEN),
        ("SET_STABLE", 0.4, 0.49, OPEN),
        ("SET_STABLE", 0.4, 0.5, EARLY),  # a ceiling of one half is enough
        ("EVOLVING", NAN, NAN, OPEN),
    ],
)
def test_set_status(verdict: str, stable_share: float, ceiling: float, expected: SetStatus) -> None:
    assert set_status(verdict, stable_share, ceiling) is expected


@pytest.mark.parametrize(
    ("shares", "expected"), [([0.2, 0.6, 1.0], 1), ([0.5, 1.0], 0), ([0.2, 0.4, 1.0], None), ([1.0], None), ([], None)]
)
def test_half_checkpoint_is_in_the_second_half_and_not_the_last(shares: list[float], expected: int | None) -> None:
    assert half_checkpoint(np.array(shares)) == expected


def test_training_share_of_no_steps_or_step_zero_is_finite() -> None:
    assert training_share(np.array([10, 40])).tolist() == [0.25, 1.0]
    assert training_share(np.array([0])).tolist() == [0.0]
    assert training_share(np.array([], dtype=int)).tolist() == []


def test_checkpoints_are_those_of_the_run_by_step(sets: xr.Dataset) -> None:
    assert checkpoints_of(sets, "rl")["step"].values.tolist() == [2, 4, 6, 8]
    assert checkpoints_of(sets, "other").sizes["model"] == 0


def test_timing_is_that_of_half_of_training_by_name(sets: xr.Dataset) -> None:
    stabilization = xr.Dataset(
        {name: ("model", [0.7, 0.4]) for name in ("share", "share_low", "share_high")},
        coords={"model": ["sft@20", "rl@4"]},
    )
    timing = run_timing(sets, "sft", stabilization=stabilization)
    assert timing is not None
    assert (timing.half_checkpoint, timing.half_share, timing.stable_share) == ("sft@20", 0.5, 0.5)
    assert (timing.set_verdict, timing.status, timing.ceiling) == ("SET_STABLE", EARLY, 0.9)
    assert timing.turnover == pytest.approx((0.02, -0.01, 0.06))
    assert timing.stabilised == (0.7, 0.7, 0.7)
    assert run_timing(sets, "rl").status is EVOLVING  # type: ignore[union-attr]


@pytest.mark.parametrize("missing", [None, "stabilization without the checkpoint"])
def test_timing_without_a_stabilisation_test(missing: Any, sets: xr.Dataset) -> None:
    empty = xr.Dataset({"share": ("model", [0.7])}, coords={"model": ["sft@10"]})
    timing = run_timing(sets, "sft", stabilization=empty if missing else None)
    assert timing is not None
    assert all(math.isnan(value) for value in timing.stabilised)


def test_the_ceiling_is_that_of_the_last_checkpoint(sets: xr.Dataset) -> None:
    sets["final_ceiling"].loc[{"model": ["sft@10", "sft@20", "sft@30"]}] = 0.1
    timing = run_timing(sets, "sft")
    assert timing is not None
    assert (timing.ceiling, timing.status) == (0.9, EARLY)


def test_no_timing_without_a_run_or_a_checkpoint_in_the_second_half(sets: xr.Dataset) -> None:
    assert run_timing(sets, "other") is None
    assert run_timing(sets.isel(model=[0, 1]), "sft") is None


def test_contrast_is_the_second_run_minus_the_first(sets: xr.Dataset) -> None:
    sft, rl = run_timing(sets, "sft"), run_timing(sets, "rl")
    assert sft is not None
    assert rl is not None
    contrast = contrast_runs(sft, rl, alpha=0.05)
    assert contrast.difference == pytest.approx(0.28)
    assert (contrast.low, contrast.high) == pytest.approx((0.28 - 0.05, 0.28 + 0.05))  # hypot(.03, .04) both ways
    assert contrast.p_value < 1e-6
    mirrored = contrast_runs(rl, sft, alpha=0.05)
    assert (mirrored.difference, mirrored.p_value) == (-contrast.difference, pytest.approx(contrast.p_value))


def test_contrast_of_a_run_without_turnover_is_missing(sets: xr.Dataset) -> None:
    sets["delta"].loc[{"model": "rl@4"}] = NAN
    sft, rl = run_timing(sets, "sft"), run_timing(sets, "rl")
    assert sft is not None
    assert rl is not None
    contrast = contrast_runs(sft, rl, alpha=0.05)
    assert all(math.isnan(value) for value in (contrast.difference, contrast.low, contrast.high, contrast.p_value))


def contrast_of(sets: xr.Dataset, shift: float = 0.0) -> Any:
    """RL against SFT where RL's turnover is ``shift`` larger."""
    rl = sets["run"].values == "rl"
    moved = sets.assign({name: sets[name] + shift * rl for name in ("delta", "delta_low", "delta_high")})
    sft_timing, rl_timing = (run_timing(moved, run) for run in ("sft", "rl"))
    assert sft_timing is not None
    assert rl_timing is not None
    return contrast_runs(sft_timing, rl_timing, alpha=0.05)


def test_contrasts_of_dictionaries_are_pooled_with_the_spread_between_them(sets: xr.Dataset) -> None:
    each = [contrast_of(sets, shift) for shift in (-0.05, 0.0, 0.05)]
    pooled = pool_contrasts(each, alpha=0.05)
    assert pooled.difference == pytest.approx(each[1].difference)
    own = each[1].difference - each[1].low
    assert pooled.difference - pooled.low == pytest.approx(math.hypot(own, 4.302652730 * 0.05 / math.sqrt(3)))
    assert pooled.second.turnover[0] == pytest.approx(each[1].second.turnover[0])
    assert (pooled.first.status, pooled.second.status) == (each[0].first.status, each[0].second.status)
    assert pool_contrasts(each[:1], alpha=0.05) is each[0]


def test_a_status_on_which_dictionaries_disagree_is_open(sets: xr.Dataset) -> None:
    other = sets.assign(verdict=("trained_run", ["UNDETERMINED", "SET_STABLE"]))
    pooled = pool_contrasts([contrast_of(sets), contrast_of(sets), contrast_of(other)], alpha=0.05)
    assert pooled.first.status is EARLY
    assert pooled.second.status is OPEN
    assert pooled.second.set_reason == "the dictionaries disagree (EVOLVING, EVOLVING, UNDETERMINED)"
    most = pool_contrasts([*[contrast_of(sets)] * 4, contrast_of(other)], alpha=0.05)
    assert most.second.status is EVOLVING
