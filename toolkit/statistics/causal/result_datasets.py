"""The judge's last step: outcome tables and what was declared beforehand, as the datasets that are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import TASK
from rlgen_stats.toolkit.statistics.causal.controls import COVARIATES, MatchedControls, by_direction
from rlgen_stats.toolkit.statistics.causal.criteria import Settings
from rlgen_stats.toolkit.statistics.causal.findings import NUMBERS, Check, State, as_columns
from rlgen_stats.toolkit.statistics.causal.outcome_table import (
    DIRECTIONS,
    N_RESAMPLES,
    OUTCOME_CLASSES,
    Direction,
    DirectionOutcomes,
    finite_mean,
    paired_effect,
)
from rlgen_stats.toolkit.statistics.causal.verdict import Verdict, judge

_PER_CONDITION: Final = (
    *("accuracy", "effect", "effect_low", "effect_high", "p_value", "dose", "kl_to_base", "kl_to_rl", "length"),
    *("forced_kl_to_base", "forced_kl_to_rl", "neutral_kl", "dose_fit"),
    *("unrelated_accuracy", "unrelated_effect", "unrelated_low", "unrelated_high", "unrelated_broken"),
    "unrelated_length",
)
_TEXT: Final = ("verdict", "reasons", "decided_by", "v5", "kind", "criterion_state", "criterion_detail")


@dataclass(frozen=True)
class Together:
    """What judging the trials of several dictionaries together needs from each."""

    ranks: Mapping[Direction, tuple[float, ...]]
    """Rank p-value of the set in each dictionary."""
    missing: tuple[int, ...]
    """Numbers of the dictionaries whose trial could not be held."""
    comparable: Mapping[Direction, bool]
    """Whether the random sets match the sets, over all dictionaries."""
    flags: Mapping[Direction, tuple[str, ...]]
    """What the matching fell short of."""


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What is declared before a trial is run and decides how it is judged."""

    alpha: float
    """Level of every test."""
    margin: float
    """Accuracy change called harmless."""
    seeds: Mapping[Direction, int]
    """Seed of each direction's sign flips."""
    controls: Mapping[Direction, MatchedControls]
    """Random sets of each direction; empty if none could be matched."""
    not_held: str
    """Why no trial can be held, as ``code: reason``; empty if one can."""
    no_controls: str
    """Why no random sets could be matched; empty if some were."""
    tasks: tuple[str, ...]
    """Tasks of the prompts."""
    attributes: Mapping[str, Any]
    """Attributes of the result: where and on what the trial was held."""

    together: Together | None = None
    """Of several dictionaries."""

    def settings(
        self, direction: Direction, *, noop_changed: float = 0.0, non_finite: tuple[str, ...] = ()
    ) -> Settings:
        """What :func:`judge` needs beside one direction's table."""
        controls, together = self.controls.get(direction), self.together
        flags = (self.no_controls,) if controls is None else controls.flags
        return Settings(
            alpha=self.alpha,
            margin=self.margin,
            n_resamples=N_RESAMPLES,
            seed=self.seeds[direction],
            comparable=controls is not None and controls.comparable
            if together is None
            else together.comparable[direction],
            control_flags=flags if together is None else together.flags[direction],
            noop_changed=noop_changed,
            non_finite=non_finite,
            n_planned=0 if controls is None else len(controls.sets),
            ranks=() if together is None else together.ranks[direction],
            missing=() if together is None else together.missing,
        )


def judge_trial(outcomes: Sequence[DirectionOutcomes], declared: Declaration) -> tuple[xr.Dataset, xr.Dataset]:
    """Judge every direction that was run.

    Parameters
    ----------
    outcomes
        One a direction; none if no trial could be held.
    declared
        What was fixed beforehand.

    Returns
    -------
    intervention : Dataset
        Layout ``intervention``; also ``forced_kl_to_base``, ``forced_kl_to_rl`` and ``neutral_kl`` [direction,
        condition]. What a direction lacks is NaN, its kind ``absent``.
    balance : Dataset
        Layout ``control_balance``; all unknown, with the reason, where there are no controls.
    """
    if declared.not_held:
        dataset = _empty(declared.tasks, ["unedited"])
        dataset["reasons"][:] = declared.not_held
        balances = {direction: balance_of(declared, direction) for direction in DIRECTIONS}
        return _text(dataset).assign_attrs(declared.attributes), by_direction(balances)
    names = list(dict.fromkeys(c.name for one in outcomes for c in one.table.conditions))
    dataset = _empty(declared.tasks, names)
    dataset["reasons"][:] = "not_asked: not run"
    for one in outcomes:
        settings = declared.settings(
            one.table.direction, noop_changed=one.passthrough_changed, non_finite=one.non_finite
        )
        _fill(dataset, one, judge(one.table, settings), declared.alpha)
    balance = by_direction({direction: balance_of(declared, direction) for direction in DIRECTIONS})
    attributes = {
        **declared.attributes,
        "n_controls": balance.attrs["n_sets"],
        "control_flags": balance.attrs["flags"] if declared.controls else [],
    }
    return _text(dataset).assign_attrs(attributes), balance


def _empty(tasks: Sequence[str], conditions: Sequence[str]) -> xr.Dataset:
    """The layout with nothing known."""
    tasks = list(tasks) or ["none"]
    shape = (len(DIRECTIONS), len(conditions))
    n_directions, per_check = len(DIRECTIONS), ("direction", "criterion")
    return xr.Dataset(
        {name: (("direction", "condition"), np.full(shape, np.nan)) for name in _PER_CONDITION}
        | {"kind": (("direction", "condition"), np.full(shape, "absent", dtype="U16"))}
        | {"over_steered": (("direction", "condition"), np.zeros(shape, dtype=bool))}
        | {
            name: (("direction", "condition", TASK), np.full((*shape, len(tasks)), np.nan))
            for name in ("task_accuracy", "task_effect")
        }
        | {"class_share": (("direction", "condition", "class"), np.full((*shape, len(OUTCOME_CLASSES)), np.nan))}
        | {name: ("direction", np.zeros(n_directions, dtype=bool)) for name in ("v1", "v2", "v3", "v4", "v6")}
        | {
            "verdict": ("direction", np.full(n_directions, "INCONCLUSIVE", dtype=object)),
            "reasons": ("direction", np.full(n_directions, "", dtype=object)),
            "v5": ("direction", np.full(n_directions, "", dtype=object)),
            "rank_p": ("direction", np.full(n_directions, np.nan)),
            "decided_by": ("direction", np.full(n_directions, "", dtype=object)),
            "n_prompts": ("direction", np.zeros(n_directions, dtype=np.int64)),
        }
        | {f"criterion_{name}": (per_check, np.full((n_directions, len(Check)), np.nan)) for name in NUMBERS}
        | {
            "criterion_state": (per_check, np.full((n_directions, len(Check)), str(State.ABSENT), dtype=object)),
            "criterion_detail": (per_check, np.full((n_directions, len(Check)), "", dtype=object)),
        },
        coords={
            "direction": list(DIRECTIONS),
            "condition": list(conditions),
            TASK: tasks,
            "class": list(OUTCOME_CLASSES),
            "criterion": [str(check) for check in Check],
        },
    )


def _fill(dataset: xr.Dataset, outcomes: DirectionOutcomes, verdict: Verdict, alpha: float) -> None:
    """Put one direction into its places."""
    table = outcomes.table
    d = DIRECTIONS.index(table.direction)
    names = dataset["condition"].values.tolist()
    columns = [names.index(condition.name) for condition in table.conditions]
    for name, values in (_effects(outcomes, verdict) | _side_effects(outcomes, alpha)).items():
        dataset[name].values[d, columns] = values
    dataset["kind"].values[d, columns] = [condition.kind for condition in table.conditions]
    dataset["class_share"].values[d, columns] = verdict.shares
    for t, task in enumerate(dataset[TASK].values):
        mask = table.task == task
        dataset["task_accuracy"].values[d, columns, t] = table.accuracy(mask)
        dataset["task_effect"].values[d, columns, t] = table.change(mask).mean(axis=(0, 1))
    for name, values in as_columns(verdict.findings).items():
        dataset[name].values[d] = values
    for name in ("verdict", "rank_p", "v5"):
        dataset[name].values[d] = getattr(verdict, name)
    for name, held in verdict.requirements.items():
        dataset[name].values[d] = held
    dataset["decided_by"].values[d] = str(verdict.decision)
    dataset["reasons"].values[d] = "; ".join(verdict.reasons)
    dataset["n_prompts"].values[d] = int(table.target.sum())


def _effects(outcomes: DirectionOutcomes, verdict: Verdict) -> dict[str, NDArray[Any]]:
    """What every arm does on the target prompts."""
    table = outcomes.table
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
        name: np.array([finite_mean(row[table.target]) for row in outcomes.divergences[name]])
        for name in ("kl_to_base", "kl_to_rl", "forced_kl_to_base", "forced_kl_to_rl")
    }


def _side_effects(outcomes: DirectionOutcomes, alpha: float) -> dict[str, NDArray[Any]]:
    """What every arm does on prompts of unrelated tasks; nothing without any."""
    table = outcomes.table
    if not table.unrelated.any():
        return {}
    clusters = table.cluster[table.unrelated]
    kept = paired_effect(table.change(table.unrelated), clusters, alpha=alpha, seed=0, n_resamples=N_RESAMPLES)
    return {
        "unrelated_accuracy": table.accuracy(table.unrelated),
        "unrelated_effect": kept.mean,
        "unrelated_low": kept.low,
        "unrelated_high": kept.high,
        "unrelated_broken": table.broken(table.unrelated),
        "unrelated_length": table.n_tokens[:, table.unrelated].mean(axis=(1, 2)),
    }


def _text(dataset: xr.Dataset) -> xr.Dataset:
    """Object text as fixed-width text."""
    return dataset.assign({name: dataset[name].astype(np.str_) for name in _TEXT})


def balance_of(declared: Declaration, direction: Direction) -> xr.Dataset:
    """How well the random sets of a direction match, by covariate; all unknown where there are none."""
    controls = declared.controls.get(direction)
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
        attrs={"n_sets": 0, "flags": [declared.not_held or declared.no_controls], "comparable": 0},
    )
