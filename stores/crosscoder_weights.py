"""The files of a saved crosscoder, checked, and its decoder as an array for plans and comparisons that run no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from rlgen_stats.schemas.errors import InputError, StoreCorruptError, StoreError
from rlgen_stats.stores.atomic import explain_damage, read_object
from rlgen_stats.stores.digests import file_sha256

WEIGHTS: Final = "weights.safetensors"
SPEC: Final = "spec.json"
CURVE: Final = "curve.json"
"""Points of training, in order; empty for weights trained elsewhere."""
_LANES: Final = 8
"""Partial sums of a norm, interleaved over channels."""


@dataclass(frozen=True, eq=False)
class Decoder:
    """Decoder rows of a crosscoder, all views side by side, in normalised units.

    Attributes
    ----------
    name
        Of the crosscoder, for messages.
    views, widths
        Model ids, and channels of each.
    rows
        [feature, channel of all views] float32.
    weights_sha256
        Hash of the weights file; empty if the crosscoder was never saved.
    """

    name: str
    views: tuple[str, ...]
    widths: tuple[int, ...]
    rows: NDArray[np.float32]
    weights_sha256: str = ""

    @property
    def n_features(self) -> int:
        """Dictionary size."""
        return len(self.rows)

    def view_index(self, view: str) -> int:
        """Slot of a view.

        Raises
        ------
        InputError
            If there is no such view; the message lists them.
        """
        return view_position(view, self.views, crosscoder=self.name)

    def by_view(self) -> list[NDArray[np.float32]]:
        """[feature, channel] rows of each view."""
        return [self.rows[:, channels] for channels in view_slots(self.widths)]

    def view_norms(self) -> NDArray[np.float64]:
        """||d_mk||, L2: [view, feature]."""
        return np.stack([_row_norms(part) for part in self.by_view()])

    def norms(self) -> NDArray[np.float64]:
        """||d_k|| over all views' rows together: [feature]."""
        return _row_norms(self.rows)


def view_slots(widths: Sequence[int]) -> list[slice]:
    """Channels of each view where the views stand side by side."""
    ends = list(accumulate(widths))
    return [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]


def view_position(view: str, views: Sequence[str], *, crosscoder: str) -> int:
    """Slot of a view among a crosscoder's views.

    Raises
    ------
    InputError
        If there is no such view; the message lists them.
    """
    if view not in views:
        raise InputError(f"crosscoder {crosscoder!r} has no view {view!r}; its views are {', '.join(views)}.")
    return list(views).index(view)


def _row_norms(matrix: NDArray[np.float32]) -> NDArray[np.float64]:
    """L2 norm of every row, summed in single precision in the order in which torch sums on a CPU.

    Levels that amplification adds are divided by these norms and are part of an arm's hash: in double precision, arms
    stored by earlier releases would not be found again.
    """
    whole = matrix.shape[1] // _LANES * _LANES
    lanes = np.zeros((len(matrix), _LANES), dtype=np.float32)
    for start in range(0, whole, _LANES):
        part = matrix[:, start : start + _LANES]
        lanes += part * part
    total = np.zeros(len(matrix), dtype=np.float32)
    for column in (*lanes.T, *(matrix[:, whole:] ** 2).T):
        total += column
    return np.sqrt(total).astype(np.float64)


def weights_hash(folder: Path) -> str:
    """SHA-256 that the weights of the crosscoder saved in a folder must have.

    Raises
    ------
    StoreError
        If there is no finished crosscoder.
    """
    return str(_described(folder)["weights_sha256"])


def read_decoder(folder: Path) -> Decoder:
    """Decoder of the crosscoder saved in a folder.

    Raises
    ------
    StoreError
        If there is no finished crosscoder, or its spec.json does not describe these weights.
    StoreCorruptError
        If the weights are not the bytes that were saved.
    """
    described = _described(folder)
    rows = _read_rows(folder / WEIGHTS, described["weights_sha256"])
    with explain_damage(folder / SPEC):
        views = tuple(map(str, described["views"]))
        widths = tuple(map(int, described["widths"] if "widths" in described else [described["width"]] * len(views)))
    if rows.shape != (described["n_features"], sum(widths)):
        raise StoreError(
            f"{folder / WEIGHTS}: the decoder must have shape {(described['n_features'], sum(widths))} for views of "
            f"width {list(widths)}, got {rows.shape}; the weights and {SPEC} do not belong together: train the "
            "crosscoder again."
        )
    return Decoder(described["name"], views, widths, rows, described["weights_sha256"])


def read_description(folder: Path) -> dict[str, Any]:
    """Content of a finished crosscoder's spec.json; its fields are not checked.

    Raises
    ------
    StoreError
        If the spec or the weights are missing.
    """
    for name in (SPEC, WEIGHTS):
        if not (folder / name).exists():
            raise StoreError(
                f"{folder} holds no finished crosscoder: {name} is missing; run the crosscoder stage or fix the path."
            )
    return read_object(folder / SPEC)


def require_fields(described: Any, needed: Sequence[str], folder: Path) -> dict[str, Any]:
    """The description of a crosscoder, if it has these fields.

    Raises
    ------
    StoreError
        Naming the missing ones.
    """
    missing = [field for field in needed if field not in described]
    if missing:
        raise StoreError(f"{folder / SPEC} lacks {missing}; expected {list(needed)}: train the crosscoder again.")
    return dict(described)


def check_unchanged(file: Path, expected: str) -> None:
    """Refuse weights that are not the bytes that were saved.

    Raises
    ------
    StoreCorruptError
        Naming both hashes.
    """
    digest = file_sha256(file)
    if digest != expected:
        raise StoreCorruptError(
            f"{file} is not the file that was saved (SHA-256 {digest[:12]}, expected {expected[:12]}); restore it or "
            "train the crosscoder again."
        )


def _described(folder: Path) -> dict[str, Any]:
    return require_fields(read_description(folder), ("name", "views", "n_features", "weights_sha256"), folder)


def _read_rows(file: Path, expected: str) -> NDArray[np.float32]:
    check_unchanged(file, expected)
    try:
        with safe_open(file, framework="np") as handle:
            if "decoder_matrix" in handle.keys():  # noqa: SIM118 (not a mapping)
                return _array(handle.get_tensor("decoder_matrix"))
            by_view = _array(handle.get_tensor("decoder"))  # format version 1: [view, feature, channel]
            return by_view.transpose(1, 0, 2).reshape(by_view.shape[1], -1)
    except SafetensorError as error:
        raise StoreCorruptError(f"{file} holds no decoder ({error}); train the crosscoder again.") from error


def _array(tensor: Any) -> NDArray[np.float32]:
    return np.asarray(tensor, dtype=np.float32)
