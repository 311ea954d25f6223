"""Whole trials on live models whose causes are planted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import xarray as xr

from rlgen_stats.schemas.errors import InputError, NotEstimableError, StoreError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.stores import Provenance, StudyFolder, open_arms, open_features, open_results, write_results
from rlgen_stats.toolkit.crosscoder import decoder_dataset
from rlgen_stats.toolkit.intervention import feature_covariates, feature_effects, plan_trial, verify_causally
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.statistics import match_features, reappearance
from rlgen_stats.toolkit.statistics.causal.covariates import mean_levels
from rlgen_stats.toolkit.trial import run as trial
from tests.trial.planted import (
    F_BRAKE,
    F_DECOY,
    F_GATE,
    GATE,
    ID,
    LEVEL,
    N_DECOYS,
    N_FEATURES,
    N_PROMPTS,
    PROVENANCE,
    planted_crosscoder,
    planted_model,
    planted_study,
)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return planted_study(tmp_path_factory.mktemp("planted"))


def covariates_without(folder: StudyFolder, feature: int) -> xr.Dataset:
    """Covariates in which one feature counts as dead, so that it cannot be drawn as a control."""
    found = feature_covariates(
        planted_crosscoder(), open_features(folder.features), models=["base@0", "rl@1"], view="rl@1"
    )
    found["log_firing"].values[feature] = -np.inf
    return found


def run(study: Any, features: list[int], dead: int) -> tuple[xr.Dataset, xr.Dataset]:
    spec, folder = study
    return verify_causally(spec, folder, features, covariates_without(folder, dead), provenance=PROVENANCE)


@pytest.fixture(scope="module")
def gate(study: Any) -> tuple[xr.Dataset, xr.Dataset]:
    return run(study, [F_GATE], F_BRAKE)


def pick(dataset: xr.Dataset, name: str, direction: str, condition: str) -> float:
    return float(dataset[name].sel(direction=direction, condition=condition))


def test_the_planted_gate_is_the_cause_in_both_directions(gate: Any) -> None:
    found, balance = gate
    assert found["verdict"].values.tolist() == ["CAUSAL_SPECIFIC", "CAUSAL_SPECIFIC"], found["reasons"].values
    assert found["rank_p"].values == pytest.approx([1 / 20] * 2)
    assert balance["balanced"].sel(covariate=["log_firing", "decoder_norm", "mas_bin"]).all()
    assert pick(found, "effect", "disable", "set") < -0.7
    assert pick(found, "effect", "amplify", "set") > 0.6
    assert found.attrs["features"] == [F_GATE]
    assert found.attrs["target_tasks"] == ["algebra", "logic"]
    assert found.attrs["unrelated_tasks"] == ["weather"]


def test_arms_that_must_agree_agree(gate: Any) -> None:
    """Doubling base's gate gives the RL model's; so does lifting it; passing through changes nothing."""
    found, _ = gate
    unedited_rl = pick(found, "accuracy", "disable", "unedited")
    for condition in ("set", "lift"):
        assert pick(found, "accuracy", "amplify", condition) == unedited_rl, condition
        assert pick(found, "kl_to_rl", "amplify", condition) < 1e-4
    assert pick(found, "accuracy", "disable", "dose-0.5") == pick(found, "accuracy", "amplify", "unedited")
    for direction in ("disable", "amplify"):
        assert pick(found, "effect", direction, "passthrough") == 0
        own = "rl" if direction == "disable" else "base"
        assert pick(found, f"kl_to_{own}", direction, "unedited") == pytest.approx(0, abs=1e-6)
        assert pick(found, "neutral_kl", direction, "unedited") == pytest.approx(0, abs=1e-6)
        assert 1e-4 < pick(found, "neutral_kl", direction, "set") < 0.1
    random = found.sel(condition=[c for c in found["condition"].values if str(c).startswith("random-0")])
    assert random.sizes["condition"] == 19
    assert (abs(random["effect"]) < 0.05).all()
    weather = found["task_effect"].sel(task="weather", condition="set")
    assert (abs(weather) < 0.05).all()
    shares = found["class_share"].sel(direction="disable", condition="set")
    assert float(shares.sel({"class": "no_answer"})) > 0.9, "without the gate it says um, as base does"


def test_the_set_is_edited_in_a_dictionary_of_another_seed_too(study: Any, tmp_path: Path) -> None:
    """The other dictionary holds the same features in another order, but one, so its arm must do what the set does."""
    spec, folder = study[0], StudyFolder(shutil.copytree(study[1].root, tmp_path / "study"))
    primary = spec.primary_crosscoder.model_copy(update={"replicates": 2})
    spec = spec.model_copy(
        update={
            "crosscoders": (primary,),
            "intervention": spec.intervention.model_copy(update={"n_controls": 2, "early_stop": False}),
        }
    )
    order = np.random.default_rng(1).permutation(N_FEATURES)
    other = planted_crosscoder()
    with torch.no_grad():
        for name in ("encoder", "decoder"):
            weights = getattr(other, name)
            axis = 1 if name == "decoder" else 2
            weights.copy_(weights.index_select(axis, torch.from_numpy(order)))
        other.encoder_bias.copy_(other.encoder_bias[..., torch.from_numpy(order)])
    other.save(folder.crosscoder("main.2"))
    covariates = covariates_without(folder, F_BRAKE)

    def held() -> xr.Dataset:
        return verify_causally(spec, folder, [F_GATE, F_DECOY], covariates, provenance=PROVENANCE)[0]

    without = held()
    assert "replicate" not in without["kind"].values
    assert all(str(words).endswith("not replicated there") for words in without["v5"].values)
    decoders = (decoder_dataset(c, np.full(N_FEATURES, 0.1)) for c in (planted_crosscoder(), other))
    matching = reappearance({"main.2": match_features(*decoders)}).expand_dims(crosscoder=["main"])
    places = np.argsort(order)
    assert matching["match"].sel(feature=F_GATE).item() == places[F_GATE]
    assert matching["matched"].sel(feature=F_GATE).item()
    matching["matched"].loc[{"feature": F_DECOY}] = False
    write_results(folder.results, "matching", matching, provenance=PROVENANCE)
    found = held()
    alone = verify_causally(spec, folder, [F_GATE], covariates, provenance=PROVENANCE, name="gate")[0]
    for direction in ("disable", "amplify"):
        words = str(found["v5"].sel(direction=direction).item())
        assert "1 of 1 dictionaries of other seeds (Holm; no random sets there): main.2" in words, words
        assert words.endswith("; main.2 has 1 of 2 features")
        arms, gate = open_arms(folder, direction), open_arms(folder, direction, trial="gate")
        texts = arms["text"].sel(condition="replicate-main.2").values
        assert (texts == gate["text"].sel(condition="set").values).all()
        assert (texts != arms["text"].sel(condition="unedited").values).any()
        effect = pick(found, "effect", direction, "replicate-main.2")
        assert effect == pick(alone, "effect", direction, "set") != 0
        assert pick(found, "effect", direction, "set") == pick(without, "effect", direction, "set")
    plan = plan_trial(spec, folder, [F_GATE, F_DECOY], provenance=PROVENANCE)
    kinds = {d: found["kind"].sel(direction=d).values for d in plan.arms}
    assert plan.arms == {d: int((kind != "absent").sum()) for d, kind in kinds.items()}
    planted_crosscoder().save(
        folder.crosscoder("main.2")
    )  # another dictionary of that name, with its own features there
    again = held()
    assert pick(again, "effect", "disable", "replicate-main.2") != pick(found, "effect", "disable", "replicate-main.2")


def test_results_have_their_layout_and_survive_the_store(gate: Any, tmp_path: Path) -> None:
    found, balance = gate
    write_results(tmp_path / "results.zarr", "intervention", found, provenance=PROVENANCE)
    write_results(tmp_path / "results.zarr", "control_balance", balance, provenance=PROVENANCE)
    again = open_results(tmp_path / "results.zarr", "intervention").compute()
    assert again["verdict"].values.tolist() == found["verdict"].values.tolist()
    np.testing.assert_array_equal(again["effect"].values, found["effect"].values)
    assert str(found["kind"].sel(direction="disable", condition="lift").item()) == "absent"


def test_seeds_are_paired_over_arms_but_the_fresh_one(study: Any, gate: Any) -> None:
    _, folder = study
    for direction in ("disable", "amplify"):
        texts = {
            name: pd.read_parquet(folder.root / "intervention" / direction / f"{name}.parquet")["text"]
            for name in ("unedited", "passthrough", "fresh")
        }
        assert (texts["unedited"] == texts["passthrough"]).all()
        assert (texts["unedited"] != texts["fresh"]).mean() > 0.1


def test_every_arm_is_on_disk_with_its_completions(study: Any, gate: Any) -> None:
    spec, folder = study
    found, _ = gate
    for direction in ("disable", "amplify"):
        kinds = found["kind"].sel(direction=direction)
        names = {str(c) for c in found["condition"].values[kinds.values != "absent"]}
        files = {file.stem for file in (folder.root / "intervention" / direction).glob("*.parquet")}
        assert files == names
        frame = pd.read_parquet(folder.root / "intervention" / direction / "set.parquet")
        assert len(frame) == spec.intervention.max_prompts
        assert {"prompt", "sample", "text", "correct", "format_class", "n_tokens"} <= set(frame.columns)
        target = frame["prompt"].str.contains("algebra|logic")
        assert frame["correct"][target].mean() == pytest.approx(pick(found, "accuracy", direction, "set"))


def test_a_frequency_matched_other_feature_is_no_cause(study: Any, tmp_path: Path) -> None:
    _, folder = study
    found, balance = run(small(study, tmp_path, max_prompts=120), [F_DECOY + N_DECOYS // 2], F_BRAKE)
    assert set(found["verdict"].values) <= {"NO_EFFECT", "INCONCLUSIVE"}
    for direction in ("disable", "amplify"):
        n_random = int((found["kind"].sel(direction=direction) == "random").sum())
        assert n_random < balance.attrs["n_sets"], "the decoy does no more than its controls: most need not be run"
        assert "v2_stopped: " in str(found["reasons"].sel(direction=direction).item())
    assert float(balance["set_mean"].sel(covariate="log_firing")) == pytest.approx(
        float(open_gate_covariates(folder)["log_firing"][F_GATE])
    ), "the decoy fires exactly as often as the gate"


def test_a_direction_whose_removal_only_stops_the_model_is_destructive(study: Any, tmp_path: Path) -> None:
    found, _ = run(small(study, tmp_path, max_prompts=120), [F_BRAKE], F_GATE)
    disable = found.sel(direction="disable")
    assert disable["verdict"].item() == "DESTRUCTIVE"
    assert bool(disable["v1"])
    assert bool(disable["v2"])
    assert not bool(disable["v6"])
    assert float(disable["class_share"].sel(condition="set", **{"class": "empty"})) == 1.0
    assert found["verdict"].sel(direction="amplify").item() != "CAUSAL_SPECIFIC"


def test_where_every_edit_does_as_much_none_is_specific(study: Any, tmp_path: Path) -> None:
    spec, folder = small(study, tmp_path, max_prompts=120)
    for name, gate in (("base", 1.0), ("rl", 2.0)):
        planted_model(gate, spare_weight=10.0).save_pretrained(folder.root / "hf" / name)
    found, _ = run((spec, folder), [F_DECOY + N_DECOYS // 2], F_BRAKE)
    for direction, sign in (("disable", -1.0), ("amplify", 1.0)):
        assert sign * pick(found, "effect", direction, "set") > 0.3
        told = found.sel(direction=direction)
        assert (told["verdict"].item(), bool(told["v1"]), bool(told["v2"])) == ("CAUSAL_NONSPECIFIC", True, False)


def trial_arm(folder: StudyFolder, direction: str, name: str) -> Any:
    """Condition of a stored arm."""
    path = folder.root / "intervention" / direction / f"{name}.parquet"
    return json.loads(pq.read_schema(path).metadata[b"rlgen_stats_condition"])


def open_gate_covariates(folder: StudyFolder) -> xr.Dataset:
    return covariates_without(folder, F_BRAKE)


def copy_of(folder: StudyFolder, root: Path) -> StudyFolder:
    """The study without its finished arms."""
    shutil.copytree(folder.root, root / "copy", ignore=shutil.ignore_patterns("intervention"))
    return StudyFolder(root / "copy")


# -- resuming, bad input


def small(study: Any, root: Path, **changes: Any) -> Any:
    spec, folder = study
    intervention = spec.intervention.model_copy(update={"max_prompts": 40, **changes})
    return spec.model_copy(update={"intervention": intervention}), copy_of(folder, root)


class Counted:
    """Progress that adds up what was done now and what before."""

    def __init__(self) -> None:
        self.now = self.before = 0.0

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "it") -> Iterator[Counted]:
        yield self

    def advance(self, amount: float = 1.0, **facts: object) -> None:
        self.now += amount

    def skip(self, amount: float, **facts: object) -> None:
        self.before += amount

    def log(self, message: str) -> None:
        pass


def without_controls(
    study: Any, features: list[int], provenance: Provenance = PROVENANCE, progress: Progress = SILENT
) -> xr.Dataset:
    """A short trial: nothing matches, so no random sets are run."""
    spec, folder = study
    covariates = covariates_without(folder, F_BRAKE).copy(deep=True)
    covariates["log_firing"].values[F_BRAKE] = covariates["log_firing"].values[F_GATE]
    covariates["contribution_energy"].values[features] += 40
    return verify_causally(spec, folder, features, covariates, provenance=provenance, progress=progress)[0]


def test_a_killed_trial_resumes_where_it_was(study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed, other = small(study, tmp_path / "a"), small(study, tmp_path / "b")
    calls, genuine = [0], trial.generate

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 9:
            raise KeyboardInterrupt
        return genuine(*args, **kwargs)

    monkeypatch.setattr(trial, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        without_controls(killed, [F_GATE])
    again = Counted()
    resumed = without_controls(killed, [F_GATE], progress=again)
    total = int((resumed["kind"] != "absent").sum())
    assert calls[0] == total + 1, "arms finished before the kill are not run again"
    assert again.before / (again.now + again.before) == pytest.approx(8 / total), "nor counted as fast"
    monkeypatch.setattr(trial, "generate", genuine)
    xr.testing.assert_identical(resumed, without_controls(other, [F_GATE]))


def test_arms_of_another_trial_are_not_taken_for_this_ones(study: Any, tmp_path: Path) -> None:
    same_folder = small(study, tmp_path)
    first = without_controls(same_folder, [F_GATE])
    again = without_controls(same_folder, [F_BRAKE], Provenance("planted", "key-two"))
    assert pick(first, "length", "disable", "set") == 2
    assert pick(again, "length", "disable", "set") == 1


def test_an_empty_set_is_a_result(study: Any) -> None:
    spec, folder = study
    found, balance = verify_causally(spec, folder, [], provenance=PROVENANCE)
    assert found["verdict"].values.tolist() == ["INCONCLUSIVE", "INCONCLUSIVE"]
    assert all("no feature selected" in reason for reason in found["reasons"].values)
    validate(found, "intervention")
    validate(balance, "control_balance")


def test_without_controls_the_trial_goes_on_and_says_why(study: Any, tmp_path: Path) -> None:
    spec, folder = small(study, tmp_path)
    covariates = covariates_without(folder, F_BRAKE)
    covariates["contribution_energy"].values[F_GATE] += 40
    found, balance = verify_causally(spec, folder, [F_GATE], covariates, provenance=PROVENANCE)
    assert found["verdict"].values.tolist() == ["INCONCLUSIVE", "INCONCLUSIVE"]
    assert all("contribution_energy" in reason for reason in found["reasons"].values)
    assert np.isnan(found["rank_p"]).all()
    assert bool(found["v1"].all()), "the effect is still measured"
    validate(balance, "control_balance")


def test_logits_that_overflow_are_reported_not_raised(study: Any, tmp_path: Path) -> None:
    found = without_controls(small(study, tmp_path, doses=(0.0, 0.5, 1e39)), [F_GATE])
    assert all("non_finite_logits: dose-1e+39" in reason for reason in found["reasons"].values)


def test_unknown_features_are_refused(study: Any) -> None:
    spec, folder = study
    with pytest.raises(InputError, match=f"0 to {N_FEATURES - 1}"):
        verify_causally(spec, folder, [N_FEATURES], provenance=PROVENANCE)


def test_no_verification_prompts_is_a_result(study: Any, tmp_path: Path) -> None:
    spec, folder = small(study, tmp_path)
    path = folder.root / "data" / "prompts.parquet"
    pd.read_parquet(path).assign(split="selection").to_parquet(path)
    found, _ = verify_causally(spec, folder, [F_GATE], provenance=PROVENANCE)
    assert all("no verification prompts" in reason for reason in found["reasons"].values)
    validate(found, "intervention")


def test_the_models_are_left_as_they_were(study: Any, gate: Any) -> None:
    """Nothing of a trial is written into the models' folders."""
    _, folder = study
    assert sum(N_PROMPTS.values()) == 230
    for name in ("base", "rl"):
        assert not list((folder.root / "hf" / name).glob("*.partial"))
    assert not torch.is_inference_mode_enabled()


def test_adding_the_rl_models_levels_to_base_does_what_rl_does(study: Any, tmp_path: Path) -> None:
    spec, folder = small(study, tmp_path, max_prompts=120, level="rl", amplify=3.0, doses=())
    found, _ = verify_causally(
        spec, folder, [F_GATE], covariates_without(folder, F_BRAKE), provenance=PROVENANCE, directions=["amplify"]
    )
    assert found.attrs["level"] == "rl"
    own = found.sel(direction="amplify")
    assert float(own["effect"].sel(condition="set")) > 0.6, own["reasons"].item()
    assert float(own["rank_p"]) == 1 / 20
    words = {word: planted_model(LEVEL["rl@1"]).model.embed_tokens.weight[ID[word], GATE].item() for word in ID}
    table = pd.read_parquet(folder.root / "data" / "prompts.parquet")
    tokens = [words[word] for text in table["text"][table["split"] == "selection"] for word in text.split()]
    level = mean_levels(planted_crosscoder(), open_features(folder.features), model="rl@1")[F_GATE]
    assert level == pytest.approx(np.mean(tokens), rel=1e-5)
    edit = trial_arm(folder, "amplify", "set")
    assert edit["dose"] == 3.0
    with pytest.raises(InputError, match=r"summaries lack \['sft@1'\]"):
        mean_levels(planted_crosscoder(), open_features(folder.features), model="sft@1")


def test_levels_need_prompts_that_no_trial_uses(study: Any) -> None:
    summaries = open_features(study[1].features)
    summaries = summaries.isel(prompt=np.flatnonzero(summaries["split"] == "verification"))
    with pytest.raises(NotEstimableError, match="levels of features are measured on prompts not kept"):
        mean_levels(planted_crosscoder(), summaries, model="rl@1")


def test_dead_features_are_refused(study: Any) -> None:
    spec, folder = study
    with pytest.raises(InputError, match=r"features \[1\] are dead: they fire on no token of base@0 or rl@1"):
        verify_causally(spec, folder, [F_GATE, F_BRAKE], covariates_without(folder, F_BRAKE), provenance=PROVENANCE)


def test_side_effects_are_told_for_every_arm(gate: Any) -> None:
    found, _ = gate
    own = found.sel(direction="disable")
    for name in ("unrelated_accuracy", "unrelated_effect", "unrelated_broken", "unrelated_length", "neutral_kl"):
        assert np.isfinite(own[name].sel(condition=["unedited", "set", "random-001"])).all(), name
    weather = own["task_effect"].sel(task="weather")
    xr.testing.assert_allclose(own["unrelated_effect"], weather.drop_vars("task").rename("unrelated_effect"))
    assert (own["unrelated_low"].sel(condition="set") <= own["unrelated_effect"].sel(condition="set")).item()
    assert "v4_length: completions on unrelated tasks 2.0 -> 2.0 tokens" in str(own["reasons"].item())


def test_the_dose_curve_is_data(gate: Any) -> None:
    found, _ = gate
    own = found.sel(direction="amplify")
    curve = own.where(np.isfinite(own["dose_fit"]), drop=True).sortby("dose")
    assert {"unedited", "set", "dose-1.5"} == set(curve["condition"].values)
    assert (np.diff(curve["dose_fit"]) >= 0).all()
    np.testing.assert_allclose(curve["dose_fit"], curve["accuracy"], atol=0.02)
    assert not own["over_steered"].sel(condition=["set", "unedited"]).any()


def test_neutral_text_of_ones_own(study: Any, tmp_path: Path) -> None:
    spec, folder = small(study, tmp_path)
    texts = {"quiet": "w1 w2 w3 w4", "loud": "q1 q2 q3 q4 q5"}
    divergence = {}
    for name, text in texts.items():
        pd.DataFrame({"text": [text] * 4}).to_csv(folder.root / f"{name}.csv")
        own = spec.intervention.model_copy(update={"neutral_text": f"{name}.csv"})
        told = without_controls(
            (spec.model_copy(update={"intervention": own}), folder), [F_GATE], Provenance("planted", name)
        )
        assert told.attrs["neutral_text"] == f"{name}.csv"
        divergence[name] = pick(told, "neutral_kl", "disable", "set")
    assert divergence["quiet"] < 0.1 < divergence["loud"], "after a question the gate matters"
    missing = spec.intervention.model_copy(update={"neutral_text": "none.csv"})
    with pytest.raises(InputError, match="none"):
        without_controls((spec.model_copy(update={"intervention": missing}), folder), [F_GATE])


# -- single features ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(study: Any) -> xr.Dataset:
    spec, folder = study
    chosen = [F_DECOY, F_GATE, F_DECOY + 1]
    return feature_effects(spec, folder, chosen, provenance=PROVENANCE, name="three")


def test_the_gate_carries_the_sets_effect(parts: xr.Dataset) -> None:
    assert parts["feature"].values.tolist() == [F_DECOY, F_GATE, F_DECOY + 1]
    for direction, sign in (("disable", -1), ("amplify", 1)):
        own = parts.sel(direction=direction)
        for way in ("alone", "left_out"):
            assert sign * float(own[way].sel(feature=F_GATE)) > 0.6
            assert float(own[f"{way}_q_value"].sel(feature=F_GATE)) < 0.01
            for decoy in (F_DECOY, F_DECOY + 1):
                assert abs(float(own[way].sel(feature=decoy))) < 0.05
                assert float(own[f"{way}_q_value"].sel(feature=decoy)) > 0.2
                assert float(own[f"{way}_low"].sel(feature=decoy)) < 0 < float(own[f"{way}_high"].sel(feature=decoy))


def test_one_feature_suffices_and_unused_prompts_say_so(study: Any, parts: xr.Dataset) -> None:
    for direction, sign in (("disable", -1), ("amplify", 1)):
        own = parts.sel(direction=direction)
        assert own["in_subset"].values.tolist() == [False, True, False]
        assert int(own["subset_size"]) == 1
        assert int(own["order"].sel(feature=F_GATE)) == 1
        assert np.isfinite(own["search_effect"].values).tolist() == [True, False, False]
        assert sign * float(own["subset_effect"]) > 0.6
        assert float(own["set_minus_subset_low"]) < 0 < float(own["set_minus_subset_high"])
    again = feature_effects(study[0], study[1], [F_DECOY, F_GATE, F_DECOY + 1], provenance=PROVENANCE, name="three")
    xr.testing.assert_identical(again, parts)


def test_effects_of_single_features_are_those_of_their_own_trials(parts: xr.Dataset, gate: Any) -> None:
    found, _ = gate
    for direction in ("disable", "amplify"):
        alone = float(parts["alone"].sel(direction=direction, feature=F_GATE))
        assert alone == pytest.approx(pick(found, "effect", direction, "set"))


def test_a_plan_knows_which_parts_are_done(study: Any, parts: xr.Dataset) -> None:
    spec, folder = study
    chosen = parts["feature"].values.tolist()
    plain, whole = (
        plan_trial(spec, folder, chosen, provenance=PROVENANCE, name="three", by_feature=by) for by in (False, True)
    )
    for direction in ("disable", "amplify"):
        assert whole.stored[direction] - plain.stored[direction] == 2 * len(chosen)
        assert whole.arms[direction] - plain.arms[direction] >= 2 * len(chosen)
    files = {file.stem for file in (folder.root / "intervention" / "three" / "disable").glob("*.parquet")}
    assert {f"{way}-{k}" for way in ("single", "without") for k in chosen} <= files


def test_parts_of_nothing_are_refused(study: Any) -> None:
    with pytest.raises(NotEstimableError, match=r"effects of single features cannot be measured \(no_features"):
        feature_effects(study[0], study[1], [], provenance=PROVENANCE)


def test_completions_of_all_arms_open_with_labels(study: Any, gate: Any, parts: xr.Dataset) -> None:
    found, _ = gate
    arms = open_arms(study[1], "disable")
    assert {"unedited", "set", "dose-0.5", "random-001"} <= set(arms["condition"].values)
    assert str(arms["kind"].sel(condition="random-001").item()) == "random"
    assert float(arms["dose"].sel(condition="dose-0.5")) == 0.5
    on_target = arms.correct.sel(prompt=arms["task"].isin(["algebra", "logic"]))
    for condition in ("unedited", "set"):
        assert float(on_target.sel(condition=condition).mean()) == pick(found, "accuracy", "disable", condition)
    assert (arms["format_class"].sel(condition="set").values == "no_answer").mean() > 0.5
    on_target = arms.sel(prompt=arms["task"].isin(["algebra", "logic"]))
    for condition, name in (("set", "kl_to_rl"), ("set", "forced_kl_to_rl"), ("random-001", "kl_to_base")):
        told = pick(found, name, "disable", condition)
        assert float(on_target[name].sel(condition=condition).mean()) == pytest.approx(told)
        assert told > 1e-3
    assert arms["forced_kl_to_rl"].sel(condition="random-001").isnull().all()
    own = open_arms(study[1].root, "disable", trial="three")
    assert {f"single-{F_GATE}", f"without-{F_GATE}", "set", "unedited"} <= set(own["condition"].values)
    assert "random-001" not in own["condition"].values
    assert float(own.correct.sel(condition=f"single-{F_GATE}").mean()) == float(
        arms.correct.sel(condition="set").mean()
    )
    assert own["kl_to_base"].sel(condition=f"single-{F_GATE}").isnull().all()
    assert own["kl_to_base"].sel(condition="unedited").notnull().any()
    with pytest.raises(StoreError, match=r"has no arms; run rlgen-stats intervene"):
        open_arms(study[1], "disable", trial="unknown")


def test_prompts_too_short_for_the_edited_positions_are_named(study: Any, tmp_path: Path) -> None:
    spec, folder = small(study, tmp_path)
    how = spec.extraction.model_copy(update={"segments": ("prompt",), "skip_first": 99})
    with pytest.raises(InputError, match=r"of \d+ prompts, e.g. '.*', have no token after the first 99"):
        run((spec.model_copy(update={"extraction": how}), folder), [F_GATE], F_BRAKE)
