"""How far an edit moves next-token distributions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rlgen_stats.toolkit.edits.edit import FeatureEdit
from rlgen_stats.toolkit.edits.hooks import SourceModel, editing
from rlgen_stats.toolkit.edits.site import EditSite
from rlgen_stats.toolkit.extraction.residual_stream import capture_residual
from rlgen_stats.toolkit.trial.divergence import (
    divergences,
    log_probabilities,
    make_probe,
    mean_residual,
    reference,
)
from tests.edits.tiny import BASE, RL, WIDTH, tiny_model

TEXTS = ([3, 4, 5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15])
LENGTHS, FIRST, LAST = (4, 2, 3), (3, 1, 2), (4, 1, 2)


def probe(batch_size: int = 2) -> Any:
    return make_probe(TEXTS, LENGTHS, (0, 2, 2), first=FIRST, last=LAST, pad=0, batch_size=batch_size, device="cpu")


def test_divergences_equal_those_of_unpadded_texts_one_position_at_a_time(crosscoder: Any) -> None:
    one, two = tiny_model(), tiny_model(seed=4)
    measured = divergences(log_probabilities(one, probe()), log_probabilities(two, probe()), probe(), 4)
    by_hand: dict[int, list[float]] = {0: [], 2: []}
    for text, first, last, owner in zip(TEXTS, FIRST, LAST, (0, 2, 2), strict=True):
        p, q = (m(input_ids=torch.tensor([text])).logits[0].double().softmax(-1).numpy() for m in (one, two))
        for position in range(first, last + 1):
            by_hand[owner].append(sum(a * np.log(a / b) for a, b in zip(p[position], q[position], strict=True)))
    assert measured[0] == pytest.approx(np.mean(by_hand[0]), rel=1e-4)
    assert measured[2] == pytest.approx(np.mean(by_hand[2]), rel=1e-4)
    assert np.isnan(measured[[1, 3]]).all()
    assert probe().n_tokens == 4
    same = divergences(log_probabilities(one, probe(3)), log_probabilities(two, probe(3)), probe(3), 4)
    np.testing.assert_allclose(same, measured, rtol=1e-4)


def test_divergences_under_an_edit_know_where_prompts_end(model: Any, crosscoder: Any) -> None:
    site = EditSite(crosscoder, RL, 1)
    edit = FeatureEdit((0, 3, 4, 9), "disable", positions="completion")
    with editing(model, edit, site) as active:
        padded = log_probabilities(model, probe(), active)
        assert active.prompt_lengths is None
        for batch, measured in zip(probe().batches, padded, strict=True):
            for i, row in enumerate(batch.rows):
                active.prompt_lengths = torch.tensor([LENGTHS[row]])
                alone = model(input_ids=torch.tensor([TEXTS[row]]), use_cache=False).logits[0].log_softmax(-1)
                kept = len(TEXTS[row]) - FIRST[row]
                torch.testing.assert_close(measured[i, -kept:], alone[-kept:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("edit", [FeatureEdit((0, 3, 4, 9), "disable"), FeatureEdit((2, 5), "lift")])
def test_arms_go_on_from_the_edited_block_with_the_same_result(model: Any, crosscoder: Any, edit: FeatureEdit) -> None:
    start = reference(model, probe(), 1, vocabulary=20)
    assert start.after_block is not None
    source = SourceModel(tiny_model(seed=4), BASE) if edit.needs_source else None
    computed: list[Any] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: computed.append(0))
    with editing(model, edit, EditSite(crosscoder, RL, 1), source=source) as active:
        whole = log_probabilities(model, probe(), active, vocabulary=20)
        assert len(computed) == len(probe().batches)
        resumed = start.under_edit(model, active)
        assert len(computed) == len(probe().batches), "block 0 was not run again"
    assert all(map(torch.equal, resumed, whole))
    assert not any(map(torch.equal, resumed, start.log_p)), "the edit acted"
    assert all(map(torch.equal, start.log_p, log_probabilities(model, probe(), vocabulary=20)))


def test_a_model_that_hands_on_more_than_the_residual_is_read_whole(model: Any, crosscoder: Any) -> None:
    """A later block that looks at what an earlier one has just computed: not the same, or an error."""
    first, last = model.model.layers[0], model.model.layers[2]
    left: list[torch.Tensor] = []
    first.mlp.register_forward_hook(lambda *call: left.append(call[2]))
    for look in (lambda: left.pop(), lambda: left.pop() if left else torch.zeros(1)):
        handle = last.register_forward_hook(lambda *call, look=look: call[2] + look())
        start = reference(model, probe(), 1, vocabulary=20)
        assert start.after_block is None
        with editing(model, FeatureEdit((0, 3), "disable"), EditSite(crosscoder, RL, 1)) as active:
            assert not any(map(torch.equal, start.under_edit(model, active), start.log_p))
        handle.remove()


@pytest.mark.parametrize(("more", "kept"), [(0, True), (-1, False)])
def test_what_is_too_much_to_keep_is_read_whole(
    model: Any, monkeypatch: pytest.MonkeyPatch, more: int, kept: bool
) -> None:
    n_numbers = sum(batch.ids.numel() for batch in probe().batches) * WIDTH
    monkeypatch.setattr("rlgen_stats.toolkit.trial.divergence.MAX_NUMBERS", n_numbers + more)
    assert (reference(model, probe(), 1, vocabulary=20).after_block is not None) == kept


def test_broken_distributions_diverge_by_nan(model: Any) -> None:
    p, q = log_probabilities(model, probe()), log_probabilities(model, probe())
    p[0] = torch.full_like(p[0], torch.nan)
    measured = divergences(p, q, probe(), 3)
    broken = {(0, 2, 2)[row] for row in probe().batches[0].rows}
    assert set(np.flatnonzero(np.isnan(measured))) == broken | {1}, "prompt 1 has no text"


def test_the_mean_residual_is_that_of_the_compared_positions(model: Any) -> None:
    rows = []
    with capture_residual(model, 1) as residual:
        for text, first, last in zip(TEXTS, FIRST, LAST, strict=True):
            model(input_ids=torch.tensor([text]))
            rows.append(residual.value[0, first : last + 1])
    expected = torch.cat(rows).double().mean(dim=0)
    torch.testing.assert_close(mean_residual(model, 1, probe()), expected, rtol=1e-5, atol=1e-5)
