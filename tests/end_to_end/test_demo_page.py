"""The page on the embedded study: its numbers are written by a command, from stores."""

from pathlib import Path

from click.testing import Result

from docs.demo_page import BEGIN, END, NONE_YET, PAGE, form_of, generated, page_with, part_of


def test_the_page_has_the_form_that_the_command_writes(mini: tuple[Path, Result]) -> None:
    folder, _ = mini
    written, committed = generated([folder, folder]), part_of(PAGE.read_text())
    assert [line for line in form_of(written) if line.startswith("#")] == ["### Seed 0", "### Seed 0"]
    assert committed == NONE_YET or form_of(committed) == form_of(written)
    for claim in ("C1", "C2", "C3", "C4", "C5"):
        assert written.count(f"| {claim} | ") >= 2
    rows = [line.count("|") for line in written.splitlines() if line.startswith("|")]
    assert min(rows) >= 4


def test_only_the_generated_part_is_replaced(mini: tuple[Path, Result]) -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    again = page_with([], page)
    assert again == page.replace("old", NONE_YET)
    assert part_of(again) == NONE_YET
