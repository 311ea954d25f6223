"""What each model gets right, and what it learned and forgot prompt by prompt; reported before any mechanism."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import BASE_MODEL, DOMAIN, MODEL, PROMPT, SAMPLE, TASK, split_model_id
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics.completion_shares import completion_shares
from rlgen_stats.toolkit.statistics.core.coordinates import find_models, model_coords
from rlgen_stats.toolkit.statistics.core.feature_blocks import in_prompt_order
from rlgen_stats.toolkit.statistics.core.paired_accuracy import (
    CLUSTER_FLIP,
    INTERVAL,
    MCNEMAR,
    difference_interval,
    paired_p_value,
    shares_clusters,
)
from rlgen_stats.toolkit.statistics.core.units import cluster_codes
from rlgen_stats.toolkit.statistics.kernels import adjust, bounded_interval, mover_weighted_sum, wilson_interval
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray

ROLES: Final = ("in_domain", "out_of_domain", "held_out", "control", "pooled")

POOLED: Final = {"all:in": "in", "all:out": "out"}
"""Pooled rows: every task of the domain but the controls, which no model should get better at."""


COUNTS: Final = ("n_prompts", "n_clusters", "kept_right", "forgotten", "gained", "kept_wrong")


@dataclass(frozen=True, kw_only=True)
class DomainAccuracy:
    """Greedy accuracy of one model on all tasks of one domain but the negative controls; fractions."""

    run: str
    model: str
    domain: str
    accuracy: float
    low: float
    high: float
    n_prompts: int
    difference: float
    """Against the reference."""
    difference_low: float
    difference_high: float
    p_value: float
    gained: int
    """Prompts the reference got wrong and this model right."""
    forgotten: int
    """Prompts the reference got right and this model wrong."""


def behaviour(
    outcomes: xr.Dataset,
    *,
    reference: str = BASE_MODEL,
    roles: Mapping[str, str] | None = None,
    family: Sequence[str] | None = None,
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
    family
        Models whose tests are corrected together; ``q_value`` is NaN for others. Default: all but the reference.
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
        ``accuracy`` is greedy, ``sampled_accuracy`` the pass rate with ``sampled_low``/``sampled_high``, NaN of models
        without samples; ``terminated`` and ``answered`` are shares of the samples, else of the greedy completions (left
        out of outcomes that do not say). Also ``n_clusters`` and ``p_test`` [task] (which test gave ``p_value``).
        Small; computed at once.

    Raises
    ------
    InputError
        If the reference, a model of the family, a role's task or a role is unknown.
    RefusedError
        If several rows hold one prompt.

    Notes
    -----
    Greedy accuracy: Wilson where prompts are the units, else :func:`bounded_interval` (NaN with one cluster).
    ``p_value``: exact McNemar where prompts are the units, else the sign flip of cluster sums, which it equals for
    clusters of one; NaN below six clusters. ``difference``: :func:`bounded_interval` over prompts or clusters. BH over
    the family's models and all tasks (pooled rows: over models and pooled rows). Greedy outcomes are
    deterministic: intervals are over prompts, not over training runs.

    References
    ----------
    McNemar 1947, doi:10.1007/BF02295996; Wilson 1927, doi:10.1080/01621459.1927.10502953.

    Examples
    --------
    >>> behaviour(open_outcomes(path)).accuracy.sel(task="all:out").to_series()  # doctest: +SKIP
    """
    models = [str(model) for model in outcomes[MODEL].values]
    reference, *in_family = find_models(outcomes, [reference, *(family or ())])
    names = [str(name) for name in dict.fromkeys(np.asarray(outcomes[TASK].values).astype(np.str_))]
    outcomes = in_prompt_order(outcomes)
    codes = cluster_codes(outcomes, clusters)
    tasks = _tasks(outcomes, names, roles or {})
    greedy = _graded(outcomes["greedy_correct"].transpose(MODEL, PROMPT).values)
    sampled = _graded(outcomes["correct"].transpose(MODEL, PROMPT, SAMPLE).values)
    passes = _share_right(sampled)
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
    p = np.array(variables["p_value"][1], dtype=np.float64)
    if family is not None:
        p[~np.isin(models, in_family)] = np.nan
    q = _adjusted(p, pooled)
    clustered = [codes is not None and shares_clusters(codes[index]) for index in tasks.index.values()]
    tests = np.array([CLUSTER_FLIP if c else MCNEMAR for c in clustered])
    shares = completion_shares(outcomes, tasks.index).data_vars
    variables |= {str(name): ((MODEL, TASK), share.values) for name, share in shares.items()}
    return xr.Dataset(
        variables | {"q_value": ((MODEL, TASK), q), "p_test": (TASK, tests)},
        coords=model_coords(outcomes, models) | tasks.coords(),
        attrs={
            "test": "exact McNemar (sign flip of cluster sums where prompts share a cluster)",
            "null": "reference and model are exchangeable on every prompt",
            "interval": INTERVAL,
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


def _share_right(sampled: NDArray[np.float64]) -> NDArray[np.float64]:
    """[model, prompt] share of graded samples that are right; NaN without any."""
    n_graded = np.isfinite(sampled).sum(axis=-1)
    return np.where(n_graded > 0, np.nansum(sampled, axis=-1) / np.maximum(n_graded, 1), np.nan)


def _adjusted(p: NDArray[np.float64], pooled: NDArray[np.bool_]) -> NDArray[np.float64]:
    """BH over models and tasks, [model, task]; pooled rows apart."""
    q = np.full_like(p, np.nan)
    for group in (pooled, ~pooled):
        q[:, group] = adjust(p[:, group], method="bh")
    return q


@dataclass(frozen=True)
class _Tasks:
    index: dict[str, IntArray]
    domains: list[str]
    roles: list[str]

    def coords(self) -> dict[str, tuple[str, NDArray[Any]]]:
        """Labels of the task dimension."""
        labels = {TASK: list(self.index), DOMAIN: self.domains, "role": self.roles}
        return {name: (TASK, np.array(values, dtype=np.str_)) for name, values in labels.items()}


def _tasks(outcomes: xr.Dataset, names: list[str], roles: Mapping[str, str]) -> _Tasks:
    """Prompts, domain and role of every task in the order of ``names``, then of the pooled rows."""
    task = np.asarray(outcomes[TASK].values).astype(np.str_)
    domain = np.asarray(outcomes[DOMAIN].values).astype(np.str_)
    for name, role in roles.items():
        if name not in names:
            raise InputError(f"roles name the task {name!r}, which is not in the outcomes; expected one of {names}.")
        if role not in ROLES[:-1]:
            raise InputError(f"the role of task {name!r} must be one of {list(ROLES[:-1])}, got {role!r}.")
    index = {name: np.flatnonzero(task == name) for name in names}
    domains = [str(domain[index[name][0]]) for name in names]
    named = [
        roles.get(name, "in_domain" if d == "in" else "out_of_domain") for name, d in zip(names, domains, strict=True)
    ]
    control = np.isin(task, [name for name, role in zip(names, named, strict=True) if role == "control"])
    for name, d in POOLED.items():
        index[name] = np.flatnonzero((domain == d) & ~control)
    return _Tasks(index, [*domains, *POOLED.values()], [*named, *["pooled"] * len(POOLED)])


def _graded(values: NDArray[Any]) -> FloatArray:
    numbers = np.asarray(values, dtype=np.float64)
    return np.where(numbers < 0, np.nan, numbers)


def _sub(codes: IntArray | None, index: IntArray) -> IntArray | None:
    return None if codes is None else codes[index]


def _accuracy(right: FloatArray, codes: IntArray | None, alpha: float) -> dict[str, float]:
    graded = np.isfinite(right)
    n = int(graded.sum())
    groups = codes[graded] if codes is not None else np.arange(n)
    n_clusters = len(np.unique(groups))
    counts = {"n_prompts": n, "n_clusters": n_clusters}
    if n == 0:
        return counts | dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high"), float("nan"))
    share = float(right[graded].mean())
    if n_clusters == n:
        low, high = wilson_interval(share * n, n, alpha=alpha)
    else:
        centred = right[graded, None] - 0.5  # within +-1/2
        low, high = (0.5 + float(end[0]) for end in bounded_interval(centred, groups, alpha=alpha, limit=0.5)[1:])
    return counts | {"accuracy": share, "accuracy_low": low, "accuracy_high": high}


def _pass_rate(
    rate: FloatArray, codes: IntArray | None, alpha: float, n_bootstrap: int, rng: np.random.Generator
) -> dict[str, float]:
    """Mean over prompts of the share of samples that are right; percentile bootstrap over clusters."""
    graded = np.isfinite(rate)
    if not graded.any():
        return dict.fromkeys(("sampled_accuracy", "sampled_low", "sampled_high"), float("nan"))
    groups = np.unique(codes[graded] if codes is not None else np.arange(graded.sum()), return_inverse=True)[1].reshape(
        -1
    )
    sizes = np.bincount(groups).astype(np.float64)
    sums = np.bincount(groups, weights=rate[graded])
    n = len(sizes)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=n_bootstrap)
    low, high = np.quantile((weights @ sums) / (weights @ sizes), [alpha / 2, 1 - alpha / 2])
    return {"sampled_accuracy": float(rate[graded].mean()), "sampled_low": float(low), "sampled_high": float(high)}


def _change(
    base: FloatArray, model: FloatArray, codes: IntArray | None, alpha: float, is_reference: bool
) -> dict[str, float]:
    """Transitions of prompts, the p-value of the difference, and its interval."""
    graded = np.isfinite(base) & np.isfinite(model)
    a, b = base[graded] == 1, model[graded] == 1
    row: dict[str, float] = {
        "kept_right": int((a & b).sum()),
        "forgotten": int((a & ~b).sum()),
        "gained": int((~a & b).sum()),
        "kept_wrong": int((~a & ~b).sum()),
    }
    nan = dict.fromkeys(("p_value", "difference", "difference_low", "difference_high"), float("nan"))
    if is_reference or not graded.any():
        return row | nan
    d = model[graded] - base[graded]
    groups = codes[graded] if codes is not None else np.arange(len(d))
    low, high = difference_interval(d, groups, alpha)
    p = paired_p_value(d, groups)
    return row | {"p_value": p, "difference": float(d.mean()), "difference_low": low, "difference_high": high}


def domain_accuracy(behaviour: xr.Dataset, model: str, domain: str) -> DomainAccuracy | None:
    """Accuracy of one model over a domain, negative controls left out.

    Parameters
    ----------
    behaviour
        Layout ``behaviour``.
    model
        Model id; must be in the dataset.
    domain
        ``in`` or ``out``.

    Returns
    -------
    DomainAccuracy or None
        The pooled row (``all:in``, ``all:out``) where the dataset has it. Otherwise the domain's tasks weighted by
        their prompts, with the interval recovered from the tasks' own (MOVER) and no p-value; that interval is too
        narrow if prompts of different tasks share a cluster. None if the domain has no tasks.

    References
    ----------
    Zou & Donner (2008), doi:10.1002/sim.3095, eq. 6.
    """
    tasks = _domain_rows(behaviour, domain)
    if not tasks:
        return None
    rows = behaviour.sel({MODEL: model, TASK: tasks})
    numeric = [name for name, variable in rows.data_vars.items() if variable.dtype.kind in "fiu"]
    columns = {str(name): np.asarray(rows[name].values, dtype=np.float64) for name in numeric}
    n_prompts = columns["n_prompts"]
    weights = n_prompts / n_prompts.sum() if n_prompts.sum() else np.full(len(tasks), np.nan)

    def pooled(name: str) -> tuple[float, float, float]:
        terms = [columns[name + end] for end in ("", "_low", "_high")]
        if len(tasks) == 1:
            return float(terms[0][0]), float(terms[1][0]), float(terms[2][0])
        return mover_weighted_sum(*terms, weights=weights)

    p_value = float(columns["p_value"][0]) if len(tasks) == 1 else float("nan")
    gained, forgotten = (int(columns[name].sum()) for name in ("gained", "forgotten"))
    accuracy, low, high = pooled("accuracy")
    difference, difference_low, difference_high = pooled("difference")
    return DomainAccuracy(
        run=split_model_id(model)[0],
        model=model,
        domain=domain,
        accuracy=accuracy,
        low=low,
        high=high,
        n_prompts=int(n_prompts.sum()),
        difference=difference,
        difference_low=difference_low,
        difference_high=difference_high,
        p_value=p_value,
        gained=gained,
        forgotten=forgotten,
    )


def _domain_rows(behaviour: xr.Dataset, domain: str) -> list[str]:
    """The domain's pooled row where there is one, else its tasks without negative controls."""
    tasks = [str(task) for task in behaviour[TASK].values]
    pooled = [name for name, pooled_domain in POOLED.items() if pooled_domain == domain and name in tasks]
    labels = zip(tasks, behaviour[DOMAIN].values, behaviour["role"].values, strict=True)
    return pooled or [
        task for task, where, role in labels if str(where) == domain and str(role) not in ("control", "pooled")
    ]
