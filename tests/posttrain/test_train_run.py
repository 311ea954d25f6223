"""Real TRL runs on a one-layer model: schedule, records, resumption, reproducibility."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlgen_stats.schemas.errors import SpecError
from rlgen_stats.schemas.study import ModelsSpec, RunSpec, StudySpec
from rlgen_stats.schemas.tasks import GraderSpec, TaskSpec
from rlgen_stats.stores import StudyFolder, read_json, write_json
from rlgen_stats.stores.study_models import list_models
from rlgen_stats.toolkit.extraction.checkpoints import load_model, load_tokenizer
from rlgen_stats.toolkit.posttrain import train_run
from tests.posttrain import conftest

Make = Callable[..., StudySpec]


def weights(folder: StudyFolder, run: str, step: int) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder.run(run) / f"step-{step}")
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def probability(model: torch.nn.Module, prompt: str, completion: str) -> float:
    ids = torch.tensor(conftest.tokenizer()([f"{prompt} {completion}<eos>"])["input_ids"])
    with torch.no_grad():
        logp = torch.log_softmax(model(input_ids=ids).logits[0, 2:-1], dim=-1)
    return float(logp.gather(-1, ids[0, 3:, None]).sum().exp())


def study_at(root: Path) -> StudyFolder:
    """A folder with the training table and nothing else."""
    (root / "data").mkdir(parents=True)
    conftest.train_table().to_parquet(root / "data" / "train.parquet")
    return StudyFolder(root)


class Stopped(Exception):
    """The process dies here."""


class KillAt:
    """Progress that raises once ``step`` steps are done."""

    def __init__(self, step: int) -> None:
        self.step, self.done = step, 0.0

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "it") -> Iterator[KillAt]:
        yield self

    def advance(self, amount: float = 1.0, **facts: object) -> None:
        self.done += amount
        if self.done >= self.step:
            raise Stopped

    def skip(self, amount: float, **facts: object) -> None:
        self.done += amount

    def log(self, message: str) -> None:
        pass


@pytest.mark.parametrize(("index", "name"), [(0, "sft"), (1, "rl")])
def test_run_writes_its_checkpoints_and_a_record(index: int, name: str, folder: StudyFolder, make_spec: Make) -> None:
    spec = make_spec()
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    torch_state = torch.get_rng_state()
    assert train_run(spec, spec.runs[index], folder) == (2, 4, 6)
    assert sorted(path.name for path in folder.run(name).iterdir()) == ["posttrain.json", "step-2", "step-4", "step-6"]
    record = read_json(folder.run(name) / "posttrain.json")
    assert record["steps"] == [2, 4, 6]
    assert record["trainer"]["learning_rate"] == 1e-2
    assert str(folder.root) not in (folder.run(name) / "posttrain.json").read_text()
    assert record["log"]
    assert "trl" in record["versions"]
    base = load_model(list_models(spec.model_copy(update={"runs": ()}), folder)[0]).state_dict()
    steps = [weights(folder, name, step) for step in (2, 4, 6)]
    assert not same(base, steps[0])
    assert not same(steps[0], steps[1])
    assert not same(steps[1], steps[2])
    assert load_tokenizer(folder.run(name) / "step-2").get_vocab() == conftest.tokenizer().get_vocab()
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002  # the caller's generators are left alone
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_a_run_keeps_the_checkpoints_of_its_schedule(folder: StudyFolder, make_spec: Make) -> None:
    run = make_spec().runs[0].model_copy(update={"schedule": "geometric"})
    assert train_run(make_spec(), run, folder) == (1, 2, 6)
    assert sorted(path.name for path in folder.run("sft").glob("step-*")) == ["step-1", "step-2", "step-6"]


def test_sft_learns_the_teacher_and_rl_the_reward(folder: StudyFolder, make_spec: Make) -> None:
    spec = make_spec(sft={"max_steps": 30}, rl={"max_steps": 30})
    for run in spec.runs:
        train_run(spec, run, folder)
    base, sft, rl = (load_model(ref) for ref in list_models(spec, folder) if ref.step in (0, 30))

    def typical(model: torch.nn.Module, form: str) -> float:
        """Median probability over the questions base is unsure of: one of them may be unlearned by chance."""
        return float(np.median([probability(model, f"q {n} :", f"{form} {n}") for n in (1, 2, 3)]))

    assert 0.3 < typical(base, "ans") < 0.7
    assert typical(base, "so ans") < 0.05
    assert typical(sft, "so ans") > 0.7
    assert typical(rl, "ans") > 0.7
    assert typical(rl, "so ans") < 0.05


def test_pretraining_reads_the_prompts_alone_and_teaches_no_ending(folder: StudyFolder, make_spec: Make) -> None:
    """The questions become likelier; after them the model still answers, where texts with an end token would end it."""
    conftest.train_table()[["text"]].to_parquet(folder.root / "data" / "train.parquet")
    run = RunSpec(
        name="aside", arm="floor", method="pretrain", n_checkpoints=1, trainer=conftest.SFT | {"max_steps": 30}
    )
    spec = make_spec()
    spec = spec.model_copy(update={"runs": (run,)})
    assert train_run(spec, run, folder) == (30,)
    base, moved = (load_model(ref) for ref in list_models(spec, folder) if ref.run in ("base", "aside"))
    ids = torch.tensor(conftest.tokenizer()(list(conftest.QUESTIONS))["input_ids"])
    with torch.no_grad():
        before, after = (model(input_ids=ids).logits.log_softmax(-1) for model in (base, moved))
    likelihood = [x[:, :-1].gather(-1, ids[:, 1:, None]).sum().item() for x in (before, after)]
    assert likelihood[1] > likelihood[0] + 1
    assert (after[:, -1, 1].exp() < 0.1).all(), "the end token"


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_same_seed_same_weights_other_seed_other_weights(index: int, make_spec: Make, tmp_path: Path) -> None:
    results = []
    for number, seed in enumerate((0, 0, 1)):
        spec = make_spec(seed=seed, n_checkpoints=1)
        other = study_at(tmp_path / str(number))
        torch.manual_seed(number)  # whatever state the caller's generators are in
        train_run(spec, spec.runs[index], other)
        results.append(weights(other, spec.runs[index].name, 6))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


@pytest.mark.parametrize(("index", "name"), [pytest.param(0, "sft", marks=pytest.mark.slow), (1, "rl")])
def test_interrupted_run_ends_as_if_it_had_not_been(index: int, name: str, make_spec: Make, tmp_path: Path) -> None:
    spec = make_spec()
    run = spec.runs[index]
    whole = study_at(tmp_path / "whole")
    train_run(spec, run, whole)
    for killed_at in (1, 5):
        folder = study_at(tmp_path / f"killed-at-{killed_at}")
        with pytest.raises(Stopped):
            train_run(spec, run, folder, progress=KillAt(killed_at))
        assert not (folder.run(name) / "posttrain.json").exists()
        (folder.run(name) / "step-99").mkdir()  # left by a longer run
        (folder.run(name) / ".step-6.abc.partial").mkdir()
        first = folder.run(name) / "step-2" / "model.safetensors"
        stamp = first.stat().st_mtime_ns if first.exists() else None
        assert (stamp is not None) == (killed_at == 5)
        assert train_run(spec, run, folder) == (2, 4, 6)
        expected = ["posttrain.json", "step-2", "step-4", "step-6"]
        assert sorted(path.name for path in folder.run(name).iterdir()) == expected
        for step in (2, 4, 6):
            assert same(weights(folder, name, step), weights(whole, name, step)), step
        if stamp is not None:  # it did resume
            assert first.stat().st_mtime_ns == stamp


def test_finished_run_is_kept_and_a_changed_one_redone(folder: StudyFolder, make_spec: Make) -> None:
    spec = make_spec()
    write_json(folder.run("sft") / "key.json", {"key": "another stage's note"})
    train_run(spec, spec.runs[0], folder)
    file = folder.run("sft") / "step-2" / "model.safetensors"
    stamp = file.stat().st_mtime_ns
    train_run(spec, spec.runs[0], folder)
    assert file.stat().st_mtime_ns == stamp
    changed = make_spec(n_checkpoints=2)
    assert train_run(changed, changed.runs[0], folder) == (3, 6)
    assert sorted(path.name for path in folder.run("sft").glob("step-*")) == ["step-3", "step-6"]
    assert (folder.run("sft") / "key.json").exists()


def test_adapters_are_trained_and_read_back(folder: StudyFolder, make_spec: Make) -> None:
    spec = make_spec(n_checkpoints=1, sft={"peft": {"r": 2, "target_modules": ["q_proj", "v_proj"]}})
    train_run(spec, spec.runs[0], folder)
    final = folder.run("sft") / "step-6"
    assert (final / "adapter_config.json").exists()
    assert not (final / "model.safetensors").exists()
    refs = list_models(spec.model_copy(update={"runs": spec.runs[:1]}), folder)
    base, tuned = (load_model(ref) for ref in refs)
    changed = {n for n, v in tuned.state_dict().items() if not torch.equal(v, base.state_dict()[n])}
    assert changed
    assert all("q_proj" in n or "v_proj" in n for n in changed)


def test_an_adapter_is_trained_in_float32_on_a_base_in_bfloat16(folder: StudyFolder, make_spec: Make) -> None:
    spec = make_spec(n_checkpoints=1, sft={"max_steps": 1, "peft": {"r": 2, "target_modules": ["q_proj", "v_proj"]}})
    spec = spec.model_copy(update={"models": ModelsSpec(dtype="bfloat16")})
    train_run(spec, spec.runs[0], folder)
    adapter = load_file(folder.run("sft") / "step-1" / "adapter_model.safetensors")
    assert {values.dtype for values in adapter.values()} == {torch.float32}
    refs = list_models(spec.model_copy(update={"runs": spec.runs[:1]}), folder)
    assert [load_model(ref).dtype for ref in refs] == [torch.bfloat16, torch.bfloat16]


def test_progress_counts_every_step(folder: StudyFolder, make_spec: Make) -> None:
    spec = make_spec(n_checkpoints=1)
    counter = KillAt(10**9)
    train_run(spec, spec.runs[1], folder, progress=counter)
    assert counter.done == 6


def test_refusals(folder: StudyFolder, make_spec: Make) -> None:
    spec = make_spec(n_checkpoints=9)
    with pytest.raises(SpecError, match=r"training takes 6 steps, too few for 'n_checkpoints' = 9"):
        train_run(spec, spec.runs[0], folder)
    own = RunSpec(name="own", arm="own", checkpoints={1: "x"})
    with pytest.raises(SpecError, match="brings its own checkpoints"):
        train_run(spec, own, folder)
    table = conftest.train_table().assign(task="quiz", choices='["0", "1"]', answer="A")
    table.to_parquet(folder.root / "data" / "train.parquet")
    scored = spec.model_copy(update={"tasks": {"quiz": TaskSpec(grader=GraderSpec(name="choice_loglik"))}})
    with pytest.raises(
        SpecError, match=r"GRPO rewards what a model writes, but rows of task 'quiz' in data\.train are"
    ):
        train_run(scored, make_spec(n_checkpoints=1).runs[1], folder)
