"""YAML of a study file, read so that no file can hang, exhaust or mislead the reader."""

from __future__ import annotations

from typing import Any, Final

import yaml

MAX_DEPTH: Final = 64
"""Levels of nesting; a study needs six, trainer arguments a few more."""
MAX_VALUES: Final = 1_000_000
"""Values that a file may stand for once its aliases are written out: hundreds of runs of a thousand checkpoints."""


_LOADER: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's, which is ten times as fast, where PyYAML was built with it."""


class YamlError(ValueError):
    """Why a text is refused; the end of a sentence."""


def load_yaml(text: str) -> Any:
    """What a YAML text says, by the rules of ``yaml.safe_load``.

    Raises
    ------
    YamlError
        If it is not YAML, nests deeper than ``MAX_DEPTH``, has a key twice, has an alias that contains itself, or
        stands for more than ``MAX_VALUES`` values through its aliases.
    """
    try:
        _check_depth(text)
        loader = _LOADER(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count_values(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise YamlError(f"is not valid YAML: {' '.join(str(error).split())}") from error


def _check_depth(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):  # event by event: composing recurses into every level
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise YamlError(f"nests more than {MAX_DEPTH} levels deep at line {_line(event)}; expected a study file")


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """Values below a node with its aliases written out; each node is visited once."""
    if id(node) in counts:
        if not counts[id(node)]:
            raise YamlError(f"has an alias at line {_line(node)} that contains itself; write the values out")
        return counts[id(node)]
    counts[id(node)] = 0  # being counted
    n_values = 1
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
        other = first.setdefault((key.tag, key.value), key)
        if other is not key:
            raise YamlError(f"has the key {key.value!r} twice, in lines {_line(other)} and {_line(key)}; keep one")


def _line(place: Any) -> int:
    return int(place.start_mark.line) + 1
