"""Raw activations beside features: scikit-learn written out, planted separations, leakage, what cannot be estimated."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from sklearn.metrics import roc_auc_score

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.schemas.layout import LAYOUTS
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics import model_separation
from rlgen_stats.toolkit.statistics.selection.linear_probe import nested_folds
from rlgen_stats.toolkit.statistics.selection.separation import PREDICTORS, _plans
from rlgen_stats.toolkit.statistics.selection.task_prompts import split_hash

MODELS = ["base@0", "rl@10"]
FEW = {"n_random": 3, "n_outer": 3, "n_inner": 2, "seed": 4}
CHANNELS = 6


@pytest.fixture
def world(make_features, make_outcomes):
    """Prompts whose features do not differ but for the first, and raw activations that a test plants."""

    def make(raw, *, n=400, per_cluster=4, selected=(0, 1), gap=0.0, right=None, seed=0):
        rng = np.random.default_rng(seed)
        labels = {"tasks": ["a", "b"], "domains": {"a": "in", "b": "out"}, "per_cluster": per_cluster}
        mean = 5 + rng.normal(0, 1, (2, n, 20))
        mean[1, :, 0] += gap
        features = make_features(mean, MODELS, **labels).assign_coords(feature=np.arange(20))
        # Splits are of whole clusters, as in a study.
        halves = np.array(["selection", "verification"])[np.arange(n) // per_cluster % 2]
        features = features.assign_coords(split=("prompt", halves))
        right = np.stack([np.zeros(n), np.ones(n)]) if right is None else right
        outcomes = make_outcomes(right, MODELS, **labels)
        activations = xr.Dataset(
            {"activation": (("model", "prompt", "channel"), raw(rng, n))},
            coords={name: features[name] for name in ("model", "run", "step", "arm", "prompt", "cluster")},
        )
        return activations, features, outcomes, selection_of(features, selected)

    return make


def selection_of(features, selected):
    chosen = np.isin(np.arange(20), selected)
    return xr.Dataset(
        {
            "selected": ("feature", chosen),
            "rank": ("feature", np.arange(1.0, 21)),
            "used": ("task", [True, True]),
        },
        coords={"feature": np.arange(20), "task": ["a", "b"]},
        attrs={"base": "base@0", "target": "rl@10", "unit": "cluster", "variable": "mean", "rule": "CONFIRMED"}
        | {"split_hash": split_hash(features)},
    )


def same(rng, n):
    """Two independent readings of the same distribution."""
    return rng.normal(0, 1, (2, n, CHANNELS))


def shifted(rng, n):
    """A shift of every prompt by one vector of norm 3, in noise that has no direction."""
    x = same(rng, n)
    x[1] += 3 * np.ones(CHANNELS) / np.sqrt(CHANNELS)
    return x


def hidden(rng, n):
    """A shift of a quiet channel, and one as large of a channel that differs far more between prompts."""
    x = same(rng, n) * np.array([100.0, 0.1, *[1.0] * (CHANNELS - 2)])
    x[1, :, :2] += 0.5
    return x


def auc(out, predictor, comparison="models"):
    return float(out.auc.sel(comparison=comparison, predictor=predictor))


@pytest.mark.slow
def test_without_a_difference_every_auc_is_a_half(world) -> None:
    """An AUC of 200 prompts had mean .4965 and standard deviation .041 over 400 worlds (seeds 0 to 399)."""
    few = FEW | {"n_random": 1}
    found = [model_separation(*world(same, seed=seed), **few) for seed in range(100, 110)]
    mean = np.mean([out.auc.sel(comparison="models").values for out in found], axis=0)
    np.testing.assert_allclose(mean, 0.5, atol=3 * 0.041 / np.sqrt(10))
    assert not any(bool(out.beats_raw.any()) for out in found)


def test_of_a_pure_shift_the_mean_difference_is_as_good_as_the_probe(world) -> None:
    """Two normal distributions three standard deviations apart: AUC = Phi(3 / sqrt 2) = .983."""
    out = model_separation(*world(shifted), **FEW)
    assert auc(out, "raw") == pytest.approx(0.983, abs=0.015)
    assert auc(out, "mean shift") == pytest.approx(auc(out, "raw"), abs=0.01)
    assert auc(out, "selected") < 0.6
    assert float(out.advantage_high.sel(comparison="models")) < 0


def test_a_shift_hidden_by_a_channel_that_varies_is_found_by_the_probe_alone(world) -> None:
    out = model_separation(*world(hidden), **FEW)
    assert auc(out, "raw") > 0.99
    assert auc(out, "mean shift") < 0.65
    assert float(out.pairs_right.sel(comparison="models", predictor="raw")) > 0.99


def test_features_that_do_better_than_raw_activations_are_said_to(world) -> None:
    out = model_separation(*world(same, gap=3.0), **FEW)
    assert auc(out, "selected") == pytest.approx(0.983, abs=0.015)
    assert auc(out, "random") < 0.6
    assert float(out.p_random.sel(comparison="models")) == 1 / 4
    assert bool(out.beats_raw.sel(comparison="models"))
    assert float(out.advantage_low.sel(comparison="models")) > 0.3


@pytest.mark.slow
def test_gains_are_told_from_losses_by_the_difference(world) -> None:
    rng = np.random.default_rng(1)
    gained = np.repeat(rng.random(100) < 0.5, 4)
    right = np.stack([~gained, gained]).astype(int)

    def raw(rng, n):
        x = same(rng, n)
        x[1, gained, 2] += 3 * np.sqrt(2)  # the difference of two readings has a standard deviation of sqrt 2
        return x

    out = model_separation(*world(raw, right=right), **FEW)
    assert auc(out, "raw", "gain or loss") == pytest.approx(0.983, abs=0.02)
    assert auc(out, "selected", "gain or loss") < 0.65
    few = model_separation(*world(raw, right=right), min_discordant=40, **FEW)
    assert str(few.estimable.sel(comparison="gain or loss").item()).startswith("no: ")
    assert np.isnan(auc(few, "raw", "gain or loss"))


def test_scores_equal_another_implementation(world) -> None:
    """Without folds written by us: for the projection every step is one line of numpy."""
    activations, features, outcomes, selection = world(hidden)
    out = model_separation(activations, features, outcomes, selection, **FEW)
    inside = np.flatnonzero(features.split.values == "verification")
    base, rl = activations.activation.values[:, inside]
    x, y = np.concatenate([base, rl]), np.repeat([0, 1], len(inside))
    cluster = np.tile(np.unique(features.cluster.values, return_inverse=True)[1][inside], 2)
    folds = nested_folds(y, cluster, 3, 2, derive_seed(4, "separation", "folds") % 2**32)
    expected = []
    for train, score, _ in folds:
        shift = x[train][y[train] == 1].mean(axis=0) - x[train][y[train] == 0].mean(axis=0)
        expected.append(roc_auc_score(y[score], x[score] @ shift))
    assert auc(out, "mean shift") == pytest.approx(np.mean(expected), rel=1e-9)


def test_both_rows_of_a_prompt_and_a_whole_cluster_are_in_one_fold(world) -> None:
    _, features, outcomes, selection = world(same)
    codes = np.unique(features.cluster.values, return_inverse=True)[1]
    present = features.split.values == "verification"
    for of_prompts in (codes, None):
        plan = _plans(features, outcomes, selection, present, MODELS, of_prompts, 6, 20)[0]
        prompt, n = np.tile(plan.prompts, 2), len(plan.prompts)
        assert plan.label.tolist() == [0] * n + [1] * n
        for train, score, inner in nested_folds(plan.label, plan.group, 3, 2, seed=1):
            assert not set(prompt[train]) & set(prompt[score])
            assert of_prompts is None or not set(codes[prompt[train]]) & set(codes[prompt[score]])
            assert all(not set(prompt[train][a]) & set(prompt[train][b]) for a, b in inner)


def test_shuffled_models_of_prompts_that_repeat_within_clusters_give_a_half(world) -> None:
    """Prompts of a cluster have nearly the same activations: a split through a cluster leaks its label (AUC near 1)."""

    def raw(rng, n):
        own = np.repeat(rng.normal(0, 1, (2, n // 4, 60)), 4, axis=1) + rng.normal(0, 0.01, (2, n, 60))
        swap = np.repeat(rng.random(n // 4) < 0.5, 4)  # which of the two readings is called the target's
        own[:, swap] = own[::-1, swap]
        return own

    found = [auc(model_separation(*world(raw, seed=seed, selected=()), **FEW), "raw") for seed in range(4)]
    assert np.mean(found) == pytest.approx(0.5, abs=0.1)


def test_neither_chunks_nor_order_matter(world) -> None:
    activations, features, outcomes, selection = world(hidden)
    whole = model_separation(activations, features, outcomes, selection, **FEW)
    mixed = np.random.default_rng(0).permutation(400)
    shuffled = features.isel(prompt=mixed, feature=slice(None, None, -1)).chunk({"feature": 7})
    shuffled = shuffled.assign_coords({name: c.compute() for name, c in shuffled.coords.items()})
    lazy = activations.isel(model=[1, 0], prompt=slice(None, None, -1)).chunk({"prompt": 33})
    again = model_separation(lazy, shuffled, outcomes, selection, **FEW)
    xr.testing.assert_allclose(again, whole, rtol=1e-6)


def test_what_cannot_be_estimated_is_said(world) -> None:
    activations, features, outcomes, selection = world(shifted)
    none = selection.assign(selected=("feature", np.zeros(20, dtype=bool)))
    out = model_separation(activations, features, outcomes, none, **FEW)
    assert np.isfinite(out.auc.sel(comparison="models").values).tolist() == [True, True, False, False]
    assert out.attrs["random_sets"] == "no: no feature is selected"
    assert not out.beats_raw.any()
    many = selection.assign(selected=("feature", np.arange(20) < 15))
    out = model_separation(activations, features, outcomes, many, **FEW)
    assert np.isfinite(out.auc.sel(comparison="models").values).tolist() == [True, True, True, False]
    assert "random sets of 15 need at least 30 other features" in out.attrs["random_sets"]
    few = model_separation(activations, features, outcomes, selection, **FEW | {"n_outer": 30})
    assert few.estimable.values.tolist()[:2] == ["no: 50 units, 60 needed"] * 2
    assert set(LAYOUTS["separation"].variables) - set(few) == {"share", "share_low", "share_high", "norm_ratio"}
    assert few.predictor.values.tolist() == list(PREDICTORS)


def test_refusals(world) -> None:
    activations, features, outcomes, selection = world(shifted)
    with pytest.raises(InputError, match="n_outer >= 2"):
        model_separation(activations, features, outcomes, selection, n_outer=1)
    with pytest.raises(InputError, match=r"1 prompt\(s\) of the features have no activation, e.g. 'p0399'"):
        model_separation(activations.isel(prompt=slice(0, 399)), features, outcomes, selection)
    with pytest.raises(InputError, match="model 'rl@10' is not in the data"):
        model_separation(activations.isel(model=[0]), features, outcomes, selection)
    with pytest.raises(RefusedError, match="split_hash differs"):
        model_separation(activations, features, outcomes, selection.assign_attrs(split_hash="other"))
