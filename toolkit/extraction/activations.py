"""Forced-text activations: every model reads the same texts, and the residual stream after one block is stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import (
    BASE_MODEL,
    POSITION,
    PROMPT,
    PROMPT_LABELS,
    SEGMENT,
    SOURCE,
    TOKEN_ID,
)
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.null_views import REPEAT_MODEL
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.schemas.study import ExtractionSpec, StudySpec
from rlgen_stats.stores import ActivationWriter, Provenance, StudyFolder, complete_models, create_activations
from rlgen_stats.stores.prompts import TEXT, load_prompts
from rlgen_stats.stores.study_models import ModelRef, final_model, find_model, list_models
from rlgen_stats.toolkit.extraction.batching import by_length, cut, left_pad, pad_id
from rlgen_stats.toolkit.extraction.checkpoints import check_weights, load_model, load_tokenizer, resolve_device
from rlgen_stats.toolkit.extraction.outcomes import read_completions
from rlgen_stats.toolkit.extraction.rendering import check_tokenizers, load_reader, read_by_all, shared_tokens
from rlgen_stats.toolkit.extraction.residual_stream import locate_layer, read_residuals
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.workers import keeping, kept, run_tasks

WINDOW_BATCHES: Final = 16
"""Batches per window at most: its texts are sorted by length together, which saves padding, and put back in store
order, which takes the memory of one window."""
WINDOW_BYTES: Final = 1 << 28
"""Float32 activations of a window and layer at most (256 MB: 16,384 tokens of width 4,096), unless of a single text."""
BATCH_BYTES: Final = 1 << 27
"""Float32 activations of a batch and layer at most, padding included, unless of a single text."""
MASK_BLOCK: Final = 1 << 20
"""Tokens whose labels are in memory at once when a mask is made."""
_FLOAT_BYTES: Final = 4
TEXT_SAMPLE: Final = 0
"""Index of the sampled completion that becomes a text; greedy ones would show only each model's most likely tokens."""


@dataclass(frozen=True)
class Text:
    """One text that every model reads."""

    prompt: str
    source: str
    """Model that wrote the completion."""
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """All token ids, as generated: nothing is decoded and tokenised again."""
        return self.prompt_ids + self.completion_ids


@dataclass(frozen=True)
class LayerStore:
    """Where the activations of one layer go."""

    layer: int
    path: Path
    provenance: Provenance


def site_name(layer: int) -> str:
    """Name of the residual stream after decoder block ``layer``."""
    return f"block{layer}"


def contrasted_models(spec: StudySpec, folder: StudyFolder) -> tuple[str, ...]:
    """Base and the last checkpoints of all contrasted runs; their completions are the texts."""
    finals = (final_model(spec, folder, run.name).model for run in spec.all_contrasted)
    return (BASE_MODEL, *finals)


def forced_texts(
    spec: StudySpec, folder: StudyFolder, sources: Sequence[str], prompts: pd.DataFrame, progress: Progress = SILENT
) -> list[Text]:
    """Texts in store order: for each source model, each prompt as it read it, with its first sampled completion.

    A completion ends before its first token that is not the same in every model's vocabulary, such as an end token
    that was added to one of them: no other model could read it. Completions that lose more than their last token are
    logged.

    Raises
    ------
    StageError
        If a source's completions are missing.
    InputError
        If a source lacks the completion of a prompt.
    """
    shared = shared_tokens(list_models(spec, folder))
    texts = []
    for source in sources:
        prompt_ids = load_reader(find_model(source, spec, folder)).encode(list(prompts[TEXT]))
        completions = read_completions(folder, source)
        token_ids = completions[completions["sample"] == TEXT_SAMPLE].set_index(PROMPT)["token_ids"]
        missing = [prompt for prompt in prompts[PROMPT] if prompt not in token_ids.index]
        if missing:
            raise InputError(
                f"{source} has no sampled completion of {len(missing)} prompt(s), e.g. {missing[0]!r}; "
                "run the outcomes stage again."
            )
        written = [read_by_all(token_ids[prompt], shared) for prompt in prompts[PROMPT]]
        rows = zip(prompts[PROMPT], prompt_ids, written, strict=True)
        texts += [Text(prompt, source, tuple(ids), tuple(kept)) for prompt, ids, kept in rows]
        n_cut = sum(len(token_ids[p]) - len(kept) > 1 for p, kept in zip(prompts[PROMPT], written, strict=True))
        if n_cut:
            progress.log(
                f"warning: {n_cut} of {len(written)} completions of {source} hold a token that not every model has; "
                "models read them up to there."
            )
    return texts


def token_table(texts: Sequence[Text]) -> pd.DataFrame:
    """One row per token in store order: prompt, source, position in its text, token_id, segment."""
    lengths = np.array([len(text.ids) for text in texts])
    starts = np.repeat(lengths.cumsum() - lengths, lengths)
    positions = np.arange(lengths.sum()) - starts
    n_prompt = np.repeat([len(text.prompt_ids) for text in texts], lengths)
    return pd.DataFrame(
        {
            PROMPT: np.repeat(np.array([text.prompt for text in texts], dtype=object), lengths),
            SOURCE: np.repeat(np.array([text.source for text in texts], dtype=object), lengths),
            POSITION: positions.astype(np.int64),
            TOKEN_ID: np.concatenate([np.array(text.ids, dtype=np.int64) for text in texts]),
            SEGMENT: np.where(positions < n_prompt, "prompt", "completion").astype(object),
        }
    )


def extract_activations(
    spec: StudySpec,
    folder: StudyFolder,
    *,
    provenance: Provenance,
    beside: Sequence[LayerStore] = (),
    progress: Progress = SILENT,
) -> None:
    """Let every model read every text and store the residual stream at ``spec.extraction.layer``.

    Parameters
    ----------
    spec, folder
        The study, with its outcomes sampled.
    provenance
        Origin of the store.
    beside
        Further layers to store in the same passes, each in a store of its own.
    progress
        Receiver of progress, in tokens.

    Raises
    ------
    StageError
        If completions are missing.
    InputError, ModelError
        If the models have no such block, or a checkpoint or tokenizer cannot be used.
    StoreError
        If the folder holds other texts or another study's activations.

    Notes
    -----
    Texts are the first sampled completions of base and of the two contrasted runs' last checkpoints, each after the
    prompt as its writer read it, so all models are compared on the same tokens (text mode ``forced``). The base is read
    a second time in other batches and order as ``base.repeat@0``: the two differ by numerical noise alone, the floor of
    any attribution.
    Batches are a function of the texts alone: an interrupted model resumes at its first uncommitted token and ends with
    the bytes an uninterrupted run would have written on the same machine, and a layer has the same bytes whichever
    others are read beside it. Each of these adds a window's activations to the memory.
    """
    prompts = load_prompts(spec, folder)
    refs = list_models(spec, folder)
    for ref in refs:
        check_weights(ref)
    check_tokenizers(refs, list(prompts[TEXT]))
    texts = forced_texts(spec, folder, contrasted_models(spec, folder), prompts, progress)
    labels = prompts[[PROMPT, *PROMPT_LABELS]]
    table = token_table(texts)
    stores = (LayerStore(spec.extraction.layer, folder.activations, provenance), *beside)
    for one in stores:
        create_activations(one.path, table, labels, provenance=one.provenance, text_mode="forced")
    done = set.intersection(*(set(complete_models(one.path, site_name(one.layer))) for one in stores))
    todo = [(ref, ref.model) for ref in refs] + [(refs[0], REPEAT_MODEL)]
    tasks = [(spec, folder, stores, ref, label) for ref, label in todo if label not in done]
    with keeping(), progress.task("models that read", total=len(todo), unit="models") as task:
        kept("texts", folder, lambda: texts)
        task.skip(len(todo) - len(tasks))
        with run_tasks(_read, tasks, progress=progress) as read:
            for (*_, label), _ in zip(tasks, read, strict=True):
                task.advance(1, model=label)


def _read(
    spec: StudySpec,
    folder: StudyFolder,
    stores: Sequence[LayerStore],
    ref: ModelRef,
    label: str,
    progress: Progress = SILENT,
) -> None:
    kept("reader", folder, lambda: _make_reader(spec, folder, stores)).read(ref, label, progress)


def _make_reader(spec: StudySpec, folder: StudyFolder, stores: Sequence[LayerStore]) -> _Reader:
    prompts, sources = load_prompts(spec, folder), contrasted_models(spec, folder)
    return _Reader(
        stores=stores,
        extraction=spec.extraction,
        device=resolve_device(spec.device),
        repeat_seed=derive_seed(spec.seed, "repeat"),
        texts=kept("texts", folder, lambda: forced_texts(spec, folder, sources, prompts)),
        pad=pad_id(load_tokenizer(list_models(spec, folder)[0])),
    )


@dataclass(frozen=True)
class Window:
    """Consecutive texts that are read together, and the batches they are read in."""

    first_token: int
    """Offset of the first text's first token in the store."""
    texts: tuple[int, ...]
    batches: tuple[tuple[int, ...], ...]


def plan_windows(
    lengths: Sequence[int], batch_size: int, token_bytes: int, shuffle_seed: int | None = None
) -> Iterator[Window]:
    """Split texts into windows of consecutive texts, each in batches of similar length, or shuffled by a seed.

    Parameters
    ----------
    lengths
        [text] tokens.
    batch_size
        Texts of a batch at most; see ``WINDOW_BATCHES``.
    token_bytes
        Memory of one token's activations; see ``WINDOW_BYTES`` and ``BATCH_BYTES``.
    shuffle_seed
        For a second reading: texts are shuffled, in batches half as large (twice as large where those of the first are
        single texts).
    """
    most_tokens = BATCH_BYTES / token_bytes
    size = batch_size
    if shuffle_seed is not None:
        size = max(1, batch_size // 2) if batch_size > 1 else 2
    first_token = 0
    for texts in _windows(lengths, size * WINDOW_BATCHES, WINDOW_BYTES / token_bytes):
        of_window = [lengths[i] for i in texts]
        if shuffle_seed is None:
            batches = [[texts[row] for row in rows] for rows in by_length(of_window, size, most_tokens)]
        else:
            # A generator for each window: a reading resumed at any window has the batches of a whole one.
            order = [int(i) for i in np.random.default_rng([shuffle_seed, texts.start]).permutation(texts)]
            others = cut(order, lengths, size, most_tokens * min(size / batch_size, 1))
            # a text too long for company was alone in the first reading: now it is read beside itself
            batches = [batch * 2 if 2 * lengths[batch[0]] > most_tokens else batch for batch in others]
        yield Window(first_token, tuple(texts), tuple(map(tuple, batches)))
        first_token += sum(of_window)


def _windows(lengths: Sequence[int], most_texts: int, most_tokens: float) -> Iterator[range]:
    """Consecutive texts, as many as fit, one at least."""
    start = n_tokens = 0
    for stop, length in enumerate(lengths):
        if stop > start and (stop - start == most_texts or n_tokens + length > most_tokens):
            yield range(start, stop)
            start, n_tokens = stop, 0
        n_tokens += length
    if lengths:
        yield range(start, len(lengths))


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """Lets one model after the other read the same texts into the stores of one or more layers."""

    stores: Sequence[LayerStore]
    extraction: ExtractionSpec
    device: torch.device
    repeat_seed: int
    texts: Sequence[Text]
    pad: int

    def read(self, ref: ModelRef, label: str, progress: Progress) -> None:
        """Store one model's activations under ``label``, resuming where an earlier attempt stopped."""
        batch_size = self.extraction.batch_size
        model = load_model(ref, device=self.device)
        for one in self.stores:
            locate_layer(model, one.layer)
        lengths = [len(text.ids) for text in self.texts]
        width = int(model.config.get_text_config().hidden_size)
        windows = plan_windows(
            lengths, batch_size, _FLOAT_BYTES * width, self.repeat_seed if label == REPEAT_MODEL else None
        )
        with ExitStack() as stack:
            writers = {one.layer: stack.enter_context(self._writer(one, label, width)) for one in self.stores}
            task = stack.enter_context(progress.task(f"{label} reads", total=sum(lengths), unit="tokens"))
            committed = {layer: writer.n_committed for layer, writer in writers.items()}
            for window in windows:
                n_tokens = sum(lengths[i] for i in window.texts)
                skip = {layer: min(max(n - window.first_token, 0), n_tokens) for layer, n in committed.items()}
                layers = [layer for layer, n in skip.items() if n < n_tokens]
                for layer, values in self._read_window(model, window, width, layers).items():
                    writers[layer].append(values[skip[layer] :])
                task.skip(min(skip.values()))
                task.advance(n_tokens - min(skip.values()))

    def _writer(self, store: LayerStore, label: str, width: int) -> ActivationWriter:
        site = site_name(store.layer)
        return ActivationWriter(store.path, model=label, site=site, width=width, dtype=self.extraction.dtype)

    def _read_window(
        self, model: Any, window: Window, width: int, layers: Sequence[int]
    ) -> dict[int, NDArray[np.float32]]:
        """Activations [token, channel] of a window's texts in store order, after each of the layers."""
        if not layers:
            return {}
        lengths = np.array([len(self.texts[i].ids) for i in window.texts])
        offsets = dict(zip(window.texts, lengths.cumsum() - lengths, strict=True))
        values = {layer: np.empty((int(lengths.sum()), width), dtype=np.float32) for layer in layers}
        for batch in window.batches:
            read = read_texts_at(model, [self.texts[i].ids for i in batch], layers, self.pad)
            for layer, residual in zip(layers, read, strict=True):
                for index, text in zip(batch, residual, strict=True):
                    values[layer][offsets[index] : offsets[index] + len(text)] = text
        return values


def read_texts(model: Any, texts: Sequence[Sequence[int]], layer: int, pad: int) -> list[NDArray[np.float32]]:
    """Residual stream [token, channel] of each text after block ``layer``, read in one left-padded batch."""
    return read_texts_at(model, texts, [layer], pad)[0]


def read_texts_at(
    model: Any, texts: Sequence[Sequence[int]], layers: Sequence[int], pad: int
) -> list[list[NDArray[np.float32]]]:
    """Of each layer, what :func:`read_texts` gives of it; one pass for all."""
    ids, mask, positions = left_pad(texts, pad, model.device)
    read = (one.to(torch.float32).cpu().numpy() for one in read_residuals(model, layers, ids, mask, positions))
    return [[row[len(row) - len(text) :] for row, text in zip(one, texts, strict=True)] for one in read]


def token_mask(
    tokens: xr.Dataset | pd.DataFrame, extraction: ExtractionSpec, purpose: Literal["train", "summary"] = "train"
) -> NDArray[np.bool_]:
    """Tokens a crosscoder trains on, or tokens a prompt's summary averages over.

    Parameters
    ----------
    tokens
        Labels of all tokens in store order: ``position`` within the text and ``segment``.
    extraction
        ``skip_first`` leading tokens of each text are never used. ``segments`` are trained on; ``summary_segments``
        are summarised, where ``last_prompt`` is each text's last prompt token, which predicts the first completion
        token.
    purpose
        ``"train"`` or ``"summary"``.

    Returns
    -------
    ndarray [token] bool

    Raises
    ------
    InputError
        If nothing is left, or ``purpose`` is neither.
    """
    if purpose == "train":
        segments: tuple[str, ...] = extraction.segments
    elif purpose == "summary":
        segments = extraction.summary_segments
    else:
        raise InputError(f"purpose must be 'train' or 'summary', got {purpose!r}.")
    n = len(tokens[POSITION])
    mask = np.empty(n, dtype=bool)
    for start in range(0, n, MASK_BLOCK):  # one token more than a block: it tells whether the last one ends a prompt
        block = slice(start, start + MASK_BLOCK + 1)
        position, segment = np.asarray(tokens[POSITION][block]), np.asarray(tokens[SEGMENT][block]).astype(np.str_)
        mask[block] = _in_segments(position, segment, segments) & (position >= extraction.skip_first)
    if not mask.any():
        raise InputError(
            f"no token of the {len(mask)} is left with segments {list(segments)} and skip_first "
            f"{extraction.skip_first}; lower extraction.skip_first or name more segments."
        )
    return mask


def _in_segments(
    position: NDArray[np.integer], segment: NDArray[np.str_], segments: tuple[str, ...]
) -> NDArray[np.bool_]:
    mask = np.isin(segment, [name for name in segments if name != "last_prompt"])
    if "last_prompt" in segments:
        ends = np.ones(len(segment), dtype=bool)  # the next token is no prompt token of the same text
        ends[:-1] = (segment[1:] != "prompt") | (position[1:] == 0)
        mask |= (segment == "prompt") & ends
    return np.asarray(mask)
