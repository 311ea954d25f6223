"""Selection of the features that separate the target model from base where it gained, task by task (claim C3).

Prompts are split first: features are chosen on one part and confirmed on another, and no effect is ever reported
from a prompt that helped to choose. Trial prompts, the third part, are not read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import BASE_MODEL, DOMAIN, FEATURE, SELECTION, SPLIT, SPLITS, TASK, VERIFICATION
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics.core.comparability import check_comparable, check_contribution_scale, source_attrs
from rlgen_stats.toolkit.statistics.core.coordinates import feature_coord, feature_ranks, find_models, in_split
from rlgen_stats.toolkit.statistics.core.feature_blocks import feature_arrays, in_prompt_order
from rlgen_stats.toolkit.statistics.core.units import check_unit, cluster_codes, present_prompts, unit_attrs
from rlgen_stats.toolkit.statistics.kernels.numerics import IntArray
from rlgen_stats.toolkit.statistics.selection.compactness import (
    COMPACT_SHARE,
    MIN_TASKS,
    MOST_COMPACT,
    accompanying_p,
    carried_share,
    no_rise_p,
)
from rlgen_stats.toolkit.statistics.selection.discordance import CONTRAST, SplitTests, discordance_tests
from rlgen_stats.toolkit.statistics.selection.options import RuleKind, SelectionRule, SelectionTests, StabilityOptions
from rlgen_stats.toolkit.statistics.selection.paper_rule import (
    PaperSelection,
    paper_rule,
    score_correlation,
    shift_rank,
)
from rlgen_stats.toolkit.statistics.selection.stability_selection import stability_selection
from rlgen_stats.toolkit.statistics.selection.task_prompts import (
    TaskPrompts,
    TaskRoles,
    assign_roles,
    greedy_correctness,
    prompts_by_task,
    shared_clusters,
    split_hash,
)
from rlgen_stats.toolkit.statistics.selection.tiers import Decision, decide, tasks_needed

ONE_MECHANISM: Final = 0.9
"""Correlation of scores between tasks above which the intersection over tasks is nearly forced (docs/method.md 4c)."""

DEFAULT_RULE: Final = SelectionRule()
DEFAULT_TESTS: Final = SelectionTests()
DEFAULT_STABILITY: Final = StabilityOptions()


def select_features(
    features: xr.Dataset,
    outcomes: xr.Dataset,
    *,
    target: str,
    base: str = BASE_MODEL,
    tasks: Sequence[str] | None = None,
    held_out: Sequence[str] = (),
    controls: Sequence[str] = (),
    rule: SelectionRule | RuleKind = DEFAULT_RULE,
    tests: SelectionTests = DEFAULT_TESTS,
    stability: StabilityOptions | None = DEFAULT_STABILITY,
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
    target, base
        Model ids.
    tasks
        Tasks to select on; default all but ``held_out`` and ``controls``.
    held_out, controls
        Tasks never selected on; reported with their role.
    rule
        Which features form the selected set: ``kind``, ``score_fraction``, ``max_features``; ``"paper"`` or
        ``"confirmed"`` stands for that kind with its defaults.
    tests
        Level and draws (``alpha``, ``n_resamples``, ``n_bootstrap``); what the contrast of a task needs
        (``min_discordant``) and a testable feature (``n_min``); how tasks are combined (``u``, ``combine``).
    stability
        Stability selection: ``n_pairs``, ``n_per_half``, ``threshold``; None: not run.
    variable, clusters
        Summary tested, and label of dependent prompts (flipped and halved together).
    seed
        Of all random draws.
    unit, allow_token_unit
        ``"prompt"``; ``"token"`` only if explicitly allowed, and then recorded as a warning.

    Returns
    -------
    xr.Dataset
        Layout ``selection``. Further ``contrast_estimable``, ``excess_estimable``, ``used`` [task],
        ``score_correlations`` [task, other_task], ``verification_score`` [feature] (mean over tasks on gain prompts)
        and ``verification_task_effect`` [task, feature]. Effects come from verification prompts only and are called
        ``verification_*``; ``score``, ``contrast``, ``excess``, ``p_flip``, ``p_guard``, ``p_value``, ``specific_p``,
        ``rank``, ``stability`` (share of random half-samples that put the feature among the leading ones) and
        ``stable`` are selection scores: they say why a feature was chosen, not how large its effect is. Computed at
        once.

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
    ``p_n1`` and ``p_n2`` carry no guard. ``contrast_p`` does: gains against losses, both as right minus wrong model,
    is zero for what follows correctness alike in both models. Where losses are fewer than ``min_discordant``, the sign
    flip over *all* prompts of the task takes its place. That rules out selection by outcome between models of equal
    accuracy, but not a feature that merely accompanies right answers where the target gives more of them: ``guard``
    says which one a task has. A task's p-value is the larger of both: it rejects only if both do. ``p_value`` is the
    partial conjunction over tasks. All are one-sided: target above base. ``tier`` and ``selected``, the features to
    edit, follow from it; a feature that rises on all prompts alike may well be the cause of gains.

    *Specific.* Such a feature does not set gains apart. ``excess_p`` asks that D be larger on gains than on prompts
    both get right and, where losses suffice, that gains and losses together exceed twice the latter (zero for an equal
    rise, for what follows correctness alike, and for their sum). ``specific_p`` and ``specific_tier`` are ``p_value``
    and ``tier`` of the largest of all these p-values of a task, as a family of their own: what claim C3 rests on.

    *Compactness.* ``carried_share`` with interval: share of the squared excess that the leading specific candidates (at
    most ``max_features`` and ``COMPACT_SHARE`` of the testable) carry on verification prompts; ``carried_best_high``:
    upper bound for any as small set. ``accompanying_p``, where losses are few: that of "these candidates merely
    accompany right answers in both models", as a set. ``no_rise_p``: that of "some feature's excess reaches
    ``MIN_EXCESS``", on selection and verification prompts together.

    *Stability.* Reported beside the tiers, which it does not change: whether other prompts would have given nearly the
    same ranking. The bounds in the attributes are on expected numbers of features (``stability_selection``).

    *Effects.* ``selected_effects`` gives those of any model. Over all candidates the verification effects are free of
    selection; those of the CONFIRMED among them passed a test on the same prompts and are a little optimistic.
    ``n_shared_clusters`` counts clusters with prompts in both parts of the split; it should be 0.

    References
    ----------
    Shi et al. 2026, arXiv:2604.25011; Benjamini and Heller 2008, doi:10.1111/j.1541-0420.2007.00984.x.

    Examples
    --------
    >>> select_features(open_features(f), open_outcomes(o), target="rl@80", held_out=["logiqa"])  # doctest: +SKIP
    """
    check_unit(unit, allow_token_unit)
    rule = SelectionRule(kind=rule) if isinstance(rule, str) else rule
    check_comparable(features, outcomes, keys=("study_id",))
    features = in_prompt_order(features, repeated=unit == "token")
    _check(features)
    base, target = find_models(features, [base, target])
    prompts = _prompts(features, outcomes, [base, target], assign_roles(features, tasks, held_out, controls), clusters)
    (values, firing), _ = feature_arrays(features, [variable, "firing"], [base, target])
    paper = _paper_rule(values, firing, prompts, rule, tests, seed)
    testable = (firing[:, prompts.selection] > 0).sum(axis=(0, 1)).compute() >= tests.n_min
    results = {split: _tests(values, prompts, split, tests, seed) for split in (SELECTION, VERIFICATION)}
    ranks = feature_ranks(features)
    decision = decide(results, testable, paper, rule, tests, ranks)
    shares, stability_attrs = _stability(values, prompts, results["selection"], testable, ranks, stability, tests, seed)
    attrs = _attrs(results, paper, decision) | _shift_attrs(values[:, prompts.selection], seed)
    attrs |= asdict(tests) | {"u": list(decision.rises.u), "score_fraction": rule.score_fraction, "seed": seed}
    attrs |= _compactness(values, prompts, results, testable, decision, rule, tests, seed)
    attrs |= stability_attrs | source_attrs(features) | unit_attrs(unit, clusters, prompts.codes)
    attrs |= {"base": base, "target": target, "variable": variable, "max_features": rule.max_features}
    attrs |= {"requested_rule": rule.kind, "n_shared_clusters": shared_clusters(features, prompts.codes)}
    attrs |= {"split_hash": split_hash(features)}
    names = np.array(prompts.roles.tasks, dtype=np.str_)
    return xr.Dataset(
        _task_variables(prompts, results, paper) | decision.variables(results["verification"]) | shares,
        coords={TASK: names, "other_task": names} | feature_coord(features),
        attrs=attrs,
    )


def _check(features: xr.Dataset) -> None:
    check_contribution_scale(features, "scores")
    missing = [name for name in (TASK, DOMAIN, SPLIT) if name not in features.coords]
    if missing:
        raise InputError(
            f"the features lack the prompt label {missing[0]!r}; expected one the encode stage wrote, or, of your own "
            "arrays, a column of the prompts given to features_dataset."
        )
    unknown = set(np.asarray(features[SPLIT].values).astype(np.str_)) - set(SPLITS)
    if unknown:
        raise InputError(f"prompts are split into {list(SPLITS)}, got {sorted(unknown)}; label every prompt.")


@dataclass(frozen=True)
class _Prompts:
    """Roles of tasks, and the prompts of each task in the selection and verification parts of the split."""

    roles: TaskRoles
    by_task: dict[str, dict[str, TaskPrompts]]
    """[split][task]"""
    codes: IntArray | None
    """Cluster per prompt, None if prompts are the units."""
    selection: IntArray
    """Prompts of the selection part."""

    @property
    def gain(self) -> dict[str, IntArray]:
        """Gain prompts of the selection part, by task selected on that has any."""
        gains = {task: of_task.gain for task, of_task in self.by_task["selection"].items() if self.roles.used[task]}
        return {task: gain for task, gain in gains.items() if len(gain)}


def _prompts(
    features: xr.Dataset, outcomes: xr.Dataset, models: list[str], roles: TaskRoles, clusters: str | None
) -> _Prompts:
    correct = greedy_correctness(features, outcomes, models)
    present = present_prompts(features, models)
    by_task = {
        split: prompts_by_task(roles, correct, present & in_split(features, split))
        for split in (SELECTION, VERIFICATION)
    }
    selection = np.flatnonzero(present & in_split(features, "selection"))
    return _Prompts(roles, by_task, cluster_codes(features, clusters), selection)


def _tests(values: da.Array, prompts: _Prompts, split: str, tests: SelectionTests, seed: int) -> SplitTests:
    return discordance_tests(
        values,
        prompts.by_task[split],
        used=prompts.roles.used,
        split=split,
        codes=prompts.codes,
        options=tests,
        seed=seed,
    )


def _paper_rule(
    values: da.Array, firing: da.Array, prompts: _Prompts, rule: SelectionRule, tests: SelectionTests, seed: int
) -> PaperSelection | None:
    """The paper's rule on the selection part; None where no task has gains."""
    if not prompts.gain:
        return None
    selection, codes = prompts.selection, prompts.codes
    position = np.full(values.shape[1], -1, dtype=np.int64)  # of every prompt among those of the selection part
    position[selection] = np.arange(len(selection))
    return paper_rule(
        values[:, selection],
        firing[:, selection],
        {task: position[index] for task, index in prompts.gain.items()},
        score_fraction=rule.score_fraction,
        n_resamples=tests.n_resamples,
        seed=seed,
        clusters=None if codes is None else codes[selection],
    )


def _stability(
    values: da.Array,
    prompts: _Prompts,
    results: SplitTests,
    testable: NDArray[np.bool_],
    ranks: IntArray,
    stability: StabilityOptions | None,
    tests: SelectionTests,
    seed: int,
) -> tuple[dict[str, tuple[str, NDArray[Any]]], dict[str, Any]]:
    """Variables and attributes of stability selection on the selection part; none if it was not asked for."""
    if stability is None:
        return {}, {}
    outcome = stability_selection(
        values,
        prompts.by_task["selection"],
        results,
        testable,
        ranks,
        stability,
        codes=prompts.codes,
        u=tasks_needed(int(results.tested.sum()), tests),
        combine=tests.combine,
        seed=seed,
    )
    return {"stability": (FEATURE, outcome.share), "stable": (FEATURE, outcome.stable)}, outcome.attrs()


def _compactness(
    values: da.Array,
    prompts: _Prompts,
    results: dict[str, SplitTests],
    testable: NDArray[np.bool_],
    decision: Decision,
    rule: SelectionRule,
    tests: SelectionTests,
    seed: int,
) -> dict[str, float | int]:
    """Attributes on how much a compact set carries, and on whether any feature's excess can matter."""
    chosen, confirming = results[SELECTION], results[VERIFICATION]
    in_use, unseen_in_use = chosen.excess_tested, confirming.excess_tested
    most = min(rule.max_features, MOST_COMPACT, max(1, int(COMPACT_SHARE * testable.sum())))
    rising = testable & (chosen.excess[in_use].sum(axis=0) > 0)
    leading = decision.specific.leading(most)
    unseen = [prompts.by_task[VERIFICATION][task] for task in np.array(confirming.tasks)[unseen_in_use]]
    share = carried_share(
        values,
        unseen,
        leading,
        rising,
        most=most,
        codes=prompts.codes,
        alpha=tests.alpha,
        seed=seed,
    )
    both = [
        prompts.by_task[SELECTION][task] | prompts.by_task[VERIFICATION][task]
        for task in np.array(chosen.tasks)[in_use]
    ]
    u = min(MIN_TASKS, decision.specific.u[0])  # what rises in two tasks of three is not shown not to rise
    no_rise = no_rise_p(values, both, testable, u=u, codes=prompts.codes)
    losses_suffice = all(
        guard == CONTRAST for part in (chosen, confirming) for guard in np.array(part.guard)[part.excess_tested]
    )
    flips = derive_seed(seed, "selection", "accompanying")
    accompanying = accompanying_p(values, [] if losses_suffice else unseen, leading, codes=prompts.codes, seed=flips)
    return share.attrs() | {"most_features": most, "no_rise_p": no_rise, "accompanying_p": accompanying}


def _task_variables(
    prompts: _Prompts, results: dict[str, SplitTests], paper: PaperSelection | None
) -> dict[str, tuple[Any, NDArray[Any]]]:
    """Variables over task, NaN for tasks not selected on."""
    tasks, by_task = prompts.roles.tasks, prompts.by_task["selection"]
    selection, verification = results["selection"], results["verification"]
    shape = selection.p_flip.shape
    score, kept = np.full(shape, np.nan), np.zeros(shape, dtype=bool)
    correlation = np.full((shape[0], shape[0]), np.nan)
    if paper is not None:
        scored = [tasks.index(task) for task in prompts.gain]
        score[scored], kept[scored] = paper.scores, paper.kept
        correlation[np.ix_(scored, scored)] = score_correlation(paper.scores)
    by_feature = {
        "score": score,
        "kept": kept,
        "p_flip": selection.p_flip,
        "contrast": selection.contrast,
        "contrast_p": selection.contrast_p,
        "p_guard": selection.p_guard,
        "excess": selection.excess,
        "excess_p": selection.excess_p,
        "verification_task_effect": verification.task_effect,
    }
    columns = {
        "estimable": selection.estimable,
        "contrast_estimable": selection.contrast_estimable,
        "excess_estimable": selection.excess_estimable,
        "guard": selection.guard,
        "verification_estimable": verification.estimable,
        "verification_guard": verification.guard,
        "verification_excess_estimable": verification.excess_estimable,
        "role": prompts.roles.roles,
        "n_selected_prompts": [len(by_task[task].every) for task in tasks],
        "n_gain": [len(by_task[task].gain) for task in tasks],
        "n_loss": [len(by_task[task].loss) for task in tasks],
        "n_kept": kept.sum(axis=1),
        "used": [prompts.roles.used[task] for task in tasks],
    }
    return (
        {name: ((TASK, FEATURE), array) for name, array in by_feature.items()}
        | {name: (TASK, np.array(column)) for name, column in columns.items()}
        | {"score_correlations": ((TASK, "other_task"), correlation)}
    )


def _attrs(results: dict[str, SplitTests], paper: PaperSelection | None, decision: Decision) -> dict[str, Any]:
    """Attributes of the layout: test, null and family, the paper's rule, and which results carry a guard."""
    nan = float("nan")
    correlation = nan
    if paper is not None and len(paper.scores) > 1:
        matrix = score_correlation(paper.scores)
        correlation = float(np.nanmean(matrix[np.triu_indices(len(matrix), 1)]))
    tests = results["selection"]
    rows = zip(tests.tasks, tests.estimable, tests.guard, strict=True)
    guards = {task: guard for task, estimable, guard in rows if estimable == "yes"}
    return {
        "test": "max(sign flip on gain prompts, guard) per task; partial conjunction over tasks; BH, then Holm",
        "null": "in fewer than u tasks does the target exceed base on gain prompts beyond selection by outcome",
        "family": "features (BH on the selection part); candidates (Holm on the verification part)",
        "family_size": decision.n_tested,
        "score_correlation": correlation,
        "one_mechanism": bool(correlation > ONE_MECHANISM),
        "n_paper": int(decision.paper_selected.sum()),
        "p_n1": paper.p_n1 if paper is not None else nan,
        "p_n2": paper.p_n2 if paper is not None else nan,
        "n1_median": float(np.median(paper.n1)) if paper is not None else nan,
        "n2_median": float(np.median(paper.n2)) if paper is not None else nan,
        "rule": decision.rule if guards or paper is not None else "nothing selected: no task is estimable",
        "guard": json.dumps(guards, sort_keys=True),
        "without_guard": "score, kept, p_flip, n_paper, p_n1, p_n2",
        "with_guard": "contrast_p, p_guard, p_value, q_value, verification_p, verification_effect",
        "with_guard_and_excess": "specific_p, specific_tier, verification_specific_q",
        "guard_contrast": "cancels features that follow correctness in both models",
        "guard_all_prompts": "cancels selection by outcome between models of equal accuracy only",
    }


def _shift_attrs(values: da.Array, seed: int) -> dict[str, float]:
    """Effective rank of the shift on the selection prompts: whether one direction may explain everything."""
    rank, top_share = shift_rank(values, seed) if values.shape[1] else (float("nan"), float("nan"))
    return {"shift_rank": rank, "shift_top_share": top_share}
