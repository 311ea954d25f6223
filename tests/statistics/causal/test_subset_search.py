"""The search for a smaller set."""

from __future__ import annotations

import numpy as np
import pytest

from rlgen_stats.toolkit.statistics.causal.subset_search import lazy_greedy

N = 12


class Coverage:
    """A submodular value: what share of 200 prompts at least one member answers."""

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.covers = draw.random((N, 200)) < draw.uniform(0.02, 0.4, N)[:, None]
        self.asked: list[tuple[int, ...]] = []

    def __call__(self, members: tuple[int, ...]) -> float:
        self.asked.append(members)
        return float(self.covers[list(members)].any(axis=0).mean())

    @property
    def alone(self) -> dict[int, float]:
        return {k: float(self.covers[k].mean()) for k in range(N)}


def eager(value: Coverage, threshold: float) -> list[int]:
    """Greedy search that measures everything."""
    order: list[int] = []
    while not order or value(tuple(order)) < threshold:
        left = [k for k in range(N) if k not in order]
        order.append(max(left, key=lambda k: value((*order, k))))
    return order


@pytest.mark.parametrize("seed", range(8))
def test_lazy_choices_are_the_eager_ones_for_fewer_measurements(seed: int) -> None:
    lazy, plain = Coverage(seed), Coverage(seed)
    search = lazy_greedy(lazy.alone, lazy, threshold=0.7, budget=10_000)
    assert list(search.order) == eager(plain, 0.7)
    assert len(lazy.asked) < 0.6 * len(plain.asked)
    assert search.values == pytest.approx([lazy(search.order[:n]) for n in range(1, len(search.order) + 1)])
    assert search.values[-1] >= 0.7
    assert all(value < 0.7 for value in search.values[:-1])
    assert sorted((*search.order, *search.left)) == list(range(N))


def test_a_spent_budget_leaves_the_best_known_gains() -> None:
    value = Coverage(3)
    search = lazy_greedy(value.alone, value, threshold=2.0, budget=0)
    assert list(search.order) == sorted(value.alone, key=lambda k: -value.alone[k])
    assert len(value.asked) == N - 1, "one measurement a member added, the first being known"
    value = Coverage(3)
    lazy_greedy(value.alone, value, threshold=2.0, budget=5)
    assert len(value.asked) <= 5 + N - 1


def test_members_that_repeat_another_come_last() -> None:
    """Order of single values would take both twins first."""
    covers = {1: {1, 2, 3, 4}, 2: {1, 2, 3, 4}, 3: {5, 6, 7}}

    def value(members: tuple[int, ...]) -> float:
        return len(set.union(*(covers[k] for k in members)))

    search = lazy_greedy({k: value((k,)) for k in covers}, value, threshold=7, budget=9)
    assert search.order == (1, 3)
    assert search.left == (2,)
