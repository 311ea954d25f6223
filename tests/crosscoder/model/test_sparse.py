"""Sparse products against dense ones, alone and inside training, encoding and the AuxK loss."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder, open_tokens
from rlgen_stats.toolkit.crosscoder import ArrayReader, Crosscoder, summarise_prompts, train_crosscoder
from rlgen_stats.toolkit.crosscoder.model import sparse as sparse_module
from rlgen_stats.toolkit.crosscoder.model.readout import Readout
from rlgen_stats.toolkit.crosscoder.model.sparse import SparseCode, matmul
from rlgen_stats.toolkit.crosscoder.uses import encode as encode_module
from rlgen_stats.toolkit.extraction import site_name, token_mask
from tests.crosscoder.planted import LAYER, PAIR, Planted, crosscoder_spec


def code(rows: int, features: int, share: float, *, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, features, generator=random) < share
    kept[3] = False  # a token without a feature
    kept[:, 5] = False  # and a feature without a token
    return torch.randn(rows, features, generator=random) * kept


@pytest.mark.parametrize("share", [0.0, 0.001, 0.015])
def test_products_are_those_of_the_dense_code(share: float) -> None:
    f = code(50, 300, share)
    right, left = torch.randn(300, 7), torch.randn(50, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entries = SparseCode.of(f)
        assert entries is not None
        torch.testing.assert_close(entries.times(right), f @ right)
        torch.testing.assert_close(entries.transposed_times(left), f.T @ left)
        torch.testing.assert_close(entries.sampled(left, right), (left @ right.T)[f != 0])
    torch.testing.assert_close(entries.column_sums(), f.sum(dim=0))
    doubled = entries.with_values(2 * entries.values)
    torch.testing.assert_close(doubled.transposed_times(left), 2 * f.T @ left)
    torch.testing.assert_close(matmul(f, right[:, 2:4]), f @ right[:, 2:4])


def test_a_dense_code_stays_dense() -> None:
    f = code(50, 300, 0.1)
    assert SparseCode.of(f) is None
    torch.testing.assert_close(matmul(f, torch.eye(300)), f)


@pytest.mark.parametrize("sparsity", ["batchtopk", "l1", "topk", "jumprelu"])
def test_training_does_not_depend_on_the_way(world: Planted, monkeypatch: pytest.MonkeyPatch, sparsity: str) -> None:
    spec = crosscoder_spec(sparsity=sparsity, objective="both", steps=25, n_features=64)
    trained = []
    for share in (1.0, -1.0):
        monkeypatch.setattr(sparse_module, "SPARSE_SHARE", share)
        reader = ArrayReader(world.data, batch_size=512, seed=1)
        trained.append(train_crosscoder(reader, spec, views=PAIR, seed=1))
    torch.testing.assert_close(trained[0].decoder_matrix, trained[1].decoder_matrix, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(trained[0].encoder_matrix, trained[1].encoder_matrix, rtol=1e-3, atol=1e-4)


def test_entries_above_limits_and_what_is_not_a_number() -> None:
    for features in (304, 300):  # with and without the way that looks at eight at a time
        values = torch.rand(40, features, generator=torch.Generator().manual_seed(4))
        values[7, 3] = float("nan")
        limit = torch.linspace(0.985, 0.999, features)
        entries = SparseCode.above(values, limit)
        assert entries is not None
        wanted = torch.where(values <= limit, 0.0, values)
        torch.testing.assert_close(entries.dense(), wanted, equal_nan=True)
        assert entries.values.isnan().sum() == 1
        assert SparseCode.above(values, 0.9) is None


@pytest.mark.parametrize("kind", ["swap", "own", "joint"])
def test_encoding_does_not_depend_on_the_way(
    encoded: tuple[StudySpec, StudyFolder], main: Crosscoder, monkeypatch: pytest.MonkeyPatch, kind: Readout
) -> None:
    spec, folder = encoded
    mask = token_mask(open_tokens(folder.activations), spec.extraction, purpose="summary")
    found = []
    for share, piece in ((1.0, 4 * main.n_features * 7), (-1.0, 1 << 25)):
        monkeypatch.setattr(sparse_module, "SPARSE_SHARE", share)
        monkeypatch.setattr(encode_module, "PIECE_BYTES", piece)
        found.append(summarise_prompts(main, folder.activations, site_name(LAYER), mask, model="rl@4", readout=kind))
    assert float(found[0]["firing"].mean()) > 0.01
    for name in ("mean", "firing", "max", "fve", "n_tokens"):
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-4, atol=1e-6, err_msg=name)
