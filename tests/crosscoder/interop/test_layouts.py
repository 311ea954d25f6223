"""Layouts of other tools: recognised by names, read by their own axes, and back to the same reconstructions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlgen_stats.cli import main
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.crosscoder import Crosscoder, export_crosscoder, import_crosscoder, load_crosscoder

VIEWS = ("base@0", "rl@9")
N_FEATURES = 11


def draws(width: int, n_views: int = 2) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(5)
    shapes = {
        "W_enc": (n_views, width, N_FEATURES),
        "b_enc": (N_FEATURES,),
        "W_dec": (N_FEATURES, n_views, width),
        "b_dec": (n_views, width),
    }
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def activations(width: int) -> Tensor:
    return torch.randn(40, 2, width, generator=torch.Generator().manual_seed(1))


def ours(crosscoder: Crosscoder, raw: Tensor) -> tuple[Tensor, Tensor]:
    f = crosscoder.encode(crosscoder.normalise(raw))
    return f, torch.stack([crosscoder.reconstruct(f, view) for view in crosscoder.views], dim=1)


def model_diff(t: dict[str, Tensor], raw: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The forward pass of that replication, view by view."""
    x = raw * factor[:, None]
    f = (sum(x[:, m] @ t["W_enc"][m] for m in range(2)) + t["b_enc"]).relu()
    back = [(f @ t["W_dec"][:, m] + t["b_dec"][m]) / factor[m] for m in range(2)]
    return f, torch.stack(back, dim=1)


@pytest.mark.parametrize("width", [5, 2])  # 2: as many channels as models, so that shapes tell nothing apart
@pytest.mark.parametrize("saved", ["folder .pt", "file .pt", "folder .safetensors", "file .safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_w_enc_layout_computes_the_same(tmp_path: Path, width: int, saved: str, prefix: str) -> None:
    t = draws(width)
    place, suffix = saved.split()
    file = tmp_path / f"{'cc_weights' if place == 'folder' else '4'}{suffix}"
    named = {prefix + name: tensor for name, tensor in t.items()}
    torch.save(named, file) if suffix == ".pt" else save_file(named, file)
    (tmp_path / "cfg.json").write_text("{}")
    imported = import_crosscoder(tmp_path if place == "folder" else file, VIEWS)
    raw = activations(width)
    for mine, their in zip(ours(imported, raw), model_diff(t, raw, torch.ones(2)), strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-4)
    assert imported.sparsity == "l1"


def test_the_scaling_factors_beside_the_weights_are_used(tmp_path: Path) -> None:
    t, raw, factor = draws(5), activations(5) * 10, torch.tensor([0.3, 0.2])
    torch.save(t, tmp_path / "cc_weights.pt")
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": [0.3, 0.2]}')
    for mine, their in zip(ours(import_crosscoder(tmp_path, VIEWS), raw), model_diff(t, raw, factor), strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-4)
    for wrong in ("[0.3]", "[0.3, 0]", "[0.3, NaN]", '"0.3"', "null", "[0.3, true]"):
        (tmp_path / "activation_scaler.json").write_text(f'{{"scaling_factor": {wrong}}}')
        with pytest.raises(InputError, match="must say what each of the 2 views is multiplied by"):
            import_crosscoder(tmp_path, VIEWS)
    (tmp_path / "activation_scaler.json").write_text("{")
    with pytest.raises(InputError, match="is no JSON"):
        import_crosscoder(tmp_path, VIEWS)


def test_model_diff_there_and_back(tmp_path: Path) -> None:
    made = Crosscoder(VIEWS, width=5, n_features=N_FEATURES, sparsity="l1", k=4, seed=2)
    with torch.no_grad():
        made.scale.copy_(torch.tensor([0.5, 3.0]))
        made.decoder_offset.normal_(generator=torch.Generator().manual_seed(2))
    file = export_crosscoder(made, tmp_path / "out", layout="model-diff")
    raw = activations(5)
    t = load_file(file)
    assert {name: tuple(tensor.shape) for name, tensor in t.items()} == {
        **{"W_enc": (2, 5, N_FEATURES), "b_enc": (N_FEATURES,)},
        **{"W_dec": (N_FEATURES, 2, 5), "b_dec": (2, 5)},
    }
    expected = model_diff(t, raw, torch.tensor([0.5, 3.0]))
    for back in (made, import_crosscoder(tmp_path / "out", VIEWS)):
        for mine, their in zip(ours(back, raw), expected, strict=True):
            torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(back.decoder_norm(), made.decoder_norm())
    batchtopk = Crosscoder(VIEWS, width=5, n_features=N_FEATURES, sparsity="batchtopk", k=4)
    with pytest.raises(InputError, match="model-diff holds crosscoders of sparsity l1, but 'crosscoder' is batchtopk"):
        export_crosscoder(batchtopk, tmp_path / "no", layout="model-diff")
    with pytest.raises(InputError, match=r"the layouts of crosscoders are crosscoder_learning, model-diff, got 'sae'"):
        export_crosscoder(made, tmp_path / "no", layout="sae")
    assert not (tmp_path / "no").exists()


def dedicated(*, sizes: tuple[int, int], leak: float = 0.0) -> dict[str, Any]:
    """Weights of dfc_learning: features of the first model alone, of the second alone, then of both."""
    random, (a, b) = torch.Generator().manual_seed(7), sizes
    encoder = torch.randn(2, 5, N_FEATURES, generator=random)
    decoder = torch.randn(2, N_FEATURES, 5, generator=random)
    for m, other in ((1, slice(0, a)), (0, slice(a, a + b))):
        encoder[m, :, other] = 0
        decoder[m, other] = leak
    return {
        "encoder.weight": encoder,
        "encoder.bias": torch.randn(N_FEATURES, generator=random),
        "decoder.weight": decoder,
        "decoder.bias": torch.randn(2, 5, generator=random),
        "code_normalization_id": torch.tensor(1),
        "k": torch.tensor(3),
        "threshold": torch.tensor(1.5),
    }


def dfc(t: dict[str, Any], raw: Tensor) -> tuple[Tensor, Tensor]:
    pre = torch.einsum("nmc,mcf->nf", raw, t["encoder.weight"]) + t["encoder.bias"]
    f = pre.relu() * (pre.relu() * t["decoder.weight"].norm(dim=2).sum(dim=0) > t["threshold"])
    return f, torch.einsum("nf,mfc->nmc", f, t["decoder.weight"]) + t["decoder.bias"]


@pytest.mark.parametrize("named", ["in the .pt", "in config.json", "as a mask", "as a mask over weights"])
def test_dedicated_features_there_and_back(tmp_path: Path, named: str) -> None:
    t, raw = dedicated(sizes=(2, 3)), activations(5)
    f, back = dfc(t, raw)
    shares = {"dict_size": N_FEATURES, "model_a_exclusive_pct": 2.1 / 11, "model_b_exclusive_pct": 3.9 / 11}
    mask = torch.ones(2, N_FEATURES, dtype=torch.bool)
    mask[1, :2] = mask[0, 2:5] = False
    match named:
        case "in the .pt":
            torch.save(t | {"_partition_config": shares}, tmp_path / "model.pt")
        case "in config.json":
            save_file(t, tmp_path / "model.safetensors")
            (tmp_path / "config.json").write_text(json.dumps(shares))
        case "as a mask":
            save_file(t | {"partition_mask": mask}, tmp_path / "model.safetensors")
        case _:  # masked when used, not when saved
            filled = t["encoder.weight"].masked_fill(~mask[:, None], 4.0)
            decoder = t["decoder.weight"].masked_fill(~mask[:, :, None], 4.0)
            masked = {"encoder.weight": filled, "decoder.weight": decoder, "partition_mask": mask}
            save_file(t | masked, tmp_path / "model.safetensors")
    imported = import_crosscoder(tmp_path, VIEWS)
    assert (imported.sparsity, imported.exclusive) == ("dfc", {"base@0": slice(6, 8), "rl@9": slice(8, 11)})
    order = [5, 6, 7, 8, 9, 10, 0, 1, 2, 3, 4]
    assert imported.facts["feature_order"] == order
    imported.save(tmp_path / "saved")
    again = load_crosscoder(tmp_path / "saved")  # which refuses weights of exclusive features in other views
    file = export_crosscoder(again, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [int(11 * config[f"model_{m}_exclusive_pct"]) for m in "ab"] == [2, 3]
    exported = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("activation")}
    torch.testing.assert_close(dfc(exported, raw), (f, back), rtol=1e-4, atol=1e-4)  # numbered as theirs again
    for crosscoder in (imported, again, import_crosscoder(tmp_path / "out", VIEWS)):
        mine_f, mine_back = ours(crosscoder, raw)
        torch.testing.assert_close(mine_f, f[:, order], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine_back, back, rtol=1e-4, atol=1e-4)


def test_partitions_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    shares = {"model_a_exclusive_pct": 2 / 10, "model_b_exclusive_pct": 3 / 10}

    def refused(match: str, t: dict[str, Any], **config: float) -> None:
        save_file(t, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=match):
            import_crosscoder(tmp_path, VIEWS)

    refused("have weights up to 0.01 in the other", dedicated(sizes=(2, 3), leak=0.01), **shares)
    refused(
        r"\[2, 10\] exclusive features do not fit", dedicated(sizes=(2, 3)), **shares | {"model_b_exclusive_pct": 0.95}
    )
    refused("must name model_a_exclusive_pct and model_b", dedicated(sizes=(2, 3)), model_a_exclusive_pct=0.1)
    refused("must be zeros and ones", dedicated(sizes=(2, 3)) | {"partition_mask": torch.ones(2, 3)})
    refused("must be zeros and ones", dedicated(sizes=(2, 3)) | {"partition_mask": torch.full((2, N_FEATURES), 0.5)})
    refused(
        "some views may use and others not", dedicated(sizes=(2, 3)) | {"partition_mask": torch.zeros(2, N_FEATURES)}
    )
    save_file(dedicated(sizes=(2, 3), leak=9e-7), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(shares))
    assert import_crosscoder(tmp_path, VIEWS).sparsity == "dfc"


def test_bfloat16_is_read_exactly(tmp_path: Path) -> None:
    t = {name: tensor.bfloat16() for name, tensor in draws(5).items()}
    save_file(t, tmp_path / "cc_weights.safetensors")
    imported = import_crosscoder(tmp_path, VIEWS)
    assert imported.encoder_matrix.dtype is torch.float32
    assert torch.equal(imported.encoder, t["W_enc"].float())
    assert torch.equal(imported.decoder, t["W_dec"].float().transpose(0, 1))


def test_wrong_tensors_are_refused(tmp_path: Path) -> None:
    def refused(match: str, views: tuple[str, ...] = VIEWS, **changes: Any) -> None:
        torch.save(draws(5) | changes, tmp_path / "cc_weights.pt")
        with pytest.raises(InputError, match=match):
            import_crosscoder(tmp_path, views)

    refused(r"W_dec must have shape \(11, 2, 5\), got \(2, 11, 5\); its axes", W_dec=torch.zeros(2, 11, 5))
    refused(r"b_dec must have shape \(2, 5\), got \(10,\)", b_dec=torch.zeros(10))
    refused(r"b_enc must have shape \(11,\), got \(2, 11\)", b_enc=torch.zeros(2, 11))
    refused("b_enc is torch.int8, .* expected plain real numbers", b_enc=torch.zeros(11, dtype=torch.int8))
    refused("W_dec is torch.float32, torch.sparse_coo", W_dec=torch.zeros(11, 2, 5).to_sparse())
    refused("W_enc has NaN or infinite values", W_enc=torch.full((2, 5, 11), float("nan")))
    refused("tensors that the layout of .* does not know, log_threshold", log_threshold=torch.zeros(11))
    refused("holds more than tensors: 'cfg' is dict", cfg={"k": 3})
    refused("2 layers, but 3 views were named", views=(*VIEWS, "sft@3"))


def test_a_folder_says_which_layouts_were_looked_for(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()
    with pytest.raises(InputError) as caught:
        import_crosscoder(tmp_path, VIEWS)
    for part in (
        "it has weights.bin; looked for",
        "crosscoder_learning, dictionary_learning and dfc_learning: model.safetensors or model.pt or ae.pt with",
        "cc_weights.safetensors or cc_weights.pt with W_enc [view, channel, feature]; b_enc [feature]; W_dec [feature,",
        "SAELens: cfg.json and sae_weights.safetensors",
    ):
        assert part in str(caught.value)


def test_command_exports_the_named_layout(tmp_path: Path) -> None:
    Crosscoder(VIEWS, width=5, n_features=N_FEATURES, sparsity="l1", k=4).save(tmp_path / "mine")
    arguments = ["export-crosscoder", str(tmp_path / "mine"), "--to", str(tmp_path / "out"), "--layout", "model-diff"]
    done = CliRunner().invoke(main, arguments)
    assert (done.exit_code, "cc_weights.safetensors" in done.stdout) == (0, True), done.output
    wrong = CliRunner().invoke(main, [*arguments[:-1], "other"])
    assert (wrong.exit_code, "'crosscoder_learning', 'model-diff', 'saelens'" in wrong.stderr) == (2, True)


def test_a_feature_without_decoder_is_never_active_at_threshold_0(tmp_path: Path) -> None:
    t = dedicated(sizes=(2, 3)) | {"threshold": torch.tensor(0.0)}
    t["decoder.weight"][:, 4] = 0
    save_file(t, tmp_path / "model.safetensors")
    f, _ = ours(import_crosscoder(tmp_path, VIEWS), activations(5))
    assert torch.equal(f[:, 4], torch.zeros(40))
    torch.testing.assert_close(f, dfc(t, activations(5))[0], rtol=1e-4, atol=1e-4)
