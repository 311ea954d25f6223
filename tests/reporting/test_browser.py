"""The report in a real browser: no console errors, no requests, something to see."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reporting.devtools import Page, open_in_chromium

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


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_in_chromium(str(CHROMIUM), "about:blank", tmp_path_factory.mktemp("browser"), *FLAGS) as one:
        yield one


def go_to(page: Page, file: Path) -> None:
    page.send("Page.navigate", url=file.as_uri())
    page.wait_for(f"document.readyState === 'complete' && location.pathname.endsWith({file.name!r})")


@pytest.mark.parametrize(("width", "height", "seen"), [(1280, 900, "ol.overview"), (390, 844, ".chips li:last-child")])
def test_the_answer_is_on_the_first_screen(width: int, height: int, seen: str, page: Page, report: Path) -> None:
    """The sentence, the five verdicts and, where there is room, the figure of the study."""
    page.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
    go_to(page, report / "index.html")
    assert page.ask(f"document.querySelector({seen!r}).getBoundingClientRect().bottom") <= height
    lefts = page.ask(
        "[...document.querySelectorAll('ol.overview figure')].map(f => Math.round(f.getBoundingClientRect().left))"
    )
    assert len(lefts) == 6
    assert len(set(lefts)) == (2 if width < 500 else 6), "panels side by side, or in two columns on a phone"
    page.send("Emulation.clearDeviceMetricsOverride")


@pytest.mark.parametrize("name", ["index.html", "features.html", "features-1.html", "prompts.html"])
def test_on_a_phone_nothing_is_wider_than_the_screen(name: str, report: Path, page: Page) -> None:
    """375 pixels: what is wider scrolls by itself, but captions wrap. Columns of texts are half the screen or wider."""
    page.send("Emulation.setDeviceMetricsOverride", width=375, height=812, deviceScaleFactor=1, mobile=True)
    go_to(page, report / name)
    assert page.ask("document.documentElement.scrollWidth") == 375
    captions = "[...document.querySelectorAll('caption')].map((one) => one.getBoundingClientRect().width)"
    assert all(width <= 375 for width in page.ask(captions))
    widths = page.ask(
        "[...document.querySelectorAll('table.contexts td:first-child, table.dense td.context')]"
        ".map((one) => one.getBoundingClientRect().width).filter((width) => width > 0)"
    )
    assert all(width > 375 / 2 for width in widths)
    assert widths or name not in ("features.html",)


def test_print_opens_what_is_folded_and_hides_what_only_a_screen_needs(report: Path, page: Page) -> None:
    seen = "[...document.querySelectorAll('details > *:not(summary)')].map((one) => one.checkVisibility())"
    page.send("Emulation.clearDeviceMetricsOverride")
    go_to(page, report / "index.html")
    page.send("Emulation.setEmulatedMedia", media="screen")
    assert set(page.ask(seen)) == {False}, "folded on a screen"
    page.send("Emulation.setEmulatedMedia", media="print")
    assert set(page.ask(seen)) == {True}
    assert page.ask("getComputedStyle(document.querySelector('nav')).display") == "none"
    of_footer = "getComputedStyle(document.querySelector('footer'))"
    assert page.ask(f"{of_footer}.breakBefore") == "avoid", "no last page with a line on it"
    page.send("Emulation.setEmulatedMedia", media="")


def test_dark_and_light_pages_are_legible(report: Path, page: Page) -> None:
    """WCAG contrast of every text colour with what it stands on is 4.5 or more, of marks in figures 3 or more."""
    go_to(page, report / "index.html")
    pages = {}
    for scheme in ("light", "dark"):
        page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        pages[scheme] = page.ask("getComputedStyle(document.documentElement).backgroundColor")
        names = {"ink", "soft", "muted", "link", "good", "bad", "warn", "open", "page", "card", "mark"}
        names |= {f"{name}-bg" for name in ("good", "bad", "warn", "open")}
        names |= {f"fig-{name}" for name in ("ink", "muted", "base", "sft", "rl", "good", "violet", "gold")}
        colours = {
            name: page.ask(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}')").strip()
            for name in sorted(names)
        }
        pairs = [(text, ground, 4.5) for text in ("ink", "soft", "muted", "link") for ground in ("page", "card")]
        pairs += [(name, f"{name}-bg", 4.5) for name in ("good", "bad", "warn", "open")] + [("ink", "mark", 4.5)]
        pairs += [(f"fig-{name}", "page", 4.5) for name in ("ink", "muted")]
        pairs += [(f"fig-{name}", "page", 3.0) for name in ("sft", "rl", "good", "violet")]
        for text, ground, least in pairs:
            assert contrast(colours[text], colours[ground]) >= least, (scheme, text, ground)
    assert pages == {"light": "rgb(250, 249, 246)", "dark": "rgb(20, 24, 27)"}
    page.send("Emulation.setEmulatedMedia", media="", features=[])


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two sRGB colours, WCAG 2.2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
