"""Stages on the workers of a cluster, and in parts: the bytes of one uninterrupted process, whoever dies when."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlgen_stats.schemas.errors import InputError, ModelError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder, committed_models, package_versions
from rlgen_stats.stores.digests import file_sha256
from rlgen_stats.toolkit import workers
from rlgen_stats.toolkit.extraction import completion_parts, sample_outcomes
from rlgen_stats.toolkit.extraction.checkpoints import load_model
from rlgen_stats.toolkit.extraction.completion_parts import PARTS
from rlgen_stats.toolkit.progress import _Silent
from rlgen_stats.toolkit.workers import local_workers, tasks_on
from tests.extraction.conftest import PROVENANCE, save_model, study_spec

IN_PARTS = study_spec(generation={"max_new_tokens": 6, "n_samples": 2, "batch_size": 1})
"""Two parts of six prompts for each of five models."""


def files_of(*places: Path) -> dict[str, bytes]:
    """Path below its place -> content, of all files but locks."""
    files = ((place, file) for place in places for file in place.rglob("*") if file.is_file())
    return {f"{place.name}/{file.relative_to(place)}": file.read_bytes() for place, file in files}


def outcome_files(folder: StudyFolder) -> dict[str, bytes]:
    return files_of(folder.outcomes, folder.completions)


@pytest.fixture(scope="module")
def uninterrupted(fresh_study: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = StudyFolder(shutil.copytree(fresh_study, tmp_path_factory.mktemp("whole") / "study"))
    sample_outcomes(IN_PARTS, folder, provenance=PROVENANCE)
    return outcome_files(folder)


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with local_workers("cpu,cpu") as found:
        yield found


def kills(where: str) -> Callable[[], None]:
    """A function that lets the worker in which it runs die at the next part that it answers; the one after is sound."""

    def arm() -> None:  # not at the module's level: workers cannot import tests
        def die(*args: Any, **options: Any) -> None:
            psutil.Process().kill()

        def die_half_way(table: Any, path: Path, **options: Any) -> None:
            path.write_bytes(b"PAR1 and then nothing")
            die()

        if where == "in its task":
            completion_parts.grade_all = die  # type: ignore[assignment]
        else:
            completion_parts.pq.write_table = die_half_way

    return arm


@pytest.mark.slow
def test_workers_that_die_in_a_task_and_in_a_write_leave_the_bytes_of_one_process(
    study: tuple[StudySpec, StudyFolder], uninterrupted: dict[str, bytes]
) -> None:
    """Four workers, of which two die."""
    folder = study[1]
    with local_workers("cpu,cpu,cpu,cpu") as client:
        client.wait_for_workers(4)
        before = client.run(os.getpid)
        first, second, *others = before
        for worker, where in ((first, "in its task"), (second, "while it writes")):
            client.run(kills(where), workers=[worker])
        with tasks_on(client, folder.spec):
            sample_outcomes(IN_PARTS, folder, provenance=PROVENANCE)
        client.wait_for_workers(4)
        after = set(client.run(os.getpid).values())
    assert after & set(before.values()) == {before[worker] for worker in others}
    assert outcome_files(folder) == uninterrupted


class _Counted(_Silent):
    """Completions that were counted, and those that an earlier run had."""

    def __init__(self) -> None:
        self.done = self.skipped = 0.0

    def task(self, *args: Any, **options: Any) -> Any:
        return self

    def __enter__(self) -> "_Counted":
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def advance(self, amount: float = 1.0, **facts: object) -> None:
        self.done += amount

    def skip(self, amount: float, **facts: object) -> None:
        self.skipped += amount


def test_a_kill_loses_one_part_of_a_model(
    study: tuple[StudySpec, StudyFolder], uninterrupted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = study[1]
    answer, answered = completion_parts.answer_prompts, 0

    def killed(*args: Any, **options: Any) -> Any:
        nonlocal answered
        answered += 1
        if answered == 4:  # the second part of the second model
            raise KeyboardInterrupt
        return answer(*args, **options)

    monkeypatch.setattr(completion_parts, "answer_prompts", killed)
    with pytest.raises(KeyboardInterrupt):
        sample_outcomes(IN_PARTS, folder, provenance=PROVENANCE)
    assert committed_models(folder.outcomes) == ["base@0"]
    kept = folder.completions / PARTS / PROVENANCE.spec_hash[:16] / "sft@3"
    assert [file.name for file in kept.iterdir()] == ["0-6.parquet"]
    counted = _Counted()
    sample_outcomes(IN_PARTS, folder, provenance=PROVENANCE, progress=counted)
    assert answered == 4 + 7
    assert (counted.done, counted.skipped) == (7 * 18, 18)
    assert outcome_files(folder) == uninterrupted


@pytest.mark.slow
def test_a_workers_refusal_is_the_commands_and_what_came_before_is_kept(
    study: tuple[StudySpec, StudyFolder], client: Any, uninterrupted: dict[str, bytes]
) -> None:
    folder = study[1]
    weights = folder.root / "own/rl-4/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with tasks_on(client, folder.spec), pytest.raises(ModelError, match=r"rl@4: .* cannot be loaded"):
        sample_outcomes(IN_PARTS, folder, provenance=PROVENANCE)
    assert committed_models(folder.outcomes) == ["base@0", "sft@3", "sft@6"]
    save_model(weights.parent, 3)
    with tasks_on(client, folder.spec):
        sample_outcomes(IN_PARTS, folder, provenance=PROVENANCE)
    assert outcome_files(folder) == uninterrupted


def test_each_process_loads_a_model_once_while_its_parts_last(
    study: tuple[StudySpec, StudyFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []

    def counting(ref: Any, **how: Any) -> Any:
        loads.append(ref.model)
        return load_model(ref, **how)

    monkeypatch.setattr(completion_parts, "load_model", counting)
    sample_outcomes(IN_PARTS, study[1], provenance=PROVENANCE)
    assert loads == ["base@0", "sft@3", "sft@6", "rl@4", "rl@8"]


def test_workers_that_cannot_do_the_study_are_refused(client: Any, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("name: tiny")

    def differ() -> None:
        workers._facts = lambda file: ({**package_versions(), "torch": "1.0"}, file_sha256(file))

    def hide() -> None:
        workers._facts = lambda file: (package_versions(), None)

    client.wait_for_workers(2)
    first, second, *_ = client.run(os.getpid)
    client.run(hide, workers=[second])
    with pytest.raises(InputError, match=rf"worker {second} finds nothing at {file}"), tasks_on(client, file):
        pass
    client.run(differ, workers=[first])
    with pytest.raises(InputError, match=rf"worker {first} has torch 1\.0, this process "), tasks_on(client, file):
        pass
