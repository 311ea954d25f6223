"""Experiments on few clusters, trends, shares of false discoveries, and stability of a selection."""

from __future__ import annotations

import numpy as np
from scipy import stats

from rlgen_stats.toolkit.statistics.kernels import (
    cluster_se,
    fdp_bound,
    max_t,
    sign_flip_test,
    tost_chain,
    trend_test,
    wild_cluster_bootstrap,
)
from rlgen_stats.toolkit.statistics.planning.planted_truth import Simulation
from rlgen_stats.toolkit.statistics.planning.simulate import simulate_features
from rlgen_stats.toolkit.statistics.selection.options import SelectionTests, StabilityOptions
from rlgen_stats.toolkit.statistics.selection.select_features import select_features
from tests.calibration.families import _dependent
from tests.calibration.rows import Row, mean_row, rate_row

ALPHA = 0.05


def few_clusters(scale: int, seed: int) -> list[Row]:
    """Eight clusters of five correlated prompts: wild bootstrap and sign flips."""
    n_features, n_clusters, size = 1000 * scale, 8, 5
    random = np.random.default_rng([seed, 21])
    code = np.repeat(np.arange(n_clusters), size)
    x = np.sqrt(0.5) * random.standard_normal((n_clusters, n_features))[code]
    x += np.sqrt(0.5) * random.standard_normal((len(code), n_features))
    wild = wild_cluster_bootstrap(x, code, n_resamples=999, seed=seed).p_value
    flip = np.asarray(sign_flip_test(x, clusters=code).p_value)
    error = cluster_se(x, code, kind="CR1").standard_error
    naive = 2 * stats.norm.sf(np.abs(x.mean(axis=0)) / error)
    setting = f"{n_features:,} features, {n_clusters} clusters of {size}, ICC .5"
    attained = 12 / 256  # the largest level below .05 that 2^8 flips can have
    return [
        rate_row(
            "wild bootstrap",
            ALPHA,
            int((np.asarray(wild) <= ALPHA).sum()),
            n_features,
            setting,
            naive=float((naive <= ALPHA).mean()),
            naive_name="clustered error, normal quantile",
        ),
        rate_row("sign flip", attained, int((flip <= ALPHA).sum()), n_features, setting),
    ]


def trends(scale: int, seed: int) -> list[Row]:
    """Independent random walks of prompts over twelve checkpoints, and checkpoints exactly at the margin."""
    n_features, n = 1500 * scale, 40
    random = np.random.default_rng([seed, 22])
    hits, naive = 0, 0
    for _ in range(0, n_features, 500):
        x = np.cumsum(random.standard_normal((n, 12, 500)), axis=1)
        hits += int((np.asarray(trend_test(x).p_value) <= ALPHA).sum())
        mean = x.mean(axis=0)
        naive += sum(stats.kendalltau(np.arange(12), mean[:, k]).pvalue <= ALPHA for k in range(500))
    x = random.standard_normal((n, 2, 4 * n_features))
    x[:, 0] += 0.05
    beyond = tost_chain(x, margin=0.05).p_beyond[0]
    d = x[:, 0] - x[:, 1]
    nearer = stats.t.sf((np.abs(d.mean(axis=0)) - 0.05) / stats.sem(d, axis=0), n - 1)
    return [
        rate_row(
            "trend over autocorrelated checkpoints",
            ALPHA,
            hits,
            n_features,
            f"{n_features:,} features, {n} prompts",
            naive=naive / n_features,
            naive_name="Mann-Kendall of the mean over prompts",
        ),
        rate_row(
            "called evolving at the margin",
            ALPHA,
            int((beyond <= ALPHA).sum()),
            4 * n_features,
            f"{4 * n_features:,} features, {n} prompts, margin a fifth of the error",
            naive=float((nearer <= ALPHA).mean()),
            naive_name="one-sided test of the nearer bound",
        ),
    ]


def false_shares(scale: int, seed: int) -> list[Row]:
    """Whether the share of false discoveries exceeds its bound at any of five thresholds, or its expected value."""
    worlds, levels, q = 80 * scale, (2.0, 2.5, 3.0, 3.5, 4.0), 0.05
    broken = naive = 0
    for w in range(worlds):
        random = np.random.default_rng([seed, 23, w])
        d, true = _dependent(random, 60, 200, 0.1, 0.8)
        joint = max_t(d, n_resamples=499, seed=w, step_down=False, thresholds=levels)
        bound = fdp_bound(joint.exceedances, levels, alpha=ALPHA)
        with np.errstate(invalid="ignore"):
            beyond = np.abs(np.nan_to_num(joint.statistic))[None] >= np.array(levels)[:, None]
        share = (beyond & ~true).sum(axis=1) / np.maximum(1, beyond.sum(axis=1))
        broken += bool((share > bound.fdp_upper + 1e-9).any())
        expected = (~true).sum() * 2 * stats.norm.sf(levels) / np.maximum(1, beyond.sum(axis=1))
        naive += bool((share > expected + 1e-9).any())
    return [
        rate_row(
            "share of false discoveries above its bound",
            q,
            broken,
            worlds,
            f"{worlds:,} families of 200 features, 60 prompts, 5 thresholds at once",
            at_most=True,
            naive=naive / worlds,
            naive_name="expected share of a normal null",
        )
    ]


def stable_by_chance(scale: int, seed: int) -> list[Row]:
    """Features called stable where no feature of RL differs from base: their number against its bound."""
    stable, leading, bound = [], [], float("nan")
    for w in range(10 * scale):
        plan = Simulation(
            n_prompts=240,
            n_features=200,
            drifting=0,
            generalising=0,
            narrow=0,
            decoys=0.2,
            runs=1,
            checkpoints=1,
            correlation=0.5,
            cluster_size=1,
            icc=0,
            gain=0.1,
            seed=seed + w,
        )
        world = simulate_features(plan)
        found = select_features(
            world.features,
            world.outcomes,
            target="rl1@20",
            tests=SelectionTests(min_discordant=3, n_resamples=9, n_bootstrap=1),
            stability=StabilityOptions(n_per_half=8, threshold=0.75),
        )
        if found.attrs["stability_q"]:
            stable.append(float(found.attrs["n_stable"]))
            bound = float(found.attrs["stability_bound_mb"])
            leading.append(float(found.attrs["stability_q"]))
    return [
        mean_row(
            "features stable by chance",
            bound,
            stable,
            f"{len(stable):,} worlds of 200 features, 240 prompts",
            at_most=True,
            naive=float(np.mean(leading)),
            naive_name="the leading features, taken for a finding",
        )
    ]
