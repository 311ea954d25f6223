"""Which of two runs settles later: mean time to stability of its features, and excess turnover of its top set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import MODEL, RUN, STEP, TRAINED_RUN
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.core.comparability import source_attrs
from rlgen_stats.toolkit.statistics.kernels import pooled_estimates
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray
from rlgen_stats.toolkit.statistics.timing.set_stability import MIN_CEILING
from rlgen_stats.toolkit.statistics.timing.stabilization import CHANGED, STRATA, mean_time, training_share

__all__ = ["MEASURES", "checkpoints_of", "timing_contrast", "training_share", "undescribed_checkpoints"]

MEASURES: Final = ("time", "turnover")
"""Mean time to stability (share of training), and excess turnover averaged over training (share of the top set)."""

SAME_SHARE: Final = 0.05
"""Checkpoints of two runs at shares of training this close are compared with each other."""


def timing_contrast(
    chains: Sequence[xr.Dataset], sets: Sequence[xr.Dataset], *, first: str, second: str, alpha: float = 0.05
) -> xr.Dataset:
    """Second run less first: mean time to stability within strata of total change, and mean excess turnover.

    Parameters
    ----------
    chains, sets
        Layouts ``stabilization`` and ``set_stability`` of each dictionary, with equal checkpoints, units and seeds.
    first, second
        Names of the runs (SFT's and RL's in claim C2).
    alpha
        1 - coverage.

    Returns
    -------
    Dataset
        Layout ``timing_contrast``. [measure]: ``difference`` with ``low``, ``high`` and ``p_value`` (of no difference),
        and by dictionary; [measure, trained_run]: ``value`` of each run with interval; [stratum]: the difference of
        times within it, with interval, and its ``weight``; [stratum, trained_run]: ``stratum_time`` and
        ``n_in_stratum``, means over dictionaries; [node, trained_run]: ``checkpoint``, the pairs compared, with
        ``paper_overlap`` (mean over dictionaries), at ``training_share``, and [node] whether the sets are
        ``determined`` there. NaN where nothing can be compared.

    Raises
    ------
    InputError
        If there is not one set test for each stabilisation test.

    Notes
    -----
    *Pairs.* Both runs are read at the shares of training at which both have a checkpoint (to within ``SAME_SHARE``, and
    nearest to each other), so that neither is read more finely: a finer schedule finds earlier times.

    *Time.* Area over S within a stratum (:func:`mean_time`); strata are combined with the Mantel-Haenszel weights
    n_1 n_2 / (n_1 + n_2), n the numbers of features (mean over dictionaries), fixed before any time is looked at. A
    stratum without features in either run, even in one draw of units, has no weight; features that never left the
    margin have no time.

    *Turnover.* Delta averaged over training, on straight lines between checkpoints, from the first pair at which both
    runs' sets are determined by the prompts (attainable overlap >= .5) in every dictionary; pairs that fail are left
    out.

    *Intervals.* Delete-group jackknife over units shared by both runs (bagged shares: infinitesimal jackknife), with
    the variance between dictionaries (:func:`~rlgen_stats.toolkit.statistics.kernels.pooled_estimates`). The two runs
    are fixed: nothing is said about other seeds of either.

    References
    ----------
    Mantel and Haenszel 1959; common risk difference: Greenland and Robins 1985, doi:10.2307/2530643.
    """
    if not chains or len(chains) != len(sets):
        raise InputError(
            f"expected one stabilisation test and one set test a dictionary, got {len(chains)} and {len(sets)}."
        )
    runs = (first, second)
    pairs, shares = paired_checkpoints(chains[0], first, second)
    times = [_times(chain, pairs, shares) for chain in chains]
    sizes = np.stack([chain["n_in_stratum"].sel({TRAINED_RUN: list(runs)}).values for chain in chains]).mean(axis=0)
    weights = _weights(sizes, np.stack([estimate for estimate, _ in times]))
    determined = _determined(sets, pairs)
    turnover = [_turnover(one, pairs, shares, determined) for one in sets]
    strata = _pooled_runs(times, alpha)
    measures = [_pooled_runs([(_weighted(e, weights), _weighted(r, weights)) for e, r in times], alpha)]
    measures.append(_pooled_runs(turnover, alpha))
    by_run = (TRAINED_RUN, np.array(runs))
    variables: dict[str, tuple[Any, Any]] = {
        name: ("measure", np.stack([getattr(difference, source) for difference, _ in measures]))
        for name, source in {"difference": "mean", "low": "low", "high": "high", "p_value": "p_value"}.items()
    }
    each_mean = np.stack([difference.each_mean for difference, _ in measures])
    variables["dictionary_difference"] = (("measure", "dictionary"), each_mean)
    for name, source in {"value": "mean", "value_low": "low", "value_high": "high"}.items():
        variables[name] = (("measure", TRAINED_RUN), np.stack([getattr(each, source) for _, each in measures]))
    for name, source in {"": "mean", "_low": "low", "_high": "high", "_p": "p_value"}.items():
        variables[f"stratum_difference{name}"] = ("stratum", getattr(strata[0], source))
    variables |= {
        "weight": ("stratum", weights),
        "stratum_time": (("stratum", TRAINED_RUN), strata[1].mean.T),
        "n_in_stratum": (("stratum", TRAINED_RUN), sizes.T),
        "checkpoint": (("node", TRAINED_RUN), np.array(pairs, dtype=np.str_).reshape(-1, 2)),
        "training_share": ("node", shares),
        "determined": ("node", determined),
        "paper_overlap": (("node", TRAINED_RUN), _paper_overlap(sets, pairs)),
    }
    return xr.Dataset(
        variables,
        coords={
            "measure": list(MEASURES),
            TRAINED_RUN: by_run,
            "stratum": list(STRATA),
            "dictionary": np.arange(1, 1 + len(chains)),
        },
        attrs={
            "test": "t test of the difference, jackknife over units and variance between dictionaries",
            "null": "both runs have the same mean time to stability, and the same excess turnover",
            "comparison": f"{second} less {first}",
            "min_attainable": MIN_CEILING,
            "alpha": alpha,
            "seed": chains[0].attrs["seed"],
            "unit": chains[0].attrs["unit"],
            "top_k": sets[0].attrs["top_k"],
            "margin": chains[0].attrs["margin"],
            "margin_unit": chains[0].attrs["margin_unit"],
        }
        | source_attrs(chains[0]),
    )


def undescribed_checkpoints(health: xr.Dataset, dictionaries: Sequence[str]) -> dict[str, float]:
    """Model -> smallest dFVE of these dictionaries, where below the limit: features say nothing about its change.

    ``health`` is the layout of that name; empty where its readouts were not judged, or were accepted as they are.
    """
    if "dfve" not in health:
        return {}
    judged = health.sel(crosscoder=list(dictionaries))
    if "readout_accepted" in judged and bool(judged["readout_accepted"].all()):
        return {}
    lowest = judged["dfve"].min("crosscoder", skipna=True)
    low = np.flatnonzero(lowest.values < float(health.attrs["dfve_min"]))
    return {str(lowest[MODEL].values[i]): float(lowest.values[i]) for i in low}


def checkpoints_of(data: xr.Dataset, run: str) -> xr.Dataset:
    """The checkpoints of one run, by step; an empty ``model`` dimension if the run has none."""
    chosen = data.isel({MODEL: np.flatnonzero(data[RUN].values == run)})
    return chosen.isel({MODEL: np.argsort(chosen[STEP].values, kind="stable")})


def paired_checkpoints(data: xr.Dataset, first: str, second: str) -> tuple[list[tuple[str, str]], FloatArray]:
    """Checkpoints of two runs at about equal shares of training, by share, and the mean share of each pair."""
    each = [checkpoints_of(data, run) for run in (first, second)]
    if not all(one.sizes[MODEL] for one in each):
        return [], np.empty(0)
    shares = [training_share(one[STEP].values) for one in each]
    apart = np.abs(shares[0][:, None] - shares[1])
    pairs = [
        (i, j)
        for i, j in enumerate(apart.argmin(axis=1).tolist())
        if apart[i, j] <= SAME_SHARE + 1e-9 and apart[:, j].argmin() == i
    ]
    names = [(str(each[0][MODEL].values[i]), str(each[1][MODEL].values[j])) for i, j in pairs]
    return names, np.array([(shares[0][i] + shares[1][j]) / 2 for i, j in pairs])


def _of_pairs(data: xr.DataArray, pairs: list[tuple[str, str]]) -> list[xr.DataArray]:
    """Values at each run's checkpoints of the pairs, in their order."""
    return [data.sel({MODEL: list(models)}) for models in zip(*pairs, strict=True)]


def _times(chain: xr.Dataset, pairs: list[tuple[str, str]], shares: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean time to stability [run, stratum] and its replicates [replicate, run, stratum]; NaN where there is none."""
    estimate = np.full((2, len(STRATA)), np.nan)
    replicates = np.full((chain.sizes["replicate"], 2, len(STRATA)), np.nan)
    if len(pairs) > 1:  # the last pair is the end of both runs
        estimate = _run_times(chain["share_in_stratum"], pairs, shares)
        replicates = _run_times(chain["share_in_stratum_replicate"], pairs, shares)
    return estimate, replicates


def _run_times(settled: xr.DataArray, pairs: list[tuple[str, str]], shares: FloatArray) -> FloatArray:
    """[..., run, stratum] from shares settled [..., model, stratum]."""
    each = [mean_time(shares, one.transpose(..., "stratum", MODEL).values) for one in _of_pairs(settled, pairs)]
    times = np.stack(each, axis=-2)
    times[..., : CHANGED.start] = np.nan
    return times


def _weights(sizes: FloatArray, times: FloatArray) -> FloatArray:
    """Mantel-Haenszel weights of the strata, from numbers of features [run, stratum]; 0 where a time is missing."""
    usable = np.isfinite(times).all(axis=(0, 1))
    weights = np.where(usable, sizes.prod(axis=0) / np.maximum(sizes.sum(axis=0), 1), 0.0)
    return weights / weights.sum() if weights.sum() else weights


def _weighted(times: FloatArray, weights: FloatArray) -> FloatArray:
    """Weighted mean over strata; NaN if no stratum counts."""
    counts = weights > 0
    return np.asarray(times[..., counts] @ weights[counts] if counts.any() else np.full(times.shape[:-1], np.nan))


def _determined(sets: Sequence[xr.Dataset], pairs: list[tuple[str, str]]) -> NDArray[np.bool_]:
    """[pair]: whether in every dictionary both runs' sets can be determined from noise, there and at the end."""
    if not pairs:
        return np.zeros(0, dtype=bool)
    lowest = np.min([[run.values for run in _of_pairs(one["attainable"], pairs)] for one in sets], axis=(0, 1))
    return np.asarray((lowest >= MIN_CEILING) & (lowest[-1] >= MIN_CEILING))


def _paper_overlap(sets: Sequence[xr.Dataset], pairs: list[tuple[str, str]]) -> FloatArray:
    """Overlap by the paper's rule at the pairs of checkpoints, mean over dictionaries: [pair, run]."""
    if not pairs:
        return np.empty((0, 2))
    each = [[run.values for run in _of_pairs(one["paper_overlap"], pairs)] for one in sets]
    return np.asarray(np.mean(each, axis=0).T)


def _turnover(
    sets: xr.Dataset, pairs: list[tuple[str, str]], shares: FloatArray, determined: NDArray[np.bool_]
) -> tuple[FloatArray, FloatArray]:
    """Mean excess turnover [run] over the pairs with determined sets, and its replicates [replicate, run]."""
    if determined.sum() < 2:
        return np.full(2, np.nan), np.full((sets.sizes["replicate"], 2), np.nan)
    span = shares[determined][-1] - shares[determined][0]

    def mean(name: str) -> FloatArray:
        each = [run.transpose(..., MODEL).values[..., determined] for run in _of_pairs(sets[name], pairs)]
        return np.stack([np.trapezoid(delta, shares[determined], axis=-1) / span for delta in each], axis=-1)

    return mean("delta"), mean("delta_replicate")


def _pooled_runs(each: Sequence[tuple[FloatArray, FloatArray]], alpha: float) -> tuple[Any, Any]:
    """Difference of the runs (second less first) and their values, pooled over dictionaries.

    ``each`` holds a dictionary's estimate [run(, stratum)] and replicates [replicate, run(, stratum)].
    """
    estimates = np.stack([estimate for estimate, _ in each])
    replicates = np.stack([replicate for _, replicate in each])
    difference = pooled_estimates(
        estimates[:, 1] - estimates[:, 0], jackknife=replicates[:, :, 1] - replicates[:, :, 0], alpha=alpha
    )
    return difference, pooled_estimates(estimates, jackknife=replicates, alpha=alpha)
