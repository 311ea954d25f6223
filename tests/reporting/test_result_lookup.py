"""Values looked up in results, and what is returned where they are missing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import xarray as xr

from rlgen_stats.toolkit.reporting.result_lookup import (
    attr_list,
    crosscoder_label,
    nearest_label,
    number,
    per_run,
    text,
)


@pytest.mark.parametrize("features", [[3, 5], np.array([3, 5]), "[3, 5]", "3, 5", (3, 5)])
def test_attribute_lists_in_any_form(features: object) -> None:
    assert attr_list(xr.Dataset(attrs={"features": features}), "features") == [3, 5]
    assert attr_list(xr.Dataset(attrs={"features": 3}), "features") == [3]
    assert attr_list(xr.Dataset(), "features") == []


def test_lookups_of_what_is_not_there_are_empty() -> None:
    data = xr.Dataset({"x": ("model", [1.0]), "s": ("model", ["w"])}, coords={"model": ["a@1"]})
    assert number(data, "x", model="a@1") == 1.0
    assert text(data, "s", model="a@1") == "w"
    assert math.isnan(number(data, "x", model="b@1"))
    assert math.isnan(number(data, "y", model="a@1"))
    assert math.isnan(number(None, "x"))
    assert text(data, "s", model="b@1") == ""


def test_pairwise_crosscoder_of_a_run_is_that_of_its_last_target() -> None:
    labels = ["early", "late", "pair-sft", "null"]
    targets = ("crosscoder", ["rl@40", "rl@80", "sft@150", "base.repeat@0"])
    data = xr.Dataset(coords={"crosscoder": labels, "target": targets})
    assert crosscoder_label(data, "rl") == "late"
    assert crosscoder_label(data, "sft") == "pair-sft"
    assert crosscoder_label(data.drop_vars("target"), "sft") == "pair-sft"
    assert crosscoder_label(data.drop_vars("target"), "rl") is None


def test_per_run_picks_by_name() -> None:
    data = xr.Dataset(
        {"verdict": ("trained_run", ["a", "b"])},
        coords={"model": ["base@0", "sft@1", "rl@1"], "trained_run": ["sft", "rl"]},
    )
    assert str(per_run(data, "verdict", "rl")) == "b"
    assert per_run(data, "verdict", "other") is None
    assert per_run(None, "verdict", "rl") is None


def test_nearest_label() -> None:
    data = xr.Dataset(coords={"tau": [0.7, 0.9]})
    assert nearest_label(data, "tau", 0.75) == 0.7
    assert nearest_label(data.drop_vars("tau"), "tau", 0.75) == 0.75
    assert nearest_label(None, "tau", 0.75) == 0.75
