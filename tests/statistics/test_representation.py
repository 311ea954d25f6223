from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from scipy.spatial import procrustes

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.layout import MODEL_COORDS, validate
from rlgen_stats.toolkit.statistics import representation_drift

MODELS = ["base@0", "same@1", "turned@1", "moved@1", "other@1"]


@pytest.fixture
def world():
    rng = np.random.default_rng(0)
    n, d = 240, 6
    base = rng.normal(0, 1, (n, d)) * [5, 3, 1, 1, 1, 1] + 40
    turn = np.linalg.qr(rng.normal(0, 1, (d, d)))[0]
    stack = np.stack([base, base, base @ turn * 2 + 3, base + 0.5, rng.normal(0, 1, (n, d))])
    return xr.Dataset(
        {"activation": (("model", "token", "channel"), stack)},
        coords={
            "model": ("model", np.array(MODELS)),
            "prompt": ("token", np.repeat([f"p{i}" for i in range(60)], 4)),
        },
    )


def unbiased_hsic(k, ell):
    """Song et al. 2012, eq. 5, token by token."""
    n = len(k)
    k, ell = k - np.diag(np.diag(k)), ell - np.diag(np.diag(ell))
    one = np.ones(n)
    return (
        np.trace(k @ ell) + one @ k @ one * (one @ ell @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ ell @ one
    ) / (n * (n - 3))


def test_against_slow_definitions(world):
    out = representation_drift(world, models=MODELS[1:], rank=2)
    validate_coords(out)
    base = world.activation.values[0]
    for m, model in enumerate(MODELS[1:], start=1):
        y = world.activation.values[m]
        got = out.sel(model=model)
        cka = unbiased_hsic(base @ base.T, y @ y.T) / np.sqrt(
            unbiased_hsic(base @ base.T, base @ base.T) * unbiased_hsic(y @ y.T, y @ y.T)
        )
        assert float(got.cka) == pytest.approx(cka, rel=1e-7)
        disparity = procrustes(base, y)[2]  # 1 - (nuclear norm)^2
        assert float(got.procrustes) == pytest.approx(np.sqrt(2 - 2 * np.sqrt(1 - disparity)), abs=1e-6)
        shift = np.linalg.norm(y - base) / np.linalg.norm(base - base.mean(0))
        assert float(got.activation_shift) == pytest.approx(shift, rel=1e-9, abs=1e-12)


def validate_coords(out):
    assert set(MODEL_COORDS) <= set(out.coords)
    movement = out.assign(weight_distance=out.cka * 0, kl_from_base=out.cka * 0)
    validate(movement, "movement")


def test_known_answers(world):
    out = representation_drift(world, models=MODELS[1:], rank=2)
    same, turned, moved, other = (out.sel(model=m) for m in MODELS[1:])
    assert float(same.activation_shift) == 0
    assert float(same.cka) == pytest.approx(1)
    assert float(same.subspace_overlap) == pytest.approx(1)
    assert float(turned.cka) == pytest.approx(1)
    assert float(turned.procrustes) == pytest.approx(0, abs=1e-6)
    assert float(moved.cka) == pytest.approx(1)
    base = world.activation.values[0]
    assert float(moved.activation_shift) == pytest.approx(0.5 * np.sqrt(6) / np.sqrt(base.var(axis=0).sum()))
    assert abs(float(other.cka)) < 0.1
    assert float(other.cka_low) < 0 < float(other.cka_high)


def test_debiased_cka_does_not_grow_with_width():
    """The plain CKA of independent activations grows towards 1 with channels; this one stays at 0."""
    rng = np.random.default_rng(3)
    stack = rng.normal(0, 1, (2, 60, 200))
    acts = xr.Dataset(
        {"activation": (("model", "token", "channel"), stack)},
        coords={"model": ["base@0", "rl@1"], "prompt": ("token", np.repeat(np.arange(20), 3))},
    )
    x, y = (a - a.mean(0) for a in stack)
    plain = np.linalg.norm(x.T @ y) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    assert plain > 0.5
    assert abs(float(representation_drift(acts, models=["rl@1"]).cka[0])) < 0.05


def test_chunks_change_nothing_and_the_mask_is_respected(world):
    whole = representation_drift(world, models=["other@1", "moved@1"])
    for chunk in (7, 100):
        parts = representation_drift(world.chunk({"token": chunk, "model": 1}), models=["other@1", "moved@1"])
        xr.testing.assert_allclose(parts, whole, rtol=1e-7, atol=1e-6)
    mask = np.arange(240) % 4 != 0
    masked = representation_drift(world, models=["other@1"], mask=mask)
    cut = representation_drift(world.isel(token=np.flatnonzero(mask)), models=["other@1"])
    xr.testing.assert_allclose(masked, cut)
    assert int(masked.n_tokens[0]) == 180


def test_jackknife_is_that_of_the_mean_square(world):
    """activation_shift by leaving out groups of whole prompts, spelled out."""
    out = representation_drift(world, models=["other@1"], n_groups=5)
    base, y = world.activation.values[0], world.activation.values[4]
    group = np.repeat(np.arange(60) % 5, 4)
    left = [
        np.linalg.norm((y - base)[group != g]) / np.linalg.norm(base[group != g] - base[group != g].mean(0))
        for g in range(5)
    ]
    error = np.sqrt(4 / 5 * np.sum((np.array(left) - np.mean(left)) ** 2))
    half = 2.7764451051977987 * error  # t(.975, 4)
    assert float((out.activation_shift_high - out.activation_shift)[0]) == pytest.approx(half, rel=1e-6)


def test_errors(world):
    with pytest.raises(InputError, match=r"model 'rl@9' is not in the data"):
        representation_drift(world, models=["rl@9"])
    with pytest.raises(InputError, match="one value per token"):
        representation_drift(world, models=["same@1"], mask=np.ones(3, dtype=bool))
    with pytest.raises(InputError, match="leaves 0 tokens"):
        representation_drift(world, models=["same@1"], mask=np.zeros(240, dtype=bool))
