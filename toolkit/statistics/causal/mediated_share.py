"""How much of what the whole site carries a few of its features carry: the effect of copying them, over the patch's.

Ceiling: the RL model's residual put into base at the edited positions, or base's into the RL model (``patch``). Points:
the features of the set, the K with the largest drift, and all, copied likewise (``lift`` into base, ``lower`` into the
RL model).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.toolkit.statistics.causal.controls import CALIPER, norm_difference
from rlgen_stats.toolkit.statistics.causal.outcome_table import DIRECTIONS, Direction, DirectionOutcomes, Floats
from rlgen_stats.toolkit.statistics.kernels import bounded_interval, pooled_mean

PATCH: Final = "patch"
"""Kind and name of the arm that copies the whole residual."""
SET: Final = "set"
"""Label of the point of the selected set."""
ALL: Final = "all"
"""Label of the point of all features."""
NEAREST: Final = "nearest"
"""Random sets of a point: those nearest in the norm of their edits, which come near enough to be comparable."""
RESCALED: Final = "rescaled"
"""The same, none of which comes near enough, so that their edits were given the norm of the point's."""
SETTLED: Final = 1e-4
"""Change of a ratio's interval at which its ends count as found."""
MOST_STEPS: Final = 200
"""Steps towards them at most: where the patch is barely shown an end lies far off."""


@dataclass(frozen=True)
class CurvePoint:
    """One set of features that is copied from the other model, and the arms that do it.

    Attributes
    ----------
    label
        ``set``, ``top-K`` or ``all``.
    n_features
        Its size.
    arm, random
        Names of its arm, and of those of its matched random sets.
    norm_ratio, random_norm_ratios
        Mean norm of each one's edit over that of the true difference between the models.
    rescaled
        Whether the random sets' edits were given the norm of the set's.
    """

    label: str
    n_features: int
    arm: str
    random: tuple[str, ...]
    norm_ratio: float
    random_norm_ratios: tuple[float, ...]
    rescaled: bool = False


@dataclass(frozen=True, eq=False)
class Curve:
    """The points of one dictionary in one direction, with what their arms change.

    Attributes
    ----------
    direction
        Which model is edited.
    points
        Sets that are copied.
    changes
        Name of an arm -> [target prompt] its accuracy minus the unedited model's; ``patch`` is the ceiling.
    cluster
        [target prompt] labels.
    """

    direction: Direction
    points: tuple[CurvePoint, ...]
    changes: Mapping[str, Floats]
    cluster: NDArray[np.str_]


def curve_of(points: Sequence[CurvePoint], outcomes: DirectionOutcomes) -> Curve:
    """The curve that one direction of a trial shows."""
    table = outcomes.table
    of_table = table.change(table.target)[0]
    changes = {condition.name: of_table[:, i] for i, condition in enumerate(table.conditions)}
    unedited = table.per_prompt(table.target)[0, table.unedited]
    changes |= {name: correct[table.target] - unedited for name, correct in outcomes.curve_correct.items()}
    return Curve(table.direction, tuple(points), changes, table.cluster[table.target])


def mediated_share(curves: Mapping[int, Sequence[Curve]], *, alpha: float) -> xr.Dataset | None:
    """Share of the full patch's effect that each point carries, in every dictionary and over all.

    Parameters
    ----------
    curves
        Number of the dictionary -> its curves, one a direction, on the same prompts in all dictionaries.
    alpha
        1 - coverage.

    Returns
    -------
    Dataset or None
        Layout ``mediated_share``; None where no patch has been run. Points are those of all dictionaries.

    Notes
    -----
    Effects are changes of accuracy on target prompts, paired by prompt and seed. A share is a ratio of two means over
    the same clusters of prompts; its interval holds every ratio r for which effect - r * patch effect may have mean 0
    (Fieller 1954, doi:10.1111/j.2517-6161.1954.tb00159.x), judged by :func:`pooled_mean`, so with the variance between
    dictionaries. It is never narrower than what would be open if effect and patch agreed on every prompt: the exact
    binomial bound on a difference not seen in as many independent prompts as these are worth, by the design effect of
    the patch (Korn and Graubard 1998, Survey Methodology 24, 193-201). Where the patch has no shown effect in the
    direction of the claim there is nothing to have a share in, and all shares are NaN.
    """
    numbers = list(curves)
    labels = list(dict.fromkeys(p.label for of_one in curves.values() for curve in of_one for p in curve.points))
    in_all = [
        label
        for label in labels
        if all(any(p.label == label for p in curve.points) for of_one in curves.values() for curve in of_one)
    ]
    n_random = max((len(p.random) for of_one in curves.values() for curve in of_one for p in curve.points), default=0)
    dataset = _empty(numbers, in_all, n_random)
    for direction in DIRECTIONS:
        of_direction = [curve for of_one in curves.values() for curve in of_one if curve.direction == direction]
        if numbers and len(of_direction) == len(numbers):
            _fill(dataset.sel(direction=direction), of_direction, in_all, alpha)
    if not np.isfinite(dataset["patch_effect"].values).any():
        return None
    return dataset.assign_attrs(
        test="Fieller interval of a ratio of cluster means, pooled over dictionaries",
        null="the features carry none of the effect of the whole residual",
        unit="prompt cluster",
        alpha=alpha,
        ranking="|mean difference of contribution, RL minus base|, on prompts that no trial uses",
    )


_POOLED: Final = ("effect", "share", "share_low", "share_high", "above_random", "above_low", "above_high")


def _empty(numbers: Sequence[int], labels: Sequence[str], n_random: int) -> xr.Dataset:
    shape = (len(DIRECTIONS), len(labels))
    each = (len(DIRECTIONS), len(numbers), len(labels))

    def unknown(dims: tuple[str, ...], sizes: tuple[int, ...]) -> tuple[tuple[str, ...], Floats]:
        return dims, np.full(sizes, np.nan)

    by_point, by_dictionary = ("direction", "point"), ("direction", "dictionary", "point")
    return xr.Dataset(
        {name: unknown(("direction",), shape[:1]) for name in ("patch_effect", "patch_low", "patch_high")}
        | {name: unknown(by_point, shape) for name in _POOLED}
        | {name: unknown(by_dictionary, each) for name in ("dictionary_share", "norm_ratio")}
        | {name: unknown((*by_dictionary, "random"), (*each, n_random)) for name in ("random_share", "random_norm")}
        | {"random_sets": (by_dictionary, np.full(each, "", dtype="<U8"))}
        | {"n_features": (by_dictionary[1:], np.zeros(each[1:], dtype=np.int64))},
        coords={"direction": list(DIRECTIONS), "dictionary": list(numbers), "point": list(labels)},
    )


def _fill(dataset: xr.Dataset, curves: Sequence[Curve], labels: Sequence[str], alpha: float) -> None:
    """Put one direction into its places; ``dataset`` is a view of them."""
    codes = np.unique(curves[0].cluster, return_inverse=True)[1]
    changes = [curve.changes for curve in curves]
    points = [[next(p for p in curve.points if p.label == label) for label in labels] for curve in curves]
    effects = np.stack([[of_one[p.arm] for p in row] for of_one, row in zip(changes, points, strict=True)])
    sign = -1.0 if curves[0].direction == "disable" else 1.0
    ratio = RatioToPatch(changes[0][PATCH], codes, sign=sign, alpha=alpha)
    random = [
        [np.stack([of_one[name] for name in p.random]) if p.random else None for p in row]
        for of_one, row in zip(changes, points, strict=True)
    ]
    above = np.stack(
        [
            [own if chance is None else own - chance.mean(axis=0) for own, chance in zip(of_own, row, strict=True)]
            for of_own, row in zip(effects, random, strict=True)
        ]
    )
    known = np.array([all(row[i] is not None for row in random) for i in range(len(labels))])
    values: dict[str, Any] = dict(zip(("patch_effect", "patch_low", "patch_high"), ratio.patch, strict=True))
    values |= {"effect": effects.mean(axis=(0, 2)), "dictionary_share": ratio.of(effects.mean(axis=2))}
    values |= dict(zip(("share", "share_low", "share_high"), ratio.interval(effects), strict=True))
    for name, value in zip(("above_random", "above_low", "above_high"), ratio.interval(above), strict=True):
        values[name] = np.where(known, value, np.nan)
    values["norm_ratio"] = [[p.norm_ratio for p in row] for row in points]
    for name, value in values.items():
        dataset[name].values[...] = value
    for d, row in enumerate(points):
        for i, point in enumerate(row):
            dataset["n_features"].values[d, i] = point.n_features
            chance = random[d][i]
            if chance is not None:
                dataset["random_sets"].values[d, i] = RESCALED if point.rescaled else NEAREST
                dataset["random_share"].values[d, i, : len(chance)] = ratio.of(chance.mean(axis=1))
                dataset["random_norm"].values[d, i, : len(chance)] = point.random_norm_ratios


class RatioToPatch:
    """Ratios of effects to the effect of the full patch, over the same prompts.

    Parameters
    ----------
    patch
        [prompt] change of accuracy that the patch makes.
    codes
        [prompt] clusters.
    sign
        Sign of the effect that is expected.
    alpha
        1 - coverage.

    Attributes
    ----------
    patch
        Mean effect of the patch, low and high: the interval of its arm. It is shown where this leaves out zero, and so
        does the interval that the ratios rest on.
    """

    def __init__(self, patch: Floats, codes: NDArray[np.int64], *, sign: float, alpha: float) -> None:
        self._patch, self._codes, self._alpha = patch, codes, alpha
        self.patch, self._unseen, self._shown = (float(patch.mean()), np.nan, np.nan), np.nan, False
        if codes.any():
            pooled = pooled_mean(patch[None], codes, alpha=alpha)
            mean, low, high = (float(end[0]) for end in bounded_interval(patch[:, None], codes, alpha=alpha))
            self.patch = (mean, low, high)
            self._shown = min(low, float(pooled.low)) > 0 if sign > 0 else max(high, float(pooled.high)) < 0
            of_one_prompt = patch.var(ddof=1) / len(patch)
            clustered = float(pooled.standard_error) ** 2
            # A patch that changes every prompt alike tells nothing of clusters, so each then counts as one prompt.
            inflation = max(clustered / of_one_prompt, 1.0) if of_one_prompt else len(patch) / len(np.unique(codes))
            self._unseen = 1 - (alpha / 2) ** (inflation / len(patch))

    def of(self, effects: Floats) -> Floats:
        """Ratios of mean effects [...]; NaN where the patch has no shown effect."""
        return effects / self.patch[0] if self._shown else np.full(effects.shape, np.nan)

    def interval(self, effects: Floats) -> tuple[Floats, Floats, Floats]:
        """Ratio of the mean over dictionaries and prompts of effects [dictionary, point, prompt], low and high."""
        table = effects.transpose(0, 2, 1)
        ratio = self.of(table.mean(axis=(0, 1)))
        if not self._shown:
            return ratio, ratio, ratio
        least = self._unseen / abs(self.patch[0])
        below, above = self._reach(table, ratio)
        return ratio, ratio - np.maximum(below, least), ratio + np.maximum(above, least)

    def _reach(self, table: Floats, ratio: Floats) -> Floats:
        """[side, point]: how far below and above a ratio the effect may still equal it times the patch's.

        A fixed point of the interval's half-width, over the patch, as a function of the ratio: it contracts because the
        patch has a shown effect, and its first step is the delta method.
        """
        sides, reach = np.array([[-1.0], [1.0]]), np.zeros((2, len(ratio)))
        for _ in range(MOST_STEPS):
            left = table[:, :, None] - (ratio + sides * reach) * self._patch[None, :, None, None]
            pooled = pooled_mean(left, self._codes, alpha=self._alpha)
            before, reach = reach, (pooled.high - pooled.mean) / abs(self.patch[0])
            if np.abs(reach - before).max(initial=0.0) < SETTLED:
                break
        return reach


@dataclass(frozen=True, kw_only=True)
class OfPatch:
    """What one set of features carries of the full patch's effect; shares are NaN where they are not known."""

    share: float
    """Over all dictionaries."""
    low: float
    high: float
    above: float
    """The same, less the mean of the random sets that are comparable; NaN where there are none."""
    above_low: float
    above_high: float
    random_sets: str
    """``nearest``, ``rescaled`` (in some dictionary), or empty: no random set is comparable."""


def of_patch(dataset: xr.Dataset, direction: str, point: str = SET) -> OfPatch:
    """One point of the curve, with the comparison with random sets only where these are comparable.

    Results of earlier releases hold no ``random_sets``, and random sets whose edits may be much smaller than the set's;
    there the stored norms tell whether they are comparable.
    """
    one = dataset.sel(direction=direction, point=point)
    if "random_sets" in one:
        kinds = {str(kind) for kind in np.ravel(one["random_sets"].values)}
    else:
        larger = norm_difference(one["norm_ratio"].values, one["random_norm"].mean("random").values)
        kinds = {NEAREST if (larger <= CALIPER).all() else ""}
    control = "" if "" in kinds else RESCALED if RESCALED in kinds else NEAREST
    above = [float(one[name]) if control else np.nan for name in ("above_random", "above_low", "above_high")]
    return OfPatch(
        share=float(one["share"]),
        low=float(one["share_low"]),
        high=float(one["share_high"]),
        above=above[0],
        above_low=above[1],
        above_high=above[2],
        random_sets=control if np.isfinite(above[0]) else "",
    )


@dataclass(frozen=True, kw_only=True)
class CompactShare:
    """What compact sets carry of the full patch's effect in base when the RL model's features are copied there."""

    of_set: OfPatch
    """The selected set."""
    is_compact: bool
    """Whether it is as small as ``most`` in every dictionary."""
    best_high: float
    """Largest upper end over ``points``; NaN where the curve has no leading ``most`` features or more."""
    points: tuple[str, ...]
    """Labels of the set, and of the leading features up to the first that has ``most`` or more."""


def compact_share(dataset: xr.Dataset | None, most: float) -> CompactShare | None:
    """What the curve says about sets of at most ``most`` features; None where the set's share is not known.

    What no point up to the first of ``most`` features or more carries no compact set is taken to carry: the features
    with the largest drift are those whose copies change most.
    """
    if dataset is None or SET not in dataset["point"].values:
        return None
    of_set = of_patch(dataset, "amplify")
    if not np.isfinite(of_set.share):
        return None
    fewest, largest = (dataset["n_features"].reduce(f, "dictionary") for f in (np.min, np.max))
    of_chosen = dataset["point"] == SET
    reach = fewest.where((fewest >= most) & ~of_chosen).min()
    within = of_chosen | (largest <= reach.fillna(np.inf))
    points = tuple(map(str, dataset["point"].values[within.values]))
    return CompactShare(
        of_set=of_set,
        is_compact=bool(largest.sel(point=SET) <= most),
        best_high=max(of_patch(dataset, "amplify", point).high for point in points) if np.isfinite(reach) else np.nan,
        points=points,
    )
