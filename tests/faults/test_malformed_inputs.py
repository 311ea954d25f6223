"""A small seeded share of the malformed inputs; ``make faults`` counts many more."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from rlgen_stats.cli import console
from tests.faults.malformed_inputs import count


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no alarm ends a case that hangs")
def test_malformed_inputs_are_named_or_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(console, "SCHEDULER_SECONDS", 2.0)
    found = count(tmp_path, seed=0, n_settings=25, share=0.03)
    bad = {verdict: cases for verdict, cases in found.items() if verdict not in ("named", "harmless")}
    assert not bad, bad
    assert len(found["named"]) > 50
    assert found["harmless"]
