"""One command a stage; each runs what it needs first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

import click

from rlgen_stats.cli.console import (
    handle_errors,
    json_option,
    print_json,
    progress_for,
    quiet_option,
    scheduler_option,
    study_argument,
)

if TYPE_CHECKING:
    from rlgen_stats.toolkit.study.trials import TrialRun

_HELP: Final = {
    "posttrain": "Train the study's runs with TRL from the base, keeping evenly spaced checkpoints.",
    "extract": "Sample and grade completions of every model, then store activations of the same tokens in all of them.",
    "crosscoder": "Train every crosscoder of the study from the activation store and measure its health.",
    "encode": "Encode every checkpoint through the declared readout and summarise features per prompt.",
    "align": "Attribute features to models: NRN and MAS with the base-base null floor.",
    "drift": "Test which features' activation differs from base, per checkpoint: sign-flip p, max-T, BH, intervals.",
    "stabilize": "Find when features (equivalence chain) and top sets (with noise ceiling) stop changing.",
    "significance": "Accuracy with intervals, per-prompt transitions, and the contrast of specific-feature counts.",
    "select": "Choose generalisation features on one half of the prompts and confirm them on the other.",
    "report": "Write the self-contained report (HTML, Markdown, JSON, CSV, SVG) and print the five verdicts.",
}


def _command(name: str) -> click.Command:
    @click.command(name, help=f"{_HELP[name]}\n\n\b\nExample:  rlgen-stats {name} my-study")
    @study_argument
    @click.option(
        "--force",
        is_flag=True,
        help="Run again although up to date, even on crosscoders that failed their health checks.",
    )
    @scheduler_option
    @quiet_option
    @json_option
    @handle_errors
    def command(study: str, force: bool, scheduler: str | None, quiet: bool, as_json: bool) -> None:
        from rlgen_stats.cli.study import finish

        finish(study, (name,), (name,) if force else (), scheduler, quiet, as_json)

    return command


def _features(_: click.Context, __: click.Parameter, value: str | None) -> list[int]:
    """``1,2,3`` as numbers."""
    if value is None:
        return []
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"expected feature ids as 12,407, got {value!r}.") from None


@click.command("intervene")
@study_argument
@click.option("--set", "set_name", metavar="NAME", help="Another set: selected, confirmed, candidate or paper.")
@click.option("--features", callback=_features, metavar="IDS", help="These features, e.g. 12,407.")
@click.option("--direction", type=click.Choice(["disable", "amplify"]), help="One direction only; default both.")
@click.option("--dose", "doses", type=float, multiple=True, help="Multipliers of the dose grid; may be repeated.")
@click.option("--dry-run", is_flag=True, help="Say what it would run and roughly how long, and stop.")
@click.option(
    "--force",
    is_flag=True,
    help="Run the study's own trial again although up to date.",
)
@scheduler_option
@quiet_option
@json_option
@handle_errors
def intervene(
    study: str,
    set_name: str | None,
    features: list[int],
    direction: Literal["disable", "amplify"] | None,
    doses: tuple[float, ...],
    dry_run: bool,
    force: bool,
    scheduler: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Disable a feature set in the RL model and amplify it in base, with matched controls, on unused prompts.

    Without options this is a stage of the study, on the set it selected. With --set, --features, --direction or --dose
    it is a trial of its own: results.zarr/trial-NAME, completions below intervention/NAME.

    \b
    Examples:  rlgen-stats intervene my-study
               rlgen-stats intervene my-study --dry-run
               rlgen-stats intervene my-study --features 12,407 --direction disable --dose 0.5 --dose 0.25
    """  # noqa: D301 - click needs the backspace itself
    from rlgen_stats.cli.study import finish

    own = set_name is None and not features and direction is None and not doses
    if own and not dry_run:
        finish(study, ("intervene",), ("intervene",) if force else (), scheduler, quiet, as_json)
        return
    from rlgen_stats.toolkit.study.trials import DIRECTIONS, run_trial

    with progress_for(quiet=quiet) as progress:
        found = run_trial(
            study,
            features=features,
            set_name=set_name if set_name or features else "selected",
            directions=DIRECTIONS if direction is None else (direction,),
            doses=doses,
            dry_run=dry_run,
            progress=progress,
        )
    if as_json:
        print_json(_told(found))
    else:
        _print(found)


def _told(found: TrialRun) -> dict[str, Any]:
    plan = found.plan
    told: dict[str, Any] = {
        "name": found.name, "features": list(plan.features), "prompts": plan.n_prompts, "samples": plan.n_samples,
        "controls": plan.n_controls, "arms": plan.arms, "stored": plan.stored, "completions": plan.completions,
        "seconds": found.seconds, "why_not": plan.why_not,
    }  # fmt: skip
    if found.result is not None:
        told["results"] = f"trial-{found.name}"
        rows = {str(d): found.result.sel(direction=d) for d in found.result["direction"].values}
        told["verdicts"] = {
            direction: {
                "verdict": str(row["verdict"].item()),
                "effect": float(row["effect"].sel(condition="set")) if "set" in row["condition"] else None,
                "rank_p": float(row["rank_p"]),
                "reasons": str(row["reasons"].item()).split("; "),
            }
            for direction, row in rows.items()
            if direction in plan.arms
        }
    return told


def _print(found: TrialRun) -> None:
    plan = found.plan
    arms = ", ".join(
        f"{n} arms {direction}" + (f" ({plan.stored[direction]} done)" if plan.stored[direction] else "")
        for direction, n in plan.arms.items()
    )
    click.echo(f"{found.name}: {len(plan.features)} feature(s); {arms or 'nothing to run'}")
    if plan.why_not:
        click.echo(f"  {plan.why_not}")
    if found.result is None:
        time = "" if found.seconds is None else f", roughly {_time(found.seconds)} at the speed of the outcomes stage"
        size = f"{plan.n_prompts} prompts, {plan.n_samples} sample(s) an arm"
        most = f"{plan.completions:,} completions of up to {plan.max_new_tokens} tokens"
        click.echo(f"  at most {most} ({size}){time}")
        return
    for direction in found.result["direction"].values:
        row = found.result.sel(direction=direction)
        if str(row["reasons"].item()).startswith("not_asked"):
            continue
        click.secho(f"  {direction}: {row['verdict'].item()}", bold=True)
        for reason in str(row["reasons"].item()).split("; "):
            click.echo(f"    {reason}")
    click.echo(f"  results.zarr/trial-{found.name}")


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


COMMANDS = {name: _command(name) for name in _HELP} | {"intervene": intervene}
