"""Slow, obvious algorithms: what each estimator means, in loops over units, flips and subsets.

They share no code with the package, and are fit for small inputs only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
SLACK = 1e-9


def every_flip(n: int) -> Iterable[tuple[int, ...]]:
    return itertools.product((1, -1), repeat=n)


def sign_flip_p(d: Sequence[float], alternative: str = "two-sided") -> float:
    """Share of all 2^N flips (zeros included) whose sum is as extreme as the observed one."""
    d = [float(x) for x in d]
    slack = SLACK * max(1.0, sum(abs(x) for x in d))

    def extremity(values: Iterable[float]) -> float:
        s = math.fsum(values)
        return {"two-sided": abs(s), "greater": s, "less": -s}[alternative]

    observed = extremity(d)
    reached = [
        extremity(e * x for e, x in zip(flip, d, strict=True)) >= observed - slack for flip in every_flip(len(d))
    ]
    return sum(reached) / len(reached)


def half_sums_p(d: Floats) -> float:
    """Exact two-sided p of up to some 34 nonzeros: all sums of one half against all sums of the other."""
    nonzero = [abs(float(x)) for x in d if x != 0]
    half = len(nonzero) // 2

    def sums(values: Sequence[float]) -> Floats:
        out = np.zeros(1)
        for value in values:
            out = np.concatenate([out + value, out - value])
        return np.sort(out)

    first, second = sums(nonzero[:half]), sums(nonzero[half:])
    observed = abs(math.fsum(d)) - SLACK * sum(nonzero)
    reached = len(first) * len(second) - np.searchsorted(first, observed - second, side="left").sum()
    return min(1.0, 2.0 * reached / 2.0 ** len(nonzero))


def max_t_p(d: Floats) -> tuple[list[float], list[float], list[float]]:
    """Single-step, step-down and raw p-values over all flips, from the definitions (Westfall and Young)."""
    n, n_features = d.shape

    def statistics(flip: Sequence[int]) -> list[float]:
        return [
            abs(math.fsum(flip[i] * d[i, k] for i in range(n))) / math.sqrt(math.fsum(d[i, k] ** 2 for i in range(n)))
            for k in range(n_features)
        ]

    observed = statistics([1] * n)
    table = [statistics(flip) for flip in every_flip(n)]
    single = [sum(max(row) >= observed[k] - SLACK for row in table) / len(table) for k in range(n_features)]
    raw = [sum(row[k] >= observed[k] - SLACK for row in table) / len(table) for k in range(n_features)]
    order = sorted(range(n_features), key=lambda k: -observed[k])
    down, floor = [0.0] * n_features, 0.0
    for place, k in enumerate(order):
        left = order[place:]
        floor = max(floor, sum(max(row[j] for j in left) >= observed[k] - SLACK for row in table) / len(table))
        down[k] = floor
    return single, down, raw


def bh(p: Sequence[float], weight: float = 1.0) -> list[float]:
    """For each p-value the smallest level at which step-up rejects it."""
    n = len(p)
    ordered = sorted(p)
    return [min(1.0, min(weight * n * ordered[j] / (j + 1) for j in range(n) if ordered[j] >= x)) for x in p]


def by(p: Sequence[float]) -> list[float]:
    return bh(p, sum(1 / k for k in range(1, len(p) + 1)))


def bky(p: Sequence[float], alpha: float) -> list[float]:
    """Two stages: BH at a/(1+a) estimates the number of nulls, BH again with it."""
    first = sum(q <= alpha / (1 + alpha) for q in bh(p))
    n_null = len(p) - first if 0 < first < len(p) else len(p)
    return [min(1.0, (1 + alpha) * n_null / len(p) * q) for q in bh_unbounded(p)]


def bh_unbounded(p: Sequence[float]) -> list[float]:
    n, ordered = len(p), sorted(p)
    return [min(n * ordered[j] / (j + 1) for j in range(n) if ordered[j] >= x) for x in p]


def holm(p: Sequence[float]) -> list[float]:
    order, out, floor = sorted(range(len(p)), key=lambda i: p[i]), [0.0] * len(p), 0.0
    for place, i in enumerate(order):
        floor = max(floor, min(1.0, (len(p) - place) * p[i]))
        out[i] = floor
    return out


def hommel(p: Sequence[float]) -> list[float]:
    """Closed testing: the largest Simes p-value of all subsets that hold the hypothesis."""
    out = []
    for i in range(len(p)):
        rest = [x for j, x in enumerate(p) if j != i]
        worst = 0.0
        for size in range(len(rest) + 1):
            for subset in itertools.combinations(rest, size):
                s = sorted([p[i], *subset])
                worst = max(worst, min(len(s) * x / (j + 1) for j, x in enumerate(s)))
        out.append(min(1.0, worst))
    return out


def endless_rbo(first: Sequence[object], second: Sequence[object], persistence: float) -> float:
    """Sum over depths, long enough that the rest is below rounding."""
    total = 0.0
    for depth in range(1, len(first) + 1):
        total += persistence ** (depth - 1) * len(set(first[:depth]) & set(second[:depth])) / depth
    return (1 - persistence) * total


def nogueira_pairs(rows: Sequence[Sequence[int]]) -> float:
    """Mean over pairs of (overlap - chance) / (mean size - chance), which the variance form equals."""
    n, size = len(rows[0]), sum(map(sum, rows)) / len(rows)
    pairs = list(itertools.combinations(rows, 2))
    shared = sum(sum(a * b for a, b in zip(x, y, strict=True)) for x, y in pairs) / len(pairs)
    return (shared - size**2 / n) / (size - size**2 / n)


def overlap_p(shared: int, n: int, size_a: int, size_b: int) -> float:
    """Count of draws, in whole numbers."""
    ways = sum(math.comb(size_a, j) * math.comb(n - size_a, size_b - j) for j in range(shared, min(size_a, size_b) + 1))
    return ways / math.comb(n, size_b)


def mcnemar_p(b: int, c: int) -> tuple[float, float]:
    """Exact and mid-p from whole-number binomial sums."""
    n, k = b + c, min(b, c)
    tail = 2 * sum(math.comb(n, j) for j in range(k + 1)) / 2**n
    return min(1.0, tail), min(1.0, tail - math.comb(n, k) / 2**n)


def clustered_error(y: Sequence[float], clusters: Sequence[object], small_sample: bool) -> float:
    """Square root of the sum over all pairs of units in one cluster of their residuals' product, over N^2."""
    mean = sum(y) / len(y)
    pairs = itertools.product(range(len(y)), repeat=2)
    variance = sum((y[i] - mean) * (y[j] - mean) for i, j in pairs if clusters[i] == clusters[j]) / len(y) ** 2
    g = len(set(clusters))
    return math.sqrt(variance * (g / (g - 1) if small_sample else 1.0))


def tost_p(d: Floats, low: float, high: float) -> float:
    return max(
        stats.ttest_1samp(d, low, alternative="greater").pvalue, stats.ttest_1samp(d, high, alternative="less").pvalue
    )


def contrast_p(plus: Floats, minus: Floats, alternative: str) -> float:
    """Every choice of which units are in the first group."""
    pooled, k = [*map(float, plus), *map(float, minus)], len(plus)
    total = sum(pooled)

    def gap(chosen: Sequence[int]) -> float:
        s = sum(pooled[i] for i in chosen)
        value = s / k - (total - s) / (len(pooled) - k)
        return {"two-sided": abs(value), "greater": value, "less": -value}[alternative]

    observed = gap(range(k))
    table = [gap(c) for c in itertools.combinations(range(len(pooled)), k)]
    return sum(x >= observed - SLACK for x in table) / len(table)


def histogram_p(a: Floats, b: Floats, statistic: str) -> tuple[float, float]:
    """Distance of the mean histograms, and its share over all ways to swap the two of each unit."""

    def distance(pairs: Iterable[tuple[Floats, Floats]]) -> float:
        pairs = list(pairs)
        first, second = (np.mean([pair[side] / pair[side].sum() for pair in pairs], axis=0) for side in (0, 1))
        gaps = [abs(float(first[: k + 1].sum() - second[: k + 1].sum())) for k in range(len(first))]
        return max(gaps) if statistic == "ks" else sum(gaps)

    units = list(zip(a, b, strict=True))
    observed = distance(units)
    table = [
        distance((y, x) if swap < 0 else (x, y) for swap, (x, y) in zip(flip, units, strict=True))
        for flip in every_flip(len(units))
    ]
    return observed, sum(x >= observed - SLACK for x in table) / len(table)


def flip_group(generators: Floats) -> Floats:
    """All products of rows of signs [m, unit], [2**m, unit]; row b multiplies the generators at the set bits of b."""
    patterns = np.ones((2 ** len(generators), generators.shape[1]))
    for b in range(len(patterns)):
        for j in range(len(generators)):
            if b >> j & 1:
                patterns[b] *= generators[j]
    return patterns
