"""Import and export: exact round trips, resumption, and refusals that leave what is there as it is."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from rlgen_stats.schemas.errors import InputError, StoreError
from rlgen_stats.stores import (
    ActivationWriter,
    Provenance,
    complete_models,
    create_activations,
    open_activations,
    open_tokens,
    verify,
)
from rlgen_stats.stores.activation_store import stored_models
from rlgen_stats.toolkit.exchange import Cache, export_activations, import_activations, open_cache, read_labels
from tests.exchange.conftest import FORMATS, WIDTH, N, bits_of, label_table, tensor_of, write_cache

WHO = {"model": "rl@200", "site": "block12"}
SHARD = 256


def bits(values: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")


def small_shards(store: Path, labels: Path) -> None:
    """A store with several shards, so that an import can be interrupted between them."""
    tokens, prompts = read_labels(labels)
    create_activations(store, tokens, prompts, provenance=Provenance("study", "spec"), shard_tokens=SHARD)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float16", "bfloat16"])
def test_export_then_import_is_the_identity(tmp_path: Path, labels: Path, kind: str, dtype: str) -> None:
    if (kind, dtype) == ("npy", "bfloat16"):
        pytest.skip("numpy has no bfloat16")
    tensor = tensor_of(dtype)
    first, second = tmp_path / "first.zarr", tmp_path / "second.zarr"
    done = import_activations(write_cache(tmp_path / "cache", kind, tensor), labels, first, **WHO)
    assert (done.n_tokens, done.n_resumed, done.n_prompts, done.width) == (N, 0, 30, WIDTH)
    assert (done.dtype, done.format, done.n_files) == (dtype, kind, 3)
    out = export_activations(first, tmp_path / "out", formats=("safetensors", "npy"))
    assert out.files == ("labels.parquet", "rl@200.npy", "rl@200.safetensors")
    assert bits_of(tensor).tobytes() == (tmp_path / "out" / "rl@200.safetensors").read_bytes()[-tensor.nbytes :]
    import_activations(tmp_path / "out" / "rl@200.safetensors", tmp_path / "out" / "labels.parquet", second, **WHO)
    one, two = open_activations(first), open_activations(second)
    np.testing.assert_array_equal(one.activation.values, two.activation.values)
    np.testing.assert_array_equal(one.activation.values[0], tensor.to(torch.float32))
    for name, column in label_table().items():
        np.testing.assert_array_equal(one[name].values, column.to_numpy())
        np.testing.assert_array_equal(two[name].values, column.to_numpy())
    assert one.attrs["labels_hash"] == two.attrs["labels_hash"] == two.attrs["study_id"] == two.attrs["spec_hash"]
    assert verify(second).ok


def test_other_tools_read_the_export(tmp_path: Path, labels: Path) -> None:
    tensor, store, out = tensor_of("bfloat16"), tmp_path / "a.zarr", tmp_path / "out"
    import_activations(write_cache(tmp_path / "cache", "pt", tensor), labels, store, **WHO)
    export_activations(store, out, formats=["npy", "safetensors"])
    with safe_open(out / "rl@200.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("activation"), tensor)
        assert file.metadata() == {"model": "rl@200", "site": "block12", "spec_hash": open_tokens(store).spec_hash}
    assert int.from_bytes((out / "rl@200.safetensors").read_bytes()[:8], "little") % 8 == 0
    array = np.load(out / "rl@200.npy", mmap_mode="r", allow_pickle=False)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, tensor.float())
    pd.testing.assert_frame_equal(pd.read_parquet(out / "labels.parquet"), label_table(), check_dtype=False)


@pytest.mark.parametrize(
    "where",
    [
        {"segment": "completion"},
        {"segment": "prompt", "task": ["math"]},
        {"prompt": ["000", "013", "029"]},
        {"domain": "out", "split": "selection", "source": "base@0"},
        {"task": ["math", "sciq"]},
    ],
)
def test_a_selection_is_the_rows_that_pandas_selects(
    tmp_path: Path, labels: Path, where: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlgen_stats.toolkit.exchange.exporting.LABEL_ROWS", 100)
    tensor, store, out = tensor_of("float16"), tmp_path / "a.zarr", tmp_path / "out"
    small_shards(store, labels)
    for model in ("rl@200", "base@0"):
        values = tensor if model == "rl@200" else -tensor
        import_activations(
            write_cache(tmp_path / model, "safetensors", values), labels, store, model=model, site="block12"
        )
    table = label_table()
    keep = np.ones(len(table), dtype=bool)
    for name, wanted in where.items():
        keep &= table[name].isin([wanted] if isinstance(wanted, str) else wanted).to_numpy()
    done = export_activations(store, out, where=where, models=["rl@200"], formats=["npy"])
    assert done.n_tokens == keep.sum() > 0
    assert done.files == ("labels.parquet", "rl@200.npy")
    np.testing.assert_array_equal(np.load(out / "rl@200.npy"), tensor.numpy()[keep])
    written = pd.read_parquet(out / "labels.parquet")
    pd.testing.assert_frame_equal(written, table[keep].reset_index(drop=True), check_dtype=False)
    both = export_activations(store, tmp_path / "both", where=where, site="block12")
    assert both.models == ("base@0", "rl@200")
    np.testing.assert_array_equal(
        np.concatenate(list(open_cache(tmp_path / "both" / "base@0.safetensors").blocks())), -tensor.numpy()[keep]
    )
    import_activations(tmp_path / "out" / "rl@200.npy", out / "labels.parquet", tmp_path / "b.zarr", **WHO)
    np.testing.assert_array_equal(open_activations(tmp_path / "b.zarr").activation.values[0], tensor.numpy()[keep])


@pytest.mark.parametrize("blocks", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_an_interrupted_import_goes_on_to_the_same_bytes(
    tmp_path: Path, labels: Path, monkeypatch: pytest.MonkeyPatch, blocks: int, dtype: str
) -> None:
    cache = write_cache(tmp_path / "cache", "safetensors", tensor_of(dtype))
    whole, resumed = tmp_path / "whole.zarr", tmp_path / "resumed.zarr"
    for store in (whole, resumed):
        small_shards(store, labels)
    import_activations(cache, labels, whole, **WHO)
    read = Cache.blocks

    def breaking(self: Cache, start: int = 0, max_rows: int = 8192) -> Iterator[NDArray[Any]]:
        for index, block in enumerate(read(self, start, max_rows)):
            if index == blocks:
                raise KeyboardInterrupt
            yield block
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Cache, "blocks", breaking)
        with pytest.raises(KeyboardInterrupt):
            import_activations(cache, labels, resumed, **WHO)
    there = stored_models(resumed)["rl@200", "block12"]
    assert there == [0, SHARD, 3 * SHARD, N][blocks]  # files of 500, 300 and 400 rows; shards of 256
    done = import_activations(cache, labels, resumed, **WHO)
    assert done.n_resumed == there
    assert complete_models(resumed) == ["rl@200"]
    assert files_of(resumed / "rl@200") == files_of(whole / "rl@200")


def test_a_finished_import_is_not_repeated_and_another_cache_is_refused(tmp_path: Path, labels: Path) -> None:
    cache, store = write_cache(tmp_path / "cache", "npy", tensor_of("float32")), tmp_path / "a.zarr"
    import_activations(cache, labels, store, **WHO)
    before = files_of(store)
    assert import_activations(cache, labels, store, **WHO).n_resumed == N
    other = tensor_of("float32")
    other[3] += 1
    with pytest.raises(InputError, match=r"rl@200/block12 already holds 1200 tokens of another cache, .* is token 3;"):
        import_activations(write_cache(tmp_path / "other", "npy", other), labels, store, **WHO)
    assert files_of(store) == before


def test_models_join_a_store_with_the_same_labels_however_they_came(tmp_path: Path, labels: Path) -> None:
    store, cache = tmp_path / "a.zarr", write_cache(tmp_path / "cache", "pt", tensor_of("float32"))
    tokens, prompts = read_labels(labels)
    more = pd.DataFrame([["zzz", "math", "in", "selection", "c"]], columns=prompts.columns)
    prompts = pd.concat([prompts[::-1], more])  # another order, and a prompt without tokens
    create_activations(store, tokens, prompts, provenance=Provenance("study", "spec"))
    label_table().to_csv(tmp_path / "labels.csv", index=False)
    import_activations(cache, tmp_path / "labels.csv", store, **WHO)
    import_activations(cache, labels, store, model="sft@3", site="block12", dtype="bfloat16", study_id="study")
    assert complete_models(store) == ["rl@200", "sft@3"]
    assert open_tokens(store).attrs["spec_hash"] == "spec"


@pytest.mark.parametrize(("column", "value"), [("task", "law"), ("token_id", 9), ("source", "base@0"), ("split", None)])
def test_a_store_with_other_labels_is_refused_and_left_alone(
    tmp_path: Path, labels: Path, monkeypatch: pytest.MonkeyPatch, column: str, value: object
) -> None:
    monkeypatch.setattr("rlgen_stats.toolkit.exchange.importing.LABEL_ROWS", 100)
    store, cache = tmp_path / "a.zarr", write_cache(tmp_path / "cache", "pt", tensor_of("float32"))
    import_activations(cache, labels, store, **WHO)
    before = files_of(store)
    table = label_table()
    rows = table["prompt"] == "025"
    table.loc[rows, column] = value or "verification"
    table.to_parquet(labels)
    with pytest.raises(
        StoreError, match=rf"has other labels than the table: token 100\d has {column} '.*', the table '"
    ):
        import_activations(cache, labels, store, model="sft@1", site="block12")
    assert files_of(store) == before


def test_provenance_names_files_without_folders(tmp_path: Path, labels: Path) -> None:
    cache, store = write_cache(tmp_path / "cache", "safetensors", tensor_of("float16")), tmp_path / "a.zarr"
    import_activations(cache, labels, store, **WHO, study_id="mine")
    attrs = open_tokens(store).attrs
    facts = json.loads(attrs["provenance"])
    assert attrs["study_id"] == "mine"
    assert facts["format"] == "safetensors"
    names = ["part-2.safetensors", "part-9.safetensors", "part-10.safetensors"]
    assert facts["files"] == [{"name": name, "bytes": (cache / name).stat().st_size} for name in names]
    assert str(tmp_path) not in attrs["provenance"]
    with pytest.raises(StoreError, match=r"belongs to the study mine, expected other; name another store"):
        import_activations(cache, labels, store, **WHO, study_id="other")


def test_wrong_imports_are_refused_before_anything_is_written(tmp_path: Path, labels: Path) -> None:
    store, cache = tmp_path / "a.zarr", write_cache(tmp_path / "cache", "pt", tensor_of("float32"))
    with pytest.raises(
        InputError, match=r"the cache has 500 rows, the label table 1200; expected one row of labels for"
    ):
        import_activations(cache / "part-2.pt", labels, store, **WHO)
    torch.save(torch.zeros(2, 3, 4), tmp_path / "padded.pt")
    with pytest.raises(InputError, match=r"the cache has 6 rows, .* label padding as segment pad, or take the table"):
        import_activations(tmp_path / "padded.pt", labels, store, **WHO)
    with pytest.raises(InputError, match="a model id looks like 'rl@200'"):
        import_activations(cache, labels, store, model="rl", site="block12")
    with pytest.raises(InputError, match="a site must be letters"):
        import_activations(cache, labels, store, model="rl@1", site="../block12")
    with pytest.raises(InputError, match="activations are stored as float32, float16, bfloat16, got 'int8'"):
        import_activations(cache, labels, store, **WHO, dtype="int8")
    bad = label_table()
    bad.loc[3, "position"] = 1
    bad.to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(InputError, match=r"position of row 3 in bad.parquet is 1 after 2 of the same text"):
        import_activations(cache, tmp_path / "bad.parquet", store, **WHO)
    assert not store.exists()
    short = label_table(1160)
    import_activations(cache, labels, store, **WHO)
    short.to_parquet(labels)
    torch.save(tensor_of("float32")[:1160].clone(), tmp_path / "short.pt")
    with pytest.raises(StoreError, match=r"has 1200 tokens, the label table 1160; expected the same texts"):
        import_activations(tmp_path / "short.pt", labels, store, **WHO)


def test_nonfinite_values_are_refused_or_kept(tmp_path: Path, labels: Path) -> None:
    tensor = tensor_of("bfloat16").view(torch.uint16)
    tensor[700, 1] = 0xFFA5  # a NaN with a payload
    tensor = tensor.view(torch.bfloat16)
    cache, store = write_cache(tmp_path / "cache", "memmap", tensor), tmp_path / "a.zarr"
    with pytest.raises(InputError, match=r"1 of .* tokens have NaN or infinite .* the first is token 700; .*--allow-n"):
        import_activations(cache, labels, store, **WHO)
    import_activations(cache, labels, store, **WHO, allow_nonfinite=True)
    export_activations(store, tmp_path / "out")
    (block,) = open_cache(tmp_path / "out" / "rl@200.safetensors").blocks()
    np.testing.assert_array_equal(block, bits_of(tensor))


def test_exports_never_replace_anything(tmp_path: Path, labels: Path) -> None:
    store = tmp_path / "a.zarr"
    import_activations(write_cache(tmp_path / "cache", "npy", tensor_of("float32")), labels, store, **WHO)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for out in (mine, mine / "thesis.txt"):
        with pytest.raises(InputError, match=r"exists and is not empty; expected a new folder"):
            export_activations(store, out)
    assert (mine / "thesis.txt").read_text() == "years of work"
    (mine / "thesis.txt").unlink()
    assert export_activations(store, mine).n_tokens == N
    assert sorted(f.name for f in mine.iterdir()) == ["labels.parquet", "rl@200.safetensors"]


def test_wrong_exports_are_refused_and_leave_nothing(tmp_path: Path, labels: Path) -> None:
    store, out = tmp_path / "a.zarr", tmp_path / "out"
    import_activations(write_cache(tmp_path / "cache", "npy", tensor_of("float32")), labels, store, **WHO)
    before = [f for f in sorted(tmp_path.iterdir()) if f.suffix != ".lock"]
    for options, error, message in (
        ({"formats": ["csv"]}, InputError, r"arrays are exported as safetensors or npy, got \['csv'\]"),
        ({"formats": []}, InputError, "arrays are exported as safetensors or npy, got nothing"),
        ({"where": {"colour": "red"}}, InputError, "tokens are selected by prompt, .*, got 'colour'"),
        (
            {"where": {"prompt": "000", "task": "math"}},
            InputError,
            "no token of .* has the labels {'prompt': '000', 't",
        ),
        ({"models": ["sft@1"]}, StoreError, "has no complete activations of .*'sft@1'"),
        ({"site": "block1"}, StoreError, "has no complete activations"),
    ):
        with pytest.raises(error, match=message):
            export_activations(store, out, **options)
    with pytest.raises(InputError, match="exports are written to a local folder, got memory://out"):
        export_activations(store, "memory://out")
    tokens = ActivationWriter(store, model="half@1", site="block12", width=2)
    with tokens as writer:
        writer.append(np.zeros((5, 2), np.float32))
    with pytest.raises(StoreError, match=r"no complete activations of .*'half@1'"):
        export_activations(store, out, models=["half@1"])
    chunk = next(p for p in (store / "rl@200" / "block12" / "activation").iterdir() if p.name.startswith("c"))
    chunk.write_bytes(b"\1" + chunk.read_bytes()[1:])
    with pytest.raises(StoreError, match="fails its crc32c checksum"):
        export_activations(store, out)
    assert [f for f in sorted(tmp_path.iterdir()) if f.suffix != ".lock"] == before
