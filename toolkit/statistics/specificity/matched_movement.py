"""Runs compared where they are equally far from base: which checkpoints' dictionaries, and with which weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

MATCHED_RATIO: Final = 1.25
"""Largest ratio of two distances from base still called equal: counts of specific features grow with the distance."""


@dataclass(frozen=True)
class Mixture:
    """Checkpoints of one run that stand, weighted, for the run at some distance from base."""

    weights: Mapping[str, float]
    """Model -> weight; they sum to one."""
    distance: float
    """From base; that of the nearest checkpoint where the distance asked for lies just outside the known ones."""

    def describe(self) -> str:
        """Its checkpoints, the shares of two."""
        if len(self.weights) == 1:
            return next(iter(self.weights))
        return " and ".join(f"{weight:.0%} {model}" for model, weight in self.weights.items())


def at_distance(distances: Mapping[str, float], level: float) -> Mixture | None:
    """The mixture of the two checkpoints on either side of ``level``, linear in the logarithm of the distance.

    Parameters
    ----------
    distances
        Model -> distance from base; models without a positive one are left out.
    level
        Distance asked for.

    Returns
    -------
    Mixture or None
        The nearest checkpoint alone if all lie on one side and it is within ``MATCHED_RATIO``; None if it is not.

    Examples
    --------
    >>> at_distance({"sft@3": 0.1, "sft@150": 0.4}, 0.2).describe()
    '50% sft@3 and 50% sft@150'
    >>> at_distance({"sft@30": 0.5}, 0.2) is None
    True
    """
    known = sorted((d, model) for model, d in distances.items() if math.isfinite(d) and d > 0)
    if not known or not level > 0:
        return None
    beyond = [i for i, (d, _) in enumerate(known) if d >= level]
    if not beyond or beyond[0] == 0:
        d, model = known[-1] if not beyond else known[0]
        return Mixture({model: 1.0}, d) if equal(d, level) else None
    (near, first), (far, second) = known[beyond[0] - 1 : beyond[0] + 1]
    share = float(np.log(level / near) / np.log(far / near))
    return Mixture({model: w for model, w in ((first, 1 - share), (second, share)) if w > 0}, level)


def equal(*distances: float) -> bool:
    """Whether distances from base, all positive, are within a factor ``MATCHED_RATIO``."""
    return min(distances) > 0 and max(distances) <= MATCHED_RATIO * min(distances)


def matched(runs: Mapping[str, Mapping[str, float]]) -> tuple[float, dict[str, Mixture | None]]:
    """The largest distance that every run reaches, and every run there.

    Parameters
    ----------
    runs
        Run -> model -> distance from base, of the checkpoints that have a dictionary with base.

    Returns
    -------
    float
        The smallest of the runs' largest distances; NaN if a run has none.
    dict
        Run -> mixture, or None where all its checkpoints are farther.
    """
    reached = [max((d for d in of_run.values() if math.isfinite(d)), default=math.nan) for of_run in runs.values()]
    level = min(reached) if reached and all(map(math.isfinite, reached)) else math.nan
    return level, {run: at_distance(of_run, level) for run, of_run in runs.items()}


def checkpoint_to_add(distances: Mapping[str, float], level: float) -> str | None:
    """The checkpoint a dictionary is missing of: the nearest to ``level`` that is not farther than equal, if any.

    Parameters
    ----------
    distances
        Model -> distance from base, of all checkpoints of the run.
    level
        Distance asked for.
    """
    near = {m: d for m, d in distances.items() if math.isfinite(d) and 0 < d <= MATCHED_RATIO * level}
    return min(near, key=lambda model: abs(math.log(near[model] / level)), default=None)
