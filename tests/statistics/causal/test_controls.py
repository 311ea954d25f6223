"""Matched random sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

from rlgen_stats.schemas.dims import FEATURE
from rlgen_stats.schemas.errors import InputError, NotEstimableError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.toolkit.intervention import match_controls
from rlgen_stats.toolkit.statistics.causal.controls import COVARIATES

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


def alive(ids: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(k for k in ids if k % 16)


def test_controls_are_distinct_disjoint_and_balanced() -> None:
    covariates, chosen = population(), alive(SET)
    duplicates = np.zeros(512, dtype=bool)
    duplicates[[6, 78, *chosen]] = True
    matched = match_controls(covariates, chosen, n_sets=99, seed=1, near_duplicates=duplicates)
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
    matched = match_controls(covariates, chosen, n_sets=50, seed=1)
    for name in COVARIATES:
        values = covariates[name].values.astype(float)
        of_set, of_controls = values[chosen], values[matched.sets.ravel()]
        spread = np.sqrt((of_set.var(ddof=1) + of_controls.var(ddof=1)) / 2)
        got = float(matched.balance["standardized_difference"].sel(covariate=name))
        assert got == pytest.approx((of_set.mean() - values[matched.sets].mean()) / spread, rel=1e-9)


def test_matching_beats_random_choice() -> None:
    covariates = population()
    energy = covariates["contribution_energy"].values
    strongest = np.argsort(np.where(np.isfinite(covariates["log_firing"].values), energy, -np.inf))[-60:-40]
    matched = match_controls(covariates, strongest, n_sets=60, seed=0)
    free = np.setdiff1d(np.flatnonzero(np.isfinite(covariates["log_firing"].values)), strongest)
    gap = energy[strongest].mean() - energy[free].mean()
    assert gap > 1
    assert abs(energy[strongest].mean() - energy[matched.sets].mean()) < 0.3 * gap


def test_draws_depend_on_the_seed_alone() -> None:
    covariates, chosen = population(), alive(SET)
    first, again, other = (match_controls(covariates, chosen, n_sets=30, seed=s).sets for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_fewer_sets_than_asked_are_flagged() -> None:
    covariates = population(40)
    matched = match_controls(covariates, (5,), n_sets=99, seed=0)
    assert len(matched.sets) <= 37
    assert any(flag.startswith("fewer_sets") for flag in matched.flags)


def test_controls_weaker_than_the_set_are_not_comparable_and_stronger_ones_are() -> None:
    covariates = population()
    rank = np.argsort(covariates["log_firing"].where(np.isfinite(covariates["log_firing"]), -9.0).values)
    strong, weak = rank[-8:], rank[64:72]
    firing = covariates["log_firing"].values
    matched = match_controls(covariates, strong, n_sets=20, seed=0)
    assert firing[strong].mean() > firing[matched.sets].mean()
    assert not matched.comparable
    assert any(flag.startswith("unbalanced:log_firing=+") for flag in matched.flags)
    below = match_controls(covariates, weak, n_sets=20, seed=0)
    assert float(below.balance["standardized_difference"].sel(covariate="log_firing")) < 0.25


def test_impossible_matches_name_the_covariate_and_the_distance() -> None:
    covariates = population()
    covariates["contribution_energy"].values[list(alive(SET))] += 50
    with pytest.raises(NotEstimableError, match=r"contribution_energy.* standard deviations away"):
        match_controls(covariates, alive(SET), n_sets=20, seed=0)
    other_bin = population()
    other_bin["mas_bin"].values[:] = 2
    other_bin["mas_bin"].values[list(alive(SET))] = 4
    with pytest.raises(NotEstimableError, match=r"mas_bin.*\[4\].*\[2\]"):
        match_controls(other_bin, alive(SET), n_sets=20, seed=0)
    with pytest.raises(NotEstimableError, match="never fire"):
        match_controls(population(), (16, 17), n_sets=20, seed=0)
    with pytest.raises(NotEstimableError, match="12 of 32 are left"):
        match_controls(population(32), [k for k in range(32) if k % 16][:18], n_sets=20, seed=0)


@pytest.mark.parametrize(
    ("features", "n_sets", "message"),
    [((), 10, "got 0"), ((1, 1), 10, "distinct"), ((512,), 10, "0 to 511"), ((1,), 0, "at least one control")],
)
def test_bad_sets_are_refused(features: Any, n_sets: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        match_controls(population(), features, n_sets=n_sets, seed=0)
    with pytest.raises(InputError, match="missing: mas_bin"):
        match_controls(population().drop_vars("mas_bin"), (1,), n_sets=1, seed=0)
