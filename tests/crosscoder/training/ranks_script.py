"""One process of a group: trains on its share of the batches, once a spec. Started by torchrun in test_together."""

from __future__ import annotations

import atexit
import json
import os
import sys
import weakref
from pathlib import Path

import torch
import torch.distributed as dist

from rlgen_stats.schemas.study import CrosscoderSpec
from rlgen_stats.toolkit.crosscoder import ArrayReader, train_crosscoder
from rlgen_stats.toolkit.crosscoder.training.ranks import join_ranks, smallest_kept


def leave_nothing() -> None:
    """A group that outlives its destruction keeps threads, and now and then one of them aborts the process."""
    if GROUP() is not None:
        sys.stderr.write("the process group outlived its destruction\n")
        os._exit(9)


if __name__ == "__main__":
    data, out, *specs = sys.argv[1:]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    values = torch.load(data, weights_only=True).numpy()
    atexit.register(leave_nothing)  # registered before the group's own handler, so it runs after it
    ranks = join_ranks(torch.device("cpu"))
    GROUP = weakref.ref(dist.group.WORLD)
    scores = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    scores[:, :3] += 5  # uneven over ranks once the rows are shared out by halves
    mine = scores[:32] if ranks.rank == 0 else scores[32:] - 4.0
    whole = torch.cat([scores[:32], scores[32:] - 4.0])
    for n_keep in (1, 40, 3000):
        assert ranks.smallest_kept(mine, n_keep) == smallest_kept(whole, n_keep)
    for spec in map(CrosscoderSpec.model_validate_json, specs):
        reader = ArrayReader(values, batch_size=spec.batch_size, seed=1)
        train_crosscoder(reader, spec, views=spec.views, seed=1, log_every=5, folder=Path(out) / spec.name)
    if ranks.rank == 0:
        (Path(out) / "world.json").write_text(json.dumps(ranks.world))
