from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.toolkit.statistics import adjust_pvalues

O4 = np.concatenate([np.arange(1, 41) ** 2 / 1700, np.linspace(0.05, 0.99, 60)])


@pytest.fixture
def p():
    return xr.DataArray(O4.reshape(4, 25), dims=("model", "feature"))


def test_a_table_is_corrected_as_its_ravel(p):
    q = adjust_pvalues(p, dims=("model", "feature")).values.ravel()
    # docs/method.md O4: BH at positions 1, 5, 10, 20, 40.
    expected = [0.0588235294118, 0.294117647059, 0.534759358289, 0.730868002054, 0.971343700856]
    assert q[[0, 4, 9, 19, 39]] == pytest.approx(expected, rel=1e-9)
    assert not np.allclose(q, O4)


def test_each_position_along_other_dims_is_its_own_family(p):
    q = adjust_pvalues(p, dims=("feature",))
    for m in range(4):
        alone = adjust_pvalues(p.isel(model=m), dims="feature")
        np.testing.assert_array_equal(q.isel(model=m).values, alone.values)
    assert q.attrs["family"] == "feature"
    assert q.attrs["family_size"] == 25


def test_nan_is_outside_the_family(p):
    holed = p.where(p > 0.02)
    q = adjust_pvalues(holed, dims=("model", "feature"))
    kept = holed.values[np.isfinite(holed.values)]
    alone = adjust_pvalues(xr.DataArray(kept, dims="feature"), dims=("feature",))
    np.testing.assert_allclose(q.values[np.isfinite(q.values)], alone.values)
    assert np.array_equal(np.isnan(q.values), np.isnan(holed.values))


@pytest.mark.parametrize("chunks", [{"feature": 1}, {"feature": 7, "model": 2}])
def test_lazy_and_chunked(p, chunks, no_compute):
    with no_compute():
        q = adjust_pvalues(p.chunk(chunks), dims=("model", "feature"), method="holm")
    assert q.chunks is not None
    np.testing.assert_array_equal(q.values, adjust_pvalues(p, dims=("model", "feature"), method="holm").values)


def test_datasets_keep_their_order_of_dimensions(p):
    out = adjust_pvalues(xr.Dataset({"p_value": p}), dims=("feature", "model"))
    assert out.p_value.dims == ("model", "feature")
    np.testing.assert_allclose(out.p_value.values, adjust_pvalues(p, dims=("model", "feature")).values)


def test_errors(p):
    with pytest.raises(RefusedError, match="needs the family"):
        adjust_pvalues(p, dims=())
    with pytest.raises(InputError, match=r"dimension 'task' is not in the data; it has \['model', 'feature'\]"):
        adjust_pvalues(p, dims=("task",))


@pytest.mark.parametrize("method", ["bh", "holm", "by"])
def test_a_mapping_is_one_family(p, method):
    """Two tables corrected together equal the correction of their concatenation, NaN left out."""
    holed = p.where(p != p[0, 3])
    parts = {"first": holed.isel(model=slice(0, 1)), "second": xr.Dataset({"p_value": holed.isel(model=slice(1, 4))})}
    together = adjust_pvalues(parts, dims=("model", "feature"), method=method)
    whole = adjust_pvalues(holed, dims=("model", "feature"), method=method)
    np.testing.assert_array_equal(np.concatenate([q.values for q in together.values()]), whole.values)
    assert together["second"].attrs["family"] == "(first + second) x model x feature"
    assert together["second"].attrs["family_size"] == 100
    alone = adjust_pvalues(parts["first"], dims=("model", "feature"), method=method)
    assert not np.allclose(together["first"], alone, equal_nan=True)


def test_a_mapping_keeps_the_other_dimensions_apart(p, no_compute):
    """Per model, the features of both tables; tables may have different features."""
    parts = {"left": p.isel(feature=slice(0, 10)).chunk({"feature": 3}), "right": p.isel(feature=slice(10, 25))}
    with no_compute():
        together = adjust_pvalues(parts, dims=("feature",))
    whole = adjust_pvalues(p, dims=("feature",))
    np.testing.assert_array_equal(np.concatenate([together["left"], together["right"]], axis=1), whole.values)
    assert together["left"].dims == ("model", "feature")


def test_mappings_are_checked(p):
    labelled = p.assign_coords(model=list("abcd"))
    with pytest.raises(InputError, match="differ in their labels of 'model'"):
        adjust_pvalues({"x": labelled, "y": labelled.assign_coords(model=list("abce"))}, dims=("feature",))
    with pytest.raises(InputError, match=r"'y' has dimensions \['model'\]; expected some of the family's"):
        adjust_pvalues({"x": p, "y": p[:, 0]}, dims=("feature",))
    with pytest.raises(InputError, match="'y' has no variable 'p_value'"):
        adjust_pvalues({"x": p, "y": xr.Dataset({"q": p})}, dims=("feature",))
    with pytest.raises(InputError, match="no correction is called 'fdr'"):
        adjust_pvalues(p, dims=("feature",), method="fdr")
