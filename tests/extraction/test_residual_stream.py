from typing import Any

import pytest
import torch

from rlgen_stats.schemas.errors import InputError, ModelError
from rlgen_stats.toolkit.extraction.batching import by_length, left_pad
from rlgen_stats.toolkit.extraction.residual_stream import capture_residual, locate_layers, name_layers, read_residual
from tests.extraction.conftest import ARCHITECTURES, tiny_model

TEXTS = [[5, 9, 12, 4, 7, 8, 3], [6, 5], [9, 9, 10, 11]]
ATOL = 2e-5
"""Float32 sums over other padding come in another order; values here are of order 1 to 100."""


def count_hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hook_equals_hidden_states_at_every_block_but_the_normed_last(architecture: str) -> None:
    model = tiny_model(architecture)
    ids, mask, positions = left_pad(TEXTS, 0, "cpu")
    hidden = model(input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True).hidden_states
    assert len(hidden) == 4
    for layer in range(2):
        with capture_residual(model, layer) as residual:
            model(input_ids=ids, attention_mask=mask, position_ids=positions)
        assert torch.equal(residual.value, hidden[layer + 1])
        assert torch.equal(read_residual(model, layer, ids, mask, positions), hidden[layer + 1])
    assert not torch.equal(hidden[1], hidden[2])
    last = read_residual(model, 2, ids, mask, positions)
    assert last.shape == hidden[3].shape
    assert not torch.allclose(last, hidden[3])  # Hugging Face norms the last entry


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_left_right_or_none_gives_the_same_real_tokens(architecture: str) -> None:
    model = tiny_model(architecture)
    ids, mask, positions = left_pad(TEXTS, 0, "cpu")
    left = read_residual(model, 1, ids, mask, positions)
    longest = max(map(len, TEXTS))
    right_ids = torch.tensor([text + [0] * (longest - len(text)) for text in TEXTS])
    right_mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in TEXTS])
    right = read_residual(model, 1, right_ids, right_mask, torch.arange(longest).expand(len(TEXTS), -1))
    for row, text in enumerate(TEXTS):
        n = len(text)
        alone = read_residual(model, 1, torch.tensor([text]), torch.ones(1, n).long(), torch.arange(n)[None])[0]
        torch.testing.assert_close(left[row, longest - n :], alone, rtol=1e-4, atol=ATOL)
        torch.testing.assert_close(right[row, :n], alone, rtol=1e-4, atol=ATOL)


def test_pads_are_seen_when_the_mask_is_left_out() -> None:
    """The padding test above can fail: without mask and positions the values differ."""
    model = tiny_model()
    ids, mask, positions = left_pad(TEXTS, 0, "cpu")
    with capture_residual(model, 1) as residual:
        model(input_ids=ids)
    masked = read_residual(model, 1, ids, mask, positions)
    assert not torch.allclose(residual.value[1, -2:], masked[1, -2:], atol=ATOL)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reading_stops_at_the_block_and_leaves_the_model_as_it_was(architecture: str) -> None:
    model = tiny_model(architecture)
    ids, mask, positions = left_pad(TEXTS, 0, "cpu")
    before = model(input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)
    with capture_residual(model, 1) as later:
        read_residual(model, 0, ids, mask, positions)
        with pytest.raises(InputError, match="nothing captured yet"):  # block 1 was not run
            _ = later.value
    after = model(input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)
    assert torch.equal(before.logits, after.logits)
    assert len(after.hidden_states) == 4


def test_hooks_are_gone_after_success_and_after_an_exception() -> None:
    model = tiny_model()
    hooks = count_hooks(model)
    with pytest.raises(IndexError), capture_residual(model, 1):  # noqa: PT012
        assert count_hooks(model) == hooks + 1
        model(torch.tensor([[10_000]]))
    assert count_hooks(model) == hooks
    with capture_residual(model, 1):
        pass
    assert count_hooks(model) == hooks


def test_layers_are_found_in_order_and_wrong_ones_refused() -> None:
    for architecture in ARCHITECTURES:
        layers = locate_layers(tiny_model(architecture, n_layers=5))
        assert len(layers) == 5
    with (
        pytest.raises(InputError, match=r"layer 3 asked for, but .* has 3 layers, blocks 0 to 2"),
        capture_residual(layers_of(), 3),
    ):
        pass
    with pytest.raises(ModelError, match=r"no config\.num_hidden_layers"):
        locate_layers(torch.nn.Linear(2, 2))


def layers_of() -> Any:
    return tiny_model()


def test_two_stacks_of_blocks_are_ambiguous() -> None:
    model = tiny_model()
    model.second = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)])
    with pytest.raises(ModelError, match=r"has 2 lists of 3 blocks .* expected exactly one"):
        locate_layers(model)


def test_blocks_can_be_named_by_their_path() -> None:
    model = tiny_model()
    model.second = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)])
    name_layers(model, "model.layers")
    assert locate_layers(model) is model.model.layers
    name_layers(model, "second")
    assert locate_layers(model) is model.second
    with pytest.raises(ModelError, match=r"no list of blocks at 'model.blocks'; its lists are model.layers, second"):
        name_layers(model, "model.blocks")
    with pytest.raises(ModelError, match=r"no list of blocks at 'model.norm'"):
        name_layers(model, "model.norm")
    assert locate_layers(model) is model.second


def test_lists_inside_blocks_are_not_taken_for_blocks() -> None:
    model = tiny_model()
    blocks = locate_layers(model)
    for block in blocks:
        block.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)])
    assert locate_layers(model) is blocks


def test_nothing_captured_is_an_error() -> None:
    with capture_residual(tiny_model(), 0) as residual, pytest.raises(InputError, match="nothing captured yet"):
        _ = residual.value


def test_batches_by_length_hold_every_index_once() -> None:
    batches = list(by_length([3, 1, 2, 1, 5], 2))
    assert batches == [[1, 3], [2, 0], [4]]
