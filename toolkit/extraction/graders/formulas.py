"""Formulas compared by value, by math-verify; what it misreads is prepared before and checked after.

Imports neither arrays nor torch: a process of its own, which runs this, starts in a second or two.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any, Final

import sympy
from math_verify import parse, verify
from math_verify.errors import TimeoutException
from math_verify.utils import timeout

from rlgen_stats.toolkit.extraction.graders.formulas_apart import alarms_reach_this_thread, serve
from rlgen_stats.toolkit.extraction.graders.normal_forms import ANNOUNCED, hyphens, words

TIMEOUT: Final = 5
"""Seconds for parsing and comparing one formula; a few take minutes to simplify."""
LOGGED: Final = 120
"""Characters of a message of math-verify."""
ROUNDING: Final = 1e-5
"""Largest relative difference of a decimal fraction from the value it stands for; math-verify rounds to six decimals,
by which all numbers below a millionth are equal."""

_BOX: Final = re.compile(r"\\(?:boxed|fbox)\s*\{")
_MARKS: Final = re.compile(r"\\q?quad|\\text|\\[\[\](),;!]|[\s${}]")
"""What may stand between the boxes of one list beside a comma, and, or."""
_SPACED: Final = re.compile(r"(?<=[\d,])(?:\\[,!]|\{,\})+(?=\d)")
"""Thin spaces of LaTeX between digits, and the comma in braces: 32,\\!348, 5\\,600, 5{,}600."""
_END: Final = re.compile(r"(?<=\d)\.(?=[\s*]|$)")
"""A full stop after a number, which math-verify reads as a decimal point."""
_IN_WORDS: Final = re.compile(r"(?:\\text\{)?\(?(?P<words>[^\W\d_]+(?: [^\W\d_]+)*)\)?\}?")
"""An expected answer that is said in a sentence as it stands: carbon dioxide, (B), \\text{Evelyn}."""
_BASE: Final = re.compile(r"(?P<digits>[0-9A-Za-z.]+)_\{?(?P<base>\d+)\}?")


def _shorten(record: logging.LogRecord) -> bool:
    """Cut a message to a line's length; math-verify logs the whole text of which the time ran out."""
    message = record.getMessage()
    if len(message) > LOGGED:
        record.msg, record.args = f"{message[:LOGGED]}…", ()
    return True


logging.getLogger("math_verify.parser").addFilter(_shorten)


def judged(text: str, answer: str) -> bool | None:
    """Whether the last box, a final answer said after it, or without both the last formula equals the answer.

    None where there is no formula; without a time limit where alarms do not reach this thread.
    """
    box = last_box(text)
    if box is None and (in_words := _IN_WORDS.fullmatch(answer.strip())):
        given_last = _said_at_end(text)
        if in_words["words"] in given_last and words(given_last) == words(in_words["words"]):
            return True
    said = text.casefold().rfind("final answer is")
    given = _parse(prepared(text[said:])) if said > text.rfind("boxed{") else ()
    given = given or (_parse(prepared(text)) if box is None else read_formula(box))
    if not given:
        return None
    expected = read_formula(answer)
    bases = [_BASE.fullmatch(formula.strip("$ ")) for formula in (box or "", answer)]
    if bases[0] and bases[1] and bases[0].groups() != bases[1].groups():
        return False
    limit = _time_limit()
    equal = bool(expected) and bool(verify(list(expected), list(given), timeout_seconds=limit))
    return equal and not _equal_by_rounding_only(expected[0], given[0], limit)


def _said_at_end(text: str) -> str:
    """The answer that a text announces with its last words, or the text itself."""
    ends = [match["given"] for match in ANNOUNCED.finditer(text) if match.end() == len(text.rstrip())]
    return ends[-1] if ends else text


def last_box(text: str) -> str | None:
    """Content of the last complete box of LaTeX, or of the last boxes where they are one list; None without one."""
    contents: list[str] = []
    following, closing = len(text), _closing_braces(text)
    for match in reversed(list(_BOX.finditer(text))):
        end = closing.get(match.end() - 1)
        if end is None:
            continue
        if contents and not re.fullmatch(",|,?and|,?or", _MARKS.sub("", text[end + 1 : following])):
            break
        contents.insert(0, text[match.end() : end])
        following = match.start()
    return ", ".join(dict.fromkeys(contents)) if contents else None


def _closing_braces(text: str) -> dict[int, int]:
    """Where each brace that is closed opens -> where it closes; in one pass, as completions may open thousands."""
    opened: list[int] = []
    closing: dict[int, int] = {}
    for brace in re.finditer(r"[{}]", text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif opened:
            closing[opened.pop()] = brace.start()
    return closing


def prepared(text: str) -> str:
    """Text as math-verify reads it rightly: signs, currency, spaces in numbers and full stops after them."""
    return _END.sub(",", _SPACED.sub("", hyphens(text).replace("\\$", "")))


@lru_cache(maxsize=1 << 16)  # an answer is compared with every model's and sample's completion
def read_formula(formula: str) -> tuple[Any, ...]:
    """Forms of a text that is one formula, an expected answer or a box; empty if it cannot be read."""
    inside = prepared(last_box(formula) or formula).rstrip(", ")
    if inside.count("$") == 1:  # a currency, not a delimiter
        inside = inside.replace("$", "")
    return _parse(inside if "$" in inside else f"${inside}$") or _parse(inside)


def _parse(text: str) -> tuple[Any, ...]:
    return tuple(parse(text, parsing_timeout=_time_limit()))


def _time_limit() -> int | None:
    return TIMEOUT if alarms_reach_this_thread() else None


def _equal_by_rounding_only(expected: Any, given: Any, limit: int | None) -> bool:
    """Whether two numbers that math-verify calls equal differ: exact ones at all, decimal fractions relatively."""
    if not (isinstance(expected, sympy.Expr) and isinstance(given, sympy.Expr)):
        return False
    if expected.has(sympy.UnevaluatedExpr) or given.has(sympy.UnevaluatedExpr):  # per cent, also equal without the sign
        return False

    def differ() -> bool:
        a, b = expected.doit(), given.doit()
        if not (a.is_number and b.is_number):
            return False
        if a.is_Rational and b.is_Rational:
            return bool(a != b)
        return bool(a != 0 and abs(sympy.N((b - a) / a)) > ROUNDING)

    try:
        return bool(timeout(timeout_seconds=limit)(differ)())
    except (Exception, TimeoutException):  # sympy raises what it likes; math-verify's verdict stands
        return False


if __name__ == "__main__":
    serve(judged)
