"""The paper's selection rule and the two nulls for the size of its intersection.

Score_k = E[f_target - f_base] over the prompts of a task that base gets wrong and the target right; keep features with
at least a fifth of the task's largest score; intersect over tasks (Shi et al. 2026, arXiv:2604.25011).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import dask.array as da
import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics.core.feature_blocks import Block, map_features
from rlgen_stats.toolkit.statistics.kernels import sign_flips
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray

N_BINS: Final = 5
"""Quantile bins of firing frequency and of scale; 25 strata keep tens of features each in dictionaries of 1,000."""

MAX_GRAM_PROMPTS: Final = 1000
"""Most prompts in the Gram matrix that gives the rank of the shift; its memory grows with their square."""


@dataclass(frozen=True, kw_only=True)
class PaperSelection:
    """What the rule selects on the selection prompts of the estimable tasks, and both nulls of its size."""

    scores: FloatArray
    """[task, feature]: mean difference on base-wrong/target-right prompts."""
    kept: NDArray[np.bool_]
    """[task, feature]: score at or above the task's threshold."""
    selected: NDArray[np.bool_]
    """[feature]: kept in every task."""
    p_n1: float
    """Chance of an intersection at least this large when the labels of every prompt are flipped at random."""
    p_n2: float
    """The same when features are relabelled within strata of frequency and scale, task by task."""
    n1: IntArray
    """Sizes of the intersection under N1."""
    n2: IntArray
    """Sizes of the intersection under N2."""


def paper_rule(
    values: da.Array,
    firing: da.Array,
    prompts: dict[str, IntArray],
    *,
    score_fraction: float,
    n_resamples: int,
    seed: int,
    clusters: IntArray | None = None,
) -> PaperSelection:
    """Apply the rule to the base-wrong/target-right prompts of each task, and again under both nulls.

    Parameters
    ----------
    values, firing
        [2 (base, target), prompt, feature], contribution scale and firing share.
    prompts
        Task -> indices of its base-wrong/target-right prompts; at least one task, none empty.
    score_fraction
        Share of the task's largest score a kept feature needs.
    n_resamples, seed
        Draws of each null, and their seed.
    clusters
        Code per prompt; labels are flipped by cluster.

    Notes
    -----
    N1 tests "no model difference on these prompts". It carries no guard against the selection of prompts by outcome:
    where activation and correctness correlate, its sizes and its p-value are too small. N2 draws from the sequential
    hypergeometric, which is the distribution that permuting ids within strata gives.
    """
    weights = _flipped_weights(prompts, values.shape[1], n_resamples, seed, clusters)
    tasks = list(prompts)
    shape = (n_resamples + 1, len(tasks))
    # Two passes: thresholds depend on the largest score over all features, so no block can decide what is kept.
    scores_pass = map_features(
        _scores_and_maxima,
        [values, firing],
        outputs={"score": (len(tasks),), "frequency": (), "scale": ()},
        states={"maxima": (shape, da.max)},
        prompts=prompts,
        weights=weights,
    )
    score, frequency, scale, maxima = da.compute(*scores_pass.features.values(), scores_pass.states["maxima"])
    kept_pass = map_features(
        _kept_everywhere,
        [values],
        outputs={"kept": (len(tasks),)},
        states={"sizes": ((n_resamples + 1,), da.sum)},
        prompts=prompts,
        weights=weights,
        thresholds=np.where(maxima > 0, score_fraction * maxima, np.inf),
    )
    kept, sizes = da.compute(kept_pass.features["kept"], kept_pass.states["sizes"])
    kept = np.asarray(kept) == 1
    n1 = np.asarray(sizes, dtype=np.int64)[1:]  # row 0 is the observed labelling
    n2 = n2_sizes(kept, strata(frequency, scale), n_resamples, derive_seed(seed, "selection", "n2"))
    selected = kept.all(axis=0)
    return PaperSelection(
        scores=np.asarray(score, dtype=np.float64),
        kept=kept,
        selected=selected,
        p_n1=_p_value(n1, selected),
        p_n2=_p_value(n2, selected),
        n1=n1,
        n2=n2,
    )


def _p_value(null_sizes: IntArray, selected: NDArray[np.bool_]) -> float:
    """Chance of a set at least as large under a null, the observed one among the draws."""
    return (1 + int((null_sizes >= int(selected.sum())).sum())) / (len(null_sizes) + 1)


def _flipped_weights(
    prompts: dict[str, IntArray], n_prompts: int, n_resamples: int, seed: int, clusters: IntArray | None
) -> dict[str, FloatArray]:
    """Task -> weights [1 + resample, prompt] whose product with D is the score; row 0 is the observed labelling."""
    units = np.arange(n_prompts) if clusters is None else clusters
    signs = sign_flips(int(units.max()) + 1, 0, n_resamples, seed=derive_seed(seed, "selection", "n1"))
    signs = np.vstack([np.ones(signs.shape[1]), signs])
    return {task: signs[:, units[index]] / len(index) for task, index in prompts.items()}


def _scores_and_maxima(
    values: NDArray[Any], firing: NDArray[Any], *, prompts: dict[str, IntArray], weights: dict[str, FloatArray]
) -> Block:
    d = values[1].astype(np.float64) - values[0]
    scores = np.stack([weights[task] @ d[index] for task, index in prompts.items()], axis=1)
    return {
        "score": scores[0],
        "maxima": scores.max(axis=2),
        "frequency": (firing > 0).mean(axis=(0, 1)),
        "scale": np.sqrt(np.square(values.astype(np.float64)).mean(axis=(0, 1))),
    }


def _kept_everywhere(
    values: NDArray[Any], *, prompts: dict[str, IntArray], weights: dict[str, FloatArray], thresholds: FloatArray
) -> Block:
    """Features kept in each task, and the size of the intersection under every labelling; thresholds [draw, task]."""
    d = values[1].astype(np.float64) - values[0]
    everywhere = np.ones((len(thresholds), d.shape[1]), dtype=bool)
    kept = np.empty((len(prompts), d.shape[1]))
    for t, (task, index) in enumerate(prompts.items()):
        above = weights[task] @ d[index] >= thresholds[:, t, None]
        kept[t] = above[0]
        everywhere &= above
    return {"kept": kept, "sizes": everywhere.sum(axis=1).astype(np.float64)}


def strata(frequency: FloatArray, scale: FloatArray) -> IntArray:
    """Stratum of every feature: quantile bins of frequency times quantile bins of scale; silent features apart."""
    codes = np.zeros(len(frequency), dtype=np.int64)
    alive = frequency > 0
    if alive.any():
        bins = [_bins(x[alive]) for x in (frequency, scale)]
        codes[alive] = 1 + bins[0] * N_BINS + bins[1]
    return np.unique(codes, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _bins(x: FloatArray) -> IntArray:
    edges = np.quantile(x, np.linspace(0, 1, N_BINS + 1)[1:-1])
    return np.searchsorted(edges, x, side="right").astype(np.int64)


def n2_sizes(kept: NDArray[np.bool_], codes: IntArray, n_resamples: int, seed: int) -> IntArray:
    """Sizes of the intersection when ids are permuted within strata, independently in each task.

    Within a stratum of n features, m_1 are kept in the first task; of those the second task hits
    Hypergeometric(m_1, n - m_1, m_2), and so on.
    """
    rng = np.random.default_rng(seed)
    size = np.bincount(codes)
    n_kept = np.stack([np.bincount(codes, weights=row, minlength=len(size)) for row in kept]).astype(np.int64)
    common = np.broadcast_to(n_kept[0], (n_resamples, len(size))).copy()
    for m in n_kept[1:]:
        common = rng.hypergeometric(common, size - common, m)
    return np.asarray(common.sum(axis=1), dtype=np.int64)


def score_correlation(scores: FloatArray) -> FloatArray:
    """Correlation of scores between tasks over features, [task, task]; NaN where a task's scores are constant."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.atleast_2d(np.corrcoef(scores))


def shift_rank(values: da.Array, seed: int) -> tuple[float, float]:
    """Effective rank of the shift target - base over prompts x features, and the share of its first direction.

    Participation ratio (sum l)^2 / sum l^2 of the squared singular values l of the uncentred shift: 1 means that one
    direction explains all of it, so that scores of all tasks must agree.
    """
    n = values.shape[1]
    if n > MAX_GRAM_PROMPTS:
        sample = np.random.default_rng(derive_seed(seed, "selection", "gram")).permutation(n)[:MAX_GRAM_PROMPTS]
        values = values[:, np.sort(sample)]
        n = MAX_GRAM_PROMPTS
    gram = map_features(_gram, [values], outputs={}, states={"gram": ((n, n), da.sum)}).states["gram"].compute()
    spectrum = np.clip(np.linalg.eigvalsh(gram), 0.0, None)
    total = float(spectrum.sum())
    if total <= 0:
        return float("nan"), float("nan")
    return total**2 / float(np.square(spectrum).sum()), float(spectrum[-1]) / total


def _gram(values: NDArray[Any]) -> Block:
    d = values[1].astype(np.float64) - values[0]
    return {"gram": d @ d.T}
