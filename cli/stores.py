"""inspect, verify, migrate and schema."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from rlgen_stats.cli.console import (
    echo,
    fail,
    handle_errors,
    heading,
    json_option,
    print_json,
    print_table,
    progress_for,
    quiet_option,
)

if TYPE_CHECKING:
    from rlgen_stats.toolkit.progress import Progress

_store = click.argument("store", type=click.Path())


@click.command("inspect")
@_store
@click.argument("names", nargs=-1, metavar="[NAME]...")
@json_option
@handle_errors
def inspect_store(store: str, names: tuple[str, ...], as_json: bool) -> None:
    """Say what a store or a study contains: models, prompts, sizes, completeness; of one store also its arrays.

    STORE is a store, or a study folder; a path or a URL such as s3://bucket/study. NAME, a store, an analysis or a
    pattern, shows these alone, with all arrays, what they hold, and where they come from.

    \b
    Examples:  rlgen-stats inspect runs/demo
               rlgen-stats inspect runs/demo drift 'selection*'
               rlgen-stats inspect runs/demo/features.zarr --json
    """  # noqa: D301 - click needs the backspace itself
    from rlgen_stats.stores import describe

    facts = describe(store, names)
    if as_json:
        print_json(facts)
    elif names or len(facts) == 1:
        for name, entry in facts.items():
            _print_facts(name, entry)
    else:
        _print_overview(store, facts)


def _print_overview(store: str, facts: dict[str, dict[str, Any]]) -> None:
    """Activations by model, prompts once, then one line a store or analysis, the dictionaries of an analysis as one."""
    from rlgen_stats.schemas.dims import split_dictionary

    for name, entry in facts.items():
        if "tokens" in entry:
            _print_activations(name, entry)
    rows: dict[str, list[str]] = {}
    sizes: dict[str, float] = {}
    for name, entry in facts.items():
        if "tokens" in entry:
            continue
        place, slash, group = name.rpartition("/")
        first = f"{place}{slash}{split_dictionary(group)[0]}" if place.endswith("results.zarr") else name
        sizes[first] = sizes.get(first, 0.0) + entry["bytes"]
        if first in rows:
            rows[first][2] = f"{int(rows[first][2]) + 1}"
            continue
        shape = " x ".join(f"{dim} {size:,}" for dim, size in entry["dimensions"].items())
        rows[first] = [first, f"{len(entry['arrays'])}", "1", shape]
    if rows:
        table = [[*counts, _bytes(sizes[name]), shape] for name, (*counts, shape) in rows.items()]
        print_table(["store or analysis", "arrays", "dictionaries", "size", "dimensions"], table)
    prompts = next((entry["prompts"] for entry in facts.values() if "prompts" in entry), None)
    if prompts:
        _print_prompts(prompts)
    example = next(reversed(rows), "NAME").rpartition("/")[2]
    echo(f"  More about one or several: rlgen-stats inspect {store} {example}")


def _print_facts(name: str, entry: dict[str, Any]) -> None:
    if "tokens" in entry:
        _print_activations(name, entry)
    else:
        _print_heading(name, entry)
        if entry.get("models"):
            echo(f"  models   {', '.join(model['model'] for model in entry['models'])}")
        held = {variable: _held(values) for variable, values in entry.get("summary", {}).items()}
        rows = [[name, _shape(array), array["dtype"], held.get(name, "")] for name, array in entry["arrays"].items()]
        print_table(["array", "dimensions", "type", "holds"], rows)
    if "prompts" in entry:
        _print_prompts(entry["prompts"])
    for key in ("readout", "scale", "test", "null", "unit", "family", "family_size", "seed", "study_id", "spec_hash"):
        if key in entry:
            echo(f"  {key:<11} {entry[key]}")
    if "written_by" in entry:
        writer = entry["written_by"]
        version, commit = writer.get("rlgen-stats", "?"), str(writer["git_commit"])[:12]
        echo(f"  written by  rlgen-stats {version}, commit {commit}")
    echo()


def _held(values: dict[str, Any]) -> str:
    """A variable's summary in a few words."""
    if "missing" not in values:
        return ", ".join(f"{n:,} {value or '(empty)'}" for value, n in values.items())
    numbers = f"{values['least']:.3g} to {values['largest']:.3g}, mean {values['mean']:.3g}" if "mean" in values else ""
    missing = f"{values['missing']:,} missing" if values["missing"] else ""
    return ", ".join(filter(None, (numbers, missing)))


def _print_heading(name: str, entry: dict[str, Any]) -> None:
    heading(name)
    compression = f", compressed {entry['compression']:.1f}x" if entry.get("compression", 1) >= 1.05 else ""
    echo(f"  {_bytes(entry['bytes'])} in {entry['files']:,} files{compression}, layout {entry['schema_version']}")


def _print_prompts(prompts: dict[str, Any]) -> None:
    splits = sorted({split for task in prompts["tasks"].values() for split in task["splits"]})
    rows = [
        [
            task,
            facts["domain"],
            *(f"{n:,}" for n in (facts["prompts"], *(facts["splits"].get(name, 0) for name in splits))),
        ]
        for task, facts in prompts["tasks"].items()
    ]
    print_table(["task", "domain", "prompts", *splits], rows)


def _shape(array: dict[str, Any]) -> str:
    return " x ".join(f"{dim} {size:,}" for dim, size in zip(array["dims"], array["shape"], strict=False))


def _print_activations(name: str, entry: dict[str, Any]) -> None:
    """One line a run and site, its checkpoints side by side."""
    _print_heading(name, entry)
    segments = ", ".join(f"{n:,} {segment}" for segment, n in entry["segments"].items() if n)
    echo(f"  {entry['tokens']:,} tokens ({segments}), text mode {entry['text_mode']}")
    lines: dict[tuple[str, str, int, str], list[dict[str, Any]]] = {}
    for model in sorted(entry["models"], key=lambda m: (m["run"], m["site"], m["step"])):
        lines.setdefault((model["run"], model["site"], model["width"], model["dtype"]), []).append(model)
    rows = []
    for (run, site, width, dtype), checkpoints in lines.items():
        steps = " ".join(_checkpoint(model) for model in checkpoints)
        size = _bytes(sum(model["uncompressed_bytes"] for model in checkpoints))
        complete = "yes" if all(model["complete"] for model in checkpoints) else "no"
        rows.append([run, site, f"{width:,}", dtype, steps, size, complete])
    print_table(["run", "site", "width", "type", "checkpoints", "size", "complete"], rows)


def _checkpoint(model: dict[str, Any]) -> str:
    return str(model["step"]) if model["complete"] else f"{model['step']} ({model['tokens']:,} tokens so far)"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


@click.command()
@_store
@json_option
@quiet_option
@handle_errors
def verify(store: str, as_json: bool, quiet: bool) -> None:
    """Check every chunk and its place, label table, count, layout version and digest of a store or a study.

    Leaves with code 2 and names the first fault if there is one.

    \b
    Example:  rlgen-stats verify runs/demo
    """  # noqa: D301 - click needs the backspace itself
    from dataclasses import asdict

    from rlgen_stats.stores import verify as verify_store

    with progress_for(quiet=quiet or as_json) as progress, _checks_bar(progress, "verify") as advance:
        report = verify_store(store, on_progress=advance)
    if as_json:
        print_json(asdict(report) | {"ok": report.ok})
    elif report.ok:
        echo(f"{store}: sound; {report.n_chunks} chunks of {report.n_arrays} arrays read.")
        for note in report.notes:
            echo(f"  {note}")
    if not report.ok:
        more = "".join(f"\n  {problem}" for problem in report.problems[1:10])
        fail(f"{store}: {len(report.problems)} fault(s), the first: {report.problems[0]}{more}")


@contextmanager
def _checks_bar(progress: Progress, description: str) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total) that moves a bar, which is opened when the total is known."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        bars: list[Any] = []

        def advance(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(progress.task(description, total=total, unit="checks")))
            bars[0].advance(1)

        yield advance


@click.command()
@_store
@json_option
@handle_errors
def migrate(store: str, as_json: bool) -> None:
    """Raise stores written by an earlier release to this release's layout, in place, and seal their chunks.

    Activations are renamed, not rewritten; an interrupted migration is run again. A store without seals is verified
    first.

    \b
    Example:  rlgen-stats migrate runs/last-year
    """  # noqa: D301 - click needs the backspace itself
    from rlgen_stats.stores import migrate as migrate_store

    done = migrate_store(store)
    if as_json:
        print_json({name: {"before": before, "now": now} for name, (before, now) in done.items()})
        return
    for name, (before, now) in done.items():
        echo(f"{name}: layout {now}" + (f" (was {before})" if before != now else ", as it was"))


@click.command()
@click.argument("name", required=False)
@handle_errors
def schema(name: str | None) -> None:
    """Print the declared layout of a dataset as JSON, or list all datasets.

    NAME is a dataset ('features', 'drift', ...), 'study' for the JSON schema of study.yaml, or 'output' for that of
    what commands print with --json.

    \b
    Examples:  rlgen-stats schema
               rlgen-stats schema features
               rlgen-stats schema output
    """  # noqa: D301 - click needs the backspace itself
    from rlgen_stats.schemas.layout import LAYOUTS, layout_document

    if name == "study":
        from rlgen_stats.schemas.study import StudySpec

        print_json(StudySpec.model_json_schema())
    elif name == "output":
        from rlgen_stats.schemas.command_output import output_document

        print_json(output_document())
    elif name is not None:
        print_json(layout_document(name))
    else:
        print_table(
            ["name", "where"],
            [[layout.name, layout.where.format(name=layout.name)] for layout in LAYOUTS.values()]
            + [["study", "study.yaml"], ["output", "--json of every command"]],
        )


COMMANDS = {"inspect": inspect_store, "verify": verify, "migrate": migrate, "schema": schema}
