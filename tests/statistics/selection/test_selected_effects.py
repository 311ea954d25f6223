"""Effects of selected features: loops, what depends on which half, order, laziness, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.toolkit.statistics import SelectionTests, select_features
from rlgen_stats.toolkit.statistics.selection.selected_effects import selected_effects

SELECTION_SCORES = (
    "score",
    "kept",
    "p_flip",
    "p_guard",
    "contrast",
    "contrast_p",
    "excess",
    "excess_p",
    "specific_p",
    "paper_selected",
    "p_value",
    "q_value",
    "rank",
    "stability",
    "stable",
    "score_correlations",
)
"""What is computed of selection prompts alone."""
DECISIONS = ("tier", "specific_tier", "selected")
"""What both halves decide."""
COUNTS = (
    "n_selected_prompts",
    "n_gain",
    "n_loss",
    "n_kept",
    "estimable",
    "contrast_estimable",
    "excess_estimable",
    "guard",
    "used",
    "role",
    "flag",
    "verification_estimable",
    "verification_guard",
    "verification_excess_estimable",
)
"""Counts, labels and reasons: no statement about a feature's size."""


@pytest.fixture
def chosen(gain_world):
    features, outcomes = gain_world()
    options = {
        "target": "rl@10",
        "controls": ["noise"],
        "tests": SelectionTests(n_resamples=199, n_bootstrap=99),
        "seed": 2,
    }
    return features, outcomes, select_features(features, outcomes, **options)


def test_numbers_against_loops(chosen) -> None:
    features, _, selection = chosen
    out = selected_effects(features, selection)
    assert out.feature.values.tolist() == selection.feature.values[np.argsort(selection["rank"].values)][:5].tolist()
    verification = features.split.values == "verification"
    d = (features["mean"][1] - features["mean"][0]).values
    fires = (features["firing"][1] - features["firing"][0]).values
    for k in out.feature.values:
        got = out.sel(feature=k, model="rl@10")
        for index, part in ((verification & (features.task.values != "noise"), got), (verification, None)):
            if part is not None:
                assert float(part.effect) == pytest.approx(d[index, k].mean())
                assert float(part.d_z) == pytest.approx(d[index, k].mean() / d[index, k].std(ddof=1))
                assert float(part.firing_change) == pytest.approx(100 * fires[index, k].mean())
                assert float(part.effect_low) < 0.6 < float(part.effect_high)
                assert int(part.n) == index.sum()
        for task in selection.task.values:
            index = verification & (features.task.values == task)
            assert float(got.task_effect.sel(task=task)) == pytest.approx(d[index, k].mean())
            assert int(got.n_task.sel(task=task)) == index.sum()
    assert out.attrs["conditioned"].startswith("these features also passed a test")
    both = selected_effects(features, selection, members="candidate")
    assert both.attrs["conditioned"].startswith("verification prompts took no part")
    assert both.sizes["feature"] == (selection.tier != "REJECTED").sum()


def test_every_variable_of_a_selection_comes_from_the_half_it_says(chosen, gain_world) -> None:
    """Turning the activations of one half into others must leave alone what is said to come from the other half."""
    features, outcomes, first = chosen
    options = {
        "target": "rl@10",
        "controls": ["noise"],
        "tests": SelectionTests(n_resamples=199, n_bootstrap=99),
        "seed": 2,
    }
    noise = gain_world(seed=9, planted=False)[0]
    changed = {}
    for split in ("selection", "verification"):
        inside = features.split == split
        mixed = features.assign({name: features[name].where(~inside, noise[name]) for name in ("mean", "firing")})
        second = select_features(mixed, outcomes, **options)
        changed[split] = {name for name in first.data_vars if not first[name].equals(second[name])}
    verification = {str(name) for name in first.data_vars if str(name).startswith("verification_")} - set(COUNTS)
    assert set(map(str, first.data_vars)) == verification | {*SELECTION_SCORES, *DECISIONS, *COUNTS}
    assert not changed["verification"] & {*SELECTION_SCORES, *COUNTS}
    # who is confirmed depends on who was a candidate; sizes of effects do not depend on the selection part at all
    assert not changed["selection"] & {
        "verification_effect",
        "verification_low",
        "verification_high",
        "verification_score",
        "verification_task_effect",
    }
    assert {"score", "p_value", "tier"} <= changed["selection"]
    assert {"verification_effect", "tier"} <= changed["verification"]


def test_effects_do_not_see_selection_prompts(chosen) -> None:
    features, _, selection = chosen
    poisoned = features.copy(deep=True)
    poisoned["mean"][1, features.split.values == "selection"] += 50
    xr.testing.assert_identical(selected_effects(poisoned, selection), selected_effects(features, selection))


def test_neither_chunks_nor_order_matter_and_lazy_stays_lazy(chosen, no_compute) -> None:
    features, _, selection = chosen
    whole = selected_effects(features, selection)
    labelled = features.assign_coords(feature=np.arange(30))
    shuffled = labelled.isel(feature=np.random.default_rng(0).permutation(30), prompt=slice(None, None, -1))
    xr.testing.assert_allclose(selected_effects(shuffled, selection), whole, rtol=1e-12)
    chunked = features.chunk({"feature": 7}).assign_coords(features.coords).assign(n_tokens=features.n_tokens)
    with no_compute():
        lazy = selected_effects(chunked, selection)
    assert lazy.effect.chunks is not None
    xr.testing.assert_allclose(lazy.compute(), whole, rtol=1e-12)


def test_clusters_of_the_selection_are_the_units(gain_world) -> None:
    features, outcomes = gain_world(n=1600, per_cluster=8)
    tests = SelectionTests(n_resamples=99, n_bootstrap=1)
    selection = select_features(features, outcomes, target="rl@10", controls=["noise"], clusters="cluster", tests=tests)
    out = selected_effects(features, selection)
    assert out.attrs["unit"] == "cluster"
    verification = (features.split.values == "verification") & (features.task.values != "noise")
    names, codes = np.unique(features.cluster.values[verification], return_inverse=True)
    assert int(out.n[0]) == len(names)
    d = (features["mean"][1] - features["mean"][0]).values[verification][:, out.feature.values]
    means = np.array([d[codes == c].mean(axis=0) for c in range(len(names))])
    np.testing.assert_allclose(out.d_z.values[0], means.mean(axis=0) / means.std(axis=0, ddof=1))


def test_refusals(chosen, gain_world) -> None:
    features, _, selection = chosen
    for split in ("selection", "all"):
        with pytest.raises(RefusedError, match=f"split='{split}' would report effects on the prompts that chose"):
            selected_effects(features, selection, split=split)
    moved = features.assign_coords(split=("prompt", features.split.values[::-1]))
    with pytest.raises(RefusedError, match="split_hash differs"):
        selected_effects(moved, selection)
    with pytest.raises(RefusedError, match="readout 'own' and 'swap' cannot be combined"):
        selected_effects(features.assign_attrs(readout="own"), selection)
    with pytest.raises(RefusedError, match="no selected feature to describe"):
        selected_effects(features, selection.assign(selected=selection.selected & False))
    with pytest.raises(InputError, match="members one of"):
        selected_effects(features, selection, members="all")
    with pytest.raises(InputError, match="result of select_features"):
        selected_effects(features, selection.drop_vars("selected"))
    with pytest.raises(InputError, match="feature 3 of the selection is not in the features"):
        selected_effects(features.assign_coords(feature=np.arange(30)).drop_sel(feature=3), selection)
    with pytest.raises(InputError, match="at least one model beside the reference"):
        selected_effects(features, selection, models=["base@0"])
    with pytest.raises(InputError, match="0 < alpha < 1"):
        selected_effects(features, selection, alpha=0)
