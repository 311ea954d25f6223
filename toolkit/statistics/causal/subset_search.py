"""Which smaller set suffices: greedy search that measures as few sets as it can."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Search:
    """A greedy search.

    Attributes
    ----------
    order
        Members in the order in which they were added.
    values
        Value of the first 1, 2, ... members.
    left
        Members never added, best last known gain first.
    """

    order: tuple[int, ...]
    values: tuple[float, ...]
    left: tuple[int, ...]


def lazy_greedy(
    alone: Mapping[int, float], value: Callable[[tuple[int, ...]], float], *, threshold: float, budget: int
) -> Search:
    """Add the member that gains most, again and again, until the value reaches a threshold.

    Parameters
    ----------
    alone
        Value of every member alone.
    value
        Value of a set; expensive.
    threshold
        Value at which the search stops.
    budget
        Sets whose only use is to choose the next member; once they are spent, the best known gain decides.

    Notes
    -----
    A gain is measured again only while it may still be the largest (lazy evaluation: Minoux 1978,
    doi:10.1007/BFb0006528): the same choice as measuring all where gains shrink as the set grows, as they do for
    features that carry the same information; a gain that first appears beside others may be missed.

    Examples
    --------
    >>> worth = {1: 0.5, 2: 0.4, 3: 0.1}
    >>> lazy_greedy(worth, lambda members: sum(worth[k] for k in members), threshold=0.8, budget=9).order
    (1, 2)
    """
    gains = dict(alone)
    order: list[int] = []
    values: list[float] = []
    current, spent = 0.0, 0
    measured = set(gains)
    while gains and (not values or current < threshold):
        best = max(gains, key=gains.__getitem__)
        while best not in measured and spent < budget:
            gains[best] = value((*order, best)) - current
            spent += 1
            measured.add(best)
            best = max(gains, key=gains.__getitem__)
        order.append(best)
        current = current + gains[best] if best in measured else value(tuple(order))
        values.append(current)
        del gains[best]
        measured = set()
    return Search(tuple(order), tuple(values), tuple(sorted(gains, key=lambda k: -gains[k])))
