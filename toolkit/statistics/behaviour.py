"""What each model gets right, and what it learned and forgot prompt by prompt; reported before any mechanism."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from rlgen_stats.schemas.dims import BASE_MODEL, DOMAIN, MODEL, PROMPT, SAMPLE, TASK
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics.core.coordinates import check_models, model_coords
from rlgen_stats.toolkit.statistics.core.feature_blocks import in_prompt_order
from rlgen_stats.toolkit.statistics.core.units import cluster_codes, cluster_sums
from rlgen_stats.toolkit.statistics.kernels import adjust, cluster_se, mcnemar, sign_flip_test, wilson_interval
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray
from rlgen_stats.toolkit.statistics.kernels.unit_tables import MIN_CLUSTERS

ROLES: Final = ("in_domain", "out_of_domain", "held_out", "control", "pooled")

POOLED: Final = {"all:in": "in", "all:out": "out"}
"""Pooled rows: every task of the domain but the controls, which no model should get better at."""


COUNTS: Final = ("n_prompts", "n_clusters", "kept_right", "forgotten", "gained", "kept_wrong")


def behaviour(
    outcomes: xr.Dataset,
    *,
    reference: str = BASE_MODEL,
    roles: Mapping[str, str] | None = None,
    clusters: str | None = "cluster",
    alpha: float = 0.05,
    seed: int = 0,
    n_bootstrap: int = 999,
) -> xr.Dataset:
    """Accuracy of every model on every task, and the transitions of prompts from the reference.

    Parameters
    ----------
    outcomes
        Layout ``outcomes``. Values below 0 are ungraded and left out.
    reference
        Model every other is compared with.
    roles
        Task -> in_domain, out_of_domain, held_out or control; tasks not named take theirs from ``domain``.
    clusters
        Label of dependent prompts; None, or a label that is unique per prompt, makes prompts the units.
    alpha
        1 - coverage of the intervals.
    seed, n_bootstrap
        Bootstrap of the sampled pass rate.

    Returns
    -------
    xr.Dataset
        Layout ``behaviour`` over model and task, with the pooled tasks ``all:in`` and ``all:out`` (controls left out).
        ``accuracy`` is greedy, ``sampled_accuracy`` the pass rate with ``sampled_low``/``sampled_high``. Also
        ``n_clusters`` and ``p_test`` [task] (which test gave ``p_value``). Small; computed at once.

    Raises
    ------
    InputError
        If the reference, a role's task or a role is unknown.
    RefusedError
        If several rows hold one prompt.

    Notes
    -----
    Greedy accuracy: Wilson where prompts are the units, else Student t with the CR1 cluster error and G-1 degrees of
    freedom (Wilson with G units where that error is 0, which is not the same as certainty). ``p_value``: exact McNemar
    where prompts are the units, else the sign flip of cluster sums, which it equals for clusters of one; NaN below six
    clusters. ``difference`` has the CR1 t interval; where every prompt changed alike, the interval that one more
    discordant unit could not leave. BH over all models but the reference and all tasks (pooled rows: over models and
    pooled rows). Greedy outcomes are deterministic: intervals are over prompts, not over training runs.

    References
    ----------
    McNemar 1947, doi:10.1007/BF02295996; Wilson 1927, doi:10.1080/01621459.1927.10502953.

    Examples
    --------
    >>> behaviour(open_outcomes(path)).accuracy.sel(task="all:out").to_series()  # doctest: +SKIP
    """
    models = [str(model) for model in outcomes[MODEL].values]
    check_models(outcomes, [reference])
    names = [str(name) for name in dict.fromkeys(np.asarray(outcomes[TASK].values).astype(np.str_))]
    outcomes = in_prompt_order(outcomes)
    codes = cluster_codes(outcomes, clusters)
    tasks = _tasks(outcomes, names, roles or {})
    greedy = _graded(outcomes["greedy_correct"].transpose(MODEL, PROMPT).values)
    sampled = _graded(outcomes["correct"].transpose(MODEL, PROMPT, SAMPLE).values)
    n_graded = np.isfinite(sampled).sum(axis=-1)
    passes = np.where(n_graded > 0, np.nansum(sampled, axis=-1) / np.maximum(n_graded, 1), np.nan)
    base = greedy[models.index(reference)]
    cells: dict[str, list[list[float]]] = {}
    for m, model in enumerate(models):
        for task, index in tasks.index.items():
            rng = np.random.default_rng(derive_seed(seed, "behaviour", task))
            row = _accuracy(greedy[m, index], _sub(codes, index), alpha)
            row |= _pass_rate(passes[m, index], _sub(codes, index), alpha, n_bootstrap, rng)
            row |= _change(base[index], greedy[m, index], _sub(codes, index), alpha, model == reference)
            for name, value in row.items():
                cells.setdefault(name, [[] for _ in models])[m].append(value)
    variables = {
        name: ((MODEL, TASK), np.array(table, dtype=np.int64 if name in COUNTS else np.float64))
        for name, table in cells.items()
    }
    pooled = np.array([role == "pooled" for role in tasks.roles])
    p = variables["p_value"][1]
    q = np.full_like(p, np.nan)
    for group in (pooled, ~pooled):
        q[:, group] = adjust(p[:, group], method="bh")
    clustered = [_clustered(_sub(codes, index)) for index in tasks.index.values()]
    tests = np.array(["sign flip of clusters" if c else "exact McNemar" for c in clustered])
    return xr.Dataset(
        variables | {"q_value": ((MODEL, TASK), q), "p_test": (TASK, tests)},
        coords=model_coords(outcomes, models) | tasks.coords(),
        attrs={
            "test": "exact McNemar (sign flip of cluster sums where prompts share a cluster)",
            "null": "reference and model are exchangeable on every prompt",
            "unit": clusters if codes is not None else "prompt",
            "family": "model x task (pooled rows apart: model x pooled)",
            "family_size": int(np.isfinite(p[:, ~pooled]).sum()),
            "family_size_pooled": int(np.isfinite(p[:, pooled]).sum()),
            "reference": reference,
            "seed": seed,
            "n_bootstrap": n_bootstrap,
            "alpha": alpha,
        },
    )


@dataclass(frozen=True)
class _Tasks:
    index: dict[str, IntArray]
    domains: list[str]
    roles: list[str]

    def coords(self) -> dict[str, tuple[str, NDArray[Any]]]:
        """Labels of the task dimension."""
        labels = {TASK: list(self.index), DOMAIN: self.domains, "role": self.roles}
        return {name: (TASK, np.array(values, dtype=np.str_)) for name, values in labels.items()}


def _tasks(outcomes: xr.Dataset, there: list[str], roles: Mapping[str, str]) -> _Tasks:
    """Prompts, domain and role of every task in the order of ``there``, then of the pooled rows."""
    task = np.asarray(outcomes[TASK].values).astype(np.str_)
    domain = np.asarray(outcomes[DOMAIN].values).astype(np.str_)
    for name, role in roles.items():
        if name not in there:
            raise InputError(f"roles name the task {name!r}, which is not in the outcomes; expected one of {there}.")
        if role not in ROLES[:-1]:
            raise InputError(f"the role of task {name!r} must be one of {list(ROLES[:-1])}, got {role!r}.")
    index = {name: np.flatnonzero(task == name) for name in there}
    domains = [str(domain[index[name][0]]) for name in there]
    named = [
        roles.get(name, "in_domain" if d == "in" else "out_of_domain") for name, d in zip(there, domains, strict=True)
    ]
    control = np.isin(task, [name for name, role in zip(there, named, strict=True) if role == "control"])
    for name, d in POOLED.items():
        index[name] = np.flatnonzero((domain == d) & ~control)
    return _Tasks(index, [*domains, *POOLED.values()], [*named, *["pooled"] * len(POOLED)])


def _graded(values: NDArray[Any]) -> FloatArray:
    numbers = np.asarray(values, dtype=np.float64)
    return np.where(numbers < 0, np.nan, numbers)


def _sub(codes: IntArray | None, index: IntArray) -> IntArray | None:
    return None if codes is None else codes[index]


def _clustered(codes: IntArray | None) -> bool:
    return codes is not None and len(np.unique(codes)) < len(codes)


def _accuracy(right: FloatArray, codes: IntArray | None, alpha: float) -> dict[str, float]:
    there = np.isfinite(right)
    n = int(there.sum())
    groups = codes[there] if codes is not None else np.arange(n)
    n_clusters = len(np.unique(groups))
    counts = {"n_prompts": n, "n_clusters": n_clusters}
    if n == 0:
        return counts | dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high"), float("nan"))
    share = float(right[there].mean())
    low, high = _wilson(share, n_clusters, alpha)
    if n_clusters < n:
        error = _error(right[there], groups)
        if error > 0:
            half = float(stats.t.ppf(1 - alpha / 2, n_clusters - 1)) * error
            low, high = max(0.0, share - half), min(1.0, share + half)
    return counts | {"accuracy": share, "accuracy_low": low, "accuracy_high": high}


def _wilson(share: float, n: int, alpha: float) -> tuple[float, float]:
    low, high = wilson_interval(share * n, n, alpha=alpha)
    return float(low), float(high)


def _error(values: FloatArray, groups: IntArray) -> float:
    """CR1 standard error of the mean; NaN with one cluster."""
    if len(np.unique(groups)) < 2:
        return float("nan")
    return float(np.asarray(cluster_se(values[:, None], groups, kind="CR1").standard_error).item())


def _pass_rate(
    rate: FloatArray, codes: IntArray | None, alpha: float, n_bootstrap: int, rng: np.random.Generator
) -> dict[str, float]:
    """Mean over prompts of the share of samples that are right; percentile bootstrap over clusters."""
    there = np.isfinite(rate)
    if not there.any():
        return dict.fromkeys(("sampled_accuracy", "sampled_low", "sampled_high"), float("nan"))
    groups = np.unique(codes[there] if codes is not None else np.arange(there.sum()), return_inverse=True)[1].reshape(
        -1
    )
    sizes = np.bincount(groups).astype(np.float64)
    sums = np.bincount(groups, weights=rate[there])
    n = len(sizes)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=n_bootstrap)
    low, high = np.quantile((weights @ sums) / (weights @ sizes), [alpha / 2, 1 - alpha / 2])
    return {"sampled_accuracy": float(rate[there].mean()), "sampled_low": float(low), "sampled_high": float(high)}


def _change(
    base: FloatArray, model: FloatArray, codes: IntArray | None, alpha: float, is_reference: bool
) -> dict[str, float]:
    """Transitions of prompts, the p-value of the difference, and its interval."""
    there = np.isfinite(base) & np.isfinite(model)
    a, b = base[there] == 1, model[there] == 1
    row: dict[str, float] = {
        "kept_right": int((a & b).sum()),
        "forgotten": int((a & ~b).sum()),
        "gained": int((~a & b).sum()),
        "kept_wrong": int((~a & ~b).sum()),
    }
    nan = dict.fromkeys(("p_value", "difference", "difference_low", "difference_high"), float("nan"))
    if is_reference or not there.any():
        return row | nan
    d = model[there] - base[there]
    groups = codes[there] if codes is not None else np.arange(len(d))
    low, high = _difference_interval(d, groups, alpha)
    p = _change_p(d, groups, int(row["gained"]), int(row["forgotten"]))
    return row | {"p_value": p, "difference": float(d.mean()), "difference_low": low, "difference_high": high}


def _change_p(d: FloatArray, groups: IntArray, gained: int, forgotten: int) -> float:
    if not _clustered(groups):
        return float(mcnemar(gained, forgotten).p_value) if gained + forgotten else 1.0
    if len(np.unique(groups)) < MIN_CLUSTERS:
        return float("nan")
    if not d.any():
        return 1.0
    return float(np.asarray(sign_flip_test(cluster_sums(d[:, None], groups)).p_value).item())


def _difference_interval(d: FloatArray, groups: IntArray, alpha: float) -> tuple[float, float]:
    n, mean = len(np.unique(groups)), float(d.mean())
    error = _error(d, groups)
    if not np.isfinite(error):
        return float("nan"), float("nan")
    if error > 0:
        half = float(stats.t.ppf(1 - alpha / 2, n - 1)) * error
        return max(-1.0, mean - half), min(1.0, mean + half)
    # Every unit changed alike: another value has at most Wilson's upper share of units, and lies in [-1, 1].
    other = _wilson(0.0, n, alpha)[1]
    return mean - (mean + 1) * other, mean + (1 - mean) * other
