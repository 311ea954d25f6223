"""compare-outcomes: two models' graded completions of the same prompts."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from rlgen_stats.cli.console import echo, handle_errors, json_option, print_json, print_table

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

_MODEL_OF_STUDY: Final = re.compile(r"(.+):([^:/\\]+@[^:/\\]+)")
"""``STUDY:RUN@STEP``; the colon of a Windows drive is followed by a path."""


@click.command("compare-outcomes")
@click.argument("a")
@click.argument("b")
@click.option("--metric", "metrics", multiple=True, help="What counts as correct, where there are several; repeatable.")
@click.option("--task", "tasks", multiple=True, help="Only this task; repeatable.")
@click.option("--cluster", help="Field that says which prompts depend on one another, e.g. doc.passage_id.")
@click.option("--common", is_flag=True, help="Drop prompts that only one of them has, instead of refusing.")
@click.option(
    "--alpha",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.05,
    show_default=True,
    help="1 - coverage of the intervals.",
)
@json_option
@handle_errors
def compare_outcomes_command(
    a: str,
    b: str,
    metrics: tuple[str, ...],
    tasks: tuple[str, ...],
    cluster: str | None,
    common: bool,
    alpha: float,
    as_json: bool,
) -> None:
    """Compare two models on the same prompts: paired difference with interval, exact test, pass@k; B minus A.

    A and B are each a table (parquet, csv, tsv, jsonl, json or arrow with prompt and correct; perhaps task, sample,
    cluster), a model of a study (STUDY:RUN@STEP), samples_*.jsonl of lm-evaluation-harness, a log of Inspect (.eval,
    .json), or a folder of either kind of logs.

    \b
    Examples:  rlgen-stats compare-outcomes out/base out/rl --metric exact_match,strict-match
               rlgen-stats compare-outcomes runs/demo:base@0 runs/demo:rl@80 --metric greedy
               rlgen-stats compare-outcomes base.eval rl.eval --cluster metadata.topic
    """  # noqa: D301 - click needs the backspace itself
    from rlgen_stats.toolkit.statistics import compare_outcomes

    one, two = (_read(name, metrics, cluster) for name in (a, b))
    result = compare_outcomes(
        one,
        two,
        tasks=tasks or None,
        unpaired="drop" if common else "error",
        names=(a, b),
        alpha=alpha,
    )
    if as_json:
        print_json({"attrs": result.attrs} | result.to_dict()["coords"] | result.to_dict()["data_vars"])
    else:
        _print(result, sorted(set(one.get("metric", []))))


def _read(name: str, metrics: tuple[str, ...], cluster: str | None) -> pd.DataFrame:
    """``PATH`` or ``STUDY:RUN@STEP``."""
    from rlgen_stats.toolkit.exchange import read_graded

    of_study = None if Path(name).exists() else _MODEL_OF_STUDY.fullmatch(name)
    path, model = of_study.groups() if of_study else (name, None)
    return read_graded(path, metric=metrics, model=model, cluster=cluster)


def _print(result: xr.Dataset, metrics: list[str]) -> None:
    attrs, level = result.attrs, 1 - result.attrs["alpha"]
    echo(f"A  {attrs['a']}\nB  {attrs['b']}")
    echo(f"   graded by {', '.join(metrics)}; {level:.0%} intervals over {attrs['unit']}s")
    header = ["task", "prompts", "A", "B", "B - A, points", "interval", "A better", "B better", "p", "p, Holm"]
    rows = []
    for task in result["task"].values:
        row = result.sel(task=task)
        rows.append(
            [
                str(task),
                f"{int(row.n_prompts):,}",
                f"{100 * float(row.accuracy_a):.1f}%",
                f"{100 * float(row.accuracy_b):.1f}%",
                f"{100 * float(row.difference):+.1f}",
                _interval(row.difference_low, row.difference_high),
                f"{int(row.a_better):,}",
                f"{int(row.b_better):,}",
                _p(row.p_value),
                "" if len(result["task"]) > 1 and task == result["task"].values[-1] else _p(row.p_holm),
            ]
        )
    print_table(header, rows)
    if result.sizes["k"] > 1:
        _print_pass(result)
    for note in _notes(result):
        echo(note)


def _print_pass(result: xr.Dataset) -> None:
    echo("")
    rows = []
    for task in result["task"].values:
        for k in result["k"].values[1:]:  # pass@1 is the accuracy above
            row = result.sel(task=task, k=k)
            difference, interval = (
                float(row.pass_difference),
                _interval(row.pass_difference_low, row.pass_difference_high),
            )
            shares = [f"{100 * float(share):.1f}%" for share in (row.pass_a, row.pass_b)]
            rows.append([str(task), f"{k}", *shares, f"{100 * difference:+.1f}", interval])
    print_table(["task", "pass@k", "A", "B", "B - A, points", "interval"], rows)


def _notes(result: xr.Dataset) -> list[str]:
    """What was left out, and which tests and intervals these are."""
    attrs = result.attrs
    tests = ", ".join(dict.fromkeys(str(test) for test in result["p_test"].values))
    notes = [f"p: {tests}; null: {attrs['null']}.", f"Intervals: {attrs['interval']}."]
    if attrs["n_unpaired_a"] or attrs["n_unpaired_b"]:
        notes.append(
            f"Left out, graded in one only: {attrs['n_unpaired_a']} prompts of A, {attrs['n_unpaired_b']} of B."
        )
    if attrs["n_ungraded_a"] or attrs["n_ungraded_b"]:
        counts = (f"{attrs[f'n_ungraded_{x}']} of {x.upper()}{_named(attrs[f'ungraded_{x}'])}" for x in "ab")
        notes.append(f"Left out, completions without a score: {', '.join(counts)}.")
    return notes


def _named(prompts: str) -> str:
    return f" (e.g. {prompts})" if prompts else ""


def _interval(low: object, high: object) -> str:
    ends = [100 * float(end) for end in (low, high)]  # type: ignore[arg-type]
    return "not estimable" if any(map(math.isnan, ends)) else f"[{ends[0]:+.1f}, {ends[1]:+.1f}]"


def _p(value: object) -> str:
    p = float(value)  # type: ignore[arg-type]
    return "-" if math.isnan(p) else f"{p:.2g}" if p < 0.001 else f"{p:.3f}"


COMMANDS = {"compare-outcomes": compare_outcomes_command}
