"""Contexts of features: per feature and model the prompts on which it is strongest, and a sample of all its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from rlgen_stats.schemas.dims import (
    BASE_MODEL,
    POSITION,
    PROMPT,
    SEGMENT,
    SOURCE,
    TASK,
    TOKEN,
    TOKEN_ID,
)
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.schemas.study import Readout, StudySpec
from rlgen_stats.stores import StudyFolder, open_activations, open_tokens, replacing
from rlgen_stats.stores.dashboards import PEAK
from rlgen_stats.stores.labels import LabelBlocks, TokenLabels
from rlgen_stats.toolkit.crosscoder.data.text_bounds import text_bounds
from rlgen_stats.toolkit.crosscoder.model.crosscoder import Crosscoder
from rlgen_stats.toolkit.crosscoder.model.loading import load_crosscoder
from rlgen_stats.toolkit.crosscoder.model.sparse import SparseCode
from rlgen_stats.toolkit.crosscoder.uses.encode import BlockFeatures, contribution_scale, partner_activations, view_of
from rlgen_stats.toolkit.crosscoder.uses.top_entries import Entries, TopEntries, random_keys
from rlgen_stats.toolkit.extraction import (
    find_model,
    load_tokenizer,
    resolve_device,
    site_name,
    usable_tokens,
)
from rlgen_stats.toolkit.extraction.activations import contrasted_models
from rlgen_stats.toolkit.progress import SILENT, Progress

QUANTILES: Final = (0.9, 0.7, 0.5, 0.3, 0.1)
"""Quantiles of a feature's firing tokens that are shown beside the strongest texts."""
SAMPLE: Final = 64
"""Random firing tokens per feature and model from which the quantiles are taken."""
BEFORE, AFTER = 24, 12
"""Tokens shown on either side of the peak."""
BLOCK_BYTES: Final = 1 << 26
"""Memory of one block of all models' features."""
GROUP_FEATURES: Final = 256
"""Features per row group of contexts.parquet, so that one feature is read without the others."""
_LABELS: Final = (PROMPT, TASK, SOURCE, SEGMENT)


def write_contexts(spec: StudySpec, folder: StudyFolder, *, n: int = 8, progress: Progress = SILENT) -> None:
    """Write where every feature of the primary crosscoder fires in base and the contrasted runs' last checkpoints.

    Parameters
    ----------
    spec, folder
        The study, with activations and the primary crosscoder.
    n
        Strongest texts per feature and model; a prompt counts once, at its peak over all its texts.
    progress
        Receiver of progress, in tokens.

    Raises
    ------
    StoreError
        If the crosscoder or a model's activations are missing.

    Notes
    -----
    Writes ``contexts.parquet`` beside the crosscoder, see :func:`rlgen_stats.stores.read_contexts` for its columns.
    All models read the same texts, so a row compares them on one token. The texts are those of the study, of any task
    and split; only tokens that the crosscoder trains on count. The tokens are read once for all features; of a block
    of tokens only those that fire leave the device.
    """
    primary = spec.primary_crosscoder
    crosscoder = load_crosscoder(folder.crosscoder(primary.name), device=resolve_device(spec.device))
    models = contrasted_models(spec, folder)
    site, readout = site_name(spec.extraction.layer), primary.readout
    blocks = [_ModelBlocks(crosscoder, folder.activations, site, model=model, readout=readout) for model in models]
    collected = _Collected(len(models), crosscoder.n_features, n=n, seed=derive_seed(spec.seed, "contexts"))
    labels = LabelBlocks(TokenLabels(folder.activations))
    _collect(collected, blocks, labels, usable_tokens(spec, folder), progress)
    tokenizer = load_tokenizer(find_model(BASE_MODEL, spec, folder))
    rows = _Rows(models, open_tokens(folder.activations), tokenizer)
    with (
        replacing(folder.contexts(primary.name)) as temporary,
        pq.ParquetWriter(temporary, rows.schema, compression="zstd") as writer,
        progress.task("context texts", total=crosscoder.n_features, unit="features") as task,
    ):
        for start in range(0, crosscoder.n_features, GROUP_FEATURES):
            group = slice(start, min(start + GROUP_FEATURES, crosscoder.n_features))
            writer.write_table(pa.Table.from_pandas(rows.of(collected, group), rows.schema, preserve_index=False))
            task.advance(group.stop - group.start)


class _Collected:
    """Of every model and feature: the strongest prompts, and a random sample of the tokens on which it fires."""

    def __init__(self, n_models: int, n_features: int, *, n: int, seed: int) -> None:
        self.top = [TopEntries(n_features, n, n_models) for _ in range(n_models)]
        self.sample = [TopEntries(n_features, SAMPLE, n_models) for _ in range(n_models)]
        self.n_features, self._seed = n_features, seed

    def update(self, contributions: Tensor, prompt: NDArray[np.int64], mask: NDArray[np.bool_], offset: int) -> None:
        """Take in a block [model, token, feature], whose first token is ``offset``; ``prompt`` and ``mask`` [token]."""
        usable = torch.from_numpy(mask).to(contributions.device)
        for model, contribution in enumerate(contributions):
            row, feature = ((contribution > 0) & usable[:, None]).nonzero(as_tuple=True)
            values = contributions[:, row, feature].T.cpu().numpy()
            rows = row.cpu().numpy()
            entries = Entries(feature.cpu().numpy(), rows + offset, values)
            self.sample[model].update(entries, random_keys(entries, self._seed), entries.token)
            self.top[model].update(entries, -values[:, model].astype(np.float64), prompt[rows])

    def flush(self) -> None:
        """Finish; to be called after the last block."""
        for entries in (*self.top, *self.sample):
            entries.flush()


@torch.no_grad()
def _collect(
    collected: _Collected,
    models: Sequence[_ModelBlocks],
    labels: LabelBlocks,
    mask: NDArray[np.bool_],
    progress: Progress,
) -> None:
    """Read all tokens once, for all models together, into ``collected``."""
    block_tokens = max(1, BLOCK_BYTES // (4 * len(models) * collected.n_features))
    with progress.task("contexts", total=len(mask), unit="tokens") as task:
        for start in range(0, len(mask), block_tokens):
            stop = min(start + block_tokens, len(mask))
            contributions = torch.stack([model.contributions(start, stop) for model in models])
            collected.update(contributions, labels.read(PROMPT, start, stop), mask[start:stop], start)
            task.advance(stop - start)
    collected.flush()


class _ModelBlocks:
    """Contributions of all features in one model."""

    def __init__(self, crosscoder: Crosscoder, store: Path, site: str, *, model: str, readout: Readout) -> None:
        view = view_of(model, crosscoder.views)
        self._features = BlockFeatures(
            crosscoder,
            open_activations(store, models=[model], site=site)["activation"][0],
            view=view,
            readout=readout,
            partners=partner_activations(crosscoder, store, site, readout),
        )
        self._scale = contribution_scale(crosscoder, view, readout)

    def contributions(self, start: int, stop: int) -> Tensor:
        """[token, feature], in the scale of features.zarr."""
        pieces = (f for _, f in self._features.read(start, stop))
        return torch.cat([(f.dense() if isinstance(f, SparseCode) else f) * self._scale for f in pieces])


class _Rows:
    """Turns collected entries into the rows of contexts.parquet."""

    def __init__(self, models: Sequence[str], tokens: xr.Dataset, tokenizer: Any) -> None:
        self._models, self._tokens = models, tokens
        self._starts, self._ends = text_bounds(tokens).T
        self._ids = tokens[TOKEN_ID].values
        self._tokenizer = tokenizer
        text, real = pa.string(), pa.float32()
        fields = {"feature": pa.int64(), "model": text, "kind": text, "rank": pa.int64(), "quantile": real}
        fields |= dict.fromkeys(_LABELS, text) | {POSITION: pa.int64(), "token": text, "activation": real, "text": text}
        self.schema = pa.schema(list((fields | {f"activation:{model}": real for model in models}).items()))

    def of(self, collected: _Collected, group: slice) -> pd.DataFrame:
        """Rows of a range of features."""
        parts = []
        for slot, model in enumerate(self._models):
            for kind, entries in (("top", collected.top[slot]), ("quantile", collected.sample[slot])):
                token, values = entries.token[group], entries.values[group]
                if kind == "quantile":
                    token, values = _quantiles(token, values, slot)
                feature, place = np.nonzero(token >= 0)
                part = pd.DataFrame({"feature": feature + group.start, "model": model, "kind": kind, "rank": place + 1})
                part["quantile"] = np.asarray(QUANTILES)[place] if kind == "quantile" else np.nan
                part[TOKEN] = token[feature, place]
                part["activation"] = values[feature, place, slot]
                part[[f"activation:{name}" for name in self._models]] = values[feature, place]
                parts.append(part)
        table = pd.concat(parts, ignore_index=True).sort_values("feature", kind="stable", ignore_index=True)
        return self._described(table).reindex(columns=self.schema.names)

    def _described(self, table: pd.DataFrame) -> pd.DataFrame:
        """The table with labels and surrounding text in place of token numbers, each token decoded once."""
        tokens, row = np.unique(table.pop(TOKEN).to_numpy(np.int64), return_inverse=True)
        labels = self._tokens.isel({TOKEN: tokens})
        for name in (*_LABELS, POSITION):
            table[name] = labels[name].values[row]
        text = np.searchsorted(self._starts, tokens, side="right") - 1
        windows = [
            window(self._tokenizer, self._ids[start:end], int(token - start))
            for token, start, end in zip(tokens, self._starts[text], self._ends[text], strict=True)
        ]
        shown = np.array([f"{before}{PEAK[0]}{peak}{PEAK[1]}{after}" for before, peak, after in windows], dtype=object)
        table["token"] = np.array([peak for _, peak, _ in windows], dtype=object)[row]
        table["text"] = shown[row]
        return table


def _quantiles(
    token: NDArray[np.int64], values: NDArray[np.float32], slot: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The sampled tokens nearest to each of QUANTILES: [feature, quantile]; -1 where a token would be repeated."""
    activation = np.where(token >= 0, values[:, :, slot], -np.inf)
    order = np.argsort(-activation, axis=1, kind="stable")
    n = (token >= 0).sum(axis=1)
    # tokens are in order of falling activation, so quantile q stands at the share 1 - q of the list
    place = np.rint((1 - np.asarray(QUANTILES)) * np.maximum(n - 1, 0)[:, None]).astype(np.int64)
    repeated = np.zeros_like(place, dtype=bool)
    repeated[:, 1:] = place[:, 1:] == place[:, :-1]
    chosen = np.take_along_axis(order, place, axis=1)
    picked = np.where(repeated | (n == 0)[:, None], -1, np.take_along_axis(token, chosen, axis=1))
    return picked, np.take_along_axis(values, chosen[:, :, None], axis=1)


def window(tokenizer: Any, ids: NDArray[np.integer], peak: int) -> tuple[str, str, str]:
    """Decoded text before, at and after token ``peak`` of one text, cut to the tokens around it.

    Decoded in growing prefixes, because how a token looks depends on what precedes it. White space that a tokenizer
    puts before the peak belongs to what precedes it.
    """
    first, last = max(0, peak - BEFORE), min(len(ids), peak + 1 + AFTER)

    def decode(end: int) -> str:
        return str(tokenizer.decode(ids[first:end].tolist(), skip_special_tokens=False))

    before, through, whole = decode(peak), decode(peak + 1), decode(last)
    if not (through.startswith(before) and whole.startswith(through)):  # a character split over tokens
        before, through = "", str(tokenizer.decode([int(ids[peak])], skip_special_tokens=False))
        return before, through, ""
    token = through[len(before) :]
    bare = token.lstrip()
    return before + token[: len(token) - len(bare)], bare, whole[len(through) :]
