"""Encode the stored activations of every model with one crosscoder's readout, and summarise them per prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from rlgen_stats.schemas.dims import (
    BASE_MODEL,
    FEATURE,
    MODEL,
    PROMPT,
    PROMPT_LABELS,
    VIEW,
    split_model_id,
)
from rlgen_stats.schemas.errors import StageError, StoreError
from rlgen_stats.schemas.study import Readout, StudySpec
from rlgen_stats.stores import (
    Provenance,
    StudyFolder,
    append_model,
    committed_models,
    complete_models,
    open_activations,
    open_features,
    open_tokens,
)
from rlgen_stats.stores.crosscoder_weights import weights_hash
from rlgen_stats.stores.labels import LabelBlocks, TokenLabels
from rlgen_stats.stores.study_models import ref_coords
from rlgen_stats.toolkit.crosscoder.data.moments import ExplainedVariance
from rlgen_stats.toolkit.crosscoder.model.crosscoder import Crosscoder
from rlgen_stats.toolkit.crosscoder.model.loading import load_crosscoder
from rlgen_stats.toolkit.crosscoder.model.readout import FeatureReadout
from rlgen_stats.toolkit.crosscoder.model.sparse import SparseCode
from rlgen_stats.toolkit.crosscoder.uses.summaries import HISTOGRAM_EDGES, PromptSummaries
from rlgen_stats.toolkit.extraction import ModelRef, list_models, resolve_device, site_name, usable_tokens
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.workers import kept, run_tasks

BLOCK_TOKENS: Final = 8192
"""Tokens read at once: one shard of the activation store."""
PIECE_BYTES: Final = 1 << 25
"""Memory of the features of the tokens encoded at once on a CPU: passes over what its cache holds cost little."""
PIECE_BYTES_GPU: Final = 1 << 30
"""The same on a GPU, which wants large products."""
SCALE: Final = "contribution"
"""features.zarr holds f_k ||d_k||, which does not change when a feature's scale moves between code and decoder."""


class Prompts:
    """Which prompt each token belongs to, and the prompts' labels, in order of their first token.

    Parameters
    ----------
    path
        Activation store.
    mask
        [token], tokens that are summarised.

    Attributes
    ----------
    labels
        One row per prompt: prompt, task, domain, split, cluster.
    """

    def __init__(self, path: Path, mask: NDArray[np.bool_]) -> None:
        stored = TokenLabels(path)
        order = pd.unique(stored.spans[PROMPT].values)
        self._place = np.full(stored.prompts.sizes[PROMPT], -1)
        self._place[order] = np.arange(len(order))
        self._mask, self._blocks = mask, LabelBlocks(stored)
        self.labels = pd.DataFrame({name: np.asarray(stored.legend(name))[order] for name in (PROMPT, *PROMPT_LABELS)})

    def __len__(self) -> int:
        return len(self._mask)

    def codes(self, start: int, stop: int) -> NDArray[np.int64]:
        """Rows of ``labels`` of tokens start to stop; -1 where a token is not summarised."""
        stop = min(stop, len(self))
        codes = self._place[self._blocks.read(PROMPT, start, stop)]
        return np.where(self._mask[start:stop], codes, -1)


def view_of(model: str, views: tuple[str, ...]) -> str:
    """The view that stands for a model: the model itself, else one of its run, else base, else the first view."""
    if model in views:
        return model
    run = split_model_id(model)[0]
    of_run = [view for view in views if split_model_id(view)[0] == run]
    return of_run[0] if of_run else BASE_MODEL if BASE_MODEL in views else views[0]


def contribution_scale(crosscoder: Crosscoder, view: str, readout: Readout) -> Tensor:
    """Factor from f_k to the stored, scale-invariant contribution: [feature]."""
    if readout == "joint":
        return crosscoder.decoder_norm()[crosscoder.view_index(view)]
    return crosscoder.contribution_norm()


class BlockFeatures:
    """Features of one model, read block by block from stored tokens.

    Parameters
    ----------
    crosscoder, activation, view, readout, partners
        As in :func:`summarise`.
    columns
        Features to read; default all.
    """

    def __init__(
        self,
        crosscoder: Crosscoder,
        activation: xr.DataArray,
        *,
        view: str,
        readout: Readout,
        partners: Mapping[str, xr.DataArray] | None = None,
        columns: Tensor | None = None,
    ) -> None:
        self._crosscoder, self._columns = crosscoder, columns
        self._device = crosscoder.encoder_matrix.device
        if readout == "joint":
            self._map = None
            self._parts = {slot: activation if slot == view else (partners or {})[slot] for slot in crosscoder.views}
        else:
            self._map = crosscoder.readout_map(view=view, kind=readout, features=columns)
            self._parts = {view: activation}
        self._view = view
        size = PIECE_BYTES if self._device.type == "cpu" else PIECE_BYTES_GPU
        self._piece = max(1, size // (4 * crosscoder.n_features))
        self._buffer: Tensor | None = None

    def read(
        self, start: int, stop: int, kept: NDArray[np.bool_] | slice = slice(None)
    ) -> Iterator[tuple[Tensor, Tensor | SparseCode]]:
        """Raw activations [token, channel] of the model and its features [token, feature], piece by piece.

        Of tokens start to stop only those ``kept`` are read. Pieces are small enough that features stay in the
        processor's cache; the next piece overwrites the features of the last.
        """
        raw = {slot: self._tensor(part, start, stop, kept) for slot, part in self._parts.items()}
        pieces = zip(*(torch.split(part, self._piece) for part in raw.values()), strict=True)
        for piece in pieces:
            of_model = piece[list(raw).index(self._view)]
            yield of_model, self._joint(piece) if self._map is None else self._mapped(self._map, of_model)

    def _mapped(self, readout: FeatureReadout, raw: Tensor) -> Tensor | SparseCode:
        if self._buffer is None:
            self._buffer = torch.empty(self._piece, readout.weight.shape[1], device=self._device)
        pre = readout.pre_activation(raw, out=self._buffer[: len(raw)])
        code = readout.gate.sparse(pre) if readout.columns is None else None
        if code is not None:
            return code
        f = readout.gate(pre)
        return f if readout.columns is None else f[:, readout.columns]

    def _joint(self, piece: tuple[Tensor, ...]) -> Tensor | SparseCode:
        f = self._crosscoder.encode(self._crosscoder.normalise(piece))
        f = f if self._columns is None else f[:, self._columns]
        code = SparseCode.of(f)
        return f if code is None else code

    def _tensor(self, part: xr.DataArray, start: int, stop: int, kept: NDArray[np.bool_] | slice) -> Tensor:
        block = np.ascontiguousarray(np.asarray(part[start:stop].values, dtype=np.float32)[kept])
        return torch.from_numpy(block).to(self._device)


def partner_activations(
    crosscoder: Crosscoder, path: Path, site: str, readout: Readout
) -> dict[str, xr.DataArray] | None:
    """The stored activations of every view, which the ``joint`` readout needs beside a model's own."""
    if readout != "joint":
        return None
    return {view: open_activations(path, models=[view], site=site)["activation"][0] for view in crosscoder.views}


@torch.no_grad()
def summarise(
    crosscoder: Crosscoder,
    activation: xr.DataArray,
    prompts: Prompts,
    *,
    view: str,
    readout: Readout,
    partners: Mapping[str, xr.DataArray] | None = None,
    block_tokens: int = BLOCK_TOKENS,
    histograms: bool = False,
) -> xr.Dataset:
    """One model's features per prompt, in contribution scale.

    x = f_k ||d_k|| over all views' rows; under the ``joint`` readout f_k ||d_mk|| of the view alone.

    Parameters
    ----------
    crosscoder
        Trained model.
    activation
        [token, channel], raw units, lazy or not; read block by block.
    prompts
        Which prompt each token belongs to.
    view
        Slot of the model for readout ``own`` and for FVE.
    readout
        Declared readout.
    partners
        View -> its activations of the same tokens, for the other slots of readout ``joint``.
    block_tokens
        Tokens encoded at once; the result does not depend on it.
    histograms
        Whether to count each prompt's tokens in bins of x too.

    Returns
    -------
    Dataset
        ``mean``, ``firing`` (share of tokens with f > 0), ``max`` [prompt, feature]; ``n_tokens`` [prompt]; ``fve`` [],
        about the mean of this model's summarised tokens. NaN for prompts without tokens. If asked for,
        ``histogram`` [prompt, feature, bin] with coordinate ``bin``: each bin's lower edge, the silent tokens at -1.
    """
    device = crosscoder.encoder_matrix.device
    scale = contribution_scale(crosscoder, view, readout)
    features = BlockFeatures(crosscoder, activation, view=view, readout=readout, partners=partners)
    counted = scale if histograms else None
    summaries = PromptSummaries(len(prompts.labels), crosscoder.n_features, device, histogram_scale=counted)
    fve = ExplainedVariance((crosscoder.widths[crosscoder.view_index(view)],))
    for start in range(0, len(prompts), block_tokens):
        code = prompts.codes(start, start + block_tokens)
        kept = code >= 0
        if not kept.any():
            continue
        place = code[kept]
        for raw, f in features.read(start, start + block_tokens, kept):
            summaries.update(place[: len(raw)], f)
            fve.update(raw.cpu().numpy(), crosscoder.reconstruct(f, view, joint=readout == "joint").cpu().numpy())
            place = place[len(raw) :]
    mean, firing, largest = summaries.result(scale)
    dataset = xr.Dataset(
        {
            "mean": ((PROMPT, FEATURE), mean),
            "firing": ((PROMPT, FEATURE), firing),
            "max": ((PROMPT, FEATURE), largest),
            "n_tokens": (PROMPT, summaries.n_tokens()),
            "fve": ((), float(fve.value())),
        }
    )
    if histograms:
        dataset["histogram"] = ((PROMPT, FEATURE, "bin"), summaries.histogram())
        dataset = dataset.assign_coords(bin=[-1.0, 0.0, *HISTOGRAM_EDGES])
    return dataset


def summarise_prompts(
    crosscoder: Crosscoder, path: Path, site: str, mask: NDArray[np.bool_], *, model: str, readout: Readout
) -> xr.Dataset:
    """:func:`summarise` of one stored model, with its prompts as coordinate.

    Parameters
    ----------
    crosscoder, readout
        As in :func:`summarise`.
    path, site
        Activation store and site.
    mask
        [token]: tokens that are summarised; prompts without any are left out.
    model
        Model id in the store.
    """
    prompts = Prompts(path, mask)
    table = summarise(
        crosscoder,
        open_activations(path, models=[model], site=site)["activation"][0],
        prompts,
        view=view_of(model, crosscoder.views),
        readout=readout,
        partners=partner_activations(crosscoder, path, site, readout),
    ).assign_coords({PROMPT: prompts.labels[PROMPT].to_numpy(np.str_)})
    return table.isel({PROMPT: table["n_tokens"].values > 0})


def encode_features(
    spec: StudySpec, folder: StudyFolder, *, provenance: Provenance, progress: Progress = SILENT
) -> None:
    """Summarise the features of base and of every checkpoint per prompt, in each dictionary of the primary crosscoder.

    Parameters
    ----------
    spec, folder
        The study, with activations stored and the primary crosscoder trained. The first dictionary's features are
        stored in features.zarr (layout ``features``), the others' in features.2.zarr and so on.
    provenance
        Origin of the stores.
    progress
        Receiver of progress, in models.

    Raises
    ------
    StageError
        If a model's activations are not complete.
    StoreError
        If a dictionary is missing, or its store was written with other weights.

    Notes
    -----
    Models already committed are skipped. The second reading of base is no model of the study and is left out.
    """
    names, site = spec.primary_crosscoder.names, site_name(spec.extraction.layer)
    refs = list_models(spec, folder)
    complete = complete_models(folder.activations, site)
    missing = [ref.model for ref in refs if ref.model not in complete]
    if missing:
        raise StageError(f"{folder.activations} lacks the activations of {missing}; run the extract stage.")
    stores = [folder.features_of(number) for number in range(1, len(names) + 1)]
    done = [committed_models(store) for store in stores]
    for name, store in zip(names, stores, strict=True):
        _check_crosscoder(store, name, weights_hash(folder.crosscoder(name)))
    todo = [(name, ref) for name, had in zip(names, done, strict=True) for ref in refs if ref.model not in had]
    tasks = [(spec, folder, name, ref) for name, ref in todo]
    with (
        progress.task("encode", total=len(names) * len(refs), unit="models") as task,
        run_tasks(_encoded, tasks) as encoded,
    ):
        for name, store, had in zip(names, stores, done, strict=True):
            task.skip(len(had), dictionary=name)
            for ref in refs:
                if ref.model not in had:
                    append_model(store, "features", next(encoded), provenance=provenance)
                    task.advance(1, dictionary=name, model=ref.model)


def _encoded(spec: StudySpec, folder: StudyFolder, name: str, ref: ModelRef, progress: Progress = SILENT) -> xr.Dataset:
    """One model's summaries in one dictionary, as they are stored."""
    path, device = folder.crosscoder(name), resolve_device(spec.device)
    crosscoder = kept("crosscoder", path, lambda: load_crosscoder(path, device=device))
    prompts = kept("prompts", folder, lambda: Prompts(folder.activations, usable_tokens(spec, folder, "summary")))
    readout, site = spec.primary_crosscoder.readout, site_name(spec.extraction.layer)
    table = summarise(
        crosscoder,
        open_activations(folder.activations, models=[ref.model], site=site)["activation"][0],
        prompts,
        view=view_of(ref.model, crosscoder.views),
        readout=readout,
        partners=partner_activations(crosscoder, folder.activations, site, readout),
        histograms=spec.summaries.histograms,
    )
    return _labelled(table, ref, crosscoder, prompts).assign_attrs(
        readout=readout,
        text_mode=str(open_tokens(folder.activations).attrs["text_mode"]),
        crosscoder=crosscoder.weights_sha256,
        scale=f"{SCALE} of the view" if readout == "joint" else SCALE,
        site=site,
    )


def _check_crosscoder(store: Path, name: str, weights: str) -> None:
    if not committed_models(store):
        return
    written = str(open_features(store).attrs.get("crosscoder"))
    if written != weights:
        raise StoreError(
            f"{store} was encoded with crosscoder {written[:12]}, but {name!r} is now {weights[:12]}; features of "
            "different crosscoders are never mixed: move it away and run the encode stage again."
        )


def _labelled(table: xr.Dataset, ref: ModelRef, crosscoder: Crosscoder, prompts: Prompts) -> xr.Dataset:
    labels: dict[str, Any] = {
        name: (PROMPT, prompts.labels[name].to_numpy(np.str_)) for name in (PROMPT, *PROMPT_LABELS)
    }
    norms = crosscoder.decoder_norm().detach().cpu().numpy()
    dataset = table.expand_dims({MODEL: [ref.model]})
    dataset["decoder_norm"] = ((VIEW, FEATURE), norms)
    return dataset.assign_coords(
        {
            **ref_coords([ref]),
            VIEW: list(crosscoder.views),
            FEATURE: np.arange(crosscoder.n_features),
            **labels,
        }
    )
