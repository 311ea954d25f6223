"""The report: five claims assessed, figures drawn, one self-contained page. No torch.

Reporting formats, it decides nothing: it looks values up in results, rounds them and chooses words by them. Estimates,
intervals, p-values and verdicts come from :mod:`rlgen_stats.toolkit.statistics`; no module here imports its kernels,
scipy or another source of tests and quantiles (``tests/reporting/test_decides_nothing.py``). What is summarised here
is only described: ranges and medians of arms that are too many to list.
"""

from rlgen_stats.toolkit.reporting.claims.assess import CLAIM_COLUMNS, assess_claims, claims_table
from rlgen_stats.toolkit.reporting.claims.claim import Claim
from rlgen_stats.toolkit.reporting.facts import read_study_data
from rlgen_stats.toolkit.reporting.feature_cards import FeatureCard, feature_cards
from rlgen_stats.toolkit.reporting.figures.draw import draw_figures
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
    "feature_cards",
    "load_results",
    "read_study_data",
    "write_report",
]
