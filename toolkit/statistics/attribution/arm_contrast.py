"""Contrast of arms: which one introduces more model-specific features (claim C1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Final, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from rlgen_stats.schemas.dims import MODEL, RUN, STEP, VIEW
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics.attribution.decoder_norms import CLUSTER_COSINE, CROSSCODER, decoder_clusters
from rlgen_stats.toolkit.statistics.core.comparability import check_comparable
from rlgen_stats.toolkit.statistics.core.coordinates import feature_ranks
from rlgen_stats.toolkit.statistics.kernels import wilson_interval
from rlgen_stats.toolkit.statistics.kernels.numerics import TIE_SLACK, FloatArray, IntArray

TAUS: Final = (0.7, 0.9)
"""Thresholds of METHOD.md 4e: target norm more than 2.3 and 9 times the original's."""

MIN_RUNS: Final = 3
"""Runs per arm from which runs, not features, are permuted: 3 against 3 is the first design whose floor is p = .10."""

MATCHED_SHIFT_RATIO: Final = 1.25
"""Largest ratio of activation shifts still called matched: counts of specific features grow with the shift."""

FVE_TOLERANCE: Final = 0.05
"""Largest difference in fraction of variance explained between crosscoders compared."""

L0_RATIO: Final = 1.25
"""Largest ratio of active features per token between crosscoders compared."""

DEAD_TOLERANCE: Final = 0.10
"""Largest difference in dead fraction: tail mass is a share of alive features."""

AGREED: Final = "agreed_"
"""Prefix of the variables that count only features whose specificity latent scaling confirms."""


@dataclass(frozen=True)
class _Tail:
    """Tail mass of one crosscoder: indicator and cluster of every alive feature."""

    hits: FloatArray
    sizes: FloatArray
    mass: float


def attribution_contrast(
    table: xr.Dataset,
    clusters: Mapping[str, xr.Dataset | IntArray],
    *,
    sft: str | Sequence[str],
    rl: str | Sequence[str],
    null: str | None = "null",
    taus: Sequence[float] = TAUS,
    norm: Literal["l1", "l2"] = "l1",
    movement: xr.Dataset | None = None,
    health: xr.Dataset | None = None,
    alpha: float = 0.05,
    seed: int = 0,
    n_bootstrap: int = 999,
) -> xr.Dataset:
    """Tail mass of model-specific features, SFT minus RL, beside the base-base floor.

    Parameters
    ----------
    table
        Layout ``attribution`` (see ``attribution_table``); with ``scaling_agrees[crosscoder, feature]`` everything is
        also computed for features that are specific by latent scaling too, under the prefix ``agreed_``.
    clusters
        Crosscoder name -> its decoders (clustered here by cosine > .7) or ready integer labels [feature].
    sft, rl
        Crosscoder names of the two arms; three or more on both sides make runs the unit.
    null
        Crosscoder of base against base read again; None if there is none.
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
        Layout ``attribution_contrast`` over ``tau``; also ``excess_sft`` and ``excess_rl`` (mass above the floor),
        ``tail_*_low`` / ``tail_*_high``, and ``n_clusters_sft`` / ``n_clusters_rl``.

    Raises
    ------
    InputError
        If a crosscoder is not in the table or has no clusters.
    RefusedError
        If table, movement and health come from different studies.

    Notes
    -----
    T = share of alive features with NRN > tau. effect = (T_sft - floor) - (T_rl - floor), in which the floor cancels;
    it matters for ``excess_*``. With fewer than three runs an arm: percentile bootstrap over decoder-cosine clusters,
    p = twice the smaller tail share with the +1 rule, and the statement is about *these* models. Where a bootstrap
    distribution is a point (mass 0 or 1 on one side) the interval is Newcombe's with clusters counted as units.
    Otherwise: exact permutation of runs between arms and Welch's interval.

    References
    ----------
    Newcombe 1998, doi:10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I.
    """
    arms = {"sft": [sft] if isinstance(sft, str) else list(sft), "rl": [rl] if isinstance(rl, str) else list(rl)}
    names = [*arms["sft"], *arms["rl"], *([null] if null else [])]
    _check_names(table, clusters, names)
    check_comparable(table, *(data for data in (movement, health) if data is not None), keys=("study_id",))
    labels = {name: _labels(table, clusters[name], name) for name in names}
    by_run = min(map(len, arms.values())) >= MIN_RUNS
    rows: dict[str, list[float]] = {}
    for tau, prefix in product(taus, ("", AGREED) if "scaling_agrees" in table else ("",)):
        tails = {name: _tail(table, name, labels[name], tau, norm, agreed=bool(prefix)) for name in names}
        draws = {
            name: _bootstrap(tails[name], n_bootstrap, derive_seed(seed, "attribution_contrast", name, tau))
            for name in names
        }
        row = _arm_rows(tails, draws, arms, null, alpha)
        row |= _runs_contrast(tails, arms, alpha) if by_run else _bootstrap_contrast(tails, draws, arms, alpha)
        for key, value in row.items():
            rows.setdefault(prefix + key, []).append(value)
    comparable = comparability(table, arms["sft"], arms["rl"], movement, health)
    variables = {key: ("tau", np.array(value, dtype=np.float64)) for key, value in rows.items()}
    return xr.Dataset(
        variables | {"comparable": ("tau", np.array([comparable] * len(taus), dtype=np.str_))},
        coords={"tau": np.array(list(taus), dtype=np.float64)},
        attrs=_attrs(arms, null, norm, by_run, alpha, seed, n_bootstrap, table),
    )


def _attrs(
    arms: dict[str, list[str]],
    null: str | None,
    norm: str,
    by_run: bool,
    alpha: float,
    seed: int,
    n_bootstrap: int,
    table: xr.Dataset,
) -> dict[str, object]:
    n = {arm: len(names) for arm, names in arms.items()}
    return {
        "test": "exact permutation of runs between arms" if by_run else "bootstrap over decoder-cosine clusters",
        "null": "arms are exchangeable over runs" if by_run else "these dictionaries have equal tail mass",
        "unit": "run" if by_run else f"cluster of features (decoder cosine > {CLUSTER_COSINE})",
        "scope": "SFT against RL" if by_run else f"these two models differ ({n['sft']} SFT and {n['rl']} RL run(s))",
        "runs_per_arm": [n["sft"], n["rl"]],
        "floor": f"crosscoder {null!r} on base and base read again" if null else "none given",
        "floor_mass_subtracted": "from each arm (excess_*); cancels in the contrast",
        "norm": norm,
        "models": [str(table["target"].sel({CROSSCODER: name}).item()) for name in (*arms["sft"], *arms["rl"])],
        "seed": seed,
        "alpha": alpha,
        "n_bootstrap": n_bootstrap,
    }


def _check_names(table: xr.Dataset, clusters: Mapping[str, object], names: list[str]) -> None:
    there = [str(name) for name in table[CROSSCODER].values]
    for name in names:
        if name not in there:
            raise InputError(f"crosscoder {name!r} is not in the attribution table; it has {there}.")
        if name not in clusters:
            raise InputError(f"crosscoder {name!r} has no clusters; give its decoders or integer labels by name.")


def _labels(table: xr.Dataset, source: xr.Dataset | IntArray, name: str) -> IntArray:
    """Cluster per feature of the table; -1 where not alive."""
    alive = np.asarray(table["alive"].sel({CROSSCODER: name}).values, dtype=bool)
    if isinstance(source, xr.Dataset):
        n = source.sizes["feature"]
        found = decoder_clusters(source, alive=alive[:n])
    else:
        found = np.asarray(source, dtype=np.int64).reshape(-1)
    if len(found) > len(alive) or alive[len(found) :].any():
        raise InputError(f"crosscoder {name!r} has {len(alive)} features in the table but {len(found)} cluster labels.")
    labels = np.full(len(alive), -1, dtype=np.int64)
    labels[: len(found)] = found
    return np.where(alive, labels, -1)


def _tail(table: xr.Dataset, name: str, labels: IntArray, tau: float, norm: str, *, agreed: bool) -> _Tail:
    nrn = np.asarray(table[f"nrn_{norm}"].sel({CROSSCODER: name}).values, dtype=np.float64)
    used = (labels >= 0) & np.isfinite(nrn)
    codes = np.unique(labels[used], return_inverse=True)[1].reshape(-1)
    # Clusters in order of their lowest feature label, so that draws do not depend on the order of features.
    lowest = np.full(int(codes.max(initial=-1)) + 1, len(used))
    np.minimum.at(lowest, codes, feature_ranks(table)[used])
    codes = np.argsort(np.argsort(lowest))[codes]
    sizes = np.bincount(codes).astype(np.float64)
    beyond = nrn > tau
    if agreed:
        beyond &= np.asarray(table["scaling_agrees"].sel({CROSSCODER: name}).values, dtype=bool)
    hits = np.bincount(codes, weights=beyond[used].astype(np.float64), minlength=len(sizes)).astype(np.float64)
    return _Tail(hits, sizes, float(hits.sum() / sizes.sum()) if len(sizes) else float("nan"))


def _bootstrap(tail: _Tail, n_bootstrap: int, seed: int) -> FloatArray:
    """Tail mass in draws of clusters with replacement."""
    n = len(tail.sizes)
    if not n:
        return np.full(n_bootstrap, np.nan)
    rng = np.random.default_rng(seed)
    draws = np.empty(n_bootstrap)
    for b in range(n_bootstrap):
        weights = np.bincount(rng.integers(0, n, n), minlength=n)
        draws[b] = (weights @ tail.hits) / (weights @ tail.sizes)
    return draws


def _interval(draws: FloatArray, alpha: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [alpha / 2, 1 - alpha / 2])
    return float(low), float(high)


def _arm_rows(
    tails: dict[str, _Tail], draws: dict[str, FloatArray], arms: dict[str, list[str]], null: str | None, alpha: float
) -> dict[str, float]:
    """Mass, interval and excess over the floor of each arm (mean over its runs), and of the floor."""
    row: dict[str, float] = {}
    floor = tails[null].mass if null else float("nan")
    for arm, names in (*arms.items(), ("null", [null] if null else [])):
        mass = float(np.mean([tails[name].mass for name in names])) if names else float("nan")
        mean = np.mean([draws[name] for name in names], axis=0) if names else np.array([np.nan])
        row[f"tail_{arm}"] = mass
        row[f"tail_{arm}_low"], row[f"tail_{arm}_high"] = _interval(mean, alpha)
        row[f"n_clusters_{arm}"] = float(sum(len(tails[name].sizes) for name in names))
        if arm != "null":
            row[f"excess_{arm}"] = mass - floor
    return row


def _bootstrap_contrast(
    tails: dict[str, _Tail], draws: dict[str, FloatArray], arms: dict[str, list[str]], alpha: float
) -> dict[str, float]:
    masses = {arm: float(np.mean([tails[name].mass for name in names])) for arm, names in arms.items()}
    effect = masses["sft"] - masses["rl"]
    if not np.isfinite(effect):
        return dict.fromkeys(("effect", "effect_low", "effect_high", "p_value"), float("nan"))
    sampled = {arm: np.mean([draws[name] for name in names], axis=0) for arm, names in arms.items()}
    difference = sampled["sft"] - sampled["rl"]
    n = len(difference)
    below = (1 + np.count_nonzero(difference <= TIE_SLACK)) / (n + 1)
    above = (1 + np.count_nonzero(difference >= -TIE_SLACK)) / (n + 1)
    low, high = _interval(difference, alpha)
    if any(mass in (0.0, 1.0) for mass in masses.values()):
        n_units = {arm: sum(len(tails[name].sizes) for name in names) for arm, names in arms.items()}
        low, high = _newcombe(masses, n_units, alpha)
    return {"effect": effect, "effect_low": low, "effect_high": high, "p_value": min(1.0, 2 * min(below, above))}


def _newcombe(masses: dict[str, float], n: dict[str, int], alpha: float) -> tuple[float, float]:
    """Newcombe's hybrid score interval for a difference of shares."""
    bounds = {arm: _wilson(masses[arm], n[arm], alpha) for arm in masses}
    effect = masses["sft"] - masses["rl"]
    down = np.hypot(masses["sft"] - bounds["sft"][0], bounds["rl"][1] - masses["rl"])
    up = np.hypot(bounds["sft"][1] - masses["sft"], masses["rl"] - bounds["rl"][0])
    return float(effect - down), float(effect + up)


def _wilson(share: float, n: int, alpha: float) -> tuple[float, float]:
    low, high = wilson_interval(share * n, n, alpha=alpha)
    return float(low), float(high)


def _runs_contrast(tails: dict[str, _Tail], arms: dict[str, list[str]], alpha: float) -> dict[str, float]:
    """Exact permutation of runs between arms; Welch interval of the difference of arm means."""
    masses = np.array([tails[name].mass for name in (*arms["sft"], *arms["rl"])])
    n = len(arms["sft"])
    sft, rl = masses[:n], masses[n:]
    effect = float(sft.mean() - rl.mean())
    total = masses.sum()
    means = [(masses[list(c)].sum(), n) for c in combinations(range(len(masses)), n)]
    permuted = np.array([s / n - (total - s) / (len(masses) - n) for s, n in means])
    p = float(np.mean(np.abs(permuted) >= abs(effect) - TIE_SLACK))
    interval = stats.ttest_ind(sft, rl, equal_var=False).confidence_interval(1 - alpha)
    return {"effect": effect, "effect_low": float(interval.low), "effect_high": float(interval.high), "p_value": p}


def comparability(
    table: xr.Dataset,
    sft: Sequence[str],
    rl: Sequence[str],
    movement: xr.Dataset | None,
    health: xr.Dataset | None,
) -> str:
    """``COMPARABLE`` or ``NOT_COMPARABLE``, a colon, and why: matched drift and parity of fit.

    Notes
    -----
    Counts of specific features track how far a model moved, so two finals are compared only at activation shifts
    within a factor 1.25. Otherwise the text says at which checkpoint of the larger mover the shift would be equal
    (interpolated), or that the ranges of the two runs do not overlap; train a crosscoder there and contrast that one.
    """
    problems, notes = _parity(table, sft, rl, health)
    drift_ok, note = _matched_drift(table, sft, rl, movement)
    (notes if drift_ok else problems).insert(0, note)
    return f"NOT_COMPARABLE: {'; '.join(problems)}" if problems else f"COMPARABLE: {'; '.join(notes)}"


def _matched_drift(
    table: xr.Dataset, sft: Sequence[str], rl: Sequence[str], movement: xr.Dataset | None
) -> tuple[bool, str]:
    if movement is None:
        return False, "how far each run moved from base is not known"
    shift = {str(m): float(v) for m, v in zip(movement[MODEL].values, movement["activation_shift"].values, strict=True)}
    targets = {name: str(table["target"].sel({CROSSCODER: name}).item()) for name in (*sft, *rl)}
    missing = [model for model in targets.values() if not np.isfinite(shift.get(model, np.nan))]
    if missing:
        return False, f"no activation shift is recorded for {missing[0]}"
    a = float(np.mean([shift[targets[name]] for name in sft]))
    b = float(np.mean([shift[targets[name]] for name in rl]))
    facts = f"activation shift from base {a:.3g} (SFT) and {b:.3g} (RL)"
    if max(a, b) <= MATCHED_SHIFT_RATIO * min(a, b):
        return True, f"{facts}, within a factor {MATCHED_SHIFT_RATIO}"
    larger, smaller, label = (sft, b, "SFT") if a > b else (rl, a, "RL")
    step = _step_at(movement, [targets[name] for name in larger], smaller)
    where = (
        f"{label} passes {smaller:.3g} near step {step:.0f}: contrast a crosscoder of that checkpoint"
        if step is not None
        else f"every checkpoint of {label} is farther, so the ranges do not overlap"
    )
    return False, f"{facts} differ by more than a factor {MATCHED_SHIFT_RATIO}; {where}"


def _step_at(movement: xr.Dataset, models: Sequence[str], level: float) -> float | None:
    """First step (mean over runs) at which the runs of ``models`` reach ``level``; None if their first is beyond it."""
    steps = []
    for model in models:
        run = str(movement[RUN].sel({MODEL: model}).item())
        own = movement.isel({MODEL: np.flatnonzero(np.asarray(movement[RUN].values).astype(np.str_) == run)})
        order = np.argsort(own[STEP].values)
        step, shift = own[STEP].values[order], np.asarray(own["activation_shift"].values, dtype=np.float64)[order]
        beyond = np.flatnonzero(shift >= level)
        if not len(beyond) or beyond[0] == 0:
            return None
        i = int(beyond[0])
        steps.append(float(np.interp(level, shift[i - 1 : i + 1], step[i - 1 : i + 1])))
    return float(np.mean(steps))


def _parity(
    table: xr.Dataset, sft: Sequence[str], rl: Sequence[str], health: xr.Dataset | None
) -> tuple[list[str], list[str]]:
    if health is None:
        return ["fit of the crosscoders (FVE, L0, dead fraction) is not known"], []
    there = [str(name) for name in health[CROSSCODER].values]
    missing = [name for name in (*sft, *rl) if name not in there]
    if missing:
        return [f"crosscoder {missing[0]!r} has no health record"], []
    facts = {arm: _fit(table, names, health) for arm, names in (("SFT", sft), ("RL", rl))}
    a, b = facts["SFT"], facts["RL"]
    problems = []
    if abs(a[0] - b[0]) > FVE_TOLERANCE:
        problems.append(f"FVE differs ({a[0]:.3f} and {b[0]:.3f}, tolerance {FVE_TOLERANCE})")
    if max(a[1], b[1]) > L0_RATIO * min(a[1], b[1]):
        problems.append(f"L0 differs ({a[1]:.1f} and {b[1]:.1f}, factor {L0_RATIO} allowed)")
    if abs(a[2] - b[2]) > DEAD_TOLERANCE:
        problems.append(f"dead fractions differ ({a[2]:.2f} and {b[2]:.2f}, tolerance {DEAD_TOLERANCE})")
    if not np.isfinite([*a, *b]).all():
        problems.append("a health value is missing")
    return problems, ["FVE, L0 and dead fraction at parity"]


def _fit(table: xr.Dataset, names: Sequence[str], health: xr.Dataset) -> NDArray[np.float64]:
    """FVE of the target view, L0 and dead fraction, averaged over the arm's crosscoders."""
    rows = []
    for name in names:
        one = health.sel({CROSSCODER: name})
        target = str(table["target"].sel({CROSSCODER: name}).item())
        views = [str(view) for view in np.atleast_1d(one[VIEW].values)]
        fve = float(one["fve"].sel({VIEW: target})) if target in views else float("nan")
        rows.append([fve, float(one["l0"]), float(one["dead_fraction"])])
    mean: FloatArray = np.array(rows, dtype=np.float64).mean(axis=0)
    return mean
