"""Experiments on means over dictionaries: how often the interval misses, whatever the dictionaries differ by."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.toolkit.statistics.kernels import pooled_mean
from tests.calibration.rows import Row, rate_row

ALPHA = 0.05
SHAPES: Final = {
    "normal": lambda random, size: random.standard_normal(size),
    "t with 3 degrees of freedom": lambda random, size: random.standard_t(3.0, size) / np.sqrt(3.0),
    "skewness 1": lambda random, size: random.gamma(4.0, 1.0, size) / 2.0 - 2.0,
    "skewness 2": lambda random, size: random.exponential(1.0, size) - 1.0,
}
"""Effects of dictionaries, of mean 0 and variance 1."""


def pooled(scale: int, seed: int) -> list[Row]:
    """Two to ten dictionaries that do not differ, differ as much as sampling does, or far more; and not normal ones."""
    cells = [("normal", n, ratio) for n in (2, 3, 5, 10) for ratio in (0.0, 1.0, 5.0)]
    cells += [(shape, 3, ratio) for shape in list(SHAPES)[1:] for ratio in (1.0, 5.0)]
    rows = []
    for shape, n_dictionaries, ratio in cells:
        missed, naive, trials = 0, 0, 0
        for n_clusters, noise in ((10, 0.05), (25, 0.95), (100, 0.5)):
            for part in range(scale):
                random = np.random.default_rng([seed, 41, len(shape), n_dictionaries, int(ratio), n_clusters, part])
                y = tables(random, shape, n_dictionaries, ratio, n_clusters, noise, 500)
                missed += _misses(y)
                naive += _misses(y.mean(axis=0)[None])
                trials += y.shape[-1]
        differ = {0.0: "that do not differ", 1.0: "that differ as sampling does", 5.0: "five times as far apart"}
        rows.append(
            rate_row(
                f"interval over {n_dictionaries} dictionaries {differ[ratio]}, {shape}, misses",
                ALPHA,
                missed,
                trials,
                f"{trials:,} tables, 10 to 100 clusters",
                at_most=True,
                known="few dictionaries, very skewed effects" if (shape, ratio) == ("skewness 2", 5.0) else "",
                **({"naive": naive / trials, "naive_name": "interval over clusters only"} if ratio == 5.0 else {}),
            )
        )
    return rows


def tables(
    random: np.random.Generator,
    shape: str,
    n_dictionaries: int,
    ratio: float,
    n_clusters: int,
    noise: float,
    n_tables: int,
) -> NDArray[np.float64]:
    """[dictionary, cluster, table] of mean 0, whose mean over dictionaries has a standard error of 1 over clusters.

    Dictionaries spread by ``ratio``; a share ``noise`` of the squared error is of each dictionary's own.
    """
    own = ratio * SHAPES[shape](random, (n_dictionaries, 1, n_tables))
    clusters = np.sqrt((1 - noise) * n_clusters) * random.standard_normal((n_clusters, n_tables))
    rest = np.sqrt(noise * n_clusters * n_dictionaries) * random.standard_normal((n_dictionaries, n_clusters, n_tables))
    return np.asarray(own + clusters + rest)


def _misses(y: NDArray[np.float64]) -> int:
    result = pooled_mean(y, alpha=ALPHA)
    return int(((result.low > 0) | (result.high < 0)).sum())
