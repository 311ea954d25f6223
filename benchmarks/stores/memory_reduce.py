"""Reducing one store's tokens to prompts; memory.py runs each task in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import numpy as np
import torch

from rlgen_stats.schemas.study import ExtractionSpec
from rlgen_stats.stores import open_activations, open_tokens
from rlgen_stats.stores.labels import LabelBlocks, TokenLabels
from rlgen_stats.toolkit.crosscoder.model.crosscoder import Crosscoder
from rlgen_stats.toolkit.crosscoder.uses.encode import Prompts, summarise
from rlgen_stats.toolkit.crosscoder.uses.summaries import PromptSummaries
from rlgen_stats.toolkit.extraction import token_mask

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from common import SITE
from sizes import MODELS, N_FEATURES, Size, Task, run_child


def _crosscoder(size: Size) -> Crosscoder:
    return Crosscoder(MODELS, width=size.width, n_features=N_FEATURES, sparsity="l1", k=8)


@torch.no_grad()
def reduce_blocks(path: Path, scale: int, size: Size) -> None:
    """Features of every token of one model, block by block, summed up per prompt."""
    crosscoder = _crosscoder(size)
    summaries = PromptSummaries(size.prompts, N_FEATURES)
    data = open_activations(path, models=[MODELS[1]], site=SITE)["activation"].data[0]
    labels, start = LabelBlocks(TokenLabels(path)), 0
    for i in range(data.numblocks[0]):
        block = torch.from_numpy(data.blocks[i].compute(scheduler="synchronous").astype(np.float32))
        codes = labels.read("prompt", start, start + len(block))
        summaries.update(codes, crosscoder.readout(block, view=MODELS[1], kind="own"))
        start += len(block)
    if int(summaries.n_tokens().sum()) != size.texts(scale).n_tokens:
        raise SystemExit("not every token was summarised.")


def encode(path: Path, scale: int, size: Size) -> None:
    """The same as the encode stage does it, with a mask of every token."""
    prompts = Prompts(path, token_mask(open_tokens(path), ExtractionSpec(skip_first=0), "summary"))
    activation = open_activations(path, models=[MODELS[1]], site=SITE)["activation"][0]
    summarise(_crosscoder(size), activation, prompts, view=MODELS[1], readout="own", block_tokens=size.shard)


TASKS: Final[dict[str, Task]] = {"reduce to prompts": reduce_blocks, "encode stage": encode}

if __name__ == "__main__":
    torch.set_num_threads(1)
    run_child(TASKS)
