"""Which checkpoints the timing of runs is read at: those whose change from base the features describe."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xarray as xr

from rlgen_stats.toolkit.progress import SILENT
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


def test_timing_leaves_them_out_of_chains_that_still_count_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """All checkpoints are handed over, since what must persist is a share of all; sets are of the described ones."""
    seen: dict[str, Any] = {}

    class Seen(Exception):
        pass

    def chain(features: xr.Dataset, **options: Any) -> Any:
        seen["chain"] = features["model"].values.tolist(), options["left_out"]
        return SimpleNamespace(compute=lambda: None)

    def sets(features: xr.Dataset, **_: Any) -> Any:
        seen["sets"] = features["model"].values.tolist()
        raise Seen

    given = {
        "_left_out": lambda _: (["rl@2"], set()),
        "features_by_dictionary": lambda _: iter([(1, xr.Dataset(coords={"model": MODELS}))]),
        "clusters_of": lambda _: None,
        "stabilization_test": chain,
        "set_stability": sets,
        "_write_with_dfve": lambda *_: None,
    }
    for name, stand_in in given.items():
        monkeypatch.setattr(statistics_stages, name, stand_in)
    runs = [SimpleNamespace(name=name, is_floor=False) for name in ("sft", "rl")]
    names = ("margin", "persist", "n_min", "alpha", "n_bootstrap", "top_k", "n_halvings")
    spec = SimpleNamespace(runs=runs, seed=0, statistics=SimpleNamespace(**dict.fromkeys(names, 1)))
    study: Any = SimpleNamespace(spec=spec, provenance=lambda *_: None)
    with pytest.raises(Seen):
        statistics_stages.stabilize(study, "key", SILENT)
    assert seen["chain"] == (MODELS, ["rl@2"])
    assert seen["sets"] == [model for model in MODELS if model != "rl@2"]
