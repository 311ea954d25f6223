"""The rules beside l1 and batchtopk: per-token top-k, trained thresholds, exclusive features; widths that differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlgen_stats.schemas.errors import InputError, StoreError
from rlgen_stats.stores.digests import file_sha256
from rlgen_stats.toolkit.crosscoder import ArrayReader, Crosscoder, load_crosscoder, measure_health, train_crosscoder
from tests.crosscoder.planted import BASE_ONLY, PAIR, SFT_ONLY, SHARED, Planted, crosscoder_spec, planted

RULES: dict[str, dict[str, Any]] = {
    "topk": {"sparsity": "topk", "k": 3},
    "jumprelu": {"sparsity": "jumprelu"},
    "dfc": {"sparsity": "dfc", "exclusive_features": (12, 12)},
}


@pytest.fixture(scope="module", params=list(RULES))
def trained(request: pytest.FixtureRequest, world: Planted) -> Crosscoder:
    reader = ArrayReader(world.data, batch_size=512, seed=1)
    return train_crosscoder(reader, crosscoder_spec(**RULES[request.param]), views=PAIR, seed=1)


def test_planted_features_are_recovered(world: Planted, trained: Crosscoder) -> None:
    learned = trained.decoder.numpy()
    learned = learned / np.linalg.norm(learned, axis=-1, keepdims=True).clip(1e-9)
    for view, kinds in ((0, (*SHARED, *BASE_ONLY)), (1, (*SHARED, *SFT_ONLY))):
        truth = world.decoder[view, list(kinds)]
        cosine = (truth / np.linalg.norm(truth, axis=1, keepdims=True)) @ learned[view].T
        assert cosine.max(axis=1).mean() > 0.9


def test_l0_on_held_out_tokens_is_k(trained: Crosscoder) -> None:
    health = measure_health(trained, ArrayReader(planted(seed=1).data, batch_size=512, seed=0))
    if trained.sparsity == "topk":
        assert health.l0 <= 3  # never more; less where fewer are positive
    else:
        assert health.l0 == pytest.approx(trained.k, rel=0.1)  # the planted code has 1.92 a token
    assert health.fve.min() > 0.85


def test_topk_keeps_each_tokens_largest_contributions() -> None:
    crosscoder = Crosscoder(PAIR, width=6, n_features=10, sparsity="topk", k=3, seed=1)
    with torch.no_grad():
        crosscoder.decoder_matrix.mul_(torch.linspace(0.2, 3.0, 10)[:, None])
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    pre, f = crosscoder.pre_activation(x).double(), crosscoder.encode(x).double()
    norm = crosscoder.selection_norm().double()
    for row, values in zip(pre, f, strict=True):
        best = sorted(range(10), key=lambda k: -float(row[k] * norm[k]))[:3]
        wanted = [float(row[k]) if k in best and row[k] > 0 else 0.0 for k in range(10)]
        assert values.tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("kind", ["swap", "own"])
def test_some_columns_of_a_readout_are_a_slice_of_all(rule: str, kind: Any) -> None:
    crosscoder = random_crosscoder(rule)
    raw = torch.randn(30, 24, generator=torch.Generator().manual_seed(3))
    chosen = torch.tensor([7, 2, 40])
    some = crosscoder.readout(raw, view="sft@9", kind=kind, features=chosen)
    torch.testing.assert_close(some, crosscoder.readout(raw, view="sft@9", kind=kind)[:, chosen])
    assert (some > 0).any()
    assert (some == 0).any()


def random_crosscoder(rule: str, seed: int = 3) -> Crosscoder:
    how = RULES[rule]
    exclusive = dict(zip(PAIR, how["exclusive_features"], strict=True)) if rule == "dfc" else None
    crosscoder = Crosscoder(
        PAIR, width=24, n_features=48, sparsity=how["sparsity"], k=how.get("k", 2), exclusive=exclusive, seed=seed
    )
    with torch.no_grad():
        crosscoder.threshold.fill_(0.3)
    return crosscoder.requires_grad_(False)


# -- exclusive features -----------------------------------------------------------------------------------------------


def test_exclusive_features_stay_exclusive_in_weights_and_moments(
    world: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, after training in which they would have been used by both views."""
    seen: list[Any] = []
    adam = torch.optim.Adam

    def spy(*args: Any, **how: Any) -> Any:
        seen.append(adam(*args, **how))
        return seen[-1]

    monkeypatch.setattr(torch.optim, "Adam", spy)
    reader = ArrayReader(world.data, batch_size=512, seed=1)
    spec = crosscoder_spec(sparsity="dfc", exclusive_features=(6, 40), steps=150)  # too few shared: pressure to leak
    crosscoder = train_crosscoder(reader, spec, views=PAIR, seed=1, folder=tmp_path)
    parts = {view: (part.start, part.stop) for view, part in crosscoder.exclusive.items()}
    assert parts == {"base@0": (2, 8), "sft@9": (8, 48)}
    trained = seen[0].param_groups[0]["params"]
    encoder, decoder = (
        next(w for w in trained if w is own) for own in (crosscoder.encoder_matrix, crosscoder.decoder_matrix)
    )
    for view, features in crosscoder.exclusive.items():
        own, other = crosscoder.slots()[PAIR.index(view)], crosscoder.slots()[1 - PAIR.index(view)]
        assert not crosscoder.decoder_matrix[features, other].any()
        assert not crosscoder.encoder_matrix[other, features].any()
        assert crosscoder.decoder_matrix[features, own].any()
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not seen[0].state[decoder][moment][features, other].any()
            assert not seen[0].state[encoder][moment][other, features].any()
    assert load_crosscoder(tmp_path).exclusive == crosscoder.exclusive
    tensors = load_file(tmp_path / "weights.safetensors")
    tensors["decoder_matrix"][3, 30] = 1e-8
    save_file(tensors, tmp_path / "weights.safetensors", {"facts": "{}"})
    described = json.loads((tmp_path / "spec.json").read_text())
    described["weights_sha256"] = file_sha256(tmp_path / "weights.safetensors")
    (tmp_path / "spec.json").write_text(json.dumps(described))
    with pytest.raises(StoreError, match=r"features 2 to 7 are declared exclusive to 'base@0' but have weights in ano"):
        load_crosscoder(tmp_path)


def test_exclusive_features_must_fit() -> None:
    with pytest.raises(InputError, match=r"20 exclusive features do not fit|exclusive features do not fit in 10"):
        Crosscoder(PAIR, width=6, n_features=10, sparsity="dfc", k=2, exclusive={"base@0": 20})
    with pytest.raises(InputError, match=r"sparsity 'dfc', and it alone, declares exclusive features"):
        Crosscoder(PAIR, width=6, n_features=10, sparsity="l1", k=2, exclusive={"base@0": 2})
    with pytest.raises(ValueError, match=r"exclusive_features must be 2 numbers, one a view"):
        crosscoder_spec(sparsity="dfc", exclusive_features=(1, 2, 3))
    with pytest.raises(ValueError, match=r"'dfc', and it alone, takes exclusive_features"):
        crosscoder_spec(sparsity="dfc")


# -- widths that differ -----------------------------------------------------------------------------------------------


def narrow(world: Planted) -> list[np.ndarray]:
    """The second view through a fixed map to 36 channels."""
    into = np.linalg.qr(np.random.default_rng(5).normal(size=(36, 24)))[0]
    return [world.data[:, 0], (world.data[:, 1] @ into.T).astype(np.float32)]


def test_views_of_other_widths_are_recovered_alike(world: Planted, tmp_path: Path) -> None:
    parts = narrow(world)
    reader = ArrayReader(parts, batch_size=512, seed=1)
    crosscoder = train_crosscoder(reader, crosscoder_spec(), views=PAIR, seed=1, folder=tmp_path)
    assert crosscoder.widths == (24, 36)
    health = measure_health(crosscoder, reader, readout="own")
    assert health.fve.min() > 0.8
    learned = crosscoder.split(crosscoder.decoder_matrix)[0].numpy()
    truth = world.decoder[0, [*SHARED, *BASE_ONLY]]
    cosine = (
        truth / np.linalg.norm(truth, axis=1, keepdims=True) @ (learned / np.linalg.norm(learned, axis=1)[:, None]).T
    )
    assert cosine.max(axis=1).mean() > 0.9
    loaded = load_crosscoder(tmp_path)
    raw = [torch.from_numpy(part[:40]) for part in parts]
    f = loaded.encode(loaded.normalise(raw))
    assert torch.equal(f, crosscoder.encode(crosscoder.normalise(raw)))
    assert [tuple(part.shape) for part in loaded.split(loaded.decode(f))] == [(40, 24), (40, 36)]
    assert loaded.reconstruct(f, "sft@9").shape == (40, 36)
    assert loaded.readout(raw[1], view="sft@9", kind="own").shape == (40, 48)
    with pytest.raises(InputError, match=r"'swap' puts one activation into every slot, but the views have the widths"):
        loaded.readout(raw[1], view="sft@9")
    with pytest.raises(InputError, match=r"have the widths \(24, 36\); name one view"):
        _ = loaded.width
    with pytest.raises(InputError, match=r"widths \[24, 36\], got \[\(40, 24\), \(40, 24\)\]"):
        loaded.normalise([raw[0], raw[0]])


def test_first_format_is_still_read(batchtopk: Crosscoder, tmp_path: Path) -> None:
    batchtopk.save(tmp_path)
    tensors = load_file(tmp_path / "weights.safetensors")
    old = {
        "encoder": batchtopk.encoder.contiguous(),
        "decoder": batchtopk.decoder.contiguous(),
        "decoder_bias": batchtopk.decoder_bias.contiguous(),
        "mean": batchtopk.mean.contiguous(),
    } | {name: tensors[name] for name in ("encoder_bias", "scale", "threshold")}
    save_file(old, tmp_path / "weights.safetensors", {"facts": "{}"})
    described = json.loads((tmp_path / "spec.json").read_text())
    for name in ("widths", "exclusive"):
        del described[name]
    described |= {"format_version": 1, "width": 24, "weights_sha256": file_sha256(tmp_path / "weights.safetensors")}
    (tmp_path / "spec.json").write_text(json.dumps(described))
    loaded = load_crosscoder(tmp_path)
    for name, tensor in batchtopk.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
