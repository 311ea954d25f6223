"""Contrast of training arms: which one introduces more model-specific features (claim C1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Final, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import special, stats
from statsmodels.stats.proportion import confint_proportions_2indep

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.null_views import noise_source
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics.core.comparability import check_comparable
from rlgen_stats.toolkit.statistics.core.coordinates import feature_ranks
from rlgen_stats.toolkit.statistics.kernels import pooled_estimates
from rlgen_stats.toolkit.statistics.kernels.numerics import TIE_SLACK, FloatArray, IntArray
from rlgen_stats.toolkit.statistics.specificity.compared_arms import (
    ARMS,
    COMPARABLE,
    COMPARISON,
    COMPARISONS,
    Arm,
    Compared,
    comparability,
    compare_arms,
    dictionaries_of,
    distances_of,
)
from rlgen_stats.toolkit.statistics.specificity.decoder_norms import CLUSTER_COSINE, CROSSCODER, decoder_clusters
from rlgen_stats.toolkit.statistics.specificity.matched_movement import MATCHED_RATIO
from rlgen_stats.toolkit.statistics.specificity.superiority import block_rows, cluster_draws, superiority

TAUS: Final = (0.7, 0.9)
"""Thresholds of docs/method.md 4e: target norm more than 2.3 and 9 times the original's."""

MIN_RUNS: Final = 3
"""Runs per arm from which runs, not features, are permuted: 3 against 3 is the first design whose floor is p = .10."""

AGREED: Final = "agreed_"
"""Prefix of the variables that count only features whose specificity latent scaling confirms."""

FLOOR: Final = "floor"
BY_TAU: Final = (
    *(f"tail_{arm}{end}" for arm in ARMS for end in ("", "_low", "_high")),
    *("effect", "effect_low", "effect_high", "p_value"),
)
"""Variables over comparison and threshold, also with the prefix ``AGREED``."""
BY_COMPARISON: Final = (
    *("superiority", "superiority_low", "superiority_high"),
    *(f"n_clusters_{arm}" for arm in ARMS),
)


@dataclass(frozen=True)
class _Dictionary:
    """Alive features of one crosscoder."""

    name: str
    cluster: IntArray
    """[feature] from 0 on."""
    sizes: FloatArray
    """[cluster]: features."""
    hits: FloatArray
    """[count, cluster]: features beyond each threshold, by norms and (then) by latent scaling too."""
    lean: FloatArray
    """[feature]: log of target's over original's decoder norm, less the median feature's."""

    @property
    def tails(self) -> FloatArray:
        """[count]: share of alive features."""
        return self.hits.sum(axis=1) / self.sizes.sum() if len(self.sizes) else np.full(len(self.hits), np.nan)

    @property
    def leaning(self) -> NDArray[np.bool_]:
        """[feature]: whether it leans to the target at least as much as the median feature does."""
        return self.lean >= 0

    def weights(self, draws: IntArray) -> FloatArray:
        """Weights [draw, leaning feature] from weights [draw, cluster]: features of one cluster share its weight."""
        cluster = self.cluster[self.leaning]
        return np.asarray((draws / self.sizes)[:, cluster], dtype=np.float64)


def attribution_contrast(
    table: xr.Dataset,
    clusters: Mapping[str, xr.Dataset | IntArray],
    *,
    sft: str | Sequence[str],
    rl: str | Sequence[str],
    floors: Mapping[str, Sequence[str]] | None = None,
    taus: Sequence[float] = TAUS,
    norm: Literal["l1", "l2"] = "l1",
    movement: xr.Dataset | None = None,
    health: xr.Dataset | None = None,
    alpha: float = 0.05,
    seed: int = 0,
    n_bootstrap: int = 999,
) -> xr.Dataset:
    """Model-specific features, SFT minus RL: of the final models, and where both are equally far from base.

    Parameters
    ----------
    table
        Layout ``attribution`` (see ``attribution_table``), whose coordinate ``target`` names the checkpoint that each
        crosscoder compares with base and ``dictionary`` its number among dictionaries of other seeds (default: all 1).
        With ``scaling_agrees[crosscoder, feature]`` everything is also computed for features that are specific by
        latent scaling too, under the prefix ``agreed_``.
    clusters
        Crosscoder name -> its decoders (clustered here by cosine > .7) or ready integer labels [feature].
    sft, rl
        Runs of the two arms; three or more on both sides make runs the unit.
    floors
        What no difference looks like: a name -> the crosscoders of base with itself (its dictionaries). Noise larger
        than either arm's distance from base at a comparison is no floor of it. Without a floor ``specificity_claim``
        takes no difference to be shown.
    taus, norm
        Thresholds on NRN and the norm it uses (the paper's is l1).
    movement
        Layout ``movement`` with every checkpoint, for matched drift.
    health
        Layout ``health``, for parity of fit.
    alpha, seed, n_bootstrap
        1 - coverage, seed and draws of the cluster bootstrap.

    Returns
    -------
    xr.Dataset
        Layout ``attribution_contrast``. Attribute ``decided_by``: the comparison that answers the claim.

    Raises
    ------
    InputError
        If a run has no crosscoder in the table, or a crosscoder no clusters.
    RefusedError
        If table, movement and health come from different studies.

    Notes
    -----
    Comparisons: the runs' last checkpoints (``final``); each run at the largest activation shift that all of them
    reach (``matched_shift``) and the same for KL from base (``matched_kl``), where a run stands for the mixture of its
    two neighbouring checkpoints that have a dictionary, weights linear in the log of the distance. ``final`` answers
    the claim where the final models are comparable (shifts within a factor 1.25, equal fit), else ``matched_shift``.

    Tail: T = share of alive features with NRN > tau; effect = T_sft - T_rl, in which a common floor cancels.
    Superiority, without a threshold: P(a feature of SFT leans more to its run than one of RL does) + P(equal) / 2, each
    decoder cluster weighted once, .5 is no difference. Compared are the halves of the dictionaries that lean to the
    run: log ratio of decoder norms at least the median, which takes off the scale that a view has as a whole.

    With fewer than three runs per arm the statement is about *these* models. Clusters of features (decoder cosine) are
    drawn within each dictionary, and the dictionaries' estimates pooled (``pooled_estimates``), so that the interval
    holds both. Where an arm has no specific feature at all (or only such) draws of it have no width, and the interval
    is at least Newcombe's with clusters counted as units. With three or more runs: exact permutation of runs between
    arms and Welch's interval.

    References
    ----------
    Newcombe 1998, doi:10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I.
    """
    runs = {"sft": [sft] if isinstance(sft, str) else list(sft), "rl": [rl] if isinstance(rl, str) else list(rl)}
    check_comparable(table, *(data for data in (movement, health) if data is not None), keys=("study_id",))
    names = {run: dictionaries_of(table, run) for run in (*runs["sft"], *runs["rl"])}
    of_base = dict(floors or {})
    prefixes = ("", AGREED) if "scaling_agrees" in table else ("",)
    groups = [*(group for of_run in names.values() for group in of_run.values()), *of_base.values()]
    dictionaries = {
        name: _dictionary(table, clusters, name, taus, norm, agreed=len(prefixes) > 1)
        for group in groups
        for name in group
    }
    contrast = _Contrast(dictionaries, alpha=alpha, seed=seed, n_bootstrap=n_bootstrap)
    compared = {one: compare_arms(one, runs, names, distances_of(movement, one)) for one in COMPARISONS}
    out = _dataset({one: contrast.of(c.arms) if c.arms else {} for one, c in compared.items()}, taus, prefixes)
    out = out.assign(_floor_variables(of_base, contrast, taus, prefixes))
    out = out.assign(_largest_floors(out, _too_far(of_base, compared, table, movement), prefixes))
    for prefix, arm in product(prefixes, ARMS):
        out[f"{prefix}excess_{arm}"] = out[f"{prefix}tail_{arm}"] - out[f"{prefix}tail_null"]
    comparable = {one: comparability(c, table, health) for one, c in compared.items()}
    out["comparable"] = (COMPARISON, np.array(list(comparable.values()), dtype=np.str_))
    for arm in ARMS:
        distance = [c.arms[arm].distance if c.arms else math.nan for c in compared.values()]
        out[f"distance_{arm}"] = (COMPARISON, np.array(distance))
    how = {"norm": norm, "seed": seed, "alpha": alpha, "n_bootstrap": n_bootstrap}
    return out.assign_attrs(_attrs(runs, compared["final"], of_base), decided_by=_decided_by(comparable), **how)


def _decided_by(comparable: Mapping[str, str]) -> str:
    """The comparison that answers the claim: at matched shift where only that is comparable."""
    known = (name for name in ("final", "matched_shift") if comparable[name].startswith(COMPARABLE))
    return next(known, "final")


def _dataset(found: Mapping[str, Mapping[str, Any]], taus: Sequence[float], prefixes: Sequence[str]) -> xr.Dataset:
    """What was found over [comparison, tau] and [comparison], NaN where a comparison could not be made."""
    n_dictionaries = max([len(one["superiority_each"]) for one in found.values() if one], default=0)
    shape = (len(found), len(prefixes), len(taus))
    variables: dict[str, Any] = {}
    for name in BY_TAU:
        values = np.full(shape, np.nan)
        for row, one in zip(values, found.values(), strict=True):
            if one:
                row[:] = np.reshape(one[name], row.shape)
        variables |= {prefix + name: ((COMPARISON, "tau"), values[:, i]) for i, prefix in enumerate(prefixes)}
    for name in BY_COMPARISON:
        variables[name] = (COMPARISON, np.array([float(one.get(name, np.nan)) for one in found.values()]))
    each, above = np.full((*shape, n_dictionaries), np.nan), np.full((len(found), n_dictionaries), np.nan)
    for i, one in enumerate(found.values()):
        if one:
            n = len(one["superiority_each"])
            each[i, ..., :n] = np.moveaxis(one["effect_each"], 0, -1).reshape(*shape[1:], n)
            above[i, :n] = one["superiority_each"]
    dims = (COMPARISON, "tau", "dictionary")
    variables |= {f"{prefix}effect_each": (dims, each[:, i]) for i, prefix in enumerate(prefixes)}
    variables["superiority_each"] = ((COMPARISON, "dictionary"), above)
    return xr.Dataset(
        variables,
        coords={
            COMPARISON: np.array(list(found), dtype=np.str_),
            "tau": np.array(list(taus), dtype=np.float64),
            "dictionary": np.arange(1, n_dictionaries + 1),
        },
    )


def _floor_variables(
    floors: Mapping[str, Sequence[str]], contrast: _Contrast, taus: Sequence[float], prefixes: Sequence[str]
) -> dict[str, Any]:
    """``tail_floor[floor, tau]``, the mean over a floor's dictionaries."""
    parts = [[(name, 1 / len(group)) for name in group] for group in floors.values()]
    tails = np.array([contrast.tails(one) for one in parts]).reshape(len(floors), len(prefixes), len(taus))
    labels = {FLOOR: np.array(list(floors), dtype=np.str_)}
    return {
        f"{prefix}tail_floor": xr.DataArray(tails[:, i], dims=(FLOOR, "tau"), coords=labels)
        for i, prefix in enumerate(prefixes)
        if floors
    }


def _too_far(
    floors: Mapping[str, Sequence[str]],
    compared: Mapping[str, Compared],
    table: xr.Dataset,
    movement: xr.Dataset | None,
) -> dict[str, list[str]]:
    """Comparison -> floors that say nothing there: farther from base than either arm is there, or who knows how far.

    Noise is as far as its source; what movement does not list is base. All of them where a comparison could not be
    made. Where no distance is known at all, the final models are their own noise's size.
    """
    targets = dict(zip(map(str, table[CROSSCODER].values), map(str, table["target"].values), strict=True))
    found: dict[str, list[str]] = {}
    for comparison, one in compared.items():
        known = {model: d for of_run in distances_of(movement, comparison).values() for model, d in of_run.items()}
        farthest = max((arm.distance for arm in one.arms.values()), default=math.nan) if one.arms else -math.inf
        found[comparison] = []
        for floor, group in floors.items():
            source = noise_source(targets[group[0]])
            distance = known.get(targets[group[0]], 0.0) if source is None else known.get(source, math.nan)
            if not (math.isnan(farthest) or distance <= MATCHED_RATIO * farthest):
                found[comparison].append(floor)
    return found


def _largest_floors(
    out: xr.Dataset, too_far: Mapping[str, Sequence[str]], prefixes: Sequence[str]
) -> dict[str, xr.DataArray]:
    """``tail_null[comparison, tau]``: the largest of the floors that hold at a comparison's distance; NaN if none."""
    largest = {}
    for prefix in prefixes:
        none = xr.full_like(out["effect"], np.nan)
        if f"{prefix}tail_floor" not in out:
            largest[f"{prefix}tail_null"] = none
            continue
        kept = [out[f"{prefix}tail_floor"].drop_sel({FLOOR: list(floors)}) for floors in too_far.values()]
        by_comparison = [one.max(FLOOR) if one.size else none.isel({COMPARISON: 0}, drop=True) for one in kept]
        largest[f"{prefix}tail_null"] = xr.concat(by_comparison, out[COMPARISON])
    return largest


def _attrs(
    runs: Mapping[str, Sequence[str]], finals: Compared, floors: Mapping[str, Sequence[str]]
) -> dict[str, object]:
    n_sft, n_rl = (len(runs[arm]) for arm in ARMS)
    by_run = min(n_sft, n_rl) >= MIN_RUNS
    return {
        "test": "exact permutation of runs between arms"
        if by_run
        else "bootstrap over decoder-cosine clusters, pooled over dictionaries",
        "null": "arms are exchangeable over runs" if by_run else "these models' dictionaries have equal tail mass",
        "unit": "run" if by_run else f"cluster of features (decoder cosine > {CLUSTER_COSINE}); dictionary",
        "scope": "SFT against RL" if by_run else f"these two models differ ({n_sft} SFT and {n_rl} RL run(s))",
        "runs_per_arm": [n_sft, n_rl],
        "floor": ", ".join(floors) or "none given",
        "models": [model for arm in ARMS for one in finals.arms[arm].runs for model in one.weights]
        if finals.arms
        else [],
    }


class _Contrast:
    """The statistics of two arms' dictionaries; draws of a dictionary are the same wherever it takes part."""

    def __init__(self, dictionaries: Mapping[str, _Dictionary], *, alpha: float, seed: int, n_bootstrap: int) -> None:
        self._dictionaries, self._alpha, self._seed, self._n_bootstrap = dictionaries, alpha, seed, n_bootstrap

    def _draws(self, name: str, rows: int | None = None) -> Iterator[IntArray]:
        seed = derive_seed(self._seed, "attribution_contrast", name)
        return cluster_draws(len(self._dictionaries[name].sizes), self._n_bootstrap, seed, rows=rows)

    def tails(self, parts: Sequence[tuple[str, float]]) -> FloatArray:
        """Share beyond each threshold of a mixture of dictionaries: [count]."""
        return np.asarray(sum(weight * self._dictionaries[name].tails for name, weight in parts), dtype=np.float64)

    def tail_draws(self, parts: Sequence[tuple[str, float]]) -> FloatArray:
        """The same in draws of clusters: [draw, count]."""
        total = np.zeros((self._n_bootstrap, 1))
        for name, weight in parts:
            one = self._dictionaries[name]
            if not len(one.sizes):
                return np.full((self._n_bootstrap, len(one.hits)), np.nan)
            drawn = [(draws @ one.hits.T) / (draws @ one.sizes)[:, None] for draws in self._draws(name)]
            total = total + weight * np.concatenate(drawn)
        return total

    def superiority(self, sft: Sequence[tuple[str, float]], rl: Sequence[tuple[str, float]]) -> FloatArray:
        """P(a feature of SFT leans more to its run than one of RL), of all clusters and in each draw: [1 + draw]."""
        total = np.zeros(1 + self._n_bootstrap)
        for (first, w), (second, v) in product(sft, rl):
            a, b = self._dictionaries[first], self._dictionaries[second]
            if not (a.leaning.any() and b.leaning.any()):
                return np.full_like(total, np.nan)
            rows = block_rows(max(len(a.sizes), len(b.sizes), len(a.lean), len(b.lean)))
            whole = tuple(np.ones((1, len(one.sizes)), dtype=np.int64) for one in (a, b))
            blocks = [whole, *zip(self._draws(first, rows), self._draws(second, rows), strict=True)]
            values = [
                superiority(a.lean[a.leaning], b.lean[b.leaning], a.weights(of_a), b.weights(of_b))
                for of_a, of_b in blocks
            ]
            total += w * v * np.nan_to_num(np.concatenate(values), nan=0.5)
        return total

    def of(self, arms: Mapping[str, Arm]) -> dict[str, Any]:
        """Tails [count] and superiority of two arms, pooled over dictionaries, with intervals and p-values."""
        n = min(arm.n_dictionaries for arm in arms.values())
        parts = {name: [arm.parts(r) for r in range(n)] for name, arm in arms.items()}
        tails = {name: np.stack([self.tails(p) for p in of_arm]) for name, of_arm in parts.items()}
        draws = {name: np.stack([self.tail_draws(p) for p in of_arm]) for name, of_arm in parts.items()}
        found: dict[str, Any] = {}
        for name in ARMS:
            pooled = pooled_estimates(tails[name], draws=draws[name], alpha=self._alpha)
            found[f"tail_{name}"] = pooled.mean
            found[f"tail_{name}_low"], found[f"tail_{name}_high"] = np.clip([pooled.low, pooled.high], 0, 1)
            found[f"n_clusters_{name}"] = self._n_clusters(parts[name])
        each = tails["sft"] - tails["rl"]
        if min(len(arm.runs) for arm in arms.values()) >= MIN_RUNS:
            found |= self._by_run(arms, n)
        else:
            effect = pooled_estimates(each, draws=draws["sft"] - draws["rl"], alpha=self._alpha)
            found |= {"effect": effect.mean, "p_value": effect.p_value}
            found["effect_low"], found["effect_high"] = self._no_width_at_the_ends(found, effect.low, effect.high)
        ranks = np.stack([self.superiority(*of_both) for of_both in zip(parts["sft"], parts["rl"], strict=True)])
        above = pooled_estimates(ranks[:, 0], draws=ranks[:, 1:], alpha=self._alpha)
        found |= {"superiority": above.mean, "effect_each": each, "superiority_each": ranks[:, 0]}
        found["superiority_low"], found["superiority_high"] = np.clip([above.low, above.high], 0, 1)
        return found

    def _n_clusters(self, parts: Sequence[Sequence[tuple[str, float]]]) -> float:
        """Clusters that as much is known from as from an arm's mixture; the mean over dictionaries."""
        spread = [sum(w**2 / max(len(self._dictionaries[name].sizes), 1) for name, w in one) for one in parts]
        return float(np.mean(1 / np.array(spread)))

    def _no_width_at_the_ends(self, found: Mapping[str, Any], low: Any, high: Any) -> tuple[FloatArray, FloatArray]:
        """The interval, and Newcombe's where an arm's share is 0 or 1: draws of that arm have no width."""
        low, high = np.array(low), np.array(high)
        n_sft, n_rl = found["n_clusters_sft"], found["n_clusters_rl"]
        for i, (sft, rl) in enumerate(zip(found["tail_sft"], found["tail_rl"], strict=True)):
            if {sft, rl} & {0.0, 1.0}:
                ends = confint_proportions_2indep(
                    sft * n_sft, n_sft, rl * n_rl, n_rl, method="newcomb", compare="diff", alpha=self._alpha
                )
                low[i], high[i] = min(low[i], ends[0]), max(high[i], ends[1])
        return low, high

    def _by_run(self, arms: Mapping[str, Arm], n: int) -> dict[str, FloatArray]:
        """Exact permutation of runs between arms, and Welch's interval of the difference of their means; [count]."""
        masses = {
            name: np.stack([np.mean([self.tails(one.parts(r)) for r in range(n)], axis=0) for one in arm.by_run()])
            for name, arm in arms.items()
        }
        sft, rl = masses["sft"], masses["rl"]
        both, n_sft = np.concatenate([sft, rl]), len(sft)
        effect = sft.mean(axis=0) - rl.mean(axis=0)
        sums = np.stack([both[list(chosen)].sum(axis=0) for chosen in combinations(range(len(both)), n_sft)])
        permuted = sums / n_sft - (both.sum(axis=0) - sums) / len(rl)
        ends = stats.ttest_ind(sft, rl, equal_var=False, axis=0).confidence_interval(1 - self._alpha)
        p = np.mean(np.abs(permuted) >= np.abs(effect) - TIE_SLACK, axis=0)
        return {"effect": effect, "effect_low": ends.low, "effect_high": ends.high, "p_value": p}


def _dictionary(
    table: xr.Dataset,
    clusters: Mapping[str, xr.Dataset | IntArray],
    name: str,
    taus: Sequence[float],
    norm: str,
    *,
    agreed: bool,
) -> _Dictionary:
    if name not in clusters:
        raise InputError(f"crosscoder {name!r} has no clusters; give its decoders or integer labels by name.")
    labels = _labels(table, clusters[name], name)
    nrn = np.asarray(table[f"nrn_{norm}"].sel({CROSSCODER: name}).values, dtype=np.float64)
    used = (labels >= 0) & np.isfinite(nrn)
    codes = np.unique(labels[used], return_inverse=True)[1].reshape(-1)
    # Clusters in order of their lowest feature label, so that draws do not depend on the order of features.
    lowest = np.full(int(codes.max(initial=-1)) + 1, len(used))
    np.minimum.at(lowest, codes, feature_ranks(table)[used])
    codes = np.argsort(np.argsort(lowest))[codes]
    beyond = np.array([nrn > tau for tau in taus])
    if agreed:
        beyond = np.concatenate([beyond, beyond & table["scaling_agrees"].sel({CROSSCODER: name}).values.astype(bool)])
    hits = [np.bincount(codes, weights=row[used].astype(float), minlength=len(lowest)) for row in beyond]
    lean = special.logit(nrn[used])
    return _Dictionary(
        name,
        codes,
        np.bincount(codes, minlength=len(lowest)).astype(np.float64),
        np.array(hits),
        lean - np.median(lean) if len(lean) else lean,
    )


def _labels(table: xr.Dataset, source: xr.Dataset | IntArray, name: str) -> IntArray:
    """Cluster per feature of the table; -1 where not alive."""
    alive = np.asarray(table["alive"].sel({CROSSCODER: name}).values, dtype=bool)
    if isinstance(source, xr.Dataset):
        given = decoder_clusters(source, alive=alive[: source.sizes["feature"]])
    else:
        given = np.asarray(source, dtype=np.int64).reshape(-1)
    if len(given) > len(alive) or alive[len(given) :].any():
        raise InputError(f"crosscoder {name!r} has {len(alive)} features in the table but {len(given)} cluster labels.")
    labels = np.full(len(alive), -1, dtype=np.int64)
    labels[: len(given)] = given
    return np.where(alive, labels, -1)
