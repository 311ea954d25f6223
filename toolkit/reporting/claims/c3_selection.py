"""C3: whether a compact, task-agnostic feature set separates RL from base."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import xarray as xr

from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.claims.c4_c5_causal import carried_by_set, share_words
from rlgen_stats.toolkit.reporting.claims.claim import Claim, PaperClaim
from rlgen_stats.toolkit.reporting.claims.replication import dictionary_caveat, health_caveat, unusable_readout
from rlgen_stats.toolkit.reporting.formatting import count, fixed, listed, p_text, percent
from rlgen_stats.toolkit.reporting.result_lookup import Results, attr_number, by_dictionary, labels_of, number, text
from rlgen_stats.toolkit.statistics.claim_verdicts import (
    COMPACT_SHARE,
    MIN_TASKS,
    Verdict,
    agreed_p,
    agreed_verdict,
    any_feature_p,
    mean_count,
    selection_verdict,
)
from rlgen_stats.toolkit.statistics.selection.select_features import ONE_MECHANISM

C3: Final = PaperClaim(
    id="C3",
    statement=(
        "A compact, task-agnostic feature set separates RL from base on prompts where base is wrong and RL is right"
    ),
    unit="features",
    paper_figure=(
        "50 and 16 features of 32,768 in its two models, by scores of at least 20% of the maximum in every selection "
        "task."
    ),
)
_COUNTS: Final = ("n_confirmed", "n_selected", "n_testable")
"""Details that are also given dictionary by dictionary."""
_YES: Final = "yes"
_UNUSED: Final = "no: not selected on"
"""State of held-out and control tasks."""


def estimable_tasks(selection: xr.Dataset) -> list[str]:
    """Selection tasks with enough prompts that base got wrong and RL right to test features on."""
    return [task for task, state in _selection_tasks(selection) if state == _YES]


def scored_tasks(selection: xr.Dataset) -> list[str]:
    """Selection tasks with any such prompt: those the paper's rule intersects."""
    return [task for task, state in _selection_tasks(selection) if not state.startswith("no")]


def _selection_tasks(selection: xr.Dataset) -> list[tuple[str, str]]:
    rows = zip(selection["task"].values, selection["estimable"].values, selection["role"].values, strict=True)
    return [(str(task), str(state)) for task, state, role in rows if str(role) not in ("held_out", "control")]


def assess_selection(results: Results, spec: StudySpec) -> Claim:
    """C3 from the selection: features confirmed on verification prompts, with the rule ``selection_verdict``.

    The rule is applied in every dictionary, and their verdicts must agree. The estimate is the mean number of CONFIRMED
    features, its interval that over dictionaries; in each, by Holm's bound, at least so many separate the models, with
    confidence 1 - alpha. p is that of "at least one feature separates" in as many dictionaries as must agree.
    """
    each = by_dictionary(results, "selection")
    if not each:
        return C3.not_estimable("the selection has not been computed")
    unusable = unusable_readout(results, spec)
    if unusable:
        return C3.not_estimable(unusable)
    judged = [_judge(data) for data in each]
    verdict = agreed_verdict([verdict for verdict, _ in judged])
    data, (_, details) = each[0], judged[0]
    for name in _COUNTS:
        details[f"{name}_by_dictionary"] = [one[name] for _, one in judged]
    details["separation_auc"] = _separation_auc(results)
    if verdict is Verdict.NOT_ESTIMABLE:
        reason = unusable_tasks(data) or "no task has enough base-wrong, RL-right prompts, or no feature is testable"
        return C3.not_estimable(reason, details=details)
    return C3.answered(
        mean_count(details["n_confirmed_by_dictionary"], alpha=spec.statistics.alpha),
        agreed_p([any_feature_p(one["verification_q"].values) for one in each]),
        verdict,
        _answer(verdict, details, [verdict for verdict, _ in judged]),
        caveats=(
            *_caveats(data, details, spec),
            *_carried_in_trials(results),
            *separation_caveats(results, spec),
            *_reappearance(results, spec, data),
            *dictionary_caveat(spec),
            *health_caveat(results, spec),
        ),
        details=details,
    )


def _carried_in_trials(results: Results) -> list[str]:
    """How much of the change the selected set carries when it is copied between the models."""
    words = [
        f"{share} {where}"
        for direction, where in (("amplify", "into base"), ("disable", "into the RL model"))
        if (share := share_words(carried_by_set(results, direction)))
    ]
    return [f"Copied from the other model on the same text, the selected set carries {listed(words)}."] if words else []


def _judge(data: xr.Dataset) -> tuple[Verdict, dict[str, Any]]:
    """Verdict of one dictionary, and what it rests on."""
    tasks = estimable_tasks(data)
    testable = np.isfinite(data["p_value"].values)
    contrast = bool(np.isfinite(data["contrast_p"].values).any())
    guarded = contrast or ("p_guard" in data and bool(np.isfinite(data["p_guard"].values).any()))
    details = _details(data, tasks, testable, contrast=contrast, guarded=guarded)
    verdict = selection_verdict(
        n_estimable=len(tasks),
        n_confirmed=details["n_confirmed"],
        n_testable=int(testable.sum()),
        guarded=guarded,
    )
    return verdict, details


def unusable_tasks(data: xr.Dataset) -> str:
    """Why tasks meant for selection could not be used, tasks with the same reason together; empty if all could."""
    by_reason: dict[str, list[str]] = {}
    for task, state in zip(data["task"].values, data["estimable"].values, strict=True):
        if str(state) not in (_YES, _UNUSED, ""):
            by_reason.setdefault(str(state).removeprefix("no: "), []).append(str(task))
    return "; ".join(f"{reason} in {listed(tasks)}" for reason, tasks in by_reason.items())


def _details(
    data: xr.Dataset, tasks: list[str], testable: np.ndarray, *, contrast: bool, guarded: bool
) -> dict[str, Any]:
    tiers, counts = np.unique(data["tier"].values.astype(str), return_counts=True)
    task_names = [str(task) for task in data["task"].values]
    return {
        "test": data.attrs.get("test", ""),
        "null": data.attrs.get("null", ""),
        "estimable_tasks": tasks,
        "n_testable": int(testable.sum()),
        "tiers": {str(tier): int(n) for tier, n in zip(tiers, counts, strict=True) if tier},
        "n_confirmed": int((data["tier"].values == "CONFIRMED").sum()),
        "n_selected": int(data["selected"].values.sum()),
        "n_paper_rule": attr_number(data, "n_paper"),
        "p_paper_rule_flip_null": attr_number(data, "p_n1"),
        "p_paper_rule_permuted_ids": attr_number(data, "p_n2"),
        "score_correlation": attr_number(data, "score_correlation"),
        "shift_rank": attr_number(data, "shift_rank"),
        "rl_specific_contrast": contrast,
        "guarded": guarded,
        "selected_by": str(data.attrs.get("rule", "")),
        "n_gain": dict(zip(task_names, (int(n) for n in data["n_gain"].values), strict=True)),
        "n_loss": dict(zip(task_names, (int(n) for n in data["n_loss"].values), strict=True)),
    }


def _answer(verdict: Verdict, details: dict[str, Any], each: list[Verdict]) -> str:
    counts, tasks = details["n_confirmed_by_dictionary"], details["estimable_tasks"]
    n_testable = _span(details["n_testable_by_dictionary"])
    one = max(counts) == min(counts) == 1
    confirmed = (
        f"{_span(counts)} feature{'s' * (not one)} of {n_testable} testable ones {'is' if one else 'are'} confirmed"
    )
    if len(counts) > 1:
        confirmed = f"in each of {len(counts)} dictionaries {confirmed}"
    where = f"on prompts not used to select them, over {count(len(tasks), 'task')}"
    if verdict is Verdict.SUPPORTED:
        return f"{confirmed[0].upper()}{confirmed[1:]} {where}."
    if verdict is Verdict.NOT_SUPPORTED:
        if max(counts) == 0:
            return f"No feature of {n_testable} testable ones is confirmed {where}."
        too_many = f"more than the {100 * COMPACT_SHARE:.0f}% that could still be called compact"
        return f"{confirmed[0].upper()}{confirmed[1:]} {where}, {too_many}."
    if len(set(each)) > 1:
        words = ", ".join(one.value.replace("_", " ").lower() for one in each)
        return f"Undetermined, because the dictionaries disagree ({words}): {confirmed}."
    if not details["guarded"]:
        return (
            f"Undetermined: {confirmed}, but RL got too few prompts wrong that base got right for the RL-specific "
            "contrast, without which selecting prompts by outcome can make any feature separate."
        )
    n_tasks = count(len(tasks), "task")
    return f"Undetermined: {confirmed}, but only {n_tasks} could be tested (at least {MIN_TASKS} needed)."


def _span(counts: list[int]) -> str:
    """``12``, or ``12 to 15``."""
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _reappearance(results: Results, spec: StudySpec, data: xr.Dataset) -> tuple[str, ...]:
    """Whether the confirmed features depend on one dictionary's initial weights."""
    matching, name = results.get("matching"), spec.primary_crosscoder.name
    confirmed = data["feature"].values[data["tier"].values == "CONFIRMED"]
    if matching is None or name not in labels_of(matching, "crosscoder"):
        return ()
    if not len(confirmed):
        return ()
    share = matching["reappearance"].sel(crosscoder=name, feature=confirmed).values
    n = len(labels_of(matching, "replicate"))
    others = {1: "the other dictionary", 2: "both other dictionaries"}.get(n, f"all {n} other dictionaries")
    return (
        f"{int((share == 1).sum())} of {count(len(confirmed), 'confirmed feature')} have a match in {others} trained "
        "from other initial weights.",
    )


def separation_caveats(results: Results, spec: StudySpec) -> tuple[str, ...]:
    """How well raw activations alone tell the models apart, beside the selected features; nothing if not computed."""
    data, auc = results.get("separation"), _separation_auc(results)
    caveats = []
    if data is not None and "models" in auc:
        models, of_models = auc["models"], {"comparison": "models"}
        share = number(data, "share", model=data.attrs.get("target"))
        sentence = (
            f"Raw activations alone tell {spec.contrasted[1].name} from base on unseen prompts with AUC "
            f"{fixed(models['raw'], 3)} (their mean shift, {percent(share, 0)} of the squared difference, "
            f"{fixed(models['mean shift'], 3)})"
        )
        if math.isfinite(models["selected"]):
            n = int(attr_number(data, "n_features"))
            random = models["random"]
            beside = f" and as many random ones {fixed(random, 3)}" if math.isfinite(random) else ""
            verdict = (
                "the features tell them apart better than raw activations do"
                if number(data, "beats_raw", **of_models)
                else "that features separate the models is no news here"
            )
            of = " of the first dictionary" if len(spec.primary_crosscoder.names) > 1 else ""
            sentence += f", the {count(n, 'selected feature')}{of} {fixed(models['selected'], 3)}{beside}: {verdict}"
        caveats.append(f"{sentence}.")
    if "gain or loss" in auc:
        told = ", ".join(f"{name} {fixed(value, 3)}" for name, value in auc["gain or loss"].items())
        caveats.append(
            f"On unseen prompts the difference of activations tells those that {spec.contrasted[1].name} gained from "
            f"those that it lost with AUC: {told}."
        )
    return tuple(caveats)


def _separation_auc(results: Results) -> dict[str, dict[str, float]]:
    """AUC by comparison and predictor, of the comparisons that could be estimated."""
    data = results.get("separation")
    return {
        comparison: {
            predictor: number(data, "auc", comparison=comparison, predictor=predictor)
            for predictor in labels_of(data, "predictor")
        }
        for comparison in labels_of(data, "comparison")
        if text(data, "estimable", comparison=comparison) == _YES
    }


def _caveats(data: xr.Dataset, details: dict[str, Any], spec: StudySpec) -> tuple[str, ...]:
    caveats = []
    correlation, rank = details["score_correlation"], details["shift_rank"]
    if math.isfinite(correlation) and correlation > ONE_MECHANISM:
        caveats.append(
            f"Scores correlate {fixed(correlation, 2)} across tasks: one mechanism serves all tasks, so that a "
            "shared set was nearly forced and being task-agnostic is not a separate finding."
        )
    if math.isfinite(rank) and rank < MIN_TASKS:
        caveats.append(
            f"The RL shift has an effective rank of {fixed(rank)}; one mean-shift direction may account for all of it."
        )
    if not math.isfinite(correlation):
        caveats.append("The correlation of scores across tasks is not estimable, so one mechanism cannot be excluded.")
    if not details["rl_specific_contrast"]:
        losses = sum(details["n_loss"].values())
        instead = "the guard is a test on all prompts instead" if details["guarded"] else "there is no guard"
        caveats.append(
            f"The RL-specific contrast needs {spec.selection.min_discordant} prompts of each kind and RL lost {losses} "
            f"in all; {instead}."
        )
    p_flip, p_ids, n_paper = (
        details["p_paper_rule_flip_null"],
        details["p_paper_rule_permuted_ids"],
        details["n_paper_rule"],
    )
    if math.isfinite(n_paper):
        caveats.append(
            f"The paper's own rule keeps {count(n_paper, 'feature')} (p = {p_text(p_flip)} when labels are flipped and "
            f"the rule re-run, {p_text(p_ids)} when feature ids are permuted)."
        )
    held_out = [str(task) for task in data["task"].values if str(task) in spec.selection.held_out_tasks]
    if held_out:
        caveats.append(f"Held out from selection: {listed(held_out)}.")
    return tuple(caveats)
