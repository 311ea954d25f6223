"""Numbers as a person reads them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import xarray as xr

from rlgen_stats.toolkit.reporting.values import (
    attr_list,
    compact,
    count,
    crosscoder_label,
    fixed,
    interval,
    listed,
    nats,
    number,
    p_text,
    per_run,
    percent,
    plain,
    points,
    text,
)

NAN = math.nan


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (fixed(-0.04), "0.0"),  # never minus zero
        (fixed(-1.25, 2, sign=True), "−1.25"),
        (fixed(1.25, 2, sign=True), "+1.25"),
        (fixed(0.0, sign=True), "0.0"),
        (fixed(NAN), "—"),
        (fixed(math.inf), "—"),
        (percent(0.5), "50.0%"),
        (points(-0.081), "−8.1 pts"),
        (interval(-0.05, 0.1, scale=100, sign=True), "[−5.0, +10.0]"),
        (interval(5, NAN, 0), "at least 5"),
        (interval(NAN, NAN), "—"),
        (p_text(0.05), "0.050"),
        (p_text(0.00042), "0.0004"),
        (p_text(3.2e-9), "3.2×10⁻⁹"),
        (p_text(NAN), "—"),
        (compact(4.0), "4"),
        (compact(0.61), "0.610"),
        (compact(-12.345), "−12.3"),
        (compact(-6.8e-10), "−6.8×10⁻¹⁰"),
        (nats(-6.8e-10), "<10⁻⁶"),
        (nats(0.0), "0"),
        (nats(1.3e-4), "1.3×10⁻⁴"),
        (count(1, "run"), "1 run"),
        (count(1234, "run"), "1,234 runs"),
        (listed(["a", "b", "c"]), "a, b and c"),
        (listed([]), ""),
    ],
)
def test_words(shown: str, expected: str) -> None:
    assert shown == expected


def test_plain_is_strict_json() -> None:
    value = {1: np.float64("nan"), "a": np.arange(2), "b": (np.bool_(True), math.inf), "c": np.str_("x")}
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == {
        "1": None,
        "a": [0, 1],
        "b": [True, None],
        "c": "x",
    }


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
