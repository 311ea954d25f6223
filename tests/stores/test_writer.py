"""The activation writer: types, labels, bounded memory, disjoint ranges, bad input."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import zarr

from rlgen_stats.schemas.errors import InputError, StoreError, StoreLockedError
from rlgen_stats.stores import (
    ActivationWriter,
    PairedReader,
    Provenance,
    complete_models,
    create_activations,
    open_activations,
    verify,
)
from rlgen_stats.stores import shards as shards_module
from rlgen_stats.stores import writer as writer_module
from tests.stores.conftest import hashes, token_table

N, WIDTH, SHARD = 1000, 6, 64


@pytest.fixture
def small(tmp_path: Path, provenance: Provenance) -> Path:
    path = tmp_path / "activations.zarr"
    create_activations(path, *token_table(N), provenance=provenance, shard_tokens=SHARD)
    return path


def write(path: Path, values: np.ndarray, model: str = "rl@80", **how: object) -> None:
    with ActivationWriter(path, model=model, site="block2", width=values.shape[1], **how) as writer:  # type: ignore[arg-type]
        for start in range(writer.n_committed, len(values), 100):
            writer.append(values[start : start + 100])


def bfloat16(n: int = N) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).normal(size=(n, WIDTH)).astype("f4")).to(torch.bfloat16)


def test_bfloat16_is_kept_bit_for_bit_and_read_as_float32_or_torch(small: Path) -> None:
    tensor = bfloat16()
    bits = tensor.view(torch.int16).numpy().view(np.uint16)
    write(small, bits, dtype="bfloat16")
    read = open_activations(small).activation.sel(model="rl@80").values
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, tensor.float().numpy())
    stored = next(PairedReader(small, ["rl@80"], "block2", batch_size=N, seed=0, dtype="stored").sequential())[:, 0]
    assert torch.equal(torch.from_numpy(stored.copy()).view(torch.bfloat16), tensor)
    plain = xr.open_zarr(small, group="rl@80/block2", consolidated=False).activation
    assert plain.attrs["bits_of"] == "bfloat16"
    np.testing.assert_array_equal(plain.values, bits)


def test_float32_given_for_bfloat16_rounds_as_torch_does(small: Path) -> None:
    values = np.random.default_rng(4).normal(size=(N, WIDTH)).astype("f4")
    values[0, :4] = [1 + 2**-8, 1 + 3 * 2**-8, 3.3e38, -0.0]  # two ties, near the top, signed zero
    write(small, values, dtype="bfloat16")
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(open_activations(small).activation.values[0], expected)


@pytest.mark.parametrize("at_once", [1, 25, 64, 999, 1000])
def test_values_are_converted_a_few_at_a_time_whatever_is_appended(
    small: Path, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(4).normal(size=(N, WIDTH)).astype("f4")
    converted: list[int] = []

    def counted(part: np.ndarray) -> np.ndarray:
        converted.append(len(part))
        return shards_module.to_bfloat16(part)

    monkeypatch.setattr(writer_module, "to_bfloat16", counted)
    monkeypatch.setattr(writer_module, "CONVERTED_BYTES", 4 * WIDTH * at_once)
    with ActivationWriter(small, model="rl@80", site="block2", width=WIDTH, dtype="bfloat16") as writer:
        writer.append(values)
    assert max(converted) == at_once
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(open_activations(small).activation.values[0], expected)


def test_nan_survives_bfloat16_with_its_sign() -> None:
    odd = np.array([np.nan, -np.nan, np.inf, -np.inf], "f4")
    kept = shards_module.to_float32(shards_module.to_bfloat16(odd), "bfloat16")
    np.testing.assert_array_equal(np.signbit(kept), np.signbit(odd))
    np.testing.assert_array_equal(np.isnan(kept), np.isnan(odd))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_nonfinite_value_is_found_and_counted(small: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "CONVERTED_BYTES", 4 * WIDTH * 25)
    values = np.zeros((N, WIDTH), "f4")
    values[[70, 333, 900], [1, 2, 3]] = [np.nan, np.inf, -np.inf]
    with (
        ActivationWriter(small, model="rl@80", site="block2", width=WIDTH, dtype=dtype) as writer,
        pytest.raises(InputError, match=r"3 of 1000 tokens have NaN or infinite.*first is token 70.*allow-nonfinite"),
    ):
        writer.append(values)
    write(small, values, dtype=dtype, allow_nonfinite=True)
    np.testing.assert_array_equal(open_activations(small).activation.values[0], values)


def test_a_value_too_large_for_float16_is_refused_not_stored_as_infinity(small: Path) -> None:
    values = np.full((N, WIDTH), 1e5, "f4")
    with pytest.raises(InputError, match=r"100 of 100.*float16"):
        write(small, values[:1000], dtype="float16")


def test_views_of_several_widths_live_in_one_store(small: Path) -> None:
    write(small, np.ones((N, 4), "f4"), "base@0")
    write(small, np.ones((N, 9), "f2"), "rl@80", dtype="float16")
    assert open_activations(small, models=["rl@80"]).sizes["channel"] == 9
    with pytest.raises(StoreError, match=r"widths \[4, 9\]; name models of one width"):
        open_activations(small)


def test_labels_given_with_the_activations_are_compared_with_the_store(small: Path) -> None:
    tokens, _ = token_table(N)
    values = np.zeros((N, WIDTH), "f4")
    with ActivationWriter(small, model="rl@80", site="block2", width=WIDTH) as writer:
        writer.append(values[:150], tokens.iloc[:150])
        writer.append(values[150:170], {"token_id": tokens.token_id.to_numpy()[150:170]})
        other = tokens.token_id.to_numpy()[170:300].copy()
        other[7] += 1
        with pytest.raises(InputError, match=r"other tokens than the store's: token 177 has token_id 8, expected 7"):
            writer.append(values[170:300], {"token_id": other})
        with pytest.raises(InputError, match=r"token 170 has prompt p9, expected p3"):
            writer.append(values[170:180], {"prompt": ["p9"] * 10})
        with pytest.raises(InputError, match=r"labels of tokens are prompt.*got 'colour'"):
            writer.append(values[170:180], {"colour": [1] * 10})
        with pytest.raises(InputError, match=r"one value for each of 10 tokens, got \(3,\)"):
            writer.append(values[170:180], {"position": [1, 2, 3]})
        writer.append(values[170:], tokens.iloc[170:])
    assert complete_models(small) == ["rl@80"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((3, WIDTH + 1), "f4"), rf"must be \[n, {WIDTH}\], got \(3, 7\)"),
        (np.zeros(WIDTH, "f4"), r"must be \[n, 6\], got \(6,\)"),
        (np.zeros((3, WIDTH), "i8"), r"must be floating point, got int64"),
        (np.zeros((3, WIDTH), "c8"), r"must be floating point, got complex64"),
        (np.zeros((N + 1, WIDTH), "f4"), rf"{N + 11} tokens given, but the store's texts have {N}"),
    ],
)
def test_wrong_shapes_and_types_are_refused_and_nothing_is_lost(small: Path, values: np.ndarray, message: str) -> None:
    good = np.random.default_rng(5).normal(size=(N, WIDTH)).astype("f4")
    with ActivationWriter(small, model="rl@80", site="block2", width=WIDTH) as writer:
        writer.append(good[:10])
        with pytest.raises(InputError, match=message):
            writer.append(values)
        writer.append(good[10:])
    np.testing.assert_array_equal(open_activations(small).activation.values[0], good)


def test_wrong_arguments_are_explained(small: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"stored as float32, float16, bfloat16, got 'float64'"):
        ActivationWriter(small, model="rl@80", site="block2", width=3, dtype="float64")
    for name in ("../evil", "a/b", "", ".hidden"):
        with pytest.raises(InputError, match=r"a site must be letters, digits"):
            ActivationWriter(small, model="rl@80", site=name, width=3)
        with pytest.raises(InputError, match=r"a run name must be letters|looks like 'rl@200'"):
            ActivationWriter(small, model=f"{name}@3", site="s", width=3)
    with pytest.raises(InputError, match=r"range within 0 to 16, got range\(3, 17\)"):
        ActivationWriter(small, model="rl@80", site="block2", width=3, shards=range(3, 17))
    with pytest.raises(StoreError, match=r"not a Zarr v3 store \(no such folder\)"):
        ActivationWriter(tmp_path / "nothing", model="rl@80", site="block2", width=3)
    write(small, np.zeros((N, WIDTH), "f4"))
    with pytest.raises(StoreError, match=r"holds shape \(1000, 6\) float32, expected \(1000, 7\) float16"):
        ActivationWriter(small, model="rl@80", site="block2", width=7, dtype="float16").__enter__()


def test_the_writer_never_waits_for_the_disk_and_holds_a_bounded_number_of_shards(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, most, lock = threading.Event(), 0, threading.Lock()
    held: set[int] = set()
    real = writer_module.write_chunk

    def stuck(folder: Path, index: int, values: np.ndarray, *, ndim: int) -> int:
        nonlocal most
        with lock:
            held.add(id(values))
            most = max(most, len(held))
        slow.wait(20)
        return real(folder, index, values, ndim=ndim)

    monkeypatch.setattr(writer_module, "write_chunk", stuck)
    values = np.random.default_rng(6).normal(size=(N, WIDTH)).astype("f4")
    with ActivationWriter(small, model="rl@80", site="block2", width=WIDTH) as writer:
        for start in range(0, writer_module.QUEUE * SHARD, SHARD):
            writer.append(values[start : start + SHARD])  # returns although nothing has reached the disk
        assert writer.n_committed == 0
        slow.set()
        writer.append(values[writer_module.QUEUE * SHARD :])
        shards = writer._free
        assert len({id(block) for block in shards}) <= writer_module.QUEUE + 2
    np.testing.assert_array_equal(open_activations(small).activation.values[0], values)


def test_a_disk_error_in_the_background_reaches_the_caller(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(writer_module, "write_chunk", broken)
    with pytest.raises(OSError, match="Input/output error"):
        write(small, np.zeros((N, WIDTH), "f4"))
    monkeypatch.undo()
    assert complete_models(small) == []


def write_range(path: Path, values: np.ndarray, first: int, stop: int) -> None:
    with ActivationWriter(path, model="rl@80", site="block2", width=WIDTH, shards=range(first, stop)) as writer:
        mine = values[first * SHARD : stop * SHARD]
        for start in range(writer.n_committed, len(mine), 37):
            writer.append(mine[start : start + 37])


RANK = """
import sys, numpy as np
from rlgen_stats.stores import ActivationWriter
path, values, (shard, first, stop) = sys.argv[1], np.load(sys.argv[2]), map(int, sys.argv[3:])
with ActivationWriter(path, model="rl@80", site="block2", width=values.shape[1], shards=range(first, stop)) as writer:
    mine = values[first * shard : stop * shard]
    for start in range(writer.n_committed, len(mine), 37):
        writer.append(mine[start : start + 37])
"""


def test_disjoint_ranges_by_several_processes_equal_one_process(
    small: Path, tmp_path: Path, provenance: Provenance
) -> None:
    values = np.random.default_rng(7).normal(size=(N, WIDTH)).astype("f4")
    alone = tmp_path / "alone" / small.name
    create_activations(alone, *token_table(N), provenance=provenance, shard_tokens=SHARD)
    write(alone, values)
    np.save(tmp_path / "values.npy", values)
    spans = ((0, 5), (5, 6), (6, 11), (11, 16))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", RANK, small, tmp_path / "values.npy", str(SHARD), *map(str, span)]
        )
        for span in spans
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0, 0, 0]
    assert complete_models(small) == ["rl@80"]
    assert hashes(small) == hashes(alone)
    assert verify(small).ok


def test_overlapping_ranges_are_refused_and_disjoint_ones_are_not(small: Path) -> None:
    values = np.zeros((N, WIDTH), "f4")
    with ActivationWriter(small, model="rl@80", site="block2", width=WIDTH, shards=range(0, 5)):
        with pytest.raises(StoreLockedError, match="one writer at a time"):
            write_range(small, values, 4, 8)
        with pytest.raises(StoreLockedError, match="one writer at a time"):
            write(small, values)
        write_range(small, values, 5, 8)
    assert complete_models(small) == []


def test_an_unfinished_shard_is_invisible(small: Path) -> None:
    values = np.ones((N, WIDTH), "f4")
    with ActivationWriter(small, model="rl@80", site="block2", width=WIDTH) as writer:
        writer.append(values[: SHARD + 10])
    committed = zarr.open_array(small / "rl@80/block2/committed", mode="r")
    assert committed[:, 0].tolist() == [SHARD] + [0] * 15
    with pytest.raises(StoreError, match="no complete activations"):
        open_activations(small, models=["rl@80"], site="block2")
