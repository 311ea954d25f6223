"""demo: the embedded study."""

from __future__ import annotations

import functools
from typing import Final, Literal

import click

from rlgen_stats.cli.console import (
    Workers,
    connect,
    handle_errors,
    json_option,
    progress_for,
    quiet_option,
    workers_options,
)

WORKERS: Final = "cpu,cpu"
"""Devices of the demo where nothing is said: two worker processes, which on two cores have one thread each."""


@click.command()
@click.option(
    "--folder", default="runs/demo", show_default=True, help="Study folder; an interrupted study is continued."
)
@click.option("--seed", default=0, show_default=True, help="Seed of the world and everything in it.")
@click.option("--seeds", "n_seeds", default=1, show_default=True, type=click.IntRange(1), help="Training runs per arm.")
@click.option(
    "--size",
    type=click.Choice(["demo", "mini"]),
    default="demo",
    show_default=True,
    help="'mini' runs every stage in seconds; its numbers mean nothing (for smoke tests).",
)
@workers_options
@quiet_option
@json_option
@handle_errors
def demo(
    folder: str,
    seed: int,
    n_seeds: int,
    size: Literal["demo", "mini"],
    workers: Workers,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run the embedded study: pretrain a tiny base, post-train it by SFT and by RL, and ask the five questions.

    Takes a few minutes on two cores, needs no network, and continues where it was interrupted. What a study of this
    size can answer is simulated first, and stands in the report. Unless --devices or --scheduler says otherwise, models
    run in two worker processes where there are two cores.

    \b
    Examples:  rlgen-stats demo
               rlgen-stats demo --seeds 3 --folder runs/three-seeds
    """  # noqa: D301 - click needs the backspace itself
    import os
    from pathlib import Path

    # Threads that wait by spinning make so small a model several times slower on a machine that does anything else.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from rlgen_stats.cli.stages import run_and_print
    from rlgen_stats.stores import StudyFolder
    from rlgen_stats.toolkit.demo import prepare_demo
    from rlgen_stats.toolkit.study import open_for_run, write_spec
    from rlgen_stats.toolkit.study.claim_power import write_claim_power

    study = StudyFolder(Path(folder))
    with progress_for(quiet=quiet) as progress:
        spec = prepare_demo(study, seed=seed, n_seeds=n_seeds, size=size, progress=progress)
        write_spec(study, spec)
        if size == "demo":
            write_claim_power(open_for_run(folder), progress=progress)
    given = click.get_current_context().params
    if size == "demo" and given["scheduler"] is None and given["devices"] is None and (os.cpu_count() or 1) > 1:
        workers = functools.partial(connect, None, WORKERS)
    run_and_print(folder, None, (), True, workers, quiet, as_json)


COMMANDS = {"demo": demo}
