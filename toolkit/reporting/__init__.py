"""The report: five claims assessed, figures drawn, one self-contained page. No torch."""

from rlgen_stats.toolkit.reporting.claims import CLAIM_COLUMNS, assess_claims, claims_table
from rlgen_stats.toolkit.reporting.figures import draw_figures
from rlgen_stats.toolkit.reporting.plotting import Graphic, Missing
from rlgen_stats.toolkit.reporting.report import load_results, write_report
from rlgen_stats.toolkit.reporting.verdicts import Claim, Verdict

__all__ = [
    "CLAIM_COLUMNS",
    "Claim",
    "Graphic",
    "Missing",
    "Verdict",
    "assess_claims",
    "claims_table",
    "draw_figures",
    "load_results",
    "write_report",
]
