"""What a second worker is worth: the outcomes of four models, in this process and on one and two worker processes."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of this process and of every worker: a core each
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pandas as pd
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from benchmarks.common import PROVENANCE, Case, interleaved, read_options, scratch, spread
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
    n = 64 if quick else 256
    texts = [" ".join(f"w{3 + (7 * i + j) % 2000}" for j in range(8 + i % 8)) for i in range(n)]
    table = pd.DataFrame(
        {"prompt_id": [f"p{i}" for i in range(n)], "text": texts, "answer": [f"w{i}" for i in range(n)]}
    )
    (root / "data").mkdir()
    table.to_parquet(root / "data/prompts.parquet")


def files_of(folder: StudyFolder) -> dict[str, bytes]:
    """Path -> content of everything that the stage left."""
    places = (folder.outcomes, folder.completions)
    return {str(f.relative_to(folder.root)): f.read_bytes() for p in places for f in p.rglob("*") if f.is_file()}


def main() -> None:
    """Measure and report."""
    options = read_options(__doc__)
    spec = study_spec(quick=options.quick)
    with scratch(options) as place, ExitStack() as stack:
        write_study(place / "study", quick=options.quick)
        left: dict[str, dict[str, bytes]] = {}

        def case(name: str, client: Any) -> Case:
            folder = StudyFolder(place / "study")

            def fresh() -> None:
                for path in (folder.outcomes, folder.completions):
                    shutil.rmtree(path, ignore_errors=True)

            def run(_: None) -> None:
                with tasks_on(client, folder.spec):
                    sample_outcomes(spec, folder, provenance=PROVENANCE)
                left[name] = files_of(folder)

            return Case(name, run, fresh)

        clients = {
            f"{n} worker{'s' * (n > 1)}": stack.enter_context(local_workers(",".join(["cpu"] * n))) for n in (1, 2)
        }
        measured = interleaved(
            [case(name, client) for name, client in {HERE: None, **clients}.items()], options.repetitions
        )
        if any(files != left[HERE] for files in left.values()):
            raise SystemExit("workers left other bytes than one process; nothing is comparable.")
        seconds = {name: spread(values) for name, values in measured.items()}
        one = seconds["1 worker"]["median"]
        rows = [
            {
                "where": name,
                "seconds": s["median"],
                "low": s["low"],
                "high": s["high"],
                "of 1 worker": one / s["median"],
            }
            for name, s in seconds.items()
        ]
        report(
            options,
            place,
            "Outcomes on workers",
            settings={"models": 4, "threads of a process": os.environ["OMP_NUM_THREADS"]},
            rows=rows,
            goals=[
                Goal("two workers against one process", seconds[HERE]["median"] / seconds["2 workers"]["median"], GOAL)
            ],
        )


if __name__ == "__main__":
    main()
