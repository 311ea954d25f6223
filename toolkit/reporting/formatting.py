"""Numbers, intervals, p-values and lists the way a person reads them, and values the way JSON knows them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final

from pydantic_core import to_jsonable_python

DASH: Final = "—"
"""Shown where there is no number."""
_WHOLE: Final = 1e6
"""Integers below this are written out."""
_TINY: Final = 1e-3
"""Numbers below this are written with a power of ten."""
_NO_DIVERGENCE: Final = 1e-6
"""Divergences below this, in nats, are rounding."""


def hundred(value: float) -> float:
    """A fraction in percent, without the rounding error of the multiplication."""
    return round(100 * float(value), 10)


def fixed(value: float, digits: int = 1, *, sign: bool = False) -> str:
    """A number with a true minus sign, or a dash; never "-0.0"."""
    if value is None or not math.isfinite(value):
        return DASH
    rounded = round(float(value), digits) + 0.0
    return f"{rounded:{'+' if sign and rounded else ''}.{digits}f}".replace("-", "−")


def percent(value: float, digits: int = 1) -> str:
    """A fraction in percent."""
    return DASH if value is None or not math.isfinite(value) else f"{fixed(100 * value, digits)}%"


def points(value: float, digits: int = 1) -> str:
    """A difference of fractions in signed percentage points."""
    return DASH if value is None or not math.isfinite(value) else f"{fixed(100 * value, digits, sign=True)} pts"


def interval(low: float, high: float, digits: int = 1, *, scale: float = 1.0, sign: bool = False) -> str:
    """``[low, high]``; open where an end is missing, a dash where both are."""
    if not math.isfinite(low) and not math.isfinite(high):
        return DASH
    if not math.isfinite(high):
        return f"at least {fixed(scale * low, digits)}"
    return f"[{fixed(scale * low, digits, sign=sign)}, {fixed(scale * high, digits, sign=sign)}]"


def p_text(p: float) -> str:
    """A p-value with three or four decimals, or as a power of ten below 0.0001."""
    if p is None or not math.isfinite(p):
        return DASH
    if p < 1e-4:
        exponent = math.floor(math.log10(p)) if p > 0 else None
        return "0" if exponent is None else f"{p / 10**exponent:.1f}×10{_superscript(exponent)}"
    return f"{p:.4f}" if p < 0.001 else f"{p:.3f}"


def compact(value: float) -> str:
    """A number of unknown size: integers in full, others with three significant digits."""
    if value is None or not math.isfinite(value):
        return DASH
    whole = float(value).is_integer() and abs(value) < _WHOLE
    if 0 < abs(value) < _TINY:
        exponent = math.floor(math.log10(abs(value)))
        return f"{value / 10.0**exponent:.1f}×10{_superscript(exponent)}".replace("-", "−")
    return (f"{value:.0f}" if whole else f"{value:#.3g}").replace("-", "−")


def nats(value: float) -> str:
    """A divergence; one that is only the rounding error of an exact zero is shown as below 10⁻⁶."""
    return f"<10{_superscript(-6)}" if 0 < abs(value) < _NO_DIVERGENCE else compact(value)


def count(value: float, noun: str) -> str:
    """``3 features``, ``1 feature``."""
    shown = f"{int(value):,}" if value is not None and math.isfinite(value) else DASH
    return f"{shown} {noun}" if shown == "1" else f"{shown} {noun}s"


def count_span(counts: Iterable[int]) -> str:
    """``12``, or ``12 to 15``."""
    low, high = min(counts := list(counts)), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def listed(items: Iterable[str]) -> str:
    """``a, b and c``."""
    words = list(items)
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _superscript(value: int) -> str:
    return str(value).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def jsonable(value: Any) -> Any:
    """``value`` as JSON knows it: numpy arrays and scalars unwrapped, NaN and infinities null, text keys."""
    return to_jsonable_python(value, inf_nan_mode="null", fallback=lambda item: item.tolist())
