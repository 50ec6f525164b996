"""The page of a figure: its style, its title and notes, and how it is saved the same on every run."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from kvbench import files
from kvbench.results import INK, MUTED, PAPER

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kvbench",
    "font.family": "sans-serif",
    # The first is bundled with matplotlib, so a layout is the same everywhere; the rest are for the reader.
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 9,
    "text.parse_math": False,
    "text.color": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.labelcolor": MUTED,
    "hatch.linewidth": 0.6,
}

WIDTH, MARGIN = 12.6, 0.12  # inches


@dataclass(frozen=True)
class Sheet:
    """An empty page under its title: what is free begins ``top`` inches below its upper edge and ends at ``bottom``.

    ``bottom`` is counted from the lower edge, ``width`` is the page's; all in inches.
    """

    figure: Figure
    top: float
    bottom: float
    width: float

    @property
    def height(self) -> float:
        """Inches from edge to edge."""
        return float(self.figure.get_figheight())

    def write(self, text: str, left: float, down: float, **style: Any) -> None:
        """Write below a point so many inches from the left and the upper edge."""
        self.figure.text(left / self.width, 1 - down / self.height, text, va="top", **style)

    def box(self, left: float, down: float, width: float, height: float) -> tuple[float, float, float, float]:
        """A rectangle in the figure's own measure, from inches and its upper left corner."""
        return left / self.width, 1 - (down + height) / self.height, width / self.width, height / self.height


def sheet(title: str, subtitle: str, notes: Sequence[str], room: float, width: float = WIDTH) -> Sheet:
    """A page with ``room`` inches between its subtitle and its notes."""
    figure = plt.figure(figsize=(width, 1), facecolor=PAPER)
    figure.patch.set_gid("paper")
    head = wrap(figure, subtitle, width, fontsize=9)
    foot = [line for note in notes for line in wrap(figure, note, width, fontsize=8)]
    top, bottom = 0.36 + 0.19 * len(head), 0.14 + 0.17 * len(foot)
    height = top + room + bottom
    figure.set_size_inches(width, height)
    made = Sheet(figure, top, bottom, width)
    made.write(title, MARGIN, 0.1, fontsize=12, fontweight="bold")
    for index, line in enumerate(head):
        made.write(line, MARGIN, 0.36 + 0.19 * index, color=MUTED)
    for index, line in enumerate(foot):
        made.write(line, MARGIN, height - 0.06 - 0.17 * (len(foot) - index), color=MUTED, fontsize=8)
    return made


def nothing(text: str) -> Figure:
    """A page that says why there is no figure."""
    figure = plt.figure(figsize=(WIDTH, 0.6), facecolor=PAPER)
    figure.patch.set_gid("paper")
    figure.text(MARGIN / WIDTH, 0.5, text, va="center", color=MUTED)
    return figure


def save(figure: Figure, provenance: str, svg: str | Path, png: str | Path) -> None:
    """Write a figure as SVG and PNG with its provenance (JSON) and nothing that changes between runs; close it."""
    about = json.dumps(json.loads(provenance), sort_keys=True)
    with files.atomic(svg) as path:
        figure.savefig(path, format="svg", metadata={"Date": None, "Description": about})
    with files.atomic(png) as path:
        figure.savefig(path, format="png", dpi=160, metadata={"Software": None, "Description": about})
    plt.close(figure)


def text_width(figure: Figure, text: str, **style: Any) -> float:
    """Inches that ``text`` takes."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    ink = Text(0, 0, text, figure=figure, **style)
    return float(ink.get_window_extent(renderer).width / figure.dpi)


def wrap(figure: Figure, text: str, width: float = WIDTH, **style: Any) -> list[str]:
    """Lines of ``text`` that fit a page of so many inches."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(figure, longer, **style) <= width - 2 * MARGIN:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
