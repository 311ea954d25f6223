"""Peak memory of extracting activations from texts of 128, 1k and 8k tokens, in small and large batches.

One reading of a tiny model with a wide residual stream, so that activations dominate. Every measurement runs in a fresh
process, has as many tokens as the others, and counts from when the model is loaded.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import PROVENANCE, Memory, in_fresh_process, read_options, scratch
from reports import Goal, report

LENGTHS: Final = (128, 1024, 8192)
BATCHES: Final = (8, 64)
"""Texts per forward pass, as asked for."""
DTYPES: Final = ("float32", "bfloat16")
TOKENS: Final = {False: 1 << 17, True: 1 << 14}
WIDTH: Final = {False: 2048, True: 64}
BOUND: Final = 4.0
"""Peak in windows, at most."""
FLAT: Final = 1.05
"""Peak of the longest texts over that of texts an eighth as long, in the larger batches, at most."""


def measure(folder: Path, *, dtype: Any, batch: int, length: int, n_tokens: int, width: int) -> dict[str, float]:
    """Read all texts with one model; what it took, and how large a window is."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlgen_stats.schemas.study import ExtractionSpec
    from rlgen_stats.stores import create_activations
    from rlgen_stats.stores.study_models import ModelRef
    from rlgen_stats.toolkit.extraction import activations
    from rlgen_stats.toolkit.progress import SILENT

    config = LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=max(LENGTHS),
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    ids = np.random.default_rng(0).integers(0, 64, (n_tokens // length, length)).tolist()
    texts = [activations.Text(f"p{i}", "base@0", tuple(row[:16]), tuple(row[16:])) for i, row in enumerate(ids)]
    table = activations.token_table(texts)
    labels = table[["prompt"]].drop_duplicates().assign(task="t", domain="in", split="selection")
    labels["cluster"] = labels["prompt"]
    create_activations(folder / "activations.zarr", table, labels, provenance=PROVENANCE)
    ref = ModelRef(model="base@0", run="base", step=0, arm="base", path=folder / "model")
    model = activations.load_model(ref, device=torch.device("cpu"))
    activations.load_model = lambda *_, **__: model  # type: ignore[assignment]
    reader = activations._Reader(
        stores=[activations.LayerStore(0, folder / "activations.zarr", PROVENANCE)],
        extraction=ExtractionSpec(layer=0, dtype=dtype, batch_size=batch),
        device=torch.device("cpu"),
        repeat_seed=0,
        texts=texts,
        pad=0,
    )
    with Memory() as memory:
        reader.read(ref, "base@0", SILENT)
    return memory.found | {"window": activations.WINDOW_BYTES / 2**20}


def main() -> None:
    options = read_options(__doc__ or "")
    if options.child:
        task = json.loads(options.child)
        with tempfile.TemporaryDirectory(dir=task.pop("parent")) as place:
            print(json.dumps(measure(Path(place), **task)))
        return
    found: dict[tuple[str, int, int], list[dict[str, float]]] = {}
    with scratch(options) as folder:
        cases = [(dtype, batch, length) for dtype in DTYPES for batch in BATCHES for length in LENGTHS]
        for _ in range(options.repetitions):
            for case in cases:
                dtype, batch, length = case
                taken = in_fresh_process(
                    __file__, parent=folder, dtype=dtype, batch=batch, length=length,
                    n_tokens=TOKENS[options.quick], width=WIDTH[options.quick],
                )  # fmt: skip
                found.setdefault(case, []).append(taken)
        rows = [
            {"stored as": dtype, "batch": batch, "tokens a text": length}
            | {"s": statistics.median(one["seconds"] for one in taken)}
            | {"peak MB above the model": statistics.median(one["rss_above_imports"] for one in taken)}
            | {"of a window": statistics.median(one["rss_above_imports"] / one["window"] for one in taken)}
            for (dtype, batch, length), taken in found.items()
        ]
        goals = []
        for dtype in DTYPES:
            peaks = [row["of a window"] for row in rows if row["stored as"] == dtype]
            goals.append(Goal(f"{dtype}, largest peak in windows", max(peaks), BOUND, at_least=False))
            goals.append(
                Goal(f"{dtype}, peak of 8k tokens over that of 1k", peaks[-1] / peaks[-2], FLAT, at_least=False)
            )
        settings = {"width": WIDTH[options.quick], "tokens": TOKENS[options.quick]}
        report(options, folder, "extraction", settings=settings, rows=rows, goals=goals)


if __name__ == "__main__":
    main()
