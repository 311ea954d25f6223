"""All experiments with their sizes: small ones for every test run, full ones for docs/calibration.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.calibration import (
    comparisons,
    dictionaries,
    families,
    invariance,
    others,
    single,
    verdicts_causal,
    verdicts_mediation,
    verdicts_selection,
    verdicts_specificity,
    verdicts_timing,
)
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
    Experiment(comparisons.compared, 10, "Two models compared"),
    Experiment(families.random_sets, 16, "Causal verdicts"),
    Experiment(verdicts_specificity.specificity_verdicts, 25, "Verdicts: C1"),
    Experiment(verdicts_timing.timing_verdicts, 75, "Verdicts: C2"),
    Experiment(verdicts_timing.turnover_of_sizes, 20, "Verdicts: C2"),
    Experiment(verdicts_timing.timing_intervals, 40, "Verdicts: C2"),
    Experiment(verdicts_selection.selection_false, 60, "Verdicts: C3"),
    Experiment(verdicts_selection.selection_more_data, 60, "Verdicts: C3"),
    Experiment(verdicts_mediation.compact_sets, 60, "Verdicts: C3"),
    Experiment(verdicts_causal.trials, 75, "Verdicts: C4 and C5"),
    Experiment(verdicts_causal.borders, 30, "Verdicts: C4 and C5"),
    Experiment(verdicts_causal.changed_answers, 20, "Verdicts: C4 and C5"),
    Experiment(verdicts_mediation.larger_edits, 15, "Verdicts: C4 and C5"),
    Experiment(verdicts_mediation.mediated_shares, 30, "Verdicts: C4 and C5"),
    Experiment(families.planned_power, 8, "Planned power"),
    Experiment(invariance.invariance, 4, "Invariance"),
)
