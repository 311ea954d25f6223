"""Contrast of training arms: which one introduces more model-specific features (claim C1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Final, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.proportion import confint_proportions_2indep

from rlgen_stats.schemas.dims import MODEL, RUN, STEP, VIEW
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics.core.comparability import check_comparable
from rlgen_stats.toolkit.statistics.core.coordinates import feature_ranks
from rlgen_stats.toolkit.statistics.kernels.numerics import TIE_SLACK, FloatArray, IntArray
from rlgen_stats.toolkit.statistics.specificity.decoder_norms import CLUSTER_COSINE, CROSSCODER, decoder_clusters

TAUS: Final = (0.7, 0.9)
"""Thresholds of docs/method.md 4e: target norm more than 2.3 and 9 times the original's."""

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
    """Tail mass of one crosscoder, by clusters of its alive features."""

    hits: FloatArray
    """[cluster]: features beyond the threshold."""
    sizes: FloatArray
    """[cluster]: features."""
    mass: float
    """Share of alive features beyond the threshold."""


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
    """Tail mass of model-specific features, SFT minus RL, and the floor of a crosscoder of base with itself.

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
        Crosscoder of base against base read again (activations of base extracted twice); None if there is none.
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
    it matters for ``excess_*``. With fewer than three runs per arm: percentile bootstrap over decoder-cosine clusters,
    p = twice the smaller tail share with the +1 rule, and the statement is about *these* models. Where a bootstrap
    distribution is a point (mass 0 or 1 on one side) the interval is Newcombe's with clusters counted as units.
    With three or more: exact permutation of runs between arms and Welch's interval.

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
        attrs=_attrs(table, arms, null, norm, by_run) | {"seed": seed, "alpha": alpha, "n_bootstrap": n_bootstrap},
    )


def _attrs(
    table: xr.Dataset, arms: dict[str, list[str]], null: str | None, norm: str, by_run: bool
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
    }


def _check_names(table: xr.Dataset, clusters: Mapping[str, object], names: list[str]) -> None:
    known = [str(name) for name in table[CROSSCODER].values]
    for name in names:
        if name not in known:
            raise InputError(f"crosscoder {name!r} is not in the attribution table; it has {known}.")
        if name not in clusters:
            raise InputError(f"crosscoder {name!r} has no clusters; give its decoders or integer labels by name.")


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
        # Draws of all zeros or all ones have no width, which says nothing about the shares.
        n_sft, n_rl = (sum(len(tails[name].sizes) for name in names) for names in (arms["sft"], arms["rl"]))
        low, high = confint_proportions_2indep(
            masses["sft"] * n_sft, n_sft, masses["rl"] * n_rl, n_rl, method="newcomb", compare="diff", alpha=alpha
        )
    p = min(1.0, 2 * min(below, above))
    return {"effect": effect, "effect_low": float(low), "effect_high": float(high), "p_value": p}


def _runs_contrast(tails: dict[str, _Tail], arms: dict[str, list[str]], alpha: float) -> dict[str, float]:
    """Exact permutation of runs between arms; Welch interval of the difference of arm means."""
    masses = np.array([tails[name].mass for name in (*arms["sft"], *arms["rl"])])
    n = len(arms["sft"])
    sft, rl = masses[:n], masses[n:]
    effect = float(sft.mean() - rl.mean())
    total = masses.sum()
    sft_sums = [masses[list(chosen)].sum() for chosen in combinations(range(len(masses)), n)]
    permuted = np.array([sft_sum / n - (total - sft_sum) / (len(masses) - n) for sft_sum in sft_sums])
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
    """``COMPARABLE`` or ``NOT_COMPARABLE``, a colon, and the reasons: matched drift and parity of fit.

    Notes
    -----
    Counts of specific features track how far a model moved, so two finals are compared only at activation shifts
    within a factor 1.25. Otherwise the text says at which step of the arm that moved farther the shift would be
    equal (interpolated), or that the ranges of the two runs do not overlap; train a crosscoder on that checkpoint and
    contrast that one.
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
    shift_sft = float(np.mean([shift[targets[name]] for name in sft]))
    shift_rl = float(np.mean([shift[targets[name]] for name in rl]))
    facts = f"activation shift from base {shift_sft:.3g} (SFT) and {shift_rl:.3g} (RL)"
    if max(shift_sft, shift_rl) <= MATCHED_SHIFT_RATIO * min(shift_sft, shift_rl):
        return True, f"{facts}, within a factor {MATCHED_SHIFT_RATIO}"
    farther, smaller, label = (sft, shift_rl, "SFT") if shift_sft > shift_rl else (rl, shift_sft, "RL")
    step = _step_at(movement, [targets[name] for name in farther], smaller)
    remedy = (
        f"{label} passes {smaller:.3g} near step {step:.0f}: contrast a crosscoder of that checkpoint"
        if step is not None
        else f"every checkpoint of {label} is farther, so the ranges do not overlap"
    )
    return False, f"{facts} differ by more than a factor {MATCHED_SHIFT_RATIO}; {remedy}"


def _step_at(movement: xr.Dataset, models: Sequence[str], level: float) -> float | None:
    """First step (mean over runs) at which the runs of ``models`` reach ``level``; None if their first is beyond it."""
    steps = []
    for model in models:
        run = str(movement[RUN].sel({MODEL: model}).item())
        of_run = movement.isel({MODEL: np.flatnonzero(np.asarray(movement[RUN].values).astype(np.str_) == run)})
        order = np.argsort(of_run[STEP].values)
        step, shift = of_run[STEP].values[order], np.asarray(of_run["activation_shift"].values, dtype=np.float64)[order]
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
    known = [str(name) for name in health[CROSSCODER].values]
    missing = [name for name in (*sft, *rl) if name not in known]
    if missing:
        return [f"crosscoder {missing[0]!r} has no health record"], []
    fits = [_fit(table, names, health) for names in (sft, rl)]
    fve, l0, dead = np.transpose(fits).tolist()
    problems = []
    if abs(fve[0] - fve[1]) > FVE_TOLERANCE:
        problems.append(f"FVE differs ({fve[0]:.3f} and {fve[1]:.3f}, tolerance {FVE_TOLERANCE})")
    if max(l0) > L0_RATIO * min(l0):
        problems.append(f"L0 differs ({l0[0]:.1f} and {l0[1]:.1f}, factor {L0_RATIO} allowed)")
    if abs(dead[0] - dead[1]) > DEAD_TOLERANCE:
        problems.append(f"dead fractions differ ({dead[0]:.2f} and {dead[1]:.2f}, tolerance {DEAD_TOLERANCE})")
    if not np.isfinite(fits).all():
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
