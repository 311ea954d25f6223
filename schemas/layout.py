"""Declared layout of every dataset: dimensions, types, labels, required attributes.

Writers and openers call :func:`validate`, which alone decides whether a store is well formed.
The groups of ``results.zarr`` are declared in ``result_layouts``.
"""

from __future__ import annotations

from typing import Any, Final

import xarray as xr

from rlgen_stats.schemas.declaring import MODEL_COORDS, PROMPT_COORDS, PROVENANCE_ATTRS, Layout, Variable, variables_on
from rlgen_stats.schemas.dims import (
    CHANNEL,
    CLUSTER,
    DOMAIN,
    FEATURE,
    MODEL,
    POSITION,
    PROMPT,
    SAMPLE,
    SEGMENT,
    SOURCE,
    SPAN,
    SPLIT,
    TASK,
    TOKEN,
    TOKEN_ID,
    VIEW,
)
from rlgen_stats.schemas.errors import InputError, StoreError
from rlgen_stats.schemas.result_layouts import RESULTS

LAYOUT_VERSION: Final = 2
"""2 (2026-11): activations keep one flat file a shard, commit records carry its checksum, runs of equal labels are
listed in ``spans``, and every group has a digest. 1: the first layout; ``rlgen-stats migrate`` raises it."""

_KINDS: Final = {"float": "f", "int": "iu", "bool": "b", "str": "UOT", "number": "fu"}


ACTIVATION_ATTRS: Final = (*PROVENANCE_ATTRS, "n_tokens", "shard_tokens", "text_mode", "labels_hash")
"""Attributes of the root of an activation store."""

LAYOUTS: Final = {
    layout.name: layout
    for layout in (
        # -- activations.zarr: labels of the tokens, once for all models ---------------------------------------------
        Layout(
            "tokens",
            variables_on(TOKEN, **{PROMPT: "int", SOURCE: "int", POSITION: "int", TOKEN_ID: "int", SEGMENT: "int"}),
            where="activations.zarr/tokens",
        ),
        Layout(
            "prompts",
            {},
            variables_on(PROMPT, **{PROMPT: "str", TASK: "str", DOMAIN: "str", SPLIT: "str", CLUSTER: "str"}),
            where="activations.zarr/prompts",
        ),
        Layout(  # runs of tokens that share prompt, source and segment; start is the first token
            "spans",
            variables_on(SPAN, start="int", **{PROMPT: "int", SOURCE: "int", SEGMENT: "int"}),
            attrs=("sources", "segments"),
            where="activations.zarr/spans",
        ),
        Layout(  # bfloat16 is kept as its bits in uint16, attribute bits_of; committed: tokens and crc32c of each shard
            "activation",
            {"activation": Variable((TOKEN, CHANNEL), "number"), "committed": Variable(("shard", "record"), "int")},
            attrs=("model", "site", "complete"),
            where="activations.zarr/<model>/<site>",
        ),
        Layout(
            "outcomes",
            variables_on(f"{MODEL} {PROMPT} {SAMPLE}", correct="int", completion_tokens="int", format_class="str")
            | variables_on(f"{MODEL} {PROMPT}", greedy_correct="int", greedy_tokens="int", greedy_class="str"),
            MODEL_COORDS | PROMPT_COORDS,
            PROVENANCE_ATTRS,
            where="outcomes.zarr",
            optional=variables_on(f"{MODEL} {PROMPT} {SAMPLE}", terminated="bool", answered="bool")
            | variables_on(f"{MODEL} {PROMPT}", greedy_terminated="bool", greedy_answered="bool")
            | variables_on(MODEL, engine="str", graded_by="str", stand_in="str"),  # where models were imported
        ),
        Layout(
            "features",
            variables_on(f"{MODEL} {PROMPT} {FEATURE}", mean="float", firing="float", max="float")
            | variables_on(f"{MODEL} {PROMPT}", n_tokens="int")
            | variables_on(f"{MODEL}", fve="float")
            | variables_on(f"{VIEW} {FEATURE}", decoder_norm="float"),
            MODEL_COORDS | PROMPT_COORDS,
            (*PROVENANCE_ATTRS, "readout", "text_mode", "crosscoder", "scale"),
            where="features.zarr",
            optional=variables_on(f"{MODEL} {PROMPT} {FEATURE} bin", histogram="int"),
        ),
        *RESULTS,
    )
}

RESULT_GROUPS: Final = tuple(name for name, layout in LAYOUTS.items() if layout.where.startswith("results.zarr"))
"""Analyses with a declared layout, groups of results.zarr."""


def validate(dataset: xr.Dataset, name: str) -> xr.Dataset:
    """Return ``dataset`` if it has the declared layout ``name``.

    Raises
    ------
    StoreError
        Naming every missing variable, wrong dimension or kind, and missing attribute. Values are not read.
    """
    layout = LAYOUTS[name]
    extra = {variable: spec for variable, spec in layout.optional.items() if variable in dataset.data_vars}
    problems = [
        problem
        for declared, present in ((layout.variables | extra, dataset.data_vars), (layout.coords, dataset.coords))
        for variable, spec in declared.items()
        if (problem := _problem(variable, spec, present.get(variable)))
    ]
    problems += [f"attribute {attr!r} is missing" for attr in layout.attrs if attr not in dataset.attrs]
    if problems:
        raise StoreError(f"not a {name!r} dataset of layout version {LAYOUT_VERSION}: {'; '.join(problems)}.")
    return dataset


def _problem(name: str, spec: Variable, array: xr.DataArray | None) -> str | None:
    if array is None:
        return f"variable {name!r} with dimensions {spec.dims} is missing"
    if tuple(array.dims) != spec.dims:
        return f"variable {name!r} has dimensions {tuple(array.dims)}, expected {spec.dims}"
    if array.dtype.kind not in _KINDS[spec.kind]:
        return f"variable {name!r} has type {array.dtype}, expected {spec.kind}"
    return None


def layout_document(name: str) -> dict[str, Any]:
    """A declared layout as JSON values, for readers that do not use this package.

    Raises
    ------
    InputError
        If no layout has this name; the message lists them.
    """
    if name not in LAYOUTS:
        raise InputError(f"no layout is called {name!r}; the layouts are {', '.join(LAYOUTS)}.")
    layout = LAYOUTS[name]
    groups = {"variables": layout.variables, "optional_variables": layout.optional, "coordinates": layout.coords}
    return {
        "name": name,
        "version": LAYOUT_VERSION,
        "where": layout.where.format(name=name),
        **{
            group: {
                variable: {"dims": list(spec.dims), "kind": spec.kind, "numpy_kinds": list(_KINDS[spec.kind])}
                for variable, spec in variables.items()
            }
            for group, variables in groups.items()
        },
        "attributes": list(layout.attrs),
        "extra": "further variables, coordinates and attributes are allowed",
    }
