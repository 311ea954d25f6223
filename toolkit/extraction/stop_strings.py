"""Texts that end completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class StopStrings:
    """Texts that end completions, looked for in the decoded text, since tokens may begin or end inside them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def text(self, ids: Sequence[int]) -> str:
        """Decoded text without special tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def found(self, ids: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether one is in the text by now; decodes its end first, where a character is at most four tokens."""
        if not stop:
            return False
        tail = 4 * max(map(len, stop)) + 4
        return _first(self.text(ids[-tail:]), stop) is not None and _first(self.text(ids), stop) is not None

    def cut(self, ids: list[int], stop: Sequence[str]) -> tuple[list[int], str, bool]:
        """Tokens and text before the first stop string, and whether there is one; a token that it begins in is kept."""
        text = self.text(ids)
        end = _first(text, stop)
        if end is None:
            return ids, text, False
        kept = len(ids)
        while kept > 1 and len(self.text(ids[: kept - 1])) >= end and self.text(ids[: kept - 1]).startswith(text[:end]):
            kept -= 1
        return ids[:kept], text[:end], True


def cut_at_stop(tokenizer: Any, ids: Sequence[int], stop: Sequence[str]) -> tuple[list[int], str, bool]:
    """Tokens and text before the first stop string, as completions end here, and whether there is one."""
    return StopStrings(tokenizer).cut(list(ids), stop)


def _first(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of some strings begins."""
    return min((at for string in stop if (at := text.find(string)) >= 0), default=None)
