"""Texts with what does not change an answer taken out."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

ANNOUNCED: Final = re.compile(r"\banswer\W{0,4}(?:\s+is\b|:)\W*(?P<given>.*?)(?=\banswer\b|\n|$)", re.IGNORECASE)
"""An answer announced in a sentence: the answer is ..., Answer: ..."""
_DASHES: Final = {ord(sign): "-" for sign in "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63\uff0d"}
"""Hyphens, dashes and minus signs of typesetting -> the hyphen of the keyboard."""
_GROUPED: Final = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
"""A number with thousands separators; neither a list of numbers with spaces, nor 1,2345."""
_EMPHASIS: Final = "*_`"
_WORD: Final = re.compile(r"(?<!\w)[-+]?\d+(?:[.,:/]\d+)*%?|[^\W_]+|[+<>=°]")
_ARTICLES: Final = frozenset({"a", "an", "the"})


def one_line(text: str) -> str:
    """Text with every run of whitespace as one space, none at the ends."""
    return " ".join(text.split())


def hyphens(text: str) -> str:
    """Text with every kind of hyphen, dash and minus sign as the hyphen of the keyboard."""
    return text.translate(_DASHES)


def ungrouped(text: str) -> str:
    """Text without the thousands separators of its numbers.

    Examples
    --------
    >>> ungrouped("5,600 and 1,234,567.5, but 1,2 and 12,34")
    '5600 and 1234567.5, but 1,2 and 12,34'
    """
    return _GROUPED.sub(lambda number: number[0].replace(",", ""), text)


def bare(text: str) -> str:
    """Text without Markdown emphasis around it, a final full stop, or thousands separators.

    Examples
    --------
    >>> bare("**5,600**."), bare("*")
    ('5600', '*')
    """
    inside = one_line(text).strip(_EMPHASIS + " ")
    inside = inside.removesuffix(".").strip(_EMPHASIS + " ")
    return ungrouped(inside or one_line(text))


def words(text: str) -> tuple[str, ...]:
    """Words and numbers of a text, without case, articles, punctuation and typesetting.

    Examples
    --------
    >>> words("The **x-ray** of \u22125,600 m.") == words("X ray of -5600 m")
    True
    >>> words("A"), words("0.5%")
    (('a',), ('0.5%',))
    """
    plain = (
        hyphens(unicodedata.normalize("NFKC", text).replace("\u2044", "/"))
        .casefold()
        .replace("'", "")
        .replace("\u2019", "")
    )
    found = tuple(ungrouped(word).removeprefix("+") or word for word in _WORD.findall(plain))
    return tuple(word for word in found if word not in _ARTICLES) or found
