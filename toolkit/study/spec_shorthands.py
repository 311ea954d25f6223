"""What study.yaml may leave to be filled in from the folders it names: lists of checkpoints, and layers by depth."""

from __future__ import annotations

import glob
import re
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Final

from rlgen_stats.schemas.errors import RlgenStatsError, SpecError
from rlgen_stats.stores import StudyFolder, read_json
from rlgen_stats.stores.hub import hub_folder, is_on_hub, locate_checkpoint

MIDDLE: Final = "middle"
_DEPTHS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Names under which configs say how many decoder blocks a model has."""


def fill_in(raw: dict[str, Any], folder: StudyFolder) -> dict[str, Any]:
    """A study's mapping with its shorthands written out; anything malformed is left for the checks of the spec.

    ``runs[].checkpoints`` may be a pattern of folders with ``*``, whose number is the step; ``extraction.layer`` and
    entries of ``extraction.layers`` may be ``middle`` or a fraction of the depth: the fraction f of n blocks is block
    floor(f n), counted from 0.

    Raises
    ------
    SpecError
        If a pattern matches nothing, or folders without one number each, or base's depth is not known.
    ModelError
        If a pattern or base is on the Hub and the Hub does not give it.
    """
    runs = raw.get("runs")
    if isinstance(runs, list):
        raw = raw | {"runs": [_fill_in_run(run, folder) if isinstance(run, dict) else run for run in runs]}
    base = raw.get("base")
    path = base.get("path") if isinstance(base, dict) else None
    if isinstance(path, str) and _relative_layers(raw):
        depth, extraction = _depth(path, folder), raw["extraction"]
        layers = extraction.get("layers")
        numbers = {"layers": [_block(one, depth) for one in layers]} if isinstance(layers, list) else {}
        numbers |= {"layer": _block(extraction["layer"], depth)} if "layer" in extraction else {}
        raw = raw | {"extraction": extraction | numbers}
    return raw


def shorthands(raw: dict[str, Any]) -> list[str]:
    """Keys of a study's mapping that :func:`fill_in` writes out, such as ``runs.0.checkpoints``."""
    runs = raw.get("runs")
    patterns = [
        f"runs.{number}.checkpoints"
        for number, run in enumerate(runs if isinstance(runs, list) else [])
        if isinstance(run, dict) and isinstance(run.get("checkpoints"), str)
    ]
    return [*patterns, *_relative_layers(raw)]


def _relative_layers(raw: dict[str, Any]) -> list[str]:
    """Keys of the layers that are given by depth, such as ``extraction.layers.0``."""
    extraction = raw.get("extraction")
    given = extraction if isinstance(extraction, dict) else {}
    layers = given.get("layers")
    entries = {f"extraction.layers.{n}": one for n, one in enumerate(layers if isinstance(layers, list) else [])}
    entries["extraction.layer"] = given.get("layer")
    return [key for key, layer in entries.items() if _share_of_depth(layer) is not None]


def existing(path: str, name: str, folder: StudyFolder) -> Path:
    """The file or folder that the key ``name`` of study.yaml names.

    Raises
    ------
    SpecError
        If there is none.
    """
    full = folder.resolve(path)
    if not path.strip():
        raise SpecError(f"'{name}' is empty in {folder.spec}; name a file or folder.")
    if not full.exists():
        hub = f", or write hf://{path} for the model of the Hub" if re.fullmatch(r"[\w.-]+/[\w.-]+", path) else ""
        raise SpecError(f"'{name}' names {full}, which does not exist; correct it in {folder.spec}{hub}.")
    return full


def _share_of_depth(layer: Any) -> float | None:
    """The fraction of the depth that a layer is given as; None of a block's number, or of anything malformed."""
    if layer == MIDDLE:
        return 0.5
    return layer if isinstance(layer, float) and 0 < layer < 1 else None


def _block(layer: Any, depth: int) -> Any:
    share = _share_of_depth(layer)
    return layer if share is None else int(share * depth)


def _fill_in_run(run: dict[str, Any], folder: StudyFolder) -> dict[str, Any]:
    pattern = run.get("checkpoints")
    return run | {"checkpoints": _matching(pattern, folder)} if isinstance(pattern, str) else run


def _matching(pattern: str, folder: StudyFolder) -> dict[int, str]:
    """Step -> folder of all folders that a pattern with ``*`` matches; step 0 is base and left out."""
    if "*" not in pattern:
        raise SpecError(
            f"checkpoints {pattern!r} has no '*'; expected a pattern such as runs/rl/global_step_*/hf, or a mapping of "
            "step to folder."
        )
    star = re.compile("([^/]*)".join(map(re.escape, re.split(r"\*+", pattern.rstrip("/")))))
    steps: dict[int, str] = {}
    for path in _candidates(pattern, folder):
        match = star.fullmatch(path)
        if match is None:
            continue
        numbers = re.findall(r"\d+", " ".join(match.groups()))
        if len(numbers) != 1:
            raise SpecError(
                f"checkpoints {pattern!r} matches {path}, where '*' stands for {', '.join(map(repr, match.groups()))} "
                "and not for one number, the step; write more of the name into the pattern, or map steps to folders."
            )
        step = int(numbers[0])
        if step in steps:
            raise SpecError(
                f"checkpoints {pattern!r} matches {steps[step]} and {path} for step {step}; write more of the name."
            )
        steps[step] = path
    if not steps.keys() - {0}:
        raise SpecError(f"checkpoints {pattern!r} matches no folder of {folder.spec.parent}; correct the pattern.")
    return {step: steps[step] for step in sorted(steps) if step}


def _candidates(pattern: str, folder: StudyFolder) -> list[str]:
    if not is_on_hub(pattern):
        paths = glob.glob(pattern.rstrip("/"), root_dir=folder.spec.parent)
        return sorted(PurePath(path).as_posix() for path in paths if folder.resolve(path).is_dir())
    repository = "/".join(pattern.split("/")[:4])
    files = map(PurePosixPath, hub_folder(repository, folder).files)
    return sorted({f"{repository}/{parent}" for file in files for parent in file.parents if parent.name})


def _depth(base: str, folder: StudyFolder) -> int:
    """Number of decoder blocks, from base's config.json."""
    on_hub = is_on_hub(base)
    place = locate_checkpoint(base, folder) if on_hub else existing(base, "base.path", folder)
    file = place / "config.json"
    try:
        config = read_json(file)
        config = config.get("text_config") or config
        found = next((config[name] for name in _DEPTHS if name in config), None)
    except (OSError, AttributeError, RlgenStatsError) as error:
        raise SpecError(
            f"extraction.layer is relative to base's depth, but {file} cannot be read ({error}); correct base.path."
        ) from error
    if not isinstance(found, int):
        raise SpecError(
            f"extraction.layer is relative to base's depth, but {file} has none of {', '.join(_DEPTHS)}; write the "
            "number of the block."
        )
    return found
