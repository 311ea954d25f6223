"""Sums behind latent scaling against numpy's least squares, blocks, scale invariance and the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.crosscoder import Crosscoder, scaling_sums
from rlgen_stats.toolkit.crosscoder.uses import scaling_sums as module
from rlgen_stats.toolkit.statistics import latent_scaling

VIEWS = ("base@0", "sft@9", "rl@9")
GROUPS = np.repeat(np.arange(40), 15)


@pytest.fixture(scope="module")
def crosscoder() -> Crosscoder:
    made = Crosscoder(VIEWS, width=6, n_features=10, sparsity="batchtopk", k=3, seed=4)
    random = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in (*made.parameters(), made.means):
            tensor.copy_(torch.randn(tensor.shape, generator=random))
        made.scale.copy_(torch.tensor([0.5, 2.0, 3.0]))
        made.threshold.fill_(2.5)
        made.encoder_bias[7] = -1e3  # never fires
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def raw() -> torch.Tensor:
    return torch.randn(len(GROUPS), 18, generator=torch.Generator().manual_seed(1))


def in_blocks(raw: torch.Tensor, size: int):  # type: ignore[no-untyped-def]
    return [(raw[start : start + size], GROUPS[start : start + size]) for start in range(0, len(raw), size)]


def least_squares(crosscoder: Crosscoder, raw: torch.Tensor, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """beta [view, feature] and its cluster-robust standard error, one feature and view at a time."""
    x = (raw.double().view(-1, 3, 6) * crosscoder.scale.double()[:, None]).numpy()
    f = crosscoder.encode(crosscoder.normalise(raw)).double().numpy()
    decoder = crosscoder.decoder.double().numpy()
    back = np.einsum("tk,vkc->tvc", f, decoder)
    error = x - back - crosscoder.decoder_bias.double().numpy()
    beta, se = np.full((3, 10), np.nan), np.full((3, 10), np.nan)
    for k in range(10):
        if not f[:, k].any():
            continue
        strongest = np.linalg.norm(decoder[:, k], axis=1).argmax()
        for v in range(3):
            y = error[:, v] + f[:, k, None] * decoder[v, k] if kind == "error" else back[:, v]
            design = (f[:, k, None] * decoder[strongest, k]).reshape(-1, 1)
            beta[v, k] = np.linalg.lstsq(design, y.reshape(-1), rcond=None)[0][0]
            rest = (y.reshape(-1) - design[:, 0] * beta[v, k]) * design[:, 0]
            scores = np.array([rest.reshape(len(f), -1)[g == GROUPS].sum() for g in range(40)])
            used = len(np.unique(GROUPS[f[:, k] > 0]))
            se[v, k] = np.sqrt(used / (used - 1) * (scores**2).sum()) / (design[:, 0] ** 2).sum()
    return beta, se


@pytest.mark.parametrize("kind", ["error", "reconstruction"])
def test_betas_are_the_least_squares_ones(crosscoder: Crosscoder, raw: torch.Tensor, kind: str) -> None:
    found = latent_scaling(scaling_sums(crosscoder, in_blocks(raw, 600), n_groups=40))
    beta, se = least_squares(crosscoder, raw, kind)
    np.testing.assert_allclose(found[f"beta_{kind}"].values, beta, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(found[f"beta_{kind}_se"].values, se, rtol=2e-4, atol=1e-6)
    assert np.isnan(found[f"beta_{kind}"].values[:, 7]).all()
    strongest = found.strongest.values
    reference = beta[strongest, np.arange(10)]
    np.testing.assert_allclose(found[f"nu_{kind}"].values, beta / reference, rtol=1e-4, atol=1e-5)
    alive = [k for k in range(10) if k != 7]
    assert (found[f"nu_{kind}"].values[strongest, np.arange(10)][alive] == 1).all()
    assert (found[f"nu_{kind}_se"].values[strongest, np.arange(10)][alive] == 0).all()


def test_blocks_change_nothing(crosscoder: Crosscoder, raw: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scaling_sums(crosscoder, in_blocks(raw, 600), n_groups=40)
    for size, gather in ((7, 1 << 26), (250, 24 * 5)):
        monkeypatch.setattr(module, "GATHER_BYTES", gather)
        xr.testing.assert_allclose(
            scaling_sums(crosscoder, in_blocks(raw, size), n_groups=40), whole, rtol=1e-5, atol=1e-3
        )


def test_the_scale_of_a_feature_changes_nothing(crosscoder: Crosscoder, raw: torch.Tensor) -> None:
    """(f, d) -> (c f, d / c) leaves betas alone."""
    other = Crosscoder(VIEWS, width=6, n_features=10, sparsity="batchtopk", k=3)
    other.load_state_dict(crosscoder.state_dict())
    other.requires_grad_(False)
    c = torch.linspace(0.3, 4.0, 10)
    other.encoder_matrix *= c
    other.encoder_bias *= c
    other.decoder_matrix /= c[:, None]
    one, two = (latent_scaling(scaling_sums(who, in_blocks(raw, 600), n_groups=40)) for who in (crosscoder, other))
    for name in ("beta_error", "beta_reconstruction", "nu_error", "nu_reconstruction", "nu_error_se"):
        np.testing.assert_allclose(one[name].values, two[name].values, rtol=1e-3, atol=1e-4)


def test_standard_errors_match_the_bootstrap_over_prompts(crosscoder: Crosscoder) -> None:
    """300 prompts of 8 tokens that share a direction, so that tokens are far from independent."""
    random = torch.Generator().manual_seed(3)
    groups = np.repeat(np.arange(300), 8)
    raw = torch.randn(2400, 18, generator=random) + 1.5 * torch.randn(300, 18, generator=random)[groups]
    sums = scaling_sums(crosscoder, [(raw, groups)], n_groups=300)
    found = latent_scaling(sums)
    draws = np.random.default_rng(0).multinomial(300, np.full(300, 1 / 300), size=4000).astype(float)
    squares = draws @ sums.squares.values
    strongest, features = found.strongest.values, np.arange(10)
    for kind in ("error", "reconstruction"):
        cross = np.einsum("dg,gvk->dvk", draws, sums[kind].values)
        beta = cross / squares[:, None]
        nu = beta / beta[:, strongest, features][:, None]
        for name, values in (("beta", beta), ("nu", nu)):
            bootstrap, se = values.std(axis=0), found[f"{name}_{kind}_se"].values
            size = found[f"beta_{kind}"].values / found[f"beta_{kind}_se"].values
            stable = (np.abs(size[strongest, features]) > 10) & (features != 7)  # a ratio needs a sure denominator
            assert stable.sum() >= 2
            for v in range(3):
                used = stable & (strongest != v) if name == "nu" else features != 7
                np.testing.assert_allclose(se[v, used], bootstrap[v, used], rtol=0.1)


def test_bad_input_is_explained(crosscoder: Crosscoder, raw: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"groups run from 0 to 9, got 0 to 39"):
        scaling_sums(crosscoder, in_blocks(raw, 600), n_groups=10)
    ragged = Crosscoder(VIEWS[:2], width=(6, 8), n_features=10, sparsity="l1", k=3)
    with pytest.raises(InputError, match=r"compares a feature's direction across views of one width, got \(6, 8\)"):
        scaling_sums(ragged, [], n_groups=10)
    with pytest.raises(InputError, match=r"needs the sums 'squares' over \('group', 'feature'\)"):
        latent_scaling(xr.Dataset())
