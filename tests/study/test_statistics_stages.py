"""Which dictionaries the contrast of specific features is made of."""

from __future__ import annotations

import numpy as np
import xarray as xr

from rlgen_stats.schemas.study import RunSpec
from rlgen_stats.toolkit.study.statistics_stages import compared_models, floors_of


def test_floors_are_base_with_itself_and_noise_of_the_runs_compared() -> None:
    targets = {
        "pair-rl": "rl@80",
        "null": "base.repeat@0",
        "halves": "base.halves@0",
        "halves.2": "base.halves@0",
        "noise-rl": "rl.noise@80",
        "noise-dpo": "dpo.noise@80",
        "aside": "aside@40",
        "aside.2": "aside@40",
        "early": "aside@20",
        "other": "rl@80",
    }
    originals = np.where(np.array(list(targets)) == "other", "aside@40", "base@0")
    table = xr.Dataset(
        coords={
            "crosscoder": list(targets),
            "target": ("crosscoder", np.array(list(targets.values()))),
            "original": ("crosscoder", originals),
        }
    )
    known = {
        "base read again": ["null"],
        "disjoint halves of the prompts": ["halves", "halves.2"],
        "noise as large as the shift of rl@80": ["noise-rl"],
    }
    assert floors_of(table, {"sft", "rl"}) == known
    of_runs = {"the floor run aside@40": ["aside", "aside.2"], "the floor run aside@20": ["early"]}
    assert floors_of(table, {"sft", "rl"}, {"aside"}) == known | of_runs


def test_no_checkpoint_of_a_floor_run_is_in_a_family_of_tests() -> None:
    models = ["base@0", "sft@5", "aside@40", "rl@5", "rl@10"]
    features = xr.Dataset(coords={"model": models, "run": ("model", [model.split("@")[0] for model in models])})
    runs = [RunSpec(name=n, arm=a, method="sft") for n, a in (("sft", "sft"), ("rl", "rl"), ("aside", "floor"))]
    assert compared_models(features, runs) == ["sft@5", "rl@5", "rl@10"]
