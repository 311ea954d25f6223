"""To a repository of the Hub and back, against a local server; what fails half way leaves nothing half there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from rlgen_stats.schemas.errors import InputError, ModelError, StoreCorruptError
from rlgen_stats.stores import write_json
from rlgen_stats.toolkit.crosscoder import Crosscoder, load_crosscoder, pull_crosscoder, push_crosscoder
from tests.crosscoder.interop.hub_stand_in import Repositories

VIEWS = ("base@0", "rl|9@80")
NAME = "main <img src=x onerror=alert(1)> `x` [a](http://b) **c** | $d$ #e\n# f"


def saved(folder: Path, *, seed: int = 0, health: bool = True) -> Crosscoder:
    made = Crosscoder(VIEWS, width=6, n_features=20, sparsity="batchtopk", k=3, name=NAME, seed=seed)
    made.threshold.fill_(0.3)
    made.facts = {"site": "block2", "spec": {"steps": 70, "batch_size": 8}}
    made.save(folder)
    if health:
        checks = [
            {"name": "fve", "ok": True, "reason": "fraction of variance explained of rl|9@80 0.960"},
            {"name": "l0", "ok": False, "reason": "L0 9 <b>"},
        ]
        write_json(folder / "health.json", {"weights_sha256": made.weights_sha256, "checks": checks})
    return made


def test_there_and_back(tmp_path: Path, hub: Repositories) -> None:
    made = saved(tmp_path / "main")
    address = push_crosscoder(tmp_path / "main", "org/repo", private=True, license="apache-2.0")
    assert address == f"{hub.address}/org/repo/commit/{hub.commit('org/repo')}"
    assert sorted(hub.files["org/repo"]) == ["README.md", "health.json", "spec.json", "weights.safetensors"]
    assert "private" in hub.created[0].values()
    assert [line for line in hub.asked if "/commit/" in line] == ["POST /api/models/org/repo/commit/main"]
    pulled = pull_crosscoder("hf://org/repo", tmp_path / "pulled")
    assert (pulled.weights_sha256, pulled.folder) == (made.weights_sha256, tmp_path / "pulled")
    raw = torch.randn(30, 2, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pulled.encode(pulled.normalise(raw)), made.encode(made.normalise(raw)))
    for name in ("health.json", "spec.json", "weights.safetensors"):
        assert (tmp_path / "pulled" / name).read_bytes() == (tmp_path / "main" / name).read_bytes()
    with pytest.raises(InputError, match="pulled is not empty; name a new folder"):
        pull_crosscoder("org/repo", tmp_path / "pulled")


def test_several_in_one_repository(tmp_path: Path, hub: Repositories) -> None:
    first, second = (saved(tmp_path / name, seed=seed) for name, seed in (("main", 0), ("main.2", 1)))
    push_crosscoder(tmp_path / "main", "org/repo/main")
    push_crosscoder(tmp_path / "main.2", "org/repo/main.2")
    assert pull_crosscoder("org/repo/main", tmp_path / "a").weights_sha256 == first.weights_sha256
    assert pull_crosscoder("org/repo@main/main.2", tmp_path / "b").weights_sha256 == second.weights_sha256
    assert "pull-crosscoder org/repo/main.2 --to" in hub.files["org/repo"]["main.2/README.md"].decode()
    with pytest.raises(InputError, match=r"hf://org/repo holds no weights.safetensors with spec.json; name the sub"):
        pull_crosscoder("org/repo", tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("stopped", ["PUT /upload", "/commit/", "/preupload/"])
def test_an_interrupted_push_shows_nothing_and_goes_on(tmp_path: Path, hub: Repositories, stopped: str) -> None:
    before = saved(tmp_path / "old", seed=1)
    push_crosscoder(tmp_path / "old", "org/repo")
    made, hub.refuse = saved(tmp_path / "main"), stopped
    match = r"hf://org/repo cannot be written, and is as it was \(.*\); check access"
    with pytest.raises(ModelError, match=match):
        push_crosscoder(tmp_path / "main", "org/repo")
    assert pull_crosscoder("org/repo", tmp_path / "a").weights_sha256 == before.weights_sha256
    hub.refuse = ""
    push_crosscoder(tmp_path / "main", "org/repo")
    assert pull_crosscoder("org/repo", tmp_path / "b").weights_sha256 == made.weights_sha256


def test_a_damaged_download_is_refused_and_leaves_no_folder(tmp_path: Path, hub: Repositories) -> None:
    saved(tmp_path / "main")
    push_crosscoder(tmp_path / "main", "org/repo")
    weights = hub.files["org/repo"]["weights.safetensors"]
    hub.files["org/repo"]["weights.safetensors"] = weights[:-1] + bytes([weights[-1] ^ 1])
    with pytest.raises(StoreCorruptError, match="hf://org/repo"):
        pull_crosscoder("org/repo", tmp_path / "pulled")
    assert [child.name for child in tmp_path.iterdir() if "pulled" in child.name] == []
    push_crosscoder(tmp_path / "main", "org/other")
    hub.refuse = "/resolve/"
    with pytest.raises(ModelError, match=r"hf://org/other cannot be downloaded \(.*\); check access"):
        pull_crosscoder("org/other", tmp_path / "pulled")
    with pytest.raises(ModelError, match=r"hf://org/none cannot be downloaded"):
        pull_crosscoder("org/none", tmp_path / "pulled")
    for name in ("repo", "org/repo/../x", "hf://org"):
        with pytest.raises(ModelError, match="is no model of the Hub; expected hf://OWNER/NAME"):
            pull_crosscoder(name, tmp_path / "pulled")


def test_names_in_the_card_are_shown_as_they_are(tmp_path: Path, hub: Repositories) -> None:
    made = saved(tmp_path / "main")
    push_crosscoder(tmp_path / "main", "org/repo", license="mit")
    card = hub.files["org/repo"]["README.md"].decode()
    _, head, body = card.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert (metadata["license"], metadata["library_name"]) == ("mit", "rlgen-stats")
    title = next(line for line in body.splitlines() if line.startswith("# "))
    assert title.count("\\") == 24  # every mark escaped, so that one line of plain text remains
    assert plain(title.removeprefix("# ")) == NAME.replace("\n", " ")
    assert not re.search(r"(?<!\\)[<\[`*$|]", title)
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert {len(cells(row)) for row in rows} == {2}
    shown = dict(map(cells, rows))
    assert shown["views"] == "base@0, rl|9@80"
    assert shown["weights, SHA-256"] == made.weights_sha256
    assert (shown["steps x tokens"], shown["site"], shown["sparsity"]) == ("70 x 8", "block2", "batchtopk, k = 3")
    assert (shown["yes"], shown["**no**"]) == ("fraction of variance explained of rl|9@80 0.960", "L0 9 <b>")


def plain(text: str) -> str:
    """Markdown text as CommonMark shows it: a backslash before punctuation is not there."""
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text)


def cells(row: str) -> list[str]:
    """Cells of a row, split at bars that are not escaped."""
    return [plain(cell.replace("\1", "\\|").strip()) for cell in row.replace("\\|", "\1").strip("|").split("|")]


def test_health_of_other_weights_is_not_pushed(tmp_path: Path, hub: Repositories) -> None:
    saved(tmp_path / "main")
    saved(tmp_path / "main", seed=3, health=False)
    push_crosscoder(tmp_path / "main", "org/repo")
    assert "health.json" not in hub.files["org/repo"]
    assert "Not measured." in hub.files["org/repo"]["README.md"].decode()


@pytest.mark.slow
def test_commands_against_an_endpoint(tmp_path: Path, hub: Repositories) -> None:
    made = saved(tmp_path / "main")
    hub_settings = {"HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "rlgen_stats.cli", *arguments]
        return subprocess.run(command, env=os.environ | hub_settings, capture_output=True, text=True, check=False)

    pushed = run("push-crosscoder", str(tmp_path / "main"), "org/repo", "--public")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout == f"{hub.address}/org/repo/commit/{hub.commit('org/repo')}\n"
    assert "public" in hub.created[0].values()
    pulled = run("pull-crosscoder", "org/repo", "--to", str(tmp_path / "pulled"), "--json")
    assert pulled.returncode == 0, pulled.stderr
    assert json.loads(pulled.stdout)["weights_sha256"] == made.weights_sha256
    assert load_crosscoder(tmp_path / "pulled").name == NAME
    again = run("pull-crosscoder", "org/repo", "--to", str(tmp_path / "pulled"))
    assert (again.returncode, "is not empty; name a new folder" in again.stderr) == (2, True)
