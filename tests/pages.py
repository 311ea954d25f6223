"""Pages whose Python runs as it stands: all blocks of a page, in order, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """Line before each Python block, and its code."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


def run_page(page: Path) -> dict[str, Any]:
    """What is defined in the end; a traceback names the page and its line."""
    names: dict[str, Any] = {}
    for line, code in python_blocks(page):
        exec(compile("\n" * line + code, str(page), "exec"), names)
    return names
