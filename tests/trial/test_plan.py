"""The first step: everything a trial will do, known before a model is loaded."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import content_hash, derive_seed
from rlgen_stats.stores import StudyFolder, open_features, write_json
from rlgen_stats.stores.crosscoder_weights import weights_hash
from rlgen_stats.stores.prompts import load_prompts
from rlgen_stats.stores.trial_completions import write_arm
from rlgen_stats.toolkit.intervention import (
    feature_covariates,
    match_controls,
    near_duplicates,
    plan_trial,
    verify_causally,
)
from rlgen_stats.toolkit.statistics.causal.covariates import mean_levels
from rlgen_stats.toolkit.statistics.causal.criteria import FEWEST_RANDOM
from rlgen_stats.toolkit.statistics.causal.edit_norms import scaled
from rlgen_stats.toolkit.statistics.causal.findings import Check
from rlgen_stats.toolkit.trial.arms import UNEDITED, Arm, choose_prompts
from rlgen_stats.toolkit.trial.plan import TrialPlan
from rlgen_stats.toolkit.trial.token_codes import token_codes
from tests.trial.planted import (
    F_BRAKE,
    F_DECOY,
    F_GATE,
    N_FEATURES,
    PROVENANCE,
    planted_crosscoder,
)
from tests.trial.trials import covariates_without, small, two_dictionaries


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


def test_unknown_features_are_refused(study: Any) -> None:
    spec, folder = study
    with pytest.raises(InputError, match=f"0 to {N_FEATURES - 1}"):
        verify_causally(spec, folder, [N_FEATURES], provenance=PROVENANCE)


def test_dead_features_are_refused(study: Any) -> None:
    spec, folder = study
    with pytest.raises(InputError, match=r"features \[1\] are dead: they fire on no token of base@0 or rl@1"):
        verify_causally(spec, folder, [F_GATE, F_BRAKE], covariates_without(folder, F_BRAKE), provenance=PROVENANCE)


WITHOUT_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "peft", "trl"):
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, NoTorch())

import pickle
from pathlib import Path
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import Provenance, StudyFolder
from rlgen_stats.toolkit.trial.plan import plan_trial

spec = StudySpec.model_validate_json(Path(sys.argv[1]).read_text())
folder = StudyFolder(Path(sys.argv[2]))
codes = pickle.loads(Path(sys.argv[3]).read_bytes())
origin = Provenance("planted", "key-one")
plan = plan_trial(spec, folder, [0, 5], provenance=origin, by_feature=True, codes=codes)
print(plan)
print({d: [sorted(int(k) for k in row) for row in one.sets] for d, one in plan.declared.controls.items()})
"""


def test_a_plan_is_built_printed_and_costed_without_torch(study: Any, tmp_path: Path) -> None:
    spec, folder = study
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    prompts = choose_prompts(load_prompts(spec, folder), spec)["prompt"]
    codes = token_codes(spec, folder, folder.crosscoder("main"), rl="rl@1", prompts=list(prompts))
    (tmp_path / "codes").write_bytes(pickle.dumps(codes))
    files = [str(tmp_path / "spec.json"), str(folder.root), str(tmp_path / "codes")]
    command = [sys.executable, "-P", "-c", WITHOUT_TORCH, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    plan = plan_trial(spec, folder, [F_GATE, 5], provenance=PROVENANCE, by_feature=True)
    sets = {d: [sorted(int(k) for k in row) for row in one.sets] for d, one in plan.declared.controls.items()}
    assert done.stdout == f"{plan}\n{sets}\n"
    n_copying = sum(1 + len(point.random) for point in plan.direction("disable").curve)
    assert n_copying == sum(arm.edit is not None and arm.edit.kind == "lift" for arm in plan.direction("disable").arms)
    beside = n_copying + 1 + spec.intervention.curve_controls  # the full patch, rescaled random sets
    assert plan.arms == {"disable": 32 + beside, "amplify": 33 + beside}
    assert "features 0, 5\n230 prompts (120 target, 80 unrelated), 1 sample(s) each" in str(plan)
    assert f"at most {plan.completions:,} completions of up to 4 tokens" in str(plan)


def test_only_the_vectors_that_models_tell_are_missing_from_a_plan(study: Any) -> None:
    plan = plan_trial(*study, [F_GATE], provenance=PROVENANCE)
    for direction in plan.directions:
        missing = [arm.condition.kind for arm in direction.arms if arm.needs_vector]
        assert missing == ["steering", "random_direction"]
        assert direction.arms[0] == UNEDITED
        assert [arm.condition.kind for arm in direction.arms[-direction.n_random :]] == ["random"] * plan.n_controls
    steering = next(arm for arm in plan.direction("disable").arms if arm.name == "steering")
    filled = steering.with_vector(np.array([1.0, 2.0]))
    assert filled.edit is not None
    assert (filled.edit.vector, filled.edit.strength, filled.needs_vector) == ((1.0, 2.0), -1.0, False)


def test_a_plan_of_nothing_says_why(study: Any) -> None:
    plan = plan_trial(*study, [], provenance=PROVENANCE)
    assert (plan.arms, plan.stored, plan.completions, plan.n_prompts) == ({}, {}, 0, 0)
    assert plan.why_not == "no_features: no feature selected"
    assert str(plan) == "features none\nno_features: no feature selected"


@pytest.mark.parametrize(("n_asked", "refused"), [(19, False), (18, True)])
def test_a_set_without_matches_is_tried_where_enough_random_sets_were_asked_for(
    study: Any, n_asked: int, refused: bool
) -> None:
    """What cannot be matched is said by the verdict; refused is only what no set could pass."""
    spec, folder = study
    covariates = covariates_without(folder, F_BRAKE)
    covariates["contribution_energy"].values[F_GATE] += 40
    asked = spec.intervention.model_copy(update={"n_controls": n_asked})
    plan = plan_trial(
        spec.model_copy(update={"intervention": asked}), folder, [F_GATE], covariates, provenance=PROVENANCE
    )
    assert plan.direction("disable").n_random == 0
    assert plan.why_not
    assert [shortfall.check for shortfall in plan.shortfalls] == ([Check.V2_RANK] if refused else [])


def test_a_readout_that_failed_is_not_tried_unless_accepted(study: Any, tmp_path: Path) -> None:
    spec, folder = study[0], StudyFolder(tmp_path / "study")
    shutil.copytree(study[1].root, folder.root)
    readout = {"models": [], "checks": [], "healthy": False, "reasons": "dFVE of rl@1 is -4", "dfve_min": 0.3}
    record = {"weights_sha256": "w", "healthy": True, "reasons": "ok", "readout": "swap", "readout_models": readout}
    write_json(folder.crosscoder("main") / "health.json", record)
    plan = plan_trial(spec, folder, [F_GATE], provenance=PROVENANCE)
    assert (plan.declared.not_held, plan.arms) == ("readout_failed: dFVE of rl@1 is -4", {})
    main, *others = spec.crosscoders
    accepting = spec.model_copy(update={"crosscoders": (main.model_copy(update={"accept_unhealthy": True}), *others)})
    assert plan_trial(accepting, folder, [F_GATE], provenance=PROVENANCE).arms["disable"] > 20


def test_the_hash_of_an_arm_is_that_of_its_version(study: Any) -> None:
    """Arms already on disk must be found again: written out, what is hashed. Version 5: tokens drawn by Gumbel-max."""
    spec, folder = study
    plan = plan_trial(spec, folder, [F_GATE], provenance=PROVENANCE, directions=["disable"])
    edit = {
        **{"features": [F_GATE], "kind": "disable", "dose": None, "positions": "all"},
        **{"phases": ["prefill", "decode"], "skip_first": 1, "vector": [], "level": [], "gain": 1.0},
    }
    expected = {
        "version": 5,
        "facts": {"spec_hash": "key-one"},
        "site": ["disable", "rl@1", 0, "swap"],
        "arm": [edit, False, weights_hash(folder.crosscoder("main"))],
        "sampling": [{"max_new_tokens": 4, "temperature": 1.0, "top_p": 1.0}, 1, 0],
        "grader": {"name": "final_answer", "marker": "=", "require_termination": True},
        "prompts": plan.prompts.ids,
    }
    assert plan.arm_hash("disable", plan.direction("disable").set_arm) == content_hash(expected)
    set_path = plan.arm_path("disable", plan.direction("disable").set_arm)
    assert set_path == folder.root / "intervention" / "disable" / "set.parquet"


def test_seeds_and_controls_of_a_trial_are_those_of_earlier_releases(study: Any) -> None:
    """Written out, what each seed is derived from: another purpose would draw other completions and other controls."""
    spec, folder = study[0].model_copy(update={"seed": 3}), study[1]
    chosen = [F_DECOY + 5, F_GATE]
    plan = plan_trial(spec, folder, chosen, provenance=PROVENANCE)
    ids = plan.prompts.ids
    assert plan.sampling.seeds(ids, fresh=False) == [derive_seed(3, "intervention", prompt, 0) for prompt in ids]
    assert plan.sampling.seeds(ids, fresh=True) == [
        derive_seed(3, "intervention", "fresh", prompt, 0) for prompt in ids
    ]
    twice = replace(plan.sampling, n_samples=2).seeds(["a", "b"], fresh=False)
    assert twice == [derive_seed(3, "intervention", prompt, sample) for sample in (0, 1) for prompt in ("a", "b")]
    assert plan.declared.seeds == {
        direction: derive_seed(3, "intervention", "verdict", direction) for direction in ("disable", "amplify")
    }
    crosscoder = planted_crosscoder()
    near = near_duplicates(crosscoder, chosen)
    assert near.sum() > len(chosen), "some decoys are too like the chosen one to be its controls"
    codes = token_codes(spec, folder, folder.crosscoder("main"), rl="rl@1", prompts=ids)
    norms = {"disable": scaled(codes.rl, -1.0), "amplify": scaled(codes.base, 1.0)}
    for direction, controls in plan.declared.controls.items():
        expected = match_controls(
            feature_covariates(crosscoder, open_features(folder.features), models=["base@0", "rl@1"], view="rl@1"),
            chosen,
            norms[direction].of_each,
            n_sets=19,
            seed=derive_seed(3, "intervention", "controls"),
            near_duplicates=near,
        )
        np.testing.assert_array_equal(controls.sets, expected.sets)
        assert not near[controls.sets].any()
        xr.testing.assert_identical(controls.balance, expected.balance)


def test_each_direction_edits_its_model_at_its_view(study: Any) -> None:
    plan = plan_trial(*study, [F_GATE, F_GATE], provenance=PROVENANCE)
    assert plan.features == (F_GATE,), "a feature named twice is one feature"
    assert {direction: site.view for direction, site in plan.sites.items()} == {"disable": "rl@1", "amplify": "base@0"}
    assert {name: model.model for name, model in plan.models.items()} == {"base": "base@0", "rl": "rl@1"}
    sizes = {
        len(features): plan_trial(*study, features, provenance=PROVENANCE, by_feature=True).direction("disable")
        for features in ([F_GATE], [F_GATE, F_DECOY], [F_GATE, F_DECOY, F_DECOY + 1])
    }
    assert {n: one.n_search_sets for n, one in sizes.items()} == {1: 0, 2: 0, 3: 7}
    assert {n: len(one.parts) for n, one in sizes.items()} == {1: 0, 2: 2, 3: 6}


def test_the_rl_models_levels_are_added_in_every_amplified_set_and_nowhere_else(study: Any, tmp_path: Path) -> None:
    spec, folder = small(study, tmp_path, level="rl", non_inferiority=0.07)
    plan = plan_trial(spec, folder, [F_GATE, F_DECOY], provenance=PROVENANCE)
    levels = mean_levels(planted_crosscoder(), open_features(folder.features), model="rl@1")
    edits = {d: [arm.edit for arm in plan.direction(d).arms if arm.edit] for d in ("disable", "amplify")}
    amplified = [edit for edit in edits["amplify"] if edit.kind == "amplify"]
    n_doses = sum(arm.condition.kind == "dose" for arm in plan.direction("amplify").arms)
    assert len(amplified) == 1 + n_doses + 19 + spec.intervention.curve_controls
    for edit in amplified:
        assert edit.level == tuple(levels[list(edit.features)].tolist())
    assert all(edit.level == () for edit in edits["disable"])
    assert (plan.declared.margin, plan.declared.alpha) == (0.07, 0.05)


def store(plan: TrialPlan, arm: Arm, *, right: bool = True) -> None:
    """As if the arm had been run when disabling, with every answer right or none."""
    rows = pd.DataFrame({"correct": [right] * plan.n_prompts * plan.n_samples})
    write_arm(rows, plan.arm_path("disable", arm), plan.arm_hash("disable", arm), {})


def test_random_sets_that_a_futility_stop_left_out_are_not_to_be_run(study: Any, tmp_path: Path) -> None:
    spec, folder = small(study, tmp_path, n_controls=25, n_samples=2)

    def planned(**changes: Any) -> TrialPlan:
        changed = spec.intervention.model_copy(update=changes)
        return plan_trial(
            spec.model_copy(update={"intervention": changed}),
            folder,
            [F_GATE],
            provenance=PROVENANCE,
            directions=["disable"],
        )

    plan = planned()
    arms = plan.direction("disable").arms
    random = [arm for arm in arms if arm.condition.kind == "random"]
    assert len(random) == 25
    for arm in arms:
        if arm not in random[FEWEST_RANDOM - 1 :]:
            store(plan, arm)
    assert planned().completions == 7 * plan.n_prompts * 2, "one set more settles it"
    store(plan, random[FEWEST_RANDOM - 1])
    assert planned().completions == 0
    assert planned().arms["disable"] == planned().stored["disable"] == len(arms) - 6
    assert planned(early_stop=False).completions == 6 * plan.n_prompts * 2
    plan.arm_path("disable", random[0]).unlink()
    assert planned().completions == 7 * plan.n_prompts * 2, "nothing is settled before the first is there"
    store(plan, random[0])
    store(plan, plan.direction("disable").set_arm, right=False)
    assert planned().completions == 6 * plan.n_prompts * 2, "the set does more than any of them"


def test_an_arm_is_stored_where_its_file_holds_the_same_arm(study: Any, tmp_path: Path) -> None:
    spec, folder = small(study, tmp_path)
    plan = plan_trial(spec, folder, [F_GATE], provenance=PROVENANCE)
    arms = {arm.name: arm for arm in plan.direction("disable").arms}
    assert not any(plan.stored.values())
    for name in ("set", "steering"):
        write_arm(pd.DataFrame({"correct": [True]}), plan.arm_path("disable", arms[name]), "another arm", {})
        assert plan.is_stored("disable", arms[name]) == (name == "steering"), "whose vector only a run can tell"
    set_arm = arms["set"]
    store(plan, set_arm)
    assert plan.is_stored("disable", set_arm)
    again = plan_trial(spec, folder, [F_GATE], provenance=PROVENANCE)
    assert again.direction("disable").stored == {"set", "steering"}
    assert again.completions == plan.completions - 2 * plan.n_prompts


def test_arms_that_read_no_feature_are_shared_by_all_dictionaries(study: Any, tmp_path: Path) -> None:
    spec, folder = two_dictionaries(study, tmp_path)
    first, second = (plan_trial(spec, folder, [F_GATE], provenance=PROVENANCE, dictionary=d) for d in (1, 2))
    for arm in first.direction("amplify").arms:
        twin = next((other for other in second.direction("amplify").arms if other.name == arm.name), None)
        if twin is None:  # other features cannot be enlarged to the norm of the set
            assert "rescaled" in arm.name
            continue
        same_hash = first.arm_hash("amplify", arm) == second.arm_hash("amplify", twin)
        same_path = first.arm_path("amplify", arm) == second.arm_path("amplify", twin)
        shared = arm.condition.kind in ("unedited", "fresh", "steering", "random_direction", "patch")
        assert (same_hash, same_path) == (shared, shared), arm.name
