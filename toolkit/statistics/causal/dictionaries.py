"""The trials of one study's dictionaries judged together: the same prompts and models, another set in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.toolkit.statistics.causal.controls import BALANCED, comparable, unbalanced
from rlgen_stats.toolkit.statistics.causal.outcome_table import DIRECTIONS, DirectionOutcomes, Floats, OutcomeTable
from rlgen_stats.toolkit.statistics.causal.result_datasets import Declaration, Together, judge_trial
from rlgen_stats.toolkit.statistics.causal.verdict import judge

Outcomes = Sequence[DirectionOutcomes]


def judge_together(trials: Mapping[int, tuple[Outcomes, Declaration]]) -> tuple[xr.Dataset, xr.Dataset]:
    """One verdict a direction from the trials of all dictionaries.

    Parameters
    ----------
    trials
        Number of the dictionary -> its outcomes, none where its trial could not be held, and its declaration.

    Returns
    -------
    intervention : Dataset
        Layout ``intervention``, of the arms that all dictionaries ran, with ``dictionary_effect`` [direction,
        dictionary]. The effect of an arm is the mean over dictionaries; interval and p-value hold the variance between
        them.
    balance : Dataset
        Layout ``control_balance``: means over dictionaries, as the effects are.

    Notes
    -----
    The criteria are those of one dictionary (docs/method.md 4d) on the completions of all. V1 also needs the direction
    in every dictionary, V2 combines their rank p-values, and where a dictionary has no set nothing is CAUSAL_SPECIFIC.
    """
    held = {number: outcomes for number, (outcomes, _) in trials.items() if outcomes}
    declared = next(declared for number, (_, declared) in trials.items() if number in held or not held)
    missing = tuple(number for number in trials if number not in held)
    pooled, ranks = [], {}
    for direction in DIRECTIONS:
        of_direction = {
            number: one for number, outcomes in held.items() for one in outcomes if one.table.direction == direction
        }
        if of_direction:
            pooled.append(_pool(list(of_direction.values())))
            ranks[direction] = tuple(_rank_p(one, trials[number][1]) for number, one in of_direction.items())
    balance = _balance([judge_trial(*trials[number])[1] for number in held or trials])
    difference = balance["standardized_difference"].values
    shortfalls = tuple(
        f"dictionary {number}: {flag}"
        for number in held
        for flag in trials[number][1].settings("disable").control_flags
        if not flag.startswith("unbalanced:")
    )
    together = Together(
        ranks=ranks,
        missing=missing,
        comparable=comparable(np.nan_to_num(difference, nan=np.inf)),
        flags=(*unbalanced(difference), *shortfalls),
    )
    sizes = [len(declared.attributes["features"]) for _, declared in trials.values()]
    attributes = {**declared.attributes, "n_features": sizes}
    result, _ = judge_trial(pooled, replace(declared, together=together, attributes=attributes))
    effects = np.full((len(DIRECTIONS), len(trials)), np.nan)
    for one in pooled:
        each = one.table.change(one.table.target)[:, :, one.table.chosen].mean(axis=1)
        effects[DIRECTIONS.index(one.table.direction), [number not in missing for number in trials]] = each
    result["dictionary_effect"] = (("direction", "dictionary"), effects)
    return result.assign_coords(dictionary=list(trials)), balance


def _balance(balances: Sequence[xr.Dataset]) -> xr.Dataset:
    """Mean over dictionaries: effects of sets and of their controls are means over dictionaries too."""
    together = xr.concat([one.drop_attrs() for one in balances], "dictionary")
    mean = together[["set_mean", "control_mean", "standardized_difference"]].mean("dictionary", skipna=False)
    balance = mean.assign(
        worst_difference=together["worst_difference"].max("dictionary", skipna=False),
        balanced=abs(mean["standardized_difference"]) < BALANCED,
    )
    return balance.assign_attrs(balances[0].attrs | {"flags": unbalanced(balance["standardized_difference"].values)})


def _rank_p(outcomes: DirectionOutcomes, declared: Declaration) -> float:
    return judge(outcomes.table, declared.settings(outcomes.table.direction)).rank_p


def _pool(outcomes: Sequence[DirectionOutcomes]) -> DirectionOutcomes:
    """Completions of several dictionaries side by side, of the arms that all of them ran."""
    tables = [one.table for one in outcomes]
    first, names = tables[0], [[c.name for c in table.conditions] for table in tables]
    shared = [name for name in names[0] if all(name in others for others in names)]
    rows = [[others.index(name) for name in shared] for others in names]

    def samples(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(t, name)[r] for t, r in zip(tables, rows, strict=True)], axis=2)

    def mean(name: str) -> Floats:
        return np.asarray(np.mean([getattr(t, name)[r] for t, r in zip(tables, rows, strict=True)], axis=0))

    table = OutcomeTable(
        direction=first.direction,
        conditions=tuple(first.conditions[i] for i in rows[0]),
        correct=samples("correct"),
        ending=samples("ending"),
        other_ending=np.concatenate([table.other_ending for table in tables], axis=1),
        kl_to_base=mean("kl_to_base"),
        kl_to_rl=mean("kl_to_rl"),
        neutral_kl=mean("neutral_kl"),
        n_tokens=samples("n_tokens"),
        task=first.task,
        cluster=first.cluster,
        target=first.target,
        unrelated=first.unrelated,
        n_dictionaries=len(outcomes),
    )
    divergences = {
        name: np.mean([one.divergences[name][r] for one, r in zip(outcomes, rows, strict=True)], axis=0)
        for name in outcomes[0].divergences
    }
    return DirectionOutcomes(
        table=table,
        divergences=divergences,
        passthrough_changed=max(one.passthrough_changed for one in outcomes),
        non_finite=tuple(dict.fromkeys(name for one in outcomes for name in one.non_finite)),
    )
