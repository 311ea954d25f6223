"""Small feature and outcome stores in memory, with planted truths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import dask
import numpy as np
import pytest
import xarray as xr

GAIN_MODELS = ["base@0", "rl@10"]
GAIN_TASKS = ["math", "quiz", "facts", "noise"]
GAIN_DOMAINS = {"math": "in", "quiz": "out", "facts": "out", "noise": "out"}


def _labels(prompts: int, tasks: list[str], domains: dict[str, str], per_cluster: int) -> dict[str, tuple]:
    task = np.array([tasks[i % len(tasks)] for i in range(prompts)])
    return {
        "prompt": ("prompt", np.array([f"p{i:04d}" for i in range(prompts)])),
        "task": ("prompt", task),
        "domain": ("prompt", np.array([domains.get(t, "out") for t in task])),
        "split": ("prompt", np.array([("selection", "verification")[(i // len(tasks)) % 2] for i in range(prompts)])),
        "cluster": ("prompt", np.array([f"c{i // per_cluster:04d}" for i in range(prompts)])),
    }


def _model_labels(models: list[str]) -> dict[str, tuple]:
    runs = [m.split("@")[0] for m in models]
    return {
        "model": ("model", np.array(models)),
        "run": ("model", np.array(runs)),
        "step": ("model", np.array([int(m.split("@")[1]) for m in models])),
        "arm": ("model", np.array(runs)),
    }


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small worlds: threads cost more than they give."""
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture
def make_features() -> Callable[..., xr.Dataset]:
    def make(
        mean: np.ndarray,
        models: list[str],
        *,
        tasks: list[str] | None = None,
        domains: dict[str, str] | None = None,
        per_cluster: int = 1,
        firing: np.ndarray | None = None,
        chunk: int | None = None,
    ) -> xr.Dataset:
        mean = np.asarray(mean, dtype=float)
        dims = ("model", "prompt", "feature")
        firing = (mean != 0).astype(float) if firing is None else firing
        dataset = xr.Dataset(
            {
                "mean": (dims, mean),
                "firing": (dims, firing),
                "max": (dims, mean * 2),
                "n_tokens": (dims[:2], np.full(mean.shape[:2], 8)),
            },
            coords=_model_labels(models) | _labels(mean.shape[1], tasks or ["a"], domains or {"a": "in"}, per_cluster),
            attrs={"scale": "contribution", "readout": "swap", "text_mode": "forced"},
        )
        # As the store opens them: data lazy, labels in memory.
        return dataset if chunk is None else dataset.chunk({"model": 1, "feature": chunk}).assign_coords(dataset.coords)

    return make


@pytest.fixture
def make_outcomes() -> Callable[..., xr.Dataset]:
    def make(
        greedy: np.ndarray,
        models: list[str],
        *,
        tasks: list[str] | None = None,
        domains: dict[str, str] | None = None,
        per_cluster: int = 1,
        correct: np.ndarray | None = None,
    ) -> xr.Dataset:
        greedy = np.asarray(greedy, dtype=np.int64)
        correct = np.repeat(greedy[..., None], 2, axis=2) if correct is None else correct
        return xr.Dataset(
            {"correct": (("model", "prompt", "sample"), correct), "greedy_correct": (("model", "prompt"), greedy)},
            coords=_model_labels(models)
            | _labels(greedy.shape[1], tasks or ["a"], domains or {"a": "in"}, per_cluster),
        )

    return make


@pytest.fixture
def no_compute() -> Callable[[], object]:
    """Context in which any dask computation fails the test."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was computed before it was asked for")

    @contextmanager
    def context() -> Iterator[None]:
        with dask.config.set(scheduler=refuse):
            yield

    return context


@pytest.fixture
def gain_world(
    make_features: Callable[..., xr.Dataset], make_outcomes: Callable[..., xr.Dataset]
) -> Callable[..., tuple[xr.Dataset, xr.Dataset]]:
    """Features 0-4 rise where rl gained, 5-9 so in one task only; 10-14 follow correctness; the rest is noise.

    With ``everywhere`` 15-19 rise on all prompts alike. A third of the prompts are gains and a quarter losses unless
    ``losses`` is False.
    """

    def make(*, n=800, losses=True, gains=True, everywhere=False, chunk=None, seed=0, planted=True, per_cluster=1):
        rng = np.random.default_rng(seed)
        u = rng.random(n)
        base = (u < 0.5).astype(int)
        rl = np.where(base == 1, (u < 0.25) | (not losses), (u < 0.84) & gains).astype(int)
        mean = 5 + np.repeat(rng.normal(0, 1, (1, n, 30)), 2, axis=0) + rng.normal(0, 0.5, (2, n, 30))
        task = np.array([GAIN_TASKS[i % 4] for i in range(n)])
        if planted:
            gained = (base == 0) & (rl == 1)
            mean[1, gained, :5] += 1.5
            mean[1, gained & (task == "quiz"), 5:10] += 1.5
            mean[1, :, 15:20] += 0.8 * everywhere
            for m, right in enumerate((base, rl)):
                mean[m, right == 1, 10:15] += 0.8
        labels = {"tasks": GAIN_TASKS, "domains": GAIN_DOMAINS, "per_cluster": per_cluster}
        features = make_features(mean, GAIN_MODELS, chunk=chunk, **labels)
        return features, make_outcomes(np.stack([base, rl]), GAIN_MODELS, **labels)

    return make
