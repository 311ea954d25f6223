"""Token detectors: shares written out, planted truth, level under the null, injections, and what cannot be said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from rlgen_stats.schemas.layout import validate
from rlgen_stats.toolkit.statistics import token_detectors
from rlgen_stats.toolkit.statistics.core.units import jackknife_groups
from rlgen_stats.toolkit.statistics.selection import token_detectors as module
from rlgen_stats.toolkit.statistics.selection.token_detectors import (
    DETECTS,
    Injections,
    TokenActivations,
    by_token_only,
    class_odds,
    explained_share,
    leading_tokens,
    like_tokens,
)

N_TEXTS, LENGTH, N_IDS = 200, 12, 15


def world(seed: int = 0) -> TokenActivations:
    """Features: 0 by token, 1 by position, 2 by both and as much noise, 3 by the text alone, 4 silent."""
    random = np.random.default_rng(seed)
    token_id = random.integers(0, N_IDS, N_TEXTS * LENGTH)
    position = np.tile(np.arange(LENGTH), N_TEXTS)
    unit = np.repeat(np.arange(N_TEXTS), LENGTH)
    by_token, by_position, of_text = (random.standard_normal(n) for n in (N_IDS, LENGTH, N_TEXTS))
    both = (by_token[token_id] + by_position[position]) / np.sqrt(by_token.var() + by_position.var())
    x = [by_token[token_id], by_position[position], both + random.standard_normal(len(both)), of_text[unit]]
    activation = np.maximum(np.stack([*x, np.full(len(both), -1.0)], axis=1), 0)
    activation[:, 2] = both + random.standard_normal(len(both))
    classes = {"low": token_id < 5, "first": position == 0}
    return TokenActivations(activation=activation, token_id=token_id, position=position, unit=unit, classes=classes)


def injections(own: list[float], matched: list[float], n: int = 60) -> Injections:
    """Texts of which the given shares fire on own and on matched tokens, feature by feature."""
    share = (np.arange(n) + 0.5)[:, None] / n
    fires = [(share < np.array(part)).astype(float) for part in (own, matched)]
    return Injections(own=fires[0], matched=fires[1], unit=np.arange(n), tokens=[["a", "b"]] * len(own))


def test_layout_and_planted_truth() -> None:
    out = validate(token_detectors(world(), injections([0] * 5, [0] * 5), [7, 8, 9, 10, 11]), "tokens")
    explained = out.explained.sel(explained_by=["token", "position", "both"]).values
    assert explained[:, 0] == pytest.approx([1, 0, 1], abs=0.02)
    assert explained[:, 1] == pytest.approx([0, 1, 1], abs=0.02)
    assert explained[2, 2] == pytest.approx(0.5, abs=0.05)
    assert explained[:, 3] == pytest.approx([0, 0, 0], abs=0.05)
    assert np.isnan(explained[:, 4]).all()
    assert out.detector.values.tolist() == [True, True, False, False, False]
    assert np.isnan(out.odds_ratio.values[:, 4]).all()


def test_a_share_is_the_out_of_fold_error_of_shrunken_means() -> None:
    """Tokens alone: the ridge fit of one indicator a token, solved as a dense linear system."""
    tokens = world()
    folds = jackknife_groups(tokens.unit, module.N_FOLDS, module.derive_seed(3, "tokens", "folds"))
    x, one_hot = tokens.activation[:, 2], np.eye(N_IDS)[tokens.token_id]
    error = spread = 0.0
    for fold in range(module.N_FOLDS):
        train, test = folds != fold, folds == fold
        design = one_hot[train] - one_hot[train].mean(axis=0)
        weights = np.linalg.solve(design.T @ design + module.PENALTY * np.eye(N_IDS), design.T @ x[train])
        predicted = x[train].mean() + (one_hot[test] - one_hot[train].mean(axis=0)) @ weights
        error += ((x[test] - predicted) ** 2).sum()
        spread += ((x[test] - x[train].mean()) ** 2).sum()
    got = explained_share(tokens, alpha=0.05, seed=3)
    assert got["explained"][0, 2] == pytest.approx(1 - error / spread, abs=1e-4)
    assert got["explained_low"][0, 2] < got["explained"][0, 2] < got["explained_high"][0, 2]


def test_rare_tokens_explain_nothing_that_they_were_not_fitted_to() -> None:
    """In the sample as many tokens as this explain a third of pure noise."""
    random = np.random.default_rng(2)
    tokens = replace(world(), token_id=random.integers(0, 800, N_TEXTS * LENGTH))
    noise = replace(tokens, activation=random.standard_normal((N_TEXTS * LENGTH, 1)))
    assert explained_share(noise, alpha=0.05, seed=0)["explained"].max() < 0.01


def test_odds_against_a_table_of_counts() -> None:
    tokens = world()
    out = class_odds(tokens, alpha=0.05, n_min=10, seed=0)
    for c, inside in enumerate(tokens.classes.values()):
        fires = tokens.activation[:, 0] > 0
        table = [[(inside & fires).sum(), (inside & ~fires).sum()], [(~inside & fires).sum(), (~inside & ~fires).sum()]]
        expected = stats.contingency.odds_ratio(np.array(table), kind="sample").statistic
        if np.isfinite(expected) and expected > 0:
            assert out["odds_ratio"][c, 0] == pytest.approx(expected, rel=0.02)
        assert out["odds_low"][c, 0] < out["odds_ratio"][c, 0] < out["odds_high"][c, 0]
    few = class_odds(replace(tokens, classes={"few": np.arange(len(tokens.unit)) < 9}), alpha=0.05, n_min=10, seed=0)
    assert np.isnan(few["odds_p"]).all()


def test_odds_keep_their_level_where_texts_fire_as_wholes() -> None:
    """A feature fires in whole texts and a class fills whole texts: tokens as units reject .3 at .05."""
    random = np.random.default_rng(4)
    tokens = world()
    unit = tokens.unit
    text_fires = random.random((N_TEXTS, 400)) < 0.4
    fires = np.where(random.random((len(unit), 400)) < 0.9, text_fires[unit], random.random((len(unit), 400)) < 0.4)
    inside = (random.random(N_TEXTS) < 0.4)[unit]
    null = replace(tokens, activation=fires.astype(float), classes={"class": inside})
    p = class_odds(null, alpha=0.05, n_min=10, seed=0)["odds_p"][0]
    assert np.mean(p <= 0.05) == pytest.approx(0.05, abs=0.04)
    table = np.array(
        [
            [(inside & f).sum(), (inside & ~f).sum(), (~inside & f).sum(), (~inside & ~f).sum()]
            for f in fires.T.astype(bool)
        ]
    )
    naive = [stats.chi2_contingency(row.reshape(2, 2), correction=False).pvalue for row in table]
    assert np.mean(np.array(naive) <= 0.05) > 0.3


def test_who_fires_alone_is_decided_by_the_difference_of_shares() -> None:
    just, short = DETECTS + 0.01, DETECTS - 0.01
    tokens = replace(world(), activation=np.random.default_rng(1).standard_normal((N_TEXTS * LENGTH, 5)))
    out = token_detectors(
        tokens, injections([just, short, 1.0, 1.0, 0.9], [0.0, 0.0, 1.0, 0.2, 0.5], n=100), [0, 1, 2, 3, 4]
    )
    assert out.fires_alone.values.tolist() == [True, False, False, True, False]
    assert (out.detector == out.fires_alone).all()
    assert out.injected.values == pytest.approx([just, short, 1, 1, 0.9])
    assert out.injected_matched.values == pytest.approx([0, 0, 1, 0.2, 0.5])
    assert out.leading.values.tolist() == ["a b"] * 5


def test_few_texts_do_not_make_a_detector() -> None:
    tokens = replace(world(), activation=np.random.default_rng(1).standard_normal((N_TEXTS * LENGTH, 1)))
    assert not token_detectors(tokens, injections([1.0], [0.0], n=4), [0]).fires_alone.item()
    assert token_detectors(tokens, injections([1.0], [0.0], n=6), [0]).fires_alone.item()
    one_unit = replace(injections([1.0], [0.0], n=6), unit=np.zeros(6, dtype=int))
    assert not token_detectors(tokens, one_unit, [0]).fires_alone.item()


def test_without_a_model_or_without_features_the_rest_is_said() -> None:
    out = validate(token_detectors(world(), None, list(range(5))), "tokens")
    assert np.isnan(out.injected).all()
    assert out.detector.values.tolist() == [True, True, False, False, False]
    nothing = replace(world(), activation=np.empty((N_TEXTS * LENGTH, 0)))
    assert validate(token_detectors(nothing, None, []), "tokens").sizes["feature"] == 0


def test_leading_tokens_are_frequent_and_fire_and_others_are_as_frequent() -> None:
    token_id = np.array([1] * 10 + [2] * 10 + [3] * 4 + [4] * 11 + [5] * 50 + [6] * 10)
    x = np.select([token_id == 3, token_id == 2, token_id == 1], [9.0, 3.0, 2.0], 0.0)[:, None]
    tokens = TokenActivations(
        activation=x, token_id=token_id, position=token_id * 0, unit=np.arange(len(token_id)), classes={}
    )
    assert leading_tokens(tokens, 3) == [[2, 1]]  # the third is seen four times only, the others never fire
    assert leading_tokens(tokens, 3, excluded=[2]) == [[1]]
    assert like_tokens(tokens, [2, 1], 2) == [[6, 4], [6, 4]]
    assert like_tokens(tokens, [2], 2, excluded=[6]) == [[1, 4]]


@pytest.mark.parametrize(
    ("explained_by_token", "fires_alone", "detector", "expected"),
    [(0.5, False, True, True), (0.499, False, True, False), (0.1, True, True, True), (0.9, False, False, False)],
)
def test_a_detector_that_needs_the_position_is_another_thing(
    explained_by_token: float, fires_alone: bool, detector: bool, expected: bool
) -> None:
    out = token_detectors(world(), None, list(range(5))).isel(feature=[0])
    low = out.explained_low.where(out.explained_by != "token", explained_by_token)
    out = out.assign(explained_low=low, fires_alone=("feature", [fires_alone]), detector=("feature", [detector]))
    assert by_token_only(out).tolist() == [expected]
