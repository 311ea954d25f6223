"""One trained crosscoder of each kind and one encoded study, shared by the tests of this folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import xarray as xr

from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder, open_activations
from rlgen_stats.toolkit.crosscoder import (
    ArrayReader,
    Crosscoder,
    encode_features,
    load_crosscoder,
    train_crosscoder,
    train_crosscoders,
    write_contexts,
    write_logits,
)
from tests.crosscoder.planted import PAIR, PROVENANCE, Planted, build_study, crosscoder_spec, planted


@pytest.fixture(scope="session")
def world() -> Planted:
    return planted()


@pytest.fixture(scope="session", params=["batchtopk", "l1"])
def either(request: pytest.FixtureRequest, world: Planted) -> Crosscoder:
    return _train(world, request.param)


@pytest.fixture(scope="session")
def batchtopk(world: Planted) -> Crosscoder:
    return _train(world, "batchtopk")


_TRAINED: dict[str, Crosscoder] = {}


def _train(world: Planted, sparsity: str) -> Crosscoder:
    if sparsity not in _TRAINED:
        reader = ArrayReader(world.data, batch_size=512, seed=1)
        _TRAINED[sparsity] = train_crosscoder(reader, crosscoder_spec(sparsity=sparsity), views=PAIR, seed=1)
    return _TRAINED[sparsity]


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudySpec, StudyFolder]:
    """A study with activations only; not to be changed."""
    return build_study(tmp_path_factory.mktemp("stored"))


@pytest.fixture(scope="session")
def encoded(
    stored: tuple[StudySpec, StudyFolder], tmp_path_factory: pytest.TempPathFactory
) -> tuple[StudySpec, StudyFolder]:
    """The same study with crosscoders and features; not to be changed."""
    root = tmp_path_factory.mktemp("encoded") / "study"
    shutil.copytree(stored[1].root, root)
    spec, folder = stored[0], StudyFolder(root)
    train_crosscoders(spec, folder, provenance=PROVENANCE)
    encode_features(spec, folder, provenance=PROVENANCE)
    write_contexts(spec, folder, n=3)
    write_logits(spec, folder, n=4)
    return spec, folder


@pytest.fixture(scope="session")
def main(encoded: tuple[StudySpec, StudyFolder]) -> Crosscoder:
    return load_crosscoder(encoded[1].crosscoder("main"))


@pytest.fixture(scope="session")
def activations(encoded: tuple[StudySpec, StudyFolder]) -> xr.Dataset:
    return open_activations(encoded[1].activations)


@pytest.fixture
def copied(stored: tuple[StudySpec, StudyFolder], tmp_path: Path) -> tuple[StudySpec, StudyFolder]:
    """A study with activations that a test may change."""
    shutil.copytree(stored[1].root, tmp_path / "study")
    return stored[0], StudyFolder(tmp_path / "study")
