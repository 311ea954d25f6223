"""Matched random sets: each member takes one of its nearest candidates that no other member of its set has taken."""

from __future__ import annotations

import numpy as np

from rlgen_stats.toolkit.statistics.kernels.numerics import IntArray


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
