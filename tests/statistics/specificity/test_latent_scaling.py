from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from xarray.tests import raise_if_dask_computes

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.toolkit.statistics import classify_features, latent_scaling, scaling_table
from rlgen_stats.toolkit.statistics.specificity.latent_scaling import MIN_GROUPS

VIEWS = ["base@0", "sft@9", "rl@9"]


def sums_of(nu: np.ndarray, *, n_groups: int = 200, noise: float = 0.0, seed: int = 0) -> xr.Dataset:
    """Sums of a world in which view m holds nu[m, k] times what the strongest view (the last) does."""
    random = np.random.default_rng(seed)
    n_views, n_features = nu.shape
    squares = random.gamma(2.0, size=(n_groups, n_features)) * (random.random((n_groups, n_features)) < 0.7)
    cross = squares[:, None] * nu
    shared = noise * random.normal(size=(n_groups, 1, n_features))  # prompts move both together
    separate = noise * random.normal(size=cross.shape)
    both = {name: cross + np.sqrt(squares)[:, None] * (separate + shared) for name in ("error", "reconstruction")}
    return xr.Dataset(
        {name: (("group", "view", "feature"), values) for name, values in both.items()}
        | {
            "squares": (("group", "feature"), squares),
            "strongest": ("feature", np.full(n_features, n_views - 1)),
            "n_active": ("feature", np.full(n_features, 10 * n_groups)),
        },
        coords={"view": VIEWS[-n_views:], "feature": np.arange(n_features)},
    )


def test_ratios_are_the_planted_ones_and_lazy_results_the_same() -> None:
    nu = np.array([[0.0, 0.1, 0.9, 0.5], [0.02, 0.3, 1.0, 0.5], [1.0, 1.0, 1.0, 1.0]])
    sums = sums_of(nu)
    scaling = latent_scaling(sums)
    np.testing.assert_allclose(scaling.nu_error.values, nu, atol=1e-12)
    np.testing.assert_allclose(scaling.beta_reconstruction.values, nu, atol=1e-12)
    with raise_if_dask_computes():
        lazy = latent_scaling(sums.chunk(feature=3, group=17))
    xr.testing.assert_allclose(lazy.compute(), scaling, rtol=1e-12)
    xr.testing.assert_allclose(latent_scaling(sums.isel(group=slice(None, None, -1))), scaling, rtol=1e-12)
    xr.testing.assert_allclose(latent_scaling(sums.isel(feature=[2, 0])), scaling.isel(feature=[2, 0]), rtol=1e-12)


def test_bounds_of_ratios_have_their_level() -> None:
    """True nu at the limit: 'specific' (every ratio below it) is claimed at most alpha of the time, one test alone."""
    nu = np.stack([np.full(4000, 0.2), np.ones(4000)])
    sums = sums_of(nu, noise=0.5, n_groups=60, seed=3)
    scaling = latent_scaling(sums).assign(nu_reconstruction=lambda x: 0 * x.nu_error)
    share = xr.DataArray(
        np.stack([np.zeros(4000), np.ones(4000)]), dims=("view", "feature"), coords={"view": VIEWS[1:]}
    )
    classes = classify_features(share, scaling, tau=0.7, alpha=0.05).feature_class.values
    assert (classes == "specific").mean() == pytest.approx(0.05, abs=0.02)
    assert (classes == "contradicted").mean() == pytest.approx(0.025, abs=0.015)
    error = (scaling.nu_error[0] - 0.2) / scaling.nu_error_se[0]
    assert float(error.std()) == pytest.approx(1.0, abs=0.06)


def test_too_few_groups_and_silent_features_have_no_standard_error() -> None:
    sums = sums_of(np.array([[0.1, 0.1], [1.0, 1.0]]), n_groups=40)
    sums["squares"][MIN_GROUPS - 1 :, 0] = 0.0
    sums["squares"][:, 0] += np.where(np.arange(40) < MIN_GROUPS - 1, 1.0, 0.0)
    sums["squares"][:, 1] = 0.0
    scaling = latent_scaling(sums)
    assert scaling.n_groups.values.tolist() == [MIN_GROUPS - 1, 0]
    assert np.isfinite(scaling.beta_error.values[:, 0]).all()
    assert np.isnan(scaling.beta_error_se.values).all()
    assert np.isnan(scaling.nu_error.values[:, 1]).all()


def test_classes() -> None:
    nu = np.array([[0.0, 0.4, 0.9, 0.0], [1.0, 1.0, 1.0, 1.0]])
    scaling = latent_scaling(sums_of(nu, noise=0.05))
    scaling["n_active"][3] = 4
    share = xr.DataArray([[0.1, 0.1, 0.45, 0.0], [0.9, 0.9, 0.55, 1.0]], dims=("view", "feature"))
    share = share.assign_coords(view=VIEWS[1:])
    classes = validate_classes(share, scaling)
    assert classes.feature_class.values.tolist() == ["specific", "contradicted", "shared", "rare"]
    assert classes.specific_to.values.tolist() == ["rl@9", "rl@9", "", ""]
    blurred = scaling.assign(nu_error_se=scaling.nu_error_se + 1.0, nu_reconstruction_se=scaling.nu_error_se + 1.0)
    assert validate_classes(share, blurred).feature_class.values[:2].tolist() == ["undetermined", "undetermined"]


def validate_classes(share: xr.DataArray, scaling: xr.Dataset) -> xr.Dataset:
    return classify_features(share, scaling, tau=0.7, min_active=10)


def test_table_of_several_crosscoders_has_the_declared_layout() -> None:
    two = latent_scaling(sums_of(np.ones((2, 3))))
    three = latent_scaling(sums_of(np.ones((3, 5))))
    classes = {
        name: classify_features(0 * table.beta_error, table, tau=0.7) for name, table in (("a", two), ("b", three))
    }
    table = validate(scaling_table({"a": two, "b": three}, classes), "latent_scaling")
    assert table.sizes == {"crosscoder": 2, "view": 3, "feature": 5}
    assert np.isnan(table.nu_error.sel(crosscoder="a", view="base@0")).all()
    np.testing.assert_array_equal(table.nu_error.sel(crosscoder="b", view=VIEWS), three.nu_error.values)
    assert table.feature_class.values[0].tolist() == ["shared"] * 3 + [""] * 2


def test_errors_name_the_remedy() -> None:
    sums = sums_of(np.ones((2, 3)))
    with pytest.raises(InputError, match=r"needs the sums 'error' over .*scaling_sums\(\)"):
        latent_scaling(sums.drop_vars("error"))
    scaling = latent_scaling(sums)
    share = xr.DataArray(np.ones((2, 3)), dims=("view", "feature"), coords={"view": ["base@0", "x@1"]})
    with pytest.raises(InputError, match=r"use one crosscoder's"):
        classify_features(share, scaling, tau=0.7)
