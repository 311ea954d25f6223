"""Simulated outcome tables: what a causal trial would yield in worlds whose truth is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.toolkit.statistics.causal.outcome_table import OUTCOME_CLASSES, Condition, OutcomeTable, Texts

RIGHT, WRONG, SILENT, EMPTY = (OUTCOME_CLASSES.index(name) for name in ("right", "wrong", "no_answer", "empty"))
N_TARGET, N_UNRELATED = 300, 100
REDRAWN: Final = 0.1
"""Share of prompts whose outcome chance decides anew in every arm."""


def arm_names(n_random: int, main: float = 0.0) -> list[Condition]:
    """Conditions of a trial with three doses between no edit and the whole one."""
    doses = [main + (1 - main) * share for share in (0.25, 0.5, 0.75)]
    return [
        Condition("unedited", "unedited", 1.0),
        Condition("fresh", "fresh", 1.0),
        Condition("passthrough", "passthrough", 1.0),
        Condition("set", "set", main),
        *(Condition(f"dose-{dose:g}", "dose", dose) for dose in doses),
        Condition("steering", "steering", 1.0),
        Condition("random-direction", "random_direction", 1.0),
        *(Condition(f"random-{b:03d}", "random", main) for b in range(n_random)),
    ]


def world(
    *,
    right: Mapping[str, float] | None = None,
    fails: int = SILENT,
    set_fails: int | None = None,
    base: float = 0.5,
    rl: float = 0.9,
    unrelated: float = 0.3,
    unrelated_drop: float = 0.0,
    kl: Mapping[str, float] | None = None,
    n_random: int = 39,
    seed: int = 0,
    random_right: Callable[[np.random.Generator], float] | None = None,
    fresh_noise: bool = True,
    n_target: int = N_TARGET,
    n_unrelated: int = N_UNRELATED,
    n_clusters: int | None = None,
    main: float = 0.0,
) -> OutcomeTable:
    """Disabling in the RL model: each prompt has one latent draw; arms and base are right on prompts below their level.

    ``right`` overrides the accuracy of kinds of arms, ``kl`` their divergence from base; doses lie between the set and
    no edit. Failures are of class ``fails``, the set arm's of ``set_fails``. A text names its prompt; a failure's is
    base's on that prompt, but for the set arm's own ``set_fails``. ``n_clusters`` share the target prompts in turn, by
    default one a prompt.
    """
    draw = np.random.default_rng(seed)
    conditions = arm_names(n_random, main)
    n = n_target + n_unrelated
    latent = draw.random(n)
    endings = np.empty((len(conditions), n, 1), dtype=np.int64)
    divergence = np.empty((len(conditions), n))
    for i, condition in enumerate(conditions):
        level = _level(condition, right or {}, rl, main)
        if condition.kind == "random" and random_right is not None:
            level = float(random_right(draw))
        redrawn = draw.random(n)
        noisy = fresh_noise and condition.kind != "unedited"
        mixed = np.where(draw.random(n) < REDRAWN, redrawn, latent) if noisy else latent
        broken = set_fails if condition.kind == "set" and set_fails is not None else fails
        endings[i, :, 0] = np.where(mixed < level, RIGHT, broken)
        drop = unrelated_drop if condition.kind == "set" else 0.0
        endings[i, n_target:, 0] = np.where(latent[n_target:] < unrelated - drop, RIGHT, WRONG)
        divergence[i] = (kl or {}).get(condition.kind, 1.0) + 0.1 * draw.standard_normal(n)
    other = np.where(latent < base, RIGHT, fails)[:, None]
    return OutcomeTable(
        direction="disable",
        conditions=tuple(conditions),
        correct=(endings == RIGHT).astype(np.float64),
        ending=endings,
        other_ending=other,
        kl_to_base=divergence,
        kl_to_rl=np.zeros_like(divergence),
        neutral_kl=np.full(len(conditions), 0.01),
        n_tokens=np.full(endings.shape, 3.0),
        task=np.array([f"task{i % 3}" if i < n_target else "control" for i in range(n)]),
        cluster=np.array([f"p{i % n_clusters if n_clusters and i < n_target else i}" for i in range(n)]),
        target=np.arange(n) < n_target,
        unrelated=np.arange(n) >= n_target,
        texts=Texts(
            unedited=texts_of(endings[0]),
            edited=texts_of(endings[3]),
            other=texts_of(other),
            prompts=np.array([f"ask p{i}" for i in range(n)], dtype=object),
            neutral=("plain words",),
        ),
    )


def _level(condition: Condition, accuracy: Mapping[str, float], rl: float, main: float) -> float:
    """Accuracy of an arm: of its kind; a dose's lies between the set's and no edit."""
    if condition.kind == "dose" and "dose" not in accuracy:
        return rl + (accuracy.get("set", rl) - rl) * (1 - condition.dose) / (1 - main)
    return accuracy.get(condition.kind, rl)


_WORDS = {RIGHT: "take p{i} ans p{i}", WRONG: "take p{i} ans x", EMPTY: ""}
_SILENT = ("well goes on", "noted p{i} done", "could be p{i} or q")


def texts_of(ending: NDArray[np.int64]) -> NDArray[np.object_]:
    """[prompt, sample] a completion for each ending: what is silent rambles, echoes or hedges, by prompt."""
    rows = [[_WORDS.get(int(e), _SILENT[i % 3]).format(i=i) for e in row] for i, row in enumerate(ending)]
    return np.array(rows, dtype=object)


def with_endings(table: OutcomeTable, ending: NDArray[np.int64]) -> OutcomeTable:
    """The table with other endings [condition, prompt, sample], and what follows from them."""
    if table.texts is None:
        return replace(table, ending=ending, correct=(ending == RIGHT).astype(np.float64))
    texts = replace(table.texts, unedited=texts_of(ending[table.unedited]), edited=texts_of(ending[table.chosen]))
    return replace(table, ending=ending, correct=(ending == RIGHT).astype(np.float64), texts=texts)


def amplified(table: OutcomeTable) -> OutcomeTable:
    """The same outcomes as a trial that amplifies: doses are mirrored about no edit."""
    conditions = tuple(
        replace(c, dose=2.0 - c.dose) if c.kind in ("set", "dose", "random") else c for c in table.conditions
    )
    return replace(
        table, direction="amplify", conditions=conditions, kl_to_rl=table.kl_to_base, kl_to_base=table.kl_to_rl
    )
