"""Raising version 1 stores, written by the release that had version 1, to this release's layout."""

import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import zarr

from rlgen_stats.schemas.errors import StoreError
from rlgen_stats.schemas.layout import LAYOUT_VERSION
from rlgen_stats.stores import (
    ActivationWriter,
    Provenance,
    complete_models,
    create_activations,
    migrate,
    open_activations,
    open_features,
    open_results,
    verify,
)
from tests.stores.conftest import token_table

VALUES = np.random.default_rng(1).normal(size=(150, 3)).astype("f4")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    with tarfile.open(Path(__file__).parent / "data/v1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "v1"


def test_old_stores_are_refused_with_the_way_out_and_then_read(old: Path, provenance: Provenance) -> None:
    for read in (
        lambda: open_activations(old / "activations.zarr"),
        lambda: open_features(old / "features.zarr"),
        lambda: open_results(old / "results.zarr", "notes"),
    ):
        with pytest.raises(StoreError, match=r"layout version 1, this release reads 2.*rlgen-stats migrate"):
            read()
    assert migrate(old) == dict.fromkeys(("activations.zarr", "features.zarr", "results.zarr"), (1, LAYOUT_VERSION))
    assert verify(old).ok, verify(old).problems
    acts = open_activations(old / "activations.zarr")
    np.testing.assert_array_equal(acts.activation.sel(model="base@0").values, VALUES)
    assert acts.sel(segment="prompt").sizes["token"] == 15
    assert open_features(old / "features.zarr")["mean"].sel(model="base@0").values.min() == 1.0
    assert open_results(old / "results.zarr", "notes").effect.values.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert complete_models(old / "activations.zarr") == ["base@0"]
    create_activations(old / "activations.zarr", *token_table(150), provenance=provenance)  # the same labels still
    with ActivationWriter(old / "activations.zarr", model="rl@80", site="block2", width=3) as writer:
        assert writer.n_committed == 64  # one whole shard was there
        writer.append(VALUES[64:])
    assert complete_models(old / "activations.zarr") == ["base@0", "rl@80"]
    assert verify(old).ok
    assert migrate(old) == dict.fromkeys(("activations.zarr", "features.zarr", "results.zarr"), (2, 2))


def test_an_interrupted_migration_is_run_again(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["rlgen_stats.stores.migrate"]
    whole = old.parent / "whole"
    shutil.copytree(old, whole)
    migrate(whole)
    for stop_at in ("_fill_missing", "seal_store", "_remove"):
        broken = old.parent / stop_at
        shutil.copytree(old, broken)

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(module, stop_at, stop)
            with pytest.raises(KeyboardInterrupt):
                migrate(broken)
        migrate(broken)
        assert verify(broken).ok, (stop_at, verify(broken).problems)
        np.testing.assert_array_equal(
            open_activations(broken / "activations.zarr").activation.sel(model="base@0").values, VALUES
        )


def test_the_future_is_refused(old: Path) -> None:
    migrate(old)
    zarr.open_group(old / "features.zarr", mode="r+").attrs["schema_version"] = 9
    with pytest.raises(StoreError, match=r"layout version 9, this release knows up to 2; upgrade"):
        migrate(old / "features.zarr")
    with pytest.raises(StoreError, match=r"not a Zarr v3 store"):
        migrate(old / "nothing.zarr")
