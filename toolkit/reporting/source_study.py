"""What the source study is said to have measured (arXiv 2604.25011), to stand beside this study's numbers.

The numbers are in ``source_study.csv``, a row each: correct them there, and write ``paper`` into ``source`` once a row
has been compared with the paper's own tables.
"""

from __future__ import annotations

from importlib.resources import files

import pandas as pd

UNCHECKED = "From secondary notes on the paper; check against its own tables before citing."


def source_study() -> pd.DataFrame:
    """All numbers, in percent and percentage points.

    Returns
    -------
    pandas.DataFrame
        quantity (``accuracy``, or ``effect`` of an edit on it), model, run (that was read or edited), direction of the
        edit, task, value, source (``paper``, or ``secondary notes``).
    """
    table = pd.read_csv(files(__package__).joinpath("source_study.csv").open(), keep_default_na=False)
    return table.astype({"value": float})


def effects(direction: str) -> pd.DataFrame:
    """Effects of an edit in a direction: one row a model, one column a task, in percentage points."""
    found = source_study().query("quantity == 'effect' and direction == @direction")
    return found.pivot(index="model", columns="task", values="value")[list(found["task"].unique())]


def effect_ranges(direction: str) -> str:
    """The same as one clause, "14 to 46 points (Qwen3-4B), ...", and whether it has been checked."""
    sizes = effects(direction).abs()
    ranges = [f"{row.min():.0f} to {row.max():.0f} points ({model})" for model, row in sizes.iterrows()]
    checked = (source_study().query("quantity == 'effect' and direction == @direction")["source"] == "paper").all()
    return " and ".join(ranges) + (
        " on its selected prompts (base wrong, RL right)." + ("" if checked else f" {UNCHECKED}")
    )
