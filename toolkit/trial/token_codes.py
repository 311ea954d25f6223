"""Both models' features on tokens that a trial edits, from the stored activations: edits are measured by them."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from rlgen_stats.schemas.dims import BASE_MODEL
from rlgen_stats.schemas.errors import NotEstimableError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.schemas.study import Readout, StudySpec
from rlgen_stats.stores import StudyFolder, open_activations, select_tokens
from rlgen_stats.toolkit.crosscoder import Crosscoder, load_crosscoder
from rlgen_stats.toolkit.extraction import site_name, usable_tokens
from rlgen_stats.toolkit.statistics.causal.edit_norms import ModelCodes, TokenCodes

N_TOKENS: Final = 1024
"""Tokens on which edits are measured, about: a mean norm is then known to a few percent."""


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
        Ids of the trial's prompts; as many of them are drawn as hold about ``N_TOKENS`` tokens.

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
    tokens = _sample(spec, folder, prompts)
    stored = open_activations(folder.activations, models=[BASE_MODEL, rl], site=site_name(spec.extraction.layer))
    base, target = (torch.from_numpy(one) for one in stored["activation"][:, tokens].values.astype(np.float32))
    dictionary, readout = load_crosscoder(crosscoder), spec.primary_crosscoder.readout
    return TokenCodes(
        _codes(dictionary, base, BASE_MODEL, readout),
        _codes(dictionary, target, rl, readout),
        float((target - base).norm(dim=1).mean()),
    )


def _sample(spec: StudySpec, folder: StudyFolder, prompts: Sequence[str]) -> NDArray[np.int64]:
    """Sorted indices of the tokens of as many prompts as hold enough: whole prompts, so that few shards are read."""
    usable = usable_tokens(spec, folder)
    n_usable = len(_tokens_of(folder, list(prompts), usable))
    if not n_usable:
        raise NotEstimableError("no_edit_norm: no stored token of the trial's prompts lies where edits are made")
    draw = np.random.default_rng(derive_seed(spec.seed, "intervention", "edit norms"))
    n_prompts = min(ceil(N_TOKENS / (n_usable / len(prompts))), len(prompts))
    sample = _tokens_of(folder, draw.choice(sorted(prompts), n_prompts, replace=False).tolist(), usable)
    return sample if len(sample) else _tokens_of(folder, list(prompts), usable)


def _tokens_of(folder: StudyFolder, prompts: list[str], usable: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Usable tokens of some prompts."""
    ranges = select_tokens(folder.activations, prompt=prompts)
    tokens = np.concatenate([np.arange(start, stop) for start, stop in ranges])
    return np.asarray(tokens[usable[tokens]], dtype=np.int64)


def _codes(crosscoder: Crosscoder, raw: torch.Tensor, model: str, readout: Readout) -> ModelCodes:
    features = crosscoder.readout(raw, view=model, kind=readout)
    return ModelCodes(sparse.csc_array(features.numpy()), crosscoder.feature_direction(model).numpy())
