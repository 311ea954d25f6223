"""Numbers as a person reads them."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest

from rlgen_stats.toolkit.reporting.formatting import (
    compact,
    count,
    fixed,
    interval,
    jsonable,
    listed,
    nats,
    p_text,
    percent,
    points,
)
from rlgen_stats.toolkit.reporting.report import without_formulas

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


def test_jsonable_is_strict_json() -> None:
    value = {1: np.float64("nan"), "a": np.arange(2), "b": (np.bool_(True), math.inf), "c": np.str_("x")}
    assert json.loads(json.dumps(jsonable(value), allow_nan=False)) == {
        "1": None,
        "a": [0, 1],
        "b": [True, None],
        "c": "x",
    }


def test_cells_of_tables_are_no_formulas() -> None:
    """A spreadsheet would run =cmd, +1, -1, @SUM and what follows a tab; numbers are numbers and stay."""
    cells = ["=1+1", "+x", "-1+cmd", "@x", "\t=1", "\r=1", "\n=1", "x=1", "", "-", "-0.5", "+1,000"]
    table = pd.DataFrame({"text": cells, "number": [-1.5] * len(cells)})
    written = without_formulas(table)
    assert list(written.text[:7]) == [f"'{cell}" for cell in cells[:7]]
    assert list(written.text[7:]) == cells[7:]
    assert list(written.number) == [-1.5] * len(cells)
