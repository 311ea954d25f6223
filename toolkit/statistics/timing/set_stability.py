"""Stability of the set of most changed features during training (claim C2, as the paper measures it).

Plain overlap of top-k sets falls when effects shrink although nothing moves; here the overlap across checkpoints is
compared with the overlap attainable if the ranking stays and each checkpoint has its own effect size and noise.

In reading order: the public function, one run, its table and verdict, the top sets of one checkpoint, and the overlap
attainable under the null.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from rlgen_stats.schemas.dims import BASE_MODEL, MODEL, TRAINED_RUN, split_model_id
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.statistics.core.comparability import check_contribution_scale, source_attrs
from rlgen_stats.toolkit.statistics.core.coordinates import feature_ranks, find_models, model_coords, run_models
from rlgen_stats.toolkit.statistics.core.feature_blocks import (
    DEFAULT_MIN_FIRING,
    Block,
    feature_arrays,
    in_prompt_order,
    map_features,
)
from rlgen_stats.toolkit.statistics.core.top_features import fold_leading, leading_features, merge_leading
from rlgen_stats.toolkit.statistics.core.units import check_unit, cluster_codes, unit_attrs
from rlgen_stats.toolkit.statistics.kernels import delete_group_jackknife, nogueira, rbo, set_overlap_pvalue
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray

DELTA_TOLERANCE: Final = 0.10
"""Share of a top set that may still change while the set is called stable (docs/method.md 4b)."""

MIN_CEILING: Final = 0.5
"""Attainable overlap (at the end: of two halves) below which prompts are too few to speak of a checkpoint's set
(docs/method.md 4b)."""

RBO_PERSISTENCE: Final = 0.9
"""Rank-biased overlap puts 86% of its weight on the first ten ranks."""

DEFAULT_GROUPS: Final = 20
"""Groups of the delete-group jackknife."""

MIN_UNITS: Final = 8
"""Fewer units leave halves of three or less: no standard deviation worth ranking by."""

MIN_UNITS_PER_GROUP: Final = 2
"""Below two units a group the number of groups is reduced."""

CHANCE_LEVEL: Final = 0.95
"""Quantile of the overlap of random sets: what chance alone reaches one time in twenty."""

SCORE_DIGITS: Final = 9
"""Decimals of a score that count: what differs less is a tie, else rounding would decide between features."""

SCORED_AT_ONCE: Final = 512
"""Features scored at a time: the sums of 20 groups and 100 halvings take 33 MB."""

ADDED_NOISE: Final = (0.35, 0.7, 1.0, 1.5, 2.2, 3.5, 6.0, 12.0, 40.0)
"""Noise added to the better determined of two checkpoints, in standard errors of the other one's half means; at the
largest one a set is drawn by chance."""

COLUMNS: Final = (
    *("overlap", "cross", "noise_ceiling", "final_ceiling", "attainable"),
    *("delta", "delta_low", "delta_high", "delta_lower", "delta_upper"),
    *("chance", "chance_high", "overlap_p", "rbo", "paper_overlap"),
)


def set_stability(
    features: xr.Dataset,
    *,
    runs: Sequence[str],
    reference: str = BASE_MODEL,
    k: int = 50,
    n_halvings: int = 100,
    n_groups: int = DEFAULT_GROUPS,
    variable: str = "mean",
    clusters: str | None = None,
    n_min: int = DEFAULT_MIN_FIRING,
    alpha: float = 0.05,
    seed: int = 0,
    unit: str = "prompt",
    allow_token_unit: bool = False,
    progress: Progress = SILENT,
) -> xr.Dataset:
    """Compare the top-k set of every checkpoint with the final one, relative to how well prompts determine a set.

    Parameters
    ----------
    features
        Layout ``features`` with every checkpoint of the runs and ``reference``; read in feature blocks.
    runs, reference
        Run names, and the model from which every checkpoint's change D is measured.
    k
        Size of the sets (the paper's is 50).
    n_halvings, n_groups
        Random halvings of the units; groups of the delete-group jackknife.
    variable, clusters, n_min, unit, allow_token_unit
        As in ``stabilization_test``; units are halved and deleted whole.
    alpha, seed
        1 - coverage (two-sided ``delta_low``, ``delta_high``; one-sided ``delta_lower``, ``delta_upper``) and seed.
    progress
        Receiver of progress, in runs.

    Returns
    -------
    xr.Dataset
        Layout ``set_stability``. Over ``model``: ``overlap`` with the final set (all prompts), ``cross`` (X),
        ``noise_ceiling`` (rho_c), ``final_ceiling`` (rho_C), ``attainable`` (X0), ``delta`` with bounds, ``chance``
        (mean overlap of random sets), ``chance_high`` (its 95% quantile), ``overlap_p`` (all hypergeometric), ``rbo``,
        ``paper_overlap``. Over ``model`` and ``replicate``: ``delta_replicate``, without each group of units. Over
        ``trained_run``: ``verdict`` SET_STABLE / EVOLVING / UNDETERMINED, ``stable_from`` (step), ``nogueira`` (over
        the checkpoints' sets), ``reason``, ``n_testable``.
        Small; computed at once.

    Raises
    ------
    InputError
        If a run has fewer than two checkpoints, a prompt lacks a checkpoint, or a setting is out of range.
    RefusedError
        For ``unit="token"``, or features that are not in contribution scale.

    Notes
    -----
    *Sets.* Features are ranked by |mean D| / (s + s0), s the root mean square over the run's checkpoints of D's
    standard deviation and s0 its median over testable features (after Tusher et al. 2001): one scale for all
    checkpoints, so that effects that only grow keep their order. A set holds only positive scores.

    *Delta* = X0 - X. X pairs one half of c with the *other* half of the final checkpoint. X0 is the X expected if the
    ranking is the same at both and each has its own effect size and noise. With inclusion probabilities p of the
    features in the sets of halves, rho = sum p^2 / k and X0 = sum p_c p_C / k = kappa sqrt(rho_c rho_C), kappa <= 1
    (Cauchy-Schwarz), = 1 where both are equally noisy. kappa is measured on the checkpoint with the larger rho, b: to
    its half means noise is added as that of the other one (its residuals times normal weights, units and features
    together) until its own half-to-half overlap has fallen to the other one's rho; kappa is the overlap of such a
    degraded half with the other half as it is, over the geometric mean of the two half-to-half overlaps. As all pairs
    are of halves that share no prompt, no effect is estimated and no distribution assumed. Replicates of the jackknife
    read kappa at their own rho, off the same curve. E[Delta] = 0 where means are proportional; measured over growing,
    shrinking and equal effects in docs/calibration.md.

    SET_STABLE from c: rho_C >= .5, and ``attainable`` >= .5 and ``delta_upper`` < .10 at c and every later checkpoint
    before the last. EVOLVING: rho_C >= .5, not stable, and ``delta_lower`` > 0 at the last checkpoint but one.
    Otherwise UNDETERMINED. Per-checkpoint bounds are not simultaneous; the walk from the end needs no correction.

    *The paper's rule*, reported only: ``paper_overlap`` is the plain overlap with the final set where features are
    ranked by model-specificity instead, m_c / (m_c + m_base), m the mean contribution over all prompts: the paper's NRN
    with contributions in place of decoder norms, which exist only for models a pairwise dictionary was trained on.

    References
    ----------
    Tusher, Tibshirani and Chu 2001, doi:10.1073/pnas.091062498; Webber, Moffat and Zobel 2010,
    doi:10.1145/1852102.1852106; Nogueira, Sechidis and Brown 2018 (JMLR 18(174)); adding noise to read off what noise
    does: Cook and Stefanski 1994, doi:10.1080/01621459.1994.10476871; the paper: Shi et al., arXiv 2604.25011.

    Examples
    --------
    >>> set_stability(open_features(path), runs=["sft", "rl"], k=50)  # doctest: +SKIP
    """
    check_unit(unit, allow_token_unit)
    check_contribution_scale(features, "ranks")
    features = in_prompt_order(features, repeated=unit == "token")
    if k < 1 or n_halvings < 1 or n_groups < 2 or not 0 < alpha < 1 or not runs:
        raise InputError(
            f"expected at least one run, k >= 1, n_halvings >= 1, n_groups >= 2 and 0 < alpha < 1; got "
            f"runs={list(runs)}, k={k}, n_halvings={n_halvings}, n_groups={n_groups}, alpha={alpha}."
        )
    (reference,) = find_models(features, [reference])
    codes = cluster_codes(features, clusters)
    design = make_design(features.sizes["prompt"], codes, k, n_halvings, n_groups, seed)
    tables: list[Table] = []
    verdicts: list[SetVerdict] = []
    all_models: list[str] = []
    with progress.task("set stability", total=len(runs), unit="run") as task:
        for run in runs:
            models = [model for model in run_models(features, run) if model != reference]
            if len(models) < 2:
                raise InputError(f"run {run!r} has {len(models)} checkpoint; set stability needs at least two.")
            table, verdict = _one_run(features, variable, reference, models, design, n_min, alpha)
            tables.append(table)
            verdicts.append(verdict)
            all_models += models
            task.advance(1, run=run, verdict=verdict.verdict)
    labels = {field.name: [getattr(verdict, field.name) for verdict in verdicts] for field in fields(SetVerdict)}
    joined = {name: np.concatenate([table[name] for table in tables]) for name in (*COLUMNS, "delta_replicate")}
    return xr.Dataset(
        {name: ((MODEL, "replicate")[: values.ndim], values) for name, values in joined.items()}
        | {name: (TRAINED_RUN, np.array(values)) for name, values in labels.items()},
        coords=model_coords(features, all_models) | {TRAINED_RUN: (TRAINED_RUN, np.array(list(runs), dtype=np.str_))},
        attrs={
            "test": f"cross-half overlap of top-{k} sets, delete-group jackknife",
            "null": "the ranking is that of the end, with this checkpoint's own effect size and noise (delta = 0)",
            "top_k": k,
            "n_halvings": n_halvings,
            "n_groups": design.n_groups,
            "tolerance": DELTA_TOLERANCE,
            "min_ceiling": MIN_CEILING,
        }
        | {"reference": reference, "variable": variable, "seed": seed, "alpha": alpha}
        | source_attrs(features)
        | unit_attrs(unit, clusters, codes),
    )


Table = dict[str, FloatArray]
"""``COLUMNS`` [checkpoint] of one run, and ``delta_replicate`` [checkpoint, replicate]."""


@dataclass(frozen=True)
class SetVerdict:
    """What is said about one run's set; the fields are the layout's variables over ``trained_run``, in their order."""

    verdict: str
    """SET_STABLE, EVOLVING or UNDETERMINED."""
    stable_from: float = float("nan")
    """Step from which the set is stable; NaN if it is not."""
    nogueira: float = float("nan")
    reason: str = ""
    n_testable: int = 0


def _one_run(
    features: xr.Dataset,
    variable: str,
    reference: str,
    models: list[str],
    design: HalvingDesign,
    n_min: int,
    alpha: float,
) -> tuple[Table, SetVerdict]:
    """Columns over the checkpoints, and the verdict."""
    arrays, _ = feature_arrays(features, [variable, "firing"], [reference, *models])
    outputs: dict[str, tuple[int, ...]] = {"spread": (), "fired": (), "mean": (1 + len(models),)}
    spread, fired, mean = da.compute(*map_features(_moments, arrays, outputs=outputs).features.values())
    testable = np.asarray(fired) >= n_min
    n_testable = int(testable.sum())
    if n_testable <= design.k or design.n_units < MIN_UNITS:
        reason = (
            f"{n_testable} testable features and {design.n_units} units; "
            f"needs more than k={design.k} features and at least {MIN_UNITS} units"
        )
        blank = {name: np.full(len(models), np.nan) for name in COLUMNS}
        blank["delta_replicate"] = np.full((len(models), design.n_groups), np.nan)
        return blank, SetVerdict("UNDETERMINED", reason=reason, n_testable=n_testable)
    s0 = float(np.median(spread[testable]))
    if not np.isfinite(s0):
        raise InputError(
            f"some prompts have no {variable!r} in {reference!r} or in a checkpoint of run "
            f"{split_model_id(models[0])[0]!r}; set stability needs every prompt in every checkpoint, so select the "
            "complete prompts first."
        )
    ranks = feature_ranks(features)
    chunks = (arrays[0].chunks[-1],)
    ids, usable, scale = (da.from_array(x, chunks=chunks) for x in (ranks, testable, spread + s0))
    scored = Scored(arrays[0], ids, usable, scale, design)
    tops = top_sets(scored, len(models))
    kappas = correction_curves(scored, tops)
    table = _table(tops, kappas, n_testable, alpha)
    table["paper_overlap"] = _paper_overlap(mean, testable, ranks, design.k)
    in_set = np.stack([np.isin(ranks[testable], top.full) for top in tops])
    verdict, stable_from, reason = _verdict(table, models)
    return table, SetVerdict(verdict, stable_from, float(nogueira(in_set)), reason, n_testable)


def _moments(values: NDArray[Any], firing: NDArray[Any]) -> Block:
    d = values[1:].astype(np.float64) - values[0]
    return {
        "spread": np.sqrt(d.var(axis=1, ddof=1).mean(axis=0)),
        "fired": (firing > 0).sum(axis=(0, 1)).astype(np.float64),
        "mean": values.mean(axis=1, dtype=np.float64),
    }


def _paper_overlap(mean: FloatArray, testable: NDArray[np.bool_], ranks: IntArray, k: int) -> FloatArray:
    """Plain overlap with the final set of features ranked by their share of the contribution, [checkpoint].

    ``mean`` [reference + checkpoints, feature] is that of the contribution.
    """
    total = mean[1:] + mean[0]
    share = np.round(mean[1:] / np.where(total > 0, total, np.inf), SCORE_DIGITS)
    keys = np.where(testable & (share > 0), -share, np.inf)
    sets = leading_features(np.stack([keys, np.broadcast_to(ranks, keys.shape)]), k)[1].astype(np.int64)
    return overlaps(sets, np.broadcast_to(sets[-1], sets.shape)) / k


def _table(tops: list[TopSets], kappas: list[Curve], n_testable: int, alpha: float) -> Table:
    """The ``COLUMNS`` over the checkpoints of one run but the paper's, and the replicates of delta.

    Half-to-half overlaps are arrays [jackknife replicate], with all units in row 0.
    """
    final, k = tops[-1], len(tops[-1].full)
    final_ceiling = _ceiling(final)
    rows: list[dict[str, Any]] = []
    for top, kappa in zip(tops, kappas, strict=True):
        ceiling = _ceiling(top)
        cross = _cross(top.halves, final.halves)
        attainable = kappa(np.minimum(ceiling, final_ceiling)) * np.sqrt(ceiling * final_ceiling)
        delta = attainable - cross
        bounds = delete_group_jackknife(delta[1:], delta[0], alpha=alpha)
        n_shared = int(overlaps(top.full, final.full))
        sizes = int((top.full >= 0).sum()), int((final.full >= 0).sum())
        row = {
            "delta": delta[0],
            "delta_low": bounds.low,
            "delta_high": bounds.high,
            "delta_lower": bounds.lower,
            "delta_upper": bounds.upper,
            "delta_replicate": delta[1:],
            "overlap": n_shared / k,
            "cross": cross[0],
            "noise_ceiling": ceiling[0],
            "final_ceiling": final_ceiling[0],
            "attainable": attainable[0],
            "chance": sizes[1] * (sizes[0] / n_testable) / k,
            "chance_high": stats.hypergeom.ppf(CHANCE_LEVEL, n_testable, *sizes) / k,
            "overlap_p": set_overlap_pvalue(n_shared, n_testable, *sizes),
            "rbo": _rbo(top.full, final.full),
        }
        rows.append(row)
    return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}


def _ceiling(top: TopSets) -> FloatArray:
    """Mean overlap of the sets of two halves at one checkpoint, as a share of k: [replicate]."""
    return _cross(top.halves, top.halves)


def _cross(first: IntArray, second: IntArray) -> FloatArray:
    """Mean overlap of one half of the first with the *other* half of the second, as a share of k.

    Sets are [..., halving, half, k]; a half and the other half share no prompt.
    """
    pairs = [overlaps(first[..., half, :], second[..., 1 - half, :]) for half in (0, 1)]
    return np.asarray((pairs[0] + pairs[1]).mean(axis=-1) / (2 * first.shape[-1]))


def _rbo(a: IntArray, b: IntArray) -> float:
    return float(rbo(a[a >= 0].tolist(), b[b >= 0].tolist(), RBO_PERSISTENCE).extrapolated)


def _verdict(table: Table, models: list[str]) -> tuple[str, float, str]:
    """Verdict, step from which the set is stable (NaN if it is not), and the reason in words."""
    ceiling = table["final_ceiling"][-1]
    nan = float("nan")
    if ceiling < MIN_CEILING:
        return (
            "UNDETERMINED",
            nan,
            f"two halves of the prompts agree on {ceiling:.2f} of the final set; {MIN_CEILING} needed",
        )
    upper, lower, attainable = (table[name][:-1] for name in ("delta_upper", "delta_lower", "attainable"))
    first = len(upper)
    while first > 0 and upper[first - 1] < DELTA_TOLERANCE and attainable[first - 1] >= MIN_CEILING:
        first -= 1
    if first < len(upper):
        step = float(split_model_id(models[first])[1])
        return "SET_STABLE", step, f"upper bound of delta below {DELTA_TOLERANCE} from step {step:.0f} on"
    if lower[-1] > 0:
        return (
            "EVOLVING",
            nan,
            f"delta {table['delta'][-2]:.2f} (at least {lower[-1]:.2f}) at the last checkpoint but one",
        )
    return "UNDETERMINED", nan, f"delta at the last checkpoint but one is between {lower[-1]:.2f} and {upper[-1]:.2f}"


@dataclass(frozen=True)
class HalvingDesign:
    """Random halvings and jackknife groups of units, the same for every checkpoint."""

    halves: FloatArray
    """[halving, prompt]: 1 in the first half."""
    noise: FloatArray
    """[half, halving, prompt]: standard normal weights, the same within a cluster."""
    groups: IntArray
    """[prompt]: jackknife group."""
    n_groups: int
    n_units: int
    k: int


def make_design(n: int, codes: IntArray | None, k: int, n_halvings: int, n_groups: int, seed: int) -> HalvingDesign:
    """Draw ``n_halvings`` halvings and at most ``n_groups`` jackknife groups of ``n`` prompts, clusters kept whole."""
    units = np.arange(n) if codes is None else codes
    n_units = int(units.max()) + 1
    rng = np.random.default_rng(derive_seed(seed, "set_stability"))
    n_groups = max(2, min(n_groups, n_units // MIN_UNITS_PER_GROUP))
    groups = rng.permutation(n_units) % n_groups
    first = np.zeros((n_halvings, n_units))
    for row in first:
        row[rng.permutation(n_units)[: n_units // 2]] = 1.0
    noise = rng.standard_normal((2, n_halvings, n_units))
    return HalvingDesign(first[:, units], noise[..., units], groups[units].astype(np.int64), n_groups, n_units, k)


@dataclass(frozen=True)
class TopSets:
    """Feature ids of top-k sets (-1: none): from all prompts in order of rank, and from every half and replicate."""

    full: IntArray
    """[k]"""
    halves: IntArray
    """[replicate, halving, half, k]; replicate 0 has all units, replicate j lacks group j-1."""


@dataclass(frozen=True)
class Scored:
    """What features are scored by: dask arrays chunked alike along features, and the design."""

    values: da.Array
    """[reference + checkpoints, prompt, feature]."""
    ids: da.Array
    """[feature]: rank of the feature's label, which names it and breaks ties: sets do not depend on where it stands."""
    usable: da.Array
    """[feature]: testable."""
    scale: da.Array
    """[feature]: what |mean D| is divided by, at every checkpoint."""
    design: HalvingDesign

    def tops(self, rankings: list[Ranking], n_rows: int) -> list[IntArray]:
        """Top-k sets [row, k] of every ranking, ``n_rows`` each, from one pass over feature blocks.

        Only the leading k features of a block are kept.
        """
        mapped = map_features(
            _block_tops,
            [self.values, self.ids, self.usable, self.scale],
            outputs={},
            states={"top": ((2, n_rows * len(rankings), self.design.k), fold_leading)},
            rankings=rankings,
            design=self.design,
        )
        rows = np.asarray(mapped.states["top"].compute()[1], dtype=np.int64)
        return list(rows.reshape(len(rankings), n_rows, self.design.k))


Ranking = tuple[Callable[..., FloatArray], tuple[int, ...]]
"""A function of the changes [prompt, feature] at these places of the values, their scale and the design, that gives
scores [row, feature]."""


def top_sets(scored: Scored, n_checkpoints: int) -> list[TopSets]:
    """Top-k sets of every checkpoint."""
    design = scored.design
    shape = (1 + design.n_groups, len(design.halves), 2, design.k)
    rankings: list[Ranking] = [(half_scores, (1 + c,)) for c in range(n_checkpoints)]
    tops = scored.tops(rankings, 1 + int(np.prod(shape[:-1])))
    return [TopSets(rows[0], rows[1:].reshape(shape)) for rows in tops]


def _block_tops(
    values: NDArray[Any],
    ids: IntArray,
    usable: NDArray[np.bool_],
    scale: FloatArray,
    *,
    rankings: list[Ranking],
    design: HalvingDesign,
) -> Block:
    """Leading k features of one block in every row, as columns of ``leading_features``: minus score, and id."""
    tops = []
    order = np.argsort(ids)
    for start in range(0, len(order), SCORED_AT_ONCE):
        few = order[start : start + SCORED_AT_ONCE]
        reference, divisor = values[0][:, few].astype(np.float64), np.where(scale[few] > 0, scale[few], np.inf)
        leading = []
        for score, places in rankings:
            changes = [values[place][:, few] - reference for place in places]
            scores = np.round(score(*changes, divisor, design), SCORE_DIGITS)
            keys = np.where(usable[few] & (scores > 0), -scores, np.inf)
            leading.append(leading_features(np.stack([keys, np.broadcast_to(ids[few], keys.shape)]), design.k))
        tops.append(np.concatenate(leading, axis=1))
    return {"top": merge_leading(np.stack(tops))}


def half_scores(d: FloatArray, scale: FloatArray, design: HalvingDesign) -> FloatArray:
    """|mean| / scale of a feature block: row 0 over all prompts, then [replicate, halving, half] flattened.

    Every replicate's sums are the full sums minus those of the deleted group, so halvings cost one product in all.
    """
    n_halvings = len(design.halves)
    sums = np.empty((design.n_groups, n_halvings, 2, d.shape[1]))  # [group, halving, half, feature]
    counts = np.empty((design.n_groups, n_halvings, 2, 1))
    for g in range(design.n_groups):
        rows = design.groups == g
        first = design.halves[:, rows]
        sums[g, :, 0] = first @ d[rows]
        sums[g, :, 1] = d[rows].sum(axis=0) - sums[g, :, 0]
        counts[g, :, 0, 0] = first.sum(axis=1)
        counts[g, :, 1, 0] = rows.sum() - first.sum(axis=1)
    total, n = sums.sum(axis=0), counts.sum(axis=0)
    means = np.concatenate([(total / n)[None], (total - sums) / (n - counts)])
    return np.asarray(np.abs(np.concatenate([d.mean(axis=0)[None], means.reshape(-1, d.shape[1])])) / scale)


Curve = Callable[[FloatArray], FloatArray]
"""Correction kappa of the geometric mean at given half-to-half overlaps of the less determined checkpoint."""


def correction_curves(scored: Scored, tops: list[TopSets]) -> list[Curve]:
    """Kappa of every checkpoint and the last one: what unequal noise takes off the geometric mean of their ceilings."""
    design, last = scored.design, len(tops) - 1
    ceilings = [float(_ceiling(top)[0]) for top in tops]
    unequal = [c for c in range(last) if ceilings[c] != ceilings[last]]
    better = {c: c if ceilings[c] > ceilings[last] else last for c in unequal}
    rankings: list[Ranking] = [(degraded_scores, (1 + b, 1 + c + last - b)) for c, b in better.items()]
    shape = (len(ADDED_NOISE), len(design.halves), 2, design.k)
    curves: list[Curve] = [np.ones_like] * len(tops)
    for c, rows in zip(unequal, scored.tops(rankings, int(np.prod(shape[:-1]))) if unequal else [], strict=True):
        degraded, undegraded = rows.reshape(shape), np.broadcast_to(tops[better[c]].halves[0], shape)
        curves[c] = _curve(ceilings[better[c]], _cross(degraded, degraded), _cross(degraded, undegraded))
    return curves


def _curve(ceiling: float, degraded: FloatArray, mixed: FloatArray) -> Curve:
    """Kappa as a function of the half-to-half overlap [added noise] of degraded sets; ``mixed``: with one as it is."""
    own = np.minimum.accumulate(np.concatenate([[ceiling], degraded]))
    with np.errstate(invalid="ignore", divide="ignore"):
        kappa = np.nan_to_num(np.concatenate([[ceiling], mixed]) / np.sqrt(own * ceiling), nan=1.0)
    return lambda overlap: np.interp(overlap, own[::-1], kappa[::-1])


def degraded_scores(d: FloatArray, other: FloatArray, scale: FloatArray, design: HalvingDesign) -> FloatArray:
    """Scores of halves whose means carry added noise, [added, halving, half] flattened.

    The noise is that of half means of ``other``, drawn anew: its residuals times normal weights, with their
    correlations over features and within clusters.
    """
    sizes = np.stack([design.halves.sum(axis=1), (1 - design.halves).sum(axis=1)])[..., None]
    first = design.halves @ d
    means = np.stack([first, d.sum(axis=0) - first]) / sizes  # [half, halving, feature]
    noise = design.noise @ (other - other.mean(axis=0)) / np.sqrt(len(d) * sizes)
    scores = [np.abs(means + added * noise).swapaxes(0, 1) for added in ADDED_NOISE]
    return np.asarray(scores).reshape(-1, d.shape[1]) / scale


def overlaps(a: IntArray, b: IntArray) -> FloatArray:
    """Size of the intersection of id sets along the last axis; ids are unique within a set, -1 is no id."""
    both = np.sort(np.concatenate([a, b], axis=-1), axis=-1)
    same = (both[..., 1:] == both[..., :-1]) & (both[..., 1:] >= 0)
    return np.asarray(same.sum(axis=-1), dtype=np.float64)
