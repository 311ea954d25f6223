"""What the limits of a readout let pass: planted changes of magnitude, under every way to read them.

Claims here are about training, so each is about the median over three initial weights.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from rlgen_stats.schemas.study import Readout
from rlgen_stats.toolkit.crosscoder import (
    ArrayReader,
    Crosscoder,
    ReadoutHealth,
    fit_readout,
    judge_readout,
    measure_health,
    measure_readout,
    train_replicates,
)
from rlgen_stats.toolkit.crosscoder.uses.readout_health import own_fve
from tests.crosscoder.training.test_objectives import VIEWS, changed_magnitudes, spec_of

Judged = Callable[[str, Readout], list[ReadoutHealth]]


@pytest.fixture(scope="module")
def data() -> NDArray[np.float32]:
    return changed_magnitudes()


@pytest.fixture(scope="module")
def judged(data: NDArray[np.float32]) -> Judged:
    """Objective and readout -> the readout of three dictionaries."""
    trained: dict[str, list[Crosscoder]] = {}
    reader = ArrayReader(data, batch_size=256, seed=1)

    def judge(objective: str, readout: Readout) -> list[ReadoutHealth]:
        if objective not in trained:
            trained[objective] = train_replicates(reader, spec_of(objective), views=VIEWS, seeds=[1, 2, 3])
        found = []
        for crosscoder in trained[objective]:
            crosscoder.facts["objective"] = objective
            if readout == "fit" and crosscoder.fit_weight is None:
                fit_readout(crosscoder, reader)
            models = measure_readout(crosscoder, reader, VIEWS, readout=readout)
            own = own_fve(crosscoder, measure_health(crosscoder, reader, readout=readout))
            found.append(judge_readout(crosscoder, models, own_fve=own, contrasted=VIEWS[1:], readout=readout))
        return found

    return judge


def median(found: list[ReadoutHealth], name: str) -> float:
    """Over dictionaries, of the worst contrasted model."""
    pick = max if name == "artefact" else min
    return float(np.median([pick(getattr(model, name) for model in one.models[1:]) for one in found]))


def failed(found: list[ReadoutHealth], name: str) -> int:
    return sum(any(check.name == name and not check.ok for check in one.checks) for one in found)


@pytest.mark.parametrize("readout", ["swap", pytest.param("fit", marks=pytest.mark.slow), "own"])
def test_a_joint_dictionary_does_not_describe_differences(judged: Judged, readout: Readout) -> None:
    found = judged("joint", readout)
    assert median(found, "dfve") < 0
    assert failed(found, "readout_dfve") >= 2
    assert (failed(found, "readout_artefact") >= 2) == (readout == "own")


def test_fit_describes_models_better_than_swap_and_still_not_their_differences(judged: Judged) -> None:
    assert median(judged("joint", "fit"), "fve") > median(judged("joint", "swap"), "fve") + 0.02


@pytest.mark.slow
@pytest.mark.parametrize("objective", [pytest.param("paired", marks=pytest.mark.slow), "both"])
def test_what_is_trained_on_single_models_and_differences_passes(judged: Judged, objective: str) -> None:
    found = judged(objective, "swap")
    assert median(found, "dfve") > 0.6
    assert sum(one.reasons == "" for one in found) >= 2
