"""Caches of every format read back exactly; broken, mixed and pickled ones are refused in one sentence."""

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.exchange import open_cache
from tests.exchange.conftest import FORMATS, PARTS, WIDTH, N, bits_of, split, tensor_of, write_cache, write_shards

CASES = [
    (kind, dtype)
    for kind in FORMATS
    for dtype in ("float32", "float16", "bfloat16")
    if (kind, dtype) != ("npy", "bfloat16")
]


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_every_format_and_type_comes_back_bit_for_bit_in_natural_order(tmp_path: Path, kind: str, dtype: str) -> None:
    tensor = tensor_of(dtype)
    cache = open_cache(write_cache(tmp_path / "cache", kind, tensor))
    assert (cache.format, cache.dtype, cache.width, cache.n_tokens) == (kind, dtype, WIDTH, N)
    assert [part.n_rows for part in cache.parts] == list(PARTS)
    blocks = list(cache.blocks(max_rows=128))
    assert max(map(len, blocks)) == 128
    read = np.concatenate(blocks)
    assert read.dtype == bits_of(tensor).dtype
    np.testing.assert_array_equal(read, bits_of(tensor))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("start", [0, 1, 499, 500, 799, 800, 1199, 1200])
def test_reading_starts_anywhere(tmp_path: Path, kind: str, start: int) -> None:
    tensor = tensor_of("float32")
    cache = open_cache(write_cache(tmp_path / "cache", kind, tensor))
    read = np.concatenate([*cache.blocks(start, 77), np.empty((0, WIDTH), np.float32)])
    np.testing.assert_array_equal(read, tensor.numpy()[start:])


def test_files_before_the_start_are_not_opened(tmp_path: Path) -> None:
    cache = open_cache(write_cache(tmp_path / "cache", "safetensors", tensor_of("float32")))
    cache.files[0].unlink()
    assert sum(map(len, cache.blocks(500))) == 700


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("start", [0, 3, 10, 11, 59])
def test_batches_of_sequences_are_flattened(tmp_path: Path, kind: str, start: int) -> None:
    tensor = torch.arange(4 * 15 * 5, dtype=torch.float32).reshape(4, 15, 5)
    folder = tmp_path / "cache"
    folder.mkdir()
    if kind == "safetensors":
        save_file({"x": tensor}, folder / "a.safetensors")
    elif kind == "npy":
        np.save(folder / "a.npy", np.asfortranarray(tensor.numpy()))
    elif kind == "pt":
        torch.save(tensor.transpose(0, 1).contiguous().transpose(0, 1), folder / "a.pt")  # not contiguous
    else:
        write_shards(folder, [tensor])
    cache = open_cache(folder)
    assert (cache.n_tokens, cache.width) == (60, 5)
    read = np.concatenate(list(cache.blocks(start, max_rows=7)))
    np.testing.assert_array_equal(read, tensor.reshape(60, 5).numpy()[start:])


def test_one_file_is_a_cache(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((3, 2), ">f4"))
    (tmp_path / "b.npy").write_bytes(b"other")
    block = next(open_cache(tmp_path / "a.npy").blocks())
    assert block.dtype == np.float32
    assert block.dtype.isnative
    np.testing.assert_array_equal(block, np.ones((3, 2)))


def test_old_memmap_shards_without_a_type_are_float32(tmp_path: Path) -> None:
    tensor = tensor_of("float32")
    write_shards(tmp_path, split(tensor), dtype=False)
    cache = open_cache(tmp_path)
    assert cache.dtype == "float32"
    np.testing.assert_array_equal(np.concatenate(list(cache.blocks())), tensor.numpy())


def test_the_tensor_is_found_or_named(tmp_path: Path) -> None:
    states, other = torch.ones(2, 3, WIDTH), torch.zeros(6, WIDTH)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    for name, write in (("a.pt", torch.save), ("a.safetensors", save_file)):
        file = tmp_path / name
        write({"states": states, "input_ids": ids}, file)  # as dictionary_learning does
        assert open_cache(file).parts[0].key == "states"
        write({"states": states, "other": other, "input_ids": ids}, file)
        with pytest.raises(InputError, match=r"holds 3 tensors \(.*\), 2 of which may be .* name it with tensor="):
            open_cache(file)
        assert next(open_cache(file, tensor="other").blocks()).sum() == 0
        with pytest.raises(InputError, match=r"has no tensor 'x'; it has (\w+, ){2}\w+: name one of them with tensor="):
            open_cache(file, tensor="x")


@pytest.mark.parametrize("want", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("have", ["float32", "float16", "bfloat16", "float64"])
def test_casts_are_those_of_torch(tmp_path: Path, have: str, want: str) -> None:
    tensor = tensor_of("float32").to(getattr(torch, have))
    tensor[0, 0], tensor[0, 1] = float("inf"), float("nan")
    save_file({"x": tensor}, tmp_path / "a.safetensors")
    cache = open_cache(tmp_path, dtype=want)
    read = np.concatenate(list(cache.blocks()))
    expected = bits_of(tensor.to(getattr(torch, want)))
    assert cache.dtype == want
    assert read.dtype == expected.dtype
    np.testing.assert_array_equal(read[1:], expected[1:])
    np.testing.assert_array_equal(read[0, [0, 2, 3]], expected[0, [0, 2, 3]])


# -- nothing pickled is loaded --------------------------------------------------------------------------------------


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.witness),)


def _pt(file: Path, payload: Payload) -> None:
    torch.save({"states": torch.ones(3, 2), "extra": payload}, file)


def _bare_pickle(file: Path, payload: Payload) -> None:
    file.write_bytes(pickle.dumps(payload))


def _legacy(file: Path, payload: Payload) -> None:
    torch.save([torch.ones(3, 2), payload], file, _use_new_zipfile_serialization=False)


def _objects(file: Path, payload: Payload) -> None:
    np.save(file, np.array([[payload]], dtype=object), allow_pickle=True)


MALICIOUS = [
    (_pt, "a.pt", "a.pt holds pickled objects besides tensors, which are never loaded; expected a tensor"),
    (_bare_pickle, "a.pt", "a.pt is a bare pickle or an archive of an old release of torch"),
    (_bare_pickle, "a.pth", "a.pth is a bare pickle"),
    (_legacy, "a.pt", "a.pt is a bare pickle or an archive of an old release of torch"),
    (_objects, "a.npy", "a.npy holds pickled Python objects, which are never loaded"),
    (_bare_pickle, "a.npy", r"a.npy cannot be read: it does not start like a \.npy file"),
    (_bare_pickle, "a.safetensors", "a.safetensors has .* it is cut off or was changed"),
]


@pytest.mark.parametrize(("write", "name", "message"), MALICIOUS)
def test_pickles_are_refused_and_not_run(
    tmp_path: Path, write: Callable[[Path, Payload], None], name: str, message: str
) -> None:
    witness = tmp_path / "witness"
    write(tmp_path / name, Payload(witness))
    with pytest.raises(InputError, match=message):
        open_cache(tmp_path)
    assert not witness.exists()


def test_the_payload_would_run() -> None:
    """The test above would notice: the same bytes do run when they are unpickled."""
    with pytest.raises(FileExistsError):
        pickle.loads(pickle.dumps(Payload(Path(__file__).parent)))  # noqa: S301 - our own bytes


# -- everything else that is wrong ----------------------------------------------------------------------------------


def _npy(folder: Path, *arrays: np.ndarray) -> None:
    for index, array in enumerate(arrays):
        np.save(folder / f"{index}.npy", array)


def _shards(folder: Path) -> None:
    write_shards(folder, split(tensor_of("float32")))


def _change(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


def _cut(folder: Path, kind: str, name: str, keep: int) -> None:
    write_cache(folder / "c", kind, tensor_of("float32"))
    _change(folder / "c" / name, lambda raw: raw[:keep])


def _safetensors(folder: Path, entry: object, values: bytes = b"\0" * 24) -> None:
    text = json.dumps({"x": entry}).encode()
    (folder / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + values)


def _zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "a.pt", "w") as archive:
        archive.writestr("hello.txt", "no tensor")


ONES = np.ones((3, 2), np.float32)
F32 = {"dtype": "F32", "shape": [3, 2]}
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty folder": (lambda f: None, r"holds no tensor files; expected \*\.safetensors, .* directly in it"),
    "other files": (lambda f: (f / "a.txt").write_text("x"), "holds no tensor files"),
    "hidden file": (lambda f: (f / "._a.npy").write_text("x"), "holds no tensor files"),
    "mixed formats": (
        lambda f: (_npy(f, ONES), torch.save(torch.ones(2, 2), f / "a.pt")),
        r"mixes formats, 0\.npy and a\.pt; expected one",
    ),
    "memmap and others": (lambda f: (_shards(f), _npy(f, ONES)), "mixes formats, 0.npy and shard_0.memmap"),
    "mixed width": (lambda f: _npy(f, ONES, ONES[:, :1]), r"1\.npy has width 1, expected 2 as in 0\.npy"),
    "mixed type": (lambda f: _npy(f, ONES, ONES.astype("f2")), r"1\.npy has type float16, expected float32 as in 0\.n"),
    "mixed names": (
        lambda f: [save_file({k: torch.ones(2, 2)}, f / f"{k}.safetensors") for k in "ab"],
        r"b\.safetensors has tensor b, expected a as in a\.safetensors; name one that all files have with tensor=",
    ),
    "float64": (
        lambda f: _npy(f, ONES.astype("f8")),
        r"0\.npy holds float64, expected one of float32, .*; ask for a cast with dtype='float32'",
    ),
    "integers": (lambda f: _npy(f, ONES.astype("i4")), r"0\.npy holds int32, expected one of float32, float16, bf"),
    "complex pt": (lambda f: torch.save(torch.ones(2, 2, dtype=torch.complex64), f / "a.pt"), "a.pt holds complex64"),
    "sparse pt": (lambda f: torch.save(torch.ones(2, 2).to_sparse(), f / "a.pt"), "a tensor without plain values"),
    "one axis": (lambda f: _npy(f, ONES[0]), r"0\.npy holds a tensor of shape \(2,\), expected \[n, width\] or \[bat"),
    "four axes": (lambda f: _npy(f, np.ones((1, 1, 1, 1), "f4")), r"shape \(1, 1, 1, 1\), expected"),
    "no width": (lambda f: _npy(f, np.ones((3, 0), "f4")), r"shape \(3, 0\), expected"),
    "not a tensor": (lambda f: torch.save([torch.ones(2, 2)], f / "a.pt"), "a.pt holds a list, expected a tensor or"),
    "no tensors": (lambda f: torch.save({"a": 1}, f / "a.pt"), r"holds 0 tensors \(none\), 0 of which"),
    "zip without tensors": (_zip, "a.pt cannot be read: torch cannot read it"),
    "cut npy": (lambda f: _cut(f, "npy", "part-9.npy", 300), r"part-9\.npy has 300 bytes, its header says 7328; it is"),
    "cut npy header": (lambda f: _cut(f, "npy", "part-9.npy", 50), r"part-9\.npy cannot be read: its header"),
    "cut safetensors": (lambda f: _cut(f, "safetensors", "part-9.safetensors", 300), r"9\.safetensors has 300 bytes"),
    "cut safetensors header": (lambda f: _cut(f, "safetensors", "part-9.safetensors", 20), "has 20 bytes, its header"),
    "empty safetensors": (lambda f: _cut(f, "safetensors", "part-9.safetensors", 0), "has 0 bytes, its header"),
    "cut pt": (lambda f: _cut(f, "pt", "part-9.pt", 5000), r"part-9\.pt is cut off"),
    "cut memmap": (lambda f: _cut(f, "memmap", "shard_1.memmap", 300), r"shard_1\.memmap has 300 bytes, its header sa"),
    "long npy": (
        lambda f: (_npy(f, ONES), _change(f / "0.npy", lambda raw: raw + b"x")),
        "0.npy has 153 bytes, its header says 152",
    ),
    "safetensors not JSON": (
        lambda f: (f / "a.safetensors").write_bytes(struct.pack("<Q", 4) + b"\xff{}x"),
        "a.safetensors cannot be read: its header is no safetensors header",
    ),
    "safetensors list": (
        lambda f: (f / "a.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]"),
        "a.safetensors cannot be read: its header is no safetensors header",
    ),
    "negative offset": (lambda f: _safetensors(f, F32 | {"data_offsets": [-8, 16]}), "is no safetensors header"),
    "crossed offsets": (lambda f: _safetensors(f, F32 | {"data_offsets": [24, 0]}), "is no safetensors header"),
    "shape of text": (lambda f: _safetensors(f, F32 | {"shape": ["3"], "data_offsets": [0, 24]}), "no safetensors hea"),
    "no offsets": (lambda f: _safetensors(f, F32), "is no safetensors header"),
    "offsets and shape differ": (
        lambda f: _safetensors(f, {"dtype": "F32", "shape": [9, 2], "data_offsets": [0, 24]}),
        r"tensor 'x' of shape \(9, 2\) takes 72 bytes, the header gives it 24",
    ),
    "safetensors of integers": (
        lambda f: _safetensors(f, {"dtype": "I32", "shape": [3, 2], "data_offsets": [0, 24]}),
        "a.safetensors holds I32, expected one of float32",
    ),
    "missing meta": (lambda f: (_shards(f), (f / "shard_1.meta").unlink()), r"shard_1\.memmap lacks shard_1\.meta"),
    "meta not JSON": (lambda f: (_shards(f), (f / "shard_1.meta").write_text("x")), r"shard_1\.meta cannot be read: e"),
    "meta without shape": (lambda f: (_shards(f), (f / "shard_1.meta").write_text("{}")), r"shard_1\.meta cannot be r"),
    "missing shard": (lambda f: (_shards(f), (f / "shard_1.memmap").unlink()), r"lacks shard_1\.memmap though it has"),
    "missing last shard": (
        lambda f: (_shards(f), (f / "shard_2.memmap").unlink()),
        "has 2 shards, its config.json say",
    ),
    "config not JSON": (lambda f: (_shards(f), (f / "config.json").write_text("x")), r"config\.json cannot be read"),
    "shuffled shards": (
        lambda f: (_shards(f), (f / "config.json").write_text('{"shuffle_shards": true}')),
        "was written with shuffle_shards, so its rows are in no known order",
    ),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_caches_are_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    make, message = WRONG[name]
    make(tmp_path)
    folder = tmp_path / "c" if (tmp_path / "c").exists() else tmp_path
    with pytest.raises(InputError, match=message):
        open_cache(folder)


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere does not exist; expected a folder of tensor files"):
        open_cache(tmp_path / "nowhere")
    with pytest.raises(InputError, match="caches are mapped from local files, got memory://x"):
        open_cache("memory://x")
    np.save(tmp_path / "0.npy", ONES)
    with pytest.raises(InputError, match="activations are stored as float32, float16, bfloat16, got 'int8'"):
        open_cache(tmp_path, dtype="int8")
    with pytest.raises(InputError, match=r"0\.npy holds one tensor without a name, got 'x'; leave tensor="):
        open_cache(tmp_path, tensor="x")
    with pytest.raises(InputError, match=r"blocks start at a row from 0 to 3 .*, got start=4 and max_rows=1"):
        list(open_cache(tmp_path).blocks(4, 1))
    with pytest.raises(InputError, match="got start=0 and max_rows=0"):
        list(open_cache(tmp_path).blocks(0, 0))
