"""What the system refuses, what would steer the terminal, and what listens where a scheduler should."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import dask
import distributed
import numpy as np
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner
from dask.base import get_scheduler

from rlgen_stats.cli import console, main
from rlgen_stats.cli.console import echo, handle_errors, plain, print_json, print_table, progress_for
from rlgen_stats.cli.features import print_feature
from rlgen_stats.cli.stages import print_verdicts
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.reporting.feature_cards import Context, FeatureCard
from tests.extraction.conftest import prompt_table, save_model
from tests.faults.malformed_inputs import SPEC


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    return done.exit_code, done.output


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            OSError(errno.EROFS, "Read-only file system", "/a/b"),
            "/a/b cannot be used; it is on a read-only file system",
        ),
        (OSError(errno.ENOLCK, "No locks available", "/a"), "/a cannot be used; its file system offers no locks"),
        (
            OSError(errno.EFBIG, "File too large"),
            "a file cannot be used; the file would be larger than the file system",
        ),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), "x cannot be used; the name is longer than the file"),
        (
            IsADirectoryError(errno.EISDIR, "Is a directory", b"/a"),
            "/a cannot be used; it is a folder, expected a file",
        ),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/a"), "a file stands where a folder is expected"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/a"),
            "the disk or quota is full; what was committed is kept",
        ),
        (
            OSError(errno.ENXIO, "No such device or address", "/dev/x"),
            "/dev/x cannot be used; no such device or address.",
        ),
        (OSError(errno.EIO, "Input/output error", 3), "3 cannot be used; the device reports a read or write error"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(error: OSError, sentence: str) -> None:
    @click.command()
    @handle_errors
    def command() -> None:
        raise error

    done = CliRunner().invoke(command)
    assert done.exit_code == 2
    assert done.output.startswith("Error: ")
    assert sentence in done.output
    assert done.output.count("\n") == 1


def test_an_error_without_file_or_reason_is_a_bug_and_stays_one() -> None:
    @click.command()
    @handle_errors
    def command() -> None:
        raise OSError("who knows")

    assert isinstance(CliRunner().invoke(command).exception, OSError)


def test_a_file_larger_than_the_limit_is_one_sentence(tmp_path: Path) -> None:
    """A real one: the process may write no more than a kilobyte."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        code, said = run("init", tmp_path / "study")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2
    assert "larger than the file system or a limit allows" in said


_FORBIDDEN: list[Path] = []
"""While it holds a folder, nothing may be written below it."""


def _refuse_writes(event: str, arguments: tuple[Any, ...]) -> None:
    if not _FORBIDDEN:
        return
    written = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod")
    if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
        written = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if written and str(arguments[0]).startswith(str(_FORBIDDEN[0])):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), arguments[0])


sys.addaudithook(_refuse_writes)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The folder as if its file system were mounted read-only; as root, permissions would not refuse."""
    _FORBIDDEN.append(folder)
    try:
        yield
    finally:
        _FORBIDDEN.clear()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with one file above the size from which hashes are remembered."""
    root = tmp_path_factory.mktemp("bad") / "study"
    for seed, name in enumerate(("base", "sft", "rl")):
        save_model(root / "models" / name, seed)
    with (root / "models/base/vocab.big").open("wb") as file:
        file.truncate((1 << 24) + 1)
    (root / "data").mkdir()
    prompt_table().to_parquet(root / "data/prompts.parquet")
    (root / "study.yaml").write_text(yaml.safe_dump(SPEC))
    return root


def test_status_and_inspect_write_nothing(study: Path, tmp_path: Path) -> None:
    position = np.arange(20) % 10
    labels: dict[str, Any] = {"prompt": [f"p{i // 10}" for i in range(20)], "position": position, "token_id": position}
    labels |= {"segment": "completion", "task": "sum", "domain": "in", "split": "selection", "cluster": "c"}
    pd.DataFrame(labels).to_csv(tmp_path / "labels.csv", index=False)
    np.save(tmp_path / "cache.npy", np.ones((20, 4), np.float32))
    site = ("--model", "rl@4", "--site", "block1", "--quiet")
    taken = ("import", tmp_path / "cache.npy", "--labels", tmp_path / "labels.csv", "--into")
    assert run(*taken, study / "activations.zarr", *site)[0] == 0
    with read_only(study):
        code, said = run("status", study)
        assert code == 0, said
        assert "waiting" in said or "ready" in said or "missing" in said, said
        assert not (study / "stages").exists()
        code, said = run("inspect", study)
        assert code == 0, said
        assert "20 tokens" in said
        code, said = run("run", study, "--stage", "outcomes", "--quiet")
        assert code == 2
        assert re.search(r"^Error: \S+/study/\S+ cannot be used; it is on a read-only file system", said), said


# -- terminal

HOSTILE = "sum\x1b[31m[/bold]\r\x07\x9b\u202e"
SHOWN = r"sum\x1b[31m[/bold]\r\x07\x9b\u202e"


def test_texts_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert plain(HOSTILE) == SHOWN
    assert plain("tab\tand\nnewline, Größe, 数学, [/bold]") == "tab\tand\nnewline, Größe, 数学, [/bold]"
    echo(HOSTILE)
    print_table(["a", "b"], [[HOSTILE, "[red]x[/red]"]])
    print_json({"a": HOSTILE})
    with progress_for() as progress, progress.task(HOSTILE, total=1) as task:
        task.advance(1, fact=HOSTILE)
        progress.log(HOSTILE)
    said = capsys.readouterr()
    assert SHOWN in said.out
    assert "[red]x[/red]" in said.out
    assert not set("\x1b\r\x07\x9b\u202e") & set(said.out + said.err)


def test_bars_show_brackets_and_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal; rich's own codes aside, what a text holds is written out."""
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    with progress_for() as progress, progress.task(HOSTILE, total=1) as task:
        task.advance(1, fact="[/dim]\x1b[31m")
        progress.log(HOSTILE)
    said = terminal.getvalue()
    assert SHOWN in said
    assert "[/dim]" in said
    assert "\x1b[31m" not in said


def test_the_verdicts_show_brackets_and_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    claim = dict.fromkeys(("id", "statement", "verdict", "answer"), HOSTILE)
    (tmp_path / "report.json").write_text(json.dumps({"answered": HOSTILE, "claims": [claim]}))
    print_verdicts(tmp_path)
    said = capsys.readouterr().out
    assert f"Verdicts, {SHOWN}" in said
    assert said.count(SHOWN) == 5
    assert not set("\x1b\r\x07\x9b\u202e") & set(said)


def test_a_feature_shows_brackets_and_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    place = Context(
        before=HOSTILE, peak=HOSTILE, after=HOSTILE, activation=1.0, prompt="p", source="s", position=0, elsewhere={}
    )
    card = FeatureCard(
        feature=3,
        row={},
        means={HOSTILE: 1.0},
        scores={},
        contexts={HOSTILE: [place]},
        samples={},
        tokens={HOSTILE: [HOSTILE]},
        origin=(HOSTILE,),
    )
    print_feature(card, 1)
    said = capsys.readouterr().out
    assert f"⟦{SHOWN}⟧" in said
    assert not set("\x1b\r\x07\x9b\u202e") & set(said.replace("\x1b[1mfeature 3\x1b[0m", "")), "the heading is bold"
    assert r"\x1b[1m" not in said, "what we print ourselves is not written out"


def test_commands_print_through_one_place() -> None:
    for file in (Path(console.__file__).parent).glob("*.py"):
        printed = re.findall(r"click\.(?:s?echo|style)\(|(?<![.\w])print\(", file.read_text())
        assert len(printed) <= (2 if file.name == "console.py" else 0), file


# -- a scheduler


@pytest.mark.parametrize("kind", ["silent", "nobody", "no address"])
def test_what_is_no_scheduler_is_given_up(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "SCHEDULER_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        silent = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        address = {"silent": silent, "nobody": "tcp://127.0.0.1:9", "no address": "x"}[kind]
        with pytest.raises(
            InputError, match=r"no dask scheduler answers at .*; start one with 'dask scheduler' or leave"
        ):
            console.connect(address, None).__enter__()
        assert dask.config.get("scheduler", None) is None, "the next computation would look for it"
        assert get_scheduler() is None, "the next computation would wait for it"


@pytest.mark.parametrize("ids", ["１,2", "1\n", " 1 , 2", "1_0", "1,,2", "", "9" * 41])
def test_features_are_numbers_with_commas_between(tmp_path: Path, ids: str) -> None:
    said = CliRunner().invoke(main, ["intervene", str(tmp_path), "--dry-run", "--features", ids])
    assert said.exit_code == 2
    assert "expected feature ids as 3,12,407" in said.output


def test_a_sentence_that_nobody_can_read_is_bad_input_still(tmp_path: Path) -> None:
    code = f"from rlgen_stats.cli import main; main(['status', {str(tmp_path)!r}])"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-P", "-c", code], stderr=full, check=False)
    assert done.returncode == 2


def test_a_client_that_could_not_connect_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collected while the next one starts, its end waits for a lock that the start holds."""
    monkeypatch.setattr(console, "SCHEDULER_SECONDS", 2.0)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(InputError, match="no dask scheduler answers"), console.connect("tcp://127.0.0.1:9", None):
            pass
        assert not [one for one in gc.get_objects() if type(one) is distributed.Client]
    finally:
        gc.enable()
