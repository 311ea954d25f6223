"""What all sections of the study file have in common."""

from __future__ import annotations

import math
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidatorFunctionWrapHandler, field_validator

LARGEST: Final = 1 << 63
"""Whole numbers beyond it fit into no array."""
PositiveInt = Annotated[int, Field(ge=1)]


class Spec(BaseModel):
    """Base of all spec sections: frozen, unknown keys forbidden, numbers read as they are written."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*", mode="wrap")
    @classmethod
    def _as_written(cls, value: Any, read: ValidatorFunctionWrapHandler) -> Any:
        result = read(value)
        _check_as_written(value, result)
        return result


def _check_as_written(written: Any, read: Any) -> None:
    """Refuse what pydantic takes for a number or a truth value: true for 1, ' 1_0' for 10; and NaN and infinity."""
    if isinstance(read, bool):
        if not isinstance(written, bool):
            raise ValueError(f"expected true or false, got {written!r}")
    elif isinstance(read, int | float):
        if isinstance(written, bool) or (isinstance(written, str) and written != str(read)):
            raise ValueError(f"expected a number, got {written!r}")
        if isinstance(read, int):
            if abs(read) > LARGEST:
                raise ValueError(f"expected a number of at most 2^63, got {str(written)[:40]}")
        elif not math.isfinite(read):
            raise ValueError(f"expected a finite number, got {written!r}")
    elif isinstance(read, dict) and isinstance(written, dict):
        if len(read) < len(written):  # '1' beside 1
            raise ValueError(f"expected every key once, got {list(written)}")
        for pair in zip(written.items(), read.items(), strict=True):
            _check_as_written(*pair)
    elif isinstance(read, list | tuple) and isinstance(written, list | tuple):
        for one, other in zip(written, read, strict=True):
            _check_as_written(one, other)
