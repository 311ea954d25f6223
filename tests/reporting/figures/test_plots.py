"""Charts as functions: a dataset and an Axes in, the Axes out; and colours that colour-blind readers can tell apart."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from rlgen_stats.schemas.errors import NotEstimableError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit import reporting
from rlgen_stats.toolkit.reporting.figures import plotting
from rlgen_stats.toolkit.reporting.figures.causal_arms import dose_response, failure_classes
from rlgen_stats.toolkit.reporting.figures.draw import FIGURES
from rlgen_stats.toolkit.reporting.figures.plotting import percent_axis

Results = dict[str, xr.Dataset]

PLOTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plot_accuracy": ("behaviour", {"models": ["base@0", "rl@80"]}),
    "plot_agreement": ("replicability", {"models": {"sft": "sft@150", "rl": "rl@80"}}),
    "plot_domain_accuracy": ("behaviour", {"models": ["base@0", "rl@80"]}),
    "plot_dose_response": ("intervention", {"direction": "disable"}),
    "plot_drift": ("drift", {"model": "rl@80"}),
    "plot_edits": ("intervention", {}),
    "plot_failure_classes": ("intervention", {"direction": "amplify"}),
    "plot_mediated_share": ("mediated_share", {"direction": "amplify"}),
    "plot_model_shares": ("attribution", {"crosscoder": "main"}),
    "plot_movement": ("movement", {}),
    "plot_overlap": ("set_stability", {"run": "rl"}),
    "plot_selection_counts": ("selection", {}),
    "plot_specific_at_distance": ("attribution_contrast", {"shifts": {"sft": 0.5, "rl": 0.2}}),
    "plot_specific_shares": ("attribution_contrast", {}),
    "plot_specificity": ("attribution", {}),
    "plot_stability": ("stabilization", {"stratum": "moderate"}),
    "plot_task_intersection": ("selection", {}),
    "plot_time_to_stability": ("timing_contrast", {}),
    "plot_transitions": ("behaviour", {"model": "rl@80"}),
    "plot_turnover": ("set_stability", {"run": "rl"}),
}


def test_every_exported_chart_is_tried() -> None:
    assert {name for name in reporting.__all__ if name.startswith("plot_")} == set(PLOTS)


@pytest.mark.parametrize("name", list(PLOTS))
def test_a_chart_draws_on_the_axes_that_it_is_given(name: str, results: Results) -> None:
    group, options = PLOTS[name]
    plot: Callable[..., Any] = getattr(reporting, name)
    other, axes = Figure().subplots(1, 2)
    assert plot(results[group], axes, **options) is axes
    assert axes.has_data()
    assert not other.has_data()


def test_a_chart_shows_the_numbers_of_its_dataset(results: Results) -> None:
    axes = reporting.plot_movement(results["movement"], Figure().subplots(), runs=["rl"])
    (line,) = axes.lines
    one = results["movement"].sel(model=[f"rl@{step}" for step in (16, 32, 48, 64, 80)])
    assert line.get_ydata().tolist() == [0.0, *one["activation_shift"].values.tolist()]
    assert line.get_xdata()[-1] == 1.0


# Linear maps of linear RGB to what readers without one kind of cone see: Machado, Oliveira and Fernandes 2009,
# doi:10.1109/TVCG.2009.113, severity 1.
DEFICIENCIES = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TELL_APART = 15.0
"""CIE 1976 colour difference from which two marks of 5 pixels are told apart; 2.3 is the least that patches need."""


def lab(colour: str, deficiency: str) -> np.ndarray:
    """CIE L*a*b* (D65) of an sRGB colour as a reader sees it."""
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(DEFICIENCIES[deficiency]) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.array(to_xyz) @ seen / [0.9505, 1.0, 1.089]
    fx, fy, fz = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


def dark(colour: str) -> str:
    """What a dark page draws instead of a figure's colour."""
    style = (Path(reporting.__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    found = re.findall(rf"{plotting.THEMED[colour]}: (#[0-9a-f]{{6}})", style)
    assert len(found) == 2
    assert found[0] == colour
    return str(found[1])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("deficiency", list(DEFICIENCIES))
@pytest.mark.parametrize(
    "together",
    [("BASE", "SFT", "RL"), ("GOOD", "GOLD"), ("VIOLET", "GOLD", "NULL"), ("GOOD", "PALE", "GOLD", "VIOLET")],
    ids="-".join,
)
def test_colours_that_stand_together_are_told_apart(together: tuple[str, ...], deficiency: str, scheme: str) -> None:
    shown = {name: getattr(plotting, name) for name in together}
    shown = shown if scheme == "light" else {name: dark(colour) for name, colour in shown.items()}
    for one, other in itertools.combinations(together, 2):
        apart = np.linalg.norm(lab(shown[one], deficiency) - lab(shown[other], deficiency))
        assert apart > TELL_APART, (one, other, round(float(apart), 1))


def test_the_colour_check_can_fail() -> None:
    apart = np.linalg.norm(lab("#2f7d4f", "deuteranopia") - lab("#8a6a55", "deuteranopia"))
    assert apart < TELL_APART < np.linalg.norm(lab("#2f7d4f", "normal") - lab("#8a6a55", "normal"))


def test_a_runs_last_checkpoint_has_a_name(results: dict[str, xr.Dataset]) -> None:
    plots = {reporting.plot_drift: "drift", reporting.plot_transitions: "behaviour"}
    for plot, group in plots.items():
        named, by_id = (plot(results[group], Figure().subplots(), model=model) for model in ("rl@final", "rl@80"))
        assert [text.get_text() for text in named.texts] == [text.get_text() for text in by_id.texts]
    axes = reporting.plot_domain_accuracy(results["behaviour"], Figure().subplots(), models=["rl@final"])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rl"]


@pytest.mark.parametrize("figure", [dose_response, failure_classes])
def test_a_direction_without_arms_has_no_panel(figure: Any, results: Results, spec: StudySpec) -> None:
    trial = results["intervention"]
    one = trial.assign(accuracy=trial["accuracy"].where(trial["direction"] == "disable"))
    assert len(figure({"intervention": one}, spec).panels) == 1
    with pytest.raises(NotEstimableError, match="no arm edits the set"):
        figure({"intervention": trial.assign(accuracy=trial["accuracy"] * np.nan)}, spec)


@pytest.mark.parametrize(("high", "shown"), [(0.049, "0.5%"), (0.051, "0%")])
def test_ticks_in_percent_have_decimals_where_the_axis_is_short(high: float, shown: str) -> None:
    axis = Figure().subplots().xaxis
    axis.set_view_interval(0.0, high, ignore=True)
    percent_axis(axis)
    assert axis.get_major_formatter()(0.005) == shown
    assert axis.get_major_formatter()(-0.02).startswith("−2")


@pytest.mark.parametrize(("attainable", "shown"), [(0.5, 5), (0.499, 4)])
def test_turnover_is_drawn_where_two_halves_could_agree(
    attainable: float, shown: int, results: Results, spec: StudySpec
) -> None:
    data = results["set_stability"]
    values = data["attainable"].values.copy()
    values[0] = attainable
    data = data.assign(attainable=("model", values))
    axes = reporting.plot_turnover(data, Figure().subplots(), run="sft")
    (dots,) = (line for line in axes.lines if line.get_marker() == "o")
    assert len(dots.get_xdata()) == shown
    alt = FIGURES["set-stability"][2](results | {"set_stability": data}, spec).alt
    assert ("excess turnover 21.0% at 20%, 3.0% at 40%" in alt) == (shown == 5)
    assert "3.0% at 40%" in alt
