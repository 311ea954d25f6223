"""Reading and writing study.yaml, with errors a person can act on."""

from __future__ import annotations

import difflib
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rlgen_stats.schemas.errors import SpecError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder, replacing
from rlgen_stats.toolkit.study.spec_shorthands import fill_in


def read_spec(path: Path | str) -> StudySpec:
    """The spec of a study folder (or of a study.yaml itself).

    Raises
    ------
    SpecError
        If the file is missing, is not YAML, has an unknown key (the nearest valid one is suggested), or a bad value.
    ModelError
        If the folders that it leaves open (see :func:`fill_in`) are on the Hub and the Hub does not give them.
    """
    path = Path(path)
    file = path if path.suffix in (".yaml", ".yml") else StudyFolder(path).spec
    if not file.exists():
        raise SpecError(
            f"no study file at {file}; expected a study.yaml: write one with 'rlgen-stats init {file.parent}'."
        )
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{file} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(raw, dict):
        raise SpecError(f"{file} must be a mapping of keys to values, got {type(raw).__name__}.")
    return parse_spec(fill_in(raw, StudyFolder(file.parent)), where=str(file))


def parse_spec(raw: dict[str, Any], *, where: str = "the study") -> StudySpec:
    """Validate a mapping as a study spec; see :func:`read_spec` for the errors."""
    try:
        return StudySpec.model_validate(raw)
    except ValidationError as error:
        problems = [_explain(dict(problem)) for problem in error.errors()]
        more = f" (and {len(problems) - 1} more problem{'s' * (len(problems) > 2)})" if len(problems) > 1 else ""
        raise SpecError(f"{where}: {problems[0]}{more}") from error


def _explain(problem: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in problem["loc"]) or "study"
    if problem["type"] == "extra_forbidden":
        known = _fields_at(problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}."
        return f"unknown key '{place}'; {hint}"
    if problem["type"] == "missing":
        return f"'{place}' is required and missing."
    message = str(problem["msg"]).removeprefix("Value error, ").rstrip(".")
    got = problem.get("input")
    shown = "" if isinstance(got, dict | list | tuple) or problem["type"] == "value_error" else f", got {got!r}"
    return f"'{place}': {message[:1].lower() + message[1:]}{shown}."


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    """Valid keys of the section that ``location`` points to."""
    section: type[BaseModel] = StudySpec
    for part in location:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(str(part))
        inner = _section_of(field.annotation) if field is not None else None
        if inner is None:
            break
        section = inner
    return sorted(section.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (tuple, list, typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            if (section := _section_of(argument)) is not None:
                return section
    return None


def write_spec(folder: StudyFolder, spec: StudySpec) -> None:
    """Write study.yaml; a file with the same content is left alone.

    Raises
    ------
    SpecError
        If the folder already has another study; it is not overwritten.
    """
    if folder.spec.exists():
        if read_spec(folder.spec) != spec:
            raise SpecError(
                f"{folder.spec} already describes another study; use another folder, or remove that one to start again."
            )
        return
    text = yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    with replacing(folder.spec) as temporary:
        temporary.write_text(text, encoding="utf-8")
