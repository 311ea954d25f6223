"""Error rates stay where they are promised, and each guard is needed: the naive estimator falls outside the band."""

import numpy as np
import pytest

from tests.calibration.experiments import EXPERIMENTS, SEED, Experiment
from tests.calibration.rows import Row, mean_row, rate_row

KNOWN_SLACK = 0.1
"""Largest deviation allowed for estimators known to be off, so that a change for the worse shows."""

LONG = {
    *("outcome_selection", "planned_power", "selection_more_data", "specificity_verdicts", "compared"),
    *("timing_verdicts", "trials", "pooled"),
}
"""Left to ``make slow``: experiments of five seconds and more, of what others ask too."""


@pytest.mark.parametrize(
    "experiment",
    [pytest.param(one, id=one.name, marks=[pytest.mark.slow] * (one.name in LONG)) for one in EXPERIMENTS],
)
def test_error_rates(experiment: Experiment) -> None:
    for row in experiment.run(1, SEED):
        if row.known:
            assert abs(row.observed - row.nominal) <= KNOWN_SLACK, row
        else:
            assert row.passed, row
        assert row.bites, row


def test_a_band_is_three_binomial_errors() -> None:
    row = rate_row("x", 0.05, 50, 1000, "")
    assert (row.low, row.high) == pytest.approx((0.05 - 0.020676, 0.05 + 0.020676), abs=1e-5)
    assert row.passed
    assert not rate_row("x", 0.05, 71, 1000, "").passed
    assert not rate_row("x", 0.05, 29, 1000, "").passed
    assert rate_row("x", 0.05, 29, 1000, "", at_most=True).passed
    assert not rate_row("x", 0.05, 50, 1000, "", naive=0.06).bites


def test_a_mean_is_held_to_its_own_error() -> None:
    values = np.random.default_rng(0).normal(0.0, 1.0, 400)
    assert mean_row("x", 0.0, values.tolist(), "").passed
    assert not mean_row("x", 0.3, values.tolist(), "").passed
    assert mean_row("x", 0.3, values.tolist(), "", at_most=True).passed
    assert Row("x", 0, 1, 0, 0, float("nan"), "", "").bites
