"""Latent scaling: whether a model uses a feature's direction although its decoder row for the feature is short."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from rlgen_stats.schemas.dims import FEATURE, GROUP, VIEW
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray
from rlgen_stats.toolkit.statistics.specificity.decoder_norms import CROSSCODER

NU_ERROR_MAX: Final = 0.2
NU_RECONSTRUCTION_MAX: Final = 0.5
"""Above these ratios a model other than the strongest uses the feature's direction too (arXiv:2504.02922)."""

MIN_GROUPS: Final = 12
"""Groups in which a feature must fire for a standard error; with fewer, cluster-robust ones are too small."""

CLASSES: Final = ("shared", "specific", "contradicted", "undetermined", "rare")
"""Model specificity of a feature; see :func:`classify_features`."""


def latent_scaling(sums: xr.Dataset) -> xr.Dataset:
    """How much of each feature's direction every model's activations contain, with standard errors.

    Parameters
    ----------
    sums
        ``squares[group, feature]``, ``error`` and ``reconstruction`` [group, view, feature],
        ``strongest[feature]``, ``n_active[feature]`` (``toolkit/crosscoder/uses/scaling_sums.py``), lazy or not.

    Returns
    -------
    xr.Dataset
        ``beta_error``, ``beta_reconstruction`` [view, feature] with ``_se``; ``nu_error``, ``nu_reconstruction``
        [view, feature], the beta of a view over that of the feature's strongest view (1 there), with ``_se``;
        ``strongest[feature]`` (slot), ``n_groups[feature]`` in which the feature fires, ``n_active[feature]``.
        NaN where the feature never fires; standard errors NaN with fewer than ``MIN_GROUPS`` groups.

    Raises
    ------
    InputError
        If a variable is missing.

    Notes
    -----
    beta = argmin_b sum_t ||y_t - b f_t d*||^2 = sum_t f_t <d*, y_t> / (||d*||^2 sum_t f_t^2), with d* the feature's
    decoder row in its strongest view, in normalised units. y = error: a view's residual plus the feature's own
    contribution f_t d_m, so beta_error is what f d* explains of what the dictionary does not assign to others.
    y = reconstruction: the sum of all features, without bias, in the view, so beta_reconstruction also finds other
    features that write the same direction there. A direction that a model lacks has nu near 0 in both.

    Standard errors are cluster robust over groups of prompts (CR0 times G / (G - 1)); those of nu follow from the same
    group sums by the delta method, which accounts for numerator and denominator sharing their prompts.

    References
    ----------
    Minder et al. (2025), arXiv:2504.02922, section 3.2 and appendix (closed form).

    Examples
    --------
    >>> sums = xr.Dataset(
    ...     {
    ...         "squares": (("group", "feature"), np.full((20, 1), 4.0)),
    ...         "error": (("group", "view", "feature"), np.tile([[[4.0], [1.0]]], (20, 1, 1))),
    ...         "reconstruction": (("group", "view", "feature"), np.tile([[[4.0], [3.0]]], (20, 1, 1))),
    ...         "strongest": ("feature", [0]),
    ...         "n_active": ("feature", [80]),
    ...     },
    ...     coords={"view": ["rl@80", "base@0"]},
    ... )
    >>> latent_scaling(sums).nu_error.values.ravel().tolist()
    [1.0, 0.25]
    """
    for name, dims in (("squares", (GROUP, FEATURE)), ("error", (GROUP, VIEW, FEATURE)), ("strongest", (FEATURE,))):
        if name not in sums or set(map(str, sums[name].dims)) != set(dims):
            raise InputError(f"latent scaling needs the sums {name!r} over {dims}; make them with scaling_sums().")
    squares = sums["squares"].transpose(GROUP, FEATURE)
    total = squares.sum(GROUP)
    usable = total > 0
    n_groups = (squares > 0).sum(GROUP)
    factor = n_groups / (n_groups - 1).where(n_groups >= MIN_GROUPS)
    strongest = sums["strongest"].astype(np.int64)
    is_strongest = strongest == xr.DataArray(np.arange(sums.sizes[VIEW]), dims=VIEW)
    out: dict[str, xr.DataArray] = {}
    for name in ("error", "reconstruction"):
        cross = sums[name].transpose(GROUP, VIEW, FEATURE)
        beta = (cross.sum(GROUP) / total).where(usable)
        deviation = (cross - beta * squares) / total  # influence of each group on beta
        reference = beta.where(is_strongest).sum(VIEW).where(usable)
        nu = beta / reference
        nu_deviation = (deviation - nu * deviation.where(is_strongest).sum(VIEW)) / reference
        nu_se = (factor * (nu_deviation**2).sum(GROUP)) ** 0.5
        out |= {
            f"beta_{name}": beta,
            f"beta_{name}_se": (factor * (deviation**2).sum(GROUP)) ** 0.5,
            f"nu_{name}": nu.where(~is_strongest, 1.0).where(usable),
            f"nu_{name}_se": nu_se.where(~is_strongest, 0.0).where(usable & (factor > 0)),
        }
    out = {name: array.transpose(VIEW, FEATURE) for name, array in out.items()}
    attrs = {"unit": "group of prompt clusters", "direction": "decoder row of the strongest view, normalised units"}
    return xr.Dataset(out, attrs=attrs).assign(strongest=strongest, n_groups=n_groups, n_active=sums["n_active"])


def classify_features(
    share: xr.DataArray,
    scaling: xr.Dataset,
    *,
    tau: float,
    alpha: float = 0.05,
    nu_error_max: float = NU_ERROR_MAX,
    nu_reconstruction_max: float = NU_RECONSTRUCTION_MAX,
    min_active: int = 1,
) -> xr.Dataset:
    """Model specificity of each feature: the norm share names a model, and latent scaling must agree.

    Parameters
    ----------
    share
        [view, feature]: share of decoder norms among the views (MAS; for two views NRN and 1 - NRN).
    scaling
        Result of :func:`latent_scaling` for the same views and features.
    tau
        A feature is a candidate for the view whose share exceeds this.
    alpha
        Level of the one-sided bounds.
    nu_error_max, nu_reconstruction_max
        Largest ratios of another view that still count as absent there.
    min_active
        Tokens a feature must fire on.

    Returns
    -------
    xr.Dataset
        ``feature_class[feature]``: ``rare`` (fires on fewer tokens), ``shared`` (no share above tau), ``specific``
        (both ratios of every other view are below their limits at level ``alpha``), ``contradicted`` (one exceeds its
        limit at that level: an artefact of the sparsity penalty), ``undetermined`` (neither shown, or no share
        known). ``specific_to[feature]``: the view of a candidate, else "".

    Raises
    ------
    InputError
        If views or features of the two differ.

    Notes
    -----
    Each bound has level ``alpha`` on its own. "Specific" needs all of them (an intersection of tests, which keeps the
    level); "contradicted" needs one of 2 (views - 1), which are corrected by Bonferroni.

    References
    ----------
    Minder et al. (2025), arXiv:2504.02922.
    """
    views = [str(view) for view in scaling[VIEW].values]
    if [str(view) for view in share[VIEW].values] != views or share.sizes[FEATURE] != scaling.sizes[FEATURE]:
        raise InputError(
            f"shares of views {[str(v) for v in share[VIEW].values]} and {share.sizes[FEATURE]} features were given "
            f"with latent scaling of {views} and {scaling.sizes[FEATURE]}; use one crosscoder's."
        )
    shares = np.asarray(share.transpose(VIEW, FEATURE).values, dtype=np.float64)
    filled = np.nan_to_num(shares, nan=-1.0)
    best = filled.argmax(axis=0)
    candidate, unknown = filled.max(axis=0) > tau, np.isnan(shares).all(axis=0)
    lower, upper = _bounds(scaling, best, alpha, max(1, 2 * (len(views) - 1)))
    limits = {"error": nu_error_max, "reconstruction": nu_reconstruction_max}
    below = np.all([(upper[name] < limit).all(axis=0) for name, limit in limits.items()], axis=0)
    above = np.any([(lower[name] > limit).any(axis=0) for name, limit in limits.items()], axis=0)
    classes = np.select(
        [unknown, ~candidate, below, above], ["undetermined", "shared", "specific", "contradicted"], "undetermined"
    )
    classes = np.where(np.asarray(scaling["n_active"].values) < min_active, "rare", classes)
    specific_to = np.where(candidate & (classes != "rare"), np.array(views, dtype=np.str_)[best], "")
    return xr.Dataset(
        {"feature_class": (FEATURE, classes), "specific_to": (FEATURE, specific_to)},
        coords={FEATURE: scaling[FEATURE].values} if FEATURE in scaling.coords else {},
        attrs={
            "tau": tau,
            "alpha": alpha,
            "nu_error_max": nu_error_max,
            "nu_reconstruction_max": nu_reconstruction_max,
            "min_active": min_active,
        },
    )


def _bounds(
    scaling: xr.Dataset, best: NDArray[np.int64], alpha: float, n_tests: int
) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """One-sided bounds of the ratios of all views but the candidate's: lower at alpha / n_tests, upper at alpha."""
    n_views = scaling.sizes[VIEW]
    is_best = np.arange(n_views)[:, None] == best
    df = np.maximum(np.asarray(scaling["n_groups"].values) - 1, 1)
    # A ratio without standard error has bounds that decide nothing; the candidate's own view takes part in no decision.
    lower: dict[str, FloatArray] = {}
    upper: dict[str, FloatArray] = {}
    for name in ("error", "reconstruction"):
        nu = np.asarray(scaling[f"nu_{name}"].transpose(VIEW, FEATURE).values)
        se = np.asarray(scaling[f"nu_{name}_se"].transpose(VIEW, FEATURE).values)
        lower[name] = np.where(is_best, -np.inf, np.nan_to_num(nu - stats.t.isf(alpha / n_tests, df) * se, nan=-np.inf))
        upper[name] = np.where(is_best, -np.inf, np.nan_to_num(nu + stats.t.isf(alpha, df) * se, nan=np.inf))
    return lower, upper


def scaling_table(tables: Mapping[str, xr.Dataset], classes: Mapping[str, xr.Dataset]) -> xr.Dataset:
    """Collect several crosscoders' latent scaling in the result layout ``latent_scaling``.

    Parameters
    ----------
    tables
        Name -> result of :func:`latent_scaling`.
    classes
        Name -> result of :func:`classify_features`.

    Returns
    -------
    xr.Dataset
        The variables of both over [crosscoder, view, feature] and [crosscoder, feature]. Dictionaries smaller than the
        largest are padded with NaN and class "", views that a crosscoder lacks are NaN.
    """
    views = list(dict.fromkeys(str(view) for table in tables.values() for view in table[VIEW].values))
    joined = [
        table.drop_vars("strongest").assign(classes[name]).assign_coords({FEATURE: np.arange(table.sizes[FEATURE])})
        for name, table in tables.items()
    ]
    table: xr.Dataset = xr.concat(
        joined,
        CROSSCODER,
        join="outer",
        fill_value={"n_active": 0, "n_groups": 0, "feature_class": "", "specific_to": ""},
    )
    # The outer join sorts views; the order in which crosscoders name them is base first.
    table = table.reindex({VIEW: np.array(views, dtype=np.str_)}).transpose(CROSSCODER, VIEW, FEATURE)
    table = table.assign_coords({CROSSCODER: np.array(list(tables), dtype=np.str_)})
    for name in ("feature_class", "specific_to"):
        table[name] = table[name].astype("<U64")
    return table.assign_attrs(next(iter(tables.values())).attrs | next(iter(classes.values())).attrs)
