"""One planted study, its trial of the gate and of three features, run once for all tests of this folder."""

from __future__ import annotations

from typing import Any

import pytest
import xarray as xr

from rlgen_stats.toolkit.intervention import feature_effects
from tests.edits.conftest import crosscoder, model
from tests.trial.planted import (
    F_BRAKE,
    F_DECOY,
    F_GATE,
    PROVENANCE,
    planted_study,
)
from tests.trial.trials import (
    run,
)

__all__ = ["crosscoder", "model"]


@pytest.fixture(scope="package")
def study(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return planted_study(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="package")
def gate(study: Any) -> tuple[xr.Dataset, xr.Dataset]:
    return run(study, [F_GATE], F_BRAKE)


@pytest.fixture(scope="package")
def parts(study: Any) -> xr.Dataset:
    spec, folder = study
    chosen = [F_DECOY, F_GATE, F_DECOY + 1]
    return feature_effects(spec, folder, chosen, provenance=PROVENANCE, name="three")
