"""inspect and verify."""

from __future__ import annotations

import click

from rlgen_stats.cli.console import fail, handle_errors, json_option, print_json

_store = click.argument("store", type=click.Path())


@click.command("inspect")
@_store
@json_option
@handle_errors
def inspect_store(store: str, as_json: bool) -> None:
    r"""Say what a store or a study contains: models, dimensions, sizes, provenance.

    \b
    Examples:  rlgen-stats inspect runs/demo
               rlgen-stats inspect runs/demo/features.zarr --json
    """
    from rlgen_stats.stores import describe

    facts = describe(store)
    if as_json:
        print_json(facts)
        return
    for name, entry in facts.items():
        click.echo(name)
        for key, value in entry.items():
            click.echo(f"  {key:<14} {value}")


@click.command()
@_store
@json_option
@handle_errors
def verify(store: str, as_json: bool) -> None:
    r"""Read every chunk of a store or a study and compare checksums and commit records.

    Leaves with code 2 and names the first fault if there is one.

    \b
    Example:  rlgen-stats verify runs/demo
    """
    from dataclasses import asdict

    from rlgen_stats.stores import verify as verify_store

    found = verify_store(store)
    if as_json:
        print_json(asdict(found) | {"ok": found.ok})
    elif found.ok:
        click.echo(f"{store}: sound; {found.n_chunks} chunks of {found.n_arrays} arrays read.")
    if not found.ok:
        fail(
            f"{store}: {len(found.problems)} fault(s), the first: {found.problems[0]}; restore it or compute it again."
        )


COMMANDS = {"inspect": inspect_store, "verify": verify}
