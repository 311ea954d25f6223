"""What a checkpoint's files say about its model, without loading its weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from rlgen_stats.schemas.errors import InputError, ModelError
from rlgen_stats.stores.atomic import explain_damage, read_json
from rlgen_stats.stores.study_models import ModelRef
from rlgen_stats.toolkit.extraction.checkpoints import is_adapter
from rlgen_stats.toolkit.extraction.residual_stream import locate_layer, locate_layers, name_layers


@dataclass(frozen=True)
class ModelShape:
    """Size of a model."""

    n_blocks: int
    """Decoder blocks."""
    width: int
    """Channels of the residual stream."""
    context: int | None
    """Longest text in tokens; None where the config does not say."""


def read_shape(ref: ModelRef, layers: Iterable[int]) -> ModelShape:
    """Size of a checkpoint's model, built from its config with no memory behind its weights.

    Parameters
    ----------
    ref
        The checkpoint; of an adapter, its base is read.
    layers
        Decoder blocks that the study reads.

    Raises
    ------
    ModelError
        If there is no config, its architecture is unknown, or its decoder blocks are not found.
    InputError
        If it lacks one of these blocks.
    """
    path = ref.base if ref.base is not None and is_adapter(ref.path) else ref.path
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # configs of many architectures fail in as many ways
        line = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(
            f"{ref.model}: {path} describes no causal language model ({line}); correct its config.json."
        ) from error
    if ref.blocks is not None:
        name_layers(model, ref.blocks)
    for layer in layers:
        locate_layer(model, layer)
    text = config.get_text_config()
    return ModelShape(len(locate_layers(model)), int(text.hidden_size), getattr(text, "max_position_embeddings", None))


def check_weight_files(ref: ModelRef) -> None:
    """Refuse weight files that are cut off, or shards that an index names and that are not there.

    Raises
    ------
    ModelError
        Naming the file.
    """
    for index in ref.path.glob("*.index.json"):
        with explain_damage(index):
            shards = sorted(set(read_json(index)["weight_map"].values()))
        missing = [name for name in shards if not (ref.path / name).is_file()]
        if missing:
            raise ModelError(
                f"{ref.model}: {ref.path} lacks {len(missing)} of {len(shards)} files of weights, e.g. {missing[0]}; "
                "copy them there."
            )
    for file in sorted(ref.path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{ref.model}: {file} is cut off or broken ({error}); copy it again.") from error


def check_context(shape: ModelShape, encoded: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
    """Refuse prompts that, with their completions, do not fit the model's context.

    Raises
    ------
    InputError
        Naming the longest.
    """
    longest, limit = max(
        ((len(ids), limit) for ids, limit in zip(encoded, limits, strict=True)), key=sum, default=(0, 0)
    )
    if shape.context is not None and longest + limit > shape.context:
        raise InputError(
            f"a prompt has {longest} tokens and {limit} may follow, but the model's context is {shape.context}; lower "
            "generation.max_new_tokens or shorten the prompts."
        )


def checkpoint_bytes(path: Path) -> int:
    """Size of a checkpoint's files of weights."""
    return sum(file.stat().st_size for kind in ("*.safetensors", "*.bin") for file in path.glob(kind))
