"""The trials of one study's dictionaries judged together: the same prompts and models, another set in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import xarray as xr

from rlgen_stats.toolkit.statistics.causal.controls import BALANCED, by_direction, comparable, unbalanced
from rlgen_stats.toolkit.statistics.causal.outcome_table import DIRECTIONS, Direction, DirectionOutcomes
from rlgen_stats.toolkit.statistics.causal.result_datasets import Declaration, Together, balance_of, judge_trial
from rlgen_stats.toolkit.statistics.causal.verdict import judge

WORST_USABLE: Final = 2.0
"""Times what sets and controls may differ by that no single dictionary may exceed, whatever the others' difference."""

Trials = Mapping[int, tuple[Sequence[DirectionOutcomes], Declaration]]


def judge_together(trials: Trials) -> tuple[xr.Dataset, xr.Dataset]:
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
    in every dictionary, V2 combines their rank p-values, V6 must hold in as many as must agree, and where a dictionary
    has no set nothing is CAUSAL_SPECIFIC. A single dictionary is judged as :func:`judge_trial` does.
    """
    held = {number: trial for number, trial in trials.items() if trial[0]}
    first = next(iter(held or trials))
    declared = trials[first][1]
    pooled, effects = [], np.full((len(DIRECTIONS), len(trials)), np.nan)
    ranks = {}
    for d, direction in enumerate(DIRECTIONS):
        tried = {n: one for n, (outcomes, _) in held.items() for one in outcomes if one.table.direction == direction}
        if not tried:
            continue
        pooled.append(_pool(list(tried.values())))
        ranks[direction] = tuple(_rank_p(one, held[number][1]) for number, one in tried.items())
        for number, one in tried.items():
            change = one.table.change(one.table.target)[0, :, one.table.chosen]
            effects[d, list(trials).index(number)] = change.mean()
    if len(trials) == 1:
        result, balance = judge_trial(pooled, declared)
    else:
        declarations = {number: one for number, (_, one) in (held or trials).items()}
        balances = {d: _balance([balance_of(one, d) for one in declarations.values()]) for d in DIRECTIONS}
        balance = by_direction(balances)
        together = Together(
            ranks=ranks,
            missing=tuple(number for number in trials if number not in held),
            comparable={d: bool(one.attrs["comparable"]) for d, one in balances.items()},
            flags={d: (*one.attrs["flags"], *_shortfalls(declarations, d)) for d, one in balances.items()},
        )
        sizes = [len(one.attributes["features"]) for _, one in trials.values()]
        attributes = {**declared.attributes, "features": [], "n_features": sizes}
        result, _ = judge_trial(pooled, replace(declared, together=together, attributes=attributes))
        result.attrs["control_flags"] = [f"{d}: {flag}" for d, flags in together.flags.items() for flag in flags]
    result["dictionary_effect"] = (("direction", "dictionary"), effects)
    return result.assign_coords(dictionary=list(trials)), balance


def _balance(balances: Sequence[xr.Dataset]) -> xr.Dataset:
    """Mean over dictionaries, as the effects of sets and of their controls are, with a bound on each of them.

    Controls that are larger in one dictionary do not make up for smaller ones in another, nor one class for another.
    """
    together = xr.concat([one.drop_attrs() for one in balances], "dictionary")
    mean = together[["set_mean", "control_mean", "standardized_difference"]].mean("dictionary", skipna=False)
    difference = mean["standardized_difference"].values
    each = together["standardized_difference"].values
    larger, other_class = np.maximum(each[:, 0], 0.0).mean(), np.abs(each[:, -1]).mean()
    usable = comparable(np.array([larger, other_class])) and all(comparable(one, times=WORST_USABLE) for one in each)
    return mean.assign(
        worst_difference=together["worst_difference"].max("dictionary", skipna=False),
        balanced=("covariate", np.abs(difference) < BALANCED),
    ).assign_attrs(
        n_sets=min(int(one.attrs["n_sets"]) for one in balances),
        comparable=int(usable),
        flags=unbalanced(difference),
    )


def _shortfalls(declared: Mapping[int, Declaration], direction: Direction) -> list[str]:
    """What the matching fell short of in single dictionaries, balance apart."""
    flags = {number: one.settings(direction).control_flags for number, one in declared.items()}
    return [
        f"dictionary {number}: {flag}"
        for number, of_one in flags.items()
        for flag in of_one
        if not flag.startswith("unbalanced:")
    ]


def _rank_p(outcomes: DirectionOutcomes, declared: Declaration) -> float:
    return judge(outcomes.table, declared.settings(outcomes.table.direction)).rank_p


def _pool(outcomes: Sequence[DirectionOutcomes]) -> DirectionOutcomes:
    """Completions of several dictionaries side by side, of the arms that all of them ran."""
    if len(outcomes) == 1:
        return outcomes[0]
    names = [[condition.name for condition in one.table.conditions] for one in outcomes]
    shared = [name for name in names[0] if all(name in others for others in names)]
    parts = tuple(one.table.keep(shared) for one in outcomes)
    samples: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts], axis=-1)
        for name in ("correct", "ending", "n_tokens", "other_ending")
    }
    known = [part.texts for part in parts if part.texts is not None]
    texts = None
    if len(known) == len(parts):
        unedited, edited, other = (
            np.concatenate([getattr(one, side) for one in known], axis=-1) for side in ("unedited", "edited", "other")
        )
        texts = replace(known[0], unedited=unedited, edited=edited, other=other)
    means: dict[str, Any] = {
        name: np.mean([getattr(part, name) for part in parts], axis=0)
        for name in ("kl_to_base", "kl_to_rl", "neutral_kl")
    }
    rows = [[others.index(name) for name in shared] for others in names]
    divergences = {
        name: np.mean([one.divergences[name][r] for one, r in zip(outcomes, rows, strict=True)], axis=0)
        for name in outcomes[0].divergences
    }
    return DirectionOutcomes(
        table=replace(parts[0], parts=parts, texts=texts, **samples, **means),
        divergences=divergences,
        passthrough_changed=max(one.passthrough_changed for one in outcomes),
        non_finite=tuple(dict.fromkeys(name for one in outcomes for name in one.non_finite)),
    )
