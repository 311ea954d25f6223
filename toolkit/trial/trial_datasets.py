"""A trial's results as the datasets that are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import TASK
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.statistics.causal.controls import COVARIATES, MatchedControls
from rlgen_stats.toolkit.statistics.causal.outcome_table import (
    OUTCOME_CLASSES,
    Direction,
    OutcomeTable,
    cluster_interval,
)
from rlgen_stats.toolkit.statistics.causal.verdict import Verdict
from rlgen_stats.toolkit.trial.arms import DIRECTIONS, edited_positions, target_prompts
from rlgen_stats.toolkit.trial.divergence import finite_mean


@dataclass(frozen=True)
class Result:
    """One direction's frames, table and verdict."""

    direction: Direction
    table: OutcomeTable
    divergences: dict[str, NDArray[np.float64]]
    verdict: Verdict


_PER_CONDITION: Final = (
    *("accuracy", "effect", "effect_low", "effect_high", "p_value", "dose", "kl_to_base", "kl_to_rl", "length"),
    *("forced_kl_to_base", "forced_kl_to_rl", "neutral_kl", "dose_fit"),
    *("unrelated_accuracy", "unrelated_effect", "unrelated_low", "unrelated_high", "unrelated_broken"),
    "unrelated_length",
)


def _empty(prompts: pd.DataFrame, conditions: Sequence[str]) -> xr.Dataset:
    """The layout with nothing known."""
    tasks = sorted(set(prompts[TASK])) or ["none"]
    shape = (len(DIRECTIONS), len(conditions))
    directions = len(DIRECTIONS)
    return xr.Dataset(
        {name: (("direction", "condition"), np.full(shape, np.nan)) for name in _PER_CONDITION}
        | {"kind": (("direction", "condition"), np.full(shape, "absent", dtype="U16"))}
        | {"over_steered": (("direction", "condition"), np.zeros(shape, dtype=bool))}
        | {
            name: (("direction", "condition", TASK), np.full((*shape, len(tasks)), np.nan))
            for name in ("task_accuracy", "task_effect")
        }
        | {"class_share": (("direction", "condition", "class"), np.full((*shape, len(OUTCOME_CLASSES)), np.nan))}
        | {name: ("direction", np.zeros(directions, dtype=bool)) for name in ("v1", "v2", "v3", "v4", "v6")}
        | {
            "verdict": ("direction", np.full(directions, "INCONCLUSIVE", dtype=object)),
            "reasons": ("direction", np.full(directions, "", dtype=object)),
            "v5": ("direction", np.full(directions, "", dtype=object)),
            "rank_p": ("direction", np.full(directions, np.nan)),
            "n_prompts": ("direction", np.zeros(directions, dtype=np.int64)),
        },
        coords={
            "direction": list(DIRECTIONS),
            "condition": list(conditions),
            TASK: tasks,
            "class": list(OUTCOME_CLASSES),
        },
    )


def _attrs(spec: StudySpec, prompts: pd.DataFrame, chosen: tuple[int, ...]) -> dict[str, Any]:
    target, unrelated = target_prompts(prompts, spec)
    return {
        "test": "sign-flip over prompt clusters (exact McNemar for one sample a prompt); t-interval over clusters; "
        "rank of the set among matched random sets",
        "null": "the edit changes no completion's chance of being right",
        "unit": "prompt cluster",
        "seed": spec.seed,
        "alpha": spec.statistics.alpha,
        "features": list(chosen),
        "readout": spec.primary_crosscoder.readout,
        "layer": spec.extraction.layer,
        "positions": edited_positions(spec.extraction),
        "phases": "prefill and decode",
        "skip_first": spec.extraction.skip_first,
        "target_tasks": sorted(set(prompts[TASK][target])),
        "unrelated_tasks": sorted(set(prompts[TASK][unrelated])),
        "lift_reference": "the RL model's features on the same tokens",
        "level": spec.intervention.level,
        "neutral_text": spec.intervention.neutral_text or "prompts of unrelated tasks",
        "n_samples": spec.intervention.n_samples,
    }


def nothing_to_show(
    spec: StudySpec, prompts: pd.DataFrame, chosen: tuple[int, ...], reason: str
) -> tuple[xr.Dataset, xr.Dataset]:
    """What a trial that cannot be held looks like."""
    dataset = _empty(prompts, ["unedited"])
    dataset["reasons"][:] = reason
    return _text(dataset).assign_attrs(_attrs(spec, prompts, chosen)), balance_table(None, reason)


def _text(dataset: xr.Dataset) -> xr.Dataset:
    """Object text as fixed-width text."""
    return dataset.assign({name: dataset[name].astype(np.str_) for name in ("verdict", "reasons", "v5", "kind")})


def as_dataset(
    spec: StudySpec,
    prompts: pd.DataFrame,
    chosen: tuple[int, ...],
    results: Sequence[Result],
    controls: MatchedControls | None,
) -> xr.Dataset:
    """Layout ``intervention``: all directions and conditions; what a direction lacks is NaN, kind absent."""
    names = list(dict.fromkeys(c.name for result in results for c in result.table.conditions))
    dataset = _empty(prompts, names)
    asked = {result.direction for result in results}
    dataset["reasons"][:] = ["" if direction in asked else "not_asked: not run" for direction in DIRECTIONS]
    for result in results:
        d = DIRECTIONS.index(result.direction)
        table, verdict = result.table, result.verdict
        at = [names.index(condition.name) for condition in table.conditions]
        for name, column in (_per_condition(result) | _side_effects(result, spec.statistics.alpha)).items():
            dataset[name].values[d, at] = column
        dataset["kind"].values[d, at] = [condition.kind for condition in table.conditions]
        dataset["class_share"].values[d, at] = verdict.shares
        for t, task in enumerate(dataset[TASK].values):
            mask = table.task == task
            dataset["task_accuracy"].values[d, at, t] = table.accuracy(mask)
            dataset["task_effect"].values[d, at, t] = table.change(mask).mean(axis=0)
        for name in ("verdict", "rank_p", "v1", "v2", "v3", "v4", "v5", "v6"):
            dataset[name].values[d] = getattr(verdict, name)
        dataset["reasons"].values[d] = "; ".join(reason.replace("; ", ", ") for reason in verdict.reasons)
        dataset["n_prompts"].values[d] = int(table.target.sum())
    facts = {
        "n_controls": 0 if controls is None else len(controls.sets),
        "control_flags": [] if controls is None else list(controls.flags),
    }
    return _text(dataset).assign_attrs(_attrs(spec, prompts, chosen) | facts)


def _per_condition(result: Result) -> dict[str, NDArray[Any]]:
    """What every arm does on the target prompts."""
    table, verdict = result.table, result.verdict
    return {
        "accuracy": table.accuracy(table.target),
        "effect": verdict.effects.mean,
        "effect_low": verdict.effects.low,
        "effect_high": verdict.effects.high,
        "p_value": verdict.effects.p_value,
        "dose": np.array([condition.dose for condition in table.conditions]),
        "dose_fit": verdict.dose_fit,
        "over_steered": verdict.over_steered,
        "length": table.n_tokens[:, table.target].mean(axis=(1, 2)),
        "neutral_kl": table.neutral_kl,
    } | {
        name: np.array([finite_mean(row[table.target]) for row in result.divergences[name]])
        for name in ("kl_to_base", "kl_to_rl", "forced_kl_to_base", "forced_kl_to_rl")
    }


def _side_effects(result: Result, alpha: float) -> dict[str, NDArray[Any]]:
    """What every arm does on prompts of unrelated tasks; nothing without any."""
    table = result.table
    if not table.unrelated.any():
        return {}
    change, codes = table.change(table.unrelated), np.unique(table.cluster[table.unrelated], return_inverse=True)[1]
    mean, low, high = cluster_interval(change, codes, alpha=alpha)
    return {
        "unrelated_accuracy": table.accuracy(table.unrelated),
        "unrelated_effect": mean,
        "unrelated_low": low,
        "unrelated_high": high,
        "unrelated_broken": table.broken(table.unrelated),
        "unrelated_length": table.n_tokens[:, table.unrelated].mean(axis=(1, 2)),
    }


def balance_table(controls: MatchedControls | None, why: str) -> xr.Dataset:
    """Layout ``control_balance``; all unknown, with the reason, where there are no controls."""
    if controls is not None:
        return controls.balance
    unknown = np.full(len(COVARIATES), np.nan)
    return xr.Dataset(
        {name: ("covariate", unknown.copy()) for name in ("set_mean", "control_mean", "standardized_difference")}
        | {
            "balanced": ("covariate", np.zeros(len(COVARIATES), dtype=bool)),
            "worst_difference": ("covariate", unknown),
        },
        coords={"covariate": list(COVARIATES)},
        attrs={"n_sets": 0, "flags": [why], "comparable": 0},
    )
