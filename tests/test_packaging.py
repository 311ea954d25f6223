"""What ships: the package list against the tree, typed packages, names in the right layer, sizes."""

import ast
import importlib
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SOURCES = [f for top in ("schemas", "stores", "toolkit", "cli") for f in sorted((ROOT / top).rglob("*.py"))]


def test_every_package_is_listed_and_nothing_else() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(config["tool"]["setuptools"]["packages"])
    there = {"rlgen_stats." + ".".join(f.parent.relative_to(ROOT).parts) for f in SOURCES if f.name == "__init__.py"}
    assert listed == there


def test_files_beside_the_code_are_named_and_not_guessed() -> None:
    """Guessing takes a folder without ``__init__`` for a package, and warns at every install."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert config["include-package-data"] is False
    folders = {package: ROOT.joinpath(*package.split(".")[1:]) for package in config["package-data"]}
    shipped = {
        f for package, patterns in config["package-data"].items() for p in patterns for f in folders[package].glob(p)
    }
    beside = {f for top in ("schemas", "stores", "toolkit", "cli") for f in (ROOT / top).rglob("*") if f.is_file()}
    assert {f for f in beside if f.suffix not in (".py", ".pyc")} == shipped


def test_ci_runs_on_the_systems_and_versions_that_are_promised() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    prefix = "Programming Language :: Python :: 3."
    versions = [one.rpartition(" ")[2] for one in config["classifiers"] if one.startswith(prefix)]
    job = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    assert job["os"] == ["ubuntu-latest", "macos-latest", "windows-latest"]
    assert job["python"] == versions == ["3.11", "3.12", "3.13", "3.14"]
    assert {(one["os"], one["dependencies"]) for one in job["include"]} == {(system, "oldest") for system in job["os"]}
    assert config["requires-python"] == f">={versions[0]}"


def test_the_citation_is_of_this_release() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (config["version"], config["license"])


@pytest.mark.parametrize("top", ["schemas", "stores", "toolkit", "cli"])
def test_packages_are_typed(top: str) -> None:
    assert (ROOT / top / "py.typed").exists()


@pytest.mark.parametrize("source", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_files_and_functions_stay_readable(source: Path) -> None:
    text = source.read_text()
    assert text.count("\n") <= 800, "a file holds one thought"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            length = (node.end_lineno or 0) - node.lineno + 1 - docstring.count("\n")
            assert length <= 61, f"{node.name} fits on a screen"


@pytest.mark.parametrize("source", [f for f in SOURCES if "cli" not in f.parts[-2:]], ids=lambda f: f.name)
def test_own_modules_are_imported_at_the_top_only(source: Path) -> None:
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside = [
                n
                for n in ast.walk(node)
                if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("rlgen_stats")
            ]
            assert not inside, f"{node.name} imports {inside[0].module} inside"


def test_a_file_is_named_once() -> None:
    """``cli`` mirrors its commands, and a package's door is always ``__init__``."""
    names = [f.stem for f in SOURCES if f.stem != "__init__" and f.parts[len(ROOT.parts)] != "cli"]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_no_name_of_a_package_hides_a_package_inside_it() -> None:
    for folder in sorted({f.parent for f in SOURCES}):
        package = importlib.import_module("rlgen_stats." + ".".join(folder.relative_to(ROOT).parts))
        inside = [f.parent.name for f in folder.glob("*/__init__.py")]
        assert [name for name in inside if not isinstance(getattr(package, name, package), ModuleType)] == []


def test_every_path_that_contributing_names_is_there() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text().split("| where is ... | |")[1].split("\n\n")[0]
    paths = re.findall(r"`([\w/.]+)`", table)
    assert len(paths) > 25
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_no_absolute_import_skips_the_namespace() -> None:
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{source}: relative import"
                assert (node.module or "").split(".")[0] not in ("schemas", "stores", "toolkit", "cli"), source
