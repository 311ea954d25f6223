"""The stages of a study, what each depends on, and whether it is up to date.

A stage's key is the hash of its share of the spec, of the files it reads, of its parents' keys, and of how often it
was forced to run anew: whatever was computed from what it left before is stale. A finished stage leaves
``stages/<name>.json`` with that key; the stores it writes carry the same key as ``spec_hash``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Final, Literal

from rlgen_stats.schemas.dims import of_dictionary
from rlgen_stats.schemas.errors import InputError, SpecError
from rlgen_stats.schemas.seeds import content_hash
from rlgen_stats.schemas.study import ChatSpec, ModelsSpec, RunSpec, StudySpec
from rlgen_stats.stores import Provenance, StudyFolder, write_json
from rlgen_stats.stores.atomic import sweep
from rlgen_stats.stores.health_records import readout_accepted
from rlgen_stats.stores.hub import hub_folder, is_on_hub
from rlgen_stats.stores.locks import exclusive, writer_of
from rlgen_stats.stores.owners import foreign_stores
from rlgen_stats.stores.prompts import prompt_files
from rlgen_stats.stores.stage_records import read_record, read_times_forced
from rlgen_stats.stores.study_models import imported_models
from rlgen_stats.toolkit.study.fingerprints import Fingerprints
from rlgen_stats.toolkit.study.spec_shorthands import existing

State = Literal["done", "stale", "running", "interrupted", "foreign", "waiting"]


@dataclass(frozen=True)
class Stage:
    """One node of the study's graph."""

    name: str
    """Also its command's."""
    needs: tuple[str, ...]
    """Stages whose output this one reads."""
    spec: tuple[str, ...]
    """Sections of the spec it depends on; dots go deeper."""
    function: str
    """``module:function`` called with (study, key, progress); named, not imported, so that a status needs no torch."""
    outputs: tuple[str, ...]
    """Paths below the study folder that exist once it is done."""
    optional: tuple[str, ...] = ()
    """Stores it writes only where they can be estimated."""
    owned: tuple[str, ...] = ()
    """Plain folders among the outputs that hold only this key's files, and go when the key changes."""
    by_dictionary: tuple[str, ...] = ()
    """Outputs that exist once for each dictionary of the encoded crosscoder."""
    answers: Literal["all", "target", "pair"] = "all"
    """Whose result it is where a study asks several contrasts: of all, of those with one second run, or of one."""
    all_layers: bool = False
    """Whether one call does the work of all layers: models are loaded once."""
    version: int = 1
    """Raised when the stage's code changes its numbers."""


_MODELS: Final = "rlgen_stats.toolkit.study.model_stages"
_STATISTICS: Final = "rlgen_stats.toolkit.study.statistics_stages"

STAGES: Final = (
    Stage("posttrain", (), ("runs", "grader", "device"), f"{_MODELS}:posttrain", ("models",)),
    Stage(
        "outcomes",
        ("posttrain",),
        ("runs", "generation", "grader", "selection.verification_share", "selection.trial_share"),
        f"{_MODELS}:outcomes",
        ("outcomes.zarr", "completions"),
        owned=("completions",),
        version=2,
    ),
    Stage(
        "extract",
        ("outcomes",),
        ("extraction", "contrast"),
        f"{_MODELS}:extract",
        ("activations.zarr",),
        all_layers=True,
    ),
    Stage(
        "crosscoder",
        ("extract",),
        ("crosscoders",),
        f"{_MODELS}:crosscoder",
        ("crosscoder", "results.zarr/health"),
        version=4,
    ),
    Stage(
        "encode",
        ("crosscoder",),
        ("summaries",),
        f"{_MODELS}:encode",
        (),
        by_dictionary=("features.zarr",),
        version=3,
    ),
    Stage("movement", ("extract",), ("statistics",), f"{_MODELS}:movement", ("results.zarr/movement",), version=3),
    Stage(
        "align",
        ("crosscoder",),
        ("statistics",),
        "rlgen_stats.toolkit.study.align_stage:align",
        ("results.zarr/attribution", "results.zarr/latent_scaling"),
        optional=("results.zarr/matching",),
        version=4,
    ),
    Stage(
        "drift",
        ("encode",),
        ("statistics",),
        f"{_STATISTICS}:drift",
        (),
        by_dictionary=("results.zarr/drift",),
        version=3,
    ),
    Stage(
        "stabilize",
        ("encode",),
        ("statistics",),
        f"{_STATISTICS}:stabilize",
        (),
        optional=("results.zarr/timing_contrast",),
        by_dictionary=("results.zarr/stabilization", "results.zarr/set_stability"),
        answers="pair",
        version=4,
    ),
    Stage(
        "significance",
        ("outcomes", "movement", "align"),
        ("statistics", "selection"),
        f"{_STATISTICS}:significance",
        ("results.zarr/behaviour",),
        optional=("results.zarr/attribution_contrast",),
        answers="pair",
        version=5,
    ),
    Stage(
        "select",
        ("encode",),
        ("statistics", "selection"),
        f"{_STATISTICS}:select",
        (),
        by_dictionary=("results.zarr/selection",),
        answers="target",
        version=4,
    ),
    Stage(
        "separation",
        ("select",),
        ("statistics", "selection"),
        "rlgen_stats.toolkit.study.separation_stage:separation",
        ("results.zarr/separation",),
        answers="target",
    ),
    Stage(
        "tokens",
        ("select",),
        ("statistics", "tokens", "intervention.neutral_text"),
        "rlgen_stats.toolkit.study.tokens_stage:tokens",
        (),
        by_dictionary=("results.zarr/tokens",),
        answers="target",
    ),
    Stage(
        "replicability",
        ("select", "drift", "align"),
        ("statistics",),
        "rlgen_stats.toolkit.study.replicability_stage:replicability",
        (),
        optional=("results.zarr/replicability",),
        answers="pair",
        version=2,
    ),
    Stage(
        "intervene",
        ("select", "align"),
        ("intervention",),
        f"{_MODELS}:intervene",
        ("results.zarr/intervention", "results.zarr/control_balance"),
        optional=("results.zarr/mediated_share",),
        owned=("intervention",),
        by_dictionary=("results.zarr/trial-dictionary", "results.zarr/trial-dictionary-balance"),
        answers="target",
        version=8,
    ),
    Stage(
        "report",
        ("significance", "drift", "stabilize", "separation", "tokens", "replicability", "intervene"),
        (),
        f"{_STATISTICS}:report",
        ("report/index.html", "report/report.json"),
        answers="pair",
        version=2,
    ),
)
"""All stages in an order that respects their needs."""

BY_NAME: Final = {stage.name: stage for stage in STAGES}


def stage_named(name: str) -> Stage:
    """The stage called ``name``.

    Raises
    ------
    InputError
        If there is none; the message lists them.
    """
    if name not in BY_NAME:
        raise InputError(f"no stage is called {name!r}; the stages are {', '.join(BY_NAME)}.")
    return BY_NAME[name]


def with_needs(names: Iterable[str]) -> tuple[Stage, ...]:
    """These stages and everything they need, in running order."""
    needed: set[str] = set()
    queue = [stage_named(name) for name in names]
    while queue:
        stage = queue.pop()
        if stage.name not in needed:
            needed.add(stage.name)
            queue += [BY_NAME[need] for need in stage.needs]
    return tuple(stage for stage in STAGES if stage.name in needed)


@dataclass(frozen=True)
class StageStatus:
    """Where one stage stands."""

    name: str
    state: State
    key: str
    seconds: float | None
    """Wall time of the finished run, None before."""


class Study:
    """A study folder with its spec: keys, records and states of all stages. Opening it computes no stage.

    Attributes
    ----------
    forced
        Names of the stages that run although they are up to date or a crosscoder is unhealthy (:meth:`force`).
    times_forced
        Stage -> how often it was forced to run anew; part of its key.
    linked
        What it answers at further layers and for further contrasts, each as a study of its own.
    beside
        Of these, those whose work the stage that runs is to do too, at other layers.
    report_to
        Trackers that the curves of crosscoders go to; no key depends on them.
    launcher
        Command line that starts the processes of a training run; None: it is trained in this process.

    Parameters
    ----------
    folder
        Study folder.
    spec
        Its spec.
    part_of
        The study that it is linked to.
    fingerprints
        Hashes of the files it reads; default those of ``part_of``, or exact ones remembered in its folder.

    Raises
    ------
    SpecError
        If a file that the spec names is missing.
    """

    def __init__(
        self,
        folder: StudyFolder,
        spec: StudySpec,
        part_of: Study | None = None,
        *,
        fingerprints: Fingerprints | None = None,
    ) -> None:
        self.folder, self.spec = folder, spec
        self.linked: tuple[Study, ...] = ()
        self.beside: tuple[Study, ...] = ()
        self.launcher: str | None = None
        self.forced: frozenset[str] = frozenset()
        self.report_to: tuple[str, ...] = ()
        self._keys: dict[str, str] = {}
        self.times_forced: dict[str, int]
        if part_of is None:
            self.times_forced = read_times_forced(folder.forced) if folder.forced.exists() else {}
            self.fingerprints = fingerprints or Fingerprints(folder.fingerprints)
            self.study_id = self._id()
        else:
            self.times_forced, self.fingerprints = part_of.times_forced, part_of.fingerprints
            self.study_id = part_of.study_id

    def _id(self) -> str:
        prompts = {name: self._fingerprint(path, name) for name, path in prompt_files(self.spec).items()}
        shared = prompts.pop("data.prompts", None)
        inputs = {"prompts": shared, "base": self._fingerprint(self.spec.base.path, "base.path"), **prompts}
        return content_hash([self.spec.name, self.spec.seed, inputs])

    def _fingerprint(self, path: str, name: str) -> str:
        if is_on_hub(path):
            one = hub_folder(path, self.folder)
            return content_hash([one.repo, one.commit, one.subfolder])  # of a table of the Hub too
        return self.fingerprints.of(existing(path, name, self.folder))

    def key(self, name: str) -> str:
        """Content key of a stage."""
        if name not in self._keys:
            stage = stage_named(name)
            parents = [self.key(need) for need in stage.needs]
            share = {path: _section(self.spec, path) for path in stage.spec}
            files = self._input_files(name)
            asked = self._asked(stage)
            extra = [*asked, *self._times(name), *self._task_share(name)]
            self._keys[name] = content_hash([name, stage.version, self.study_id, share, files, parents, *extra])
        return self._keys[name]

    def _times(self, name: str) -> list[dict[str, int]]:
        """How often a stage was forced, as a part of its key; never, nothing."""
        return [{"forced": self.times_forced[name]}] if name in self.times_forced else []

    def force(self, names: Iterable[str]) -> None:
        """Let stages run anew, and those that an earlier run was to force and did not begin: what read them is stale.

        A stage that never ran keeps its key. Nothing is written: :meth:`write_times_forced` does.
        """
        named = frozenset(names)
        for name in named:
            if self.record(name):
                self.times_forced[name] = self.times_forced.get(name, 0) + 1
        for one in (self, *self.linked):
            records = {name: one.record(name) for name in self.times_forced}
            begun_before = {name for name, last in records.items() if last.get("forced") != self.times_forced[name]}
            one.forced = named | {name for name in begun_before if records[name]}
            one.forget_keys()

    @contextmanager
    def being_written(self) -> Iterator[None]:
        """Hold the study's lock, having removed what killed processes left in its folder.

        Raises
        ------
        StoreLockedError
            If another process holds it.
        """
        with exclusive(self.folder.stages / "run"):
            sweep(self.folder.root)
            yield

    def write_times_forced(self) -> None:
        """Remember how often stages were forced: from then on their old output is out of date, whatever happens."""
        if self.times_forced:
            write_json(self.folder.forced, self.times_forced)

    def _asked(self, stage: Stage) -> list[str]:
        """What a stage depends on of several contrasts; with one contrast, nothing."""
        if not self.spec.contrasts:
            return []
        if stage.answers == "all":
            return [run.name for run in self.spec.all_contrasted] if "contrast" in stage.spec else []
        return [run.name for run in self.spec.contrasted][1 if stage.answers == "target" else 0 :]

    def _task_share(self, name: str) -> list[Any]:
        """What a stage depends on of graders and tasks, beside their files; tasks at every default add nothing."""
        if name == "outcomes":
            return [*self.spec.grading_versions(), *filter(None, [self.spec.task_settings()])]
        if name == "posttrain" and any(run.method == "grpo" for run in self.spec.runs):
            return self.spec.reward_settings()
        return []

    def forget_keys(self) -> None:
        """Compute keys anew: a stage has changed what later ones depend on."""
        self._keys.clear()

    def _input_files(self, name: str) -> dict[str, str]:
        """Fingerprints of the files that a stage reads beside the study's stores."""
        if name == "posttrain":
            trained = [run for run in self.spec.runs if run.method != "checkpoints"]
            settings = {run.name: self.spec.training_settings(run) for run in trained}
            lengths = {f"{run} settings": content_hash(given) for run, given in settings.items() if given}
            return self._training_files() | self._grader_files() | lengths
        if name == "outcomes":  # every other stage that loads models needs it
            changed = self.spec.models != ModelsSpec()  # studies from before this section keep their keys
            loading = {"models": content_hash(self.spec.models.model_dump(mode="json"))} if changed else {}
            return self._grader_files() | self._imported_files() | self._chat_of_base() | loading
        if name == "crosscoder":
            return self._crosscoder_files()
        files = {}
        neutral = self.spec.intervention.neutral_text
        if name in ("intervene", "tokens") and neutral is not None:
            files["neutral_text"] = self._fingerprint(neutral, "intervention.neutral_text")
        primary = self.spec.primary_crosscoder
        by_note = not primary.accept_unhealthy and readout_accepted(self.folder.crosscoder(primary.name))
        if name in ("stabilize", "intervene", "report") and by_note:  # a trial that was not held is held now
            files["readout"] = "accepted"
        if name == "report":  # which shows the verdicts of all
            reports = {one.folder.linked_as: one.folder.report / "report.json" for one in self.linked}
            files |= {other: self.fingerprints.of(file) for other, file in reports.items() if file.exists()}
        return files

    def _imported_files(self) -> dict[str, str]:
        return {f"imported.{model}": self.fingerprints.of(file) for model, file in imported_models(self.folder).items()}

    def _training_files(self) -> dict[str, str]:
        files = {
            f"{run.name}@{step}": self._fingerprint(path, f"runs.{run.name}.checkpoints.{step}")
            for run in self.spec.runs
            for step, path in run.checkpoints.items()
        }
        for run in self.spec.runs:
            files |= self._template_files(f"runs.{run.name}", run)
        if any(run.method != "checkpoints" for run in self.spec.runs):
            if self.spec.data.train is None:
                raise SpecError("'data.train' is required to train runs here; name a table of training prompts.")
            files["train"] = self._fingerprint(self.spec.data.train, "data.train")
        return files

    def _grader_files(self) -> dict[str, str]:
        """Files of the user's own graders."""
        graders = [self.spec.grader, *(task.grader for task in self.spec.tasks.values() if task.grader is not None)]
        files = {}
        for python in sorted({grader.python for grader in graders if grader.python is not None}):
            try:
                found = importlib.util.find_spec(python.partition(":")[0])
            except ModuleNotFoundError:
                found = None
            if found is None or found.origin is None:
                raise SpecError(f"no module of grader {python!r}; install its package or put its folder on PYTHONPATH.")
            files[python] = self.fingerprints.of(Path(found.origin))
        return files

    def _chat_of_base(self) -> dict[str, str]:
        """How base reads prompts, if it is not as plain text; no training depends on it."""
        chat = self.spec.base.chat
        if not chat.rendered:
            return {}
        return {"base.chat": content_hash(chat.model_dump(mode="json"))} | self._template_files("base", chat)

    def _template_files(self, name: str, chat: ChatSpec) -> dict[str, str]:
        if chat.template_file is None:
            return {}
        return {f"{name}.chat_template": self._fingerprint(chat.template_file, f"{name}.chat_template")}

    def _crosscoder_files(self) -> dict[str, str]:
        return {
            f"{crosscoder.name}.{kind}": self._fingerprint(path, f"crosscoders.{crosscoder.name}.{kind}")
            for crosscoder in self.spec.crosscoders
            for kind, path in (("weights", crosscoder.weights), ("corpus", crosscoder.corpus))
            if path is not None
        }

    def training_key(self, run: RunSpec) -> str:
        """Content key of one training run: base, training data, grader and the run's own settings."""
        share = [self.study_id, self._training_files(), self.spec.grader.model_dump(mode="json")]
        version, again = BY_NAME["posttrain"].version, self._times("posttrain")
        reward = [self.spec.reward_settings(), self._grader_files()] if run.method == "grpo" else []
        settings = self.spec.training_settings(run)
        return content_hash([*share, run.model_dump(mode="json"), version, *again, *reward, *settings])

    def provenance(self, name: str, key: str) -> Provenance:
        """Origin of a stage's stores: study, key, seed, and the keys of the stages it read."""
        parents = {need: self.key(need) for need in stage_named(name).needs}
        details = {"stage": name, "study": self.spec.name, "seed": self.spec.seed, "parents": parents}
        return Provenance(self.study_id, key, details)

    def file(self, name: str) -> Path:
        """File of a stage's record."""
        return self.folder.stages / f"{name}.json"

    def record(self, name: str) -> dict[str, Any]:
        """What the last run of a stage left, empty if it never started."""
        file = self.file(name)
        return read_record(file) if file.exists() else {}

    def write_record(self, name: str, **facts: Any) -> None:
        """Replace a stage's record."""
        write_json(self.file(name), {"stage": name, "study_id": self.study_id, **facts})

    def outputs(self, stage: Stage) -> list[Path]:
        """Paths that exist once a stage is done."""
        dictionaries = range(1, len(self.spec.primary_crosscoder.names) + 1)
        repeated = [_of_dictionary(output, number) for output in stage.by_dictionary for number in dictionaries]
        return [self.folder.root / output for output in (*stage.outputs, *repeated)]

    def dictionaries(self, stage: Stage) -> dict[str, str]:
        """Outputs that exist once for each dictionary -> the folder of its crosscoder, both below the study's."""
        names = self.spec.primary_crosscoder.names
        return {
            _of_dictionary(output, number): self.folder.crosscoder(name).relative_to(self.folder.root).as_posix()
            for output in stage.by_dictionary
            for number, name in enumerate(names, start=1)
        }

    def stores(self, stage: Stage) -> list[Path]:
        """Everything a stage may have written: its outputs, also of more dictionaries than there are now."""
        paths = self.outputs(stage) + [self.folder.root / output for output in stage.optional]
        for output in stage.by_dictionary:
            numbered = (self.folder.root / _of_dictionary(output, number) for number in count(2))
            paths += [path for path in takewhile(Path.exists, numbered) if path not in paths]
        return paths

    def state(self, name: str) -> State:
        """Where a stage stands.

        done: its record has this key and what it wrote is there; stale: finished under another key; interrupted: begun,
        or an output is missing; foreign: a store in its place is not the one it wrote (of another study, key or
        dictionary, or without one of its models); waiting: never begun.
        """
        record = self.record(name)
        if not record:
            return "waiting"
        if record.get("finished") and record.get("key") == self.key(name):
            if not all(path.exists() for path in self.outputs(stage_named(name))):
                return "interrupted"
            record |= {"dictionaries": self.dictionaries(stage_named(name))}
            return "foreign" if foreign_stores(self.folder.root, record) else "done"
        return "stale" if record.get("finished") else "interrupted"

    def status(self) -> tuple[StageStatus, ...]:
        """State of every stage; running: the one begun last, where a process of this host is at work on the study."""
        states = {stage.name: self.state(stage.name) for stage in STAGES}
        begun = [
            name for name, state in states.items() if state == "interrupted" and not self.record(name).get("finished")
        ]
        if begun and writer_of(self.folder.stages / "run") is not None:
            states[max(begun, key=lambda name: self.file(name).stat().st_mtime_ns)] = "running"
        return tuple(
            StageStatus(name, state, self.key(name), self.record(name).get("seconds")) for name, state in states.items()
        )


def _of_dictionary(output: str, number: int) -> str:
    path = Path(output)
    return path.with_name(of_dictionary(path.stem, number) + path.suffix).as_posix()


def _section(spec: StudySpec, path: str) -> Any:
    """A section of the spec. A layer's key does not know which others are asked: adding one leaves finished ones."""
    value: Any = spec.model_dump(mode="json", exclude={"extraction": {"layers"}})
    for part in path.split("."):
        value = value[part]
    return value
