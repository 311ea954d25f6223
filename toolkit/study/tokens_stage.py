"""The tokens stage: whether the selected features respond to tokens rather than to what a text is about."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import (
    BASE_MODEL,
    CLUSTER,
    MODEL,
    POSITION,
    PROMPT,
    SEGMENT,
    SPLIT,
    TOKEN_ID,
    TRIAL,
    of_dictionary,
)
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import (
    StudyFolder,
    open_activations,
    open_by_dictionary,
    open_outcomes,
    open_tokens,
    write_results,
)
from rlgen_stats.stores.hub import locate_table
from rlgen_stats.stores.prompts import TEXT, load_prompts, load_texts, plain_text
from rlgen_stats.stores.study_models import ModelRef, final_model
from rlgen_stats.toolkit.crosscoder import load_crosscoder
from rlgen_stats.toolkit.crosscoder.data.text_bounds import text_bounds
from rlgen_stats.toolkit.crosscoder.model.crosscoder import Crosscoder
from rlgen_stats.toolkit.crosscoder.model.sparse import SparseCode
from rlgen_stats.toolkit.crosscoder.uses.encode import BLOCK_TOKENS, BlockFeatures, view_of
from rlgen_stats.toolkit.crosscoder.uses.injection import Injection, injected_peaks
from rlgen_stats.toolkit.extraction import load_model, load_tokenizer, resolve_device, site_name, usable_tokens
from rlgen_stats.toolkit.extraction.batching import encode_prompts, pad_id
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.statistics import token_detectors
from rlgen_stats.toolkit.statistics.kernels.draws import stream
from rlgen_stats.toolkit.statistics.selection.token_detectors import (
    Injections,
    TokenActivations,
    leading_tokens,
    like_tokens,
)
from rlgen_stats.toolkit.study.model_stages import ranked_features
from rlgen_stats.toolkit.study.stage_graph import Study
from rlgen_stats.toolkit.workers import kept, run_tasks

MOST_TOKENS: Final = 500_000
"""Tokens read: whole prompts in the order of a hash, up to this number."""
MOST_POSITIONS: Final = 256
"""Positions farther from the start of the completion count as this far."""
TEXT_TOKENS: Final = 64
"""First tokens of an unrelated text that are kept."""
N_LIKE: Final = 20
"""Tokens of like frequency among which a matched one is drawn."""
MARKER, FIRST = "answer marker", "first completion token"


def tokens(study: Study, key: str, progress: Progress) -> dict[str, Any]:
    """What tokens explain of the selected features' activations, and whether the features fire on injected tokens."""
    spec, folder = study.spec, study.folder
    provenance = study.provenance("tokens", key)
    sets = {n: ranked_features(chosen) for n, chosen in open_by_dictionary(folder.results, "selection").items()}
    tasks = [(spec, folder, number, sets[number]) for number in range(1, len(spec.primary_crosscoder.names) + 1)]
    detectors = {}
    with (
        progress.task("tokens", total=len(tasks), unit="dictionaries") as task,
        run_tasks(_detectors, tasks) as results,
    ):
        for (_, _, number, _), found in zip(tasks, results, strict=True):
            write_results(folder.results, of_dictionary("tokens", number), found, provenance=provenance)
            detectors[str(number)] = int(found["detector"].sum())
            task.advance(1, detectors=detectors[str(number)])
    return {"detectors": detectors}


def _detectors(
    spec: StudySpec, folder: StudyFolder, number: int, features: list[int], progress: Progress = SILENT
) -> xr.Dataset:
    """Which of one dictionary's selected features are token detectors."""
    target, device = final_model(spec, folder, spec.contrasted[1].name), resolve_device(spec.device)
    tokenizer, labels, texts = kept("tokens to inject", folder, lambda: _make_inputs(spec, folder, target))
    name = spec.primary_crosscoder.names[number - 1]
    crosscoder = load_crosscoder(folder.crosscoder(name), device=device)
    columns = torch.tensor(features, dtype=torch.long, device=device)
    view = view_of(target.model, crosscoder.views)
    stored = labels.with_activations(_activations(spec, folder, crosscoder, target.model, view, columns, labels.rows))
    injections = None
    if features:
        plan = _Plan(stored, texts, tokenizer, spec.tokens.n_injected, derive_seed(spec.seed, "tokens", name))
        peaks = injected_peaks(
            kept("target", folder, lambda: load_model(target, device=device)),
            spec.extraction.layer,
            crosscoder.readout_map(view=view, kind=spec.primary_crosscoder.readout, features=columns),
            plan.injections,
            pad=pad_id(tokenizer),
            batch_size=spec.extraction.batch_size,
        )
        injections = plan.measured(peaks)
    found = token_detectors(
        stored,
        injections,
        features,
        alpha=spec.statistics.alpha,
        n_min=spec.statistics.n_min,
        seed=derive_seed(spec.seed, "tokens"),
    )
    return found.assign_attrs(crosscoder=crosscoder.weights_sha256)


def _make_inputs(spec: StudySpec, folder: StudyFolder, target: ModelRef) -> tuple[Any, _Labels, list[_Text]]:
    """What is the same for all dictionaries."""
    tokenizer = load_tokenizer(target)
    return tokenizer, _labels(spec, folder, tokenizer), _unrelated_texts(spec, folder, tokenizer, target.model)


@dataclass(frozen=True, kw_only=True)
class _Labels:
    """The stored tokens that are read, and what they are."""

    rows: NDArray[np.int64]
    """Positions in the store, ascending."""
    token_id: NDArray[np.int64]
    position: NDArray[np.int64]
    unit: NDArray[np.int64]
    classes: dict[str, NDArray[np.bool_]]

    def with_activations(self, activation: NDArray[np.float64]) -> TokenActivations:
        """The same with features on them."""
        return TokenActivations(
            activation=activation,
            token_id=self.token_id,
            position=self.position,
            unit=self.unit,
            classes=self.classes,
        )


def _labels(spec: StudySpec, folder: StudyFolder, tokenizer: Any) -> _Labels:
    """Tokens that summaries average over, of prompts that no trial uses."""
    stored = open_tokens(folder.activations)
    usable = usable_tokens(spec, folder, "summary") & (np.asarray(stored[SPLIT].values) != TRIAL)
    prompt = np.asarray(stored[PROMPT].values).astype(np.str_)
    usable &= np.isin(prompt, _some_prompts(prompt[usable], spec.seed))
    starts, ends = text_bounds(stored).T
    in_prompt = np.asarray(stored[SEGMENT].values) == "prompt"
    n_prompt = np.add.reduceat(in_prompt.astype(np.int64), starts)
    position = np.asarray(stored[POSITION].values, dtype=np.int64) - np.repeat(n_prompt, ends - starts)
    token_id = np.asarray(stored[TOKEN_ID].values, dtype=np.int64)[usable]
    position = np.clip(position[usable], -MOST_POSITIONS, MOST_POSITIONS)
    unit = np.unique(np.asarray(stored[CLUSTER].values).astype(np.str_)[usable], return_inverse=True)[1].reshape(-1)
    classes = {name: np.isin(token_id, ids) for name, ids in _class_ids(spec, tokenizer, token_id).items()}
    classes[FIRST] = position == 0
    return _Labels(rows=np.flatnonzero(usable), token_id=token_id, position=position, unit=unit, classes=classes)


def _some_prompts(prompt: NDArray[np.str_], seed: int) -> list[str]:
    """Prompts in the order of a hash while their tokens are at most ``MOST_TOKENS``; at least one."""
    names, counts = np.unique(prompt, return_counts=True)
    order = sorted(range(len(names)), key=lambda i: derive_seed(seed, "tokens prompt", str(names[i])))
    n = max(1, int((np.cumsum(counts[order]) <= MOST_TOKENS).sum()))
    return [str(names[i]) for i in order[:n]]


def _class_ids(spec: StudySpec, tokenizer: Any, token_id: NDArray[np.int64]) -> dict[str, list[int]]:
    """Token ids of each declared class, and of the answer marker."""
    text = {int(i): tokenizer.decode([int(i)]).strip() for i in np.unique(token_id)}
    ids = {
        name: [i for i, word in text.items() if re.fullmatch(expression, word)]
        for name, expression in spec.tokens.classes.items()
    }
    marker = spec.grader.marker if spec.grader.name == "final_answer" else "boxed"
    words = {tokenizer.decode([i]).strip() for i in tokenizer(marker, add_special_tokens=False)["input_ids"]}
    return ids | {MARKER: [i for i, word in text.items() if word and word in words]}


def _activations(
    spec: StudySpec,
    folder: StudyFolder,
    crosscoder: Crosscoder,
    model: str,
    view: str,
    columns: torch.Tensor,
    rows: NDArray[np.int64],
) -> NDArray[np.float64]:
    """[token, feature] of the rows of the store."""
    if not len(columns):
        return np.empty((len(rows), 0))
    stored = open_activations(folder.activations, models=[model], site=site_name(spec.extraction.layer))["activation"]
    readout = spec.primary_crosscoder.readout
    features = BlockFeatures(crosscoder, stored.isel({MODEL: 0}), view=view, readout=readout, columns=columns)
    parts = [np.empty((0, len(columns)))]
    for start in range(0, stored.sizes["token"], BLOCK_TOKENS):
        inside = rows[(rows >= start) & (rows < start + BLOCK_TOKENS)] - start
        if len(inside):
            read = np.zeros(min(BLOCK_TOKENS, stored.sizes["token"] - start), dtype=bool)
            read[inside] = True
            for _, f in features.read(start, start + BLOCK_TOKENS, read):
                dense = f.dense() if isinstance(f, SparseCode) else f
                parts.append(dense.cpu().numpy().astype(np.float64))
    return np.concatenate(parts)


@dataclass(frozen=True)
class _Text:
    ids: list[int]
    unit: str


def _unrelated_texts(spec: StudySpec, folder: StudyFolder, tokenizer: Any, target: str) -> list[_Text]:
    """Neutral texts, and prompts that are neither of a trial nor base wrong and the target right."""
    neutral = spec.intervention.neutral_text
    texts = [] if neutral is None else load_texts(locate_table(neutral, folder))[: spec.tokens.n_texts // 2]
    prompts = load_prompts(spec, folder)
    correct = open_outcomes(folder.outcomes)["greedy_correct"].sel({MODEL: [BASE_MODEL, target]}).load()
    base, rl = correct.transpose(MODEL, PROMPT).values
    gained = np.asarray(correct[PROMPT].values).astype(np.str_)[(base == 0) & (rl == 1)].tolist()
    prompts = prompts[(prompts[SPLIT] != TRIAL) & ~prompts[PROMPT].isin(gained)]
    order = prompts[PROMPT].map(lambda prompt: derive_seed(spec.seed, "tokens text", prompt)).sort_values().index
    prompts = prompts.loc[order[: spec.tokens.n_texts - len(texts)]]
    units = [f"neutral {i}" for i in range(len(texts))] + prompts[CLUSTER].tolist()
    ids = encode_prompts(tokenizer, [*texts, *map(plain_text, prompts[TEXT])])
    return [_Text(one[:TEXT_TOKENS], unit) for one, unit in zip(ids, units, strict=True)]


class _Plan:
    """Which tokens are put where: each feature's leading ones, and at the same places others of like frequency."""

    def __init__(
        self, stored: TokenActivations, texts: Sequence[_Text], tokenizer: Any, n_tokens: int, seed: int
    ) -> None:
        special = [int(i) for i in tokenizer.all_special_ids]
        self._texts, self._tokenizer = texts, tokenizer
        self._leading = leading_tokens(stored, n_tokens, special)
        self.injections: list[Injection] = []
        for column, own in enumerate(self._leading):
            like = like_tokens(stored, own, N_LIKE, special)
            random = stream(seed, column)
            for text in texts:
                place = int(random.integers(1, len(text.ids) + 1))
                matched = [int(random.choice(pool)) for pool in like if len(pool)]
                for inserted in (own, matched):
                    ids = (*text.ids[:place], *inserted, *text.ids[place:])
                    self.injections.append(Injection(ids, place, place + len(inserted), column))

    def measured(self, peaks: NDArray[np.float64]) -> Injections:
        """[text, feature] of both kinds, from the peaks of the injections in order."""
        own, matched = peaks.reshape(len(self._leading), len(self._texts), 2).transpose(2, 1, 0)
        decoded = [[self._tokenizer.decode([i]).strip() for i in ids] for ids in self._leading]
        unit = pd.factorize(np.array([text.unit for text in self._texts]))[0].astype(np.int64)
        return Injections(own=own, matched=matched, unit=unit, tokens=decoded)
