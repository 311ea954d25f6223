"""intervene: the study's own causal trial, and trials of any other feature set."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import click

from rlgen_stats.cli.console import (
    Workers,
    echo,
    handle_errors,
    heading,
    json_option,
    print_json,
    print_table,
    progress_for,
    quiet_option,
    study_argument,
    workers_options,
    yes_option,
)

if TYPE_CHECKING:
    import xarray as xr

    from rlgen_stats.toolkit.study.trials_of_other_sets import TrialEstimate, TrialRun


def _features(_: click.Context, __: click.Parameter, value: str | None) -> list[int]:
    """``3,12,407`` as numbers."""
    if value is None:
        return []
    if not re.fullmatch(r"-?[0-9]{1,40}(,-?[0-9]{1,40})*", value):
        raise click.BadParameter(f"expected feature ids as 3,12,407, got {value!r}.")
    return [int(part) for part in value.split(",")]


@click.command("intervene")
@study_argument
@click.option("--set", "set_name", metavar="NAME", help="Another set: selected, rising, confirmed, candidate or paper.")
@click.option("--features", callback=_features, metavar="IDS", help="These features, with commas between: 3,12,407.")
@click.option("--dictionary", type=int, help="Number of the dictionary whose set it is; default 1.")
@click.option("--direction", type=click.Choice(["disable", "amplify"]), help="One direction only; default both.")
@click.option("--dose", "doses", type=float, multiple=True, help="Doses of the curve; the first above 1 is tested.")
@click.option("--level", type=click.Choice(["own", "rl"]), help="Amplify own activations, or add RL's mean levels.")
@click.option("--by-feature", is_flag=True, help="Also edit every feature alone, leave each out, and find a subset.")
@click.option("--dry-run", is_flag=True, help="Say what it would run and roughly how long, and stop.")
@click.option(
    "--force",
    is_flag=True,
    help="Run the study's own trial again although up to date.",
)
@yes_option
@workers_options
@quiet_option
@json_option
@handle_errors
def intervene(
    study: str,
    set_name: str | None,
    features: list[int],
    dictionary: int | None,
    direction: Literal["disable", "amplify"] | None,
    doses: tuple[float, ...],
    level: Literal["own", "rl"] | None,
    by_feature: bool,
    dry_run: bool,
    force: bool,
    yes: bool,
    workers: Workers,
    quiet: bool,
    as_json: bool,
) -> None:
    """Disable a feature set in the RL model and amplify it in base, with matched controls, on unused prompts.

    Without options this is a stage of the study, on the set it selected in each of its dictionaries. With --set,
    --features, --direction, --dose, --level or --by-feature it is a trial of its own, in one dictionary:
    results.zarr/trial-NAME, completions below intervention/NAME.

    \b
    Examples:  rlgen-stats intervene my-study
               rlgen-stats intervene my-study --dry-run
               rlgen-stats intervene my-study --features 3,12,407 --direction disable --dose 0.5 --dose 0.25
    """  # noqa: D301 - click needs the backspace itself
    from rlgen_stats.cli.stages import run_and_print

    asked = (set_name, direction, level, dictionary)
    stage = all(one is None for one in asked) and not features and not doses and not by_feature
    if stage and not dry_run:
        run_and_print(study, ("intervene",), ("intervene",) if force else (), yes, workers, quiet, as_json)
        return
    from rlgen_stats.toolkit.statistics.causal.outcome_table import DIRECTIONS
    from rlgen_stats.toolkit.study.trials_of_other_sets import estimate_set, verify_set

    directions = DIRECTIONS if direction is None else (direction,)
    numbers = _dictionaries(study) if stage else (1 if dictionary is None else dictionary,)
    what: dict[str, Any] = {
        "features": features,
        "set_name": "selected" if set_name is None and not features else set_name,
        "directions": directions,
        "doses": doses,
        "level": level,
    }
    estimate = estimate_set(study, dictionary=numbers[0], **what) if dry_run else None
    if estimate is not None:
        _print_estimate(estimate, set_name or "selected", features, len(numbers), as_json)
        return
    with nullcontext() if dry_run else workers() as client, progress_for(quiet=quiet) as progress:
        trials = [
            verify_set(
                study,
                **what,
                dictionary=number,
                by_feature=by_feature,
                dry_run=dry_run,
                workers=client,
                progress=progress,
            )
            for number in numbers
        ]
    if as_json:
        print_json([_as_json(trial) for trial in trials] if len(trials) > 1 else _as_json(trials[0]))
        return
    for trial in trials:
        _print(trial)


def _dictionaries(study: str) -> range:
    """Numbers of the dictionaries, in each of which the study holds a trial of its own."""
    from rlgen_stats.toolkit.study import open_for_run

    return range(1, len(open_for_run(study, exact=False).spec.primary_crosscoder.names) + 1)


def _print_estimate(
    estimate: TrialEstimate, set_name: str, features: list[int], n_dictionaries: int, as_json: bool
) -> None:
    """What trials would take whose stages have not run; nothing is run."""
    if as_json:
        content: dict[str, Any] = {
            "name": set_name,
            "features": features or None,
            "prompts": estimate.n_prompts,
            "samples": estimate.n_samples,
            "controls": estimate.n_controls,
            "arms": estimate.arms,
            "stored": dict.fromkeys(estimate.arms, 0),
            "completions": n_dictionaries * estimate.completions,
            "seconds": None,
            "why_not": "",
            "cannot_show": [],
            "waiting_for": estimate.waiting_for,
        }
        print_json(content)
        return
    arms = ", ".join(f"{n} arms {direction}" for direction, n in estimate.arms.items())
    where = f" in each of {n_dictionaries} dictionaries" if n_dictionaries > 1 else ""
    echo(f"Not run yet: {', '.join(estimate.waiting_for)}. By the settings alone, nothing was run:")
    echo(f"  at most {arms}{where}, {estimate.n_prompts} prompts, {estimate.n_samples} sample(s) an arm")
    echo(f"  in all {n_dictionaries * estimate.completions:,} completions of up to {estimate.max_new_tokens} tokens")


def _as_json(trial: TrialRun) -> dict[str, Any]:
    plan = trial.plan
    content: dict[str, Any] = {
        "name": trial.name,
        "features": list(plan.features),
        "prompts": plan.n_prompts,
        "samples": plan.n_samples,
        "controls": plan.n_controls,
        "arms": plan.arms,
        "stored": plan.stored,
        "completions": plan.completions,
        "seconds": trial.seconds,
        "why_not": plan.why_not,
        "cannot_show": [str(shortfall) for shortfall in plan.shortfalls],
    }
    if trial.result is not None:
        content["results"] = f"trial-{trial.name}"
        rows = {str(d): trial.result.sel(direction=d) for d in trial.result["direction"].values}
        content["verdicts"] = {
            direction: {
                "verdict": str(row["verdict"].item()),
                "effect": float(row["effect"].sel(condition="set")) if "set" in row["condition"] else None,
                "rank_p": float(row["rank_p"]),
                "reasons": str(row["reasons"].item()).split("; "),
                "replication": str(row["v5"].item()),
            }
            for direction, row in rows.items()
            if direction in plan.arms
        }
    return content


def _print(trial: TrialRun) -> None:
    plan = trial.plan
    arms = ", ".join(
        f"{n} arms {direction}" + (f" ({plan.stored[direction]} done)" if plan.stored[direction] else "")
        for direction, n in plan.arms.items()
    )
    echo(f"{trial.name}: {len(plan.features)} feature(s); {arms or 'nothing to run'}")
    if plan.why_not:
        echo(f"  {plan.why_not}")
    for shortfall in plan.shortfalls:
        echo(f"  cannot show {shortfall}")
    if trial.result is None:
        # where answers are short, reading texts for the divergences takes longer than sampling
        speed = "to sample at the speed of the outcomes stage, and time to read texts for the divergences"
        time = "" if trial.seconds is None else f", roughly {_time(trial.seconds)} {speed}"
        size = f"{plan.n_prompts} prompts, {plan.n_samples} sample(s) an arm"
        most = f"{plan.completions:,} completions of up to {plan.max_new_tokens} tokens"
        echo(f"  at most {most} ({size}){time}")
        return
    for direction in trial.result["direction"].values:
        row = trial.result.sel(direction=direction)
        if str(row["reasons"].item()).startswith("not_asked"):
            continue
        heading(f"  {direction}: {row['verdict'].item()}")
        for reason in str(row["reasons"].item()).split("; "):
            echo(f"    {reason}")
        echo(f"    v5_replication: {row['v5'].item()}")
        if trial.parts is not None:
            _print_parts(trial.parts.sel(direction=direction))
    echo(f"  results.zarr/trial-{trial.name}; rlgen-stats report STUDY --force puts it into the report")


def _print_parts(parts: xr.Dataset) -> None:
    rows = parts.sortby("order")
    print_table(
        ["feature", "alone", "q", "left out", "q", "in the smaller set"],
        [
            [str(int(k)), f"{a:+.3f}", f"{qa:.3g}", f"{o:+.3f}", f"{qo:.3g}", "yes" if kept else ""]
            for k, a, qa, o, qo, kept in zip(
                *(rows[name].values for name in ("feature", "alone", "alone_q_value", "left_out", "left_out_q_value")),
                rows["in_subset"].values,
                strict=True,
            )
        ],
    )
    effects = [
        f"{label} {float(parts[name]):+.3f} [{float(parts[f'{name}_low']):+.3f}, {float(parts[f'{name}_high']):+.3f}]"
        for name, label in (
            ("subset_effect", "the smaller set"),
            ("set_effect", "all"),
            ("set_minus_subset", "difference"),
        )
    ]
    echo(
        f"    {int(parts['subset_size'])} of {parts.sizes['feature']} features; on unused prompts {', '.join(effects)}"
    )


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


COMMANDS = {"intervene": intervene}
