"""Single features of a set, and a smaller set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

from rlgen_stats.schemas.errors import NotEstimableError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.intervention import feature_effects, plan_trial
from rlgen_stats.toolkit.statistics.causal.outcome_table import paired_effect
from rlgen_stats.toolkit.statistics.kernels import adjust
from rlgen_stats.toolkit.trial.arms import Arm
from rlgen_stats.toolkit.trial.parts import measure_parts
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


@pytest.mark.parametrize("direction", ["disable", "amplify"])
def test_effects_of_parts_are_the_paired_effects_of_their_arms(study: Any, direction: Any) -> None:
    """Accuracies made up: one feature carries three fifths of the effect, another nearly all of the rest."""
    worth = {F_GATE: 0.36, F_DECOY: 0.23, F_DECOY + 1: 0.01}
    sign = 1.0 if direction == "amplify" else -1.0
    spec = study[0].model_copy(update={"seed": 6})
    plan = plan_trial(spec, study[1], list(worth), provenance=PROVENANCE, directions=[direction], by_feature=True)
    noise = np.random.default_rng(0).standard_normal((8, plan.n_prompts)) * 0.05

    def share_correct(_: Any, arm: Arm) -> Any:
        members = () if arm.edit is None else arm.edit.features
        row = sum(1 << list(worth).index(k) for k in members)
        return 0.5 + sign * sum(worth[k] for k in members) + noise[row]

    result = measure_parts(plan, share_correct).sel(direction=direction)
    target = plan.prompts.target
    clusters = plan.prompts.table["cluster"].to_numpy(np.str_)[target]
    seed = derive_seed(6, "intervention", "parts", direction)
    whole, none = noise[7, target] + sign * 0.6, noise[0, target]
    without = [noise[7 - (1 << i), target] + sign * (0.6 - w) for i, w in enumerate(worth.values())]
    left_out = paired_effect(
        np.stack([whole - rest for rest in without], axis=1), clusters, alpha=0.05, seed=seed, n_resamples=9999
    )
    np.testing.assert_allclose(result["left_out"], left_out.mean)
    np.testing.assert_allclose(result["left_out_p_value"], left_out.p_value)
    assert 0.001 < left_out.p_value[2] < 0.9, "a p-value that tells which sign flips were drawn"
    p_values = np.stack([result["alone_p_value"].values, result["left_out_p_value"].values])
    np.testing.assert_allclose(result["alone_q_value"], adjust(p_values, method="bh")[0])
    assert int(result["subset_size"]) == 2, "three fifths do not suffice, all but a sixtieth does"
    assert result["in_subset"].values.tolist() == [True, True, False]
    other_half = np.array([derive_seed(6, "subset search", cluster) % 2 == 1 for cluster in clusters])
    pair = noise[3, target] + sign * 0.59
    changes = np.stack([pair - none, whole - none, whole - pair], axis=1)[other_half]
    reported = paired_effect(changes, clusters[other_half], alpha=0.05, seed=seed, n_resamples=9999)
    for i, name in enumerate(("subset_effect", "set_effect", "set_minus_subset")):
        assert float(result[name]) == pytest.approx(reported.mean[i])
        assert float(result[f"{name}_low"]) == pytest.approx(reported.low[i])
        assert float(result[f"{name}_p_value"]) == pytest.approx(reported.p_value[i])
    searched = sign * 0.36 + (noise[1, target] - none)[~other_half].mean()
    assert float(result["search_effect"][0]) == pytest.approx(searched)
