"""What the objectives paired and both train: features of one model, and the differences between models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.study import CrosscoderSpec, StudySpec
from rlgen_stats.toolkit.crosscoder import ArrayReader, Crosscoder, load_crosscoder, train_crosscoder, train_replicates
from rlgen_stats.toolkit.crosscoder.data.paired import ViewMoments, measure_views
from rlgen_stats.toolkit.crosscoder.training.objective import difference_weights
from rlgen_stats.toolkit.crosscoder.training.ranks import Ranks
from rlgen_stats.toolkit.crosscoder.training.train import start_run, train_step, training_key
from tests.crosscoder.planted import crosscoder_spec, study_spec

VIEWS = ("base@0", "sft@9", "rl@9")
WIDTH, N_FEATURES, CHANGED = 32, 40, 10


def changed_magnitudes(n_tokens: int = 8192) -> NDArray[np.float32]:
    """[token, view, channel]: one dictionary for all models; in sft and rl some features fire more or less strongly."""
    random, fixed = np.random.default_rng(0), np.random.default_rng(3)
    directions = fixed.normal(size=(N_FEATURES, WIDTH))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    fires = random.random((n_tokens, N_FEATURES)) < 0.06
    code = np.where(fires, random.uniform(1.0, 2.0, fires.shape), 0.0)
    factor = np.ones((3, N_FEATURES))
    factor[1, :CHANGED], factor[2, CHANGED : 2 * CHANGED] = 0.5, 1.6
    noise = 0.02 * random.normal(size=(n_tokens, 3, WIDTH))
    data = np.einsum("tk,vk,kc->tvc", code, factor, directions) + 0.3 * fixed.normal(size=WIDTH) + noise
    return np.asarray(data, dtype=np.float32)


def difference_explained(crosscoder: Crosscoder, data: NDArray[np.float32]) -> float:
    """Share of the variance of rl - base that the decoded features of the two models explain, read by swap."""
    base, _, rl = torch.from_numpy(data).unbind(1)
    with torch.no_grad():
        decoded = [
            crosscoder.reconstruct(crosscoder.readout(raw), view) for raw, view in ((rl, "rl@9"), (base, "base@0"))
        ]
    difference = rl - base
    error = difference - (decoded[0] - decoded[1])
    return 1 - float(error.square().sum() / (difference - difference.mean(0)).square().sum())


def spec_of(objective: str, **changes: Any) -> CrosscoderSpec:
    how: dict[str, Any] = {
        "views": VIEWS,
        "n_features": 64,
        "k": 3,
        "steps": 400,
        "batch_size": 256,
        "objective": objective,
    }
    return crosscoder_spec(**(how | changes))


@pytest.fixture(scope="module")
def data() -> NDArray[np.float32]:
    return changed_magnitudes()


@pytest.mark.slow
def test_differences_are_explained_by_readout_swap_only_where_it_was_trained(data: NDArray[np.float32]) -> None:
    explained = {
        objective: [
            difference_explained(crosscoder, data)
            for crosscoder in train_replicates(
                ArrayReader(data, batch_size=256, seed=1), spec_of(objective), views=VIEWS, seeds=[1, 2, 3]
            )
        ]
        for objective in ("joint", "both")
    }
    assert np.median(explained["joint"]) < 0.3
    assert np.median(explained["both"]) > 0.7


@pytest.mark.parametrize("objective", ["joint", "paired", "both"])
def test_the_curve_says_what_readout_and_joint_code_explain(data: NDArray[np.float32], objective: str) -> None:
    spec = spec_of(objective, sparsity="l1", difference_weight=3.0, l1_coefficient=0.0, batch_size=400)
    moments = measure_views(ArrayReader(data, batch_size=400, seed=1))
    run = start_run(
        spec, VIEWS, moments, seed=1, key="", folder=None, device=torch.device("cpu"), ranks=Ranks()
    )  # fmt: skip
    raw = torch.from_numpy(data[:400])
    first, second = {"joint": (400, 0), "both": (200, 200), "paired": (0, 400)}[objective]
    joint, paired = raw[:first], raw[first:]
    with torch.no_grad():
        c = run.crosscoder
        if second:
            c.share_decoder()
        code = c.encode(c.normalise(joint))
        joint_errors = [c.reconstruct(code, view, joint=True) - joint[:, i] for i, view in enumerate(VIEWS)]
        codes = [c.readout(paired[:, i]) for i in range(3)]
        errors = [c.reconstruct(f, view) - paired[:, i] for i, (f, view) in enumerate(zip(codes, VIEWS, strict=True))]
        scale = c.scale.tolist()
        l0 = float(torch.cat([code, *codes]).gt(0).sum() / (first + 3 * second))
    train_step(run, spec, raw.flatten(1), log=True)
    (point,) = run.curve
    squares = [float(error.square().sum()) for error in (joint_errors if first else errors)]
    n_tokens = first or second
    fve = [1 - square / n_tokens / variance for square, variance in zip(squares, moments.variance, strict=True)]
    assert list(point["fve"].values()) == pytest.approx(fve, rel=1e-4)
    assert point["l0"] == pytest.approx(l0)
    normalised = [
        float(e.square().sum()) * s**2 for es in (joint_errors, errors) for e, s in zip(es, scale, strict=True)
    ]
    differences = [float((error - errors[0]).square().sum()) for error in errors]
    base, *others = data.transpose(1, 0, 2).astype(float)
    weights = [0.0, *(3.0 * base.var(axis=0).sum() / np.square(one - base).sum(axis=1).mean() for one in others)]
    weighted = sum(weight * difference for weight, difference in zip(weights, differences, strict=True))
    assert point["loss"] == pytest.approx((sum(normalised) + scale[0] ** 2 * weighted) / 400, rel=1e-4)
    if objective == "joint":
        assert "dfve" not in point
        return
    between = paired - paired[:, :1]
    variance = (between - between.mean(dim=0)).square().sum(dim=(0, 2)).tolist()
    wanted = {view: 1 - differences[i] / variance[i] for i, view in enumerate(VIEWS) if i}
    assert point["dfve"] == pytest.approx(wanted, rel=1e-4)


def test_the_reference_is_base_wherever_it_stands(data: NDArray[np.float32]) -> None:
    turned = ArrayReader(data[:, ::-1], batch_size=256, seed=1)
    crosscoder = train_crosscoder(turned, spec_of("both", views=VIEWS[::-1], steps=3), views=VIEWS[::-1], seed=1)
    assert list(crosscoder.facts["last"]["dfve"]) == ["rl@9", "sft@9"]
    others = ("sft@9", "rl@9", "rl@4")
    crosscoder = train_crosscoder(turned, spec_of("both", views=others, steps=3), views=others, seed=1)
    assert list(crosscoder.facts["last"]["dfve"]) == ["rl@9", "rl@4"]


def test_paired_objectives_are_refused_where_views_have_no_common_encoder() -> None:
    random = np.random.default_rng(0)
    wide = [random.normal(size=(600, width)).astype(np.float32) for width in (8, 8, 12)]
    reader = ArrayReader(wide, batch_size=256, seed=0)
    with pytest.raises(InputError, match=r"objective 'both' puts .* the widths \[8, 8, 12\]; write objective: joint"):
        train_crosscoder(reader, spec_of("both"), views=VIEWS, seed=0)
    for objective in ("paired", "both"):
        with pytest.raises(
            ValueError, match=r"exclusive features of sparsity 'dfc' do not have; write objective: joint"
        ):
            spec_of(objective, sparsity="dfc", exclusive_features=(4, 4, 4))


# -- the settings -----------------------------------------------------------------------------------------------------


def test_a_study_trains_its_encoded_crosscoder_on_both_and_three_times() -> None:
    main, null = study_spec().crosscoders
    assert (main.objective, main.replicates, main.names) == ("both", 3, ("main", "main.2", "main.3"))
    assert (null.objective, null.replicates, null.names) == ("joint", 1, ("null",))
    again = StudySpec.model_validate(study_spec().model_dump(mode="json"))
    assert again.crosscoders == (main, null)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"objective": "paired", "replicates": 2}, ("paired", 2)),
        ({"weights": "theirs.pt"}, ("joint", 1)),
        ({"sparsity": "dfc", "exclusive_features": [4, 4, 4]}, ("joint", 3)),
    ],
)
def test_what_is_written_or_impossible_has_no_default(changes: dict[str, Any], wanted: tuple[str, int]) -> None:
    main = {"name": "main", "views": ["base@0", "sft@final", "rl@final"], "n_features": 48, "k": 6}
    first = {"name": "first", "views": ["base@0", "rl@final"]}
    spec = study_spec(crosscoders=[first, main | changes, main | {"name": "twin"}])
    found = [(c.objective, c.replicates) for c in spec.crosscoders]
    assert found == [("joint", 1), wanted, ("joint", 1)]


def test_a_crosscoder_alone_is_trained_jointly_and_once() -> None:
    spec = crosscoder_spec()
    assert (spec.objective, spec.replicates, spec.names) == (None, None, ("pair",))
    assert spec.resolved() == crosscoder_spec(objective="joint", replicates=1)


def test_weights_depend_on_the_objective_and_not_on_the_number_of_replicates() -> None:
    def key(**changes: Any) -> str:
        return training_key(crosscoder_spec(**changes), ("base@0", "sft@9"), seed=1, data_hash="data")

    assert key() == key(objective="joint") == key(objective="joint", replicates=3)
    assert len({key(objective="joint"), key(objective="both"), key(objective="both", difference_weight=0.0)}) == 3


@pytest.mark.parametrize("objective", ["joint", "paired", "both"])
def test_equal_features_decode_to_equal_activations_of_all_models(
    data: NDArray[np.float32], objective: str, tmp_path: Path
) -> None:
    """So that what changed between models is in their features, and nothing arises where nothing changed."""
    reader = ArrayReader(data, batch_size=256, seed=1)
    trained = train_crosscoder(reader, spec_of(objective, steps=30), views=VIEWS, seed=1, folder=tmp_path)
    for crosscoder in (trained, load_crosscoder(tmp_path)):
        of_base, _, of_rl = (crosscoder.feature_direction(view, joint=True) for view in VIEWS)
        if objective != "paired":
            assert (of_base - of_rl).norm() > 0.01 * of_base.norm(), "the joint code keeps a decoder for each view"
        f = crosscoder.readout(torch.from_numpy(data[:50, 0]))
        decoded = [crosscoder.reconstruct(f, view) for view in VIEWS]
        assert torch.equal(decoded[0], decoded[2]) == (objective != "joint")
        mean = torch.stack([crosscoder.feature_direction(view, joint=True) for view in VIEWS]).mean(dim=0)
        wanted = of_rl if objective == "joint" else mean
        torch.testing.assert_close(crosscoder.feature_direction("rl@9"), wanted)
        torch.testing.assert_close(decoded[2], f @ wanted + crosscoder.offset("rl@9"), rtol=1e-4, atol=1e-4)


def test_a_difference_weighs_by_its_own_size_and_rounding_does_not() -> None:
    """0.3 of all of base, whatever the size of the change; below 1e-5 of base's variance as if it were that."""
    moments = ViewMoments(
        mean=np.zeros(12),
        mean_norm=np.ones(4),
        variance=np.array([8.0, 5.0, 5.0, 5.0]),
        change=8 * np.array([0.0, 0.02, 1.1e-5, 0.9e-5]),
        widths=(3, 3, 3, 3),
        n_tokens=9,
    )
    spec = spec_of("both", difference_weight=0.3)
    weights = difference_weights(spec, ("base@0", "sft@9", "rl@9", "rl@4"), moments)
    assert weights.tolist() == pytest.approx([0.0, 0.3 / 0.02, 0.3 / 1.1e-5, 0.3 / 1e-5])


def test_the_size_of_a_change_is_its_mean_squared_length(data: NDArray[np.float32]) -> None:
    found = measure_views(ArrayReader(data, batch_size=256, seed=1), reference=2)
    wanted = [np.square(data[:, view].astype(float) - data[:, 2]).sum(axis=1).mean() for view in range(3)]
    assert found.change.tolist() == pytest.approx(wanted)
    views = [data[:, 0], data[:, 1, :8]]
    assert np.isnan(measure_views(ArrayReader(views, batch_size=256, seed=1)).change).tolist() == [False, True]


@pytest.mark.slow
def test_a_shift_of_the_mean_is_told_by_features_and_not_by_offsets(data: NDArray[np.float32]) -> None:
    """rl is base and one constant vector: with one offset for all models only features can say so."""
    shift = np.random.default_rng(5).normal(size=WIDTH).astype(np.float32)
    shift *= 2 / np.linalg.norm(shift)
    shifted = np.stack([data[:, 0], data[:, 0], data[:, 0] + shift], axis=1)
    reader, told = ArrayReader(shifted, batch_size=256, seed=1), {}
    for objective in ("joint", "both"):
        trained = train_replicates(reader, spec_of(objective), views=VIEWS, seeds=[1, 2, 3])
        told[objective] = []
        for crosscoder in trained:
            offset = torch.stack([crosscoder.offset(view) for view in VIEWS])
            assert torch.equal(offset[0], offset[2]) == (objective == "both")
            each = torch.stack([crosscoder.offset(view, joint=True) for view in VIEWS])
            assert (each[2] - each[0]).norm() > 0.1, "the joint code keeps an offset for each view"
            decoded = [
                crosscoder.reconstruct(crosscoder.readout(torch.from_numpy(shifted[:, i])), view).mean(dim=0)
                for i, view in ((2, "rl@9"), (0, "base@0"))
            ]
            by_features = (decoded[0] - decoded[1]) - (offset[2] - offset[0])
            told[objective].append(float(by_features @ torch.from_numpy(shift)) / 4)
    assert np.median(told["both"]) == pytest.approx(1, abs=0.15)
