"""The second step: arms on live models, kept on disk, resumed and shared."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from rlgen_stats.schemas.errors import InputError, RefusedError, StoreError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import Provenance, open_arms
from rlgen_stats.stores.trial_completions import ArmFiles
from rlgen_stats.toolkit.intervention import Condition, FeatureEdit, plan_trial
from rlgen_stats.toolkit.progress import SILENT
from rlgen_stats.toolkit.statistics.causal.criteria import FEWEST_RANDOM
from rlgen_stats.toolkit.trial import run_trial as trial
from rlgen_stats.toolkit.trial.arms import UNEDITED, Arm
from rlgen_stats.toolkit.trial.divergence import forced_texts
from rlgen_stats.toolkit.trial.plan import check_size
from tests.trial.planted import (
    F_BRAKE,
    F_GATE,
    GATE,
    ID,
    N_PROMPTS,
    PROVENANCE,
    WIDTH,
    planted_crosscoder,
)
from tests.trial.trials import (
    Counted,
    copy_of,
    pick,
    run,
    small,
    without_controls,
)


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
    result, _ = gate
    for direction in ("disable", "amplify"):
        kinds = result["kind"].sel(direction=direction)
        names = {str(c) for c in result["condition"].values[kinds.values != "absent"]}
        files = {file.stem for file in (folder.root / "intervention" / direction).glob("*.parquet")}
        assert files >= names
        assert all("-all" in name or "-top-" in name or "-random-" in name for name in files - names)
        frame = pd.read_parquet(folder.root / "intervention" / direction / "set.parquet")
        assert len(frame) == spec.intervention.max_prompts
        assert {"prompt", "sample", "text", "correct", "format_class", "n_tokens"} <= set(frame.columns)
        target = frame["prompt"].str.contains("algebra|logic")
        assert frame["correct"][target].mean() == pytest.approx(pick(result, "accuracy", direction, "set"))


def test_completions_of_all_arms_open_with_labels(study: Any, gate: Any, parts: xr.Dataset) -> None:
    result, _ = gate
    arms = open_arms(study[1], "disable")
    assert {"unedited", "set", "dose-0.5", "random-001"} <= set(arms["condition"].values)
    assert str(arms["kind"].sel(condition="random-001").item()) == "random"
    assert float(arms["dose"].sel(condition="dose-0.5")) == 0.5
    on_target = arms.correct.sel(prompt=arms["task"].isin(["algebra", "logic"]))
    for condition in ("unedited", "set"):
        assert float(on_target.sel(condition=condition).mean()) == pick(result, "accuracy", "disable", condition)
    assert (arms["format_class"].sel(condition="set").values == "no_answer").mean() > 0.5
    on_target = arms.sel(prompt=arms["task"].isin(["algebra", "logic"]))
    for condition, name in (("set", "kl_to_rl"), ("set", "forced_kl_to_rl"), ("random-001", "kl_to_base")):
        expected = pick(result, name, "disable", condition)
        assert float(on_target[name].sel(condition=condition).mean()) == pytest.approx(expected)
        assert expected > 1e-3
    assert arms["forced_kl_to_rl"].sel(condition="random-001").isnull().all()
    of_trial = open_arms(study[1].root, "disable", trial="three")
    assert {f"single-{F_GATE}", f"without-{F_GATE}", "set", "unedited"} <= set(of_trial["condition"].values)
    assert "random-001" not in of_trial["condition"].values
    assert float(of_trial.correct.sel(condition=f"single-{F_GATE}").mean()) == float(
        arms.correct.sel(condition="set").mean()
    )
    assert of_trial["kl_to_base"].sel(condition=f"single-{F_GATE}").isnull().all()
    assert of_trial["kl_to_base"].sel(condition="unedited").notnull().any()
    with pytest.raises(StoreError, match=r"has no arms; run rlgen-stats intervene"):
        open_arms(study[1], "disable", trial="unknown")


def in_small_batches(study: Any, root: Path) -> Any:
    """Four arms of 40 completions fill eight batches of 16."""
    spec, folder = small(study, root)
    generation = spec.generation.model_copy(update={"batch_size": 16})
    return spec.model_copy(update={"generation": generation}), folder


def test_a_killed_trial_resumes_where_it_was(study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed, other = in_small_batches(study, tmp_path / "a"), in_small_batches(study, tmp_path / "b")
    arms, calls, genuine = [0], [0], trial.answer_in_arms

    def counted(*args: Any, seeds: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt
        arms[0] += len(seeds)
        return genuine(*args, seeds=seeds, **kwargs)

    monkeypatch.setattr(trial, "answer_in_arms", counted)
    with pytest.raises(KeyboardInterrupt):
        without_controls(killed, [F_GATE])
    before = arms[0]
    assert before >= 8, "both unedited arms, and two times some"
    again = Counted()
    resumed = without_controls(killed, [F_GATE], progress=again)
    plan = plan_trial(*killed, [F_GATE], provenance=PROVENANCE)
    total = sum(plan.stored.values())
    assert arms[0] == total, "arms finished before the kill are not run again"
    assert again.before / (again.now + again.before) == pytest.approx(before / total), "nor counted as fast"
    monkeypatch.setattr(trial, "answer_in_arms", genuine)
    xr.testing.assert_identical(resumed, without_controls(other, [F_GATE]))


def test_arms_that_share_batches_are_what_they_are_alone(study: Any, tmp_path: Path) -> None:
    """All kinds of edits, four arms at a time in refilled batches; equal but for the rounding of probabilities."""
    spec, folder = in_small_batches(study, tmp_path)
    plan = plan_trial(spec, folder, [F_GATE], provenance=PROVENANCE)
    rng = np.random.default_rng(0)
    for one in plan.directions:
        arms = list({arm.condition.kind: arm for arm in one.arms}.values())
        arms = [arm.with_vector(rng.normal(size=WIDTH)) if arm.needs_vector else arm for arm in arms]
        assert len(arms) >= 10
        together = trial.LiveTrial(replace(plan, files=ArmFiles(tmp_path / "together"))).run_arms(one.direction, arms)
        alone = trial.LiveTrial(replace(plan, files=ArmFiles(tmp_path / "alone")))
        for arm, frame in zip(arms, together, strict=True):
            pd.testing.assert_frame_equal(frame, alone.run_arm(one.direction, arm))
        assert len({tuple(frame["text"]) for frame in together}) > 3


@pytest.mark.parametrize(("positions", "n_reads"), [("all", 5), ("completion", 1)])
def test_prompts_are_read_once_for_all_arms_that_change_nothing_in_them(
    study: Any, tmp_path: Path, positions: Any, n_reads: int
) -> None:
    """Unedited and fresh arms read alike; edits of whole prompts do not, edits that begin at the completion do."""
    spec, folder = in_small_batches(study, tmp_path)
    plan = plan_trial(spec, folder, [F_GATE], provenance=PROVENANCE)
    where = {"positions": positions, "skip_first": 1}
    edits = [FeatureEdit((F_GATE,), "amplify", dose, **where) for dose in (0.0, 0.5, 2.0, 4.0)]
    arms = [UNEDITED, replace(UNEDITED, condition=Condition("fresh", "fresh", 1.0), fresh=True)]
    arms += [Arm(Condition(f"dose-{edit.dose}", "dose", 1.0), edit) for edit in edits]
    live = trial.LiveTrial(plan)
    read: list[int] = []

    def record(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["past_key_values"] is None:
            read.append(len(kwargs["input_ids"]))

    handle = live.model("rl").register_forward_pre_hook(record, with_kwargs=True)
    together = live._complete("disable", arms, SILENT)
    handle.remove()
    first = slice(None, -1 if positions == "completion" else None)  # the last token is read under the edit
    assert sum(read) == n_reads * len({tuple(ids[first]) for ids in live.texts.prompts["rl"]})
    for arm, frame in zip(arms, together, strict=True):
        pd.testing.assert_frame_equal(frame, live._complete("disable", [arm], SILENT)[0])
    assert len({tuple(frame["text"]) for frame in together}) > 3


def test_arms_are_equal_to_the_bit_where_batches_are_the_same(study: Any, tmp_path: Path) -> None:
    """One row a pass: what an arm's logits are does not depend on the arms that ran before."""
    spec, folder = in_small_batches(study, tmp_path)
    generation = spec.generation.model_copy(update={"batch_size": 1})
    plan = plan_trial(spec.model_copy(update={"generation": generation}), folder, [F_GATE], provenance=PROVENANCE)
    arms = [UNEDITED, plan.directions[0].set_arm]
    live = trial.LiveTrial(plan)
    seen: list[Any] = []
    handle = live.model("rl").register_forward_hook(lambda module, args, output: seen.append(output.logits[:, -1]))
    live._complete("disable", arms, SILENT)
    together = torch.cat(seen)
    seen.clear()
    for arm in arms:
        live._complete("disable", [arm], SILENT)
    handle.remove()
    assert torch.equal(together, torch.cat(seen))


def test_arms_of_another_trial_are_not_taken_for_this_ones(study: Any, tmp_path: Path) -> None:
    same_folder = small(study, tmp_path)
    first = without_controls(same_folder, [F_GATE])
    again = without_controls(same_folder, [F_BRAKE], Provenance("planted", "key-two"))
    assert pick(first, "length", "disable", "set") == 2
    assert pick(again, "length", "disable", "set") == 1


def test_logits_that_overflow_are_reported_not_raised(study: Any, tmp_path: Path) -> None:
    result = without_controls(small(study, tmp_path, doses=(0.0, 0.5, 1e39)), [F_GATE])
    assert all("non_finite_logits: dose-1e+39" in reason for reason in result["reasons"].values)


def test_prompts_too_short_for_the_edited_positions_are_named(study: Any, tmp_path: Path) -> None:
    spec, folder = small(study, tmp_path)
    how = spec.extraction.model_copy(update={"segments": ("prompt",), "skip_first": 3})
    with pytest.raises(InputError, match=r"of \d+ prompts, e.g. '.*', have no token after the first 3"):
        run((spec.model_copy(update={"extraction": how}), folder), [F_GATE], F_BRAKE)


def test_the_models_are_left_as_they_were(study: Any, gate: Any) -> None:
    """Nothing of a trial is written into the models' folders."""
    _, folder = study
    assert sum(N_PROMPTS.values()) == 230
    for name in ("base", "rl"):
        assert not list((folder.root / "hf" / name).glob("*.partial"))
    assert not torch.is_inference_mode_enabled()


class Canned(trial.LiveTrial):
    """Models of the study, and arms whose outcomes are made up: two samples a prompt, each grade its own draw."""

    def __init__(self, plan: Any) -> None:
        super().__init__(plan)
        self.arms: dict[tuple[str, str], Arm] = {}
        self.frames: dict[tuple[str, str], pd.DataFrame] = {}

    def run_arms(self, direction: Any, arms: Any, probes: Any = None, progress: Any = None) -> list[pd.DataFrame]:
        return [self.made_up(direction, arm) for arm in arms]

    def made_up(self, direction: Any, arm: Arm) -> pd.DataFrame:
        self.arms[direction, arm.name] = arm
        if (direction, arm.name) in self.frames:
            return self.frames[direction, arm.name]
        n = self.plan.n_prompts * self.plan.n_samples
        draw = np.random.default_rng(derive_seed(0, direction, arm.name))
        target = np.tile(self.plan.prompts.target, self.plan.n_samples)
        correct = draw.random(n) < 0.5
        correct[target & (arm.condition.kind in ("set", "random"))] = False  # every random set does what the set does
        words = ["same" if arm.name == "unedited" or k % 4 else "other" for k in range(n)]
        kl = {name: np.tile(draw.random(self.plan.n_prompts), self.plan.n_samples) for name in trial.DIVERGENCES}
        forced = {name: values * np.nan for name, values in kl.items() if name.startswith("forced")}
        frame = pd.DataFrame(
            {
                **{"correct": correct, "format_class": np.where(correct, "answer", "no_answer"), "text": words},
                **{"n_tokens": draw.integers(1, 9, n), "finite": arm.name != "dose-0.5"},
                "token_ids": [[ID["=3"], ID["<eos>"]]] * n,
                **kl,
                **(forced if arm.condition.kind == "random" else {}),
            }
        )
        return self.frames.setdefault((direction, arm.name), frame)


@pytest.mark.parametrize("early_stop", [True, False])
def test_outcomes_of_several_samples_are_put_together_prompt_by_prompt(
    study: Any, tmp_path: Path, early_stop: bool
) -> None:
    spec, folder = small(study, tmp_path, n_samples=2, early_stop=early_stop, n_controls=25)
    plan = plan_trial(spec.model_copy(update={"seed": 4}), folder, [F_GATE], provenance=PROVENANCE)
    live = Canned(plan)
    both = trial.run_trial(plan, live=live)
    assert [one.table.direction for one in both] == ["disable", "amplify"]
    other = {"disable": "amplify", "amplify": "disable"}  # whose unedited arm is that of the other model
    for one in both:
        table, direction = one.table, one.table.direction
        frames = [live.frames[direction, condition.name] for condition in table.conditions]
        n, n_random = plan.n_prompts, sum(c.kind == "random" for c in table.conditions)
        assert n_random == (FEWEST_RANDOM if early_stop else plan.n_controls), "one that does as much is too many"
        for column, cube in (("correct", table.correct), ("n_tokens", table.n_tokens)):
            assert cube.shape == (len(frames), n, 2)
            for sample in (0, 1):
                rows = [frame[column].to_numpy()[sample * n : (sample + 1) * n] for frame in frames]
                np.testing.assert_array_equal(cube[:, :, sample], np.stack(rows))
        of_other = live.frames[other[direction], "unedited"]["correct"].to_numpy().reshape(2, n).T
        np.testing.assert_array_equal(table.other_ending == 0, of_other)
        forced = np.stack([frame["forced_kl_to_rl"].to_numpy()[:n] for frame in frames])
        np.testing.assert_array_equal(table.kl_to_rl, forced)
        assert one.non_finite == ("dose-0.5",)
        assert one.passthrough_changed == 0.25
        share = live.share_correct(direction, UNEDITED)
        np.testing.assert_array_equal(share, table.correct[table.unedited].mean(axis=1))


def test_steering_is_the_rl_models_residual_less_bases_and_the_random_direction_as_long(
    study: Any, tmp_path: Path
) -> None:
    spec, folder = small(study, tmp_path)
    plan = plan_trial(spec.model_copy(update={"seed": 4}), folder, [F_GATE], provenance=PROVENANCE)
    live = Canned(plan)
    trial.run_trial(plan, live=live)
    edits = {key: arm.edit for key, arm in live.arms.items() if arm.edit is not None and arm.edit.vector}
    assert len(edits) == 4
    steering = np.array(edits["disable", "steering"].vector)
    assert steering[GATE] > 0, "the RL model's gate is the higher one"
    assert np.abs(np.delete(steering, GATE)).max() < 1e-5
    draw = np.random.default_rng(derive_seed(4, "intervention", "random direction")).standard_normal(WIDTH)
    random = draw / np.linalg.norm(draw) * np.linalg.norm(steering)
    np.testing.assert_allclose(edits["amplify", "random-direction"].vector, random)
    assert {key: edit.strength for key, edit in edits.items() if key[0] == "disable"} == {
        ("disable", "steering"): -1.0,
        ("disable", "random-direction"): -1.0,
    }


def test_a_second_sample_leaves_the_first_as_it_is(study: Any, tmp_path: Path) -> None:
    frames = {}
    for n_samples in (1, 2):
        spec, folder = small(study, tmp_path / str(n_samples), n_samples=n_samples, max_prompts=12)
        plan = plan_trial(spec, folder, [F_GATE], provenance=PROVENANCE, directions=["disable"])
        frames[n_samples] = trial.LiveTrial(plan).run_arm("disable", UNEDITED)
    one, two = frames[1], frames[2]
    assert two["sample"].tolist() == [0] * 12 + [1] * 12
    assert two["prompt"].tolist() == one["prompt"].tolist() * 2
    pd.testing.assert_frame_equal(two.iloc[:12].reset_index(drop=True), one)
    assert (two["text"][12:].to_numpy() != one["text"].to_numpy()).any()


def test_arms_stop_and_are_graded_as_their_tasks_say(study: Any, tmp_path: Path) -> None:
    frames, hashes = {}, set()
    tasks = {
        "math": {"stop": ["="], "max_new_tokens": 3},
        "weather": {"grader": {"name": "regex", "pattern": "no such text"}},
    }
    for name, listed in (("free", {}), ("tasks", tasks)):
        spec, folder = small(study, tmp_path / name, max_prompts=12)
        spec = StudySpec.model_validate(spec.model_dump() | {"tasks": listed})
        plan = plan_trial(spec, folder, [F_GATE], provenance=PROVENANCE, directions=["disable"])
        frames[name] = trial.LiveTrial(plan).run_arm("disable", UNEDITED)
        hashes.add(plan.arm_hash("disable", UNEDITED))
    assert len(hashes) == 2
    free, own = frames["free"], frames["tasks"]
    math = free["task"] == "math"
    assert free["text"][math].str.contains("=").any()
    assert not own["text"][math].str.contains("=").any()
    assert not own["correct"][math].any()
    pd.testing.assert_series_equal(own["text"][~math], free["text"][~math])
    weather = free["task"] == "weather"
    assert free["correct"][weather].any()
    assert not own["correct"][weather].any()


def test_a_trial_too_small_to_call_anything_a_cause_is_refused_before_a_model_is_loaded(
    study: Any, tmp_path: Path
) -> None:
    spec, folder = small(study, tmp_path, accept_undecidable=False)
    shutil.rmtree(folder.root / "hf" / "rl")
    plan = plan_trial(spec, folder, [F_GATE], provenance=PROVENANCE)
    assert "cannot show v4_accuracy: side effects cannot be shown to be small with 10 clusters" in str(plan)
    with pytest.raises(RefusedError, match="clusters of unrelated prompts, 59 are needed"):
        trial.run_trial(plan)
    with pytest.raises(RefusedError, match="clusters of unrelated prompts, 59 are needed"):
        check_size(spec, folder)
    whole = spec.intervention.model_copy(update={"max_prompts": 230})
    check_size(spec.model_copy(update={"intervention": whole}), folder)


def test_a_dictionary_that_changed_since_planning_is_refused(study: Any, tmp_path: Path) -> None:
    spec, folder = small(study, tmp_path)
    plan = plan_trial(spec, folder, [F_GATE], provenance=PROVENANCE)
    other = planted_crosscoder()
    with torch.no_grad():
        other.decoder.mul_(2)
    other.save(folder.crosscoder("main"))
    with pytest.raises(StoreError, match="other weights than when the trial was planned"):
        trial.LiveTrial(plan).edit_site("disable")


def test_each_model_reads_the_trials_prompts_by_its_own_template(study: Any, tmp_path: Path) -> None:
    """Here a completion depends on the last token alone: the words before it change what is read, not the outcome."""
    spec, folder = small(study, tmp_path, n_controls=19)
    (folder.root / "chat.jinja").write_text("w1 w2 {{ messages[0]['content'] }}")
    sft, rl = spec.runs
    chat = spec.model_copy(update={"runs": (sft, rl.model_copy(update={"chat_template": "chat.jinja"}))})
    live = trial.LiveTrial(plan_trial(chat, folder, [F_GATE], provenance=PROVENANCE))
    base, read = live.texts.prompts["base"], live.texts.prompts["rl"]
    assert read == [[ID["w1"], ID["w2"], *ids] for ids in base]
    unedited = {name: live.run_arm(direction, UNEDITED) for direction, name in trial.EDITED.items()}
    texts, lengths, owner = forced_texts(live.plan, live.texts, unedited, 64)
    assert all(text[:2] == [ID["w1"], ID["w2"]] for text in texts[::2])  # RL writes every other one
    assert lengths[:2] == [len(read[owner[0]]), len(base[owner[1]])]
    found = without_controls((chat, folder), [F_GATE])
    plain = without_controls((spec, copy_of(folder, tmp_path / "plain")), [F_GATE])
    for direction in ("disable", "amplify"):
        for condition in ("unedited", "set"):
            assert pick(found, "accuracy", direction, condition) == pick(plain, "accuracy", direction, condition)
    other = copy_of(folder, tmp_path / "other")
    (other.root / "chat.jinja").write_text("{{ messages[0]['content'] }} w1")  # after which there is nothing to answer
    again = trial.LiveTrial(plan_trial(chat, other, [F_GATE], provenance=PROVENANCE))
    assert again.run_arm("disable", UNEDITED)["correct"].mean() < 0.3 < 0.5 < unedited["rl"]["correct"].mean()
    assert again.run_arm("amplify", UNEDITED)["text"].equals(unedited["base"]["text"])
