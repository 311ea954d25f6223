"""Pages on finished studies: their numbers are written by a command, from stores."""

import runpy
import shutil
from pathlib import Path

from click.testing import Result

from rlgen_stats.toolkit.study import open_for_run
from rlgen_stats.toolkit.study.claim_power import write_claim_power
from tests.pages import DOCS

SCRIPT = runpy.run_path(str(DOCS / "study_page.py"))
BEGIN, END, NONE_YET = (SCRIPT[name] for name in ("BEGIN", "END", "NONE_YET"))
form_of, generated, page_with, part_of = (SCRIPT[name] for name in ("form_of", "generated", "page_with", "part_of"))


def test_the_page_has_the_form_that_the_command_writes(mini: tuple[Path, Result], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mini[0], tmp_path / "study"))
    write_claim_power(open_for_run(folder), n_worlds=1)
    written, committed = generated([folder, folder]), part_of((DOCS / "demo.md").read_text())
    assert [line for line in form_of(written) if line.startswith("#")] == ["### Seed 0", "### Seed 0"]
    assert form_of(committed) == form_of(generated([folder] * committed.count("### Seed")))
    for claim in ("C1", "C2", "C3", "C4", "C5"):
        assert written.count(f"| {claim} | ") >= 2


def test_only_the_generated_part_is_replaced() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    again = page_with([], page)
    assert again == page.replace("old", NONE_YET)
    assert part_of(again) == NONE_YET
