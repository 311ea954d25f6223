"""What has to be the same on a GPU; skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder, open_tokens
from rlgen_stats.toolkit.crosscoder import ArrayReader, load_crosscoder, summarise_prompts, train_crosscoder
from rlgen_stats.toolkit.extraction import site_name, token_mask
from tests.crosscoder.planted import LAYER, PAIR, Planted, crosscoder_spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    ("sparsity", "objective"),
    [("batchtopk", "joint"), ("l1", "joint"), ("topk", "joint"), ("jumprelu", "joint"), ("batchtopk", "both")],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_learns_what_it_learns_on_the_cpu(
    world: Planted, sparsity: str, objective: str, precision: str
) -> None:
    spec = crosscoder_spec(sparsity=sparsity, objective=objective, precision=precision, steps=400)
    fve = {}
    for device in ("cpu", "cuda"):
        reader = ArrayReader(world.data, batch_size=512, seed=1)
        crosscoder = train_crosscoder(reader, spec, views=PAIR, seed=1, device=device)
        fve[device] = np.mean(list(crosscoder.facts["last"]["fve"].values()))
        assert crosscoder.encoder_matrix.dtype == torch.float32
    assert fve["cuda"] == pytest.approx(fve["cpu"], abs=0.02)


def test_encoding_gives_the_same_summaries(encoded: tuple[StudySpec, StudyFolder]) -> None:
    spec, folder = encoded
    mask = token_mask(open_tokens(folder.activations), spec.extraction, purpose="summary")
    found = [
        summarise_prompts(
            load_crosscoder(folder.crosscoder("main"), device=torch.device(device)),
            folder.activations, site_name(LAYER), mask, model="rl@4", readout="swap",
        )
        for device in ("cpu", "cuda")
    ]  # fmt: skip
    for name in ("mean", "firing", "max", "fve"):
        np.testing.assert_allclose(found[1][name], found[0][name], rtol=1e-3, atol=1e-5, err_msg=name)
