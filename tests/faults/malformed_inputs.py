"""Malformed inputs through the command line: each is named in one sentence, harmless, or silently wrong."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import yaml
from click.testing import CliRunner, Result

from rlgen_stats.cli import main
from rlgen_stats.schemas.errors import RlgenStatsError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.study import read_spec, run_study
from tests.extraction.conftest import prompt_table, save_model

SECONDS: Final = 60
"""After which a command counts as hung."""
SPEC: Final[dict[str, Any]] = {
    "name": "tiny",
    "seed": 7,
    "device": "cpu",
    "base": {"path": "models/base"},
    "runs": [
        {"name": "sft", "arm": "sft", "checkpoints": {2: "models/rl", 3: "models/sft"}},
        {"name": "rl", "arm": "rl", "checkpoints": {2: "models/sft", 4: "models/rl"}},
    ],
    "data": {"prompts": "data/prompts.parquet", "train": None},
    "generation": {"max_new_tokens": 6, "n_samples": 2, "batch_size": 12},
    "extraction": {"layer": 1},
    "crosscoders": [
        {"name": "main", "views": ["base@0", "sft@final", "rl@final"], "n_features": 64},
        {"name": "sft", "views": ["base@0", "sft@final"], "n_features": 64},
        {"name": "rl", "views": ["base@0", "rl@final"], "n_features": 64},
        {"name": "floor", "views": ["base@0", "base@halves"], "n_features": 64},
    ],
    "intervention": {"accept_undecidable": True},
}
WRONG: Final = (
    *(None, True, False, -1, 0, 1, 7, 1.5, 1e-300, 10**30, math.nan, math.inf, -math.inf),
    *("", " ", "x", "rl\n", "1", "１２", "1_0", "0x1f", "nan", "a\0b", "[/bold]\x1b[31m", "../x", "middle", "base@0"),
    *([], [[]], [1], [True], [math.nan], ["rl", "rl"], ["base@0", "base@0"], {}, {"x": 1}, {True: "x"}, {"": {}}),
    "y" * 5000,
)
"""Values put in place of every setting."""


@dataclass(frozen=True)
class Case:
    """One input and the command that reads it."""

    kind: str
    name: str
    arguments: tuple[str, ...]
    is_right: Callable[[Result], bool] = lambda result: True
    """Whether what a command without an error did is what the input says."""


def build(root: Path) -> Path:
    """A small sound study with outcomes and activations, and what the commands read beside it."""
    for seed, name in enumerate(("base", "sft", "rl")):
        save_model(root / "study/models" / name, seed)
    (root / "study/data").mkdir()
    prompt_table().to_parquet(root / "study/data/prompts.parquet")
    (root / "study/study.yaml").write_text(yaml.safe_dump(SPEC))
    run_study(root / "study", stages=["outcomes", "extract"])
    sound = CliRunner().invoke(main, ["check", str(root / "study")])
    if sound.exit_code != 0:  # or every wrong setting would seem to be named
        raise AssertionError(sound.output)
    n = 60
    np.save(root / "cache.npy", np.random.default_rng(0).normal(size=(n, 4)).astype(np.float32))
    labels(n).to_csv(root / "labels.csv", index=False)
    graded = pd.DataFrame({"prompt": [f"p{i}" for i in range(20)], "correct": [i % 2 for i in range(20)]})
    graded.to_csv(root / "graded.csv", index=False)
    return root


def labels(n: int = 60) -> pd.DataFrame:
    position = np.arange(n) % 10
    columns: dict[str, Any] = {"prompt": [f"p{i // 10}" for i in range(n)], "position": position, "token_id": position}
    columns |= {"segment": np.where(position < 4, "prompt", "completion"), "task": "sum", "domain": "in"}
    return pd.DataFrame(columns | {"split": "selection", "cluster": [f"c{i // 10}" for i in range(n)]})


# -- one case


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    def ring(signum: int, frame: object) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(case: Case) -> tuple[str, str]:
    """``named``, ``harmless``, ``silently wrong``, ``traceback`` or ``hang``, and what the command said."""
    with deadline(SECONDS):
        result = CliRunner().invoke(main, list(case.arguments))
    said = result.output.strip()
    if isinstance(result.exception, TimeoutError):
        return "hang", repr(result.exception)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return "traceback", repr(result.exception)[:300]
    if "Traceback" in said or "\x1b" in said:
        return "traceback" if "Traceback" in said else "silently wrong", said[-300:]
    if result.exit_code == 2 and "Error: " in said:
        return "named", said
    if result.exit_code == 0:
        return ("harmless" if case.is_right(result) else "silently wrong"), said[-300:]
    return "traceback", f"exit code {result.exit_code}: {said[-300:]}"


# -- study files


def settings(schema: dict[str, Any], place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places of all settings that the schema of a study file has, the first element standing for every list."""

    def resolved(part: dict[str, Any]) -> list[dict[str, Any]]:
        if "$ref" in part:
            return [schema["$defs"][part["$ref"].rpartition("/")[2]]]
        return [one for option in part.get("anyOf", []) for one in resolved(option)] or [part]

    def walk(part: dict[str, Any], place: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        for one in resolved(part):
            for name, below in one.get("properties", {}).items():
                yield (*place, name)
                yield from walk(below, (*place, name))
            if "items" in one:
                yield from walk(one["items"], (*place, 0))
            if isinstance(one.get("additionalProperties"), dict) and place == ("tasks",):
                yield from walk(one["additionalProperties"], (*place, "sum"))

    yield from dict.fromkeys(walk(schema, place))


def changed(place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """The sound study with one setting changed."""
    content: Any = deepcopy(SPEC)
    at = content
    for part, following in pairwise(place):
        if isinstance(at, list):
            at.extend([{}] * (part + 1 - len(at)))
        elif not isinstance(at.get(part), dict | list):
            at[part] = [] if isinstance(following, int) else {}
        at = at[part]
    at[place[-1]] = value
    return dict(content)


def reads_as_written(file: Path, place: tuple[Any, ...], value: Any) -> bool:
    """Whether the setting of a study file that was accepted has the value that was written."""
    got: Any = read_spec(file)
    for part in place:
        got = got[part] if isinstance(got, tuple | dict) else getattr(got, part)
    if hasattr(got, "model_dump"):
        got = got.model_dump()
        if isinstance(value, dict):
            return all(same(got.get(key), one) for key, one in value.items())
        return any(same(one, value) for one in got.values())  # a shorthand: one value stands for the section
    shorthand = value == "middle" or (place[-1] == "layer" and isinstance(value, float))
    return value is None or shorthand or same(got, value)


def same(got: Any, written: Any) -> bool:
    if isinstance(written, list):
        return isinstance(got, list | tuple) and all(map(same, got, written)) and len(got) == len(written)
    if isinstance(written, bool) or isinstance(got, bool):
        return got is written
    if isinstance(written, float) and not math.isfinite(written):
        return False
    if isinstance(got, float) and isinstance(written, int):
        return got == float(written)
    return bool(got == written) or str(got) == written


def study_cases(root: Path, draw: random.Random, n: int) -> Iterator[Case]:
    """Settings of the schema with wrong values, drawn without replacement."""
    places = list(settings(StudySpec.model_json_schema()))
    pairs = [(place, value) for place in places for value in WRONG]
    for number, (place, value) in enumerate(draw.sample(pairs, min(n, len(pairs)))):
        folder = linked_study(root, f"setting-{number}")
        file = folder / "study.yaml"
        file.write_text(yaml.safe_dump(changed(place, value), allow_unicode=True, sort_keys=False))

        def right(result: Result, file: Path = file, place: tuple[Any, ...] = place, value: Any = value) -> bool:
            try:
                return reads_as_written(file, place, value)
            except RlgenStatsError:
                return False

        yield Case("setting", f"{'.'.join(map(str, place))}: {value!r:.40}", ("check", str(folder)), right)


def linked_study(root: Path, name: str) -> Path:
    """A study folder of its own with the models and prompts of the sound one."""
    folder = root / "cases" / name
    folder.mkdir(parents=True)
    for part in ("models", "data"):
        (folder / part).symlink_to(root / "study" / part)
    return folder


def text_cases(root: Path) -> Iterator[Case]:
    """Texts that are no study file."""
    sound = yaml.safe_dump(SPEC).encode()
    bomb = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
    texts: dict[str, bytes] = {
        "alias bomb": ("a0: &a0 [x, x]\n" + bomb).encode() + sound,
        "bomb in trainer": sound + b"x: &x [1]\n",
        "recursive alias": sound + b"trainer: &t [*t]\n",
        "recursive mapping": sound + b"trainer: &t {t: *t}\n",
        "100,000 unknown keys": sound + "".join(f"key{i}: {i}\n" for i in range(100_000)).encode(),
        "100,000 runs": sound + b"contrasts: [" + b"[a, b], " * 100_000 + b"]\n",
        "duplicate key": sound + b"seed: 8\n",
        "duplicate key in other digits": sound.replace(b"2: models/rl", b"2: models/rl\n    0x2: models/sft"),
        "duplicate key with a sign": sound.replace(b"2: models/rl", b"2: models/rl\n    +2: models/sft"),
        "a truth value for a step": sound.replace(b"2: models/rl", b"true: models/rl"),
        "an octal number": sound.replace(b"seed: 7", b"seed: 0644"),
        "a time of day": sound.replace(b"seed: 7", b"seed: 1:30"),
        "5,000 digits": sound.replace(b"seed: 7", b"seed: " + b"9" * 5000),
        "a million digits": sound.replace(b"seed: 7", b"seed: 0x" + b"f" * 1_000_000),
        "bytes for a name": sound.replace(b"name: tiny", b"name: !!binary dGlueQ=="),
        "100,000 tasks": sound + b"tasks:\n" + b"".join(b"  t%d: {}\n" % i for i in range(100_000)),
        "100,000 token classes": sound
        + b"tokens: {classes: {"
        + b"".join(b"t%d: x, " % i for i in range(100_000))
        + b"}}\n",
        "duplicate nested key": sound.replace(b"path: models/base", b"path: models/base\n  path: models/rl"),
        "deep": b"x: " + b"[" * 5000 + b"]" * 5000,
        "deep mapping": b"".join(b" " * i + b"a:\n" for i in range(3000)),
        "empty": b"",
        "null": b"null\n",
        "list": b"- 1\n",
        "scalar": b"study\n",
        "two documents": sound + b"---\n" + sound,
        "binary": bytes(range(256)),
        "utf-16": yaml.safe_dump(SPEC).encode("utf-16"),
        "bom": b"\xef\xbb\xbf" + sound,
        "nul": sound + b"\0",
        "tab": sound + b"\tx: 1\n",
        "python tag": sound + b"x: !!python/object/apply:os.system ['true']\n",
        "unknown tag": sound + b"x: !foo 1\n",
        "date as name": sound.replace(b"name: tiny", b"name: 2026-01-01"),
        "merge key": sound + b"<<: 3\n",
        "unhashable key": sound + b"? [1, 2]\n: 3\n",
        "too large": sound + b"#" * 20_000_000,
        "unclosed": b"x: [1, 2\n",
        "escape": b'name: "\\x1b[31mred"\n' + sound,
        "future layout": sound + b"schema_version: 99\n",
    }
    for name, text in texts.items():
        folder = linked_study(root, name.replace(" ", "-"))
        (folder / "study.yaml").write_bytes(text)
        harmless = name in ("bom",)
        for command in ("check", "status"):
            yield Case(
                "text", f"{name} ({command})", (command, str(folder)), lambda result, harmless=harmless: harmless
            )


# -- files, folders and other things in their place


def strange_paths(root: Path) -> dict[str, str]:
    """Paths that are no usable file or folder."""
    at = root / "strange"
    at.mkdir(exist_ok=True)
    for name in ("pipe", "pipe.csv", "pipe.jsonl", "pipe.npy", "pipe.safetensors", "pipe.zarr"):
        os.mkfifo(at / name)
    for name in ("folder.csv", "folder.npy", "folder.parquet", "folder.zarr", "empty"):
        (at / name).mkdir()
    for name in ("empty.csv", "empty.parquet", "empty.jsonl", "empty.npy", "empty.safetensors", "empty.zarr", "plain"):
        (at / name).write_bytes(b"")
    for name in (
        "noise.csv",
        "noise.parquet",
        "noise.jsonl",
        "noise.npy",
        "noise.safetensors",
        "noise.pt",
        "noise.eval",
    ):
        (at / name).write_bytes(random.Random(3).randbytes(4000))
    (at / "dangling.csv").symlink_to(at / "nowhere")
    (at / "circle.csv").symlink_to(at / "circle.csv")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(at / "socket.csv")[-100:] if len(str(at / "socket.csv")) < 100 else "\0rlgen-malformed")
    server.close()
    paths = {path.name: str(path) for path in sorted(at.iterdir())}
    return paths | {
        "nothing": "",
        "missing": str(at / "missing.csv"),
        "below a file": str(at / "plain" / "x.csv"),
        "too long": str(at / ("n" * 300 + ".csv")),
        "far too long": "/" + "n/" * 5000,
        "null device": "/dev/null",
        "zero device": "/dev/zero",
        "random device": "/dev/urandom",
        "process memory": "/proc/self/mem",
        "process": "/proc/self",
        "no scheme": "nosuch://bucket/x",
        "memory scheme": "memory://nothing/x",
        "http": "http://127.0.0.1:9/x.csv",
        "s3": "s3://",
        "escape": "\x1b[31m.csv",
        "markup": "[/bold].csv",
    }


def path_cases(root: Path) -> Iterator[Case]:
    """Every command that reads or writes a path, given things that are none of its kind."""
    store, out = str(root / "study/activations.zarr"), root / "written"
    take = ("--model", "rl@4", "--engine", "here", "--temperature", "1", "--top-p", "1", "--max-new-tokens", "6")
    place = ("--model", "rl@4", "--site", "block1")
    for number, (name, path) in enumerate(strange_paths(root).items()):
        commands = {
            "check": ("check", path),
            "status": ("status", path),
            "inspect": ("inspect", path),
            "verify": ("verify", path),
            "migrate": ("migrate", path),
            "export": ("export", path, "--to", str(out / f"export-{number}")),
            "export to": ("export", store, "--to", path, "--model", "rl@4", "--quiet"),
            "import": ("import", path, "--labels", str(root / "labels.csv"), "--into", str(out / "i.zarr"), *place),
            "labels": ("import", str(root / "cache.npy"), "--labels", path, "--into", str(out / "l.zarr"), *place),
            "into": ("import", str(root / "cache.npy"), "--labels", str(root / "labels.csv"), "--into", path, *place),
            "import-outcomes": ("import-outcomes", str(root / "study"), path, *take),
            "export-requests": ("export-requests", str(root / "study"), "--to", path, "--model", "base@0"),
            "compare-outcomes": ("compare-outcomes", path, str(root / "graded.csv")),
            "import-crosscoder": (
                "import-crosscoder",
                path,
                "--view",
                "base@0",
                "--view",
                "rl@4",
                "--to",
                str(out / "c"),
            ),
            "init": ("init", path),
            "simulate": ("simulate", path, "--prompts", "40", "--features", "8", "--quiet"),
        }
        writes = ("export to", "into", "init", "simulate", "export-requests")
        for command, arguments in commands.items():
            reads_nothing = command in writes or (command, name) in READABLE
            yield Case("path", f"{command}: {name}", arguments, lambda result, fine=reads_nothing: fine)


READABLE: Final = frozenset({("inspect", "empty"), ("verify", "empty")})
"""Readers and things that they may call sound."""


PATHS: Final = (
    *(("data", "prompts"), ("base", "path"), ("base", "chat_template"), ("runs", 0, "checkpoints", 2)),
    *(("runs", 1, "chat_template"), ("intervention", "neutral_text"), ("crosscoders", 0, "weights")),
    ("crosscoders", 0, "corpus"),
)
"""Settings that name files."""


def place_cases(root: Path) -> Iterator[Case]:
    """Pipes and devices, and nothing, where study.yaml names a file and where a study keeps its own."""
    pipe = root / "a-pipe"
    os.mkfifo(pipe)
    for number, (place, path) in enumerate(product(PATHS, (str(pipe), "/dev/zero", "", " "))):
        folder = linked_study(root, f"place-{number}")
        (folder / "study.yaml").write_text(yaml.safe_dump(changed(place, path), sort_keys=False))
        yield Case(
            "place", f"{'.'.join(map(str, place))}: {path[-12:]!r}", ("status", str(folder)), lambda result: False
        )
    kept = [*(root / "study").glob("stages/*.json"), *(root / "study").glob("*.zarr/zarr.json")]
    kept += [*(root / "study").glob("*.zarr/seals.json"), *(root / "study").glob("*.zarr/correct/c/**/*")]
    for number, (file, command) in enumerate(product(filter(Path.is_file, kept), ("status", "verify", "inspect"))):
        folder = copied_study(root, f"kept-{number}")
        replaced = folder / file.relative_to(root / "study")
        replaced.unlink()
        os.mkfifo(replaced)
        cache = file.name == "fingerprints.json"
        reads = cache or command != "verify"  # others may have no use for the file
        yield Case(
            "place", f"{command}: a pipe for {file.name}", (command, str(folder)), lambda result, fine=reads: fine
        )


def copied_study(root: Path, name: str) -> Path:
    """The sound study with stores and records of its own."""
    folder = linked_study(root, name)
    shutil.copytree(
        root / "study", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("models", "data", "*.lock")
    )
    return folder


VALUES: Final = (
    *(None, True, False, -1, 0, 10**30, 1.5, math.inf, "", "x", "１", [], [1], {}, {"x": 1}, [[]]),
    {"rl@4": {"x": None}},
)
"""Put in the place of any value of a JSON file."""


def json_cases(root: Path, draw: random.Random, n: int) -> Iterator[Case]:
    """One value of a record, of metadata or of a list of seals is another, or gone."""
    files = [*(root / "study").glob("stages/*.json"), *(root / "study").glob("*.zarr/**/*.json")]
    files = sorted(file for file in files if file.name != "fingerprints.json")
    for number in range(n):
        file, command = draw.choice(files), draw.choice(("status", "verify", "verify", "inspect"))
        was = file.read_text()
        content = json.loads(was)
        place, value = draw.choice(list(places_in(content))), draw.choice(VALUES)
        at = content
        for part in place[:-1]:
            at = at[part]
        if draw.random() < 0.2 and isinstance(at, dict):
            del at[place[-1]]
        else:
            at[place[-1]] = value
        folder = copied_study(root, f"json-{number}")
        (folder / file.relative_to(root / "study")).write_text(json.dumps(content))
        # what a record says for people is in no digest, and other commands have no use for most of it
        fine = command != "verify" or file.parent.name == "stages" or content == json.loads(was)
        name = f"{command}: {file.relative_to(root / 'study')} {'.'.join(map(str, place))[:60]} {value!r:.20}"
        yield Case("json", name, (command, str(folder)), lambda result, fine=fine: fine)


def places_in(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places of all values of a JSON document."""
    below = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in below:
        yield (*place, name)
        yield from places_in(value, (*place, name))


# -- tables


def table_cases(root: Path) -> Iterator[Case]:
    """Tables of prompts, labels, completions and verdicts with cells that mean nothing."""
    yield from prompt_cases(root)
    yield from label_cases(root)
    yield from completion_cases(root)
    graded = pd.read_csv(root / "graded.csv")
    folder = root / "graded"
    folder.mkdir()
    for number, (column, value) in enumerate((c, v) for c in graded.columns for v in CELLS):
        table = graded.astype(object)
        table.at[3, column] = value
        file = write_table(table, folder / f"{number}.jsonl")
        fine = column == "prompt" or (value != value or value in (0, 1, "", " ", "1", "0.5", 0.5, None))
        arguments = ("compare-outcomes", str(file), str(root / "graded.csv"), "--common")
        yield Case("table", f"graded {column}: {value!r:.40}", arguments, lambda result, fine=fine: fine)


CELLS: Final[tuple[Any, ...]] = (
    *(None, "", " ", True, 1, -1, 0.5, 2, 1e300, math.nan, math.inf, "x", "a\0", "a\0b", "1", "0.5", "１"),
    *([], ["a"], {"a": 1}, "[/bold]\x1b[31m", "=1+1", "p1", "p1\n", 10**30),
)


def write_table(table: pd.DataFrame, file: Path) -> Path:
    rows = [json.dumps(row) for row in table.to_dict(orient="records")]
    file.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return file


def prompt_cases(root: Path) -> Iterator[Case]:
    sound = prompt_table().astype(object)
    for number, (column, value) in enumerate((c, v) for c in sound.columns for v in CELLS):
        table = sound.copy()
        table.at[2, column] = value
        folder = root / "cases" / f"prompts-{number}"
        (folder / "data").mkdir(parents=True)
        (folder / "models").symlink_to(root / "study/models")
        write_table(table, folder / "data/prompts.jsonl")
        spec = SPEC | {"data": {"prompts": "data/prompts.jsonl", "train": None}}
        (folder / "study.yaml").write_text(yaml.safe_dump(spec))
        missing = value is None or isinstance(value, list | dict) or (isinstance(value, float) and math.isnan(value))
        blank = isinstance(value, str) and not value.strip()
        wrong = missing or blank or (column in ("prompt_id", "task") and isinstance(value, str) and "\0" in value)
        wrong |= (column == "prompt_id" and value == "p1") or column == "domain"
        arguments = ("check", str(folder))
        yield Case("table", f"prompts {column}: {value!r:.40}", arguments, lambda result, wrong=wrong: not wrong)


def label_cases(root: Path) -> Iterator[Case]:
    sound, folder = labels().astype(object), root / "labels"
    folder.mkdir()
    tables: dict[str, pd.DataFrame] = {}
    for column in ("prompt", "position", "token_id", "segment", "domain", "split"):
        for value in ("", "x", "-1", "1.5", "nan", "inf", "99999999999", "１", "a\0", "True", "=1+1"):
            table = sound.copy()
            table.at[5, column] = value
            tables[f"{column}: {value!r}"] = table
    tables["descending positions"] = sound.iloc[::-1]
    tables["position twice"] = sound.assign(position=[0, 1, 1, *sound.position[3:]])
    tables["no column"] = sound.drop(columns="task")
    tables["column twice"] = pd.concat([sound, sound.task], axis=1)
    tables["one row less"] = sound.iloc[1:]
    ids = sound.prompt.where(sound.index >= 10, "p1\0")
    tables["ids that differ by NUL"] = sound.assign(prompt=ids)
    for number, (name, table) in enumerate(tables.items()):
        table.to_csv(folder / f"{number}.csv", index=False)
        arguments = ("import", str(root / "cache.npy"), "--labels", str(folder / f"{number}.csv"), "--quiet")
        arguments += ("--into", str(folder / f"{number}.zarr"), "--model", "rl@4", "--site", "block1")
        prompt = name in ("prompt: 'x'", *(f"prompt: {v!r}" for v in ("-1", "1.5", "nan", "inf", "99999999999", "１")))
        fine = prompt or name in ("prompt: 'True'", "prompt: '=1+1'")
        yield Case("table", f"labels {name}", arguments, lambda result, fine=fine: fine)


def completion_cases(root: Path) -> Iterator[Case]:
    folder = root / "completions"
    folder.mkdir()
    ids = list(prompt_table().prompt_id)
    sound = [
        {"prompt_id": i, "sample": s, "text": "so ans 3", "token_ids": [7, 3, 11, 1]} for i in ids for s in (-1, 0, 1)
    ]
    number = 0
    for column in ("prompt_id", "sample", "text", "token_ids", "temperature", "finish_reason", "correct", "engine"):
        for value in CELLS:
            rows = [dict(row) for row in sound]
            rows[4][column] = value
            file = folder / f"{number}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            arguments = (
                "import-outcomes",
                str(root / "study"),
                str(file),
                "--model",
                "rl@4",
                "--engine",
                "here",
                "--yes",
            )
            arguments += ("--temperature", "1", "--top-p", "1", "--max-new-tokens", "6")
            fine = value is None or (isinstance(value, float) and math.isnan(value)) or value == ""
            fine &= column != "prompt_id" and (column, value) != ("token_ids", "")
            fine |= column in ("engine", "finish_reason") or rows == sound
            fine |= column == "temperature" and value is not True and value in (1, "1")  # of one: as declared
            yield Case("table", f"completions {column}: {value!r:.40}", arguments, lambda result, fine=fine: fine)
            number += 1


# -- options


def option_cases(root: Path) -> Iterator[Case]:
    """Numbers that an option cannot have, and names that nothing has."""
    numbers = ("nan", "inf", "-inf", "-1", "0", "1e400", "x", "", "１２", "9" * 40, "1_0", "0x1")
    simulate = ("simulate", str(root / "written/sim"), "--quiet", "--prompts", "12", "--features", "8")
    options = {
        ("power", "--quiet"): (
            *("--effect", "--power", "--features", "--true-share", "--density", "--icc", "--cluster-size", "--alpha"),
            *("--prompts", "--runs", "--run-sd"),
        ),
        simulate: (
            "--prompts",
            "--features",
            "--drifting",
            "--effect",
            "--density",
            "--icc",
            "--cluster-size",
            "--accuracy",
        ),
        ("compare-outcomes", str(root / "graded.csv"), str(root / "graded.csv")): ("--alpha", "--task", "--metric"),
        ("check", str(root / "study")): ("--tokens-per-second",),
        ("features", str(root / "study"), "1"): ("--contexts",),
        ("intervene", str(root / "study"), "--dry-run"): ("--features", "--dose", "--dictionary", "--set"),
        ("export", str(root / "study/activations.zarr"), "--to", str(root / "written/e")): (
            "--model",
            "--site",
            "--where",
        ),
        ("schema",): ("",),
        ("run", str(root / "study"), "--quiet"): ("--stage", "--force"),
    }
    plausible = {"0", "1_0", "１２"}
    for command, names in options.items():
        for option in names:
            for value in numbers:
                arguments = (*command, *((option,) if option else ()), value)
                large = option in ("--tokens-per-second", "--run-sd", "--contexts") and value.startswith("9")
                fine = (
                    value in plausible and ((command[0], option) != ("intervene", "--features") or value == "0")
                ) or large
                yield Case("option", f"{command[0]} {option} {value:.20}", arguments, lambda result, fine=fine: fine)


# -- something else than a scheduler


def scheduler_cases(root: Path, stack: ExitStack) -> Iterator[Case]:
    """A port that accepts and stays silent, one that speaks garbage, one that hangs up, and addresses of nothing."""

    def serve(answer: Callable[[socket.socket], None]) -> str:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return f"tcp://127.0.0.1:{server.getsockname()[1]}"

    held: list[socket.socket] = []

    def babble(connection: socket.socket) -> None:
        try:
            while True:
                connection.sendall(os.urandom(1 << 12))
        except OSError:
            pass

    def hello(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        held.append(connection)

    addresses = {
        "silent": serve(held.append),
        "garbage": serve(babble),
        "web server": serve(hello),
        "hangs up": serve(lambda connection: connection.close()),
        "nobody": "tcp://127.0.0.1:9",
        "no address": "x",
        "no scheme": "nosuch://127.0.0.1:1",
        "empty": "",
        "no port": "tcp://127.0.0.1",
        "no host": "tcp://nosuch.invalid:1",
    }
    for name, address in addresses.items():
        arguments = ("run", str(root / "study"), "--stage", "drift", "--scheduler", address, "--quiet")
        yield Case("scheduler", name, arguments, lambda result: False)


# -- all


def all_cases(root: Path, stack: ExitStack, *, seed: int, n_settings: int, share: float = 1.0) -> Iterator[Case]:
    """Every family; of those written by hand a share, drawn by the seed."""
    draw = random.Random(seed)
    yield from study_cases(root, draw, n_settings)
    yield from json_cases(root, draw, n_settings)
    for family in (text_cases, path_cases, place_cases, table_cases, option_cases):
        for case in family(root):
            if draw.random() < share:
                yield case
    for case in scheduler_cases(root, stack):
        if share > 0.5 or case.name in ("garbage", "no address"):
            yield case


def count(
    root: Path, *, seed: int, n_settings: int, share: float = 1.0, log: Callable[[str], object] | None = None
) -> dict[str, list[tuple[Case, str]]]:
    """Outcome -> cases and what was said."""
    found: dict[str, list[tuple[Case, str]]] = {}
    with ExitStack() as stack:
        for case in all_cases(build(root), stack, seed=seed, n_settings=n_settings, share=share):
            verdict, said = outcome(case)
            if log is not None and verdict not in ("named", "harmless"):
                log(f"{verdict}: {case.kind}, {case.name}: {said!r:.400}\n")
            found.setdefault(verdict, []).append((case, said))
    return found
