"""Settings that pydantic would read as something else than what is written, and study files of no use."""

from __future__ import annotations

import math
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlgen_stats.schemas.dims import check_name, split_dictionary, split_model_id
from rlgen_stats.schemas.errors import InputError, SpecError
from rlgen_stats.toolkit.study import read_spec
from rlgen_stats.toolkit.study.spec_file import parse_spec, spec_problems
from tests.faults.malformed_inputs import SPEC


def changed(**sections: Any) -> dict[str, Any]:
    return deepcopy(SPEC) | sections


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"seed": True}, "'seed': expected a number, got True"),
        ({"seed": "1_0"}, "'seed': expected a number, got '1_0'"),
        ({"seed": "１２"}, "'seed': "),
        ({"generation": {"temperature": math.inf}}, "'generation.temperature': expected a finite number, got inf"),
        ({"generation": {"temperature": math.nan}}, "'generation.temperature': "),
        ({"generation": {"temperature": "0.70"}}, "'generation.temperature': expected a number, got '0.70'"),
        ({"intervention": {"doses": [0.5, True]}}, "'intervention.doses': expected a number, got True"),
        ({"intervention": {"doses": 0.5}}, "'intervention.doses': input should be a list"),
        ({"intervention": {"early_stop": 1}}, "'intervention.early_stop': expected true or false, got 1"),
        ({"intervention": {"early_stop": "off"}}, "'intervention.early_stop': expected true or false, got 'off'"),
        ({"statistics": {"n_bootstrap": []}}, "'statistics.n_bootstrap': "),
        ({"grader": {"marker": ""}}, "'grader.marker': "),
        ({"grader": {"marker": " \n"}}, "'grader.marker': "),
        ({"contrast": ["rl", "rl"]}, "a contrast compares two runs, got 'rl' with itself"),
        ({"crosscoders": [SPEC["crosscoders"][0] | {"replicates": 101}]}, "less than or equal to 100"),
        ({"name": "tiny\n"}, r"a study name must be letters, .* got 'tiny\\n'"),
        ({"schema_version": 99}, "'schema_version': "),
        (
            {"runs": [SPEC["runs"][0], SPEC["runs"][1] | {"checkpoints": {True: "models/rl"}}]},
            "expected a number, got True",
        ),
        (
            {"runs": [SPEC["runs"][0], SPEC["runs"][1] | {"checkpoints": {1: "models/rl", "1": "models/sft"}}]},
            r"checkpoints': expected every key once, got \[1, '1'\]",
        ),
        (
            {"runs": [SPEC["runs"][0], SPEC["runs"][1] | {"checkpoints": {2**63: "models/rl"}}]},
            "checkpoint steps end at 9223372036854775807",
        ),
        ({"runs": [SPEC["runs"][0], SPEC["runs"][1] | {"trainer": {"beta": math.nan}}]}, "expected a finite number"),
        (
            {"crosscoders": [*SPEC["crosscoders"], {"name": "x", "views": ["base@0", "base@0"], "n_features": 64}]},
            "the views of crosscoder 'x' must be different models",
        ),
        (
            {"crosscoders": [*SPEC["crosscoders"], {"name": "x", "views": ["base@0", "rl@４"], "n_features": 64}]},
            "a model id looks like 'rl@200'",
        ),
    ],
)
def test_what_is_not_meant_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec(changed(**sections))


def test_numbers_written_plainly_are_taken() -> None:
    spec = parse_spec(changed(seed="12", generation={"temperature": 1}, intervention={"doses": [0, 2], "curve": []}))
    assert (spec.seed, spec.generation.temperature, spec.intervention.doses) == (12, 1.0, (0.0, 2.0))
    quoted = SPEC["runs"][1] | {"checkpoints": {"4": "models/rl", 2**63 - 1: "models/sft"}}
    assert list(parse_spec(changed(runs=[SPEC["runs"][0], quoted])).runs[1].checkpoints) == [4, 2**63 - 1]


@pytest.mark.parametrize("name", ["rl\n", "r\nl", "rl ", "-rl", ".rl", "rÖ", ""])
def test_names_match_whole(name: str) -> None:
    with pytest.raises(InputError, match="must be letters, digits"):
        check_name(name, "a run name")


@pytest.mark.parametrize("model", ["rl@１２", "rl@²", "rl@12\n", "rl@-1", "rl@", "rl"])
def test_steps_are_plain_digits(model: str) -> None:
    with pytest.raises(InputError, match="a model id looks like"):
        split_model_id(model)
    assert split_dictionary("drift.２") == ("drift.２", 1)


def test_unknown_keys_by_the_thousand_are_counted() -> None:
    """Each is compared with every known key where it is explained, so only the first are."""
    raw = changed(**{f"key{i}": i for i in range(3000)})
    problems = spec_problems(raw)
    assert len(problems) == 51
    assert problems[-1] == "2,950 more problems like these."
    with pytest.raises(SpecError, match=r"unknown key 'key0'; .* \(and 2999 more problems\)$"):
        parse_spec(raw)


def test_values_of_a_message_are_cut() -> None:
    with pytest.raises(SpecError, match="…") as error:
        parse_spec(changed(seed="y" * 100_000))
    assert len(str(error.value)) < 2000


def test_pipes_devices_and_large_files_are_no_study_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "study.yaml")
    with pytest.raises(SpecError, match="no study file at"):
        read_spec(tmp_path)
    (tmp_path / "study.yaml").unlink()
    (tmp_path / "study.yaml").symlink_to("/dev/zero")
    with pytest.raises(SpecError, match="no study file at"):
        read_spec(tmp_path)
    (tmp_path / "study.yaml").unlink()
    text = yaml.safe_dump(SPEC)
    for size, fits in ((16_000_000, True), (16_000_001, False)):
        with (tmp_path / "study.yaml").open("w") as file:
            file.write(text + "#" * (size - len(text)))
        if fits:
            assert read_spec(tmp_path).name == "tiny"
        else:
            with pytest.raises(SpecError, match="has 16,000,001 bytes, expected a study file of at most 16,000,000"):
                read_spec(tmp_path)
