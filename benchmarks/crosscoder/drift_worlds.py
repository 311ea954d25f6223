"""Drift that is known: how well dictionaries of each objective and readout measure it, and what is called DRIFT.

Worlds of 64 features in 32 channels and of 120 in 64, a third of which change from base to the final checkpoint
(``tests/statistics/drift/planted_drift.py``). Per world, dictionaries are trained on base and the final checkpoint;
both and the half-way one are encoded prompt by prompt, and ``drift_test`` is run on 400 prompts. 25 minutes on a core.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from rlgen_stats.schemas.study import Readout
from rlgen_stats.toolkit.statistics import drift_test

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.statistics.drift.planted_drift import (
    SHARES,
    DriftWorld,
    difference_explained,
    drift_world,
    encoded,
    matched,
    trained,
)

WORLDS: Final = ((32, 64), (64, 120))
"""Channels and planted features."""
ROWS: Final[tuple[tuple[str, float, tuple[Readout, ...]], ...]] = (
    ("joint", 0.0, ("swap", "own")),
    *(("both", weight, ("swap",)) for weight in (0.0, 0.3, 0.5, 1.0)),
)
"""Objective, difference_weight, readouts."""
N_PROMPTS: Final = 400
COLUMNS: Final = {
    "r": "r",
    "r_half": "r, half way",
    "significant": "unchanged, q <= .05",
    "false_drift": "unchanged, DRIFT",
    "power": "changed, DRIFT",
    "power_half": "half way",
    "rotated": "turned, DRIFT",
    "dfve": "dFVE",
    "found": "found",
}
"""What is measured, and its heading."""


def measured(world: DriftWorld, objective: str, weight: float, readouts: tuple[Readout, ...], seed: int) -> list[Any]:
    """One dictionary; one row a readout."""
    data, truth = world.draw(N_PROMPTS, 500 + seed)
    crosscoder = trained(world, seed=seed, objective=objective, difference_weight=weight)
    rows = []
    for readout in readouts:
        features = encoded(crosscoder, data, readout)
        learnt, found = matched(world, crosscoder, features)
        drift = drift_test(features, models=["rl@1", "rl@2"], n_resamples=99, n_bootstrap=9)
        effect, call, q = (drift[name].values[:, learnt] for name in ("effect", "call", "q_value"))
        unchanged, turned = found & (world.kind == "unchanged"), found & (world.kind == "rotated")
        changed = found & ~unchanged & ~turned
        compared = found & (world.kind != "rotated")
        true = [(truth[m] - truth[0]).mean(axis=0) for m in (1, 2)]
        r = [np.corrcoef(np.nan_to_num(e[compared]), t[compared])[0, 1] for e, t in zip(effect, true, strict=True)]
        called = call == "DRIFT"
        rows.append(
            {"objective": objective, "weight": weight, "readout": readout, "seed": seed}
            | {"r": r[1], "r_half": r[0], "found": found.mean(), "significant": (q[1][unchanged] <= 0.05).mean()}
            | {"false_drift": called[1][unchanged].mean(), "false_drift_half": called[0][unchanged].mean()}
            | {"power": called[1][changed].mean(), "power_half": called[0][changed].mean()}
            | {"rotated": called[1][turned].mean(), "dfve": difference_explained(crosscoder, data, 2, readout)}
            | {kind: called[1][found & (world.kind == kind)].mean() for kind in SHARES}
            | {"leak": np.nanmedian(np.abs(drift["effect_sd"].values[1, learnt][unchanged]))}
        )
    return rows


def main() -> None:
    """Run all worlds, print the table, keep every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="worlds of each size")
    parser.add_argument("--json", type=Path, help="keep the rows here; rows that are there already are not run again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = options.json is not None and options.json.exists()
    rows: list[dict[str, Any]] = json.loads(options.json.read_text()) if kept else []
    for seed in range(options.seeds):
        for n_channels, n_features in WORLDS:
            world = drift_world(n_channels, n_features, seed)
            for objective, weight, readouts in ROWS:
                key = {"channels": n_channels, "objective": objective, "weight": weight, "seed": seed}
                if any(key.items() <= row.items() for row in rows):
                    continue
                start = time.monotonic()
                for row in measured(world, objective, weight, readouts, seed):
                    rows.append({name: _plain(value) for name, value in {"channels": n_channels, **row}.items()})
                sys.stderr.write(f"{key}: {time.monotonic() - start:.0f} s\n")
                if options.json is not None:
                    options.json.write_text(json.dumps(rows, indent=1))
    sys.stdout.write(table(rows))


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int) else float(value)


def table(rows: list[dict[str, Any]]) -> str:
    """Medians over worlds with lowest and highest, as Markdown."""
    lines = [f"| channels | objective, readout | {' | '.join(COLUMNS.values())} |", "|" + "---|" * (2 + len(COLUMNS))]
    for n_channels, _ in WORLDS:
        for objective, weight, readouts in ROWS:
            for readout in readouts:
                key = {"channels": n_channels, "objective": objective, "weight": weight, "readout": readout}
                some = [row for row in rows if key.items() <= row.items()]
                name = f"{objective}, {readout}" if objective == "joint" else f"{objective}, weight {weight:g}"
                cells = [_cell([row[column] for row in some]) for column in COLUMNS]
                lines.append(f"| {n_channels} | {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(values: list[float]) -> str:
    low, middle, high = np.nanmin(values), np.nanmedian(values), np.nanmax(values)
    return " ".join(f"{value:.2f}".replace("0.", ".", 1) for value in (middle,)) + f" ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
