"""Fixtures of a synthetic study with planted numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import xarray as xr

from rlgen_stats.schemas.layout import RESULT_GROUPS, validate
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import Provenance, StudyFolder, write_results
from rlgen_stats.toolkit.reporting import Graphic, Missing, draw_figures, write_report
from rlgen_stats.toolkit.reporting.figures.draw import with_populations
from tests.reporting.synthetic_study import (
    BUILDERS,
    HOSTILE,
    PROVENANCE,
    behaviour,
    make_spec,
    other_parts,
    other_trial,
    write_stores,
)


@pytest.fixture
def spec() -> StudySpec:
    return make_spec()


@pytest.fixture
def spec_with() -> Callable[..., StudySpec]:
    return make_spec


@pytest.fixture
def results() -> dict[str, xr.Dataset]:
    """Fresh datasets of every declared layout, valid and with planted numbers."""
    built = {name: build() for name, build in BUILDERS.items()}
    assert set(built) == set(RESULT_GROUPS)
    return {name: validate(dataset, name) for name, dataset in built.items()}


@pytest.fixture
def behaviour_without_pooled() -> xr.Dataset:
    return behaviour(pooled=False)


@pytest.fixture
def provenance() -> Provenance:
    return PROVENANCE


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """A whole study folder, shared: tests must not change it."""
    folder = StudyFolder(tmp_path_factory.mktemp("study") / "synthetic")
    folder.root.mkdir()
    write_stores(folder)
    for name, build in BUILDERS.items():
        write_results(folder.results, name, build(), provenance=PROVENANCE)
    write_results(folder.results, "trial-features-3-9", other_trial(), provenance=PROVENANCE)
    write_results(folder.results, "trial-features-3-9-features", other_parts(), provenance=PROVENANCE)
    return folder


@pytest.fixture(scope="session")
def drawn() -> dict[str, Graphic | Missing]:
    return draw_figures({name: build() for name, build in BUILDERS.items()}, make_spec())


@pytest.fixture(scope="session")
def report(written: StudyFolder) -> Path:
    """The whole report, written once."""
    index = write_report(written, make_spec(), provenance=PROVENANCE)
    assert index == written.report / "index.html"
    return written.report


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch, drawn: dict[str, Graphic | Missing]) -> None:
    """Reports get the figures drawn before: drawing takes most of a report's time."""
    monkeypatch.setattr(
        "rlgen_stats.toolkit.reporting.report.draw_figures", lambda *args: with_populations(drawn, args[2])
    )


@pytest.fixture
def empty_folder(tmp_path: Path) -> StudyFolder:
    folder = StudyFolder(tmp_path / "empty")
    folder.root.mkdir()
    return folder


@pytest.fixture
def hostile() -> str:
    return HOSTILE
