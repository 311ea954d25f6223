"""The report in a real browser: no console errors, no requests, something to see."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed on this machine")

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)
OWN_HOSTS = ("googleapis.com", "google.com", "gstatic.com")
"""Where Chromium itself calls home whatever page is open; the report has no link to any of these."""


def open_page(page: str, profile: Path, *arguments: str) -> tuple[str, list[str], set[str]]:
    """What it printed, console messages, and hosts that were asked for."""
    log = profile / "net.json"
    profile.mkdir()
    done = subprocess.run(
        [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile / 'data'}", f"--log-net-log={log}", *arguments, page],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    hosts = set(re.findall(r'"url":"(?:https?|wss?)://([^"/:?]+)', log.read_text(encoding="utf-8", errors="replace")))
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console, {host for host in hosts if not host.endswith(OWN_HOSTS)}


def test_the_watch_would_see_a_request_and_an_error(tmp_path: Path) -> None:
    """The assertions below can fail: a page that fetches and complains is caught."""
    page = tmp_path / "bad.html"
    bad = '<img src="http://rlgen-stats.invalid/x.png"><script>console.error("no")</script>'
    page.write_text(bad, encoding="utf-8")
    _, console, hosts = open_page(page.as_uri(), tmp_path / "profile", "--dump-dom")
    assert hosts == {"rlgen-stats.invalid"}
    assert any('"no"' in line for line in console)


def test_the_page_of_features_is_quiet(report: Path, tmp_path: Path) -> None:
    dom, console, hosts = open_page((report / "features.html").as_uri(), tmp_path / "profile", "--dump-dom")
    assert not console
    assert not hosts
    assert dom.count("<section") == 6


def test_the_table_of_features_sorts_and_searches(report: Path, tmp_path: Path) -> None:
    """A click on the first heading puts the largest number last, another first; a search hides what lacks its words."""
    page = (report / "features.html").read_text(encoding="utf-8")
    clicks = """<script>
    const rows = () => [...document.querySelectorAll("table.sortable tbody tr")].filter((row) => !row.hidden);
    const told = [], first = () => told.push(rows()[0].cells[0].textContent.trim());
    const button = document.querySelector("table.sortable thead button");
    first(); button.click(); first(); button.click(); first();
    const box = document.querySelector("input[type=search]");
    box.value = "confirmed edited"; box.dispatchEvent(new Event("input")); told.push(rows().length);
    document.title = told.join(" ");
    </script></body>"""
    changed = tmp_path / "features.html"
    changed.write_text(page.replace("</body>", clicks), encoding="utf-8")
    dom, console, _ = open_page(changed.as_uri(), tmp_path / "profile", "--dump-dom")
    assert not console
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title is not None
    assert title[1].split()[1:] == ["0", "239", "5"]


@pytest.mark.parametrize(("width", "height"), [(1280, 2400), (500, 2400)])
def test_the_report_is_quiet_and_can_be_looked_at(width: int, height: int, report: Path, tmp_path: Path) -> None:
    image = tmp_path / "report.png"
    arguments = (f"--window-size={width},{height}", f"--screenshot={image}")
    _, console, hosts = open_page((report / "index.html").as_uri(), tmp_path / "profile", *arguments)
    assert not console
    assert not hosts
    content = image.read_bytes()
    assert struct.unpack(">II", content[16:24]) == (width, height)
    assert len(content) > 60_000, "an almost empty page compresses to less"
