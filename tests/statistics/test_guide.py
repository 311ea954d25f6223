"""The examples of docs/statistics.md run as they stand, on a small simulated study."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlgen_stats.toolkit.statistics import Simulation, write_simulation
from tests.pages import DOCS, run_page


@pytest.mark.slow
def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    plan = {"n_prompts": 320, "n_features": 160, "effect": 0.4, "density": 0.5, "cluster_size": 2, "gain": 0.3}
    write_simulation("planted", Simulation(**plan, checkpoints=5))
    run_page(DOCS / "statistics.md")
    said = capsys.readouterr().out
    assert "drifting" in said
    assert "moderate" in said
    assert "p_holm" in said
