"""How checkpoints and tokenizers are loaded: whole checkpoints, sharded ones and LoRA adapters."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from rlgen_stats.schemas.errors import ModelError
from rlgen_stats.stores.study_models import ModelRef
from rlgen_stats.toolkit.extraction.batch_check import check_batches
from rlgen_stats.toolkit.extraction.residual_stream import name_layers
from rlgen_stats.toolkit.extraction.training_shards import merge_command
from rlgen_stats.toolkit.memory import keep_freed_memory

ADAPTER_CONFIG: Final = "adapter_config.json"
WEIGHT_FILES: Final = (
    "*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
"""Files of which at least one makes a folder a checkpoint."""
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""Files of which at least one makes a folder's tokenizer its own; otherwise the base's is used."""
_HARMLESS: Final = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$|^v_head\.")
"""Tensors that a language model does without: masks and frequencies it computes, and the value head of PPO."""


def resolve_device(device: str) -> torch.device:
    """Torch device of a spec; ``"auto"`` takes cuda where present, else the CPU, for which freed memory is kept.

    Raises
    ------
    ModelError
        If the name is no device, or cuda is asked for and absent.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"'device' must be auto, cpu, cuda or cuda:N, got {device!r}.") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"'device' is {device!r} but torch sees no CUDA device; use 'auto' or 'cpu'.")
    if resolved.type == "cpu":
        keep_freed_memory()
    return resolved


def check_weights(ref: ModelRef, *, download: bool = True) -> None:
    """Refuse a folder that is missing or holds no weights; those of models of the Hub are downloaded, or left out.

    Raises
    ------
    ModelError
        Naming the folder and the files looked for.
    """
    on_hub = {hub.path: hub for hub in ref.hub}
    for folder in dict.fromkeys([ref.path, *([ref.base] if ref.base and is_adapter(ref.path) else [])]):
        if folder in on_hub:
            if download:
                on_hub[folder].download()
            continue
        if not folder.is_dir():
            raise ModelError(f"{ref.model}: no folder {folder}; correct its path in the study file.")
        if not any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES):
            merge = merge_command(folder)
            if merge is not None:
                raise ModelError(
                    f"{ref.model}: {folder} has no weights but the shards of its training; merge them, copy config.json"
                    f" and the tokenizer beside the result if they are not there, and name that folder: {merge}"
                )
            raise ModelError(
                f"{ref.model}: {folder} has no weights; expected one of {', '.join(WEIGHT_FILES)}: "
                "name the folder that save_pretrained wrote."
            )


def is_adapter(path: Path) -> bool:
    """Whether a folder holds a LoRA (peft) adapter instead of a whole model."""
    return (path / ADAPTER_CONFIG).exists()


def load_model(ref: ModelRef, *, device: torch.device | str = "cpu") -> Any:
    """Load a checkpoint for reading: local files only, evaluation mode, no gradients, adapters merged.

    Parameters
    ----------
    ref
        The checkpoint, and how it is loaded (``loading``).
    device
        Where the weights are put, unless ``loading`` has a device map.

    Returns
    -------
    transformers.PreTrainedModel

    Raises
    ------
    ModelError
        If the folder is missing, has no weights, cannot be read, lacks some of the model's parameters, has some that
        find no place in it (of the adapter as of the model), or holds values that are not finite; if its kind cannot
        be read in padded batches; or if it does not fit its device map.
    """
    check_weights(ref)
    model = _load_adapter(ref) if is_adapter(ref.path) else _load_whole(ref.model, ref.path, ref)
    if any(values.is_meta for values in model.parameters()):
        raise ModelError(
            f"{ref.model}: device map {ref.loading.device_map!r} leaves parts of {ref.path} on the CPU or the disk; "
            "expected devices that hold the whole model: use more of them, or a smaller models.dtype."
        )
    broken = next((name for name, values in model.named_parameters() if not values.isfinite().all()), None)
    if broken is not None:
        raise ModelError(
            f"{ref.model}: {ref.path} has values that are NaN or infinite in {broken}; its training diverged, or they "
            f"are beyond {model.dtype}."
        )
    if ref.loading.device_map is None:
        model = model.to(device)
    model.eval()
    model.requires_grad_(False)
    if ref.blocks is not None:
        name_layers(model, ref.blocks)
    check_batches(model, ref.model)
    return model


def resolve_dtype(ref: ModelRef) -> torch.dtype:
    """Type that a checkpoint is loaded in; ``auto`` is the one base is stored in.

    One type for all models of a study: read in different ones, base and a run would differ by rounding alone.

    Raises
    ------
    ModelError
        If base's config cannot be read.
    """
    if ref.loading.dtype != "auto":
        return cast(torch.dtype, getattr(torch, ref.loading.dtype))
    path = ref.base or ref.path
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{ref.model}: {path / 'config.json'} cannot be read ({_line(error)}).") from error
    return cast(torch.dtype, config.dtype or config.get_text_config().dtype or torch.float32)


def _load_whole(name: str, path: Path, ref: ModelRef) -> Any:
    how = ref.loading.model_dump(include={"device_map", "attn_implementation"}, exclude_none=True)
    try:
        with _quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=resolve_dtype(ref),
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=False,
                **how,
            )
    except Exception as error:  # loaders of many formats raise as many types; all are about this folder
        raise ModelError(f"{name}: {path} cannot be loaded as a causal language model ({_line(error)}).") from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:  # transformers would draw them at random and only warn
        raise ModelError(
            f"{name}: {path} lacks {len(missing)} of the model's parameters, e.g. {missing[0]}; "
            "expected a complete checkpoint of the architecture in its config.json."
        )
    extra = sorted(key for key in info["unexpected_keys"] if not _HARMLESS.search(key))
    if extra:  # what they hold would be left out without a word
        raise ModelError(
            f"{name}: {len(extra)} tensors of {path} have no place in the model, e.g. {extra[0]}; "
            "expected a checkpoint of the architecture, and of as many layers, as in its config.json."
        )
    return model


def _load_adapter(ref: ModelRef) -> Any:
    from peft import PeftModel, load_peft_weights  # slow to import, and most studies have no adapter

    if ref.base is None:
        raise ModelError(f"{ref.model}: {ref.path} is an adapter and needs a base model; name base.path.")
    base = _load_whole(f"base of {ref.model}", ref.base, ref)
    try:
        with _quiet():
            weights = load_peft_weights(str(ref.path), device="cpu")
            _resize_embeddings(base, weights)
            model = PeftModel.from_pretrained(base, ref.path)
            loaded = model.load_adapter(ref.path, model.active_adapter)  # again: only this says what found no place
    except Exception as error:
        raise ModelError(f"{ref.model}: adapter {ref.path} does not load on {ref.base} ({_line(error)}).") from error
    extra = [key for key in loaded.unexpected_keys if not _is_saved_twice(key, weights)]
    for keys, fault in ((extra, "have no place in the base"), (loaded.missing_keys, "are missing")):
        if keys:  # peft would only warn, and the model be the base or half of the adapter
            raise ModelError(
                f"{ref.model}: {len(keys)} tensors of adapter {ref.path} {fault}, e.g. {sorted(keys)[0]}; "
                f"expected an adapter trained on {ref.base}, whole and with its layers' names."
            )
    return model.merge_and_unload()


def _is_saved_twice(key: str, adapter: Mapping[str, torch.Tensor]) -> bool:
    """Whether a tensor is a copy that peft saves of resized embeddings that were trained, beside the one it loads."""
    one, other = adapter.get(key), adapter.get(key.replace(".modules_to_save.", "."))
    return one is not None and other is not None and one is not other and torch.equal(one, other)


def _resize_embeddings(base: Any, adapter: Mapping[str, torch.Tensor]) -> None:
    """Give base the rows of an adapter that was trained with more tokens, and that holds the resized embeddings."""
    saved = {}
    for layer in filter(None, (base.get_input_embeddings(), base.get_output_embeddings())):
        name = next(name for name, module in base.named_modules() if module is layer)
        key = re.compile(rf"base_model\.model\.{re.escape(name)}\.(\w+\.)?weight")
        saved[name] = max((len(values) for full, values in adapter.items() if key.fullmatch(full)), default=None)
    rows = {n for n in saved.values() if n is not None}
    if not rows - {len(base.get_input_embeddings().weight)}:
        return
    if len(rows) > 1 or (None in saved.values() and not base.config.get_text_config().tie_word_embeddings):
        raise ValueError(f"it resizes the embeddings and lacks some of them, rows: {saved}")
    base.resize_token_embeddings(rows.pop(), mean_resizing=False)


def _line(error: BaseException) -> str:
    """An error on one line, short enough for one sentence."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars from transformers, nor what it tells peft's authors, while loading."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def load_tokenizer(source: ModelRef | Path | str) -> Any:
    """Load a checkpoint's tokenizer (the base's where the checkpoint has none), padding on the left.

    Raises
    ------
    ModelError
        If there is none or it cannot be read.
    """
    path = Path(source.path if isinstance(source, ModelRef) else source)
    if isinstance(source, ModelRef) and source.base is not None and not _has_tokenizer(path):
        path = source.base
    if not path.is_dir() or not _has_tokenizer(path):
        raise ModelError(
            f"{path} has no tokenizer; expected one of {', '.join(TOKENIZER_FILES)}: save it beside the base."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{path}: the tokenizer cannot be loaded ({_line(error)}).") from error
    tokenizer.padding_side = "left"
    return tokenizer


def _has_tokenizer(path: Path) -> bool:
    return any((path / name).exists() for name in TOKENIZER_FILES)
