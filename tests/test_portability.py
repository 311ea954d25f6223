"""macOS and Windows, simulated: what only Linux has is hidden, and no module names it unguarded."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from rlgen_stats.schemas.errors import StoreError
from rlgen_stats.stores.locations import is_remote, place
from rlgen_stats.toolkit.study import linked_studies
from tests.test_packaging import ROOT, SOURCES

MODULES = {"curses", "fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
"""Not on Windows."""
# fmt: off
NAMES = {
    "os": {
        "chown", "fchmod", "fork", "forkpty", "getegid", "geteuid", "getgid", "getloadavg", "getpgid", "getuid", "kill",
        "killpg", "mkfifo", "nice", "posix_fadvise", "posix_fallocate", "pread", "pwrite", "rename", "sendfile",
        "sched_getaffinity", "sched_setaffinity", "setsid", "statvfs", "sysconf", "uname", "wait", "waitpid", "WNOHANG",
        "O_CLOEXEC", "O_DIRECT", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_SYNC", "O_TMPFILE",
    },
    "signal": {"SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "alarm", "pause", "pthread_kill", "setitimer"},
    "mmap": {"MAP_POPULATE", "MAP_SHARED", "PROT_READ"},
}
# fmt: on
"""Attributes that Windows lacks, or that do something else there: ``os.kill(pid, 0)`` ends processes."""
LEFT = {"O_NONBLOCK", "statvfs", "sysconf", "waitpid", "WNOHANG"}
"""Not hidden in the simulation: the standard library and filelock use them where the system has them."""

SIMULATION = f"""
import importlib, json, mmap, os, pkgutil, shutil, signal, sys
from pathlib import Path

def load():
    for package in ("schemas", "stores", "toolkit", "cli"):  # an editable install says nothing of rlgen_stats itself
        top = importlib.import_module("rlgen_stats." + package)
        for found in pkgutil.walk_packages(top.__path__, top.__name__ + "."):
            if not found.name.endswith("__main__"):
                importlib.import_module(found.name)

load()  # other packages take what this system has
for name in [name for name in sys.modules if name.startswith("rlgen_stats.")]:
    del sys.modules[name]
for name in {sorted(MODULES)!r}:
    sys.modules[name] = None
for module, names in (("os", {sorted(NAMES["os"] - LEFT)!r}),
                      ("signal", {sorted(NAMES["signal"])!r}), ("mmap", {sorted(NAMES["mmap"])!r})):
    for name in names:
        if hasattr(sys.modules[module], name):
            delattr(sys.modules[module], name)
opened = os.open
def open_files(path, *arguments, **options):
    if isinstance(path, (str, Path)) and os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return opened(path, *arguments, **options)
os.open, shutil._use_fd_functions = open_files, False
load()

folder = Path(sys.argv[1])
from rlgen_stats.stores import atomic
atomic.os = type("nt", (), {{**vars(os), "name": "nt"}})  # pathlib and others go on with this system
from click.testing import CliRunner
from rlgen_stats.cli import main
for command in (["simulate", str(folder), "--prompts", "40", "--features", "8", "--checkpoints", "1", "--runs", "1",
                 "--quiet"],
                ["inspect", str(folder), "--json"], ["verify", str(folder), "--json", "--quiet"]):
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, (command, done.output, done.exception)
assert json.loads(done.stdout)["ok"]

import numpy as np
from rlgen_stats.stores import shards
shards.write_chunk(folder, 0, np.arange(12, dtype="<f4").reshape(3, 4), ndim=2)
assert len(shards._read_bytes(folder / "c.0.0")) == 12 * 4 + 4

from rlgen_stats.toolkit.extraction.graders.math_grader import MathGrader
assert MathGrader().judge("so \\\\boxed{{1/2}}", "0.5", ()) is True
"""


def _unguarded(tree: ast.Module) -> list[str]:
    """Names of ``MODULES`` and ``NAMES`` outside of ``try: import`` and of functions that ask for them by hasattr."""
    found = []
    guarded = {id(n) for node in ast.walk(tree) if isinstance(node, ast.Try) for n in ast.walk(node)}
    for node in ast.walk(tree):
        asks = isinstance(node, ast.FunctionDef) and any(
            isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "hasattr" for n in ast.walk(node)
        )
        guarded |= {id(n) for n in ast.walk(node)} if asks else set()
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = NAMES.get(node.module or "", set())
            found += [node.module or ""] if (node.module or "").split(".")[0] in MODULES else []
            found += [alias.name for alias in node.names if alias.name in names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += [f"{node.value.id}.{node.attr}"] if node.attr in NAMES.get(node.value.id, set()) else []
    return found


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import fcntl", ["fcntl"]),
        ("from resource import getrlimit", ["resource"]),
        ("import os\nos.kill(1, 0)", ["os.kill"]),
        ("from os import O_NOFOLLOW", ["O_NOFOLLOW"]),
        ("try:\n    import fcntl\nexcept ImportError:\n    fcntl = None", []),
        ("def f():\n    return mmap.MAP_SHARED if hasattr(mmap, 'MAP_SHARED') else 0", []),
        ("os.replace(a, b)", []),
    ],
)
def test_the_search_finds_what_is_unguarded(code: str, found: list[str]) -> None:
    assert _unguarded(ast.parse(code)) == found


@pytest.mark.parametrize("source", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_module_needs_what_only_some_systems_have(source: Path) -> None:
    text = source.read_text(encoding="utf-8")
    assert _unguarded(ast.parse(text)) == []


def test_everything_imports_and_stores_work_without_what_only_linux_has(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", SIMULATION, str(tmp_path / "planted")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("path", ["C:\\studies\\demo", "C:/studies/demo", "C://studies/demo", "d:demo", "a/b://c"])
def test_a_drive_is_no_scheme(path: str) -> None:
    assert not is_remote(place(path))
    assert str(place(path)) == str(Path(path))


def test_a_url_is_one_still() -> None:
    assert is_remote(place("memory://bucket/study"))
    assert place("file:///tmp/study") == Path("/tmp/study")


def test_links_that_windows_refuses_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = OSError(22, "A required privilege is not held by the client")
    refused.winerror = 1314  # type: ignore[attr-defined]

    def refuse(*_: object, **__: object) -> None:
        raise refused

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(StoreError, match="Windows lets you make links in Developer Mode"):
        linked_studies._link(tmp_path / "layers/2/features.zarr", tmp_path / "features.zarr")
    refused.winerror = 5  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="privilege"):
        linked_studies._link(tmp_path / "layers/2/features.zarr", tmp_path / "features.zarr")
