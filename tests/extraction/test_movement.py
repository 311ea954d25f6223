from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlgen_stats.schemas.declaring import MODEL_COORDS
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder
from rlgen_stats.toolkit.extraction import load_model, measure_movement, next_token
from rlgen_stats.toolkit.extraction.activations import Text
from rlgen_stats.toolkit.extraction.movement import BaseLogits, mean_divergence, token_divergences, weight_distance
from rlgen_stats.toolkit.extraction.residual_stream import locate_layers
from tests.extraction.conftest import ARCHITECTURES, WORDS, save_model, tiny_model
from tests.extraction.test_checkpoints import ref_to, save_adapter

TEXTS = [
    Text("a", "base@0", (5, 9, 12), (4, 7, 1)),
    Text("b", "base@0", (6,), (5,)),
    Text("c", "base@0", (9, 9), (10, 3, 3, 8, 8)),
]


def divergence_of(base: Any, model: Any, texts: Sequence[Text] = TEXTS) -> float:
    return mean_divergence(BaseLogits(base, texts, 0, BytesIO()), model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_divergence_equals_a_loop_over_prefixes(architecture: str) -> None:
    base, other = tiny_model(architecture), tiny_model(architecture, seed=1)
    slow = []
    for text in sorted(TEXTS, key=lambda text: len(text.ids)):
        for n in range(len(text.prompt_ids), len(text.ids)):
            prefix = torch.tensor([text.ids[:n]])
            p, q = (torch.softmax(m(prefix).logits[0, -1].double(), -1) for m in (base, other))
            slow.append(float((p * (p / q).log()).sum()))
    fast = torch.cat(list(token_divergences(BaseLogits(base, TEXTS, 0, BytesIO()), other)))
    np.testing.assert_allclose(fast, slow, rtol=1e-3, atol=1e-5)
    assert divergence_of(base, other) == pytest.approx(np.mean(slow), rel=1e-4)
    assert np.mean(slow) > 0.1


def test_divergence_is_zero_to_itself_and_has_a_direction() -> None:
    base, other = tiny_model(), tiny_model(seed=1)
    assert divergence_of(base, base) == 0.0
    assert divergence_of(base, other) != pytest.approx(divergence_of(other, base), rel=0.01)
    assert np.isnan(divergence_of(base, other, []))
    assert np.isnan(divergence_of(base, other, [Text("d", "base@0", (5, 9), ())]))


def test_divergence_does_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    base, other = tiny_model(), tiny_model(seed=1)
    whole = divergence_of(base, other)
    monkeypatch.setattr(next_token, "LOGIT_BYTES", 1)
    monkeypatch.setattr(next_token, "BLOCK_BYTES", 1)
    assert divergence_of(base, other) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "gemma2"])
def test_base_reads_the_texts_once_for_all_models(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless its logits are not the head's, as Gemma 2's, which are capped."""
    base, others = tiny_model(architecture), [tiny_model(architecture, seed=seed) for seed in (1, 2)]
    if architecture == "gemma2":
        base.config.final_logit_softcapping = 1.0
    expected = [divergence_of(base, other) for other in others]
    monkeypatch.setattr(next_token, "LOGIT_BYTES", 1)  # each text is a batch
    passes = []
    locate_layers(base)[0].register_forward_hook(lambda *_: passes.append(1))
    reused = BaseLogits(base, TEXTS, 0, BytesIO())
    assert [mean_divergence(reused, other) for other in others] == pytest.approx(expected, rel=1e-5)
    assert mean_divergence(reused, base) == 0.0
    if architecture == "gemma2":
        assert len(passes) > 3 * len(TEXTS)
    else:
        assert len(passes) == len(TEXTS)


def test_half_types_are_kept_to_the_bit() -> None:
    base, other = tiny_model().to(torch.bfloat16), tiny_model(seed=1).to(torch.bfloat16)
    for batch, logits in BaseLogits(base, TEXTS, 0, BytesIO()):
        assert torch.equal(logits, batch.logits(base))
        assert not torch.equal(logits, batch.logits(other))


def test_weight_distance_is_the_relative_norm_of_the_change() -> None:
    base, other = tiny_model(), tiny_model()
    assert weight_distance(base, other) == 0.0
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    assert weight_distance(base, other) == pytest.approx(0.25, rel=1e-6)
    moved = tiny_model(seed=4)
    flat = [torch.cat([p.double().ravel() for p in m.parameters()]) for m in (base, moved)]
    assert weight_distance(base, moved) == pytest.approx(float((flat[1] - flat[0]).norm() / flat[0].norm()), rel=1e-9)


def test_rows_of_added_tokens_are_compared_with_nothing() -> None:
    base, other = tiny_model(), tiny_model()
    other.resize_token_embeddings(len(WORDS) + 2, mean_resizing=False)
    with torch.no_grad():
        other.lm_head.weight[len(WORDS) :] = 0.5
    assert weight_distance(base, other) == 0.0
    assert divergence_of(base, other) == divergence_of(other, base) == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        other.model.embed_tokens.weight[0] += 1.0
    assert weight_distance(base, other) > 0.0


def test_an_adapter_counts_as_the_change_it_makes(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    save_adapter(tmp_path / "lora")
    merged = load_model(ref_to(tmp_path / "lora", base))
    changed = {
        name
        for (name, a), (_, b) in zip(tiny_model().named_parameters(), merged.named_parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj"}
    assert 0 < weight_distance(tiny_model(), merged) < 1


def test_every_model_of_a_study_is_measured(sampled: tuple[StudySpec, StudyFolder]) -> None:
    spec, folder = sampled
    save_model(folder.root / "own/rl-4", 0)  # the same weights as base
    moved = measure_movement(spec, folder)
    assert list(moved.model.values) == ["base@0", "sft@3", "sft@6", "rl@4", "rl@8"]
    assert set(MODEL_COORDS) <= set(moved.coords)
    same = np.isin(moved.model, ["base@0", "rl@4"])
    for name in ("weight_distance", "kl_from_base"):
        assert (moved[name].values[same] == 0).all()
        assert (moved[name].values[~same] > 0.1).all()
