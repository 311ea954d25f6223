"""Views that are base itself: a crosscoder of base with one of them shows what no difference looks like."""

from __future__ import annotations

from typing import Final

from rlgen_stats.schemas.dims import BASE_MODEL, BASE_RUN, model_id, split_model_id

REPEAT_MODEL: Final = model_id(f"{BASE_RUN}.repeat", 0)
"""Base read a second time in other batches: numerical noise alone."""
HALVES_MODEL: Final = model_id(f"{BASE_RUN}.halves", 0)
"""Base again, where each of the two views is trained on half of the prompts: what a sample of texts decides."""
_NOISE: Final = ".noise"
BASE_VIEWS: Final = {BASE_MODEL: BASE_MODEL, "base@repeat": REPEAT_MODEL, "base@halves": HALVES_MODEL}
"""View of study.yaml -> model id, where no checkpoint of a run is needed to tell."""


def noise_model(model: str) -> str:
    """Label of base with noise on every token as large as ``model``'s distance from base there.

    Examples
    --------
    >>> noise_model("rl@80")
    'rl.noise@80'
    """
    run, step = split_model_id(model)
    return model_id(run + _NOISE, step)


def noise_source(model: str) -> str | None:
    """The model whose distance from base a label of :func:`noise_model` stands for; None for other labels."""
    run, step = split_model_id(model)
    return model_id(run.removesuffix(_NOISE), step) if run.endswith(_NOISE) else None


def floor_name(model: str) -> str | None:
    """What a crosscoder of base with this view is the floor of, in words; None if it is a model of its own.

    Examples
    --------
    >>> floor_name("rl.noise@80"), floor_name("rl@80")
    ('noise as large as the shift of rl@80', None)
    """
    source = noise_source(model)
    if source is not None:
        return f"noise as large as the shift of {source}"
    return {REPEAT_MODEL: "base read again", HALVES_MODEL: "disjoint halves of the prompts"}.get(model)


def floor_run_name(model: str) -> str:
    """What a crosscoder of base with a checkpoint of a floor run is the floor of, in words."""
    return f"the floor run {model}"


def is_reserved(run: str) -> bool:
    """Whether a run of this name could be mistaken for one of these views."""
    return run.endswith(_NOISE) or any(split_model_id(model)[0] == run for model in BASE_VIEWS.values())
