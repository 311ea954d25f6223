"""Every result is what the report expects and survives the store."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from rlgen_stats.schemas.layout import LAYOUTS, validate
from rlgen_stats.stores import Provenance, open_results, write_results
from rlgen_stats.toolkit import statistics
from rlgen_stats.toolkit.statistics import (
    SelectionTests,
    attribution_contrast,
    attribution_table,
    behaviour,
    drift_test,
    select_features,
    set_stability,
    stabilization_test,
)

MODELS = ["base@0", *(f"{run}@{step}" for run in ("sft", "rl") for step in (5, 10, 15, 20))]
LABELS = {"tasks": ["a", "b"], "domains": {"a": "in", "b": "out"}}


@pytest.fixture
def results(make_features, make_outcomes):
    rng = np.random.default_rng(0)
    mean = 5 + rng.normal(0, 1, (1, 120, 24)) + rng.normal(0, 0.5, (9, 120, 24))
    features = make_features(mean, MODELS, chunk=10, **LABELS)
    outcomes = make_outcomes(rng.random((9, 120)) < 0.5, MODELS, **LABELS)
    decoders = xr.Dataset(
        {
            "decoder": (("view", "feature", "channel"), rng.normal(0, 1, (2, 24, 6))),
            "firing": ("feature", rng.random(24)),
        }
    )
    pairs = {
        name: decoders.assign_coords(view=["base@0", target])
        for name, target in (("sft", "sft@20"), ("rl", "rl@20"), ("null", "base.repeat@0"))
    }
    table = attribution_table(pairs, multiview={"main": pairs["sft"]})
    few = {"n_bootstrap": 19, "seed": 1}
    return {
        "behaviour": behaviour(outcomes, **few),
        "drift": drift_test(features, models=["sft@20", "rl@20"], n_resamples=19, **few),
        "stabilization": stabilization_test(features, runs=["sft", "rl"], **few),
        "set_stability": set_stability(features, runs=["sft", "rl"], k=5, n_halvings=5, n_groups=4),
        "attribution": table,
        "attribution_contrast": attribution_contrast(table, pairs, sft="sft", rl="rl", **few),
        "selection": select_features(
            features, outcomes, target="rl@20", tests=SelectionTests(n_resamples=19, n_bootstrap=19), seed=1
        ),
    }


def test_layouts_attributes_and_the_store(results, tmp_path):
    provenance = Provenance("study", "abc", {})
    for group, dataset in results.items():
        validate(dataset, group)
        write_results(tmp_path / "results.zarr", group, dataset, provenance=provenance)
        back = open_results(tmp_path / "results.zarr", group).load()
        for name in LAYOUTS[group].variables:
            there, wanted = back[name].values, dataset[name].values
            if wanted.dtype.kind in "UOT":
                assert there.tolist() == wanted.tolist()
            else:
                np.testing.assert_array_equal(there, wanted)
        for attr in LAYOUTS[group].attrs:
            np.testing.assert_equal(back.attrs[attr], dataset.attrs[attr])


def test_same_seed_same_numbers_other_seed_other_numbers(make_features):
    rng = np.random.default_rng(0)
    features = make_features(rng.gamma(1, 1, (9, 40, 6)), MODELS)
    one, two, three = (
        drift_test(features, models=["rl@20"], n_resamples=99, n_bootstrap=99, seed=s) for s in (1, 1, 2)
    )
    xr.testing.assert_identical(one, two)
    assert not np.array_equal(one.p_max_t, three.p_max_t)
    np.testing.assert_array_equal(one.p_value, three.p_value)  # exact or saddlepoint: no seed in it


def test_public_names_exist():
    for name in statistics.__all__:
        assert callable(getattr(statistics, name))
        assert getattr(statistics, name).__doc__
