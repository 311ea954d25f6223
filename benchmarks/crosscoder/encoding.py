"""How many tokens a second one model's stored activations are encoded at, against the bare encoder product."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import xarray as xr

from benchmarks.common import PROVENANCE, SITE, Case, Texts, interleaved, options_with_device, spread
from benchmarks.crosscoder.data import Size, planted, size_of, synchronised
from benchmarks.reports import Goal, report
from rlgen_stats.schemas.dims import PROMPT
from rlgen_stats.stores import ActivationWriter, create_activations
from rlgen_stats.toolkit.crosscoder import Crosscoder, summarise_prompts
from rlgen_stats.toolkit.crosscoder.data.paired import ArrayReader, measure_views

OURS: Final = "this package: from the store to summaries per prompt, with FVE"
BARE: Final = "the bare encoder product"
MODEL: Final = "run1@1"


def trained(size: Size, data: np.ndarray, device: torch.device) -> Crosscoder:
    """A crosscoder at its start, with the threshold that lets k features a token pass under ``swap``."""
    views = ["base@0", *(f"run{i}@1" for i in range(1, size.views))]
    crosscoder = Crosscoder(views, width=size.width, n_features=size.n_features, sparsity="batchtopk", k=size.k, seed=1)
    crosscoder.fit_normalisation(measure_views(ArrayReader(data, batch_size=size.batch, seed=0)))
    crosscoder.requires_grad_(False)
    own = torch.from_numpy(data[:256, 1])
    with torch.no_grad():
        x = crosscoder.normalise(crosscoder.join([own] * size.views))
        contribution = (crosscoder.pre_activation(x) * crosscoder.selection_norm()).numpy().ravel()
    place = len(contribution) - size.k * len(own)
    crosscoder.threshold.fill_(float(np.partition(contribution, place)[place]))
    return crosscoder.to(device)


def store(folder: Path, size: Size, data: np.ndarray) -> int:
    """Write one model's activations; tokens."""
    texts = Texts(prompts=len(data) // 256, sources=1)
    create_activations(folder, next(texts.token_tables(10**6)), texts.prompt_table(), provenance=PROVENANCE)
    with ActivationWriter(folder, model=MODEL, site=SITE, width=size.width, dtype="bfloat16") as writer:
        writer.append(data[: texts.n_tokens, 1])
    return texts.n_tokens


def main() -> None:
    """Measure and report."""
    options, device = options_with_device(__doc__)
    size = size_of(options, device)
    data = planted(size, n_batches=32 if size.full and device.type == "cpu" else 8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "activations.zarr"
        n_tokens = store(path, size, data)
        crosscoder = trained(size, data, device)
        mask = np.ones(n_tokens, dtype=bool)
        found: list[xr.Dataset] = []

        def ours() -> None:
            found[:] = [summarise_prompts(crosscoder, path, SITE, mask, model=MODEL, readout="swap")]

        weight = torch.randn(size.width, size.n_features, device=device)
        raw = torch.from_numpy(data[:n_tokens, 1]).to(device)
        target = torch.empty(min(8192, n_tokens), size.n_features, device=device)

        def bare() -> None:
            for part in torch.split(raw, len(target)):
                torch.mm(part, weight, out=target[: len(part)])

        cases = [Case(OURS, synchronised(ours, device)), Case(BARE, synchronised(bare, device))]
        seconds = {name: spread(times) for name, times in interleaved(cases, options.repetitions).items()}
        rows: list[dict[str, Any]] = [
            {
                "what": name, "tokens/s": n_tokens / times["median"], "low": n_tokens / times["high"],
                "high": n_tokens / times["low"], "of bare": seconds[BARE]["median"] / times["median"],
            }
            for name, times in seconds.items()
        ]  # fmt: skip
        fires = float(found[0]["firing"].mean(PROMPT).sum())
        report(
            options, Path(folder), "Encoding stored activations",
            settings=size.settings(device) | {"tokens": n_tokens, "L0": round(fires, 1)}, rows=rows,
            goals=[Goal("tokens/s against the bare encoder product", rows[0]["of bare"], 0.7)],
        )  # fmt: skip


if __name__ == "__main__":
    main()
