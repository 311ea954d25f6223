"""What dictionaries decode of one change, with planted weights: copies, other dictionaries, common mistakes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.crosscoder import ArrayReader, Crosscoder, agreement_sums, measure_readout
from rlgen_stats.toolkit.crosscoder.uses import agreement
from rlgen_stats.toolkit.statistics.replicability import decoded_agreement

VIEWS = ("base@0", "rl@9")
MODELS = ("base@0", "rl@5", "rl@9")
WIDTH = 16
N_KNOWN = 12
"""Directions that any of the dictionaries decodes; no dictionary knows the others."""


def activations(n_tokens: int = 1500) -> NDArray[np.float32]:
    """[token, model, channel]: every direction is active on a third of the tokens and twice as strong in rl@9."""
    random = np.random.default_rng(0)
    code = random.uniform(1, 2, (n_tokens, WIDTH)) * (random.random((n_tokens, WIDTH)) < 0.3)
    more = random.uniform(0.5, 1.5, (n_tokens, WIDTH)) * (code > 0)
    return np.stack([code, code + more / 2, code + more], axis=1).astype(np.float32)


def dictionary(known: list[int], *, offset: float = 0.0) -> Crosscoder:
    """Feature i decodes direction known[i] of every model; the offsets of rl's reconstruction are ``offset``."""
    crosscoder = Crosscoder(VIEWS, width=WIDTH, n_features=len(known), sparsity="l1", k=2)
    rows = torch.eye(WIDTH)[known]
    with torch.no_grad():
        crosscoder.scale.copy_(torch.tensor([0.5, 2.0]))
        for view, scale in enumerate(crosscoder.scale):
            crosscoder.encoder[view] = rows.T / (len(VIEWS) * scale)
            crosscoder.decoder[view] = rows * scale
        crosscoder.encoder_bias.zero_()
        crosscoder.decoder_offset.zero_()
        crosscoder.decoder_bias[1] = offset * crosscoder.scale[1]
    return crosscoder.requires_grad_(False)


def sums(
    crosscoders: list[Crosscoder], *, batch_size: int = 100, max_tokens: int = 1 << 18, seed: int = 0
) -> xr.Dataset:
    reader = ArrayReader(activations(), batch_size=batch_size, seed=seed)
    return agreement_sums(crosscoders, reader, MODELS, max_tokens=max_tokens)


def test_products_are_those_of_the_changes() -> None:
    data = activations().astype(float)
    found = sums([dictionary([0, 1, 2]), dictionary([2, 3], offset=0.5)])
    assert found["part"].values.tolist() == ["change", "decoded.1", "decoded.2", "error.1", "error.2"]
    assert found["model"].values.tolist() == ["rl@5", "rl@9"]
    assert found["n_tokens"].item() == len(data)
    for slot, model in ((1, "rl@5"), (2, "rl@9")):
        change = data[:, slot] - data[:, 0]
        first, second = np.zeros_like(change), np.full_like(change, 0.5)
        first[:, :3], second[:, 2:4] = change[:, :3], second[:, 2:4] + change[:, 2:4]
        parts = np.stack([change, first, second, change - first, change - second])
        one = found.sel(model=model)
        np.testing.assert_allclose(one["products"], np.einsum("ptc,qtc->pq", parts, parts), rtol=1e-5, atol=1e-2)
        np.testing.assert_allclose(one["totals"], parts.sum(axis=1), rtol=1e-5, atol=1e-2)


def test_permuted_copies_agree_wholly_and_disjoint_ones_only_in_what_they_miss() -> None:
    known = list(range(N_KNOWN))
    found = decoded_agreement(sums([dictionary(known), dictionary(known[::-1])])).sel(model="rl@9")
    assert float(found.decoded_correlation[0, 1]) == pytest.approx(1, abs=1e-6)
    assert float(found.error_correlation[0, 1]) == pytest.approx(1, abs=1e-6)
    found = decoded_agreement(sums([dictionary(known[:6]), dictionary(known[6:])])).sel(model="rl@9")
    assert float(found.decoded_correlation[0, 1]) == pytest.approx(0, abs=1e-6)
    assert float(found.error_correlation[0, 1]) == pytest.approx(4 / 10, abs=0.03), "four directions nobody knows"
    assert found.true_correlation.values == pytest.approx(np.sqrt(6 / 16), abs=0.03)


def test_offsets_count_about_zero_and_not_about_the_mean() -> None:
    found = decoded_agreement(sums([dictionary([0, 1]), dictionary([0, 1], offset=3.0)])).sel(model="rl@9")
    assert float(found.decoded_correlation[0, 1]) == pytest.approx(1, abs=1e-6)
    assert float(found.decoded_cosine[0, 1]) < 0.5


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    crosscoders = [dictionary([0, 1, 2]), dictionary([2, 3])]
    whole = sums(crosscoders)
    monkeypatch.setattr(agreement, "PIECE_TOKENS", 37)
    cut = sums(crosscoders)
    for name in ("products", "totals"):
        np.testing.assert_allclose(cut[name], whole[name], rtol=1e-12, atol=1e-9)
    together = decoded_agreement(whole)
    alone = decoded_agreement(sums(crosscoders[1:]))
    np.testing.assert_allclose(
        together["true_correlation"].sel(dictionary=2), alone["true_correlation"].sel(dictionary=1), rtol=1e-12
    )


def test_a_sample_of_tokens_is_seeded() -> None:
    crosscoders = [dictionary([0, 1, 2])]
    one = sums(crosscoders, max_tokens=300, seed=1)
    assert one["n_tokens"].item() == 300
    xr.testing.assert_identical(one, sums(crosscoders, max_tokens=300, seed=1))
    assert not np.array_equal(one["products"], sums(crosscoders, max_tokens=300, seed=2)["products"])


def test_error_and_change_give_the_share_explained_of_the_readout() -> None:
    crosscoder = dictionary(list(range(5)))
    found = sums([crosscoder]).sel(model="rl@9")
    change, error = (found["products"].sel(part=p, other_part=p).item() for p in ("change", "error.1"))
    total = found["totals"].sel(part="change").values
    reader = ArrayReader(activations(), batch_size=100, seed=0)
    dfve = measure_readout(crosscoder, reader, MODELS)[2].dfve
    assert 1 - error / (change - (total @ total) / found["n_tokens"].item()) == pytest.approx(dfve, abs=1e-5)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(InputError, match="give a dictionary and a model beside base, got 0"):
        sums([])
    narrow = Crosscoder(VIEWS, width=8, n_features=4, sparsity="l1", k=2)
    with pytest.raises(InputError, match="must have the crosscoders' width 16"):
        sums([dictionary([0]), narrow])
