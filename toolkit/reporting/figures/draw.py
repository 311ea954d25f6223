"""All figures of the report; one that cannot be drawn is replaced by the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
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
from rlgen_stats.toolkit.reporting.population import populations
from rlgen_stats.toolkit.reporting.result_lookup import Results, tidy

FIGURES: Final[dict[str, tuple[str, str, Callable[[Results, StudySpec], Graphic]]]] = {
    "accuracy": ("Accuracy by task and model", "tasks", accuracy),
    "transitions": ("What changed prompt by prompt", "tasks", transitions),
    "replicability": (TITLE, "dictionaries", agreement_ladder),
    "specificity": ("Model-specific features", "attribution", specificity),
    "matched-drift": ("Specific features against movement", "finals", matched_drift),
    "stabilization": ("When features stabilise", "when", stabilization),
    "set-stability": ("The top set through training", "set_stability", set_stability),
    "intersection": ("Which tasks share the selected features", "scores", task_intersection),
    "mediated-share": (SHARE_TITLE, "copying", mediated_share),
    "dose-response": ("Dose response of the set", "editing", dose_response),
    "failure-classes": ("How completions of the edited models end", "editing", failure_classes),
    "drift": ("Which features drifted", "drift", drift_volcano),
}
"""Title, analysis whose population it shows, and function of every figure."""


def draw_figures(
    results: Results, spec: StudySpec, said_of: Mapping[str, str] | None = None
) -> dict[str, Graphic | Missing]:
    """Every figure by name; one that cannot be drawn is replaced by the reason.

    ``said_of`` are the populations by analysis; default what the results alone say of them.
    """
    results = tidy(results)
    said_of = populations(results, spec) if said_of is None else said_of
    drawn: dict[str, Graphic | Missing] = {}
    for name, (title, _, draw) in FIGURES.items():
        try:
            drawn[name] = draw(results, spec)
        except NotEstimableError as error:
            drawn[name] = Missing(name, title, str(error))
    return with_populations(drawn, said_of)


def with_populations(
    drawn: Mapping[str, Graphic | Missing], said_of: Mapping[str, str]
) -> dict[str, Graphic | Missing]:
    """The figures with what they are drawn of."""
    return {
        name: replace(one, population=said_of.get(FIGURES[name][1], "")) if isinstance(one, Graphic) else one
        for name, one in drawn.items()
    }
