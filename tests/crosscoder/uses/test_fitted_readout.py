"""Readout fit against numpy's least squares, and what it is for: one model's features from a joint dictionary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import rlgen_stats.toolkit.crosscoder.training.stage as stage_module
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder, read_json
from rlgen_stats.toolkit.crosscoder import (
    ArrayReader,
    Crosscoder,
    fit_readout,
    load_crosscoder,
    measure_readout,
    train_crosscoders,
)
from tests.crosscoder.planted import PAIR, PROVENANCE, Planted


def copy_of(crosscoder: Crosscoder) -> Crosscoder:
    other = Crosscoder(PAIR, width=24, n_features=48, sparsity=crosscoder.sparsity, k=crosscoder.k)
    other.load_state_dict({name: v for name, v in crosscoder.state_dict().items() if not name.startswith("fit")})
    return other.requires_grad_(False).eval()


def by_lstsq(crosscoder: Crosscoder, data: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """All rows written out: [token x view, channel and 1] to the joint pre-activation, repeated for every view."""
    x = data.astype(np.float64)
    scaled = x * crosscoder.scale.double().numpy()[:, None]
    pre = np.einsum("tvc,vcf->tf", scaled, crosscoder.encoder.double().numpy())
    pre += crosscoder.encoder_bias.double().numpy()
    rows = np.concatenate([x[:, view] for view in range(x.shape[1])])
    rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    solution = np.linalg.lstsq(rows, np.concatenate([pre] * x.shape[1]), rcond=None)[0]
    return solution[:-1], solution[-1]


def test_the_map_is_the_least_squares_solution(either: Crosscoder, world: Planted) -> None:
    crosscoder, data = copy_of(either), world.data[:5000]
    assert fit_readout(crosscoder, ArrayReader(data, batch_size=100, seed=0)) is crosscoder
    weight, bias = by_lstsq(crosscoder, data)
    readout = crosscoder.readout_map(kind="fit")
    np.testing.assert_allclose(readout.weight.numpy(), weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(readout.bias.numpy(), bias, rtol=1e-5, atol=1e-6)
    chosen = torch.tensor([5, 0, 40])
    raw = torch.from_numpy(np.ascontiguousarray(data[:50, 1]))
    torch.testing.assert_close(
        crosscoder.readout(raw, kind="fit", features=chosen), crosscoder.readout(raw, kind="fit")[:, chosen]
    )


def test_a_direction_without_variance_is_no_obstacle(batchtopk: Crosscoder, world: Planted) -> None:
    data = world.data[:3000].copy()
    data[:, :, 3] = data[:, :, 4]
    crosscoder = fit_readout(copy_of(batchtopk), ArrayReader(data, batch_size=100, seed=0))
    weight, bias = by_lstsq(crosscoder, data)
    x = data[:200, 1].astype(np.float64)
    fitted = crosscoder.readout_map(kind="fit").pre_activation(torch.from_numpy(data[:200, 1].copy())).numpy()
    np.testing.assert_allclose(fitted, x @ weight + bias, rtol=1e-3, atol=1e-3)


def test_it_describes_single_models_where_swap_does_not(batchtopk: Crosscoder, world: Planted) -> None:
    crosscoder = copy_of(batchtopk)
    reader = ArrayReader(world.data, batch_size=512, seed=0)
    with pytest.raises(InputError, match=r"has not been fitted; call fit_readout\(crosscoder, reader\)"):
        measure_readout(crosscoder, reader, PAIR, readout="fit")
    fit_readout(crosscoder, reader)
    fit, swap = (measure_readout(crosscoder, reader, PAIR, readout=kind) for kind in ("fit", "swap"))
    gain = [a.fve - b.fve for a, b in zip(fit, swap, strict=True)]
    assert np.mean(gain) > 0.1
    assert fit[1].artefact == 0


def test_the_map_is_saved_and_files_without_it_still_load(
    batchtopk: Crosscoder, world: Planted, tmp_path: Path
) -> None:
    crosscoder = copy_of(batchtopk)
    crosscoder.save(tmp_path / "before")
    assert load_crosscoder(tmp_path / "before").fit_weight is None
    fit_readout(crosscoder, ArrayReader(world.data, batch_size=512, seed=0)).save(tmp_path / "after")
    loaded = load_crosscoder(tmp_path / "after")
    raw = torch.from_numpy(np.ascontiguousarray(world.data[:20, 0]))
    torch.testing.assert_close(loaded.readout(raw, kind="fit"), crosscoder.readout(raw, kind="fit"), rtol=0, atol=0)


def test_views_of_several_widths_are_refused() -> None:
    crosscoder = Crosscoder(PAIR, width=(3, 4), n_features=5, sparsity="l1", k=1)
    reader = ArrayReader([np.ones((9, 3)), np.ones((9, 4))], batch_size=3, seed=0)
    with pytest.raises(InputError, match=r"maps every model alike, but the views .* have the widths \[3, 4\]"):
        fit_readout(crosscoder, reader)


@pytest.mark.slow
def test_a_study_changes_to_fit_without_training_again(
    copied: tuple[StudySpec, StudyFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, folder = copied
    train_crosscoders(spec, folder, provenance=PROVENANCE)
    monkeypatch.setattr(stage_module, "train_replicates", lambda *a, **k: pytest.fail("trained again"))
    content = spec.model_dump(mode="json")
    content["crosscoders"][0] |= {"readout": "fit"}
    changed = StudySpec.model_validate(content)
    train_crosscoders(changed, folder, provenance=PROVENANCE)
    crosscoder = load_crosscoder(folder.crosscoder("main"))
    assert crosscoder.fit_weight is not None
    assert crosscoder.default_readout == "fit"
    record = read_json(folder.crosscoder("main") / "health.json")
    assert (record["readout"], record["weights_sha256"]) == ("fit", crosscoder.weights_sha256)
    monkeypatch.setattr(stage_module, "measure_health", lambda *a, **k: pytest.fail("measured again"))
    train_crosscoders(changed, folder, provenance=PROVENANCE)  # fitted and measured once
