"""Experiments on two models compared prompt by prompt: level of the test and misses of the interval, with clusters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special, stats

from rlgen_stats.toolkit.statistics import compare_outcomes
from tests.calibration.rows import Row, rate_row

ALPHA = 0.05
TRUTH_DRAWS = 400_000


@dataclass(frozen=True)
class World:
    """Prompts in clusters; a cluster shifts both models' log-odds alike, and one against the other."""

    n_clusters: int
    n_samples: int
    difference: float
    """Of the log-odds, B minus A, on average over clusters."""

    def rates(self, random: np.random.Generator, clusters: NDArray[np.int64]) -> NDArray[np.float64]:
        """[model, prompt] chance of a right completion."""
        n = int(clusters.max()) + 1
        level = random.normal(0, 1, n)[clusters] + random.normal(0, 1, len(clusters))
        apart = self.difference + random.normal(0, 2, n)[clusters]
        return special.expit(np.stack([level - apart / 2, level + apart / 2]))

    def truth(self, seed: int) -> float:
        """Mean difference of the chances, over many prompts that each have a cluster of their own."""
        rates = self.rates(np.random.default_rng([seed, 50]), np.arange(TRUTH_DRAWS))
        return float((rates[1] - rates[0]).mean())

    def tables(self, seed: int, n: int) -> list[pd.DataFrame]:
        """Completions of both models; each of the ``n`` comparisons is a task of its own."""
        random = np.random.default_rng([seed, 51, self.n_clusters, self.n_samples, int(10 * self.difference)])
        sizes = random.integers(4, 13, n * self.n_clusters)
        clusters = np.repeat(np.arange(len(sizes)), sizes)
        right = random.random((2, len(clusters), self.n_samples)) < self.rates(random, clusters)[..., None]
        rows = pd.DataFrame({"prompt": np.arange(len(clusters)), "cluster": clusters})
        rows = rows.assign(task=clusters // self.n_clusters).loc[np.repeat(rows.index, self.n_samples)]
        rows["sample"] = np.tile(range(self.n_samples), len(clusters))
        return [rows.assign(correct=one.ravel().astype(int)) for one in right]


WORLDS = (World(20, 1, 0.0), World(60, 1, 0.0), World(60, 4, 0.0), World(20, 1, 0.8), World(60, 4, 0.8))


def compared(scale: int, seed: int) -> list[Row]:
    """Models that are equal on average (level of the test), and models that differ (misses of the interval)."""
    n, rows = 60 * scale, []
    for world in WORLDS:
        truth = world.truth(seed) if world.difference else 0.0
        a, b = world.tables(seed, n)
        result = compare_outcomes(a, b).isel(task=slice(n))
        missed = int(((result.difference_low > truth) | (result.difference_high < truth)).sum())
        by_task = (b.correct - a.correct).groupby([a.task, a.prompt]).mean().groupby("task")
        alone = int((np.abs(by_task.mean() - truth) > stats.norm.ppf(1 - ALPHA / 2) * by_task.sem()).sum())
        size = f"{n:,} comparisons, {world.n_clusters} clusters of 4 to 12 prompts, {world.n_samples} sample(s)"
        if not world.difference:
            rows.append(_row("two equal models differ", int((result.p_value <= ALPHA).sum()), n, size, alone))
        rows.append(_row(f"interval of {'a' if truth else 'no'} difference, misses", missed, n, size, alone))
    return rows


def _row(name: str, hits: int, n: int, size: str, naive: int) -> Row:
    return rate_row(name, ALPHA, hits, n, size, naive=naive / n, naive_name="prompts as units")
