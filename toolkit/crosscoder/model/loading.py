"""Crosscoders from their folders, checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from rlgen_stats.schemas.errors import StoreError
from rlgen_stats.stores.crosscoder_weights import SPEC, WEIGHTS, check_unchanged, read_description, require_fields
from rlgen_stats.toolkit.crosscoder.model.crosscoder import FORMAT_VERSION, Crosscoder
from rlgen_stats.toolkit.crosscoder.model.files import read_tensors

_FIELDS: Final = (
    "format_version",
    "name",
    "views",
    "widths",
    "n_features",
    "sparsity",
    "k",
    "exclusive",
    "readout",
    "weights_sha256",
)
"""What spec.json must say."""


UNKNOWN_AS_NAN: Final = frozenset({"means", "threshold"})
"""Tensors that are NaN where they are not known: of weights trained elsewhere, or with a rule that needs none."""


def load_crosscoder(folder: Path | str, *, device: str | torch.device = "cpu") -> Crosscoder:
    """A saved crosscoder, in evaluation mode.

    Parameters
    ----------
    folder
        Folder with weights.safetensors and spec.json.
    device
        Torch device.

    Raises
    ------
    StoreError
        If a file is missing, the format is newer, a field is missing, a tensor has another shape than declared or
        values that are not finite, or an exclusive feature has weights in another view.
    StoreCorruptError
        If the weights are not the bytes that were saved.

    Examples
    --------
    >>> crosscoder = load_crosscoder("runs/demo/crosscoder/main")  # doctest: +SKIP
    >>> crosscoder.feature_direction("rl@80").shape  # doctest: +SKIP
    """
    folder = Path(folder)
    described = _read_spec(folder)
    crosscoder = Crosscoder(
        described["views"],
        width=described["widths"],
        n_features=described["n_features"],
        sparsity=described["sparsity"],
        k=described["k"],
        exclusive=described["exclusive"],
        readout=described["readout"],
        name=described["name"],
    )
    crosscoder.ranks_activations = bool(described.get("ranks_activations", False))
    crosscoder.facts = dict(described.get("facts", {}))
    crosscoder.weights_sha256, crosscoder.folder = described["weights_sha256"], folder
    tensors = _read_weights(folder / WEIGHTS, described)
    if "fit_weight" in tensors:  # optional: the readout fit, where it has been fitted
        crosscoder.fit_weight = torch.empty(crosscoder.width, crosscoder.n_features)
        crosscoder.fit_bias = torch.empty(crosscoder.n_features)
    if "shared_decoder" in tensors:  # optional: after objectives paired and both
        crosscoder.shared_decoder = torch.empty(crosscoder.n_features, crosscoder.width)
    for name, expected in crosscoder.state_dict().items():
        if name not in tensors or tensors[name].shape != expected.shape:
            got = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise StoreError(
                f"{folder / WEIGHTS}: tensor {name!r} must have shape {tuple(expected.shape)} for "
                f"views of width {list(crosscoder.widths)} and {crosscoder.n_features} features, "
                f"got {got}; the weights and {SPEC} do not belong together: train the crosscoder again."
            )
    used = {name: tensors[name] for name in crosscoder.state_dict()}
    broken = not_finite({name: used[name] for name in used.keys() - UNKNOWN_AS_NAN})
    if broken:
        raise StoreError(f"{folder / WEIGHTS}: {broken} has NaN or infinite values; train the crosscoder again.")
    crosscoder.load_state_dict(used)
    _check_exclusive(crosscoder, folder / WEIGHTS)
    return crosscoder.requires_grad_(False).eval().to(device)


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor by name that holds NaN or an infinity: its training diverged, or its file is damaged."""
    return next((name for name in sorted(tensors) if not bool(tensors[name].isfinite().all())), None)


def _read_spec(folder: Path) -> dict[str, Any]:
    described = read_description(folder)
    version = described.get("format_version") if isinstance(described, dict) else None
    if version == 1 and isinstance(described.get("views"), list):
        described = {"widths": [described.get("width")] * len(described["views"]), "exclusive": {}} | described
    elif version != FORMAT_VERSION:
        raise StoreError(
            f"{folder / SPEC} has crosscoder format version {version!r}, this release reads 1 to {FORMAT_VERSION}; "
            "use a matching release of rlgen-stats or train again."
        )
    return require_fields(described, _FIELDS, folder)


def _read_weights(file: Path, described: dict[str, Any]) -> dict[str, Tensor]:
    check_unchanged(file, described["weights_sha256"])
    tensors = read_tensors(file)[0]
    return _from_version_1(tensors) if described["format_version"] == 1 else tensors


def _from_version_1(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Version 1 kept [view, channel, feature], [view, feature, channel], [view, channel] and [view, channel]."""
    try:
        return tensors | {
            "encoder_matrix": tensors["encoder"].flatten(0, 1),
            "decoder_matrix": tensors["decoder"].transpose(0, 1).flatten(1),
            "decoder_offset": tensors["decoder_bias"].flatten(),
            "means": tensors["mean"].flatten(),
        }
    except KeyError as error:
        raise StoreError(f"a crosscoder of format version 1 lacks tensor {error}; train it again.") from error


def _check_exclusive(crosscoder: Crosscoder, file: Path) -> None:
    for view, features in crosscoder.exclusive.items():
        others = [slot for other, slot in zip(crosscoder.views, crosscoder.slots(), strict=True) if other != view]
        leaks = any(
            bool(crosscoder.decoder_matrix[features, slot].any() or crosscoder.encoder_matrix[slot, features].any())
            for slot in others
        )
        if leaks:
            raise StoreError(
                f"{file}: features {features.start} to {features.stop - 1} are declared exclusive to {view!r} but have "
                "weights in another view; train the crosscoder again."
            )
