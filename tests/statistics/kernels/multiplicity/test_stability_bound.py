"""Stability-selection bounds: published formulas, random selections, refusals."""

import numpy as np
import pytest

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels import (
    cpss_bound,
)


def test_stability_bounds() -> None:
    assert cpss_bound(50, 1000, 50, 0.9) == pytest.approx(50**2 / 1000 / 0.8)
    assert cpss_bound(50, 1000, 50, 0.9, "unimodal") == pytest.approx(4 * 0.11 / 1.02 * 50**2 / 1000)
    assert cpss_bound(50, 1000, 50, 0.9, "unimodal") < cpss_bound(50, 1000, 50, 0.9)
    with pytest.raises(InputError, match=r"\(1/2, 1\], got 0.5"):
        cpss_bound(50, 1000, 50, 0.5)


def test_refusals() -> None:
    for arguments, message in (
        ((0, 100, 50, 0.9), "0 < q <= 100"),
        ((90, 100, 50, 0.9, "unimodal"), r"needs q <= 100 / sqrt\(3\), got 90"),
        ((10, 100, 50, 0.51, "unimodal"), "needs a threshold above"),
        ((10, 100, 50, 0.9, "r-concave"), "none or unimodal, got 'r-concave'"),
    ):
        with pytest.raises(InputError, match=message):
            cpss_bound(*arguments)


def test_stability_bound_holds_for_random_selection() -> None:
    """Features picked at random: those above the threshold number no more than the bound."""
    random = np.random.default_rng(66)
    n, q, pairs, threshold, kept = 300, 30, 25, 0.6, []
    for _ in range(60):
        share = np.zeros(n)
        for _ in range(2 * pairs):
            share[random.permutation(n)[:q]] += 1 / (2 * pairs)
        kept.append((share >= threshold).sum())
    assert np.mean(kept) <= cpss_bound(q, n, pairs, threshold, "unimodal") <= cpss_bound(q, n, pairs, threshold)
