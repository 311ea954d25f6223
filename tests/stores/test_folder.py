"""Openers take the study or the store, and a run's last checkpoint by the name ``RUN@final``."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from rlgen_stats.schemas.errors import InputError, StoreError
from rlgen_stats.stores import (
    ActivationWriter,
    PairedReader,
    Provenance,
    StudyFolder,
    append_model,
    open_activations,
    open_arms,
    open_by_dictionary,
    open_features,
    open_outcomes,
    open_results,
    open_tokens,
    read_contexts,
    result_groups,
    select_tokens,
    stored_model,
    write_results,
)
from rlgen_stats.stores.trial_completions import write_arm
from tests.stores.conftest import N_TOKENS, activation_values, feature_table

MODELS = ("base@0", "rl@8", "rl@80")


@pytest.fixture
def study(store: Path, provenance: Provenance) -> Path:
    """Activations of three models, features, results, contexts and an arm, in one folder."""
    folder = StudyFolder(store.parent)
    for model in MODELS:
        with ActivationWriter(store, model=model, site="block1", width=6) as writer:
            writer.append(activation_values(model))
        append_model(folder.features, "features", feature_table(model), provenance=provenance)
    write_results(folder.results, "notes", xr.Dataset({"x": ("row", [1.0])}), provenance=provenance)
    folder.crosscoder("main").mkdir(parents=True)
    row = {"feature": [3], "model": ["rl@80"], "kind": ["top"], "rank": [1]}
    pd.DataFrame(row).to_parquet(folder.contexts("main"))
    labels = {"prompt": ["p"], "sample": [0], "task": ["t"], "domain": ["in"], "split": ["trial"], "cluster": ["c"]}
    answers = {"correct": [True], "n_tokens": [3], "format_class": ["answer"], "text": ["yes"]}
    arm = folder.root / "intervention/disable/set.parquet"
    arm.parent.mkdir(parents=True)
    write_arm(pd.DataFrame(labels | answers), arm, "h", {"name": "set", "kind": "set", "dose": 0.0})
    return folder.root


def test_every_opener_takes_the_study_its_folder_object_and_the_store(study: Path, tmp_path: Path) -> None:
    for where in (study, str(study), StudyFolder(study)):
        assert open_features(where).sizes["model"] == 3
        assert open_results(where, "notes").x.values.tolist() == [1.0]
        assert result_groups(where) == ["notes"]
        assert list(open_by_dictionary(where, "notes")) == [1]
        assert open_tokens(where).sizes["token"] == N_TOKENS
        assert len(select_tokens(where, task="math"))
        assert open_activations(where).model.values.tolist() == list(MODELS)
    assert open_features(study / "features.zarr").sizes["model"] == 3
    assert open_results(study / "results.zarr", "notes").sizes["row"] == 1
    assert open_activations(study / "activations.zarr", models=["rl@8"]).sizes["model"] == 1
    shutil.copytree(study / "features.zarr", tmp_path / "mine")
    assert open_features(tmp_path / "mine").sizes["model"] == 3, "a store of another name"
    for where in (study, study / "results.zarr", StudyFolder(study)):
        assert read_contexts(where, "main").feature.tolist() == [3]
        assert open_arms(where, "disable").condition.values.tolist() == ["set"]


def test_what_is_not_there_is_named(study: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"outcomes.zarr is not a Zarr v3 store \(no such folder\)"):
        open_outcomes(study)
    with pytest.raises(StoreError, match=r"nowhere/features.zarr is not a Zarr v3 store \(no such folder\)"):
        open_features(tmp_path / "nowhere")


def test_the_last_checkpoint_of_a_run_has_a_name(study: Path) -> None:
    final = open_activations(study, models=["base@0", "rl@final"])
    assert final.model.values.tolist() == ["base@0", "rl@80"]
    np.testing.assert_array_equal(final.activation.sel(model="rl@80").values, activation_values("rl@80"))
    reader = PairedReader(study, ["rl@final", "base@0"], "block1", batch_size=100, seed=0)
    assert reader.models == ("rl@80", "base@0")
    features = open_features(study)
    assert stored_model("rl@final", features.model.values) == "rl@80"
    assert stored_model("rl@8", features.model.values) == "rl@8"
    with pytest.raises(InputError, match=r"run 'dpo' has no checkpoint in the data; the runs are \['base', 'rl'\]"):
        open_activations(study, models=["dpo@final"])
