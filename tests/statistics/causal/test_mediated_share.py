"""Shares of the full patch's effect, on changes whose truth is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlgen_stats.schemas.layout import validate
from rlgen_stats.toolkit.statistics.causal.mediated_share import (
    Curve,
    CurvePoint,
    RatioToPatch,
    compact_share,
    curve_of,
    mediated_share,
    of_patch,
)
from rlgen_stats.toolkit.statistics.causal.outcome_table import Condition
from tests.statistics.causal.test_result_datasets import outcomes
from tests.statistics.causal.worlds import causal

N = 200
CODES = np.arange(N)


def changes(n_gained: int, n_lost: int = 0, *, start: int = 0) -> np.ndarray:
    out = np.zeros(N)
    out[start : start + n_gained] = 1.0
    out[N - n_lost :] = -1.0
    return out


def point(label: str, n: int, *, n_random: int = 0, ratio: float = 0.3, rescaled: bool = False) -> CurvePoint:
    random = tuple(f"{label}-random-{i}" for i in range(n_random))
    return CurvePoint(label, n, label, random, ratio, tuple(0.1 * i for i in range(n_random)), rescaled)


def curve(sign: float = 1.0, **arms: Any) -> Curve:
    points = (point("set", 5, n_random=2), point("all", 64, ratio=1.04))
    known = {"patch": changes(80), "set": changes(20), "all": changes(80)}
    known |= {"set-random-0": changes(4), "set-random-1": np.zeros(N)} | arms
    return Curve(
        "amplify" if sign > 0 else "disable",
        points,
        {name: sign * values for name, values in known.items()},
        np.array([f"p{i}" for i in range(N)]),
    )


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_shares_are_ratios_of_changes_and_random_sets_are_taken_off(sign: float) -> None:
    found = mediated_share({1: [curve(sign)]}, alpha=0.05)
    assert found is not None
    validate(found, "mediated_share")
    one = found.sel(direction="amplify" if sign > 0 else "disable")
    assert float(one["patch_effect"]) == pytest.approx(sign * 0.4)
    np.testing.assert_allclose(one["share"], [0.25, 1.0])
    np.testing.assert_allclose(one["effect"], [sign * 0.1, sign * 0.4])
    np.testing.assert_allclose(one["random_share"].sel(point="set").values[0], [0.05, 0.0], atol=1e-15)
    np.testing.assert_allclose(one["random_norm"].sel(point="set").values[0], [0.0, 0.1])
    np.testing.assert_allclose(one["above_random"], [0.225, np.nan])
    np.testing.assert_allclose(one["norm_ratio"].values, [[0.3, 1.04]])
    assert one["random_sets"].values.tolist() == [["nearest", ""]]
    assert ((one["share_low"] < one["share"]) & (one["share"] < one["share_high"])).all()
    assert np.isnan(found["share"].sel(direction="disable" if sign > 0 else "amplify")).all()


def test_the_interval_is_fiellers() -> None:
    """One dictionary, one prompt a cluster: the roots of (e - r p)^2 = t^2 var(e_i - r p_i) / n."""
    from scipy import stats

    draw = np.random.default_rng(3)
    patch = (draw.random(N) < 0.4) * 1.0
    effect = patch * (draw.random(N) < 0.5) - (draw.random(N) < 0.05)
    share, low, high = RatioToPatch(patch, CODES, sign=1.0, alpha=0.1).interval(effect[None, None])
    t2 = stats.t.ppf(0.95, N - 1) ** 2 / N
    v = np.cov(effect, patch)
    quadratic = [
        patch.mean() ** 2 - t2 * v[1, 1],
        -2 * (effect.mean() * patch.mean() - t2 * v[0, 1]),
        effect.mean() ** 2 - t2 * v[0, 0],
    ]
    np.testing.assert_allclose([low[0], high[0]], np.sort(np.roots(quadratic)), atol=2e-3)
    assert share[0] == pytest.approx(effect.mean() / patch.mean())


def test_features_that_do_all_that_the_patch_does_still_have_an_interval() -> None:
    """No prompt tells them apart: what is open is a difference not seen in as many prompts."""
    for size, n_effective in ((1, N), (4, N / 4)):
        patch = np.repeat(changes(80 // size)[: N // size], size)
        ratio = RatioToPatch(patch, np.arange(N) // size, sign=1.0, alpha=0.05)
        _, low, high = ratio.interval(patch[None, None])
        open_share = (1 - 0.025 ** (1 / n_effective)) / patch.mean()
        np.testing.assert_allclose([1 - low[0], high[0] - 1], open_share, rtol=0.03)
    _, low, _ = RatioToPatch(np.ones(N), CODES // 4, sign=1.0, alpha=0.05).interval(np.ones((1, 1, N)))
    assert low[0] == pytest.approx(0.025 ** (4 / N)), "every prompt changed"


@pytest.mark.parametrize(
    ("patch", "shown"),
    [(changes(12, 2), True), (changes(9, 4), False), (-changes(12, 2), False)],
)
def test_without_a_shown_effect_of_the_patch_there_is_no_share(patch: np.ndarray, shown: bool) -> None:
    found = mediated_share({1: [curve(patch=patch)]}, alpha=0.05)
    assert found is not None
    assert np.isfinite(found["share"].sel(direction="amplify")).all() == shown
    assert float(found["patch_effect"].sel(direction="amplify")) == pytest.approx(patch.mean())


def test_dictionaries_that_differ_widen_the_interval_and_each_has_its_curve() -> None:
    alike = mediated_share({1: [curve()], 2: [curve()], 3: [curve()]}, alpha=0.05)
    spread = {d: [curve(set=changes(n))] for d, n in ((1, 4), (2, 20), (3, 36))}
    apart = mediated_share(spread, alpha=0.05)
    assert alike is not None
    assert apart is not None
    np.testing.assert_allclose(apart["dictionary_share"].sel(direction="amplify", point="set"), [0.05, 0.25, 0.45])
    widths = [float((x["share_high"] - x["share_low"]).sel(direction="amplify", point="set")) for x in (alike, apart)]
    assert float(apart["share"].sel(direction="amplify", point="set")) == pytest.approx(0.25)
    assert widths[1] > 2 * widths[0]
    assert float(apart["share_low"].sel(direction="amplify", point="set")) < 0


def test_a_point_that_a_dictionary_lacks_is_left_out() -> None:
    shorter = curve()
    shorter = replace(shorter, points=shorter.points[1:])
    found = mediated_share({1: [curve()], 2: [shorter]}, alpha=0.05)
    assert found is not None
    assert found["point"].values.tolist() == ["all"]
    assert mediated_share({}, alpha=0.05) is None


def test_a_curve_is_made_of_judged_arms_and_of_those_run_for_it_alone() -> None:
    table = causal()
    names = [condition.name for condition in table.conditions]
    as_patch = tuple(Condition("patch", "patch", 1.0) if c.name == "steering" else c for c in table.conditions)
    right = np.linspace(0, 1, len(table.task))
    found = curve_of((), outcomes(replace(table, conditions=as_patch), curve_correct={"lower-all": right}))
    unedited = table.correct[0].mean(axis=1)
    steering = table.correct[names.index("steering")].mean(axis=1)
    np.testing.assert_array_equal(found.changes["patch"], (steering - unedited)[table.target])
    np.testing.assert_array_equal(found.changes["lower-all"], (right - unedited)[table.target])
    assert len(found.cluster) == table.target.sum()


def curves(*rescaled: bool) -> dict[int, list[Curve]]:
    """A dictionary each, whose random sets are rescaled or not."""
    points = {r: (point("set", 5, n_random=2, rescaled=r), point("top-1", 1), point("all", 64)) for r in (False, True)}
    one = curve(**{"top-1": changes(2)})
    return {d: [replace(one, points=points[r])] for d, r in enumerate(rescaled, start=1)}


def test_a_point_says_which_random_sets_it_is_compared_with() -> None:
    for rescaled, expected in (((False, False), "nearest"), ((False, True), "rescaled"), ((True, True), "rescaled")):
        found = mediated_share(curves(*rescaled), alpha=0.05)
        assert found is not None
        known = of_patch(found, "amplify")
        assert (known.random_sets, known.above) == (expected, pytest.approx(0.225))
        assert known.above_low < known.above < known.above_high
    alone = of_patch(found, "amplify", "all")
    assert (alone.random_sets, np.isnan(alone.above), alone.share) == ("", True, pytest.approx(1.0))


@pytest.mark.parametrize(("norm", "comparable"), [(0.2701, True), (0.2699, False), (0.5, True)])
def test_random_sets_of_earlier_results_count_where_their_edits_are_no_smaller_by_a_tenth(
    norm: float, comparable: bool
) -> None:
    """The set's norm is .3 of the difference's in either dictionary, the random sets' .3 in the first."""
    found = mediated_share(curves(False, False), alpha=0.05)
    assert found is not None
    norms = np.full(found["random_norm"].shape, 0.3)
    norms[:, 1] = norm
    known = of_patch(
        found.drop_vars("random_sets").assign(random_norm=found["random_norm"].copy(data=norms)), "amplify"
    )
    assert (known.random_sets, np.isfinite(known.above)) == ("nearest" if comparable else "", comparable)


@pytest.mark.parametrize(
    ("most", "is_compact", "points"),
    [
        (1, False, ("set", "top-1")),  # the set, however large, and the leading features up to the limit
        (2, False, ("set", "top-1", "all")),
        (4, False, ("set", "top-1", "all")),
        (5, True, ("set", "top-1", "all")),
        (64, True, ("set", "top-1", "all")),
        (65, True, ("set", "top-1", "all")),  # too few are known to exclude a set of 65
    ],
)
def test_sets_are_compact_up_to_a_size_and_excluded_by_the_points_that_reach_it(
    most: int, is_compact: bool, points: tuple[str, ...]
) -> None:
    found = mediated_share(curves(False, False), alpha=0.05)
    assert found is not None
    known = compact_share(found, most)
    assert known is not None
    assert (known.is_compact, known.points) == (is_compact, points)
    highs = [float(found["share_high"].sel(direction="amplify", point=label)) for label in points]
    np.testing.assert_equal(known.best_high, max(highs) if most < 65 else np.nan)


def test_without_a_share_of_the_set_nothing_is_said_of_compactness() -> None:
    assert compact_share(None, 5) is None
    unshown = mediated_share({1: [curve(patch=changes(9, 4))]}, alpha=0.05)
    assert compact_share(unshown, 5) is None
    found = mediated_share({1: [curve()]}, alpha=0.05)
    assert found is not None
    assert compact_share(found.sel(point=["all"]), 5) is None
