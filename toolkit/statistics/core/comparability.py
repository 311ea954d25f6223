"""Which numbers may be compared: datasets of one readout, text mode, dictionary and scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import xarray as xr

from rlgen_stats.schemas.errors import RefusedError

SOURCE_ATTRS: Final = ("readout", "text_mode", "crosscoder", "scale")
"""Attributes of the features that are copied to every result computed from them."""

_REMEDIES: Final = {
    "readout": "encode both with the same readout",
    "text_mode": "summarise both on the same text mode (forced or onpolicy)",
    "crosscoder": "encode both with the same crosscoder, or match features across dictionaries first",
    "scale": "encode both in the same scale",
    "study_id": "use stores of one study",
}


def check_comparable(*datasets: xr.Dataset | xr.DataArray, keys: Sequence[str] = tuple(_REMEDIES)) -> None:
    """Refuse to combine datasets whose attributes say that their numbers are not comparable.

    Parameters
    ----------
    datasets
        Features, outcomes or results; an attribute that one of them lacks is not compared.
    keys
        Attributes that must agree; by default readout, text_mode, crosscoder, scale and study_id.

    Raises
    ------
    RefusedError
        Naming the attribute, both values and the remedy.
    """
    for key in keys:
        values = list(dict.fromkeys(str(d.attrs[key]) for d in datasets if d.attrs.get(key) is not None))
        if len(values) > 1:
            raise RefusedError(
                f"datasets with {key} {values[0]!r} and {values[1]!r} cannot be combined: their numbers are not "
                f"comparable; {_REMEDIES.get(key, 'compute each separately')}."
            )


def check_contribution_scale(features: xr.Dataset, what: str) -> None:
    """Refuse to rank raw activations of different features against each other.

    Raises
    ------
    RefusedError
        Unless ``features`` are in contribution scale.
    """
    scale = features.attrs.get("scale")
    if scale != "contribution":
        raise RefusedError(
            f"{what} of different features can be compared only in contribution scale (f ||d||), these features have "
            f"scale={scale!r}; encode them with scale='contribution', or say so in features_dataset if they are."
        )


def source_attrs(features: xr.Dataset) -> dict[str, Any]:
    """Attributes of ``features`` (``SOURCE_ATTRS``) for a result computed from them."""
    return {name: features.attrs[name] for name in SOURCE_ATTRS if name in features.attrs}
