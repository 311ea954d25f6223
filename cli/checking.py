"""check: what is wrong with a study, and what it will take, before anything is loaded or sampled."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from rlgen_stats.cli.console import (
    EXIT_BAD_INPUT,
    echo,
    handle_errors,
    json_option,
    print_json,
    print_table,
    progress_for,
    study_argument,
)
from rlgen_stats.schemas.errors import RlgenStatsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlgen_stats.toolkit.progress import Progress
    from rlgen_stats.toolkit.study.check_study import Problem, StudyCheck

MAX_CHARACTERS: Final = 600
"""Of a prompt that is shown."""


@click.command()
@study_argument
@click.option(
    "--tokens-per-second", type=click.FloatRange(min=0, min_open=True), help="Speed of sampling, to say the hours."
)
@click.option(
    "--simulate",
    type=click.IntRange(1, 10_000),
    metavar="N",
    help="Simulate N studies of this size for each of several truths, to say which verdicts it can give; reports "
    "written afterwards show them too.",
)
@json_option
@handle_errors
def check(study: str, tokens_per_second: float | None, simulate: int | None, as_json: bool) -> None:
    """Say what is wrong with a study, all at once, and what it will take; no weights are loaded.

    Paths, tables, answers, tokenizers, decoder blocks, weight files; then completions, tokens, hours and bytes. 'run'
    does it first.

    \b
    Examples:  rlgen-stats check my-study --tokens-per-second 4000
               rlgen-stats check my-study --simulate 20
    """  # noqa: D301 - click needs the backspace itself
    from dataclasses import asdict

    from rlgen_stats.toolkit.study.check_study import check_study

    with progress_for() as progress:
        found = check_study(study, progress=progress)
        power = _simulated(study, simulate, progress) if simulate and not found.problems else None
    if as_json:
        costs = found.costs
        hours = costs.hours(tokens_per_second) if costs and tokens_per_second else (None, None)
        print_json(asdict(found) | {"hours": hours[0], "trial_hours": hours[1], "claim_power": power})
    else:
        _print_examples(found)
        _print_costs(found, tokens_per_second)
        if power:
            rows = [[one["claim"], one["truth"], one["verdict"], f"{one['power']:.2f}"] for one in power]
            print_table(["claim", "if this were true", "right verdict", "power"], rows)
        print_problems(found.problems)
        if not found.problems:
            echo("No problems.")
    if found.problems:
        sys.exit(EXIT_BAD_INPUT)


def _simulated(study: str, n_worlds: int, progress: Progress) -> list[dict[str, Any]]:
    """What a study of this size can answer, one row a claim and truth."""
    from rlgen_stats.toolkit.study import open_for_run
    from rlgen_stats.toolkit.study.claim_power import write_claim_power

    found = write_claim_power(open_for_run(study, progress=progress), n_worlds=n_worlds, progress=progress)
    columns = {str(name): found[name].values.tolist() for name in found.data_vars}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def check_before_run(study: str, stages: Sequence[str] | None, progress: Progress) -> None:
    """Print every problem of a study of which stages are still to run, and leave with exit code 2 if there is one."""
    from rlgen_stats.stores import StudyFolder
    from rlgen_stats.toolkit.study import STAGES, open_for_run
    from rlgen_stats.toolkit.study.check_study import check_study
    from rlgen_stats.toolkit.study.stage_graph import with_needs

    plan = with_needs(stages if stages is not None else [stage.name for stage in STAGES])
    if StudyFolder(Path(study)).stages.exists():  # what was run before was checked then, and its keys are known
        with suppress(RlgenStatsError):
            opened = open_for_run(study, exact=False, progress=progress)
            if all(one.state(stage.name) == "done" for one in (opened, *opened.linked) for stage in plan):
                return
    found = check_study(study, stages=plan, progress=progress)
    if found.problems:
        print_problems(found.problems)
        sys.exit(EXIT_BAD_INPUT)


def print_problems(problems: Sequence[Problem]) -> None:
    """One line a problem, on standard error."""
    if len(problems) > 1:
        echo(f"Error: {len(problems)} problems", err=True)
    for problem in problems:
        echo(f"{'Error:' if len(problems) == 1 else ' '} {problem.where}: {problem.message}", err=True)


def _print_examples(found: StudyCheck) -> None:
    for one in found.examples:
        models = ", ".join(one.models)
        echo(
            f"{one.task}, {found.n_prompts[one.task]:,} prompts; the first as {models} read it ({one.n_tokens} tokens):"
        )
        shown = one.text if len(one.text) <= MAX_CHARACTERS else f"{one.text[:MAX_CHARACTERS]} …"
        echo("".join(f"  | {line}\n" for line in shown.splitlines() or [""]), nl=False)


def _print_costs(found: StudyCheck, tokens_per_second: float | None) -> None:
    costs = found.costs
    if costs is None:
        return
    imported = f", {len(found.imported)} of them imported" if found.imported else ""
    models = "1 model" if len(found.models) == 1 else f"{len(found.models)} models"
    echo(f"{models}{imported}; {found.n_blocks} decoder blocks of width {found.width:,}.")
    header = [
        "sampling",
        "completions",
        "tokens at most",
        "after tokens of prompts",
        *(["hours at most"] if tokens_per_second else []),
    ]
    rows = [
        ["outcomes", *(f"{n:,}" for n in (costs.completions, costs.tokens, costs.prompt_tokens))],
        ["trials", *(f"{n:,}" for n in (costs.trial_completions, costs.trial_tokens, costs.trial_prompt_tokens))],
    ]
    if tokens_per_second:
        for row, hours in zip(rows, costs.hours(tokens_per_second), strict=True):
            row.append(f"{hours:,.1f}")
    print_table(header, rows)
    print_table(["written", "bytes at most"], [[name, _size(size)] for name, size in costs.stores.items()])
    echo(f"{_size(found.bytes_left or 0)} still to write, {_size(found.bytes_free or 0)} free.")


def _size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.1f} TB"


COMMANDS = {"check": check}
