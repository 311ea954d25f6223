"""What the report says first: one sentence, five verdicts, and in- and out-of-domain accuracy of every final model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from rlgen_stats.schemas.dims import BASE_MODEL, BASE_RUN
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.claims.c4_c5_causal import carried_by_set, share_words
from rlgen_stats.toolkit.reporting.claims.claim import Claim, verdict_label
from rlgen_stats.toolkit.reporting.formatting import count, count_span, fixed, interval, listed, percent
from rlgen_stats.toolkit.reporting.result_lookup import Results, final_models, labels_of
from rlgen_stats.toolkit.statistics.causal.mediated_share import SET
from rlgen_stats.toolkit.statistics.claim_verdicts import Verdict
from rlgen_stats.toolkit.statistics.task_accuracy import DomainAccuracy, domain_accuracy

DOMAINS: Final = {"in": "In-domain", "out": "Out-of-domain"}
"""Domain -> words."""
_EDITS: Final = {
    "C4": "that switching the selected features off specifically lowers {rl}’s accuracy",
    "C5": "that turning them up specifically raises base’s",
}
"""What the claims on edits say, as a clause."""


def domain_accuracies(results: Results, spec: StudySpec) -> list[DomainAccuracy]:
    """Accuracy of base and every run's final model on both domains; empty without the behaviour analysis."""
    data = results.get("behaviour")
    if data is None:
        return []
    base = {BASE_RUN: BASE_MODEL} if BASE_MODEL in labels_of(data, "model") else {}
    models = base | final_models(spec, data)
    rows = (domain_accuracy(data, model, domain) for model in models.values() for domain in DOMAINS)
    return [row for row in rows if row is not None]


def answer(rows: list[DomainAccuracy], claims: Iterable[Claim], results: Results, spec: StudySpec) -> str:
    """What RL changed and whether it matters, in one sentence: accuracy, what few features carry, the two edits."""
    claims = [claim for claim in claims if claim.id in _EDITS]
    carried, edits = _carried_words(results), _edits_words(claims, spec)
    turn = "and" if all(claim.verdict is Verdict.SUPPORTED for claim in claims) else "but"
    parts = [_behaviour_words(rows, spec), f"{carried}, {turn} {edits}" if carried else edits]
    sentence = "; ".join(part for part in parts if part)
    return f"{sentence}."


def _behaviour_words(rows: list[DomainAccuracy], spec: StudySpec) -> str:
    """Accuracy out of domain, else in domain: RL against base and SFT, in the words that the interval allows."""
    by_run = {(row.run, row.domain): row for row in rows}
    sft, rl = (run.name for run in spec.contrasted)
    for domain, where in (("out", "out-of-domain"), ("in", "in-domain")):
        base, first, second = (by_run.get((run, domain)) for run in (BASE_RUN, sft, rl))
        if base is None or second is None:
            continue
        verb = "is not shown to have changed"
        if second.difference_low > 0 or second.difference_high < 0:
            verb = "raised" if second.difference_low > 0 else "lowered"
        beside = "" if first is None else f"{sft} {percent(first.accuracy, 0)}; "
        return (
            f"{rl} {verb} {where} accuracy from {percent(base.accuracy, 0)} to {percent(second.accuracy, 0)} ({beside}"
            f"greedy, {count(second.n_prompts, 'prompt')})"
        )
    return "Behaviour was not measured"


def _carried_words(results: Results) -> str:
    """What the selected features carry when they are copied into base; empty where no trial measured it."""
    words = share_words(carried_by_set(results, "amplify"))
    if not words:
        return ""
    sizes = results["mediated_share"]["n_features"].sel(point=SET).values.tolist()
    return f"copied into base, the {count_span(sizes)} features selected carry {words}"


def _edits_words(claims: Iterable[Claim], spec: StudySpec) -> str:
    """The verdicts on the paper's two edits, together where they are the same."""
    edits = {claim.id: claim for claim in claims}
    clauses = {name: words.format(rl=spec.contrasted[1].name) for name, words in _EDITS.items() if name in edits}
    if len({claim.verdict for claim in edits.values()}) == 1:
        return f"{listed(clauses.values())} is {verdict_label(edits['C4'].verdict)} ({listed(edits)})"
    said = (f"{words} is {verdict_label(edits[name].verdict)} ({name})" for name, words in clauses.items())
    return ", ".join(said)


def chip(claim: Claim) -> str:
    """Estimate with its unit, its interval, and why the verdict is that where they do not say it."""
    return "; ".join(part for part in (_numbers(claim), claim.in_short) if part)


def _numbers(claim: Claim) -> str:
    if not math.isfinite(claim.estimate):
        return "no estimate"
    if claim.unit == "features":
        ends = interval(claim.low, claim.high, 0)
        return f"{count(claim.estimate, 'feature')} confirmed, {ends if math.isfinite(claim.low) else 'no interval'}"
    unit = claim.unit.removeprefix("percentage ").replace("alive ", "")
    return f"{fixed(claim.estimate, sign=True)} {interval(claim.low, claim.high, sign=True)} {unit}"
