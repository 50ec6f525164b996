"""The roofline figure: every measured prefill and decode step under the measured roofs of its device.

Source: Williams, Waterman & Patterson, Roofline: an insightful visual performance model for multicore architectures,
CACM 52(4), 2009.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kvbench import plots, words
from kvbench.results import COLOURS, FAINT, INK, MUTED, PAPER, colours, is_baseline, read_rows, unique
from kvbench.words import Row

PHASES = {"prefill": "prefill", "decode": "decode step"}
SHAPES = {"prefill": "^", "decode": "o"}
WORK = {"prefill": "prefill", "decode": "decode_step"}
TIME = {"prefill": "ttft_s", "decode": "tpot_s"}

HEIGHT = 4.2  # inches of the axes
LEFT = 0.85  # inches left of them
SIZE = 9  # points of a label


@dataclass(frozen=True)
class Mark:
    """One phase of one cell: operations a byte by count, operations a second reached, share of the possible speed."""

    row: Row
    phase: str
    intensity: float
    reached: float
    share: float


@dataclass(frozen=True)
class Roof:
    """What a device does with a dtype: bytes and operations a second."""

    device: str
    dtype: str
    copy: float
    matmul: float

    def over(self, intensity: float) -> float:
        """Operations a second that are possible at an intensity."""
        return min(self.copy * intensity, self.matmul)


Box = tuple[float, float, float, float]
"""Left, bottom, right and top of a rectangle, in pixels."""

Place = tuple[float, float, float, float]
"""Where a label may go: the pixel that it is about, and the shift of its near edge from there, across and up."""


@dataclass
class Page:
    """Axes with what already takes room on them, so that no label covers another, a mark or a line."""

    figure: Figure
    axes: Axes
    taken: list[Box] = field(default_factory=list)
    leaders: list[Box] = field(default_factory=list)

    def pixel(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the data lies."""
        across, up = self.axes.transData.transform((x, y))
        return float(across), float(up)

    def block(self, start: tuple[float, float], end: tuple[float, float], half: float) -> None:
        """Keep a line between two pixels free of labels, and so many pixels on each side of it."""
        self.taken += _along_line(start, end, half)

    def write(self, text: str, places: Iterable[Place], **style: Any) -> None:
        """Write at the first place that is free; a label that finds none is left out."""
        width = plots.text_width(self.figure, text, fontsize=SIZE) * self.figure.dpi + 4
        height = SIZE * 1.35 / 72 * self.figure.dpi
        frame, taken, covered = self.axes.bbox, np.array(self.taken), np.array(self.taken + self.leaders)
        for x, y, right, up in places:
            # a shift to the left or down ends the label there, one to the right or up begins it
            left = x + right - (width if right < 0 else width / 2 if right == 0 else 0)
            bottom = y + up - (height if up < 0 else height / 2 if up == 0 else 0)
            box = (left, bottom, left + width, bottom + height)
            if left < frame.x0 or bottom < frame.y0 or box[2] > frame.x1 or box[3] > frame.y1 or _meet(box, covered):
                continue
            end = min(max(x, left), box[2]), min(max(y, bottom), box[3])
            if abs(x - end[0]) < 6:
                end = x, end[1]  # straight down, so that several can run beside each other
            leader = _along_line((x, y), end, 1, after=9) if math.dist((x, y), end) > 14 else []
            if not any(_meet(part, taken) for part in leader):
                self.taken.append(box)
                self.leaders += leader
                self._put(text, box, [(x, y), end] if leader else [], **style)
                return

    def _put(self, text: str, box: Box, leader: list[tuple[float, float]], **style: Any) -> None:
        data = self.axes.transData.inverted()
        if leader:
            across, up = zip(*(data.transform(point) for point in leader), strict=True)
            self.axes.plot(across, up, color=MUTED, linewidth=0.6, zorder=2)
        x, y = data.transform((box[0] + 2, (box[1] + box[3]) / 2))
        self.axes.text(x, y, text, va="center", ha="left", fontsize=SIZE, zorder=5, **style)


def _meet(box: Box, others: np.ndarray) -> bool:
    left, bottom, right, top = others.T
    return bool(np.any((left < box[2]) & (box[0] < right) & (bottom < box[3]) & (box[1] < top)))


def _along_line(start: tuple[float, float], end: tuple[float, float], half: float, after: float = 0.0) -> list[Box]:
    """Squares along a line, from so many pixels after its start; one rectangle for a line along an axis."""
    length = math.dist(start, end)
    if 0.0 in (start[0] - end[0], start[1] - end[1]) and not after:
        (left, right), (bottom, top) = sorted((start[0], end[0])), sorted((start[1], end[1]))
        return [(left - half, bottom - half, right + half, top + half)]
    places = np.arange(after, length, 4)[:, None] / length
    middles = np.array(start) + places * (np.array(end) - np.array(start))
    return [(float(x) - half, float(y) - half, float(x) + half, float(y) + half) for x, y in middles]


def draw(stats: str | Path, provenance: str, svg: str | Path, png: str | Path) -> None:
    """Write the figure as SVG and PNG, byte for byte the same on every run.

    Raises
    ------
    UserError : the stats cannot be read.
    """
    with plt.rc_context(plots.STYLE):
        plots.save(roofline(read_rows(stats)), provenance, svg, png)


def roofline(rows: Sequence[Row]) -> Figure:
    """The figure of all cells that have limits; one that says so where none has."""
    marks = [mark for row in rows for mark in marks_of(row)]
    roofs = _roofs(marks)
    if not marks:
        return _nothing()
    page = _page(rows, marks)
    _scales(page.axes, marks, roofs)
    _draw_marks(page, marks, rows)
    _draw_roofs(page, roofs)
    _label_marks(page, marks)
    return page.figure


def marks_of(row: Row) -> Iterator[Mark]:
    """The marks of a cell: those of its phases that were measured and have limits."""
    for phase, work in WORK.items():
        seconds, moved, done = (row.get(name) for name in (TIME[phase], f"{work}_bytes", f"{work}_flops"))
        if seconds and moved and done:
            share = row[f"fastest_{TIME[phase]}"] / seconds
            yield Mark(row, phase, done / moved, done / seconds, share)


def _roof(row: Row) -> Roof:
    dtype = str(row.get("dtype") or "").removeprefix("torch.")
    return Roof(str(row["device"]), dtype, row["copy_bytes_per_s"], row["matmul_flops_per_s"])


def _roofs(marks: Sequence[Mark]) -> list[Roof]:
    return unique(_roof(mark.row) for mark in marks)


def _nothing() -> Figure:
    figure = plt.figure(figsize=(plots.WIDTH, 0.6), facecolor=PAPER)
    figure.patch.set_gid("paper")
    text = "No cell has both a measured time and known limits, so there is no roofline to draw."
    figure.text(plots.MARGIN / plots.WIDTH, 0.5, text, va="center", color=MUTED)
    return figure


def _page(rows: Sequence[Row], marks: Sequence[Mark]) -> Page:
    """The page with its title, legend, notes and empty axes."""
    figure = plt.figure(figsize=(plots.WIDTH, 1), facecolor=PAPER)
    figure.patch.set_gid("paper")
    facts = [", ".join(unique(str(mark.row[key]) for mark in marks)) for key in ("model", "device")]
    subtitle = plots.wrap(figure, " · ".join(facts), fontsize=9)
    notes = [line for note in _notes(rows, marks) for line in plots.wrap(figure, note, fontsize=8)]
    entries = _entries(rows, marks)
    legend = 0.55 + max(plots.text_width(figure, text, fontsize=SIZE) for text, _ in entries)
    top, bottom = 0.36 + 0.19 * len(subtitle) + 0.15, 0.68 + 0.17 * len(notes)
    height = top + HEIGHT + bottom
    figure.set_size_inches(plots.WIDTH, height)

    def write(text: str, inches_from_top: float, **style: Any) -> None:
        figure.text(plots.MARGIN / plots.WIDTH, 1 - inches_from_top / height, text, va="top", **style)

    write("Speed beside what the device allows", 0.1, fontsize=12, fontweight="bold")
    for index, line in enumerate(subtitle):
        write(line, 0.36 + 0.19 * index, color=MUTED)
    for index, line in enumerate(notes):
        write(line, height - 0.06 - 0.17 * (len(notes) - index), color=MUTED, fontsize=8)
    width = (plots.WIDTH - LEFT - legend) / plots.WIDTH
    axes = figure.add_axes((LEFT / plots.WIDTH, bottom / height, width, HEIGHT / height))
    handles = [Line2D([], [], label=text, **marker) for text, marker in entries]
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "bbox_transform": axes.transAxes}
    figure.legend(handles=handles, frameon=False, fontsize=SIZE, labelspacing=0.5, handletextpad=0.3, **place)
    return Page(figure, axes)


def _entries(rows: Sequence[Row], marks: Sequence[Mark]) -> list[tuple[str, dict[str, Any]]]:
    """What the legend says: methods by colour, the baseline first, and phases by shape."""
    style = _styles(rows)
    baselines = {row["method"] for row in rows if is_baseline(row, rows)}
    simulated = {mark.row["method"] for mark in marks if mark.row.get("simulated")}
    methods = sorted(unique(mark.row["method"] for mark in marks), key=lambda method: method not in baselines)
    return [
        (words.shorten(method, 26) + " (simulated)" * (method in simulated), _marker("s", *style[method]))
        for method in methods
    ] + [(name, _marker(SHAPES[phase], MUTED, True)) for phase, name in PHASES.items()]


def _notes(rows: Sequence[Row], marks: Sequence[Mark]) -> list[str]:
    notes = [
        "Across: operations for each byte that must move, by count. Up: operations a second at the median time. Lines:"
        " the device’s measured rates. Percent: fastest possible time over measured time."
    ]
    drawn = {id(mark.row) for mark in marks}
    without = [row for row in rows if id(row) not in drawn]
    if without:
        what = "cell has no mark: it was" if len(without) == 1 else "cells have no mark: they were"
        notes.append(f"{len(without)} {what} not measured, or no limits are known.")
    return notes


def _scales(axes: Axes, marks: Sequence[Mark], roofs: Sequence[Roof]) -> None:
    """Logarithmic axes that hold every mark and the bend of every roof."""
    across = [mark.intensity for mark in marks] + [roof.matmul / roof.copy for roof in roofs]
    up = [mark.reached for mark in marks] + [roof.matmul for roof in roofs]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(_padded(across, 0.1, 0.08))
    axes.set_ylim(_padded(up, 0.12, 0.1))
    axes.set_facecolor("none")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8, labelcolor=INK)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.minorticks_off()
    across, up = _decades(*axes.get_xlim()), _decades(*axes.get_ylim())
    axes.set_xticks(across, [f"{value:,.10g}" for value in across])
    axes.set_yticks(up, [si(value, "FLOP/s") for value in up])
    axes.set_xlabel("FLOP for each byte", fontsize=8, loc="left", color=INK)


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten between two values."""
    return [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]


def _padded(values: Sequence[float], below: float, above: float) -> tuple[float, float]:
    """Ends of a logarithmic axis that leave these shares of it free."""
    low, high = min(values), max(values)
    span = max(high / low, 10.0) ** (1 / (1 - below - above))
    return low / span**below, high * span**above


def si(value: float, unit: str) -> str:
    """Three digits with an SI prefix: ``2.94 TB/s``, ``712 TFLOP/s``."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{float(f'{value / size:.3g}'):,.10g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def _draw_roofs(page: Page, roofs: Sequence[Roof]) -> None:
    left, right = page.axes.get_xlim()
    several = len(unique(roof.device for roof in roofs)) > 1
    for roof in roofs:
        corners = [(x, roof.over(x)) for x in (left, roof.matmul / roof.copy, right)]
        page.axes.plot(*zip(*corners, strict=True), color=INK, linewidth=1.2)
        for start, end in itertools.pairwise(page.pixel(*corner) for corner in corners):
            page.block(start, end, half=3)
    for roof in roofs:
        name = f"{roof.device} multiplies" if several else "multiplies"
        spots = [page.pixel(x, roof.matmul) for x in reversed(_between(roof.matmul / roof.copy, right))]
        places = [(x, y, -1.0, up) for up in (6.0, -6.0) for x, y in spots]
        page.write(f"{name} {roof.dtype} at {si(roof.matmul, 'FLOP/s')}", places, color=MUTED)
    for device, copy in unique((roof.device, roof.copy) for roof in roofs):
        bend = max(roof.matmul for roof in roofs if (roof.device, roof.copy) == (device, copy)) / copy
        spots = [page.pixel(x, copy * x) for x in _between(left, bend)]
        places = [(x, y, shift, -shift) for shift in (-9.0, 9.0) for x, y in spots]
        page.write(
            f"{device} copies {si(copy, 'B/s')}" if several else f"copies {si(copy, 'B/s')}", places, color=MUTED
        )


def _between(left: float, right: float) -> list[float]:
    """Values between two, evenly apart on a logarithmic axis, without the ends."""
    return [left * (right / left) ** (step / 60) for step in range(3, 60)]


def _draw_marks(page: Page, marks: Sequence[Mark], rows: Sequence[Row]) -> None:
    """Each mark, and a line up to its roof."""
    style = _styles(rows)
    for mark in marks:
        colour, filled = style[mark.row["method"]]
        x, y, roof = mark.intensity, mark.reached, _roof(mark.row).over(mark.intensity)
        page.axes.plot([x, x], [y, roof], color=MUTED, linewidth=0.5, zorder=1.5)
        page.axes.plot([x], [y], **_marker(SHAPES[mark.phase], colour, filled), zorder=4)
        page.block(page.pixel(x, y), page.pixel(x, y), half=5)
        page.block(page.pixel(x, y), page.pixel(x, roof), half=1.5)


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, bool]]:
    """Each method's colour, and whether its marks are filled: they are hollow where colours begin again."""
    palette = colours(rows)
    coloured = [method for method, colour in palette.items() if colour in COLOURS]
    return {
        method: (colour, method not in coloured or coloured.index(method) < len(COLOURS))
        for method, colour in palette.items()
    }


def _marker(shape: str, colour: str, filled: bool) -> dict[str, Any]:
    edge = PAPER if filled else colour
    face = colour if filled else PAPER
    return {
        "marker": shape,
        "markersize": 8,
        "markerfacecolor": face,
        "markeredgecolor": edge,
        "markeredgewidth": 0.8 if filled else 1.6,
        "linestyle": "none",
    }


def _label_marks(page: Page, marks: Sequence[Mark]) -> None:
    """A label for each group of marks that differ in their method alone; the colour tells the method."""
    groups: dict[tuple[str, ...], list[Mark]] = {}
    for mark in marks:
        key = *(str(mark.row[name]) for name in ("device", "model", "workload")), mark.phase
        groups.setdefault(key, []).append(mark)
    models = len(unique(mark.row["model"] for mark in marks))
    for (_, model, workload, phase), group in sorted(groups.items(), key=lambda item: _order(item[1])):
        name = f"{model}, {workload}" if models > 1 else workload
        spots = [page.pixel(mark.intensity, mark.reached) for mark in sorted(group, key=lambda mark: mark.reached)]
        places = itertools.chain(_below(spots[0]) if phase == "prefill" else (), _around(spots))
        page.write(f"{words.shorten(name, 40)}, {phase} {_shares(group)}", places)


def _order(group: Sequence[Mark]) -> tuple[str, float]:
    """Decode upwards along its slope; prefill from left to right, so that its labels descend like stairs."""
    return group[0].phase, min(m.reached if m.phase == "decode" else m.intensity for m in group)


def _below(spot: tuple[float, float]) -> Iterator[Place]:
    """Places that end just left of a line straight down."""
    for down in range(10, 240, 4):
        yield *spot, -4, -down


def _shares(group: Sequence[Mark]) -> str:
    low, high = (words.number(100 * edge(mark.share for mark in group), 2) for edge in (min, max))
    return f"{low}%" if low == high else f"{low} to {high}%"


def _around(spots: Sequence[tuple[float, float]]) -> Iterator[Place]:
    """Places near one of several points: to the right and below first, then farther away."""
    sides = ((1, -0.4), (1, 0), (0, -1), (1, -1), (-1, -0.4), (-1, 0), (-1, -1), (0, 1), (-1, 1), (1, 1))
    for distance in range(8, 200, 8):
        for (x, y), (right, up) in itertools.product(spots, sides):
            yield x, y, right * distance, up * distance
