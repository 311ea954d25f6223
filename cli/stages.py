"""One command a stage; each runs what it needs first."""

from __future__ import annotations

from typing import Final

import click

from rlgen_stats.cli.console import handle_errors, json_option, quiet_option, scheduler_option, study_argument

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


COMMANDS = {name: _command(name) for name in _HELP}
