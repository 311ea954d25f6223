"""view: a study's explorer in the browser."""

from __future__ import annotations

import importlib.util

import click

from rlgen_stats.cli.console import echo, handle_errors, study_argument


@click.command()
@study_argument
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=5006,
    show_default=True,
    help="Port on 127.0.0.1; 0 takes any that is free.",
)
@click.option("--no-browser", is_flag=True, help="Print the address only.")
@handle_errors
def view(study: str, port: int, no_browser: bool) -> None:
    """Serve the report's facts to a browser on this machine: models, drift, features, prompts and completions.

    Pick a task, a checkpoint, an edit and an outcome; a dot or a row of a feature leads to its contexts. Results that a
    run adds meanwhile are there when the page is loaded again. Ctrl-C ends it.

    \b
    Examples:  rlgen-stats view runs/demo
               rlgen-stats view runs/demo --port 0 --no-browser
    """  # noqa: D301 - click needs the backspace itself
    from rlgen_stats.schemas.errors import InputError, StageError
    from rlgen_stats.toolkit.study import open_for_run
    from rlgen_stats.toolkit.study.stage_graph import STAGES

    opened = open_for_run(study, exact=False)
    stale = [stage.name for stage in STAGES if stage.name != "report" and opened.state(stage.name) == "stale"]
    if stale:
        raise StageError(
            f"the results of {', '.join(stale)} are of another study.yaml than is in {study} now; run: "
            f"rlgen-stats run {study}"
        )
    if importlib.util.find_spec("bokeh") is None:
        raise InputError("the explorer needs Bokeh, which is not installed; run: pip install 'rlgen-stats[view]'")
    from rlgen_stats.toolkit.reporting.explorer import study_server

    server = study_server(opened.folder, opened.spec, port=port)
    server.start()
    echo(f"http://127.0.0.1:{server.port}/ shows {study}; Ctrl-C ends it.")
    if not no_browser:
        server.show("/")
    try:
        server.io_loop.start()
    except KeyboardInterrupt:
        echo()
    finally:
        server.stop()


COMMANDS = {"view": view}
