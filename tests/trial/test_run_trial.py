"""The second step: arms on live models, kept on disk, resumed and shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import xarray as xr

from rlgen_stats.schemas.errors import InputError, StoreError
from rlgen_stats.stores import Provenance, open_arms
from rlgen_stats.toolkit.trial import run_trial as trial
from tests.trial.planted import (
    F_BRAKE,
    F_GATE,
    N_PROMPTS,
)
from tests.trial.trials import (
    Counted,
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
        assert files == names
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


def test_logits_that_overflow_are_reported_not_raised(study: Any, tmp_path: Path) -> None:
    result = without_controls(small(study, tmp_path, doses=(0.0, 0.5, 1e39)), [F_GATE])
    assert all("non_finite_logits: dose-1e+39" in reason for reason in result["reasons"].values)


def test_prompts_too_short_for_the_edited_positions_are_named(study: Any, tmp_path: Path) -> None:
    spec, folder = small(study, tmp_path)
    how = spec.extraction.model_copy(update={"segments": ("prompt",), "skip_first": 99})
    with pytest.raises(InputError, match=r"of \d+ prompts, e.g. '.*', have no token after the first 99"):
        run((spec.model_copy(update={"extraction": how}), folder), [F_GATE], F_BRAKE)


def test_the_models_are_left_as_they_were(study: Any, gate: Any) -> None:
    """Nothing of a trial is written into the models' folders."""
    _, folder = study
    assert sum(N_PROMPTS.values()) == 230
    for name in ("base", "rl"):
        assert not list((folder.root / "hf" / name).glob("*.partial"))
    assert not torch.is_inference_mode_enabled()
