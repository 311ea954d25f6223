"""Labels of tokens and prompts: lazy coordinates, and selection by label.

Tokens carry codes, prompts carry text, and ``spans`` lists the runs of tokens that share prompt, source and segment,
so that a selection by labels reads the spans (a few million rows for 10^9 tokens) and never the tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing
from xarray.core.indexing import IndexSelResult

from rlgen_stats.schemas.dims import (
    CLUSTER,
    DOMAIN,
    POSITION,
    PROMPT,
    PROMPT_LABELS,
    SEGMENT,
    SOURCE,
    SPLIT,
    TASK,
    TOKEN,
    TOKEN_ID,
)
from rlgen_stats.schemas.errors import InputError, StoreCorruptError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.stores.atomic import ZARR_JSON, explain_damage
from rlgen_stats.stores.digests import read_checked, read_document
from rlgen_stats.stores.prompt_index import label_values, selected_labels
from rlgen_stats.stores.seals import check_listed, sealed_store
from rlgen_stats.stores.tables import fixed_width, open_unread

TOKENS_GROUP: Final = "tokens"
PROMPTS_GROUP: Final = "prompts"
SPANS_GROUP: Final = "spans"
LONGEST: Final = "longest"
"""Attribute of a column of prompts: characters of its longest text. Columns of older stores have none."""
SELECTABLE: Final = (PROMPT, TASK, DOMAIN, SPLIT, CLUSTER, SOURCE, SEGMENT)
"""Labels that select tokens without reading the tokens."""


def has_labels(store: Path) -> bool:
    """Whether a store is one of activations; a group called tokens alone may also be a result."""
    return any((store / group / ZARR_JSON).exists() for group in (PROMPTS_GROUP, SPANS_GROUP))


class TokenLabels:
    """The labels of one activation store: each column of prompts and spans is read when it is first used; codes never.

    Parameters
    ----------
    path
        Activation store.
    """

    def __init__(self, path: Path) -> None:
        attrs = read_document(path)["attributes"]
        with explain_damage(path / ZARR_JSON):
            self.path, self.n_tokens, self.hash = path, int(attrs["n_tokens"]), str(attrs["labels_hash"])
        self._legends: dict[str, NDArray[Any]] = {}

    @cached_property
    def spans(self) -> xr.Dataset:
        """``start``, ``prompt``, ``source``, ``segment`` [span]; a column stays in memory once it was read."""
        check_listed(self.path, SPANS_GROUP)
        return validate(open_unread(self.path / SPANS_GROUP), SPANS_GROUP)

    @cached_property
    def prompts(self) -> xr.Dataset:
        """Coordinates ``prompt``, ``task``, ``domain``, ``split``, ``cluster`` [prompt], without an index; as spans."""
        check_listed(self.path, PROMPTS_GROUP)
        return validate(open_unread(self.path / PROMPTS_GROUP), PROMPTS_GROUP)

    @cached_property
    def codes(self) -> dict[str, Any]:
        """The arrays of the tokens group, on disk."""
        check_listed(self.path, TOKENS_GROUP)
        read_checked(self.path / TOKENS_GROUP)
        with explain_damage(self.path / TOKENS_GROUP / ZARR_JSON):
            group = zarr.open_group(sealed_store(self.path / TOKENS_GROUP), mode="r")
            return {str(name): array for name, array in group.arrays()}

    def legend(self, name: str) -> NDArray[Any] | None:
        """Text of every code of label ``name``; None for labels that are numbers."""
        if name in (POSITION, TOKEN_ID):
            return None
        if name in (SOURCE, SEGMENT):
            return np.array(self.spans.attrs["sources" if name == SOURCE else "segments"], dtype=np.str_)
        if name not in self._legends:
            column = self.prompts[name]
            text = fixed_width(column.values)
            if text.dtype != np.dtype(f"U{column.attrs.get(LONGEST, text.dtype.itemsize // 4)}"):
                raise StoreCorruptError(
                    f"{self.path / PROMPTS_GROUP / name} does not hold text of the length it announces; restore it."
                )
            self._legends[name] = text
        return self._legends[name]

    def dtype(self, name: str) -> np.dtype[Any]:
        """Type of label ``name``; known without reading it where the store says how long its text is."""
        if name in (POSITION, TOKEN_ID):
            codes: np.dtype[Any] = self.codes[name].dtype
            return codes
        if name in (PROMPT, *PROMPT_LABELS) and LONGEST in self.prompts[name].attrs:
            with explain_damage(self.path / PROMPTS_GROUP / name / ZARR_JSON):
                return np.dtype(f"U{self.prompts[name].attrs[LONGEST]}")
        legend = self.legend(name)
        assert legend is not None  # noqa: S101 - every label but the two above is text
        return legend.dtype

    def coordinate(self, name: str) -> xr.Variable:
        """Label ``name`` of every token, read and decoded when touched."""
        return xr.Variable((TOKEN,), indexing.LazilyIndexedArray(_DecodedLabels(self, name)))

    def coordinates(self) -> xr.Coordinates:
        """All labels, lazily, with an index that selects by them."""
        variables = {name: self.coordinate(name) for name in (*SELECTABLE, POSITION, TOKEN_ID)}
        index = TokenIndex(self)
        return xr.Coordinates(variables, indexes=dict.fromkeys(SELECTABLE, index))

    def ranges(self, where: Mapping[str, object]) -> NDArray[np.int64]:
        """Sorted, disjoint token ranges [k, 2] that have the given labels.

        Raises
        ------
        InputError
            If a label or a value is unknown.
        """
        keep = np.ones(self.spans.sizes["span"], dtype=bool)
        for name, values in where.items():
            if name not in SELECTABLE:
                raise InputError(f"tokens are selected by {', '.join(SELECTABLE)}, got {name!r}.")
            legend = self.legend(name)
            assert legend is not None  # noqa: S101 - selectable labels are coded
            code = self.spans[PROMPT if name in (PROMPT, *PROMPT_LABELS) else name].values
            keep &= selected_labels(legend, values, name)[code]
        start = self.spans["start"].values
        stop = np.append(start[1:], self.n_tokens)
        return merge_ranges(np.stack([start[keep], stop[keep]], axis=1).astype(np.int64))


class LabelBlocks:
    """Codes of labels read in store order, one stored block of each label in memory at a time."""

    def __init__(self, labels: TokenLabels) -> None:
        self._codes = labels.codes
        self._held: dict[str, tuple[int, NDArray[Any]]] = {}

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Codes of label ``name`` (an array of the tokens group) of tokens start to stop."""
        codes = self._codes[name]
        size, parts = int(codes.chunks[0]), []
        while start < stop:
            index = start // size
            if self._held.get(name, (-1, None))[0] != index:
                self._held[name] = (index, codes[index * size : (index + 1) * size])
            parts.append(self._held[name][1][start - index * size : stop - index * size])
            start += len(parts[-1])
        return np.concatenate(parts) if parts else np.empty(0, codes.dtype)


def merge_ranges(ranges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sorted ranges with touching neighbours joined."""
    if not len(ranges):
        return ranges
    new = np.append(True, ranges[1:, 0] != ranges[:-1, 1])
    last = np.append(np.flatnonzero(new)[1:] - 1, len(ranges) - 1)
    return np.stack([ranges[new, 0], ranges[last, 1]], axis=1)


def positions_in(ranges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Every token of sorted ranges."""
    lengths = ranges[:, 1] - ranges[:, 0]
    # One running count over all ranges, shifted within each so that it begins at the range's start.
    offset = np.repeat(ranges[:, 0] - np.append(0, np.cumsum(lengths)[:-1]), lengths)
    positions: NDArray[np.int64] = np.arange(int(lengths.sum()), dtype=np.int64) + offset
    return positions


class _DecodedLabels(BackendArray):
    """One label of every token: codes on disk that are decoded when read."""

    def __init__(self, labels: TokenLabels, name: str) -> None:
        self._labels, self._name = labels, name
        self._codes = labels.codes[PROMPT if name in (PROMPT, *PROMPT_LABELS) else name]
        self.shape: tuple[int, ...] = self._codes.shape
        self.dtype = labels.dtype(name)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> Any:
        (rows,) = key
        codes = self._codes.oindex[rows] if isinstance(rows, np.ndarray) else self._codes[rows]
        legend = self._labels.legend(self._name)
        with explain_damage(self._labels.path / TOKENS_GROUP):
            return codes if legend is None else legend[codes]


class TokenIndex(xr.Index):
    """Selects tokens by label values through the spans; ``ds.sel(task="sciq", segment="completion")``."""

    def __init__(self, labels: TokenLabels, rows: slice | NDArray[np.int64] | None = None) -> None:
        self._labels = labels
        self._rows = slice(0, labels.n_tokens) if rows is None else rows

    def sel(self, labels: dict[Any, Any], method: Any = None, tolerance: Any = None) -> IndexSelResult:
        """Rows that have the given labels."""
        where = {name: label_values(value) for name, value in labels.items()}
        ranges = self._labels.ranges(where)
        if isinstance(self._rows, slice):
            inside = np.clip(ranges, self._rows.start, self._rows.stop) - self._rows.start
            inside = merge_ranges(inside[inside[:, 0] < inside[:, 1]])
            if len(inside) == 1:
                return IndexSelResult({TOKEN: slice(int(inside[0, 0]), int(inside[0, 1]))})
            return IndexSelResult({TOKEN: positions_in(inside)})
        last = np.searchsorted(ranges[:, 0], self._rows, side="right") - 1  # the last range that starts before the row
        chosen = (last >= 0) & (self._rows < ranges[last, 1]) if len(ranges) else np.zeros(len(self._rows), dtype=bool)
        return IndexSelResult({TOKEN: _as_slice(np.flatnonzero(chosen))})

    def isel(self, indexers: Mapping[Any, Any]) -> TokenIndex | None:
        """The index of the chosen rows; none for a single token."""
        chosen = indexers.get(TOKEN)
        if isinstance(chosen, xr.Variable):
            chosen = chosen.values
        if chosen is None or np.ndim(chosen) > 1:
            return self if chosen is None else None
        if isinstance(chosen, slice):
            size = self._rows.stop - self._rows.start if isinstance(self._rows, slice) else len(self._rows)
            start, stop, step = chosen.indices(size)
            if step == 1 and isinstance(self._rows, slice):
                return TokenIndex(self._labels, slice(self._rows.start + start, self._rows.start + max(start, stop)))
            chosen = np.arange(start, stop, step)
        elif np.ndim(chosen) == 0:
            return None
        chosen = np.asarray(chosen)
        if not isinstance(self._rows, slice):
            return TokenIndex(self._labels, self._rows[chosen])
        if chosen.dtype == bool:
            chosen = np.flatnonzero(chosen)
        size = self._rows.stop - self._rows.start
        rows = chosen if not len(chosen) or chosen.min() >= 0 else np.where(chosen < 0, chosen + size, chosen)
        return TokenIndex(self._labels, rows + self._rows.start if self._rows.start else rows)

    @classmethod
    def concat(cls, indexes: Sequence[Any], dim: Hashable, positions: Any = None) -> TokenIndex:
        """One index after the other, or each at its ``positions``."""
        rows = np.concatenate(
            [np.arange(i._rows.start, i._rows.stop) if isinstance(i._rows, slice) else i._rows for i in indexes]
        )
        order = np.argsort(np.concatenate([np.asarray(p) for p in positions])) if positions is not None else slice(None)
        return cls(indexes[0]._labels, rows[order])

    def create_variables(self, variables: Mapping[Any, xr.Variable] | None = None) -> dict[Any, xr.Variable]:
        """The labels of the chosen rows, still on disk."""
        rows = _as_slice(self._rows) if isinstance(self._rows, np.ndarray) else self._rows
        return {name: self._labels.coordinate(name)[rows] for name in variables or SELECTABLE}

    def equals(self, other: xr.Index, **_: Any) -> bool:
        """Whether both choose the same rows of the same labels."""
        if not isinstance(other, TokenIndex) or other._labels.hash != self._labels.hash:
            return False
        if isinstance(self._rows, slice) or isinstance(other._rows, slice):
            return isinstance(self._rows, slice) and isinstance(other._rows, slice) and self._rows == other._rows
        return np.array_equal(self._rows, other._rows)

    def __repr__(self) -> str:
        return "TokenIndex"


def _as_slice(rows: NDArray[np.int64]) -> Any:
    """Rows as a slice where they are consecutive, which costs nothing for any number of them."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows
