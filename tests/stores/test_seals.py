"""Seals: a sound chunk or group that is not the one committed in its place is named by verify and when it is read."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from rlgen_stats.schemas.errors import StoreCorruptError
from rlgen_stats.stores import (
    ActivationWriter,
    PairedReader,
    Provenance,
    append_model,
    create_activations,
    creation,
    migrate,
    open_activations,
    open_features,
    open_outcomes,
    open_results,
    open_tokens,
    seals,
    verify,
    write_results,
)
from rlgen_stats.stores.atomic import read_json, write_json
from rlgen_stats.stores.digests import write_digest
from rlgen_stats.stores.tables import FEATURE_BLOCK
from tests.stores.conftest import feature_table, token_table

N, WIDTH, SHARD = 1000, 5, 128
MODELS = ("base@0", "rl@80")


def outcome_table(model: str, value: int) -> xr.Dataset:
    labels = feature_table(model).drop_vars(["mean", "firing", "max", "n_tokens", "fve", "decoder_norm", "view"])
    three, two = ("model", "prompt", "sample"), ("model", "prompt")
    return labels.assign(
        correct=(three, np.full((1, 3, 2), value)),
        completion_tokens=(three, np.full((1, 3, 2), value + 7)),
        format_class=(three, np.full((1, 3, 2), f"class {value}")),
        greedy_correct=(two, np.full((1, 3), value)),
        greedy_tokens=(two, np.full((1, 3), value + 7)),
        greedy_class=(two, np.full((1, 3), f"class {value}")),
    )


def notes(value: float) -> xr.Dataset:
    return xr.Dataset({"effect": ("feature", value + np.arange(2.0 * FEATURE_BLOCK))})


def write_study(path: Path, provenance: Provenance, seed: int) -> Path:
    """All four stores; two seeds give studies of equal shapes and other values."""
    tokens, prompts = token_table(N)
    tokens["token_id"] += seed
    create_activations(path / "activations.zarr", tokens, prompts, provenance=provenance, shard_tokens=SHARD)
    for i, model in enumerate(MODELS):
        values = np.random.default_rng([seed, i]).normal(size=(N, WIDTH)).astype("f4")
        with ActivationWriter(path / "activations.zarr", model=model, site="block2", width=WIDTH) as writer:
            writer.append(values)
        table = feature_table(model, float(10 * seed + i))
        append_model(path / "features.zarr", "features", table, provenance=provenance)
        append_model(path / "outcomes.zarr", "outcomes", outcome_table(model, 10 * seed + i), provenance=provenance)
    for group, value in (("notes", 0.0), ("others", 1.0)):
        write_results(path / "results.zarr", group, notes(10 * seed + value), provenance=provenance)
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(creation, "LABEL_BLOCK", 400)
        for seed, name in enumerate(("study", "older")):
            write_study(folder / name, Provenance("study-one", "key-one"), seed=seed)
    return folder


@pytest.fixture
def study(tmp_path: Path, written: Path) -> Path:
    return Path(shutil.copytree(written / "study", tmp_path / "study"))


@pytest.fixture
def older(written: Path) -> Path:
    return written / "older"


def shuffled(study: Path) -> None:
    list(PairedReader(study / "activations.zarr", MODELS, "block2", batch_size=100, seed=0).epoch(0))


READERS: dict[str, Callable[[Path], object]] = {
    "activations.zarr/rl@80/block2/activation/c.{}.0": lambda study: (
        open_activations(study / "activations.zarr").activation.values
    ),
    "activations.zarr/base@0/block2/activation/c.{}.0": shuffled,
    "activations.zarr/tokens/token_id/c/{}": lambda study: open_tokens(study / "activations.zarr").token_id.values,
    "features.zarr/mean/c/{}/0/0": lambda study: open_features(study / "features.zarr")["mean"].values,
    "features.zarr/step/c/{}": lambda study: open_features(study / "features.zarr").step.values,
    "outcomes.zarr/correct/c/{}/0/0": lambda study: open_outcomes(study / "outcomes.zarr").correct.values,
    "outcomes.zarr/greedy_class/c/{}/0": lambda study: open_outcomes(study / "outcomes.zarr").greedy_class.values,
    "results.zarr/notes/effect/c/{}": lambda study: open_results(study / "results.zarr", "notes").effect.values,
}


def swap(one: Path, two: Path, older: Path) -> None:
    kept = one.read_bytes()
    shutil.copy(two, one)
    two.write_bytes(kept)


def duplicate(one: Path, two: Path, older: Path) -> None:
    shutil.copy(two, one)


def roll_back(one: Path, two: Path, older: Path) -> None:
    shutil.copy(older, one)


def check_found(study: Path, store: str, read: Callable[[Path], object], said: str) -> None:
    """Verify names it, the study's other stores are sound, and reading refuses."""
    problems = verify(study).problems
    assert {problem.split(": ")[0] for problem in problems} == {store}, problems
    assert any(said in problem for problem in problems), problems
    with pytest.raises(StoreCorruptError, match=r"restore it"):
        read(study)


@pytest.mark.parametrize("change", [swap, pytest.param(duplicate, marks=pytest.mark.slow), roll_back])
@pytest.mark.parametrize("name", READERS)
def test_a_sound_chunk_in_the_wrong_place_is_named(
    study: Path, older: Path, name: str, change: Callable[[Path, Path, Path], None]
) -> None:
    one, two = name.format(0), name.format(1)
    if change is roll_back and name.startswith("features.zarr/step"):
        pytest.skip("the same labels in both")
    assert (study / one).read_bytes() != (study / two).read_bytes()
    READERS[name](study)
    change(study / one, study / two, older / one)
    store, array = name.split("/", 1)
    array = array.split("/c")[0]
    check_found(study, store, READERS[name], f"{array}: chunk [0")


def test_shards_swapped_together_with_their_records_are_named(study: Path) -> None:
    """Each pair is consistent in itself: the record has the checksum of the shard."""
    group = study / "activations.zarr/rl@80/block2"
    for array in ("activation", "committed"):
        swap(group / array / "c.1.0", group / array / "c.2.0", group)
    read = READERS["activations.zarr/rl@80/block2/activation/c.{}.0"]
    check_found(study, "activations.zarr", read, "model rl@80, site block2, tokens 128 to 255: ")


GROUPS: dict[str, Callable[[Path], object]] = {
    "results.zarr/notes": lambda study: open_results(study / "results.zarr", "notes"),
    "activations.zarr/rl@80/block2": lambda study: open_activations(study / "activations.zarr"),
    "activations.zarr/tokens": lambda study: open_tokens(study / "activations.zarr"),
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_whole_group_put_back_is_named(study: Path, older: Path, name: str) -> None:
    shutil.rmtree(study / name)
    shutil.copytree(older / name, study / name)
    store, group = name.split("/", 1)
    check_found(study, store, GROUPS[name], f"group {group}: ")


def test_results_that_changed_places_are_named(study: Path) -> None:
    results = study / "results.zarr"
    (results / "notes").rename(results / "kept")
    (results / "others").rename(results / "notes")
    (results / "kept").rename(results / "others")
    check_found(study, "results.zarr", GROUPS["results.zarr/notes"], "group notes: ")


def test_a_root_put_back_is_named(study: Path, provenance: Provenance) -> None:
    file = study / "results.zarr/zarr.json"
    kept = file.read_bytes()
    write_results(study / "results.zarr", "notes", notes(5.0), provenance=provenance)
    file.write_bytes(kept)
    check_found(study, "results.zarr", GROUPS["results.zarr/notes"], "group notes: ")


@pytest.mark.parametrize("content", [None, "", "[]", "5", '"text"', "{}", '{"mean/c/0/0/0": 7}', "[" * 100_000])
def test_damaged_seals_are_named_and_not_for_every_chunk(study: Path, content: str | None) -> None:
    file = study / "features.zarr/seals.json"
    file.unlink() if content is None else file.write_text(content)
    seals.checksums.cache_clear()
    problems = verify(study).problems
    assert [problem.split(": ")[1] for problem in problems] == ["group .", "layout"], problems
    assert all("seals.json" in problem for problem in problems), problems
    with pytest.raises(StoreCorruptError, match=r"seals\.json"):
        open_features(study / "features.zarr")


def test_older_seals_with_older_chunks_are_named(study: Path, older: Path) -> None:
    """All of a group's files but its zarr.json: that holds the hash of its seals."""
    for name in ("mean/c/0/0/0", "seals.json"):
        shutil.copy(older / "features.zarr" / name, study / "features.zarr" / name)
    seals.checksums.cache_clear()
    check_found(study, "features.zarr", READERS["features.zarr/mean/c/{}/0/0"], "does not list the chunks that were")


def test_a_reader_of_a_growing_store_sees_what_it_opened(study: Path, provenance: Provenance) -> None:
    opened = open_features(study / "features.zarr")
    append_model(study / "features.zarr", "features", feature_table("rl@90", 9.0), provenance=provenance)
    seals.checksums.cache_clear()
    assert opened["mean"].values.max() == 1.0
    assert verify(study).ok


def test_results_written_anew_since_they_were_opened_are_not_mixed(study: Path, provenance: Provenance) -> None:
    opened = open_results(study / "results.zarr", "notes")
    write_results(study / "results.zarr", "notes", notes(5.0), provenance=provenance)
    seals.checksums.cache_clear()
    with pytest.raises(StoreCorruptError):
        opened.effect.values  # noqa: B018
    assert open_results(study / "results.zarr", "notes").effect.values[0] == 5.0


# -- stores of earlier releases --------------------------------------------------------------------------------------
def unseal(study: Path) -> None:
    """The stores as an earlier release wrote them."""
    for file in study.rglob("zarr.json"):
        document = read_json(file)
        if document["node_type"] == "group":
            document.pop("consolidated_metadata", None)
            document["attributes"] = {k: v for k, v in document["attributes"].items() if k not in ("seal", "groups")}
            write_json(file, document)
            (file.parent / "seals.json").unlink(missing_ok=True)
            write_digest(file.parent)


def test_stores_without_seals_are_read_and_sealed_by_migrate(study: Path) -> None:
    unseal(study)
    report = verify(study)
    assert report.ok, report.problems
    assert [note.split(" ")[:3] for note in report.notes] == [
        ["activations.zarr:", "5", "group(s)"],
        ["features.zarr:", "1", "group(s)"],
        ["outcomes.zarr:", "1", "group(s)"],
        ["results.zarr:", "2", "group(s)"],
    ]
    for read in READERS.values():
        read(study)
    chunks = sorted(study.glob("features.zarr/mean/c/*/0/0"))
    swap(*chunks, study)
    assert verify(study).ok  # as it says
    swap(*chunks, study)
    migrate(study)
    assert verify(study).ok
    assert verify(study).notes == ()
    swap(*chunks, study)
    check_found(study, "features.zarr", READERS["features.zarr/mean/c/{}/0/0"], "mean: chunk [0")


def test_what_is_not_sound_is_not_sealed(study: Path) -> None:
    unseal(study)
    chunk = study / "features.zarr/mean/c/0/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(StoreCorruptError, match=r"features\.zarr is not sealed, because it is not sound: mean\[0:1"):
        migrate(study / "features.zarr")
    assert not (study / "features.zarr/seals.json").exists()


def test_an_append_seals_the_whole_store(study: Path, provenance: Provenance) -> None:
    unseal(study)
    append_model(study / "features.zarr", "features", feature_table("rl@90"), provenance=provenance)
    assert verify(study / "features.zarr").notes == ()
    assert verify(study / "features.zarr").ok


def test_model_labels_agree_with_the_committed_models(study: Path) -> None:
    unseal(study)
    swap(*sorted(study.glob("features.zarr/model/c/*")), study)
    with pytest.raises(StoreCorruptError, match=r"announces the models base@0, rl@80, .* labelled rl@80, base@0"):
        open_features(study / "features.zarr")
    assert "announces the models" in verify(study).problems[0]


# -- killed writers --------------------------------------------------------------------------------------------------
class DeathError(Exception):
    """No BaseException: one in Zarr's event loop ends the loop, and whoever waits for it waits forever."""


def append(study: Path, provenance: Provenance) -> None:
    append_model(study / "features.zarr", "features", feature_table("rl@90", 9.0), provenance=provenance)


def rewrite(study: Path, provenance: Provenance) -> None:
    write_results(study / "results.zarr", "notes", notes(5.0), provenance=provenance)


def extract(study: Path, provenance: Provenance) -> None:
    with ActivationWriter(study / "activations.zarr", model="rl@90", site="block2", width=WIDTH) as writer:
        writer.append(np.ones((N - writer.n_committed, WIDTH), "f4"))


@pytest.mark.parametrize(
    ("store", "write"), [("features.zarr", append), ("results.zarr", rewrite), ("activations.zarr", extract)]
)
def test_a_writer_that_dies_at_any_rename_leaves_a_sound_store(
    study: Path,
    provenance: Provenance,
    monkeypatch: pytest.MonkeyPatch,
    store: str,
    write: Callable[[Path, Provenance], None],
) -> None:
    rename, deaths = os.replace, 0
    while True:
        left = [deaths]

        def dying(*args: object, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise DeathError
            rename(*args)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            try:
                write(study, provenance)
                break
            except DeathError:
                deaths += 1
        assert verify(study / store).problems == (), deaths
    assert deaths >= 2
    assert verify(study / store).problems == ()
    groups = json.loads((study / "results.zarr/zarr.json").read_text())["attributes"]["groups"]
    assert {name: len(digests) for name, digests in groups.items()} == {"notes": 1, "others": 1}
