"""The report: five claims assessed, figures drawn, one self-contained page. No torch.

Reporting formats, it decides nothing: it looks values up in results, rounds them and chooses words by them. Estimates,
intervals, p-values and verdicts come from :mod:`rlgen_stats.toolkit.statistics`; no module here imports its kernels,
scipy or another source of tests and quantiles (``tests/reporting/test_decides_nothing.py``). What is summarised here
is only described: ranges and medians of arms that are too many to list.

The charts are functions of a dataset and a Matplotlib ``Axes``, which they return: ``plot_drift(drift, axes,
model="rl@80")`` with ``drift = open_results(study, "drift")``.
"""

from rlgen_stats.toolkit.reporting.claims.assess import CLAIM_COLUMNS, assess_claims, claims_table
from rlgen_stats.toolkit.reporting.claims.claim import Claim
from rlgen_stats.toolkit.reporting.facts import read_study_data
from rlgen_stats.toolkit.reporting.feature_cards import FeatureCard, feature_cards
from rlgen_stats.toolkit.reporting.feature_files import export_features
from rlgen_stats.toolkit.reporting.figures.agreement_ladder import plot_agreement
from rlgen_stats.toolkit.reporting.figures.along_training import plot_overlap, plot_stability, plot_turnover
from rlgen_stats.toolkit.reporting.figures.behaviour_and_drift import plot_accuracy, plot_drift, plot_transitions
from rlgen_stats.toolkit.reporting.figures.causal_arms import plot_dose_response, plot_failure_classes
from rlgen_stats.toolkit.reporting.figures.copied_features import plot_mediated_share
from rlgen_stats.toolkit.reporting.figures.dictionary import (
    plot_model_shares,
    plot_specific_at_distance,
    plot_specificity,
    plot_task_intersection,
)
from rlgen_stats.toolkit.reporting.figures.draw import draw_figures
from rlgen_stats.toolkit.reporting.figures.overview import (
    plot_domain_accuracy,
    plot_edits,
    plot_movement,
    plot_selection_counts,
    plot_specific_shares,
    plot_time_to_stability,
)
from rlgen_stats.toolkit.reporting.figures.plotting import Graphic, Missing
from rlgen_stats.toolkit.reporting.report import load_results, write_report
from rlgen_stats.toolkit.statistics.claim_verdicts import Verdict

__all__ = [
    "CLAIM_COLUMNS",
    "Claim",
    "FeatureCard",
    "Graphic",
    "Missing",
    "Verdict",
    "assess_claims",
    "claims_table",
    "draw_figures",
    "export_features",
    "feature_cards",
    "load_results",
    "plot_accuracy",
    "plot_agreement",
    "plot_domain_accuracy",
    "plot_dose_response",
    "plot_drift",
    "plot_edits",
    "plot_failure_classes",
    "plot_mediated_share",
    "plot_model_shares",
    "plot_movement",
    "plot_overlap",
    "plot_selection_counts",
    "plot_specific_at_distance",
    "plot_specific_shares",
    "plot_specificity",
    "plot_stability",
    "plot_task_intersection",
    "plot_time_to_stability",
    "plot_transitions",
    "plot_turnover",
    "read_study_data",
    "write_report",
]
