"""The figure of a training: how near the model stays to its original, and how much its cache keeps, step by step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from kvbench import placing, sheets, words
from kvbench.errors import UserError
from kvbench.results import COLOURS, MUTED, read_rows, unique
from kvbench.words import Row

COLUMNS = ["step", "seconds", "asked_compression", "corpus", "kl", "kl_off", "kept_fraction"]
ABOVE, HEIGHT, UNDER, LEFT, LABELS = 0.42, 2.6, 0.5, 0.62, 1.75  # inches
LEAST = 1e-4
"""Divergence below which a line ends: it is of no interest, and 0 has no place on the scale."""
NOTES = [
    "Judged on texts that it was not trained on, and obeying evictions for good; train: on what it learns from, with"
    " evictions still soft. Dashed: nothing evicted, the cost of the changed weights alone. Dotted: what was asked for."
]


def draw(curve: str | Path, name: str, provenance: str, svg: str | Path, png: str | Path) -> None:
    """Write the figure of a retrofit's training as SVG and PNG, byte for byte the same for the same curve.

    Raises
    ------
    UserError : the curve cannot be read, or has no rows.
    """
    rows = read_rows(curve, COLUMNS)
    if not rows:
        raise UserError(f"{curve} has no rows", "Delete it and run again")
    with plt.rc_context(sheets.STYLE):
        sheets.save(figure(rows, name), provenance, svg, png)


def figure(rows: Sequence[Row], name: str) -> Figure:
    """Divergence on the left, what is kept on the right; ``rows`` are the curve's."""
    last = max(rows, key=lambda row: (row["step"], row["seconds"]))
    facts = f"{last['step']} steps in {words.number(last['seconds'])} s"
    page = sheets.sheet(f"Training of {name}", facts, NOTES, ABOVE + HEIGHT + UNDER)
    corpora = [corpus for corpus in unique(row["corpus"] for row in rows) if corpus != "train"]
    palette = dict(zip(corpora, COLOURS, strict=False)) | {"train": MUTED}
    width = (sheets.WIDTH - 2 * (LEFT + LABELS)) / 2
    for index, panel in enumerate((_divergence, _kept)):
        left = LEFT + index * (LEFT + width + LABELS)
        axes = page.figure.add_axes(page.box(left, page.top + ABOVE, width, HEIGHT))
        axes.set_facecolor("none")
        axes.set_xlabel("step")
        axes.set_xlim(0, max(last["step"], 1))
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(MUTED)
        axes.tick_params(color=MUTED)
        panel(axes, rows, palette)
    return page.figure


def _divergence(axes: Axes, rows: Sequence[Row], palette: dict[str, str]) -> None:
    """One line a corpus with evictions, and a dashed one without."""
    axes.set_title("KL divergence from the original, nats a token", loc="left", fontsize=10, fontweight="bold")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    ends: list[tuple[float, str, str]] = []
    for corpus, colour in palette.items():
        thin = corpus == "train"
        ends += _line(axes, rows, corpus, "kl", corpus, color=colour, linewidth=0.9 if thin else 1.8)
        ends += _line(
            axes, rows, corpus, "kl_off", f"{corpus}, off", color=colour, linewidth=1.2, linestyle=(0, (3, 2))
        )
    _label(axes, ends)


def _kept(axes: Axes, rows: Sequence[Row], palette: dict[str, str]) -> None:
    """One line a corpus, and what was asked for."""
    axes.set_title("Share of tokens kept", loc="left", fontsize=10, fontweight="bold")
    axes.set_ylim(0, 1.02)
    asked = sorted({(row["step"], 1 / row["asked_compression"]) for row in rows})
    axes.plot(*zip(*asked, strict=True), color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
    ends = [(asked[-1][1], "asked for", MUTED)]
    for corpus, colour in palette.items():
        if corpus != "train":
            ends += _line(axes, rows, corpus, "kept_fraction", corpus, color=colour, linewidth=1.8)
    _label(axes, ends)


def _line(
    axes: Axes, rows: Sequence[Row], corpus: str, column: str, label: str, color: str, **style: Any
) -> list[tuple[float, str, str]]:
    """Draw a column of a corpus; returns where its line ends, its label and its colour."""
    points = [(row["step"], row[column]) for row in rows if row["corpus"] == corpus and row[column] is not None]
    shown = [(step, value) for step, value in points if column == "kept_fraction" or value > LEAST]
    if not shown:
        return []
    axes.plot(*zip(*shown, strict=True), color=color, **style)
    return [(shown[-1][1], label, color)]


def _label(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names right of the lines' ends, moved apart where they would lie on each other."""
    axes.set_ylim(axes.get_ylim())  # the scale is settled before anything is placed by it
    place = axes.transAxes.inverted()
    wanted = [float(place.transform(axes.transData.transform((0, value)))[1]) for value, *_ in ends]
    heights = placing.spread(wanted, 0.16 / HEIGHT, 0.0, 1.0)
    for (value, label, colour), height in zip(ends, heights, strict=True):
        text = f"{label} {words.number(value)}"
        axes.text(1.02, height, text, transform=axes.transAxes, va="center", color=colour, fontsize=8)
