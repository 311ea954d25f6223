"""How many tokens a second a BatchTopK crosscoder trains on, against plain PyTorch and against its matrix products.

With ``--crosscoder-learning`` also against that repository's own trainer.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from benchmarks.common import Case, interleaved, options_with_device, spread
from benchmarks.crosscoder.data import Size, planted, size_of, synchronised
from benchmarks.crosscoder.peers import PlainCrosscoder, PlainTrainer, crosscoder_learning
from benchmarks.reports import Goal, report
from rlgen_stats.schemas.study import CrosscoderSpec
from rlgen_stats.toolkit.crosscoder import ArrayReader
from rlgen_stats.toolkit.crosscoder.data.paired import endless, joined, measure_views
from rlgen_stats.toolkit.crosscoder.model import sparse
from rlgen_stats.toolkit.crosscoder.training.ranks import Ranks
from rlgen_stats.toolkit.crosscoder.training.train import start_run, train_step

STEPS: Final = 4
"""Steps a measurement."""
LATE: Final = 50_000
"""Step at which ours is timed, of twice as many: after all warm-ups, with as many dead features as there are."""
CORPUS: Final = 400_000_000
OURS: Final = "this package"
BOTH: Final = "this package, objective both"
DENSE: Final = "this package, dense products throughout"
PLAIN: Final = "plain PyTorch"
THEIRS: Final = "crosscoder_learning, its own trainer"
PRODUCTS: Final = "the five matrix products alone"
SQUARE: Final = "a square matrix product"


@dataclass
class Ours:
    """Steps of this package's training, reading included."""

    size: Size
    reader: ArrayReader
    device: torch.device
    objective: Literal["joint", "both"] = "joint"

    def __post_init__(self) -> None:
        size = self.size
        views = ("base@0", *(f"run{i}@1" for i in range(1, size.views)))
        spec = CrosscoderSpec(
            name="benchmark", views=views, n_features=size.n_features, k=size.k, steps=2 * LATE,
            batch_size=size.batch, precision="bfloat16" if size.low else "float32", objective=self.objective,
        )  # fmt: skip
        self.spec = spec
        self.run = start_run(
            spec, views, measure_views(self.reader), seed=1, key="", folder=None, device=self.device, ranks=Ranks()
        )
        self.run.step = LATE
        self.run.objective.load_state(
            {"last_fired": torch.full((size.n_features,), LATE, device=self.device), "running": torch.tensor(1.0)}
        )
        self.batches = endless(self.reader)

    def dense_steps(self) -> None:
        """The same without the products of sparse codes."""
        share, sparse.SPARSE_SHARE = sparse.SPARSE_SHARE, -1.0  # type: ignore[misc]
        self.steps()
        sparse.SPARSE_SHARE = share  # type: ignore[misc]

    def steps(self) -> None:
        for _ in range(STEPS):
            batch = torch.from_numpy(joined(next(self.batches))).to(self.device)
            train_step(self.run, self.spec, batch, log=False)


def plain(size: Size, reader: ArrayReader, device: torch.device) -> Callable[[], None]:
    """Steps of the plain implementation on the same batches."""
    torch.manual_seed(0)
    trainer = PlainTrainer(PlainCrosscoder(size.views, size.width, size.n_features, size.k).to(device), low=size.low)
    return on_batches(trainer.step, size, reader, device)


def theirs(checkout: Path, size: Size, reader: ArrayReader, device: torch.device) -> Callable[[], None]:
    """Steps of crosscoder_learning on the same batches."""
    step = crosscoder_learning(
        checkout, views=size.views, width=size.width, n_features=size.n_features, k=size.k, step=LATE, device=device
    )
    return on_batches(step, size, reader, device)


def on_batches(
    step: Callable[[torch.Tensor], object], size: Size, reader: ArrayReader, device: torch.device
) -> Callable[[], None]:
    """Steps on normalised batches, one after the other."""
    scale = torch.from_numpy(np.sqrt(size.width) / measure_views(reader).mean_norm).float().to(device)[:, None]
    batches = endless(reader)

    def steps() -> None:
        for _ in range(STEPS):
            step(torch.from_numpy(next(batches)).to(device) * scale)

    return steps


def products(size: Size, device: torch.device) -> Callable[[], None]:
    """The products of a dense step: encode, decode, and the gradients of decoder, code and encoder."""
    kind = torch.bfloat16 if size.low else torch.float32
    x, f = torch.randn(size.batch, size.flat), torch.randn(size.batch, size.n_features)
    encoder = torch.randn(size.flat, size.n_features)
    x, f, encoder = (tensor.to(device, kind) for tensor in (x, f, encoder))
    decoder = encoder.T.contiguous()

    def steps() -> None:
        for _ in range(STEPS):
            x @ encoder
            f @ decoder
            f.T @ x
            x @ decoder.T
            x.T @ f

    return steps


def square(size: Size, device: torch.device) -> tuple[Callable[[], None], float]:
    """Products of large square matrices, and their operations."""
    n = 4096 if device.type == "cpu" else 16384
    n = n if size.full else 256
    a = torch.randn(n, n).to(device, torch.bfloat16 if size.low else torch.float32)
    return lambda: [a @ a for _ in range(2)] and None, 4.0 * n**3


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--views", type=int, help="models; default 3")
    parser.add_argument("--crosscoder-learning", type=Path, help="folder of a checkout, to be timed too")


def main() -> None:
    """Measure and report."""
    options, device = options_with_device(__doc__, _add_options)
    size = size_of(options, device)
    torch.set_float32_matmul_precision("highest")
    with tempfile.TemporaryDirectory() as folder:
        reader = ArrayReader(planted(size), batch_size=size.batch, seed=0)
        ours = Ours(size, reader, device)
        one, operations = square(size, device)
        both = Ours(size, reader, device, "both")
        cases = {
            OURS: ours.steps,
            BOTH: both.steps,
            PLAIN: plain(size, reader, device),
            PRODUCTS: products(size, device),
            SQUARE: one,
        }
        if device.type == "cpu":
            cases[DENSE] = ours.dense_steps
        if options.crosscoder_learning:
            cases[THEIRS] = theirs(options.crosscoder_learning, size, reader, device)
        timed = [Case(name, synchronised(run, device)) for name, run in cases.items()]
        found = interleaved(timed, options.repetitions, options.clock)
        rows, goals = _told(size, {name: spread(seconds) for name, seconds in found.items()}, operations, device)
        batch = torch.from_numpy(joined(next(ours.batches))).to(device)
        kept = ours.run.objective.describe(ours.run.objective.fit(batch, ours.run.step))["l0"]
        report(
            options, Path(folder), "Training a BatchTopK crosscoder",
            settings=size.settings(device) | {"L0": round(float(kept), 1)}, rows=rows, goals=goals,
        )  # fmt: skip


def _told(
    size: Size, seconds: dict[str, dict[str, float]], operations: float, device: torch.device
) -> tuple[list[dict[str, Any]], list[Goal]]:
    step = 10.0 * size.batch * size.flat * size.n_features
    rates = {name: STEPS * step / found["median"] for name, found in seconds.items() if name != SQUARE}
    rates[SQUARE] = operations / seconds[SQUARE]["median"]
    peak = max(rates[PRODUCTS], rates[SQUARE])
    rows = []
    for name, found in seconds.items():
        row: dict[str, Any] = {"what": name}
        if name != SQUARE:
            row |= {"ms a step": 1e3 * found["median"] / STEPS}
            row |= {"low": 1e3 * found["low"] / STEPS, "high": 1e3 * found["high"] / STEPS}
        if name in (OURS, BOTH, DENSE, PLAIN, THEIRS):
            tokens = STEPS * size.batch / found["median"]
            row |= {"tokens/s": tokens, "of plain": seconds[PLAIN]["median"] / found["median"]}
            row |= {"hours for 400M tokens": CORPUS / tokens / 3600}
        rows.append(row | {"dense GFLOP/s": rates[name] / 1e9, "of peak": rates[name] / peak})
    wanted = 0.5 if device.type == "cuda" else 0.6
    dense = rates.get(DENSE, rates[OURS]) / peak
    goals = [Goal("of the measured matmul peak, dense products", dense, wanted)]
    if device.type == "cpu":
        for peer in (PLAIN, THEIRS):
            if peer in seconds:
                ratio = seconds[peer]["median"] / seconds[OURS]["median"]
                goals.insert(0, Goal(f"tokens/s against {peer}", ratio, 1.3))
    return rows, goals


if __name__ == "__main__":
    main()
