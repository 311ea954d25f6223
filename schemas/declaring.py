"""Building blocks of layouts: variables with dimensions and kinds, and what several datasets share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from rlgen_stats.schemas.dims import ARM, CLUSTER, DOMAIN, MODEL, PROMPT, RUN, SPLIT, STEP, TASK

PROVENANCE_ATTRS: Final = ("schema_version", "study_id", "spec_hash", "provenance")
"""Attributes every store carries: layout version, study, hash of the inputs, versions and seeds (JSON)."""

TEST_ATTRS: Final = ("test", "null", "unit", "family", "family_size", "seed", "alpha")
"""Attributes every table of p-values carries."""


@dataclass(frozen=True)
class Variable:
    """A variable: its dimensions in order and its kind (float, int, bool, str, or number: float or its bits)."""

    dims: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class Layout:
    """What one dataset must contain; extra variables and coordinates are allowed."""

    name: str
    variables: dict[str, Variable]
    coords: dict[str, Variable] = field(default_factory=dict)
    attrs: tuple[str, ...] = ()
    where: str = "results.zarr/{name}"
    """Place in a study; ``{name}`` is the layout's name."""
    optional: dict[str, Variable] = field(default_factory=dict)
    """Variables that may be absent; present ones follow the declaration."""


def variables_on(dims: str, **kinds: str) -> dict[str, Variable]:
    """Variables that share the dimensions named in ``dims`` (space separated)."""
    return {name: Variable(tuple(dims.split()), kind) for name, kind in kinds.items()}


MODEL_COORDS: Final = variables_on(MODEL, **{MODEL: "str", RUN: "str", STEP: "int", ARM: "str"})
PROMPT_COORDS: Final = variables_on(PROMPT, **{PROMPT: "str", TASK: "str", DOMAIN: "str", SPLIT: "str", CLUSTER: "str"})
TEST_VARIABLES: Final = {
    "statistic": "float",
    "effect": "float",
    "effect_low": "float",
    "effect_high": "float",
    "p_value": "float",
    "q_value": "float",
    "n": "int",
    "flag": "str",
}
