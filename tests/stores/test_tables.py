"""Outcome, feature and result stores: committed models only, others' stores refused, groups replaced whole."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

from rlgen_stats.schemas.dims import of_dictionary
from rlgen_stats.schemas.errors import InputError, StoreError
from rlgen_stats.schemas.layout import LAYOUTS
from rlgen_stats.stores import (
    Provenance,
    append_model,
    committed_models,
    describe,
    open_features,
    open_results,
    open_study,
    result_groups,
    verify,
    write_results,
)
from tests.stores.conftest import feature_table


@pytest.fixture
def features(tmp_path: Path, provenance: Provenance) -> Path:
    path = tmp_path / "features.zarr"
    append_model(path, "features", feature_table("base@0", 0.0), provenance=provenance)
    append_model(path, "features", feature_table("sft@1000000", 1.0), provenance=provenance)
    return path


def test_models_are_appended_with_labels(features: Path) -> None:
    dataset = open_features(features)
    assert dataset.model.values.tolist() == ["base@0", "sft@1000000"]
    assert dataset.step.values.tolist() == [0, 1000000]
    assert dataset["mean"].sel(model="sft@1000000").values.min() == 1.0
    assert dataset["mean"].chunks is not None
    assert dataset.sel(model="base@0").where(dataset.task == "task1", drop=True).sizes["prompt"] == 1


def test_interrupted_append_is_invisible_and_redone(features: Path, provenance: Provenance) -> None:
    before = (features / "zarr.json").read_bytes()
    append_model(features, "features", feature_table("rl@5", 9.0), provenance=provenance)
    (features / "zarr.json").write_bytes(before)  # died before the commit
    assert verify(features).ok, verify(features).problems
    assert open_features(features).model.values.tolist() == ["base@0", "sft@1000000"]
    append_model(features, "features", feature_table("rl@6", 2.0), provenance=provenance)
    dataset = open_features(features)
    assert dataset.model.values.tolist() == ["base@0", "sft@1000000", "rl@6"]
    assert float(dataset["mean"].sel(model="rl@6").max()) == 2.0
    assert verify(features).ok, verify(features).problems


def test_foreign_and_wrong_appends_are_refused(features: Path, provenance: Provenance) -> None:
    with pytest.raises(StoreError, match=r"another study or settings.*study_id"):
        append_model(features, "features", feature_table("rl@5"), provenance=Provenance("study-two", "key-one"))
    with pytest.raises(StoreError, match="spec_hash"):
        append_model(features, "features", feature_table("rl@5"), provenance=Provenance("study-one", "key-two"))
    with pytest.raises(StoreError, match="'base@0' is already in"):
        append_model(features, "features", feature_table("base@0"), provenance=provenance)
    with pytest.raises(StoreError, match="other prompts"):
        append_model(features, "features", feature_table("rl@5", prompts=("p0", "p1", "q")), provenance=provenance)
    with pytest.raises(StoreError, match=r"variable 'mean'.*missing.*attribute 'readout' is missing"):
        append_model(features, "features", feature_table("rl@5").drop_vars("mean").drop_attrs(), provenance=provenance)
    one = feature_table("rl@5")
    richer = features.with_name("richer.zarr")
    append_model(richer, "features", one.assign(more=one["fve"]), provenance=provenance)
    with pytest.raises(StoreError, match=r"holds 'more' for every model, 'rl@6' comes without it"):
        append_model(richer, "features", feature_table("rl@6"), provenance=provenance)
    with pytest.raises(StoreError, match=r"comes with 'more'.*holds none"):
        append_model(features, "features", one.assign(more=one["fve"]), provenance=provenance)
    with pytest.raises(StoreError, match=r"comes with 'mean' of .*'feature': 4"):
        append_model(features, "features", one.isel(feature=slice(4)), provenance=provenance)
    assert committed_models(features) == ["base@0", "sft@1000000"]


def test_newer_layout_and_corruption_are_explained(features: Path) -> None:
    group = zarr.open_group(features, mode="r+")
    group.attrs["schema_version"] = 99
    with pytest.raises(StoreError, match=r"layout version 99.*upgrade"):
        open_features(features)
    group.attrs["schema_version"] = 2
    chunk = next(p for p in (features / "mean" / "c").rglob("*") if p.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-6] + b"\0" * 6)
    with pytest.raises(ValueError, match="checksum"):
        open_features(features)["mean"].values  # noqa: B018


def balance(value: float) -> xr.Dataset:
    names = ("set_mean", "control_mean", "standardized_difference")
    return xr.Dataset(
        {name: ("covariate", [value]) for name in names} | {"balanced": ("covariate", [True])},
        coords={"covariate": ["rate"]},
    )


def test_results_are_replaced_whole(tmp_path: Path, provenance: Provenance) -> None:
    path = tmp_path / "results.zarr"
    write_results(path, "control_balance", balance(1.0), provenance=provenance)
    write_results(path, "control_balance", balance(2.0), provenance=provenance)
    assert result_groups(path) == ["control_balance"]
    assert open_results(path, "control_balance").set_mean.values.tolist() == [2.0]
    with pytest.raises(StoreError, match=r"'set_mean'.*missing"):
        write_results(path, "control_balance", balance(3.0).drop_vars("set_mean"), provenance=provenance)
    assert open_results(path, "control_balance").set_mean.values.tolist() == [2.0]
    with pytest.raises(StoreError, match="no results 'drift'; it has control_balance"):
        open_results(path, "drift")


def test_a_name_that_is_not_there_names_the_nearest(tmp_path: Path, provenance: Provenance) -> None:
    for number in range(1, 40):
        group = of_dictionary("control_balance", number)
        write_results(tmp_path / "results.zarr", group, balance(1.0), provenance=provenance)
    with pytest.raises(InputError, match=r"no 'balanc', but 'control_balance'; list its 39 stores and analyses with: "):
        describe(tmp_path, ["balanc"])
    with pytest.raises(
        InputError, match=r"no 'results.zarr/nosuch'; list its 39 .*: rlgen-stats inspect /.*\.$"
    ) as refused:
        describe(tmp_path, ["results.zarr/nosuch"])
    assert len(str(refused.value)) < 120 + len(str(tmp_path)) * 2


def test_text_variables_survive_a_condition(tmp_path: Path, provenance: Provenance) -> None:
    table = balance(1.0).assign(note=("covariate", ["fine"]))
    write_results(tmp_path / "results.zarr", "notes", table, provenance=provenance)
    opened = open_results(tmp_path / "results.zarr", "notes")
    assert opened.where(opened.set_mean > 0).note.values.tolist() == ["fine"]
    assert np.isnan(opened.where(opened.set_mean > 2).note.values[0])


def test_text_in_any_memory_order_comes_back(tmp_path: Path, provenance: Provenance) -> None:
    words = np.array([[f"{row}{column}" for column in "abc"] for row in "xy"])
    table = xr.Dataset({"c": (("a", "b"), words), "f": (("a", "b"), np.asfortranarray(words))})
    write_results(tmp_path / "results.zarr", "words", table, provenance=provenance)
    opened = open_results(tmp_path / "results.zarr", "words")
    np.testing.assert_array_equal(opened.f.values, words)
    np.testing.assert_array_equal(opened.c.values, words)


def test_study_tree_is_lazy_and_asks_for_a_study(tmp_path: Path, features: Path, provenance: Provenance) -> None:
    with pytest.raises(StoreError, match=r"expected a study\.yaml"):
        open_study(tmp_path)
    (tmp_path / "study.yaml").write_text("name: x\n")
    write_results(tmp_path / "results.zarr", "control_balance", balance(1.0), provenance=provenance)
    tree = open_study(tmp_path)
    assert {"/features", "/results/control_balance"} <= set(tree.groups)
    np.testing.assert_array_equal(tree["features"].to_dataset()["fve"].values, [0.5, 0.5])


def test_layout_names_every_problem_at_once() -> None:
    assert set(LAYOUTS) >= {"outcomes", "features", "drift", "selection", "intervention"}
    broken = balance(1.0).assign(set_mean=("covariate", ["text"]), control_mean=(("a", "b"), [[1.0]]))
    from rlgen_stats.schemas.layout import validate

    with pytest.raises(StoreError, match=r"'set_mean' has type .*expected float.*'control_mean' has dimensions"):
        validate(broken, "control_balance")


def test_an_append_reads_nothing_of_other_models(features: Path, provenance: Provenance) -> None:
    """It read a chunk of every label for every model, so that the 200th took 8 times as long as the first."""
    labels = [features / name / f"c/{number}" for name in ("model", "run", "step", "arm") for number in (0, 1)]
    kept = {chunk: chunk.read_bytes() for chunk in labels}
    for chunk in kept:
        chunk.unlink()
    append_model(features, "features", feature_table("rl@5"), provenance=provenance)
    for chunk, content in kept.items():
        chunk.write_bytes(content)
    assert open_features(features).model.values.tolist() == ["base@0", "sft@1000000", "rl@5"]
