"""Tokens a second of refilled batches against model.generate, and how often a batch changes a sampled token."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria

from benchmarks.common import REPETITIONS, spread
from benchmarks.reports import Goal, report
from rlgen_stats.toolkit.extraction import generate
from rlgen_stats.toolkit.extraction.batching import by_length, left_pad

STOP: Final = 0.1
"""Probability that a row ends at a token."""
LONGEST: Final = 48
EQUAL: Final = 16
"""Tokens of every row where all are equally long."""
BATCH: Final = 8
POSITIONS: Final = 30
"""Consecutive tokens over which it is said how often one differs."""
GOALS: Final = {"varied": 1.5, "equal": 0.95}


def passages(tokenizer: Any, n: int, shortest: int, longest: int) -> list[list[int]]:
    """Beginnings of paragraphs of Python's documentation, of different numbers of tokens."""
    paragraphs = [p for text in topics.values() for p in text.split("\n\n") if len(p.split()) > longest]
    draw = np.random.default_rng(0)
    chosen = draw.choice(len(paragraphs), n, replace=False)
    return [tokenizer(paragraphs[i])["input_ids"][: int(draw.integers(shortest, longest + 1))] for i in chosen]


# -- tokens a second -------------------------------------------------------------------------------------------------
class Lengths(StoppingCriteria):  # type: ignore[misc]
    """Ends every row at a length of its own."""

    def __init__(self, limits: Sequence[int], prompt_length: int) -> None:
        self.limits, self.prompt_length = torch.tensor(limits), prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **how: Any) -> torch.Tensor:
        return self.limits.to(input_ids.device) <= input_ids.shape[1] - self.prompt_length


@dataclass
class Work:
    """Prompts and how many tokens follow each."""

    model: Any
    tokenizer: Any
    prompts: list[list[int]]
    limits: list[int]
    sampled: bool

    def ours(self) -> None:
        """Refilled batches."""
        written = generate(
            self.model,
            self.tokenizer,
            self.prompts,
            max_new_tokens=self.limits,
            greedy=not self.sampled,
            seeds=range(len(self.prompts)),
            batch_size=BATCH,
        )
        if [len(row.token_ids) for row in written] != self.limits:
            raise SystemExit("a row ended by itself; nothing is comparable.")

    def theirs(self) -> None:
        """``model.generate`` of one static batch after the other, prompts of similar length together."""
        for rows in by_length([len(ids) for ids in self.prompts], BATCH):
            ids, mask, _ = left_pad([self.prompts[row] for row in rows], 0, self.model.device)
            limits = [self.limits[row] for row in rows]
            self.model.generate(
                ids,
                attention_mask=mask,
                do_sample=self.sampled,
                top_k=0,
                max_new_tokens=max(limits),
                stopping_criteria=[Lengths(limits, ids.shape[1])],
                pad_token_id=0,
            )


def cpu_seconds(cases: dict[str, Callable[[], None]], repetitions: int) -> dict[str, list[float]]:
    """CPU seconds of every case, A B A B ...; the first round warms up and is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repetition in range(repetitions + 1):
        for name, run in cases.items():
            start = time.process_time()
            run()
            if repetition:
                seconds[name].append(time.process_time() - start)
    return seconds


# -- how often a batch changes a token -------------------------------------------------------------------------------
def differing_by_inverse_cdf(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """P(token of p is not that of q) where both take the one in whose share of [0, 1) the same uniform number lies."""
    high, other_high = p.cumsum(), q.cumsum()
    common = np.minimum(high, other_high) - np.maximum(high - p, other_high - q)
    return float(np.clip(1.0 - np.clip(common, 0.0, None).sum(), 0.0, 1.0))


def differing_by_gumbel_max(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """P(token of p is not that of q) with the same Gumbel numbers: both are i with 1 / sum_j max(p_j/p_i, q_j/q_i)."""
    kept = (p > 0) & (q > 0)
    p, q = p[kept], q[kept]
    order = np.argsort(q / p)
    p, q = p[order], q[order]
    same = 1.0 / (p.cumsum() / p + (q.sum() - q.cumsum()) / q)
    return float(np.clip(1.0 - same.sum(), 0.0, 1.0))


@torch.inference_mode()
def changed_tokens(model: Any, texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """P(at least one of ``POSITIONS`` sampled tokens differs) between a row alone and in a padded batch."""
    ids, mask, positions = left_pad(texts, 0, model.device)
    together = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    unchanged: dict[str, list[float]] = {"inverse CDF": [], "Gumbel-max": []}
    for row, text in enumerate(texts):
        alone = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -POSITIONS:]
        pairs = [torch.softmax(x.double(), -1).numpy() for x in (alone, together[row, -POSITIONS:])]
        for name, differing in (("inverse CDF", differing_by_inverse_cdf), ("Gumbel-max", differing_by_gumbel_max)):
            unchanged[name].append(float(np.prod([1.0 - differing(p, q) for p, q in zip(*pairs, strict=True)])))
    return {name: 1.0 - float(np.mean(values)) for name, values in unchanged.items()}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of a Hugging Face causal language model")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--quick", action="store_true", help="few rows, once: checks the script, measures nothing")
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args()
    options.repetitions = 1 if options.quick else options.repetitions
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, trust_remote_code=False)
    model.eval().requires_grad_(False)
    model.generation_config.eos_token_id = tokenizer.eos_token = None  # rows end where the benchmark says
    n = 2 * BATCH if options.quick else 6 * BATCH
    varied = np.minimum(np.random.default_rng(1).geometric(STOP, n), LONGEST).tolist()
    rows, goals = [], []
    for lengths, limits in (("varied", varied), ("equal", [EQUAL] * (2 * BATCH))):
        prompts = passages(tokenizer, len(limits), 8, 24)
        for sampled in (False, True):
            work = Work(model, tokenizer, prompts, limits, sampled)
            seconds = cpu_seconds({"refilled batches": work.ours, "model.generate": work.theirs}, options.repetitions)
            times = {name: spread(values) for name, values in seconds.items()}
            how = f"{lengths} lengths, {'sampled' if sampled else 'greedy'}"
            ratio = times["model.generate"]["median"] / times["refilled batches"]["median"]
            rows += [
                {
                    "what": f"{how}: {name}",
                    "tokens/CPU-s": sum(limits) / one["median"],
                    "low": sum(limits) / one["high"],
                    "high": sum(limits) / one["low"],
                }
                for name, one in times.items()
            ]
            goals.append(Goal(f"tokens/s, {how}, of model.generate", ratio, GOALS[lengths]))
    texts = passages(tokenizer, 4 if options.quick else 24, POSITIONS, 60)
    for kind in (torch.float32, torch.bfloat16):
        changed = changed_tokens(model.to(kind), texts)
        rows.append({"what": f"P(one of {POSITIONS} tokens differs in a batch), {kind}", **changed})
    with tempfile.TemporaryDirectory() as folder:
        report(
            options,
            Path(folder),
            "Refilled batches",
            settings={"model": Path(options.model).name, "rows": n, "batch": BATCH, "stop": STOP, "threads": 1},
            rows=rows,
            goals=goals,
        )


if __name__ == "__main__":
    main()
