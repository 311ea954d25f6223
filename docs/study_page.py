"""Write what finished studies showed into a page, from their stores, so that page and runs cannot disagree.

From the root of the repository::

    python -P docs/study_page.py docs/demo.md runs/demo-1 runs/demo-2
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from rlgen_stats.stores import StudyFolder, open_results, read_contexts, read_logits, result_groups
from rlgen_stats.toolkit.reporting.feature_table import shown_of
from rlgen_stats.toolkit.study.spec_file import read_spec

BEGIN, END = "<!-- what the study showed: begin -->", "<!-- what the study showed: end -->"
FEATURES = 10
_OF_MODEL = ("fve_model", "dfve", "code_r2")
NONE_YET = "No run of this version is on the page yet."


def generated(folders: Sequence[Path]) -> str:
    """The generated part of the page; every number is read from a study's results, report or stage records."""
    if not folders:
        return NONE_YET
    parts = [line for folder in folders for line in _study(folder)]
    return "\n".join([*_power(folders[0]), *parts]).strip()


def page_with(folders: Sequence[Path], page: str) -> str:
    """The page with its generated part written anew."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{generated(folders)}\n{END}{rest.split(END)[1]}"


def part_of(page: str) -> str:
    """The generated part of a page."""
    return page.split(BEGIN)[1].split(END)[0].strip()


def form_of(part: str) -> list[str]:
    """Headings and table heads of a generated part, numbers left out: what does not hang on a run."""
    lines = re.sub(r"\d+", "0", part).splitlines()
    heads = [line for line, after in itertools.pairwise(lines) if after.startswith("|---")]
    return [line for line in lines if line.startswith("#") or line in heads]


def _study(folder: Path) -> Iterator[str]:
    report = json.loads((folder / "report/report.json").read_text())
    yield f"\n### Seed {read_spec(folder).seed}\n\n{report['answer']}\n"
    yield from _table(
        ("claim", "verdict", "in words"), ((one["id"], one["verdict"], one["answer"]) for one in report["claims"])
    )
    yield from _behaviour(folder)
    yield from _movement(folder)
    yield from _health(folder)
    yield from _curve(folder)
    yield from _features(folder)
    yield from _seconds(folder)


def _power(folder: Path) -> Iterator[str]:
    if "claim_power" not in result_groups(StudyFolder(folder).results):
        return
    data = open_results(folder, "claim_power").load()
    yield f"What a study of this size can answer, {data.attrs['n_worlds']} simulated studies of each truth:\n"
    columns = [data[name].values.tolist() for name in ("claim", "truth", "verdict", "power")]
    rows = ((claim, truth, verdict, f"{power:.2f}") for claim, truth, verdict, power in zip(*columns, strict=True))
    yield from _table(("claim", "if this were true", "right verdict", "power"), rows)


def _behaviour(folder: Path) -> Iterator[str]:
    data = open_results(folder, "behaviour").load()
    data = data.sel(task=[task for task in data["task"].values if not str(task).startswith("all")])
    final = {str(run): str(model) for model, run in zip(data["model"].values, data["run"].values, strict=True)}
    moved = ("kept_right", "forgotten", "gained", "kept_wrong")
    yield "\nGreedy accuracy; its change from base in points, with interval; against base right/right, right/wrong,"
    yield "wrong/right, wrong/wrong:\n"
    rows: list[list[str]] = []
    for task in data["task"].values.tolist():
        row = [str(task)]
        for run, model in final.items():
            one = data.sel(task=task, model=model)
            change, low, high = (round(100 * one[f"difference{end}"].item(), 0) + 0.0 for end in ("", "_low", "_high"))
            counts = " ".join(f"{float(one[name]):.0f}" for name in moved)
            against = "" if run == "base" else f", {change:+.0f} [{low:+.0f}, {high:+.0f}] ({counts})"
            row.append(f"{float(one['accuracy']):.2f}{against}")
        rows.append(row)
    yield from _table(("task", *final), rows)


def _features(folder: Path) -> Iterator[str]:
    """The first of the selected features of the first dictionary, or where too few are selected, the next by p."""
    spec, data = read_spec(folder), open_results(folder, "selection").load()
    order = np.lexsort((data["p_value"].fillna(1.0).values, ~data["selected"].values.astype(bool)))
    features = data["feature"].values[order[:FEATURES]].tolist()
    contexts = read_contexts(folder, spec.primary_crosscoder.name, features)
    tokens = read_logits(folder, spec.primary_crosscoder.name, features)
    target = str(data.attrs["target"])
    models = [name.removeprefix("activation:") for name in contexts if name.startswith("activation:")]
    selected = int(data["selected"].sum())
    yield f"\n{FEATURES} features of dictionary 1, selected ones ({selected} in all) first: where they fire most in"
    yield f"{target}, their activation there in {', '.join(models)}, and the tokens whose logits they raise most:\n"
    rows: list[list[str]] = []
    for feature in features:
        one, own = data.sel(feature=feature), contexts[contexts["feature"] == feature]
        top = own[(own["model"] == target) & (own["kind"] == "top") & (own["rank"] == 1)]
        raised = tokens[(tokens["feature"] == feature) & (tokens["model"] == target) & (tokens["sign"] == 1)]
        rows.append(
            [
                str(feature),
                _selected_as(one) if one["selected"] else "not selected",
                f"`{' '.join(top['text'].item().split())}`" if len(top) else "",
                ", ".join(f"{top[f'activation:{model}'].item():.2f}" for model in models) if len(top) else "",
                ", ".join(f"`{token.strip()}`" for token in raised.sort_values("rank")["token"][:5]),
            ]
        )
    yield from _table(("feature", "selected as", "fires most on the marked token of", "activations", "raises"), rows)


def _movement(folder: Path) -> Iterator[str]:
    data = open_results(folder, "movement").load()
    yield "\nDistance from base at every checkpoint (relative activation shift, KL in nats a token):\n"
    rows = (
        (model, f"{shift:.3f}", f"{kl:.3f}")
        for model, shift, kl in zip(
            data["model"].values.tolist(), data["activation_shift"].values, data["kl_from_base"].values, strict=True
        )
        if not model.startswith("base")
    )
    yield from _table(("model", "shift", "KL"), rows)


def _health(folder: Path) -> Iterator[str]:
    data, spec = open_results(folder, "health").load(), read_spec(folder)
    last = {model.split("@")[0]: model for model in data["model"].values.tolist()}
    yield "\nWhat the features say of each model: share of its variance (FVE), of its change from base (dFVE), and of"
    yield "that change by differences of features alone (code R2):\n"
    rows = (
        (
            name,
            last[run.name],
            *(f"{float(data[of].sel(crosscoder=name, model=last[run.name])):.2f}" for of in _OF_MODEL),
        )
        for name in spec.primary_crosscoder.names
        for run in spec.contrasted
    )
    yield from _table(("dictionary", "model", "FVE", "dFVE", "code R2"), rows)


def _curve(folder: Path) -> Iterator[str]:
    if "mediated_share" not in result_groups(StudyFolder(folder).results):
        return
    data = open_results(folder, "mediated_share").load()
    yield "\nWhat copying features from the other model does, as a share of copying its whole residual:\n"
    rows = (
        (
            {"amplify": "RL's into base", "disable": "base's into RL"}[direction],
            point,
            "-".join(sorted({str(n) for n in data["n_features"].sel(point=point).values.tolist()}, key=int)),
            f"{100 * float(one['effect']):+.1f}",
            _share(one),
        )
        for direction in data["direction"].values.tolist()
        for point in data["point"].values.tolist()
        for one in (data.sel(direction=direction, point=point),)
    )
    yield from _table(("copied", "features", "how many", "points of accuracy", "share"), rows)


def _share(one: xr.Dataset) -> str:
    share, low, high = (float(one[name]) for name in ("share", "share_low", "share_high"))
    return f"{share:.2f} [{low:.2f}, {high:.2f}]" if np.isfinite(share) else "copying all has no shown effect"


def _selected_as(feature: xr.Dataset) -> str:
    shown = shown_of({name: str(feature[name].values) for name in ("tier", "specific_tier")})
    return shown if shown in ("confirmed", "rises") else f"by the rule {feature.attrs['rule']}"


def _seconds(folder: Path) -> Iterator[str]:
    records = [json.loads(path.read_text()) for path in sorted((folder / "stages").glob("*.json"))]
    of_stage = {one["stage"]: one["seconds"] for one in records if "seconds" in one}
    said = ", ".join(f"{name} {seconds:.0f}" for name, seconds in sorted(of_stage.items(), key=lambda item: -item[1]))
    yield f"\nSeconds by stage, pretraining not among them: {said}; {sum(of_stage.values()):.0f} in all."


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(str(cell).replace('|', '¦') for cell in row)} |"


def main(page: Path, folders: Sequence[str]) -> None:
    """Rewrite the page from the studies in these folders."""
    page.write_text(page_with([Path(folder) for folder in folders], page.read_text()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
