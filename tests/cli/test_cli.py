"""The command line: help without torch, one-sentence errors with exit code 2, JSON, progress off a terminal."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner

from rlgen_stats.cli import console, main
from rlgen_stats.cli.console import handle_errors, print_json, progress_for
from rlgen_stats.cli.main import _COMMANDS
from rlgen_stats.cli.stages import STAGE_NAMES, print_verdicts
from rlgen_stats.schemas.errors import OutOfSpaceError
from rlgen_stats.stores import Provenance, append_model
from rlgen_stats.toolkit.study import STAGES
from tests.cli.json_output import commands
from tests.stores.conftest import feature_table


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from rlgen_stats.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'xarray', 'zarr', 'dask', 'numpy', 'pydantic', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in _COMMANDS)


def test_a_reader_that_has_seen_enough_ends_the_command_without_a_word() -> None:
    code = "from rlgen_stats.cli.console import echo\nfor _ in range(2): echo('a line')\nprint('went on')"
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as gone:
        done = subprocess.run([sys.executable, "-P", "-c", code], stdout=gone, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (console.EXIT_READER_GONE, b"")


def test_status_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from rlgen_stats.cli import main\n"
        f"try: main(['status', {str(tmp_path)!r}])\nexcept SystemExit as e: assert e.code == 2\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def examples_of(text: str) -> list[list[str]]:
    """Command lines of a help text; one goes on in the next line where that starts no other."""
    lines = []
    for line in text.splitlines():
        if "  rlgen-stats " in line:
            lines.append(line.partition("rlgen-stats ")[2])
        elif lines and line.startswith(" " * 12):
            lines[-1] += line
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("name", list(commands()))
def test_every_command_has_help_with_examples_that_parse(name: str) -> None:
    code, out, _ = run(*name.split(), "--help")
    assert code == 0
    assert "Example" in out
    examples = examples_of(commands()[name].help or "")
    assert examples
    for example in examples:
        words = example[: len(name.split())]
        assert words == name.split(), "an example is of its own command"
        commands()[name].make_context(name, example[len(words) :])


@pytest.mark.parametrize("option", ["--stage", "--force"])
def test_an_unknown_stage_is_refused_and_help_names_all(option: str, tmp_path: Path) -> None:
    assert [stage.name for stage in STAGES] == STAGE_NAMES
    assert set(STAGE_NAMES) <= set(_COMMANDS), "each has a command"
    code, out, err = run("run", str(tmp_path), option, "dirft")
    assert (code, out) == (2, "")
    assert f"Invalid value for '{option}': 'dirft' is not one of 'posttrain', 'outcomes', 'extract'" in err
    assert ", ".join(STAGE_NAMES) in " ".join(run("run", "--help")[1].split())


def test_a_forced_stage_that_would_not_run_is_refused(tmp_path: Path) -> None:
    code, _, err = run("run", str(tmp_path), "--stage", "extract", "--force", "drift")
    assert code == 2
    assert "--force drift would do nothing: extract does not need it; add --stage drift." in err


def test_version_is_said() -> None:
    assert run("--version")[1] == f"rlgen-stats, version {version('rlgen-stats')}\n"


@pytest.mark.parametrize(
    ("line", "offered"),
    [("rlgen-stats dri", "drift"), ("rlgen-stats run x --stage se", "select"), ("rlgen-stats run --q", "--quiet")],
)
def test_shells_complete_commands_stages_and_options(line: str, offered: str) -> None:
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1), "_RLGEN_STATS_COMPLETE": "bash_complete"}
    done = CliRunner().invoke(main, env=words, prog_name="rlgen-stats")
    assert offered in [answer.partition(",")[2] for answer in done.stdout.split()]


@pytest.mark.parametrize(
    ("name", "accepts"), [("posttrain", False), ("extract", False), ("encode", True), ("align", True)]
)
def test_only_stages_that_refuse_unhealthy_crosscoders_offer_to_accept_them(name: str, accepts: bool) -> None:
    assert ("failed their health checks" in " ".join(run(name, "--help")[1].split())) is accepts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stattus"], "no command is called 'stattus'; did you mean 'status'?"),
        (["status", "nowhere"], "no study file at nowhere/study.yaml; expected a study.yaml"),
        (["run", "nowhere"], "no study file at nowhere/study.yaml"),
        (["drift", "nowhere"], "no study file at nowhere/study.yaml"),
        (["inspect", "nowhere"], "nowhere is not a Zarr v3 store (no such folder)"),
        (["verify", "nowhere"], "nowhere is not a Zarr v3 store"),
        (["run", "nowhere", "--scheduler", "tcp://127.0.0.1:1"], "no dask scheduler answers at 'tcp://127.0.0.1:1'"),
        (["run", "nowhere", "--devices", "cuda:0"], "devices are numbers of GPUs or cpu, with commas between"),
        (["run", "nowhere", "--devices", "0,²"], "devices are numbers of GPUs or cpu, with commas between (0,1), got"),
        (["run", "nowhere", "--devices", "0", "--scheduler", "tcp://h:1"], "name one of the two"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "SCHEDULER_SECONDS", 1.0)
    code, out, err = run(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_init_then_status(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    assert run("init", str(folder))[0] == 0
    assert run("init", str(folder))[0] == 2
    code, _, err = run("status", str(folder))
    assert code == 2
    assert "'base.path' names" in err


def test_inspect_and_verify_speak_json_and_find_faults(tmp_path: Path) -> None:
    store = tmp_path / "features.zarr"
    append_model(store, "features", feature_table("base@0"), provenance=Provenance("a", "b"))
    code, out, _ = run("inspect", str(tmp_path), "--json")
    assert code == 0
    assert json.loads(out)["features.zarr"]["models"] == [{"model": "base@0", "complete": True}]
    assert run("verify", str(tmp_path))[0] == 0
    chunk = next(p for p in (store / "mean" / "c").rglob("*") if p.is_file())
    chunk.write_bytes(b"\0" + chunk.read_bytes()[1:-1] + b"\0")
    code, out, err = run("verify", str(tmp_path), "--json")
    assert code == 2
    assert json.loads(out)["ok"] is False
    assert "the chunk mean/c/0/0/0 fails its crc32c checksum" in err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OutOfSpaceError(28, "the disk holding x is full"), 2, "Error: the disk holding x is full"),
        (OSError(28, "No space left on device"), 2, "the disk or quota is full; what was committed is kept"),
        (PermissionError(13, "denied", "/x/y"), 2, "/x/y cannot be used; you may not read or write it"),
        (KeyboardInterrupt(), 130, "run the same command again to continue"),
    ],
)
def test_system_errors_end_cleanly(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @handle_errors
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        command()
    assert caught.value.code == code
    assert message in capsys.readouterr().err


def test_json_has_null_for_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [1.5, float("nan")]})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None]}


def test_progress_without_a_terminal_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_for() as progress:
        progress.log("hello")
        with progress.task("work", total=3, unit="steps") as task:
            for _ in range(3):
                task.advance(1, loss=0.25)
    err = capsys.readouterr().err
    assert "hello" in err
    assert "work: 3/3 steps" in err
    assert "loss=0.25" in err


def test_what_an_earlier_run_did_is_no_measure_of_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress_for() as progress, progress.task("work", total=1000, unit="steps") as task:
        task.skip(900)
        now[0] = 20.0
        task.advance(20)
    first, last = capsys.readouterr().err.splitlines()
    assert first.strip() == "work: 920/1000 steps, 1/s, 80 s left"
    assert "work: 920/1000 steps, 1/s" in last


@pytest.mark.parametrize("columns", [70, 120])
def test_bars_leave_earlier_work_out_of_the_speed(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now, screen = [0.0], io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr("rich.console.monotonic", lambda: now[0])
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    with progress_for() as progress, progress.task("disable: 108 arms", total=25000, unit="completions") as task:
        task.skip(24900, arm="random-019")
        now[0] = 20.0
        task.advance(20, arm="random-020", accuracy=0.64)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()).splitlines()[-1]
    assert re.search(r"24920/25000 compl\S+ 1/s 0:00:20 eta 0:01:20", text), "the unit gives way, no number does"


def test_schema_prints_declared_layouts_as_json() -> None:
    code, out, _ = run("schema", "features")
    assert code == 0
    told = json.loads(out)
    assert told["variables"]["mean"]["dims"] == ["model", "prompt", "feature"]
    assert told["where"] == "features.zarr"
    assert json.loads(run("schema", "study")[1])["type"] == "object"
    code, out, _ = run("schema")
    assert code == 0
    assert "activations.zarr/<model>/<site>" in out
    code, _, err = run("schema", "nope")
    assert code == 2
    assert "no layout is called 'nope'" in err


def test_inspect_is_readable_and_migrate_says_what_it_did(tmp_path: Path) -> None:
    with tarfile.open(Path(__file__).parents[1] / "stores/data/v1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    code, _, err = run("inspect", str(tmp_path / "v1/activations.zarr"))
    assert code == 2
    assert "rlgen-stats migrate" in err
    code, out, _ = run("migrate", str(tmp_path / "v1"))
    assert code == 0
    assert "activations.zarr: layout 2 (was 1)" in out
    code, out, _ = run("inspect", str(tmp_path / "v1"))
    assert code == 0
    assert "150 tokens (15 prompt, 135 completion)" in out
    assert "80 (64 tokens so far)" in out
    assert run("verify", str(tmp_path / "v1"))[1].startswith(f"{tmp_path / 'v1'}: sound;")
    assert json.loads(run("migrate", str(tmp_path / "v1"), "--json")[1])["features.zarr"] == {"before": 2, "now": 2}


def test_verdicts_are_printed_as_they_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim = {"id": "C1", "statement": "s", "verdict": "UNDETERMINED", "answer": "add [base@0, rl@1]"}
    (tmp_path / "report.json").write_text(json.dumps({"claims": [claim]}))
    print_verdicts(tmp_path)
    assert "[base@0, rl@1]" in capsys.readouterr().out
