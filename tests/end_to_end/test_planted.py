"""A planted cause is found: by drift, by selection, and by editing the live model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from rlgen_stats.stores import open_results, read_json
from rlgen_stats.toolkit.crosscoder import load_crosscoder
from rlgen_stats.toolkit.study import run_study
from tests.end_to_end.planted import gate_direction, write_study

PLANTED_SCALE = 0.5
SMALL = {"n_features": 96, "steps": 700, "batch_size": 512, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("planted")
    write_study(
        root,
        scale=PLANTED_SCALE,
        crosscoders=[
            {"name": "main", "views": ["base@0", "sft@final", "rl@final"], "k": 6, **SMALL},
            {"name": "pair-sft", "views": ["base@0", "sft@final"], "k": 6, **SMALL},
            {"name": "pair-rl", "views": ["base@0", "rl@final"], "k": 6, **SMALL},
        ],
        statistics={"n_resamples": 199, "n_bootstrap": 199, "n_halvings": 10, "top_k": 10},
        selection={"max_features": 4},
        intervention={"n_controls": 19, "max_prompts": 160, "doses": [0.0, 0.5, 2.0]},
    )
    run_study(root)
    return root


def test_behaviour_shows_what_was_planted(planted: Path) -> None:
    behaviour = open_results(planted / "results.zarr", "behaviour").load()
    accuracy = behaviour.accuracy.sel(task="first")
    assert abs(float(accuracy.sel(model="base@0")) - 0.5) < 0.1
    assert float(accuracy.sel(model="rl@2")) > 0.9
    assert int(behaviour.forgotten.sel(model="sft@2", task="first")) <= 1


def test_drift_finds_the_planted_run_and_not_the_copy(planted: Path) -> None:
    drift = open_results(planted / "results.zarr", "drift").load()
    called = (drift.call == "DRIFT").sum("feature")
    assert int(called.sel(model="sft@2")) == 0
    assert int(called.sel(model="rl@2")) > 0
    assert int(called.sel(model="rl@2")) >= int(called.sel(model="rl@1")) - 3


def test_selected_features_point_along_the_planted_direction(planted: Path) -> None:
    selection = open_results(planted / "results.zarr", "selection").load()
    chosen = np.flatnonzero(selection.selected.values)
    assert len(chosen) >= 1
    directions = load_crosscoder(planted / "crosscoder/main").feature_direction("rl@2").detach()
    wanted = gate_direction(LlamaForCausalLM.from_pretrained(planted / "models/base"))
    cosine = torch.nn.functional.cosine_similarity(directions, wanted[None], dim=-1).numpy()
    others = np.setdiff1d(np.arange(len(cosine)), chosen)
    assert cosine[chosen].max() > 0.4
    assert cosine[chosen].max() > np.quantile(cosine[others], 0.97)
    assert cosine[chosen].mean() > cosine[others].mean() + 0.2


def test_disabling_them_moves_the_live_copy_back_to_base_and_random_sets_do_not(planted: Path) -> None:
    found = open_results(planted / "results.zarr", "intervention").load().sel(direction="disable")
    kind = found["kind"].values.astype(str)
    divergence = dict(zip(found["condition"].values, found.kl_to_base.values, strict=True))
    unedited, edited = divergence["unedited"], divergence["set"]
    assert unedited > 0.1
    assert edited < 0.5 * unedited
    assert edited < np.nanmin(found.kl_to_base.values[kind == "random"])
    assert edited < divergence["dose-0.5"] < unedited
    assert divergence["passthrough"] == pytest.approx(unedited, rel=1e-4)
    assert divergence["steering"] < 0.1 * unedited, (
        "what was planted is one constant direction: subtracting it undoes it"
    )
    assert str(found.verdict.item()) != "NO_EFFECT"


def test_the_copy_that_did_not_change_is_reported_as_such(planted: Path) -> None:
    claims = {claim["id"]: claim for claim in read_json(planted / "report/report.json")["claims"]}
    movement = open_results(planted / "results.zarr", "movement").load()
    assert float(movement.activation_shift.sel(model="sft@2")) == pytest.approx(0, abs=1e-6)
    assert float(movement.activation_shift.sel(model="rl@2")) > 0.05
    assert claims["C1"]["verdict"] in ("UNDETERMINED", "CONTRADICTED", "NOT_SUPPORTED")
