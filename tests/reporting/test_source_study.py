"""The source study's numbers: those of the method page, marked until somebody has checked them."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from rlgen_stats.toolkit.reporting import source_study as module
from rlgen_stats.toolkit.reporting.source_study import UNCHECKED, effect_ranges, effects, source_study

METHOD = Path(__file__).parents[2] / "docs" / "method.md"
EDITS = {
    ("disable", "Qwen3-4B"): "disable, 4B RL (50 features)",
    ("disable", "Qwen2.5-7B"): "disable, 7B RL (16)",
    ("amplify", "Qwen3-4B"): "amplify, 4B base",
    ("amplify", "Qwen2.5-7B"): "amplify, 7B base",
}


def test_effects_are_those_of_the_method_page() -> None:
    rows = [[cell.strip() for cell in line.split("|")] for line in METHOD.read_text().splitlines()]
    for (direction, model), label in EDITS.items():
        (written,) = [row[row.index(label) + 1 :] for row in rows if label in row]
        assert effects(direction).loc[model].tolist() == [float(cell) for cell in written if cell]


def test_accuracies_are_those_of_the_method_page() -> None:
    table = source_study().query("quantity == 'accuracy'")
    numbers = {
        line.split("|")[1].strip(): [float(x) for x in re.findall(r"\d+\.\d", "|".join(line.split("|")[2:9]))]
        for line in METHOD.read_text().splitlines()
        if line.strip().startswith(("| Qwen", "| SFT", "| RL "))
    }
    both = numbers["SFT / RL"]
    expected = {
        ("Qwen3-4B", "base"): numbers["Qwen3-4B base"],
        ("Qwen3-4B", "sft"): numbers["SFT"],
        ("Qwen3-4B", "rl"): numbers["RL"],
        ("Qwen2.5-7B", "base"): numbers["Qwen2.5-7B base"],
        ("Qwen2.5-7B", "sft"): both[::2],
        ("Qwen2.5-7B", "rl"): both[1::2],
    }
    found = {key: rows["value"].tolist() for key, rows in table.groupby(["model", "run"])}
    assert found == expected


def test_ranges_are_marked_until_every_row_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert effect_ranges("disable").startswith("12 to 44 points (Qwen2.5-7B) and 14 to 46 points (Qwen3-4B)")
    assert effect_ranges("disable").endswith(UNCHECKED)
    checked: pd.DataFrame = source_study()
    checked.loc[checked["direction"] == "disable", "source"] = "paper"
    monkeypatch.setattr(module, "source_study", lambda: checked)
    assert UNCHECKED not in effect_ranges("disable")
    assert effect_ranges("amplify").endswith(UNCHECKED)
