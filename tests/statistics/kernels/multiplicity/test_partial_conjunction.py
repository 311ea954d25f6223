"""Partial conjunction: worst intersection over subsets, validity with one true task, refusals."""

import itertools

import numpy as np
import pytest
from scipy import stats

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels import (
    partial_conjunction,
)


@pytest.mark.parametrize("combine", ["bonferroni", "simes", "fisher"])
def test_partial_conjunction_is_the_worst_intersection(combine: str) -> None:
    """Against the definition: the largest combined p over all subsets of n - u + 1 tasks."""
    p = np.random.default_rng(2).uniform(size=(30, 5)) ** 3
    for u in (1, 3, 5):
        slow = []
        for row in p:
            values = []
            for subset in itertools.combinations(np.sort(row), 5 - u + 1):
                s = np.sort(subset)
                if combine == "bonferroni":
                    values.append(min(1.0, len(s) * s[0]))
                elif combine == "simes":
                    values.append(min(1.0, (len(s) / np.arange(1, len(s) + 1) * s).min()))
                else:
                    values.append(stats.combine_pvalues(s, "fisher").pvalue)
            slow.append(max(values))
        np.testing.assert_allclose(partial_conjunction(p, u=u, combine=combine), slow, rtol=1e-9)
    assert np.isnan(partial_conjunction([[0.1, np.nan]], u=1, combine="fisher")).all()
    with pytest.raises(InputError, match="between 1 and the number of tasks 5, got 6"):
        partial_conjunction(p, u=6, combine=combine)


@pytest.mark.parametrize("combine", ["bonferroni", "simes", "fisher"])
def test_conjunction_is_valid_with_one_true_task(combine: str) -> None:
    """One task with an effect of any size is not two: p is at least uniform."""
    random = np.random.default_rng(67)
    p = random.random((6000, 4))
    p[:, 2] = 1e-12
    result = partial_conjunction(p, u=2, combine=combine)
    assert (result <= 0.05).mean() < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 6000)
    order = [3, 1, 0, 2]
    np.testing.assert_allclose(partial_conjunction(p[:, order], u=2, combine=combine), result, rtol=1e-12)


def test_refusals() -> None:
    with pytest.raises(InputError, match="combine must be bonferroni"):
        partial_conjunction([[0.1, 0.2]], u=1, combine="stouffer")
    with pytest.raises(InputError, match=r"got shape \(2,\)"):
        partial_conjunction([0.1, 0.2], u=1, combine="fisher")
