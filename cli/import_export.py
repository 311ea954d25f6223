"""Activations and crosscoders in and out."""

from __future__ import annotations

import click

from rlgen_stats.cli.console import fail, handle_errors, json_option, print_json, progress_for, quiet_option


@click.command("import")
@click.argument("cache", type=click.Path())
@click.option("--labels", metavar="FILE", required=True, help="Label table, one row a token: .parquet, .csv, .csv.gz.")
@click.option("--into", metavar="STORE", required=True, help="Activation store; created if it does not exist.")
@click.option("--model", metavar="RUN@STEP", required=True, help="Model the cache comes from, e.g. rl@200.")
@click.option("--site", required=True, help="Site in the model, e.g. block12.")
@click.option("--tensor", metavar="KEY", help="Name of the tensor, where a file holds several.")
@click.option("--dtype", help="Stored type: float32, float16 or bfloat16; default: the cache's.")
@click.option("--allow-nonfinite", is_flag=True, help="Keep NaN and infinite values.")
@click.option("--ignore", metavar="COL", multiple=True, help="A column of the label table to leave out; repeatable.")
@json_option
@quiet_option
@handle_errors
def import_cache(
    cache: str,
    labels: str,
    into: str,
    model: str,
    site: str,
    tensor: str | None,
    dtype: str | None,
    allow_nonfinite: bool,
    ignore: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Import an activation cache made elsewhere: safetensors, npy, pt, or memmap shards of crosscoder_learning.

    Nothing pickled is ever loaded. Interrupted, it goes on where it stopped when run again.

    \b
    Example:  rlgen-stats import caches/rl-200 --labels labels.parquet
                --into activations.zarr --model rl@200 --site block12
    """  # noqa: D301 - click needs the backspace itself
    from dataclasses import asdict

    from rlgen_stats.toolkit.exchange import import_activations

    with progress_for(quiet=quiet) as progress:
        done = import_activations(
            cache,
            labels,
            into,
            model=model,
            site=site,
            tensor=tensor,
            dtype=dtype,
            ignore=ignore,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
    if as_json:
        print_json(asdict(done) | {"store": into})
        return
    before = f" ({done.n_resumed} of them were stored before)" if done.n_resumed else ""
    click.echo(
        f"{into}: {done.model} at {done.site} has {done.n_tokens} tokens of {done.n_prompts} prompts, width "
        f"{done.width}, {done.dtype}, from {done.n_files} {done.format} file(s){before}."
    )


@click.command("export")
@click.argument("store", type=click.Path())
@click.option("--to", "out", metavar="FOLDER", required=True, help="New folder to write.")
@click.option("--model", "models", metavar="RUN@STEP", multiple=True, help="Model to export; repeatable; default all.")
@click.option("--site", help="Site in the model; default: the only one.")
@click.option(
    "--where",
    "conditions",
    metavar="LABEL=VALUE",
    multiple=True,
    help="Only these tokens, e.g. segment=completion or task=math,sciq (any of them); repeatable (all must hold).",
)
@click.option("--format", "formats", metavar="FORMAT", multiple=True, help="safetensors (default) or npy; repeatable.")
@json_option
@quiet_option
@handle_errors
def export_store(
    store: str,
    out: str,
    models: tuple[str, ...],
    site: str | None,
    conditions: tuple[str, ...],
    formats: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Export selected activations: one file a model, and their labels as parquet, in the same order.

    \b
    Examples:  rlgen-stats export runs/demo/activations.zarr --to out
               rlgen-stats export runs/demo/activations.zarr --to out --model rl@80
                 --where segment=completion --where task=sum,diff --format npy
    """  # noqa: D301 - click needs the backspace itself
    from dataclasses import asdict

    from rlgen_stats.toolkit.exchange import export_activations

    with progress_for(quiet=quiet) as progress:
        done = export_activations(
            store,
            out,
            models=models or None,
            site=site,
            where=_where(conditions),
            formats=formats or ("safetensors",),
            progress=progress,
        )
    if as_json:
        print_json(asdict(done))
        return
    click.echo(f"{done.folder}: {done.n_tokens} tokens of {', '.join(done.models)} at {done.site}.")
    for file in done.files:
        click.echo(f"  {file}")


@click.command("import-crosscoder")
@click.argument("weights", type=click.Path())
@click.option(
    "--view", "views", metavar="RUN@STEP", multiple=True, required=True, help="Model of each layer, in order."
)
@click.option("--to", "out", metavar="FOLDER", required=True, help="New folder for weights.safetensors and spec.json.")
@json_option
@handle_errors
def import_crosscoder_command(weights: str, views: tuple[str, ...], out: str, as_json: bool) -> None:
    """Import a crosscoder trained with crosscoder_learning or dictionary_learning.

    WEIGHTS is a .safetensors or .pt file, or the folder it is in. A study uses such weights without this command:
    write their path as ``weights`` of a crosscoder in study.yaml.

    \b
    Example:  rlgen-stats import-crosscoder runs/crosscoder --view base@0 --view rl@200 --to crosscoder/pair-rl
    """  # noqa: D301 - click needs the backspace itself
    from pathlib import Path

    from rlgen_stats.toolkit.crosscoder import import_crosscoder

    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        fail(f"{folder} is not empty; name a new folder.")
    crosscoder = import_crosscoder(weights, views, name=folder.name)
    folder.mkdir(parents=True, exist_ok=True)
    crosscoder.save(folder)
    if as_json:
        print_json(crosscoder.describe() | {"folder": out})
        return
    click.echo(
        f"{out}: {crosscoder.n_features:,} features of {', '.join(views)}, width {crosscoder.width}, "
        f"{crosscoder.sparsity}."
    )


@click.command("export-crosscoder")
@click.argument("crosscoder", type=click.Path())
@click.option("--to", "out", metavar="FOLDER", required=True, help="New folder for model.safetensors and config.json.")
@handle_errors
def export_crosscoder_command(crosscoder: str, out: str) -> None:
    """Export a crosscoder in the layout of crosscoder_learning (one layer a view).

    \b
    Example:  rlgen-stats export-crosscoder runs/demo/crosscoder/main --to out/main
    """  # noqa: D301 - click needs the backspace itself
    from rlgen_stats.toolkit.crosscoder import export_crosscoder, load_crosscoder

    click.echo(f"{export_crosscoder(load_crosscoder(crosscoder), out)}")


def _where(conditions: tuple[str, ...]) -> dict[str, object]:
    """``label=a,b`` as the values a label may have."""
    values_of: dict[str, object] = {}
    for condition in conditions:
        label, equals, values = condition.partition("=")
        if not equals or not label or not values:
            fail(f"--where takes label=value or label=value,value, got {condition!r}; e.g. segment=completion.")
        if label in values_of:
            fail(f"--where names {label!r} twice, expected each label once; write {label}=value,value for any of them.")
        values_of[label] = values.split(",")
    return values_of


COMMANDS = {
    "import": import_cache,
    "export": export_store,
    "import-crosscoder": import_crosscoder_command,
    "export-crosscoder": export_crosscoder_command,
}
