"""Simulated outcome tables: what a trial would yield in worlds whose truth is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from rlgen_stats.toolkit.intervention import Condition, OutcomeTable, Settings
from rlgen_stats.toolkit.statistics.causal.outcome_table import OUTCOME_CLASSES

RIGHT, WRONG, SILENT, EMPTY = (OUTCOME_CLASSES.index(name) for name in ("right", "wrong", "no_answer", "empty"))
SETTINGS = Settings(alpha=0.05, margin=0.05, n_resamples=999, seed=3)
N_TARGET, N_UNRELATED = 300, 100


def arm_names(n_random: int, main: float = 0.0) -> list[Condition]:
    middle = (main + 1) / 2
    return [
        Condition("unedited", "unedited", 1.0),
        Condition("fresh", "fresh", 1.0),
        Condition("passthrough", "passthrough", 1.0),
        Condition("set", "set", main),
        Condition(f"dose-{middle:g}", "dose", middle),
        Condition("steering", "steering", 1.0),
        Condition("random-direction", "random_direction", 1.0),
        *(Condition(f"random-{b:03d}", "random", main) for b in range(n_random)),
    ]


def world(
    *,
    right: dict[str, float] | None = None,
    fails: int = SILENT,
    set_fails: int | None = None,
    base: float = 0.5,
    rl: float = 0.9,
    unrelated_drop: float = 0.0,
    kl: dict[str, float] | None = None,
    n_random: int = 39,
    seed: int = 0,
    random_right: Any = None,
    fresh_noise: bool = True,
) -> OutcomeTable:
    """Disabling in the RL model: each prompt has one latent draw; an arm is right on prompts below its accuracy.

    ``right`` overrides the accuracy of kinds; failures are of class ``fails``, the set arm's of ``set_fails``.
    """
    draw = np.random.default_rng(seed)
    conditions = arm_names(n_random)
    n = N_TARGET + N_UNRELATED
    latent = draw.random(n)
    accuracy = {"dose": None, **(right or {})}
    endings = np.empty((len(conditions), n, 1), dtype=np.int64)
    divergence = np.empty((len(conditions), n))
    for i, condition in enumerate(conditions):
        level = accuracy.get(condition.kind)
        level = rl if level is None else level
        if condition.kind == "random" and random_right is not None:
            level = float(random_right(draw))
        redrawn = draw.random(n)
        mixed = (
            np.where(draw.random(n) < 0.1, redrawn, latent) if fresh_noise and condition.kind != "unedited" else latent
        )
        broken = set_fails if condition.kind == "set" and set_fails is not None else fails
        endings[i, :, 0] = np.where(mixed < level, RIGHT, broken)
        drop = unrelated_drop if condition.kind == "set" else 0.0
        endings[i, N_TARGET:, 0] = np.where(latent[N_TARGET:] < 0.3 - drop, RIGHT, WRONG)
        divergence[i] = (kl or {}).get(condition.kind, 1.0) + 0.1 * draw.standard_normal(n)
    other = np.where(draw.random(n) < base, RIGHT, fails)[:, None]
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
        task=np.array([f"task{i % 3}" if i < N_TARGET else "control" for i in range(n)]),
        cluster=np.array([f"p{i}" for i in range(n)]),
        target=np.arange(n) < N_TARGET,
        unrelated=np.arange(n) >= N_TARGET,
    )


def causal(**changes: Any) -> OutcomeTable:
    """The set carries what RL added: without it the model rambles as base does, and half of it does half."""
    return world(**{"right": {"set": 0.5, "dose": 0.7}, "kl": {"set": 0.3}, **changes})


def with_sets(settings: Settings, **changes: Any) -> Settings:
    return replace(settings, **changes)
