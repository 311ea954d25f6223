"""Matched draws against a loop over draws and members."""

from __future__ import annotations

import numpy as np
import pytest

from rlgen_stats.toolkit.statistics.core.nearest_draws import nearest_free


@pytest.mark.parametrize("n_candidates", [6, 40])
def test_members_take_free_candidates_as_in_a_loop(n_candidates: int) -> None:
    random = np.random.default_rng(n_candidates)
    n_members, n_draws = 5, 30
    nearest = np.array([random.permutation(n_candidates) for _ in range(n_members)])
    places = np.stack([random.integers(n_candidates - m, size=n_draws) for m in range(n_members)], axis=1)
    drawn = nearest_free(nearest, places, n_candidates)
    for draw in range(n_draws):
        taken: list[int] = []
        for member in range(n_members):
            free = [candidate for candidate in nearest[member] if candidate not in taken]
            taken.append(int(free[places[draw, member]]))
        assert drawn[draw].tolist() == taken
