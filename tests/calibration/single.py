"""Experiments on one test or interval at a time: p-values, units, coverage, equivalence."""

from __future__ import annotations

from unittest import mock

import numpy as np
from scipy import stats

from rlgen_stats.toolkit.statistics.kernels import bootstrap_t, sign_flip_test, tost_chain
from rlgen_stats.toolkit.statistics.kernels.intervals import bootstrap
from rlgen_stats.toolkit.statistics.kernels.intervals.bootstrap import MIN_NONZERO
from tests.calibration.rows import Row, rate_row

ALPHA = 0.05


def sign_flip_uniform(scale: int, seed: int) -> list[Row]:
    """Type-I error of every method of the sign-flip test, on zero-inflated heavy-tailed symmetric differences."""
    naive_name = "normal tail of the flips"
    rows = []
    for name, n, density, level, n_features, draw, options in (
        ("enumeration, 12 of 60 prompts firing", 60, 0.2, ALPHA, 4000, _heavy, {"method": "auto"}),
        ("lattice", 200, 0.4, ALPHA, 2000, _lattice, {"method": "auto"}),
        ("saddlepoint", 200, 0.3, ALPHA, 4000, _heavy, {"method": "saddlepoint"}),
        ("saddlepoint, far tail", 200, 0.3, 0.002, 20_000, _heavy, {"method": "saddlepoint"}),
        ("Monte-Carlo, 999 flips", 60, 0.2, ALPHA, 4000, _heavy, {"method": "monte-carlo", "n_resamples": 999}),
    ):
        hits, naive, block = 0, 0, 2000
        for start in range(0, n_features * scale, block):
            random = np.random.default_rng([seed, n, int(100 * density), start])
            firing = np.repeat(np.arange(n)[:, None] < round(density * n), block, axis=1)
            d = draw(random, (n, block)) * random.permuted(firing, axis=0)
            hits += int((np.asarray(sign_flip_test(d, seed=seed, **options).p_value) <= level).sum())
            z = np.abs(d.sum(axis=0)) / np.sqrt(np.square(d).sum(axis=0))
            naive += int((2 * stats.norm.sf(z) <= level).sum())
        total = n_features * scale
        naive_options = {"naive": naive / total, "naive_name": naive_name} if draw is _heavy and level * n < 3.1 else {}
        size = f"{total:,} features, {n} prompts, {density:.0%} firing"
        rows.append(rate_row(f"sign flip, {name}: p <= {level}", level, hits, total, size, **naive_options))
    return rows


def _heavy(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return random.standard_t(2.0, shape)


def _lattice(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    # Wide enough that ties at the critical value weigh little, narrow enough for the convolution.
    return random.choice([-1.0, 1.0], shape) * random.integers(1, 60, shape)


def clusters(scale: int, seed: int) -> list[Row]:
    """Prompts that share a template are flipped together."""
    n_features, n_clusters, size = 1500 * scale, 40, 5
    random = np.random.default_rng([seed, 1])
    code = np.repeat(np.arange(n_clusters), size)
    shared = random.standard_normal((n_clusters, n_features))[code]
    d = np.sqrt(0.3) * shared + np.sqrt(0.7) * random.standard_normal((len(code), n_features))
    d *= (random.random((n_clusters, n_features)) < 0.5)[code]
    p = np.asarray(sign_flip_test(d, clusters=code).p_value)
    naive = np.asarray(sign_flip_test(d).p_value)
    return [
        rate_row(
            "sign flip of whole clusters (ICC .3)",
            ALPHA,
            int((p <= ALPHA).sum()),
            n_features,
            f"{n_features:,} features, {n_clusters} clusters of {size}",
            naive=float((naive <= ALPHA).mean()),
            naive_name="prompts flipped one by one",
        )
    ]


def token_unit(scale: int, seed: int) -> list[Row]:
    """200 prompts of 64 tokens, intraclass correlation .05: prompts against tokens as units."""
    n_prompts, n_tokens, icc, block = 200, 64, 0.05, 50
    n_features = 500 * scale
    hits = np.zeros(2, dtype=np.int64)
    for start in range(0, n_features, block):
        random = np.random.default_rng([seed, 2, start])
        token = np.sqrt(1 - icc) * random.standard_normal((n_prompts, n_tokens, block))
        token += np.sqrt(icc) * random.standard_normal((n_prompts, 1, block))
        by_prompt = sign_flip_test(token.mean(axis=1)).p_value
        by_token = sign_flip_test(token.reshape(-1, block)).p_value
        hits += [int((np.asarray(p) <= ALPHA).sum()) for p in (by_prompt, by_token)]
    return [
        rate_row(
            "unit is the prompt",
            ALPHA,
            int(hits[0]),
            n_features,
            f"{n_features:,} features, {n_prompts} prompts of {n_tokens} tokens, ICC .05",
            naive=hits[1] / n_features,
            naive_name="token as unit",
        )
    ]


def coverage(scale: int, seed: int) -> list[Row]:
    """Intervals of a zero-inflated mean: the nonzero prompts are normal, or skewed."""
    n_features, n = 1000 * scale, 200
    rows = []
    for shape in ("normal", "skewed"):
        for nonzero in (10, 25, 100):
            rate = _covered(shape, nonzero, n, n_features, seed)
            naive_options: dict[str, object] = {}
            if nonzero == MIN_NONZERO:
                naive_options = {
                    "naive": _covered(shape, 5, n, n_features, seed, fewest=2),
                    "naive_name": "interval given although only 5 prompts are not zero",
                }
            rows.append(
                rate_row(
                    f"bootstrap-t interval, {shape}, {nonzero} of {n} prompts not zero",
                    0.95,
                    round(rate * n_features),
                    n_features,
                    f"{n_features:,} features, 999 draws",
                    known="few prompts that are not zero" if nonzero < 100 else "",
                    **naive_options,
                )
            )
    return rows


def _covered(shape: str, nonzero: int, n: int, n_features: int, seed: int, fewest: int = MIN_NONZERO) -> float:
    """Share of intervals that hold the mean; standard deviation 1, or 1.41 with skewness 1.41, where not zero."""
    inside, block = 0, 1000
    for start in range(0, n_features, block):
        random = np.random.default_rng([seed, 3, nonzero, len(shape), start])
        size = (nonzero, block)
        x = np.zeros((n, block))
        x[:nonzero] = 0.3 + (random.standard_normal(size) if shape == "normal" else random.gamma(2.0, 1.0, size) - 2)
        with mock.patch.object(bootstrap, "MIN_NONZERO", fewest):
            result = bootstrap_t(x, n_resamples=999, seed=seed + start)
        truth = nonzero / n * 0.3
        inside += int(((np.asarray(result.low) <= truth) & (truth <= np.asarray(result.high))).sum())
    return inside / n_features


def stabilisation(scale: int, seed: int) -> list[Row]:
    """A feature exactly one margin away from its final value at checkpoint 1, and equal to it from checkpoint 2 on."""
    n_features = 2000 * scale
    rows = []
    for name, n, relative in (
        ("few prompts", 30, False),
        ("many prompts", 400, False),
        ("margin half the total change", 600, True),
    ):
        random = np.random.default_rng([seed, 5, n])
        means = np.array([1.0, 0.5, 0.0, 0.0]) if relative else np.array([2.0, 0.5, 0.0, 0.0])
        x = random.standard_normal((n, len(means), n_features))
        x[:, 0] *= 3.0 if relative else 1.0  # base varies more, so the estimated margin is imprecise
        x += means[:, None]
        at = tost_chain(x, margin=0.5, alpha=ALPHA, relative=relative).stabilized_at
        d = x[:, 1] - x[:, -1]
        if relative:
            room = 0.5 * np.abs((x[:, 0] - x[:, -1]).mean(axis=0)) - np.abs(d.mean(axis=0))
            p = stats.t.sf(room / (d.std(axis=0, ddof=1) / np.sqrt(n)), n - 1)
            naive, naive_name = float((p <= ALPHA).mean()), "estimated margin taken as known"
        else:
            naive = float((stats.ttest_1samp(d, 0.0, axis=0).pvalue > ALPHA).mean())
            naive_name = "stable while not significantly different"
        rows.append(
            rate_row(
                f"stabilised one checkpoint too early, {name}",
                ALPHA,
                int((np.asarray(at) <= 1).sum()),
                n_features,
                f"{n_features:,} features, {n} prompts",
                at_most=n < 100,
                **({} if n == 400 else {"naive": naive, "naive_name": naive_name}),
            )
        )
    return rows
