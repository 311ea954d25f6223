"""The whole spine on a mini study: every stage, its stores, resumption after kills, the same numbers twice."""

import hashlib
import json
import random
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
import yaml
import zarr
from click.testing import Result
from safetensors.numpy import load_file

from rlgen_stats.schemas.dims import split_dictionary
from rlgen_stats.schemas.layout import RESULT_GROUPS
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.stores import (
    open_arms,
    open_features,
    open_outcomes,
    open_results,
    open_study,
    read_contexts,
    read_json,
    result_groups,
    verify,
    write_json,
)
from rlgen_stats.toolkit.progress import SILENT
from rlgen_stats.toolkit.study import STAGES, open_for_run, tokens_stage
from rlgen_stats.toolkit.study.claim_power import write_claim_power
from tests.cli.json_output import printed
from tests.end_to_end.conftest import run_command
from tests.end_to_end.same_numbers import differences
from tests.end_to_end.verdict_consistency import contradictions
from tests.faults.killed_studies import ORDER, all_differences, copy_inputs, kill_round, other_files
from tests.faults.kills import elsewhere
from tests.pages import DOCS, run_page
from tests.stores.test_seals import unseal

RESULTS = {
    "attribution", "attribution_contrast", "behaviour", "control_balance", "drift", "health", "intervention",
    "latent_scaling", "matching", "movement", "replicability", "selection", "separation", "set_stability",
    "stabilization", "timing_contrast", "tokens",
}  # fmt: skip


def digest(folder: Path) -> dict[str, str]:
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file() and not f.name.endswith((".lock", ".partial"))
    }


def test_it_prints_five_verdicts_and_the_report(mini: tuple[Path, Result]) -> None:
    folder, result = mini
    for claim in ("C1", "C2", "C3", "C4", "C5"):
        assert claim in result.stdout
    assert f"Report: {folder / 'report' / 'index.html'}" in result.stdout.replace("\n", "")
    claims = read_json(folder / "report/report.json")["claims"]
    assert [claim["id"] for claim in claims] == ["C1", "C2", "C3", "C4", "C5"]


def test_every_stage_is_done_and_a_second_run_touches_nothing(mini: tuple[Path, Result]) -> None:
    folder, _ = mini
    states = json.loads(run_command("status", str(folder), "--json").stdout)["stages"]
    assert {s["name"]: s["state"] for s in states} == {stage.name: "done" for stage in STAGES}
    before = digest(folder)
    again = run_command("run", str(folder))
    assert again.exit_code == 0
    assert again.stderr.count("up to date") == len(STAGES)
    assert digest(folder) == before


def test_stores_are_sound_complete_and_open_in_plain_xarray(mini: tuple[Path, Result]) -> None:
    folder, _ = mini
    assert verify(folder).problems == ()
    stored = set(result_groups(folder / "results.zarr"))
    trials = {"trial-dictionary", "trial-dictionary-balance"}
    assert {split_dictionary(group)[0] for group in stored} - trials == RESULTS
    for group in sorted(stored):
        assert split_dictionary(group)[0] in {*RESULT_GROUPS, *trials}
        open_results(folder / "results.zarr", group)
        xr.open_zarr(folder / "results.zarr" / group, consolidated=False).load()
    for store in ("outcomes.zarr", "features.zarr"):
        xr.open_zarr(folder / store, consolidated=False).load()
    assert {"/outcomes", "/features", "/activations", "/results/drift"} <= set(open_study(folder).groups)


def test_every_verdict_follows_from_the_studys_own_tables(mini: tuple[Path, Result], tmp_path: Path) -> None:
    """And one that does not is found: each verdict of the report is replaced by one that its tables do not say."""
    folder, _ = mini
    assert contradictions(folder) == []
    (tmp_path / "results.zarr").symlink_to(folder / "results.zarr")
    report = read_json(folder / "report/report.json")
    for claim in report["claims"]:
        if claim["verdict"] != "NOT_ESTIMABLE":
            wrong = "SUPPORTED" if claim["verdict"] != "SUPPORTED" else "CONTRADICTED"
            claims = [one | ({"verdict": wrong} if one is claim else {}) for one in report["claims"]]
            write_json(tmp_path / "report/report.json", report | {"claims": claims})
            assert contradictions(tmp_path)[0].startswith(f"{claim['id']} {wrong}: ")


def test_what_dictionaries_agree_on_is_that_of_their_own_results(mini: tuple[Path, Result]) -> None:
    folder, _ = mini
    results = folder / "results.zarr"
    found = open_results(results, "replicability").load()
    models = found.model.values.tolist()
    assert [model.partition("@")[0] for model in models] == ["sft", "rl"]
    assert found.dictionary.values.tolist() == [1, 2, 3]
    assert found.replicate.values.tolist() == ["main.2", "main.3"]
    matching = open_results(results, "matching").sel(crosscoder="main", replicate=["main.2", "main.3"]).load()
    assert found.n_matched.sel(criterion="matched").values.tolist() == matching.matched.sum("feature").values.tolist()
    health = open_results(results, "health").load()
    for number, name in ((1, "main"), (2, "main.2"), (3, "main.3")):
        own = open_results(results, "drift" if number == 1 else f"drift.{number}").load().sel(model=models)
        assert (
            found.n_drift.sel(dictionary=number).values.tolist() == (own.call == "DRIFT").sum("feature").values.tolist()
        )
        assert (
            found.dfve.sel(dictionary=number).values.tolist()
            == health.dfve.sel(crosscoder=name, model=models).values.tolist()
        )
        for part in ("decoded", "error"):
            itself = found[f"{part}_correlation"].sel(dictionary=number, other=number)
            assert itself.values == pytest.approx(1.0)
            between = found[f"{part}_correlation"].sel(dictionary=number).drop_sel(other=number)
            assert (np.abs(between) < 1).all()
    told = read_json(folder / "report/report.json")["over_dictionaries"]
    assert told["absent"] == ""
    assert len(told["pairs"]) == 6
    assert len(told["sentences"]) == 3


def test_how_far_models_moved_is_of_clusters_and_of_the_studys_seed(mini: tuple[Path, Result]) -> None:
    facts = open_results(mini[0] / "results.zarr", "movement").attrs
    assert facts["unit"] == "group of clusters"
    assert facts["seed"] == derive_seed(0, "movement")


def test_null_floors_of_the_mini_can_fail(mini: tuple[Path, Result]) -> None:
    results = mini[0] / "results.zarr"
    table = open_results(results, "attribution").load()
    spread = table.log_ratio.std("feature").to_series()
    assert spread[["null", "noise"]].min() > 1e-5, "base against itself is zero by construction"
    floors = open_results(results, "attribution_contrast").floor.values.tolist()
    assert floors == ["disjoint halves of the prompts", "noise as large as the shift of sft@6"]


def test_raw_activations_stand_beside_the_features(mini: tuple[Path, Result]) -> None:
    folder, _ = mini
    data = open_results(folder / "results.zarr", "separation").load()
    assert data["estimable"].sel(comparison="models").item() == "no: 4 units, 10 needed"  # so few clusters has the mini
    assert np.isnan(data["auc"]).all()
    features = open_features(folder / "features.zarr")
    assert set(data["model"].values) == set(features["model"].values) - {"base@0"}
    assert np.isfinite(data["share"].sel(model=data.attrs["target"]))
    tables = pd.read_csv(folder / "report/tables/separation.csv")
    assert tables["predictor"].tolist() == ["raw", "mean shift", "selected", "random"] * 3


def test_what_tokens_explain_stands_beside_the_features(mini: tuple[Path, Result]) -> None:
    folder, _ = mini
    chosen = open_results(folder / "results.zarr", "selection").load()
    data = open_results(folder / "results.zarr", "tokens").load()
    assert set(data["feature"].values) == set(chosen["feature"].values[chosen["selected"].values])
    assert {"number", "answer marker", "first completion token"} <= set(data["token_class"].values.astype(str))
    assert (data["n_class_tokens"].sel(token_class=["number", "answer marker", "first completion token"]) > 0).all()
    assert len(pd.read_csv(folder / "report/tables/token_classes.csv")) == data["odds_ratio"].size


@pytest.mark.slow
def test_tokens_are_injected_into_texts_of_the_study(
    mini: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(mini[0], tmp_path / "mini")
    monkeypatch.setattr(tokens_stage, "ranked_features", lambda selection: [9, 3, 5])
    study = open_for_run(tmp_path / "mini")
    tokens_stage.tokens(study, study.key("tokens"), SILENT)
    data = open_results(study.folder.results, "tokens").load()
    assert data["feature"].values.tolist() == [9, 3, 5]
    assert data.attrs["n_texts"] > 20
    assert data["injected"].notnull().all()
    assert (data["leading"] != "").any()


def test_what_the_readme_says_one_can_ask(mini: tuple[Path, Result]) -> None:
    folder, _ = mini
    study = open_study(folder)
    outcomes = study["outcomes"].to_dataset()
    right = outcomes.greedy_correct.compute()
    assert right.groupby("task").mean("prompt").sizes["task"] > 2
    base, rl = right.isel(model=0), right.isel(model=-1)
    features = study["features"].to_dataset()
    gained = features["mean"].where((base == 0) & (rl == 1), drop=True)
    assert gained.chunks is not None
    drift = study["results/drift"].to_dataset()
    assert (drift.q_value < 0.05).sum("feature").compute().sizes["model"] == outcomes.sizes["model"] - 1


@pytest.mark.parametrize(
    "page", ["tutorial.md", "analyses.md", "notebooks/query-a-study.md", "notebooks/own-checkpoints.md"]
)
def test_the_python_of_a_page_runs_on_a_study(
    mini: tuple[Path, Result], page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/demo").symlink_to(mini[0])
    monkeypatch.chdir(tmp_path)
    before = digest(mini[0])
    run_page(DOCS / page)
    assert digest(mini[0]) == before


def test_features_can_be_read(mini: tuple[Path, Result]) -> None:
    study = str(mini[0])
    contexts = read_contexts(study, "main")
    fires = int(contexts["feature"].iloc[0])
    told = run_command("features", study, str(fires), "--contexts", "1")
    assert told.exit_code == 0
    first = contexts[(contexts["feature"] == fires) & (contexts["kind"] == "top") & (contexts["rank"] == 1)].iloc[0]
    assert told.output.startswith(f"feature {fires}\n  By decoder norms and latent scaling it is ")
    assert f"⟦{first['token']}⟧" in told.output
    assert "raises  base@0: " in told.output
    (card,) = json.loads(run_command("features", study, str(fires), "--json").output)
    assert card["contexts"][first["model"]][0]["activation"] == pytest.approx(first["activation"])
    wrong = run_command("features", study, "100000")
    assert wrong.exit_code == 2
    assert re.search(r"Error: features of 'main' run from 0 to \d+, got \[100000\]\.", wrong.output)


def test_labels_agree_between_stores(mini: tuple[Path, Result]) -> None:
    folder, _ = mini
    study = open_study(folder)
    outcomes, features = study["outcomes"].to_dataset(), study["features"].to_dataset()
    assert outcomes.model.values.tolist() == features.model.values.tolist()
    assert outcomes.prompt.values.tolist() == features.prompt.values.tolist()
    activations = study["activations"].to_dataset()
    tasks = dict(zip(outcomes.prompt.values, outcomes.task.values, strict=True))
    assert all(tasks[p] == t for p, t in zip(activations.prompt.values, activations.task.values, strict=True))
    completions = pd.read_parquet(folder / "completions/base@0.parquet")
    greedy = completions[completions["sample"] == -1].set_index("prompt")["correct"]
    stored = outcomes.greedy_correct.sel(model="base@0")
    assert greedy.loc[outcomes.prompt.values].astype(int).tolist() == stored.values.tolist()


def test_records_name_the_spec_and_every_store_its_origin(mini: tuple[Path, Result]) -> None:
    folder, _ = mini
    keys = {stage.name: read_json(folder / f"stages/{stage.name}.json")["key"] for stage in STAGES}
    features = open_features(folder / "features.zarr")
    assert features.attrs["spec_hash"] == keys["encode"]
    facts = json.loads(features.attrs["provenance"])
    assert facts["parents"] == {"crosscoder": keys["crosscoder"]}
    assert {"git_commit", "packages", "seed"} <= set(facts)


def test_a_study_with_another_seed_in_the_same_folder_is_refused(mini: tuple[Path, Result]) -> None:
    folder, _ = mini
    before = digest(folder)
    refused = run_command("demo", "--size", "mini", "--seed", "5", "--folder", str(folder))
    assert refused.exit_code == 2
    assert refused.stderr.strip().splitlines()[-1].startswith("Error: ")
    after = digest(folder)
    assert {name: after[name] for name in before} == before


def test_a_folder_without_weights_is_named(mini: tuple[Path, Result], tmp_path: Path) -> None:
    folder, _ = mini
    copy = tmp_path / "study"
    for part in ("models", "data"):
        shutil.copytree(folder / part, copy / part)
    spec = yaml.safe_load((folder / "study.yaml").read_text())
    empty = copy / "models/empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    for run in spec["runs"]:
        run |= {"method": "checkpoints", "checkpoints": {1: "models/empty"}, "trainer": {}}
    (copy / "study.yaml").write_text(yaml.safe_dump(spec))
    result = run_command("extract", str(copy))
    assert result.exit_code == 2
    assert "no weights" in result.stderr


def sampled_differences(reference: Path, study: Path) -> list[str]:
    """Of trained weights, completions and outcomes."""
    files = [line for part in ("models", "completions") for line in other_files(reference, study, part)]
    ours, theirs = (open_outcomes(folder / "outcomes.zarr").load() for folder in (reference, study))
    return files + ([] if ours.equals(theirs) else ["other outcomes"])


@pytest.mark.parametrize(
    ("stages", "until", "compare"),
    [
        (("posttrain", "outcomes"), "outcomes", sampled_differences),
        pytest.param(("posttrain", "crosscoder", "report"), None, all_differences, marks=pytest.mark.slow),
    ],
    ids=["models", "all"],
)
def test_killed_and_run_again_it_ends_with_the_same_numbers(
    mini: tuple[Path, Result],
    tmp_path: Path,
    stages: tuple[str, ...],
    until: str | None,
    compare: Callable[[Path, Path], list[str]],
) -> None:
    """Also shows that the same study twice gives the same numbers: this one starts from the same prompts and base."""
    again, draw = copy_inputs(mini[0], tmp_path / "again"), random.Random(0)
    changes = dict.fromkeys(ORDER, 12)  # of any stage the first ones
    how = {"stages": stages, "until": until, "compare": compare, "log": print}
    kills = partial(kill_round, mini[0], again, changes, draw, **how)
    counted = elsewhere(kills, start="spawn")
    assert set(counted) <= {"harmless", "silently wrong"}  # a moment may fall after the end
    assert counted["silently wrong"] == 0
    assert counted["harmless"] > 0


@pytest.mark.slow
def test_one_changed_number_is_seen_wherever_it_stands(mini: tuple[Path, Result], tmp_path: Path) -> None:
    copy, before = tmp_path / "changed", tmp_path / "before"
    shutil.copytree(mini[0], copy)
    unseal(copy)  # or the change is refused as damage
    shutil.copytree(copy, before)
    drift = zarr.open_group(copy / "results.zarr/drift")
    drift["effect"][0, 0] = np.nextafter(drift["effect"][0, 0], np.inf) if np.isfinite(drift["effect"][0, 0]) else 0.0
    report = read_json(copy / "report/report.json")
    report["claims"][2]["answer"] += " 17"
    (copy / "report/report.json").write_text(json.dumps(report))
    changed = list(differences(before, copy))
    assert [line.split(":")[0] for line in changed] == ["/results/drift/effect", "report.json > claims > 2 > answer"]


@pytest.mark.slow
def test_several_processes_train_crosscoders_through_torchrun(
    mini: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "study"
    shutil.copytree(mini[0], folder)
    with monkeypatch.context() as one_of_two:
        one_of_two.setenv("WORLD_SIZE", "2")
        refused = run_command("drift", str(folder), "--force")
    assert refused.exit_code == 2
    assert "several processes together run the crosscoder stage only" in refused.stderr
    before = {name: read_json(folder / "crosscoder" / name / "curve.json") for name in ("main", "pair-rl")}
    stamp = (folder / "crosscoder/main/spec.json").stat().st_mtime_ns
    launch = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*launch, "-m", "rlgen_stats.cli", "crosscoder", str(folder), "--force"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "crosscoder/main/spec.json").stat().st_mtime_ns > stamp  # trained again, not kept
    states = json.loads(run_command("status", str(folder), "--json").stdout)["stages"]
    assert {s["name"]: s["state"] for s in states}["crosscoder"] == "done"
    for name, curve in before.items():
        again = read_json(folder / "crosscoder" / name / "curve.json")
        assert [point["step"] for point in again] == [point["step"] for point in curve]
        assert again[-1]["loss"] == pytest.approx(curve[-1]["loss"], rel=0.02)
    assert {s["name"]: s["state"] for s in states}["encode"] == "stale"
    problems = verify(folder).problems  # later results are of the weights before
    assert all("made with the crosscoder weights" in problem for problem in problems), problems


@pytest.mark.slow
def test_a_trial_can_be_held_in_any_dictionary(mini: tuple[Path, Result], tmp_path: Path) -> None:
    study = tmp_path / "study"
    shutil.copytree(mini[0], study)
    own = json.loads(run_command("intervene", str(study), "--dry-run", "--json").stdout)
    assert [plan["name"] for plan in own] == ["selected", "selected-in-2", "selected-in-3"]
    assert {plan["why_not"] for plan in own} == {"no_features: no feature selected"}  # in this study
    firing = open_features(study / "features.2.zarr")["firing"].mean(["model", "prompt"]).values
    feature = str(int(np.argsort(firing)[-5]))
    there = ("intervene", str(study), "--features", feature, "--dictionary", "2", "--direction", "disable")
    run = run_command(*there, "--json", "--quiet")
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["results"] == f"trial-features-{feature}-in-2"
    arms = study / "intervention/dictionary-2"
    assert (arms / f"features-{feature}-in-2/disable/set.parquet").exists()
    assert not (arms / "disable/unedited.parquet").exists()  # it reads no feature: shared with the first dictionary
    for number in ("0", "4"):
        refused = run_command("intervene", str(study), "--dictionary", number)
        assert refused.exit_code == 2
        assert "this study's dictionaries are numbered 1 to 3" in refused.output


@pytest.mark.slow
def test_trials_of_other_sets_beside_the_studys_own(mini: tuple[Path, Result], tmp_path: Path) -> None:
    study = tmp_path / "study"
    shutil.copytree(mini[0], study)
    before = digest(study / "results.zarr" / "intervention")
    features = pd.Series(open_features(study / "features.zarr")["firing"].mean(["model", "prompt"]).values)
    first, second = sorted(features.nlargest(6).index[4:])
    planned = run_command("intervene", str(study), "--features", f"{first},{second}", "--dry-run", "--json")
    assert planned.exit_code == 0, planned.output
    plan = json.loads(planned.stdout)
    assert plan["features"] == [first, second]
    assert plan["completions"] == (sum(plan["arms"].values()) - sum(plan["stored"].values())) * plan["prompts"]
    assert plan["seconds"] > 0
    one = ("intervene", str(study), "--features", f"{first},{second}", "--direction", "disable", "--dose", "0.3")
    run = run_command(*one, "--json", "--quiet")
    assert run.exit_code == 0, run.output
    ran = json.loads(run.stdout)
    name = f"trial-features-{first}-{second}"
    assert ran["results"] == name
    assert set(ran["arms"]) == {"disable"}
    result = open_results(study / "results.zarr", name).load()
    told = ran["verdicts"]["disable"]
    assert told["verdict"] == result["verdict"].sel(direction="disable").item()
    assert told["replication"] == result["v5"].sel(direction="disable").item() != ""
    assert result.attrs["features"] == [first, second]
    assert str(result["reasons"].sel(direction="amplify").item()).startswith("not_asked")
    kinds = result["kind"].sel(direction="disable")
    assert "dose-0.3" in result["condition"].values[kinds.values != "absent"]
    again = json.loads(run_command(*one, "--dry-run", "--json").stdout)
    assert again["stored"]["disable"] == again["arms"]["disable"], "futility stops included"
    assert again["completions"] == 0
    added = ("--direction", "amplify", "--dose", "3", "--dose", "6", "--level", "rl", "--json", "--quiet")
    run = run_command("intervene", str(study), "--features", f"{first},{second}", *added)
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["results"] == f"{name}-x3-rl-level"
    result = open_results(study / "results.zarr", f"{name}-x3-rl-level").load()
    assert (result.attrs["level"], float(result["dose"].sel(direction="amplify", condition="set"))) == ("rl", 3.0)
    assert open_arms(study, "amplify", trial=f"{name}-x3-rl-level".removeprefix("trial-")).sizes["condition"] > 5
    assert digest(study / "results.zarr" / "intervention") == before
    assert not (study / "intervention" / name.removeprefix("trial-") / "amplify").exists(), (
        "another dose, another trial"
    )
    states = json.loads(run_command("status", str(study), "--json").stdout)["stages"]
    assert {s["state"] for s in states} == {"done"}
    assert verify(study).ok
    dead = int(features.idxmin())
    zarr.open_group(study / "features.zarr", mode="r+")["firing"][:, :, dead] = 0.0  # training promises no dead feature
    for arguments, message in (
        (("--features", "1,2", "--set", "paper"), "name a set or features, one of the two"),
        (("--set", "best"), "the sets are selected, confirmed, candidate, paper, got 'best'"),
        (("--features", "999999"), "feature ids run from 0 to"),
        (("--features", "a,b"), "expected feature ids as 3,12,407"),
        (("--features", str(dead)), f"features [{dead}] are dead"),
        (("--features", str(first), "--direction", "disable", "--level", "rl"), "a level is what amplification adds"),
    ):
        refused = run_command("intervene", str(study), *arguments)
        assert refused.exit_code == 2
        assert message in refused.output


@pytest.mark.slow
def test_what_commands_print_for_machines_is_as_declared(mini: tuple[Path, Result], tmp_path: Path) -> None:
    study = tmp_path / "study"
    shutil.copytree(mini[0], study)
    document = printed("demo", "--size", "mini", "--folder", study, "--quiet")
    assert [verdict["id"] for verdict in document["result"]["verdicts"]] == ["C1", "C2", "C3", "C4", "C5"]
    for stage, fact in (("outcomes", "greedy_accuracy"), ("movement", "kl_from_base"), ("significance", "accuracy")):
        by_model = printed(stage, study, "--quiet")["result"]["facts"][fact]
        assert {"base@0", "sft@6", "rl@2"} <= set(by_model), stage
    assert printed("check", study)["problems"] == []
    assert len(printed("inspect", study)) > 10
    assert printed("status", study)["rendered_prompts"]
    assert printed("features", study, "3")[0]["feature"] == 3
    assert len(printed("export-features", study, "--to", tmp_path / "features")["files"]) > 3
    assert printed("intervene", study, "--dry-run")[0]["name"] == "selected"
    assert printed("export-requests", study)[0]["n_requests"] > 0
    sampled = pd.read_parquet(study / "completions/rl@2.parquet")
    rows = sampled.rename(columns={"prompt": "prompt_id"})[["prompt_id", "sample", "text"]]
    rows.assign(correct=True).to_json(tmp_path / "sampled.jsonl", orient="records", lines=True)
    settings = ("--temperature", "1", "--top-p", "1", "--max-new-tokens", "16", "--engine", "here", "--yes")
    assert printed("import-outcomes", study, tmp_path / "sampled.jsonl", "--model", "rl@2", *settings)["n_prompts"] > 0


SAME = 0.99
"""Share of completions: one whose two best tokens are equal but for rounding may differ."""


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_two_threads_train_the_same_models_but_for_rounding_and_write_the_same_completions(
    mini: tuple[Path, Result], tmp_path: Path
) -> None:
    folder = copy_inputs(mini[0], tmp_path / "study")
    result = run_command("run", str(folder), "--stage", "outcomes")
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    for weights in mini[0].glob("models/*/step-*/model.safetensors"):
        ours, theirs = load_file(weights), load_file(folder / weights.relative_to(mini[0]))
        assert all(np.abs(ours[name] - theirs[name]).max() < 1e-3 for name in ours)
    tables = sorted((mini[0] / "completions").glob("*.parquet"))
    assert len(tables) == 5
    for table in tables:
        one, other = pd.read_parquet(table), pd.read_parquet(folder / "completions" / table.name)
        assert (one["prompt"] == other["prompt"]).all()
        assert (one["text"] == other["text"]).mean() >= SAME
        assert (one["correct"] == other["correct"]).mean() >= SAME


PAGE = runpy.run_path(str(DOCS / "study_page.py"))


def test_the_demos_page_has_the_form_that_the_command_writes(mini: tuple[Path, Result], tmp_path: Path) -> None:
    generated, part_of = PAGE["generated"], PAGE["part_of"]

    def form_of(part: str) -> list[str]:
        return [
            line for line in PAGE["form_of"](part) if not line.startswith("| copied")
        ]  # only of trials with a curve

    folder = Path(shutil.copytree(mini[0], tmp_path / "study"))
    write_claim_power(open_for_run(folder), n_worlds=1)
    written, committed = generated([folder, folder]), part_of((DOCS / "demo.md").read_text())
    assert [line for line in form_of(written) if line.startswith("#")] == ["### Seed 0", "### Seed 0"]
    assert form_of(committed) == form_of(generated([folder] * committed.count("### Seed")))
    for claim in ("C1", "C2", "C3", "C4", "C5"):
        assert written.count(f"| {claim} | ") >= 2


def test_only_the_generated_part_of_a_page_is_replaced() -> None:
    page = f"before\n{PAGE['BEGIN']}\nold\n{PAGE['END']}\nafter\n"
    again = PAGE["page_with"]([], page)
    assert again == page.replace("old", PAGE["NONE_YET"])
    assert PAGE["part_of"](again) == PAGE["NONE_YET"]
