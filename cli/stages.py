"""init, run, status, and one command a stage, which runs what the stage needs first."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Final

import click

from rlgen_stats.cli.console import (
    Workers,
    echo,
    handle_errors,
    json_option,
    launcher_option,
    plain,
    print_json,
    progress_for,
    quiet_option,
    study_argument,
    workers_options,
    yes_option,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rlgen_stats.toolkit.study.stage_graph import StageStatus

_HELP: Final = {
    "posttrain": "Train the study's runs with TRL from the base, keeping the checkpoints of its schedule.",
    "extract": "Sample and grade completions of every model, then store activations of the same tokens in all of them.",
    "crosscoder": "Train every crosscoder of the study from the activation store and measure its health.",
    "encode": "Encode every checkpoint with the declared readout and summarise features per prompt.",
    "align": "Attribute features to models by decoder norms and latent scaling, and match dictionaries of other seeds.",
    "drift": "Test which features' activation differs from base, per checkpoint: sign-flip p, max-T, BH, intervals.",
    "stabilize": "Find when features (equivalence chain) and top sets (with noise ceiling) stop changing.",
    "significance": "Accuracy with intervals, per-prompt transitions, and the contrast of specific-feature counts.",
    "select": "Choose generalisation features on one part of the prompts and confirm them on another.",
    "replicability": "Say what dictionaries of other seeds agree on: features, sets, whole changes, and their errors.",
    "report": "Write the self-contained report (HTML, Markdown, JSON, CSV, SVG) and print the five verdicts.",
}

_ACCEPTING: Final = ("encode", "align")
"""Stages that refuse crosscoders that failed their health checks, unless forced."""


@click.command()
@study_argument
@click.option("--name", help="Name of the study; default: the folder's name.")
@handle_errors
def init(study: str, name: str | None) -> None:
    """Start a study folder with a commented study.yaml and an example prompt table.

    \b
    Example:  rlgen-stats init my-study
    """  # noqa: D301 - click needs the backspace itself
    from pathlib import Path

    from rlgen_stats.toolkit.study.template import write_template

    file = write_template(Path(study), name or Path(study).resolve().name)
    echo(
        f"Wrote {file}. Fill in the paths of your base and runs, and of your prompts (or: rlgen-stats tasks), then: "
        f"rlgen-stats run {study}"
    )


@click.command()
@study_argument
@click.option("--stage", "stages", multiple=True, help="Only this stage and what it needs; may be repeated.")
@click.option(
    "--force",
    "force",
    multiple=True,
    metavar="STAGE",
    help="Run this stage again although up to date, and what reads it; encode and align then accept crosscoders that "
    "failed their health checks. May be repeated.",
)
@yes_option
@workers_options
@launcher_option
@quiet_option
@json_option
@handle_errors
def run(
    study: str,
    stages: tuple[str, ...],
    force: tuple[str, ...],
    yes: bool,
    workers: Workers,
    launcher: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Bring a study up to date: run every stage that is missing, interrupted or stale.

    Stop it at any time; the next run continues from what was committed. What 'check' finds is said first.

    \b
    Examples:  rlgen-stats run my-study
               rlgen-stats run my-study --stage drift
               rlgen-stats run my-study --scheduler tcp://127.0.0.1:8786
    """  # noqa: D301 - click needs the backspace itself
    run_and_print(study, stages or None, force, yes, workers, quiet, as_json, launcher)


def run_and_print(
    study: str,
    stages: tuple[str, ...] | None,
    force: tuple[str, ...],
    yes: bool,
    workers: Workers,
    quiet: bool,
    as_json: bool,
    launcher: str | None = None,
) -> None:
    """Run stages, then print their states as JSON, or the verdicts if there is a report."""
    from rlgen_stats.cli.checking import check_before_run
    from rlgen_stats.toolkit.study import run_study

    def replace(costs: str) -> bool:
        return yes or (sys.stdin.isatty() and click.confirm(f"{costs}. Go on?"))

    with workers() as client, progress_for(quiet=quiet) as progress:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            check_before_run(study, stages, progress)
        opened = run_study(
            study, stages=stages, force=force, replace=replace, workers=client, launcher=launcher, progress=progress
        )
    studies = [opened, *opened.linked]
    reports = [one.folder.report / "index.html" for one in studies if (one.folder.report / "index.html").exists()]
    if as_json:
        found = {"stages": _described(opened.status()), "report": str(reports[0]) if reports else None}
        print_json(found | ({"reports": list(map(str, reports))} if len(studies) > 1 else {}))
    elif (stages is None or "report" in stages) and reports:
        for one in reports:
            print_verdicts(one.parent)


def print_verdicts(report: Path) -> None:
    """Print the five claims of a report with their verdicts, and its path."""
    from rich.console import Console
    from rich.table import Table

    from rlgen_stats.stores import read_json

    content = read_json(report / "report.json")
    claims, answered = content["claims"], content.get("answered", "")
    table = Table(title=f"Verdicts{answered and f', {answered}'}", title_justify="left", show_lines=False)
    for column in ("", "claim", "verdict", "answer"):
        table.add_column(column, overflow="fold")
    for claim in claims:
        table.add_row(*(plain(claim[name]) for name in ("id", "statement", "verdict", "answer")))
    Console().print(table, markup=False)  # answers name views, as [base@0, rl@200]
    echo(f"Report: {report / 'index.html'}")


@click.command()
@study_argument
@json_option
@handle_errors
def status(study: str, as_json: bool) -> None:
    """Show which stages are done, stale, interrupted or waiting, how long each took, and prompts as models read them.

    \b
    Example:  rlgen-stats status runs/demo
    """  # noqa: D301 - click needs the backspace itself
    from rlgen_stats.stores.tables import rendered_prompts
    from rlgen_stats.toolkit.study import open_for_run

    with progress_for() as progress:  # only where a file is to be hashed
        opened = open_for_run(study, exact=False, progress=progress)
        states = [(one, one.status()) for one in (opened, *opened.linked)]
    prompts = rendered_prompts(opened.folder.outcomes)
    if as_json:
        found = {"study": opened.spec.name, "study_id": opened.study_id, "stages": _described(states[0][1])}
        linked = {one.folder.linked_as: _described(stages) for one, stages in states[1:]}
        print_json(found | ({"linked": linked} if linked else {}) | {"rendered_prompts": prompts})
        return
    for one, stages in states:
        echo(f"{one.spec.name}  ({one.folder.root}, study {one.study_id[:12]})")
        for stage in stages:
            seconds = f"{stage.seconds:8.1f} s" if stage.seconds is not None and stage.state == "done" else ""
            echo(f"  {stage.name:<13} {stage.state:<12}{seconds}")
    if prompts:
        echo("Prompts as models read them, the first of every task:")
    for prompt in prompts:
        who = f"{prompt['task']}, {prompt['prompt']}, {' '.join(prompt['models'])}"
        echo(f"  {who} ({prompt['n_tokens']} tokens): {_both_ends(prompt['text'])!r}")


def _both_ends(text: str, kept: int = 300) -> str:
    """A text without its middle, if it is long: a chat template shows at both ends."""
    return text if len(text) <= 2 * kept else f"{text[:kept]} … {text[-kept:]}"


def _described(stages: Sequence[StageStatus]) -> list[dict[str, Any]]:
    return [{"name": one.name, "state": one.state, "key": one.key, "seconds": one.seconds} for one in stages]


def _stage_command(name: str) -> click.Command:
    @click.command(name, help=f"{_HELP[name]}\n\n\b\nExample:  rlgen-stats {name} my-study")
    @study_argument
    @click.option(
        "--force",
        is_flag=True,
        help="Run again although up to date; what reads it is then out of date."
        + (" Crosscoders that failed their health checks are accepted." if name in _ACCEPTING else ""),
    )
    @yes_option
    @workers_options
    @quiet_option
    @json_option
    @handle_errors
    def command(
        study: str,
        force: bool,
        yes: bool,
        workers: Workers,
        quiet: bool,
        as_json: bool,
        launcher: str | None = None,
    ) -> None:
        run_and_print(study, (name,), (name,) if force else (), yes, workers, quiet, as_json, launcher)

    return launcher_option(command) if name == "posttrain" else command


COMMANDS = {"init": init, "run": run, "status": status} | {name: _stage_command(name) for name in _HELP}
