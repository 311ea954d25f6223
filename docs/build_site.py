"""How the site is built: its pages are the repository's, at their own paths, so that links hold here and there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File

PAGES = ("*.md", "docs/**/*", "benchmarks/README.md", "tests/README.md", "tests/mutation/score.md")
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?([\w.]+)`")
log = get_plugin_logger("site")


def heading_id(text: str, separator: str) -> str:
    """Id of a heading as GitHub makes it, so that one link holds in both."""
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", separator)


def on_config(config: Any) -> Any:
    """Give headings the ids that they have on GitHub."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = heading_id
    return config


def on_files(files: Any, config: Any) -> Any:
    """Take pages from the whole repository instead of one folder."""
    root = Path(config.config_file_path).parent
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for path in sorted(path for pattern in PAGES for path in root.glob(pattern)):
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts:
            name = path.relative_to(root).as_posix()
            files.append(File(name, str(root), config.site_dir, config.use_directory_urls))
    return files


class SphinxRoles(griffe.Extension):
    """Turn ``:func:`name``` into a link where the target is on the site; a name that does not exist is an error."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite all docstrings, once everything is loaded."""
        seen: set[str] = set()
        stack: list[Any] = [pkg]
        while stack:
            one = stack.pop()
            if one.is_alias or one.path in seen:
                continue
            seen.add(one.path)
            if one.docstring is not None:
                one.docstring.value = ROLE.sub(lambda found, one=one: self.link(one, found[1]), one.docstring.value)
            stack.extend(one.members.values())

    def link(self, where: Any, name: str) -> str:
        """A reference to ``name`` as it is understood in a docstring of ``where``."""
        short = name.rpartition(".")[2]
        try:
            path = name if name.startswith("rlgen_stats.") else where.resolve(name)
            where.modules_collection[path]
        except (griffe.NameResolutionError, KeyError):
            log.warning("%s: docstring refers to %r, which does not exist", where.path, name)
            return f"`{short}`"
        return f'<autoref optional identifier="{path}">`{short}`</autoref>'
