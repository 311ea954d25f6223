"""SAEs in the layout of SAELens: in, as one encoder and decoder for all models, and out, one for each view."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.study import Readout
from rlgen_stats.stores import write_json
from rlgen_stats.stores.digests import file_sha256
from rlgen_stats.toolkit.crosscoder.interop.layouts import SCALER
from rlgen_stats.toolkit.crosscoder.model.crosscoder import Crosscoder
from rlgen_stats.toolkit.crosscoder.model.loading import not_finite
from rlgen_stats.toolkit.crosscoder.model.readout import Sparsity

SAE_CONFIG: Final = "cfg.json"
SAE_WEIGHTS: Final = "sae_weights.safetensors"
_VERSION: Final = "6.0.0"
"""Release whose settings are written; without it SAELens takes them for those of an older one, and drops metadata."""
_ARCHITECTURES: Final = ("standard", "jumprelu", "topk", "batchtopk")
_AVERAGE_NORM: Final = "expected_average_only_in"


def sae_files(path: Path | str) -> list[Path]:
    """The files that decide what an SAE in the layout of SAELens is; empty if the folder is none."""
    files = [Path(path) / name for name in (SAE_CONFIG, SAE_WEIGHTS, SCALER)]
    return [file for file in files if file.is_file()] if all(file.is_file() for file in files[:2]) else []


def import_sae(
    path: Path | str, views: Sequence[str], *, name: str = "imported", norm_scaling_factor: float | None = None
) -> Crosscoder:
    """An SAE of one model as a crosscoder that reads every model with its encoder and writes with its decoder.

    Parameters
    ----------
    path
        Folder with cfg.json and sae_weights.safetensors.
    views
        Model ids; the SAE stands for all of them.
    name
        Its name here.
    norm_scaling_factor
        What activations are multiplied by, for ``normalize_activations: expected_average_only_in`` that is not folded
        into the weights; default the one in activation_scaler.json.

    Returns
    -------
    Crosscoder
        Readout ``swap`` gives the SAE's features of each model. ``sparsity`` is ``"l1"`` for architecture standard,
        ``"topk"`` for topk, ``"jumprelu"`` for jumprelu and batchtopk; ``k`` is 0 where the file does not say. Save it
        with ``save``.

    Raises
    ------
    InputError
        If a file or tensor is missing or has another shape, or the SAE is one that this form cannot express.

    Notes
    -----
    SAELens: x = a c, f = act((x - b_dec) W_enc + b_enc), a_hat = (f W_dec + b_dec) / c, without b_dec in the encoder
    where ``apply_b_dec_to_input`` is false, and c = 1 but for an average norm that was not folded. Here W = W_enc / V
    in each of V slots, so that one activation in all of them gives W_enc; the bias takes up b_dec. Thresholds, on f_k
    there, are on f_k sum_m ||d_mk|| here. With ``rescale_acts_by_decoder_norm`` features are in units of their decoder
    norm, as SAELens reports them. The models' means are not known, so readout ``own`` is refused; decoders of all views
    are equal, so norms say nothing about specificity.
    """
    folder = Path(path)
    config, tensors = _read(folder)
    factor = _scaling_factor(config, folder, norm_scaling_factor)
    sparsity, k, threshold = _rule(config, tensors, folder)
    encoder, decoder = tensors["W_enc"].double(), tensors["W_dec"].double()
    bias, offset = tensors["b_enc"].double(), tensors["b_dec"].double()
    if config.get("apply_b_dec_to_input", True):
        bias = bias - offset @ encoder
    if config.get("rescale_acts_by_decoder_norm", False):
        norm = decoder.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        encoder, bias, decoder = encoder * norm, bias * norm, decoder / norm[:, None]
    width, n_features = encoder.shape
    crosscoder = Crosscoder(views, width=width, n_features=n_features, sparsity=sparsity, k=k, name=name)
    crosscoder.ranks_activations = sparsity == "topk"
    n_views = len(crosscoder.views)
    with torch.no_grad():
        crosscoder.scale.fill_(factor)
        crosscoder.means.fill_(float("nan"))
        crosscoder.encoder_matrix.copy_((encoder / n_views).repeat(n_views, 1))
        crosscoder.encoder_bias.copy_(bias)
        crosscoder.decoder_matrix.copy_(decoder.repeat(1, n_views))
        crosscoder.decoder_offset.copy_(offset.repeat(n_views))
        if threshold is not None:
            norms = crosscoder.selection_norm().double()
            crosscoder.threshold.copy_(torch.where(norms > 0, threshold * norms, 1.0))  # no decoder: never active
    metadata = {**config, **(config.get("metadata") or {})}
    crosscoder.facts = {
        "imported_from": f"SAELens {config.get('architecture', 'standard')}",
        "imported_sha256": file_sha256(folder / SAE_WEIGHTS),
        "sae_of": {key: metadata.get(key) for key in ("model_name", "hook_name")},
        "one_model": True,
    }
    return crosscoder.requires_grad_(False).eval()


def export_saes(crosscoder: Crosscoder, folder: Path | str) -> list[Path]:
    """Write one SAE a view, as SAELens loads it from disk: its features are those the readout gives of that model.

    Parameters
    ----------
    crosscoder
        Views of one width under readout swap; its own readout, or swap where that is joint.
    folder
        New or empty folder; the SAEs are in subfolders named as the views.

    Returns
    -------
    list of Path
        Their folders.

    Raises
    ------
    InputError
        If the folder is not empty, or the crosscoder has no such readout or no threshold yet.

    Notes
    -----
    Architecture standard for l1, topk for topk, jumprelu for all others, with each feature's threshold on f_k. Weights
    are of raw activations. Under topk the features are contributions f_k sum_m ||d_mk||, which it ranks.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; name a new folder.")
    kind: Readout = "swap" if crosscoder.default_readout == "joint" else crosscoder.default_readout
    saes = {view: _sae(crosscoder, view, kind) for view in crosscoder.views}
    for view, (config, tensors) in saes.items():
        (folder / view).mkdir(parents=True)
        save_file(
            {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}, folder / view / SAE_WEIGHTS
        )
        write_json(folder / view / SAE_CONFIG, config)
    return [folder / view for view in saes]


def _sae(crosscoder: Crosscoder, view: str, kind: Readout) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of one view."""
    readout = crosscoder.readout_map(view=view, kind=kind, dtype=torch.float64)
    weight, bias, gate = readout.weight.detach(), readout.bias.detach(), readout.gate
    decoder = crosscoder.feature_direction(view).detach().double()
    config: dict[str, Any] = {"architecture": "standard"}
    tensors = {}
    if gate.k is not None and gate.norm is not None:
        norm = gate.norm.clamp_min(torch.finfo(torch.float32).tiny)
        weight, bias, decoder = weight * norm, bias * norm, decoder / norm[:, None]
        config = {"architecture": "topk", "k": gate.k, "rescale_acts_by_decoder_norm": False}
    elif gate.limit is not None:
        config = {"architecture": "jumprelu"}
        tensors["threshold"] = gate.limit
    tensors |= {"W_enc": weight, "b_enc": bias, "W_dec": decoder, "b_dec": crosscoder.offset(view).detach()}
    site = str(crosscoder.facts.get("site", ""))
    block = re.fullmatch(r"block(\d+)", site)
    metadata = {
        "sae_lens_version": _VERSION,
        "model_name": view,
        "hook_name": f"blocks.{block[1]}.hook_resid_post" if block else None,
        "crosscoder": crosscoder.name,
        "readout": kind,
    }
    return {
        **config,
        "d_in": len(weight),
        "d_sae": crosscoder.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }, tensors


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not sae_files(folder):
        raise InputError(f"{folder} holds no SAE: expected {SAE_CONFIG} and {SAE_WEIGHTS}; fix the path.")
    try:
        config = dict(json.loads((folder / SAE_CONFIG).read_text(encoding="utf-8")))
        tensors = load_file(folder / SAE_WEIGHTS)
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{folder} is not readable as an SAE ({str(error)[:100]}); fetch it again.") from error
    _refuse(config, tensors, folder)
    missing = [name for name in ("W_enc", "b_enc", "W_dec", "b_dec") if name not in tensors]
    if missing or tensors["W_enc"].ndim != 2:
        raise InputError(f"{folder} lacks {missing or 'W_enc [channel, feature]'}, got {sorted(tensors)[:8]}.")
    width, n_features = tensors["W_enc"].shape
    shapes = {"b_enc": (n_features,), "W_dec": (n_features, width), "b_dec": (width,)}
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise InputError(f"{folder}: {name} must have shape {shape}, got {tuple(tensors[name].shape)}.")
    broken = not_finite({name: tensors[name] for name in ("W_enc", *shapes)})
    if broken:
        raise InputError(f"{folder}: {broken} has NaN or infinite values; its training diverged, take an earlier one.")
    return config, tensors


def _refuse(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    """What one linear encoder with a threshold, and one linear decoder to the same place, cannot be."""
    architecture = config.get("architecture", "standard")
    hook = str((config.get("metadata") or {}).get("hook_name") or config.get("hook_name") or "")
    if architecture not in _ARCHITECTURES:
        raise InputError(f"{folder} is a {architecture} SAE; {', '.join(_ARCHITECTURES)} can be read.")
    if config.get("d_out", config.get("d_in")) != config.get("d_in"):
        raise InputError(f"{folder} is a transcoder, which reconstructs another place than it reads; use an SAE.")
    if config.get("reshape_activations", "none") not in ("none", None) or hook.endswith("hook_z"):
        raise InputError(f"{folder} reads attention heads (hook_z), not the residual stream; use an SAE of that.")
    scaled = [name for name in ("scaling_factor", "finetuning_scaling_factor") if name in tensors]
    if any(not bool((tensors[name] == 1).all()) for name in scaled):
        raise InputError(f"{folder} has a finetuned factor for each feature ({scaled[0]}), which cannot be expressed.")


def _scaling_factor(config: dict[str, Any], folder: Path, given: float | None) -> float:
    kind = config.get("normalize_activations", "none")
    if kind in (False, "none", None):
        return 1.0
    if kind not in (True, _AVERAGE_NORM):
        raise InputError(
            f"{folder} normalises every token by itself ({kind}), which one scale for all tokens cannot express."
        )
    file = folder / SCALER
    factor = given if given is not None or not file.is_file() else json.loads(file.read_text()).get("scaling_factor")
    if factor is None or not float(factor) > 0:
        raise InputError(
            f"{folder} was trained on activations scaled to an average norm, but does not say by what; pass "
            f'norm_scaling_factor=, write {{"scaling_factor": ...}} into {SCALER}, or fold it into the weights.'
        )
    return float(factor)


def _rule(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> tuple[Sparsity, int, Tensor | None]:
    """Sparsity rule, k (0: not known) and threshold on f_k."""
    architecture = config.get("architecture", "standard")
    activation = str(config.get("activation_fn_str", config.get("activation_fn", "relu")))
    k = int((config.get("activation_fn_kwargs") or {}).get("k", config.get("k", 0)))
    if architecture == "topk" or (architecture == "standard" and activation == "topk"):
        if k < 1:
            raise InputError(f"{folder} is a topk SAE that does not say its k; add it to {SAE_CONFIG}.")
        return "topk", k, None
    if activation != "relu":
        raise InputError(f"{folder} has the activation function {activation!r}; relu and topk can be read.")
    if architecture == "standard":
        return "l1", 0, None
    threshold = tensors.get("threshold", tensors.get("topk_threshold"))
    if threshold is None and "log_threshold" in tensors:
        threshold = tensors["log_threshold"].double().exp()
    if threshold is None:
        raise InputError(f"{folder} is a {architecture} SAE without its threshold; use one saved for inference.")
    return "jumprelu", k, threshold.double().clamp_min(0.0)
