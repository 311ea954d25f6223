"""Features for other tools: the table says what the stores say, the dashboards have every field of SAEDashboard's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from rlgen_stats.schemas.errors import InputError, StageError
from rlgen_stats.stores import StudyFolder, open_features, open_results
from rlgen_stats.toolkit.reporting import export_features, load_results
from rlgen_stats.toolkit.reporting.feature_files import dashboard_batches
from tests.reporting.synthetic_study import N_FEATURES, SELECTED, make_spec

MODELS = ("base@0", "sft@150", "rl@80")


@pytest.fixture(scope="module")
def exported(written: StudyFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    files = export_features(written, make_spec(), load_results(written), out)
    assert files == sorted(
        [out / "features.parquet", *(out / model / f"batch-{n}.json" for model in MODELS for n in (0, 1))]
    )
    return out


def test_the_table_says_of_every_feature_what_the_stores_say(written: StudyFolder, exported: Path) -> None:
    table = pd.read_parquet(exported / "features.parquet")
    assert list(table["feature"]) == list(range(N_FEATURES))
    drift, selection = (open_results(written.results, name).load() for name in ("drift", "selection"))
    features = open_features(written.features).load()
    k = SELECTED[0]
    row = table.set_index("feature").loc[k]
    assert row["tier"] == str(selection["tier"].sel(feature=k).item())
    assert bool(row["selected"])
    for model in MODELS:
        one = features.sel(model=model, feature=k)
        assert row[f"mean:{model}"] == pytest.approx(float(one["mean"].mean()))
        weights = one["n_tokens"].values
        assert row[f"firing:{model}"] == pytest.approx(float((one["firing"].values * weights).sum() / weights.sum()))
    for name in ("effect_sd", "q_value", "call"):
        np.testing.assert_equal(row[f"{name}:rl@80"], drift[name].sel(model="rl@80", feature=k).item())
    assert list(row["promoted:rl@80"]) == ["<t1>", "<t2>"]
    assert list(row["suppressed:rl@80"]) == ["<t-1>", "<t-2>"]


def test_dashboards_have_saedashboards_fields_and_the_peaks(exported: Path) -> None:
    batch, last = (json.loads((exported / "rl@80" / f"batch-{n}.json").read_text(encoding="utf-8")) for n in (0, 1))
    assert set(batch) == {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
    assert (batch["model_id"], batch["sae_set"]) == ("rl@80", f"{make_spec().name}-main")
    assert [one["feature_index"] for one in batch["features"] + last["features"]] == list(range(N_FEATURES))
    assert len(batch["features"]) == 128
    fields = {
        *("feature_index", "neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero", "activations"),
        *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
        *("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
        *("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
        *("freq_hist_data_bar_values", "freq_hist_data_bar_heights"),
        *("logits_hist_data_bar_heights", "logits_hist_data_bar_values"),
        *("n_prompts_total", "n_tokens_in_prompt", "dataset", "decoder_weights_dist", "vector"),
    }
    for one in batch["features"]:
        assert set(one) == fields
    one = batch["features"][SELECTED[0]]
    assert (one["pos_str"], one["pos_values"], one["neg_str"]) == (["<t1>", "<t2>"], [1.0, 1.0], ["<t-1>", "<t-2>"])
    assert len(one["activations"]) == 3
    assert one["activations"][1] == {
        **{"bin_min": -1.0, "bin_max": 4.2, "bin_contains": -1.0},
        **{"tokens": ["step by <i>step</i> ", "the", " sum of 1"], "values": [0.0, pytest.approx(3.2), 0.0]},
        "qualifying_token_index": 1,
    }
    other = next(k for k in range(128) if k not in SELECTED)
    assert (batch["features"][other]["activations"], batch["features"][other]["pos_str"]) == ([], [])


def test_a_peak_at_the_start_of_a_text_is_its_first_token(written: StudyFolder, tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study")
    shutil.copytree(written.root, folder.root)
    file = folder.contexts("main")
    contexts = pd.read_parquet(file)
    contexts.assign(text="⟦a⟧ b").to_parquet(file)
    batch = next(dashboard_batches(folder, make_spec(), open_features(folder.features), "base@0"))
    one = batch["features"][SELECTED[0]]["activations"][0]
    assert (one["tokens"], one["values"], one["qualifying_token_index"]) == (["a", " b"], [pytest.approx(4.2), 0.0], 0)


def test_firing_is_a_share_of_tokens_not_of_prompts(written: StudyFolder) -> None:
    summaries = open_features(written.features).load()
    longer = xr.where(summaries["prompt"] == summaries["prompt"][0], 10_000, summaries["n_tokens"])
    summaries = summaries.assign(n_tokens=longer.transpose(*summaries["n_tokens"].dims))
    batch = next(dashboard_batches(written, make_spec(), summaries, "rl@80"))
    one = summaries.sel(model="rl@80").transpose("prompt", "feature", ...)
    tokens = one["n_tokens"].values
    expected = (one["firing"].values * tokens[:, None]).sum(axis=0) / tokens.sum()
    np.testing.assert_allclose([f["frac_nonzero"] for f in batch["features"]], expected[:128], rtol=1e-5)


def test_without_results_or_contexts_the_table_is_shorter(written: StudyFolder, tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study")
    shutil.copytree(written.features, folder.features)
    export_features(folder, make_spec(), {}, tmp_path / "out")
    table = pd.read_parquet(tmp_path / "out" / "features.parquet")
    expected = [f"{name}:{model}" for model in MODELS for name in ("mean", "firing")]
    assert list(table.columns) == ["feature", *expected]
    batch = json.loads((tmp_path / "out" / "base@0" / "batch-0.json").read_text())
    assert all(one["activations"] == [] for one in batch["features"])


def test_what_cannot_be_exported_is_said(written: StudyFolder, empty_folder: StudyFolder, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(InputError, match="full is not empty; name a new folder"):
        export_features(written, make_spec(), {}, tmp_path / "full")
    with pytest.raises(InputError, match="features are written as parquet, neuronpedia, got 'csv'"):
        export_features(written, make_spec(), {}, tmp_path / "out", ["csv"])
    with pytest.raises(StageError, match=r"features\.zarr is missing; run rlgen-stats encode first"):
        export_features(empty_folder, make_spec(), {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
