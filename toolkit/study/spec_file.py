"""Reading and writing study.yaml, with errors a person can act on."""

from __future__ import annotations

import difflib
import types
import typing
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel, ValidationError

from rlgen_stats.schemas.errors import SpecError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder, replacing
from rlgen_stats.toolkit.study.spec_shorthands import fill_in
from rlgen_stats.toolkit.study.strict_yaml import YamlError, load_yaml

MAX_BYTES: Final = 16_000_000
"""Size of a study.yaml; hundreds of runs of a thousand checkpoints each take a tenth of it."""
MAX_SHOWN: Final = 600
"""Characters of a value, or of what is wrong with it, that a message shows."""
MAX_PROBLEMS: Final = 50
"""Problems of one study file that are explained."""


def read_spec(path: Path | str) -> StudySpec:
    """The spec of a study folder (or of a study.yaml itself).

    Raises
    ------
    SpecError
        If the file is missing, is not YAML (or such that :func:`load_yaml` refuses it), has an unknown key (the nearest
        valid one is suggested), or a bad value.
    ModelError
        If the folders that it leaves open (see :func:`fill_in`) are on the Hub and the Hub does not give them.
    """
    file, raw = read_mapping(path)
    return parse_spec(fill_in(raw, StudyFolder(file.parent)), where=str(file))


def read_mapping(path: Path | str) -> tuple[Path, dict[str, Any]]:
    """File and content of a study.yaml, not validated; see :func:`read_spec` for the errors."""
    path = Path(path)
    file = path if path.suffix in (".yaml", ".yml") else StudyFolder(path).spec
    if not file.is_file():  # nor read a pipe or a device, which may never end
        raise SpecError(
            f"no study file at {file}; expected a study.yaml: write one with 'rlgen-stats init {file.parent}'."
        )
    if file.stat().st_size > MAX_BYTES:
        raise SpecError(
            f"{file} has {file.stat().st_size:,} bytes, expected a study file of at most {MAX_BYTES:,}; tables go into "
            "files of their own."
        )
    try:
        raw = load_yaml(file.read_text(encoding="utf-8"))
    except YamlError as error:
        raise SpecError(f"{file} {error}.") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{file} is not valid YAML: {error}.") from error
    if not isinstance(raw, dict):
        raise SpecError(f"{file} must be a mapping of keys to values, got {type(raw).__name__}.")
    return file, raw


def parse_spec(raw: dict[str, Any], *, where: str = "the study") -> StudySpec:
    """Validate a mapping as a study spec; see :func:`read_spec` for the errors."""
    try:
        return StudySpec.model_validate(raw)
    except ValidationError as error:
        more = f" (and {error.error_count() - 1} more problem{'s' * (error.error_count() > 2)})"
        first = _explain(dict(error.errors()[0]))
        raise SpecError(f"{where}: {first}{more * (error.error_count() > 1)}") from error


def spec_problems(raw: dict[str, Any]) -> list[str]:
    """Everything that :func:`parse_spec` would refuse, one sentence each; nothing of a valid study."""
    try:
        StudySpec.model_validate(raw)
    except ValidationError as error:
        return _explain_all(error)
    return []


def _explain_all(error: ValidationError) -> list[str]:
    problems = error.errors()
    left_out = [f"{len(problems) - MAX_PROBLEMS:,} more problems like these."] if len(problems) > MAX_PROBLEMS else []
    return [_explain(dict(problem)) for problem in problems[:MAX_PROBLEMS]] + left_out


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
    message = message.replace("a valid tuple", "a list").replace("a valid dictionary", "a mapping")  # YAML's words
    got = problem.get("input")
    shown = (
        "" if isinstance(got, dict | list | tuple) or problem["type"] == "value_error" else f", got {_short(repr(got))}"
    )
    return f"'{_short(place)}': {_short(message[:1].lower() + message[1:])}{shown}."


def _short(text: str) -> str:
    """A text, or its beginning where it is longer than a few sentences."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


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
    given_twice = {"extraction": {"layer"}} if spec.extraction.layers else None
    text = yaml.safe_dump(spec.model_dump(mode="json", exclude=given_twice), sort_keys=False, allow_unicode=True)
    with replacing(folder.spec) as temporary:
        temporary.write_text(text, encoding="utf-8")
