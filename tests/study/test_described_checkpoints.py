"""Which checkpoints the timing of runs is read at: those whose change from base the features describe."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xarray as xr

from rlgen_stats.toolkit.study import statistics_stages

MODELS = ["base@0", "sft@5", "sft@10", "rl@2", "rl@4", "rl@6"]


@pytest.mark.parametrize(
    ("low", "accepted", "left_out", "too_few"),
    [
        ([], False, [], set()),
        (["rl@2"], False, ["rl@2"], set()),
        (["rl@2"], True, [], set()),
        (["rl@2", "rl@4"], False, [], {"rl"}),  # one checkpoint is no course: its results stay whole, without contrast
        (["rl@2", "sft@5"], False, ["rl@2"], {"sft"}),
        (["base@0"], False, [], set()),
    ],
)
def test_checkpoints_are_left_out_unless_too_few_remain(
    monkeypatch: pytest.MonkeyPatch, low: list[str], accepted: bool, left_out: list[str], too_few: set[str]
) -> None:
    dfve = np.array([[0.8] * len(MODELS), [0.1 if model in low else 0.8 for model in MODELS]])
    health = xr.Dataset(
        {"dfve": (("crosscoder", "model"), dfve), "readout_accepted": ("crosscoder", [accepted, accepted])},
        coords={"crosscoder": ["main", "main.2"], "model": MODELS},
        attrs={"dfve_min": 0.3},
    )
    monkeypatch.setattr(statistics_stages, "open_results", lambda *_: health)
    monkeypatch.setattr(statistics_stages, "open_features", lambda *_: xr.Dataset(coords={"model": MODELS}))
    study: Any = SimpleNamespace(
        spec=SimpleNamespace(
            primary_crosscoder=SimpleNamespace(names=("main", "main.2"), accept_unhealthy=False),
            runs=[SimpleNamespace(name="sft"), SimpleNamespace(name="rl")],
        ),
        folder=SimpleNamespace(results=None, features_of=lambda _: None),
    )
    assert statistics_stages._left_out(study) == (left_out, too_few)
