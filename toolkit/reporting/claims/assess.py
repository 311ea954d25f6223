"""All five claims assessed, and as a table of text."""

from __future__ import annotations

import math
from typing import Final

from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.claims.c1_specificity import assess_specificity
from rlgen_stats.toolkit.reporting.claims.c2_timing import assess_timing
from rlgen_stats.toolkit.reporting.claims.c3_selection import assess_selection
from rlgen_stats.toolkit.reporting.claims.c4_c5_causal import assess_amplification, assess_disabling
from rlgen_stats.toolkit.reporting.claims.claim import Claim
from rlgen_stats.toolkit.reporting.formatting import DASH, count, fixed, interval, p_text
from rlgen_stats.toolkit.reporting.result_lookup import Results, tidy

CLAIM_COLUMNS: Final = ("Claim", "Statement", "Verdict", "Estimate", "Interval", "p")
"""Headings of :func:`claims_table`."""


def assess_claims(results: Results, spec: StudySpec) -> tuple[Claim, ...]:
    """Answer C1 to C5 from a study's results; a missing or unusable analysis gives NOT_ESTIMABLE, never an error.

    Parameters
    ----------
    results
        Results groups by name, with the layouts of :mod:`rlgen_stats.schemas.layout`; any may be missing.
    spec
        The study: its alpha, its contrasted runs, its runs per arm.

    Returns
    -------
    tuple of Claim
        C1, C2, C3, C4, C5; the rules of their verdicts are in :mod:`rlgen_stats.toolkit.statistics.claim_verdicts`.

    Examples
    --------
    >>> from rlgen_stats.toolkit.study import read_spec  # doctest: +SKIP
    >>> assess_claims({}, read_spec("runs/demo"))[0].verdict  # doctest: +SKIP
    <Verdict.NOT_ESTIMABLE: 'NOT_ESTIMABLE'>
    """
    results = tidy(results)
    return (
        assess_specificity(results, spec),
        assess_timing(results, spec),
        assess_selection(results, spec),
        assess_disabling(results, spec),
        assess_amplification(results, spec),
    )


def estimate_text(claim: Claim) -> str:
    """The estimate with its unit."""
    if not math.isfinite(claim.estimate):
        return DASH
    if claim.unit == "features":
        return count(claim.estimate, "feature")
    return f"{fixed(claim.estimate, sign=True)} points"


def interval_text(claim: Claim) -> str:
    """The interval without its unit."""
    digits = 0 if claim.unit == "features" else 1
    return interval(claim.low, claim.high, digits, sign=digits == 1)


def claims_table(claims: tuple[Claim, ...]) -> list[tuple[str, ...]]:
    """One row of text per claim, with the columns of ``CLAIM_COLUMNS``.

    Examples
    --------
    >>> claims_table(())
    []
    """
    return [(c.id, c.statement, c.verdict.value, estimate_text(c), interval_text(c), p_text(c.p_value)) for c in claims]
