"""tasks: the ready-made ones, and how they get into a study."""

from __future__ import annotations

import click

from rlgen_stats.cli.console import (
    echo,
    fail,
    handle_errors,
    json_option,
    print_json,
    print_table,
    study_argument,
)


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
@handle_errors
def tasks(context: click.Context, as_json: bool) -> None:
    """List the ready-made tasks; 'tasks add' writes some of them into a study.

    \b
    Example:  rlgen-stats tasks
    """  # noqa: D301 - click needs the backspace itself
    if context.invoked_subcommand is not None:
        return
    from rlgen_stats.toolkit.exchange.benchmark_layouts import BENCHMARKS

    if as_json:
        print_json({name: one.settings(f"data/tasks/{name}.parquet") for name, one in BENCHMARKS.items()})
        return
    rows = [
        [one.name, one.title, one.domain, one.role, one.scoring, one.dataset, one.config or "", one.split]
        for one in BENCHMARKS.values()
    ]
    print_table(["task", "benchmark", "domain", "role", "graded by", "dataset", "config", "split"], rows)


@tasks.command(short_help="Write ready-made tasks into a study.")
@study_argument
@click.argument("names", nargs=-1, required=True)
@click.option(
    "--from",
    "source",
    metavar="PATH",
    help="Table (parquet, jsonl, csv, ...) or folder in a published layout, a folder with one NAME each, or a Hub id.",
)
@click.option("--split", help="Split of the data set; default: the one the benchmark is tested on.")
@click.option(
    "--column",
    "columns",
    metavar="PUBLISHED=YOURS",
    multiple=True,
    help="A column that your table names otherwise; repeatable.",
)
@click.option(
    "--generate", "generated", is_flag=True, help="Let models write the letter of a choice, instead of scoring all."
)
@json_option
@handle_errors
def add(
    study: str,
    names: tuple[str, ...],
    source: str | None,
    split: str | None,
    columns: tuple[str, ...],
    generated: bool,
    as_json: bool,
) -> None:
    """Write ready-made tasks into STUDY: data/tasks/NAME.parquet each, and an entry under 'tasks:' of its study.yaml.

    \b
    Examples:  rlgen-stats tasks add my-study math500 openbookqa piqa
               rlgen-stats tasks add my-study sciq --from downloads/sciq/test.jsonl
    """  # noqa: D301 - click needs the backspace itself
    from dataclasses import asdict
    from pathlib import Path

    from rlgen_stats.stores import StudyFolder
    from rlgen_stats.toolkit.study.add_tasks import add_tasks

    wrong = [pair for pair in columns if not all(pair.partition("="))]
    if wrong:
        fail(f"--column takes PUBLISHED=YOURS, got {wrong[0]!r}.")
    renamed = dict(pair.split("=", 1) for pair in columns)
    added = add_tasks(StudyFolder(Path(study)), names, source=source, split=split, columns=renamed, generated=generated)
    if as_json:
        print_json([asdict(task) for task in added])
        return
    for task in added:
        echo(f"{task.name}: {task.n_prompts} prompt(s) in {task.file}, an entry under 'tasks:' of study.yaml.")


COMMANDS = {"tasks": tasks}
