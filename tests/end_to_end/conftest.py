"""One mini study per test session, run through the command line as a user would."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rlgen_stats.cli import main


def run_command(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("mini") / "study"
    result = run_command("demo", "--size", "mini", "--folder", str(folder))
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    return folder, result
