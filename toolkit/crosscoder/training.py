"""Training a crosscoder from paired activations: one loop for every sparsity rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlgen_stats.schemas.errors import InputError, StoreCorruptError
from rlgen_stats.schemas.seeds import content_hash
from rlgen_stats.schemas.study import CrosscoderSpec
from rlgen_stats.stores import write_json
from rlgen_stats.toolkit.crosscoder.files import read_tensors, write_tensors
from rlgen_stats.toolkit.crosscoder.model import Crosscoder
from rlgen_stats.toolkit.crosscoder.objective import Objective, Workspace, make_objective
from rlgen_stats.toolkit.crosscoder.reader import PairedActivations, ViewMoments, endless, measure_views
from rlgen_stats.toolkit.progress import SILENT, Progress

DECAY_SHARE: Final = 0.2
"""Share of the steps, at the end, over which the learning rate falls linearly to zero."""

MAX_GRADIENT_NORM: Final = 1.0
"""Gradients are clipped to this norm. Losses are sums over channels, so most steps are clipped; Adam does not mind the
scale, and the direction stays a batch's own."""

LOG_EVERY: Final = 50
"""Steps between two points of the curve."""

SAVE_EVERY: Final = 500
"""Steps between two resumable states."""

CURVE: Final = "curve.json"
STATE: Final = "training.safetensors"


def learning_rate(step: int, spec: CrosscoderSpec) -> float:
    """Rate at a step counted from 0: linear warm-up, plateau, linear decay to zero over the last fifth."""
    warmup = max(1.0, spec.warmup_fraction * spec.steps)
    decay = max(1.0, DECAY_SHARE * spec.steps)
    return spec.learning_rate * min(1.0, (step + 1) / warmup, (spec.steps - step) / decay)


@dataclass
class _Run:
    """Everything a step changes."""

    crosscoder: Crosscoder
    work: Workspace
    objective: Objective
    optimiser: torch.optim.Adam
    variance: Tensor
    """Total variance of each view in normalised units."""
    step: int
    curve: list[dict[str, Any]]


def train_crosscoder(
    reader: PairedActivations,
    spec: CrosscoderSpec,
    *,
    views: Sequence[str],
    seed: int,
    device: str | torch.device = "cpu",
    folder: Path | None = None,
    progress: Progress = SILENT,
    log_every: int = LOG_EVERY,
    save_every: int = SAVE_EVERY,
    data_hash: str = "",
    facts: Mapping[str, Any] | None = None,
) -> Crosscoder:
    """Train one crosscoder; the same inputs give the same weights on a CPU, interrupted or not.

    Parameters
    ----------
    reader
        Paired raw activations [batch, view, channel] with batches of ``spec.batch_size``.
    spec
        Sparsity, size, steps, rates.
    views
        Model ids of the reader's views, in order.
    seed
        Seed of the initial weights (the order of the data is the reader's).
    device
        Torch device.
    folder
        Where weights.safetensors, spec.json, curve.json and, while training, a resumable state go; None keeps nothing.
    progress
        Receiver of progress.
    log_every, save_every
        Steps between curve points and between states; neither changes the weights.
    data_hash
        Identity of the data; a state saved for other data or another spec is not continued.
    facts
        Anything else to keep in spec.json.

    Returns
    -------
    Crosscoder
        In evaluation mode, without gradients.

    Raises
    ------
    InputError
        If batches have another number of views than ``views``, or the loss becomes NaN or infinite.

    Notes
    -----
    Adam with warm-up, a last fifth of linear decay and gradient clipping. Bit-for-bit repeatability holds for one
    machine, one torch build and one number of threads; on CUDA, results repeat up to the order of atomic additions.
    """
    device = torch.device(device)
    key = training_key(spec, views, seed=seed, n_tokens=reader.n_tokens, data_hash=data_hash)
    moments = measure_views(reader)
    _check_views(moments, views)
    run = _start(spec, views, moments, seed=seed, device=device)
    if folder is not None:
        _resume(run, folder / STATE, key)
    with (
        progress.task(f"crosscoder {spec.name}", total=spec.steps, unit="step") as task,
        closing(endless(reader, start=run.step)) as batches,
    ):
        task.advance(run.step)
        before = run.step
        while run.step < spec.steps:
            log = (run.step + 1) % log_every == 0 or run.step + 1 == spec.steps
            point = _train_step(run, spec, next(batches), log=log)
            run.step += 1
            if point is not None:
                run.curve.append(point)
                task.advance(run.step - before, loss=point["loss"], l0=point["l0"])
                before = run.step
            if folder is not None and run.step % save_every == 0 and run.step < spec.steps:
                _save_state(run, folder, key)
    told = {"key": key, "seed": seed, "data_tokens": reader.n_tokens, **(facts or {})}
    return _finish(run, spec, folder=folder, facts=told)


def training_key(spec: CrosscoderSpec, views: Sequence[str], *, seed: int, n_tokens: int, data_hash: str) -> str:
    """Hash of everything a crosscoder's weights depend on; its name and readout are not among it."""
    settings = spec.model_dump(mode="json", exclude={"name", "views", "readout"})
    return content_hash([settings, list(views), int(seed), int(n_tokens), data_hash])


def _check_views(moments: ViewMoments, views: Sequence[str]) -> None:
    if len(moments.mean) != len(views):
        raise InputError(f"the reader has {len(moments.mean)} views, but {len(views)} were named: {list(views)}.")


def _start(
    spec: CrosscoderSpec, views: Sequence[str], moments: ViewMoments, *, seed: int, device: torch.device
) -> _Run:
    crosscoder = Crosscoder(
        views,
        width=moments.mean.shape[1],
        n_features=spec.n_features,
        sparsity=spec.sparsity,
        k=spec.k,
        readout=spec.readout,
        name=spec.name,
        seed=seed,
    )
    crosscoder.fit_normalisation(moments)
    crosscoder.to(device).train()
    scale = np.sqrt(moments.mean.shape[1]) / moments.mean_norm
    work = Workspace(crosscoder, spec.batch_size)
    optimiser = torch.optim.Adam(work.weights().values(), lr=spec.learning_rate, fused=True)
    variance = torch.from_numpy(moments.variance * scale**2)
    return _Run(crosscoder, work, make_objective(spec, device), optimiser, variance, step=0, curve=[])


@torch.no_grad()
def _train_step(run: _Run, spec: CrosscoderSpec, batch: NDArray[np.float32], *, log: bool) -> dict[str, Any] | None:
    """One step; returns a point of the curve if ``log``, read from the batch just seen before the weights move."""
    for group in run.optimiser.param_groups:
        group["lr"] = learning_rate(run.step, spec)
    run.work.encode(torch.from_numpy(batch).to(run.work.x.device, non_blocking=True))
    run.objective.step(run.work, run.step)
    point = _curve_point(run) if log else None
    torch.nn.utils.clip_grad_norm_(run.work.weights().values(), MAX_GRADIENT_NORM)
    run.optimiser.step()
    return point


def _curve_point(run: _Run) -> dict[str, Any]:
    loss = run.objective.loss(run.work, run.step)
    if not np.isfinite(loss):
        raise InputError(
            f"crosscoder {run.crosscoder.name!r}: the loss is {loss} at step {run.step + 1}; lower learning_rate "
            f"(now {run.optimiser.param_groups[0]['lr']:.2g}) or check the activations for outliers."
        )
    shape = (run.work.batch_size, len(run.crosscoder.views), run.crosscoder.width)
    residual = run.work.error.double().reshape(shape).square().sum(dim=2).mean(dim=0).cpu()
    fve = 1.0 - residual / run.variance
    return {
        "step": run.step + 1,
        "loss": loss,
        "l0": float((run.work.features > 0).sum(dim=1).double().mean()),
        "fve": dict(zip(run.crosscoder.views, fve.tolist(), strict=True)),
        "dead": float((run.work.active <= 0).double().mean()),
    }


def _save_state(run: _Run, folder: Path, key: str) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in run.crosscoder.state_dict().items()}
    tensors |= {f"objective.{name}": tensor for name, tensor in run.objective.state().items()}
    for name, weight in run.work.weights().items():
        tensors |= {f"adam.{name}.{part}": value for part, value in run.optimiser.state[weight].items()}
    write_tensors(folder / STATE, tensors, {"key": key, "step": run.step, "curve": run.curve})


def _resume(run: _Run, file: Path, key: str) -> None:
    """Continue from a saved state if there is one of this very spec and data."""
    if not file.exists():
        return
    try:
        tensors, facts = read_tensors(file)
    except StoreCorruptError:
        return  # a state is a convenience: an unreadable one only costs the steps it would have saved
    if facts.get("key") != key:
        return
    run.crosscoder.load_state_dict(_below(tensors, "model."))
    run.objective.load_state(_below(tensors, "objective."))
    for name, weight in run.work.weights().items():
        parts = _below(tensors, f"adam.{name}.")
        run.optimiser.state[weight] = {part: value.to(weight.device) for part, value in parts.items()}
    run.step, run.curve = int(facts["step"]), list(facts["curve"])


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _finish(run: _Run, spec: CrosscoderSpec, *, folder: Path | None, facts: dict[str, Any]) -> Crosscoder:
    crosscoder = run.crosscoder
    run.objective.finish(crosscoder)
    crosscoder.facts = {
        **facts,
        "spec": spec.model_dump(mode="json"),
        "trained_tokens": spec.steps * spec.batch_size,
        "torch": torch.__version__,
        "last": run.curve[-1] if run.curve else {},
    }
    crosscoder.requires_grad_(False).eval()
    if folder is not None:
        write_json(folder / CURVE, run.curve)
        crosscoder.save(folder)
        (folder / STATE).unlink(missing_ok=True)
    return crosscoder
