"""A study at two layers, through every stage: each layer as a study alone, one report over both."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rlgen_stats.stores import (
    complete_models,
    describe,
    open_activations,
    open_features,
    open_results,
    open_study,
    read_json,
    result_groups,
    verify,
)
from rlgen_stats.toolkit.study import open_for_run
from tests.end_to_end.conftest import run_command
from tests.extraction.conftest import prompt_table, save_model

pytestmark = pytest.mark.slow  # a whole study; tests/study/test_linked_studies.py has small ones

CROSSCODER = {"n_features": 32, "k": 4, "steps": 20, "batch_size": 32, "accept_unhealthy": True, "replicates": 1}
SPEC: dict[str, Any] = {
    "name": "two-layers",
    "device": "cpu",
    "base": {"path": "models/base"},
    "runs": [
        {"name": "sft", "arm": "sft", "checkpoints": {3: "models/sft-3", 6: "models/sft-6"}},
        {"name": "rl", "arm": "rl", "checkpoints": {4: "models/rl-4", 8: "models/rl-8"}},
    ],
    "data": {"prompts": "data/prompts.csv", "train": None},
    "generation": {"max_new_tokens": 6, "n_samples": 2},
    "extraction": {"layers": [2, 0.4]},
    "crosscoders": [
        {"name": "main", "views": ["base@0", "sft@final", "rl@final"], **CROSSCODER},
        {"name": "pair", "views": ["base@0", "rl@final"], **CROSSCODER},
    ],
    "statistics": {"n_resamples": 99, "n_bootstrap": 99, "n_halvings": 10, "top_k": 5, "n_min": 2},
    "selection": {"min_discordant": 2},
    "intervention": {
        "accept_undecidable": True, "n_controls": 19, "max_prompts": 4, "doses": [0.5],
        "curve": [2], "curve_controls": 1,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layers") / "study"
    for seed, name in enumerate(("base", "sft-3", "sft-6", "rl-4", "rl-8")):
        save_model(root / "models" / name, seed)
    (root / "data").mkdir()
    prompt_table().to_csv(root / "data/prompts.csv", index=False)
    (root / "study.yaml").write_text(yaml.safe_dump(SPEC, sort_keys=False))
    result = run_command("run", str(root))
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    assert result.stderr.count("base@0 reads") <= 1
    return root


def test_each_layer_has_activations_dictionaries_and_results_of_its_own(layers: Path) -> None:
    (other,) = open_for_run(layers).linked
    assert other.folder.linked_as == "layers/1"
    assert {stage.state for one in (open_for_run(layers), other) for stage in one.status()} == {"done"}
    for folder, site in ((layers, "block2"), (layers / "layers/1", "block1")):
        stored = open_activations(folder / "activations.zarr")
        assert stored.attrs["site"] == site
        assert len(complete_models(folder / "activations.zarr")) == 6
        assert open_study(folder)["activations"].attrs["site"] == site
    first, second = (open_features(folder / "features.zarr").load() for folder in (layers, layers / "layers/1"))
    assert not np.allclose(first["mean"], second["mean"])
    assert set(result_groups(layers / "results.zarr")) == set(result_groups(layers / "layers/1/results.zarr"))


def test_what_does_not_depend_on_the_layer_is_measured_once(layers: Path) -> None:
    first, second = (
        open_results(folder / "results.zarr", "movement").load() for folder in (layers, layers / "layers/1")
    )
    for name in ("weight_distance", "kl_from_base"):
        assert first[name].identical(second[name])
    assert not np.allclose(first["activation_shift"], second["activation_shift"])
    assert (layers / "layers/1/outcomes.zarr").is_symlink()


def test_the_studys_report_shows_the_verdicts_at_every_layer(layers: Path) -> None:
    report, other = (read_json(folder / "report/report.json") for folder in (layers, layers / "layers/1"))
    assert report["answered"] == "layer 2; 2 layers asked, each at level 0.025 (0.05 in all), the others layer 1"
    assert other["answered"].startswith("layer 1; 2 layers asked")
    verdicts = {claim["id"]: claim["verdict"] for claim in other["claims"]}
    assert report["others"] == [{"asked": "layer 1", "path": "../layers/1/report/index.html", "verdicts": verdicts}]
    page = (layers / "report/index.html").read_text()
    assert '<a href="../layers/1/report/index.html">layer 1</a>' in page
    assert (layers / "report" / "../layers/1/report/index.html").exists()
    table = (layers / "report/report.md").read_text().split("| Asked | C1 | C2 | C3 | C4 | C5 |\n|---|")[1].splitlines()
    assert table[1].startswith("| layer 2 (this report) |")
    assert table[2].startswith("| [layer 1](../layers/1/report/index.html) |")
    assert table[3] == ""
    assert "| Asked |" not in (layers / "layers/1/report/report.md").read_text()


def test_commands_cover_the_layers(layers: Path) -> None:
    again = run_command("run", str(layers))
    assert again.stderr.count("up to date") == 2 * 16 - 2
    told = json.loads(run_command("status", str(layers), "--json").stdout)
    assert {stage["state"] for stage in told["linked"]["layers/1"]} == {"done"}
    assert "layers/1" in run_command("status", str(layers)).stdout
    described = describe(layers).keys()
    assert described >= {"activations.zarr", "layers/1/activations.zarr", "layers/1/results.zarr/drift"}
    assert "layers/1/outcomes.zarr" not in described
    assert run_command("features", str(layers / "layers/1"), "3").exit_code == 0
    plan = run_command("intervene", str(layers / "layers/1"), "--features", "3", "--dry-run")
    assert plan.exit_code in (0, 2), plan.output
    refused = run_command("run", str(layers / "layers/1"))
    assert refused.exit_code == 2
    assert "is part of the study in" in refused.output


def test_a_fault_at_a_further_layer_is_found_from_the_study(layers: Path) -> None:
    files = (layers / "layers/1/activations.zarr/rl@8/block1/activation").rglob("*")
    chunk = next(file for file in sorted(files) if file.is_file() and file.suffix != ".json")
    content = chunk.read_bytes()
    try:
        chunk.write_bytes(content[:-8] + bytes(8))
        (problem,) = verify(layers).problems
        assert problem.startswith("layers/1/activations.zarr: model rl@8, site block1, tokens 0 to")
    finally:
        chunk.write_bytes(content)
