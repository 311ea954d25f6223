"""Import: a cache and its label table become one model's activations in a store."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from rlgen_stats.schemas.dims import PROMPT, PROMPT_LABELS, TOKEN
from rlgen_stats.schemas.errors import InputError, StoreError
from rlgen_stats.stores import ActivationWriter, Provenance, create_activations, open_tokens, place
from rlgen_stats.stores.activation_store import ARRAY, activation_group
from rlgen_stats.stores.creation import TokenCoder
from rlgen_stats.stores.locations import explain_access_errors
from rlgen_stats.stores.shards import open_shards
from rlgen_stats.toolkit.exchange.caches import BLOCK_ROWS, Cache, open_cache
from rlgen_stats.toolkit.exchange.label_table import COLUMNS, LABEL_ROWS, read_labels
from rlgen_stats.toolkit.progress import SILENT, Progress


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import did."""

    model: str
    site: str
    n_tokens: int
    """Tokens of the store, all of them committed."""
    n_resumed: int
    """Tokens that an earlier attempt had already committed."""
    n_prompts: int
    width: int
    dtype: str
    format: str
    n_files: int


def import_activations(
    cache: Path | str,
    labels: Path | str,
    into: Path | str,
    *,
    model: str,
    site: str,
    tensor: str | None = None,
    dtype: str | None = None,
    study_id: str | None = None,
    ignore: Collection[str] = (),
    allow_nonfinite: bool = False,
    progress: Progress = SILENT,
) -> Imported:
    """Store a cache made elsewhere as the activations of one model; an interrupted import goes on where it stopped.

    Parameters
    ----------
    cache
        Folder or file as :func:`open_cache` takes them: [n_tokens, width].
    labels
        Label table as :func:`read_labels` takes it: row i labels row i of the cache.
    into
        Activation store, made with these labels if there is none; else its labels must be these. Folder or URL.
    model, site
        ``run@step`` and the name of the site, e.g. ``rl@200`` and ``block12``.
    tensor
        Name of the tensor, where a file holds several.
    dtype
        Stored type; default the type of the cache.
    study_id
        Study the store belongs to; default the hash of the labels.
    ignore
        Columns of the label table to leave out.
    allow_nonfinite
        Keep NaN and infinite values instead of refusing them.
    progress
        Receiver of progress, in tokens.

    Raises
    ------
    InputError
        If the cache or the labels cannot be used, their numbers of rows differ, or the values committed by an earlier
        attempt are not those of this cache.
    StoreError
        If the store has other labels, belongs to another ``study_id``, or holds this model with another width or type.

    Notes
    -----
    Only files of the first cache are named in the provenance of the store (by name and size, without their folder).

    Examples
    --------
    >>> import_activations("caches/rl-200", "labels.parquet", "activations.zarr",
    ...                    model="rl@200", site="block12")  # doctest: +SKIP
    """
    group = activation_group(model, site)  # refuses a bad name before anything is read
    opened = open_cache(cache, tensor=tensor, dtype=dtype)
    tokens, prompts = read_labels(labels, ignore=ignore)
    check_rows(opened, len(tokens))
    store = place(into)
    with explain_access_errors(store):
        exists = store.exists()
    if exists:
        _check_store(store, tokens, prompts, study_id)
    else:
        _make_store(store, opened, tokens, prompts, study_id)
    writer = ActivationWriter(
        store, model=model, site=site, width=opened.width, dtype=opened.dtype, allow_nonfinite=allow_nonfinite
    )
    with writer, progress.task(f"import {model}", total=opened.n_tokens, unit="tokens") as task:
        n_resumed = writer.n_committed
        if n_resumed:
            _check_continues(opened, store / group / ARRAY, n_resumed)
            task.skip(n_resumed)
        for block in opened.blocks(n_resumed):
            writer.append(block)
            task.advance(len(block))
    return Imported(
        model=model,
        site=site,
        n_tokens=opened.n_tokens,
        n_resumed=n_resumed,
        n_prompts=len(prompts),
        width=opened.width,
        dtype=opened.dtype,
        format=opened.format,
        n_files=len(opened.files),
    )


def check_rows(cache: Cache, n_labels: int) -> None:
    """Refuse labels of another number of rows.

    Raises
    ------
    InputError
        Naming both numbers.
    """
    if cache.n_tokens == n_labels:
        return
    padded = any(len(part.shape) == 3 for part in cache.parts)
    raise InputError(
        f"the cache has {cache.n_tokens} rows, the label table {n_labels}; expected one row of labels for each row of "
        f"the cache, in its order: "
        f"{'label padding as segment pad, or ' if padded else ''}take the table that was written with this cache."
    )


def _make_store(store: Path, cache: Cache, tokens: pd.DataFrame, prompts: pd.DataFrame, study_id: str | None) -> None:
    coder = TokenCoder(prompts)
    for _ in coder.blocks(tokens):  # checks the labels, and hashes them as the store will
        pass
    labels_hash = coder.labels_hash()
    files = [{"name": file.name, "bytes": file.stat().st_size} for file in cache.files]
    details = {"stage": "import", "format": cache.format, "files": files}
    provenance = Provenance(study_id or labels_hash, labels_hash, details)
    create_activations(store, tokens, prompts, provenance=provenance)


def _check_store(store: Path, tokens: pd.DataFrame, prompts: pd.DataFrame, study_id: str | None) -> None:
    """Refuse a store of another study or with other labels, naming the first label and token that differ."""
    stored = open_tokens(store)
    if study_id is not None and stored.attrs["study_id"] != study_id:
        raise StoreError(
            f"{store} belongs to the study {str(stored.attrs['study_id'])[:12]}, expected {study_id[:12]}; name "
            "another store or leave study_id out."
        )
    if stored.sizes[TOKEN] != len(tokens):
        raise StoreError(
            f"{store} has {stored.sizes[TOKEN]} tokens, the label table {len(tokens)}; expected the same texts in the "
            "same order: name another store or take the labels it was made with."
        )
    for start in range(0, len(tokens), LABEL_ROWS):
        rows = slice(start, start + LABEL_ROWS)
        block, stored_block = tokens.iloc[rows], stored.isel({TOKEN: rows})
        prompt_rows = block[PROMPT].cat.codes.to_numpy()  # prompts come in the order of the categories
        for name in COLUMNS:
            given = np.asarray(prompts[name])[prompt_rows] if name in PROMPT_LABELS else np.asarray(block[name])
            wrong = given != stored_block[name].values
            if wrong.any():
                row = int(wrong.argmax())
                raise StoreError(
                    f"{store} has other labels than the table: token {start + row} has {name} "
                    f"{str(stored_block[name].values[row])!r}, the table {str(given[row])!r}; expected the same: name "
                    "another store or take the labels it was made with."
                )


def _check_continues(cache: Cache, array: Path, n_committed: int) -> None:
    """Refuse to resume if the rows that are stored already are not the first rows of this cache."""
    given = next(cache.blocks(0, min(n_committed, BLOCK_ROWS)))
    stored = open_shards(array, decoded=False)[: len(given)]
    bits = f"u{given.dtype.itemsize}"
    differs = (np.ascontiguousarray(given).view(bits) != np.ascontiguousarray(stored).view(bits)).any(axis=1)
    if differs.any():
        raise InputError(
            f"{'/'.join(array.parent.parts[-2:])} already holds {n_committed} tokens of another cache, the first other "
            f"one is token {int(differs.argmax())}; expected the rows of this cache: name another model or site, or "
            "delete that group."
        )
