"""Verdict, text, figures and tables agree; where they do not, no report is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import xarray as xr

from rlgen_stats.schemas.errors import RefusedError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import Provenance, StudyFolder
from rlgen_stats.toolkit.reporting import Graphic, Missing, assess_claims, write_report
from rlgen_stats.toolkit.reporting.claims.claim import Claim
from rlgen_stats.toolkit.reporting.figures.along_training import time_difference
from rlgen_stats.toolkit.reporting.figures.draw import FIGURES
from rlgen_stats.toolkit.reporting.headline import domain_accuracies
from rlgen_stats.toolkit.reporting.report_agreement import DRAWN_EXACTLY, DRAWN_ROUGHLY, disagreements
from rlgen_stats.toolkit.statistics.claim_verdicts import Verdict

Results = dict[str, xr.Dataset]


def as_said(results: Results, spec: StudySpec) -> list[dict[str, Any]]:
    return [claim.as_dict() for claim in assess_claims(results, spec)]


def figure(value: float) -> dict[str, Graphic | Missing]:
    return {"stabilization": Graphic("stabilization", "Title", (), "Caption.", roughly={"C2": value})}


def test_a_report_agrees_with_itself(results: Results, spec: StudySpec) -> None:
    claims = as_said(results, spec)
    assert disagreements(claims, results, domains=domain_accuracies(results, spec), figures=figure(28.0)) == []


@pytest.mark.parametrize(
    ("name", "changes", "fault"),
    [
        ("C2", {"verdict": "NOT_SUPPORTED"}, "are not excluded"),
        ("C2", {"verdict": "CONTRADICTED"}, "is not on its side"),
        ("C4", {"estimate": -34.0}, "the table"),
        ("C5", {"verdict": "NOT_SUPPORTED"}, "its trial is CAUSAL_SPECIFIC"),
        ("C5", {"answer": "It rises."}, "its answer does not name 21.0"),
        ("C5", {"answer": "It rises by 121.0 or 21.05."}, "its answer does not name 21.0"),
        ("C1", {"answer": "13.2% of sft's, 3.4% of rl's."}, "its answer does not name 13.1%"),
        ("C3", {"answer": "In 1 dictionary 15 features."}, "its answer does not name 5"),
        ("C3", {"estimate": 6.0}, "the claim counts 6.0, the tables [5]"),
        ("C1", {"high": 99.0}, "the table"),
    ],
)
def test_a_claim_that_its_tables_or_its_text_contradict_is_named(
    name: str, changes: dict[str, Any], fault: str, results: Results, spec: StudySpec
) -> None:
    claims = [claim | changes if claim["id"] == name else claim for claim in as_said(results, spec)]
    found = disagreements(claims, results)
    assert found
    assert all(sentence.startswith(name) for sentence in found)
    assert fault in " ".join(found)


@pytest.mark.parametrize(
    ("verdict", "drawn", "agrees"),
    [
        ("SUPPORTED", 0.1, True),
        ("SUPPORTED", -0.1, False),
        ("NOT_SUPPORTED", DRAWN_ROUGHLY - 0.01, True),
        ("NOT_SUPPORTED", DRAWN_ROUGHLY, False),
        ("NOT_SUPPORTED", -DRAWN_ROUGHLY, False),
        ("UNDETERMINED", -30.0, True),
    ],
)
def test_a_verdict_that_its_figure_contradicts_is_an_error(
    verdict: str, drawn: float, agrees: bool, results: Results, spec: StudySpec
) -> None:
    """Such as "do not differ in timing" above curves that lie 23 points apart."""
    c2 = next(claim for claim in as_said(results, spec) if claim["id"] == "C2")
    c2 |= {"verdict": verdict, "in_short": "why"}
    assert (disagreements([c2], {}, figures=figure(drawn)) == []) is agrees


@pytest.mark.parametrize(
    ("verdict", "low", "in_short", "agrees"),
    [
        ("NOT_SUPPORTED", -60.0, "it breaks the model", True),
        ("NOT_SUPPORTED", -60.0, "", False),
        ("UNDETERMINED", -60.0, "", False),
        ("SUPPORTED", -60.0, "", True),
        ("NOT_SUPPORTED", 0.0, "", True),
    ],
)
def test_a_clear_effect_that_supports_nothing_says_why(
    verdict: str, low: float, in_short: str, agrees: bool, results: Results, spec: StudySpec
) -> None:
    """Such as "not supported, -36 [-60, -12]" of an edit that breaks the model."""
    c4 = next(claim for claim in as_said(results, spec) if claim["id"] == "C4")
    c4 |= {"verdict": verdict, "low": low, "high": -12.0 if low else 12.0, "in_short": in_short}
    assert (disagreements([c4], {}) == []) is agrees


@pytest.mark.parametrize(
    ("counts", "answer", "agrees"),
    [
        ([5, 5, 0, 5, 5], "In 4 of 5 dictionaries 5 features of 210 are confirmed.", True),
        ([0, 0, 0], "No feature of 210 testable ones rises.", True),
        ([0, 0, 0], "In each of 3 dictionaries no feature of 210 testable ones rises.", True),
        ([0, 0, 0], "In each of 3 dictionaries 0 features of 210 are confirmed.", True),
        ([5, 5, 5], "No such effect: no feature of 210 testable ones rises.", False),
        ([5, 5, 5], "In each of 3 dictionaries 15 features of 210 are confirmed.", False),
    ],
)
def test_c3_names_what_the_agreeing_dictionaries_count(
    counts: list[int], answer: str, agrees: bool, results: Results, spec: StudySpec
) -> None:
    c3 = next(claim for claim in as_said(results, spec) if claim["id"] == "C3")
    c3 |= {"answer": answer, "details": c3["details"] | {"n_confirmed_by_dictionary": counts}}
    assert (disagreements([c3], {}) == []) is agrees


@pytest.mark.parametrize(("off", "agrees"), [(0.9 * DRAWN_EXACTLY, True), (1.1 * DRAWN_EXACTLY, False)])
def test_the_overview_draws_the_estimates(off: float, agrees: bool, results: Results, spec: StudySpec) -> None:
    claims = as_said(results, spec)
    drawn = {"editing": {"C4.estimate": claims[3]["estimate"] + off}}
    assert (disagreements(claims, results, drawn=drawn) == []) is agrees


@pytest.mark.parametrize(
    ("figure", "group", "changed", "where"),
    [
        ("dose-response", "intervention", "accuracy", "C4.estimate"),
        ("dose-response", "intervention", "accuracy", "C5.estimate"),
        ("mediated-share", "mediated_share", "share", "C5.details.share_of_patch.0"),
    ],
)
def test_figures_draw_the_numbers_of_the_claims(
    figure: str, group: str, changed: str, where: str, results: Results, spec: StudySpec
) -> None:
    """Drawn from another table than the claims were computed from, it is named."""
    claims = as_said(results, spec)
    _, _, draw = FIGURES[figure]
    assert disagreements(claims, results, figures={figure: draw(results, spec)}) == []
    lower = results | {group: results[group].assign({changed: 0.9 * results[group][changed]})}
    fault = " ".join(disagreements(claims, results, figures={figure: draw(lower, spec)}))
    assert f"the figure '{figure}' draws" in fault
    assert f"{where} is" in fault


def test_accuracy_gained_is_prompts_gained_less_forgotten(results: Results, spec: StudySpec) -> None:
    row = next(row for row in domain_accuracies(results, spec) if row.run == "rl")
    assert disagreements([], {}, domains=[row]) == []
    (fault,) = disagreements([], {}, domains=[replace(row, gained=row.gained + 2)])
    assert f"{row.gained + 2} prompts gained" in fault


def test_the_curves_of_c2_are_what_its_estimate_is_computed_from(results: Results, spec: StudySpec) -> None:
    """The area between the drawn curves, weighted as the claim is; moving one curve moves it."""
    before = time_difference(results, spec)
    assert before > 0
    settled = results["stabilization"]["share_in_stratum"]
    later = settled.where(settled["run"] != "rl", 0.5 * settled)
    moved = results | {"stabilization": results["stabilization"].assign(share_in_stratum=later)}
    assert time_difference(moved, spec) > before + 0.05


def test_a_report_that_contradicts_itself_is_not_written(
    written: StudyFolder,
    empty_folder: StudyFolder,
    spec: StudySpec,
    provenance: Provenance,
    without_figures: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(results: Results, spec: StudySpec) -> tuple[Claim, ...]:
        return tuple(replace(c, verdict=Verdict.CONTRADICTED) if c.id == "C4" else c for c in claims(results, spec))

    claims: Callable[[Results, StudySpec], tuple[Claim, ...]] = assess_claims
    monkeypatch.setattr("rlgen_stats.toolkit.reporting.report.assess_claims", wrong)
    folder = StudyFolder(empty_folder.root)
    (folder.root / "results.zarr").symlink_to(written.results)
    with pytest.raises(RefusedError, match="C4 CONTRADICTED: the opposite is not shown"):
        write_report(folder, spec, provenance=provenance)
    assert not folder.report.exists()
