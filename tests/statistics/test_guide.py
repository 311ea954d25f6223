"""The examples of docs/statistics.md run as they stand, on a small simulated study."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlgen_stats.toolkit.statistics import Simulation, write_simulation

GUIDE = Path(__file__).parents[2] / "docs" / "statistics.md"


def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    plan = {"n_prompts": 320, "n_features": 160, "effect": 0.4, "density": 0.5, "cluster_size": 2, "gain": 0.3}
    write_simulation("planted", Simulation(**plan, checkpoints=5))
    exec(
        compile("\n".join(re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)), str(GUIDE), "exec"),
        {},
    )
    said = capsys.readouterr().out
    assert "drifting" in said
    assert "moderate" in said
    assert "p_holm" in said
