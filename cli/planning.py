"""Commands simulate (studies whose truth is known) and power (sample size)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import click

from rlgen_stats.cli.console import (
    echo,
    handle_errors,
    json_option,
    print_json,
    print_table,
    progress_for,
    quiet_option,
)

if TYPE_CHECKING:
    from rlgen_stats.toolkit.progress import Progress
    from rlgen_stats.toolkit.statistics.planning.power import Control, Design, Power
    from rlgen_stats.toolkit.statistics.planning.power_check import SimulatedPower

MOST: Final = 10**12
"""More prompts, features or runs than this are a slip, and no number of numpy's holds many more."""


class _Count(click.types.IntParamType):
    """A whole number up to ``MOST``, which ``--help`` need not say."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        count: int = super().convert(value, param, ctx)
        if count > MOST:
            self.fail(f"{count} is more than {MOST:,}.", param, ctx)
        return count


_COUNT: Final = _Count()
_SIMULATION: Final = (
    ("--prompts", "n_prompts", 400, "Number of prompts."),
    ("--features", "n_features", 2048, "Number of features."),
    ("--drifting", "drifting", 0.1, "Share of features that change in both arms."),
    ("--generalising", "generalising", 0.02, "Share that rise in rl only, in every task."),
    ("--narrow", "narrow", 0.01, "Share that rise in rl only, in domain."),
    ("--decoys", "decoys", 0.02, "Share that correlate with correctness and do not differ between models."),
    ("--dead", "dead", 0.1, "Share that never fire."),
    ("--effect", "effect", 0.3, "d_z of every planted change."),
    ("--outcome-correlation", "outcome_correlation", 0.2, "Correlation of decoys with correctness."),
    ("--density", "density", 0.25, "Share of prompts on which a feature fires."),
    ("--icc", "icc", 0.1, "Correlation of noise within a cluster of prompts."),
    ("--cluster-size", "cluster_size", 4, "Prompts per cluster."),
    ("--correlation", "correlation", 0.3, "Correlation between features of a group."),
    ("--group", "group", 32, "Features per group."),
    ("--runs", "runs", 2, "Runs per arm."),
    ("--run-sd", "run_sd", 0.05, "Standard deviation of a planted d_z between runs."),
    ("--checkpoints", "checkpoints", 5, "Checkpoints per run."),
    ("--tasks-in", "tasks_in", 1, "Tasks in domain."),
    ("--tasks-out", "tasks_out", 3, "Tasks out of domain."),
    ("--accuracy", "accuracy", 0.4, "Accuracy of base."),
    ("--gain", "gain", 0.2, "Accuracy gained: sft in domain, rl everywhere."),
    ("--samples", "samples", 4, "Graded completions per prompt."),
    ("--seed", "seed", 0, "Seed of all random numbers."),
)

RUNS_SHOWN: Final = (3, 4, 5)
"""Numbers of runs per arm shown unless ``--runs`` names one."""


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    for flag, name, default, text in reversed(_SIMULATION):
        kind = _COUNT if isinstance(default, int) else type(default)
        command = click.option(flag, name, type=kind, default=default, show_default=True, help=text)(command)
    return command


@click.command()
@click.argument("folder", type=click.Path())
@_options
@json_option
@quiet_option
@handle_errors
def simulate(folder: str, as_json: bool, quiet: bool, **settings: Any) -> None:
    """Write feature and outcome stores in which every change is known, to check analyses against the truth.

    FOLDER gets features.zarr, outcomes.zarr and the group 'truth' of results.zarr. Run again with the same settings, an
    interrupted call is resumed.

    \b
    Examples:  rlgen-stats simulate planted --prompts 400 --features 2048 --drifting 0.1 --effect 0.3 --seed 1
               rlgen-stats simulate trap --drifting 0 --generalising 0 --narrow 0 --decoys 1 --dead 0 --gain 0
    \b
    Then, in Python:
      features = open_features("planted/features.zarr")
      truth = open_results("planted/results.zarr", "truth").load()
      drift = drift_test(features, models=["rl1@100"], clusters="cluster")
      (drift.call == "DRIFT").groupby(truth.kind).mean("feature").compute()
    """  # noqa: D301 - click needs the backspace itself
    from dataclasses import asdict

    from rlgen_stats.toolkit.statistics.planning.planted_truth import KINDS, Simulation, plant_truth
    from rlgen_stats.toolkit.statistics.planning.simulate import write_simulation

    simulation = Simulation(**settings)
    with progress_for(quiet=quiet) as progress:
        written = write_simulation(folder, simulation, progress=progress)
    kind = plant_truth(simulation).kind
    counts = {name: int((kind == name).sum()) for name in KINDS}
    if as_json:
        print_json(asdict(written) | {"simulation": asdict(simulation), "planted": counts})
        return
    resumed = f" ({written.n_resumed} of them written before)" if written.n_resumed else ""
    echo(
        f"{folder}: {written.n_models} models{resumed}, {simulation.n_prompts:,} prompts, "
        f"{simulation.n_features:,} features, seed {simulation.seed}."
    )
    effect = f"d_z {simulation.effect:g}"
    descriptions = {
        "null": "nothing",
        "dead": "never fires",
        "drifting": f"{effect}, up or down, in sft and rl",
        "generalising": f"{effect}, up, in rl, every task",
        "narrow": f"{effect}, up, in rl, in domain",
        "decoy": f"correlates with correctness, {simulation.outcome_correlation:g}",
    }
    print_table(["kind", "features", "planted"], [[name, f"{n:,}", descriptions[name]] for name, n in counts.items()])
    echo(f"  truth: open_results({written.results!r}, 'truth')")


@click.command()
@click.option("--effect", type=float, default=0.1, show_default=True, help="Smallest d_z that matters.")
@click.option("--power", "target_power", type=float, default=0.9, show_default=True, help="Chance to find it.")
@click.option("--features", type=_COUNT, default=32_768, show_default=True, help="Testable features in the family.")
@click.option("--true-share", type=float, default=0.01, show_default=True, help="Share of them with the effect.")
@click.option("--density", type=float, default=0.25, show_default=True, help="Share of prompts a feature fires on.")
@click.option("--icc", type=float, default=0.0, show_default=True, help="Correlation of differences in a cluster.")
@click.option("--cluster-size", type=_COUNT, default=1, show_default=True, help="Prompts per cluster.")
@click.option("--alpha", type=float, default=0.05, show_default=True, help="Error rate.")
@click.option("--prompts", type=_COUNT, help="Instead: the smallest effect this many prompts can show.")
@click.option(
    "--runs", type=_COUNT, help="Runs per arm of the comparison of arms; default: 3, 4, 5 and what is needed."
)
@click.option("--run-sd", type=float, default=0.05, show_default=True, help="Sd of a feature's d_z between runs.")
@click.option("--simulate", "n_worlds", type=_COUNT, metavar="N", help="Check the answer in N simulated data sets.")
@click.option("--seed", type=_COUNT, default=0, show_default=True, help="Seed of the simulation.")
@json_option
@quiet_option
@handle_errors
def power(
    effect: float,
    target_power: float,
    features: int,
    true_share: float,
    density: float,
    icc: float,
    cluster_size: int,
    alpha: float,
    prompts: int | None,
    runs: int | None,
    run_sd: float,
    n_worlds: int | None,
    seed: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Say how many prompts and runs a study needs to see an effect, or what a number of prompts can show.

    d_z is the mean of a paired difference over prompts divided by its standard deviation, zeros included. Planned is
    the power to show that a feature differs; a call of DRIFT also needs more than the margin: plan with the excess.

    \b
    Examples:  rlgen-stats power --effect 0.1 --power 0.9 --features 32768
               rlgen-stats power --prompts 500 --icc 0.05 --cluster-size 4 --simulate 20
    """  # noqa: D301 - click needs the backspace itself
    from rlgen_stats.toolkit.statistics.planning.power import Design

    design = Design(
        effect=effect,
        n_features=features,
        true_share=true_share,
        density=density,
        icc=icc,
        cluster_size=cluster_size,
        alpha=alpha,
    )
    with progress_for(quiet=quiet or as_json) as progress:
        answers = _prompt_answers(design, target_power, prompts)
        checks = _checks(design, answers, n_worlds, seed, progress) if n_worlds else {}
    n_prompts = prompts or answers["fdr"].n_prompts
    arms = _run_answers(design, n_prompts, target_power, runs, run_sd)
    if as_json:
        from dataclasses import asdict

        print_json(
            {
                "design": asdict(design),
                "power_wanted": target_power,
                "run_sd": run_sd,
                "drift": {control: asdict(answer) for control, answer in answers.items()},
                "simulated": {control: asdict(check) for control, check in checks.items()},
                "arms": arms,
            }
        )
        return
    _print_prompts(design, answers, checks, target_power, prompts)
    _print_runs(design, arms, n_prompts, target_power, run_sd)


_CONTROLS: Final[dict[Control, str]] = {"fdr": "BH (FDR)", "fwer": "max-T (FWER)", "none": "one named feature"}


def _prompt_answers(design: Design, target_power: float, prompts: int | None) -> dict[Control, Power]:
    """Prompts needed for the design's effect, or the effect that ``prompts`` can show, under every control."""
    from dataclasses import replace

    from rlgen_stats.toolkit.statistics.planning.power import CONTROLS, detectable_effect, required_prompts

    designs = {control: replace(design, control=control) for control in CONTROLS}
    if prompts is None:
        return {control: required_prompts(one, power=target_power) for control, one in designs.items()}
    return {control: detectable_effect(one, n_prompts=prompts, power=target_power) for control, one in designs.items()}


def _checks(
    design: Design, answers: dict[Control, Power], n_worlds: int, seed: int, progress: Progress
) -> dict[Control, SimulatedPower]:
    """Every answer checked by simulation."""
    from dataclasses import replace

    from rlgen_stats.toolkit.statistics.planning.power_check import simulated_power

    checks = {}
    for control, answer in answers.items():
        planned = replace(design, control=control, effect=answer.effect)
        checks[control] = simulated_power(
            planned, n_prompts=answer.n_prompts, n_worlds=n_worlds, seed=seed, progress=progress
        )
    return checks


def _run_answers(
    design: Design, n_prompts: int, target_power: float, runs: int | None, run_sd: float
) -> list[dict[str, Any]]:
    """Comparison of arms at several numbers of runs, under BH and for one named feature."""
    from dataclasses import asdict, replace

    from rlgen_stats.schemas.errors import NotEstimableError
    from rlgen_stats.toolkit.statistics.planning.power import required_runs, run_power

    rows = []
    for control in ("fdr", "none"):
        one = replace(design, control=control)
        for r in (runs,) if runs else RUNS_SHOWN:
            reached = run_power(one, runs=r, n_prompts=n_prompts, run_sd=run_sd)
            rows.append({"control": control, "needed": False} | asdict(reached))
        try:
            needed = required_runs(one, n_prompts=n_prompts, power=target_power, run_sd=run_sd)
        except NotEstimableError:  # no affordable number of runs reaches it, which _print_runs says
            continue
        rows.append({"control": control, "needed": True} | asdict(needed))
    return rows


def _print_prompts(
    design: Design,
    answers: dict[Control, Power],
    checks: dict[Control, SimulatedPower],
    target_power: float,
    prompts: int | None,
) -> None:
    from rlgen_stats.toolkit.statistics.planning.power import power_at

    dependence = f", clusters of {design.cluster_size} with ICC {design.icc:g}" if design.cluster_size > 1 else ""
    setting = (
        f"{design.n_features:,} features, {design.true_share:.2%} of them changed, firing on {design.density:.0%} "
    )
    if prompts is None:
        echo(f"Prompts needed to see d_z = {design.effect:g} with {target_power:.0%} power:")
    else:
        echo(f"d_z that {prompts:,} prompts show with {target_power:.0%} power:")
    echo(f"  {setting}of prompts{dependence}, alpha {design.alpha:g}")
    header = ["errors controlled by", "prompts", "d_z", "power", "p below"]
    rows = {
        control: [
            _CONTROLS[control],
            f"{answer.n_prompts:,}",
            f"{answer.effect:.3f}",
            f"{answer.power:.2f}",
            f"{answer.threshold:.2g}",
        ]
        for control, answer in answers.items()
    }
    if prompts is not None:
        from dataclasses import replace

        header.append(f"power at {design.effect:g}")
        for control, row in rows.items():
            row.append(f"{power_at(replace(design, control=control), n_prompts=prompts).power:.2f}")
    if checks:
        header += ["planned at", "simulated", "errors"]
        for control, check in checks.items():
            rows[control] += [
                f"{check.planned:.3f}, {check.n_features:,} features",
                f"{check.power:.3f} ({check.power_low:.3f} to {check.power_high:.3f})",
                f"{check.error_rate:.3f}",
            ]
    print_table(header, list(rows.values()))


def _print_runs(design: Design, arms: list[dict[str, Any]], n_prompts: int, target_power: float, run_sd: float) -> None:
    echo(
        f"\nRuns per arm to see a difference of {design.effect:g} between arms ({n_prompts:,} prompts, sd between runs "
        f"{run_sd:g}; the unit is the run):"
    )
    rows = [
        [
            _CONTROLS[arm["control"]],
            f"{arm['runs']}{' (needed)' if arm['needed'] else ''}",
            "-" if math.isnan(arm["power_moderated"]) else f"{arm['power_moderated']:.2f}",
            f"{arm['power_permutation']:.2f}" if not arm["verdict"] else "impossible",
            f"{arm['floor']:.2g}",
        ]
        for arm in arms
    ]
    print_table(["errors controlled by", "runs", "moderated t", "permutation", "smallest p"], rows)
    if not any(arm["needed"] for arm in arms):
        echo(f"  No number of runs up to 200 reaches {target_power:.0%} power.")
    for verdict in dict.fromkeys(arm["verdict"] for arm in arms if arm["verdict"]):
        echo(f"  {verdict}.")


COMMANDS = {"simulate": simulate, "power": power}
