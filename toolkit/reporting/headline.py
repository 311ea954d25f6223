"""In- and out-of-domain accuracy of every final model: what the report says first."""

from __future__ import annotations

from typing import Final

from rlgen_stats.schemas.dims import BASE_MODEL, BASE_RUN
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.formatting import percent
from rlgen_stats.toolkit.reporting.result_lookup import Results, final_models, labels_of
from rlgen_stats.toolkit.statistics.task_accuracy import DomainAccuracy, domain_accuracy

DOMAINS: Final = {"in": "In-domain", "out": "Out-of-domain"}
"""Domain -> words."""


def domain_accuracies(results: Results, spec: StudySpec) -> list[DomainAccuracy]:
    """Accuracy of base and every run's final model on both domains; empty without the behaviour analysis."""
    data = results.get("behaviour")
    if data is None:
        return []
    base = {BASE_RUN: BASE_MODEL} if BASE_MODEL in labels_of(data, "model") else {}
    models = base | final_models(spec, data)
    rows = (domain_accuracy(data, model, domain) for model in models.values() for domain in DOMAINS)
    return [row for row in rows if row is not None]


def lede(rows: list[DomainAccuracy], spec: StudySpec) -> str:
    """One sentence on what both runs did to accuracy."""
    by_run = {(row.run, row.domain): row for row in rows}
    sft, rl = (run.name for run in spec.contrasted)
    parts = []
    for domain, words in (("in", "in domain"), ("out", "out of domain")):
        shown = [by_run.get((run, domain)) for run in (BASE_RUN, sft, rl)]
        accuracies = [percent(row.accuracy, 0) for row in shown if row is not None]
        if len(accuracies) == len(shown):
            base, first, second = accuracies
            parts.append(f"{words}, {sft} answers {first} and {rl} {second} of the prompts correctly (base {base})")
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}." if parts else "Behaviour was not measured."
