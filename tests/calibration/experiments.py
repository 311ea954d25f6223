"""All experiments with their sizes: small ones for every test run, full ones for docs/calibration.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.calibration import dictionaries, families, invariance, others, single, verdicts_mediation
from tests.calibration.rows import Row

SEED = 20261


@dataclass(frozen=True)
class Experiment:
    run: Callable[[int, int], list[Row]]
    full: int
    """Multiple of the small size."""
    title: str

    @property
    def name(self) -> str:
        return self.run.__name__


EXPERIMENTS = (
    Experiment(single.sign_flip_uniform, 20, "Sign-flip p-values"),
    Experiment(single.clusters, 20, "Sign-flip p-values"),
    Experiment(others.few_clusters, 20, "Sign-flip p-values"),
    Experiment(single.token_unit, 20, "The unit"),
    Experiment(families.false_discoveries, 16, "Families"),
    Experiment(families.family_wise, 16, "Families"),
    Experiment(others.false_shares, 20, "Families"),
    Experiment(single.coverage, 20, "Intervals"),
    Experiment(dictionaries.pooled, 10, "Dictionaries"),
    Experiment(single.stabilisation, 20, "Stabilisation"),
    Experiment(others.trends, 8, "Stabilisation"),
    Experiment(families.set_overlap, 20, "Stabilisation"),
    Experiment(families.outcome_selection, 16, "Selection by outcome"),
    Experiment(others.stable_by_chance, 8, "Selection by outcome"),
    Experiment(families.random_sets, 16, "Causal verdicts"),
    Experiment(families.planned_power, 8, "Planned power"),
    Experiment(invariance.invariance, 4, "Invariance"),
    Experiment(verdicts_mediation.larger_edits, 15, "Verdicts: C4 and C5"),
    Experiment(verdicts_mediation.mediated_shares, 30, "Verdicts: C4 and C5"),
)
