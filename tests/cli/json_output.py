"""Every command, and what it prints with ``--json``, checked against its declared type."""

from typing import Any

import click
from click.testing import CliRunner
from pydantic import TypeAdapter

from rlgen_stats.cli import main
from rlgen_stats.cli.main import _COMMANDS
from rlgen_stats.schemas.command_output import OUTPUTS


def commands() -> dict[str, click.Command]:
    """Every command, those of groups by both names."""
    found = {}
    for name in _COMMANDS:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        found[name] = command
        if isinstance(command, click.Group):
            found |= {f"{name} {sub}": one for sub, one in command.commands.items()}
    return found


def printed(command: str, *arguments: object, code: int = 0) -> Any:
    """The document that a command prints to standard output, which must be of the declared type."""
    done = CliRunner().invoke(main, [*command.split(), *map(str, arguments), "--json"])
    assert done.exit_code == code, f"{done.stderr}\n{done.exception!r}"
    TypeAdapter(OUTPUTS[command]).validate_json(done.stdout)
    return TypeAdapter(Any).validate_json(done.stdout)
