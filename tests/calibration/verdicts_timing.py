"""Claim C2: verdicts on simulated studies, excess turnover where only sizes differ, and coverage of its intervals."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

import dask
import numpy as np
import xarray as xr

from rlgen_stats.toolkit.statistics import set_stability, stabilization_test
from rlgen_stats.toolkit.statistics.claim_verdicts import Verdict
from rlgen_stats.toolkit.statistics.planning.simulated_claims import features_of_runs, two_runs
from rlgen_stats.toolkit.statistics.timing.run_contrast import timing_contrast
from rlgen_stats.toolkit.study.claim_power import verdict_of_contrast
from tests.calibration.rows import MOST_ERRORS, Row, rate_row

ALPHA: Final = 0.05
SHARES: Final = np.array([0.2, 0.4, 0.6, 0.8, 1.0])
N, F, K = 60, 150, 20
SETTLING: Final = {
    "alike": ((0.2, 0.9), (0.2, 0.9)),
    "later": ((0.05, 0.4), (0.5, 1.0)),
    "earlier": ((0.5, 1.0), (0.05, 0.4)),
    "later, both early": ((0.02, 0.15), (0.1, 0.4)),
}
"""Shares of training between which the features of SFT, and of RL, become complete."""
OLD_RULE: Final = "status by half of training"
UNBIASED: Final = 0.03
"""Mean Delta allowed where nothing but sizes differs (docs/method.md 4b)."""


def features_of(paths: dict[str, np.ndarray], random: np.random.Generator) -> xr.Dataset:
    """Features of runs with checkpoints at equal distances."""
    steps = range(10, 10 * len(next(iter(paths.values()))) + 1, 10)
    return features_of_runs(paths, steps, N, random)


def paths_of(kind: str, random: np.random.Generator) -> dict[str, np.ndarray]:
    """True changes of one study; effects are exponential, RL's six tenths of SFT's."""
    if kind != "growing":
        return two_runs(SETTLING[kind], SHARES, F, random)
    sft, rl = (scale * random.exponential(0.8, F) * random.choice([-1, 1], F) for scale in (1.0, 0.6))
    return {"sft": np.tile(sft, (5, 1)), "rl": SHARES[:, None] * rl}


def analysed(features: xr.Dataset, seed: int) -> tuple[xr.Dataset, xr.Dataset]:
    """Stabilisation and set tests of a study."""
    with dask.config.set(scheduler="synchronous"):
        chain = stabilization_test(features, runs=["sft", "rl"], n_bootstrap=199, seed=seed).compute()
        sets = set_stability(features, runs=["sft", "rl"], k=K, n_halvings=10, n_groups=10, seed=seed)
    return chain, sets


def old_verdict(sets: xr.Dataset) -> Verdict:
    """The rule before: turnover below the arithmetic mean of the ceilings, and a status by half of training."""
    early, turnover = {}, {}
    for run in ("sft", "rl"):
        one = sets.isel(model=np.flatnonzero(sets["run"].values == run))
        delta = ((one.noise_ceiling + one.final_ceiling) / 2 - one.cross).values
        low, high, lower, upper = (
            delta + (one[f"delta_{end}"] - one.delta).values for end in ("low", "high", "lower", "upper")
        )
        stable = np.cumprod((upper[:-1] < 0.10)[::-1])[::-1].astype(bool)
        if float(one.final_ceiling[-1]) < 0.5 or (not stable.any() and lower[-2] <= 0):
            return Verdict.UNDETERMINED
        early[run] = bool(stable.any() and SHARES[stable.argmax()] <= 0.5)
        turnover[run] = (delta[2], low[2], high[2])
    (sft, sft_low, sft_high), (rl, rl_low, rl_high) = turnover["sft"], turnover["rl"]
    below, above = rl - sft - np.hypot(rl - rl_low, sft_high - sft), rl - sft + np.hypot(rl_high - rl, sft - sft_low)
    if early["sft"] == early["rl"]:
        return Verdict.NOT_SUPPORTED
    if early["sft"]:
        return Verdict.SUPPORTED if below > 0 else Verdict.UNDETERMINED
    return Verdict.CONTRADICTED if above < 0 else Verdict.UNDETERMINED


FALSE: Final = {
    "alike": ("SUPPORTED", "CONTRADICTED"),
    "growing": ("SUPPORTED", "CONTRADICTED"),
    "later": ("CONTRADICTED", "NOT_SUPPORTED"),
    "earlier": ("SUPPORTED", "NOT_SUPPORTED"),
    "later, both early": ("CONTRADICTED", "NOT_SUPPORTED"),
}
"""Verdicts that are wrong in a study of this kind."""
WORDS: Final = {
    "alike": "both runs settle alike",
    "growing": "RL's effects only grow, in one ranking",
    "later": "RL settles later",
    "earlier": "RL settles earlier",
    "later, both early": "RL settles later, both before half of training",
}


def timing_verdicts(scale: int, seed: int) -> list[Row]:
    """How often a study is given a direction it does not have, or denied the one it has."""
    worlds, rows = 4 * scale, []
    size = f"{worlds} studies, {N} prompts, {F} features, 5 checkpoints a run"
    for i, (kind, wrong) in enumerate(FALSE.items()):
        new, old = Counter[Verdict](), Counter[Verdict]()
        for w in range(worlds):
            random = np.random.default_rng([seed, 31, i, w])
            chain, sets = analysed(features_of(paths_of(kind, random), random), w)
            new[
                verdict_of_contrast(timing_contrast([chain], [sets], first="sft", second="rl", alpha=ALPHA), ALPHA)
            ] += 1
            old[old_verdict(sets)] += 1
        hits, before = (sum(found[Verdict(verdict)] for verdict in wrong) for found in (new, old))
        naive: dict[str, Any] = {"naive": before / worlds, "naive_name": OLD_RULE} if before > worlds / 2 else {}
        rows.append(rate_row(f"false verdict, {WORDS[kind]}", ALPHA, hits, worlds, size, at_most=True, **naive))
        if kind in ("later", "earlier"):
            right = Verdict.SUPPORTED if kind == "later" else Verdict.CONTRADICTED
            found, before_ = new[right] / worlds, old[right] / worlds
            rows.append(Row(f"{right.lower()}, {WORDS[kind]}", 0.8, found, 0.8, 1.0, before_, OLD_RULE, size))
    return rows


def turnover_of_sizes(scale: int, seed: int) -> list[Row]:
    """One ranking at every checkpoint, sizes that grow, shrink or stay; exponential, heavy-tailed or few effects."""
    worlds = 16 * scale
    kinds = {
        "grow": np.array([0.2, 0.5, 0.8, 1.0]),
        "shrink": np.array([1.0, 0.8, 0.5, 0.3]),
        "stay": np.ones(4),
    }
    delta, old = [], []
    for w in range(worlds):
        random = np.random.default_rng([seed, 32, w])
        size = {
            0: random.exponential(0.3, F),
            1: 0.3 * np.abs(random.standard_t(2, F)),
            2: np.where(random.random(F) < 0.2, random.exponential(0.6, F), 0.0),
        }[w % 3]
        features = features_of({kind: level[:, None] * size for kind, level in kinds.items()}, random)
        with dask.config.set(scheduler="synchronous"):
            sets = set_stability(
                features, runs=list(kinds), k=(10, 20, 40)[w % 5 % 3], n_halvings=10, n_groups=2, seed=w
            )
        delta.append(sets.delta.values)
        old.append(((sets.noise_ceiling + sets.final_ceiling) / 2 - sets.cross).values)
    rows, size = [], f"{worlds} worlds, top 10 to 40 of {F}, {N} prompts"
    for i, kind in enumerate(kinds):
        of_kind = slice(4 * i, 4 * i + 3)  # at the last checkpoint Delta is 0
        new, before = (np.array(x)[:, of_kind] for x in (delta, old))
        worst = np.abs(new.mean(axis=0)).argmax()
        half = max(UNBIASED, MOST_ERRORS * float(new[:, worst].std(ddof=1)) / np.sqrt(worlds))
        naive = (np.abs(before.mean(axis=0)).max(), "arithmetic mean of ceilings") if kind != "stay" else (np.nan, "")
        name = f"mean Delta of the worst checkpoint, sizes {kind}"
        rows.append(Row(name, 0.0, float(new[:, worst].mean()), -half, half, float(naive[0]), naive[1], size))
    return rows


def timing_intervals(scale: int, seed: int) -> list[Row]:
    """Intervals that miss the mean over repetitions of a study, its features and their true changes held fixed."""
    worlds = 10 * scale
    paths = paths_of("later", np.random.default_rng([seed, 33]))
    found: dict[str, list[np.ndarray]] = {}
    for w in range(worlds):
        chain, sets = analysed(features_of(paths, np.random.default_rng([seed, 33, w])), w)
        contrast = timing_contrast([chain], [sets], first="sft", second="rl", alpha=ALPHA)
        changed = chain.isel(stratum=[1, 2])
        for name, data, variable, ends in (
            ("share of features settled", chain, "share", ("", "_low", "_high")),
            ("share settled in a stratum", changed, "share_in_stratum", ("", "_low", "_high")),
            ("excess turnover at a checkpoint", sets.isel(model=[0, 5, 6, 7, 8]), "delta", ("", "_low", "_high")),
            ("difference in time and in turnover", contrast, "", ("difference", "low", "high")),
        ):
            found.setdefault(name, []).append(np.stack([data[variable + end].values for end in ends]))
    rows = []
    for name, estimates in found.items():
        value, low, high = np.moveaxis(np.array(estimates), 1, 0)
        truth = value.mean(axis=0)
        varies = value.std(axis=0) > 0.005  # where all repetitions agree there is nothing to cover
        missed = ((truth < low) | (truth > high)).mean(axis=0)[varies]
        size = f"{worlds} repetitions, the worst of {missed.size}"
        rows.append(
            rate_row(f"interval misses, {name}", ALPHA, round(missed.max() * worlds), worlds, size, at_most=True)
        )
    return rows
