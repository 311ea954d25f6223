"""Style of all figures: colours, canvas, and SVG that is the same bytes every time.

Text stays text (searchable, read aloud, in the page's font); coordinates are computed with the font matplotlib
ships, so a file does not depend on the fonts of the machine that made it.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK: Final = "#1f2a33"
MUTED: Final = "#5f6b76"
RULE: Final = "#c9d0d6"
GRID: Final = "#e7ebee"
PAPER: Final = "#ffffff"
BASE: Final = "#75808a"
SFT: Final = "#c4561b"
RL: Final = "#1b6ca8"
NULL: Final = "#a4adb5"
GOOD: Final = "#2f7d4f"
PALE: Final = "#dbe2e7"
VIOLET: Final = "#7b5ea7"
GOLD: Final = "#b98a16"

THEMED: Final = {
    INK: "--fig-ink",
    MUTED: "--fig-muted",
    RULE: "--fig-rule",
    GRID: "--fig-grid",
    PAPER: "--fig-paper",
    BASE: "--fig-base",
    SFT: "--fig-sft",
    RL: "--fig-rl",
    NULL: "--fig-null",
    GOOD: "--fig-good",
    PALE: "--fig-pale",
    VIOLET: "--fig-violet",
    GOLD: "--fig-gold",
}
"""Colour -> CSS variable that replaces it in figures inside the page, so that they follow its light or dark theme.

Orange and blue are distinguishable under every common colour vision deficiency; models also differ by marker.
"""

MARKERS: Final = {"base": "o", "sft": "s", "rl": "D"}
_FONTS: Final = "Inter, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"
_RC: Final[dict[str, Any]] = {
    "svg.hashsalt": "rlgen-stats",
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of tasks and runs may hold dollars
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.grid": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "savefig.bbox": None,
}
_NO_METADATA: Final = {"Creator": None, "Date": None, "Format": None, "Type": None}


SINGLE: Final = 5.2
"""Width of a figure of one panel, inches."""
HALF: Final = 3.6
"""Width of a panel that stands beside another one, or above it on a narrow page."""
FEATURE_LINK: Final = "feature:"
"""Start of a link to a feature inside a drawing; where its section is only the page knows."""


@dataclass(frozen=True)
class Panel:
    """One axes as an SVG document of its own, so that a narrow page can stack the panels of a figure."""

    svg: str
    alt: str
    """What it shows, in words and numbers."""


@dataclass(frozen=True)
class Graphic:
    """One figure."""

    name: str
    """File name without suffix; of several panels the first has it."""
    title: str
    panels: tuple[Panel, ...]
    caption: str
    """How to read it."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Numbers of claims that the drawing shows, by where report.json has them (``C4.estimate``), in its unit."""
    roughly: Mapping[str, float] = field(default_factory=dict)
    """By claim: what its estimate would be if it were read off the drawing, which shows it in another way."""
    population: str = ""
    """Prompts, decoding, unit, models."""

    @property
    def alt(self) -> str:
        """What all panels show."""
        return " ".join(panel.alt for panel in self.panels)

    @property
    def files(self) -> dict[str, Panel]:
        """File name -> panel."""
        names = [self.name, *(f"{self.name}-{i}" for i in range(2, len(self.panels) + 1))]
        return {f"{name}.svg": panel for name, panel in zip(names, self.panels, strict=True)}

    def inline(self, sections: Mapping[int, str] | None = None) -> list[str]:
        """The panels for use inside a page; ``sections`` says where the features are that drawings link to."""
        return [
            inlined(linked(panel.svg, sections or {}), file.removesuffix(".svg")) for file, panel in self.files.items()
        ]


def linked(svg: str, sections: Mapping[int, str], prefix: str = "") -> str:
    """A drawing whose links lead to features' sections; those of features without one are taken out.

    Dots are no stops of the tab key: the table of all features has the same links.
    """

    def link(match: re.Match[str]) -> str:
        href = sections.get(int(match[1]))
        return match[2] if href is None else f'<a href="{prefix}{href}" tabindex="-1">{match[2]}</a>'

    return re.sub(rf'<a xlink:href="{FEATURE_LINK}(\d+)"[^>]*>(.*?)</a>', link, svg, flags=re.DOTALL)


@dataclass(frozen=True)
class Missing:
    """A figure that cannot be drawn, and why."""

    name: str
    title: str
    reason: str


def inlined(svg: str, name: str) -> str:
    """An SVG document for use inside a page: ids that begin with ``name``, colours from the page's CSS variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(\bid=")', rf"\g<1>svg-{name}-", svg)
    svg = re.sub(r'(aria-labelledby=")([^"]+)"', lambda m: m[1] + _prefixed(m[2], name) + '"', svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\g<1>svg-{name}-", svg)
    for colour, variable in THEMED.items():
        svg = re.sub(rf"(fill|stroke): {colour}", rf"\1: var({variable}, {colour})", svg)
    return svg.strip()


def _prefixed(ids: str, name: str) -> str:
    return " ".join(f"svg-{name}-{element}" for element in ids.split())


@contextmanager
def canvas(width: float, height: float, **grid: Any) -> Iterator[tuple[Figure, np.ndarray]]:
    """A styled figure (inches) with axes as a 2-D array; draw inside the block, call :func:`to_svg` there too.

    Keywords go to ``Figure.subplots``.
    """
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(squeeze=False, **grid)


def panel(draw: Callable[[Axes], object], width: float, height: float, *, title: str, alt: str) -> Panel:
    """A panel (inches) of one axes that ``draw`` fills."""
    with canvas(width, height) as (figure, grid):
        draw(grid[0, 0])
        return Panel(to_svg(figure, title=title, alt=alt), alt)


def legend_below(axes: Axes, columns: int = 3) -> None:
    """A legend under the axes, where it covers nothing."""
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=columns,
        handlelength=1.6,
        columnspacing=1.2,
        borderaxespad=0,
    )


def to_svg(figure: Figure, *, title: str, alt: str) -> str:
    """The figure as a deterministic SVG document with a title and a description for screen readers."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=_NO_METADATA, transparent=True)
    svg = buffer.getvalue()
    svg = svg.replace("font-family: 'DejaVu Sans'", f"font-family: {_FONTS}")
    svg = re.sub(r"<defs>\s*<style[^>]*>[^<]*</style>\s*</defs>\s*", "", svg)  # inlined, it would style the whole page
    svg = re.sub(r"<!DOCTYPE[^>]*>\s*", "", svg)
    start = svg.index("<svg")
    head_end = svg.index(">", start)
    head = re.sub(r'\s(width|height)="[^"]*"', "", svg[start:head_end])
    described = (
        f'{head} stroke-linejoin="round" stroke-linecap="butt" role="img" aria-labelledby="title desc">\n'
        f' <title id="title">{html.escape(title)}</title>\n <desc id="desc">{html.escape(alt)}</desc>'
    )
    return svg[:start] + described + svg[head_end + 1 :]


def percent_axis(axis: Any) -> None:
    """Ticks of a fraction axis in percent, with as many decimals as tell them apart."""

    def shown(value: float, _: Any) -> str:
        low, high = axis.get_view_interval()
        return f"{100 * value:.{0 if high - low > 0.05 else 1}f}%".replace("-", "−")

    axis.set_major_formatter(shown)


def quiet(axes: Any, *, grid: str = "x") -> None:
    """Drop the spine across the grid and draw light grid lines."""
    axes.grid(axis=grid)
    axes.spines["left" if grid == "x" else "bottom"].set_visible(grid != "x")
    axes.tick_params(length=0)
