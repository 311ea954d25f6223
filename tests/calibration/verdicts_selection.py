"""Verdicts on C3 in simulated studies: false SUPPORTED, and whether more data can turn a true set against the claim."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from rlgen_stats.toolkit.statistics.claim_verdicts import Verdict, selection_claim
from rlgen_stats.toolkit.statistics.kernels import adjust, permutation_contrast, sign_flip_test
from rlgen_stats.toolkit.statistics.planning.simulated_claims import (
    MODELS,
    Change,
    rises_where_gained,
    selection_study,
)
from rlgen_stats.toolkit.statistics.selection.options import SelectionTests
from rlgen_stats.toolkit.statistics.selection.select_features import select_features
from tests.calibration.rows import Row, rate_row

ALPHA, TASKS, TRUE, FEATURES = 0.05, 2, 6, 60
TESTS = SelectionTests(n_resamples=9, n_bootstrap=0)

study = partial(selection_study, n_features=FEATURES)
"""A study of two tasks."""


def verdicts(features: xr.Dataset, outcomes: xr.Dataset) -> tuple[Verdict, Verdict]:
    """The verdict by today's rule, and by the rule of earlier releases."""
    out = select_features(features, outcomes, target=MODELS[1], tests=TESTS, stability=None)
    return selection_claim([out], alpha=ALPHA)[0], _earlier(features, outcomes)


def _earlier(features: xr.Dataset, outcomes: xr.Dataset) -> Verdict:
    """Gains, and as guard gains against losses (both right minus wrong model) or all prompts; at most a tenth."""
    d = (features["mean"][1] - features["mean"][0]).values
    base, rl = outcomes.greedy_correct.values == 1
    p = {}
    for split in ("selection", "verification"):
        of_tasks = []
        for task in ("in", "out"):
            inside = (features.split.values == split) & (features.task.values == task)
            gain, loss = d[inside & ~base & rl], -d[inside & base & ~rl]
            if len(gain) < 6:
                continue
            if min(len(gain), len(loss)) >= TESTS.min_discordant:
                guard = permutation_contrast(gain, loss, alternative="greater", n_resamples=999).p_value
            else:
                guard = sign_flip_test(d[inside], alternative="greater").p_value
            of_tasks.append(np.maximum(sign_flip_test(gain, alternative="greater").p_value, guard))
        if len(of_tasks) < TASKS:
            return Verdict.UNDETERMINED
        p[split] = np.max(of_tasks, axis=0)
    candidate = np.asarray(adjust(p["selection"], method="bh")) <= ALPHA
    holm = np.asarray(adjust(np.where(candidate, p["verification"], np.nan), method="holm"))
    confirmed = int((np.nan_to_num(holm, nan=1.0) <= ALPHA).sum())
    return Verdict.SUPPORTED if 0 < confirmed <= 0.1 * d.shape[1] else Verdict.NOT_SUPPORTED


def nothing(right: np.ndarray, noise: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """No difference."""
    return noise


def everywhere(right: np.ndarray, noise: np.ndarray, random: np.random.Generator, *, by: float = 0.6) -> np.ndarray:
    """Some features rise by the same on all prompts."""
    noise[1, :, :TRUE] += by
    return noise


def follows(right: np.ndarray, noise: np.ndarray, random: np.random.Generator, *, r: float = 0.3) -> np.ndarray:
    """Some features are higher where the model itself is right, in base and RL alike."""
    noise[:, :, :TRUE] += 2 * r * right[:, :, None]
    return noise


def follows_and_rises(right: np.ndarray, noise: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Both at once."""
    return everywhere(right, follows(right, noise, random), random)


def _rates(change: Change, n: int, worlds: int, seed: int, **options: Any) -> tuple[Counter[Verdict], Counter[Verdict]]:
    pairs = [verdicts(*study(change, n, seed=1000 * seed + w, **options)) for w in range(worlds)]
    return Counter(new for new, _ in pairs), Counter(old for _, old in pairs)


MANY_LOSSES = {"accuracy": (0.5, 0.6), "lost": 0.4}
EQUAL = {"accuracy": (0.5, 0.5), "lost": 0.06}
"""Two models of equal accuracy that seldom disagree."""


def selection_false(scale: int, seed: int) -> list[Row]:
    """SUPPORTED where no feature changes in particular where RL gained."""
    worlds, rows = 5 * scale, []
    for name, change, n, options in (
        ("nothing differs", nothing, 400, {}),
        ("rises everywhere", everywhere, 400, {}),
        ("rises everywhere, many losses", everywhere, 600, MANY_LOSSES),
        ("follows correctness, equal accuracy, few losses", follows, 800, EQUAL),
        ("follows correctness, RL more accurate, few losses", follows, 400, {}),
        ("follows correctness, many losses", follows, 600, MANY_LOSSES),
        ("follows and rises, many losses", follows_and_rises, 600, MANY_LOSSES),
    ):
        new, old = _rates(change, n, worlds, seed, **options)
        rows.append(
            _row(
                f"C3 SUPPORTED, {name}",
                new[Verdict.SUPPORTED],
                old[Verdict.SUPPORTED],
                worlds,
                f"{worlds} studies of {FEATURES} features, {n} prompts",
                "without the excess over both right",
            )
        )
    return rows


def selection_more_data(scale: int, seed: int) -> list[Row]:
    """False verdicts with few prompts and with many: a true set of 30 features in 200, and a rise spread over half."""
    worlds, rows = 5 * scale, []
    for n in (60, 120, 400, 1200):
        new, old = _rates(rises_where_gained(30), n, worlds, seed, n_features=200)
        rows.append(
            _row(
                f"C3 NOT_SUPPORTED, true set, {n} prompts",
                new[Verdict.NOT_SUPPORTED],
                old[Verdict.NOT_SUPPORTED],
                worlds,
                f"{worlds} studies, 30 of 200 features, 20 carry 67%",
                "at most a tenth confirmed",
            )
        )
    for n in (120, 400):
        new, old = _rates(rises_where_gained(30), n, worlds, seed)
        rows.append(
            _row(
                f"C3 SUPPORTED, spread out, {n} prompts",
                new[Verdict.SUPPORTED],
                old[Verdict.SUPPORTED],
                worlds,
                f"{worlds} studies, 30 of {FEATURES} features, 6 carry 20%",
                "at most a tenth confirmed",
            )
        )
    return rows


def _row(name: str, hits: int, old_hits: int, worlds: int, size: str, naive_name: str) -> Row:
    """False verdicts; beside them those of earlier releases, where they are more than chance allows."""
    row = rate_row(name, ALPHA, hits, worlds, size, at_most=True)
    rate = old_hits / worlds
    return replace(row, naive=rate, naive_name=naive_name) if rate > row.high else row
