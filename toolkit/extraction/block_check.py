"""Which block's residual stream activations made elsewhere are, by reading their first texts again."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import POSITION, TOKEN_ID
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.study import ModelsSpec
from rlgen_stats.stores.shards import to_float32
from rlgen_stats.stores.study_models import ModelRef
from rlgen_stats.toolkit.exchange.caches import Cache, open_cache
from rlgen_stats.toolkit.exchange.importing import check_rows
from rlgen_stats.toolkit.exchange.label_table import read_labels
from rlgen_stats.toolkit.extraction.checkpoints import load_model, resolve_device
from rlgen_stats.toolkit.extraction.residual_stream import capture_residual, locate_layers

N_TEXTS: Final = 4
"""Texts that are read again."""
LARGEST_DIFFERENCE: Final = 0.1
"""Median over tokens of |difference| / |activation| up to which a cache counts as a block's: bfloat16 in another engine
makes a few per cent in the last blocks of a model, and a neighbouring block is not nearer than the right one."""


def check_block(
    cache: Path | str,
    labels: Path | str,
    site: str,
    checkpoint: Path | str,
    *,
    tensor: str | None = None,
    ignore: tuple[str, ...] = (),
) -> float:
    """Refuse activations that are not the residual stream after the block that their site names.

    Parameters
    ----------
    cache, labels, tensor, ignore
        As :func:`~rlgen_stats.toolkit.exchange.import_activations` takes them; whole texts, in order.
    site
        ``blockN``, the output of decoder block N, counted from 0.
    checkpoint
        Folder of the model whose activations they are.

    Returns
    -------
    float
        Median over the tokens of the first texts of |difference| / |activation|.

    Raises
    ------
    InputError
        If cache or labels cannot be used, the site names no block, the cache has another width than the model, or
        another block or none is nearest.
    ModelError
        If the checkpoint cannot be loaded.
    """
    named = re.fullmatch(r"block([0-9]+)", site)
    if named is None:
        raise InputError(f"a checkpoint is compared at a site like 'block12', got {site!r}; leave --checkpoint out.")
    opened, (tokens, _) = open_cache(cache, tensor=tensor), read_labels(labels, ignore=ignore)
    check_rows(opened, len(tokens))
    path = Path(checkpoint)
    ref = ModelRef(model=path.name, run=path.name, step=0, arm="", path=path, loading=ModelsSpec(dtype="auto"))
    model = load_model(ref, device=resolve_device("auto"))
    n_blocks = len(locate_layers(model))
    block = int(named[1])
    if block >= n_blocks:
        raise InputError(f"site {site!r} is none of the model's blocks 0 to {n_blocks - 1}; correct --site.")
    starts = np.flatnonzero(tokens[POSITION].to_numpy() == 0)[: N_TEXTS + 1]
    n_rows = int(starts[N_TEXTS]) if len(starts) > N_TEXTS else len(tokens)
    ids = np.split(tokens[TOKEN_ID].to_numpy()[:n_rows], starts[1:N_TEXTS])
    given = _rows(opened, n_rows)
    read = [_residuals(model, text) for text in ids]
    if given.shape[1] != read[0].shape[2]:
        raise InputError(
            f"the cache has width {given.shape[1]}, {path} {read[0].shape[2]}; expected activations of this model."
        )
    expected = np.concatenate(read, axis=1)  # [block, token, channel]
    norms = np.linalg.norm(expected, axis=2)
    distance = np.median(np.linalg.norm(given - expected, axis=2) / np.where(norms > 0, norms, 1), axis=1)
    distance = np.where(np.isfinite(distance), distance, np.inf)
    nearest = int(distance.argmin())
    if distance[nearest] > LARGEST_DIFFERENCE:
        raise InputError(
            f"the cache is the output of no block of {path}: the nearest, block {nearest}, differs by "
            f"{distance[nearest]:.0%} on the first texts; expected the residual stream of this model and these tokens."
        )
    if nearest != block:
        raise InputError(
            f"the cache is the output of block {nearest} of {path}, not of block {block}, from which it differs by "
            f"{distance[block]:.0%}; correct --site, or read block {block} (vLLM's layer id {block + 1})."
        )
    return float(distance[block])


def _rows(cache: Cache, n_rows: int) -> NDArray[np.float32]:
    blocks, n = [], 0
    for block in cache.blocks():
        blocks.append(to_float32(block, cache.dtype)[: n_rows - n])
        n += len(blocks[-1])
        if n == n_rows:
            break
    return np.concatenate(blocks)


@torch.inference_mode()
def _residuals(model: Any, ids: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
    """Residual stream [block, token, channel] after every block."""
    with ExitStack() as stack:
        captured = [stack.enter_context(capture_residual(model, i)) for i in range(len(locate_layers(model)))]
        model(input_ids=torch.tensor([ids.tolist()], device=model.device), use_cache=False)
        return np.stack([one.value[0].to(torch.float32).cpu().numpy() for one in captured])
