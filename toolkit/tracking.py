"""Training curves to Weights & Biases, TensorBoard or Trackio, through accelerate; no weight depends on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, TypeAlias

from rlgen_stats.schemas.errors import InputError

TRACKERS: Final = ("wandb", "tensorboard", "trackio")
"""What curves can be reported to; each is the name of the package it needs."""

Report: TypeAlias = Callable[[int, Mapping[str, float]], None]
"""Receives the step and the values of a point."""


def ignore(step: int, values: Mapping[str, float]) -> None:
    """Report nothing."""


def check_trackers(report_to: Sequence[str]) -> None:
    """Refuse trackers that are unknown or whose package is missing.

    Raises
    ------
    InputError
        Naming the package to install.
    """
    for name in report_to:
        if name not in TRACKERS:
            raise InputError(f"curves are reported to {', '.join(TRACKERS)}, got {name!r}; name one of them.")
        package = find_spec(name)
        if package is None or package.origin is None:  # a folder that wandb left in the working directory is no package
            raise InputError(f"reporting to {name} needs the package {name}, which is missing: pip install {name}.")


@contextmanager
def tracking(
    report_to: Sequence[str], run: str, *, project: str, settings: Mapping[str, Any], logs: Path
) -> Iterator[Report]:
    """Trackers of one training run, open while the block runs.

    Parameters
    ----------
    report_to
        Some of ``TRACKERS``; none reports nothing.
    run
        Its name.
    project
        Name of the project that it belongs to.
    settings
        Shown beside the curves; text and numbers of them.
    logs
        Folder for the files of TensorBoard.

    Raises
    ------
    InputError
        If a package is missing or a tracker does not start.
    """
    check_trackers(report_to)
    trackers: list[Any] = []
    with ExitStack() as stack:
        for name in report_to:
            try:
                trackers.append(_started(name, run, project, settings, logs))
            except Exception as error:  # of the tracker: not logged in, no network, no room
                said = " ".join(str(error).split())[:200] or type(error).__name__
                raise InputError(f"{name} does not start ({said}); correct that, or do not report to it.") from error
            stack.callback(trackers[-1].finish)

        def report(step: int, values: Mapping[str, float]) -> None:
            for tracker in trackers:
                tracker.log(dict(values), step=step)

        yield report


def _started(name: str, run: str, project: str, settings: Mapping[str, Any], logs: Path) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # seconds to import

    tracker: Any
    if name == "tensorboard":
        tracker = LOGGER_TYPE_TO_CLASS[name](run, logs)
    else:
        tracker = LOGGER_TYPE_TO_CLASS[name](project, name=run)
    if hasattr(tracker, "start"):  # of accelerate before 1.11 it starts when made
        tracker.start()
    shown = {key: value for key, value in settings.items() if isinstance(value, str | int | float)}
    tracker.store_init_configuration(shown)
    return tracker
