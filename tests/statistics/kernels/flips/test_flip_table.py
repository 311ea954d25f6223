"""Groups of sign patterns and their Walsh-Hadamard transform."""

import numpy as np
import pytest

from rlgen_stats.toolkit.statistics.kernels import sign_flips
from rlgen_stats.toolkit.statistics.kernels.flips.flip_table import flip_count, flip_table, walsh_hadamard
from tests.oracles import slow


@pytest.mark.parametrize(("n", "n_resamples"), [(13, 999), (40, 63), (200, 1000), (7, 10)])
def test_flips_are_a_group_that_does_not_depend_on_other_units(n: int, n_resamples: int) -> None:
    table = flip_table(n, n_resamples, seed=4)
    index = np.arange(len(table))[:, None]
    patterns = 1.0 - 2.0 * (np.bitwise_count(index & table.codes) & 1)
    assert len(table) == len(patterns) == flip_count(n, n_resamples) > n_resamples
    assert (patterns[0] == 1).all()
    known = {row.tobytes() for row in patterns}
    for i in (1, 5, 11):
        assert {row.tobytes() for row in patterns * patterns[i]} == known
    longer = flip_table(n + 50, n_resamples, seed=4, exact=False)
    if not table.exhaustive:
        np.testing.assert_array_equal(longer.codes[:n], table.codes)
        np.testing.assert_array_equal(patterns, slow.flip_group(sign_flips(n, 0, table.n_generators, seed=4)))


@pytest.mark.parametrize("m", [1, 4, 5, 6, 10, 11])
def test_transform_is_the_sum_over_signs(m: int) -> None:
    cells = np.random.default_rng(m).normal(size=(2**m, 3))
    index = np.arange(2**m)
    signs = (-1.0) ** np.array([[bin(a & b).count("1") for b in index] for a in index[:64]])
    np.testing.assert_allclose(walsh_hadamard(cells.copy())[:64], signs @ cells, atol=1e-11)
