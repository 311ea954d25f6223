"""Ready-made tasks written into a study: a table each, and an entry under ``tasks:`` of study.yaml."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd
import yaml

from rlgen_stats.schemas.errors import InputError, SpecError
from rlgen_stats.stores import StudyFolder, replacing
from rlgen_stats.stores.table_files import SUFFIXES
from rlgen_stats.toolkit.exchange.benchmark_files import read_benchmark
from rlgen_stats.toolkit.exchange.benchmark_layouts import BENCHMARKS, Benchmark
from rlgen_stats.toolkit.study.spec_file import read_mapping
from rlgen_stats.toolkit.study.strict_yaml import load_yaml
from rlgen_stats.toolkit.study.template import EXAMPLE_PROMPTS, without_example

_FOLDER: Final = "data/tasks"


@dataclass(frozen=True)
class AddedTask:
    """A task that was written into a study."""

    name: str
    file: str
    n_prompts: int
    settings: dict[str, Any]
    """Its entry under ``tasks:``."""


def add_tasks(
    folder: StudyFolder,
    names: Sequence[str],
    *,
    source: str | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    generated: bool = False,
) -> list[AddedTask]:
    """Write ready-made tasks into a study: all of them, or none where one cannot be read.

    The example prompts of ``rlgen-stats init``, and their tasks, go where they are still as it wrote them.

    Parameters
    ----------
    folder
        The study, with its study.yaml.
    names
        Of ``BENCHMARKS``.
    source
        File, folder or Hub id to read instead of where the benchmark is published. Of several tasks, or where it has an
        entry of the task's name, a folder with a file or folder NAME each.
    split, columns
        As in :func:`read_benchmark`.
    generated
        Let models write the letter of a choice, instead of scoring every choice by its log-likelihood.

    Raises
    ------
    InputError
        If a task is unknown or cannot be read.
    SpecError
        If study.yaml is missing or malformed, has one of the tasks already, or cannot take them; it is left alone then.
    """
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], BENCHMARKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the tasks are {', '.join(BENCHMARKS)}."
        raise InputError(f"no ready-made task is called {unknown[0]!r}; {hint}")
    file, _ = read_mapping(folder.root)
    chosen = [BENCHMARKS[name] for name in dict.fromkeys(names)]
    files = {one.name: f"{_FOLDER}/{one.name}.parquet" for one in chosen}
    settings = {one.name: one.settings(files[one.name], generated=generated) for one in chosen}
    text, prompts = file.read_text(encoding="utf-8"), folder.root / EXAMPLE_PROMPTS
    own = without_example(text, prompts)
    edited = with_tasks(text if own is None else own, settings, where=str(file))
    tables = {}
    for one in chosen:
        place = None if source is None else _place(source, one, alone=len(chosen) == 1)
        tables[one.name] = read_benchmark(one, place, split=split, columns=columns)
    for name, table in tables.items():
        _write(table, folder.root / files[name])
    with replacing(file) as temporary:
        temporary.write_text(edited, encoding="utf-8")
    if own is not None:
        prompts.unlink()
    return [AddedTask(name, files[name], len(table), settings[name]) for name, table in tables.items()]


def _place(source: str, benchmark: Benchmark, *, alone: bool) -> str:
    """Where a task is in a folder of several; the source itself if it is the only task and has no such entry."""
    named = [Path(source) / f"{benchmark.name}{suffix}" for suffix in ("", *SUFFIXES)]
    inside = [path for path in named if path.exists()]
    if not alone and not Path(source).is_dir():
        raise InputError(f"no folder at {Path(source).absolute()}; correct the path of --from.")
    if not inside and not alone:
        raise InputError(
            f"{source} has no file or folder {benchmark.name!r}; several tasks are read from a folder with one each: "
            "name it so, or add them one by one."
        )
    return str(inside[0]) if inside else source


def _write(table: pd.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        table.to_parquet(temporary, index=False)


def with_tasks(text: str, tasks: Mapping[str, Mapping[str, Any]], *, where: str) -> str:
    """The text of a study.yaml with more tasks; all else, comments too, stays letter for letter.

    Raises
    ------
    SpecError
        If it has a task of this name, or lists its tasks in a way that cannot be added to.
    """
    before: dict[str, Any] = load_yaml(text)
    listed = before.get("tasks") or {}
    again = [name for name in tasks if name in listed]
    if again:
        raise SpecError(f"{where} has task {again[0]!r} already; remove that entry first, or edit it.")
    edited = _inserted(text, tasks)
    if edited is None or load_yaml(edited) != before | {"tasks": listed | {n: dict(t) for n, t in tasks.items()}}:
        lines = _entries(tasks, 2).rstrip()
        raise SpecError(
            f"{where}: its tasks are not listed one a line, so that none can be added; write them so, or add by hand:\n"
            f"tasks:\n{lines}"
        )
    return edited


class _OneLineTexts(yaml.SafeDumper):
    """Writes a text of several lines as one line, with its line feeds escaped."""


_OneLineTexts.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, '"' if "\n" in text else None)
)


def _entries(tasks: Mapping[str, Mapping[str, Any]], indent: int) -> str:
    entries = {name: dict(task) for name, task in tasks.items()}
    dumped = yaml.dump(entries, Dumper=_OneLineTexts, sort_keys=False, allow_unicode=True, width=1000)
    return "".join(" " * indent + line for line in dumped.splitlines(keepends=True))


def _inserted(text: str, tasks: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The text with the entries after the last task; a new section at the end where there is none."""
    lines = text.splitlines(keepends=True)
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    key, value = next(((k, v) for k, v in pairs if k.value == "tasks"), (None, None))
    if key is None or value is None:
        gap = "" if text.endswith("\n") else "\n"
        return f"{text}{gap}\ntasks:\n{_entries(tasks, 2)}"
    if not value.value or value.tag.endswith(":null"):  # 'tasks:' or 'tasks: {}'
        line = key.start_mark.line
        comment = lines[line][value.end_mark.column :] if value.end_mark.line == line else "\n"
        lines[line : line + 1] = [f"tasks:{comment.rstrip()}\n", _entries(tasks, 2)]
        return "".join(lines)
    if value.flow_style:
        return None
    last = _last_line(value)
    if not lines[last].endswith("\n"):
        lines[last] += "\n"
    lines.insert(last + 1, _entries(tasks, value.value[0][0].start_mark.column))
    return "".join(lines)


def _last_line(node: yaml.Node) -> int:
    """Line on which a block ends, without the comments that follow it."""
    while isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        node = node.value[-1][1] if isinstance(node, yaml.MappingNode) else node.value[-1]
    end: int = node.end_mark.line
    return end if node.end_mark.column or end == node.start_mark.line else end - 1  # block scalars end a line below
