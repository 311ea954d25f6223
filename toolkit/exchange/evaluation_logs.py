"""Per-sample logs of lm-evaluation-harness and Inspect, read as graded completions by task and metric."""

from __future__ import annotations

import importlib
import json
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from rlgen_stats.schemas.dims import CLUSTER, PROMPT, SAMPLE
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.stores.table_files import json_lines

NO_TASK: Final = "all"
"""Task of a log that does not name one."""

_LM_EVAL_NAME: Final = re.compile(r"samples_(.+?)(_\d{4}-\d{2}-\d{2}T.*)?\.jsonl")
_LM_EVAL_FIELDS: Final = (
    *("doc_id", "doc", "target", "arguments", "resps", "filtered_resps"),
    *("filter", "metrics", "doc_hash", "prompt_hash", "target_hash"),
)
"""Fields of a sample that are no metrics; older releases do not list the metrics."""
_INSPECT_GRADES: Final = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0, "yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}
"""What Inspect's own metrics make of letters and words: correct, partial, incorrect, no answer."""
_ZSTANDARD: Final = 93
"""Compression of the entries of newer ``.eval`` files, which Python's zipfile reads from 3.14 on."""
_HEADERS: Final = ("header.json", "start.json", "_journal/start.json")
"""Where an ``.eval`` archive names its task: finished, of the first releases, unfinished."""
_SUMMARIES: Final = ("summaries.json", "summary.json")
_SUMMARISED: Final = 5000
"""Characters of a prompt that tell it apart: summaries cut it after 5,120, and the first releases joined its lines."""


@dataclass(frozen=True)
class TaskLog:
    """Samples of one task."""

    file: Path
    task: str
    engine: str
    """lm-eval or inspect."""
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Metric -> one row a sample: prompt, sample, correct, content, and cluster where asked for."""
    completions: list[dict[str, Any]] = field(default_factory=list)
    """Where asked for, one row a completion: prompt, sample, prompt_text, text, terminated and how it was drawn."""

    def add(self, metric: str, row: Mapping[str, Any], value: Any) -> None:
        """One graded sample; ``value`` is a float, None where ungraded, or something that is no score."""
        self.rows.setdefault(metric, []).append({**row, "correct": value})


def evaluation_logs(file: Path, cluster: str | None = None, *, completions: bool = False) -> list[TaskLog] | None:
    """Tasks that a file logs, or None if it is no log of either framework.

    Parameters
    ----------
    file
        ``samples_<task>_<date>.jsonl`` or a JSON file with the samples of all tasks (lm-evaluation-harness); ``.eval``
        or ``.json`` (Inspect).
    cluster
        Field of a sample that says which prompts depend on one another, with dots.
    completions
        Whether completions are read too; an ``.eval`` file is then read whole, by Inspect itself.

    Raises
    ------
    InputError
        If a sample lacks the field, an archive is no log, or Inspect is needed and not installed.

    Notes
    -----
    lm-evaluation-harness logs a document once for every filter; a metric is called as in its results:
    ``exact_match,strict-match``. Inspect's metrics are its scorers, ``scorer/key`` where a scorer gives several values;
    letters and words count as Inspect counts them (C 1, P .5, I and N 0), and samples without a score are ungraded.
    """
    if file.suffix == ".eval":
        if completions:
            return [_inspect_document(file, _read_with_inspect(file), cluster, completions=True)]
        return [_inspect(file, *_archive(file), cluster)]
    if file.suffix == ".jsonl":
        if not _is_lm_eval(next(json_lines(file), {})):
            return None
        name = _LM_EVAL_NAME.fullmatch(file.name)
        return [_lm_eval(file, name[1] if name else NO_TASK, json_lines(file), cluster, completions=completions)]
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig")) if file.suffix == ".json" else None
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":  # of a table with one object a line
            raise
        return None
    if not isinstance(content, dict):
        return None
    samples = content.get("samples")
    if isinstance(content.get("eval"), dict) and isinstance(samples, list):
        return [_inspect_document(file, content, cluster, completions=completions)]
    if isinstance(samples, dict):
        return [_lm_eval(file, str(task), rows, cluster, completions=completions) for task, rows in samples.items()]
    return None


def _is_lm_eval(row: Mapping[str, Any]) -> bool:
    return "doc_id" in row and bool(row.keys() & {"filtered_resps", "resps", "arguments", "doc_hash"})


def _lm_eval(
    file: Path, task: str, samples: Iterable[dict[str, Any]], cluster: str | None, *, completions: bool
) -> TaskLog:
    log, first_filter = TaskLog(file, task, "lm-eval"), None
    for number, sample in enumerate(samples):
        first_filter = sample.get("filter") if not number else first_filter
        if completions and sample.get("filter") == first_filter:  # a document comes once for every filter
            log.completions.extend(_lm_eval_completions(sample))
        row = {PROMPT: str(sample["doc_id"]), SAMPLE: 0, "content": sample.get("doc_hash")}
        row |= _cluster(log, sample, cluster)
        for metric in sample.get("metrics") or [name for name in sample if name not in _LM_EVAL_FIELDS]:
            name = f"{metric},{sample['filter']}" if "filter" in sample else str(metric)
            log.add(name, row, _number(sample.get(metric)))
    return log


def _lm_eval_completions(sample: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of one document; without a text where choices were scored by log-likelihood."""
    arguments = sample.get("arguments") or []
    requests = list(arguments.values()) if isinstance(arguments, dict) else arguments
    request = requests[0] if requests else {}
    parts = list(request.values()) if isinstance(request, dict) else list(request)
    settings = parts[1] if len(parts) > 1 and isinstance(parts[1], dict) else {}
    drawn = {
        "prompt_text": parts[0] if parts else None,
        # the harness draws greedily unless it is told to sample
        "temperature": settings.get("temperature") if settings.get("do_sample") or settings.get("temperature") else 0.0,
        "top_p": settings.get("top_p"),
        "max_new_tokens": settings.get("max_gen_toks"),
    }
    answers = sample.get("resps") or [[]]
    texts = answers[0] if len(answers) == 1 and all(isinstance(text, str) for text in answers[0]) else [None]
    return [{PROMPT: str(sample["doc_id"]), SAMPLE: i, "text": text} | drawn for i, text in enumerate(texts)]


def _read_with_inspect(file: Path) -> dict[str, Any]:
    """Content of an ``.eval`` file with its attachments in place, which Inspect alone can put there."""
    try:
        inspect_log = importlib.import_module("inspect_ai.log")
    except ImportError as error:
        raise InputError(
            f"reading completions from {file} needs Inspect, which is not installed; pip install inspect-ai, or write "
            f"the log as JSON where it is: inspect log dump --resolve-attachments {file.name} > {file.stem}.json."
        ) from error
    return dict(inspect_log.read_eval_log(str(file), resolve_attachments=True).model_dump(mode="json"))


def _inspect_document(file: Path, content: Mapping[str, Any], cluster: str | None, *, completions: bool) -> TaskLog:
    samples = content["samples"] or []
    log = _inspect(file, str(content["eval"]["task"]), samples, cluster)
    if completions:
        configs = [content["eval"].get("model_generate_config"), (content.get("plan") or {}).get("config")]
        drawn = {
            name: next((config[theirs] for config in configs if config and config.get(theirs) is not None), None)
            for name, theirs in (("temperature", "temperature"), ("top_p", "top_p"), ("max_new_tokens", "max_tokens"))
        }
        log.completions.extend(_inspect_completion(sample) | drawn for sample in samples)
    return log


def _inspect_completion(sample: Mapping[str, Any]) -> dict[str, Any]:
    output = sample.get("output") or {}
    choice = (output.get("choices") or [{}])[0]
    return {
        PROMPT: str(sample["id"]),
        SAMPLE: int(sample.get("epoch", 1)) - 1,
        "prompt_text": message_text(sample.get("input")),
        "text": _content_text((choice.get("message") or {}).get("content")),
        "terminated": {"stop": True, "max_tokens": False, "model_length": False}.get(choice.get("stop_reason")),
    }


def message_text(source: Any) -> str | None:
    """A sample's input, or the last message of the user where it is a chat."""
    if isinstance(source, list):
        asked = [message for message in source if message.get("role") == "user"]
        return _content_text(asked[-1].get("content")) if asked else None
    return source if isinstance(source, str) else None


def _content_text(content: Any) -> str | None:
    """Text of a message: itself, or its parts of text, without reasoning and pictures."""
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if part.get("type") == "text")
    return content if isinstance(content, str) else None


def _inspect(file: Path, task: str, samples: Iterable[dict[str, Any]], cluster: str | None) -> TaskLog:
    log, ungraded = TaskLog(file, task, "inspect"), []
    for sample in samples:
        text = sample.get("input")
        start = " ".join(text.split())[:_SUMMARISED] if isinstance(text, str) else ""
        content = json.dumps([start, sample.get("target")])
        row = {
            PROMPT: str(sample["id"]),
            SAMPLE: sample.get("epoch", 1),
            "content": sha256(content.encode()).hexdigest(),
        }
        row |= _cluster(log, sample, cluster)
        # The first logs have one score without a name.
        scores = sample.get("scores") or ({"score": sample["score"]} if sample.get("score") else {})
        for scorer, score in scores.items():
            value = score.get("value")
            several = value if isinstance(value, dict) else {"": value}
            for key, one in several.items():
                log.add(f"{scorer}/{key}" if key else scorer, row, _grade(one))
        if not scores:
            ungraded.append(row)
    for metric in log.rows:
        for row in ungraded:
            log.add(metric, row, None)
    return log


def _grade(value: Any) -> Any:
    if not isinstance(value, str):
        return _number(value)
    if value.lower() in _INSPECT_GRADES or value in _INSPECT_GRADES:
        return _INSPECT_GRADES.get(value, _INSPECT_GRADES.get(value.lower()))
    return float(value) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", value) else value


def _number(value: Any) -> Any:
    """Numbers and truth values as float; anything else, which is no score, as it came."""
    return float(value) if isinstance(value, bool | int | float) else value


def _cluster(log: TaskLog, sample: Any, name: str | None) -> dict[str, str]:
    if name is None:
        return {}
    for key in name.split("."):
        if not isinstance(sample, dict) or key not in sample:
            raise InputError(
                f"a sample of task {log.task!r} in {log.file} has no {name!r}; name a field that all have."
            )
        sample = sample[key]
    return {CLUSTER: str(sample)}


def _archive(file: Path) -> tuple[str, list[dict[str, Any]]]:
    """Task and samples of an ``.eval`` archive; its summaries hold what is needed, without the transcripts."""
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        header = next((name for name in _HEADERS if name in names), None)
        if header is None:
            raise InputError(f"{file} is no log of Inspect: it lacks {_HEADERS[0]}; expected what inspect eval wrote.")
        task = str(_entry(file, archive, header)["eval"]["task"])
        summaries = next((name for name in _SUMMARIES if name in names), None)
        if summaries is not None:
            return task, list(_entry(file, archive, summaries))
        single = sorted(name for name in names if re.fullmatch(r"samples/[^/]+(\.json|/sample\.json)", name))
        return task, [_entry(file, archive, name) for name in single]


def _entry(file: Path, archive: zipfile.ZipFile, name: str) -> Any:
    """JSON of one entry."""
    entry = archive.getinfo(name)
    if entry.compress_type != _ZSTANDARD:
        return json.loads(archive.read(name))
    with file.open("rb") as raw:
        raw.seek(entry.header_offset + 26)  # lengths of name and extra field; the rest is in the central directory
        raw.seek(sum(struct.unpack("<HH", raw.read(4))), 1)
        packed = raw.read(entry.compress_size)
    return json.loads(pa.CompressedInputStream(pa.BufferReader(packed), "zstd").read())
