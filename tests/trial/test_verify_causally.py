"""Whole trials on live models whose causes are planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.stores import Provenance, open_arms, open_features, open_results, write_results
from rlgen_stats.toolkit.intervention import verify_causally, verify_in_dictionaries
from rlgen_stats.toolkit.statistics.causal.covariates import mean_levels
from rlgen_stats.toolkit.statistics.causal.criteria import FEWEST_RANDOM
from tests.trial.planted import (
    F_BRAKE,
    F_DECOY,
    F_GATE,
    GATE,
    ID,
    LEVEL,
    N_DECOYS,
    N_FEATURES,
    PROVENANCE,
    planted_crosscoder,
    planted_model,
)
from tests.trial.trials import (
    covariates_without,
    pick,
    run,
    small,
    trial_arm,
    two_dictionaries,
    without_controls,
)


def test_the_planted_gate_is_the_cause_in_both_directions(gate: Any) -> None:
    result, balance = gate
    assert result["verdict"].sel(direction="amplify").item() == "CAUSAL_SPECIFIC", result["reasons"].values
    disable = result.sel(direction="disable")
    assert all(bool(disable[name]) for name in ("v1", "v2", "v3", "v4"))
    assert disable["decided_by"].item() == "v6_not_shown", "zeroing silences every prompt, also those that base answers"
    assert result["rank_p"].values == pytest.approx([1 / 20] * 2)
    assert balance["balanced"].sel(covariate=["edit_norm_disable", "log_firing_disable", "mas_bin_disable"]).all()
    assert pick(result, "effect", "disable", "set") < -0.7
    assert pick(result, "effect", "amplify", "set") > 0.6
    assert result.attrs["features"] == [F_GATE]
    assert result.attrs["target_tasks"] == ["algebra", "logic"]
    assert result.attrs["unrelated_tasks"] == ["weather"]


def test_arms_that_must_agree_agree(gate: Any) -> None:
    """Doubling base's gate gives the RL model's; so does lifting it; passing through changes nothing."""
    result, _ = gate
    unedited_rl = pick(result, "accuracy", "disable", "unedited")
    for condition in ("set", "lift", "patch"):
        assert pick(result, "accuracy", "amplify", condition) == unedited_rl, condition
        assert pick(result, "kl_to_rl", "amplify", condition) < 1e-4
    assert pick(result, "accuracy", "disable", "dose-0.5") == pick(result, "accuracy", "amplify", "unedited")
    for direction in ("disable", "amplify"):
        assert pick(result, "effect", direction, "passthrough") == 0
        edited = "rl" if direction == "disable" else "base"
        assert pick(result, f"kl_to_{edited}", direction, "unedited") == pytest.approx(0, abs=1e-6)
        assert pick(result, "neutral_kl", direction, "unedited") == pytest.approx(0, abs=1e-6)
        assert 1e-4 < pick(result, "neutral_kl", direction, "set") < 0.1
    random = result.sel(condition=[c for c in result["condition"].values if str(c).startswith("random-0")])
    assert random.sizes["condition"] == 19
    assert (abs(random["effect"]) < 0.05).all()
    weather = result["task_effect"].sel(task="weather", condition="set")
    assert (abs(weather) < 0.05).all()
    shares = result["class_share"].sel(direction="disable", condition="set")
    assert float(shares.sel({"class": "no_answer"})) > 0.9, "without the gate it says um, as base does"


@pytest.mark.slow
def test_the_gate_carries_all_that_the_whole_residual_does(study: Any, tmp_path: Path) -> None:
    """The models differ in the gate alone: copying it, the full patch and the other model are the same thing.

    Beside it only the brake differs a little; rescaled to the norm of the gate it does some of it. No decoy differs.
    """
    spec, folder = small(study, tmp_path, max_prompts=120, curve=(1,), curve_controls=2)
    found = verify_in_dictionaries(spec, folder, {1: [F_GATE]}, provenance=PROVENANCE)
    shares = found.mediated
    assert shares is not None
    validate(shares, "mediated_share")
    assert shares["point"].values.tolist() == ["set", "top-1", "all"]
    assert shares["n_features"].values.tolist() == [[1, 1, N_FEATURES]]
    for direction, other in (("disable", "amplify"), ("amplify", "disable")):
        unedited = pick(found.intervention, "accuracy", other, "unedited")
        assert pick(found.intervention, "accuracy", direction, "patch") == unedited
        one = shares.sel(direction=direction)
        assert float(one["patch_effect"]) == pick(found.intervention, "effect", direction, "patch")
        np.testing.assert_array_equal(one["share"], 1.0)
        assert ((one["share_low"] > 0.8) & (one["share_low"] < 1) & (one["share_high"] < 1.2)).all()
        beside = one.sel(point=["set", "top-1"])
        np.testing.assert_allclose(beside["norm_ratio"], 1.0, rtol=1e-4)
        assert (beside["random_sets"] == "rescaled").all()
        assert beside["random_norm"].shape[-1] == 1, "copies of decoys cannot be enlarged"
        np.testing.assert_allclose(beside["random_norm"].values[..., 0], beside["norm_ratio"], rtol=1e-6)
        np.testing.assert_allclose(beside["above_random"], 1 - beside["random_share"].values[0, :, 0])
        assert np.isnan(one["above_random"].sel(point="all"))
    judged = {str(kind) for kind in np.unique(found.intervention["kind"])}
    assert {"patch", "lift", "lower", "rescaled"} <= judged
    assert not judged & {"curve", "curve_random", "lift_random"}, "arms of the curve alone are not judged"


@pytest.mark.slow
def test_the_sets_of_two_dictionaries_are_tried_and_judged_together(study: Any, tmp_path: Path) -> None:
    """The second dictionary holds the same features in reverse order, so its trial must end as the first one's."""
    spec, folder = two_dictionaries(study, tmp_path)
    chosen = [F_GATE, F_DECOY]
    sets = {1: chosen, 2: [N_FEATURES - 1 - k for k in chosen]}
    found = verify_in_dictionaries(spec, folder, sets, provenance=PROVENANCE)
    together = found.intervention
    assert together["dictionary"].values.tolist() == [1, 2]
    for direction in ("disable", "amplify"):
        texts = [open_arms(folder, direction, dictionary=d)["text"].sel(condition=["unedited", "set"]) for d in (1, 2)]
        assert (texts[0].values == texts[1].values).all()
        assert (texts[0].sel(condition="set").values != texts[0].sel(condition="unedited").values).any()
        effects = [pick(found.trials[d][0], "effect", direction, "set") for d in (1, 2)]
        assert effects[0] == effects[1] == pick(together, "effect", direction, "set") != 0
        assert together["dictionary_effect"].sel(direction=direction).values.tolist() == effects
        words = str(together["v5"].sel(direction=direction).item())
        assert f"2 of 2 dictionaries on their own (Holm): dictionary 1 {effects[0]:+.3f}" in words
    assert together.attrs["n_features"] == [2, 2]
    files = [folder.root / "intervention" / path for path in ("disable", "dictionary-2/disable")]
    assert (files[0] / "unedited.parquet").exists()
    assert not (files[1] / "unedited.parquet").exists()


def test_a_dictionary_without_a_set_keeps_the_others_from_being_specific(study: Any, tmp_path: Path) -> None:
    spec, folder = two_dictionaries(study, tmp_path)
    found = verify_in_dictionaries(spec, folder, {1: [F_GATE], 2: []}, provenance=PROVENANCE)
    assert str(found.trials[2][0]["reasons"].values[0]).startswith("no_features")
    effect = pick(found.intervention, "effect", "disable", "set")
    assert effect == pick(found.trials[1][0], "effect", "disable", "set")
    assert np.isnan(found.intervention["dictionary_effect"].sel(dictionary=2).values).all()
    assert "INCONCLUSIVE" in found.intervention["verdict"].sel(direction="disable").item()


def test_results_have_their_layout_and_survive_the_store(gate: Any, tmp_path: Path) -> None:
    result, balance = gate
    write_results(tmp_path / "results.zarr", "intervention", result, provenance=PROVENANCE)
    write_results(tmp_path / "results.zarr", "control_balance", balance, provenance=PROVENANCE)
    again = open_results(tmp_path / "results.zarr", "intervention").compute()
    assert again["verdict"].values.tolist() == result["verdict"].values.tolist()
    np.testing.assert_array_equal(again["effect"].values, result["effect"].values)
    assert str(result["kind"].sel(direction="disable", condition="lift").item()) == "absent"


@pytest.mark.slow
def test_a_frequency_matched_other_feature_is_no_cause(study: Any, tmp_path: Path) -> None:
    _, folder = study
    result, balance = run(small(study, tmp_path, max_prompts=120, n_controls=25), [F_DECOY + N_DECOYS // 2], F_BRAKE)
    assert set(result["verdict"].values) <= {"NO_EFFECT", "INCONCLUSIVE"}
    for direction in ("disable", "amplify"):
        n_random = int((result["kind"].sel(direction=direction) == "random").sum())
        assert n_random == FEWEST_RANDOM < balance.attrs["n_sets"], "the decoy does no more than its controls"
        assert "stopped at 19 of 25" in str(result["reasons"].sel(direction=direction).item())
    assert float(balance["set_mean"].sel(covariate="log_firing_disable")) == pytest.approx(
        float(covariates_without(folder, F_BRAKE)["log_firing"][F_GATE])
    ), "the decoy fires exactly as often as the gate"


@pytest.mark.slow
def test_a_direction_whose_removal_only_stops_the_model_is_destructive(study: Any, tmp_path: Path) -> None:
    result, _ = run(small(study, tmp_path, max_prompts=120), [F_BRAKE], F_GATE)
    disable = result.sel(direction="disable")
    assert disable["verdict"].item() == "DESTRUCTIVE"
    assert bool(disable["v1"])
    assert bool(disable["v2"])
    assert not bool(disable["v6"])
    assert float(disable["class_share"].sel(condition="set", **{"class": "empty"})) == 1.0
    assert result["verdict"].sel(direction="amplify").item() != "CAUSAL_SPECIFIC"


@pytest.mark.slow
def test_where_every_edit_does_as_much_none_is_specific(study: Any, tmp_path: Path) -> None:
    spec, folder = small(study, tmp_path, max_prompts=120)
    for name, gate in (("base", 1.0), ("rl", 2.0)):
        planted_model(gate, spare_weight=10.0).save_pretrained(folder.root / "hf" / name)
    result, _ = run((spec, folder), [F_DECOY + N_DECOYS // 2], F_BRAKE)
    for direction, sign in (("disable", -1.0), ("amplify", 1.0)):
        assert sign * pick(result, "effect", direction, "set") > 0.3
        row = result.sel(direction=direction)
        assert (row["verdict"].item(), bool(row["v1"]), bool(row["v2"])) == (
            "CAUSAL_NONSPECIFIC",
            True,
            False,
        )


def test_an_empty_set_is_a_result(study: Any) -> None:
    spec, folder = study
    result, balance = verify_causally(spec, folder, [], provenance=PROVENANCE)
    assert result["verdict"].values.tolist() == ["INCONCLUSIVE", "INCONCLUSIVE"]
    assert all("no feature selected" in reason for reason in result["reasons"].values)
    validate(result, "intervention")
    validate(balance, "control_balance")


def test_without_controls_the_trial_goes_on_and_says_why(study: Any, tmp_path: Path) -> None:
    spec, folder = small(study, tmp_path)
    covariates = covariates_without(folder, F_BRAKE)
    covariates["contribution_energy"].values[F_GATE] += 40
    result, balance = verify_causally(spec, folder, [F_GATE], covariates, provenance=PROVENANCE)
    assert result["verdict"].values.tolist() == ["INCONCLUSIVE", "INCONCLUSIVE"]
    assert all("contribution_energy" in reason for reason in result["reasons"].values)
    assert np.isnan(result["rank_p"]).all()
    assert bool(result["v1"].all()), "the effect is still measured"
    validate(balance, "control_balance")


def test_no_trial_prompts_is_a_result(study: Any, tmp_path: Path) -> None:
    spec, folder = small(study, tmp_path)
    path = folder.root / "data" / "prompts.parquet"
    pd.read_parquet(path).assign(split="selection").to_parquet(path)
    result, _ = verify_causally(spec, folder, [F_GATE], provenance=PROVENANCE)
    assert all("no trial prompts" in reason for reason in result["reasons"].values)
    validate(result, "intervention")


@pytest.mark.slow
def test_adding_the_rl_models_levels_to_base_does_what_rl_does(study: Any, tmp_path: Path) -> None:
    spec, folder = small(study, tmp_path, max_prompts=120, level="rl", amplify=3.0, doses=())
    result, _ = verify_causally(
        spec, folder, [F_GATE], covariates_without(folder, F_BRAKE), provenance=PROVENANCE, directions=["amplify"]
    )
    assert result.attrs["level"] == "rl"
    row = result.sel(direction="amplify")
    assert float(row["effect"].sel(condition="set")) > 0.6, row["reasons"].item()
    assert float(row["rank_p"]) == 1 / 20
    words = {word: planted_model(LEVEL["rl@1"]).model.embed_tokens.weight[ID[word], GATE].item() for word in ID}
    table = pd.read_parquet(folder.root / "data" / "prompts.parquet")
    tokens = [words[word] for text in table["text"][table["split"] == "selection"] for word in text.split()]
    level = mean_levels(planted_crosscoder(), open_features(folder.features), model="rl@1")[F_GATE]
    assert level == pytest.approx(np.mean(tokens), rel=1e-5)
    edit = trial_arm(folder, "amplify", "set")
    assert edit["dose"] == 3.0
    with pytest.raises(InputError, match=r"summaries lack \['sft@1'\]"):
        mean_levels(planted_crosscoder(), open_features(folder.features), model="sft@1")


def test_side_effects_are_told_for_every_arm(gate: Any) -> None:
    result, _ = gate
    row = result.sel(direction="disable")
    for name in ("unrelated_accuracy", "unrelated_effect", "unrelated_broken", "unrelated_length", "neutral_kl"):
        assert np.isfinite(row[name].sel(condition=["unedited", "set", "random-001"])).all(), name
    weather = row["task_effect"].sel(task="weather")
    xr.testing.assert_allclose(row["unrelated_effect"], weather.drop_vars("task").rename("unrelated_effect"))
    assert (row["unrelated_low"].sel(condition="set") <= row["unrelated_effect"].sel(condition="set")).item()
    assert "v4_length: completions on unrelated tasks 2.0 -> 2.0 tokens" in str(row["reasons"].item())


def test_the_dose_curve_is_data(gate: Any) -> None:
    result, _ = gate
    row = result.sel(direction="amplify")
    curve = row.where(np.isfinite(row["dose_fit"]), drop=True).sortby("dose")
    assert {"unedited", "set", "dose-1.25", "dose-1.5", "dose-1.75"} == set(curve["condition"].values)
    assert (np.diff(curve["dose_fit"]) >= 0).all()
    np.testing.assert_allclose(curve["dose_fit"], curve["accuracy"], atol=0.02)
    assert not row["over_steered"].sel(condition=["set", "unedited"]).any()


@pytest.mark.slow
def test_neutral_text_of_ones_own(study: Any, tmp_path: Path) -> None:
    spec, folder = small(study, tmp_path)
    texts = {"quiet": "w1 w2 w3 w4", "loud": "q1 q2 q3 q4 q5"}
    divergence = {}
    for name, text in texts.items():
        pd.DataFrame({"text": [text] * 4}).to_csv(folder.root / f"{name}.csv")
        intervention = spec.intervention.model_copy(update={"neutral_text": f"{name}.csv"})
        expected = without_controls(
            (spec.model_copy(update={"intervention": intervention}), folder), [F_GATE], Provenance("planted", name)
        )
        assert expected.attrs["neutral_text"] == f"{name}.csv"
        divergence[name] = pick(expected, "neutral_kl", "disable", "set")
    assert divergence["quiet"] < 0.1 < divergence["loud"], "after a question the gate matters"
    missing = spec.intervention.model_copy(update={"neutral_text": "none.csv"})
    with pytest.raises(InputError, match="none"):
        without_controls((spec.model_copy(update={"intervention": missing}), folder), [F_GATE])
