"""Records of a study's stages, of the declared types whoever wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from rlgen_stats.schemas.errors import StoreCorruptError
from rlgen_stats.stores.atomic import read_object

Times = Annotated[int, Field(ge=1)]


class _Identity(TypedDict):
    stage: str
    study_id: str
    key: str


class _Record(_Identity, total=False):
    finished: bool
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    earlier: list[str]
    needs: dict[str, str]
    stores: dict[str, list[str]]
    dictionaries: dict[str, str]
    forced: Times
    facts: dict[str, Any]


_RECORD: Final = TypeAdapter(_Record)
_TIMES: Final = TypeAdapter(dict[str, Times])


def read_record(file: Path) -> dict[str, Any]:
    """What the last run of a stage left.

    Raises
    ------
    StoreCorruptError
        If the file is not JSON, or a value is missing or of another type.
    """
    return _checked(file, _RECORD)


def read_times_forced(file: Path) -> dict[str, int]:
    """Stage -> how often it was forced to run anew; errors as :func:`read_record`."""
    return _checked(file, _TIMES)


def _checked(file: Path, expected: TypeAdapter[Any]) -> dict[str, Any]:
    found = read_object(file)
    try:
        expected.validate_python(found, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise StoreCorruptError(
            f"{file}: {where}: {first['msg'].lower()}; restore it or delete it and run again."
        ) from error
    return found
