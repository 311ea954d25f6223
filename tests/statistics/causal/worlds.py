"""Simulated outcome tables of the tests' size, beside those that plan a study's power."""

from typing import Any

from rlgen_stats.toolkit.intervention import OutcomeTable, Settings
from rlgen_stats.toolkit.statistics.planning.simulated_trials import (
    EMPTY,
    N_TARGET,
    N_UNRELATED,
    RIGHT,
    SILENT,
    WRONG,
    amplified,
    with_endings,
    world,
)

__all__ = [
    "EMPTY",
    "N_TARGET",
    "N_UNRELATED",
    "RIGHT",
    "SETTINGS",
    "SILENT",
    "WRONG",
    "amplified",
    "causal",
    "with_endings",
    "world",
]

SETTINGS = Settings(alpha=0.05, margin=0.05, n_resamples=999, seed=3)


def causal(**changes: Any) -> OutcomeTable:
    """The set carries what RL added: without it the model rambles where and as base does, and half of it does half."""
    return world(**{"right": {"set": 0.5}, "kl": {"set": 0.3}, **changes})
