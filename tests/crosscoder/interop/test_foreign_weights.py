"""Weights in the N-layer layout: the same reconstruction as an independent reading of it, there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from rlgen_stats.cli import main
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.crosscoder import Crosscoder, export_crosscoder, import_crosscoder

VIEWS = ("base@0", "sft@9", "rl@9")
LAYERS, WIDTH, FEATURES = 3, 6, 20


def theirs(*, normaliser: bool = True, threshold: float | None = 2.0, kind: int = 1) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    tensors = {
        "encoder.weight": draw(LAYERS, WIDTH, FEATURES),
        "encoder.bias": draw(FEATURES),
        "decoder.weight": draw(LAYERS, FEATURES, WIDTH),
        "decoder.bias": draw(LAYERS, WIDTH),
        "code_normalization_id": torch.tensor(kind),
        "target_rms": torch.tensor(1.5),
        "activation_mean": torch.full((LAYERS, WIDTH), float("nan")),
        "activation_std": torch.full((LAYERS, WIDTH), float("nan")),
        "activation_global_scale": torch.ones(LAYERS),
    }
    if normaliser:
        std = draw(LAYERS, WIDTH).abs() + 0.5
        tensors |= {
            "activation_mean": 3 * draw(LAYERS, WIDTH),
            "activation_std": std,
            "activation_global_scale": 1.5 / std.square().sum(dim=1).sqrt(),
        }
    if threshold is not None:
        tensors |= {"k": torch.tensor(4, dtype=torch.int32), "threshold": torch.tensor(threshold)}
    return tensors


def their_output(tensors: dict[str, torch.Tensor], raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and raw reconstruction as that library computes them, token by token in float64."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    normal = not bool(t["activation_mean"].isnan().any())
    mean = t["activation_mean"] if normal else torch.zeros(LAYERS, WIDTH).double()
    scale = t["activation_global_scale"] if normal else torch.ones(LAYERS).double()
    codes, outputs = [], []
    for a in raw.double():
        x = (a - mean) * scale[:, None]
        f = (sum(x[m] @ t["encoder.weight"][m] for m in range(LAYERS)) + t["encoder.bias"]).relu()
        if "threshold" in t:
            rows = t["decoder.weight"]
            weight = {
                1: rows.norm(dim=2).sum(dim=0),
                2: rows.norm(dim=(0, 2)),
                3: rows.norm(dim=(0, 2)) * 0.7 + rows.norm(dim=2).sum(dim=0) * 0.2,
                4: torch.ones(FEATURES).double(),
            }[int(t["code_normalization_id"])]
            f = f * (f * weight > t["threshold"])
        back = torch.stack([f @ t["decoder.weight"][m] + t["decoder.bias"][m] for m in range(LAYERS)])
        codes.append(f)
        outputs.append(back / scale[:, None] + mean)
    return torch.stack(codes), torch.stack(outputs)


def our_output(crosscoder: Crosscoder, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    f = crosscoder.encode(crosscoder.normalise(raw))
    return f, torch.stack([crosscoder.reconstruct(f, view) for view in crosscoder.views], dim=1)


@pytest.fixture(scope="module")
def raw() -> torch.Tensor:
    return 2 * torch.randn(64, LAYERS, WIDTH, generator=torch.Generator().manual_seed(0)) + 1


@pytest.mark.parametrize("normaliser", [True, False])
@pytest.mark.parametrize("kind", [1, 2, 3, 4])
@pytest.mark.parametrize("threshold", [2.0, None])
def test_imported_weights_compute_the_same(
    tmp_path: Path, raw: torch.Tensor, normaliser: bool, kind: int, threshold: float | None
) -> None:
    tensors = theirs(normaliser=normaliser, threshold=threshold, kind=kind)
    save_file(tensors, tmp_path / "model.safetensors")
    alphas = {"code_normalization_alpha_sae": 0.7, "code_normalization_alpha_cc": 0.2}
    (tmp_path / "config.json").write_text(json.dumps(alphas))
    crosscoder = import_crosscoder(tmp_path, VIEWS)
    assert crosscoder.sparsity == ("l1" if threshold is None else "batchtopk" if kind == 1 else "jumprelu")
    f, back = our_output(crosscoder, raw)
    wanted_f, wanted = their_output(tensors, raw)
    torch.testing.assert_close(f.double(), wanted_f, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(back.double(), wanted, rtol=1e-3, atol=1e-3)
    assert 0.05 < (f > 0).float().mean() < 0.9
    if normaliser:
        torch.testing.assert_close(crosscoder.mean, tensors["activation_mean"])
    else:
        with pytest.raises(InputError, match=r"means .* are not known.*use readout 'swap'"):
            crosscoder.readout(raw[:, 0], view="base@0", kind="own")
        assert crosscoder.readout(raw[:, 0]).shape == (64, FEATURES)


@pytest.mark.parametrize("sparsity", ["l1", "batchtopk", "dfc"])
def test_round_trip(tmp_path: Path, raw: torch.Tensor, sparsity: Any) -> None:
    exclusive = {"rl@9": 3} if sparsity == "dfc" else None
    made = Crosscoder(VIEWS, width=WIDTH, n_features=FEATURES, sparsity=sparsity, k=4, exclusive=exclusive, seed=2)
    with torch.no_grad():
        made.scale.copy_(torch.tensor([0.5, 2.0, 3.0]))
        made.means.normal_(generator=torch.Generator().manual_seed(1))
        made.decoder_offset.normal_(generator=torch.Generator().manual_seed(2))
        made.threshold.fill_(0.3)
    file = export_crosscoder(made, tmp_path / "out")
    f, back = our_output(made, raw)
    theirs_f, theirs_back = their_output(load_file(file), raw)
    imported = import_crosscoder(tmp_path / "out", VIEWS)
    torch.testing.assert_close(theirs_f.float()[:, imported.facts.get("feature_order", ...)], f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs_back.float(), back, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(imported.means, made.means)
    assert (imported.sparsity, imported.exclusive) == (made.sparsity, made.exclusive)
    again_f, again = our_output(imported, raw)
    torch.testing.assert_close(again, back, rtol=1e-4, atol=1e-4)
    assert torch.equal(again_f > 0, f > 0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["activation_dim"], config["dict_size"], config["num_layers"]) == (WIDTH, FEATURES, LAYERS)
    with pytest.raises(InputError, match="is not empty; name a new folder"):
        export_crosscoder(made, tmp_path / "out")


def test_a_normaliser_in_bfloat16_is_the_same_but_for_its_digits(tmp_path: Path, raw: torch.Tensor) -> None:
    for factor in (1.0, 1.02):  # rounded; and another scale than the variance gives
        tensors = {
            name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in theirs().items()
        }
        exact = tensors["activation_std"].double().square().sum(dim=1).sqrt()
        tensors["activation_global_scale"] = (factor * 1.003 * 1.5 / exact).bfloat16()
        save_file(tensors, tmp_path / "model.safetensors")
        if factor == 1.0:
            code, back = our_output(import_crosscoder(tmp_path, VIEWS), raw)
            for found, expected in zip((code, back), their_output(tensors, raw), strict=True):
                torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
        else:
            with pytest.raises(InputError, match="normalised neuron by neuron"):
                import_crosscoder(tmp_path, VIEWS)


@pytest.mark.parametrize("name", ["activation_mean", "activation_std", "activation_global_scale"])
def test_a_normaliser_of_another_shape_is_named(tmp_path: Path, name: str) -> None:
    tensors = theirs()
    tensors[name] = tensors[name][None].transpose(0, -1).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=f"{name} must have shape"):
        import_crosscoder(tmp_path, VIEWS)


@pytest.mark.parametrize("file", ["model.pt", "ae.pt"])
@pytest.mark.parametrize("by_folder", [False, True])
def test_tensor_files_of_torch_and_compiled_prefixes_are_read(
    tmp_path: Path, raw: torch.Tensor, file: str, by_folder: bool
) -> None:
    """As crosscoder_learning and, as ae.pt, dictionary_learning save them."""
    tensors = theirs()
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}, tmp_path / file)
    f, _ = our_output(import_crosscoder(tmp_path if by_folder else tmp_path / file, VIEWS), raw)
    torch.testing.assert_close(f.double(), their_output(tensors, raw)[0], rtol=1e-3, atol=1e-3)


def test_prefixes_of_wrapped_modules_are_no_part_of_a_name(tmp_path: Path) -> None:
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        save_file({prefix + name: tensor for name, tensor in theirs().items()}, tmp_path / "model.safetensors")
        imported = import_crosscoder(tmp_path, VIEWS)
        torch.testing.assert_close(imported.decoder, theirs()["decoder.weight"])


class Evil:
    def __reduce__(self) -> Any:
        return (Path("owned").touch, ())


def test_bad_files_are_explained_and_nothing_pickled_runs(tmp_path: Path) -> None:
    def saved(**changes: torch.Tensor) -> Path:
        save_file(theirs() | changes, tmp_path / "model.safetensors")
        return tmp_path

    with pytest.raises(InputError, match="3 layers, but 2 views were named"):
        import_crosscoder(saved(), VIEWS[:2])
    with pytest.raises(InputError, match=r"never learned its inference threshold \(-1\)"):
        import_crosscoder(saved(threshold=torch.tensor(-1.0)), VIEWS)
    with pytest.raises(InputError, match="a code per layer"):
        import_crosscoder(saved(code_normalization_id=torch.tensor(5)), VIEWS)
    with pytest.raises(InputError, match="normalised neuron by neuron"):
        import_crosscoder(saved(activation_global_scale=torch.ones(LAYERS)), VIEWS)
    with pytest.raises(InputError, match=r"decoder.weight must have shape \(3, 20, 6\), got \(3, 6, 20\)"):
        import_crosscoder(saved(**{"decoder.weight": torch.zeros(3, 6, 20)}), VIEWS)
    save_file({"W": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"is no crosscoder of a known layout.*got \['W'\]"):
        import_crosscoder(tmp_path / "other.safetensors", VIEWS)
    with pytest.raises(InputError, match=r"there is nothing at .*nothing; expected a weights file or its folder"):
        import_crosscoder(tmp_path / "nothing", VIEWS)
    for name, value in (("decoder.weight", float("nan")), ("encoder.bias", float("inf")), ("threshold", float("nan"))):
        broken = theirs()[name].clone()
        broken.view(-1)[-1] = value
        with pytest.raises(InputError, match=rf"{name} has NaN or infinite values; its training diverged"):
            import_crosscoder(saved(**{name: broken}), VIEWS)
    torch.save({"encoder.weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="nothing pickled is opened"):
        import_crosscoder(tmp_path / "evil.pt", VIEWS)
    assert not Path("owned").exists()
    jump = Crosscoder(VIEWS, width=WIDTH, n_features=FEATURES, sparsity="jumprelu", k=4)
    with pytest.raises(InputError, match="holds crosscoders of sparsity l1, batchtopk, dfc, but"):
        export_crosscoder(jump, tmp_path / "jump")


def test_commands_go_there_and_back(tmp_path: Path) -> None:
    save_file(theirs(), tmp_path / "model.safetensors")
    (tmp_path / "in").mkdir()
    (tmp_path / "model.safetensors").rename(tmp_path / "in" / "model.safetensors")
    run = CliRunner().invoke
    views = [part for view in VIEWS for part in ("--view", view)]
    done = run(main, ["import-crosscoder", str(tmp_path / "in"), *views, "--to", str(tmp_path / "ours"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["n_features"] == FEATURES
    again = run(main, ["import-crosscoder", str(tmp_path / "in"), *views, "--to", str(tmp_path / "ours")])
    assert (again.exit_code, "is not empty; name a new folder" in again.stderr) == (2, True)
    back = run(main, ["export-crosscoder", str(tmp_path / "ours"), "--to", str(tmp_path / "theirs")])
    assert back.exit_code == 0, back.output
    first, last = (load_file(tmp_path / where / "model.safetensors") for where in ("in", "theirs"))
    for name in ("encoder.weight", "decoder.weight", "activation_mean", "activation_global_scale", "threshold"):
        torch.testing.assert_close(last[name], first[name], rtol=1e-5, atol=1e-5)
    wrong = run(main, ["import-crosscoder", str(tmp_path / "in"), "--view", "base@0", "--to", str(tmp_path / "x")])
    assert (wrong.exit_code, "3 layers, but 1 views were named" in wrong.stderr) == (2, True)
    assert not (tmp_path / "x").exists()
