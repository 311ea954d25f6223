"""Prompts, doses and arms of a trial."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from rlgen_stats.schemas.seeds import content_hash, derive_seed
from rlgen_stats.schemas.study import ExtractionSpec, InterventionSpec
from rlgen_stats.toolkit.edits.edit import FeatureEdit
from rlgen_stats.toolkit.statistics.causal.edit_norms import ModelCodes, TokenCodes, copied
from rlgen_stats.toolkit.statistics.causal.outcome_table import Condition
from rlgen_stats.toolkit.trial.arms import (
    Arm,
    CopiedSet,
    choose_prompts,
    copying_arms,
    dose_grid,
    edited_positions,
    part_arm,
    part_arms,
    plan_arms,
    target_prompts,
)

PROMPT_COUNTS = {"math": 50, "sciq": 40, "logiqa": 8, "piqa": 40, "rocks": 60}


def table() -> pd.DataFrame:
    rows = [
        {
            "prompt": f"{task}-{i}",
            "text": "t",
            "answer": "a",
            "task": task,
            "domain": "in" if task == "math" else "out",
            "split": "trial" if i % 2 else ("selection", "verification")[i // 2 % 2],
            "cluster": f"{task}-{i}",
        }
        for task, n in PROMPT_COUNTS.items()
        for i in range(2 * n)
    ]
    return pd.DataFrame(rows)


class Plan:
    """The parts of a study spec that planning reads."""

    def __init__(self, controls: tuple[str, ...] = ("rocks",), **changes: Any) -> None:
        self.seed = changes.pop("seed", 0)
        self.selection = type("Selection", (), {"control_tasks": controls})()
        self.extraction = ExtractionSpec()
        self.intervention = InterventionSpec(**changes)


def chosen(**changes: Any) -> pd.DataFrame:
    return choose_prompts(table(), Plan(**changes))  # type: ignore[arg-type]


def test_prompts_are_spread_evenly_over_tasks_and_kept_out_of_selection() -> None:
    prompts = chosen(max_prompts=100)
    assert (prompts["split"] == "trial").all()
    counts = prompts["task"].value_counts().to_dict()
    assert counts["rocks"] == 25
    assert counts["logiqa"] == 8, "a small task gives what it has"
    assert abs(counts["math"] - counts["sciq"]) <= 1
    assert len(prompts) == 100
    assert chosen(max_prompts=100)["prompt"].tolist() == prompts["prompt"].tolist()
    assert chosen(max_prompts=100, seed=1)["prompt"].tolist() != prompts["prompt"].tolist()
    assert len(chosen(max_prompts=10_000)) == sum(PROMPT_COUNTS.values())
    assert chosen(max_prompts=100, controls=())["task"].value_counts().max() == 23


def test_a_prompt_is_chosen_whatever_its_outcome_or_place_in_the_file() -> None:
    shuffled = table().sample(frac=1.0, random_state=3)
    again = choose_prompts(shuffled.reset_index(drop=True), Plan(max_prompts=60))  # type: ignore[arg-type]
    assert set(again["prompt"]) == set(chosen(max_prompts=60)["prompt"])


@pytest.mark.parametrize(
    ("controls", "counts"),
    [
        (("rocks",), {"rocks": 20}),
        (("rocks", "piqa"), {"rocks": 20, "piqa": 20}),
        (("rocks", "piqa", "sciq"), {"rocks": 16}),
    ],
)
def test_each_unrelated_task_gets_a_quarter_while_all_together_get_no_more_than_half(
    controls: tuple[str, ...], counts: dict[str, int]
) -> None:
    got = chosen(max_prompts=80, controls=controls)["task"].value_counts()
    assert {task: int(got[task]) for task in counts} == counts


def test_the_hash_that_chooses_prompts_is_that_of_earlier_releases() -> None:
    prompts = chosen(max_prompts=40, seed=5, controls=())
    pool = table()[lambda t: (t["split"] == "trial") & (t["task"] == "rocks")]["prompt"]
    first = sorted(pool, key=lambda prompt: derive_seed(5, "intervention prompt", prompt))[:8]
    assert set(prompts["prompt"][prompts["task"] == "rocks"]) == set(first)


def test_effects_are_measured_out_of_domain_and_side_effects_on_controls() -> None:
    prompts = chosen(max_prompts=100)
    target, unrelated = target_prompts(prompts, Plan())  # type: ignore[arg-type]
    assert set(prompts["task"][target]) == {"sciq", "logiqa", "piqa"}
    assert set(prompts["task"][unrelated]) == {"rocks"}
    inside = prompts.assign(domain="in")
    target, _ = target_prompts(inside, Plan())  # type: ignore[arg-type]
    assert set(prompts["task"][target]) == {"sciq", "logiqa", "piqa", "math"}


@pytest.mark.parametrize(
    ("direction", "doses", "expected"),
    [
        ("disable", (0.0, 0.5, 2.0, 4.0), (0.25, 0.5, 0.75, 2.0, 4.0)),
        ("amplify", (0.0, 0.5, 2.0, 4.0), (0.0, 0.5, 1.25, 1.5, 1.75, 4.0)),
        ("disable", (0.1, 0.2), (0.1, 0.2, 0.25, 0.5, 0.75)),
        ("disable", (0.1, 0.2, 0.9), (0.1, 0.2, 0.9)),
        ("amplify", (1.0, 1.1, 1.2, 1.75), (1.1, 1.2, 1.75)),
    ],
)
def test_the_dose_grid_always_has_three_doses_between_nothing_and_the_main_one(
    direction: Any, doses: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    assert dose_grid(direction, InterventionSpec(doses=doses)) == expected


def test_edits_are_where_the_crosscoder_was_trained() -> None:
    assert edited_positions(ExtractionSpec()) == "all"
    assert edited_positions(ExtractionSpec(segments=("completion",))) == "completion"
    assert edited_positions(ExtractionSpec(segments=("prompt",))) == "prompt"


@pytest.mark.parametrize("direction", ["disable", "amplify"])
def test_the_plan_has_every_arm_once(direction: Any) -> None:
    steering = np.array([3.0, 0.0])
    arms = plan_arms(
        direction,
        [4, 2],
        np.array([[1, 3], [5, 6]]),
        Plan(),  # type: ignore[arg-type]
        steering=steering,
        random_direction=np.array([0.0, 3.0]),
    )
    names = [arm.name for arm in arms]
    assert len(set(names)) == len(names)
    kinds = [arm.condition.kind for arm in arms]
    for kind in ("fresh", "passthrough", "set", "steering", "random_direction", "patch"):
        assert kinds.count(kind) == 1
    assert kinds.count("random") == 2
    by_name = {arm.name: arm for arm in arms}
    assert by_name["set"].edit == FeatureEdit(
        (4, 2),
        "disable" if direction == "disable" else "amplify",
        None if direction == "disable" else 2.0,
        skip_first=1,
    )
    assert by_name["random-002"].edit is not None
    assert by_name["random-002"].edit.features == (5, 6)
    assert by_name["steering"].edit is not None
    assert by_name["steering"].edit.strength == (-1.0 if direction == "disable" else 1.0)
    assert [arm.fresh for arm in arms].count(True) == 1
    assert by_name["passthrough"].edit == FeatureEdit((), "passthrough", skip_first=1)
    assert by_name["fresh"].edit is None


def test_a_vector_that_adds_nothing_has_no_arm() -> None:
    no_sets = np.empty((0, 1), dtype=np.int64)
    arms = plan_arms("disable", [4], no_sets, Plan(), steering=np.zeros(2))  # type: ignore[arg-type]
    assert {arm.condition.kind for arm in arms} == {"fresh", "passthrough", "set", "dose", "patch"}


def test_random_sets_are_also_run_at_the_norm_of_the_set_where_they_have_one() -> None:
    sets = np.array([[1, 3], [5, 6], [7, 8]])
    arms = plan_arms("disable", [4, 2], sets, Plan(), gains=[1.5, 0.0])  # type: ignore[arg-type]
    by_name = {arm.name: arm for arm in arms}
    assert [name for name in by_name if name.startswith("rescaled")] == ["rescaled-001"]
    assert by_name["rescaled-001"].edit == FeatureEdit((1, 3), "disable", skip_first=1, gain=1.5)
    assert [name for name in by_name if name.startswith("random-0")] == ["random-001", "random-002", "random-003"]


@pytest.mark.parametrize(("direction", "name"), [("disable", "lower"), ("amplify", "lift")])
def test_sets_are_copied_from_the_other_model_with_their_random_sets(direction: Any, name: str) -> None:
    own = ModelCodes(sparse.csc_array(np.array([[3.0, 0.0, 1.0], [1.0, 0.0, 1.0]])), np.eye(3, dtype=np.float32))
    other = ModelCodes(sparse.csc_array(np.zeros((2, 3))), np.eye(3, dtype=np.float32))
    none = np.empty((0, 1), dtype=np.int64)
    sets = (
        CopiedSet("set", (0,), np.array([[2], [1]])),
        CopiedSet("top-1", (0,), np.array([[1]])),
        CopiedSet("all", (0, 1, 2), none),
    )
    arms, points = copying_arms(direction, sets, Plan(), copied(TokenCodes(own, other, 4.0)), 4.0)  # type: ignore[arg-type]
    assert {arm.name: (arm.condition.kind, arm.edit) for arm in arms} == {
        arm: (kind, FeatureEdit(features, "lift", skip_first=1))
        for arm, kind, features in (
            (name, name, (0,)),
            (f"{name}-random-1", "lift_random", (2,)),
            (f"{name}-random-2", "lift_random", (1,)),
            (f"{name}-top-1", "curve", (0,)),
            (f"{name}-top-1-random-1", "curve_random", (1,)),
            (f"{name}-all", "curve", (0, 1, 2)),
        )
    }
    assert [(p.label, p.n_features, p.arm, p.random) for p in points] == [
        ("set", 1, name, (f"{name}-random-1", f"{name}-random-2")),
        ("top-1", 1, f"{name}-top-1", (f"{name}-top-1-random-1",)),
        ("all", 3, f"{name}-all", ()),
    ]
    assert (points[0].norm_ratio, points[0].random_norm_ratios) == (0.5, (0.25, 0.0))
    assert points[2].norm_ratio == pytest.approx((10**0.5 + 2**0.5) / 2 / 4)


def test_copies_of_random_sets_are_rescaled_to_the_norm_of_the_set_where_asked() -> None:
    codes = np.array([[4.0, 0.0, 1.0, 3 / 9.9, 3 / 10.1], [2.0, 0.0, 1.0, 3 / 9.9, 3 / 10.1]])
    own, other = (ModelCodes(sparse.csc_array(c), np.eye(5, dtype=np.float32)) for c in (codes, 0 * codes))
    of_set = CopiedSet("set", (0,), np.array([[1], [2], [3], [4]]), rescaled=True)
    arms, (one,) = copying_arms("amplify", [of_set], Plan(), copied(TokenCodes(own, other, 6.0)), 6.0)  # type: ignore[arg-type]
    assert [(arm.name, arm.condition.kind) for arm in arms] == [
        ("lift", "lift"),
        ("lift-rescaled-2", "lift_random"),
        ("lift-rescaled-3", "lift_random"),
    ], "sets that change nothing, or next to nothing, have no arm"
    assert [(arm.edit.features, arm.edit.kind, arm.edit.gain) for arm in arms[1:] if arm.edit] == [
        ((2,), "lift", 3.0),
        ((3,), "lift", pytest.approx(9.9)),
    ]
    assert (one.random, one.rescaled) == (("lift-rescaled-2", "lift-rescaled-3"), True)
    assert (one.norm_ratio, one.random_norm_ratios) == (0.5, pytest.approx((0.5, 0.5)))


def test_a_part_edits_its_features_as_the_set_does_and_has_one_name() -> None:
    edit = FeatureEdit((4, 2, 7, 9), "amplify", 3.0, level=(0.4, 0.2, 0.7, 0.9))
    whole = Arm(Condition("set", "set", 3.0), edit)
    pair = part_arm(whole, (9, 4))
    assert pair == part_arm(whole, (4, 9))
    assert pair.edit == FeatureEdit((4, 9), "amplify", 3.0, level=(0.4, 0.9))
    assert pair.name == f"subset-{content_hash([4, 9])[:12]}" != part_arm(whole, (4, 2)).name
    assert (part_arm(whole, (7,)).name, part_arm(whole, (4, 2, 9)).name) == ("single-7", "without-7")
    assert part_arm(whole, (9, 7, 2, 4)) is whole
    assert [arm.name for arm in part_arms(whole)] == [
        f"{way}-{k}" for way in ("single", "without") for k in (4, 2, 7, 9)
    ]
