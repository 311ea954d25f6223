"""Random feature sets that resemble a chosen set in everything but the choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import FEATURE
from rlgen_stats.schemas.errors import InputError, NotEstimableError
from rlgen_stats.toolkit.statistics.causal.outcome_table import Direction
from rlgen_stats.toolkit.statistics.core.nearest_draws import nearest_free

EDIT_NORM: Final = "edit_norm"
"""Norm of the whole edit: the vector that all features of a set write together in the model that is edited."""
STRENGTHS: Final = ("log_firing", "decoder_norm", "contribution_energy")
"""Covariates of single features that say how much an edit of the feature moves the residual stream."""
COVARIATES: Final = (EDIT_NORM, *STRENGTHS, "mas_bin")
"""What controls are matched on, first things first (docs/method.md 4d)."""
CALIPER: Final = 0.1
"""Difference of the set's edit norm from its controls' mean, as a share of the larger one, up to which they are
comparable (calipers: Rosenbaum & Rubin 1985, doi:10.1080/00031305.1985.10479383)."""
EQUAL_NORM: Final = 0.02
"""Difference of edit norms within which sets count as equally near."""
BALANCED: Final = 0.1
"""Standardised difference below which a covariate counts as balanced (Austin 2009, doi:10.1002/sim.3697)."""
USABLE: Final = 0.25
"""Standardised difference of attribution classes beyond which a comparison leans on the model, not on the data (Rubin
2001, doi:10.1023/A:1020363010465)."""
NEAR_DUPLICATE: Final = 0.7
"""Decoder cosine above which a feature says nearly the same as a member of the set (docs/method.md 4d)."""
MIN_POOL: Final = 10
"""Nearest candidates per member from which controls are drawn, at least."""
OVERDRAW: Final = 40
"""Candidate sets drawn per set kept; the best balanced are kept (rerandomisation: Morgan & Rubin 2012,
doi:10.1214/12-AOS1008)."""
BIN_PENALTY: Final = 4.0
"""Distance of one attribution bin, in standard deviations of the other covariates: bins are crossed only in need."""
TINY: Final = 1e-12
NOISE: Final = 1e-5
"""Spread, relative to the largest value, that single precision makes out of equal numbers."""


@dataclass(frozen=True)
class MatchedControls:
    """Control sets and how well they match.

    Attributes
    ----------
    sets
        [control, member] feature ids; member j of a control was drawn for member j of the set.
    balance
        Layout ``control_balance``: one row a covariate, plus ``worst_difference`` (largest over single controls). The
        difference of edit norms is a share of the larger norm, those of the other covariates are standardised.
    requested
        Control sets asked for.
    flags
        What is not as asked: ``fewer_sets:...``, ``unbalanced:...``; empty if all is well.
    comparable
        Whether the set cannot look special for being a larger edit or of another class.
    """

    sets: NDArray[np.int64]
    balance: xr.Dataset
    requested: int
    flags: tuple[str, ...]
    comparable: bool

    @property
    def comparable_rescaled(self) -> bool:
        """Whether they are comparable once their edits are given the norm of the set's."""
        others = self.balance["standardized_difference"].values[1:]
        return comparable(np.append(0.0, others))


EditNorms = Callable[[NDArray[np.int64]], NDArray[np.float64]]
"""[set, member] feature ids -> [set] norms of their edits."""


def match_controls(
    covariates: xr.Dataset,
    features: Sequence[int],
    edit_norms: EditNorms,
    *,
    n_sets: int,
    seed: int,
    near_duplicates: NDArray[np.bool_] | None = None,
) -> MatchedControls:
    """Random sets of the set's size whose edits are as large, nearest in firing, decoder norm, energy and attribution.

    Parameters
    ----------
    covariates
        Over dimension ``feature``: ``log_firing`` (-inf for a dead feature), ``decoder_norm``,
        ``contribution_energy`` (all float) and ``mas_bin`` (integer).
    features
        The set.
    edit_norms
        Measures the edits of sets in the model that is edited.
    n_sets
        Number of control sets (B).
    seed
        Seed of the draws.
    near_duplicates
        [feature] True where a feature is too similar to a member of the set to serve as its control.

    Returns
    -------
    MatchedControls
        At most ``n_sets`` distinct sets; flags say what fell short.

    Raises
    ------
    InputError
        If a covariate is missing or a feature id is out of range.
    NotEstimableError
        If no set of that size is left; says how many features each rule took out, or which covariate is out of range.

    Notes
    -----
    Each member's controls come from its nearest unused candidates, standardised over alive features; of
    ``OVERDRAW * n_sets`` such sets those whose edit norms come nearest to the set's are kept, best balanced first among
    those that are equally near. Firing rate, norm and energy of single features do not
    tell the norm of a joint edit: features that fire together and point the same way add up. Standardised difference =
    (mean of the set - mean of the controls) / sqrt((variance of the set + variance of the controls) / 2), with the
    alive features' standard deviation where the set has fewer than three members or no spread.
    """
    chosen, values, bins = _prepare(covariates, features, n_sets)
    alive = np.asarray(np.isfinite(values).all(axis=1), dtype=np.bool_)
    if not alive[chosen].all():
        dead = [int(k) for k in chosen[~alive[chosen]]]
        raise NotEstimableError(f"features {dead[:5]} of the set never fire, so nothing can be matched to them.")
    excluded = np.zeros(len(values), dtype=bool) if near_duplicates is None else np.asarray(near_duplicates, dtype=bool)
    eligible = alive & ~excluded
    eligible[chosen] = False
    pool = np.flatnonzero(eligible)
    if len(pool) < len(chosen):
        raise NotEstimableError(
            f"{len(chosen)} control features are needed and {len(pool)} of {len(values)} are left "
            f"({int((~alive).sum())} never fire, {int(excluded.sum())} nearly duplicate the set); "
            "use a smaller set or a larger dictionary."
        )
    scale = np.maximum(values[alive].std(axis=0), _noise(values[alive]))
    _refuse_impossible(values, bins, chosen, pool)
    distance = np.sqrt(
        (((values[chosen][:, None] - values[pool][None]) / scale) ** 2).sum(axis=-1)
        + (BIN_PENALTY * (bins[chosen][:, None] - bins[pool][None])) ** 2
    )
    candidates = _draw(distance, pool, n_sets, np.random.default_rng(seed))
    table = np.column_stack([values, bins.astype(np.float64)])
    distinct = _distinct(candidates)
    of_set, of_candidates = float(edit_norms(chosen[None])[0]), edit_norms(distinct)
    kept = _best(distinct, norm_difference(of_set, of_candidates), chosen, table, alive)[:n_sets]
    return _result(distinct[kept], (of_set, of_candidates[kept]), chosen, table, alive, n_sets)


def norm_difference(of_set: Any, of_controls: Any) -> NDArray[np.float64]:
    """Set's norm minus a control's as a share of the larger one, between -1 and 1; 0 where both are 0.

    Examples
    --------
    >>> [round(float(d), 2) for d in norm_difference(3.36, [2.59, 6.72])]
    [0.23, -0.5]
    """
    controls = np.asarray(of_controls, dtype=np.float64)
    return np.asarray((of_set - controls) / np.maximum(np.maximum(of_set, controls), TINY))


def _noise(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spread below which a covariate counts as constant, one number a column."""
    return np.asarray(np.maximum(NOISE * np.abs(values).max(axis=0), TINY), dtype=np.float64)


def _prepare(
    covariates: xr.Dataset, features: Sequence[int], n_sets: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    needed = COVARIATES[1:]
    missing = [name for name in needed if name not in covariates]
    if missing:
        raise InputError(f"controls are matched on {', '.join(needed)}; missing: {', '.join(missing)}.")
    n_features = covariates.sizes[FEATURE]
    chosen = np.asarray(list(features), dtype=np.int64)
    if not len(chosen) or n_sets < 1:
        raise InputError(f"a set of features and at least one control are needed, got {len(chosen)} and {n_sets}.")
    if chosen.min() < 0 or chosen.max() >= n_features or len(np.unique(chosen)) != len(chosen):
        raise InputError(f"features are distinct ids from 0 to {n_features - 1}, got {list(map(int, chosen))[:10]}.")
    values = np.column_stack([np.asarray(covariates[name].values, dtype=np.float64) for name in STRENGTHS])
    return chosen, values, np.asarray(covariates["mas_bin"].values, dtype=np.int64)


def _refuse_impossible(
    values: NDArray[np.float64], bins: NDArray[np.int64], chosen: NDArray[np.int64], pool: NDArray[np.int64]
) -> None:
    """Refuse a set that lies wholly outside all candidates on one covariate: nothing there resembles it at all."""
    for column, name in enumerate(STRENGTHS):
        of_set, others = values[chosen, column], values[pool, column]
        gap = max(of_set.min() - others.max(), others.min() - of_set.max())
        spread = max(float(others.std()), NOISE * float(np.abs(values[pool, column]).max()), TINY)
        if gap > spread:
            raise NotEstimableError(
                f"controls cannot be matched on {name}: the set is in [{of_set.min():.3g}, {of_set.max():.3g}], all "
                f"others in [{others.min():.3g}, {others.max():.3g}], {gap / spread:.1f} standard deviations away."
            )
    if not np.isin(bins[chosen], bins[pool]).any():
        raise NotEstimableError(
            f"controls cannot be matched on mas_bin: the set is in bins {sorted(set(bins[chosen].tolist()))}, every "
            f"other feature in {sorted(set(bins[pool].tolist()))}."
        )


def _draw(
    distance: NDArray[np.float64], pool: NDArray[np.int64], n_sets: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Candidate sets [draw, member]: each member takes one of its nearest candidates not yet taken in that set."""
    n_members = len(distance)
    n_draws = OVERDRAW * n_sets
    width = max(MIN_POOL, math.ceil((2 * n_sets) ** (1 / n_members)))
    width = min(width + n_members - 1, len(pool))  # up to n_members - 1 of the nearest may be taken already
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :width]
    reach = np.full(n_draws, width - n_members + 1)  # of the nearest, those that are free for whoever comes last
    turns = rng.permutation(n_members)
    places = np.stack([rng.integers(1, reach + 1) for _ in turns], axis=1) - 1
    drawn = np.empty((n_draws, n_members), dtype=np.int64)
    drawn[:, turns] = nearest_free(nearest[turns], places, len(pool))
    return pool[drawn]


def _spread(
    table: NDArray[np.float64], chosen: NDArray[np.int64], controls: NDArray[np.float64], alive: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Denominator of the standardised difference, one number a covariate."""
    population = np.maximum(table[alive].std(axis=0), _noise(table[alive]))
    if len(chosen) < 3:
        return np.asarray(population, dtype=np.float64)
    pooled = np.sqrt((table[chosen].var(axis=0, ddof=1) + controls.var(axis=0, ddof=1)) / 2)
    return np.asarray(np.where(pooled > _noise(table[alive]), pooled, population), dtype=np.float64)


def _distinct(candidates: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sets in the order of their first draw, each once."""
    _, first = np.unique(np.sort(candidates, axis=1), axis=0, return_index=True)
    return candidates[np.sort(first)]


def _best(
    sets: NDArray[np.int64],
    norm_differences: NDArray[np.float64],
    chosen: NDArray[np.int64],
    table: NDArray[np.float64],
    alive: NDArray[np.bool_],
) -> NDArray[np.int64]:
    """Places of the sets, best first: nearest in norm, and where equally near best balanced."""
    near = np.ceil(np.abs(norm_differences) / EQUAL_NORM)
    spread = _spread(table, chosen, table[sets.ravel()], alive)
    worst = np.abs((table[sets].mean(axis=1) - table[chosen].mean(axis=0)) / spread).max(axis=1)
    return np.lexsort((worst, near))


def _result(
    sets: NDArray[np.int64],
    norms: tuple[float, NDArray[np.float64]],
    chosen: NDArray[np.int64],
    table: NDArray[np.float64],
    alive: NDArray[np.bool_],
    n_sets: int,
) -> MatchedControls:
    spread = _spread(table, chosen, table[sets.ravel()], alive)
    set_mean = np.append(norms[0], table[chosen].mean(axis=0))
    each = np.column_stack([norms[1], table[sets].mean(axis=1)])
    control_mean = each.mean(axis=0)

    def differences(controls: NDArray[np.float64]) -> NDArray[np.float64]:
        of_norm = norm_difference(norms[0], controls[..., :1])
        return np.concatenate([of_norm, (set_mean - controls)[..., 1:] / spread], axis=-1)

    difference = differences(control_mean)
    flags = [f"fewer_sets:{len(sets)} of {n_sets}"] if len(sets) < n_sets else []
    flags += unbalanced(difference)
    usable = comparable(difference)
    balance = xr.Dataset(
        {
            "set_mean": ("covariate", set_mean),
            "control_mean": ("covariate", control_mean),
            "standardized_difference": ("covariate", difference),
            "balanced": ("covariate", np.abs(difference) < BALANCED),
            "worst_difference": ("covariate", np.abs(differences(each)).max(axis=0)),
        },
        coords={"covariate": list(COVARIATES)},
        attrs={"n_sets": len(sets), "flags": list(flags), "comparable": int(usable)},
    )
    return MatchedControls(sets, balance, n_sets, tuple(flags), usable)


def unbalanced(difference: NDArray[np.float64]) -> list[str]:
    """One flag a covariate of ``COVARIATES`` in which sets and controls differ."""
    known = zip(COVARIATES, difference.tolist(), strict=True)
    return [f"unbalanced:{name}={value:+.2f}" for name, value in known if abs(value) >= BALANCED]


def comparable(difference: NDArray[np.float64], *, times: float = 1.0) -> bool:
    """Whether random sets with these differences, one a covariate, can be a set's controls.

    Parameters
    ----------
    difference
        [covariate] by ``COVARIATES``; NaN is not comparable.
    times
        Factor on what may differ: of one dictionary among several, whose mean is what counts.

    Notes
    -----
    The set's edit may not be larger than theirs, nor its features of another class; larger controls only make
    specificity harder to show. Firing rate, decoder norm and energy of single features are balanced as far as they go
    and reported: they stand for the size of an edit, which is measured.
    """
    larger, other_class = difference[0], difference[-1]
    return bool(larger <= times * CALIPER and abs(other_class) <= times * USABLE)


def by_direction(balances: Mapping[Direction, xr.Dataset]) -> xr.Dataset:
    """Balance of the controls of both directions, one row a covariate and direction: layout ``control_balance``."""
    rows = [
        one.assign_coords(covariate=[f"{name}_{direction}" for name in one["covariate"].values])
        for direction, one in balances.items()
    ]
    attributes = [one.attrs for one in rows]
    return xr.concat([one.drop_attrs() for one in rows], "covariate").assign_attrs(
        n_sets=min(one["n_sets"] for one in attributes),
        comparable=min(one["comparable"] for one in attributes),
        flags=[f"{direction}: {flag}" for direction, one in balances.items() for flag in one.attrs["flags"]],
    )
