"""The activation store: labels once, one array a model and site, committed shard by shard.

Layout (plain Zarr v3, every chunk checksummed with crc32c)::

    activations.zarr/
      tokens/                 prompt, source, position, token_id, segment  [token]   codes; legends in attributes
      prompts/                prompt, task, domain, split, cluster         [prompt]  text
      <model>/<site>/
        activation            [token, channel]   one chunk is one shard of SHARD_TOKENS tokens
        committed             [shard]            tokens in the shard, written after its data; 0 = not there
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import pandas as pd
import xarray as xr
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from rlgen_stats.schemas.dims import (
    CHANNEL,
    CLUSTER,
    DOMAIN,
    MODEL,
    POSITION,
    PROMPT,
    RUN,
    SEGMENT,
    SEGMENTS,
    SOURCE,
    SPLIT,
    STEP,
    TASK,
    TOKEN,
    TOKEN_ID,
    check_name,
    split_model_id,
)
from rlgen_stats.schemas.errors import InputError, StoreError
from rlgen_stats.schemas.seeds import content_hash
from rlgen_stats.stores.durable import exclusive, explain_full_disk, replacing, sync
from rlgen_stats.stores.provenance import Provenance
from rlgen_stats.stores.tables import as_strings, check_is_store, check_owner, check_version, encoding, write_zarr

SHARD_TOKENS: Final = 8192
"""Tokens per shard (unit of commit): 64 MB at width 4,096 float16, 2 MB at width 64 float32."""
PROMPT_LABELS: Final = (TASK, DOMAIN, SPLIT, CLUSTER)
TOKENS_GROUP: Final = "tokens"
PROMPTS_GROUP: Final = "prompts"
ARRAY: Final = "activation"
COMMITTED: Final = "committed"


def create_activations(
    path: Path | str,
    tokens: pd.DataFrame,
    prompts: pd.DataFrame,
    *,
    provenance: Provenance,
    text_mode: str = "forced",
) -> None:
    """Write the labels of all tokens; calling again with the same labels changes nothing.

    Parameters
    ----------
    path
        Store folder.
    tokens
        One row a token in store order: prompt, source (model that wrote the text), position, token_id, segment.
    prompts
        One row a prompt: prompt, task, domain, split, cluster.
    provenance
        Origin of the store.
    text_mode
        ``"forced"``: every model reads the same tokens; ``"onpolicy"``: each reads its own.

    Raises
    ------
    InputError
        If a label is missing, a prompt id is duplicated or unknown, or a segment is none of the declared ones.
    StoreError
        If the folder holds another store; it is left as it is.
    """
    path = Path(path)
    _check_labels(tokens, prompts)
    labels_hash = content_hash([_digest(tokens), _digest(prompts)])
    if path.exists():
        _check_same_labels(path, labels_hash, provenance)
        return
    attrs = provenance.attrs() | {"n_tokens": len(tokens), "text_mode": text_mode, "labels_hash": labels_hash}
    with replacing(path) as temporary:
        write_zarr(xr.Dataset(attrs=attrs | {"shard_tokens": SHARD_TOKENS}), temporary, mode="w")
        table = _token_table(tokens, prompts)
        write_zarr(table, temporary, group=TOKENS_GROUP, mode="w", encoding=encoding(table, {TOKEN: 1 << 20}))
        labels = xr.Dataset({name: (PROMPT, prompts[name].astype(str).to_numpy()) for name in (PROMPT, *PROMPT_LABELS)})
        labels = as_strings(labels.set_coords([PROMPT, *PROMPT_LABELS]))
        write_zarr(labels, temporary, group=PROMPTS_GROUP, mode="w", encoding=encoding(labels))


def _digest(frame: pd.DataFrame) -> str:
    return content_hash([int(x) for x in pd.util.hash_pandas_object(frame.astype(str), index=False)])


def _check_labels(tokens: pd.DataFrame, prompts: pd.DataFrame) -> None:
    for frame, name, wanted in (
        (tokens, "tokens", (PROMPT, SOURCE, POSITION, TOKEN_ID, SEGMENT)),
        (prompts, "prompts", (PROMPT, *PROMPT_LABELS)),
    ):
        missing = [column for column in wanted if column not in frame.columns]
        if missing:
            raise InputError(f"the {name} table lacks the column(s) {missing}; expected {list(wanted)}.")
        if frame.empty:
            raise InputError(f"the {name} table is empty; there is nothing to store.")
    twice = prompts[PROMPT][prompts[PROMPT].duplicated()]
    if len(twice):
        raise InputError(f"prompt ids must be unique, {twice.iloc[0]!r} comes {len(twice)} more time(s); rename them.")
    unknown = set(tokens[PROMPT].unique()) - set(prompts[PROMPT])
    if unknown:
        raise InputError(
            f"{len(unknown)} prompt id(s) of the tokens are not in the prompts table, e.g. {min(unknown)!r}."
        )
    segments = set(tokens[SEGMENT].unique()) - set(SEGMENTS)
    if segments:
        raise InputError(f"segments are {list(SEGMENTS)}, got {sorted(segments)}.")
    if (tokens[POSITION] < 0).any():
        raise InputError("token positions start at 0, got a negative one.")


def _check_same_labels(path: Path, labels_hash: str, provenance: Provenance) -> None:
    check_is_store(path)
    check_owner(path, provenance)
    if zarr.open_group(path, mode="r").attrs.get("labels_hash") != labels_hash:
        raise StoreError(
            f"{path} holds other tokens than the ones given (labels hash differs); expected the same texts in the "
            "same order: use another folder or move the store away."
        )


def _token_table(tokens: pd.DataFrame, prompts: pd.DataFrame) -> xr.Dataset:
    sources = list(dict.fromkeys(tokens[SOURCE]))
    prompt_code = pd.Categorical(tokens[PROMPT], categories=prompts[PROMPT]).codes.astype(np.int32)
    source_code = pd.Categorical(tokens[SOURCE], categories=sources).codes.astype(np.int16)
    segment_code = pd.Categorical(tokens[SEGMENT], categories=list(SEGMENTS)).codes.astype(np.int8)
    return xr.Dataset(
        {
            PROMPT: (TOKEN, prompt_code, {"legend": "index into prompts/prompt"}),
            SOURCE: (TOKEN, source_code, {"legend": sources}),
            POSITION: (TOKEN, tokens[POSITION].to_numpy(np.int32)),
            TOKEN_ID: (TOKEN, tokens[TOKEN_ID].to_numpy(np.int32)),
            SEGMENT: (TOKEN, segment_code, {"legend": list(SEGMENTS)}),
        }
    )


def activation_group(model: str, site: str) -> str:
    """Path of one model's array inside the store."""
    split_model_id(model)
    return f"{model}/{check_name(site, 'a site')}"


class ActivationWriter:
    """Writes one model's activations shard by shard, in store order; resumes where the last one stopped.

    Parameters
    ----------
    path
        Store made by :func:`create_activations`.
    model, site
        ``run@step`` and the site's name, e.g. ``block2``.
    width
        Channels d.
    dtype
        ``float32`` or ``float16``.

    Raises
    ------
    StoreError
        If the store is missing or the array there has another width or type.
    StoreLockedError
        If another living process writes this array.
    InputError
        On append: wrong shape, too many tokens, or NaN/inf (with their number and the first token).

    Notes
    -----
    ``n_committed`` tokens are durable; feed the rest. An unfinished shard is thrown away on exit after an error, so
    a resumed run writes the bytes an uninterrupted one would have written.

    Examples
    --------
    >>> with ActivationWriter(path, model="rl@80", site="block2", width=64) as writer:  # doctest: +SKIP
    ...     for batch in batches[writer.n_committed :]:
    ...         writer.append(batch)
    """

    def __init__(self, path: Path | str, *, model: str, site: str, width: int, dtype: str = "float32") -> None:
        self._path = Path(path)
        check_is_store(self._path)
        self._model, self._site, self._width, self._dtype = model, site, int(width), np.dtype(dtype)
        root = zarr.open_group(self._path, mode="r")
        self._n_tokens, self._shard = int(root.attrs["n_tokens"]), int(root.attrs["shard_tokens"])
        self._buffer: list[NDArray[Any]] = []
        self._buffered = 0
        self.n_committed = 0

    def __enter__(self) -> ActivationWriter:
        folder = self._path / activation_group(self._model, self._site)
        self._lock = exclusive(self._path.with_name(f"{self._path.name}.{self._model}.{self._site}"))
        self._lock.__enter__()
        try:
            group = self._open_group(folder)
        except BaseException as error:
            self._lock.__exit__(type(error), error, error.__traceback__)
            raise
        self._activation, self._committed = group[ARRAY], group[COMMITTED]
        self._folder = folder
        self.n_committed = _committed_tokens(self._committed[:], self._n_tokens, self._shard)
        return self

    def _open_group(self, folder: Path) -> Any:
        name = activation_group(self._model, self._site)
        n_shards = -(-self._n_tokens // self._shard)
        if not (folder / COMMITTED / "zarr.json").exists():
            group = zarr.open_group(self._path, mode="r+").require_group(name)
            for array in (ARRAY, COMMITTED):
                if array in group:
                    del group[array]
            group.create_array(
                ARRAY,
                shape=(self._n_tokens, self._width),
                chunks=(min(self._shard, self._n_tokens), self._width),
                dtype=self._dtype,
                compressors=[Crc32cCodec()],
                fill_value=float("nan"),
                dimension_names=(TOKEN, CHANNEL),
            )
            group.create_array(
                COMMITTED, shape=(n_shards,), chunks=(1,), dtype="int64", compressors=[Crc32cCodec()], fill_value=0,
                dimension_names=("shard",),
            )  # fmt: skip
        group = zarr.open_group(self._path, mode="r+")[name]
        there = group[ARRAY]
        if there.shape != (self._n_tokens, self._width) or there.dtype != self._dtype:
            raise StoreError(
                f"{name} holds shape {there.shape} {there.dtype}, "
                f"expected {(self._n_tokens, self._width)} {self._dtype}; use another site name or delete the group."
            )
        return group

    def append(self, activation: NDArray[Any]) -> None:
        """Add the next tokens, shape [n, channel]; whole shards are written and committed at once."""
        activation = np.asarray(activation)
        start = self.n_committed + self._buffered
        if activation.ndim != 2 or activation.shape[1] != self._width:
            raise InputError(f"activations of {self._model} must be [n, {self._width}], got {activation.shape}.")
        if start + len(activation) > self._n_tokens:
            raise InputError(
                f"{self._model}: {start + len(activation)} tokens given, but the store's texts have {self._n_tokens}."
            )
        activation = activation.astype(self._dtype)
        bad = ~np.isfinite(activation).all(axis=1)
        if bad.any():
            raise InputError(
                f"{self._model}: {int(bad.sum())} of {len(bad)} tokens have NaN or infinite activations in "
                f"{self._dtype}, the first is token {start + int(bad.argmax())}; check the checkpoint or store float32."
            )
        self._buffer.append(activation)
        self._buffered += len(activation)
        while self._buffered >= self._shard:
            self._write_shard(self._shard)
        if self._buffered and self.n_committed + self._buffered == self._n_tokens:
            self._write_shard(self._buffered)

    def _write_shard(self, size: int) -> None:
        block = np.concatenate(self._buffer)
        shard, rest = block[:size], block[size:]
        index = self.n_committed // self._shard
        with explain_full_disk(self._path):
            self._activation[self.n_committed : self.n_committed + size] = shard
            sync(self._folder / ARRAY / "c" / str(index) / "0")
            self._committed[index] = size
            sync(self._folder / COMMITTED / "c" / str(index))
        self._buffer, self._buffered = ([rest] if len(rest) else []), len(rest)
        self.n_committed += size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._buffer, self._buffered = [], 0
        self._lock.__exit__(kind, error, trace)


def _committed_tokens(committed: NDArray[Any], n_tokens: int, shard: int) -> int:
    """Tokens in the leading run of committed shards."""
    missing = np.flatnonzero(committed == 0)
    first = int(missing[0]) if len(missing) else len(committed)
    return min(first * shard, n_tokens)


def stored_models(path: Path | str) -> dict[tuple[str, str], int]:
    """(model, site) -> committed tokens, for everything in the store."""
    path = Path(path)
    check_is_store(path)
    root = zarr.open_group(path, mode="r")
    n_tokens, shard = int(root.attrs["n_tokens"]), int(root.attrs["shard_tokens"])
    found = {}
    for record in sorted(path.glob(f"*@*/*/{COMMITTED}/zarr.json")):
        folder = record.parent.parent
        committed = zarr.open_array(record.parent, mode="r")[:]
        found[(folder.parent.name, folder.name)] = _committed_tokens(np.asarray(committed), n_tokens, shard)
    return found


def complete_models(path: Path | str, site: str | None = None) -> list[str]:
    """Models whose every token is committed (at ``site``, if given)."""
    n_tokens = int(zarr.open_group(path, mode="r").attrs["n_tokens"])
    return [m for (m, s), n in stored_models(path).items() if n == n_tokens and site in (None, s)]


def open_tokens(path: Path | str) -> xr.Dataset:
    """Labels of every token, read into memory: coordinates prompt, task, domain, split, cluster, source, position,
    token_id, segment on dimension ``token``.
    """
    path = Path(path)
    check_is_store(path)
    root = zarr.open_group(path, mode="r")
    check_version(path, dict(root.attrs))
    codes = xr.open_zarr(path, group=TOKENS_GROUP, consolidated=False, chunks=None).load()
    prompts = xr.open_zarr(path, group=PROMPTS_GROUP, consolidated=False, chunks=None).load()
    which = codes[PROMPT].values
    labels: dict[str, NDArray[Any]] = {name: _decode(prompts[name].values, which) for name in (PROMPT, *PROMPT_LABELS)}
    labels |= {name: _decode(codes[name].attrs["legend"], codes[name].values) for name in (SOURCE, SEGMENT)}
    labels |= {name: codes[name].values for name in (POSITION, TOKEN_ID)}
    return xr.Dataset(coords={name: (TOKEN, values) for name, values in labels.items()}, attrs=dict(root.attrs))


def _decode(legend: Any, codes: NDArray[Any]) -> NDArray[Any]:
    text: NDArray[Any] = np.asarray(legend, dtype=object).astype(np.str_)
    decoded: NDArray[Any] = text[codes]
    return decoded


def open_activations(path: Path | str, *, models: list[str] | None = None, site: str | None = None) -> xr.Dataset:
    """Activations of complete models with all labels: ``activation[model, token, channel]``, lazily.

    Parameters
    ----------
    path
        Store folder.
    models
        Model ids; default all complete ones at the site.
    site
        Site name; default the only one.

    Raises
    ------
    StoreError
        If a model is absent or unfinished, several sites need a choice, or widths differ (name models of one width).

    Examples
    --------
    >>> acts = open_activations("runs/demo/activations.zarr")  # doctest: +SKIP
    >>> acts.activation.sel(model="rl@80").where(acts.segment == "completion", drop=True)  # doctest: +SKIP
    """
    path = Path(path)
    tokens = open_tokens(path)
    sites = sorted({s for _, s in stored_models(path)})
    if site is None:
        if len(sites) != 1:
            raise StoreError(f"{path} has the sites {sites}; name one with site=.")
        site = sites[0]
    complete = complete_models(path, site)
    wanted = list(models) if models is not None else complete
    absent = [model for model in wanted if model not in complete]
    if absent or not wanted:
        raise StoreError(
            f"{path} has no complete activations of {absent or 'any model'} at {site!r}; it has {complete}."
        )
    arrays = [xr.open_zarr(path, group=activation_group(m, site), consolidated=False, chunks={})[ARRAY] for m in wanted]
    widths = {array.sizes[CHANNEL] for array in arrays}
    if len(widths) > 1:
        raise StoreError(f"the models have widths {sorted(widths)}; name models of one width with models=.")
    labels = {
        MODEL: (MODEL, np.array(wanted, dtype=np.str_)),
        RUN: (MODEL, np.array([split_model_id(m)[0] for m in wanted], dtype=np.str_)),
        STEP: (MODEL, np.array([split_model_id(m)[1] for m in wanted])),
    }
    activation = xr.concat(arrays, dim=MODEL)
    dataset = xr.Dataset({ARRAY: activation}, attrs=tokens.attrs | {"site": site})
    return dataset.assign_coords(tokens.coords).assign_coords(labels)
