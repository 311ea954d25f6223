"""Import of completions sampled elsewhere into a study, which then samples the other models only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd

from rlgen_stats.schemas.dims import GREEDY, MODEL, PROMPT, TASK
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder, committed_models, open_outcomes
from rlgen_stats.stores.atomic import remove_folder
from rlgen_stats.stores.digests import file_sha256
from rlgen_stats.stores.hub import locate_table
from rlgen_stats.stores.owners import owner
from rlgen_stats.stores.prompts import TEXT, load_prompts
from rlgen_stats.stores.study_models import ModelRef, find_model, imported_models, list_models
from rlgen_stats.stores.table_files import table_sha256
from rlgen_stats.stores.tables import rewrite_models
from rlgen_stats.toolkit.exchange.sampled_files import TABLE, Sampled, SampledFiles, read_sampled
from rlgen_stats.toolkit.extraction.activations import contrasted_models
from rlgen_stats.toolkit.extraction.import_checks import as_completion, check_settings, complete_set, match_prompts
from rlgen_stats.toolkit.extraction.imported import (
    HERE,
    Origin,
    StandIn,
    check_origins,
    prompts_hash,
    read_origin,
    with_origin,
    write_import,
)
from rlgen_stats.toolkit.extraction.rendering import PromptReader, load_reader
from rlgen_stats.toolkit.study.linked_studies import open_for_run
from rlgen_stats.toolkit.study.stage_graph import Study

STAGE: Final = "outcomes"


@dataclass(frozen=True, kw_only=True)
class ImportedOutcomes:
    """What an import did."""

    model: str
    file: str
    """Where the completions are kept."""
    origin: Origin
    n_prompts: int
    n_samples: int
    n_truncated: int
    """Completions that the model did not end."""
    changed: bool
    """False where the same was imported before."""
    missing: tuple[str, ...]
    """Models that are to be imported too, since one engine samples all models of a study."""


def import_outcomes(
    path: Path | str,
    model: str,
    files: Sequence[Path | str],
    *,
    greedy: Sequence[Path | str] = (),
    metrics: Sequence[str] = (),
    grade_here: bool = False,
    stand_in: StandIn = "",
    declared: Mapping[str, float | None] | None = None,
    engine: str | None = None,
    replace: Callable[[str], bool] = lambda question: False,
) -> ImportedOutcomes:
    """Take completions of one model from files; the outcomes stage grades them and samples the other models.

    Parameters
    ----------
    path
        Study folder.
    model
        ``run@step``, or ``base@0``.
    files, greedy, metrics
        As :func:`~rlgen_stats.toolkit.exchange.sampled_files.read_sampled` takes them.
    grade_here
        Whether the study's graders decide although verdicts come along.
    stand_in
        ``"greedy"`` lets the first sample stand in for greedy completions that were not made, ``"samples"`` the greedy
        one for samples.
    declared
        temperature, top_p and max_new_tokens that the files do not record.
    engine
        What sampled them, where the files do not say; ``here``: this toolkit.
    replace
        Asked with one sentence where the study has completions of this model already; False keeps them.

    Raises
    ------
    InputError
        If a file cannot be used; if prompts are missing, extra or have another text; if samples are missing; if the
        tokens are another tokenizer's; if the settings are not the study's; if it is not known what sampled them, or
        models imported before are of another engine; or if completions are there and kept.
    ModelError
        If the study has no such model, or its tokenizer cannot be read.

    Notes
    -----
    Written at once or not at all. What other models' completions were sampled before stays.
    """
    study = open_for_run(path)
    if study.folder.study is not None:
        raise InputError(f"{path} is part of the study in {study.folder.study}; import into that.")
    with study.being_written():
        ref = find_model(model, study.spec, study.folder)
        sampled, of_greedy = ([locate_table(file) for file in some] for some in (files, greedy))
        given = read_sampled(sampled, greedy=of_greedy, metrics=metrics)
        if grade_here:
            given = given.without_verdicts()
        origin, found = _checked(study, ref, given, stand_in, declared or {}, engine, [*sampled, *of_greedy])
        models = [one.model for one in list_models(study.spec, study.folder)]
        others = {model: at for model, at in imported_models(study.folder).items() if model in models}
        origins = {model: read_origin(at) for model, at in others.items()} | {ref.model: origin}
        check_origins(list(origins), origins)
        file = study.folder.imported / f"{ref.model}.parquet"
        changed = not file.exists() or read_origin(file) != origin
        if changed:
            _ask(study, ref.model, file, replace)
            before = study.key(STAGE)
            write_import(file, found, origin)
            study.forget_keys()
            _keep_sampled(study, before, ref.model)
    truncated = sum(not completion.terminated for completion, _ in found.values())
    return ImportedOutcomes(
        model=ref.model,
        file=str(file),
        origin=origin,
        n_prompts=len({prompt for prompt, _ in found}),
        n_samples=ref.n_samples,
        n_truncated=truncated,
        changed=changed,
        missing=() if origin.engine == HERE else tuple(model for model in models if model not in origins),
    )


def _checked(
    study: Study,
    ref: ModelRef,
    given: SampledFiles,
    stand_in: StandIn,
    declared: Mapping[str, float | None],
    engine: str | None,
    files: Sequence[Path],
) -> tuple[Origin, dict[tuple[str, int], Any]]:
    """The completions, if they are the study's in every respect, and their origin."""
    spec, folder = study.spec, study.folder
    prompts, reader = load_prompts(spec, folder), load_reader(ref)
    tokenizer = reader.tokenizer
    tasks = dict(zip(prompts[PROMPT], prompts[TASK], strict=True))
    limits = {prompt: spec.max_new_tokens_of(task) for prompt, task in tasks.items()}
    matched = match_prompts(given.completions, prompts, _readings(reader, prompts))
    chosen = complete_set(given.completions, matched, prompts, n_samples=ref.n_samples, stand_in=stand_in)
    settings = check_settings(chosen, declared, spec.generation, limits)
    _check_content(spec, folder, ref.model, given, chosen, tasks)
    engine = engine or given.engine
    if engine == TABLE:
        raise InputError(
            "the files do not say what sampled them; expected one engine for all models of a study: name it with "
            f"--engine, e.g. vllm, or {HERE} for completions of this toolkit."
        )
    found = {}
    for key, one in chosen.items():
        asked: dict[str, Any] = {"limit": limits[key[0]], "stop": spec.task(tasks[key[0]]).stop}
        found[key] = as_completion(one, tokenizer, prompt=key[0], engine=given.engine, **asked), one.correct
    origin = Origin(
        engine=engine,
        graded_by=given.graded_by or HERE,
        stand_in=stand_in,
        settings=settings,
        files={(file_sha256 if file.is_file() else table_sha256)(file): file.name for file in files},
        prompts=prompts_hash(prompts),
    )
    return origin, found


def _readings(reader: PromptReader, prompts: pd.DataFrame) -> list[dict[str, str]]:
    """Prompts as the model reads them, and as verl writes these: decoded again, special tokens left out."""
    texts = list(prompts[TEXT])
    decoded = reader.tokenizer.batch_decode(reader.encode(texts), skip_special_tokens=True)
    return [dict(zip(prompts[PROMPT], form, strict=True)) for form in (map(reader.render, texts), decoded)]


def _check_content(
    spec: StudySpec,
    folder: StudyFolder,
    model: str,
    given: SampledFiles,
    chosen: Mapping[tuple[str, int], Sampled],
    tasks: Mapping[str, str],
) -> None:
    """Refuse completions that can be neither read nor graded."""
    ungraded = next((key for key, one in chosen.items() if given.graded_by and one.correct is None), None)
    if ungraded is not None:
        raise InputError(
            f"sample {ungraded[1]} of prompt {ungraded[0]!r} has no {given.graded_by}; expected a verdict of every "
            "completion, or of none, so that the study's grader decides."
        )
    scored = next((task for task in tasks.values() if spec.grader_of(task).name == "choice_loglik"), None)
    if scored is not None and given.graded_by is None:
        raise InputError(
            f"task {scored!r} is graded by the log-likelihood of its choices, which completions do not tell; name the "
            "verdicts that came along with --metric, or give the task another grader."
        )
    empty = next((key for key, one in chosen.items() if one.text is None and one.token_ids is None), None)
    if empty is None:
        return
    which = "the greedy completion" if empty[1] == GREEDY else f"sample {empty[1]}"
    if given.graded_by is None:
        raise InputError(
            f"{which} of prompt {empty[0]!r} has neither text nor tokens nor a verdict; expected one: where choices "
            "were scored by log-likelihood, name the verdict with --metric."
        )
    if model in contrasted_models(spec, folder):
        raise InputError(
            f"{which} of prompt {empty[0]!r} is a verdict without its text, and all models read the texts of {model}; "
            "import the completions themselves."
        )


def _ask(study: Study, model: str, file: Path, replace: Callable[[str], bool]) -> None:
    sampled = model in committed_models(study.folder.outcomes)
    if not sampled and not file.exists():
        return
    what = "imported before" if file.exists() else "sampled here"
    if not replace(f"completions of {model}, {what}, would be replaced, and what was computed from them anew"):
        raise InputError(
            f"the study has completions of {model}, {what}; they are kept: add --yes to replace them by these."
        )


def _keep_sampled(study: Study, before: str, model: str) -> None:
    """Let the other models' outcomes stand under the key that the import made; they do not depend on it."""
    store, record = study.folder.outcomes, study.record(STAGE)
    if owner(store) != (study.study_id, before) or record.get("key") != before:
        return  # of other settings, or none: the stage deals with it
    key = study.key(STAGE)
    outcomes = open_outcomes(store).load()
    kept = outcomes.isel({MODEL: [i for i, name in enumerate(outcomes[MODEL].values) if str(name) != model]})
    if not kept.sizes[MODEL]:
        remove_folder(store)
    else:
        kept = kept if "engine" in kept else with_origin(kept, None)
        rewrite_models(store, "outcomes", kept, provenance=study.provenance(STAGE, key))
    begun = {name: record[name] for name in ("seconds", "forced") if name in record}
    earlier = sorted({before, *map(str, record.get("earlier", []))})
    study.write_record(STAGE, key=key, finished=False, earlier=earlier, **begun)
