"""Matched random sets: each member takes one of its nearest candidates that no other member of its set has taken."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.draws import stream
from rlgen_stats.toolkit.statistics.kernels.numerics import IntArray

WINDOW: Final = 0.1
"""Share of the candidates, those nearest to a member, among which its match is drawn."""
MIN_WINDOW: Final = 10
"""Fewest candidates among which a match is drawn: with fewer the random sets would hardly differ."""


def nearest_free(nearest: IntArray, places: IntArray, n_candidates: int) -> IntArray:
    """Draw sets without replacement, member after member, from candidates in order of their distance.

    Parameters
    ----------
    nearest
        [member, place]: candidates (0 to ``n_candidates`` - 1) of each member, nearest first, none twice in a row.
    places
        [draw, member]: which of the candidates still free in this draw a member takes; 0 is the nearest. With m members
        drawn before it, that many candidates may be taken, so that place + m must lie inside ``nearest``.
    n_candidates
        Candidates in all.

    Returns
    -------
    IntArray
        [draw, member] candidates, distinct within a draw. Members are served in order of the rows of ``nearest``.

    Examples
    --------
    >>> nearest_free(np.array([[2, 0, 1], [2, 1, 0]]), np.array([[0, 0], [1, 1]]), 3)
    array([[2, 1],
           [0, 1]])
    """
    draws = np.arange(len(places))
    taken = np.zeros((len(places), n_candidates), dtype=bool)
    drawn = np.empty(places.shape, dtype=np.int64)
    for member, candidates in enumerate(nearest):
        n_free = np.cumsum(~taken[:, candidates], axis=1)
        # The first place up to which there are as many free candidates as asked for is itself free.
        drawn[:, member] = candidates[np.argmax(n_free > places[:, member, None], axis=1)]
        taken[draws, drawn[:, member]] = True
    return drawn


def matched_on_rate(rate: Any, members: Any, n_sets: int, *, seed: int) -> tuple[IntArray, int]:
    """Random sets of candidates whose firing rates, or numbers of firing prompts, are those of the members.

    Parameters
    ----------
    rate
        [candidate], ascending.
    members
        [member]: their rates. Members are served in this order.
    n_sets
        Number of sets.
    seed
        Of the draws; draw b depends on (seed, b) alone.

    Returns
    -------
    IntArray
        [set, member] candidates, distinct within a set.
    int
        Largest distance of a match from its member, in ranks of the rate.

    Raises
    ------
    InputError
        If there are fewer than two candidates a member: the sets would be much the same.

    Examples
    --------
    >>> sets, _ = matched_on_rate(np.arange(100), [3, 90], 50, seed=0)
    >>> bool((sets[:, 0] < 20).all() and (sets[:, 1] > 70).all())
    True
    """
    values, wanted = np.asarray(rate), np.asarray(members)
    n, m = len(values), len(wanted)
    if n < 2 * m:
        raise InputError(f"random sets of {m} need at least {2 * m} candidates, got {n}; choose fewer members.")
    distance = np.abs(np.arange(n) - np.searchsorted(values, wanted)[:, None])
    window = max(int(WINDOW * n), MIN_WINDOW)
    # Up to m - 1 of the nearest are taken when the last member is drawn, so that the window must reach past them.
    nearest = np.argsort(distance, axis=1, kind="stable")[:, : window + m - 1]
    n_choices = np.minimum(window, n - np.arange(m))
    places = np.stack([stream(seed, b).integers(n_choices) for b in range(n_sets)])
    drawn = nearest_free(nearest, places, n)
    return drawn, int(distance[np.arange(m), drawn].max()) if m else 0
