"""Caches of every format as other tools write them, and a label table that fits."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

N, WIDTH = 1200, 6
PARTS = (500, 300, 400)
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FORMATS = ("safetensors", "npy", "pt", "memmap")


def tensor_of(dtype: str, n: int = N) -> torch.Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(7)).to(TORCH[dtype])


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def split(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [part.clone() for part in torch.split(tensor, list(PARTS))]


def write_cache(folder: Path, kind: str, tensor: torch.Tensor) -> Path:
    """The tensor in three files that only natural order puts right: part 2, 9 and 10."""
    folder.mkdir()
    for index, part in zip((2, 9, 10), split(tensor), strict=True):
        if kind == "safetensors":
            save_file({"hidden": part}, folder / f"part-{index}.safetensors", metadata={"by": "someone"})
        elif kind == "npy":
            np.save(folder / f"part-{index}.npy", part.numpy())
        elif kind == "pt":
            torch.save(part, folder / f"part-{index}.pt")
    if kind == "memmap":
        write_shards(folder, [*split(tensor)])
    return folder


def write_shards(folder: Path, parts: list[torch.Tensor], *, dtype: bool = True) -> None:
    """As ActivationCache of crosscoder_learning does, with the statistics it leaves beside the shards."""
    for index, part in enumerate(parts):
        values = (part.view(torch.int16) if part.dtype == torch.bfloat16 else part).numpy()
        (folder / f"shard_{index}.memmap").write_bytes(values.tobytes())
        meta = {"shape": list(part.shape)} | ({"dtype": str(part.dtype)} if dtype else {})
        (folder / f"shard_{index}.meta").write_text(json.dumps(meta))
    config = {"shard_count": len(parts), "shuffle_shards": False, "total_size": sum(map(len, parts))}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("mean.pt", "std.pt", "count.pt"):
        torch.save(torch.zeros(WIDTH), folder / name)


def label_table(n: int = N) -> pd.DataFrame:
    index = np.arange(n)
    prompt = index // 40
    return pd.DataFrame(
        {
            "prompt": [f"{i:03d}" for i in prompt],
            "position": index % 40,
            "token_id": index % 91,
            "segment": np.where(index % 40 < 8, "prompt", "completion"),
            "task": np.where(prompt % 2, "math", "sciq"),
            "domain": np.where(prompt % 2, "in", "out"),
            "split": np.where(prompt % 3, "selection", "verification"),
            "cluster": [f"c{i // 2}" for i in prompt],
            "source": np.where(prompt % 5, "base@0", "rl@200"),
        }
    )


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    path = tmp_path / "labels.parquet"
    label_table().to_parquet(path)
    return path
