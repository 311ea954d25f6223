"""How often a larger edit passes for specific, a mediated share is missed, and a set is wrongly called compact."""

from __future__ import annotations

from typing import Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import sparse, stats

from rlgen_stats.schemas.dims import FEATURE
from rlgen_stats.toolkit.statistics.causal.controls import match_controls
from rlgen_stats.toolkit.statistics.causal.edit_norms import EditNorm, ModelCodes
from rlgen_stats.toolkit.statistics.causal.mediated_share import (
    ALL,
    PATCH,
    SET,
    Curve,
    CurvePoint,
    RatioToPatch,
    compact_share,
    mediated_share,
)
from rlgen_stats.toolkit.statistics.claim_verdicts import SelectionReason, Verdict, selection_verdict
from rlgen_stats.toolkit.statistics.selection.compactness import CARRIED
from tests.calibration.rows import Row, rate_row

ALPHA: Final = 0.05
N_SETS: Final = 39
N_GROUPS, PER_GROUP, N_TOKENS, N_CHANNELS = 8, 32, 64, 16


def larger_edits(scale: int, seed: int) -> list[Row]:
    """Disabling any features costs accuracy in proportion to the norm of the edit, and nothing else matters.

    The set's features fire together and point the same way, as features of one mechanism do, so that they add up; each
    by itself fires, is long and is active like any other feature.
    """
    n_studies, size, n_prompts = 20 * scale, 6, 400
    random = np.random.default_rng([seed, 51])
    hits, naive = 0, 0
    for study in range(n_studies):
        covariates, norm = _dictionary(random)
        chosen = random.permutation(PER_GROUP)[:size]
        for by_norm in (True, False):
            matched = match_controls(
                covariates,
                chosen.tolist(),
                norm.of_each if by_norm else _nothing,
                n_sets=N_SETS,
                seed=study,
            )
            norms = norm.of_each(np.vstack([chosen[None], matched.sets]))
            cost = random.binomial(n_prompts, np.minimum(0.3 * norms / norms[0], 1.0))
            rank = (1 + (cost[1:] >= cost[0]).sum()) / (1 + len(matched.sets))
            specific = matched.comparable and rank <= ALPHA
            hits, naive = hits + (by_norm and specific), naive + (not by_norm and specific)
    return [
        rate_row(
            "set that is only a larger edit called specific",
            ALPHA,
            hits,
            n_studies,
            f"{n_studies} studies, sets of {size}, {N_SETS} random sets, {n_prompts} prompts",
            naive=naive / n_studies,
            naive_name="matched on single features' firing, norm and energy",
            at_most=True,
        )
    ]


def _nothing(sets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Edits that all have one norm: what matching on single features knows of them."""
    return np.ones(len(sets))


def _dictionary(random: np.random.Generator) -> tuple[xr.Dataset, EditNorm]:
    """Groups of features that fire on the same tokens and share most of their direction; alike one by one."""
    n = N_GROUPS * PER_GROUP
    group = np.repeat(np.arange(N_GROUPS), PER_GROUP)
    shared = random.standard_normal((N_GROUPS, N_CHANNELS))
    directions = np.sqrt(0.7) * shared[group] + np.sqrt(0.3) * random.standard_normal((n, N_CHANNELS))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    fires = random.random((N_TOKENS, N_GROUPS)) < 0.3
    level = np.exp(0.2 * random.standard_normal(n))
    codes = fires[:, group] * level * np.exp(0.2 * random.standard_normal((N_TOKENS, n)))
    covariates = xr.Dataset(
        {
            "log_firing": (FEATURE, np.log(0.3) + 0.1 * random.standard_normal(n)),
            "decoder_norm": (FEATURE, np.exp(0.1 * random.standard_normal(n))),
            "contribution_energy": (FEATURE, 2 * np.log(level)),
            "mas_bin": (FEATURE, np.full(n, 2)),
        }
    )
    return covariates, EditNorm((ModelCodes(sparse.csc_array(codes), directions.astype(np.float32)),))


def mediated_shares(scale: int, seed: int) -> list[Row]:
    """Features that carry a known share of the patch's effect, in one dictionary and over three that differ."""
    n_studies = 10 * scale
    rows = []
    for n_dictionaries, spread, shares in ((1, 0.0, (0.0, 0.2, 0.5, 0.9, 1.0)), (3, 0.15, (0.4, 0.5, 0.6))):
        random = np.random.default_rng([seed, 52, n_dictionaries])
        misses, naive, n = 0, 0, 0
        for _ in range(n_studies):
            patch, effects, code = _study(random, shares, n_dictionaries, spread)
            ratio = RatioToPatch(patch, code, sign=1.0, alpha=ALPHA)
            share, low, high = ratio.interval(effects)
            if np.isnan(share).any():
                continue  # no shown effect of the patch, and so no share
            left = effects.mean(axis=0) - share[:, None] * patch
            half = stats.norm.ppf(1 - ALPHA / 2) * left.std(axis=1, ddof=1) / np.sqrt(len(patch)) / patch.mean()
            misses += int(((low > shares) | (high < shares)).sum())
            naive += int((np.abs(share - shares) > half).sum())
            n += len(shares)
        rows.append(
            rate_row(
                f"mediated share missed, {n_dictionaries} dictionar{'y' if n_dictionaries == 1 else 'ies'}",
                ALPHA,
                misses,
                n,
                f"{n} shares of {shares[0]:g} to {shares[-1]:g}, 30 clusters of 5 prompts, ICC .3",
                naive=naive / max(n, 1) if spread else np.nan,
                naive_name="dictionaries taken as known" if spread else "",
                at_most=True,
            )
        )
    return rows


def compact_sets(scale: int, seed: int) -> list[Row]:
    """C3's verdict on confirmed features where the set, the leading 50 and random sets carry known shares."""
    n_studies, rows = 5 * scale, []
    for carries, shares, spread, wrong, verdict, naive_name in (
        ("half", (0.5, 0.5, 0.05), 0.15, True, Verdict.SUPPORTED, "the share without its interval"),
        ("half", (0.5, 0.5, 0.05), 0.15, True, Verdict.NOT_SUPPORTED, "the share without its interval"),
        ("nine tenths, as random sets do,", (0.9, 0.9, 0.9), 0.05, True, Verdict.SUPPORTED, "without random sets"),
        ("nine tenths", (0.9, 0.95, 0.05), 0.05, False, Verdict.SUPPORTED, ""),
        ("a tenth", (0.1, 0.2, 0.05), 0.05, False, Verdict.NOT_SUPPORTED, ""),
    ):
        random = np.random.default_rng([seed, 53])
        found = [_compactness(random, shares, spread) for _ in range(n_studies)]
        hits = sum((one is verdict) is wrong for one, _ in found)
        naive = sum(second is verdict for _, second in found) / n_studies
        rows.append(
            rate_row(
                f"C3 {'' if wrong else 'not '}{verdict.value}, the set carries {carries} of the patch's effect",
                ALPHA if wrong else 0.2,
                hits,
                n_studies,
                f"{n_studies} studies, 3 dictionaries that differ by {spread:g}, 60 clusters of 5 prompts, ICC .3",
                naive=naive if naive_name else np.nan,
                naive_name=naive_name,
                at_most=True,
            )
        )
    return rows


def _compactness(
    random: np.random.Generator, shares: tuple[float, float, float], spread: float
) -> tuple[Verdict, Verdict]:
    """The verdict in one study, and the naive one: by the share alone, or without random sets where they do much."""
    of_set, leading, of_random = shares
    arms = (of_set, leading, *[of_random] * 3, 1.0)
    patch, effects, code = _study(random, arms, 3, spread, n_clusters=60)
    names = ("set", "top-50", "r-1", "r-2", "r-3", "all")
    points = (
        CurvePoint(SET, 8, "set", ("r-1", "r-2", "r-3"), 0.3, (0.3, 0.3, 0.3)),
        CurvePoint("top-50", 50, "top-50", (), 0.6, ()),
        CurvePoint(ALL, 512, "all", (), 1.0, ()),
    )
    curves = {
        d: [Curve("amplify", points, dict(zip(names, one, strict=True)) | {PATCH: patch}, code.astype(str))]
        for d, one in enumerate(effects, start=1)
    }
    found = compact_share(mediated_share(curves, alpha=ALPHA), 50)
    if found is None:  # no shown effect of the patch, and so no share
        return Verdict.UNDETERMINED, Verdict.UNDETERMINED
    verdict, reason = selection_verdict(
        n_estimable=5,
        n_confirming=5,
        n_confirmed=5,
        carried_low=found.of_set.low,
        best_high=found.best_high,
        no_rise_p=1.0,
        accompanying_p=np.nan,
        alpha=ALPHA,
        is_compact=found.is_compact,
        beyond_random_low=found.of_set.above_low,
    )
    if of_random > CARRIED:
        return verdict, Verdict.SUPPORTED if reason is SelectionReason.LIKE_RANDOM else verdict
    return verdict, Verdict.SUPPORTED if found.of_set.share >= CARRIED else Verdict.NOT_SUPPORTED


def _study(
    random: np.random.Generator, shares: tuple[float, ...], n_dictionaries: int, spread: float, n_clusters: int = 30
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Changes that the patch makes [prompt], that features make [dictionary, share, prompt], and clusters [prompt].

    A patch changes 35% of the prompts, one in seven for the worse. Features do the same on a share of these, clusters
    of which are alike, and something of their own on 2% of the rest.
    """
    size, icc = 5, 0.3
    code = np.repeat(np.arange(n_clusters), size)

    def latent(*shape: int) -> NDArray[np.float64]:
        common = random.standard_normal((*shape, n_clusters))[..., code]
        return np.sqrt(icc) * common + np.sqrt(1 - icc) * random.standard_normal((*shape, len(code)))

    z = latent()
    patch = (z > stats.norm.isf(0.3)).astype(float) - (z < stats.norm.ppf(0.05))
    each = np.clip(np.array(shares) + spread * random.standard_normal((n_dictionaries, 1)), 0, 1)
    does = latent(n_dictionaries, len(shares)) < stats.norm.ppf(each)[..., None]
    own = (patch == 0) & (random.random(does.shape) < 0.02)
    return patch, np.where(own, random.choice([-1.0, 1.0], does.shape), does * patch), code
