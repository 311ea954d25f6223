"""From the study file's ``trainer`` section to TRL's configs, with TRL's argument names."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig
from trl import GRPOConfig, SFTConfig

from rlgen_stats.schemas.errors import SpecError
from rlgen_stats.schemas.study import RunSpec

CONFIGS: Final[Mapping[str, Any]] = {"sft": SFTConfig, "grpo": GRPOConfig, "pretrain": SFTConfig}
PEFT: Final = "peft"
"""Key of ``trainer`` that asks for a LoRA adapter: a mapping of LoraConfig's own names."""

_SCHEDULE = "checkpoints follow the run's 'n_checkpoints' and 'schedule'"
_NO_EVALUATION = "training has no evaluation set here; the outcomes stage grades every checkpoint"
_NO_HUB = "nothing is uploaded from a study"
_DEVICE = "the device is the study's 'device'"
_SEED = "it is derived from the study's and the run's 'seed'"
_TEMPLATE = "prompts are read, and end, by the run's 'chat_template'"
OWNED: Final[Mapping[str, str]] = {
    "output_dir": "checkpoints go to models/<run>",
    "seed": _SEED,
    "data_seed": _SEED,
    "save_strategy": _SCHEDULE,
    "save_steps": _SCHEDULE,
    "save_total_limit": _SCHEDULE,
    "load_best_model_at_end": _SCHEDULE,
    "resume_from_checkpoint": "an interrupted run resumes by itself",
    "disable_tqdm": "progress is the toolkit's own",
    "do_train": "training is what this stage does",
    "do_eval": _NO_EVALUATION,
    "do_predict": _NO_EVALUATION,
    "eval_strategy": _NO_EVALUATION,
    "eval_steps": _NO_EVALUATION,
    "use_cpu": _DEVICE,
    "push_to_hub": _NO_HUB,
    "hub_model_id": _NO_HUB,
    "hub_token": _NO_HUB,
    "hub_strategy": _NO_HUB,
    "model_init_kwargs": "the model is the study's 'base'",
    "trust_remote_code": "code in a checkpoint's folder is never run",
    "eos_token": _TEMPLATE,
    "chat_template_path": _TEMPLATE,
    "chat_template_kwargs": _TEMPLATE,
    "remove_unused_columns": "the grader needs the answers",
    "reward_weights": "there is one reward, the study's 'grader'",
}
"""Names the study decides, each with the reason it is refused."""


def trainer_arguments(run: RunSpec, *, output: Path, seed: int, device: torch.device, max_new_tokens: int) -> Any:
    """TRL's config for a run.

    Parameters
    ----------
    run
        The run; ``run.trainer`` holds names of SFTConfig or GRPOConfig (and ``peft``).
    output
        Folder for the trainer's own state.
    seed
        Seed of shuffling, sampling and adapters.
    device
        Where training runs.
    max_new_tokens
        Length limit of the study's completions, which GRPO's have too unless ``run.trainer`` says otherwise.

    Returns
    -------
    trl.SFTConfig or trl.GRPOConfig

    Raises
    ------
    SpecError
        For a name that TRL does not have (the nearest one is suggested), one that the study decides (with the reason),
        or a value that TRL refuses.
    """
    config = CONFIGS[run.method]
    given = {name: value for name, value in run.trainer.items() if name != PEFT}
    _check_names(run, given, [field.name for field in dataclasses.fields(config) if field.init])
    _check_numbers(run, given, config)
    decided: dict[str, Any] = {
        "output_dir": str(output),
        "seed": seed,
        "save_strategy": "no",  # CheckpointSchedule asks for every save
        "save_total_limit": 2,  # the newest state may be incomplete when killed; the one before it is not
        "disable_tqdm": True,
        "use_cpu": device.type == "cpu",
        "trust_remote_code": False,
    }
    if run.method == "grpo":
        decided["remove_unused_columns"] = False
    defaults: dict[str, Any] = {"report_to": "none"}
    if run.method == "grpo":
        defaults["max_completion_length"] = max_new_tokens
    if device.type == "cpu":
        defaults |= {"bf16": False, "dataloader_pin_memory": False}
    try:
        built = config(**{**defaults, **given, **decided})
    except (ValueError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise SpecError(f"run {run.name!r}: {config.__name__} refuses these 'trainer' arguments: {reason}") from error
    if device.type == "cuda" and built.n_gpu > 1:
        built._n_gpu = 1  # several visible GPUs must not become DataParallel, which TRL refuses
    return built


def adapter_config(run: RunSpec) -> Any | None:
    """LoraConfig for a run with ``trainer: {peft: {...}}``, None for full-parameter training.

    Raises
    ------
    SpecError
        For an unknown name or a refused value.
    """
    if PEFT not in run.trainer:
        return None
    given = run.trainer[PEFT]
    if not isinstance(given, dict):
        raise SpecError(f"run {run.name!r}: 'trainer.peft' must map LoraConfig names to values, got {given!r}.")
    known = [field.name for field in dataclasses.fields(LoraConfig) if field.init]
    for name in given:
        if name not in known:
            raise SpecError(f"run {run.name!r}: peft's LoraConfig has no {name!r}; {_suggestion(name, known)}")
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **given})
    except (ValueError, TypeError) as error:
        raise SpecError(f"run {run.name!r}: LoraConfig refuses these 'trainer.peft' arguments: {error}") from error


def _check_names(run: RunSpec, given: Mapping[str, Any], known: list[str]) -> None:
    for name in given:
        if name in OWNED:
            raise SpecError(f"run {run.name!r}: 'trainer.{name}' cannot be set: {OWNED[name]}; remove it.")
        if name not in known:
            free = [*(other for other in known if other not in OWNED), PEFT]
            kind = CONFIGS[run.method].__name__
            raise SpecError(f"run {run.name!r}: TRL's {kind} has no argument {name!r}; {_suggestion(name, free)}")


def _suggestion(name: str, known: list[str]) -> str:
    closest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {closest[0]!r}?" if closest else "see its documentation for the names it takes."


def _check_numbers(run: RunSpec, given: Mapping[str, Any], config: Any) -> None:
    """Refuse numbers given as text (YAML reads 5e-4 as text) or as true and false, which Python takes for 1 and 0."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(config)}
    for name, value in given.items():
        is_number = "float" in kinds[name] or "int" in kinds[name]
        if is_number and isinstance(value, str) and "str" not in kinds[name]:
            raise SpecError(
                f"run {run.name!r}: 'trainer.{name}' must be a number, got the text {value!r}; "
                "YAML needs a decimal point in scientific notation: 5.0e-4."
            )
        if is_number and isinstance(value, bool) and "bool" not in kinds[name]:
            raise SpecError(f"run {run.name!r}: 'trainer.{name}' must be a number, got {str(value).lower()}.")
    if given.get("max_steps") == 0:  # the trainer takes it for "not given"
        raise SpecError(f"run {run.name!r}: 'trainer.max_steps' is 0; give a number of steps, or leave it out.")
