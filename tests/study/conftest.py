from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

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
