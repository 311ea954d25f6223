"""Which of two runs settles later, on hand-made curves and set tests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.toolkit.statistics.timing.run_contrast import (
    checkpoints_of,
    timing_contrast,
    training_share,
    undescribed_checkpoints,
)

NAN = float("nan")
STEPS = {"sft": [20, 5, 10, 15], "rl": [8, 2, 4, 6]}
"""Out of order on purpose: checkpoints are taken by step."""
SETTLED = {"sft": [0.8, 0.4, 0.6, 0.7], "rl": [0.5, 0.1, 0.2, 0.3]}
DELTA = {"sft": [0.0, 0.1, 0.04, 0.0], "rl": [0.0, 0.3, 0.1, 0.06]}
RUNS = ["rl", "sft"]
G = 10
LITTLE = np.random.default_rng(9).normal(0, 1e-4, G)
"""Influence of the groups of prompts where it is not under test."""


def coords(runs: Sequence[str] = RUNS) -> dict[str, object]:
    rows = [(run, step) for run in runs for step in STEPS[run]]
    return {
        "model": [f"{run}@{step}" for run, step in rows],
        "run": ("model", [run for run, _ in rows]),
        "step": ("model", [step for _, step in rows]),
        "arm": ("model", [run for run, _ in rows]),
        "trained_run": list(runs),
    }


def chain(*, later: float = 0.0, influence: np.ndarray | None = None, sizes: object = None) -> xr.Dataset:
    """Layout ``stabilization`` as far as the contrast reads it; RL's shares lower by ``later`` in large changes."""
    moderate = np.concatenate([SETTLED[run] for run in RUNS])
    large = moderate - later * np.repeat([1.0, 0.0], 4)
    settled = np.stack([np.ones(8), moderate, large], axis=1)
    influence = LITTLE if influence is None else influence
    only_rl = np.repeat([1.0, 0.0], 4)[:, None]
    return xr.Dataset(
        {
            "share_in_stratum": (("model", "stratum"), settled),
            "share_in_stratum_replicate": (
                ("replicate", "model", "stratum"),
                settled + influence[:, None, None] * only_rl,
            ),
            "n_in_stratum": (("trained_run", "stratum"), [[500, 30, 10], [300, 60, 40]] if sizes is None else sizes),
        },
        coords=coords() | {"stratum": ["unchanged", "moderate", "large"]},
        attrs={"seed": 3, "unit": "prompt", "margin": 0.2, "margin_unit": "sd of base@0"},
    )


def sets(*, shift: float = 0.0, attainable: object = 0.9, influence: np.ndarray | None = None) -> xr.Dataset:
    delta = np.concatenate([DELTA[run] for run in RUNS]) + shift * np.repeat([1.0, 0.0], 4)
    influence = LITTLE if influence is None else influence
    return xr.Dataset(
        {
            "delta": ("model", delta),
            "delta_replicate": (("model", "replicate"), delta[:, None] + influence),
            "attainable": ("model", np.broadcast_to(np.asarray(attainable, dtype=float), 8).copy()),
            "paper_overlap": ("model", np.linspace(0.2, 0.9, 8) + shift),
        },
        coords=coords(),
        attrs={"top_k": 50, "seed": 3, "unit": "prompt"},
    )


def contrast(chains: list[xr.Dataset], set_tests: list[xr.Dataset]) -> xr.Dataset:
    return timing_contrast(chains, set_tests, first="sft", second="rl", alpha=0.05)


def area(shares: Sequence[float]) -> float:
    """Mean time by hand: trapezia of equal width from nothing settled at the start."""
    nodes = [0.0, *shares]
    return 1 - sum((a + b) / 2 * 0.25 for a, b in pairwise(nodes))


def test_mean_times_and_their_difference_by_hand() -> None:
    out = validate(contrast([chain(later=0.1)], [sets()]), "timing_contrast")
    sft, rl = area([0.4, 0.6, 0.7, 0.8]), area([0.1, 0.2, 0.3, 0.5])
    rl_large = area([0.0, 0.1, 0.2, 0.4])
    assert out["stratum_time"].values[1:] == pytest.approx(np.array([[sft, rl], [sft, rl_large]]))
    weights = np.array([0, 60 * 30 / 90, 40 * 10 / 50])
    weights /= weights.sum()
    assert out["weight"].values == pytest.approx(weights)
    expected = weights[1] * (rl - sft) + weights[2] * (rl_large - sft)
    assert float(out["difference"].sel(measure="time")) == pytest.approx(expected)
    assert out["value"].sel(measure="time", trained_run="sft") == pytest.approx(sft)
    assert np.isnan(out["stratum_difference"].values[0]), "what never left the margin has no time"


def test_turnover_is_the_average_over_training_by_hand() -> None:
    out = contrast([chain()], [sets()])
    sft, rl = ((a / 2 + b + c + d / 2) / 3 for a, b, c, d in ([0.1, 0.04, 0, 0], [0.3, 0.1, 0.06, 0]))
    assert out["value"].sel(measure="turnover").values == pytest.approx([sft, rl])
    assert float(out["difference"].sel(measure="turnover")) == pytest.approx(rl - sft)


def test_intervals_are_those_of_the_jackknife() -> None:
    influence = np.random.default_rng(0).normal(0, 0.03, G)
    out = contrast([chain(influence=influence)], [sets()])
    width = -influence * (1 - 0.125)  # the share is 0 at the start: the last trapezium of the shift is a triangle
    error = np.sqrt((G - 1) / G * np.sum((width - width.mean()) ** 2))
    half = stats.t.isf(0.025, G - 1) * error
    low, high, difference = (float(out[name].sel(measure="time")) for name in ("low", "high", "difference"))
    assert (low, high) == pytest.approx((difference - half, difference + half), rel=1e-6)
    assert float(out["p_value"].sel(measure="time")) == pytest.approx(2 * stats.t.sf(difference / error, G - 1))


def test_noise_common_to_both_runs_takes_nothing_from_their_difference() -> None:
    """The old interval added both runs' errors as if they had other prompts."""
    influence = np.random.default_rng(0).normal(0, 0.05, G)
    out = contrast([chain()], [sets(influence=influence)]).sel(measure="turnover")
    assert float(out["high"] - out["low"]) == pytest.approx(0, abs=1e-9)
    assert float((out["value_high"] - out["value_low"]).min()) > 0.05


def test_dictionaries_are_pooled_with_the_spread_between_them() -> None:
    spread = (-0.02, 0.0, 0.02)
    out = contrast([chain()] * 3, [sets(shift=shift) for shift in spread]).sel(measure="turnover")
    one = contrast([chain()], [sets()]).sel(measure="turnover")
    assert out["dictionary_difference"].values == pytest.approx(float(one["difference"]) + np.array(spread))
    assert float(out["difference"]) == pytest.approx(float(one["difference"]))
    half = stats.t.isf(0.025, 2) * 0.02 / np.sqrt(3)
    assert float(out["high"] - out["low"]) == pytest.approx(2 * half)


def test_runs_are_found_by_name_not_by_position() -> None:
    turned = [data.sel(trained_run=["sft", "rl"]) for data in (chain(later=0.1), sets())]
    xr.testing.assert_allclose(contrast([turned[0]], [turned[1]]), contrast([chain(later=0.1)], [sets()]))


def test_only_checkpoints_at_the_same_share_of_training_are_compared() -> None:
    """A run read at more checkpoints would find earlier times."""
    whole = contrast([chain()], [sets()])
    assert whole["checkpoint"].values.tolist() == [
        ["sft@5", "rl@2"],
        ["sft@10", "rl@4"],
        ["sft@15", "rl@6"],
        ["sft@20", "rl@8"],
    ]
    kept = [m for m in coords()["model"] if m != "rl@2"]  # type: ignore[attr-defined]
    fewer = contrast([chain().sel(model=kept)], [sets().sel(model=kept)])
    assert fewer["training_share"].values.tolist() == [0.5, 0.75, 1.0]
    assert float(fewer["stratum_time"].values[1, 0]) == pytest.approx(1 - (0.5 * 0.3 + 0.25 * 0.65 + 0.25 * 0.75))
    assert float(whole["stratum_time"].values[1, 0]) < float(fewer["stratum_time"].values[1, 0])


@pytest.mark.parametrize(("step", "n_pairs"), [(5.99, 4), (6.0, 4), (6.01, 3)])
def test_same_share_means_within_a_twentieth(step: float, n_pairs: int) -> None:
    def moved(data: xr.Dataset) -> xr.Dataset:
        steps = np.where(data["step"].values == 5, step, data["step"].values.astype(float))
        return data.assign_coords(step=("model", steps))

    assert contrast([moved(chain())], [moved(sets())]).sizes["node"] == n_pairs


def test_a_stratum_without_features_of_both_runs_has_no_weight() -> None:
    out = contrast([chain(later=0.1, sizes=[[500, 30, 0], [300, 60, 40]])], [sets()])
    assert out["weight"].values.tolist() == [0, 1, 0]
    missing = chain(later=0.1)
    missing["share_in_stratum_replicate"][:, :4, 2] = NAN  # in one draw of prompts no feature changed so far
    missing["share_in_stratum"][:4, 2] = NAN
    assert contrast([missing], [sets()])["weight"].values.tolist() == [0, 1, 0]
    nothing = contrast([chain(sizes=[[500, 0, 0], [300, 60, 40]])], [sets()])
    assert np.isnan(nothing["difference"].sel(measure="time"))


@pytest.mark.parametrize(("attainable", "determined"), [(0.5, True), (0.49, False)])
def test_turnover_is_not_read_where_prompts_do_not_determine_the_sets(attainable: float, determined: bool) -> None:
    levels = np.full(8, 0.9)
    levels[1] = attainable  # rl@2
    out = contrast([chain()] * 2, [sets(), sets(attainable=levels)])
    assert out["determined"].values.tolist() == [determined, True, True, True]
    if not determined:
        rl = (0.1 / 2 + 0.06) / 2
        assert float(out["value"].sel(measure="turnover", trained_run="rl")) == pytest.approx(rl)
    levels[0] = attainable  # rl@8, the last one
    last = contrast([chain()], [sets(attainable=levels)])
    assert bool(np.isfinite(last["difference"].sel(measure="turnover"))) == determined
    assert np.isfinite(last["difference"].sel(measure="time"))


def test_the_papers_overlap_stands_beside() -> None:
    out = contrast([chain()] * 2, [sets(), sets(shift=-0.1)])
    rl = np.linspace(0.2, 0.9, 8)[[1, 2, 3, 0]] - 0.05
    assert out["paper_overlap"].sel(trained_run="rl").values == pytest.approx(rl)


def test_runs_without_common_checkpoints_are_missing_and_unequal_inputs_refused() -> None:
    kept = ["sft@20", "rl@8"]
    out = validate(contrast([chain().sel(model=kept)], [sets().sel(model=kept)]), "timing_contrast")
    assert np.isnan(out["difference"]).all()
    other = contrast([chain().sel(model=["sft@20"])], [sets().sel(model=["sft@20"])])
    assert other.sizes["node"] == 0
    assert np.isnan(other["difference"]).all()
    with pytest.raises(InputError, match="one stabilisation test and one set test a dictionary, got 2 and 1"):
        contrast([chain()] * 2, [sets()])


def test_checkpoints_are_those_of_the_run_by_step() -> None:
    assert checkpoints_of(sets(), "rl")["step"].values.tolist() == [2, 4, 6, 8]
    assert checkpoints_of(sets(), "other").sizes["model"] == 0


def test_training_share_of_no_steps_or_step_zero_is_finite() -> None:
    assert training_share(np.array([10, 40])).tolist() == [0.25, 1.0]
    assert training_share(np.array([0])).tolist() == [0.0]
    assert training_share(np.array([], dtype=int)).tolist() == []


@pytest.mark.parametrize(("dfve", "undescribed"), [(0.31, {}), (0.3, {}), (0.29, {"rl@2": 0.29})])
def test_a_checkpoint_is_described_if_every_dictionary_describes_it(dfve: float, undescribed: dict[str, float]) -> None:
    health = xr.Dataset(
        {
            "dfve": (("crosscoder", "model"), [[0.8, 0.7], [dfve, 0.7], [-1.0, -1.0]]),
            "readout_accepted": ("crosscoder", [False, False, False]),
        },
        coords={"crosscoder": ["main", "main.2", "other"], "model": ["rl@2", "rl@4"]},
        attrs={"dfve_min": 0.3},
    )
    assert undescribed_checkpoints(health, ["main", "main.2"]) == undescribed
    accepted = health.assign(readout_accepted=("crosscoder", [True, True, False]))
    assert undescribed_checkpoints(accepted, ["main", "main.2"]) == {}
    assert undescribed_checkpoints(health.drop_vars("dfve"), ["main"]) == {}
