"""What another engine needs to complete a study's prompts, or to read its texts, as this toolkit would."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from transformers import AutoConfig, GenerationConfig

from rlgen_stats.schemas.dims import GREEDY, PROMPT, PROMPT_LABELS, TASK
from rlgen_stats.schemas.errors import InputError, ModelError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import replacing
from rlgen_stats.stores.prompts import TEXT, load_prompts
from rlgen_stats.stores.study_models import ModelRef, find_model, list_models
from rlgen_stats.toolkit.extraction.activations import contrasted_models, forced_texts, token_table
from rlgen_stats.toolkit.extraction.checkpoints import is_adapter
from rlgen_stats.toolkit.extraction.completion_parts import sample_seeds
from rlgen_stats.toolkit.extraction.generation import stop_ids
from rlgen_stats.toolkit.extraction.rendering import PromptReader, load_reader
from rlgen_stats.toolkit.study.linked_studies import open_for_run

REQUESTS: Final = "requests"
"""Folder of requests, below the study's."""


@dataclass(frozen=True)
class Requests:
    """Requests that were written."""

    file: str
    n_requests: int
    model: str = ""
    """``run@step``; empty where the requests are the same for all models."""
    checkpoint: str = ""


def export_requests(path: Path | str, models: Sequence[str] = (), *, to: Path | str | None = None) -> list[Requests]:
    """Write the completions that a study asks of its models, one line each, for an engine in another environment.

    Parameters
    ----------
    path
        Study folder.
    models
        ``run@step``; default all.
    to
        Folder; default ``requests`` in the study's.

    Returns
    -------
    list of Requests
        ``MODEL.jsonl`` of every model: ``prompt_id``, ``sample`` (-1 is greedy), ``model``, ``checkpoint``, ``dtype``,
        ``prompt`` (rendered) and ``prompt_token_ids`` (with one BOS at most), and ``sampling`` by vLLM's names:
        temperature, top_p, max_tokens, stop, stop_token_ids and, where something is drawn, seed.

    Raises
    ------
    InputError
        If the prompts cannot be used, or a task has no completions since its choices are scored.
    ModelError
        If there is no such model, or its tokenizer or config cannot be read.

    Notes
    -----
    No weights are loaded. Seeds are those of sampling here; another engine makes other draws of them.
    """
    study = open_for_run(path)
    spec, folder = study.spec, study.folder
    prompts = load_prompts(spec, folder)
    scored = next((task for task in prompts[TASK] if spec.grader_of(task).name == "choice_loglik"), None)
    if scored is not None:
        raise InputError(
            f"task {scored!r} is graded by the log-likelihood of its choices, which no completion tells; sample the "
            "study here, or give the task another grader."
        )
    chosen = [find_model(model, spec, folder) for model in models] or list(list_models(spec, folder))
    into = Path(to) if to is not None else folder.root / REQUESTS
    written = []
    for ref in chosen:
        file = into / f"{ref.model}.jsonl"
        n_requests = _write_lines(file, _requests(spec, ref, prompts))
        written.append(Requests(str(file), n_requests, ref.model, str(ref.path)))
    return written


def export_texts(path: Path | str, *, to: Path | str | None = None) -> list[Requests]:
    """Write the texts that all models of a study read, for an engine that stores hidden states.

    Parameters
    ----------
    path
        Study folder, its outcomes sampled or imported.
    to
        Folder; default ``requests`` in the study's.

    Returns
    -------
    list of Requests
        ``texts.jsonl``: ``prompt_id``, ``source`` (the model that wrote the completion), ``dtype`` and
        ``prompt_token_ids``, prompt and completion as one. Beside it ``labels.parquet``, one row a token in the same
        order, as ``rlgen-stats import`` takes it.

    Raises
    ------
    StageError
        If the completions of a contrasted model are missing.
    """
    study = open_for_run(path)
    spec, folder = study.spec, study.folder
    prompts = load_prompts(spec, folder)
    texts = forced_texts(spec, folder, contrasted_models(spec, folder), prompts)
    into = Path(to) if to is not None else folder.root / REQUESTS
    lines = (
        {"prompt_id": text.prompt, "source": text.source, "dtype": spec.models.dtype, "prompt_token_ids": text.ids}
        for text in texts
    )
    n_texts = _write_lines(into / "texts.jsonl", lines)
    labels = token_table(texts).merge(prompts[[PROMPT, *PROMPT_LABELS]], on=PROMPT, how="left")
    with replacing(into / "labels.parquet") as temporary:
        labels.to_parquet(temporary, index=False)
    return [Requests(str(into / "texts.jsonl"), n_texts)]


def _requests(spec: StudySpec, ref: ModelRef, prompts: Sequence[dict[Any, Any]]) -> Iterator[dict[str, Any]]:
    reader = load_reader(ref)
    texts = list(prompts[TEXT])
    ids, tasks = list(prompts[PROMPT]), list(prompts[TASK])
    rows = list(zip(ids, tasks, map(reader.render, texts), reader.encode(texts), strict=True))
    ends = _ends(ref, reader)
    generation = spec.generation
    seeds = iter(sample_seeds(spec.seed, ids, generation.n_samples))
    for sample in range(GREEDY, generation.n_samples):
        for prompt, task, text, token_ids in rows:
            if sample == GREEDY:
                drawn: dict[str, Any] = {"temperature": 0.0}
            else:
                drawn = {"temperature": generation.temperature, "top_p": generation.top_p, "seed": next(seeds)}
            yield {
                "prompt_id": prompt,
                "sample": sample,
                "model": ref.model,
                "checkpoint": str(ref.path),
                "dtype": spec.models.dtype,
                "prompt": text,
                "prompt_token_ids": token_ids,
                "sampling": drawn
                | {"max_tokens": spec.max_new_tokens_of(task)}
                | _stops(spec.task(task).stop, reader, ends),
            }


def _ends(ref: ModelRef, reader: PromptReader) -> tuple[int, ...]:
    """Tokens that end a completion of the model, as its files say."""
    path = ref.base if ref.base is not None and is_adapter(ref.path) else ref.path
    try:
        try:
            config = GenerationConfig.from_pretrained(path, local_files_only=True)
        except OSError:  # transformers does the same when it loads a model without one
            config = GenerationConfig.from_model_config(
                AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{ref.model}: {path / 'config.json'} cannot be read ({reason}).") from error
    return stop_ids(SimpleNamespace(generation_config=config), reader.tokenizer, reader.end_of_turn)


def _stops(strings: Sequence[str], reader: PromptReader, ends: Sequence[int]) -> dict[str, Any]:
    """Stop strings, and stop tokens: also those that a string names, since no decoded text has a special token."""
    added = reader.tokenizer.added_tokens_decoder.items()
    special = {str(token): index for index, token in added if token.special}
    named = {special[string] for string in strings if string in special}
    return {
        "stop": [string for string in strings if string not in special],
        "stop_token_ids": sorted(named.union(ends)),
    }


def _write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    n_rows = 0
    with replacing(file) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            n_rows += 1
    return n_rows
