"""The training loop of a crosscoder: paired activations in, weights out, the same for every sparsity rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from rlgen_stats.schemas.errors import InputError, StoreCorruptError
from rlgen_stats.schemas.seeds import content_hash
from rlgen_stats.schemas.study import CrosscoderSpec
from rlgen_stats.stores import write_json
from rlgen_stats.stores.crosscoder_weights import CURVE
from rlgen_stats.toolkit.crosscoder.data.paired import PairedActivations, ViewMoments, in_orders, measure_views
from rlgen_stats.toolkit.crosscoder.model.crosscoder import Crosscoder
from rlgen_stats.toolkit.crosscoder.model.files import read_tensors, write_tensors
from rlgen_stats.toolkit.crosscoder.training.objective import Fit, Objective, difference_weights, reference_view
from rlgen_stats.toolkit.crosscoder.training.ranks import Ranks, join_ranks
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.tracking import Report, ignore

DECAY_SHARE: Final = 0.2
"""Share of the steps, at the end, over which the learning rate falls linearly to zero."""

MAX_GRADIENT_NORM: Final = 1.0
"""Gradients are clipped to this norm. Losses are sums over channels, so most steps are clipped: Adam does not depend on
the scale, and the direction stays."""

LOG_EVERY: Final = 50
"""Steps between two points of the curve."""

SAVE_EVERY: Final = 500
"""Steps between two resumable states."""

TOKENS_OF_L0: Final = 2048
"""Tokens of the last batches, a tenth of training's at most, whose L0 under the fixed threshold is kept."""

STATE: Final = "training.safetensors"


def learning_rate(step: int, spec: CrosscoderSpec) -> float:
    """Rate at a step counted from 0: linear warm-up, plateau, linear decay to zero over the last fifth."""
    warmup = max(1.0, spec.warmup_fraction * spec.steps)
    decay = max(1.0, DECAY_SHARE * spec.steps)
    return spec.learning_rate * min(1.0, (step + 1) / warmup, (spec.steps - step) / decay)


@dataclass(kw_only=True)
class TrainingRun:
    """One crosscoder in training: everything a step changes."""

    crosscoder: Crosscoder
    objective: Objective
    optimiser: torch.optim.Adam
    seed: int
    key: str
    """Identity of spec, views, seed and data: a saved state of another is not continued."""
    folder: Path | None
    step: int
    curve: list[dict[str, Any]]

    def weights(self) -> dict[str, Tensor]:
        """All trained tensors by name."""
        return dict(self.crosscoder.named_parameters()) | self.objective.weights()


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
        Paired raw activations with batches of ``spec.batch_size``.
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
        Receiver of progress, in tokens.
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

    Started by torchrun (or inside an initialised ``torch.distributed`` group), every process takes its share of each
    batch: the curve is that of one process up to the order of sums. All processes must see the same store and folder.
    """
    return train_replicates(
        reader,
        spec,
        views=views,
        seeds=[seed],
        device=device,
        folders=None if folder is None else [folder],
        progress=progress,
        log_every=log_every,
        save_every=save_every,
        data_hash=data_hash,
        facts=facts,
    )[0]


def train_replicates(
    reader: PairedActivations,
    spec: CrosscoderSpec,
    *,
    views: Sequence[str],
    seeds: Sequence[int],
    orders: Sequence[int | None] | None = None,
    device: str | torch.device = "cpu",
    folders: Sequence[Path] | None = None,
    progress: Progress = SILENT,
    log_every: int = LOG_EVERY,
    save_every: int = SAVE_EVERY,
    data_hash: str = "",
    facts: Mapping[str, Any] | None = None,
    report: Report = ignore,
) -> list[Crosscoder]:
    """Train crosscoders that differ in their initial weights and the order of the data, in one pass over it.

    Parameters
    ----------
    seeds
        Seed of each one's initial weights.
    orders
        Seed of the order in which each reads the data, None for the reader's own, which is the default.
    folders
        Folder of each.
    report
        Receives every point of the curves, as ``NAME/loss``, with its step.
    reader, spec, views, device, progress, log_every, save_every, data_hash, facts
        As in :func:`train_crosscoder`.

    Returns
    -------
    list of Crosscoder
        Each with the weights it would have got alone.
    """
    device = torch.device(device)
    moments = measure_views(reader, reference=reference_view(views))
    _check_views(moments, views)
    ranks = join_ranks(device)
    run_folders = [None] * len(seeds) if folders is None else list(folders)
    run_orders = [None] * len(seeds) if orders is None else list(orders)
    runs = []
    for seed, order, folder in zip(seeds, run_orders, run_folders, strict=True):
        key = training_key(spec, views, seed=seed, order=order, data_hash=data_hash or f"{reader.n_tokens} tokens")
        runs.append(start_run(spec, views, moments, seed=seed, key=key, folder=folder, device=device, ranks=ranks))
        _resume(runs[-1])
    step = min(run.step for run in runs)
    batch_bytes = 4 * spec.batch_size * sum(moments.widths)
    # the batches after which no state is kept: a run that goes on from one reads them all
    last, n_last = list[Tensor](), min(math.ceil(TOKENS_OF_L0 / spec.batch_size), max(spec.steps // 10, 1))
    with (
        (progress if ranks.rank == 0 else SILENT).task(
            f"crosscoder {spec.name}", total=spec.steps * spec.batch_size, unit="tokens"
        ) as task,
        closing(in_orders(reader, [None, *run_orders], batch_bytes=batch_bytes, start=step)) as batches,
    ):
        task.skip(step * spec.batch_size)
        while step < spec.steps:
            as_read, *each = next(batches)
            if step >= spec.steps - n_last:
                last.append(torch.from_numpy(as_read.copy()).to(device))
            log = (step + 1) % log_every == 0 or step + 1 == spec.steps
            for run, rows in zip(runs, each, strict=True):
                if run.step == step:  # a run resumed from a later state waits until the others reach it
                    train_step(run, spec, torch.from_numpy(rows).to(device, non_blocking=True), log=log)
            step += 1
            if log:
                task.advance(spec.batch_size * ((step - 1) % log_every + 1), **_progress_facts(runs[0]))
                if ranks.rank == 0:
                    report(step, _points(runs, step))
            if step % save_every == 0 and step <= spec.steps - n_last and ranks.rank == 0:
                for run in runs:
                    _save_state(run)
    common = {"data_tokens": reader.n_tokens, **(facts or {})}
    return [_finish(run, spec, last, facts={"key": run.key, "seed": run.seed, **common}) for run in runs]


def _progress_facts(run: TrainingRun) -> dict[str, float | str]:
    """What the progress line says; the fractions of variance explained in the order of the views."""
    last = run.curve[-1]
    fve = "/".join(f"{value:.3f}" for value in last["fve"].values())
    return {"loss": last["loss"], "l0": last["l0"], "fve": fve, "dead": last["dead"]}


def _points(runs: Sequence[TrainingRun], step: int) -> dict[str, float]:
    """What the curves of all runs say at a step."""
    values: dict[str, float] = {}
    for number, run in enumerate(runs, start=1):
        name = run.folder.name if run.folder is not None else f"{run.crosscoder.name}.{number}"
        if run.curve[-1]["step"] == step:  # else it waits for the others
            values |= _plain(run.curve[-1], name)
    return values


def _plain(point: Mapping[str, Any], name: str) -> dict[str, float]:
    """A point of a curve, each value after the crosscoder's name: ``main/loss``, ``main/fve/rl@80``."""
    values: dict[str, float] = {}
    for key, value in point.items():
        parts = {f"{key}/{view}": one for view, one in value.items()} if isinstance(value, Mapping) else {key: value}
        values |= {f"{name}/{part}": float(one) for part, one in parts.items() if part != "step"}
    return values


def training_key(
    spec: CrosscoderSpec, views: Sequence[str], *, seed: int, order: int | None = None, data_hash: str
) -> str:
    """Hash of everything a crosscoder's weights depend on, which its name and its use do not."""
    left_out = {"name", "views", "readout", "replicates", "accept_unhealthy", "corpus"}
    settings = spec.resolved().model_dump(mode="json", exclude=left_out)
    if settings["objective"] != "joint":
        settings["decoder"] = "shared"  # the rules of paired rows; crosscoders trained under earlier ones are replaced
    return content_hash([settings, list(views), int(seed), data_hash, *([] if order is None else [order])])


def _check_views(moments: ViewMoments, views: Sequence[str]) -> None:
    if len(moments.widths) != len(views):
        raise InputError(f"the reader has {len(moments.widths)} views, but {len(views)} were named: {list(views)}.")


def start_run(
    spec: CrosscoderSpec,
    views: Sequence[str],
    moments: ViewMoments,
    *,
    seed: int,
    key: str,
    folder: Path | None,
    device: torch.device,
    ranks: Ranks,
) -> TrainingRun:
    """A crosscoder with its initial weights, normalisation, objective and optimiser, before the first step."""
    crosscoder = Crosscoder(
        views,
        width=moments.widths,
        n_features=spec.n_features,
        sparsity=spec.sparsity,
        k=spec.k,
        exclusive=dict(zip(views, spec.exclusive_features, strict=True)) if spec.exclusive_features else None,
        readout=spec.readout,
        name=spec.name,
        seed=seed,
    )
    crosscoder.facts["objective"] = spec.objective or "joint"
    crosscoder.fit_normalisation(moments)
    crosscoder.to(device).train()
    scale = np.sqrt(moments.widths) / moments.mean_norm
    objective = Objective(
        spec,
        crosscoder,
        variance=torch.from_numpy(moments.variance * scale**2),
        difference_weights=difference_weights(spec, views, moments),
        ranks=ranks,
    )
    return TrainingRun(
        crosscoder=crosscoder,
        objective=objective,
        optimiser=torch.optim.Adam([*crosscoder.parameters(), *objective.weights().values()], fused=True),
        seed=seed,
        key=key,
        folder=folder,
        step=0,
        curve=[],
    )


def train_step(run: TrainingRun, spec: CrosscoderSpec, batch: Tensor, *, log: bool) -> None:
    """One step; ``log`` adds a point to the curve, read from the batch just seen before the weights move."""
    for group in run.optimiser.param_groups:
        group["lr"] = learning_rate(run.step, spec)
    fit = compute_gradients(run, batch)
    if log:
        run.curve.append(_curve_point(run, fit))
    torch.nn.utils.clip_grad_norm_(run.crosscoder.parameters(), MAX_GRADIENT_NORM)
    run.optimiser.step()
    run.step += 1


def compute_gradients(run: TrainingRun, batch: Tensor) -> Fit:
    """Gradients of a whole batch [token, D] in ``grad`` of all weights, summed over processes.

    Those of exclusive features in all other views are zeroed: a weight whose gradient is always zero keeps Adam's
    moments, and itself, at exactly zero.
    """
    run.optimiser.zero_grad()
    fit = run.objective.fit(batch, run.step)
    (fit.loss + fit.revival).backward()  # type: ignore[no-untyped-call]
    gradients = {}
    for name, weight in run.weights().items():
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        gradients[name] = weight.grad
    for view, features in run.crosscoder.exclusive.items():
        for other, channels in zip(run.crosscoder.views, run.crosscoder.slots(), strict=True):
            if other != view:
                gradients["decoder_matrix"][features, channels] = 0.0
                gradients["encoder_matrix"][channels, features] = 0.0
    for gradient in gradients.values():
        run.objective.ranks.sum_(gradient)
    return fit


def _curve_point(run: TrainingRun, fit: Fit) -> dict[str, Any]:
    point = {"step": run.step + 1, **run.objective.describe(fit)}
    if not np.isfinite(point["loss"]):
        raise InputError(
            f"crosscoder {run.crosscoder.name!r}: the loss is {point['loss']} at step {run.step + 1}; lower "
            f"learning_rate (now {run.optimiser.param_groups[0]['lr']:.2g}) or check the activations for outliers."
        )
    return point


def _save_state(run: TrainingRun) -> None:
    if run.folder is None:
        return
    tensors = {f"model.{name}": tensor for name, tensor in run.crosscoder.state_dict().items()}
    tensors |= {f"objective.{name}": tensor for name, tensor in run.objective.state().items()}
    for name, weight in run.weights().items():
        tensors |= {f"adam.{name}.{part}": value for part, value in run.optimiser.state[weight].items()}
    write_tensors(run.folder / STATE, tensors, {"key": run.key, "step": run.step, "curve": run.curve})


def _resume(run: TrainingRun) -> None:
    """Continue from a saved state if there is one with the same key, that is spec, views, seed and data."""
    if run.folder is None or not (run.folder / STATE).exists():
        return
    try:
        tensors, facts = read_tensors(run.folder / STATE)
    except StoreCorruptError:
        return  # a state is a convenience: an unreadable one only costs the steps it would have saved
    if facts.get("key") != run.key:
        return
    run.crosscoder.load_state_dict(_with_prefix(tensors, "model."))
    run.objective.load_state(_with_prefix(tensors, "objective."))
    for name, weight in run.weights().items():
        parts = _with_prefix(tensors, f"adam.{name}.")
        run.optimiser.state[weight] = {part: value.to(weight.device) for part, value in parts.items()}
    run.step, run.curve = int(facts["step"]), list(facts["curve"])


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _finish(run: TrainingRun, spec: CrosscoderSpec, last: Sequence[Tensor], *, facts: dict[str, Any]) -> Crosscoder:
    crosscoder = run.crosscoder
    run.objective.finish()
    if crosscoder.facts["objective"] != "joint":
        crosscoder.share_decoder()
    crosscoder.facts = {
        **crosscoder.facts,
        **facts,
        "spec": spec.model_dump(mode="json"),
        "trained_tokens": spec.steps * spec.batch_size,
        "torch": torch.__version__,
        "last": run.curve[-1] if run.curve else {},
    }
    crosscoder.requires_grad_(False).eval()
    crosscoder.facts["l0_trained"] = float(torch.cat([_active(crosscoder, batch) for batch in last]).mean())
    if run.folder is not None and run.objective.ranks.rank == 0:
        write_json(run.folder / CURVE, run.curve)
        crosscoder.save(run.folder)
        (run.folder / STATE).unlink(missing_ok=True)
    return crosscoder


def _active(crosscoder: Crosscoder, raw: Tensor) -> Tensor:
    """[token] active features (L0) under the fixed threshold: of all views together, else in the mean over views.

    Of single views read as training read them, whatever the declared readout, which may not be fitted yet.
    """
    if crosscoder.has_joint_code:
        codes = [crosscoder.encode(crosscoder.normalise(raw))]
    else:
        swap = crosscoder.readout_map(kind="swap")
        codes = [swap(part) for part in crosscoder.split(raw)]
    return torch.stack([(code > 0).sum(dim=-1).double() for code in codes]).mean(dim=0)
