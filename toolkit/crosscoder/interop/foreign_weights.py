"""Crosscoder weights in the layouts of other tools: in and out, without pickle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.stores import write_json
from rlgen_stats.stores.digests import file_sha256
from rlgen_stats.toolkit.crosscoder.interop.layouts import (
    LAYOUTS,
    PARTITION,
    SCALER,
    ForeignWeights,
    allowed_features,
    read_foreign,
)
from rlgen_stats.toolkit.crosscoder.model.crosscoder import Crosscoder
from rlgen_stats.toolkit.crosscoder.model.readout import Sparsity

_SCALE: Final = "activation_global_scale"
_NORMALISATIONS: Final = {1: "CROSSCODER", 2: "SAE", 3: "MIXED", 4: "NONE", 5: "DECOUPLED"}
"""Number in the file -> which decoder norm scales a feature before it is compared with the threshold."""


def import_crosscoder(path: Path | str, views: Sequence[str], *, name: str = "imported") -> Crosscoder:
    """A crosscoder trained elsewhere, in one of the ``LAYOUTS``.

    Parameters
    ----------
    path
        A .safetensors or .pt file, or the folder it is in.
    views
        Model id of each layer (model) of the weights, in order.
    name
        Its name here.

    Returns
    -------
    Crosscoder
        ``sparsity`` is ``"l1"`` without a threshold, ``"batchtopk"`` with one on contributions, ``"dfc"`` with one and
        features that one view alone may use, ``"jumprelu"`` (one threshold per feature) where the file's threshold is
        on another scale. Save it with ``save``.

    Raises
    ------
    InputError
        If the file is missing, holds anything but tensors, lacks one of them, has one too many or NaN in it, was
        trained with a code per layer or with a normalisation that one scalar per view cannot express, has no learned
        threshold, or has another number of layers than ``views``.

    Notes
    -----
    In those files: x = (a - mean_m) g_m, f = relu(x W + b), a_hat = (f D + c) / g_m + mean_m. Here: x = a s_m. The
    function is the same with s_m = g_m, b - sum_m mean_m g_m W_m and c + mean_m g_m; decoder norms and contributions
    do not change. Files without a normaliser have unknown means, so readout ``own`` is refused, and the g_m of
    activation_scaler.json beside them, or 1.

    Dedicated features (dfc) come last here, view by view, after the shared ones: ``facts["feature_order"]`` is the
    number that each feature has in the file, where that differs.
    """
    theirs = read_foreign(Path(path))
    allowed = allowed_features(theirs)
    theirs = replace(theirs, encoder=theirs.encoder * allowed[:, None], decoder=theirs.decoder * allowed[:, :, None])
    n_layers, width, n_features = theirs.encoder.shape
    if len(views) != n_layers:
        raise InputError(f"{theirs.file} has {n_layers} layers, but {len(views)} views were named: {list(views)}.")
    scale, mean = _normaliser(theirs)
    sparsity, threshold = _threshold(theirs)
    k = int(theirs.others.get("k", 0))
    order, sizes = torch.arange(n_features), [0] * n_layers
    if sparsity == "batchtopk" and not allowed.all():
        sparsity, (order, sizes) = "dfc", _dedicated(allowed, theirs.file)
    exclusive = dict(zip(views, sizes, strict=True)) if sparsity == "dfc" else None
    crosscoder = Crosscoder(
        views, width=width, n_features=n_features, sparsity=sparsity, k=k, exclusive=exclusive, name=name
    )
    encoder = theirs.encoder[:, :, order].double()
    normalised_mean = (torch.nan_to_num(mean) * scale[:, None]).double()
    with torch.no_grad():
        crosscoder.scale.copy_(scale)
        crosscoder.means.copy_(mean.flatten())
        crosscoder.encoder_matrix.copy_(encoder.flatten(0, 1))
        # float64 until the end: the bias absorbs the mean, and both may be much larger than their difference
        mean_code = torch.einsum("vc,vcf->f", normalised_mean, encoder)
        crosscoder.encoder_bias.copy_(theirs.encoder_bias[order].double() - mean_code)
        crosscoder.decoder_matrix.copy_(theirs.decoder[:, order].transpose(0, 1).flatten(1))
        crosscoder.decoder_offset.copy_((theirs.decoder_bias.double() + normalised_mean).flatten())
        if threshold is not None:
            crosscoder.threshold.copy_(threshold)
    crosscoder.facts = {"imported_from": theirs.file.name, "imported_sha256": file_sha256(theirs.file)}
    if not torch.equal(order, torch.arange(n_features)):
        crosscoder.facts["feature_order"] = order.tolist()
    return crosscoder.requires_grad_(False).eval()


def export_crosscoder(crosscoder: Crosscoder, folder: Path | str, *, layout: str = "crosscoder_learning") -> Path:
    """Write a crosscoder as another tool opens it.

    Parameters
    ----------
    crosscoder
        Views of one width; sparsity l1, batchtopk or dfc, for layout ``model-diff`` l1.
    folder
        New or empty folder.
    layout
        One of ``LAYOUTS``: ``"crosscoder_learning"``, which dictionary_learning and, two views with dedicated features,
        dfc_learning open too; or ``"model-diff"``, whose activation_scaler.json says what activations are multiplied
        by, since those weights do not.

    Returns
    -------
    Path
        The weights file.

    Raises
    ------
    InputError
        If the layout is none or cannot hold this crosscoder, or the folder is not empty.
    """
    folder = Path(folder)
    if layout not in LAYOUTS:
        raise InputError(f"the layouts of crosscoders are {', '.join(LAYOUTS)}, got {layout!r}; name one of them.")
    able = ("l1",) if layout == "model-diff" else ("l1", "batchtopk", "dfc")
    if crosscoder.sparsity not in able:
        raise InputError(
            f"the layout {layout} holds crosscoders of sparsity {', '.join(able)}, but {crosscoder.name!r} is "
            f"{crosscoder.sparsity}; choose another layout, or share its own weights.safetensors and spec.json."
        )
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; name a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    tensors, config = (_model_diff if layout == "model-diff" else _n_layer)(crosscoder)
    file = folder / LAYOUTS[layout].files[0]
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, file, {"format": "pt"})
    write_json(folder / LAYOUTS[layout].config, config)
    if layout == "model-diff":
        write_json(folder / SCALER, {"scaling_factor": crosscoder.scale.tolist()})
    return file


def _model_diff(crosscoder: Crosscoder) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {
        "W_enc": crosscoder.encoder,
        "b_enc": crosscoder.encoder_bias,
        "W_dec": crosscoder.decoder.transpose(0, 1),
        "b_dec": crosscoder.decoder_bias,
    }
    settings = {"d_in": crosscoder.width, "dict_size": crosscoder.n_features, "enc_dtype": "fp32"}
    return tensors, settings | {"device": "cpu", "seed": 0, "dec_init_norm": 0.08}


def _n_layer(crosscoder: Crosscoder) -> tuple[dict[str, Tensor], dict[str, Any]]:
    width, n_views, n_features = crosscoder.width, len(crosscoder.views), crosscoder.n_features
    scale = crosscoder.scale.detach().float().cpu()
    mean = torch.nan_to_num(crosscoder.mean.detach().cpu())
    normalised_mean = (mean * scale[:, None]).double()
    encoder = crosscoder.encoder.detach().cpu()
    mean_code = torch.einsum("vc,vcf->f", normalised_mean, encoder.double())
    bias = (crosscoder.encoder_bias.detach().cpu().double() + mean_code).float()
    decoder = crosscoder.decoder.detach().cpu()
    config: dict[str, Any] = {
        "activation_dim": width,
        "dict_size": n_features,
        "num_layers": n_views,
        "code_normalization": "CROSSCODER",
        "dict_class": "CrossCoder" if crosscoder.sparsity == "l1" else "BatchTopKCrossCoder",
    }
    tensors = {}
    if crosscoder.exclusive:  # theirs come first, view by view
        n_shared = min(part.start for part in crosscoder.exclusive.values())
        encoder, bias, decoder = encoder.roll(-n_shared, 2), bias.roll(-n_shared), decoder.roll(-n_shared, 1)
        mask = torch.ones(n_views, n_features, dtype=torch.uint8)
        for view, part in crosscoder.exclusive.items():
            others = [m for m, other in enumerate(crosscoder.views) if other != view]
            mask[others, part.start - n_shared : part.stop - n_shared] = 0
        tensors[PARTITION] = mask
        if n_views == 2:
            parts = (crosscoder.exclusive.get(view, slice(0, 0)) for view in crosscoder.views)
            # half a feature more, so that rounding down gives the number back
            shares = [(part.stop - part.start + 0.5) / n_features if part.stop else 0.0 for part in parts]
            config |= {"model_a_exclusive_pct": shares[0], "model_b_exclusive_pct": shares[1]}
            config["dict_class"] = "DedicatedFeatureBatchTopKCrossCoder"
    tensors |= {
        "encoder.weight": encoder,
        "encoder.bias": bias,
        "decoder.weight": decoder,
        "decoder.bias": (crosscoder.decoder_bias.detach().cpu().double() - normalised_mean).float(),
        "code_normalization_id": torch.tensor(1),
        "target_rms": torch.tensor(1.0),
        "activation_mean": mean,
        "activation_std": (1.0 / (scale * width**0.5))[:, None].expand(n_views, width),
        "activation_global_scale": scale,
    }
    if crosscoder.sparsity != "l1":
        tensors |= {"k": torch.tensor(crosscoder.k, dtype=torch.int32), "threshold": crosscoder.threshold.float()}
        config["k"] = crosscoder.k
    return tensors, config


def _dedicated(allowed: Tensor, file: Path) -> tuple[Tensor, list[int]]:
    """The file's number of each feature here, shared ones first, and how many each view has for itself."""
    n_views = len(allowed)
    n_users = allowed.sum(dim=0)
    if not bool(((n_users == 1) | (n_users == n_views)).all()):
        raise InputError(f"{file} has features that some views may use and others not; expected all views, or one.")
    owner = torch.where(n_users == n_views, -1, allowed.int().argmax(dim=0))
    return owner.argsort(stable=True), [int((owner == view).sum()) for view in range(n_views)]


def _normaliser(theirs: ForeignWeights) -> tuple[Tensor, Tensor]:
    """Scale [view] and mean [view, channel]; NaN means where the file has no normaliser."""
    layers, width, _ = theirs.encoder.shape
    tensors = theirs.others
    unknown = torch.full((layers, width), float("nan"))
    mean, std = tensors.get("activation_mean", unknown), tensors.get("activation_std", unknown)
    if bool(mean.isnan().any() or std.isnan().any()):
        return torch.ones(layers) if theirs.scaler is None else theirs.scaler, unknown
    scale = tensors.get(_SCALE)
    for name, shape in (("activation_mean", (layers, width)), ("activation_std", (layers, width)), (_SCALE, (layers,))):
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise InputError(f"{theirs.file}: {name} must have shape {shape}, got {tuple(tensors[name].shape)}.")
    # normalised as one scalar per view where the scale follows from the total variance; 1e-8 as in crosscoder_learning
    expected = float(tensors.get("target_rms", torch.tensor(1.0))) / (std.double().square().sum(dim=1) + 1e-8).sqrt()
    if scale is None:
        return expected.float(), mean.float()
    rounding = max(torch.finfo(tensor.dtype).eps for tensor in (scale, std))  # a file in bfloat16 has three digits
    if not torch.allclose(scale.double(), expected, rtol=max(1e-3, rounding)):
        raise InputError(
            f"{theirs.file} was trained on activations normalised neuron by neuron, which one scalar per view cannot "
            "express; train it with keep_relative_variance."
        )
    return scale.float(), mean.float()


def _threshold(theirs: ForeignWeights) -> tuple[Sparsity, Tensor | None]:
    """Sparsity rule and threshold on f_k sum_m ||d_mk||."""
    tensors, file = theirs.others, theirs.file
    if "threshold" not in tensors:
        return "l1", None
    kind = _NORMALISATIONS.get(int(tensors.get("code_normalization_id", torch.tensor(1))), "unknown")
    threshold = tensors["threshold"].double()
    norms = theirs.decoder.double().norm(dim=2)
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
        alpha_sae = float(theirs.config.get("code_normalization_alpha_sae", 1.0))
        alpha_cc = float(theirs.config.get("code_normalization_alpha_cc", 0.1))
        scale = alpha_sae * norms.square().sum(dim=0).sqrt() + alpha_cc * norms.sum(dim=0)
    return "jumprelu", threshold * norms.sum(dim=0) / scale.clamp_min(torch.finfo(torch.float32).tiny)
