"""What a study of a given size can answer, simulated before anything is trained."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder, open_results, verify
from rlgen_stats.toolkit.demo import demo_spec
from rlgen_stats.toolkit.demo.prepare import write_tables
from rlgen_stats.toolkit.demo.world import World
from rlgen_stats.toolkit.progress import Progress
from rlgen_stats.toolkit.study import claim_power as module
from rlgen_stats.toolkit.study import open_for_run, write_spec
from rlgen_stats.toolkit.study.claim_power import StudySize, _truths, steps_of, study_size, write_claim_power

SIZE = StudySize(
    n_clusters=60,
    n_selection_tasks=2,
    prompts_per_task=210,
    steps=(1, 3, 6, 16, 40, 100),
    n_target=250,
    n_target_clusters=63,
    n_unrelated=100,
    n_random=39,
    n_features=256,
    n_dictionaries=3,
    min_discordant=20,
    alpha=0.05,
    margin=0.05,
)


@pytest.fixture(scope="module")
def spec() -> StudySpec:
    return demo_spec()


def power_of(size: StudySize, spec: StudySpec, claim: str, n: int = 6) -> dict[str, float]:
    """Verdict -> share of simulated studies, of a claim's truths, that give it."""
    return {
        verdict: float(np.mean([str(study(seed)) == verdict for seed in range(n)]))
        for which, _, verdict, study in _truths(size, spec)
        if which == claim
    }


def test_a_study_of_this_size_can_support_and_refuse_every_claim(spec: StudySpec) -> None:
    found = [(claim, verdict, str(study(1))) for claim, _, verdict, study in _truths(SIZE, spec)]
    assert {claim for claim, *_ in found} == {"C1", "C2", "C3", "C4, C5"}
    assert sum(verdict == said for _, verdict, said in found) >= len(found) - 1, found


def test_without_a_floor_no_difference_can_be_shown(spec: StudySpec) -> None:
    others = tuple(one for one in spec.crosscoders if one.name not in ("null", "noise"))
    bare = spec.model_copy(update={"crosscoders": others})
    said = [str(study(1)) for claim, _, _, study in _truths(SIZE, bare) if claim == "C1"]
    assert set(said) <= {"UNDETERMINED", "NOT_SUPPORTED"}


@pytest.mark.slow
def test_power_falls_with_what_the_study_lacks(spec: StudySpec) -> None:
    whole = power_of(SIZE, spec, "C4, C5")
    assert whole["CAUSAL_SPECIFIC"] > 0.5 < whole["NO_EFFECT"]
    few = power_of(replace(SIZE, n_unrelated=50), spec, "C4, C5")  # 59 of which none changes exclude a loss of .05
    assert few["CAUSAL_SPECIFIC"] == 0
    small = power_of(replace(SIZE, n_target=20, n_target_clusters=20), spec, "C4, C5")
    assert small["NO_EFFECT"] == 0
    assert power_of(replace(SIZE, prompts_per_task=24), spec, "C3")["SUPPORTED"] < 0.5
    assert "SUPPORTED" not in power_of(replace(SIZE, n_features=0), spec, "C1")  # no dictionary of base and one model


def test_sizes_are_read_off_the_study_and_what_is_stored_for_them_is_kept(
    spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = StudyFolder(tmp_path)
    write_tables(folder, spec, World(0), "demo")
    sizes = {"n_clusters": 210, "n_selection_tasks": 5, "n_target": 216, "n_unrelated": 98, "n_dictionaries": 1}
    of_demo = replace(SIZE, **sizes)
    assert study_size(spec, folder, steps_of(spec.contrasted[1])) == of_demo
    (folder.run("base") / "config.json").parent.mkdir(parents=True)
    (folder.run("base") / "config.json").write_text("{}")
    write_spec(folder, spec)
    asked: list[int] = []

    def instead(size: StudySize, spec: StudySpec, *, n_worlds: int, progress: Progress) -> xr.Dataset:
        asked.append(n_worlds)
        row = {"claim": "C1", "truth": "t", "verdict": "SUPPORTED", "power": 0.5}
        said = {"n_worlds": n_worlds, "size": json.dumps(asdict(size))}
        return xr.Dataset({name: ("row", [value]) for name, value in row.items()}, attrs=said)

    monkeypatch.setattr(module, "claim_power", instead)
    for n in (3, 3, 4):
        write_claim_power(open_for_run(tmp_path), n_worlds=n)
    assert asked == [3, 4]
    stored = open_results(folder.results, "claim_power")
    assert json.loads(stored.attrs["size"])["n_unrelated"] == 98
    assert verify(folder.results).problems == ()


def test_checkpoints_are_known_before_training(spec: StudySpec) -> None:
    run = spec.contrasted[0]
    assert steps_of(run) == (1, 3, 6, 16, 40, 100)
    assert steps_of(run.model_copy(update={"checkpoints": {30: "a", 10: "b"}})) == (10, 30)
