"""Which numbers may be compared."""

from __future__ import annotations

import pytest
import xarray as xr

from rlgen_stats.schemas.errors import RefusedError
from rlgen_stats.toolkit.statistics import adjust_pvalues
from rlgen_stats.toolkit.statistics.core.comparability import check_comparable, check_contribution_scale


@pytest.mark.parametrize("key", ["readout", "text_mode", "crosscoder", "scale", "study_id"])
def test_two_datasets_that_differ_in_one_attribute_are_refused(key: str) -> None:
    one, two = xr.Dataset(attrs={key: "a"}), xr.Dataset(attrs={key: "b"})
    check_comparable(one, one, xr.Dataset())
    with pytest.raises(RefusedError, match=f"{key} 'a' and 'b' cannot be combined"):
        check_comparable(one, two)


@pytest.mark.parametrize("scale", ["activation", None])
def test_only_contributions_rank_features(scale: str | None) -> None:
    check_contribution_scale(xr.Dataset(attrs={"scale": "contribution"}), "ranks")
    with pytest.raises(RefusedError, match="ranks of different features"):
        check_contribution_scale(xr.Dataset(attrs={} if scale is None else {"scale": scale}), "ranks")


@pytest.mark.parametrize("key", ["readout", "text_mode"])
def test_one_family_has_one_readout_and_text_mode(key: str) -> None:
    tables = {name: xr.DataArray([0.01, 0.2], dims="feature", attrs={key: name}) for name in ("a", "b")}
    with pytest.raises(RefusedError, match=key):
        adjust_pvalues(tables, dims=("feature",))
