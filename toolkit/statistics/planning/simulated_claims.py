"""Simulated inputs of the first three claims, with a known truth: what their verdicts would be made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray

# -- C1: tables of attribution ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpecificShares:
    """Share of specific features of every checkpoint, and how far from base it is."""

    shares: Mapping[str, float]
    """Model -> share of its features that are specific."""
    shifts: Mapping[str, float]
    """Model -> relative activation shift."""
    n_features: int = 400
    spread: float = 0.0
    """Standard deviation of a share between dictionaries."""
    cluster: int = 4
    """Features of one direction, specific together or not at all."""
    n_dictionaries: int = 3


def attribution_of(world: SpecificShares, random: np.random.Generator) -> xr.Dataset:
    """Norm ratios of the dictionaries of every model with base, [crosscoder, feature]."""
    names, shares = list(world.shares), np.array(list(world.shares.values()))
    r = world.n_dictionaries
    share = np.clip(shares[:, None] + world.spread * random.standard_normal((len(names), r)), 0.0, 1.0)
    shape = (len(names) * r, world.n_features // world.cluster)
    specific = np.repeat(random.random(shape) < share.reshape(-1, 1), world.cluster, axis=1)
    nrn = np.where(specific, 0.95, 0.5 + 0.03 * random.standard_normal(specific.shape))
    return xr.Dataset(
        dict.fromkeys(("nrn_l1", "nrn_l2"), (("crosscoder", "feature"), nrn))
        | {"alive": (("crosscoder", "feature"), np.ones(nrn.shape, dtype=bool))},
        coords={
            "crosscoder": [f"{name}.{number}" for name in names for number in range(r)],
            "target": ("crosscoder", np.repeat(names, r)),
            "dictionary": ("crosscoder", np.tile(np.arange(1, r + 1), len(names))),
        },
    )


def movement_of(world: SpecificShares) -> xr.Dataset:
    """How far every model is from base."""
    models = list(world.shifts)
    return xr.Dataset(
        {"activation_shift": ("model", np.array(list(world.shifts.values())))},
        coords={"model": models, "run": ("model", [model.partition("@")[0] for model in models])},
    )


def equal_health(table: xr.Dataset) -> xr.Dataset:
    """Health of dictionaries that fit equally well."""
    names, views = table["crosscoder"].values, np.unique(table["target"].values)
    same = {name: ("crosscoder", np.full(len(names), value)) for name, value in (("l0", 16.0), ("dead_fraction", 0.0))}
    fve = {"fve": (("crosscoder", "view"), np.full((len(names), len(views)), 0.9))}
    return xr.Dataset(fve | same, coords={"crosscoder": names, "view": views})


# -- C2: features along two runs --------------------------------------------------------------------------------------


def features_of_runs(
    paths: Mapping[str, FloatArray],
    steps: Sequence[int],
    n_prompts: int,
    random: np.random.Generator,
) -> xr.Dataset:
    """Features of runs whose true changes are ``paths`` [checkpoint, feature], in standard deviations of base.

    Prompts respond by half of the change more or less; a third of the noise is common to groups of features.
    """
    f = next(iter(paths.values())).shape[1]
    loadings = random.standard_normal((3, f)) / 3

    def draw() -> FloatArray:
        own, common = random.standard_normal((n_prompts, f)), random.standard_normal((n_prompts, 3))
        return np.asarray(np.sqrt(2 / 3) * own + common @ loadings)

    base, means = 20 + draw(), []
    for path in paths.values():
        response = 1 + 0.5 * random.standard_normal((n_prompts, f))
        means += [base + change * response + 0.5 * draw() for change in path]
    run = ["base", *(name for name in paths for _ in steps)]
    step = [0, *(step for _ in paths for step in steps)]
    dims = ("model", "prompt", "feature")
    return xr.Dataset(
        {
            "mean": (dims, np.stack([base, *means])),
            "firing": (dims, np.ones((len(run), n_prompts, f))),
            "n_tokens": (dims[:2], np.full((len(run), n_prompts), 8)),
        },
        coords={
            "model": [f"{name}@{at}" for name, at in zip(run, step, strict=True)],
            "run": ("model", run),
            "step": ("model", step),
            "arm": ("model", run),
            "prompt": [f"p{i:04d}" for i in range(n_prompts)],
        },
        attrs={"scale": "contribution", "readout": "swap", "text_mode": "forced"},
    )


def settling(
    size: FloatArray, window: tuple[float, float], shares: FloatArray, random: np.random.Generator
) -> FloatArray:
    """Changes [checkpoint, feature] that begin at random and are complete within a window of shares of training."""
    end = random.uniform(*window, len(size))
    begin = end * random.uniform(0, 1, len(size))
    return np.asarray(size * np.clip((shares[:, None] - begin) / (end - begin), 0, 1))


def two_runs(
    windows: tuple[tuple[float, float], tuple[float, float]],
    shares: FloatArray,
    n_features: int,
    random: np.random.Generator,
) -> dict[str, FloatArray]:
    """True changes of an SFT and an RL run; effects are exponential, RL's six tenths of SFT's."""
    sizes = (scale * random.exponential(0.8, n_features) * random.choice([-1, 1], n_features) for scale in (1.0, 0.6))
    return {
        name: settling(size, window, shares, random)
        for name, size, window in zip(("sft", "rl"), list(sizes), windows, strict=True)
    }


# -- C3: activations and outcomes of base and one model ---------------------------------------------------------------

MODELS: Final = ("base@0", "rl@10")
Change = Callable[[NDArray[np.bool_], FloatArray, np.random.Generator], FloatArray]
"""[model, prompt] correctness, [model, prompt, feature] noise -> activations."""


def selection_study(
    change: Change,
    n: int,
    seed: int,
    *,
    n_features: int,
    tasks: Sequence[str] = ("in", "out"),
    accuracy: tuple[float, float] = (0.5, 0.85),
    lost: float = 0.02,
) -> tuple[xr.Dataset, xr.Dataset]:
    """Features and outcomes of ``n`` prompts in tasks, split 40/30/30; ``change`` makes activations of noise.

    ``accuracy`` of base and RL; ``lost``: share of base's right answers that RL loses.
    """
    random = np.random.default_rng(seed)
    base = random.random(n) < accuracy[0]
    gained = (accuracy[1] - accuracy[0] * (1 - lost)) / (1 - accuracy[0])
    rl = np.where(base, random.random(n) >= lost, random.random(n) < gained)
    right = np.stack([base, rl])
    noise = random.standard_normal((1, n, n_features)) + 0.5 * random.standard_normal((2, n, n_features))
    values = 5 + change(right, noise, random)
    task = np.array(tasks)[np.arange(n) % len(tasks)]
    labels = {
        "model": list(MODELS),
        "run": ("model", [model.partition("@")[0] for model in MODELS]),
        "prompt": [f"p{i}" for i in range(n)],
        "task": ("prompt", task),
        "domain": ("prompt", np.where(task == tasks[0], "in", "out")),
        "split": ("prompt", random.choice(["selection", "verification", "trial"], n, p=[0.4, 0.3, 0.3])),
    }
    dims = ("model", "prompt", "feature")
    features = xr.Dataset(
        {"mean": (dims, values), "firing": (dims, np.ones_like(values))},
        coords=labels,
        attrs={"scale": "contribution"},
    )
    return features, xr.Dataset({"greedy_correct": (dims[:2], right.astype(np.int64))}, coords=labels)


def rises_where_gained(n: int, by: float = 0.9) -> Change:
    """The first ``n`` features rise by so many standard deviations where base is wrong and RL right, and only there."""

    def change(right: NDArray[np.bool_], noise: FloatArray, random: np.random.Generator) -> FloatArray:
        noise[1, ~right[0] & right[1], :n] += by
        return noise

    return change
