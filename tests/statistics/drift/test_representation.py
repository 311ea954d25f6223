from __future__ import annotations

import tracemalloc

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from scipy.spatial import procrustes

from rlgen_stats.schemas.declaring import MODEL_COORDS
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics import representation_drift
from rlgen_stats.toolkit.statistics.drift.representation import _groups

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
    group = _groups(world, "prompt", 5, derive_seed(0, "representation_drift"))
    assert np.bincount(group).tolist() == [48] * 5
    assert np.all(group.reshape(60, 4) == group[::4, None])
    left = [
        np.linalg.norm((y - base)[group != g]) / np.linalg.norm(base[group != g] - base[group != g].mean(0))
        for g in range(5)
    ]
    error = np.sqrt(4 / 5 * np.sum((np.array(left) - np.mean(left)) ** 2))
    half = 2.7764451051977987 * error  # t(.975, 4)
    assert float((out.activation_shift_high - out.activation_shift)[0]) == pytest.approx(half, rel=1e-6)


def test_order_of_tokens_does_not_matter(world):
    whole = representation_drift(world, models=["other@1", "moved@1"])
    mixed = world.isel(token=np.random.default_rng(1).permutation(240))
    xr.testing.assert_allclose(representation_drift(mixed, models=["other@1", "moved@1"]), whole, rtol=1e-7, atol=1e-6)


def test_tasks_that_take_turns_do_not_widen_the_interval():
    """Four tasks in turn, the first of which moved: dealt out in order, every group would hold one task alone."""
    rng = np.random.default_rng(2)
    base = rng.normal(0, 1, (800, 4))
    moved = base + np.where(np.arange(800) % 4 == 0, 2.0, 0.0)[:, None]
    acts = xr.Dataset(
        {"activation": (("model", "token", "channel"), np.stack([base, moved]))},
        coords={"model": ["base@0", "rl@1"], "prompt": ("token", np.array([f"p{i:03d}" for i in range(800)]))},
    )
    out = representation_drift(acts, models=["rl@1"], n_groups=20)
    width = float((out.activation_shift_high - out.activation_shift_low)[0])
    in_turn = np.arange(800) % 20
    left = [
        np.sqrt(np.square((moved - base)[in_turn != g]).sum() / np.square(base[in_turn != g]).sum()) for g in range(20)
    ]
    ordered = 2 * 2.093 * np.sqrt(19 / 20 * np.square(np.array(left) - np.mean(left)).sum())
    assert width < 0.6 * ordered


def test_memory_is_that_of_a_block_and_the_sums():
    n, d = 400_000, 16

    def draw(block_info=None):
        (_, (start, stop), _) = block_info[None]["array-location"]
        return np.random.default_rng(start).normal(size=(1, stop - start, d))

    lazy = da.map_blocks(draw, chunks=((1, 1), (20_000,) * 20, (d,)), dtype=np.float64)
    acts = xr.Dataset(
        {"activation": (("model", "token", "channel"), lazy)},
        coords={"model": ["base@0", "rl@1"], "prompt": ("token", np.arange(n) // 100)},
    )
    tracemalloc.start()
    representation_drift(acts, models=["rl@1"], n_groups=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * 2**20 < 2 * n * d * 8


def test_errors(world):
    with pytest.raises(InputError, match=r"model 'rl@9' is not in the data"):
        representation_drift(world, models=["rl@9"])
    with pytest.raises(InputError, match="one value per token"):
        representation_drift(world, models=["same@1"], mask=np.ones(3, dtype=bool))
    with pytest.raises(InputError, match="leaves 0 tokens"):
        representation_drift(world, models=["same@1"], mask=np.zeros(240, dtype=bool))
