"""A trial in which one task's choices are scored: under the edit, as the other tasks are answered under it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder
from rlgen_stats.toolkit.edits.hooks import ActiveEdit
from rlgen_stats.toolkit.extraction import answering
from rlgen_stats.toolkit.extraction.choice_scoring import score_choices
from rlgen_stats.toolkit.intervention import plan_trial
from rlgen_stats.toolkit.progress import SILENT
from rlgen_stats.toolkit.trial.arms import UNEDITED
from rlgen_stats.toolkit.trial.run_trial import LiveTrial
from tests.trial.planted import F_GATE, PROVENANCE, planted_study
from tests.trial.trials import pick, without_controls


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudySpec, StudyFolder]:
    """The planted study; of logic's prompts two choices are scored: to say nothing, and the right answer."""
    spec, folder = planted_study(tmp_path_factory.mktemp("scored"), max_prompts=60, n_samples=2)
    table = pd.read_parquet(folder.root / "data/prompts.parquet")
    logic = table["task"] == "logic"
    table["choices"] = [
        ["um", f"={answer}"] if own else None for own, answer in zip(logic, table["answer"], strict=True)
    ]
    table.loc[logic, "answer"] = "B"
    table.to_parquet(folder.root / "data/prompts.parquet")
    tasks = {"logic": {"grader": "choice_loglik"}}
    return StudySpec.model_validate(spec.model_dump(exclude_unset=True) | {"tasks": tasks}), folder


@pytest.fixture(scope="module")
def scored(study: tuple[StudySpec, StudyFolder]) -> LiveTrial:
    return LiveTrial(plan_trial(*study, [F_GATE], provenance=PROVENANCE))


def of_task(frame: pd.DataFrame, task: str) -> pd.DataFrame:
    return frame[frame["task"] == task]


def test_the_edit_changes_which_choice_is_most_likely(scored: LiveTrial) -> None:
    arms = {name: scored.run_arm("disable", arm) for name, arm in arms_of(scored).items()}
    logic = {name: of_task(frame, "logic") for name, frame in arms.items()}
    assert len(logic["unedited"]) >= 20
    assert logic["unedited"]["correct"].all()
    assert (logic["set"]["text"] == "um").all()
    assert not logic["set"]["correct"].any()
    assert (logic["set"]["format_class"] == "answer").all()
    for frame in logic.values():  # not drawn: both samples are the same
        first, second = frame[frame["sample"] == 0], frame[frame["sample"] == 1]
        assert list(first["text"]) == list(second["text"])
        assert (frame["n_tokens"] == 1).all()
    amplified = {name: of_task(scored.run_arm("amplify", arm), "logic") for name, arm in arms_of(scored).items()}
    assert (amplified["unedited"]["text"] == "um").all()


def arms_of(scored: LiveTrial) -> dict[str, Any]:
    return {"unedited": UNEDITED, "set": scored.plan.directions[0].set_arm}


def test_other_tasks_are_answered_as_without_it(scored: LiveTrial, tmp_path: Path) -> None:
    spec, folder = planted_study(tmp_path, max_prompts=60, n_samples=2)
    plain = LiveTrial(plan_trial(spec, folder, [F_GATE], provenance=PROVENANCE))
    here = scored.run_arm("disable", arms_of(scored)["set"])
    there = plain.run_arm("disable", arms_of(plain)["set"])
    assert list(here["prompt"]) == list(there["prompt"])
    for task in ("algebra", "weather"):
        assert list(of_task(here, task)["text"]) == list(of_task(there, task)["text"])


def test_the_edit_in_force_is_told_where_prompts_end(scored: LiveTrial, monkeypatch: pytest.MonkeyPatch) -> None:
    handles = []

    def spied(*arguments: Any, active: Any, **how: Any) -> Any:
        handles.append(active)
        return score_choices(*arguments, active=active, **how)

    monkeypatch.setattr(answering, "score_choices", spied)
    for arm in arms_of(scored).values():
        scored._complete("disable", [arm], SILENT)
    assert all(isinstance(handle, ActiveEdit) for handle in handles)


def test_a_whole_trial_of_scored_choices(study: tuple[StudySpec, StudyFolder]) -> None:
    """Divergences on forced texts included, whose completions are choices."""
    result = without_controls(study, [F_GATE])
    assert pick(result, "accuracy", "disable", "unedited") > pick(result, "accuracy", "disable", "set") + 0.5
    assert pick(result, "forced_kl_to_rl", "disable", "set") > 0.1
    assert pick(result, "forced_kl_to_rl", "disable", "unedited") == pytest.approx(0, abs=1e-6)
