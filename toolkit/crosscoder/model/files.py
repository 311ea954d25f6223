"""Tensors in files: safetensors only, written atomically, never pickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlgen_stats.schemas.errors import StoreCorruptError
from rlgen_stats.stores import replacing


def write_tensors(file: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and JSON facts in one file, atomically."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(file) as temporary:
        save_file(plain, temporary, {"facts": json.dumps(facts, sort_keys=True)})


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inverse of :func:`write_tensors`.

    Raises
    ------
    StoreCorruptError
        If the file is no safetensors file of this toolkit.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
            return tensors, dict(json.loads((handle.metadata() or {})["facts"]))
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise StoreCorruptError(f"{file} is no tensor file of this toolkit ({error}); compute it again.") from error
