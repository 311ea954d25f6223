"""Creating an activation store: labels are checked, coded, hashed and written block by block."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import xarray as xr
import zarr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import (
    POSITION,
    PROMPT,
    PROMPT_LABELS,
    SEGMENT,
    SEGMENTS,
    SOURCE,
    SPAN,
    TOKEN,
    TOKEN_ID,
)
from rlgen_stats.schemas.errors import InputError, StoreError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.schemas.seeds import content_hash
from rlgen_stats.stores.atomic import replacing
from rlgen_stats.stores.digests import read_document
from rlgen_stats.stores.labels import LONGEST, PROMPTS_GROUP, SPANS_GROUP, TOKENS_GROUP
from rlgen_stats.stores.locations import explain_access_errors, place
from rlgen_stats.stores.provenance import Provenance
from rlgen_stats.stores.seals import seal_store
from rlgen_stats.stores.tables import COMPRESSORS, as_strings, check_is_store, check_owner, encoding, write_zarr

SHARD_TOKENS: Final = 8192
"""Tokens per shard (unit of commit): 64 MB at width 4,096 float16, 2 MB at width 64 float32."""
LABEL_BLOCK: Final = 1 << 20
"""Tokens per chunk of labels."""
CODED_ROWS: Final = 1 << 16
"""Rows of text labels coded at once: text takes ten times the memory of its codes."""
TOKEN_DTYPES: Final = {PROMPT: "int32", SOURCE: "int16", POSITION: "int32", TOKEN_ID: "int32", SEGMENT: "int8"}


def create_activations(
    path: Path | str,
    tokens: pd.DataFrame | Iterable[pd.DataFrame],
    prompts: pd.DataFrame,
    *,
    provenance: Provenance,
    text_mode: str = "forced",
    shard_tokens: int | None = None,
) -> None:
    """Write the labels of all tokens; calling again with the same labels changes nothing.

    Parameters
    ----------
    path
        Store folder or URL.
    tokens
        One row a token in store order: prompt, source (model that wrote the text), position, token_id, segment. A
        table, or an iterable of tables that follow one another, of which one block is held at a time.
    prompts
        One row a prompt: prompt, task, domain, split, cluster.
    provenance
        Origin of the store.
    text_mode
        ``"forced"``: every model reads the same tokens; ``"onpolicy"``: each reads its own.
    shard_tokens
        Tokens per shard, the unit of commit; default ``SHARD_TOKENS``.

    Raises
    ------
    InputError
        If a label is missing, a prompt id is duplicated or unknown, a segment is none of the declared ones, or
        positions are negative or do not ascend within a text.
    StoreError
        If the folder holds another store; it is left as it is.
    """
    path = place(path)
    _check_prompts(prompts)
    shard_tokens = SHARD_TOKENS if shard_tokens is None else int(shard_tokens)
    if shard_tokens < 1:
        raise InputError(f"a shard holds at least one token, got shard_tokens={shard_tokens}.")
    coder = TokenCoder(prompts)
    with explain_access_errors(path):
        exists = path.exists()
    if exists:
        check_is_store(path)
        check_owner(path, provenance)
        for _ in coder.blocks(tokens):  # only to check and hash the given labels
            pass
        if read_document(path)["attributes"].get("labels_hash") != coder.labels_hash():
            raise StoreError(
                f"{path} holds other tokens than the ones given (labels hash differs); expected the same texts in the "
                "same order: use another folder or move the store away."
            )
        return
    with replacing(path) as temporary:
        write_zarr(xr.Dataset(), temporary, mode="w")
        _write_tokens(temporary / TOKENS_GROUP, coder.blocks(tokens))
        attrs = {"n_tokens": coder.n_tokens, "shard_tokens": shard_tokens, "text_mode": text_mode}
        write_zarr(
            xr.Dataset(attrs=provenance.attrs() | attrs | {"labels_hash": coder.labels_hash()}), temporary, mode="a"
        )
        write_table(temporary / SPANS_GROUP, SPANS_GROUP, coder.spans())
        write_table(temporary / PROMPTS_GROUP, PROMPTS_GROUP, prompt_table(prompts))
        seal_store(temporary)


def _check_prompts(prompts: pd.DataFrame) -> None:
    _check_columns(prompts, "prompts", (PROMPT, *PROMPT_LABELS))
    repeated = prompts[PROMPT][prompts[PROMPT].duplicated()]
    if len(repeated):
        raise InputError(
            f"prompt ids must be unique, {repeated.iloc[0]!r} comes {len(repeated)} more time(s); rename them."
        )


def _check_columns(frame: pd.DataFrame, name: str, expected: tuple[str, ...]) -> None:
    missing = [column for column in expected if column not in frame.columns]
    extra = [str(column) for column in frame.columns if column not in expected]
    if missing:
        raise InputError(f"the {name} table lacks the column(s) {missing}; expected {list(expected)}.")
    if extra:
        raise InputError(f"the {name} table has the unknown column(s) {extra}; expected {list(expected)}: drop them.")
    if frame.empty:
        raise InputError(f"the {name} table is empty; there is nothing to store.")
    empty = [column for column in expected if frame[column].isna().any()]
    if empty:
        raise InputError(f"the {name} table has missing values in {empty}; every row needs every label: fill them.")


def prompt_table(prompts: pd.DataFrame) -> xr.Dataset:
    """The prompts and their labels, as text."""
    columns = {name: prompts[name].astype(str) for name in (PROMPT, *PROMPT_LABELS)}
    table = as_strings(xr.Dataset({name: (PROMPT, column.to_numpy(object)) for name, column in columns.items()}))
    for name, column in columns.items():
        table[name].attrs[LONGEST] = max(1, int(column.str.len().max()))
    return table.set_coords(list(columns))


def write_table(path: Path, layout: str, dataset: xr.Dataset) -> None:
    """Write one small group of labels."""
    write_zarr(validate(dataset, layout), path, mode="w", encoding=encoding(dataset, {SPAN: LABEL_BLOCK}))


def _write_tokens(path: Path, blocks: Iterable[dict[str, NDArray[Any]]]) -> None:
    group = zarr.open_group(path, mode="w")
    empty = {"shape": (0,), "chunks": (LABEL_BLOCK,), "compressors": COMPRESSORS, "dimension_names": (TOKEN,)}
    # Readers take a missing chunk for a lost one (see ``locations``), so chunks of zeros are written too.
    everything = {"write_empty_chunks": True}
    arrays = {
        name: group.create_array(name, dtype=dtype, config=everything, **empty) for name, dtype in TOKEN_DTYPES.items()
    }
    for block in blocks:
        for name, array in arrays.items():
            array.append(block[name])


class TokenCoder:
    """Labels of tokens as codes, with their spans and their hash; neither depends on the blocks they come in.

    Parameters
    ----------
    prompts
        Table of prompts; a token's prompt code is its row.
    """

    def __init__(self, prompts: pd.DataFrame) -> None:
        self._ids = pd.Index(prompts[PROMPT].astype(str))
        self._prompt_hash = content_hash(prompts[[PROMPT, *PROMPT_LABELS]].astype(str).to_numpy().tolist())
        self._hashes = {name: hashlib.sha256() for name in TOKEN_DTYPES}
        self._sources: dict[str, int] = {}
        self._spans: list[dict[str, NDArray[Any]]] = []
        self._last: dict[str, int] | None = None
        self._first_position = 0
        self.n_tokens = 0

    def blocks(self, tokens: pd.DataFrame | Iterable[pd.DataFrame]) -> Iterator[dict[str, NDArray[Any]]]:
        """Coded blocks of ``LABEL_BLOCK`` tokens; the last may be short."""
        waiting: list[dict[str, NDArray[Any]]] = []
        for frame in [tokens] if isinstance(tokens, pd.DataFrame) else tokens:
            _check_columns(frame, "tokens", tuple(TOKEN_DTYPES))
            start = 0
            while start < len(frame):
                held = sum(len(part[PROMPT]) for part in waiting)
                piece = self._coded(frame.iloc[start : start + min(CODED_ROWS, LABEL_BLOCK - held)])
                self._check_positions(piece)
                self.add(piece)
                waiting.append(piece)
                start, held = start + len(piece[PROMPT]), held + len(piece[PROMPT])
                if held == LABEL_BLOCK:
                    yield _joined(waiting)
                    waiting = []
        if waiting:
            yield _joined(waiting)
        if not self.n_tokens:
            raise InputError("the tokens table is empty; there is nothing to store.")

    def _coded(self, frame: pd.DataFrame) -> dict[str, NDArray[Any]]:
        prompt = self._ids.get_indexer(pd.Index(frame[PROMPT].astype(str)))
        if (prompt < 0).any():
            unknown = sorted(set(frame[PROMPT].astype(str)[prompt < 0]))
            raise InputError(
                f"{len(unknown)} prompt id(s) of the tokens are not in the prompts table, e.g. {unknown[0]!r}."
            )
        segment = pd.Index(SEGMENTS).get_indexer(pd.Index(frame[SEGMENT].astype(str)))
        if (segment < 0).any():
            unknown = sorted(set(frame[SEGMENT].astype(str)[segment < 0]))
            raise InputError(f"segments are {list(SEGMENTS)}, got {unknown}.")
        local, names = pd.factorize(frame[SOURCE].astype(str))
        known = np.array([self._sources.setdefault(str(name), len(self._sources)) for name in names])
        coded = {PROMPT: prompt, SOURCE: known[local], SEGMENT: segment}
        for name in (POSITION, TOKEN_ID):
            coded[name] = frame[name].to_numpy()
            if coded[name].dtype.kind not in "iu":
                raise InputError(f"the column {name!r} of the tokens holds integers, got {coded[name].dtype}.")
        return {name: np.asarray(coded[name]).astype(dtype) for name, dtype in TOKEN_DTYPES.items()}

    def _check_positions(self, block: dict[str, NDArray[Any]]) -> None:
        """Refuse positions that do not ascend within a text.

        Consecutive tokens of one prompt and source may be several texts (samples): where the next text begins,
        positions drop back to the first position of the run.
        """
        position = block[POSITION]
        if (position < 0).any():
            token = self.n_tokens + int((position < 0).argmax())
            raise InputError(
                f"token positions start at 0, got a negative one at token {token}; count from the text start."
            )
        before = self._last or dict.fromkeys(TOKEN_DTYPES, -1)
        past = np.append(before[POSITION], position[:-1])
        new_run = np.zeros(len(position), dtype=bool)
        for name in (PROMPT, SOURCE):
            new_run |= block[name] != np.append(before[name], block[name][:-1])
        run = np.maximum.accumulate(np.where(new_run, np.arange(len(position)), -1))
        first = np.where(run < 0, self._first_position, position[run])
        wrong = ~new_run & (position <= past) & (position != first)
        if wrong.any():
            row = int(wrong.argmax())
            raise InputError(
                f"positions must ascend within a text, token {self.n_tokens + row} has position {position[row]} after "
                f"{past[row]}; sort the tokens of each text."
            )
        self._first_position = int(first[-1])

    def add(self, block: dict[str, NDArray[Any]]) -> None:
        """Count coded tokens into the spans and the hash."""
        before = self._last or dict.fromkeys(TOKEN_DTYPES, -1)
        new = np.zeros(len(block[PROMPT]), dtype=bool)
        for name in (PROMPT, SOURCE, SEGMENT):
            new |= block[name] != np.append(before[name], block[name][:-1])
        starts = np.flatnonzero(new)
        codes = {name: block[name][starts] for name in (PROMPT, SOURCE, SEGMENT)}
        self._spans.append({"start": starts + self.n_tokens} | codes)
        for name, running in self._hashes.items():
            running.update(np.ascontiguousarray(block[name]).tobytes())
        self.n_tokens += len(new)
        self._last = {name: int(block[name][-1]) for name in TOKEN_DTYPES}

    def spans(self, sources: list[str] | None = None) -> xr.Dataset:
        """Runs of tokens with one prompt, source and segment, and the legends of the codes."""
        joined = _joined(self._spans)
        return xr.Dataset(
            {name: (SPAN, values) for name, values in joined.items()},
            attrs={"sources": sources or list(self._sources), "segments": list(SEGMENTS)},
        )

    def labels_hash(self, sources: list[str] | None = None) -> str:
        """Hash of every label of every token, and of the prompts."""
        columns = [self._hashes[name].hexdigest() for name in TOKEN_DTYPES]
        return content_hash([columns, sources or list(self._sources), list(SEGMENTS), self._prompt_hash])


def _joined(parts: list[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
