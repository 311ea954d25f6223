"""Sets of features by name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.stores import write_results
from rlgen_stats.toolkit.study.stage_graph import Study
from rlgen_stats.toolkit.study.trials_of_other_sets import SETS, _named
from tests.reporting.synthetic_study import PROVENANCE, selection


def study_with(tmp_path: Path, *, first_confirmed: int) -> Study:
    """Features 3 to 7 rise, 10 to 12 are candidates; those above are first in rank."""
    data = selection()
    tier = data["tier"].copy()
    tier[:] = "REJECTED"
    tier[3:8], tier[10:13] = "CONFIRMED", "CANDIDATE"
    specific = tier.where(tier["feature"] >= first_confirmed, "REJECTED")
    data = data.assign(tier=tier, specific_tier=specific, rank=-1.0 * data["feature"])
    write_results(tmp_path / "results.zarr", "selection", data, provenance=PROVENANCE)
    return cast(Study, SimpleNamespace(folder=SimpleNamespace(results=tmp_path / "results.zarr")))


def test_rising_confirmed_and_candidate_are_what_the_tiers_say_by_rank(tmp_path: Path) -> None:
    study = study_with(tmp_path, first_confirmed=5)
    assert {name: _named(study, name, 1) for name in SETS[1:4]} == {
        "rising": (7, 6, 5, 4, 3),
        "confirmed": (7, 6, 5),
        "candidate": (12, 11, 10, 7, 6, 5, 4, 3),
    }


def test_an_empty_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the set 'confirmed' of this study is empty in dictionary 1"):
        _named(study_with(tmp_path, first_confirmed=8), "confirmed", 1)
