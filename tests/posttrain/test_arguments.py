"""TRL's arguments by their own names; everything else refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlgen_stats.schemas.errors import SpecError
from rlgen_stats.schemas.study import RunSpec
from rlgen_stats.toolkit.posttrain import checkpoint_steps
from rlgen_stats.toolkit.posttrain.arguments import OWNED, adapter_config, trainer_arguments

CPU = torch.device("cpu")


def built(method: Any, **trainer: Any) -> Any:
    run = RunSpec(name="run", arm="arm", method=method, trainer=trainer)
    return trainer_arguments(run, output=Path("somewhere"), seed=7, device=CPU, max_new_tokens=300)


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_trl_names_pass_through_and_ours_are_set(method: str) -> None:
    config = built(
        method, learning_rate=3e-4, per_device_train_batch_size=8, warmup_steps=3, lr_scheduler_type="cosine"
    )
    assert (config.learning_rate, config.per_device_train_batch_size, config.warmup_steps) == (3e-4, 8, 3)
    assert config.lr_scheduler_type == "cosine"
    assert (config.seed, config.use_cpu, config.bf16, config.save_strategy) == (7, True, False, "no")
    assert config.report_to == []
    assert config.trust_remote_code is False


def test_completions_in_training_are_as_long_as_elsewhere_unless_the_run_says_otherwise() -> None:
    assert built("grpo").max_completion_length == 300
    assert built("grpo", max_completion_length=40).max_completion_length == 40


def test_own_names_of_each_method() -> None:
    assert built("grpo", num_generations=4, per_device_train_batch_size=8, loss_type="dr_grpo").num_generations == 4
    with pytest.raises(SpecError, match=r"SFTConfig has no argument 'num_generations'"):
        built("sft", num_generations=4)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("learning_rat", "learning_rate"), ("num_generation", "num_generations"), ("betta", "beta")],
)
def test_unknown_names_are_refused_with_the_nearest_valid_one(name: str, suggestion: str) -> None:
    with pytest.raises(SpecError, match=rf"GRPOConfig has no argument '{name}'; did you mean '{suggestion}'\?"):
        built("grpo", **{name: 1})


def test_a_suggestion_is_never_a_refused_name() -> None:
    with pytest.raises(SpecError) as caught:
        built("sft", output_dirr="x")
    assert "'output_dir'?" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(OWNED))
def test_names_the_study_decides_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(SpecError) as caught:
        built("grpo", **{name: 1})
    assert f"'trainer.{name}' cannot be set" in str(caught.value)
    assert OWNED[name] in str(caught.value)


def test_trl_refusals_become_one_sentence() -> None:
    with pytest.raises(SpecError, match=r"run 'run': GRPOConfig refuses .*num_generations"):
        built("grpo", num_generations=8, per_device_train_batch_size=12)


def test_no_steps_at_all_are_refused() -> None:
    with pytest.raises(SpecError, match=r"'trainer.max_steps' is 0; give a number of steps, or leave it out\."):
        built("sft", max_steps=0)
    assert built("sft", max_steps=1).max_steps == 1


def test_yaml_scientific_notation_without_a_point_is_explained() -> None:
    with pytest.raises(SpecError, match=r"'trainer.learning_rate' must be a number, got the text '5e-4'.*5\.0e-4"):
        built("sft", learning_rate="5e-4")


@pytest.mark.parametrize(("name", "value"), [("max_steps", True), ("learning_rate", False), ("max_length", True)])
def test_true_and_false_are_no_numbers(name: str, value: bool) -> None:
    with pytest.raises(SpecError, match=rf"'trainer.{name}' must be a number, got {str(value).lower()}\."):
        built("sft", **{name: value})
    assert built("sft", packing=True, bf16=False).packing is True


def test_adapters_pass_through_peft() -> None:
    run = RunSpec(name="run", arm="arm", method="sft", trainer={"peft": {"r": 2, "target_modules": ["q_proj"]}})
    assert trainer_arguments(run, output=Path("x"), seed=0, device=CPU, max_new_tokens=9).max_steps == -1
    config = adapter_config(run)
    assert (config.r, config.task_type) == (2, "CAUSAL_LM")
    wrong = RunSpec(name="run", arm="arm", method="sft", trainer={"peft": {"target_module": ["q_proj"]}})
    with pytest.raises(SpecError, match=r"LoraConfig has no 'target_module'; did you mean 'target_modules'\?"):
        adapter_config(wrong)


@pytest.mark.parametrize(("total", "n"), [(80, 5), (150, 5), (7, 3), (5, 5), (1, 1), (1000, 7)])
def test_schedule_is_even_and_ends_with_training(total: int, n: int) -> None:
    steps = checkpoint_steps(total, n)
    assert len(steps) == len(set(steps)) == n
    assert steps[-1] == total
    assert all(abs(step - total * (i + 1) / n) <= 0.5 for i, step in enumerate(steps))


@pytest.mark.parametrize(("total", "n", "expected"), [(150, 5, (1, 3, 12, 43, 150)), (6, 3, (1, 2, 6)), (9, 1, (9,))])
def test_a_geometric_schedule_multiplies(total: int, n: int, expected: tuple[int, ...]) -> None:
    steps = checkpoint_steps(total, n, "geometric")
    assert steps == expected


def test_steps_that_coincide_are_kept_once() -> None:
    assert checkpoint_steps(8, 6, "geometric") == (1, 2, 3, 5, 8)  # 8^(1/5) and 8^(2/5) both round to 2


@pytest.mark.parametrize(("total", "n"), [(3, 4), (0, 1), (5, 0)])
def test_schedule_refuses_fewer_steps_than_checkpoints(total: int, n: int) -> None:
    with pytest.raises(SpecError, match="n_checkpoints"):
        checkpoint_steps(total, n)
