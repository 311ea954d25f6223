"""Verification: every missing, cut, swapped or foreign piece is found and named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from rlgen_stats.schemas.errors import StoreCorruptError, StoreError
from rlgen_stats.stores import (
    ActivationWriter,
    PairedReader,
    Provenance,
    append_model,
    create_activations,
    open_activations,
    open_features,
    verify,
    write_json,
    write_results,
)
from tests.reporting.synthetic_study import tokens
from tests.stores.conftest import feature_table, token_table
from tests.stores.test_seals import unseal

N, WIDTH, SHARD = 1000, 5, 128


@pytest.fixture
def study(tmp_path: Path, provenance: Provenance) -> Path:
    path = tmp_path / "study"
    activations = path / "activations.zarr"
    create_activations(activations, *token_table(N), provenance=provenance, shard_tokens=SHARD)
    for i, model in enumerate(("base@0", "rl@80")):
        values = np.random.default_rng(i).normal(size=(N, WIDTH)).astype("f4")
        with ActivationWriter(activations, model=model, site="block2", width=WIDTH) as writer:
            writer.append(values)
        append_model(path / "features.zarr", "features", feature_table(model, float(i)), provenance=provenance)
    write_results(
        path / "results.zarr", "notes", xr.Dataset({"effect": ("feature", np.arange(4.0))}), provenance=provenance
    )
    return path


def flip(file: Path, offset: int, bit: int) -> bytes:
    sound = file.read_bytes()
    broken = bytearray(sound)
    broken[offset] ^= 1 << bit
    file.write_bytes(bytes(broken))
    return sound


def test_reading_a_flipped_byte_raises(study: Path) -> None:
    random = np.random.default_rng(1)
    store = study / "activations.zarr"
    chunks = sorted(store.glob("rl@80/block2/activation/c.*"))
    for _ in range(40):
        file = chunks[random.integers(len(chunks))]
        sound = flip(file, int(random.integers(file.stat().st_size)), int(random.integers(8)))
        with pytest.raises(StoreCorruptError, match=r"shard \d \(rows \d+ to \d+\) fails its crc32c checksum"):
            open_activations(store).activation.sel(model="rl@80").values  # noqa: B018
        with pytest.raises(StoreCorruptError, match="checksum"):
            list(PairedReader(store, ["rl@80", "base@0"], "block2", batch_size=100, seed=0).epoch(0))
        file.write_bytes(sound)
    chunk = study / "features.zarr/mean/c/0/0/0"
    sound = flip(chunk, 9, 3)
    with pytest.raises(ValueError, match="checksum"):
        open_features(study / "features.zarr")["mean"].values  # noqa: B018
    chunk.unlink()
    with pytest.raises(StoreCorruptError, match="lacks the chunk"):
        open_features(study / "features.zarr")["mean"].values  # noqa: B018
    chunk.write_bytes(sound)
    assert open_features(study / "features.zarr")["mean"].shape == (2, 3, 5)


def spoil_swap(store: Path) -> None:
    one, two = (store / f"rl@80/block2/activation/c.{i}.0" for i in (1, 2))
    kept = one.read_bytes()
    shutil.copy(two, one)
    two.write_bytes(kept)


def spoil_other_model(store: Path) -> None:
    shutil.copy(store / "base@0/block2/activation/c.3.0", store / "rl@80/block2/activation/c.3.0")


def spoil_missing(store: Path) -> None:
    (store / "rl@80/block2/activation/c.4.0").unlink()


def spoil_cut(store: Path) -> None:
    file = store / "rl@80/block2/activation/c.5.0"
    file.write_bytes(file.read_bytes()[:-9])


def spoil_empty(store: Path) -> None:
    (store / "rl@80/block2/activation/c.5.0").write_bytes(b"")


def spoil_record(store: Path) -> None:
    (store / "rl@80/block2/committed/c.6.0").unlink()


def spoil_label_chunk(store: Path) -> None:
    (store / "tokens/position/c/0").unlink()


def spoil_labels(store: Path) -> None:
    import zarr

    array = zarr.open_array(store / "tokens/token_id", mode="r+")
    array[17] = array[17] + 1  # a well-formed chunk with a sound checksum


def spoil_spans(store: Path) -> None:
    import zarr

    array = zarr.open_array(store / "spans/start", mode="r+")
    array[3] = array[3] + 1


def spoil_attribute(store: Path) -> None:
    document = json.loads((store / "zarr.json").read_text())
    document["attributes"]["spec_hash"] = "another"
    (store / "zarr.json").write_text(json.dumps(document))


def spoil_version(store: Path) -> None:
    document = json.loads((store / "zarr.json").read_text())
    document["attributes"]["schema_version"] = 7
    (store / "zarr.json").write_text(json.dumps(document))


def spoil_metadata(store: Path) -> None:
    (store / "rl@80/block2/activation/zarr.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_swap, r"rl@80, site block2, tokens 128 to 255: .*chunk \[1, 0\] has the checksum .* committed there"),
        (spoil_other_model, r"rl@80, site block2, tokens 384 to 511: .*chunk \[3, 0\] has the checksum"),
        (spoil_missing, r"tokens 512 to 639.*shard 4 .* is missing"),
        (spoil_cut, r"tokens 640 to 767.*has \d+ bytes, expected \d+"),
        (spoil_empty, r"tokens 640 to 767.*is missing or empty"),
        (spoil_record, r"tokens 768 to 895.*shard 6 .* is missing"),
        (spoil_label_chunk, r"tokens/position\[0:1000\].*lacks the chunk|labels.*lacks the chunk"),
        (spoil_labels, r"tokens/token_id: chunk \[0\] has the checksum .* committed there"),
        (spoil_spans, r"spans/start: chunk \[0\] has the checksum .* committed there"),
        (spoil_attribute, r"group \.: its metadata or attributes changed"),
        (spoil_version, r"layout version 7, this release reads up to 2; upgrade"),
        (spoil_metadata, r"zarr.json is not Zarr v3 metadata"),
    ],
)
def test_what_is_wrong_is_named(study: Path, spoil, said: str) -> None:  # type: ignore[no-untyped-def]
    spoil(study / "activations.zarr")
    report = verify(study)
    assert not report.ok
    assert any(__import__("re").search(said, problem) for problem in report.problems), report.problems


def test_the_first_bad_shard_comes_first_whatever_order_the_threads_finish(study: Path) -> None:
    for name in ("c.6.0", "c.2.0", "c.4.0"):
        flip(study / "activations.zarr/rl@80/block2/activation" / name, 20, 1)
    problems = verify(study / "activations.zarr").problems
    assert ["tokens 256" in problems[0], "tokens 512" in problems[1], "tokens 768" in problems[2]] == [True] * 3


def test_progress_counts_every_check(study: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify(study, on_progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))
    assert report.n_chunks >= 16 + 16 + 5


def test_an_unfinished_model_is_no_fault(study: Path) -> None:
    values = np.ones((300, WIDTH), "f4")
    with ActivationWriter(study / "activations.zarr", model="sft@5", site="block2", width=WIDTH) as writer:
        writer.append(values)
    assert verify(study).ok


def test_a_result_called_tokens_is_no_table_of_tokens(study: Path, provenance: Provenance) -> None:
    write_results(study / "results.zarr", "tokens", tokens(), provenance=provenance)
    assert verify(study).problems == ()


def test_no_store_is_explained(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"not a Zarr v3 store \(no such folder\)"):
        verify(tmp_path / "nothing")
    with pytest.raises(StoreError, match=r"the folder is there but has no zarr.json"):
        verify(tmp_path)


def test_labels_that_are_all_alike_are_on_disk_too(tmp_path: Path, provenance: Provenance) -> None:
    tokens, prompts = token_table(N)
    path = tmp_path / "a.zarr"
    create_activations(path, tokens.assign(source="base@0", token_id=0), prompts, provenance=provenance)
    assert verify(path).ok, verify(path).problems
    assert (path / "tokens/source/c/0").exists()


def test_a_study_that_has_no_store_yet_is_sound(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a Zarr"):
        verify(tmp_path)
    (tmp_path / "study.yaml").write_text("name: begun\n")
    assert verify(tmp_path).ok
    assert verify(tmp_path).n_chunks == 0


def test_a_store_that_a_finished_stage_left_and_that_is_gone_is_named(study: Path, provenance: Provenance) -> None:
    """The stores that are there are sound; a backup that lacks one was called sound, too."""
    stores = {"features.zarr": ["base@0", "rl@80"], "features.2.zarr": ["base@0"], "results.zarr/drift": []}
    own = {"study_id": provenance.study_id, "key": provenance.spec_hash, "stage": "encode", "stores": stores}
    own["dictionaries"] = {"features.zarr": "crosscoder/main"}
    write_json(study / "stages/encode.json", own | {"finished": True})
    (fault,) = verify(study).problems
    for name in ("features.2.zarr", "results.zarr/drift", "crosscoder/main"):
        assert f"{name} is missing, which stage encode left or used; restore it, or 'rlgen-stats run " in fault
    assert "features.zarr is missing" not in fault
    write_json(study / "stages/encode.json", own | {"finished": False})
    assert verify(study).ok  # it is being written


def test_a_store_that_is_not_the_one_a_stage_wrote_is_named(study: Path, provenance: Provenance) -> None:
    """An import with one model put in place of the study's own was sound in itself, and so passed."""
    unseal(study)  # a sealed store itself names the group that is gone
    stores = {"activations.zarr": ["base@0", "rl@80"], "features.zarr": ["base@0", "rl@80"]}
    own = {"study_id": provenance.study_id, "key": provenance.spec_hash}
    write_json(study / "stages/extract.json", {"stage": "extract", "finished": True, "stores": stores} | own)
    assert verify(study).ok
    shutil.rmtree(study / "activations.zarr/rl@80")
    shutil.rmtree(study / "features.zarr")
    append_model(study / "features.zarr", "features", feature_table("rl@80"), provenance=Provenance("another", "key"))
    fault = verify(study).problems[0]
    assert fault.startswith("stages/extract.json: activations.zarr: lacks rl@80, which stage extract wrote")
    assert "; features.zarr: not what stage extract wrote, but of study another, key key" in fault
    write_json(study / "stages/extract.json", {"stage": "extract", "finished": False, "stores": stores} | own)
    assert verify(study).ok  # it is being written
