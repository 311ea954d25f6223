"""Crosscoder weights in the layout of crosscoder_learning and dictionary_learning: in and out, without pickle."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.stores import write_json
from rlgen_stats.stores.digests import file_sha256
from rlgen_stats.toolkit.crosscoder.model.crosscoder import Crosscoder
from rlgen_stats.toolkit.crosscoder.model.readout import Sparsity

WEIGHT_FILES: Final = ("model.safetensors", "model.pt", "ae.pt")
"""Names looked for in a folder; the first that exists is read."""
CONFIG: Final = "config.json"
_WRAPPERS: Final = re.compile(r"^(_orig_mod\.|module\.)+")
"""Prefixes of tensors saved from a compiled module, or from one trained on several devices."""
_NORMALISATIONS: Final = {1: "CROSSCODER", 2: "SAE", 3: "MIXED", 4: "NONE", 5: "DECOUPLED"}
"""Number in the file -> which decoder norm scales a feature before it is compared with the threshold."""
_NEEDED: Final = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")


def import_crosscoder(path: Path | str, views: Sequence[str], *, name: str = "imported") -> Crosscoder:
    """A crosscoder trained with crosscoder_learning or dictionary_learning.

    Parameters
    ----------
    path
        A .safetensors or .pt file, or a folder with model.safetensors, model.pt or ae.pt (and config.json).
    views
        Model id of each layer of the weights, in order.
    name
        Its name here.

    Returns
    -------
    Crosscoder
        ``sparsity`` is ``"l1"`` without a threshold, ``"batchtopk"`` with one on contributions, ``"jumprelu"`` (one
        threshold per feature) where the file's threshold is on another scale. Save it with ``save``.

    Raises
    ------
    InputError
        If the file is missing, holds anything but tensors, lacks one of them or has NaN in it, was trained with a code
        per layer or with a normalisation that one scalar per view cannot express, has no learned threshold, or has
        another number of layers than ``views``.

    Notes
    -----
    In those files: x = (a - mean_m) g_m, f = relu(x W + b), a_hat = (f D + c) / g_m + mean_m. Here: x = a s_m. The
    function is the same with s_m = g_m, b - sum_m mean_m g_m W_m and c + mean_m g_m; decoder norms and contributions
    do not change. Files without a normaliser have g = 1 and unknown means, so readout ``own`` is refused.
    """
    file = weights_file(Path(path))
    tensors = _read(file)
    n_layers, width, n_features = tensors["encoder.weight"].shape
    if len(views) != n_layers:
        raise InputError(f"{file} has {n_layers} layers, but {len(views)} views were named: {list(views)}.")
    scale, mean = _normaliser(tensors, file)
    sparsity, threshold = _threshold(tensors, file)
    k = int(tensors["k"]) if "k" in tensors else 0
    crosscoder = Crosscoder(views, width=width, n_features=n_features, sparsity=sparsity, k=k, name=name)
    encoder = tensors["encoder.weight"].double()
    normalised_mean = (torch.nan_to_num(mean) * scale[:, None]).double()
    with torch.no_grad():
        crosscoder.scale.copy_(scale)
        crosscoder.means.copy_(mean.flatten())
        crosscoder.encoder_matrix.copy_(encoder.flatten(0, 1))
        # float64 until the end: the bias absorbs the mean, and both may be much larger than their difference
        mean_code = torch.einsum("vc,vcf->f", normalised_mean, encoder)
        crosscoder.encoder_bias.copy_(tensors["encoder.bias"].double() - mean_code)
        crosscoder.decoder_matrix.copy_(tensors["decoder.weight"].transpose(0, 1).flatten(1))
        crosscoder.decoder_offset.copy_((tensors["decoder.bias"].double() + normalised_mean).flatten())
        if threshold is not None:
            crosscoder.threshold.copy_(threshold)
    crosscoder.facts = {"imported_from": file.name, "imported_sha256": file_sha256(file)}
    return crosscoder.requires_grad_(False).eval()


def export_crosscoder(crosscoder: Crosscoder, folder: Path | str) -> Path:
    """Write a crosscoder as model.safetensors and config.json that crosscoder_learning opens.

    Parameters
    ----------
    crosscoder
        Sparsity l1, batchtopk or dfc; views of one width.
    folder
        New or empty folder.

    Returns
    -------
    Path
        The weights file.

    Raises
    ------
    InputError
        If the layout cannot hold this crosscoder, or the folder is not empty.
    """
    folder = Path(folder)
    if crosscoder.sparsity in ("topk", "jumprelu"):
        raise InputError(
            f"the N-layer crosscoder layout has one threshold for all features, but {crosscoder.name!r} is "
            f"{crosscoder.sparsity}; share its own weights.safetensors and spec.json."
        )
    width, n_views = crosscoder.width, len(crosscoder.views)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; name a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    scale = crosscoder.scale.detach().float().cpu()
    mean = torch.nan_to_num(crosscoder.mean.detach().cpu())
    normalised_mean = (mean * scale[:, None]).double()
    encoder = crosscoder.encoder.detach().cpu()
    mean_code = torch.einsum("vc,vcf->f", normalised_mean, encoder.double())
    bias = crosscoder.encoder_bias.detach().cpu().double() + mean_code
    tensors = {
        "encoder.weight": encoder,
        "encoder.bias": bias.float(),
        "decoder.weight": crosscoder.decoder,
        "decoder.bias": (crosscoder.decoder_bias.detach().cpu().double() - normalised_mean).float(),
        "code_normalization_id": torch.tensor(1),
        "target_rms": torch.tensor(1.0),
        "activation_mean": mean,
        "activation_std": (1.0 / (scale * width**0.5))[:, None].expand(n_views, width),
        "activation_global_scale": scale,
    }
    if crosscoder.sparsity != "l1":
        tensors |= {"k": torch.tensor(crosscoder.k, dtype=torch.int32), "threshold": crosscoder.threshold.float()}
    file = folder / WEIGHT_FILES[0]
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, file, {"format": "pt"})
    config = {
        "activation_dim": width,
        "dict_size": crosscoder.n_features,
        "num_layers": n_views,
        "code_normalization": "CROSSCODER",
        "dict_class": "CrossCoder" if crosscoder.sparsity == "l1" else "BatchTopKCrossCoder",
    }
    if crosscoder.sparsity != "l1":
        config["k"] = crosscoder.k
    write_json(folder / CONFIG, config)
    return file


def weights_file(path: Path) -> Path:
    """The weights at a path: the file itself, or the one in the folder."""
    if path.is_file():
        return path
    files = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
    if files:
        return files[0]
    if not path.is_dir():
        raise InputError(f"there is nothing at {path}; expected a weights file or its folder: fix the path.")
    held = ", ".join(sorted(file.name for file in path.iterdir())[:6]) or "nothing"
    raise InputError(
        f"{path} has none of {', '.join(WEIGHT_FILES)}, the files of crosscoder_learning and dictionary_learning, it "
        f"has {held}; name the folder that they wrote, or write the weights as {', '.join(_NEEDED)} into "
        f"{WEIGHT_FILES[0]}."
    )


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            tensors: Any = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(f"{file} holds more than tensors ({str(error)[:100]}); nothing pickled is opened.") from error
    if not isinstance(tensors, dict):
        raise InputError(f"{file} holds {type(tensors).__name__}, expected named tensors.")
    named: dict[str, Tensor] = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    _check(named, file)
    return named


def _check(tensors: dict[str, Tensor], file: Path) -> None:
    missing = [name for name in _NEEDED if name not in tensors]
    if missing or tensors["encoder.weight"].ndim != 3:
        raise InputError(
            f"{file} is no N-layer crosscoder: expected {', '.join(_NEEDED)} with encoder.weight [layer, channel, "
            f"feature], got {sorted(tensors)[:8]}."
        )
    layers, width, n_features = tensors["encoder.weight"].shape
    shapes = {
        "encoder.bias": (n_features,),
        "decoder.weight": (layers, n_features, width),
        "decoder.bias": (layers, width),
    }
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise InputError(f"{file}: {name} must have shape {shape}, got {tuple(tensors[name].shape)}.")
    broken = [name for name in (*_NEEDED, "threshold") if name in tensors and not tensors[name].isfinite().all()]
    if broken:
        raise InputError(
            f"{file}: {broken[0]} has NaN or infinite values; its training diverged, take an earlier file."
        )


def _normaliser(tensors: dict[str, Tensor], file: Path) -> tuple[Tensor, Tensor]:
    """Scale [view] and mean [view, channel]; NaN means where the file has no normaliser."""
    layers, width, _ = tensors["encoder.weight"].shape
    unknown = torch.full((layers, width), float("nan"))
    mean, std = tensors.get("activation_mean", unknown), tensors.get("activation_std", unknown)
    if bool(mean.isnan().any() or std.isnan().any()):
        return torch.ones(layers), unknown
    scale = tensors.get("activation_global_scale")
    # normalised as one scalar per view where the scale follows from the total variance; 1e-8 as in crosscoder_learning
    expected = float(tensors.get("target_rms", torch.tensor(1.0))) / (std.double().square().sum(dim=1) + 1e-8).sqrt()
    if scale is None:
        return expected.float(), mean.float()
    if not torch.allclose(scale.double(), expected, rtol=1e-3):
        raise InputError(
            f"{file} was trained on activations normalised neuron by neuron, which one scalar per view cannot express; "
            "train it with keep_relative_variance."
        )
    return scale.float(), mean.float()


def _threshold(tensors: dict[str, Tensor], file: Path) -> tuple[Sparsity, Tensor | None]:
    """Sparsity rule and threshold on f_k sum_m ||d_mk||."""
    if "threshold" not in tensors:
        return "l1", None
    kind = _NORMALISATIONS.get(int(tensors.get("code_normalization_id", torch.tensor(1))), "unknown")
    threshold = tensors["threshold"].double()
    norms = tensors["decoder.weight"].double().norm(dim=2)
    if kind in ("DECOUPLED", "unknown") or threshold.ndim:
        raise InputError(f"{file} has a code per layer (code normalization {kind}); one code for all views is needed.")
    if float(threshold) < 0:
        raise InputError(f"{file} never learned its inference threshold ({float(threshold):g}); finish its training.")
    if kind == "CROSSCODER":
        return "batchtopk", threshold
    if kind == "SAE":
        scale = norms.square().sum(dim=0).sqrt()
    elif kind == "NONE":
        scale = torch.ones(norms.shape[1], dtype=torch.float64)
    else:
        alpha_sae, alpha_cc = _mixture(file)
        scale = alpha_sae * norms.square().sum(dim=0).sqrt() + alpha_cc * norms.sum(dim=0)
    return "jumprelu", threshold * norms.sum(dim=0) / scale.clamp_min(torch.finfo(torch.float32).tiny)


def _mixture(file: Path) -> tuple[float, float]:
    config = json.loads((file.parent / CONFIG).read_text()) if (file.parent / CONFIG).exists() else {}
    return float(config.get("code_normalization_alpha_sae", 1.0)), float(config.get("code_normalization_alpha_cc", 0.1))
