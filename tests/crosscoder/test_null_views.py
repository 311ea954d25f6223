"""Crosscoders of base with itself that can call a feature specific: halves of the prompts, noise of an arm's size."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.null_views import BASE_VIEWS, floor_name, is_reserved, noise_model, noise_source
from rlgen_stats.schemas.study import CrosscoderSpec, StudySpec
from rlgen_stats.stores import StudyFolder, open_activations
from rlgen_stats.stores.study_models import find_model, resolve_view
from rlgen_stats.toolkit.crosscoder import (
    ArrayReader,
    decoder_dataset,
    load_crosscoder,
    train_crosscoder,
    train_crosscoders,
)
from rlgen_stats.toolkit.crosscoder.data.halves import HalvesReader, halves_weight
from rlgen_stats.toolkit.crosscoder.data.paired import measure_views
from rlgen_stats.toolkit.crosscoder.model import sparse as sparse_module
from rlgen_stats.toolkit.crosscoder.training import stage as stage_module
from rlgen_stats.toolkit.crosscoder.training.ranks import Ranks
from rlgen_stats.toolkit.crosscoder.training.train import TrainingRun, compute_gradients, start_run
from rlgen_stats.toolkit.statistics import attribution
from tests.crosscoder.planted import PROVENANCE, crosscoder_spec, planted, study_spec

HALVES = ("base@0", "base.halves@0")
AGAIN = ("base@0", "base.repeat@0")
Study = tuple[StudySpec, StudyFolder]


# -- names ------------------------------------------------------------------------------------------------------------


def test_views_of_base_are_told_from_models(stored: Study) -> None:
    assert noise_source(noise_model("rl.2@80")) == "rl.2@80"
    assert [noise_source(model) for model in ("rl@80", *BASE_VIEWS.values())] == [None] * 4
    assert [floor_name(model) is None for model in ("base@0", "rl@80", *HALVES[1:], *AGAIN[1:], "rl.noise@80")] == [
        *(True, True),
        *(False, False, False),
    ]
    assert [is_reserved(run) for run in ("rl", "base", "base.repeat", "base.halves", "rl.noise")] == [
        False,
        *[True] * 4,
    ]
    assert [resolve_view(view, *stored) for view in ("base@halves", "rl@noise")] == ["base.halves@0", "rl.noise@4"]
    assert {find_model(model, *stored).path for model in ("base.halves@0", "rl.noise@4")} == {
        find_model("base@0", *stored).path
    }


# -- each view is trained on its own half -----------------------------------------------------------------------------


def gradients(run: TrainingRun, raw: np.ndarray) -> dict[str, torch.Tensor]:
    compute_gradients(run, torch.from_numpy(raw).flatten(1))
    return {name: weight.grad.clone() for name, weight in run.weights().items() if weight.grad is not None}


@pytest.mark.parametrize("share", [1.0, -1.0], ids=["sparse", "dense"])
@pytest.mark.parametrize("changes", [{"sparsity": "topk", "k": 3}, {"sparsity": "l1", "l1_coefficient": 0.0}])
def test_a_view_learns_from_its_half_as_if_there_were_no_other(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], share: float
) -> None:
    """The gradient of a view's decoder is that of its half alone, where no rule couples rows."""
    monkeypatch.setattr(sparse_module, "SPARSE_SHARE", share)
    data = np.repeat(planted(400).data[:, :1], 2, axis=1)
    first, second = data[:200], data[200:]
    moments = measure_views(ArrayReader(data, batch_size=400, seed=1))

    def start(views: tuple[str, str], batch_size: int) -> TrainingRun:
        spec = crosscoder_spec(views=views, batch_size=batch_size, **changes)
        device = torch.device("cpu")
        return start_run(spec, views, moments, seed=3, key="", folder=None, device=device, ranks=Ranks())

    halves = gradients(start(HALVES, 400), data)
    for part, view in ((first, 0), (second, 1)):
        alone = gradients(start(AGAIN, 200), part)
        for name, axis in (("decoder_matrix", 1), ("decoder_offset", 0)):
            here, there = (one[name].chunk(2, dim=axis)[view] for one in (halves, alone))
            assert there.norm() > 1e-3
            torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


def test_what_only_one_half_has_is_called_specific() -> None:
    """The floor that can fail does: features that fire in texts of one half are learned by one view alone."""
    data = np.repeat(planted().data[:, :1], 2, axis=1)
    rare = planted().code[:, 0] > 0
    halves = HalvesReader(*(ArrayReader(data[part], batch_size=128, seed=1) for part in (rare, ~rare)))
    assert halves.n_batches == int(rare.sum()) // 128
    assert halves.n_tokens == len(data)
    spec = crosscoder_spec(views=HALVES, batch_size=256, steps=300, n_features=30, sparsity="l1")
    crosscoder = train_crosscoder(halves, spec, views=HALVES, seed=1)
    directions = crosscoder.decoder.numpy() / np.linalg.norm(crosscoder.decoder.numpy(), axis=-1, keepdims=True)
    nearest = int(np.argmax(np.abs(directions[0] @ planted().decoder[0, 0])))
    firing = np.ones(30)
    nrn = attribution(decoder_dataset(crosscoder, firing)).nrn_l1.values
    assert nrn[nearest] < 0.05
    equal = train_crosscoder(
        ArrayReader(data, batch_size=256, seed=1), spec.model_copy(update={"views": AGAIN}), views=AGAIN, seed=1
    )
    np.testing.assert_allclose(attribution(decoder_dataset(equal, firing)).nrn_l1, 0.5, atol=1e-4)


def test_halves_are_of_two_views() -> None:
    assert halves_weight((1, 2), 3).square().tolist() == [
        pytest.approx(row) for row in ([2, 0, 0], [0, 2, 2], [0, 2, 2])
    ]
    with pytest.raises(InputError, match="halves of the prompts are for two views, got 3"):
        halves_weight((1, 1, 1), 4)


# -- in a study -------------------------------------------------------------------------------------------------------


def test_a_study_trains_its_floors(copied: Study) -> None:
    spec, folder = copied
    null = spec.crosscoders[1].model_dump(mode="json") | {"sparsity": "batchtopk", "steps": 60}
    main = spec.crosscoders[0].model_dump(mode="json") | {"steps": 5, "replicates": 1}
    floors = [null | {"name": name, "views": ["base@0", view]} for name, view in
              (("null", "base@repeat"), ("halves", "base@halves"), ("noise", "rl@noise"))]  # fmt: skip
    spec = study_spec(crosscoders=[main, *floors])
    train_crosscoders(spec, folder, provenance=PROVENANCE)
    spread = {}
    for name, view in (("null", "base.repeat@0"), ("halves", "base.halves@0"), ("noise", "rl.noise@4")):
        crosscoder = load_crosscoder(folder.crosscoder(name))
        assert crosscoder.views == ("base@0", view)
        spread[name] = float(np.nanstd(attribution(decoder_dataset(crosscoder)).log_ratio))
        record = json.loads((folder.crosscoder(name) / "health.json").read_text())
        assert record["views"] == ["base@0", view]
    assert spread["null"] < 1e-3, "zero by construction"
    assert spread["halves"] > 0.01
    assert spread["noise"] > 0.01


def test_no_readout_is_judged_on_a_floor_run(copied: Study) -> None:
    """Its features bear no claim, and it may move where a dictionary of the other models describes nothing."""
    spec, folder = copied
    aside = spec.runs[0].model_dump(mode="json") | {"name": "aside", "arm": "floor"}
    main = spec.crosscoders[0].model_dump(mode="json") | {"steps": 5, "replicates": 1}
    runs = [*(run.model_dump(mode="json") for run in spec.runs), aside]
    train_crosscoders(study_spec(runs=runs, crosscoders=[main]), folder, provenance=PROVENANCE)
    readout = json.loads((folder.crosscoder("main") / "health.json").read_text())["readout_models"]
    assert [one["model"] for one in readout["models"]] == ["base@0", "sft@2", "sft@4", "rl@2", "rl@4"]


@pytest.mark.parametrize(("views", "own"), [(["base@0", "rl@4"], True), (["base@0", "base@halves"], False)])
def test_a_study_trains_its_replicates_in_orders_of_their_own(
    views: list[str], own: bool, copied: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first has the reader's; halves of the prompts, told apart by their place in a batch, have one for all."""
    spec, folder = copied
    given: list[Any] = []

    def stop(*_: Any, orders: list[int | None], **__: Any) -> None:
        given.extend(orders)
        raise InterruptedError

    monkeypatch.setattr(stage_module, "train_replicates", stop)
    one = spec.crosscoders[1].model_dump(mode="json") | {"views": views, "replicates": 3}
    spec = spec.model_copy(update={"crosscoders": (CrosscoderSpec.model_validate(one),)})
    monkeypatch.setattr(StudySpec, "primary_crosscoder", study_spec().primary_crosscoder)
    with pytest.raises(InterruptedError):
        train_crosscoders(spec, folder, provenance=PROVENANCE)
    assert given[0] is None
    assert len(set(given)) == (3 if own else 1)


def test_halves_of_a_study_share_no_cluster_of_prompts(copied: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, folder = copied
    given: list[Any] = []

    def stop(data: Any, *_: Any, **__: Any) -> None:
        given.append(data)
        raise InterruptedError

    monkeypatch.setattr(stage_module, "train_replicates", stop)
    null = spec.crosscoders[1].model_dump(mode="json") | {"views": ["base@0", "base@halves"], "batch_size": 65}
    spec = spec.model_copy(update={"crosscoders": (CrosscoderSpec.model_validate(null),)})
    monkeypatch.setattr(StudySpec, "primary_crosscoder", study_spec().primary_crosscoder)
    with pytest.raises(InterruptedError):
        train_crosscoders(spec, folder, provenance=PROVENANCE)
    stored = open_activations(folder.activations, models=["base@0"]).isel(model=0).load()
    cluster_of: dict[bytes, set[str]] = {}
    for row, cluster in zip(stored.activation.values, stored.cluster.values, strict=True):
        cluster_of.setdefault(row.tobytes(), set()).add(str(cluster))
    halves: tuple[set[str], set[str]] = (set(), set())
    for batch in given[0].epoch(0):
        assert batch.shape == (65, 2, 16)
        np.testing.assert_array_equal(batch[:, 0], batch[:, 1])
        for half, rows in zip(halves, (batch[:32, 0], batch[32:, 0]), strict=True):
            known = [cluster_of[np.ascontiguousarray(row).tobytes()] for row in rows]
            half.update(*(clusters for clusters in known if len(clusters) == 1))
    assert not halves[0] & halves[1]
    assert {len(half) for half in halves} == {7, 8}, "of 15 clusters"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"views": ["base@0", "base@halves", "rl@final"]},
            r"'base@halves' is a floor .* expected views \[base@0, base@h",
        ),
        ({"views": ["base@0", "rl@noise"], "objective": "both"}, "'rl@noise' is a floor .* objective joint"),
        ({"views": ["sft@final", "base@halves"]}, "'base@halves' is a floor"),
        ({"views": ["base@0", "dpo@noise"]}, "'dpo@noise' is no model of this study; expected base@0, base@repeat, "),
        ({"views": ["base@0", "dpo@final"]}, "RUN@final / RUN@step / RUN@noise with RUN in"),
    ],
)
def test_floors_are_refused_where_they_are_none(changes: dict[str, Any], message: str) -> None:
    null = {"name": "null", "n_features": 8, "k": 2, "steps": 5}
    with pytest.raises(ValueError, match=message):
        study_spec(crosscoders=[study_spec().crosscoders[0].model_dump(mode="json"), null | changes])


def test_a_floor_of_noise_is_not_judged_by_its_fit() -> None:
    null = {"name": "null", "n_features": 8, "k": 2, "steps": 5}
    for view, accepted in (("base@halves", False), ("rl@noise", True)):
        spec = study_spec(
            crosscoders=[study_spec().crosscoders[0].model_dump(mode="json"), null | {"views": ["base@0", view]}]
        )
        assert spec.crosscoders[1].accept_unhealthy is accepted
