"""Where texts begin and end in the activation store."""

from __future__ import annotations

from typing import Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import POSITION, PROMPT, SOURCE

LABEL_BLOCK: Final = 1 << 20
"""Tokens whose labels are decoded at once."""


def text_bounds(tokens: xr.Dataset) -> NDArray[np.int64]:
    """First token and end of every text in store order: [text, 2].

    Parameters
    ----------
    tokens
        Labels of all tokens. A text is a run of one prompt and one source with positions that go up.
    """
    n = len(tokens[POSITION])
    starts = [np.zeros(1, dtype=np.int64)]
    for start in range(0, n, LABEL_BLOCK):  # one token more than a block: a change is seen between two tokens
        block = slice(start, start + LABEL_BLOCK + 1)
        prompt, source, position = (np.asarray(tokens[name][block]) for name in (PROMPT, SOURCE, POSITION))
        new = (prompt[1:] != prompt[:-1]) | (source[1:] != source[:-1]) | (position[1:] <= position[:-1])
        starts.append(np.flatnonzero(new) + start + 1)
    first = np.concatenate(starts)
    return np.stack([first, np.append(first[1:], n)], axis=1)


def spread(n: int, most: int) -> NDArray[np.int64]:
    """At most ``most`` of the indices 0..n-1, evenly spread."""
    return np.unique(np.linspace(0, n - 1, num=min(n, most)).round().astype(np.int64))
