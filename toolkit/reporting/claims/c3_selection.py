"""C3: whether a compact, task-agnostic feature set separates RL from base."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xarray as xr

from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.claims.c4_c5_causal import beyond_random, carried_by_set, share_words
from rlgen_stats.toolkit.reporting.claims.claim import Claim, PaperClaim
from rlgen_stats.toolkit.reporting.claims.replication import dictionary_caveat, health_caveat, unusable_readout
from rlgen_stats.toolkit.reporting.formatting import count, count_span, fixed, listed, p_text, percent
from rlgen_stats.toolkit.reporting.result_lookup import (
    Results,
    attr_number,
    by_dictionary,
    chooses_features,
    labels_of,
    number,
    text,
)
from rlgen_stats.toolkit.statistics.causal.mediated_share import ALL, SET, CompactShare, compact_share
from rlgen_stats.toolkit.statistics.claim_verdicts import (
    SelectionReason,
    Verdict,
    agreed_p,
    any_feature_p,
    mean_count,
    mean_share,
    mostly_token_detectors,
    selection_claim,
    tested_tasks,
    verdicts_agree,
)
from rlgen_stats.toolkit.statistics.selection.compactness import CARRIED, MIN_EXCESS, MIN_TASKS
from rlgen_stats.toolkit.statistics.selection.discordance import CONTRAST
from rlgen_stats.toolkit.statistics.selection.select_features import ONE_MECHANISM
from rlgen_stats.toolkit.statistics.selection.token_detectors import by_token_only

C3: Final = PaperClaim(
    id="C3",
    statement=(
        "A compact, task-agnostic feature set separates RL from base on prompts where base is wrong and RL is right"
    ),
    short="A few features carry RL’s gain",
    unit="features",
    paper_figure=(
        "50 and 16 features of 32,768 in its two models, by scores of at least 20% of the maximum in every selection "
        "task."
    ),
)
_EACH: Final = (
    "n_confirmed",
    "n_rising",
    "n_selected",
    "n_selected_rising",
    "n_selected_specific",
    "n_testable",
    "no_rise_p",
    "accompanying_p",
)
"""Details that are also given dictionary by dictionary."""
_YES: Final = "yes"
_UNUSED: Final = "no: not selected on"
"""State of held-out and control tasks."""


def scored_tasks(selection: xr.Dataset) -> list[str]:
    """Selection tasks with any prompt that base got wrong and RL right: those the paper's rule intersects."""
    rows = zip(selection["task"].values, selection["estimable"].values, selection["role"].values, strict=True)
    return [
        str(task)
        for task, state, role in rows
        if str(role) not in ("held_out", "control") and not str(state).startswith("no")
    ]


@dataclass(frozen=True, eq=False)
class _Judged:
    """One dictionary: its selection, what the verdict rests on, and the verdict."""

    data: xr.Dataset
    details: dict[str, Any]
    verdict: Verdict
    reason: SelectionReason


def assess_selection(results: Results, spec: StudySpec) -> Claim:
    """C3 from the selection: features confirmed on verification prompts, with the rule of ``selection_claim``.

    The rule is applied in every dictionary, and their verdicts must agree. Whether a compact set carries the change is
    read off the curve of mediated shares, over all dictionaries together: the selected set lifted into base. Without a
    trial, or where the full patch has no shown effect, it is read off the rise on verification prompts, dictionary by
    dictionary, and the answer says so. The estimate is the mean number of features
    confirmed to rise where RL gained by more than where both models are right, its interval that over dictionaries; in
    each, by Holm's bound, at least so many do, with confidence 1 - alpha. p is that of "at least one feature does" in
    as many dictionaries as must agree.
    """
    each = by_dictionary(results, "selection")
    if not each:
        return C3.not_estimable("the selection has not been computed")
    unusable = unusable_readout(results, spec)
    if unusable:
        return C3.not_estimable(unusable)
    shares = results.get("mediated_share")
    lifted = compact_share(shares, min(attr_number(data, "most_features") for data in each))
    verdict, verdicts = selection_claim(each, shares, alpha=spec.statistics.alpha)
    judged = [_Judged(data, _details(data), *one) for data, one in zip(each, verdicts, strict=True)]
    data, details = each[0], judged[0].details
    for name in _EACH:
        details[f"{name}_by_dictionary"] = [one.details[name] for one in judged]
    details["reason_by_dictionary"] = [one.reason.value for one in judged]
    details["compactness_by"] = "rise" if lifted is None else "mediated share"
    details["carried"] = _carried(each, spec)
    details |= carried_by_set(results, "amplify")
    details["separation_auc"] = _separation_auc(results)
    details |= _token_details(results)
    if verdict is Verdict.NOT_ESTIMABLE:
        reason = (
            unusable_tasks(data, "excess_estimable")
            or "no task has enough base-wrong, RL-right prompts, or no feature is testable"
        )
        return C3.not_estimable(reason, details=details)
    return C3.answered(
        mean_count(details["n_confirmed_by_dictionary"], alpha=spec.statistics.alpha),
        agreed_p([any_feature_p(one["verification_specific_q"].values) for one in each]),
        verdict,
        _answer(verdict, judged, _Share(results, spec, lifted)) + _token_sentence(details),
        caveats=(
            *_caveats(data, details, spec),
            *_token_caveat(details),
            *_carried_in_trials(results),
            *_carried_of_the_rise(details),
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


def _carried_of_the_rise(details: dict[str, Any]) -> list[str]:
    """The other measure of compactness, where the answer does not rest on it."""
    carried = details["carried"]
    if details["compactness_by"] == "rise" or not math.isfinite(carried["share"]):
        return []
    return [
        f"Of the rise on verification prompts beyond that where base was right too, the leading candidates, "
        f"{int(carried['most_features'])} at most, carry {_with_interval(carried)}; the verdict rests on what the set "
        "does when it is lifted into base."
    ]


def _carried(each: list[xr.Dataset], spec: StudySpec) -> dict[str, float]:
    """Share of the rise that the leading candidates carry, over dictionaries with its interval, and its bounds."""
    share, low, high = ([attr_number(data, f"carried_{name}") for data in each] for name in ("share", "low", "high"))
    pooled = mean_share(share, low, high, alpha=spec.statistics.alpha)
    return dict(zip(("share", "low", "high"), pooled, strict=True)) | {
        "best_high": max(attr_number(data, "carried_best_high") for data in each),
        "most_features": max(attr_number(data, "most_features") for data in each),
    }


def _with_interval(share: dict[str, float]) -> str:
    return f"{percent(share['share'], 0)} [{percent(share['low'], 0)}, {percent(share['high'], 0)}]"


def unusable_tasks(data: xr.Dataset, column: str = "estimable") -> str:
    """Why tasks meant for selection could not be used, tasks with the same reason together; empty if all could."""
    by_reason: dict[str, list[str]] = {}
    for task, state in zip(data["task"].values, data[column].values, strict=True):
        if str(state) not in (_YES, _UNUSED, ""):
            by_reason.setdefault(str(state).removeprefix("no: "), []).append(str(task))
    return "; ".join(f"{reason} (task{'s' * (len(tasks) > 1)} {listed(tasks)})" for reason, tasks in by_reason.items())


def _details(data: xr.Dataset) -> dict[str, Any]:
    tasks, confirming = tested_tasks(data)
    tiers, counts = np.unique(data["tier"].values.astype(str), return_counts=True)
    task_names = [str(task) for task in data["task"].values]
    return {
        "test": data.attrs.get("test", ""),
        "null": data.attrs.get("null", ""),
        "estimable_tasks": tasks,
        "confirming_tasks": confirming,
        "n_testable": int(np.isfinite(data["specific_p"].values).sum()),
        "tiers": {str(tier): int(n) for tier, n in zip(tiers, counts, strict=True) if tier},
        "n_confirmed": int((data["specific_tier"].values == "CONFIRMED").sum()),
        "n_rising": int((data["tier"].values == "CONFIRMED").sum()),
        "n_selected": int(data["selected"].values.sum()),
        "n_selected_rising": int((data["selected"].values & (data["tier"].values == "CONFIRMED")).sum()),
        "n_selected_specific": int((data["selected"].values & (data["specific_tier"].values == "CONFIRMED")).sum()),
        "n_paper_rule": attr_number(data, "n_paper"),
        "p_paper_rule_flip_null": attr_number(data, "p_n1"),
        "p_paper_rule_permuted_ids": attr_number(data, "p_n2"),
        "score_correlation": attr_number(data, "score_correlation"),
        "shift_rank": attr_number(data, "shift_rank"),
        "rl_specific_contrast": all(
            str(guard) == CONTRAST
            for guard, task in zip(data["guard"].values, task_names, strict=True)
            if task in tasks
        ),
        "no_rise_p": attr_number(data, "no_rise_p"),
        "accompanying_p": attr_number(data, "accompanying_p"),
        "selected_by": str(data.attrs.get("rule", "")),
        "n_gain": dict(zip(task_names, (int(n) for n in data["n_gain"].values), strict=True)),
        "n_loss": dict(zip(task_names, (int(n) for n in data["n_loss"].values), strict=True)),
    }


@dataclass(frozen=True, eq=False)
class _Share:
    """What compact sets carry, in words: of the full patch's effect, or else of the rise."""

    results: Results
    spec: StudySpec
    lifted: CompactShare | None

    def of_set(self, each: list[xr.Dataset]) -> str:
        """Set, share, and what it is a share of."""
        if self.lifted is not None:
            details = carried_by_set(self.results, "amplify")
            sizes = self.results["mediated_share"]["n_features"].sel(point=SET).values
            n = f"{listed(map(str, sizes))} feature{'s' * (list(sizes) != [1])}"
            who = f"the set ({n}) carries" if len(sizes) == 1 else f"the dictionaries' sets ({n}) carry"
            return f"lifted into base, {who} {share_words(details)}{beyond_random(details)}"
        carried = _carried(each, self.spec)
        share = f"the leading candidates, {int(carried['most_features'])} at most, carry {_with_interval(carried)}"
        return f"{share} of that difference ({self._why_of_the_rise})"

    def at_most(self, each: list[xr.Dataset]) -> str:
        """What no compact set exceeds."""
        if self.lifted is not None:
            named = {SET: "the selected set", ALL: "all features"}
            sets = [
                named.get(point, f"the {point.removeprefix('top-')} of largest drift") for point in self.lifted.points
            ]
            return (
                f"lifted into base, {listed(sets)} carry no more than {percent(self.lifted.best_high, 0)} of what "
                "copying the whole residual does"
            )
        carried = _carried(each, self.spec)
        return (
            f"the difference is spread out: no {int(carried['most_features'])} features carry more than "
            f"{percent(carried['best_high'], 0)} of it ({self._why_of_the_rise})"
        )

    @property
    def _why_of_the_rise(self) -> str:
        if SET in labels_of(self.results.get("mediated_share"), "point"):
            return "copying RL's whole residual into base has no shown effect to have a share in"
        return "no trial has measured what share of RL's effect they carry"


def _answer(verdict: Verdict, judged: list[_Judged], share: _Share) -> str:
    """What the dictionaries that give the verdict say, those with the same reason together; if too few agree, all."""
    agreeing = [one for one in judged if one.verdict is verdict]
    head, shown = "Undetermined: " if verdict is Verdict.UNDETERMINED else "", agreeing
    if not verdicts_agree([one.verdict for one in judged]):
        words = ", ".join(one.verdict.value.replace("_", " ").lower() for one in judged)
        head, shown = f"Undetermined, because the dictionaries disagree ({words}): ", judged
    parts = []
    for reason in dict.fromkeys(one.reason for one in shown):
        group = [one for one in shown if one.reason is reason]
        where = f"in {f'each of {len(judged)}' if len(group) == len(judged) else f'{len(group)} of {len(judged)}'} "
        parts.append(f"{where + 'dictionaries ' if len(judged) > 1 else ''}{_reason_words(reason, group, share)}")
    answer = f"{head}{'; '.join(parts)}."
    return answer[0].upper() + answer[1:]


def _reason_words(reason: SelectionReason, group: list[_Judged], share: _Share) -> str:
    """What dictionaries with one reason say, without a full stop."""
    n_confirmed = [one.details["n_confirmed"] for one in group]
    n_testable = count_span([one.details["n_testable"] for one in group])
    n_tasks = count(len(group[0].details["estimable_tasks"]), "task")
    confirming = group[0].details["confirming_tasks"]
    one_feature = max(n_confirmed) == min(n_confirmed) == 1
    confirmed = (
        f"{count_span(n_confirmed)} feature{'s' * (not one_feature)} of {n_testable} testable ones "
        f"{'is' if one_feature else 'are'} confirmed to rise where RL gained by more than where base was right too"
    )
    on_others = "" if confirming is None else f", {len(confirming)} on these"
    tested = (
        f"{confirmed}, on prompts not used to select them ({n_tasks} could be tested on those that select{on_others})"
    )
    each = [one.data for one in group]
    if reason is SelectionReason.NO_TASK:
        return "no task could be tested"
    if reason is SelectionReason.FEW_TASKS:
        return f"{confirmed}, but only {n_tasks} could be tested (at least {MIN_TASKS} needed)"
    if reason is SelectionReason.FEW_CONFIRMING:
        n_confirming = count(len(confirming), "task") if confirming else "no task"
        return (
            f"{confirmed}; on prompts not used to select them {n_confirming} could be tested (at least {MIN_TASKS} "
            f"needed; on those that select, {n_tasks} could be)"
        )
    if reason is SelectionReason.NO_RISE:
        return (
            f"no feature of {n_testable} testable ones rises where RL gained by {MIN_EXCESS:g} sd more than where base "
            f"was right too in {MIN_TASKS} tasks or more, of {n_tasks.removesuffix(' tasks')}"
        )
    if reason is SelectionReason.NONE_CONFIRMED:
        n_rising = [one.details["n_rising"] for one in group]
        rising = f"; {count_span(n_rising)} rise where RL gained, not shown to do so by more than elsewhere"
        return (
            f"{tested}{rising if max(n_rising) else ''}, which does not show that none rises more where RL gained than "
            "where base was right too"
        )
    if reason is SelectionReason.SPREAD_OUT:
        return f"{tested}, but {share.at_most(each)}"
    if reason is SelectionReason.SHARE_UNKNOWN:
        return f"{tested}, but what share of the rise they carry cannot be estimated"
    return f"{tested}; {share.of_set(each)}{_OPEN_QUESTIONS.get(reason, '')}"


_OPEN_QUESTIONS: Final = {
    SelectionReason.TOO_MANY: ", but these are too many for a compact set",
    SelectionReason.SHARE_OPEN: f", which neither shows nor excludes that a compact set carries {percent(CARRIED, 0)}",
    SelectionReason.LIKE_RANDOM: ", so that it is not shown to be more than any features would do",
    SelectionReason.ACCOMPANYING: (
        ", but RL lost too few prompts to tell features that it changed from features that merely accompany right "
        "answers, in base and RL alike: in RL they are not shown to be higher where it gained than where base was "
        "right too"
    ),
}
"""What is missing although the share is known."""


def _token_details(results: Results) -> dict[str, list[int]]:
    """Features of the edited set of every dictionary, and how many respond to tokens, or to tokens at their place."""
    each = by_dictionary(results, "tokens")
    return {
        "n_token_tested_by_dictionary": [int(data.sizes["feature"]) for data in each],
        "n_token_detectors_by_dictionary": [int(data["detector"].values.sum()) for data in each],
        "n_by_token_only_by_dictionary": [int(by_token_only(data).sum()) for data in each],
        "n_fire_alone_by_dictionary": [int(data["fires_alone"].values.sum()) for data in each],
    }


def _token_sentence(details: dict[str, Any]) -> str:
    n, of = details["n_token_detectors_by_dictionary"], details["n_token_tested_by_dictionary"]
    if not mostly_token_detectors(n, of):
        return ""
    counts = listed(f"{detectors} of {features}" for detectors, features in zip(n, of, strict=True))
    return (
        f" The set that is edited is mostly token and token-and-position detectors ({counts} features): tokens and "
        "their place explain most of what they do."
    )


def _token_caveat(details: dict[str, Any]) -> tuple[str, ...]:
    of = details["n_token_tested_by_dictionary"]
    if not sum(of):
        return ()
    either, only = details["n_token_detectors_by_dictionary"], details["n_by_token_only_by_dictionary"]
    both = [n - of_token for n, of_token in zip(either, only, strict=True)]
    tested, by_token, by_both, alone = (
        listed(map(str, counts)) for counts in (of, only, both, details["n_fire_alone_by_dictionary"])
    )
    return (
        f"Of the {tested} edited features {by_token} are token detectors ({alone} fire in most unrelated texts once "
        "their leading tokens are put there and not with others of like frequency; of the others the token alone "
        f"explains half of the activation or more) and {by_both} token-and-position detectors (of which token and "
        "place together explain as much, the token alone does not).",
    )


def _reappearance(results: Results, spec: StudySpec, data: xr.Dataset) -> tuple[str, ...]:
    """Whether the confirmed features depend on one dictionary's initial weights."""
    matching, name = results.get("matching"), spec.primary_crosscoder.name
    confirmed = data["feature"].values[data["specific_tier"].values == "CONFIRMED"]
    if matching is None or name not in labels_of(matching, "crosscoder"):
        return ()
    if not len(confirmed):
        return ()
    share = matching["reappearance"].sel(crosscoder=name, feature=confirmed).values
    n = len(labels_of(matching, "replicate"))
    others = {1: "the other dictionary", 2: "both other dictionaries"}.get(n, f"all {n} other dictionaries")
    return (
        f"{int((share == 1).sum())} of {count(len(confirmed), 'confirmed feature')} "
        f"{'has' if len(confirmed) == 1 else 'have'} a match in {others} trained "
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
            f"Raw activations alone tell {spec.contrasted[1].name} from base on {_n_prompts(data, 'models')}"
            "verification prompts with AUC "
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
            f"On {_n_prompts(data, 'gain or loss')}verification prompts the difference of activations tells those "
            f"that {spec.contrasted[1].name} gained from "
            f"those that it lost with AUC: {told}."
        )
    return tuple(caveats)


def _n_prompts(data: xr.Dataset | None, comparison: str) -> str:
    n = number(data, "n_prompts", comparison=comparison)
    return f"{n:,.0f} " if math.isfinite(n) else ""


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


def _fallback(details: dict[str, Any], *, several: bool) -> str:
    """That the set is no set of candidates, where there is none."""
    if "no candidate" not in details["selected_by"]:
        return ""
    where = " in the first dictionary" if several else ""
    return f". No feature is a candidate{where}, so that the set is what the paper's rule keeps"


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
        losses, n = (int(data[name].values[chooses_features(data)].sum()) for name in ("n_loss", "n_selected_prompts"))
        caveats.append(
            f"The RL-specific contrast needs {spec.selection.min_discordant} prompts of each kind in each task and, of "
            f"the {n:,} selection prompts, RL lost {losses}; instead all prompts guard against selection by outcome, "
            "and whether the "
            "features merely accompany right answers is tested on all of them together (as if features were as high on "
            "harder prompts as on easier ones)."
        )
    selected = details["n_selected_by_dictionary"]
    if any(selected):
        rising, specific = (
            listed(map(str, details[f"n_selected_{shown}_by_dictionary"])) for shown in ("rising", "specific")
        )
        sets = f"{listed(map(str, selected))} feature{'s' * (selected != [1])}"
        who = "The set that is edited (C4, C5) holds" if len(selected) == 1 else "The edited sets (C4, C5) hold"
        caveats.append(
            f"{who} {sets}; {rising} of them are shown to rise where RL gained, {specific} by more than where base was "
            f"right too{_fallback(details, several=len(selected) > 1)}."
        )
    p_flip, p_ids, n_paper = (
        details["p_paper_rule_flip_null"],
        details["p_paper_rule_permuted_ids"],
        details["n_paper_rule"],
    )
    if math.isfinite(n_paper):
        where = "in the first dictionary " if len(selected) > 1 else ""
        caveats.append(
            f"The paper's own rule {where}keeps {count(n_paper, 'feature')} (p = {p_text(p_flip)} when labels are "
            f"flipped and the rule re-run, {p_text(p_ids)} when feature ids are permuted)."
        )
    held_out = [str(task) for task in data["task"].values if str(task) in spec.selection.held_out_tasks]
    if held_out:
        caveats.append(f"Held out from selection: {listed(held_out)}.")
    return tuple(caveats)
