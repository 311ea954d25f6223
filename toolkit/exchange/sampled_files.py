"""Completions that others have sampled: files of vLLM and SGLang, logs of evaluation frameworks, rollouts of verl."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Final

import numpy as np

from rlgen_stats.schemas.dims import GREEDY, PROMPT, SAMPLE
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.stores.prompts import FILE_ID
from rlgen_stats.stores.table_files import is_table_folder, json_lines, read_table
from rlgen_stats.toolkit.exchange.evaluation_logs import TaskLog, evaluation_logs, message_text

TABLE: Final = "table"
"""Engine of rows that do not say what sampled them."""
CORRECT: Final = "correct"
"""Column of a table that holds verdicts."""
SETTINGS: Final = ("temperature", "top_p", "max_new_tokens")
"""What decides how a completion is drawn, by the names of study.yaml."""
_IDS: Final = (FILE_ID, PROMPT, "custom_id")
_TEXTS: Final = ("text", "completion", "output", "response", "generated_text")
_TOKENS: Final = ("token_ids", "output_ids", "output_token_ids")
_LENGTHS: Final = ("max_new_tokens", "max_tokens", "max_completion_tokens")
_ENDED: Final = {"stop": True, "eos": True, "length": False, "max_tokens": False, "abort": False}
"""Reason for which a completion ended -> whether the model ended it."""
_VERL: Final = frozenset({"input", "output", "score", "step"})
"""Fields of every line that verl dumps."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """One completion as its file has it; None is what the file does not say."""

    prompt: str | None = None
    """Id of the prompt."""
    prompt_text: str | None = None
    sample: int | None = None
    """Number of the sample; GREEDY is the greedy completion."""
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    terminated: bool | None = None
    """Whether the model ended by itself."""
    correct: bool | None = None
    """Verdict that came along."""
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class SampledFiles:
    """Completions of one model, in the order of the files."""

    engine: str
    """As the rows say in a column ``engine``; else vllm, sglang, lm-eval, inspect or verl by their layout, or TABLE."""
    completions: tuple[Sampled, ...]
    graded_by: str | None
    """What the verdicts are, None where there are none."""

    def without_verdicts(self) -> SampledFiles:
        """The same, to be graded anew."""
        return SampledFiles(self.engine, tuple(replace(one, correct=None) for one in self.completions), None)


def read_sampled(files: Sequence[Path], *, greedy: Sequence[Path] = (), metrics: Sequence[str] = ()) -> SampledFiles:
    """Read completions, or verdicts alone, of one model.

    Parameters
    ----------
    files
        Tables (see :func:`~rlgen_stats.stores.table_files.read_table`) with prompt_id, sample, text or
        token_ids, and perhaps correct, one row a completion, or a line a prompt as vLLM and SGLang return it
        (``outputs``, ``meta_info``, batch responses), each perhaps with the ``engine`` that sampled it;
        ``samples_*.jsonl`` of lm-evaluation-harness; ``.eval`` or ``.json`` of Inspect; ``STEP.jsonl`` that verl dumps.
        Completions of one prompt without a number count in the order of the files.
    greedy
        The same, of greedy completions. What a file records as drawn at temperature 0 is greedy without it.
    metrics
        Verdicts to take: a column, a metric of lm-evaluation-harness (``exact_match,strict-match``), a scorer of
        Inspect, ``score`` of verl; several where tasks differ. Default: the column ``correct`` of a table, none of the
        others.

    Raises
    ------
    InputError
        If a file is missing, of no known kind or malformed, files of several engines come together, or the metric is
        absent or no verdict.
    """
    engines: dict[str, Path] = {}
    completions: list[Sampled] = []
    for file, is_greedy in [*((file, False) for file in files), *((file, True) for file in greedy)]:
        if not file.is_file() and not is_table_folder(file):
            raise InputError(f"there is no file {file}; expected completions: correct the path.")
        try:
            engine, rows = _read(file, metrics)
            read = [Sampled(**row) for row in rows]
        except (ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{file} cannot be read as completions ({type(error).__name__}: {str(error)[:80]}); expected rows with "
                "prompt_id, sample and text or token_ids, or a log of lm-evaluation-harness, Inspect or verl."
            ) from error
        engines.setdefault(engine, file)
        completions += [replace(one, sample=GREEDY) if is_greedy or one.temperature == 0 else one for one in read]
    if len(engines) > 1:
        raise InputError(
            f"the files are of {' and '.join(engines)} ({', '.join(file.name for file in engines.values())}); expected "
            "the completions of one model from one engine: import them apart or write them as one table."
        )
    if not completions:
        raise InputError(f"{', '.join(map(str, [*files, *greedy]))}: no completions; expected at least one row.")
    graded = " and ".join(metrics) or (CORRECT if any(one.correct is not None for one in completions) else None)
    return SampledFiles(next(iter(engines)), tuple(_numbered(completions)), graded)


def _numbered(completions: Iterable[Sampled]) -> Iterator[Sampled]:
    """Completions without a number get the next of their prompt."""
    numbers: dict[str | None, Iterator[int]] = {}
    for one in completions:
        if one.sample is None:
            number = next(numbers.setdefault(one.prompt if one.prompt is not None else one.prompt_text, count()))
            one = replace(one, sample=number)
        yield one


def _read(file: Path, metrics: Sequence[str]) -> tuple[str, Iterable[dict[str, Any]]]:
    logs = evaluation_logs(file, completions=True)
    if logs is not None:
        return logs[0].engine if logs else "inspect", [row for log in logs for row in _of_log(log, metrics)]
    if file.suffix == ".jsonl" and next(json_lines(file), {}).keys() >= _VERL:
        return "verl", _of_verl(file, metrics)
    rows = [row for line in read_table(file).to_dict(orient="records") for row in _flat(line)]
    engines = sorted({str(row["engine"]) for row in rows if row.get("engine")})
    if len(engines) > 1:
        raise InputError(f"{file} has completions of {' and '.join(engines)}; expected those of one engine.")
    return engines[0] if engines else TABLE, [_of_row(row, metrics, file) for row in rows]


def _of_log(log: TaskLog, metrics: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Completions of a task's log, with the verdicts of a metric where one is named."""
    n_samples = max((row[SAMPLE] for row in log.completions), default=0) + 1
    verdicts: dict[tuple[str, int], Any] = {}
    metric = _only(metrics, log.rows, f"task {log.task!r} of {log.file}")
    if metric is not None:
        if log.engine == "lm-eval" and n_samples > 1:
            raise InputError(
                f"{log.file} grades the {n_samples} samples of a document as one; leave the metric {metric!r} out, so "
                "that each is graded here."
            )
        first = 0 if log.engine == "lm-eval" else 1  # Inspect counts epochs from 1
        verdicts = {
            (row[PROMPT], row[SAMPLE] - first): _truth(row[CORRECT], metric, log.file) for row in log.rows[metric]
        }
    for row in log.completions:
        yield row | {CORRECT: verdicts.get((row[PROMPT], row[SAMPLE]))}


def _only(metrics: Sequence[str], names: Iterable[str], what: str) -> str | None:
    """The one of these metrics that a log or row has; None if none are asked for."""
    found = [metric for metric in metrics if metric in names]
    if metrics and len(found) != 1:
        raise InputError(
            f"{what} has {' and '.join(found) or 'none'} of the metrics {', '.join(metrics)}, expected one; it has "
            f"{', '.join(names)}."
        )
    return found[0] if found else None


def _of_verl(file: Path, metrics: Sequence[str]) -> Iterator[dict[str, Any]]:
    steps = set()
    for row in json_lines(file):
        steps.add(row["step"])
        if len(steps) > 1:
            raise InputError(f"{file} holds rollouts of the steps {sorted(steps)}; expected those of one model.")
        metric = _only(metrics, row, str(file))
        yield {
            "prompt_text": str(row["input"]),
            "text": str(row["output"]),
            CORRECT: None if metric is None else _truth(row[metric], metric, file),
        }


def _flat(line: Mapping[Any, Any]) -> Iterator[dict[str, Any]]:
    """One row a completion of a line that holds several, or holds them nested."""
    row = {name: value for name, value in line.items() if not _is_missing(value)}
    response = row.get("response")
    if isinstance(response, dict):  # of a batch, in OpenAI's layout: vllm run-batch, SGLang's batches
        outputs, engine = (response.get("body") or {}).get("choices") or [], "vllm"
    elif isinstance(row.get("outputs"), list | np.ndarray):
        outputs, engine = list(row["outputs"]), "vllm"
    elif isinstance(row.get("meta_info"), dict):
        outputs, engine = [row["meta_info"]], "sglang"
    else:
        yield row
        return
    rest = {name: value for name, value in row.items() if name not in ("response", "outputs", "meta_info")}
    for output in outputs:
        message = {"text": output["message"].get("content")} if "message" in output else {}
        number = {SAMPLE: output["index"]} if "index" in output and len(outputs) > 1 else {}
        yield {"engine": engine} | rest | number | dict(output) | message


def _of_row(row: Mapping[str, Any], metrics: Sequence[str], file: Path) -> dict[str, Any]:
    named = next((name for name in _IDS if name in row), None)
    texts = [row[name] for name in ("prompt_text", PROMPT) if name in row and name != named]
    text, tokens = _first(row, _TEXTS), _first(row, _TOKENS)
    reason = row.get("finish_reason")
    ended = row.get("terminated", _ENDED.get(str(reason["type"] if isinstance(reason, dict) else reason)))
    graded = _only(metrics, row, str(file)) or CORRECT
    return {
        "prompt": None if named is None else _label(row[named]),
        "prompt_text": message_text(texts[0]) if texts else None,
        "sample": _number(row, (SAMPLE,), int),
        "text": None if text is None else str(text),
        "token_ids": None
        if tokens is None
        else tuple(_exactly(token, int) for token in (json.loads(tokens) if isinstance(tokens, str) else tokens)),
        "terminated": None if ended is None else _truth(ended, "terminated", file),
        "correct": _truth(row[graded], graded, file) if graded in row else None,
        "temperature": _number(row, ("temperature",), float),
        "top_p": _number(row, ("top_p",), float),
        "max_new_tokens": _number(row, _LENGTHS, int),
    }


def _first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if name in row), None)


def _number(row: Mapping[str, Any], names: Sequence[str], kind: type[int] | type[float]) -> Any:
    """A number; None where there is none, or an empty cell of a csv."""
    value = _first(row, names)
    return None if value in (None, "") else _exactly(value, kind)


def _exactly(value: Any, kind: type[int] | type[float]) -> Any:
    """A cell as a number, if it is one: not a truth value, not half a sample, not digits of other scripts."""
    number = math.nan if isinstance(value, bool) or not str(value).isascii() else float(value)
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        raise ValueError(f"{value!r} is no {'whole' if kind is int else 'finite'} number")
    return kind(number)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _label(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _truth(value: Any, name: str, file: Path) -> bool:
    words = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
    given = words.get(str(value).strip().lower())
    if given is None:
        raise InputError(
            f"{name} of {file} must be true or false (or 1, 0), got {value!r}; write it so, or leave it out."
        )
    return given
