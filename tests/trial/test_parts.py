"""Single features of a set, and a smaller set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

from rlgen_stats.schemas.errors import NotEstimableError
from rlgen_stats.toolkit.intervention import feature_effects
from tests.trial.planted import (
    F_DECOY,
    F_GATE,
    PROVENANCE,
)
from tests.trial.trials import (
    pick,
)


def test_the_gate_carries_the_sets_effect(parts: xr.Dataset) -> None:
    assert parts["feature"].values.tolist() == [F_DECOY, F_GATE, F_DECOY + 1]
    for direction, sign in (("disable", -1), ("amplify", 1)):
        side = parts.sel(direction=direction)
        for way in ("alone", "left_out"):
            assert sign * float(side[way].sel(feature=F_GATE)) > 0.6
            assert float(side[f"{way}_q_value"].sel(feature=F_GATE)) < 0.01
            for decoy in (F_DECOY, F_DECOY + 1):
                assert abs(float(side[way].sel(feature=decoy))) < 0.05
                assert float(side[f"{way}_q_value"].sel(feature=decoy)) > 0.2
                assert float(side[f"{way}_low"].sel(feature=decoy)) < 0 < float(side[f"{way}_high"].sel(feature=decoy))


def test_one_feature_suffices_and_unused_prompts_say_so(study: Any, parts: xr.Dataset) -> None:
    for direction, sign in (("disable", -1), ("amplify", 1)):
        side = parts.sel(direction=direction)
        assert side["in_subset"].values.tolist() == [False, True, False]
        assert int(side["subset_size"]) == 1
        assert int(side["order"].sel(feature=F_GATE)) == 1
        assert np.isfinite(side["search_effect"].values).tolist() == [True, False, False]
        assert sign * float(side["subset_effect"]) > 0.6
        assert float(side["set_minus_subset_low"]) < 0 < float(side["set_minus_subset_high"])
    again = feature_effects(study[0], study[1], [F_DECOY, F_GATE, F_DECOY + 1], provenance=PROVENANCE, name="three")
    xr.testing.assert_identical(again, parts)


def test_effects_of_single_features_are_those_of_their_own_trials(parts: xr.Dataset, gate: Any) -> None:
    result, _ = gate
    for direction in ("disable", "amplify"):
        alone = float(parts["alone"].sel(direction=direction, feature=F_GATE))
        assert alone == pytest.approx(pick(result, "effect", direction, "set"))


def test_parts_of_nothing_are_refused(study: Any) -> None:
    with pytest.raises(NotEstimableError, match=r"effects of single features cannot be measured \(no_features"):
        feature_effects(study[0], study[1], [], provenance=PROVENANCE)
