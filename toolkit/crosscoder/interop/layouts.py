"""The files in which other tools keep crosscoders: names and axes of their tensors, read without pickle.

``LAYOUTS`` is the one table; a layout is recognised by the names of its tensors, never by their shapes: two models of
two channels look the same either way round.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.crosscoder.model.loading import not_finite

SCALER: Final = "activation_scaler.json"
"""What activations are multiplied by before the encoder, where the weights do not say: a name of SAELens."""
PARTITION: Final = "partition_mask"
"""Which features each view may use, [view, feature], of a crosscoder with dedicated features."""
PARTITION_CONFIG: Final = "_partition_config"
"""The same as shares of all features, beside the tensors of dfc_learning."""
_WRAPPERS: Final = re.compile(r"^(_orig_mod\.|module\.)+")
"""Prefixes of tensors saved from a compiled module, or from one trained on several devices."""
_LARGEST_LEAK: Final = 1e-6
"""Weights up to this, of features in a view that may not use them, are zeros that were rounded (as in dfc_learning)."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one family of tools names a crosscoder's tensors. The axes of the encoder are [view, channel, feature]."""

    tools: str
    encoder: str
    encoder_bias: str
    """[feature]."""
    decoder: str
    decoder_axes: tuple[str, str, str]
    decoder_bias: str
    """[view, channel]."""
    others: frozenset[str]
    """Tensors that may come along; any other could change what the weights compute, and is refused."""
    files: tuple[str, ...]
    """Names looked for in a folder; the first one is written."""
    config: str
    """Settings beside the file."""

    @property
    def weights(self) -> dict[str, tuple[str, ...]]:
        """Name -> axes of the tensors without which there is no crosscoder."""
        return {
            self.encoder: ("view", "channel", "feature"),
            self.encoder_bias: ("feature",),
            self.decoder: self.decoder_axes,
            self.decoder_bias: ("view", "channel"),
        }

    def __str__(self) -> str:
        axes = "; ".join(f"{name} [{', '.join(axes)}]" for name, axes in self.weights.items())
        return f"{self.tools}: {' or '.join(self.files)} with {axes}"


LAYOUTS: Final = {
    "crosscoder_learning": Layout(
        tools="crosscoder_learning, dictionary_learning and dfc_learning",
        encoder="encoder.weight",
        encoder_bias="encoder.bias",
        decoder="decoder.weight",
        decoder_axes=("view", "feature", "channel"),
        decoder_bias="decoder.bias",
        others=frozenset(
            {
                *("activation_mean", "activation_std", "activation_global_scale", "target_rms"),
                *("code_normalization_id", "k", "threshold", PARTITION, PARTITION_CONFIG),
            }
        ),
        files=("model.safetensors", "model.pt", "ae.pt"),
        config="config.json",
    ),
    "model-diff": Layout(
        tools="crosscoder-model-diff-replication",
        encoder="W_enc",
        encoder_bias="b_enc",
        decoder="W_dec",
        decoder_axes=("feature", "view", "channel"),
        decoder_bias="b_dec",
        others=frozenset({PARTITION}),
        files=("cc_weights.safetensors", "cc_weights.pt"),
        config="cfg.json",
    ),
}


@dataclass(frozen=True, kw_only=True)
class ForeignWeights:
    """A crosscoder as its file has it, in its tool's units."""

    file: Path
    encoder: Tensor
    """[view, channel, feature]."""
    encoder_bias: Tensor
    decoder: Tensor
    """[view, feature, channel]."""
    decoder_bias: Tensor
    others: dict[str, Any]
    """What came along, by name."""
    config: dict[str, Any]
    """Settings beside the file; empty if there are none."""
    scaler: Tensor | None
    """Factor of each view, of ``SCALER``."""


def weights_file(path: Path) -> Path:
    """The weights at a path: the file itself, or the one in the folder.

    Raises
    ------
    InputError
        If there is none.
    """
    if path.is_file():
        return path
    names = [name for layout in LAYOUTS.values() for name in layout.files]
    files = [path / name for name in names if (path / name).is_file()]
    if files:
        return files[0]
    if not path.is_dir():
        raise InputError(f"there is nothing at {path}; expected a weights file or its folder: fix the path.")
    held = ", ".join(sorted(file.name for file in path.iterdir())[:6]) or "nothing"
    raise InputError(
        f"{path} has no weights of a known layout, it has {held}; looked for {_known()} | a folder of ours | SAELens: "
        "cfg.json and sae_weights.safetensors. Name the weights file itself, or write one of these."
    )


def weights_files(path: Path) -> list[Path]:
    """The weights at a path and what beside them decides what they compute."""
    file = weights_file(path)
    beside = (file.parent / name for name in (*(layout.config for layout in LAYOUTS.values()), SCALER))
    return [file, *(one for one in beside if one.is_file())]


def read_foreign(path: Path) -> ForeignWeights:
    """Read the weights at a path.

    Raises
    ------
    InputError
        If there are none, they are of no layout in ``LAYOUTS``, hold anything but tensors, unknown tensors, NaN, or
        shapes that do not belong together.
    """
    file = weights_file(path)
    held = _load(file)
    layout = next((one for one in LAYOUTS.values() if one.weights.keys() <= held.keys()), None)
    if layout is None or held[layout.encoder].ndim != 3:
        raise InputError(f"{file} is no crosscoder of a known layout: expected {_known()}; got {sorted(held)[:8]}.")
    _check(held, layout, file)
    order = [layout.decoder_axes.index(axis) for axis in ("view", "feature", "channel")]
    return ForeignWeights(
        file=file,
        encoder=held[layout.encoder],
        encoder_bias=held[layout.encoder_bias],
        decoder=held[layout.decoder].permute(order),
        decoder_bias=held[layout.decoder_bias],
        others={name: held[name] for name in layout.others & held.keys()},
        config=_settings(file.parent / layout.config),
        scaler=_scaler(file.parent / SCALER, len(held[layout.encoder])),
    )


def allowed_features(weights: ForeignWeights) -> Tensor:
    """Whether a view may use a feature: [view, feature].

    As a mask says; else as shares of all features say: the first view's come first, then the second's, then those of
    both; else every view may use every one.

    Raises
    ------
    InputError
        If the partition does not fit the weights.
    """
    n_views, _, n_features = weights.encoder.shape
    mask, shares = weights.others.get(PARTITION), weights.others.get(PARTITION_CONFIG, weights.config)
    if mask is not None:
        if tuple(mask.shape) != (n_views, n_features) or not bool(((mask == 0) | (mask == 1)).all()):
            raise InputError(
                f"{weights.file}: {PARTITION} must be zeros and ones, [view, feature] {(n_views, n_features)}, got "
                f"{tuple(mask.shape)}."
            )
        return torch.ne(mask, 0)
    allowed = torch.ones(n_views, n_features, dtype=torch.bool)
    names = [f"model_{letter}_exclusive_pct" for letter in "ab"]
    if not isinstance(shares, dict) or not any(name in shares for name in names):
        return allowed
    try:
        sizes = [int(n_features * float(shares[name])) for name in names]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{weights.file}: its partition must name {' and '.join(names)}, got {shares}.") from error
    if n_views != 2 or min(sizes) < 0 or sum(sizes) > n_features:
        raise InputError(f"{weights.file}: {sizes} exclusive features do not fit {n_views} views of {n_features}.")
    allowed[1, : sizes[0]] = False
    allowed[0, sizes[0] : sum(sizes)] = False
    used = torch.maximum(weights.encoder.abs().amax(dim=1), weights.decoder.abs().amax(dim=2))
    leak = float((used * ~allowed).max())
    if leak > _LARGEST_LEAK:
        raise InputError(
            f"{weights.file}: features that its partition gives to one view have weights up to {leak:.2g} in the "
            "other; its partition and its weights do not belong together."
        )
    return allowed


def _known() -> str:
    return " | ".join(map(str, LAYOUTS.values()))


def _load(file: Path) -> dict[str, Any]:
    try:
        if file.suffix == ".safetensors":
            held: Any = load_file(file)
        else:
            held = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(
            f"{file} could not be read as tensors ({type(error).__name__}); expected a .safetensors file, or what "
            "torch.save writes of tensors and nothing else: nothing pickled is opened."
        ) from error
    if not isinstance(held, dict):
        raise InputError(f"{file} holds {type(held).__name__}, expected named tensors.")
    named = {_WRAPPERS.sub("", str(name)): value for name, value in held.items()}
    strange = [
        name for name, value in named.items() if name != PARTITION_CONFIG and not isinstance(value, torch.Tensor)
    ]
    if strange:
        raise InputError(
            f"{file} holds more than tensors: {strange[0]!r} is {type(named[strange[0]]).__name__}; save the module's "
            "state_dict alone."
        )
    return named


def _check(held: dict[str, Any], layout: Layout, file: Path) -> None:
    unknown = sorted(held.keys() - layout.weights.keys() - layout.others)
    if unknown:
        raise InputError(
            f"{file} has tensors that the layout of {layout.tools} does not know, {', '.join(unknown[:4])}, and what "
            "they change is unknown; fold them into the weights or leave them out."
        )
    sizes = dict(zip(layout.weights[layout.encoder], held[layout.encoder].shape, strict=True))
    for name, axes in layout.weights.items():
        shape = tuple(sizes[axis] for axis in axes)
        if tuple(held[name].shape) != shape:
            raise InputError(
                f"{file}: {name} must have shape {shape}, got {tuple(held[name].shape)}; its axes are "
                f"{', '.join(axes)}."
            )
        if not held[name].is_floating_point() or held[name].layout is not torch.strided:
            raise InputError(f"{file}: {name} is {held[name].dtype}, {held[name].layout}; expected plain real numbers.")
    broken = not_finite({name: held[name] for name in [*layout.weights, *({"threshold"} & held.keys())]})
    if broken:
        raise InputError(f"{file}: {broken} has NaN or infinite values; its training diverged, take an earlier file.")


def _settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is no JSON ({str(error)[:100]}); fetch it again.") from error
    return settings if isinstance(settings, dict) else {}


def _scaler(file: Path, n_views: int) -> Tensor | None:
    """The factor of each view that a file names, one for all or one each."""
    if not file.is_file():
        return None
    factor = _settings(file).get("scaling_factor")
    factors: list[Any] = factor if isinstance(factor, list) else [factor] * n_views
    if len(factors) != n_views or not all(type(one) in (int, float) and 0 < one < float("inf") for one in factors):
        raise InputError(
            f"{file} must say what each of the {n_views} views is multiplied by, "
            f'{{"scaling_factor": [...]}}, got {factor!r}.'
        )
    return torch.tensor(factors, dtype=torch.float32)
