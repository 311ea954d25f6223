"""Damaged files of every kind end in one StoreCorruptError that names a file, whatever reads them."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rlgen_stats.schemas.errors import RlgenStatsError, StoreCorruptError, StoreError, StoreLockedError
from rlgen_stats.stores import (
    Provenance,
    StudyFolder,
    describe,
    open_activations,
    open_features,
    open_results,
    select_tokens,
    verify,
)
from rlgen_stats.stores.atomic import explain_damage, read_json, read_object, write_json
from rlgen_stats.stores.health_records import read_health
from rlgen_stats.stores.locks import exclusive
from rlgen_stats.stores.tables import rendered_prompts
from rlgen_stats.stores.trial_completions import has_arm, open_arms, read_arm
from tests.stores.test_seals import unseal, write_study

JSON_OF_ANY_KIND = ["", "{", "[]", "5", "null", '"text"', "{}", "[" * 100_000, "\0\1\2"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("written") / "study", Provenance("study-one", "key-one"), seed=0)


@pytest.fixture
def study(tmp_path: Path, written: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "study"))


def read_activations(study: Path) -> None:
    select_tokens(study / "activations.zarr", task="math", segment="prompt")
    assert open_activations(study / "activations.zarr").activation[0, :3].compute().shape == (3, 5)


READERS: dict[str, Callable[[Path], Any]] = {
    "activations.zarr": read_activations,
    "features.zarr": lambda study: open_features(study / "features.zarr")["mean"].values,
    "results.zarr": lambda study: open_results(study / "results.zarr", "notes").effect.values,
}
FILES = [
    "activations.zarr/zarr.json",
    "activations.zarr/spans/zarr.json",
    "activations.zarr/tokens/zarr.json",
    "activations.zarr/rl@80/block2/zarr.json",
    "activations.zarr/rl@80/block2/activation/zarr.json",
    "features.zarr/zarr.json",
    "results.zarr/zarr.json",
    "results.zarr/notes/zarr.json",
]


def refuses(study: Path, file: str) -> str:
    """What reading says; also through verify and inspect, which must not fail otherwise."""
    store = file.split("/")[0]
    with pytest.raises(RlgenStatsError) as raised:
        READERS[store](study)
    try:
        assert not verify(study / store).ok
        describe(study / store)
    except RlgenStatsError:
        pass
    return str(raised.value)


@pytest.mark.parametrize("content", JSON_OF_ANY_KIND)
def test_metadata_of_any_kind(study: Path, content: str) -> None:
    for file in FILES:
        sound = (study / file).read_bytes()
        (study / file).write_text(content)
        said = refuses(study, file)
        assert f"{file} is not Zarr v3 metadata" in said, (file, said)
        (study / file).write_bytes(sound)


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("activations.zarr/zarr.json", "n_tokens", "many"),
        ("activations.zarr/zarr.json", "shard_tokens", None),
        ("activations.zarr/zarr.json", "groups", ["tokens"]),
        ("activations.zarr/rl@80/block2/zarr.json", "complete", "yes"),
        ("features.zarr/zarr.json", "committed_models", 2),
        ("features.zarr/zarr.json", "schema_version", "two"),
        ("results.zarr/notes/zarr.json", "seal", 5),
        ("results.zarr/notes/zarr.json", "schema_version", []),
    ],
)
def test_attributes_of_another_type(study: Path, file: str, name: str, value: object) -> None:
    document = read_json(study / file)
    write_json(study / file, document | {"attributes": document["attributes"] | {name: value}})
    assert f"{file} is not Zarr v3 metadata ({name} is of another type" in refuses(study, file)
    write_json(study / file, document | {"attributes": 5})
    assert f"{file} is not Zarr v3 metadata (attributes is of another type" in refuses(study, file)


@pytest.mark.parametrize("file", FILES)
def test_metadata_without_attributes(study: Path, file: str) -> None:
    """One flipped bit takes them away."""
    document = read_json(study / file)
    document["attributds"] = document.pop("attributes")
    write_json(study / file, document)
    with suppress(RlgenStatsError):  # of a group that is not complete any more, a reader sees the others
        READERS[file.split("/")[0]](study)
    with suppress(RlgenStatsError):
        assert not verify(study / file.split("/")[0]).ok


@pytest.mark.parametrize("part", ["shape", "data_type", "chunk_grid", "codecs", "chunk_key_encoding"])
@pytest.mark.parametrize("value", [None, True, 7, "text", [], {"name": "x"}])
def test_metadata_of_arrays_without_consolidation(study: Path, part: str, value: object) -> None:
    """As earlier releases wrote results: readers see the arrays' own files."""
    unseal(study / "results.zarr")
    file = study / "results.zarr/notes/effect/zarr.json"
    write_json(file, read_json(file) | {part: value})
    said = refuses(study, "results.zarr/notes/effect/zarr.json")
    assert "results.zarr/notes" in said, said


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("chunk_grid", "configuration", "chunk_shape", 0), 0),
        (("chunk_grid", "configuration", "chunk_shape", 0), -1),
        (("chunk_grid", "configuration", "chunk_shape"), []),
        (("shape", 0), 10**30),
        (("shape", 0), 0),
        (("chunk_key_encoding", "configuration", "separator"), -1),
        (("chunk_key_encoding", "configuration", "separator"), 1e400),
        (("dimension_names",), True),
        (("dimension_names",), ["model"]),
        (("fill_value",), 10**30),
    ],
)
@pytest.mark.parametrize("consolidated", [False, True])
@pytest.mark.parametrize("array", ["features.zarr/mean", "results.zarr/notes/effect"])
def test_values_that_no_array_has(
    study: Path, array: str, consolidated: bool, place: tuple[Any, ...], value: object
) -> None:
    """Where readers of Zarr divide by zero, overflow or look for attributes."""
    file = (study / array).parent / "zarr.json" if consolidated else study / array / "zarr.json"
    document = read_json(file)
    at = document["consolidated_metadata"]["metadata"][Path(array).name] if consolidated else document
    for part in place[:-1]:
        at = at[part]
    at[place[-1]] = value
    write_json(file, document)
    store = array.split("/")[0]
    with suppress(StoreCorruptError):  # what is consolidated does not need the array's own file
        READERS[store](study)
        assert not consolidated
    with suppress(StoreCorruptError):
        describe(study / store)
    assert not verify(study / store).ok


@pytest.mark.parametrize("version", [True, "1", None, 99])
def test_a_layout_that_does_not_exist_is_not_described(study: Path, version: object) -> None:
    file = study / "features.zarr/zarr.json"
    document = read_json(file)
    document["attributes"]["schema_version"] = version
    write_json(file, document)
    with pytest.raises(StoreError, match=r"schema_version is of another type|layout version 99, this release reads"):
        describe(study / "features.zarr")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("other", ["pipe", "device"])
@pytest.mark.parametrize("file", ["zarr.json", "seals.json", "mean/zarr.json", "mean/c/0/0/0"])
def test_a_pipe_or_a_device_in_a_stores_place_is_named(study: Path, file: str, other: str) -> None:
    path = study / "features.zarr" / file
    path.unlink()
    os.mkfifo(path) if other == "pipe" else path.symlink_to("/dev/zero")
    assert any("is a pipe, a socket or a device" in problem for problem in problems_of(study / "features.zarr"))
    with suppress(StoreCorruptError):
        READERS["features.zarr"](study)
        assert file == "mean/zarr.json", "which readers have in the group's file"


def problems_of(store: Path) -> list[str]:
    try:
        return list(verify(store).problems)
    except StoreCorruptError as error:
        return [str(error)]


def test_what_is_cut_or_gone(study: Path) -> None:
    for file in FILES:
        sound = (study / file).read_bytes()
        (study / file).write_bytes(sound[: len(sound) // 2])
        assert file in refuses(study, file)
        (study / file).unlink()
        assert str(study / file.split("/")[0]) in refuses(study, file)
        (study / file).write_bytes(sound)


@pytest.mark.parametrize("content", JSON_OF_ANY_KIND)
def test_records_of_any_kind(tmp_path: Path, content: str) -> None:
    file = tmp_path / "stages/drift.json"
    file.parent.mkdir()
    file.write_text(content)
    (tmp_path / "health.json").write_text(content)
    if content == "{}":
        assert read_object(file) == {}
        return
    with pytest.raises(StoreCorruptError, match=r"drift\.json"):
        read_object(file)
    with pytest.raises(StoreCorruptError, match=r"health\.json"):
        read_health(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "5", "null", "true"])
def test_a_record_of_a_stage_that_is_damaged_is_named_by_verify(study: Path, content: str) -> None:
    (study / "stages").mkdir()
    (study / "stages/drift.json").write_text(content)
    assert verify(study).problems[0].startswith("stages/drift.json: ")


@pytest.mark.parametrize("value", ["[", "5", [], None])
def test_prompts_as_models_read_them(study: Path, value: object) -> None:
    file = study / "outcomes.zarr/zarr.json"
    document = read_json(file)
    write_json(file, document | {"attributes": document["attributes"] | {"rendered_prompts": value}})
    with pytest.raises(StoreCorruptError, match=r"outcomes\.zarr"):
        rendered_prompts(study / "outcomes.zarr")


def test_arms_of_a_trial(tmp_path: Path) -> None:
    file = tmp_path / "intervention/disable/set.parquet"
    file.parent.mkdir(parents=True)
    for content in (b"", b"PAR1", b"garbage", bytes(100)):
        file.write_bytes(content)
        for read in (
            lambda: has_arm(file, "hash"),
            lambda: read_arm(file, "hash"),
            lambda: open_arms(StudyFolder(tmp_path), "disable"),
        ):
            with pytest.raises(StoreCorruptError, match=r"set\.parquet cannot be read"):
                read()


@pytest.mark.parametrize("name", ["lock", "0-4.lock", "a-4-1-00000000.lock", "0-4-1-xyz.lock", "0-4-1-0a.lock"])
def test_garbage_beside_a_lock_bars_nobody_and_hides_no_holder(tmp_path: Path, name: str) -> None:
    (tmp_path / f".a.zarr.{name}").write_bytes(b"\xff garbage\n")
    message = r"is being written by process \d+"
    with (
        exclusive(tmp_path / "a.zarr", (0, 4)),
        pytest.raises(StoreLockedError, match=message),
        exclusive(tmp_path / "a.zarr"),
    ):
        raise AssertionError("two writers")


@pytest.mark.parametrize(
    "kind", [ValueError, KeyError, TypeError, RecursionError, OSError, OverflowError, AttributeError]
)
def test_what_readers_raise_is_explained(kind: type[Exception]) -> None:
    with pytest.raises(StoreCorruptError, match=r"some\.json cannot be read \('?x"), explain_damage(Path("some.json")):
        raise kind("x")


def test_errors_of_the_file_system_are_not_damage() -> None:
    with pytest.raises(OSError, match="no space") as raised, explain_damage(Path("some.json")):
        raise OSError(28, "no space")
    assert not isinstance(raised.value, StoreCorruptError)
