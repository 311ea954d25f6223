"""Whether what changed in a feature does the same in both models: put into base, and taken out of the RL model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import xarray as xr

from rlgen_stats.toolkit.statistics.causal.mediated_share import SET, Curve
from rlgen_stats.toolkit.statistics.causal.outcome_table import DIRECTIONS
from rlgen_stats.toolkit.statistics.kernels import bounded_interval

EQUIVALENT: Final = "EQUIVALENT"
"""The two effects differ by less than the margin."""
DIFFERENT: Final = "DIFFERENT"
"""They differ, and are not shown to by less than the margin."""
UNDETERMINED: Final = "UNDETERMINED"
"""Neither is shown."""
NO_EFFECT_SHOWN: Final = "NO_EFFECT_SHOWN"
"""It is not shown to do anything in either model, so that there is nothing to compare."""


def causal_equivalence(curves: Sequence[Curve], *, alpha: float, margin: float) -> xr.Dataset | None:
    """Compare what the same copied change does in both models.

    Parameters
    ----------
    curves
        Of one dictionary, one a direction, on the same prompts; the set's point is read.
    alpha
        Level of the tests.
    margin
        Difference of effects on accuracy below which they count as the same.

    Returns
    -------
    Dataset or None
        [direction]: ``effect`` on accuracy of lifting base's features (amplify) and of lowering the RL model's
        (disable), with ``effect_low`` and ``effect_high`` of level 1 - alpha / 2, as two are looked at. Scalars:
        ``difference`` = effect in base + effect in the RL model, 0 where they are opposite and equal, with
        ``difference_low``, ``difference_high`` of level 1 - alpha and ``inner_low``, ``inner_high`` of level
        1 - 2 alpha; ``state``: ``EQUIVALENT``, ``DIFFERENT``, ``UNDETERMINED`` or ``NO_EFFECT_SHOWN``. None where
        either model was not edited so.

    Notes
    -----
    ``lift`` adds sum_k (f_rl,k - f_base,k) d_k to base, ``lower`` takes the same off the RL model, the features of
    both read on the text at hand. Differences are paired by prompt and seed; the unit is the cluster of prompts
    (:func:`bounded_interval`). Equivalence is two one-sided tests: the interval of level 1 - 2 alpha lies within the
    margin (Schuirmann 1987, doi:10.1007/BF01068419). It needs an effect in one of the models: what does nothing does
    the same everywhere. Accuracy is bounded: base can gain only where it is wrong, and the RL model lose only where
    it is right, so that ``DIFFERENT`` need not mean another mechanism.
    """
    changes = {}
    for curve in curves:
        point = next((point for point in curve.points if point.label == SET), None)
        if point is not None and point.arm in curve.changes:
            changes[curve.direction] = np.asarray(curve.changes[point.arm], dtype=np.float64)
    if set(changes) != set(DIRECTIONS):
        return None
    codes = np.unique(curves[0].cluster, return_inverse=True)[1]
    each = np.stack([changes[direction] for direction in DIRECTIONS], axis=1)
    effect, low, high = bounded_interval(each, codes, alpha=alpha / 2)
    both = each.sum(axis=1, keepdims=True)
    difference, outer_low, outer_high = (float(x[0]) for x in bounded_interval(both, codes, alpha=alpha, limit=2.0))
    _, inner_low, inner_high = (float(x[0]) for x in bounded_interval(both, codes, alpha=2 * alpha, limit=2.0))
    if not ((low > 0) | (high < 0)).any():
        state = NO_EFFECT_SHOWN
    elif -margin < inner_low and inner_high < margin:
        state = EQUIVALENT
    else:
        state = DIFFERENT if outer_low > 0 or outer_high < 0 else UNDETERMINED
    by_direction = {"effect": effect, "effect_low": low, "effect_high": high}
    scalars = {"difference": difference, "difference_low": outer_low, "difference_high": outer_high}
    return xr.Dataset(
        {name: ("direction", values) for name, values in by_direction.items()}
        | scalars
        | {"inner_low": inner_low, "inner_high": inner_high, "state": state},
        coords={"direction": list(DIRECTIONS)},
        attrs={
            "test": "two one-sided tests of lift + lower, cluster intervals",
            "null": "the effects differ by the margin or more",
            "unit": "prompt cluster",
            "alpha": alpha,
            "margin": margin,
            "n_prompts": len(each),
        },
    )
