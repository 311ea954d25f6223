"""All figures of the report; one that cannot be drawn is replaced by the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from rlgen_stats.schemas.errors import NotEstimableError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.figures.agreement_ladder import TITLE, agreement_ladder
from rlgen_stats.toolkit.reporting.figures.along_training import set_stability, stabilization
from rlgen_stats.toolkit.reporting.figures.behaviour_and_drift import accuracy, drift_volcano, transitions
from rlgen_stats.toolkit.reporting.figures.causal_arms import dose_response, failure_classes
from rlgen_stats.toolkit.reporting.figures.copied_features import TITLE as SHARE_TITLE
from rlgen_stats.toolkit.reporting.figures.copied_features import mediated_share
from rlgen_stats.toolkit.reporting.figures.dictionary import matched_drift, specificity, task_intersection
from rlgen_stats.toolkit.reporting.figures.plotting import Graphic, Missing
from rlgen_stats.toolkit.reporting.result_lookup import Results, tidy

FIGURES: Final[dict[str, tuple[str, Callable[[Results, StudySpec], Graphic]]]] = {
    "accuracy": ("Accuracy by task and model", accuracy),
    "transitions": ("What changed prompt by prompt", transitions),
    "replicability": (TITLE, agreement_ladder),
    "specificity": ("Model-specific features", specificity),
    "matched-drift": ("Specific features against movement", matched_drift),
    "stabilization": ("When features stabilise", stabilization),
    "set-stability": ("The top set through training", set_stability),
    "intersection": ("Which tasks share the selected features", task_intersection),
    "mediated-share": (SHARE_TITLE, mediated_share),
    "dose-response": ("Dose response of the set", dose_response),
    "failure-classes": ("How completions of the edited models end", failure_classes),
    "drift": ("Which features drifted", drift_volcano),
}
"""Title and function of every figure."""


def draw_figures(results: Results, spec: StudySpec) -> dict[str, Graphic | Missing]:
    """Every figure by name; one that cannot be drawn is replaced by the reason."""
    results = tidy(results)
    drawn: dict[str, Graphic | Missing] = {}
    for name, (title, draw) in FIGURES.items():
        try:
            drawn[name] = draw(results, spec)
        except NotEstimableError as error:
            drawn[name] = Missing(name, title, str(error))
    return drawn
