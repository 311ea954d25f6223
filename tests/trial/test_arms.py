"""The plan of a trial: prompts, doses, arms; and what is measured on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from rlgen_stats.schemas.study import ExtractionSpec, InterventionSpec
from rlgen_stats.toolkit.edits.edit import FeatureEdit
from rlgen_stats.toolkit.edits.hooks import editing
from rlgen_stats.toolkit.edits.site import EditSite
from rlgen_stats.toolkit.extraction.residual_stream import capture_residual
from rlgen_stats.toolkit.trial.arms import (
    choose_prompts,
    dose_grid,
    edited_positions,
    plan_arms,
    target_prompts,
)
from rlgen_stats.toolkit.trial.divergence import (
    divergences,
    log_probabilities,
    make_probe,
    mean_residual,
)
from tests.edits.tiny import RL, tiny_model

PROMPT_COUNTS = {"math": 50, "sciq": 40, "logiqa": 8, "piqa": 40, "rocks": 60}


def table() -> pd.DataFrame:
    rows = [
        {
            "prompt": f"{task}-{i}",
            "text": "t",
            "answer": "a",
            "task": task,
            "domain": "in" if task == "math" else "out",
            "split": "verification" if i % 2 else "selection",
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
    found = chosen(max_prompts=100)
    assert (found["split"] == "verification").all()
    counts = found["task"].value_counts().to_dict()
    assert counts["rocks"] == 25
    assert counts["logiqa"] == 8, "a small task gives what it has"
    assert abs(counts["math"] - counts["sciq"]) <= 1
    assert len(found) == 100
    assert chosen(max_prompts=100)["prompt"].tolist() == found["prompt"].tolist()
    assert chosen(max_prompts=100, seed=1)["prompt"].tolist() != found["prompt"].tolist()
    assert len(chosen(max_prompts=10_000)) == sum(PROMPT_COUNTS.values())
    assert chosen(max_prompts=100, controls=())["task"].value_counts().max() == 23


def test_a_prompt_is_chosen_whatever_its_outcome_or_place_in_the_file() -> None:
    shuffled = table().sample(frac=1.0, random_state=3)
    again = choose_prompts(shuffled.reset_index(drop=True), Plan(max_prompts=60))  # type: ignore[arg-type]
    assert set(again["prompt"]) == set(chosen(max_prompts=60)["prompt"])


def test_effects_are_measured_out_of_domain_and_side_effects_on_controls() -> None:
    found = chosen(max_prompts=100)
    target, unrelated = target_prompts(found, Plan())  # type: ignore[arg-type]
    assert set(found["task"][target]) == {"sciq", "logiqa", "piqa"}
    assert set(found["task"][unrelated]) == {"rocks"}
    inside = found.assign(domain="in")
    target, _ = target_prompts(inside, Plan())  # type: ignore[arg-type]
    assert set(found["task"][target]) == {"sciq", "logiqa", "piqa", "math"}


@pytest.mark.parametrize(
    ("direction", "doses", "wanted"),
    [
        ("disable", (0.0, 0.5, 2.0, 4.0), (0.5, 2.0, 4.0)),
        ("amplify", (0.0, 0.5, 2.0, 4.0), (0.0, 0.5, 1.5, 4.0)),
        ("disable", (2.0,), (0.5, 2.0)),
        ("amplify", (1.0, 1.25, 1.75), (1.25, 1.75)),
    ],
)
def test_the_dose_grid_always_has_a_dose_between_nothing_and_the_main_one(
    direction: Any, doses: tuple[float, ...], wanted: tuple[float, ...]
) -> None:
    assert dose_grid(direction, InterventionSpec(doses=doses)) == wanted


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
    for kind in ("fresh", "passthrough", "set", "steering", "random_direction"):
        assert kinds.count(kind) == 1
    assert kinds.count("random") == 2
    assert kinds.count("lift") == (direction == "amplify")
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


# -- divergences


TEXTS = ([3, 4, 5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15])
LENGTHS, FIRST, LAST = (4, 2, 3), (3, 1, 2), (4, 1, 2)


def probe(batch_size: int = 2) -> Any:
    return make_probe(TEXTS, LENGTHS, (0, 2, 2), first=FIRST, last=LAST, pad=0, batch_size=batch_size, device="cpu")


def test_divergences_equal_those_of_unpadded_texts_one_position_at_a_time(crosscoder: Any) -> None:
    one, two = tiny_model(), tiny_model(seed=4)
    found = divergences(log_probabilities(one, probe()), log_probabilities(two, probe()), probe(), 4)
    by_hand: dict[int, list[float]] = {0: [], 2: []}
    for text, first, last, owner in zip(TEXTS, FIRST, LAST, (0, 2, 2), strict=True):
        p, q = (m(input_ids=torch.tensor([text])).logits[0].double().softmax(-1).numpy() for m in (one, two))
        for position in range(first, last + 1):
            by_hand[owner].append(sum(a * np.log(a / b) for a, b in zip(p[position], q[position], strict=True)))
    assert found[0] == pytest.approx(np.mean(by_hand[0]), rel=1e-4)
    assert found[2] == pytest.approx(np.mean(by_hand[2]), rel=1e-4)
    assert np.isnan(found[[1, 3]]).all()
    assert probe().n_tokens == 4
    same = divergences(log_probabilities(one, probe(3)), log_probabilities(two, probe(3)), probe(3), 4)
    np.testing.assert_allclose(same, found, rtol=1e-4)


def test_divergences_under_an_edit_know_where_prompts_end(model: Any, crosscoder: Any) -> None:
    site = EditSite(crosscoder, RL, 1)
    edit = FeatureEdit((0, 3, 4, 9), "disable", positions="completion")
    with editing(model, edit, site) as active:
        padded = log_probabilities(model, probe(), active)
        assert active.prompt_lengths is None
        for batch, found in zip(probe().batches, padded, strict=True):
            for i, row in enumerate(batch.rows):
                active.prompt_lengths = torch.tensor([LENGTHS[row]])
                alone = model(input_ids=torch.tensor([TEXTS[row]]), use_cache=False).logits[0].log_softmax(-1)
                kept = len(TEXTS[row]) - FIRST[row]
                torch.testing.assert_close(found[i, -kept:], alone[-kept:], rtol=1e-4, atol=1e-4)


def test_broken_distributions_diverge_by_nan(model: Any) -> None:
    p, q = log_probabilities(model, probe()), log_probabilities(model, probe())
    p[0] = torch.full_like(p[0], torch.nan)
    found = divergences(p, q, probe(), 3)
    broken = {(0, 2, 2)[row] for row in probe().batches[0].rows}
    assert set(np.flatnonzero(np.isnan(found))) == broken | {1}, "prompt 1 has no text"


def test_the_mean_residual_is_that_of_the_compared_positions(model: Any) -> None:
    rows = []
    with capture_residual(model, 1) as residual:
        for text, first, last in zip(TEXTS, FIRST, LAST, strict=True):
            model(input_ids=torch.tensor([text]))
            rows.append(residual.value[0, first : last + 1])
    wanted = torch.cat(rows).double().mean(dim=0)
    torch.testing.assert_close(mean_residual(model, 1, probe()), wanted, rtol=1e-5, atol=1e-5)
