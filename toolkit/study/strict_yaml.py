"""YAML of a study file, read so that no file can hang, exhaust or mislead the reader."""

from __future__ import annotations

import re
from typing import Any, Final

import yaml

MAX_DEPTH: Final = 64
"""Levels of nesting; a study needs six, trainer arguments a few more."""
MAX_VALUES: Final = 1_000_000
"""Values that a file may stand for once its aliases are written out: hundreds of runs of a thousand checkpoints."""


MAX_ENTRIES: Final = 5_000
"""Entries of one mapping, and half of those of a list: checkpoints of a run are a thousand at most."""
MAX_DIGITS: Final = 400
"""Digits of a number; the largest float has 309."""
_PLAIN: Final = re.compile(r"[-+]?(0|[1-9][0-9]*)")

_LOADER: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's, which is ten times as fast, where PyYAML was built with it."""


class YamlError(ValueError):
    """Why a text is refused; the end of a sentence."""


def load_yaml(text: str) -> Any:
    """What a YAML text says, by the rules of ``yaml.safe_load``.

    Raises
    ------
    YamlError
        If it is not YAML, nests deeper than ``MAX_DEPTH``, has a key twice or one that is no text or whole number, has
        a number that YAML reads otherwise than people do (010 as 8), has an alias that contains itself, holds more than
        ``MAX_ENTRIES`` values in one place, or stands for more than ``MAX_VALUES`` through its aliases.
    """
    try:
        _check_size(text)
        loader = _LOADER(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count_values(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except YamlError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise YamlError(f"is not valid YAML: {' '.join(str(error).split())}") from error


def _check_size(text: str) -> None:
    entries: list[int] = []  # of the collections that are open
    for event in yaml.parse(text, Loader=_LOADER):  # event by event: composing recurses into every level
        if isinstance(event, yaml.CollectionEndEvent):
            entries.pop()
            continue
        if entries and isinstance(event, yaml.NodeEvent):
            entries[-1] += 1
            if entries[-1] > 2 * MAX_ENTRIES:
                raise YamlError(f"has more than {MAX_ENTRIES:,} entries at line {_line(event)}; expected a study file")
        if isinstance(event, yaml.CollectionStartEvent):
            entries.append(0)
            if len(entries) > MAX_DEPTH:
                raise YamlError(f"nests more than {MAX_DEPTH} levels deep at line {_line(event)}; is it a study file?")


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """Values below a node with its aliases written out; each node is visited once."""
    if id(node) in counts:
        if not counts[id(node)]:
            raise YamlError(f"has an alias at line {_line(node)} that contains itself; write the values out")
        return counts[id(node)]
    counts[id(node)] = 0  # being counted
    n_values = 1
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node)
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        n_values += sum(_count_values(part, counts) for pair in node.value for part in pair)
    elif isinstance(node, yaml.SequenceNode):
        n_values += sum(_count_values(part, counts) for part in node.value)
    if n_values > MAX_VALUES:
        raise YamlError(
            f"stands for more than {MAX_VALUES:,} values through its aliases, from line {_line(node)} on; write out "
            "those that are needed"
        )
    counts[id(node)] = n_values
    return n_values


def _check_keys(node: yaml.MappingNode) -> None:
    first: dict[tuple[str, str], yaml.Node] = {}
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        kind = _check_scalar(key)
        if kind not in ("str", "int", "merge"):
            raise YamlError(f"has the key {key.value!r} in line {_line(key)}, which YAML takes for a {kind}: quote it")
        name = str(int(key.value)) if kind == "int" else key.value
        other = first.setdefault((kind, name), key)
        if other is not key:
            raise YamlError(f"has the key {key.value!r} twice, in lines {_line(other)} and {_line(key)}; keep one")


def _check_scalar(node: yaml.ScalarNode) -> str:
    """Its kind; refused are numbers that YAML 1.1 reads otherwise than people do, and kinds that no study has."""
    kind, value = str(node.tag.rpartition(":")[2]), node.value
    if kind in ("int", "float") and len(value) > MAX_DIGITS:
        raise YamlError(f"has a number of {len(value):,} digits in line {_line(node)}; expected {MAX_DIGITS} at most")
    if (kind == "int" and not _PLAIN.fullmatch(value)) or (kind == "float" and ":" in value):
        raise YamlError(f"has the number {value!r} in line {_line(node)}; write it in decimal digits alone")
    if kind == "binary":
        raise YamlError(f"has a value of kind !!binary in line {_line(node)}; write the value itself")
    return kind


def _line(place: Any) -> int:
    return int(place.start_mark.line) + 1
