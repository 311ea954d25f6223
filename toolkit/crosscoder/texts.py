"""Where texts begin and end in the activation store, and what is written there."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import POSITION, PROMPT, SOURCE


def text_bounds(tokens: xr.Dataset) -> NDArray[np.int64]:
    """First token and end of every text in store order: [text, 2].

    Parameters
    ----------
    tokens
        Labels of all tokens. A text is a run of one prompt and one source with positions that go up.
    """
    prompt, source, position = (np.asarray(tokens[name]) for name in (PROMPT, SOURCE, POSITION))
    new = (prompt[1:] != prompt[:-1]) | (source[1:] != source[:-1]) | (position[1:] <= position[:-1])
    starts = np.concatenate([[0], np.flatnonzero(new) + 1])
    return np.stack([starts, np.append(starts[1:], len(position))], axis=1).astype(np.int64)


def spread(n: int, most: int) -> NDArray[np.int64]:
    """At most ``most`` of the indices 0..n-1, evenly spread."""
    return np.unique(np.linspace(0, n - 1, num=min(n, most)).round().astype(np.int64))
