"""The embedded study trained and answered with two threads: sums in another order, the same completions."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import Result
from safetensors.numpy import load_file

from tests.end_to_end.conftest import run_command
from tests.faults.killed_studies import copy_inputs

SAME = 0.99
"""Share of completions: one whose two best tokens are equal but for rounding may differ."""


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_two_threads_train_the_same_models_but_for_rounding_and_write_the_same_completions(
    mini: tuple[Path, Result], tmp_path: Path
) -> None:
    folder = copy_inputs(mini[0], tmp_path / "study")
    result = run_command("run", str(folder), "--stage", "outcomes")
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    for weights in mini[0].glob("models/*/step-*/model.safetensors"):
        ours, theirs = load_file(weights), load_file(folder / weights.relative_to(mini[0]))
        assert all(np.abs(ours[name] - theirs[name]).max() < 1e-3 for name in ours)
    tables = sorted((mini[0] / "completions").glob("*.parquet"))
    assert len(tables) == 5
    for table in tables:
        one, other = pd.read_parquet(table), pd.read_parquet(folder / "completions" / table.name)
        assert (one["prompt"] == other["prompt"]).all()
        assert (one["text"] == other["text"]).mean() >= SAME
        assert (one["correct"] == other["correct"]).mean() >= SAME
