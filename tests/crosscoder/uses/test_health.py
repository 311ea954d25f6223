from __future__ import annotations

import itertools
import math
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlgen_stats.schemas.errors import InputError, StageError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder, read_json, write_json
from rlgen_stats.toolkit.crosscoder import (
    ArrayReader,
    Crosscoder,
    SpliceCE,
    SplicedText,
    decoder_dataset,
    health_dataset,
    load_crosscoder,
    measure_health,
    require_healthy,
    splice_ce,
)
from rlgen_stats.toolkit.crosscoder.uses.health import DEAD_MAX, judge_health
from rlgen_stats.toolkit.extraction import find_model, load_model, next_token
from rlgen_stats.toolkit.extraction.activations import read_texts
from tests.crosscoder.planted import LAYER, PAIR, Planted, planted

TEXTS = ([4, 5, 6, 7, 8, 9, 10], [3, 3, 9], [11, 12, 13, 14, 4, 5])


# -- fit and sparsity -------------------------------------------------------------------------------------------------


def test_health_equals_the_textbook(either: Crosscoder, world: Planted, tmp_path: Path) -> None:
    data = world.data[:1500]
    health = measure_health(either, ArrayReader(data, batch_size=100, seed=0), readout="own", folder=tmp_path)
    x = data.astype(np.float64) * either.scale.double().numpy()[:, None]
    f = either.encode(torch.from_numpy(x.astype(np.float32))).numpy()
    back = np.einsum("bf,vfc->bvc", f, either.decoder.numpy()) + either.decoder_bias.numpy()
    for slot, view in enumerate(PAIR):
        total = ((x[:, slot] - x[:, slot].mean(axis=0)) ** 2).sum()
        assert health.fve[slot] == pytest.approx(1 - ((x[:, slot] - back[:, slot]) ** 2).sum() / total, abs=1e-6)
        own = either.readout(torch.from_numpy(data[:, slot]), view=view, kind="own")
        own_back = (own @ either.decoder[slot] + either.decoder_bias[slot]).numpy()
        wanted = 1 - ((x[:, slot] - own_back) ** 2).sum() / total
        assert health.fve_readout[slot] == pytest.approx(wanted, abs=1e-6)
    assert health.l0 == pytest.approx((f > 0).sum(axis=1).mean())
    np.testing.assert_allclose(health.firing, (f > 0).mean(axis=0), atol=1e-12)
    assert health.dead_fraction == (f == 0).all(axis=0).mean()
    assert health.n_tokens == 1500
    written = read_json(tmp_path / "health.json")
    assert written["firing"] == health.firing.tolist()
    assert written["weights_sha256"] == either.weights_sha256


def test_a_constant_code_explains_nothing(batchtopk: Crosscoder, world: Planted) -> None:
    still = Crosscoder(PAIR, width=24, n_features=48, sparsity="l1", k=2)
    still.load_state_dict(batchtopk.state_dict())
    with torch.no_grad():
        still.encoder_bias.fill_(-1e6)  # nothing ever fires
        still.decoder_bias.copy_(still.mean * still.scale[:, None])
    health = measure_health(still, ArrayReader(world.data, batch_size=512, seed=0))
    np.testing.assert_allclose(health.fve, 0.0, atol=1e-6)
    assert health.dead_fraction == 1.0
    assert not health.healthy
    assert "fraction of variance explained of base@0" in health.reasons
    assert f"dead fraction 1.000, at most {DEAD_MAX:g} allowed" in health.reasons
    assert "L0 0.00, expected above 0" in health.reasons


def test_every_line_has_a_verdict(batchtopk: Crosscoder, world: Planted) -> None:
    reader = ArrayReader(world.data, batch_size=512, seed=0)
    losses = {"base@0": SpliceCE(1.0, 1.1, 3.0, 50, 0.1, 2.0), "sft@9": SpliceCE(1.0, 2.5, 3.0, 50, 0.5, 2.0)}
    health = measure_health(batchtopk, reader, ce=losses)
    verdicts = {(check.name, check.view): check.ok for check in health.checks}
    assert verdicts == {
        ("fve", "base@0"): True,
        ("fve", "sft@9"): True,
        ("l0", ""): True,
        ("reconstruction_bias", "base@0"): True,
        ("reconstruction_bias", "sft@9"): True,
        ("dead_fraction", ""): health.dead_fraction <= DEAD_MAX,
        ("dense_fraction", ""): True,
        ("ce_recovered", "base@0"): True,
        ("ce_recovered", "sft@9"): False,
        ("kl_recovered", "base@0"): True,
        ("kl_recovered", "sft@9"): False,
    }
    assert "cross-entropy recovered of sft@9 0.250, at least 0.9 needed" in health.reasons
    nothing_lost = measure_health(batchtopk, reader, ce={"base@0": SpliceCE(1.0, 1.0, 1.0, 5)})
    assert not nothing_lost.healthy


def test_shrunken_reconstructions_are_noticed(batchtopk: Crosscoder, world: Planted) -> None:
    reader = ArrayReader(world.data, batch_size=512, seed=0)
    whole = measure_health(batchtopk, reader)
    data = world.data.astype(np.float64) * batchtopk.scale.double().numpy()[:, None]
    f = batchtopk.encode(torch.from_numpy(data.astype(np.float32)))
    back = batchtopk.decode(f).double().numpy().reshape(data.shape)
    for slot in range(2):
        a, b = ((values[:, slot] - values[:, slot].mean(axis=0)).ravel() for values in (data, back))
        assert whole.bias[slot] == pytest.approx((b @ b) / (a @ b), rel=1e-4)
    small = Crosscoder(PAIR, width=24, n_features=48, sparsity="batchtopk", k=2)
    small.load_state_dict(batchtopk.state_dict())
    small.requires_grad_(False)
    small.decoder_matrix *= 0.8
    small.threshold *= 0.8
    shrunk = measure_health(small, reader)
    np.testing.assert_allclose(shrunk.bias, 0.8 * whole.bias, rtol=1e-3)
    assert f"relative reconstruction bias of base@0 {shrunk.bias[0]:.3f}, expected 1" in shrunk.reasons


def test_firing_rates_are_counted_by_decade_and_dense_features_found(batchtopk: Crosscoder, world: Planted) -> None:
    health = measure_health(batchtopk, ArrayReader(world.data, batch_size=512, seed=0))
    rates = health.firing
    wanted = [np.sum(rates == 0)] + [
        np.sum((rates > 0 if low == 0 else rates >= low) & (rates < high))
        for low, high in itertools.pairwise([0, *(10.0**p for p in range(-6, 0)), np.inf])
    ]
    assert health.firing_histogram().tolist() == wanted
    assert sum(wanted) == 48
    assert health.dense_fraction == 0
    dense = Crosscoder(PAIR, width=24, n_features=48, sparsity="l1", k=2)
    dense.encoder_bias.data[:24] = 1e3
    dense.encoder_bias.data[24:] = -1e3
    always = measure_health(dense, ArrayReader(world.data, batch_size=512, seed=0))
    assert always.dense_fraction == 1
    assert "fire on over 20% of tokens 1.000, at most 0.1 allowed" in always.reasons


def test_unhealthy_crosscoders_are_refused_until_accepted(
    encoded: tuple[StudySpec, StudyFolder], tmp_path: Path
) -> None:
    folder = StudyFolder(tmp_path)
    shutil.copytree(encoded[1].crosscoder("main"), folder.crosscoder("main"))
    file = folder.crosscoder("main") / "health.json"
    record = read_json(file) | {"checks": []}
    write_json(file, record | {"healthy": True})
    require_healthy(folder, {"main": False}, stage="encode", force=False)
    write_json(file, record | {"healthy": False, "reasons": "dead fraction 0.9"})
    with pytest.raises(StageError, match=r"(?s)'main' failed its health check:\n  dead fraction 0.9\n.*encode --force"):
        require_healthy(folder, {"main": False}, stage="encode", force=False)
    assert not (folder.crosscoder("main") / "accepted.json").exists()
    require_healthy(folder, {"main": False}, stage="encode", force=True)
    assert read_json(folder.crosscoder("main") / "accepted.json")["reasons"] == "dead fraction 0.9"
    require_healthy(folder, {"main": False}, stage="align", force=False)  # accepted for these weights
    write_json(file, record | {"healthy": False, "weights_sha256": "other"})
    with pytest.raises(StageError, match=r"align --force"):
        require_healthy(folder, {"main": False}, stage="align", force=False)
    require_healthy(folder, {"main": True}, stage="align", force=False)


def test_a_threshold_that_is_off_is_noticed(batchtopk: Crosscoder, world: Planted) -> None:
    off = Crosscoder(PAIR, width=24, n_features=48, sparsity="batchtopk", k=2)
    off.load_state_dict(batchtopk.state_dict())
    off.threshold *= 10  # almost nothing fires, whatever training found
    health = measure_health(off, ArrayReader(world.data, batch_size=512, seed=0))
    assert [check.ok for check in health.checks if check.name == "l0"] == [False]


@pytest.mark.parametrize(("objective", "tolerance"), [("joint", 0.1), ("both", 0.25), ("paired", 0.1)])
def test_a_code_that_shares_its_k_with_others_may_be_farther_from_it(
    batchtopk: Crosscoder, world: Planted, objective: str, tolerance: float
) -> None:
    """Of k active features a row on average, joint rows may have more than paired ones; no threshold is off then.

    Of objective paired the mean over all rows is judged, which the threshold was set by.
    """
    health = measure_health(batchtopk, ArrayReader(world.data, batch_size=512, seed=0))
    shared = Crosscoder(PAIR, width=24, n_features=48, sparsity="batchtopk", k=2)
    shared.load_state_dict(batchtopk.state_dict())
    shared.facts = {"objective": objective}
    for side in (-1, 1):
        for off, ok in ((tolerance - 0.005, True), (tolerance + 0.005, False)):
            checks = judge_health(shared, replace(health, l0=2 * (1 + side * off)))
            assert [check.ok for check in checks if check.name == "l0"] == [ok]


def test_many_tokens_are_sampled_from_all_over(batchtopk: Crosscoder) -> None:
    world = planted(4096, seed=3)
    reader = ArrayReader(world.data, batch_size=256, seed=0)
    health = measure_health(batchtopk, reader, max_tokens=1000)
    assert health.n_tokens == 1024
    assert health.l0 == pytest.approx(measure_health(batchtopk, reader).l0, rel=0.1)


# -- splicing ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(stored: tuple[StudySpec, StudyFolder]) -> Any:
    return load_model(find_model("base@0", *stored))


def own_residual(model: Any) -> list[np.ndarray]:
    return read_texts(model, TEXTS, LAYER, 0)


def test_own_activations_cost_nothing_and_noise_costs_what_it_costs(model: Any) -> None:
    residual = own_residual(model)
    mask = [np.arange(len(text)) >= 1 for text in TEXTS]
    mean = np.concatenate(residual).mean(axis=0)
    same = splice_ce(
        model,
        LAYER,
        [SplicedText(np.array(t), r, m) for t, r, m in zip(TEXTS, residual, mask, strict=True)],
        constant=mean,
    )
    assert same.increase == pytest.approx(0.0, abs=1e-6)
    assert same.recovered == pytest.approx(1.0, abs=1e-5)
    assert same.n_tokens == sum(len(text) - 2 for text in TEXTS)
    random = np.random.default_rng(0)
    noisy = [r + random.normal(size=r.shape).astype(np.float32) for r in residual]
    texts = [SplicedText(np.array(t), r, m) for t, r, m in zip(TEXTS, noisy, mask, strict=True)]
    result = splice_ce(model, LAYER, texts, constant=mean)
    assert result.clean == pytest.approx(same.clean)
    assert abs(result.increase) > 0.01

    clean, spliced = [], []  # slow: one text at a time, the rest of the network run by hand from the replaced stream
    for text, given, replacement, where in zip(TEXTS, residual, noisy, mask, strict=True):
        logits = model(torch.tensor([text])).logits[0].double().log_softmax(-1)
        stream = torch.from_numpy(np.where(where[:, None], replacement, given))
        again = run_from(model, stream[None], LAYER + 1).double().log_softmax(-1)[0]
        for t in range(len(text) - 1):
            if where[t]:
                clean.append(-logits[t, text[t + 1]].item())
                spliced.append(-again[t, text[t + 1]].item())
    assert result.clean == pytest.approx(np.mean(clean), rel=1e-5)
    assert result.spliced == pytest.approx(np.mean(spliced), rel=1e-5)


@torch.no_grad()
def run_from(model: Any, stream: torch.Tensor, layer: int) -> torch.Tensor:
    """Logits when the residual stream before block ``layer`` is ``stream``."""
    positions = torch.arange(stream.shape[1])[None]
    rotary = model.model.rotary_emb(stream, positions)
    n = stream.shape[1]
    causal = torch.full((n, n), -math.inf).triu(1)[None, None]
    for block in model.model.layers[layer:]:
        out = block(stream, attention_mask=causal, position_embeddings=rotary, position_ids=positions)
        stream = out[0] if isinstance(out, tuple) else out
    logits: torch.Tensor = model.lm_head(model.model.norm(stream))
    return logits


def test_splicing_leaves_no_hook_behind(model: Any) -> None:
    before = model(torch.tensor([TEXTS[0]])).logits
    text = SplicedText(np.array(TEXTS[0]), np.zeros((7, 16), np.float32), np.ones(7, bool))
    splice_ce(model, LAYER, [text], constant=np.zeros(16))
    assert torch.equal(model(torch.tensor([TEXTS[0]])).logits, before)


def test_the_head_reads_a_sample_of_tokens_in_blocks(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    residual = own_residual(model)
    mean = np.concatenate(residual).mean(axis=0)
    texts = [
        SplicedText(np.array(t), r + np.float32(0.5), np.arange(len(t)) >= 1)
        for t, r in zip(TEXTS, residual, strict=True)
    ]
    whole = splice_ce(model, LAYER, texts, constant=mean)
    assert whole.n_tokens == 5 + 1 + 4
    every_third = splice_ce(model, LAYER, texts, constant=mean, max_tokens=4)  # of the ten: 0, 3, 6 and 9
    logits = [model(torch.tensor([text])).logits[0].double().log_softmax(-1) for text in TEXTS]
    scored = [(0, 1), (0, 4), (2, 1), (2, 4)]
    assert every_third.n_tokens == 4
    assert every_third.clean == pytest.approx(np.mean([-logits[i][t, TEXTS[i][t + 1]].item() for i, t in scored]))

    read: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: read.append(output.shape[:-1].numel()))
    monkeypatch.setattr(next_token, "LOGIT_BYTES", 4 * 6 * model.config.vocab_size)
    monkeypatch.setattr(next_token, "BLOCK_BYTES", 8 * 2 * model.config.vocab_size)
    try:
        in_blocks = splice_ce(model, LAYER, texts, constant=mean)
    finally:
        handle.remove()
    assert sorted(read) == [5] * 3 + [5] * 3  # the two shorter texts together, and the long one
    for name, value in vars(whole).items():
        assert getattr(in_blocks, name) == pytest.approx(value, rel=1e-5)
    monkeypatch.setattr(next_token, "LOGIT_BYTES", 4 * 3 * model.config.vocab_size)
    assert splice_ce(model, LAYER, texts, constant=mean).n_tokens == 3 + 1 + 3  # no text has more than fit


def test_splicing_errors(model: Any) -> None:
    wrong = SplicedText(np.array(TEXTS[1]), np.zeros((3, 15), np.float32), np.ones(3, bool))
    with pytest.raises(InputError, match=r"text of 3 tokens needs replacements \[3, 16\]"):
        splice_ce(model, LAYER, [wrong], constant=np.zeros(16))
    last_only = SplicedText(np.array(TEXTS[1]), np.zeros((3, 16), np.float32), np.arange(3) == 2)
    with pytest.raises(InputError, match=r"no replaced token is followed by another"):
        splice_ce(model, LAYER, [last_only], constant=np.zeros(16))


# -- tables -----------------------------------------------------------------------------------------------------------


def test_health_table_has_the_declared_layout(encoded: tuple[StudySpec, StudyFolder]) -> None:
    table = validate(health_dataset(encoded[1], ["main", "null"]), "health")
    assert list(table.view.values) == ["base@0", "sft@4", "rl@4", "base.repeat@0"]
    assert np.isnan(table.fve.sel(crosscoder="null", view="rl@4"))
    assert np.isfinite(table.fve.sel(crosscoder="null", view=["base@0", "base.repeat@0"])).all()
    assert np.isfinite(table.ce_increase.sel(crosscoder="main", view=["base@0", "sft@4", "rl@4"])).all()
    assert list(table.n_features.values) == [48, 48]
    with pytest.raises(StageError, match=r"other/health.json is missing; run the crosscoder stage"):
        health_dataset(encoded[1], ["other"])


def test_decoder_table_is_what_the_statistics_read(
    encoded: tuple[StudySpec, StudyFolder], batchtopk: Crosscoder
) -> None:
    crosscoder = load_crosscoder(encoded[1].crosscoder("main"))
    table = decoder_dataset(crosscoder)
    assert dict(table.sizes) == {"view": 3, "feature": 48, "channel": 16}
    np.testing.assert_array_equal(table.decoder.values, crosscoder.decoder.numpy())
    assert table.firing.values.tolist() == read_json(encoded[1].crosscoder("main") / "health.json")["firing"]
    given = decoder_dataset(crosscoder, np.linspace(0, 1, 48))
    assert given.firing.values[-1] == 1.0
    with pytest.raises(InputError, match=r"one rate per feature, 48, got shape \(47,\)"):
        decoder_dataset(crosscoder, np.zeros(47))
    with pytest.raises(InputError, match=r"never saved; pass firing="):
        decoder_dataset(Crosscoder(PAIR, width=3, n_features=5, sparsity="l1", k=1))


@pytest.mark.parametrize("objective", ["paired", "both"])
def test_after_paired_training_alone_all_views_share_one_decoder(batchtopk: Crosscoder, objective: str) -> None:
    crosscoder = deepcopy(batchtopk)
    crosscoder.facts = {**crosscoder.facts, "objective": objective}
    table = decoder_dataset(crosscoder, np.ones(crosscoder.n_features))
    assert table.attrs.get("one_decoder", False) == (objective == "paired")
