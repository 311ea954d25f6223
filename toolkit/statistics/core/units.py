"""Units of inference: prompts, or the clusters of prompts that depend on one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import MODEL, PROMPT
from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.toolkit.statistics.kernels.draws import stream
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray
from rlgen_stats.toolkit.statistics.kernels.unit_tables import MIN_CLUSTERS

TOKEN_WARNING: Final = (
    "rows are tokens taken as independent: at ICC .05 and 64 tokens a prompt a nominal 5% test rejects 32% of true "
    "nulls"
)
"""Attribute ``warning`` of every result computed with ``unit='token'``."""


def check_unit(unit: str, allow_token_unit: bool = False) -> None:
    """Refuse tests that count tokens as independent.

    Raises
    ------
    RefusedError
        For ``unit="token"`` without ``allow_token_unit``.
    InputError
        For anything else that is not ``"prompt"``.
    """
    if unit == "token" and not allow_token_unit:
        raise RefusedError(
            "unit='token' would count dependent tokens as independent evidence (at ICC .05 a nominal 5% test rejects "
            "32% of true nulls); use unit='prompt', and clusters='cluster' where prompts share a template, or, if rows "
            "are tokens known to be independent, allow_token_unit=True."
        )
    if unit not in ("prompt", "token"):
        raise InputError(f"unit must be 'prompt', got {unit!r}; name a coarser unit with clusters=.")


def unit_attrs(unit: str, clusters: str | None, codes: IntArray | None) -> dict[str, str]:
    """Attribute ``unit`` of a result, and ``warning`` where tokens were taken as units."""
    if codes is not None and clusters is not None:
        return {"unit": clusters}
    return {"unit": unit} | ({"warning": TOKEN_WARNING} if unit == "token" else {})


def cluster_codes(dataset: xr.Dataset, clusters: str | None) -> IntArray | None:
    """Integer code of each prompt's cluster; None when prompts are the units (no clusters, or clusters of one prompt).

    Raises
    ------
    InputError
        If the dataset has no such coordinate of the prompts.
    """
    if clusters is None:
        return None
    if clusters not in dataset.coords or dataset[clusters].dims != (PROMPT,):
        raise InputError(
            f"clusters={clusters!r} is not a coordinate of the prompts; expected one of "
            f"{sorted(str(name) for name, c in dataset.coords.items() if c.dims == (PROMPT,))}."
        )
    codes: IntArray = np.unique(np.asarray(dataset[clusters].values).astype(np.str_), return_inverse=True)[1]
    return None if len(np.unique(codes)) == len(codes) else codes.reshape(-1).astype(np.int64)


def check_clusters(codes: IntArray | None) -> None:
    """Refuse tests on fewer than six clusters.

    Raises
    ------
    RefusedError
        Naming the number of clusters and the smallest attainable p-value.
    """
    n = None if codes is None else len(np.unique(codes))
    if n is not None and n < MIN_CLUSTERS:
        raise RefusedError(
            f"{n} clusters cannot carry a test (the smallest two-sided sign-flip p is {2.0 ** (1 - n):.3g}); give "
            f"at least {MIN_CLUSTERS} clusters, or clusters=None if the prompts are independent."
        )


def cluster_sums(values: FloatArray, codes: IntArray | None) -> FloatArray:
    """Sums over the prompts (axis 0) of each cluster; ``values`` itself when prompts are the units."""
    if codes is None:
        return values
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    sums: FloatArray = np.add.reduceat(values[order], starts, axis=0)
    return sums


def unit_means(values: FloatArray, codes: IntArray | None) -> FloatArray:
    """Means over the prompts (axis 0) of each cluster: one row per unit, all units with equal weight."""
    if codes is None:
        return values
    sizes = np.unique(codes, return_counts=True)[1].astype(np.float64)
    means: FloatArray = cluster_sums(values, codes) / sizes.reshape(-1, *[1] * (values.ndim - 1))
    return means


def jackknife_groups(unit: IntArray, n_groups: int, seed: int) -> IntArray:
    """Group of every row, 0 to at most ``n_groups`` - 1: whole units at random, as many in each (within one)."""
    names, codes = np.unique(unit, return_inverse=True)
    groups: IntArray = stream(seed, 0).permutation(len(names))[codes.reshape(-1)] % n_groups
    return groups


def present_prompts(features: xr.Dataset, models: Sequence[str]) -> NDArray[np.bool_]:
    """Prompts with at least one summarised token in every one of ``models``."""
    if "n_tokens" not in features:
        return np.ones(features.sizes[PROMPT], dtype=bool)
    counts = features["n_tokens"].sel({MODEL: list(models)}).transpose(MODEL, PROMPT).values
    return np.asarray((counts > 0).all(axis=0))
