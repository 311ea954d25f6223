"""What a second worker is worth: the outcomes of four models, in this process and on one and two worker processes."""

from __future__ import annotations

import os
import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of this process and of every worker: a core each
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pandas as pd
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from benchmarks.common import PROVENANCE, read_options, scratch, spread
from benchmarks.reports import Goal, report
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder
from rlgen_stats.toolkit.extraction import sample_outcomes
from rlgen_stats.toolkit.workers import local_workers, tasks_on

HERE: Final = "this process"
VOCABULARY: Final = 2048
GOAL: Final = 1.6


def study_spec(*, quick: bool) -> StudySpec:
    """Base and three checkpoints of one run, each in several parts."""
    return StudySpec.model_validate(
        {
            "name": "scaling",
            "device": "cpu",
            "base": {"path": "base"},
            "runs": [
                {"name": "sft", "arm": "sft", "method": "checkpoints", "checkpoints": {1: "m1"}},
                {"name": "rl", "arm": "rl", "method": "checkpoints", "checkpoints": {1: "m2", 2: "m3"}},
            ],
            "generation": {"max_new_tokens": 8 if quick else 64, "n_samples": 3, "batch_size": 4 if quick else 16},
            "crosscoders": [{"name": "main", "views": ["base@0", "sft@final", "rl@final"], "n_features": 64}],
        }
    )


def write_study(root: Path, *, quick: bool) -> None:
    """Models of random weights, and prompts of a few words."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    raw = Tokenizer(models.WordLevel(words, unk_token="w2"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w0", eos_token="w1", unk_token="w2")
    width = 64 if quick else 256
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        intermediate_size=3 * width,
        max_position_embeddings=256,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    for seed, name in enumerate(("base", "m1", "m2", "m3")):
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    n = 64 if quick else 96
    texts = [" ".join(f"w{3 + (7 * i + j) % 2000}" for j in range(8 + i % 8)) for i in range(n)]
    table = pd.DataFrame({"prompt_id": [f"p{i}" for i in range(n)], "text": texts, "task": "sum", "domain": "in"})
    table["answer"] = [str(i) for i in range(n)]
    (root / "data").mkdir()
    table.to_parquet(root / "data/prompts.parquet")


def files_of(folder: StudyFolder) -> dict[str, bytes]:
    """Path -> content of everything that the stage left."""
    places = (folder.outcomes, folder.completions)
    return {str(f.relative_to(folder.root)): f.read_bytes() for p in places for f in p.rglob("*") if f.is_file()}


def processor_seconds(client: Any) -> dict[str, float]:
    """Of this process (no name) and of every worker, so far."""
    return {"": time.process_time()} | ({} if client is None else client.run(time.process_time))


def timed(spec: StudySpec, folder: StudyFolder, client: Any) -> dict[str, float]:
    """One run: seconds by the clock, and the processor's on the longest path, this process's and the busiest worker's.

    The latter is what the clock shows on cores that nobody else uses, if this process and its workers never overlap.
    """
    for path in (folder.outcomes, folder.completions):
        shutil.rmtree(path, ignore_errors=True)
    before, start = processor_seconds(client), time.perf_counter()
    with tasks_on(client, folder.spec):
        sample_outcomes(spec, folder, provenance=PROVENANCE)
    clock, after = time.perf_counter() - start, processor_seconds(client)
    own, *workers = (after[name] - before[name] for name in before)
    return {"clock": clock, "path": own + max(workers, default=0.0)}


def main() -> None:
    """Measure and report."""
    options = read_options(__doc__)
    kind = "clock" if options.clock is time.perf_counter else "path"
    spec = study_spec(quick=options.quick)
    with scratch(options) as place, ExitStack() as stack:
        folder = StudyFolder(place / "study")
        write_study(folder.root, quick=options.quick)
        clients = {HERE: None} | {
            f"{n} worker{'s' * (n > 1)}": stack.enter_context(local_workers(",".join(["cpu"] * n))) for n in (1, 2)
        }
        seconds: dict[str, list[float]] = {name: [] for name in clients}
        expected: dict[str, bytes] = {}
        for repetition in range(options.repetitions + 1):
            for name, client in clients.items():
                taken = timed(spec, folder, client)[kind]
                expected = expected or files_of(folder)
                if files_of(folder) != expected:
                    raise SystemExit(f"{name} left other bytes than {HERE}; nothing is comparable.")
                if repetition:  # the first round warms up
                    seconds[name].append(taken)
        medians = {name: spread(values) for name, values in seconds.items()}
        here = medians[HERE]["median"]
        rows = [
            {"where": name, "seconds": s["median"], "low": s["low"], "high": s["high"], "speed": here / s["median"]}
            for name, s in medians.items()
        ]
        report(
            options,
            place,
            "Outcomes on workers",
            settings={"models": 4, "threads of a process": os.environ["OMP_NUM_THREADS"], "seconds of": kind},
            rows=rows,
            goals=[Goal("two workers against one process", here / medians["2 workers"]["median"], GOAL)],
        )


if __name__ == "__main__":
    main()
