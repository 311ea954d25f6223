"""Stages that only write their outputs: for tests of the graph, not of the science."""

from typing import Any

import pytest
import xarray as xr

from rlgen_stats.stores import Provenance, write_results
from rlgen_stats.toolkit.study import STAGES, Study
from rlgen_stats.toolkit.study import run as run_module
from rlgen_stats.toolkit.study.stage_graph import BY_NAME

CALLS: list[str] = []


def write_output(study: Study, key: str, path: str) -> None:
    target = study.folder.root / path
    if path.startswith("results.zarr/"):
        write_results(
            study.folder.results, target.name + "-x", xr.Dataset(), provenance=Provenance(study.study_id, key)
        )
        (study.folder.results / (target.name + "-x")).rename(target)
    else:
        target.mkdir(parents=True, exist_ok=True) if not target.suffix else target.parent.mkdir(exist_ok=True)
        if target.suffix in (".html", ".json"):
            target.write_text('{"claims": []}')
        elif target.suffix == ".zarr":
            xr.Dataset(attrs=Provenance(study.study_id, key).attrs()).to_zarr(target, consolidated=False, mode="w")


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that only write their outputs: the graph is under test, not the science."""
    CALLS.clear()

    def resolve(function: str) -> Any:
        name = next(stage.name for stage in STAGES if stage.function == function)

        def call(study: Study, key: str, progress: object) -> None:
            CALLS.append(name)
            for one in (study, *study.beside):
                for path in one.outputs(BY_NAME[name]):
                    write_output(one, one.key(name), str(path.relative_to(one.folder.root)))

        return call

    monkeypatch.setattr(run_module.pkgutil, "resolve_name", resolve)
