"""The documentation: its site builds without a dead link or an unknown name, and its analyses are as short as they say.

Pages that need a study run on the mini study of ``end_to_end/test_mini.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import DOCS, python_blocks, run_page

ROOT = DOCS.parent


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    """Pages, links between them, their anchors, and every name that docstrings refer to; nothing is fetched."""
    pytest.importorskip("mkdocstrings_handlers.python", reason="pip install '.[docs]'")
    subprocess.run(["make", "-s", ".namespace/rlgen_stats"], cwd=ROOT, check=True)
    command = [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    statistics = (tmp_path / "docs/reference/statistics/index.html").read_text()
    assert 'id="rlgen_stats.toolkit.statistics.features_dataset"' in statistics
    assert 'href="#rlgen_stats.toolkit.statistics.judge"' in statistics, "a role in a docstring is a link"
    assert ":func:" not in statistics
    assert 'id="where-is-"' in (tmp_path / "CONTRIBUTING/index.html").read_text(), "headings have GitHub's ids"


def test_five_analyses_of_at_most_ten_lines() -> None:
    lengths = [sum(bool(line.strip()) for line in code.splitlines()) for _, code in python_blocks(DOCS / "analyses.md")]
    assert len(lengths) == 5
    assert max(lengths) <= 10


def test_statistics_on_own_arrays_find_what_the_page_plants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page(DOCS / "notebooks/own-arrays.md")
    said = capsys.readouterr().out
    assert "sft@100 [0 1 2 3 4 5 6 7 8 9]" in said
    assert "\nSUPPORTED\n" in said
    assert "\n[10 11 12]\n" in said
    assert names["verdict"].requirements["v1"]
    assert names["verdict"].requirements["v2"]
