"""Everything that is wrong with a study, all at once, and what it will take; no weights are loaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pandas as pd
from transformers.utils import is_flash_attn_2_available

from rlgen_stats.schemas.dims import BASE_RUN, TASK
from rlgen_stats.schemas.errors import RlgenStatsError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder, committed_models
from rlgen_stats.stores.folder import linked_folders
from rlgen_stats.stores.hub import is_on_hub, locate_checkpoint, locate_table
from rlgen_stats.stores.prompts import TEXT, load_prompts, load_texts, prompt_files
from rlgen_stats.stores.study_models import POSTTRAIN_RECORD, ModelRef, imported_models, list_models, one_of_each
from rlgen_stats.toolkit.extraction.checkpoints import check_weights, resolve_device
from rlgen_stats.toolkit.extraction.grading import check_answers, check_letters, graders_of
from rlgen_stats.toolkit.extraction.imported import check_origins, read_import
from rlgen_stats.toolkit.extraction.model_shape import (
    ModelShape,
    check_context,
    check_weight_files,
    checkpoint_bytes,
    read_shape,
)
from rlgen_stats.toolkit.extraction.rendering import RenderedExample, check_tokenizers, load_reader, rendered_examples
from rlgen_stats.toolkit.posttrain.schedule import checkpoint_steps
from rlgen_stats.toolkit.posttrain.training_prompts import load_training_table
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.study.costs import Costs, Sizes, estimate, token_limits
from rlgen_stats.toolkit.study.linked_studies import open_for_run
from rlgen_stats.toolkit.study.spec_checks import stage_problems
from rlgen_stats.toolkit.study.spec_file import parse_spec, read_mapping, spec_problems
from rlgen_stats.toolkit.study.spec_shorthands import fill_in, shorthands
from rlgen_stats.toolkit.study.stage_graph import STAGES, Stage
from rlgen_stats.toolkit.trial.plan import check_size

if TYPE_CHECKING:
    from rlgen_stats.toolkit.extraction.rendering import RenderedExample

_TOKENIZER_FILES: Final = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class Problem:
    """One thing that must be changed before the study can run."""

    where: str
    """Setting, model or file."""
    message: str
    """Expected, got, fix."""


@dataclass(frozen=True, kw_only=True)
class StudyCheck:
    """What was found; numbers are None where a problem hides them."""

    problems: tuple[Problem, ...]
    models: tuple[str, ...] = ()
    imported: tuple[str, ...] = ()
    n_prompts: dict[str, int] = field(default_factory=dict)
    """Task -> prompts."""
    examples: tuple[RenderedExample, ...] = ()
    """The first prompt of every task as base and runs read it."""
    n_blocks: int | None = None
    """Decoder blocks of base."""
    width: int | None = None
    costs: Costs | None = None
    bytes_left: int | None = None
    """Of the costs' bytes, those that are not written yet."""
    bytes_free: int | None = None


class _Problems:
    """Problems found so far."""

    def __init__(self) -> None:
        self.found: list[Problem] = []

    def add(self, where: str, message: str) -> None:
        problem = Problem(where, message)
        if problem not in self.found:
            self.found.append(problem)

    @contextmanager
    def collecting(self, where: str) -> Iterator[None]:
        """Take an error of the toolkit inside the block as a problem."""
        try:
            yield
        except RlgenStatsError as error:
            self.add(where, str(error.args[-1] if isinstance(error, OSError) else error))


def check_study(path: Path | str, *, stages: Iterable[Stage] = STAGES, progress: Progress = SILENT) -> StudyCheck:
    """Find everything that would stop a study, and estimate its costs; no weights are loaded or downloaded.

    Parameters
    ----------
    path
        Study folder.
    stages
        Stages that are to run.
    progress
        Receiver of progress while files are hashed.

    Raises
    ------
    SpecError
        If there is no study.yaml, or none that can be read.

    Notes
    -----
    What depends on something broken is not checked: a model whose folder is missing has no tokenizer to compare.
    """
    problems = _Problems()
    file, raw = read_mapping(path)
    left_open: tuple[str, ...] = ()
    try:
        raw = fill_in(raw, StudyFolder(file.parent))
    except RlgenStatsError as error:
        problems.add("study.yaml", str(error))
        left_open = tuple(f"'{key}'" for key in shorthands(raw))  # not wrong, but what they stand for is not known
    for message in spec_problems(raw):
        if not message.startswith(left_open):
            problems.add("study.yaml", message)
    if problems.found:
        return StudyCheck(problems=tuple(problems.found))
    spec, folder = parse_spec(raw).answering(1), StudyFolder(file.parent)
    for message in stage_problems(spec, stages):
        problems.add("study.yaml", message)
    _check_machine(spec, problems)
    _check_views(spec, problems)
    _check_paths(spec, folder, problems)
    prompts = _check_prompts(spec, folder, problems)
    here = _reachable(spec, folder, problems)
    refs = () if here is None else _refs(here, folder, problems)
    shape = _check_models(spec, refs, prompts, problems)
    examples, prompt_tokens = _check_texts(here or spec, folder, refs, prompts, shape, problems)
    found: dict[str, Any] = {}
    if prompts is not None and shape is not None and prompt_tokens is not None:
        found = _costs(spec, folder, prompts, refs, shape, prompt_tokens, problems, progress)
    imported = tuple(model for model in imported_models(folder) if model in {ref.model for ref in refs})
    return StudyCheck(
        problems=tuple(problems.found),
        models=tuple(ref.model for ref in refs),
        imported=imported,
        n_prompts={}
        if prompts is None
        else {str(k): int(n) for k, n in prompts.groupby(TASK, sort=False).size().items()},
        examples=examples,
        n_blocks=None if shape is None else shape.n_blocks,
        width=None if shape is None else shape.width,
        **found,
    )


def _check_machine(spec: StudySpec, problems: _Problems) -> None:
    """Name what models need of this machine and it has not."""
    with problems.collecting("device"):
        resolve_device(spec.device)
    if spec.models.attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
        problems.add(
            "models.attn_implementation",
            "flash_attention_2 needs a CUDA device and the package flash-attn, and one is missing here; install it, or "
            "name another such as sdpa.",
        )


def _check_views(spec: StudySpec, problems: _Problems) -> None:
    """Name views that training will not write, or write twice, as far as its steps are known before it."""
    steps = {
        run.name: checkpoint_steps(total, run.n_checkpoints, run.schedule)
        for run in spec.runs
        if isinstance(total := run.trainer.get("max_steps"), int) and total >= run.n_checkpoints
    }
    for one in spec.crosscoders:
        for view, run, step in ((view, *view.split("@", 1)) for view in one.views):
            where, known = f"crosscoders.{one.name}.views", steps.get(run, ())
            if known and step.isdigit() and int(step) not in known:
                problems.add(where, f"{view!r} will not be there: {run!r} gets steps {', '.join(map(str, known))}.")
            if known and step == str(known[-1]) and f"{run}@final" in one.views:
                problems.add(where, f"{view!r} is '{run}@final'; name each model once.")


def _check_paths(spec: StudySpec, folder: StudyFolder, problems: _Problems) -> None:
    """Name every path of the study file that leads nowhere."""
    paths: dict[str, str | None] = {"base.path": spec.base.path, **prompt_files(spec)}
    if any(run.method != "checkpoints" for run in spec.runs):
        paths["data.train"] = spec.data.train
        if spec.data.train is None:
            problems.add("data.train", "is required to train runs here; name a table of training prompts.")
    for run in spec.runs:
        paths |= {f"runs.{run.name}.checkpoints.{step}": path for step, path in run.checkpoints.items()}
    for one in spec.crosscoders:
        paths |= {f"crosscoders.{one.name}.weights": one.weights, f"crosscoders.{one.name}.corpus": one.corpus}
    paths["intervention.neutral_text"] = spec.intervention.neutral_text
    for where, path in paths.items():
        if path is not None and not _is_there(path, folder):
            problems.add(where, f"names {folder.resolve(path)}, which does not exist; correct the path.")
    tables = {where: path for where, path in paths.items() if where.endswith((".corpus", ".neutral_text"))}
    for where, path in tables.items():
        if path is not None and _is_there(path, folder):
            with problems.collecting(where):
                load_texts(locate_table(path, folder))


def _is_there(path: str, folder: StudyFolder) -> bool:
    return is_on_hub(path) or folder.resolve(path).exists()


def _check_prompts(spec: StudySpec, folder: StudyFolder, problems: _Problems) -> pd.DataFrame | None:
    """The prompts, with the training tables and what trials need of them; None if they cannot be read."""
    for run in spec.runs:
        if run.method != "checkpoints" and spec.data.train and _is_there(spec.data.train, folder):
            with problems.collecting("data.train"):
                load_training_table(spec, run, folder)
    if not all(_is_there(file, folder) for file in prompt_files(spec).values()):
        return None
    prompts: pd.DataFrame | None = None
    with problems.collecting(" and ".join(prompt_files(spec))):
        prompts = load_prompts(spec, folder)
        for task, rows in prompts.groupby(TASK, sort=False):
            with problems.collecting(f"task {task}"):
                check_answers(graders_of(spec, [str(task)]), rows)
                check_letters(spec, rows)
        with problems.collecting("intervention"):
            check_size(spec, folder)
    return prompts


def _reachable(spec: StudySpec, folder: StudyFolder, problems: _Problems) -> StudySpec | None:
    """The study without checkpoints that the Hub does not give; None if it does not give base. No weights are read."""
    runs = []
    for run in spec.runs:
        where = f"runs.{run.name}.checkpoints"
        there = {
            step: path for step, path in run.checkpoints.items() if _is_given(path, folder, f"{where}.{step}", problems)
        }
        if there or run.method != "checkpoints":
            runs.append(run.model_copy(update={"checkpoints": there}))
    given = _is_given(spec.base.path, folder, "base.path", problems)
    return spec.model_copy(update={"runs": tuple(runs)}) if given else None


def _is_given(path: str, folder: StudyFolder, where: str, problems: _Problems) -> bool:
    given = False
    with problems.collecting(where):
        locate_checkpoint(path, folder)
        given = True
    return given


def _refs(spec: StudySpec, folder: StudyFolder, problems: _Problems) -> tuple[ModelRef, ...]:
    """Models whose folders are there; of runs that are still to be trained, none."""
    made = [
        run for run in spec.runs if run.method == "checkpoints" or (folder.run(run.name) / POSTTRAIN_RECORD).exists()
    ]
    refs: tuple[ModelRef, ...] = ()
    with problems.collecting("runs"):
        refs = list_models(spec.model_copy(update={"runs": tuple(made)}), folder)
    return tuple(ref for ref in refs if ref.path.is_dir())


def _check_models(
    spec: StudySpec,
    refs: Sequence[ModelRef],
    prompts: pd.DataFrame | None,
    problems: _Problems,
) -> ModelShape | None:
    """Weight files, configs and tokenizers; the shape of base, None if it is not known."""
    shape, configs, tokenizers = None, dict[str, ModelShape | None](), set()
    widths: dict[str, int] = {}
    first: dict[str, tuple[ModelRef, ModelShape]] = {}
    for ref in refs:
        with problems.collecting(ref.model):
            check_weights(ref, download=False)
            if ref.path not in [hub.path for hub in ref.hub]:
                check_weight_files(ref)
        config = _content(ref.path, ("config.json", "adapter_config.json"))
        if config not in configs:
            configs[config] = None
            with problems.collecting(ref.model):
                configs[config] = read_shape(ref, spec.extraction.layers or (spec.extraction.layer,))
        found = configs[config]
        if found is not None:
            widths.setdefault(ref.run, found.width)
            other, usual = first.setdefault(ref.run, (ref, found))
            if (found.n_blocks, found.width) != (usual.n_blocks, usual.width):
                problems.add(
                    ref.model,
                    f"checkpoints of one run are expected to be one model, got {found.n_blocks} blocks of width "
                    f"{found.width} in {ref.path} and {usual.n_blocks} of width {usual.width} in {other.path}; correct "
                    "the run's checkpoints.",
                )
            shape = found if ref is refs[0] else shape
        files = _content(ref.path, _TOKENIZER_FILES) + ref.chat.model_dump_json()
        if files not in tokenizers:
            tokenizers.add(files)
            with problems.collecting(ref.model):
                check_tokenizers([refs[0], ref], [] if prompts is None else list(prompts[TEXT]))
    _check_widths(spec, widths, problems)
    return shape


def _check_widths(spec: StudySpec, widths: Mapping[str, int], problems: _Problems) -> None:
    """Name crosscoders trained on single models (objectives paired and both) whose views differ in width."""
    for one in spec.crosscoders:
        runs = dict.fromkeys(view.partition("@")[0] for view in one.views)
        known = {run: widths[run] for run in runs if run in widths}
        if one.objective != "joint" and one.weights is None and len(set(known.values())) > 1:
            problems.add(
                f"crosscoders.{one.name}",
                f"objective {one.objective!r} puts one view's activation into every slot and needs views of one "
                f"width, got {', '.join(f'{width} of {run}' for run, width in known.items())}; write objective: joint, "
                "and readout: own where its features are read.",
            )


def _content(folder: Path, patterns: Sequence[str]) -> str:
    """Hash of small files; the same for checkpoints that differ in their weights alone."""
    digest = sha256()
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}):
        digest.update(f"{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _check_texts(
    spec: StudySpec,
    folder: StudyFolder,
    refs: Sequence[ModelRef],
    prompts: pd.DataFrame | None,
    shape: ModelShape | None,
    problems: _Problems,
) -> tuple[tuple[RenderedExample, ...], int | None]:
    """One prompt a task, and the tokens of all prompts where most; imports that are not the study's are named."""
    if prompts is None:
        return (), None
    imported, files = {}, imported_models(folder)
    for ref in refs:
        if ref.model in files:
            with problems.collecting(str(files[ref.model])):
                imported[ref.model] = read_import(files[ref.model], prompts, ref.n_samples)
    with problems.collecting("import-outcomes"):
        check_origins([ref.model for ref in refs], {model: one.origin for model, one in imported.items()})
    examples: tuple[RenderedExample, ...] = ()
    n_tokens = None
    if refs and refs[0].run == BASE_RUN:
        with problems.collecting("prompts"):
            examples = tuple(rendered_examples(spec, folder))
            for ref in one_of_each(spec, folder):
                encoded = load_reader(ref).encode(list(prompts[TEXT]))
                n_tokens = max(n_tokens or 0, sum(map(len, encoded)))
                if shape is not None:
                    check_context(shape, encoded, token_limits(spec, prompts))
    return examples, n_tokens


def _costs(
    spec: StudySpec,
    folder: StudyFolder,
    prompts: pd.DataFrame,
    refs: Sequence[ModelRef],
    shape: ModelShape,
    prompt_tokens: int,
    problems: _Problems,
    progress: Progress,
) -> dict[str, Any]:
    trained = {ref.run for ref in refs}
    untrained = {
        run.name: run.n_checkpoints for run in spec.runs if run.method != "checkpoints" and run.name not in trained
    }
    models = {ref.model: 1 + ref.n_samples for ref in refs}
    for run, count in untrained.items():
        models |= {f"{run} checkpoint {n}": 1 + spec.generation.n_samples.others for n in range(1, count)}
        models[f"{run} checkpoint {count}"] = 1 + spec.generation.n_samples.final
    study = open_for_run(folder.root, exact=False, progress=progress) if folder.stages.exists() else None
    answers = () if study is None else (study, *study.linked)
    pending = {
        stage.name: stage for stage in STAGES if not answers or any(one.state(stage.name) != "done" for one in answers)
    }
    sampled = set(imported_models(folder))
    if study is not None and study.record("outcomes").get("key") == study.key("outcomes"):
        sampled |= set(committed_models(folder.outcomes))
    sizes = Sizes(
        models=models,
        to_sample=[model for model in models if model not in sampled],
        trials_left="intervene" in pending,
        width=shape.width,
        prompt_tokens=prompt_tokens,
        checkpoint_bytes=checkpoint_bytes(folder.resolve(spec.base.path)),
    )
    costs = estimate(spec, prompts, sizes)
    unfinished = {
        Path(output).parts[0]
        for stage in pending.values()
        for output in (*stage.outputs, *stage.by_dictionary, *stage.optional, *stage.owned)
    }
    left = sum(max(0, costs.stores[name] - _written(folder.root, name)) for name in unfinished & costs.stores.keys())
    free = shutil.disk_usage(folder.root).free
    if left > free:
        problems.add(
            "disk",
            f"{left / 1e9:.1f} GB may be written below {folder.root} and {free / 1e9:.1f} GB are free; use another "
            "disk, or fewer features, checkpoints or prompts.",
        )
    return {"costs": costs, "bytes_left": left, "bytes_free": free}


def _written(root: Path, name: str) -> int:
    """Bytes of a store that are on disk, those of all layers, contrasts and dictionaries together."""
    stem, dot, suffix = name.partition(".")
    folders = (root, *linked_folders(root))
    found = [path for one in folders for path in (one / name, *(one.glob(f"{stem}.*{dot}{suffix}") if dot else ()))]
    found = [path for path in found if not path.is_symlink()]
    return sum(file.stat().st_size for path in found for file in path.rglob("*") if file.is_file())
