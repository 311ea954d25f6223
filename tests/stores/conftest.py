import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from rlgen_stats.stores import Provenance, create_activations

N_TOKENS, WIDTH = 20_000, 6


@pytest.fixture
def provenance() -> Provenance:
    return Provenance("study-one", "key-one")


def token_table(n: int = N_TOKENS) -> tuple[pd.DataFrame, pd.DataFrame]:
    index = np.arange(n)
    tokens = pd.DataFrame(
        {
            "prompt": [f"p{i // 50}" for i in index],
            "source": np.where(index % 100 < 50, "base@0", "rl@80"),
            "position": index % 50,
            "token_id": index % 17,
            "segment": np.where(index % 50 < 5, "prompt", "completion"),
        }
    )
    names = [f"p{i}" for i in range(-(-n // 50))]
    prompts = pd.DataFrame(
        {
            "prompt": names,
            "task": ["math" if i % 2 else "sciq" for i in range(len(names))],
            "domain": ["in" if i % 2 else "out" for i in range(len(names))],
            "split": ["selection" if i % 3 else "verification" for i in range(len(names))],
            "cluster": [f"c{i // 2}" for i in range(len(names))],
        }
    )
    return tokens, prompts


def activation_values(model: str) -> np.ndarray:
    return np.random.default_rng(len(model)).normal(size=(N_TOKENS, WIDTH)).astype(np.float32)


@pytest.fixture
def store(tmp_path: Path, provenance: Provenance) -> Path:
    path = tmp_path / "activations.zarr"
    create_activations(path, *token_table(), provenance=provenance)
    return path


def feature_table(model: str, value: float = 1.0, prompts: tuple[str, ...] = ("p0", "p1", "p2")) -> xr.Dataset:
    n, f = len(prompts), 5
    run, step = model.split("@")
    summary = {
        name: (("model", "prompt", "feature"), np.full((1, n, f), value, "f4")) for name in ("mean", "firing", "max")
    }
    return xr.Dataset(
        summary
        | {
            "n_tokens": (("model", "prompt"), np.ones((1, n), int)),
            "fve": ("model", [0.5]),
            "decoder_norm": (("view", "feature"), np.ones((2, f))),
        },
        coords={
            "model": [model],
            "run": ("model", [run]),
            "step": ("model", [int(step)]),
            "arm": ("model", [run]),
            "prompt": list(prompts),
            "view": ["base@0", "rl@80"],
        }
        | {name: ("prompt", [f"{name}{i}" for i in range(n)]) for name in ("task", "domain", "split", "cluster")},
        attrs={"readout": "swap", "text_mode": "forced", "crosscoder": "main", "scale": "contribution"},
    )


def hashes(store: Path) -> dict[str, str]:
    return {
        str(f.relative_to(store)): hashlib.sha256(f.read_bytes()).hexdigest() for f in store.rglob("*") if f.is_file()
    }
