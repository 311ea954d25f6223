"""Selection of the features that separate the target model from base where it gained, task by task (claim C3).

Prompts are split first: features are chosen on one half and confirmed on the other, and no effect is ever reported
from a prompt that helped to choose.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, get_args

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import BASE_MODEL, DOMAIN, FEATURE, SPLIT, SPLITS, TASK
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.core.comparability import check_comparable, check_contribution_scale, source_attrs
from rlgen_stats.toolkit.statistics.core.coordinates import feature_coord, feature_ranks, in_split
from rlgen_stats.toolkit.statistics.core.feature_blocks import DEFAULT_MIN_FIRING, feature_arrays, in_prompt_order
from rlgen_stats.toolkit.statistics.core.units import check_unit, cluster_codes, present_prompts, unit_attrs
from rlgen_stats.toolkit.statistics.kernels.numerics import IntArray
from rlgen_stats.toolkit.statistics.selection.discordance import Sides, SplitTests, split_tests
from rlgen_stats.toolkit.statistics.selection.paper_rule import PaperRule, paper_rule, score_correlation, shift_rank
from rlgen_stats.toolkit.statistics.selection.stability_selection import (
    DEFAULT_PAIRS,
    DEFAULT_THRESHOLD,
    check_stability,
    stability_selection,
)
from rlgen_stats.toolkit.statistics.selection.tasks import (
    Labels,
    greedy_right,
    shared_clusters,
    split_hash,
    task_labels,
    task_sides,
)
from rlgen_stats.toolkit.statistics.selection.tiers import Found, Options, Rule, decide, tasks_needed

ONE_MECHANISM: Final = 0.9
"""Correlation of scores between tasks above which the intersection over tasks is nearly forced (METHOD.md 4c)."""


def select_features(
    features: xr.Dataset,
    outcomes: xr.Dataset,
    *,
    base: str = BASE_MODEL,
    target: str,
    tasks: Sequence[str] | None = None,
    held_out: Sequence[str] = (),
    controls: Sequence[str] = (),
    rule: Rule = "confirmed",
    score_fraction: float = 0.2,
    u: int | None = None,
    combine: str = "simes",
    alpha: float = 0.05,
    n_resamples: int = 999,
    n_bootstrap: int = 999,
    min_discordant: int = 20,
    n_min: int = DEFAULT_MIN_FIRING,
    max_features: int = 50,
    n_pairs: int = DEFAULT_PAIRS,
    n_per_half: int | None = None,
    stability_threshold: float = DEFAULT_THRESHOLD,
    variable: str = "mean",
    clusters: str | None = None,
    seed: int = 0,
    unit: str = "prompt",
    allow_token_unit: bool = False,
) -> xr.Dataset:
    """Choose the features in which ``target`` exceeds ``base`` where it gained, task by task, and confirm them.

    Parameters
    ----------
    features
        Layout ``features`` in contribution scale, with label ``split`` on prompts; read in feature blocks.
    outcomes
        Layout ``outcomes``; ``greedy_correct`` decides base-wrong/target-right (gain) and the reverse (loss).
    base, target
        Model ids.
    tasks
        Tasks to select on; default all but ``held_out`` and ``controls``.
    held_out, controls
        Tasks never selected on; reported with their role.
    rule
        ``"confirmed"``: selected are the CONFIRMED features, else the CANDIDATEs, else the paper's set.
        ``"paper"``: the paper's set.
    score_fraction
        Paper's rule: share of the task's largest score that a feature needs.
    u, combine
        Tasks in which a feature must show the effect (default all estimable ones) and how p-values are combined.
    alpha, n_resamples, n_bootstrap, seed
        Level (BH on the selection half, Holm on the verification half) and 1 - coverage; draws; seed.
    min_discordant
        Gains and losses that the contrast needs, each.
    n_min
        Selection prompts, pooled over both models, on which a testable feature fires.
    max_features
        Largest set selected; the highest ranked are kept.
    n_pairs, n_per_half, stability_threshold
        Stability selection: complementary pairs (0: none), features kept per half-sample (default
        ``stability_selection.default_per_half``) and the share from which a feature is stable.
    variable, clusters
        Summary tested, and label of dependent prompts (flipped and halved together).
    unit, allow_token_unit
        ``"prompt"``; ``"token"`` only if explicitly allowed, and then recorded as a warning.

    Returns
    -------
    xr.Dataset
        Layout ``selection``. Further ``p_guard`` [task, feature], ``guard``, ``contrast_estimable``, ``used`` [task],
        ``score_correlations`` [task, other_task], ``verification_score`` [feature] (mean over tasks on gain prompts)
        and ``verification_task_effect`` [task, feature]. Effects come from verification prompts only and are called
        ``verification_*``; ``score``, ``contrast``, ``p_flip``, ``p_guard``, ``p_value``, ``rank``, ``stability``
        (share of random half-samples that put the feature among the leading ones) and ``stable`` are selection scores:
        they say why a feature was chosen, not how large its effect is. Computed at once.

    Raises
    ------
    RefusedError
        If the features are not in contribution scale (raw scores of different features cannot be compared), if
        features and outcomes are of different studies, or for ``unit="token"``.
    InputError
        If models, tasks, labels or prompts do not fit.

    Notes
    -----
    *Guard.* D on prompts chosen because base failed and the target did not is confounded: with no model difference at
    all it is biased wherever activation and correctness correlate. ``score``, ``kept``, ``p_flip``, ``n_paper``,
    ``p_n1`` and ``p_n2`` carry no guard. ``contrast_p`` does (gains against losses, both signed right minus wrong,
    labels permuted) but needs losses; where there are fewer than ``min_discordant``, ``p_guard`` falls back to the sign
    flip over *all* prompts of the task, chosen without looking at outcomes. That rules out selection, but not that a
    feature merely follows being right, which the contrast cancels; ``guard`` says which one a task has. A task's
    p-value is max(p_flip, p_guard): it rejects only if both do. ``p_value`` is the partial conjunction of these over
    tasks. All are one-sided: target above base.

    *Stability.* Information beside the tiers, which it does not change. It asks whether the ranking would have been
    much the same on other prompts; the bounds in the attributes are on expected numbers (``stability_selection``).

    *Effects.* ``selected_effects`` gives those of any model. Over all candidates the verification effects are free of
    selection; those of the CONFIRMED among them passed a test on the same prompts and are a little optimistic.
    ``n_shared_clusters`` counts clusters with prompts on both sides of the split; it should be 0.

    References
    ----------
    Shi et al. 2026, arXiv:2604.25011; Benjamini and Heller 2008, doi:10.1111/j.1541-0420.2007.00984.x.

    Examples
    --------
    >>> select_features(open_features(f), open_outcomes(o), target="rl@80", held_out=["logiqa"])  # doctest: +SKIP
    """
    check_unit(unit, allow_token_unit)
    check_comparable(features, outcomes, keys=("study_id",))
    features = in_prompt_order(features, repeated=unit == "token")
    options = Options(
        score_fraction, u, combine, alpha, n_resamples, n_bootstrap, min_discordant, n_min, seed, n_pairs, n_per_half,
        stability_threshold,
    )  # fmt: skip
    _check(features, rule, options)
    prompts = _prompts(features, outcomes, [base, target], task_labels(features, tasks, held_out, controls), clusters)
    (values, firing), _ = feature_arrays(features, [variable, "firing"], [base, target])
    paper = _paper(values, firing, prompts, options)
    testable = (firing[:, prompts.chosen] > 0).sum(axis=(0, 1)).compute() >= n_min
    tests = {split: _tests(values, prompts, split, options) for split in SPLITS}
    ranks = feature_ranks(features)
    found = decide(tests, testable, paper, rule, max_features, options, ranks)
    stable, told = _stability(values, prompts, tests["selection"], testable, ranks, options)
    attrs = _attrs(features, tests, paper, found, values[:, prompts.chosen], options)
    attrs |= told | source_attrs(features) | unit_attrs(unit, clusters, prompts.codes)
    attrs |= {"base": base, "target": target, "variable": variable, "max_features": max_features}
    attrs |= {"requested_rule": rule, "n_shared_clusters": shared_clusters(features, prompts.codes)}
    names = np.array(prompts.labels.tasks, dtype=np.str_)
    return xr.Dataset(
        _task_variables(prompts, tests, paper) | found.variables(tests["verification"]) | stable,
        coords={TASK: names, "other_task": names} | feature_coord(features),
        attrs=attrs,
    )


@dataclass(frozen=True)
class _Prompts:
    """Which prompts of which task stand on which side, in both halves."""

    labels: Labels
    sides: dict[str, dict[str, Sides]]
    """[split][task]"""
    codes: IntArray | None
    chosen: IntArray
    """Selection prompts."""

    @property
    def gain(self) -> dict[str, IntArray]:
        """Gain prompts of the selection half, by task selected on that has any."""
        own = self.sides["selection"].items()
        return {task: side.gain for task, side in own if self.labels.used[task] and len(side.gain)}


def _prompts(
    features: xr.Dataset, outcomes: xr.Dataset, models: list[str], labels: Labels, clusters: str | None
) -> _Prompts:
    right = greedy_right(features, outcomes, models)
    there = present_prompts(features, models)
    sides = {split: task_sides(labels, right, there & in_split(features, split)) for split in SPLITS}
    chosen = np.flatnonzero(there & in_split(features, "selection"))
    return _Prompts(labels, sides, cluster_codes(features, clusters), chosen)


def _check(features: xr.Dataset, rule: str, options: Options) -> None:
    check_contribution_scale(features, "scores")
    if rule not in get_args(Rule) or not 0 < options.score_fraction <= 1 or not 0 < options.alpha < 1:
        raise InputError(
            f"expected rule 'confirmed' or 'paper', 0 < score_fraction <= 1 and 0 < alpha < 1; got {rule!r}, "
            f"{options.score_fraction}, {options.alpha}."
        )
    if options.n_pairs:
        check_stability(options.n_pairs, options.n_per_half, options.stability_threshold)
    missing = [name for name in (TASK, DOMAIN, SPLIT) if name not in features.coords]
    if missing:
        raise InputError(f"the features lack the prompt label {missing[0]!r}; it is written by the encode stage.")
    unknown = set(np.asarray(features[SPLIT].values).astype(np.str_)) - set(SPLITS)
    if unknown:
        raise InputError(f"prompts are split into {list(SPLITS)}, got {sorted(unknown)}; label every prompt.")


def _tests(values: da.Array, prompts: _Prompts, split: str, options: Options) -> SplitTests:
    """Tests of one split; intervals only where effects may be reported."""
    return split_tests(
        values,
        prompts.sides[split],
        used=prompts.labels.used,
        split=split,
        codes=prompts.codes,
        min_discordant=options.min_discordant,
        n_resamples=options.n_resamples,
        n_bootstrap=options.n_bootstrap if split == "verification" else 0,
        alpha=options.alpha,
        seed=options.seed,
    )


def _paper(values: da.Array, firing: da.Array, prompts: _Prompts, options: Options) -> PaperRule | None:
    if not prompts.gain:
        return None
    chosen, codes = prompts.chosen, prompts.codes
    place = np.full(values.shape[1], -1, dtype=np.int64)
    place[chosen] = np.arange(len(chosen))
    return paper_rule(
        values[:, chosen],
        firing[:, chosen],
        {task: place[index] for task, index in prompts.gain.items()},
        score_fraction=options.score_fraction,
        n_resamples=options.n_resamples,
        seed=options.seed,
        clusters=None if codes is None else codes[chosen],
    )


def _stability(
    values: da.Array,
    prompts: _Prompts,
    tests: SplitTests,
    testable: NDArray[np.bool_],
    ranks: IntArray,
    options: Options,
) -> tuple[dict[str, tuple[str, NDArray[Any]]], dict[str, Any]]:
    """Variables and attributes of stability selection on the selection half; none if it was not asked for."""
    if not options.n_pairs:
        return {}, {}
    found = stability_selection(
        values,
        prompts.sides["selection"],
        tests,
        testable,
        ranks,
        codes=prompts.codes,
        u=tasks_needed(tests, options),
        combine=options.combine,
        n_pairs=options.n_pairs,
        n_per_half=options.n_per_half,
        threshold=options.stability_threshold,
        seed=options.seed,
    )
    return {"stability": (FEATURE, found.share), "stable": (FEATURE, found.stable)}, found.attrs()


def _task_variables(
    prompts: _Prompts, tests: dict[str, SplitTests], paper: PaperRule | None
) -> dict[str, tuple[Any, NDArray[Any]]]:
    """Variables over task, NaN for tasks not selected on."""
    labels, sides = prompts.labels, prompts.sides["selection"]
    first, second = tests["selection"], tests["verification"]
    shape = first.p_flip.shape
    rows = [labels.tasks.index(task) for task in prompts.gain]
    score, kept = np.full(shape, np.nan), np.zeros(shape, dtype=bool)
    correlation = np.full((shape[0], shape[0]), np.nan)
    if paper is not None:
        score[rows], kept[rows] = paper.scores, paper.kept
        correlation[np.ix_(rows, rows)] = score_correlation(paper.scores)
    by_feature = {
        "score": score, "kept": kept, "p_flip": first.p_flip, "contrast": first.contrast,
        "contrast_p": first.contrast_p, "p_guard": first.p_guard, "verification_task_effect": second.task_effect,
    }  # fmt: skip
    texts = {
        "estimable": first.estimable, "contrast_estimable": first.contrast_estimable, "guard": first.guard,
        "verification_estimable": second.estimable, "verification_guard": second.guard, "role": labels.roles,
    }  # fmt: skip
    counts = {
        "n_selected_prompts": [len(sides[task].everyone) for task in labels.tasks],
        "n_gain": [len(sides[task].gain) for task in labels.tasks],
        "n_loss": [len(sides[task].loss) for task in labels.tasks],
        "n_kept": kept.sum(axis=1),
        "used": [labels.used[task] for task in labels.tasks],
    }
    return (
        {name: ((TASK, FEATURE), array) for name, array in by_feature.items()}
        | {name: (TASK, np.array(column)) for name, column in (texts | counts).items()}
        | {"score_correlations": ((TASK, "other_task"), correlation)}
    )


def _attrs(
    features: xr.Dataset,
    tests: dict[str, SplitTests],
    paper: PaperRule | None,
    found: Found,
    values: da.Array,
    options: Options,
) -> dict[str, Any]:
    """Attributes of the layout and the statements a reader needs beside the numbers."""
    nan = float("nan")
    rank, top_share = shift_rank(values, options.seed) if values.shape[1] else (nan, nan)
    correlation = nan
    if paper is not None and len(paper.scores) > 1:
        matrix = score_correlation(paper.scores)
        correlation = float(np.nanmean(matrix[np.triu_indices(len(matrix), 1)]))
    used = [i for i, text in enumerate(tests["selection"].estimable) if text == "yes"]
    guards = {tests["selection"].tasks[i]: tests["selection"].guard[i] for i in used}
    return {
        "test": "max(sign flip on gain prompts, guard) per task; partial conjunction over tasks; BH, then Holm",
        "null": "in fewer than u tasks does the target exceed base on gain prompts beyond selection by outcome",
        "family": "features (BH on the selection half); candidates (Holm on the verification half)",
        "family_size": found.n_tested,
        "split_hash": split_hash(features),
        "score_correlation": correlation,
        "one_mechanism": bool(correlation > ONE_MECHANISM),
        "shift_rank": rank,
        "shift_top_share": top_share,
        "n_paper": int(found.paper_selected.sum()),
        "p_n1": paper.p_n1 if paper is not None else nan,
        "p_n2": paper.p_n2 if paper is not None else nan,
        "n1_median": float(np.median(paper.n1)) if paper is not None else nan,
        "n2_median": float(np.median(paper.n2)) if paper is not None else nan,
        "rule": found.rule if guards or paper is not None else "nothing selected: no task is estimable",
        "guard": json.dumps(guards, sort_keys=True),
        "without_guard": "score, kept, p_flip, n_paper, p_n1, p_n2",
        "with_guard": "contrast_p, p_guard, p_value, q_value, verification_p, verification_effect",
        "guard_contrast": "cancels selection by outcome and features that merely follow being right",
        "guard_all_prompts": "cancels selection by outcome only",
        "u": list(found.u),
        "combine": options.combine,
        "score_fraction": options.score_fraction,
        "min_discordant": options.min_discordant,
        "n_min": options.n_min,
        "n_resamples": options.n_resamples,
        "n_bootstrap": options.n_bootstrap,
        "seed": options.seed,
        "alpha": options.alpha,
    }
