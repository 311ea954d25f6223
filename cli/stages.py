"""init, run, status, and one command a stage, which runs what the stage needs first."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Final

import click

from rlgen_stats.cli.console import (
    Workers,
    echo,
    fail,
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

    from rlgen_stats.toolkit.study import Study
    from rlgen_stats.toolkit.study.stage_graph import StageStatus

_HELP: Final = {
    "posttrain": "Train the study's runs with TRL from the base, keeping the checkpoints of its schedule.",
    "outcomes": "Sample and grade completions of every model: one greedy, and as many sampled ones as study.yaml says.",
    "extract": "Store activations of the same texts in every model.",
    "crosscoder": "Train every crosscoder of the study from the activation store and measure its health.",
    "encode": "Encode every checkpoint with the declared readout and summarise features per prompt.",
    "movement": "Measure how far each model moved from base: weights, next-token distributions, activations.",
    "align": "Attribute features to models by decoder norms and latent scaling, and match dictionaries of other seeds.",
    "drift": "Test which features' activation differs from base, per checkpoint: sign-flip p, max-T, BH, intervals.",
    "stabilize": "Find when features (equivalence chain) and top sets (with noise ceiling) stop changing.",
    "significance": "Accuracy with intervals, per-prompt transitions, and the contrast of specific-feature counts.",
    "select": "Choose generalisation features on one part of the prompts and confirm them on another.",
    "separation": "Say how well selected features tell the models' activations apart, beside the raw activations.",
    "tokens": "Say how far token and position alone explain the selected features.",
    "replicability": "Say what dictionaries of other seeds agree on: features, sets, whole changes, and their errors.",
    "intervene": "Disable and amplify the chosen features in the live models, with controls.",
    "report": "Write the self-contained report (HTML, Markdown, JSON, CSV, SVG) and print the five verdicts.",
}

report_to_option = click.option(
    "--report-to",
    "report_to",
    multiple=True,
    type=click.Choice(["wandb", "tensorboard", "trackio"]),
    help="Send the training curves of crosscoders there; repeatable. No result depends on it.",
)
STAGE_NAMES: Final = list(_HELP)
"""All stages in the order in which they run."""
_VERDICT: Final = ("id", "statement", "verdict", "answer")
"""What is shown of a claim."""
_ACCEPTING: Final = ("encode", "align")
"""Stages that refuse crosscoders that failed their health checks, unless forced."""


@click.command()
@study_argument
@click.option("--name", help="Name of the study; default: the folder's name.")
@json_option
@handle_errors
def init(study: str, name: str | None, as_json: bool) -> None:
    """Start a study folder with a commented study.yaml and an example prompt table.

    \b
    Example:  rlgen-stats init my-study
    """  # noqa: D301 - click needs the backspace itself
    from pathlib import Path

    from rlgen_stats.toolkit.study.template import write_template

    file = write_template(Path(study), name or Path(study).resolve().name)
    if as_json:
        print_json({"file": str(file)})
        return
    echo(
        f"Wrote {file}. Fill in the paths of your base and runs, and of your prompts (or: rlgen-stats tasks), then: "
        f"rlgen-stats run {study}"
    )


@click.command()
@study_argument
@click.option(
    "--stage",
    "stages",
    multiple=True,
    metavar="STAGE",
    type=click.Choice(STAGE_NAMES),
    help=f"Only this stage and what it needs; may be repeated. STAGE is one of {', '.join(STAGE_NAMES)}.",
)
@click.option(
    "--force",
    "force",
    multiple=True,
    metavar="STAGE",
    type=click.Choice(STAGE_NAMES),
    help="Run this stage again although up to date, and what reads it; encode and align then accept crosscoders that "
    "failed their health checks. May be repeated.",
)
@yes_option
@workers_options
@report_to_option
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
    report_to: tuple[str, ...],
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
    run_and_print(study, stages or None, force, yes, workers, quiet, as_json, report_to, launcher)


def run_and_print(
    study: str,
    stages: tuple[str, ...] | None,
    force: tuple[str, ...],
    yes: bool,
    workers: Workers,
    quiet: bool,
    as_json: bool,
    report_to: tuple[str, ...] = (),
    launcher: str | None = None,
) -> None:
    """Run stages, then print the result of the last one, or the verdicts of a whole run."""
    from rlgen_stats.cli.checking import check_before_run
    from rlgen_stats.toolkit.study import run_study
    from rlgen_stats.toolkit.study.stage_graph import with_needs

    idle = [name for name in force if stages and name not in {stage.name for stage in with_needs(stages)}]
    if idle:
        fail(f"--force {idle[0]} would do nothing: {', '.join(stages or ())} does not need it; add --stage {idle[0]}.")

    def replace(costs: str) -> bool:
        return yes or (sys.stdin.isatty() and click.confirm(f"{costs}. Go on?"))

    with workers() as client, progress_for(quiet=quiet) as progress:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            check_before_run(study, stages, progress)
        opened = run_study(
            study,
            stages=stages,
            force=force,
            replace=replace,
            workers=client,
            launcher=launcher,
            progress=progress,
            report_to=report_to,
        )
    last = "report" if stages is None or "report" in stages else stages[-1]
    if as_json:
        linked = {one.folder.linked_as: _result(one, last) for one in opened.linked}
        of_study = {"study": opened.spec.name, "study_id": opened.study_id}
        print_json(
            {"result": _result(opened, last), "linked": linked} | of_study | {"plan": _described(opened.status())}
        )
        return
    for one in (opened, *opened.linked):
        if last == "report":
            print_verdicts(one.folder.report)
        else:
            _print_facts(one, last)


def _result(study: Study, name: str) -> dict[str, Any]:
    """What a stage of a study, or of one that is linked to it, found."""
    record, report = study.record(name), study.folder.report
    found: dict[str, Any] = {"stage": name, "state": study.state(name), "seconds": record.get("seconds")}
    found |= {"facts": record.get("facts", {}), "stores": list(record.get("stores", {}))}
    if name == "report":
        found |= {"report": str(report / "index.html"), "verdicts": _claims(report)[0]}
    return found


def _claims(report: Path) -> tuple[list[dict[str, str]], str]:
    """The claims of a report, and what of several layers or contrasts it answers."""
    from rlgen_stats.stores.atomic import explain_damage, read_object

    file = report / "report.json"
    with explain_damage(file):
        content = read_object(file)
        claims = [{name: str(claim[name]) for name in _VERDICT} for claim in content["claims"]]
        return claims, str(content.get("answered", ""))


def _print_facts(study: Study, name: str) -> None:
    of_linked = f", {study.folder.linked_as}" if study.folder.linked_as else ""
    echo(f"{name}{of_linked}: {study.state(name)}")
    for fact, value in study.record(name).get("facts", {}).items():
        if isinstance(value, dict) and any(isinstance(one, dict) for one in value.values()):
            echo(f"  {fact}")
            for of, values in value.items():
                echo(f"    {of}  {_spoken(values)}")
        else:
            echo(f"  {fact}  {_spoken(value)}")


def _spoken(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_spoken(one)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_spoken, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_verdicts(report: Path) -> None:
    """Print the five claims of a report with their verdicts, and its path."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    claims, answered = _claims(report)
    title = Text(plain(f"Verdicts{answered and f', {answered}'}"), "table.title")
    table = Table(title=title, title_justify="left", show_lines=False)
    for column in ("", "claim", "verdict", "answer"):
        table.add_column(column, overflow="fold")
    for claim in claims:
        table.add_row(*map(plain, claim.values()))
    Console().print(table, markup=False)  # answers name views, as [base@0, rl@200]
    echo(f"Report: {report / 'index.html'}")


@click.command()
@study_argument
@json_option
@handle_errors
def status(study: str, as_json: bool) -> None:
    """Show where stages stand, how long each took, and prompts as models read them.

    A stage is done, stale (made under other settings), running, interrupted, foreign or waiting.

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
    example = f"Examples:  rlgen-stats {name} my-study\n           rlgen-stats {name} my-study --json"

    @click.command(name, help=f"{_HELP[name]}\n\nWhat it needs and is missing or stale runs first.\n\n\b\n{example}")
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
        report_to: tuple[str, ...] = (),
        launcher: str | None = None,
    ) -> None:
        run_and_print(study, (name,), (name,) if force else (), yes, workers, quiet, as_json, report_to, launcher)

    further = {"crosscoder": report_to_option, "posttrain": launcher_option}
    return further[name](command) if name in further else command


COMMANDS = {"init": init, "run": run, "status": status} | {
    name: _stage_command(name)
    for name in _HELP
    if name != "intervene"  # which has a module of its own
}
