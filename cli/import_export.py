"""Activations and crosscoders in and out."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from rlgen_stats.cli.console import (
    echo,
    fail,
    handle_errors,
    json_option,
    print_json,
    progress_for,
    quiet_option,
    study_argument,
)

if TYPE_CHECKING:
    from rlgen_stats.toolkit.crosscoder import Crosscoder


@click.command("import")
@click.argument("cache", type=click.Path())
@click.option("--labels", metavar="FILE", required=True, help="Label table, one row a token: .parquet, .csv, .tsv, ...")
@click.option("--into", metavar="STORE", required=True, help="Activation store; created if it does not exist.")
@click.option("--model", metavar="RUN@STEP", required=True, help="Model the cache comes from, e.g. rl@200.")
@click.option("--site", required=True, help="Site in the model, e.g. block12.")
@click.option("--tensor", metavar="KEY", help="Name of the tensor, where a file holds several.")
@click.option(
    "--checkpoint",
    metavar="FOLDER",
    help="Read the first texts with this checkpoint, and refuse activations of another block than --site names.",
)
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
    checkpoint: str | None,
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

    if checkpoint is not None:
        from rlgen_stats.toolkit.extraction.block_check import check_block

        check_block(cache, labels, site, checkpoint, tensor=tensor, ignore=ignore)
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
    echo(
        f"{into}: {done.model} at {done.site} has {done.n_tokens} tokens of {done.n_prompts} prompts, width "
        f"{done.width}, {done.dtype}, from {done.n_files} {done.format} file(s){before}."
    )


@click.command("export-requests")
@study_argument
@click.option("--model", "models", metavar="RUN@STEP", multiple=True, help="Model to sample; repeatable; default all.")
@click.option("--texts", is_flag=True, help="Instead: the texts that all models read, to store hidden states of them.")
@click.option("--to", "into", metavar="FOLDER", help="Where to write; default: requests in the study's folder.")
@json_option
@handle_errors
def export_requests_command(study: str, models: tuple[str, ...], texts: bool, into: str | None, as_json: bool) -> None:
    """Write what another engine is to sample: prompts as tokens, seeds and sampling settings, a file a model.

    A script of ten lines runs them under vLLM, in its own environment (docs/outcomes-from-elsewhere.md);
    'import-outcomes' reads what it writes.

    \b
    Examples:  rlgen-stats export-requests my-study
               rlgen-stats export-requests my-study --model base@0 --model rl@200 --to requests
    """  # noqa: D301 - click needs the backspace itself
    from dataclasses import asdict

    from rlgen_stats.toolkit.study.outcome_requests import export_requests, export_texts

    if texts and models:
        fail("--texts are the same for all models; leave --model out.")
    written = export_texts(study, to=into) if texts else export_requests(study, models, to=into)
    if as_json:
        print_json([asdict(one) for one in written])
        return
    for one in written:
        what = f"completions of {one.model} ({one.checkpoint})" if one.model else "texts; their labels: labels.parquet"
        echo(f"{one.file}: {one.n_requests:,} {what}.")


@click.command("import-outcomes")
@study_argument
@click.argument("files", metavar="FILE...", type=click.Path(), nargs=-1)
@click.option("--model", metavar="RUN@STEP", required=True, help="Model that was sampled, e.g. rl@200 or base@0.")
@click.option("--greedy", metavar="FILE", multiple=True, type=click.Path(), help="File of greedy ones; repeatable.")
@click.option("--no-greedy", is_flag=True, help="Let the first sample stand in for greedy completions.")
@click.option("--no-samples", is_flag=True, help="Let the greedy completion stand in for samples.")
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    help="Verdicts to take: a column, metric or scorer; repeatable where tasks differ; default: column correct.",
)
@click.option("--grade-here", is_flag=True, help="Let the study's graders decide although verdicts come along.")
@click.option("--temperature", type=float, help="Sampling temperature, where the files do not record it.")
@click.option("--top-p", type=float, help="Nucleus mass, where the files do not record it.")
@click.option("--max-new-tokens", type=int, help="Length limit in tokens, where the files do not record it.")
@click.option("--engine", help="What sampled them, where the files do not say: e.g. vllm; here: this toolkit.")
@click.option("--yes", is_flag=True, help="Replace completions of this model that the study has.")
@json_option
@handle_errors
def import_outcomes_command(
    study: str,
    files: tuple[str, ...],
    model: str,
    greedy: tuple[str, ...],
    no_greedy: bool,
    no_samples: bool,
    metrics: tuple[str, ...],
    grade_here: bool,
    temperature: float | None,
    top_p: float | None,
    max_new_tokens: int | None,
    engine: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Take completions of one model that were sampled elsewhere; those of all other models must be of the same engine.

    FILE is a table (jsonl, parquet, csv: prompt_id, sample, text or token_ids, perhaps correct), what vLLM or SGLang
    returned as jsonl, samples_*.jsonl of lm-evaluation-harness, a log of Inspect, or STEP.jsonl that verl dumps. They
    are graded by the study's graders unless verdicts are taken. Prompts, tokenizer and sampling settings must be the
    study's.

    \b
    Examples:  rlgen-stats import-outcomes my-study --model rl@200 rl-200.jsonl --greedy rl-200-greedy.jsonl
                 --temperature 1 --top-p 1 --max-new-tokens 512
               rlgen-stats import-outcomes my-study --model base@0 samples_gsm8k_2026-01-02.jsonl --no-samples
    """  # noqa: D301 - click needs the backspace itself
    from dataclasses import asdict

    from rlgen_stats.toolkit.study.outcome_imports import import_outcomes

    if no_greedy and no_samples:
        fail("--no-greedy and --no-samples exclude one another, expected one of them; something must have been drawn.")
    done = import_outcomes(
        study,
        model,
        files,
        greedy=greedy,
        metrics=metrics,
        grade_here=grade_here,
        stand_in="greedy" if no_greedy else "samples" if no_samples else "",
        declared={"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens},
        engine=engine,
        replace=lambda question: yes or (sys.stdin.isatty() and click.confirm(f"{question}. Go on?")),
    )
    if as_json:
        print_json(asdict(done))
        return
    origin = done.origin
    graded = "to be graded by the study's graders" if origin.graded_by == "here" else f"graded by {origin.graded_by}"
    echo(
        f"{done.file}: {done.model}, {done.n_prompts:,} prompts, 1 greedy and {done.n_samples} sampled completions of "
        f"each, from {origin.engine}, {graded}; {done.n_truncated:,} cut off."
    )
    if not done.changed:
        echo("They were imported before; nothing changed.")
    if done.missing:
        echo(f"To be imported from {origin.engine} too, before 'run': {', '.join(done.missing)}.")


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
    echo(f"{done.folder}: {done.n_tokens} tokens of {', '.join(done.models)} at {done.site}.")
    for file in done.files:
        echo(f"  {file}")


@click.command("import-crosscoder")
@click.argument("weights", type=click.Path())
@click.option(
    "--view", "views", metavar="RUN@STEP", multiple=True, required=True, help="Model of each layer, in order."
)
@click.option("--to", "out", metavar="FOLDER", required=True, help="New folder for weights.safetensors and spec.json.")
@json_option
@handle_errors
def import_crosscoder_command(weights: str, views: tuple[str, ...], out: str, as_json: bool) -> None:
    """Import a crosscoder trained elsewhere: crosscoder_learning, dictionary_learning, dfc_learning, W_enc and W_dec.

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
    _describe(crosscoder, out, as_json)


@click.command("export-crosscoder")
@click.argument("crosscoder", type=click.Path())
@click.option("--to", "out", metavar="FOLDER", required=True, help="New folder to write.")
@click.option(
    "--layout",
    type=click.Choice(["crosscoder_learning", "model-diff", "saelens"]),
    default="crosscoder_learning",
    show_default=True,
    help="Tool that is to open it; saelens: one SAE a view.",
)
@json_option
@handle_errors
def export_crosscoder_command(crosscoder: str, out: str, layout: str, as_json: bool) -> None:
    """Export a crosscoder for other tools: a layer a view, or an SAE a view.

    \b
    Examples:  rlgen-stats export-crosscoder runs/demo/crosscoder/main --to out/main
               rlgen-stats export-crosscoder runs/demo/crosscoder/main --to out/saes --layout saelens
    """  # noqa: D301 - click needs the backspace itself
    from rlgen_stats.toolkit.crosscoder import export_crosscoder, export_saes, load_crosscoder

    loaded = load_crosscoder(crosscoder)
    written = export_saes(loaded, out) if layout == "saelens" else [export_crosscoder(loaded, out, layout=layout)]
    if as_json:
        print_json({"files": [str(path) for path in written]})
    else:
        for path in written:
            echo(str(path))


@click.command("export-features")
@study_argument
@click.option("--to", "out", metavar="FOLDER", required=True, help="New folder to write.")
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(["parquet", "neuronpedia"]),
    help="parquet: one table; neuronpedia: JSON of SAEDashboard, a folder a model; repeatable; default both.",
)
@json_option
@handle_errors
def export_features_command(study: str, out: str, formats: tuple[str, ...], as_json: bool) -> None:
    """Export a study's features: everything known of each as one table, and dashboards that Neuronpedia takes.

    \b
    Examples:  rlgen-stats export-features runs/demo --to out/features
               rlgen-stats export-features runs/demo --to out/features --format parquet
    """  # noqa: D301 - click needs the backspace itself
    from rlgen_stats.toolkit.reporting import export_features, load_results
    from rlgen_stats.toolkit.study import open_for_run

    opened = open_for_run(study, exact=False)
    results = load_results(opened.folder)
    options = {"formats": formats} if formats else {}
    files = [str(file) for file in export_features(opened.folder, opened.spec, results, out, **options)]
    if as_json:
        print_json({"files": files})
    else:
        for file in files:
            echo(file)


@click.command("push-crosscoder")
@click.argument("crosscoder", type=click.Path())
@click.argument("repository", metavar="OWNER/NAME[@BRANCH][/SUBFOLDER]")
@click.option("--private/--public", default=None, help="Of a new repository; default: as its owner has set.")
@click.option("--license", metavar="NAME", help="License that the model card names, e.g. apache-2.0.")
@json_option
@handle_errors
def push_crosscoder_command(
    crosscoder: str, repository: str, private: bool | None, license: str | None, as_json: bool
) -> None:
    """Put a crosscoder into a repository of the Hugging Face Hub, with a model card of its spec and health.

    One commit: all files are there afterwards, or none. Log in with 'hf auth login' first.

    \b
    Example:  rlgen-stats push-crosscoder runs/demo/crosscoder/main me/demo-crosscoder --private
    """  # noqa: D301 - click needs the backspace itself
    from rlgen_stats.toolkit.crosscoder import push_crosscoder

    commit = push_crosscoder(crosscoder, repository, private=private, license=license)
    if as_json:
        print_json({"commit": commit})
    else:
        echo(commit)


@click.command("pull-crosscoder")
@click.argument("repository", metavar="OWNER/NAME[@REVISION][/SUBFOLDER]")
@click.option("--to", "out", metavar="FOLDER", required=True, help="New folder.")
@json_option
@handle_errors
def pull_crosscoder_command(repository: str, out: str, as_json: bool) -> None:
    """Bring a crosscoder from a repository of the Hugging Face Hub, checked against the hash of its weights.

    \b
    Example:  rlgen-stats pull-crosscoder me/demo-crosscoder --to crosscoder/main
    """  # noqa: D301 - click needs the backspace itself
    from rlgen_stats.toolkit.crosscoder import pull_crosscoder

    _describe(pull_crosscoder(repository, out), out, as_json)


def _describe(crosscoder: Crosscoder, folder: str, as_json: bool) -> None:
    if as_json:
        print_json(crosscoder.describe() | {"folder": folder})
        return
    width = "/".join(map(str, dict.fromkeys(crosscoder.widths)))
    echo(
        f"{folder}: {crosscoder.n_features:,} features of {', '.join(crosscoder.views)}, width {width}, "
        f"{crosscoder.sparsity}."
    )


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
    "export-requests": export_requests_command,
    "import-outcomes": import_outcomes_command,
    "export": export_store,
    "import-crosscoder": import_crosscoder_command,
    "export-crosscoder": export_crosscoder_command,
    "export-features": export_features_command,
    "push-crosscoder": push_crosscoder_command,
    "pull-crosscoder": pull_crosscoder_command,
}
