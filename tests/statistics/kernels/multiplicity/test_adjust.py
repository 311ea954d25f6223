"""Corrections against their definitions: step-up by hand, closed testing over all subsets, two stages."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from statsmodels.stats.multitest import multipletests

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels import (
    adjust,
    family_size,
    storey,
)
from tests.oracles import slow

METHODS = ("bonferroni", "holm", "hommel", "bh", "by", "bky", "storey")
P_VALUES = st.lists(st.floats(1e-12, 1) | st.integers(1, 20).map(lambda k: k / 20), min_size=1, max_size=7)
QUICK = settings(max_examples=60, deadline=None, derandomize=True)


@QUICK
@given(P_VALUES)
def test_equal_their_definitions(p: list[float]) -> None:
    close = {"rtol": 1e-9, "atol": 1e-300}
    np.testing.assert_allclose(adjust(p, method="bh"), slow.bh(p), **close)
    np.testing.assert_allclose(adjust(p, method="by"), slow.by(p), **close)
    np.testing.assert_allclose(adjust(p, method="holm"), slow.holm(p), **close)
    np.testing.assert_allclose(adjust(p, method="bonferroni"), [min(1.0, len(p) * x) for x in p], **close)
    np.testing.assert_allclose(adjust(p, method="bky", alpha=0.1), slow.bky(p, 0.1), **close)
    np.testing.assert_allclose(adjust(p, method="hommel"), slow.hommel(p), **close)


def test_hommel_equals_the_quadratic_algorithm_and_lies_between_holm_and_raw() -> None:
    random = np.random.default_rng(40)
    for n in (2, 30, 400):
        for power in (1, 3):
            p = random.random(n) ** power
            np.testing.assert_allclose(
                adjust(p, method="hommel"), np.minimum(1, multipletests(p, method="hommel")[1]), rtol=1e-9
            )
    result = adjust(p, method="hommel")
    assert (result >= p).all()
    assert (result <= adjust(p, method="holm") + 1e-12).all()


@QUICK
@given(P_VALUES, st.sampled_from(METHODS), st.randoms(use_true_random=False))
def test_order_shape_and_holes_do_not_matter(p: list[float], method: str, random: object) -> None:
    result = adjust(p, method=method)
    order = np.random.default_rng(len(p)).permutation(len(p))
    np.testing.assert_allclose(adjust(np.array(p)[order], method=method), result[order], rtol=1e-12)
    holed = np.array([*p, np.nan]).reshape(1, -1, 1)
    again = adjust(holed, method=method)
    assert again.shape == holed.shape
    assert np.isnan(again[0, -1, 0])
    np.testing.assert_array_equal(again.ravel()[:-1], result)
    assert ((result >= 0) & (result <= 1)).all()
    ranked = np.argsort(p, kind="stable")
    assert (np.diff(result[ranked]) >= -1e-15).all()


def test_family_size_counts_what_is_left_out() -> None:
    size = family_size([[0.1, np.nan], [0.3, np.nan], [1.0, 0.0]])
    assert (size.n_tested, size.n_missing) == (4, 2)


def test_storey_never_estimates_that_nothing_is_null() -> None:
    """Three p-values below the threshold say little about the share of nulls; q must not become 0."""
    result = storey([0.1, 0.2, 0.3])
    assert result.pi0 == pytest.approx(2 / 3)
    np.testing.assert_allclose(result.q_value, [0.2, 0.2, 0.2])
    assert np.isnan(storey([np.nan]).pi0)
    with pytest.raises(InputError, match=r"in \(0, 1\), got 1"):
        storey([0.5], threshold=1)


def test_rates_with_dead_features_and_dependent_blocks() -> None:
    """Error rates over 400 families with 30% dead and 10% true features; Storey's needs them independent."""
    random = np.random.default_rng(41)
    true = np.arange(100) < 10
    for shared, methods in ((0.5, ("bh", "holm", "hommel")), (0.0, ("bh", "bky", "storey", "holm", "hommel"))):
        rates: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(400):
            z = np.sqrt(shared) * np.repeat(random.normal(size=10), 10) + np.sqrt(1 - shared) * random.normal(size=100)
            p = norm.sf(random.permutation(z) + 3.5 * true)
            p[random.random(100) < 0.3] = np.nan
            for name, result in rates.items():
                called = np.nan_to_num(adjust(p, method=name, alpha=0.1), nan=1) <= 0.1
                wrong = (called & ~true).sum()
                result.append(float(wrong > 0) if name in ("holm", "hommel") else wrong / max(1, called.sum()))
        for name, result in rates.items():
            assert 0.01 < np.mean(result) < 0.1 + 3 * np.std(result) / np.sqrt(400), (name, shared)


def test_corrections_explain_bad_input() -> None:
    with pytest.raises(InputError, match=r"p-values lie in \[0, 1\]"):
        adjust([0.5, 1.2], method="bh")
    with pytest.raises(InputError, match="no correction is called 'fdr'"):
        adjust([0.5], method="fdr")
    assert np.isnan(adjust([np.nan], method="bh")).all()
