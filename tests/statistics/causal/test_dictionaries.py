"""Trials of several dictionaries judged together, on tables whose truth is known."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlgen_stats.schemas.layout import validate
from rlgen_stats.toolkit.statistics.causal.controls import MatchedControls
from rlgen_stats.toolkit.statistics.causal.criteria import combined_rank_p
from rlgen_stats.toolkit.statistics.causal.dictionaries import _balance, judge_together
from rlgen_stats.toolkit.statistics.causal.findings import Check, from_columns, holds, of_check
from rlgen_stats.toolkit.statistics.causal.outcome_table import OutcomeTable, paired_effect
from rlgen_stats.toolkit.statistics.causal.result_datasets import Declaration
from rlgen_stats.toolkit.statistics.kernels import bounded_interval
from tests.statistics.causal.test_result_datasets import controls, declared, outcomes
from tests.statistics.causal.worlds import RIGHT, SETTINGS, WRONG, causal, with_endings

FEATURES = {"features": [1, 2, 3]}


def together(*tables: OutcomeTable, **changes: Any) -> Any:
    fixed = declared(**changes)
    fixed = replace(fixed, attributes={**fixed.attributes, **FEATURES})
    return judge_together({i: ([outcomes(table)], fixed) for i, table in enumerate(tables, start=1)})


def weakened(table: OutcomeTable, lost: float, *, seed: int = 0) -> OutcomeTable:
    """The same trial where the set's arm differs from the unedited one on a share ``lost`` of the target prompts."""
    ending = table.ending.copy()
    ending[table.chosen] = ending[table.unedited]
    right = np.flatnonzero(table.target & (ending[table.chosen, :, 0] == RIGHT))
    ending[table.chosen, np.random.default_rng(seed).permutation(right)[: round(lost * len(right))], 0] = WRONG
    return with_endings(table, ending)


@pytest.mark.parametrize("n", [1, 3])
def test_dictionaries_without_any_effect_do_not_disagree(n: int) -> None:
    still = weakened(causal(fresh_noise=False), 0.0)
    result, _ = together(*[still] * n)
    assert float(row(result).sel(condition="set")["effect"]) == 0
    assert "v1_dictionaries" not in str(row(result)["reasons"].item())


def row(result: Any) -> Any:
    return result.sel(direction="disable")


def test_one_dictionary_alone_is_judged_as_ever() -> None:
    from rlgen_stats.toolkit.statistics.causal.result_datasets import judge_trial

    alone, _ = judge_trial([outcomes(causal())], declared())
    result, _ = together(causal())
    for name in ("verdict", "effect", "effect_low", "effect_high", "p_value", "v1", "v2", "v3", "v4", "v6", "rank_p"):
        expected, got = row(alone)[name].values, row(result)[name].values
        if got.dtype.kind == "f":
            np.testing.assert_allclose(got, expected, rtol=1e-9)
        else:
            np.testing.assert_array_equal(got, expected)


def test_three_dictionaries_with_the_cause_are_specific_and_their_interval_is_wider() -> None:
    tables = [weakened(causal(seed=0), lost, seed=i) for i, lost in enumerate((0.4, 0.5, 0.6))]
    tables = [replace(t, kl_to_base=causal(seed=0).kl_to_base, ending=causal_endings(t)) for t in tables]
    result, balance = together(*tables)
    validate(result, "intervention")
    validate(balance, "control_balance")
    each = row(result)["dictionary_effect"].values
    at_set = row(result).sel(condition="set")
    assert float(at_set["effect"]) == pytest.approx(each.mean())
    # worked by hand: the half-width of the clusters alone, and t with 2 degrees of freedom times the spread of three
    mean = np.mean([t.change(t.target)[0, :, t.chosen] for t in tables], axis=0)[:, None]
    _, low, high = bounded_interval(mean, np.arange(len(mean)), alpha=0.05)
    spread = 4.303 * each.std(ddof=1) / np.sqrt(3)
    for bound, alone in (("effect_low", low[0]), ("effect_high", high[0])):
        half, clusters_only = abs(float(at_set[bound]) - each.mean()), abs(alone - each.mean())
        assert clusters_only < half <= np.hypot(clusters_only, spread) * 1.001
        assert half > 0.95 * spread
    assert tables[0].n_dictionaries == 1


def causal_endings(table: OutcomeTable) -> Any:
    """Failures of the set's arm as base's own: silent."""
    ending = table.ending.copy()
    failed = table.target & (ending[table.chosen, :, 0] == WRONG)
    ending[table.chosen, failed, 0] = 2
    return ending


@pytest.mark.parametrize(("third", "holds"), [(0.3, True), (-0.01, False)])
def test_v1_needs_the_direction_in_every_dictionary(third: float, holds: bool) -> None:
    table = causal()
    if third > 0:
        other = weakened(table, third)
    else:  # the set's arm gains on a few prompts that the unedited model gets wrong
        other = weakened(table, 0.0)
        ending = other.ending.copy()
        wrong = np.flatnonzero(other.target & (ending[other.unedited, :, 0] != RIGHT))
        ending[other.chosen, wrong[:3], 0] = RIGHT
        other = with_endings(other, ending)
    result, _ = together(weakened(table, 0.4, seed=1), weakened(table, 0.4, seed=2), other)
    reasons = str(row(result)["reasons"].item())
    assert ("v1_dictionaries" in reasons) == (not holds)
    if not holds:
        assert not bool(row(result)["v1"])


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.85, 1.0])
def test_rank_p_values_of_dictionaries_are_combined_whatever_they_share(shared: float) -> None:
    """Each set is exchangeable with its random sets, but the effects of the three dictionaries' sets correlate."""
    draw, rejected = np.random.default_rng(0), 0
    for _ in range(2000):
        common = np.sqrt(shared) * draw.standard_normal()  # what the sets have in common and random sets have not
        effects = common + np.sqrt(1 - shared) * draw.standard_normal(3)
        random = draw.standard_normal((99, 3))
        rejected += combined_rank_p((1 + (random >= effects).sum(axis=0)) / 100) <= 0.05
    assert rejected <= 0.06 * 2000


def test_combined_rank_p_values_keep_to_their_ends() -> None:
    assert combined_rank_p([0.04]) == 0.04
    assert combined_rank_p([0.05, 0.05, 0.05]) == 0.05
    assert 0.05 < combined_rank_p([1.0, 0.02, 0.02]) < 1.0
    assert np.isnan(combined_rank_p([0.01, np.nan]))


V6_OF_EACH = [
    # what is left of the divergence in each dictionary, and whether V6 holds, is refuted, and the divergence grows
    ((0.3, 0.3, 0.3), (True, False, False)),
    ((0.3, 0.25, 0.35), (True, False, False)),
    ((0.88, 0.87, 0.05), (False, False, False)),  # one dictionary closes nearly all, the mean is not shown to
    ((1.5, 1.6, 1.4), (False, True, True)),
    ((1.5, 8.0, 40.0), (False, True, True)),  # they differ by factors, and each is shown
    ((0.95, 0.95, 6.0), (False, True, False)),  # all stay short of the tenth, one grows
    ((0.8, 0.8, 6.0), (False, False, False)),
]


@pytest.mark.parametrize(("left", "expected"), V6_OF_EACH)
def test_v6_is_about_dictionaries_and_not_about_one_of_them(
    left: tuple[float, ...], expected: tuple[bool, ...]
) -> None:
    result, _ = together(*(causal(kl={"set": one}) for one in left))
    findings = from_columns(row(result))
    divergence, away = (of_check(findings, check) for check in (Check.V6_KL, Check.V6_AWAY))
    assert divergence is not None
    assert away is not None
    assert (holds(findings, "v6"), "the divergence" in away.detail, away.high < -divergence.bound) == expected
    assert divergence.statistic == pytest.approx(1 - np.prod(left) ** (1 / 3), abs=0.05 * max(left))
    assert divergence.low < divergence.statistic < divergence.high


@pytest.mark.parametrize(
    ("n_away", "verdict"), [(0, "CAUSAL_SPECIFIC"), (1, "INCONCLUSIVE"), (2, "INCONCLUSIVE"), (3, "DESTRUCTIVE")]
)
def test_v6_must_hold_in_every_dictionary(n_away: int, verdict: str) -> None:
    """In some dictionaries the edited model moves away from base; the mean still moves toward it, but for all three."""
    toward = causal()
    kl = toward.kl_to_base.copy()
    kl[toward.chosen] = 1.2  # more than the unedited model's 1.0
    away = replace(toward, kl_to_base=kl)
    result, _ = together(*[away] * n_away, *[toward] * (3 - n_away))
    assert row(result)["verdict"].item() == verdict
    assert f"v6_dictionaries: it holds in {3 - n_away} of 3" in str(row(result)["reasons"].item())


def test_no_verdict_is_specific_while_a_dictionary_lacks_a_set() -> None:
    fixed = declared()
    fixed = replace(fixed, attributes={**fixed.attributes, **FEATURES})
    empty = replace(fixed, controls={}, not_held="no_features: no feature selected")
    trials = {1: ([outcomes(causal())], fixed), 2: ((), empty)}
    result, balance = judge_together(trials)
    assert row(result)["verdict"].item() == "INCONCLUSIVE"
    assert str(row(result)["reasons"].item()).startswith("v5_dictionaries: ")
    assert "v5_sets: 1 of 2 dictionaries have a set: none in dictionary 2" in str(row(result)["reasons"].item())
    assert np.isfinite(balance["standardized_difference"].values).all()  # of the dictionary that has a set
    assert "One dictionary: not replicated" in str(row(result)["v5"].item())
    result, _ = judge_together({1: trials[1], 2: ((), empty), 3: trials[1]})
    everywhere = "2 of 2 dictionaries on their own (Holm): dictionary 1 -40.7, dictionary 3 -40.7"
    assert everywhere in str(row(result)["v5"].item())
    assert "One dictionary" not in str(row(result)["v5"].item())
    nothing, unknown = judge_together({1: ((), empty), 2: ((), empty)})
    assert set(nothing["reasons"].values) == {"no_features: no feature selected"}
    assert np.isnan(unknown["standardized_difference"].values).all()


def with_controls(fixed: Declaration, found: MatchedControls) -> Declaration:
    return replace(fixed, controls=dict.fromkeys(("disable", "amplify"), found))


@pytest.mark.parametrize(
    ("differences", "of_class", "usable"),
    [
        ((0.12, 0.07), (0.0, 0.0), True),
        ((0.19, 0.19, -0.5), (0.0, 0.0, 0.0), False),  # smaller controls in two are not undone by larger ones
        ((0.19, 0.10, -0.5), (0.0, 0.0, 0.0), True),
        ((-0.5, -0.5), (0.0, 0.0), True),
        ((0.0, 0.0), (0.24, -0.24), True),
        ((0.0, 0.0), (0.4, -0.4), False),
        ((0.21, 0.0), (0.0, 0.0), False),  # twice the most that one set alone may differ by
        ((np.nan, 0.0), (0.0, 0.0), False),
    ],
)
def test_what_falls_short_in_one_dictionary_is_not_made_up_in_another(
    differences: tuple[float, ...], of_class: tuple[float, ...], usable: bool
) -> None:
    balances = []
    for norm, other in zip(differences, of_class, strict=True):
        balance = controls().balance.copy(deep=True)
        balance["standardized_difference"][:] = [norm, 0.0, 0.0, 0.0, other]
        balances.append(balance.assign_attrs(n_sets=99))
    assert _balance(balances).attrs["comparable"] == int(usable)


@pytest.mark.parametrize(("other", "usable"), [(0.07, True), (0.13, False)])
def test_controls_are_compared_with_the_sets_over_all_dictionaries(other: float, usable: bool) -> None:
    """One dictionary's controls fall short by .12: what counts is the mean, as for the effects."""
    fixed = declared()
    fixed = replace(fixed, attributes={**fixed.attributes, **FEATURES})

    def short_by(difference: float) -> Any:
        known = controls()
        balance = known.balance.copy(deep=True)
        balance["standardized_difference"][:] = [difference, 0.0, 0.0, 0.0, 0.0]
        return with_controls(fixed, replace(known, balance=balance, comparable=difference <= 0.1))

    trials = {1: ([outcomes(causal())], short_by(0.12)), 2: ([outcomes(causal())], short_by(other))}
    result, balance = judge_together(trials)
    assert bool(row(result)["v2"]) == usable
    assert (row(result)["verdict"].item() == "CAUSAL_SPECIFIC") == usable
    mean = (0.12 + other) / 2
    assert float(balance["standardized_difference"][0]) == pytest.approx(mean)
    flag = f"unbalanced:edit_norm={mean:+.2f}"
    assert balance.attrs["flags"] == ([] if usable else [f"disable: {flag}", f"amplify: {flag}"])
    assert balance.attrs["comparable"] == int(usable)


def test_imbalances_of_opposite_sign_do_not_make_good_controls() -> None:
    fixed = declared()
    fixed = replace(fixed, attributes={**fixed.attributes, **FEATURES})

    def off_by(difference: float) -> Any:
        balance = controls().balance.copy(deep=True)
        balance["standardized_difference"][:] = [difference, 0.0, 0.0, 0.0, 0.0]
        return with_controls(fixed, replace(controls(), balance=balance, comparable=False))

    for size, usable in ((0.19, True), (0.21, False)):
        trials = {i: ([outcomes(causal())], off_by(sign * size)) for i, sign in ((1, 1), (2, -1))}
        assert bool(row(judge_together(trials)[0])["v2"]) == usable


@pytest.mark.slow
def test_an_interval_over_dictionaries_covers_the_mean_of_all_dictionaries() -> None:
    """Dictionaries differ by .1 about -.3: an interval over prompts alone would miss."""
    covered: Counter[str] = Counter()
    draw = np.random.default_rng(4)
    for _ in range(300):
        shifts = -0.3 + 0.1 * draw.standard_normal(3)
        latent = draw.random((100, 1))
        changes = -(latent < np.abs(shifts)).astype(np.float64).T[:, :, None]
        labels = np.array([f"p{i}" for i in range(100)])
        pooled = paired_effect(changes, labels, alpha=0.05, seed=0, n_resamples=99)
        alone = paired_effect(changes.mean(axis=0), labels, alpha=0.05, seed=0, n_resamples=99)
        for name, effect in (("pooled", pooled), ("alone", alone)):
            covered[name] += int(effect.low[0] <= -0.3 <= effect.high[0])
    assert covered["pooled"] >= 0.93 * 300
    assert covered["alone"] < 0.92 * 300
    assert SETTINGS.alpha == 0.05
