"""Settings that a stage must refuse, found in the spec before the first stage runs instead of hours later."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from rlgen_stats.schemas.errors import SpecError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.study.stage_graph import Stage


def check_stages(spec: StudySpec, stages: Iterable[Stage]) -> None:
    """Refuse a spec for which one of these stages must fail.

    The spec alone does not refuse these settings, because a study may stop before such a stage: one checkpoint per run
    is enough for drift.

    Raises
    ------
    SpecError
        Naming the stage, what it expects, what the spec says, and the fix.
    """
    for problem in stage_problems(spec, stages):
        raise SpecError(problem)


def stage_problems(spec: StudySpec, stages: Iterable[Stage]) -> list[str]:
    """Everything that :func:`check_stages` would refuse, one sentence each."""
    found = ((stage, check(spec)) for stage in stages for check in _CHECKS.get(stage.name, ()))
    return [f"the {stage.name} stage {problem}" for stage, problem in found if problem]


def _check_scale(spec: StudySpec) -> str:
    primary = spec.primary_crosscoder
    if primary.readout != "joint":
        return ""
    return (
        "compares different features and expects readout 'swap', 'fit' or 'own', got 'joint', whose scale differs from "
        f"model to model; change the readout of crosscoder {primary.name!r}."
    )


def _check_checkpoints(spec: StudySpec) -> str:
    for run in (run for run in spec.runs if not run.is_floor):
        trained_here = run.method != "checkpoints"
        n_checkpoints = run.n_checkpoints if trained_here else len(run.checkpoints)
        if n_checkpoints < 2:
            return (
                f"follows runs over their checkpoints and expects at least two, got {n_checkpoints} of run "
                f"{run.name!r}; {'raise its n_checkpoints' if trained_here else 'list more of its checkpoints'}."
            )
    return ""


def _check_pair(spec: StudySpec) -> str:
    if any(len(crosscoder.views) == 2 for crosscoder in spec.crosscoders):
        return ""
    return (
        "attributes features by the decoder norms of two models and expects a crosscoder with exactly two views, got "
        f"{', '.join(f'{c.name} with {len(c.views)}' for c in spec.crosscoders)}; add crosscoders with views "
        "[base@0, RUN@final] and [base@0, base@halves]."
    )


_CHECKS: Final[dict[str, tuple[Callable[[StudySpec], str], ...]]] = {
    "align": (_check_pair,),
    "stabilize": (_check_scale, _check_checkpoints),
    "select": (_check_scale,),
}
"""Stage -> checks; each returns the end of a sentence, or nothing where the stage can run."""
