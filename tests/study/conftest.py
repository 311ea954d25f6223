import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pandas as pd
import pytest
import yaml

from tests.extraction.conftest import save_model

MAIN = {"name": "main", "views": ["base@0", "sft@final", "rl@final"]}
PAIR = {"name": "pair-rl", "views": ["base@0", "rl@final"]}


def spec_dict(**changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "base": {"path": "models/base"},
        "data": {"prompts": "data/prompts.csv", "train": None},
        "runs": [
            {"name": "sft", "arm": "sft", "checkpoints": {5: "models/sft-5", 10: "models/sft-10"}},
            {"name": "rl", "arm": "rl", "checkpoints": {10: "models/rl-10", 20: "models/rl-20"}},
        ],
        "crosscoders": [MAIN, PAIR],
    } | changes


@pytest.fixture
def study_folder(tmp_path: Path) -> Path:
    root = tmp_path / "study"
    for model in ("base", "sft-5", "sft-10", "rl-10", "rl-20"):
        (root / "models" / model).mkdir(parents=True)
        (root / "models" / model / "config.json").write_text(model)
    (root / "data").mkdir()
    pd.DataFrame({"prompt_id": ["a"], "text": ["1 + 1"], "answer": ["2"], "task": ["math"], "domain": ["in"]}).to_csv(
        root / "data/prompts.csv", index=False
    )
    (root / "study.yaml").write_text(yaml.safe_dump(spec_dict()))
    return root


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A repository with base, a trajectory and a run's readme, and what is asked of it."""

    def __init__(self, root: Path, cache: Path) -> None:
        self.files, self.cache = root / "repository", cache
        self.commit, self.online, self.calls = COMMIT, True, []  # type: ignore[var-annotated]
        save_model(self.files)
        (self.files / "README.md").write_text("text")
        (self.files / "pytorch_model.bin").write_text("the same weights again")
        for number, step in enumerate(("step-0010", "step-0200"), start=1):
            save_model(self.files / step, seed=number)

    def dataset_info(self, repo: str, *, revision: str) -> Any:
        return self.model_info(f"datasets/{repo}", revision=revision)

    def model_info(self, repo: str, *, revision: str) -> Any:
        self.calls.append(f"info {repo}@{revision}")
        if not self.online:
            raise ConnectionError("no route to host")
        names = sorted(str(file.relative_to(self.files)) for file in self.files.rglob("*") if file.is_file())
        return SimpleNamespace(sha=self.commit, siblings=[SimpleNamespace(rfilename=name) for name in names])

    def snapshot_download(
        self,
        repo: str,
        *,
        revision: str,
        repo_type: str = "model",
        allow_patterns: list[str] | None = None,
        local_files_only: bool = False,
    ) -> str:
        """As huggingface_hub lays out its cache."""
        place = self.cache / f"{repo_type}s--{repo.replace('/', '--')}"
        if local_files_only:
            commit = (place / "refs" / revision).read_text()
            return str(place / "snapshots" / commit)
        self.calls.append(f"download {sorted(allow_patterns or [])}")
        if not self.online:
            raise ConnectionError("no route to host")
        for name in allow_patterns or []:
            target = place / "snapshots" / revision / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.files / name, target)
        (place / "refs").mkdir(exist_ok=True)
        return str(place / "snapshots" / revision)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    cache = tmp_path / "cache"
    hub = Hub(tmp_path, cache)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return hub
