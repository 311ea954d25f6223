"""Matched random sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from numpy.typing import NDArray
from scipy import sparse

from rlgen_stats.schemas.dims import FEATURE
from rlgen_stats.schemas.errors import InputError, NotEstimableError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.stores.crosscoder_weights import Decoder
from rlgen_stats.toolkit.intervention import match_controls
from rlgen_stats.toolkit.statistics.causal.controls import STRENGTHS, _best, comparable, norm_difference, unbalanced
from rlgen_stats.toolkit.statistics.causal.covariates import near_duplicates
from rlgen_stats.toolkit.statistics.causal.edit_norms import EditNorm, ModelCodes

SET = (5, 77, 140, 301, 302, 410)


def population(n: int = 512, seed: int = 0) -> xr.Dataset:
    draw = np.random.default_rng(seed)
    strength = draw.standard_normal(n)
    log_firing = -3 + strength + 0.5 * draw.standard_normal(n)
    log_firing[::16] = -np.inf
    return xr.Dataset(
        {
            "log_firing": (FEATURE, log_firing),
            "decoder_norm": (FEATURE, np.exp(0.3 * draw.standard_normal(n))),
            "contribution_energy": (FEATURE, strength + 0.5 * draw.standard_normal(n)),
            "mas_bin": (FEATURE, draw.integers(0, 5, n)),
        }
    )


def of_one_size(sets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Edits that all have one norm."""
    return np.ones(len(sets))


def alive(ids: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(k for k in ids if k % 16)


def test_controls_are_distinct_disjoint_and_balanced() -> None:
    covariates, chosen = population(), alive(SET)
    duplicates = np.zeros(512, dtype=bool)
    duplicates[[6, 78, *chosen]] = True
    matched = match_controls(covariates, chosen, of_one_size, n_sets=99, seed=1, near_duplicates=duplicates)
    assert matched.sets.shape == (99, len(chosen))
    assert not np.isin(matched.sets, np.flatnonzero(duplicates)).any()
    assert np.isfinite(covariates["log_firing"].values[matched.sets]).all()
    assert all(len(set(row)) == len(chosen) for row in matched.sets.tolist())
    assert len({tuple(sorted(row)) for row in matched.sets.tolist()}) == 99
    assert matched.balance["balanced"].all()
    assert matched.flags == ()
    assert matched.comparable
    validate(matched.balance, "control_balance")


def test_balance_is_the_standardised_difference() -> None:
    covariates, chosen = population(), list(alive(SET))
    matched = match_controls(covariates, chosen, of_one_size, n_sets=50, seed=1)
    for name in (*STRENGTHS, "mas_bin"):
        values = covariates[name].values.astype(float)
        of_set, of_controls = values[chosen], values[matched.sets.ravel()]
        spread = np.sqrt((of_set.var(ddof=1) + of_controls.var(ddof=1)) / 2)
        got = float(matched.balance["standardized_difference"].sel(covariate=name))
        assert got == pytest.approx((of_set.mean() - values[matched.sets].mean()) / spread, rel=1e-9)


def test_matching_beats_random_choice() -> None:
    covariates = population()
    energy = covariates["contribution_energy"].values
    strongest = np.argsort(np.where(np.isfinite(covariates["log_firing"].values), energy, -np.inf))[-60:-40]
    matched = match_controls(covariates, strongest, of_one_size, n_sets=60, seed=0)
    free = np.setdiff1d(np.flatnonzero(np.isfinite(covariates["log_firing"].values)), strongest)
    gap = energy[strongest].mean() - energy[free].mean()
    assert gap > 1
    assert abs(energy[strongest].mean() - energy[matched.sets].mean()) < 0.3 * gap


def test_draws_depend_on_the_seed_alone() -> None:
    covariates, chosen = population(), alive(SET)
    first, again, other = (match_controls(covariates, chosen, of_one_size, n_sets=30, seed=s).sets for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_fewer_sets_than_asked_are_flagged() -> None:
    covariates = population(40)
    matched = match_controls(covariates, (5,), of_one_size, n_sets=99, seed=0)
    assert len(matched.sets) <= 37
    assert any(flag.startswith("fewer_sets") for flag in matched.flags)


def features_that_add_up(n_groups: int = 8, n_each: int = 32) -> tuple[xr.Dataset, EditNorm]:
    """Features alike one by one; those of a group fire on the same tokens and point nearly the same way."""
    draw = np.random.default_rng(4)
    group = np.repeat(np.arange(n_groups), n_each)
    directions = draw.standard_normal((n_groups, 16))[group] + 0.5 * draw.standard_normal((len(group), 16))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    codes = (draw.random((64, n_groups)) < 0.3)[:, group] * np.exp(0.2 * draw.standard_normal((64, len(group))))
    covariates = population(len(group)).assign(mas_bin=(FEATURE, np.full(len(group), 2)))
    covariates["log_firing"] = (FEATURE, np.log(0.3) + 0.1 * draw.standard_normal(len(group)))
    return covariates, EditNorm((ModelCodes(sparse.csc_array(codes), directions.astype(np.float32)),))


def test_controls_are_as_large_in_the_edited_model_where_matching_single_features_leaves_them_smaller() -> None:
    covariates, norm = features_that_add_up()
    chosen = [0, 1, 2, 3, 40, 41]

    by_feature = match_controls(covariates, chosen, of_one_size, n_sets=40, seed=0)
    by_norm = match_controls(covariates, chosen, norm.of_each, n_sets=40, seed=0)
    assert by_feature.comparable, "nothing in single features tells"
    assert norm_difference(norm.of(chosen), norm.of_each(by_feature.sets).mean()) > 0.15
    assert abs(norm_difference(norm.of(chosen), norm.of_each(by_norm.sets).mean())) < 0.03
    assert by_norm.comparable
    balance = by_norm.balance.sel(covariate="edit_norm")
    assert float(balance["set_mean"]) == norm.of(chosen)
    assert float(balance["control_mean"]) == pytest.approx(norm.of_each(by_norm.sets).mean())


def test_a_set_no_random_one_is_as_large_as_is_not_comparable() -> None:
    def larger(sets: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.where((sets == 5).any(axis=1), 1.2, 1.0)

    matched = match_controls(population(), alive(SET), larger, n_sets=40, seed=0)
    assert not matched.comparable
    assert matched.comparable_rescaled, "nothing but the norm is wrong, and edits can be rescaled"
    assert "unbalanced:edit_norm=+0.17" in matched.flags


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        ([0.1, 9, 9, 9, 0.25], True),
        ([0.101, 0, 0, 0, 0], False),
        ([-0.9, 0, 0, 0, 0], True),
        ([0, 0, 0, 0, 0.251], False),
        ([0, 0, 0, 0, -0.251], False),
        ([np.nan, 0, 0, 0, 0], False),
    ],
)
def test_comparable_sets_are_no_larger_and_of_one_class(difference: list[float], expected: bool) -> None:
    assert comparable(np.array(difference)) == expected
    assert comparable(2 * np.array(difference), times=2.0) == expected


@pytest.mark.parametrize(("value", "flagged"), [(0.0999, False), (0.1, True), (-0.0999, False), (-0.1001, True)])
def test_a_difference_of_a_tenth_is_unbalanced(value: float, flagged: bool) -> None:
    assert unbalanced(np.array([0.0, value, 0.0, 0.0, 0.0])) == ([f"unbalanced:log_firing={value:+.2f}"] * flagged)


@pytest.mark.parametrize(("farther", "first"), [(0.0199, 1), (0.0201, 0)])
def test_norms_within_a_fiftieth_are_equally_near_and_balance_decides(farther: float, first: int) -> None:
    table = np.array([[0.0], [5.0], [0.1], [1.0], [-1.0]])
    sets, everyone = np.array([[1], [2]]), np.ones(5, dtype=bool)
    assert _best(sets, np.array([0.005, farther]), np.array([0]), table, everyone)[0] == first


@pytest.mark.parametrize(("n", "bin_of_controls"), [(141, 3), (158, 4)])
def test_one_attribution_bin_is_as_far_as_four_standard_deviations(n: int, bin_of_controls: int) -> None:
    """Ten features of the set's bin fire 3.9 (of 141) or 4.1 (of 158) deviations more, ten of the next bin alike."""
    log_firing, bins = np.zeros(n), np.full(n, 9)
    bins[0], bins[1:11], bins[11:21] = 3, 3, 4
    log_firing[1:11] = 1.0
    assert (1 / log_firing.std() < 4) == (bin_of_controls == 3)
    columns = {"log_firing": log_firing, "decoder_norm": np.ones(n), "contribution_energy": np.ones(n), "mas_bin": bins}
    covariates = xr.Dataset({name: (FEATURE, values) for name, values in columns.items()})
    matched = match_controls(covariates, (0,), of_one_size, n_sets=5, seed=0)
    assert set(bins[matched.sets.ravel()].tolist()) == {bin_of_controls}


@pytest.mark.parametrize(("cosine", "duplicate"), [(0.69, False), (0.71, True), (-0.71, False)])
def test_decoders_closer_than_seven_tenths_are_near_duplicates(cosine: float, duplicate: bool) -> None:
    rows = np.array([[1.0, 0.0], [cosine, np.sqrt(1 - cosine**2)]], dtype=np.float32)
    found = near_duplicates(Decoder("main", ("base@0",), (2,), rows), [0])
    assert found.tolist() == [True, duplicate]


def test_impossible_matches_name_the_covariate_and_the_distance() -> None:
    covariates = population()
    covariates["contribution_energy"].values[list(alive(SET))] += 50
    with pytest.raises(NotEstimableError, match=r"contribution_energy.* standard deviations away"):
        match_controls(covariates, alive(SET), of_one_size, n_sets=20, seed=0)
    other_bin = population()
    other_bin["mas_bin"].values[:] = 2
    other_bin["mas_bin"].values[list(alive(SET))] = 4
    with pytest.raises(NotEstimableError, match=r"mas_bin.*\[4\].*\[2\]"):
        match_controls(other_bin, alive(SET), of_one_size, n_sets=20, seed=0)
    with pytest.raises(NotEstimableError, match="never fire"):
        match_controls(population(), (16, 17), of_one_size, n_sets=20, seed=0)
    with pytest.raises(NotEstimableError, match="12 of 32 are left"):
        match_controls(population(32), [k for k in range(32) if k % 16][:18], of_one_size, n_sets=20, seed=0)


@pytest.mark.parametrize(("apart", "refused"), [(0.009, False), (0.011, True)])
def test_what_single_precision_makes_of_equal_numbers_is_no_distance(apart: float, refused: bool) -> None:
    covariates = population()
    covariates["contribution_energy"].values[:] = 1000.0
    covariates["contribution_energy"].values[5] += apart  # a hundred-thousandth of 1000 is 0.01
    if refused:
        with pytest.raises(NotEstimableError, match="contribution_energy"):
            match_controls(covariates, (5,), of_one_size, n_sets=5, seed=0)
    else:
        assert len(match_controls(covariates, (5,), of_one_size, n_sets=5, seed=0).sets) == 5


@pytest.mark.parametrize(
    ("features", "n_sets", "message"),
    [((), 10, "got 0"), ((1, 1), 10, "distinct"), ((512,), 10, "0 to 511"), ((1,), 0, "at least one control")],
)
def test_bad_sets_are_refused(features: Any, n_sets: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        match_controls(population(), features, of_one_size, n_sets=n_sets, seed=0)
    with pytest.raises(InputError, match="missing: mas_bin"):
        match_controls(population().drop_vars("mas_bin"), (1,), of_one_size, n_sets=1, seed=0)
