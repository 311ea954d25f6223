"""The report: five claims assessed, figures drawn, one self-contained page. No torch."""

from rlgen_stats.toolkit.reporting.claims.c1_specificity import CLAIM_COLUMNS, assess_claims, claims_table
from rlgen_stats.toolkit.reporting.claims.verdicts import Claim, Verdict
from rlgen_stats.toolkit.reporting.facts import read_study_data
from rlgen_stats.toolkit.reporting.feature_cards import FeatureCard, feature_cards
from rlgen_stats.toolkit.reporting.figures.draw import draw_figures
from rlgen_stats.toolkit.reporting.figures.plotting import Graphic, Missing
from rlgen_stats.toolkit.reporting.report import load_results, write_report

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
    "feature_cards",
    "load_results",
    "read_study_data",
    "write_report",
]
