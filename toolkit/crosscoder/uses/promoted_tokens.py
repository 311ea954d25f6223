"""Promoted tokens: whose logits a feature's direction raises and lowers, directly through the unembedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rlgen_stats.schemas.study import Readout, StudySpec
from rlgen_stats.stores import StudyFolder, replacing
from rlgen_stats.toolkit.crosscoder.model.crosscoder import Crosscoder
from rlgen_stats.toolkit.crosscoder.model.loading import load_crosscoder
from rlgen_stats.toolkit.crosscoder.uses.encode import contribution_scale
from rlgen_stats.toolkit.extraction import find_model, load_model, load_tokenizer, resolve_device
from rlgen_stats.toolkit.progress import SILENT, Progress

BLOCK_BYTES: Final = 1 << 28
"""Memory of the effects of one block of features on the whole vocabulary."""
_FINAL_NORMS: Final = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
"""Names of the last normalisation in a Hugging Face decoder."""
_SCHEMA: Final = pa.schema(
    [
        ("feature", pa.int64()),
        ("model", pa.string()),
        ("sign", pa.int8()),
        ("rank", pa.int64()),
        ("token", pa.string()),
        ("effect", pa.float32()),
    ]
)


@torch.no_grad()
def write_logits(spec: StudySpec, folder: StudyFolder, *, n: int = 8, progress: Progress = SILENT) -> None:
    """Write the tokens that every feature of the primary crosscoder raises and lowers most, in each view's model.

    Parameters
    ----------
    spec, folder
        The study, with the primary crosscoder.
    n
        Tokens per feature, model and sign.
    progress
        Receiver of progress, in features.

    Raises
    ------
    StoreError
        If the crosscoder or a model is missing.

    Notes
    -----
    Writes ``logits.parquet`` beside the crosscoder, see :func:`rlgen_stats.stores.read_logits` for its columns.
    Features without a decoder in a view (exclusive to another one) are left out there. The direct path only, see
    :func:`logit_effects`.
    """
    primary = spec.primary_crosscoder
    crosscoder = load_crosscoder(folder.crosscoder(primary.name), device=resolve_device(spec.device))
    with (
        replacing(folder.logits(primary.name)) as temporary,
        pq.ParquetWriter(temporary, _SCHEMA, compression="zstd") as writer,
        progress.task("logits", total=crosscoder.n_features * len(crosscoder.views), unit="features") as task,
    ):
        for view in crosscoder.views:
            reference = find_model(view, spec, folder)
            model = load_model(reference)
            tokenizer = load_tokenizer(reference)
            words: dict[int, str] = {}
            size = max(1, BLOCK_BYTES // (4 * model.get_output_embeddings().weight.shape[0]))
            for start in range(0, crosscoder.n_features, size):
                block = torch.arange(start, min(start + size, crosscoder.n_features))
                effect = logit_effects(model, crosscoder, view, block.tolist(), readout=primary.readout)
                writer.write_table(_strongest(effect, block, view, n, tokenizer, words))
                task.advance(len(block), model=view)


def _strongest(effect: Tensor, features: Tensor, view: str, n: int, tokenizer: Any, words: dict[int, str]) -> pa.Table:
    """The n most raised and n most lowered tokens of each feature; ``words`` keeps decoded tokens between calls."""
    has_decoder = (effect != 0).any(dim=1)
    effect, features = effect[has_decoder], features[has_decoder.cpu()]
    n = min(n, effect.shape[1])
    best = [torch.topk(sign * effect, n, dim=1) for sign in (1.0, -1.0)]
    value = torch.stack([best[0].values, -best[1].values], dim=1).cpu().numpy()
    token = torch.stack([best[0].indices, best[1].indices], dim=1).cpu().numpy()
    for new in set(np.unique(token).tolist()) - words.keys():
        words[new] = str(tokenizer.decode([new]))
    shape = value.shape
    index = np.indices(shape)
    columns = {
        "feature": features.numpy()[index[0]].ravel(),
        "model": np.full(value.size, view),
        "sign": np.array([1, -1], dtype=np.int8)[index[1]].ravel(),
        "rank": index[2].ravel() + 1,
        "token": [words[one] for one in token.ravel().tolist()],
        "effect": value.ravel(),
    }
    return pa.table(columns, schema=_SCHEMA)


@torch.no_grad()
def logit_effects(
    model: Any, crosscoder: Crosscoder, view: str, features: Sequence[int], *, readout: Readout = "swap"
) -> Tensor:
    """Change of each logit, centred over the vocabulary, per unit of contribution: [feature, vocabulary].

    Parameters
    ----------
    model
        Hugging Face causal language model of the view.
    crosscoder, view
        Crosscoder and which of its views the model is.
    features
        Feature ids.
    readout
        How the features are read, which decides what a unit of contribution adds.

    Notes
    -----
    The direct path only: later blocks are skipped, and the final normalisation enters with its gain but not with its
    data-dependent scale. A first look at a feature, not a measure of its effect.
    """
    chosen = list(features)
    norm = contribution_scale(crosscoder, view, readout)[chosen].clamp_min(torch.finfo(torch.float32).tiny)
    direction = crosscoder.feature_direction(view, joint=readout == "joint")[chosen] / norm[:, None]
    inner = getattr(model, "base_model", model)
    norms = [getattr(inner, name) for name in _FINAL_NORMS if hasattr(inner, name)]
    gain = getattr(norms[0], "weight", None) if norms else None
    unembedding = model.get_output_embeddings().weight.to(direction.device).float()
    direction = direction * (1.0 if gain is None else gain.to(direction.device).float())
    # Softmax does not see a shift common to all logits, so that only what exceeds the mean counts.
    effect: Tensor = direction @ (unembedding - unembedding.mean(dim=0)).T
    return effect
