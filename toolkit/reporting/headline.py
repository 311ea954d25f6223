"""In- and out-of-domain accuracy of every final model: what the report says first."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import xarray as xr

from rlgen_stats.schemas.dims import BASE_MODEL, BASE_RUN
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.values import Results, final_models, labels_of, number, percent

DOMAINS: Final = {"in": "In-domain", "out": "Out-of-domain"}
"""Domain -> words."""
_POOLED: Final = "all:"
"""Prefix of the rows that pool a domain's tasks (controls left out)."""


@dataclass(frozen=True)
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
    """Against base."""
    difference_low: float
    difference_high: float
    p_value: float
    gained: int
    """Prompts base got wrong and this model right."""
    forgotten: int
    """Prompts base got right and this model wrong."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def shown_models(results: Results, spec: StudySpec) -> dict[str, str]:
    """``run -> final model``, base first."""
    data = results.get("behaviour")
    here = {BASE_RUN: BASE_MODEL} if BASE_MODEL in labels_of(data, "model") else {}
    return here | final_models(spec, data)


def domain_accuracy(results: Results, spec: StudySpec) -> list[DomainAccuracy]:
    """Accuracy per final model and domain; from pooled rows where the analysis has them, else pooled here.

    Pooling here weights tasks by prompts and recovers the interval from the tasks' own, as for strata (it is too
    narrow if prompts of different tasks share a cluster).

    References
    ----------
    Zou & Donner (2008), doi:10.1002/sim.3095, eq. 6.
    """
    data = results.get("behaviour")
    if data is None:
        return []
    rows = []
    for run, model in shown_models(results, spec).items():
        for domain in DOMAINS:
            pooled = _POOLED + domain
            tasks = [pooled] if pooled in labels_of(data, "task") else domain_tasks(data, domain)
            if tasks:
                rows.append(_pool(data, run, model, domain, tasks))
    return rows


def domain_tasks(data: xr.Dataset, domain: str) -> list[str]:
    """Tasks of a domain, without negative controls and pooled rows."""
    rows = zip(labels_of(data, "task"), labels_of(data, "domain"), labels_of(data, "role"), strict=True)
    return [task for task, where, role in rows if where == domain and role not in ("control", "pooled")]


def own_tasks(data: xr.Dataset) -> xr.Dataset:
    """The dataset without rows that pool tasks."""
    return data.isel(task=np.flatnonzero([not task.startswith(_POOLED) for task in labels_of(data, "task")]))


def _pool(data: xr.Dataset, run: str, model: str, domain: str, tasks: list[str]) -> DomainAccuracy:
    at = [{"model": model, "task": task} for task in tasks]
    n = np.array([number(data, "n_prompts", **one) for one in at])
    weight = n / n.sum() if n.sum() else np.full(len(tasks), math.nan)
    accuracy = _weighted(data, "accuracy", at, weight)
    difference = _weighted(data, "difference", at, weight)
    gained, forgotten = (int(sum(number(data, name, **one) for one in at)) for name in ("gained", "forgotten"))
    p = number(data, "p_value", **at[0]) if len(at) == 1 else math.nan
    return DomainAccuracy(run, model, domain, *accuracy, int(n.sum()), *difference, p, gained, forgotten)


def _weighted(data: xr.Dataset, name: str, at: list[dict[str, str]], weight: np.ndarray) -> tuple[float, float, float]:
    mean, low, high = (np.array([number(data, name + end, **one) for one in at]) for end in ("", "_low", "_high"))
    if len(at) == 1:
        return float(mean[0]), float(low[0]), float(high[0])
    value = float(weight @ mean)
    down, up = (float(np.sqrt(np.square(weight * d).sum())) for d in (mean - low, high - mean))
    return value, value - down, value + up


def lede(rows: list[DomainAccuracy], spec: StudySpec) -> str:
    """One sentence on what both runs did to accuracy."""
    found = {(row.run, row.domain): row for row in rows}
    sft, rl = (run.name for run in spec.contrasted)
    parts = []
    for domain, words in (("in", "in domain"), ("out", "out of domain")):
        trio = [found.get((run, domain)) for run in (BASE_RUN, sft, rl)]
        if all(row is not None for row in trio):
            base, first, second = (percent(row.accuracy, 0) for row in trio if row is not None)
            parts.append(f"{words}, {sft} answers {first} and {rl} {second} of the prompts (base {base})")
    return f"{'; '.join(parts)}."[0].upper() + f"{'; '.join(parts)}."[1:] if parts else "Behaviour was not measured."
