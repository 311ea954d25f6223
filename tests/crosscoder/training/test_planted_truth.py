"""A known dictionary in three models: what training recovers, whose it says each feature is, and what comes back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from rlgen_stats.schemas.study import CrosscoderSpec
from rlgen_stats.toolkit.crosscoder import (
    ArrayReader,
    Crosscoder,
    decoder_dataset,
    measure_health,
    scaling_sums,
    train_crosscoder,
    train_replicates,
)
from rlgen_stats.toolkit.statistics import (
    attribution,
    classify_features,
    latent_scaling,
    match_features,
    reappearance,
)
from tests.crosscoder.planted import crosscoder_spec
from tests.crosscoder.three_views import FREQUENCY, GAIN, KINDS, N_FEATURES, VIEWS, World, kind_of, three_views

RULES: dict[str, dict[str, Any]] = {
    "batchtopk": {},
    "l1": {"l1_coefficient": 0.3},
    "topk": {"k": 3},
    "jumprelu": {},
    "dfc": {"exclusive_features": (12, 12, 12)},
}
HOW = {"n_features": 96, "steps": 1500, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def truth() -> World:
    return three_views()


def joint(rows: np.ndarray) -> np.ndarray:
    """[view, feature, channel] as unit vectors [feature, view * channel]."""
    flat = rows.transpose(1, 0, 2).reshape(rows.shape[1], -1)
    return np.asarray(flat / np.linalg.norm(flat, axis=1, keepdims=True).clip(1e-9))


def best_matches(truth: World, crosscoder: Crosscoder, views: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """For each planted feature, the learned one of largest cosine over all views, and that cosine."""
    factor = np.array(GAIN)[views] * crosscoder.scale.numpy()
    cosine = joint(truth.decoder[views] * factor[:, None, None]) @ joint(crosscoder.decoder.numpy()).T
    return cosine.argmax(axis=1), cosine.max(axis=1)


def planted_of(truth: World, crosscoder: Crosscoder) -> np.ndarray:
    """The planted feature each learned one is closest to."""
    factor = np.array(GAIN) * crosscoder.scale.numpy()
    cosine = joint(truth.decoder * factor[:, None, None]) @ joint(crosscoder.decoder.numpy()).T
    return np.asarray(cosine.argmax(axis=0))


def classes(crosscoder: Crosscoder, data: np.ndarray, firing: np.ndarray) -> tuple[xr.Dataset, xr.Dataset]:
    """Classes and attribution of a crosscoder on data [token, view, channel], 40 tokens a prompt."""
    groups = np.arange(len(data)) // 40
    blocks = (
        (torch.from_numpy(data[start : start + 3000]).flatten(1), groups[start : start + 3000])
        for start in range(0, len(data), 3000)
    )
    scaling = latent_scaling(scaling_sums(crosscoder, blocks, n_groups=int(groups.max()) + 1))
    table = attribution(decoder_dataset(crosscoder, firing=firing))
    return classify_features(table["mas_l1"], scaling, tau=0.7, min_active=10), table


def spec_of(rule: str) -> CrosscoderSpec:
    return crosscoder_spec(name="three", views=VIEWS, sparsity=rule, **(HOW | RULES[rule]))


@pytest.fixture(scope="module")
def reader(truth: World) -> ArrayReader:
    return ArrayReader(truth.data, batch_size=512, seed=1)


@pytest.fixture(scope="module")
def replicates(reader: ArrayReader) -> list[Crosscoder]:
    """Three l1 dictionaries of other initial weights."""
    return train_replicates(reader, spec_of("l1"), views=VIEWS, seeds=[1, 2, 3])


def check_features_and_owners(truth: World, reader: ArrayReader, crosscoder: Crosscoder) -> None:
    found, cosine = best_matches(truth, crosscoder, [0, 1, 2])
    assert cosine.mean() > 0.85
    table, _ = classes(crosscoder, truth.data, measure_health(crosscoder, reader).firing)
    says = np.where(table.feature_class == "specific", table.specific_to, table.feature_class)[found]
    recovered = cosine > 0.9
    assert recovered.mean() > 0.6
    right = says == [kind_of(k) for k in range(N_FEATURES)]
    assert right[recovered].mean() > 0.85


@pytest.mark.slow
def test_planted_features_and_their_owners_are_found_from_any_initial_weights(
    truth: World, reader: ArrayReader, replicates: list[Crosscoder]
) -> None:
    assert (FREQUENCY > 1e-3).all()
    for crosscoder in replicates:
        check_features_and_owners(truth, reader, crosscoder)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "l1"])
def test_planted_features_and_their_owners_are_found(truth: World, reader: ArrayReader, rule: str) -> None:
    crosscoder = train_crosscoder(reader, spec_of(rule), views=VIEWS, seed=1)
    check_features_and_owners(truth, reader, crosscoder)
    if rule == "dfc":
        for view, part in crosscoder.exclusive.items():
            closed = [at for other, at in zip(VIEWS, crosscoder.slots(), strict=True) if other != view]
            assert not any(crosscoder.decoder_matrix[part, at].any() for at in closed)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["l1", "batchtopk"])
def test_false_specifics_of_l1_are_removed_by_latent_scaling(rule: str) -> None:
    """Features at 45% strength in base are shared; the l1 penalty shrinks their base rows, batchtopk does not."""
    truth = three_views(weak=0.45)
    data, views = truth.data[:, [0, 2]], ("base@0", "rl@9")
    reader = ArrayReader(data, batch_size=512, seed=1)
    spec = crosscoder_spec(name="two", views=views, sparsity=rule, **(HOW | {"l1_coefficient": 1.4}))
    crosscoder = train_crosscoder(reader, spec, views=views, seed=1)
    found, cosine = best_matches(truth, crosscoder, [0, 2])
    weak = [k for k in range(len(KINDS[0][1]) // 2) if cosine[k] > 0.9]
    assert len(weak) >= 5
    table, norms = classes(crosscoder, data, measure_health(crosscoder, reader).firing)
    naive = norms.nrn_l1.values[found[weak]] > 0.7
    says = table.feature_class.values[found[weak]]
    if rule == "l1":
        assert naive.mean() > 0.5  # the norm share alone calls most of them RL-specific
        assert (says[naive] == "contradicted").mean() >= 0.9
    else:
        assert naive.mean() <= 0.1
        assert (says == "shared").mean() >= 0.9
    only = [k for k in KINDS[3][1] if cosine[k] > 0.95]
    assert len(only) >= 3
    assert (table.feature_class.values[found[only]] == "specific").mean() > 0.5


@pytest.mark.slow
def test_other_seeds_bring_the_planted_features_back(
    truth: World, reader: ArrayReader, replicates: list[Crosscoder]
) -> None:
    first, *others = replicates
    sets = [decoder_dataset(c, firing=measure_health(c, reader).firing) for c in replicates]
    prompts = np.arange(len(truth.data)) // 40
    activity = []
    for crosscoder in replicates:
        f = crosscoder.readout(torch.from_numpy(truth.data[:, 2])).numpy()
        sums = np.zeros((prompts.max() + 1, f.shape[1]))
        np.add.at(sums, prompts, f)
        activity.append(xr.DataArray(sums / 40, dims=("prompt", "feature")))
    matches = {
        name: match_features(sets[0], other, activations_a=activity[0], activations_b=own, seed=1)
        for name, other, own in zip(("two", "three"), sets[1:], activity[1:], strict=True)
    }
    table = reappearance(matches)
    found, cosine = best_matches(truth, first, [0, 1, 2])
    real = found[cosine > 0.98]
    assert (table.best_similarity.values[:, real] > 0.95).mean() > 0.9
    assert (table.reappearance.values[real] == 1).mean() > 0.5  # l1 learns some twice, and a partner has one match
    assert np.nanmedian(table.correlation.values[:, real]) > 0.85
    for name, other in zip(("two", "three"), others, strict=True):
        partner = table.match.sel(replicate=name).values[found]
        matched = table.matched.sel(replicate=name).values[found]
        same = planted_of(truth, other)[partner] == np.arange(N_FEATURES)
        assert same[matched].mean() > 0.9
    assert (table.subspace_overlap > 0.9).all()
