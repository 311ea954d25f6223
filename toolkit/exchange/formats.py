"""Tensor files, one opener per format: the header is read and checked at once, values are mapped on request.

Headers are parsed here or by readers that run no code: a safetensors header is JSON, a ``.npy`` header a literal, and
``.pt`` archives are opened by torch with ``weights_only=True``. Anything that needs a pickle is refused.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.stores.shards import FLOATS, stored_dtype

READABLE: Final = (*FLOATS, "float64")
"""Types a cache may hold; float64 is read only where a cast is asked for."""
SHOWN_KEYS: Final = 20
"""Tensor names listed in a message."""

_SAFETENSORS: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_LENGTH_BYTES: Final = 8
"""A safetensors file starts with the length of its header, little endian."""
_NPY_MAGIC: Final = b"\x93NUMPY"
_NPY_HEADERS: Final = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@dataclass(frozen=True)
class TensorFile:
    """What the header of one file says, and how to map its values."""

    file: Path
    key: str | None
    """Name of the tensor inside the file; None where tensors have none."""
    dtype: str
    """``float32``, ``float16``, ``bfloat16`` or ``float64``."""
    shape: tuple[int, ...]
    """[n, width] or [batch, sequence, width]."""
    values: Callable[[], NDArray[Any]]
    """Maps the values in their shape; bfloat16 as its bits in uint16."""

    @property
    def n_rows(self) -> int:
        """Rows once batch and sequence are one axis."""
        return math.prod(self.shape[:-1])


def open_safetensors(file: Path, tensor: str | None) -> TensorFile:
    """A safetensors file, by its header.

    Raises
    ------
    InputError
        If the file is cut, its header is broken, or the tensor is absent, ambiguous or not of numbers.
    """
    header, start = _safetensors_header(file)
    tensors = {key: (_SAFETENSORS.get(kind, kind), shape) for key, (kind, shape, _) in header.items()}
    key = _choose(file, tensors, tensor)
    dtype, shape = _checked(file, *tensors[key])
    begin, end = header[key][2]
    expected = math.prod(shape) * stored_dtype(dtype).itemsize
    if end - begin != expected:
        raise _corrupt(
            file, f"tensor {key!r} of shape {shape} takes {expected} bytes, the header gives it {end - begin}"
        )
    return TensorFile(file, key, dtype, shape, partial(_mapped, file, dtype, shape, start + begin))


def _safetensors_header(file: Path) -> tuple[dict[str, tuple[str, tuple[int, ...], tuple[int, int]]], int]:
    """Tensor name -> (type, shape, offsets), and where the values start."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
            raise _truncated(file, size, _LENGTH_BYTES + length)
        text = handle.read(length)
    try:
        entries = json.loads(text)
        header = {key: _entry(value) for key, value in entries.items() if key != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _corrupt(file, f"its header is no safetensors header ({type(error).__name__})") from error
    start = _LENGTH_BYTES + length
    expected = start + max((offsets[1] for _, _, offsets in header.values()), default=0)
    if size != expected:
        raise _truncated(file, size, expected)
    return header, start


def _entry(value: dict[str, Any]) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    begin, end = _counts(value["data_offsets"])
    if begin > end:
        raise ValueError
    return str(value["dtype"]), _counts(value["shape"]), (begin, end)


def _counts(values: Any) -> tuple[int, ...]:
    """Non-negative integers of a JSON list."""
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError
    return tuple(values)


def open_npy(file: Path, tensor: str | None) -> TensorFile:
    """A ``.npy`` file, by its header.

    Raises
    ------
    InputError
        If the file holds Python objects, is cut, or is not a ``.npy`` file at all.
    """
    _refuse_key(file, tensor)
    size = file.stat().st_size
    with file.open("rb") as handle:
        if handle.read(len(_NPY_MAGIC)) != _NPY_MAGIC:
            raise _corrupt(file, "it does not start like a .npy file, and nothing else (a pickle, say) is opened")
        handle.seek(0)
        try:
            shape, _, dtype = _NPY_HEADERS[np.lib.format.read_magic(handle)](handle)
        except (ValueError, KeyError, EOFError) as error:
            raise _corrupt(file, "its header cannot be read") from error
        start = handle.tell()
    if dtype.hasobject:
        raise InputError(
            f"{file.name} holds pickled Python objects, which are never loaded; expected numbers: save a float32, "
            "float16 or bfloat16 tensor with numpy.save or as safetensors."
        )
    name, shape = _checked(file, dtype.name, shape)
    if size != start + math.prod(shape) * dtype.itemsize:
        raise _truncated(file, size, start + math.prod(shape) * dtype.itemsize)
    return TensorFile(file, None, name, shape, partial(np.load, file, mmap_mode="r", allow_pickle=False))


def open_torch(file: Path, tensor: str | None) -> TensorFile:
    """A ``.pt`` or ``.pth`` file with a tensor or a dictionary of tensors.

    Raises
    ------
    InputError
        If the file needs a pickle, is cut, or holds no tensor of that name.
    """
    loaded = _torch_tensors(file)
    if not isinstance(loaded, Mapping):
        _refuse_key(file, tensor)
        loaded, key = {"": loaded}, ""
    else:
        key = _choose(file, {name: _dtype_and_shape(value) for name, value in loaded.items()}, tensor)
    dtype, shape = _checked(file, *_dtype_and_shape(loaded[key]))
    if loaded[key].device.type != "cpu" or str(loaded[key].layout) != "torch.strided":
        raise InputError(f"{file.name} holds a tensor without plain values in memory; save it dense and on the CPU.")
    return TensorFile(file, key or None, dtype, shape, partial(_torch_values, file, key))


def _dtype_and_shape(tensor: Any) -> tuple[str, tuple[int, ...]]:
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def _torch_tensors(file: Path) -> Any:
    """The tensor of a file, or its tensors by name; their values are mapped."""
    import torch  # the only format that needs it; without it, import and export start a second earlier

    if not zipfile.is_zipfile(file):
        with file.open("rb") as handle:
            if handle.read(2) == b"PK":
                raise InputError(f"{file.name} is cut off (the end of the archive is missing); copy it again.")
        raise InputError(
            f"{file.name} is a bare pickle or an archive of an old release of torch, which are never loaded; expected "
            "what torch.save writes since 1.6: save the tensor again."
        )
    try:
        loaded = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    except UnpicklingError as error:
        raise InputError(
            f"{file.name} holds pickled objects besides tensors, which are never loaded; expected a tensor or a "
            "dictionary of tensors: save only that, or use safetensors."
        ) from error
    except OSError:
        raise
    except Exception as error:  # a broken archive can make the reader raise anything
        raise _corrupt(file, f"torch cannot read it ({type(error).__name__})") from error
    if isinstance(loaded, torch.Tensor):
        return loaded
    if not isinstance(loaded, Mapping):
        raise InputError(
            f"{file.name} holds a {type(loaded).__name__}, expected a tensor or a dictionary of tensors; save one."
        )
    return {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}


def _torch_values(file: Path, key: str) -> NDArray[Any]:
    import torch

    loaded = _torch_tensors(file)
    tensor: torch.Tensor = (loaded[key] if isinstance(loaded, Mapping) else loaded).detach()
    values: NDArray[Any] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return values


def open_memmap_shard(file: Path, tensor: str | None) -> TensorFile:
    """A ``shard_<i>.memmap`` of crosscoder_learning or dictionary_learning, by the ``.meta`` beside it.

    Raises
    ------
    InputError
        If the ``.meta`` is missing or broken, or the file has another size than it says.
    """
    _refuse_key(file, tensor)
    meta = file.with_suffix(".meta")
    if not meta.is_file():
        raise InputError(f"{file.name} lacks {meta.name}, which says its shape; copy the cache again with its metas.")
    try:
        entry = json.loads(meta.read_text(encoding="utf-8"))
        shape, kind = _counts(entry["shape"]), str(entry.get("dtype", "float32"))  # older caches are all float32
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _corrupt(meta, "expected JSON with a shape and perhaps a dtype") from error
    dtype, shape = _checked(file, kind.removeprefix("torch."), shape)
    size, expected = file.stat().st_size, math.prod(shape) * stored_dtype(dtype).itemsize
    if size != expected:
        raise _truncated(file, size, expected)
    return TensorFile(file, None, dtype, shape, partial(_mapped, file, dtype, shape, 0))


def _mapped(file: Path, dtype: str, shape: tuple[int, ...], offset: int) -> NDArray[Any]:
    return np.memmap(file, stored_dtype(dtype).newbyteorder("<"), mode="r", offset=offset, shape=shape)


def _choose(file: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], tensor: str | None) -> str:
    """The tensor called ``tensor``, or the only one that can be activations."""
    keys = ", ".join(list(tensors)[:SHOWN_KEYS]) + (", ..." if len(tensors) > SHOWN_KEYS else "")
    if tensor is not None:
        if tensor not in tensors:
            raise InputError(
                f"{file.name} has no tensor {tensor!r}; it has {keys or 'none'}: name one of them with tensor= "
                "(--tensor)."
            )
        return tensor
    if len(tensors) == 1:
        return next(iter(tensors))
    usable = [key for key, (dtype, shape) in tensors.items() if dtype in READABLE and len(shape) in (2, 3)]
    if len(usable) != 1:
        raise InputError(
            f"{file.name} holds {len(tensors)} tensors ({keys or 'none'}), {len(usable)} of which may be activations, "
            "expected one; name it with tensor= (--tensor)."
        )
    return usable[0]


def _checked(file: Path, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Type and shape, if activations can have them."""
    if dtype not in READABLE:
        raise InputError(f"{file.name} holds {dtype}, expected one of {', '.join(FLOATS)}; save it as one of them.")
    if len(shape) not in (2, 3) or not shape[-1]:
        raise InputError(
            f"{file.name} holds a tensor of shape {tuple(shape)}, expected [n, width] or [batch, sequence, width]; "
            "save it so, or name another with tensor= (--tensor)."
        )
    return dtype, tuple(shape)


def _refuse_key(file: Path, tensor: str | None) -> None:
    if tensor is not None:
        raise InputError(f"{file.name} holds one tensor without a name, got {tensor!r}; leave tensor= (--tensor) out.")


def _truncated(file: Path, size: int, expected: int) -> InputError:
    return InputError(
        f"{file.name} has {size} bytes, its header says {expected}; it is cut off or was changed: copy it again."
    )


def _corrupt(file: Path, reason: str) -> InputError:
    return InputError(f"{file.name} cannot be read: {reason}; restore it or save it again.")
