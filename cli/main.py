"""The command group; commands are found by name and imported when asked for."""

from __future__ import annotations

import importlib
import math
from importlib.metadata import version as installed_version
from typing import Any, Final

import click

_COMMANDS: Final = {
    "demo": ("rlgen_stats.cli.demo", "Run the embedded study, from pretraining a tiny base to the report."),
    "init": ("rlgen_stats.cli.stages", "Start a study folder with a commented study.yaml."),
    "tasks": ("rlgen_stats.cli.tasks", "List ready-made tasks (MATH-500, ARC, PIQA, ...); add them to a study."),
    "run": ("rlgen_stats.cli.stages", "Bring a study up to date: every stage that is missing or stale."),
    "check": ("rlgen_stats.cli.checking", "Say what is wrong with a study, all at once, and what it will take."),
    "status": ("rlgen_stats.cli.stages", "Show which stages are done, stale, running, interrupted or waiting."),
    "posttrain": ("rlgen_stats.cli.stages", "Train the runs with TRL (SFT, GRPO), keeping checkpoints."),
    "outcomes": ("rlgen_stats.cli.stages", "Sample and grade completions of every model."),
    "extract": ("rlgen_stats.cli.stages", "Store labelled activations of the same texts in every model."),
    "crosscoder": ("rlgen_stats.cli.stages", "Train the crosscoders and measure their health."),
    "encode": ("rlgen_stats.cli.stages", "Summarise every checkpoint's features per prompt."),
    "movement": ("rlgen_stats.cli.stages", "Measure how far each model moved from base."),
    "align": ("rlgen_stats.cli.stages", "Attribute features to models; match dictionaries of other seeds."),
    "drift": ("rlgen_stats.cli.stages", "Test which features changed, against base and along checkpoints."),
    "stabilize": ("rlgen_stats.cli.stages", "Find when features and top sets stop changing."),
    "significance": ("rlgen_stats.cli.stages", "Accuracy, transitions, and the contrast of specific features."),
    "select": ("rlgen_stats.cli.stages", "Choose generalisation features; confirm on other prompts."),
    "separation": ("rlgen_stats.cli.stages", "Say how well selected features tell the models apart."),
    "tokens": ("rlgen_stats.cli.stages", "Say what tokens and positions explain of the selected features."),
    "replicability": ("rlgen_stats.cli.stages", "Say what dictionaries of other seeds agree on."),
    "intervene": ("rlgen_stats.cli.intervene", "Disable and amplify the chosen features in the live models."),
    "report": ("rlgen_stats.cli.stages", "Write the report and print the five verdicts."),
    "view": ("rlgen_stats.cli.viewing", "Look at a study in the browser: models, features, prompts, completions."),
    "features": (
        "rlgen_stats.cli.features",
        "Read features: the model they are specific to, where they fire, tokens they promote.",
    ),
    "compare-outcomes": (
        "rlgen_stats.cli.comparing",
        "Compare two models on the same prompts, from tables, a study or evaluation logs.",
    ),
    "simulate": ("rlgen_stats.cli.planning", "Write stores with known effects, to check analyses against the truth."),
    "power": ("rlgen_stats.cli.planning", "Say how many prompts and runs an effect needs, or what a number can show."),
    "inspect": ("rlgen_stats.cli.stores", "Say what a store or a study contains."),
    "verify": ("rlgen_stats.cli.stores", "Check every chunk, label, count and digest of a store or a study."),
    "migrate": ("rlgen_stats.cli.stores", "Raise stores of an earlier release to this one's layout."),
    "schema": ("rlgen_stats.cli.stores", "Print the declared layout of a dataset as JSON."),
    "import": ("rlgen_stats.cli.import_export", "Import an activation cache made elsewhere, with its label table."),
    "export-requests": ("rlgen_stats.cli.import_export", "Write what another engine, such as vLLM, is to sample."),
    "import-outcomes": ("rlgen_stats.cli.import_export", "Take completions of a model that were sampled elsewhere."),
    "export": ("rlgen_stats.cli.import_export", "Export selected activations and labels to safetensors or npy."),
    "import-crosscoder": ("rlgen_stats.cli.import_export", "Import crosscoder weights of other tools."),
    "export-crosscoder": ("rlgen_stats.cli.import_export", "Export a crosscoder, or an SAE a view, for other tools."),
    "export-features": ("rlgen_stats.cli.import_export", "Export features as a table and as Neuronpedia dashboards."),
    "push-crosscoder": ("rlgen_stats.cli.import_export", "Put a crosscoder on the Hugging Face Hub, with a card."),
    "pull-crosscoder": ("rlgen_stats.cli.import_export", "Bring a crosscoder from the Hugging Face Hub."),
}


def _finite(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """The value of an option that is a number; NaN passes every range that click checks."""
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, float) and not math.isfinite(one):
            raise click.BadParameter(f"{one} is no finite number.", context, parameter)
    return value


class _LazyGroup(click.Group):
    """A group whose commands are imported on use; the help page needs none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(_COMMANDS[cmd_name][0])
        command = module.COMMANDS[cmd_name]
        assert isinstance(command, click.Command)  # noqa: S101 - a programming error, not input
        for parameter in command.params:
            if isinstance(parameter.type, click.types.FloatParamType):
                parameter.callback = parameter.callback or _finite
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(args[0], _COMMANDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(_COMMANDS)}."
            raise click.UsageError(f"no command is called {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(installed_version("rlgen-stats"), prog_name="rlgen-stats")
def main() -> None:
    """Find what post-training changed inside a language model, when, and whether it matters.

    \b
    Try it:            rlgen-stats demo
    Your own study:    rlgen-stats init my-study && rlgen-stats run my-study
    """  # noqa: D301 - click needs the backspace itself
