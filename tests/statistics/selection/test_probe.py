"""The probe: scikit-learn written out, planted signal, random worlds, order, matching, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics import SelectionRule, SelectionTests, select_features
from rlgen_stats.toolkit.statistics.selection.linear_probe import fit_probe, matched_sets, nested_folds
from rlgen_stats.toolkit.statistics.selection.probe import correctness_probe

FEW = {"n_random": 19, "n_outer": 3, "n_inner": 2, "seed": 4}


@pytest.fixture
def chosen(gain_world):
    """Features 10 to 14 correlate with correctness; the paper's rule keeps them, and a probe should find them."""
    features, outcomes = gain_world()
    features["mean"][1, :, :10] = features["mean"][0, :, :10]
    tests = SelectionTests(n_resamples=99, n_bootstrap=1)
    selection = select_features(features, outcomes, target="rl@10", controls=["noise"], tests=tests, seed=2)
    inside = np.isin(np.arange(30), np.arange(10, 15))
    return features, outcomes, selection.assign(paper_selected=("feature", inside))


def test_scores_equal_scikit_learn_written_out(chosen) -> None:
    features, outcomes, selection = chosen
    out = correctness_probe(features, outcomes, selection, members="paper", **FEW)
    prompts = np.flatnonzero((features.split == "verification") & (features.task != "noise"))
    y = outcomes.greedy_correct.values[1, prompts]
    members = selection.feature.values[np.argsort(selection["rank"].values)]
    members = members[np.isin(members, np.arange(10, 15))]
    x = features["mean"].values[1][np.ix_(prompts, members)]
    auc, loss, strengths = [], np.empty(len(prompts)), (0.01, 0.1, 1.0)
    for train, score, inner in nested_folds(y, prompts, 3, 2, seed=_fold_seed()):
        losses = []
        for c in strengths:
            total = []
            for a, b in inner:
                z = _standard(x[train][a])
                model = LogisticRegression(C=c).fit(z(x[train][a]), y[train][a])
                p = model.predict_proba(z(x[train][b]))[:, 1]
                total.append(-np.mean(np.log(np.where(y[train][b] == 1, p, 1 - p))))
            losses.append(np.mean(total))
        z = _standard(x[train])
        model = LogisticRegression(C=strengths[int(np.argmin(losses))]).fit(z(x[train]), y[train])
        p = model.predict_proba(z(x[score]))[:, 1]
        auc.append(roc_auc_score(y[score], p))
        loss[score] = -np.log(np.where(y[score] == 1, p, 1 - p))
    assert float(out.auc) == pytest.approx(np.mean(auc), abs=1e-4)
    assert float(out.log_loss) == pytest.approx(loss.mean(), abs=1e-4)
    assert (out.attrs["n"], out.attrs["n_right"]) == (len(y), y.sum())


@pytest.mark.parametrize(("strength", "signal", "seed"), [(0.01, 0.5, 1), (0.1, 0.5, 0), (1.0, 4.0, 0)])
def test_the_inner_folds_choose_one_of_three_penalties(strength: float, signal: float, seed: int) -> None:
    """Worlds in which both outer folds choose the same: the stronger the signal, the weaker the penalty."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(200, 3))
    y = (random.random(200) < 1 / (1 + np.exp(-signal * x[:, 0]))).astype(int)
    folds = nested_folds(y, np.arange(200), 2, 2, seed=0)
    by_hand = [LogisticRegression(C=strength).fit(_standard(x[a])(x[a]), y[a]).coef_[0] for a, _, _ in folds]
    assert fit_probe(x, y, folds).coefficient == pytest.approx(np.mean(by_hand, axis=0), abs=1e-5)


def _standard(x):
    return lambda values: (values - x.mean(axis=0)) / x.std(axis=0)


def _fold_seed() -> int:
    return derive_seed(4, "probe", "folds") % 2**32


@pytest.mark.slow
def test_features_that_correlate_with_correctness_beat_random_sets_and_noise_does_not(chosen) -> None:
    features, outcomes, selection = chosen
    probe = correctness_probe(features, outcomes, selection, members="paper", **FEW)
    assert float(probe.p_auc) == float(probe.p_log_loss) == 1 / 20
    assert float(probe.auc) > 0.7
    assert float(probe.log_loss) < float(probe.log_loss_chance) < 0.7
    assert np.all(probe.coefficient > 0)
    noise = selection.assign(paper_selected=("feature", np.isin(np.arange(30), [20, 24, 28])))
    probe = correctness_probe(features, outcomes, noise, members="paper", **FEW)
    assert float(probe.auc) < 0.6
    assert float(probe.log_loss) > float(probe.log_loss_chance) - 0.01
    assert probe.attrs["role"] == "descriptive"


@pytest.mark.slow
def test_answers_unrelated_to_features_are_not_predicted(gain_world) -> None:
    """Ranks of a null set among random ones are uniform: the mean of 8 is near a half."""
    features, outcomes = gain_world(n=400, planted=False)
    selection = select_features(
        features,
        outcomes,
        target="rl@10",
        controls=["noise"],
        rule=SelectionRule(kind="paper"),
        tests=SelectionTests(n_resamples=9, n_bootstrap=1),
        stability=None,
    )
    ranks = []
    for k in range(8):
        inside = np.isin(np.arange(30), [2 * k, 2 * k + 1])
        p = correctness_probe(
            features,
            outcomes,
            selection.assign(paper_selected=("feature", inside)),
            members="paper",
            n_random=9,
            n_outer=2,
            n_inner=2,
        )
        ranks.append(float(p.p_auc))
        assert float(p.auc) < 0.65
    assert np.mean(ranks) == pytest.approx(0.55, abs=3 * 0.29 / np.sqrt(8))


@pytest.mark.slow
def test_neither_chunks_nor_order_nor_processes_matter(chosen) -> None:
    features, outcomes, selection = chosen
    few = FEW | {"n_random": 5}
    whole = correctness_probe(features, outcomes, selection, **few)
    labelled = features.assign_coords(feature=np.arange(30))
    shuffled = labelled.isel(feature=np.random.default_rng(0).permutation(30), prompt=slice(None, None, -1))
    chunked = shuffled.chunk({"feature": 7}).assign_coords(shuffled.coords)
    xr.testing.assert_allclose(correctness_probe(chunked, outcomes, selection, **few), whole, rtol=1e-9)
    xr.testing.assert_identical(correctness_probe(features, outcomes, selection, n_jobs=2, **few), whole)


def test_random_sets_fire_as_often_and_leave_out_the_selected() -> None:
    rates = np.random.default_rng(5).integers(0, 400, 3000)
    selected = np.flatnonzero(rates > 380)[:20]
    sets, worst = matched_sets(rates, selected, np.arange(3000), 30, seed=6)
    assert sets[0] is selected
    assert worst <= 0.12
    for drawn in sets[1:]:
        assert len(set(drawn)) == 20
        assert not set(drawn) & set(selected)
        assert rates[drawn].min() > 300
    assert len({tuple(drawn) for drawn in sets}) == 31
    reversed_sets, _ = matched_sets(rates[::-1], 2999 - selected, np.arange(3000)[::-1], 30, seed=6)
    np.testing.assert_array_equal(np.sort(2999 - reversed_sets[7]), np.sort(sets[7]))


def test_candidates_fire_on_ten_prompts_and_are_twice_as_many_as_the_selected() -> None:
    counts, selected, ranks = np.array([50, 50, 9, 9, 10, 11, 12, 13]), np.array([0, 1]), np.arange(8)
    sets, worst = matched_sets(counts, selected, ranks, 200, seed=0)
    assert set(np.concatenate(sets[1:])) == {4, 5, 6, 7}, "9 prompts are too few, 10 enough"
    assert worst == 1.0, "the last of four candidates stands in for a feature beyond all of them: 4 ranks of 4"
    with pytest.raises(InputError, match=r"need at least 4 other features that fire on 10 .*, got 3"):
        matched_sets(np.where(counts == 10, 9, counts), selected, ranks, 9, seed=0)


@pytest.mark.parametrize("answer", [0, 1])
def test_folds_need_two_units_of_either_answer_each(answer: int) -> None:
    right = np.where(np.arange(40) < 8, answer, 1 - answer)
    assert len(nested_folds(right, np.arange(40), 4, 2, seed=1)) == 4
    right[0] = 1 - answer
    with pytest.raises(RefusedError, match=r"4 outer folds need at least 8 units with right and with wrong .* got 7"):
        nested_folds(right, np.arange(40), 4, 2, seed=1)


def test_whole_clusters_stay_in_one_fold(gain_world) -> None:
    groups, right = np.repeat(np.arange(60), 4), np.tile([0, 1, 1, 0], 60)
    for train, score, inner in nested_folds(right, groups, 4, 3, seed=1):
        assert not set(groups[train]) & set(groups[score])
        for a, b in inner:
            assert not set(groups[train][a]) & set(groups[train][b])


def test_refusals(chosen, gain_world) -> None:
    features, outcomes, selection = chosen
    with pytest.raises(InputError, match="n_outer >= 2"):
        correctness_probe(features, outcomes, selection, n_outer=1)
    with pytest.raises(InputError, match="task 'history' is not in the selection"):
        correctness_probe(features, outcomes, selection, tasks=["history"])
    with pytest.raises(InputError, match="model 'rl@99' is not in the data"):
        correctness_probe(features, outcomes, selection, model="rl@99")
    same = outcomes.assign(greedy_correct=outcomes.greedy_correct * 0)
    with pytest.raises(RefusedError, match="answers all of the 300 verification prompts alike"):
        correctness_probe(features, same, selection)
    with pytest.raises(RefusedError, match="40 outer folds need at least 80 units"):
        correctness_probe(features, outcomes, selection, tasks=["quiz"], n_outer=40)
    everything = selection.assign(paper_selected=("feature", np.arange(30) < 15))
    with pytest.raises(InputError, match="random sets of 15 need at least 30 other features"):
        correctness_probe(features, outcomes, everything, members="paper")
