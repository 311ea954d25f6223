"""Write the report: one page that answers the five claims, and the same numbers as JSON and CSV."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import jinja2
import pandas as pd
import xarray as xr

from rlgen_stats.schemas.dims import BASE_MODEL, split_model_id
from rlgen_stats.schemas.errors import RefusedError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import Provenance, StudyFolder, open_results, replacing, result_groups
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.reporting.arm_rows import direction_blocks
from rlgen_stats.toolkit.reporting.claims.assess import assess_claims, estimate_text, interval_text
from rlgen_stats.toolkit.reporting.claims.c4_c5_causal import CHECK_KEYS, CHECKS
from rlgen_stats.toolkit.reporting.claims.claim import VERDICT_MEANINGS, VERDICT_SYMBOLS, Claim, verdict_label
from rlgen_stats.toolkit.reporting.claims.replication import replication_text
from rlgen_stats.toolkit.reporting.csv_tables import build_tables
from rlgen_stats.toolkit.reporting.examples import Example, Unread, pick_examples, pick_unread
from rlgen_stats.toolkit.reporting.facts import Fact, StudyData, collect_facts, families, glance, read_study_data
from rlgen_stats.toolkit.reporting.feature_cards import FeatureCard, feature_cards
from rlgen_stats.toolkit.reporting.feature_table import SELECTED_PAGE, FeatureTable, feature_table, shown_of
from rlgen_stats.toolkit.reporting.figures.draw import draw_figures
from rlgen_stats.toolkit.reporting.figures.overview import Step, overview
from rlgen_stats.toolkit.reporting.figures.plotting import Graphic, Missing, inlined, linked
from rlgen_stats.toolkit.reporting.formatting import compact, fixed, interval, jsonable, nats, p_text, percent, points
from rlgen_stats.toolkit.reporting.headline import DOMAINS, answer, chip, domain_accuracies
from rlgen_stats.toolkit.reporting.other_answers import OtherAnswer, answered_note, asked, other_answers
from rlgen_stats.toolkit.reporting.over_dictionaries import counts_note, sentences, why_absent
from rlgen_stats.toolkit.reporting.population import CLAIM_POPULATION, populations
from rlgen_stats.toolkit.reporting.prompt_pages import PromptCard, prompt_cards
from rlgen_stats.toolkit.reporting.report_agreement import disagreements
from rlgen_stats.toolkit.reporting.result_lookup import Results, final_models, labels_of, tidy
from rlgen_stats.toolkit.reporting.source_study import effects
from rlgen_stats.toolkit.reporting.trial_rows import part_blocks, trial_rows
from rlgen_stats.toolkit.statistics.causal.verdict import decided_again
from rlgen_stats.toolkit.statistics.completion_shares import share_warnings
from rlgen_stats.toolkit.statistics.task_accuracy import DomainAccuracy

PROMOTED: Final = 4
"""Promoted tokens in the table of all features."""
REPORT_SCHEMA: Final = 1
"""Version of report.json."""
GROUPS: Final = (
    "behaviour",
    "movement",
    "health",
    "attribution",
    "latent_scaling",
    "attribution_contrast",
    "drift",
    "stabilization",
    "set_stability",
    "timing_contrast",
    "selection",
    "separation",
    "tokens",
    "intervention",
    "control_balance",
    "mediated_share",
)
"""Analyses of a complete study, in reading order."""
CLAIM_FIGURES: Final = {
    "C1": ("specificity", "matched-drift"),
    "C2": ("set-stability", "stabilization"),
    "C3": ("intersection",),
    "C4": ("mediated-share", "dose-response"),
    "C5": (),
}
"""Figures shown in a claim's section; C4's shows both directions."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything the templates show."""

    spec: StudySpec
    results: dict[str, xr.Dataset]
    claims: tuple[Claim, ...]
    domains: list[DomainAccuracy]
    facts: list[Fact]
    glance: list[tuple[str, str, str]]
    overview: tuple[Step, ...]
    populations: dict[str, str]
    figures: dict[str, Graphic | Missing]
    tables: dict[str, pd.DataFrame]
    features: list[FeatureCard]
    """Selected features, by rank."""
    feature_table: FeatureTable
    other_features: dict[int, FeatureCard]
    """Features with a section on another page than the selected ones."""
    prompts: list[PromptCard]
    examples: list[Example]
    unread: list[Unread]
    others: tuple[OtherAnswer, ...]
    provenance: Provenance

    @property
    def missing(self) -> list[str]:
        """Analyses that have not been computed."""
        return [group for group in GROUPS if group not in self.results]


def load_results(folder: StudyFolder) -> dict[str, xr.Dataset]:
    """Every results group of a study in memory, in reading order; empty if there is no results store.

    Trials have the verdict that the present rules give their criteria.
    """
    stored = result_groups(folder.results)
    ordered = [*(group for group in GROUPS if group in stored), *(group for group in stored if group not in GROUPS)]
    results = {group: open_results(folder.results, group) for group in ordered}
    return tidy({group: decided_again(data) if "decided_by" in data else data for group, data in results.items()})


def write_report(
    folder: StudyFolder,
    spec: StudySpec,
    *,
    linked: Iterable[tuple[StudyFolder, StudySpec]] = (),
    provenance: Provenance,
    progress: Progress = SILENT,
) -> Path:
    """Write ``report/`` whole: index.html and features.html (self-contained), report.md, report.json, figures, tables.

    Parameters
    ----------
    folder
        Study folder; any results group may be missing, and the report says which.
    spec
        Its study.
    linked
        Folders of its further layers and contrasts, of which the verdicts are shown, with what each answers.
    provenance
        Origin of the report.
    progress
        Receiver of progress.

    Returns
    -------
    Path
        ``report/index.html``. The old report, if any, stays in place until the new one is complete.

    Raises
    ------
    StoreError
        If a results group is corrupt or of a newer version.
    RefusedError
        If verdicts, text, figures and tables do not agree (:mod:`rlgen_stats.toolkit.reporting.report_agreement`).
    OutOfSpaceError
        If the disk is full.

    Notes
    -----
    The same results give the same bytes: no dates, no random ids, fixed SVG salts.
    """
    with progress.task("report", total=4, unit="part") as task:
        report = assemble(folder, spec, provenance, linked)
        task.advance(2, claims=len(report.claims))
        with replacing(folder.report) as target:
            target.mkdir()
            _write_pages(target, report)
            task.advance(1)
            _write_data(target, report)
            task.advance(1)
    return folder.report / "index.html"


def assemble(
    folder: StudyFolder,
    spec: StudySpec,
    provenance: Provenance,
    linked: Iterable[tuple[StudyFolder, StudySpec]] = (),
) -> Report:
    """Read a study folder and put together everything the report shows."""
    results = load_results(folder)
    data: StudyData = read_study_data(folder, spec)
    claims = assess_claims(results, spec)
    domains = domain_accuracies(results, spec)
    facts = collect_facts(data, results, spec, provenance)
    said_of = populations(results, spec, data.prompts)
    steps, figures = overview(results, spec, said_of), draw_figures(results, spec, said_of)
    _check_agreement(results, claims, domains, figures, steps)
    table, examples = feature_table(results, spec), pick_examples(folder, spec, results, data)
    selected = feature_cards(folder, spec, results, data)
    others = [feature for page, block in table.pages.items() if page != SELECTED_PAGE for feature in block]
    return Report(
        spec=spec,
        results=results,
        claims=claims,
        domains=domains,
        facts=facts,
        glance=glance(data, results, spec),
        overview=steps,
        populations=said_of,
        figures=figures,
        tables=build_tables(results, spec, claims=claims, domains=domains, facts=facts, said_of=said_of),
        features=selected,
        feature_table=table,
        other_features={card.feature: card for card in feature_cards(folder, spec, results, data, others)},
        prompts=prompt_cards(folder, spec, results, data, [*(one.prompt for one in examples), *_prompts_of(selected)]),
        examples=examples,
        unread=pick_unread(folder, results, data),
        others=other_answers(folder, linked),
        provenance=provenance,
    )


def _check_agreement(
    results: Results,
    claims: tuple[Claim, ...],
    domains: list[DomainAccuracy],
    figures: dict[str, Graphic | Missing],
    steps: tuple[Step, ...],
) -> None:
    faults = disagreements(
        [claim.as_dict() for claim in claims],
        results,
        domains=domains,
        figures=figures,
        drawn={step.name: step.numbers for step in steps},
    )
    if faults:
        raise RefusedError(
            f"expected a report whose verdicts, text, figures and tables agree, got {len(faults)} disagreements: "
            f"{'; '.join(faults)}. No report was written and all results are kept. If they come from another version "
            "of rlgen-stats, 'rlgen-stats run' computes them again; if not, this is an error of ours: please report it."
        )


# -- pages -------------------------------------------------------------------------------------------------------------
def environment(*, autoescape: bool = True) -> jinja2.Environment:
    """Templates with the report's number formats as filters; HTML is escaped, missing names are errors."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("rlgen_stats.toolkit.reporting", "templates"),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "shown": shown_of,
        "pct": percent,
        "pts": points,
        "num": fixed,
        "p": p_text,
        "compact": compact,
        "nats": nats,
        "verdict_label": verdict_label,
        "chip": chip,
        "estimate": estimate_text,
        "claim_interval": interval_text,
        "md": _markdown,
        "sortable": lambda value: f"{value:.4g}" if math.isfinite(value) else "",
        "words": lambda value: str(value).replace("_", " "),
    }
    templates.globals |= {"interval": interval, "verdict_symbols": VERDICT_SYMBOLS}
    return templates


_MARKUP: Final = {ord(sign): f"\\{sign}" for sign in "\\`*_{}[]#|"} | {ord("<"): "&lt;", ord(">"): "&gt;"}


def _markdown(value: object) -> str:
    """Text in which every Markdown and HTML character is escaped."""
    return str(value).translate(_MARKUP).replace("\n", " ")


def _prompts_of(cards: list[FeatureCard]) -> list[str]:
    """Prompts that contexts of features lead to."""
    return [shared.context.prompt for card in cards for shared in card.side_by_side]


def _write_pages(target: Path, report: Report) -> None:
    html, markdown = environment(), environment(autoescape=False)
    view = page_view(report)
    for name, template, templates in (
        ("index.html", "index.html.j2", html),
        ("prompts.html", "prompts.html.j2", html),
        ("report.md", "report.md.j2", markdown),
    ):
        (target / name).write_text(templates.get_template(template).render(view), encoding="utf-8")
    of_features = html.get_template("features.html.j2")
    cards = {card.feature: card for card in report.features} | report.other_features
    for page, features in report.feature_table.pages.items():
        of_page = {"page": page, "cards": [cards[feature] for feature in features]}
        (target / page).write_text(of_features.render(view | of_page), encoding="utf-8")


def page_view(report: Report) -> dict[str, Any]:
    """Names the templates use."""
    results, spec = report.results, report.spec
    return {
        "spec": spec,
        "sft": spec.contrasted[0].name,
        "rl": spec.contrasted[1].name,
        "answered_note": answered_note(spec),
        "asked": asked(spec),
        "others": report.others,
        "answer": answer(report.domains, report.claims, results, spec),
        "overview": [
            {"step": step, "svg": inlined(step.svg, f"overview-{step.name}") if step.svg else ""}
            for step in report.overview
        ],
        "populations": report.populations,
        "claim_population": _claim_populations(report),
        "source_effects": {"C4": effects("disable"), "C5": effects("amplify")},
        "domains": report.domains,
        "shares": completion_rows(results, spec),
        "share_warnings": _share_warnings(results, spec),
        "unread": report.unread,
        "domain_names": DOMAINS,
        "claims": report.claims,
        "verdict_meanings": VERDICT_MEANINGS,
        "glance": report.glance,
        "facts": report.facts,
        "topics": list(dict.fromkeys(fact.topic for fact in report.facts)),
        "families": families(results),
        "replication": replication_text(spec),
        "claim_power": power_rows(results),
        "over_dictionaries": over_dictionaries(report),
        "figures": {
            name: {"graphic": g, "svgs": g.inline(report.feature_table.hrefs)}
            if isinstance(g, Graphic)
            else {"missing": g}
            for name, g in report.figures.items()
        },
        "claim_figures": CLAIM_FIGURES,
        "missing": report.missing,
        "health": _records(report.tables, "health"),
        "health_views": _records(report.tables, "health_views"),
        "health_models": _records(report.tables, "health_models"),
        "drift_summary": _records(report.tables, "drift_summary"),
        "movement": _records(report.tables, "movement"),
        "balance": _records(report.tables, "control_balance"),
        "arms": direction_blocks(results.get("intervention")),
        "classes": labels_of(results.get("intervention"), "class"),
        "trials": trial_rows(results),
        "parts": part_blocks(results),
        "features": report.features,
        **_features_view(report),
        "examples": report.examples,
        "tables": {name: len(table) for name, table in sorted(report.tables.items())},
        "provenance": report.provenance,
        "details": {claim.id: _flat_details(claim.details) for claim in report.claims},
    }


def _features_view(report: Report) -> dict[str, Any]:
    """Names that the pages of features and prompts use."""
    cards = [*report.features, *report.other_features.values()]
    return {
        "table": report.feature_table,
        "hrefs": report.feature_table.hrefs,
        "runs": [run.name for run in report.spec.contrasted],
        "promoted": {
            card.feature: card.tokens.get(BASE_MODEL, next(iter(card.tokens.values()), []))[:PROMOTED] for card in cards
        },
        "prompts": report.prompts,
        "prompt_hrefs": {card.prompt: f"prompts.html#{card.anchor}" for card in report.prompts},
        "nan": math.nan,
    }


def power_rows(results: Results) -> list[dict[str, Any]]:
    """What a study of this size can answer: claim, truth, right verdict, its power; empty if not simulated."""
    data = results.get("claim_power")
    if data is None:
        return []
    names = ("claim", "truth", "verdict", "power")
    return [
        dict(zip(names, row, strict=True)) | {"n_worlds": int(data.attrs["n_worlds"])}
        for row in zip(*(data[name].values.tolist() for name in names), strict=True)
    ]


def _claim_populations(report: Report) -> dict[str, str]:
    return {claim: report.populations.get(name, "") for claim, name in CLAIM_POPULATION.items()}


def completion_rows(results: Results, spec: StudySpec) -> list[dict[str, Any]]:
    """Terminated, answered and right shares of base and every run's final model, a row each task; none without them."""
    behaviour = results.get("behaviour")
    if behaviour is None or "terminated" not in behaviour or "answered" not in behaviour:
        return []
    finals = [BASE_MODEL, *final_models(spec, behaviour).values()]
    chosen = behaviour.sel(model=[model for model in dict.fromkeys(finals) if model in behaviour["model"].values])
    columns = ("terminated", "answered", "sampled_accuracy")
    table = chosen[list(columns)].to_dataframe(dim_order=["task", "model"]).reset_index()
    return [
        {"task": row["task"], "model": row["model"], "run": split_model_id(row["model"])[0]}
        | {c: row[c] for c in columns}
        for row in table[table["role"] != "pooled"].to_dict("records")
    ]


def _share_warnings(results: Results, spec: StudySpec) -> list[str]:
    behaviour = results.get("behaviour")
    if behaviour is None:
        return []
    shares = behaviour.sel(task=behaviour["role"] != "pooled")
    finals = {BASE_MODEL, *final_models(spec, shares).values()}
    models = labels_of(shares, "model")
    n_samples = spec.generation.n_samples
    sampled = [model for model in models if (n_samples.final if model in finals else n_samples.others)]
    return share_warnings(shares, may_be_cut=spec.may_be_cut(labels_of(shares, "task")), sampled=sampled)


def over_dictionaries(report: Report) -> dict[str, Any]:
    """Whether findings replicate over dictionaries: why there is no answer, sentences, a row a pair, counts."""
    return {
        "absent": why_absent(report.results, report.spec),
        "sentences": list(sentences(report.results, report.spec)),
        "pairs": _records(report.tables, "replicability"),
        "counts": counts_note(report.results, report.spec),
    }


def _records(tables: dict[str, pd.DataFrame], name: str) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items()} for row in tables[name].to_dict("records")] if name in tables else []


_CHECK_LABELS: Final = {CHECK_KEYS[check]: label for check, label in CHECKS.items()}


def _flat_details(details: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested details as rows of name and value, both as text."""
    rows: list[tuple[str, str]] = []
    for key, value in details.items():
        name = f"{prefix}{_CHECK_LABELS.get(key, key)}".replace("_", " ")
        if isinstance(value, dict):
            rows += _flat_details(value, f"{name}: ")
        elif isinstance(value, list | tuple):
            rows.append((name, "; ".join(_detail(item) for item in value) or "none"))
        else:
            rows.append((name, _detail(value)))
    return rows


def _detail(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return compact(value) if isinstance(value, float) else str(value)


# -- data --------------------------------------------------------------------------------------------------------------
def as_json(report: Report) -> dict[str, Any]:
    """Content of report.json: claims, facts, behaviour, health, arms, features; NaN is null."""
    return {
        "report_schema": REPORT_SCHEMA,
        "study": report.spec.name,
        "answered": answered_note(report.spec),
        "others": [other.as_dict() for other in report.others],
        "provenance": {
            "study_id": report.provenance.study_id,
            "spec_hash": report.provenance.spec_hash,
            "details": json.loads(str(report.provenance.attrs()["provenance"])),
        },
        "behaviour": {
            "domains": [asdict(row) for row in report.domains],
            "tasks": _records(report.tables, "behaviour"),
            "warnings": _share_warnings(report.results, report.spec),
        },
        "answer": answer(report.domains, report.claims, report.results, report.spec),
        "overview": [
            {"step": step.question, "answer": step.answer, "population": step.population} for step in report.overview
        ],
        "populations": report.populations,
        "claims": [claim.as_dict() | {"population": _claim_populations(report)[claim.id]} for claim in report.claims],
        "facts": [asdict(fact) for fact in report.facts],
        "replication": replication_text(report.spec),
        "claim_power": power_rows(report.results),
        "over_dictionaries": over_dictionaries(report),
        "families": families(report.results),
        "analyses": {"present": list(report.results), "missing": report.missing},
        "movement": _records(report.tables, "movement"),
        "health": _records(report.tables, "health"),
        "health_views": _records(report.tables, "health_views"),
        "health_models": _records(report.tables, "health_models"),
        "drift": _records(report.tables, "drift_summary"),
        "interventions": _records(report.tables, "intervention"),
        "trials": trial_rows(report.results),
        "features": [
            {
                "feature": card.feature,
                "selection": card.row,
                "mean_activation": card.means,
                "paper_score": card.scores,
                "origin": list(card.origin),
            }
            for card in report.features
        ],
        "figures": {
            name: {
                "title": g.title,
                "alt": g.alt,
                "population": g.population,
                "files": [f"figures/{file}" for file in g.files],
            }
            if isinstance(g, Graphic)
            else {"title": g.title, "missing": g.reason}
            for name, g in report.figures.items()
        },
        "tables": {name: f"tables/{name}.csv" for name in report.tables},
    }


_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n")
"""Beginnings of a cell that spreadsheets may read as a formula."""


def _write_data(target: Path, report: Report) -> None:
    content = json.dumps(jsonable(as_json(report)), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    (target / "report.json").write_text(content + "\n", encoding="utf-8")
    (target / "figures").mkdir()
    for graphic in report.figures.values():
        if isinstance(graphic, Graphic):
            for file, panel in graphic.files.items():
                svg = linked(panel.svg, report.feature_table.hrefs, prefix="../")
                (target / "figures" / file).write_text(svg, encoding="utf-8")
    (target / "tables").mkdir()
    for name, table in report.tables.items():
        without_formulas(table).to_csv(target / "tables" / f"{name}.csv", index=False, lineterminator="\n")


def without_formulas(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose texts no spreadsheet runs: one that begins like a formula gets an apostrophe before it."""

    def safe(cell: Any) -> Any:
        runs = isinstance(cell, str) and cell.startswith(_FORMULA) and not re.fullmatch(r"[+-][\d.,]*%?", cell)
        return f"'{cell}" if runs else cell

    return table.map(safe)
