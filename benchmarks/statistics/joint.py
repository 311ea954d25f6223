"""Sign flips of all features at once against the tools people use for them, and our sparse path against our dense one.

One-sample data, all tools with the same numbers of units, features and flips; what they take is measured whole, since
a part of the flips scaled up would count their set-up as often. P-values must agree within Monte-Carlo error before
anything is timed.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from threadpoolctl import ThreadpoolController

from rlgen_stats.toolkit.statistics.kernels import max_t, max_t_p_value, sign_flip_test, sign_flips
from rlgen_stats.toolkit.statistics.kernels.flips import maxt

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Case, interleaved, read_options, scratch, spread
from reports import Goal, report

try:
    from nilearn.mass_univariate import permuted_ols
except ImportError:
    permuted_ols = None
try:
    from mne.stats import permutation_t_test
except ImportError:
    permutation_t_test = None

FLIPS: Final = 1000
DENSE: Final = {False: (500, 8192), True: (60, 256)}
SPARSE: Final = {False: (10_000, 4096), True: (400, 256)}
LARGE: Final = {False: (10_000, 32_768), True: (400, 1024)}
SADDLE: Final = {False: (1000, 32_768), True: (200, 1024)}
DENSITY: Final = 0.05
THREADS: Final = int(os.environ.get("OMP_NUM_THREADS", "2"))
"""What every tool gets."""
BLAS: Final = ThreadpoolController()
"""Looked up once: one thread of ours is one thread, and two are two, not two times two."""
PART: Final = 2048
"""Features a thread takes at once: what dask would hand it."""
GOALS: Final = {
    "nilearn permuted_ols": 80.0,
    "mne permutation_t_test": 10.0,
    "scipy permutation_test": 200.0,
    "signs @ X, float32": 0.8,
}
OURS: Final = "this package, max_t"
DEFAULT: Final = "this package, sign_flip_test as it comes"


def dense(shape: tuple[int, int]) -> NDArray[np.float64]:
    """Normal differences, a tenth of the features shifted."""
    generator = np.random.default_rng(0)
    return generator.standard_normal(shape) + 0.15 * (np.arange(shape[1]) % 10 == 0)


def sparse(shape: tuple[int, int]) -> NDArray[np.float32]:
    """Differences of which one in twenty is not zero."""
    generator = np.random.default_rng(1)
    found = np.zeros(shape, np.float32)
    for row in found:
        there = generator.random(shape[1]) < DENSITY
        row[there] = generator.standard_normal(int(there.sum()))
    return found


def joint(d: NDArray[np.floating[Any]], flips: int) -> NDArray[np.float64]:
    """Family-wise p-values of ours, of one block of features."""
    with BLAS.limit(limits=1):
        return max_t(d, n_resamples=flips, step_down=False, unadjusted=False).p_single_step


def product(d: NDArray[np.floating[Any]], flips: int) -> NDArray[np.float64]:
    """The same numbers as everyone computes them: signs times differences, a block of features at a time."""
    return _product(d, sign_flips(len(d), 0, flips, seed=0), np.float64)[1]


def plain(d: NDArray[np.floating[Any]], flips: int) -> NDArray[np.float64]:
    """Family-wise p-values from one product in float32, as one would write it."""
    signs = 2 * np.random.default_rng(0).integers(0, 2, (flips, len(d)), dtype=np.int8) - 1
    statistic, maxima = _product(d, signs, np.float32)
    return (1 + (maxima[:, None] >= statistic).sum(axis=0)) / (1 + flips)


def _product(
    d: NDArray[np.floating[Any]], signs: NDArray[Any], dtype: type[np.floating[Any]]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Statistic of every feature, and the largest of every flip."""
    signs, statistic, maxima = signs.astype(dtype), [], np.zeros(len(signs), dtype)
    for at in range(0, d.shape[1], PART):
        part = d[:, at : at + PART].astype(dtype)
        part /= np.sqrt(np.square(part).sum(axis=0))
        statistic.append(np.abs(part.sum(axis=0)))
        sums = signs @ part
        np.maximum(maxima, np.abs(sums, out=sums).max(axis=1), out=maxima)
    return np.concatenate(statistic), maxima


def nilearn(d: NDArray[np.float64], flips: int) -> NDArray[np.float64]:
    """Family-wise p-values of nilearn: sign swaps, because the tested variable is the intercept."""
    found = permuted_ols(
        np.ones((len(d), 1)),
        d,
        model_intercept=False,
        n_perm=flips,
        two_sided_test=True,
        random_state=0,
        verbose=0,
        n_jobs=THREADS,
    )
    return np.asarray(10.0 ** -(found["logp_max_t"] if isinstance(found, dict) else found[0])[0])


def mne(d: NDArray[np.float64], flips: int) -> NDArray[np.float64]:
    """Family-wise p-values of MNE."""
    return np.asarray(permutation_t_test(d, n_permutations=flips, rng=0, verbose="error")[1])


def scipy(d: NDArray[np.float64], flips: int) -> NDArray[np.float64]:
    """Per-feature p-values of scipy."""
    found = stats.permutation_test(
        (d,), lambda x, axis: np.abs(x.mean(axis=axis)), alternative="greater", permutation_type="samples",
        vectorized=True, n_resamples=flips, batch=1, axis=0, rng=np.random.default_rng(0),
    )  # fmt: skip
    return np.asarray(found.pvalue)


def threaded(d: NDArray[np.floating[Any]], flips: int) -> NDArray[np.float64]:
    """Blocks of features on several threads, their maxima combined, as the labelled functions do it."""
    if THREADS == 1:
        return joint(d, flips)
    parts = [d[:, at : at + PART] for at in range(0, d.shape[1], PART)]
    with ThreadPoolExecutor(THREADS) as pool, BLAS.limit(limits=1):
        found = list(pool.map(lambda part: max_t(part, n_resamples=flips, step_down=False, unadjusted=False), parts))
    maxima = np.max([one.maxima for one in found], axis=0)
    return max_t_p_value(np.concatenate([one.statistic for one in found]), maxima)


def without_sparse(d: NDArray[np.float32]) -> NDArray[np.float64]:
    """The same test through dense products."""
    limit, maxt.SPARSE_DENSITY = maxt.SPARSE_DENSITY, 0.0  # type: ignore[misc]
    try:
        return joint(d, FLIPS)
    finally:
        maxt.SPARSE_DENSITY = limit  # type: ignore[misc]


def check(d: NDArray[np.float64], peers: dict[str, Callable[..., NDArray[np.float64]]]) -> dict[str, float]:
    """Largest difference between our p-values and each tool's, in standard errors of two Monte-Carlo runs."""
    small, flips = d[:, :200], 400
    ours = max_t(small, n_resamples=flips, step_down=False)
    found = {}
    for name, run in peers.items():
        p = ours.p_raw if name.startswith("scipy") else ours.p_single_step
        theirs = run(small, flips)
        middle = np.clip((p + theirs) / 2, 1 / flips, 1 - 1 / flips)
        error = np.sqrt(2 * middle * (1 - middle) / flips)
        found[name] = float(np.max(np.abs(theirs - p) / error))
        if found[name] > 6:
            raise SystemExit(f"{name} gives other p-values: {found[name]:.1f} standard errors apart.")
    return found


def main() -> None:
    options = read_options(__doc__ or "")
    warnings.filterwarnings("ignore")
    d = dense(DENSE[options.quick])
    peers: dict[str, Callable[..., NDArray[np.float64]]] = {"scipy permutation_test": scipy}
    peers |= {"nilearn permuted_ols": nilearn} if permuted_ols is not None else {}
    peers |= {"mne permutation_t_test": mne} if permutation_t_test is not None else {}
    peers["signs @ X, float32"] = plain
    apart = check(d, peers)
    few, many, wide = sparse(SPARSE[options.quick]), sparse(LARGE[options.quick]), sparse(SADDLE[options.quick])
    cases = [Case(OURS, lambda _: threaded(d, FLIPS)), Case(DEFAULT, lambda _: sign_flip_test(d))]
    cases += [Case(name, lambda _, name=name: peers[name](d, FLIPS)) for name in peers]
    cases += [
        Case("sparse path", lambda _: joint(few, FLIPS)),
        Case("dense path", lambda _: without_sparse(few)),
        Case("matrix product", lambda _: product(few, FLIPS)),
        Case("max-T of many", lambda _: threaded(many, FLIPS)),
        Case("saddlepoint", lambda _: sign_flip_test(wide)),
    ]
    with scratch(options) as folder:
        seconds = {
            name: spread(values) for name, values in interleaved(cases, options.repetitions, options.clock).items()
        }
        sizes = dict.fromkeys([OURS, DEFAULT, *peers], DENSE)
        sizes |= dict.fromkeys(["sparse path", "dense path", "matrix product"], SPARSE)
        sizes |= {"max-T of many": LARGE, "saddlepoint": SADDLE}
        rows = [
            {"what": name, "units x features": "{:,} x {:,}".format(*sizes[name][options.quick])}
            | {"density": 1.0 if sizes[name] is DENSE else DENSITY, "s": found["median"], "low": found["low"]}
            | {
                "high": found["high"],
                "of ours": found["median"] / seconds[OURS]["median"] if sizes[name] is DENSE else None,
            }
            | {"p-values apart (SE)": apart.get(name)}
            for name, found in seconds.items()
        ]
        median = {name: found["median"] for name, found in seconds.items()}
        goals = [Goal(f"{name}, times as long as ours", median[name] / median[OURS], GOALS[name]) for name in peers]
        goals += [
            Goal("dense path, times as long as the sparse path", median["dense path"] / median["sparse path"], 3.0),
            Goal(
                "matrix product, times as long as the sparse path",
                median["matrix product"] / median["sparse path"],
                3.0,
            ),
            Goal("max-T of 32,768 x 10,000, s", median["max-T of many"], 10.0, at_least=False),
            Goal("saddlepoint of 32,768 x 1,000, s", median["saddlepoint"], 1.0, at_least=False),
        ]
        report(options, folder, "joint", settings={"flips": FLIPS, "threads": THREADS}, rows=rows, goals=goals)


if __name__ == "__main__":
    main()
