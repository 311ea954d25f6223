"""Small features and outcomes in memory, as anyone makes them from arrays, with planted truths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import dask
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from rlgen_stats.toolkit.statistics import features_dataset, outcomes_dataset

SPLIT = ("selection", "verification")
GAIN_MODELS = ["base@0", "rl@10"]
GAIN_TASKS = ["math", "quiz", "facts", "noise"]
GAIN_DOMAINS = {"math": "in", "quiz": "out", "facts": "out", "noise": "out"}


def _prompts(n: int, tasks: list[str], domains: dict[str, str], per_cluster: int) -> pd.DataFrame:
    task = [tasks[i % len(tasks)] for i in range(n)]
    return pd.DataFrame(
        {
            "prompt": [f"p{i:04d}" for i in range(n)],
            "task": task,
            "domain": [domains.get(t, "out") for t in task],
            "split": [SPLIT[(i - i % per_cluster) // len(tasks) % 2] for i in range(n)],  # whole clusters
            "cluster": [f"c{i // per_cluster:04d}" for i in range(n)],
        }
    )


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

        def by_model(values: np.ndarray) -> dict[str, np.ndarray]:
            return dict(zip(models, values, strict=True))

        dataset = features_dataset(
            by_model(mean),
            firing=None if firing is None else by_model(firing),
            maximum=by_model(mean * 2),
            n_tokens=by_model(np.full(mean.shape[:2], 8)),
            prompts=_prompts(mean.shape[1], tasks or ["a"], domains or {"a": "in"}, per_cluster),
            scale="contribution",
            readout="swap",
            text_mode="forced",
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
        correct = np.repeat(np.asarray(greedy)[..., None], 2, axis=2) if correct is None else correct
        return outcomes_dataset(
            dict(zip(models, np.asarray(greedy), strict=True)),
            samples=dict(zip(models, correct, strict=True)),
            prompts=_prompts(len(greedy[0]), tasks or ["a"], domains or {"a": "in"}, per_cluster),
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
