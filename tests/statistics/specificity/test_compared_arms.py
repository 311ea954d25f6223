"""Which arms are compared at which distance, and how alike their crosscoders must fit: just inside and just outside."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from rlgen_stats.toolkit.statistics.specificity.compared_arms import (
    Arm,
    comparability,
    compare_arms,
    dictionaries_of,
)
from rlgen_stats.toolkit.statistics.specificity.matched_movement import (
    Mixture,
    at_distance,
    checkpoint_to_add,
    equal,
    matched,
)
from rlgen_stats.toolkit.statistics.specificity.superiority import block_rows, cluster_draws, superiority

RUNS = {"sft": ["sft"], "rl": ["rl"]}
NAMES = {"sft": {"sft@10": ("sft",)}, "rl": {"rl@10": ("rl",)}}
EQUAL = {"sft": {"sft@10": 1.0}, "rl": {"rl@10": 1.0}}


def table(**targets: str) -> xr.Dataset:
    """Crosscoders by name, each with its target."""
    return xr.Dataset(
        coords={"crosscoder": list(targets), "target": ("crosscoder", list(targets.values()))},
    )


def health(targets: xr.Dataset, fits: dict[str, tuple[float, float, float]]) -> xr.Dataset:
    """FVE of the target view, L0 and dead fraction of every crosscoder; the other views fit badly."""
    views = sorted(set(targets["target"].values.tolist()))
    fve = np.array(
        [
            [fits[name][0] if view == str(targets["target"].sel(crosscoder=name).item()) else 0.1 for view in views]
            for name in fits
        ]
    )
    columns = {"l0": [fit[1] for fit in fits.values()], "dead_fraction": [fit[2] for fit in fits.values()]}
    return xr.Dataset(
        {"fve": (("crosscoder", "view"), fve)} | {name: ("crosscoder", column) for name, column in columns.items()},
        coords={"crosscoder": list(fits), "view": views},
    )


@pytest.mark.parametrize(
    ("sft", "rl", "reason"),
    [
        ((0.9, 10, 0.1), (0.9, 10, 0.1), ""),
        ((0.9, 10, 0.1), (0.851, 10, 0.1), ""),
        ((0.851, 10, 0.1), (0.9, 10, 0.1), ""),
        ((0.9, 10, 0.1), (0.849, 10, 0.1), "FVE differs"),
        ((0.849, 10, 0.1), (0.9, 10, 0.1), "FVE differs"),
        ((0.5, 10, 0.1), (0.5, 12.5, 0.1), ""),  # a factor of exactly 1.25
        ((0.5, 12.5, 0.1), (0.5, 10, 0.1), ""),
        ((0.5, 10, 0.1), (0.5, 12.51, 0.1), "L0 differs"),
        ((0.5, 12.51, 0.1), (0.5, 10, 0.1), "L0 differs"),
        ((0.5, 10, 0.1), (0.5, 10, 0.199), ""),
        ((0.5, 10, 0.199), (0.5, 10, 0.1), ""),
        ((0.5, 10, 0.1), (0.5, 10, 0.201), "dead fractions differ"),
        ((0.5, 10, 0.201), (0.5, 10, 0.1), "dead fractions differ"),
        ((np.nan, 10, 0.1), (0.5, 10, 0.1), "a health value is missing"),
    ],
)
def test_parity_of_fit(sft: tuple[float, float, float], rl: tuple[float, float, float], reason: str) -> None:
    both = table(sft="sft@10", rl="rl@10")
    compared = compare_arms("final", RUNS, NAMES, EQUAL)
    text = comparability(compared, both, health(both, {"sft": sft, "rl": rl}))
    assert text.startswith("NOT_COMPARABLE: " if reason else "COMPARABLE: ")
    assert reason in text


def test_the_fit_of_an_arm_is_the_mean_over_runs_and_dictionaries() -> None:
    """FVE of SFT's two runs, two dictionaries each: .9, .8, .8, .7, hence .8, within .05 of RL's .751, not of .749."""
    names = {
        "s": {"s@1": ("s", "s.2")},
        "t": {"t@1": ("t", "t.2")},
        "rl": {"rl@1": ("rl", "rl.2")},
    }
    targets = table(**{"s": "s@1", "s.2": "s@1", "t": "t@1", "t.2": "t@1", "rl": "rl@1", "rl.2": "rl@1"})
    distances = {run: {f"{run}@1": 1.0} for run in names}
    compared = compare_arms("final", {"sft": ["s", "t"], "rl": ["rl"]}, names, distances)
    for of_rl, expected in ((0.751, "COMPARABLE"), (0.749, "NOT_COMPARABLE")):
        fve = dict(zip(("s", "s.2", "t", "t.2", "rl", "rl.2"), (0.9, 0.8, 0.8, 0.7, of_rl, of_rl), strict=True))
        text = comparability(compared, targets, health(targets, {name: (x, 10, 0.1) for name, x in fve.items()}))
        assert text.split(":")[0] == expected, text


def test_parts_of_an_arm_share_one_weight() -> None:
    near = Mixture({"s@1": 0.25, "s@2": 0.75}, 0.2)
    arm = Arm((near, Mixture({"t@1": 1.0}, 0.4)), {"s@1": ("a", "a2"), "s@2": ("b", "b2"), "t@1": ("c", "c2", "c3")})
    assert arm.parts(1) == [("a2", 0.125), ("b2", 0.375), ("c2", 0.5)]
    assert arm.n_dictionaries == 2
    assert arm.distance == pytest.approx(0.3)


def test_only_the_first_crosscoder_of_a_checkpoint_counts_with_all_its_dictionaries() -> None:
    both = table(**{"one": "sft@10", "one.2": "sft@10", "late": "sft@20", "other": "sft@10", "rl": "rl@10"})
    both = both.assign_coords(dictionary=("crosscoder", [1, 2, 1, 1, 1]))
    assert dictionaries_of(both, "sft") == {"sft@10": ("one", "one.2"), "sft@20": ("late",)}
    alone = both.drop_vars("dictionary").isel(crosscoder=[0, 1])
    assert dictionaries_of(alone, "sft") == {"sft@10": ("one",)}


@pytest.mark.parametrize(
    ("distances", "expected"),
    [
        ((1.0, 0.8), True),  # a factor of exactly 1.25
        ((1.0, 0.801), True),
        ((1.0, 0.799), False),
        ((0.799, 1.0), False),
        ((0.0, 0.0), False),  # neither moved: no distance at which they are equal
        ((1e-3, 1e-3), True),
        ((-1.0, -1.0), False),
    ],
)
def test_equal_distances_are_within_a_factor_of_a_quarter_more(distances: tuple[float, float], expected: bool) -> None:
    assert equal(*distances) is expected


@pytest.mark.parametrize(
    ("known", "level", "expected"),
    [
        ({"a": 0.1, "b": 0.4}, 0.2, {"a": 0.5, "b": 0.5}),  # half way in logarithms
        ({"a": 0.01, "b": 0.81}, 0.27, {"a": 0.25, "b": 0.75}),
        ({"a": 0.1, "b": 0.4, "c": 0.9}, 0.4, {"b": 1.0}),
        ({"a": 0.1, "b": 0.2, "c": 0.8}, 0.4, {"b": 0.5, "c": 0.5}),  # the two on either side
        ({"a": 0.1, "b": 0.161}, 0.2, {"b": 1.0}),  # all nearer to base: the farthest, within 1.25
        ({"a": 0.1, "b": 0.159}, 0.2, None),
        ({"a": 0.249, "b": 0.9}, 0.2, {"a": 1.0}),  # all farther: the nearest
        ({"a": 0.251, "b": 0.9}, 0.2, None),
        ({"a": 0.0, "b": 0.2}, 0.2, {"b": 1.0}),  # base itself is at no distance
        ({"a": 0.0, "b": 0.249}, 0.2, {"b": 1.0}),
        ({"a": -1.0, "b": 0.249}, 0.2, {"b": 1.0}),
        ({"a": float("nan")}, 0.2, None),
        ({"a": 0.1}, 0.0, None),
        ({"a": 0.1}, -1.0, None),
        ({"a": 0.1}, float("nan"), None),
        ({"a": 2.0, "b": 8.0}, 4.0, {"a": 0.5, "b": 0.5}),
        ({"a": 0.9, "b": 3.6}, 1.8, {"a": 0.5, "b": 0.5}),
    ],
)
def test_a_run_at_a_distance(known: dict[str, float], level: float, expected: dict[str, float] | None) -> None:
    found = at_distance(known, level)
    assert (found is None) == (expected is None)
    if found is not None:
        assert dict(found.weights) == pytest.approx(expected)


def test_runs_are_matched_at_the_largest_distance_that_all_reach() -> None:
    level, runs = matched({"sft": {"s1": 0.1, "s2": 0.4}, "rl": {"r1": 0.2, "none": float("nan")}})
    assert level == 0.2
    assert runs["sft"] is not None
    assert runs["sft"].describe() == "50% s1 and 50% s2"
    assert runs["rl"] is not None
    assert runs["rl"].describe() == "r1"
    assert np.isnan(matched({"sft": {"s1": 0.1}, "rl": {}})[0])


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"a": 0.1, "b": 0.25}, "b"),  # a factor of exactly 1.25 beyond
        ({"a": 0.1, "b": 0.2501}, "a"),
        ({"a": 0.0}, None),
        ({"a": -1.0}, None),
        ({"a": 0.1, "b": 0.19, "c": 0.24}, "b"),  # nearest in logarithms
        ({"a": 0.15, "b": 0.24}, "b"),
        ({"a": 0.9}, None),
        ({"a": 0.0, "b": 0.001}, "b"),
    ],
)
def test_the_checkpoint_that_lacks_a_dictionary(known: dict[str, float], expected: str | None) -> None:
    assert checkpoint_to_add(known, 0.2) == expected


@pytest.mark.parametrize(
    ("distances", "comparison", "reason"),
    [
        ({"sft": {"sft@10": 1.0}, "rl": {"rl@10": 0.801}}, "final", ""),
        ({"sft": {"sft@10": 1.0}, "rl": {"rl@10": 0.799}}, "final", "differ by more than a factor 1.25"),
        ({"sft": {"sft@10": 1.0}, "rl": {"rl@10": 0.801}}, "matched_shift", ""),
        ({"sft": {"sft@10": 1.0}, "rl": {"rl@10": 0.799}}, "matched_shift", "there is no dictionary of sft"),
        ({"sft": {"sft@10": 1.0}, "rl": {"rl@10": 0.0}}, "matched_shift", "not known or zero"),
        ({"sft": {"sft@10": 1.0}, "rl": {"rl@10": 0.0}}, "matched_kl", "the KL of a run is not known or zero"),
        ({"sft": {"sft@10": 1e-3}, "rl": {"rl@10": 1e-3}}, "matched_shift", ""),
        ({"sft": {"sft@10": 3.0}, "rl": {"rl@10": 3.0}}, "matched_shift", ""),
        ({}, "final", "is not known"),
    ],
)
def test_distances_at_which_arms_are_compared(
    distances: dict[str, dict[str, float]], comparison: str, reason: str
) -> None:
    compared = compare_arms(comparison, RUNS, NAMES, distances)
    assert bool(compared.problems) == bool(reason)
    assert reason in "".join(compared.problems)


def test_superiority_counts_pairs_by_weight() -> None:
    """By hand: 3 beats 2 and 1; 2 beats 1 and ties with 2; 1 ties with 1."""
    a, b = np.array([3.0, 2.0, 1.0]), np.array([2.0, 1.0])
    assert superiority(a, b, np.ones((1, 3)), np.ones((1, 2))) == pytest.approx([(2 + 1.5 + 0.5) / 6])
    weighted = superiority(a, b, np.array([[1.0, 2.0, 0.0]]), np.array([[3.0, 1.0]]))
    assert weighted == pytest.approx([(1 * (3 + 1) + 2 * (3 / 2 + 1)) / (3 * 4)])
    assert np.isnan(superiority(a, b, np.zeros((1, 3)), np.ones((1, 2)))).all()


def test_every_draw_draws_as_many_clusters_as_there_are_whatever_the_block() -> None:
    whole = np.concatenate(list(cluster_draws(7, 10, seed=0)))
    assert whole.shape == (10, 7)
    assert (whole.sum(axis=1) == 7).all()
    blocks = list(cluster_draws(7, 10, seed=0, rows=4))
    assert [len(block) for block in blocks] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(blocks), whole)
    assert (block_rows(2**22), block_rows(2**21), block_rows(2**23), block_rows(0)) == (1, 2, 1, 2**22)


@pytest.mark.parametrize(("farthest", "comparable"), [(0.35, True), (0.4, False)])
def test_final_models_of_several_runs_are_compared_where_every_run_is_as_far(farthest: float, comparable: bool) -> None:
    """The arms' means are within a factor 1.25 in both; one run of the first is as far as .3 and .24 or not."""
    far = {"s": 0.28, "t": farthest, "rl": 0.3}
    names = {run: {f"{run}@10": (run,)} for run in far}
    distances = {run: {f"{run}@10": distance} for run, distance in far.items()}
    compared = compare_arms("final", {"sft": ["s", "t"], "rl": ["rl"]}, names, distances)
    assert bool(compared.problems) != comparable
    words = " ".join(compared.problems or [compared.note])
    assert f"of single runs 0.28 to {farthest:g}," in words
