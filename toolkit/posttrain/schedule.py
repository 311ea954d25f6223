"""When checkpoints are written, and writing them while TRL trains."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Literal

from transformers import TrainerCallback

from rlgen_stats.schemas.errors import SpecError
from rlgen_stats.schemas.study import RunSpec
from rlgen_stats.stores import replacing, write_json
from rlgen_stats.toolkit.progress import Progress, Task

RESUME_FOLDER: Final = ".trainer"
"""Trainer state (optimiser, schedule, generators) of the last checkpoint; removed once the run is finished."""
RESUME_NOTE: Final = "resume.json"
"""Names the newest trainer state that is complete."""
_SHOWN: Final = ("loss", "reward")
"""Logged values shown in the progress."""


def checkpoint_steps(total: int, n: int, schedule: Literal["linear", "geometric"] = "linear") -> tuple[int, ...]:
    """The optimiser steps of ``n`` checkpoints, the last one ``total``.

    Parameters
    ----------
    total
        Steps of the whole training.
    n
        Number of checkpoints.
    schedule
        ``"linear"``: total i / n. ``"geometric"``: from the first step to the last, each the same multiple of the one
        before; steps that coincide once rounded are kept once.

    Raises
    ------
    SpecError
        If there are fewer steps than checkpoints.

    Examples
    --------
    >>> checkpoint_steps(80, 5)
    (16, 32, 48, 64, 80)
    >>> checkpoint_steps(150, 5, "geometric")
    (1, 3, 12, 43, 150)
    """
    if n < 1 or total < n:
        raise SpecError(
            f"training takes {total} steps, too few for 'n_checkpoints' = {n}; "
            "lower n_checkpoints or raise max_steps or num_train_epochs under 'trainer'."
        )
    if schedule == "geometric":
        return tuple(sorted({round(total ** (i / (n - 1))) for i in range(n)})) if n > 1 else (total,)
    # total * i / n, rounded to the nearest step in whole numbers
    return tuple((total * i + n // 2) // n for i in range(1, n + 1))


def step_folder(folder: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of ``step``."""
    return folder / f"step-{step}"


class CheckpointSchedule(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Writes each scheduled checkpoint whole or not at all, and has the trainer keep its state for resuming.

    Parameters
    ----------
    folder
        The run's folder.
    run
        Its number of checkpoints and their schedule; the steps are known once the trainer knows its own number of them.
    tokenizer
        Saved beside each checkpoint.
    note
        Facts that identify the run in the resume note, so that only the same run resumes from it.
    keep_state
        Whether to keep the trainer's state at each checkpoint.
    """

    def __init__(
        self, folder: Path, run: RunSpec, tokenizer: Any, note: Mapping[str, Any], *, keep_state: bool
    ) -> None:
        self.folder, self.run, self.tokenizer = folder, run, tokenizer
        self.note, self.keep_state = dict(note), keep_state
        self.steps: tuple[int, ...] = ()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fix the schedule."""
        self.steps = checkpoint_steps(state.max_steps, self.run.n_checkpoints, self.run.schedule)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write a checkpoint where one is due."""
        if state.global_step not in self.steps:
            return
        if state.is_world_process_zero:
            with replacing(step_folder(self.folder, state.global_step)) as temporary:
                kwargs["model"].save_pretrained(temporary)
                self.tokenizer.save_pretrained(temporary)
        if self.keep_state and state.global_step < self.steps[-1]:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that the trainer's state of this step is complete."""
        if state.is_world_process_zero:
            note = {**self.note, "step": state.global_step, "checkpoint": f"checkpoint-{state.global_step}"}
            write_json(self.folder / RESUME_FOLDER / RESUME_NOTE, note)


class ProgressReport(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Hands the trainer's steps, loss and reward to the toolkit's progress.

    Parameters
    ----------
    progress
        Receiver of progress.
    description
        Title of the task.
    """

    def __init__(self, progress: Progress, description: str) -> None:
        self._progress, self._description = progress, description
        self._stack = ExitStack()
        self._task: Task | None = None
        self._facts: dict[str, object] = {}
        self._seen = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the task."""
        self._task = self._stack.enter_context(
            self._progress.task(self._description, total=state.max_steps, unit="steps")
        )
        self._task.skip(state.global_step)
        self._seen = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Remember the newest loss and reward."""
        for name in _SHOWN:
            if logs and isinstance(logs.get(name), int | float):
                self._facts[name] = round(float(logs[name]), 3)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance by one optimiser step."""
        self._advance(state.global_step)

    def _advance(self, step: int) -> None:
        if self._task is not None and step > self._seen:
            self._task.advance(step - self._seen, **self._facts)
            self._seen = step

    def close(self) -> None:
        """Close the task, also after an error."""
        self._stack.close()
