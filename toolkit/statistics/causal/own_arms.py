"""The outcome table of a causal trial from graded answers of one's own arms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import CLUSTER, PROMPT, TASK
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.causal.outcome_table import (
    DIRECTIONS,
    Condition,
    Direction,
    Floats,
    OutcomeTable,
    ending_of,
)
from rlgen_stats.toolkit.statistics.core.own_arrays import Prompts, check_rows, prompt_labels

KINDS: Final = (
    *("unedited", "fresh", "passthrough", "set", "dose", "random", "rescaled"),
    *("steering", "random_direction", "patch", "lift", "lower", "part"),
)
"""Kinds of arm; an arm is of the kind that its name begins with."""
MAIN_DOSE: Final = {"disable": 0.0, "amplify": 2.0}
"""What features of the set are multiplied by."""
AT_MAIN_DOSE: Final = ("set", "random", "rescaled")
ROUNDING: Final = 1e-6
"""Nats below 0 that a divergence of equal distributions may have in single precision; counted as 0."""


def arms_table(
    correct: Mapping[str, Any],
    other: Any,
    *,
    direction: Direction,
    prompts: Prompts,
    unrelated: Sequence[str] = (),
    doses: Mapping[str, float] | None = None,
    format_class: Mapping[str, Any] | None = None,
    other_format_class: Any = None,
    kl_to_other: Mapping[str, Any] | None = None,
    neutral_kl: Mapping[str, float] | None = None,
) -> OutcomeTable:
    """Outcomes of edited models as :func:`~rlgen_stats.toolkit.statistics.judge` takes them, from arrays.

    Parameters
    ----------
    correct
        Arm -> [prompt] or [prompt, sample], 1 where the answer is right, else 0; the same samples in every arm. The
        arms ``unedited`` (the model as it is) and ``set`` (with the edit) are needed. Others are named by their kind,
        and what follows a dash: ``random-001`` (matched random sets), ``dose-0.5``, ``fresh`` (other seeds),
        ``passthrough``, ``steering``, ``random-direction``, ``rescaled-001``.
    other
        The same of the other model, unedited: of base when disabling, of the RL model when amplifying.
    direction
        ``disable`` (the RL model is edited, accuracy should fall) or ``amplify`` (base is, it should rise).
    prompts
        As in :func:`~rlgen_stats.toolkit.statistics.features_dataset`; tasks and clusters are used.
    unrelated
        Tasks on which side effects are measured; the effect is measured on all others.
    doses
        Arm -> what the features were multiplied by. Default: the number after ``dose-``; 0 when disabling and 2 when
        amplifying for the set and random sets; 1 otherwise.
    format_class, other_format_class
        How completions ended, in the shape of ``correct`` and ``other`` (``FORMAT_CLASSES``). Default: with an answer.
    kl_to_other
        Arm -> [prompt] KL divergence from the other model in nats, NaN where it was not measured. Without it V6 cannot
        be shown, nor CAUSAL_SPECIFIC.
    neutral_kl
        Arm -> nats per token from the unedited model on text that neither wrote. Without it V4 cannot be shown.

    Returns
    -------
    OutcomeTable

    Raises
    ------
    InputError
        If an arm is missing or of no known kind, a shape or value is not as above, or no prompt is left to measure on.

    Examples
    --------
    >>> from rlgen_stats.toolkit.statistics import judge
    >>> rng = np.random.default_rng(0)
    >>> rl, base = rng.random((2, 200)) < [[0.9], [0.4]]
    >>> arms = {"unedited": rl, "set": rl & base} | {f"random-{b:03d}": rl for b in range(19)}
    >>> table = arms_table(arms, base, direction="disable", prompts=[f"p{i}" for i in range(200)])
    >>> judge(table).requirements
    {'v1': True, 'v2': True, 'v3': False, 'v4': False, 'v6': False}
    """
    if direction not in DIRECTIONS:
        raise InputError(f"direction is one of {list(DIRECTIONS)}, got {direction!r}.")
    labels = prompt_labels(prompts)
    task = labels[TASK][1]
    absent = sorted(set(unrelated) - set(task.tolist()))
    if absent:
        raise InputError(f"no prompt has the unrelated task {absent[0]!r}; the tasks are {sorted(set(task.tolist()))}.")
    for name, given in (("doses", doses), ("format_class", format_class), ("neutral_kl", neutral_kl)):
        _check_arms(name, given or {}, correct)
    _check_arms("kl_to_other", kl_to_other or {}, correct)
    conditions = tuple(_condition(str(arm), direction, doses or {}) for arm in correct)
    ids = labels[PROMPT][1]
    right = {str(arm): _right(f"arm {arm!r}", values, ids) for arm, values in correct.items()}
    others = _right("the other model", other, ids)
    for arm, values in right.items():
        if values.shape != others.shape:
            raise InputError(
                f"arm {arm!r} has {values.shape[1]} samples a prompt, the other model {others.shape[1]}; give the same "
                "samples in every arm."
            )
    names, shape = list(right), (len(right), len(task))
    kl = np.stack([_divergence(arm, kl_to_other, ids) for arm in names])
    unknown = np.full(shape, np.nan)
    return OutcomeTable(
        direction=direction,
        conditions=conditions,
        correct=np.stack([right[arm] for arm in names]),
        ending=np.stack([_endings(arm, right[arm], (format_class or {}).get(arm)) for arm in names]),
        other_ending=_endings("the other model", others, other_format_class),
        kl_to_base=kl if direction == "disable" else unknown,
        kl_to_rl=kl if direction == "amplify" else unknown,
        neutral_kl=np.array([_nats(f"neutral_kl of {a!r}", (neutral_kl or {}).get(a, np.nan)) for a in names]),
        n_tokens=np.full((*shape, others.shape[1]), np.nan),
        task=task,
        cluster=labels[CLUSTER][1],
        target=~np.isin(task, list(unrelated)),
        unrelated=np.isin(task, list(unrelated)),
    )


def _condition(arm: str, direction: Direction, doses: Mapping[str, float]) -> Condition:
    name = arm.replace("-", "_") + "_"
    kinds = [kind for kind in KINDS if name.startswith(f"{kind}_")]
    if not kinds:
        raise InputError(f"arm {arm!r} is of no known kind; its name begins with one of {', '.join(KINDS)} and a dash.")
    kind = max(kinds, key=len)  # random-direction is no random set
    dose = MAIN_DOSE[direction] if kind in AT_MAIN_DOSE else 1.0
    if kind == "dose" and arm not in doses:
        try:
            dose = float(arm.removeprefix("dose-"))
        except ValueError as error:
            raise InputError(f"arm {arm!r} needs a dose; name it dose-0.5, or give its dose in doses.") from error
    dose = float(doses.get(arm, dose))
    if not math.isfinite(dose):
        raise InputError(f"arm {arm!r} has the dose {dose}; expected the number that its features were multiplied by.")
    return Condition(arm, kind, dose)


def _check_arms(name: str, given: Mapping[str, Any], arms: Mapping[str, Any]) -> None:
    unknown = sorted(map(str, given.keys() - arms.keys()))
    if unknown:
        raise InputError(f"{name} names the arm {unknown[0]!r}; the arms are {sorted(arms)}.")


def _right(what: str, values: Any, prompts: NDArray[np.str_]) -> Floats:
    """[prompt, sample] 0 or 1."""
    check_rows(what, values, prompts)
    n_prompts = len(prompts)
    array = np.asarray(values)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or len(array) != n_prompts or array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
        raise InputError(
            f"{what} has shape {np.shape(values)} and type {array.dtype}; expected 0 or 1 for each of {n_prompts} "
            "prompts, or [prompt, sample]."
        )
    return array.astype(np.float64)


def _endings(what: str, right: Floats, classes: Any) -> NDArray[np.int64]:
    given = np.full(right.shape, "answer") if classes is None else np.asarray(classes).astype(np.str_)
    given = given[:, None] if given.ndim == 1 else given
    if given.shape != right.shape:
        raise InputError(f"format_class of {what} has shape {given.shape}; expected {right.shape}, as of its answers.")
    return ending_of(right.astype(bool), given)


def _divergence(arm: str, divergences: Mapping[str, Any] | None, prompts: NDArray[np.str_]) -> Floats:
    values = (divergences or {}).get(arm, np.full(len(prompts), np.nan))
    check_rows(f"kl_to_other of {arm!r}", values, prompts)
    row = np.asarray(values, dtype=np.float64)
    if row.shape != prompts.shape:
        raise InputError(
            f"kl_to_other of {arm!r} has shape {row.shape}; expected one number a prompt, {prompts.shape}."
        )
    return _nats(f"kl_to_other of {arm!r}", row)


def _nats(what: str, values: Any) -> Floats:
    """Divergences that can be, NaN where none was measured."""
    nats = np.asarray(values, dtype=np.float64)
    wrong = nats[(nats < -ROUNDING) | np.isinf(nats)]
    if len(wrong):
        raise InputError(
            f"{what} has the value {wrong[0]:g}; expected nats, finite and not below 0: take the divergence over whole "
            "next-token distributions (an estimate from sampled tokens can be negative), NaN where there is none."
        )
    return nats.clip(min=0)
