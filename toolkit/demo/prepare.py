"""Preparing the embedded study: its tables, its base and its spec."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

import pandas as pd

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.study import (
    BaseSpec,
    CrosscoderSpec,
    DataSpec,
    ExtractionSpec,
    GenerationSpec,
    InterventionSpec,
    RunSpec,
    SampleNumbers,
    SelectionSpec,
    StatisticsSpec,
    StudySpec,
)
from rlgen_stats.schemas.tasks import GraderSpec
from rlgen_stats.stores import StudyFolder, replacing
from rlgen_stats.stores.prompts import prompt_files
from rlgen_stats.toolkit.demo.pretrain import BaseSettings, check_base, pretrain_base
from rlgen_stats.toolkit.demo.prompt_tables import evaluation_prompts, neutral_texts, training_prompts, trivia_prompts
from rlgen_stats.toolkit.demo.world import CONTROL, HELD_OUT, MARKER, TRIVIA, World
from rlgen_stats.toolkit.progress import SILENT, Progress

Size = Literal["demo", "mini"]

BASE_SETTINGS: Final = {
    "demo": BaseSettings(),
    "mini": BaseSettings(
        hidden_size=32, n_layers=2, n_heads=2, feed_forward=64, steps=150, batch_size=64, n_eval_pairs=14
    ),
}
N_TRIVIA: Final = {"demo": 289, "mini": 0}
"""Questions without a style: of the demo's, a causal trial gets the 59 and more that rule out side effects."""
NEUTRAL: Final = "data/neutral.parquet"

_SFT: Final[dict[str, dict[str, Any]]] = {
    "demo": {"max_steps": 100, "learning_rate": 1e-4, "per_device_train_batch_size": 64, "logging_steps": 10},
    "mini": {"max_steps": 6, "learning_rate": 5e-4, "per_device_train_batch_size": 16, "logging_steps": 2},
}
_GRPO: Final[dict[str, dict[str, Any]]] = {
    "demo": {"max_steps": 100, "per_device_train_batch_size": 64, "num_generations": 8, "logging_steps": 5},
    "mini": {"max_steps": 2, "per_device_train_batch_size": 256, "num_generations": 8, "logging_steps": 1},
}
_GRPO_ALWAYS: Final[dict[str, Any]] = {
    "learning_rate": 1e-4,
    "max_completion_length": 12,  # the longest behaviour of the base, a worked answer, has nine tokens
    "temperature": 1.0,
    "beta": 0.0,
    "loss_type": "dr_grpo",
    "scale_rewards": "none",
}
_ALWAYS: Final[dict[str, Any]] = {"gradient_checkpointing": False}
"""Recomputing activations saves memory that so small a model does not need."""


def prepare_demo(
    folder: StudyFolder,
    *,
    seed: int = 0,
    n_seeds: int = 1,
    size: Size = "demo",
    progress: Progress = SILENT,
) -> StudySpec:
    """Write the embedded study's tables and base into a study folder and return its spec.

    Files that exist with the same content are kept, so an interrupted demo continues.

    Parameters
    ----------
    folder
        Study folder; gets data/prompts.parquet, data/train.parquet and models/base.
    seed
        Seed of the world and of everything trained in it.
    n_seeds
        Training runs per arm.
    size
        ``"demo"``, or ``"mini"``: the same world, tiny and barely trained, to run every stage in seconds.
    progress
        Receiver of progress.

    Returns
    -------
    StudySpec
        To be written as study.yaml.

    Raises
    ------
    InputError
        If ``size`` or ``n_seeds`` is out of range.
    StoreError
        If the folder holds another demo's base; nothing is overwritten.

    Examples
    --------
    >>> spec = prepare_demo(StudyFolder(Path("runs/demo")))  # doctest: +SKIP
    """
    spec = demo_spec(seed, n_seeds, size)
    settings = BASE_SETTINGS[size]
    world = World(seed, settings.n_eval_pairs)
    base = folder.resolve(spec.base.path)
    check_base(base, world, settings)
    write_tables(folder, spec, world, size)
    pretrain_base(base, world, settings, progress=progress)
    return spec


def write_tables(folder: StudyFolder, spec: StudySpec, world: World, size: Size) -> None:
    """Write the tables that the spec names: prompts, training prompts, neutral texts. What is there is kept."""
    tables = evaluation_prompts(world), trivia_prompts(world, n=N_TRIVIA[size])
    _write_table(folder.resolve(prompt_files(spec)["data.prompts"]), pd.concat(tables, ignore_index=True))
    if spec.data.train is not None:
        _write_table(folder.resolve(spec.data.train), training_prompts(world))
    if spec.intervention.neutral_text is not None:
        _write_table(folder.resolve(spec.intervention.neutral_text), neutral_texts(world))


def _write_table(path: Path, table: pd.DataFrame) -> None:
    if path.exists() and pd.read_parquet(path).equals(table):
        return
    with replacing(path) as temporary:
        table.to_parquet(temporary, index=False)


def demo_spec(seed: int = 0, n_seeds: int = 1, size: Size = "demo") -> StudySpec:
    """The embedded study's spec.

    Parameters
    ----------
    seed
        Seed of the study.
    n_seeds
        Training runs per arm: ``sft``, ``sft.1``, ... and ``rl``, ``rl.1``, ...
    size
        ``"demo"`` or ``"mini"``.

    Raises
    ------
    InputError
        If ``size`` or ``n_seeds`` is out of range.
    """
    if size not in BASE_SETTINGS:
        raise InputError(f"size must be one of {', '.join(BASE_SETTINGS)}, got {size!r}.")
    if n_seeds < 1:
        raise InputError(f"n_seeds must be 1 or more, got {n_seeds}.")
    mini = size == "mini"
    return StudySpec(
        name=size,
        seed=seed,
        device="cpu",  # so small a model gains nothing from a GPU, and a CPU repeats itself bit for bit
        base=BaseSpec(path="models/base"),
        data=DataSpec(),
        runs=_runs(n_seeds, size),
        contrast=("sft", "rl"),
        generation=GenerationSpec(
            max_new_tokens=16, n_samples=SampleNumbers(final=2, others=2 if mini else 0), batch_size=448
        ),
        grader=GraderSpec(name="final_answer", marker=MARKER),
        extraction=ExtractionSpec(layer=0 if mini else 2, batch_size=128),
        crosscoders=_crosscoders(mini),
        statistics=_statistics(mini),
        selection=SelectionSpec(
            held_out_tasks=HELD_OUT,
            control_tasks=(CONTROL,) if mini else (CONTROL, TRIVIA),
            min_discordant=5 if mini else 20,
            max_features=25,  # a tenth of the features
        ),
        intervention=InterventionSpec(
            n_controls=19 if mini else 39,
            curve=(1, 5, 15, 50),
            max_prompts=32 if mini else 350,
            accept_undecidable=mini,
            neutral_text=None if mini else NEUTRAL,
        ),
    )


NEAR: Final = (6, 16)
"""Checkpoints of SFT: one nearer to base than RL ends and one about as far, for a comparison at equal distance."""


def _runs(n_seeds: int, size: Size) -> tuple[RunSpec, ...]:
    arms: tuple[tuple[str, Literal["sft", "grpo"], dict[str, Any]], ...] = (
        ("sft", "sft", {**_SFT[size], **_ALWAYS}),
        ("rl", "grpo", {**_GRPO[size], **_GRPO_ALWAYS, **_ALWAYS}),
    )
    return tuple(
        RunSpec(
            name=arm if replicate == 0 else f"{arm}.{replicate}",
            arm=arm,
            method=method,
            seed=replicate,
            n_checkpoints=2 if size == "mini" else 6,
            schedule="linear" if size == "mini" else "geometric",
            trainer=trainer,
        )
        for arm, method, trainer in arms
        for replicate in range(n_seeds)
    )


def _crosscoders(mini: bool) -> tuple[CrosscoderSpec, ...]:
    def one(name: str, *views: str, steps: int = 400) -> CrosscoderSpec:
        return CrosscoderSpec(
            name=name,
            views=views,
            sparsity="batchtopk",
            n_features=64 if mini else 256,
            k=8 if mini else 16,
            steps=30 if mini else steps,
            batch_size=128 if mini else 1024,
            learning_rate=1e-3,
            accept_unhealthy=mini,  # thirty steps fit nothing: the mini study only exercises the stages
        )

    dictionaries = (
        one("main", "base@0", "sft@final", "rl@final", steps=1000),
        one("pair-sft", "base@0", "sft@final"),
        one("pair-rl", "base@0", "rl@final"),
        one("null", "base@0", "base@halves"),
        one("noise", "base@0", "sft@noise"),
    )
    near = () if mini else tuple(one(f"pair-sft-{step}", "base@0", f"sft@{step}") for step in NEAR)
    return dictionaries + near


def _statistics(mini: bool) -> StatisticsSpec:
    if mini:
        return StatisticsSpec(n_resamples=199, n_bootstrap=99, n_min=5, top_k=10, n_halvings=10)
    return StatisticsSpec()
