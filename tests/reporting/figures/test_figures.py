"""Figures: valid, deterministic, described, and honest about what they cannot show."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
import xarray as xr

from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting import Graphic, Missing, draw_figures
from rlgen_stats.toolkit.reporting.figures.causal_arms import dose_response
from rlgen_stats.toolkit.reporting.figures.dictionary import specificity
from rlgen_stats.toolkit.reporting.figures.draw import FIGURES
from rlgen_stats.toolkit.reporting.figures.plotting import FEATURE_LINK, THEMED

Results = dict[str, xr.Dataset]
SVG = "{http://www.w3.org/2000/svg}"


def graphic(drawn: dict[str, Graphic | Missing], name: str) -> Graphic:
    shown = drawn[name]
    assert isinstance(shown, Graphic), shown
    return shown


def test_every_figure_is_drawn_in_order(drawn: dict[str, Graphic | Missing]) -> None:
    assert list(drawn) == list(FIGURES)
    assert all(isinstance(one, Graphic) for one in drawn.values())


@pytest.mark.parametrize("name", list(FIGURES))
def test_svg_is_valid_named_and_described(name: str, drawn: dict[str, Graphic | Missing]) -> None:
    one = graphic(drawn, name)
    assert one.caption.endswith(".")
    for panel in one.panels:
        root = ElementTree.fromstring(panel.svg)
        assert root.tag == f"{SVG}svg"
        assert root.get("role") == "img"
        assert root.findtext(f"{SVG}title")
        assert root.findtext(f"{SVG}desc") == panel.alt
        assert len(panel.alt) > 40
        assert root.find(f".//{SVG}text") is not None, "text must stay text"


@pytest.mark.parametrize("name", list(FIGURES))
def test_every_figure_says_its_population(name: str, drawn: dict[str, Graphic | Missing]) -> None:
    assert re.search(r"prompts|completions", graphic(drawn, name).population)


@pytest.mark.parametrize("name", list(FIGURES))
def test_svg_fetches_nothing_and_carries_no_date(name: str, drawn: dict[str, Graphic | Missing]) -> None:
    svg = "".join(panel.svg for panel in graphic(drawn, name).panels)
    assert not re.findall(rf'(?:href|src)="(?!#|{FEATURE_LINK})', svg)
    assert not re.findall(r"url\((?!#)", svg)
    assert "<metadata" not in svg
    assert "<style" not in svg, "a style inside an inline SVG would reach the whole page"


def test_inline_ids_are_unique_on_one_page_and_resolve(drawn: dict[str, Graphic | Missing]) -> None:
    page = "".join(svg for name in drawn for svg in graphic(drawn, name).inline())
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    referenced = set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page))
    referenced |= {one for many in re.findall(r'aria-labelledby="([^"]+)"', page) for one in many.split()}
    assert referenced <= set(ids)


def test_inline_colours_follow_the_page(drawn: dict[str, Graphic | Missing]) -> None:
    page = "".join(svg for name in drawn for svg in graphic(drawn, name).inline())
    for colour, variable in THEMED.items():
        assert not re.search(rf"(fill|stroke): {colour}", page), f"{colour} should be {variable}"


@pytest.mark.slow
def test_the_same_results_give_the_same_bytes(
    drawn: dict[str, Graphic | Missing], results: Results, spec: StudySpec
) -> None:
    again = draw_figures(results, spec)
    assert [graphic(again, name).panels for name in again] == [graphic(drawn, name).panels for name in drawn]


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("accuracy", "addition: base 40%, sft 80%, rl 90%"),
        ("transitions", "sft on parity: 10% gained, 15% forgotten"),
        ("matched-drift", "sft: shift 0.550, 13.1% specific; rl: shift 0.210, 3.4% specific"),
        ("stabilization", "moderate change. sft: 20% by 20% of training, 62% by 40% of training"),
        ("set-stability", "sft: excess turnover 21.0% at 20%, 3.0% at 40%"),
        ("intersection", "5 in all 4 tasks"),
        ("dose-response", "disable: 41% at dose 0, 60% at dose 0.5, 76% at dose 1, 77% at dose 1.5"),
        (
            "mediated-share",
            "Lowered in the RL model: the set (5 features) 70% (edit 0.30 of the true difference's norm)",
        ),
        ("failure-classes", "disable, the set: right 41%, wrong 18%, no answer 32%"),
    ],
)
def test_alt_text_has_the_planted_numbers(name: str, numbers: str, drawn: dict[str, Graphic | Missing]) -> None:
    assert numbers in graphic(drawn, name).alt


def test_drift_counts_calls(drawn: dict[str, Graphic | Missing], results: Results) -> None:
    n = int((results["drift"].sel(model="rl@80").call == "DRIFT").sum())
    assert f"rl: {n} of 210 testable features drifted" in graphic(drawn, "drift").alt


def test_specificity_tail_is_the_share_above_tau(drawn: dict[str, Graphic | Missing], results: Results) -> None:
    one = results["attribution"].sel(crosscoder="pair-sft")
    nrn = one.nrn_l1.values[one.alive.values]
    assert f"sft: {100 * np.mean(nrn > 0.7):.1f}% of {nrn.size} alive" in graphic(drawn, "specificity").alt


def test_a_floor_run_is_drawn_beside_base_against_itself(results: Results, spec: StudySpec) -> None:
    aside = spec.runs[0].model_copy(update={"name": "aside", "arm": "floor"})
    spec = spec.model_copy(update={"runs": (*spec.runs, aside)})
    targets = ("crosscoder", ["sft@150", "rl@80", "aside@20"])
    alt = specificity({"attribution": results["attribution"].assign_coords(target=targets)}, spec).alt
    assert [part.split(": ")[0] for part in alt.split(". ", 1)[1].split(". ")[0].split("; ")] == [
        "sft",
        "rl",
        "the floor run aside@20",
    ]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("accuracy", "behaviour"),
        ("transitions", "behaviour"),
        ("specificity", "attribution"),
        ("matched-drift", "movement"),
        ("stabilization", "stabilization"),
        ("set-stability", "set_stability"),
        ("intersection", "selection"),
        ("dose-response", "intervention"),
        ("failure-classes", "intervention"),
        ("mediated-share", "mediated_share"),
        ("drift", "drift"),
    ],
)
def test_without_its_analysis_a_figure_says_so(name: str, group: str, results: Results, spec: StudySpec) -> None:
    missing = draw_figures({"attribution_contrast": results["attribution_contrast"]}, spec)[name]
    assert missing == Missing(name, FIGURES[name][0], f"the analysis '{group}' has not been computed")


def test_nothing_kept_is_no_crash(results: Results, spec: StudySpec) -> None:
    results["selection"] = results["selection"].assign(kept=xr.zeros_like(results["selection"].kept))
    only = {"selection": results["selection"]}
    shown = draw_figures(only, spec)["intersection"]
    assert isinstance(shown, Missing)
    assert shown.reason == "the paper's rule keeps no feature in any task"


def test_all_nan_numbers_still_draw(results: Results, spec: StudySpec) -> None:
    """Not estimable values leave gaps, not exceptions."""
    hollow = {
        group: data.map(lambda v: xr.full_like(v, np.nan) if v.dtype.kind == "f" else v)
        for group, data in results.items()
    }
    shown = draw_figures(hollow, spec)
    assert set(shown) == set(FIGURES)


def test_many_features_are_thinned_and_counted(results: Results, spec: StudySpec) -> None:
    many = xr.concat([results["drift"]] * 20, "feature", data_vars="minimal")
    shown = draw_figures({"drift": many}, spec)["drift"]
    assert isinstance(shown, Graphic)
    assert "points with larger p are not drawn" in shown.caption
    assert sum(len(panel.svg) for panel in shown.panels) < 1_700_000


def test_the_dose_axis_says_what_is_added(results: Results, spec: StudySpec) -> None:
    results["intervention"].attrs["level"] = "rl"
    svg = "".join(panel.svg for panel in dose_response(results, spec).panels)
    assert svg.count("dose: multiplier of the set's activation") == 1, "disabling multiplies"
    assert svg.count("dose: 1 + RL's mean activations added") == 1
