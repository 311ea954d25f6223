"""The residual stream of a Hugging Face model: where its blocks are and how their output is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from rlgen_stats.schemas.errors import InputError, ModelError

_NAMED: Final = "rlgen_stats_blocks"
"""Attribute in which :func:`name_layers` stores the path on a model."""


class StopReadingError(Exception):
    """Target layer reached: raised inside a forward pass to skip the layers after it, see :func:`run_to_layer`."""


class Capture:
    """The output of one block in the latest forward pass."""

    def __init__(self) -> None:
        self._value: torch.Tensor | None = None

    @property
    def value(self) -> torch.Tensor:
        """Block output of the latest forward pass, [batch, token, channel].

        Raises
        ------
        InputError
            If no forward pass has been made inside the context.
        """
        if self._value is None:
            raise InputError("nothing captured yet; expected a forward pass of the model inside the context.")
        return self._value


def locate_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The decoder blocks of a causal language model, in order.

    Found by shape, not by name: the outermost ``ModuleList`` with as many entries as the config has hidden layers,
    which holds for Llama, Qwen2/3, Mistral, Gemma, GPT-NeoX, GPT-2, OPT, Phi and their wrappers; or the list named by
    :func:`name_layers`.

    Raises
    ------
    ModelError
        If there is no such list, or more than one.
    """
    named = getattr(model, _NAMED, None)
    if named is not None:
        return _list_at(model, named)
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    n_layers = getattr(config, "num_hidden_layers", None)
    if n_layers is None:
        raise ModelError(f"{type(model).__name__} has no config.num_hidden_layers; expected a causal language model.")
    candidates: dict[str, torch.nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in candidates)
        if isinstance(module, torch.nn.ModuleList) and len(module) == n_layers and not inside:
            candidates[name] = module
    if len(candidates) != 1:
        raise ModelError(
            f"{type(model).__name__} has {len(candidates)} lists of {n_layers} blocks "
            f"({sorted(candidates) or 'none'}), expected exactly one; name it by its dotted path: extraction.blocks in "
            "study.yaml, or name_layers(model, path)."
        )
    return next(iter(candidates.values()))


def name_layers(model: torch.nn.Module, path: str) -> None:
    """Name the list of a model's decoder blocks, for architectures in which :func:`locate_layers` does not find it.

    Parameters
    ----------
    model
        Causal language model.
    path
        Dotted path of their ``ModuleList``, e.g. ``"transformer.blocks"``.

    Raises
    ------
    ModelError
        If there is no ``ModuleList`` at this path.
    """
    _list_at(model, path)
    setattr(model, _NAMED, path)


def _list_at(model: torch.nn.Module, path: str) -> torch.nn.ModuleList:
    blocks = dict(model.named_modules()).get(path)
    if not isinstance(blocks, torch.nn.ModuleList) or not len(blocks):
        lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
        raise ModelError(
            f"{type(model).__name__} has no list of blocks at {path!r}; its lists are {', '.join(lists) or 'none'}."
        )
    return blocks


def locate_layer(model: torch.nn.Module, layer: int) -> torch.nn.Module:
    """Decoder block ``layer``, counted from 0.

    Raises
    ------
    InputError
        If the model has fewer blocks.
    """
    layers = locate_layers(model)
    if not 0 <= layer < len(layers):
        raise InputError(
            f"layer {layer} asked for, but {type(model).__name__} has {len(layers)} layers, blocks 0 to "
            f"{len(layers) - 1}; correct extraction.layer or extraction.layers."
        )
    return layers[layer]


def block_output(output: Any) -> torch.Tensor:
    """The hidden states in a block's return value: the value itself, or the first entry of a tuple."""
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(hidden, torch.Tensor):
        raise ModelError(
            f"a block returned {type(hidden).__name__}, expected a tensor or a tuple that starts with one."
        )
    return hidden


@contextmanager
def capture_residual(model: torch.nn.Module, layer: int, *, stop: bool = False) -> Iterator[Capture]:
    """Capture the residual stream after decoder block ``layer`` in every forward pass inside the context.

    Parameters
    ----------
    model
        Causal language model.
    layer
        Block, counted from 0. The value equals ``output_hidden_states[layer + 1]``, except that Hugging Face applies
        the final norm to the last entry.
    stop
        End the pass at this block by raising :class:`StopReadingError`; call the model by :func:`run_to_layer`.

    Yields
    ------
    Capture
        ``.value`` is [batch, token, channel], detached.

    Raises
    ------
    InputError
        If the model has no such block.

    Examples
    --------
    >>> with capture_residual(model, 2) as residual:  # doctest: +SKIP
    ...     model(input_ids)
    ...     residual.value.shape
    """
    capture = Capture()

    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        capture._value = block_output(output).detach()
        if stop:
            raise StopReadingError

    handle = locate_layer(model, layer).register_forward_hook(keep)
    try:
        yield capture
    finally:
        handle.remove()


def run_to_layer(model: Any, **inputs: Any) -> None:
    """Run a forward pass up to the block at which a capture with ``stop`` ends it."""
    with suppress(StopReadingError):
        model(**inputs)


@dataclass(frozen=True)
class BlockOutputs:
    """What a block returned in one forward pass after the other."""

    layer: int
    """Block, counted from 0."""
    outputs: list[Any] = field(default_factory=list)


@contextmanager
def record_block(model: torch.nn.Module, layer: int) -> Iterator[BlockOutputs]:
    """Keep what block ``layer`` returns in every forward pass inside the context, for :func:`resume_after`."""
    recorded = BlockOutputs(layer)
    handle = locate_layer(model, layer).register_forward_hook(lambda *call: recorded.outputs.append(call[2]))
    try:
        yield recorded
    finally:
        handle.remove()


@contextmanager
def resume_after(model: torch.nn.Module, recorded: BlockOutputs) -> Iterator[None]:
    """Let forward passes go on from what was recorded: up to that block no block computes anything.

    Parameters
    ----------
    model
        The model recorded from. Hooks on the block see and may change what it returns.
    recorded
        The passes inside the context must be given the inputs recorded with, in that order, and no cache.
    """
    blocks, outputs = locate_layers(model), iter(recorded.outputs)

    def resume(*_: Any, **__: Any) -> Any:
        output = next(outputs)  # copied, for a later block may add to it in place
        return (output[0].clone(), *output[1:]) if isinstance(output, tuple) else output.clone()

    def skip(*args: Any, **kwargs: Any) -> Any:
        hidden, like = args[0] if args else kwargs["hidden_states"], recorded.outputs[0]
        return (hidden, *like[1:]) if isinstance(like, tuple) else hidden

    with ExitStack() as stack:
        for number in range(recorded.layer + 1):
            stack.enter_context(_computing(blocks[number], resume if number == recorded.layer else skip))
        yield


@contextmanager
def _computing(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Have a module compute something else."""
    own = vars(module).get("forward")  # where its weights are moved when they are needed
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def read_residual(
    model: Any, layer: int, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    """Residual stream [batch, token, channel] after block ``layer``; later blocks and the output head are not run."""
    return read_residuals(model, [layer], input_ids, attention_mask, position_ids)[0]


@torch.inference_mode()
def read_residuals(
    model: Any,
    layers: Sequence[int],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor,
) -> list[torch.Tensor]:
    """Residual streams [batch, token, channel] after several blocks, in one pass that ends at the last of these."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    with ExitStack() as stack:
        captures = [stack.enter_context(capture_residual(model, layer, stop=layer == max(layers))) for layer in layers]
        run_to_layer(model, **inputs, use_cache=False)
        return [capture.value for capture in captures]
