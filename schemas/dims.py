"""Names of dimensions, coordinates and categories; every other module takes them from here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from rlgen_stats.schemas.errors import InputError

MODEL: Final = "model"
"""One checkpoint of one run, ``run@step``."""
PROMPT: Final = "prompt"
"""Stable prompt id: the unit of every test."""
SAMPLE: Final = "sample"
"""Index of a sampled completion."""
GREEDY: Final = -1
"""What tables of completions have in its place for the greedy completion."""
NOT_SAMPLED: Final = -1
"""Tokens and grade of a sample that a model has fewer than other models."""
TOKEN: Final = "token"
"""Position in the concatenation of all texts."""
CHANNEL: Final = "channel"
"""Residual-stream dimension."""
FEATURE: Final = "feature"
"""Index of a crosscoder latent."""
TASK: Final = "task"
"""Family of prompts with one grader."""
VIEW: Final = "view"
"""Slot of a crosscoder; a model id."""

RUN: Final = "run"
TRAINED_RUN: Final = "trained_run"
"""Dimension of results that hold once per run; ``run`` labels checkpoints on the model dimension."""
STEP: Final = "step"
ARM: Final = "arm"
DOMAIN: Final = "domain"
SPLIT: Final = "split"
CLUSTER: Final = "cluster"
POSITION: Final = "position"
TOKEN_ID: Final = "token_id"
SEGMENT: Final = "segment"
SOURCE: Final = "source"
"""Model that wrote the text a token belongs to."""
SPAN: Final = "span"
"""Run of consecutive tokens with one prompt, one source and one segment."""
GROUP: Final = "group"
"""Clusters of prompts whose sums are kept together: the unit of streaming standard errors."""
PROMPT_LABELS: Final = (TASK, DOMAIN, SPLIT, CLUSTER)
"""Labels of a prompt, besides its id."""

DOMAINS: Final = ("in", "out")
SELECTION, VERIFICATION, TRIAL = SPLITS = ("selection", "verification", "trial")
"""What a prompt is used for: features are chosen on selection prompts and confirmed on verification prompts; a causal
trial edits models on trial prompts, which decide nothing before."""
SEGMENTS: Final = ("prompt", "completion", "pad")
FORMAT_CLASSES: Final = ("answer", "no_answer", "empty", "degenerate", "truncated")
"""Kinds of completion. answer: ended with an answer that can be read; no_answer: ended without one; empty: no text;
degenerate: ends in one n-gram over and over; truncated: cut off by the length limit, whatever can be read in it."""
BASE_RUN: Final = "base"
FINAL: Final = "final"
"""In place of a step: the last checkpoint of a run."""

_NUMBER = re.compile(r"[0-9]+")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_name(name: str, what: str) -> str:
    """Return ``name`` if it is safe as a folder and group name, else raise.

    Raises
    ------
    InputError
        If the name is empty, starts with a dot or dash, or has other characters than letters,
        digits, ``.``, ``_`` and ``-`` (which also rules out path traversal).
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{what} must be letters, digits, '.', '_' or '-' and start with a letter or digit, "
            f"got {name!r}; rename it."
        )
    return name


def of_dictionary(name: str, dictionary: int) -> str:
    """Name of what is kept of one of the encoded crosscoder's dictionaries: ``name``, then ``name.2``, ``name.3``, ...

    Examples
    --------
    >>> of_dictionary("drift", 1), of_dictionary("drift", 2)
    ('drift', 'drift.2')
    """
    return name if dictionary == 1 else f"{name}.{dictionary}"


def split_dictionary(name: str) -> tuple[str, int]:
    """Inverse of :func:`of_dictionary`."""
    stem, _, number = name.rpartition(".")
    return (stem, int(number)) if stem and _NUMBER.fullmatch(number) else (name, 1)


def model_id(run: str, step: int) -> str:
    """``run@step``: the label of one checkpoint on the model dimension."""
    return f"{check_name(run, 'a run name')}@{int(step)}"


def split_model_id(model: str) -> tuple[str, int]:
    """Inverse of :func:`model_id`.

    Raises
    ------
    InputError
        If ``model`` is not ``run@step``.
    """
    run, separator, step = model.rpartition("@")
    if not separator or not _NUMBER.fullmatch(step):
        raise InputError(f"a model id looks like 'rl@200' (run@step), got {model!r}.")
    return check_name(run, "a run name"), int(step)


def stored_model(model: str, models: Iterable[str]) -> str:
    """``rl@final`` as the last checkpoint of that run among ``models``; any other label as it is.

    Raises
    ------
    InputError
        If none of ``models`` is a checkpoint of that run; the message lists the runs.

    Examples
    --------
    >>> stored_model("rl@final", ["base@0", "rl@40", "rl@80"])
    'rl@80'
    """
    run, _, step = model.rpartition("@")
    if step != FINAL:
        return model
    steps: dict[str, list[int]] = {}
    for known in models:
        name, number = split_model_id(known)
        steps.setdefault(name, []).append(number)
    if run not in steps:
        raise InputError(f"run {run!r} has no checkpoint in the data; the runs are {sorted(steps)}.")
    return model_id(run, max(steps[run]))


BASE_MODEL: Final = model_id(BASE_RUN, 0)
