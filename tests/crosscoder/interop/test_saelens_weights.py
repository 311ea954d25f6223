"""SAEs in the layout of SAELens against a forward pass written out here, token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder, read_json
from rlgen_stats.toolkit.crosscoder import (
    ArrayReader,
    Crosscoder,
    decoder_dataset,
    export_saes,
    import_sae,
    load_crosscoder,
    measure_health,
    train_crosscoders,
)
from rlgen_stats.toolkit.statistics import attribution
from tests.crosscoder.planted import PROVENANCE

VIEWS = ("base@0", "sft@4", "rl@4")
WIDTH, N_FEATURES = 16, 40


def write_sae(folder: Path, *, drop: tuple[str, ...] = (), **config: Any) -> dict[str, NDArray[np.float64]]:
    random = np.random.default_rng(2)
    tensors = {
        "W_enc": random.normal(size=(WIDTH, N_FEATURES)) / 4,
        "b_enc": random.normal(size=N_FEATURES) / 10,
        "W_dec": random.normal(size=(N_FEATURES, WIDTH)) * random.uniform(0.5, 2, (N_FEATURES, 1)) / 4,
        "b_dec": random.normal(size=WIDTH) / 2,
    }
    if config.get("architecture") in ("jumprelu", "batchtopk"):
        tensors["threshold"] = random.uniform(-0.2, 1, N_FEATURES)
    tensors = {name: values for name, values in tensors.items() if name not in drop}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: torch.tensor(v, dtype=torch.float32) for name, v in tensors.items()}, folder / "sae_weights.safetensors"
    )
    (folder / "cfg.json").write_text(json.dumps({"d_in": WIDTH, "d_sae": N_FEATURES} | config))
    return {name: v.astype(np.float32).astype(np.float64) for name, v in tensors.items()}


def forward(
    weights: dict[str, NDArray[np.float64]], a: NDArray[np.float64], config: dict[str, Any], factor: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Features and reconstruction of one token."""
    x = a * factor
    pre = (x - weights["b_dec"] * config.get("apply_b_dec_to_input", True)) @ weights["W_enc"] + weights["b_enc"]
    norm = np.array([np.linalg.norm(row) for row in weights["W_dec"]])
    rescaled = config.get("rescale_acts_by_decoder_norm", False)
    pre = pre * norm if rescaled else pre
    f = np.zeros(N_FEATURES)
    largest = sorted(range(N_FEATURES), key=lambda k: -pre[k])[: int(config.get("k", N_FEATURES))]
    for k in range(N_FEATURES):
        threshold = max(0.0, weights["threshold"][k]) if "threshold" in weights else 0.0
        if pre[k] > threshold and (config.get("architecture") != "topk" or k in largest):
            f[k] = pre[k]
    return f, ((f / norm if rescaled else f) @ weights["W_dec"] + weights["b_dec"]) / factor


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": "standard"},
        {"apply_b_dec_to_input": False, "activation_fn_str": "relu"},  # no architecture: an old file
        {"architecture": "jumprelu", "metadata": {"hook_name": "blocks.5.hook_resid_post"}},
        {"architecture": "batchtopk", "k": 5.0, "apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": True},
        {"architecture": "topk", "k": 4},
        {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True},
        {"architecture": "jumprelu", "normalize_activations": "expected_average_only_in"},
    ],
)
def test_features_and_reconstructions_are_the_saes(tmp_path: Path, config: dict[str, Any]) -> None:
    weights = write_sae(tmp_path, **config)
    factor = 0.3 if "normalize_activations" in config else 1.0
    if factor != 1.0:
        (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.3}')
    import_sae(tmp_path, VIEWS).save(tmp_path / "saved")
    crosscoder = load_crosscoder(tmp_path / "saved")
    data = np.random.default_rng(0).normal(size=(60, WIDTH)).astype(np.float32) * 2 / factor
    wanted = [forward(weights, a.astype(np.float64), config, factor) for a in data]
    f = crosscoder.readout(torch.from_numpy(data))
    np.testing.assert_allclose(f.numpy(), [each for each, _ in wanted], rtol=1e-4, atol=1e-5)
    assert 0 < (f > 0).float().mean() < 0.9
    for view in VIEWS:  # one decoder for all
        back = crosscoder.reconstruct(f, view).numpy()
        np.testing.assert_allclose(back, [each for _, each in wanted], rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match=r"means of the activations .* are not known"):
        crosscoder.readout_map(view="rl@4", kind="own")


@pytest.mark.parametrize(
    ("config", "drop", "message"),
    [
        ({"architecture": "gated"}, (), "is a gated SAE"),
        ({"architecture": "transcoder"}, (), "is a transcoder SAE"),
        ({"d_out": 20}, (), "is a transcoder, which"),
        ({"normalize_activations": "layer_norm"}, (), r"normalises every token by itself \(layer_norm\)"),
        ({"normalize_activations": "expected_average_only_in"}, (), "does not say by what; pass norm_scaling_factor="),
        ({"reshape_activations": "hook_z"}, (), "reads attention heads"),
        ({"hook_name": "blocks.3.attn.hook_z"}, (), "reads attention heads"),
        ({"activation_fn_str": "tanh-relu"}, (), "activation function 'tanh-relu'"),
        ({"architecture": "topk"}, (), "does not say its k"),
        ({"architecture": "batchtopk"}, ("threshold",), "without its threshold"),
        ({}, ("b_dec",), r"lacks \['b_dec'\]"),
    ],
)
def test_what_cannot_be_expressed_is_refused_in_one_sentence(
    tmp_path: Path, config: dict[str, Any], drop: tuple[str, ...], message: str
) -> None:
    write_sae(tmp_path, drop=drop, **config)
    with pytest.raises(InputError, match=message):
        import_sae(tmp_path, VIEWS)


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_an_sae_that_diverged_is_refused(tmp_path: Path, name: str) -> None:
    write_sae(tmp_path)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    tensors[name].flatten()[-1] = float("nan")
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    with pytest.raises(InputError, match=f"{name} has NaN or infinite values; its training diverged"):
        import_sae(tmp_path, VIEWS)


def test_a_feature_without_decoder_never_fires(tmp_path: Path) -> None:
    weights = write_sae(tmp_path, architecture="jumprelu")
    weights["W_dec"][7] = 0
    save_file({name: torch.tensor(v).float() for name, v in weights.items()}, tmp_path / "sae_weights.safetensors")
    raw = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(0)) * 3
    f = import_sae(tmp_path, VIEWS).readout(raw)
    assert bool((f[:, 7] == 0).all())
    assert int((f > 0).sum()) > 100


def test_its_norms_say_nothing_and_its_health_is_that_of_single_models(tmp_path: Path) -> None:
    write_sae(tmp_path, architecture="standard")
    crosscoder = import_sae(tmp_path, VIEWS)
    table = attribution(decoder_dataset(crosscoder, firing=np.full(N_FEATURES, 0.1)), original="base@0", target="rl@4")
    assert np.isnan(table["mas_l1"]).all()
    assert np.isnan(table["nrn_l2"]).all()
    assert not table["alive"].any()
    data = np.random.default_rng(0).normal(size=(300, 3, WIDTH)).astype(np.float32)
    health = measure_health(crosscoder, ArrayReader(data, batch_size=100, seed=0))
    np.testing.assert_array_equal(health.fve, health.fve_readout)
    assert health.l0 == pytest.approx(health.l0_readout.mean())
    crosscoder.facts = {}
    assert measure_health(crosscoder, ArrayReader(data, batch_size=100, seed=0)).l0 != pytest.approx(
        health.l0, rel=1e-3
    )


def test_a_study_takes_it_as_weights(copied: tuple[StudySpec, StudyFolder]) -> None:
    spec, folder = copied
    write_sae(folder.root / "public", architecture="jumprelu")
    content = spec.model_dump(mode="json")
    content["crosscoders"] = [
        content["crosscoders"][0] | {"weights": "public", "n_features": N_FEATURES, "replicates": 1}
    ]
    changed = StudySpec.model_validate(content)
    train_crosscoders(changed, folder, provenance=PROVENANCE)
    taken = load_crosscoder(folder.crosscoder("main"))
    assert isinstance(taken, Crosscoder)
    assert taken.facts["imported_from"] == "SAELens jumprelu"
    assert not taken.has_joint_code
    record = read_json(folder.crosscoder("main") / "health.json")
    assert record["fve"] == record["fve_readout"]
    readout = record["readout_models"]
    assert {one["artefact"] for one in readout["models"] if one["model"] != "base@0"} == {0.0}
    assert not any(check["name"] in ("l0", "readout_l0") and check["limit"] == 0 for check in record["checks"])


@pytest.mark.parametrize("sparsity", ["l1", "batchtopk", "jumprelu", "topk", "dfc"])
@pytest.mark.parametrize("readout", ["swap", "own", "joint"])
def test_an_sae_a_view_gives_the_codes_of_the_readout(tmp_path: Path, sparsity: Any, readout: Any) -> None:
    exclusive = {"rl@4": 5} if sparsity == "dfc" else None
    made = Crosscoder(
        VIEWS, width=WIDTH, n_features=N_FEATURES, sparsity=sparsity, k=6, exclusive=exclusive, readout=readout, seed=3
    )
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        made.scale.copy_(torch.tensor([0.5, 2.0, 3.0]))
        made.means.normal_(generator=random)
        made.decoder_offset.normal_(generator=random)
        made.encoder_bias.normal_(generator=random)
        made.decoder_matrix.mul_(torch.rand(N_FEATURES, 1, generator=random) + 0.5)
        made.decoder_matrix[11] = 0
        made.threshold.fill_(0.2)
    made.requires_grad_(False).facts["site"] = "block7"
    folders = export_saes(made, tmp_path / "saes")
    assert [folder.name for folder in folders] == list(VIEWS)
    raw = torch.randn(50, WIDTH, generator=random)
    for view, folder in zip(VIEWS, folders, strict=True):
        config = read_json(folder / "cfg.json")
        weights = {
            name: tensor.double().numpy() for name, tensor in load_file(folder / "sae_weights.safetensors").items()
        }
        f = made.readout(raw, view=view, kind="swap" if readout == "joint" else readout)
        scale = made.selection_norm() if sparsity == "topk" else torch.ones(N_FEATURES)
        theirs = [forward(weights, token, config, 1.0) for token in raw.double().numpy()]
        np.testing.assert_allclose(np.stack([code for code, _ in theirs]), f * scale, rtol=1e-4, atol=1e-4)
        back = made.reconstruct(f, view)
        np.testing.assert_allclose(np.stack([out for _, out in theirs]), back, rtol=1e-4, atol=1e-4)
        assert (config["metadata"]["hook_name"], config["d_sae"]) == ("blocks.7.hook_resid_post", N_FEATURES)
        assert config["metadata"]["sae_lens_version"] == "6.0.0"  # else SAELens 6 drops the metadata
        again = import_sae(folder, VIEWS)
        # above a threshold of contributions, what writes nothing is never active
        written = (made.feature_direction(view).norm(dim=1) > 0) | (sparsity == "l1")
        torch.testing.assert_close(again.readout(raw), f * scale * written, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="is not empty; name a new folder"):
        export_saes(made, tmp_path / "saes")


def test_no_threshold_is_no_sae(tmp_path: Path) -> None:
    made = Crosscoder(VIEWS, width=WIDTH, n_features=N_FEATURES, sparsity="batchtopk", k=6)
    with pytest.raises(InputError, match="has no inference threshold yet"):
        export_saes(made, tmp_path / "saes")
    assert not (tmp_path / "saes").exists()
