"""study.yaml: what is refused, and how the refusal reads."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlgen_stats.schemas import study as study_module
from rlgen_stats.schemas.errors import SpecError
from rlgen_stats.schemas.spec import Spec
from rlgen_stats.stores import StudyFolder
from rlgen_stats.stores.prompts import load_prompts
from rlgen_stats.toolkit.extraction import Completion
from rlgen_stats.toolkit.extraction.grading import check_answers, grade_all, graders_of
from rlgen_stats.toolkit.study import parse_spec, read_spec, write_spec
from rlgen_stats.toolkit.study.strict_yaml import YamlError, load_yaml
from rlgen_stats.toolkit.study.template import write_template
from tests.study.conftest import spec_dict

RUNS = spec_dict()["runs"]
MAIN = spec_dict()["crosscoders"][0]
BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
"""Ten lines of aliases that stand for 9^9 values."""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sed": 1}, "unknown key 'sed'; did you mean 'seed'"),
        ({"generation": {"temprature": 1}}, "unknown key 'generation.temprature'; did you mean 'temperature'"),
        (
            {"crosscoders": [MAIN | {"n_feature": 3}]},
            "unknown key 'crosscoders.0.n_feature'; did you mean 'n_features'",
        ),
        ({"zzz": 1}, "unknown key 'zzz'; expected one of base, "),
        ({"base": {}}, "'base.path' is required and missing"),
        ({"generation": {"temperature": -1}}, "'generation.temperature': input should be greater than 0, got -1"),
        ({"statistics": {"alpha": "much"}}, "'statistics.alpha': .*got 'much'"),
        ({"runs": RUNS[:1]}, "compares two arms"),
        ({"runs": [RUNS[0], RUNS[0] | {"arm": "rl"}]}, r"run names must be unique, .* got \['sft'\]"),
        (
            {"runs": [RUNS[0], RUNS[1] | {"name": "SFT"}]},
            r"run names .* in small letters too, got \['sft'\]",
        ),
        (
            {"crosscoders": [MAIN, {"name": "Main.2", "views": ["base@0", "sft@15"]}]},
            r"crosscoder names, replicates included, must be unique, .* got \['main\.2'\]",
        ),
        ({"runs": [RUNS[0] | {"name": "../x"}, RUNS[1]]}, "a run name must be letters"),
        ({"runs": [RUNS[0] | {"name": "base"}, RUNS[1]]}, "cannot be called 'base'"),
        ({"runs": [RUNS[0] | {"method": "grpo"}, RUNS[1]]}, "training methods take none"),
        ({"contrast": ["sft", "dpo"]}, r"contrast names run 'dpo', but the runs are \['rl', 'sft'\]"),
        (
            {"crosscoders": [MAIN | {"views": ["base@0", "dpo@final", "rl@final"]}]},
            "'dpo@final' is no model of this study",
        ),
        ({"crosscoders": [MAIN | {"views": ["base@0", "sft@final"]}]}, "one crosscoder must have exactly the views"),
        ({"crosscoders": [MAIN | {"k": 10, "n_features": 4}]}, "k=10 exceeds n_features=4"),
        (
            {"crosscoders": [MAIN, {"name": "pair", "views": ["base@0", "sft@15"]}]},
            r"crosscoder 'pair': view 'sft@15' is no checkpoint of run 'sft'; expected sft@final, sft@5, sft@10",
        ),
        (
            {"crosscoders": [MAIN, {"name": "pair", "views": ["base@0", "sft@repeat"]}]},
            r"a model id looks like .*, got 'sft@repeat'",
        ),
        (
            {"crosscoders": [MAIN, {"name": "pair", "views": ["sft@final", "sft@10"]}]},
            r"views of crosscoder 'pair' must be different models, got \['sft@final', 'sft@10'\]; name each model once",
        ),
        ({"intervention": {"doses": [0.5, -1.0]}}, r"'intervention\.doses\.1': .*greater than or equal to 0, got -1"),
        ({"intervention": {"amplify": float("inf")}}, r"'intervention\.amplify': input should be a finite number"),
        ({"tasks": {"math": {"stop": "\n\n"}}}, r"'tasks\.math\.stop': input should be a list, got"),
        (
            {"extraction": {"layer": 4, "layers": [4, 8]}},
            "'extraction': give one layer as 'layer' or several as 'layers', not both",
        ),
        (
            {"extraction": {"layers": [4, 8, 4]}},
            r"'layers' takes different decoder blocks, got block 4 more than once in \[4, 8, 4\]",
        ),
        ({"extraction": {"layers": [4, -1]}}, r"'extraction\.layers\.1': .*greater than or equal to 0, got -1"),
        ({"extraction": {"layers": [4, 1.5]}}, r"'extraction\.layers\.1': .*integer.*got 1\.5"),
        ({"extraction": {"layers": 4}}, r"'extraction\.layers': .*list"),
        ({"extraction": {"segments": []}}, r"'extraction\.segments': .*at least 1 item"),
        ({"extraction": {"summary_segments": []}}, r"'extraction\.summary_segments': .*at least 1 item"),
    ],
)
def test_bad_specs_are_explained(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec(spec_dict(**changes))


def test_steps_of_a_run_that_is_trained_here_are_not_checked() -> None:
    runs = [{"name": "sft", "arm": "sft", "method": "sft"}, RUNS[1]]
    pair = {"name": "pair", "views": ["base@0", "sft@7"]}
    assert parse_spec(spec_dict(runs=runs, crosscoders=[MAIN, pair])).crosscoders[1].views == ("base@0", "sft@7")
    with pytest.raises(SpecError, match=r"view 'sft@0' is no checkpoint of run 'sft'; expected sft@final\."):
        parse_spec(spec_dict(runs=runs, crosscoders=[MAIN, pair | {"views": ["base@0", "sft@0"]}]))


@pytest.mark.parametrize(
    "section", [s for s in vars(study_module).values() if isinstance(s, type) and issubclass(s, Spec)]
)
def test_every_field_says_what_it_is_for(section: type[Spec]) -> None:
    descriptions = [field.description for field in section.model_fields.values()]
    assert all(descriptions)
    assert len(set(descriptions)) == len(descriptions)


def test_numbers_of_samples_are_one_or_two() -> None:
    """One number is written as before, so that the keys of studies stay."""
    for given, final, others, written in (
        (4, 4, 4, 4),
        ({"final": 4, "others": 4}, 4, 4, 4),
        ({"final": 4}, 4, 0, {"final": 4, "others": 0}),
    ):
        generation = parse_spec(spec_dict(generation={"n_samples": given})).generation
        assert (generation.n_samples.final, generation.n_samples.others) == (final, others)
        assert generation.model_dump(mode="json")["n_samples"] == written
        assert parse_spec(spec_dict(generation=generation.model_dump(mode="json"))).generation == generation
    for wrong, message in (
        (0, r"'generation.n_samples.final': input should be greater than or equal to 1, got 0"),
        ({"final": 2, "others": 3}, r"others \(3\) must not exceed final \(2\)"),
        (
            {"last": 2},
            r"unknown key 'generation.n_samples.last'; expected one of final, others|n_samples.final' is req",
        ),
        ("many", r"'generation.n_samples': must be a number, or a choice such as {final: 4, others: 0}; got 'many'"),
        (True, r"must be a number, or a choice .*got True"),
    ):
        with pytest.raises(SpecError, match=message):
            parse_spec(spec_dict(generation={"n_samples": wrong}))


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no study file at .*rlgen-stats init"):
        read_spec(tmp_path)
    (tmp_path / "study.yaml").write_text("a: [1")
    with pytest.raises(SpecError, match="not valid YAML"):
        read_spec(tmp_path)
    (tmp_path / "study.yaml").write_text("- 1")
    with pytest.raises(SpecError, match=r"must be a mapping .* got list"):
        read_spec(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"stands for more than 1,000,000 values through its aliases"),
        ("a: &a {b: *a}", "has an alias at line 1 that contains itself; write the values out"),
        ("a: &a [1, [*a]]", "has an alias at line 1 that contains itself"),
        ("[" * 5000, "nests more than 64 levels deep at line 1"),
        ("a:\n" + "".join(" " * (i + 1) + "a:\n" for i in range(90)), "nests more than 64 levels deep at line 65"),
        ("name: a\nseed: 1\nname: b\n", "has the key 'name' twice, in lines 1 and 3; keep one"),
        ("runs:\n  - {name: a, arm: b, name: c}\n", "has the key 'name' twice, in lines 2 and 2"),
        ("a: \x00", "is not valid YAML: unacceptable character"),
        ("a: {1: x, 0x1: y}", "has the number '0x1' in line 1; write it in decimal digits alone"),
        ("a: {1: x, +1: y}", r"has the key '\+1' twice, in lines 1 and 1"),
        ("a: {true: x}", "has the key 'true' in line 1, which YAML takes for a bool: quote it"),
        ("a: {1.0: x}", "has the key '1.0' in line 1, which YAML takes for a float: quote it"),
        ("a: {~: x}", "which YAML takes for a null: quote it"),
        ("a: 010", "has the number '010' in line 1"),
        ("a: 1_000", "has the number '1_000' in line 1"),
        ("a: 1:30", "has the number '1:30' in line 1"),
        ("a: 1:30.5", "has the number '1:30.5' in line 1"),
        ("a: !!binary dGlueQ==", "has a value of kind !!binary in line 1"),
        ("a: " + "9" * 401, "has a number of 401 digits in line 1; expected 400 at most"),
        ("a: " + "9" * 5000, "has a number of 5,000 digits"),
        ("a: !!int x", "has the number 'x' in line 1"),
        ("a: {" + "".join(f"k{i}: 1, " for i in range(5001)) + "}", "has more than 5,000 entries at line 1"),
        ("a: [" + "1, " * 10_001 + "]", "has more than 5,000 entries at line 1"),
    ],
)
def test_hostile_files_are_refused_at_once(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(SpecError, match=message):
        read_spec(tmp_path)


def test_nesting_aliases_and_merges_within_bounds_are_read() -> None:
    deep = "[" * 64 + "]" * 64
    assert load_yaml(deep) == yaml.safe_load(deep)
    with pytest.raises(YamlError):
        load_yaml(f"[{deep}]")
    many = "a: {" + "".join(f"k{i}: 1, " for i in range(5000)) + "}"
    assert load_yaml(many) == yaml.safe_load(many)
    plain = f"a: {'9' * 400}\nb: [-7, +7, 0, -0, 1.5e-3, .5, '010', '1:30', yes]\n'true': x\n-1: y\n"
    assert load_yaml(plain) == yaml.safe_load(plain)
    merged = "a: &a {k: 1, n: 2}\nb: {<<: *a, k: 3}\nc: *a\n10: x\n'10': y\n"
    assert load_yaml(merged) == yaml.safe_load(merged)
    assert load_yaml("") is None


def test_contrast_and_primary_crosscoder_default_to_the_first_of_each_arm() -> None:
    spec = parse_spec(spec_dict(runs=[*RUNS, RUNS[0] | {"name": "sft.1"}]))
    assert [run.name for run in spec.contrasted] == ["sft", "rl"]
    assert spec.primary_crosscoder.name == "main"


@pytest.mark.parametrize("changes", [{"contrast": ["sft", "rl"]}, {"extraction": {"layers": [4, 8]}}])
def test_spec_round_trips_and_another_is_not_overwritten(tmp_path: Path, changes: dict[str, Any]) -> None:
    spec = parse_spec(spec_dict(**changes))
    folder = StudyFolder(tmp_path)
    write_spec(folder, spec)
    write_spec(folder, spec)
    assert read_spec(tmp_path) == spec
    with pytest.raises(SpecError, match="already describes another study"):
        write_spec(folder, parse_spec(spec_dict(name="other")))
    assert read_spec(tmp_path) == spec


def test_template_is_a_valid_study(tmp_path: Path) -> None:
    file = write_template(tmp_path, "mine")
    with pytest.raises(SpecError, match=r"'base\.path' names .*models/base, which does not exist"):
        read_spec(tmp_path)
    (tmp_path / "models/base").mkdir(parents=True)
    (tmp_path / "models/base/config.json").write_text('{"num_hidden_layers": 28}')
    spec = read_spec(tmp_path)
    assert (spec.name, spec.extraction.layer, spec.models.dtype) == ("mine", 14, "auto")
    assert len(spec.crosscoders) == 5
    assert yaml.safe_load(file.read_text())["generation"]["n_samples"] == 4
    with pytest.raises(SpecError, match="exists already"):
        write_template(tmp_path, "mine")


def test_the_templates_own_answers_are_graded_right_as_a_model_would_write_them(tmp_path: Path) -> None:
    """One grader, math, was paired with a question on gases: no answer to it was ever right."""
    write_template(tmp_path, "mine")
    (tmp_path / "models/base").mkdir(parents=True)
    (tmp_path / "models/base/config.json").write_text('{"num_hidden_layers": 28}')
    spec = read_spec(tmp_path)
    prompts = load_prompts(spec, StudyFolder(tmp_path))
    graders = graders_of(spec, prompts["task"])
    check_answers(graders, prompts)
    written = [Completion((), f"The answer is {answer}.", True) for answer in prompts["answer"]]
    assert [grade.correct for grade in grade_all(graders, written, prompts)] == [True, True]
