"""Both models' features on tokens that a trial edits, from the stored activations: edits are measured by them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from rlgen_stats.schemas.dims import BASE_MODEL
from rlgen_stats.schemas.errors import NotEstimableError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder, open_activations, select_tokens
from rlgen_stats.toolkit.crosscoder import Crosscoder, load_crosscoder
from rlgen_stats.toolkit.extraction import site_name, usable_tokens
from rlgen_stats.toolkit.statistics.causal.edit_norms import ModelCodes, TokenCodes

N_TOKENS: Final = 1024
"""Tokens on which edits are measured, in whole texts; a mean norm is then known to a few percent."""


@torch.no_grad()
def token_codes(
    spec: StudySpec, folder: StudyFolder, crosscoder: Path, *, rl: str, prompts: Sequence[str]
) -> TokenCodes:
    """Features of base and of the RL model on the stored texts of some prompts.

    Parameters
    ----------
    spec, folder
        The study, with the activations of base and of the RL model stored.
    crosscoder
        Folder of the dictionary.
    rl
        Model id of the RL model.
    prompts
        Ids of the trial's prompts; texts of prompts in random order are taken until there are ``N_TOKENS`` tokens.

    Returns
    -------
    TokenCodes
        An edit at the site leaves the site's own activations on a given text as they are, so that these are also the
        edited model's.

    Raises
    ------
    NotEstimableError
        If no stored token is of these prompts and at the edited positions.
    """
    site = site_name(spec.extraction.layer)
    tokens = _sample(spec, folder, prompts)
    raw = {model: _read(folder.activations, model, site, tokens) for model in (BASE_MODEL, rl)}
    dictionary = load_crosscoder(crosscoder)
    readout = spec.primary_crosscoder.readout
    base, target = (_codes(dictionary, raw[model], model, readout) for model in (BASE_MODEL, rl))
    return TokenCodes(base, target, float((raw[rl] - raw[BASE_MODEL]).norm(dim=1).mean()))


def _sample(spec: StudySpec, folder: StudyFolder, prompts: Sequence[str]) -> list[NDArray[np.int64]]:
    """Indices of the sampled tokens, text by text: few texts, so that few shards are read."""
    usable = usable_tokens(spec, folder)
    draw = np.random.default_rng(derive_seed(spec.seed, "intervention", "edit norms"))
    chosen: list[NDArray[np.int64]] = []
    taken = 0
    for prompt in draw.permutation(np.array(sorted(prompts))):
        for start, stop in select_tokens(folder.activations, prompt=str(prompt)):
            chosen.append(start + np.flatnonzero(usable[start:stop]))
            taken += len(chosen[-1])
        if taken >= N_TOKENS:
            break
    if not taken:
        raise NotEstimableError("no_edit_norm: no stored token of the trial's prompts lies where edits are made")
    return [text for text in chosen if len(text)]


def _read(store: Path, model: str, site: str, texts: Sequence[NDArray[np.int64]]) -> torch.Tensor:
    stored = open_activations(store, models=[model], site=site)["activation"][0]
    parts = [np.asarray(stored[text[0] : text[-1] + 1].values, np.float32)[text - text[0]] for text in texts]
    return torch.from_numpy(np.concatenate(parts))


def _codes(crosscoder: Crosscoder, raw: torch.Tensor, model: str, readout: str) -> ModelCodes:
    features = crosscoder.readout(raw, view=model, kind=readout)
    return ModelCodes(sparse.csc_array(features.numpy()), crosscoder.feature_direction(model).numpy())
