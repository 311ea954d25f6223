"""Drift of features whose truth is known, measured with trained dictionaries; medians over worlds and their weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from rlgen_stats.toolkit.statistics import drift_test
from tests.statistics.drift.planted_drift import drift_world, encoded, matched, trained

pytestmark = pytest.mark.slow  # dictionaries are trained in three worlds

SEEDS = range(3)


@dataclass(frozen=True)
class Found:
    """One world's dictionary: of the planted features that it found."""

    correlation: float
    """Of measured and true drift, turned features left out."""
    significant: float
    """Share of the unchanged ones that differ significantly."""
    false_drift: float
    """Share of the unchanged ones called DRIFT."""
    power: float
    """Share of the stronger, weaker and new ones called DRIFT."""


def found(seed: int) -> Found:
    """A world of 48 features in 32 channels, its dictionary, and the drift test on 300 prompts."""
    world = drift_world(32, 48, seed)
    crosscoder = trained(world, seed=seed, steps=700, n_prompts=1000, objective="both")
    data, truth = world.draw(300, 500 + seed)
    features = encoded(crosscoder, data)
    learnt, close = matched(world, crosscoder, features)
    drift = drift_test(features, models=["rl@1", "rl@2"], n_resamples=99, n_bootstrap=9).isel(model=1, feature=learnt)
    unchanged, compared = close & (world.kind == "unchanged"), close & (world.kind != "rotated")
    called = drift["call"].values == "DRIFT"
    true = (truth[2] - truth[0]).mean(axis=0)
    return Found(
        correlation=float(np.corrcoef(drift["effect"].values[compared], true[compared])[0, 1]),
        significant=float((drift["q_value"].values[unchanged] <= 0.05).mean()),
        false_drift=float(called[unchanged].mean()),
        power=float(called[compared & ~unchanged].mean()),
    )


@pytest.fixture(scope="module")
def worlds() -> list[Found]:
    return [found(seed) for seed in SEEDS]


def test_measured_drift_follows_the_true_one(worlds: list[Found]) -> None:
    assert np.median([world.correlation for world in worlds]) > 0.85


def test_changed_features_drift_and_leaking_ones_do_not(worlds: list[Found]) -> None:
    """Most features that did not change differ significantly; few by more than the margin."""
    assert np.median([world.significant for world in worlds]) > 0.4
    assert np.median([world.false_drift for world in worlds]) < 0.15
    assert np.median([world.power for world in worlds]) > 0.6
