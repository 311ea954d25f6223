from __future__ import annotations

import sys

import numpy as np
import pytest
import xarray as xr

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.toolkit.statistics import attribution, attribution_table, decoder_clusters


def decoders(views, n_features=30, width=8, seed=0):
    rng = np.random.default_rng(seed)
    decoder = rng.normal(0, 1, (len(views), n_features, width)) * rng.gamma(1, 1, (len(views), n_features, 1))
    firing = rng.random(n_features)
    firing[-2:] = 0
    return xr.Dataset(
        {"decoder": (("view", "feature", "channel"), decoder), "firing": ("feature", firing)},
        coords={"view": ("view", np.array(views))},
    )


def test_against_the_definitions():
    d = decoders(["base@0", "rl@5"])
    out = attribution(d)
    for k in range(30):
        o, t = d.decoder.values[:, k]
        assert out.nrn_l1.values[k] == pytest.approx(np.abs(t).sum() / (np.abs(o).sum() + np.abs(t).sum()))
        norms = np.linalg.norm(o), np.linalg.norm(t)
        assert out.nrn_l2.values[k] == pytest.approx(norms[1] / sum(norms))
        assert out.log_ratio.values[k] == pytest.approx(np.log(norms[1]) - np.log(norms[0]))
        assert out.mas_l2.values[:, k] == pytest.approx(np.array(norms) / sum(norms))
        assert out.cosine.values[k] == pytest.approx(o @ t / norms[0] / norms[1])
        np.testing.assert_allclose(out.view_cosine.values[:, :, k], [[1, out.cosine[k]], [out.cosine[k], 1]])
    assert out.alive.values.sum() == 28
    # NRN is the MAS of the target when there are two views.
    np.testing.assert_allclose(out.nrn_l1, out.mas_l1.sel(view="rl@5"))


def test_the_scale_of_a_feature_does_not_matter():
    d = decoders(["base@0", "sft@5", "rl@5"])
    scale = xr.DataArray(np.random.default_rng(1).gamma(1, 1, 30), dims="feature")
    a, b = (attribution(x, original="base@0", target="rl@5") for x in (d, d.assign(decoder=d.decoder * scale)))
    xr.testing.assert_allclose(a, b)
    assert float(abs(a.mas_l1.sum("view") - 1).max()) < 1e-12


def test_a_feature_of_one_model_only_and_of_none():
    d = decoders(["base@0", "rl@5"])
    d.decoder[0, 0] = 0
    d.decoder[:, 1] = 0
    out = attribution(d)
    assert out.nrn_l1.values[0] == 1
    assert out.log_ratio.values[0] == np.inf
    assert np.isnan(out.nrn_l1.values[1])
    assert np.isnan(out.cosine.values[:2]).all()
    assert np.isfinite(out.cosine.values[2:]).all()


def test_views_of_several_widths_have_cosines_where_they_can():
    d = decoders(["base@0", "sft@5", "rl@5"]).assign(width=("view", [8, 8, 6]))
    d.decoder[2, :, 6:] = np.nan
    out = attribution(d)
    assert np.isnan(out.view_cosine.values[:2, 2]).all()
    assert np.isnan(out.view_cosine.values[2, :2]).all()
    np.testing.assert_allclose(out.view_cosine.values[2, 2], 1)
    whole = attribution(decoders(["base@0", "sft@5"]).assign(decoder=d.decoder[:2]))
    np.testing.assert_allclose(out.view_cosine.values[0, 1], whole.cosine.values)


def test_lazy(no_compute):
    d = decoders(["base@0", "rl@5"]).chunk({"feature": 7})
    with no_compute():
        out = attribution(d)
    xr.testing.assert_allclose(out.compute(), attribution(decoders(["base@0", "rl@5"])))


def test_table_follows_the_layout_and_pads():
    table = attribution_table(
        {"sft": decoders(["base@0", "sft@9"]), "null": decoders(["base@0", "base.repeat@0"], n_features=20)},
        multiview={"main": decoders(["base@0", "sft@9", "rl@9"])},
    )
    validate(table, "attribution")
    assert table.target.values.tolist() == ["sft@9", "base.repeat@0"]
    assert not table.alive.sel(crosscoder="null").values[20:].any()
    assert np.isnan(table.nrn_l1.sel(crosscoder="null").values[20:]).all()
    main = attribution(decoders(["base@0", "sft@9", "rl@9"]))
    np.testing.assert_allclose(table.mas_l1.sel(mas_crosscoder="main", view="rl@9"), main.mas_l1.sel(view="rl@9"))
    np.testing.assert_allclose(table.view_cosine.values[0], main.view_cosine.values)
    assert table.cosine.sel(crosscoder="sft").notnull().all()
    validate(attribution_table({"sft": decoders(["base@0", "sft@9"])}), "attribution")


def test_clusters_against_a_slow_flood_fill(monkeypatch):
    rng = np.random.default_rng(5)
    centres = rng.normal(0, 1, (6, 10))
    which = rng.integers(0, 6, 80)
    rows = centres[which] + rng.normal(0, 0.45, (80, 10))
    d = xr.Dataset(
        {"decoder": (("view", "feature", "channel"), rows.reshape(80, 2, 5).transpose(1, 0, 2))},
        coords={"view": ["a@0", "b@1"]},
    )
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    near = unit @ unit.T > 0.7
    labels = np.full(80, -1)
    for k in range(80):
        if labels[k] < 0:
            stack, labels[k] = [k], k
            while stack:
                for j in np.flatnonzero(near[stack.pop()] & (labels < 0)):
                    labels[j] = k
                    stack.append(j)
    monkeypatch.setattr(sys.modules[decoder_clusters.__module__], "COSINE_BLOCK", 7)
    got = decoder_clusters(d)
    assert len(np.unique(got)) == len(np.unique(labels)) < 60
    assert np.array_equal(got[:, None] == got, labels[:, None] == labels)
    alive = np.arange(80) % 2 == 0
    assert np.array_equal(decoder_clusters(d, alive=alive) >= 0, alive)


def test_errors():
    with pytest.raises(InputError, match="variable 'firing'"):
        attribution(decoders(["base@0", "rl@5"]).drop_vars("firing"))
    with pytest.raises(InputError, match=r"view 'ppo@1' is not in this crosscoder"):
        attribution(decoders(["base@0", "rl@5"]), original="base@0", target="ppo@1")
    with pytest.raises(InputError, match="both original= and target="):
        attribution(decoders(["base@0", "rl@5"]), target="rl@5")
    with pytest.raises(InputError, match="has 3 views"):
        attribution_table({"x": decoders(["base@0", "sft@1", "rl@5"])})
    with pytest.raises(InputError, match="at least one pairwise"):
        attribution_table({})
