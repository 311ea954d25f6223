"""simulate and power from the command line."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from rlgen_stats.cli.planning import COMMANDS
from rlgen_stats.stores import open_features, open_results


def run(name: str, *arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(COMMANDS[name], list(arguments))
    return result.exit_code, result.stdout, result.stderr


SMALL = ("--prompts", "40", "--features", "100", "--runs", "1", "--checkpoints", "1", "--seed", "1", "--quiet")


def test_simulate_writes_stores_and_says_what_is_planted(tmp_path: Path) -> None:
    folder = str(tmp_path / "planted")
    code, out, err = run("simulate", folder, *SMALL, "--drifting", "0.2")
    assert code == 0, err
    assert "3 models, 40 prompts, 100 features, seed 1." in out
    assert "drifting" in out
    assert "d_z 0.3, up or down, in sft and rl" in out
    assert open_features(f"{folder}/features.zarr").sizes["feature"] == 100
    assert int((open_results(f"{folder}/results.zarr", "truth").kind == "drifting").sum()) == 20
    code, out, _ = run("simulate", folder, *SMALL, "--drifting", "0.2", "--json")
    assert code == 0
    printed = json.loads(out)
    assert printed["n_resumed"] == 3
    assert printed["planted"]["drifting"] == 20
    assert printed["simulation"]["seed"] == 1
    code, _, err = run("simulate", folder, *SMALL)
    assert code == 2
    assert "was written for another study or settings" in err


def test_simulate_defaults_are_the_dataclass(tmp_path: Path) -> None:
    from dataclasses import asdict

    from rlgen_stats.toolkit.statistics.planning.planted_truth import Simulation

    defaults = {p.name: p.default for p in COMMANDS["simulate"].params if p.name in asdict(Simulation())}
    assert defaults == asdict(Simulation())


def test_simulate_refuses_in_one_sentence(tmp_path: Path) -> None:
    code, out, err = run("simulate", str(tmp_path / "x"), "--effect", "3")
    assert (code, out) == (2, "")
    assert err.startswith("Error: effect d_z=3.0 cannot be planted at density 0.25")
    assert not (tmp_path / "x").exists()


def test_power_answers_the_question() -> None:
    code, out, err = run("power", "--effect", "0.1", "--power", "0.9", "--features", "32768", "--density", "1")
    assert code == 0, err
    lines = {line.split("  ")[1].strip(): line.split() for line in out.splitlines() if line.startswith("  ")}
    assert lines["BH (FDR)"][2] != ""
    assert "2,288" in out
    assert "1,053" in out
    assert "permutation of 3 against 3 runs is impossible: its smallest p is 0.1, 0.05 needed." in out


def test_power_of_given_prompts_with_a_simulated_check() -> None:
    design = ("--prompts", "200", "--features", "200", "--effect", "0.2")
    code, out, err = run("power", *design, "--simulate", "3", "--json", "--runs", "4")
    assert code == 0, err
    printed = json.loads(out)
    assert printed["drift"]["none"]["n_prompts"] == 200
    assert 0.2 < printed["drift"]["none"]["effect"] < printed["drift"]["fwer"]["effect"] < 0.4
    assert printed["simulated"]["fdr"]["n_worlds"] == 3
    assert abs(printed["simulated"]["none"]["power"] - 0.9) < 0.35
    assert {arm["runs"] for arm in printed["arms"] if not arm["needed"]} == {4}
    code, out, _ = run("power", *design)
    assert code == 0
    assert "d_z that 200 prompts show with 90% power:" in out
    assert "power at 0.2" in out


def test_power_refuses_in_one_sentence() -> None:
    code, _, err = run("power", "--effect", "2")
    assert code == 2
    assert err.startswith("Error: effect d_z=2.0 cannot occur at density 0.25")
    code, _, err = run("power", "--prompts", "20")
    assert code == 2
    assert "20 prompts show no effect with power 0.9" in err
