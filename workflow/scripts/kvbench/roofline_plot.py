"""The roofline figure: every measured prefill and decode step under the measured roofs of its device.

Source: Williams, Waterman & Patterson, Roofline: an insightful visual performance model for multicore architectures,
CACM 52(4), 2009.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kvbench import placing, sheets, words
from kvbench.results import FAINT, INK, MUTED, is_baseline, read_rows, unique
from kvbench.words import Row

PHASES = {"prefill": "prefill", "decode": "decode step"}
SHAPES = {"prefill": "^", "decode": "o"}
WORK = {"prefill": "prefill", "decode": "decode_step"}
TIME = {"prefill": "ttft_s", "decode": "tpot_s"}

HEIGHT = 4.2  # inches of the axes
ABOVE, UNDER = 0.15, 0.54  # inches over and under them
LEFT = 0.85  # inches left of them


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


def draw(stats: str | Path, provenance: str, svg: str | Path, png: str | Path) -> None:
    """Write the figure as SVG and PNG, byte for byte the same on every run.

    Raises
    ------
    UserError : the stats cannot be read.
    """
    with plt.rc_context(sheets.STYLE):
        sheets.save(roofline(read_rows(stats)), provenance, svg, png)


def roofline(rows: Sequence[Row]) -> Figure:
    """The figure of all cells that have limits; one that says so where none has."""
    marks = [mark for row in rows for mark in marks_of(row)]
    roofs = _roofs(marks)
    if not marks:
        return sheets.nothing("No cell has both a measured time and known limits, so there is no roofline to draw.")
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


def _page(rows: Sequence[Row], marks: Sequence[Mark]) -> placing.Page:
    """The page with its title, legend, notes and empty axes."""
    facts = [", ".join(unique(str(mark.row[key]) for mark in marks)) for key in ("model", "device")]
    title = "Speed beside what the device allows"
    page = sheets.sheet(title, " · ".join(facts), _notes(rows, marks), ABOVE + HEIGHT + UNDER)
    entries = _entries(rows, marks)
    legend = 0.55 + max(sheets.text_width(page.figure, text, fontsize=placing.SIZE) for text, _ in entries)
    axes = page.figure.add_axes(page.box(LEFT, page.top + ABOVE, sheets.WIDTH - LEFT - legend, HEIGHT))
    handles = [Line2D([], [], label=text, **marker) for text, marker in entries]
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "bbox_transform": axes.transAxes}
    page.figure.legend(
        handles=handles, frameon=False, fontsize=placing.SIZE, labelspacing=0.5, handletextpad=0.3, **place
    )
    return placing.Page(page.figure, axes)


def _entries(rows: Sequence[Row], marks: Sequence[Mark]) -> list[tuple[str, dict[str, Any]]]:
    """What the legend says: methods by colour, the baseline first, and phases by shape."""
    style = placing.styles(rows)
    baselines = {row["method"] for row in rows if is_baseline(row, rows)}
    simulated = {mark.row["method"] for mark in marks if mark.row.get("simulated")}
    methods = sorted(unique(mark.row["method"] for mark in marks), key=lambda method: method not in baselines)
    return [
        (words.shorten(method, 26) + " (simulated)" * (method in simulated), placing.marker("s", *style[method]))
        for method in methods
    ] + [(name, placing.marker(SHAPES[phase], MUTED, True)) for phase, name in PHASES.items()]


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
    axes.set_xlim(placing.padded(across, 0.1, 0.08))
    axes.set_ylim(placing.padded(up, 0.12, 0.1))
    axes.set_facecolor("none")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8, labelcolor=INK)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.minorticks_off()
    across, up = placing.decades(*axes.get_xlim()), placing.decades(*axes.get_ylim())
    axes.set_xticks(across, [f"{value:,.10g}" for value in across])
    axes.set_yticks(up, [si(value, "FLOP/s") for value in up])
    axes.set_xlabel("FLOP for each byte", fontsize=8, loc="left", color=INK)


def si(value: float, unit: str) -> str:
    """Three digits with an SI prefix: ``2.94 TB/s``, ``712 TFLOP/s``."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{float(f'{value / size:.3g}'):,.10g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def _draw_roofs(page: placing.Page, roofs: Sequence[Roof]) -> None:
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


def _draw_marks(page: placing.Page, marks: Sequence[Mark], rows: Sequence[Row]) -> None:
    """Each mark, and a line up to its roof."""
    style = placing.styles(rows)
    for mark in marks:
        colour, filled = style[mark.row["method"]]
        x, y, roof = mark.intensity, mark.reached, _roof(mark.row).over(mark.intensity)
        page.axes.plot([x, x], [y, roof], color=MUTED, linewidth=0.5, zorder=1.5)
        page.axes.plot([x], [y], **placing.marker(SHAPES[mark.phase], colour, filled), zorder=4)
        page.block(page.pixel(x, y), page.pixel(x, y), half=5)
        page.block(page.pixel(x, y), page.pixel(x, roof), half=1.5)


def _label_marks(page: placing.Page, marks: Sequence[Mark]) -> None:
    """A label for each group of marks that differ in their method alone; the colour tells the method."""
    groups: dict[tuple[str, ...], list[Mark]] = {}
    for mark in marks:
        key = *(str(mark.row[name]) for name in ("device", "model", "workload")), mark.phase
        groups.setdefault(key, []).append(mark)
    models = len(unique(mark.row["model"] for mark in marks))
    for (_, model, workload, phase), group in sorted(groups.items(), key=lambda item: _order(item[1])):
        name = f"{model}, {workload}" if models > 1 else workload
        spots = [page.pixel(mark.intensity, mark.reached) for mark in sorted(group, key=lambda mark: mark.reached)]
        places = itertools.chain(_below(spots[0]) if phase == "prefill" else (), placing.around(spots))
        page.write(f"{words.shorten(name, 40)}, {phase} {_shares(group)}", places)


def _order(group: Sequence[Mark]) -> tuple[str, float]:
    """Decode upwards along its slope; prefill from left to right, so that its labels descend like stairs."""
    return group[0].phase, min(m.reached if m.phase == "decode" else m.intensity for m in group)


def _below(spot: tuple[float, float]) -> Iterator[placing.Place]:
    """Places that end just left of a line straight down."""
    for down in range(10, 240, 4):
        yield *spot, -4, -down


def _shares(group: Sequence[Mark]) -> str:
    low, high = (words.number(100 * edge(mark.share for mark in group), 2) for edge in (min, max))
    return f"{low}%" if low == high else f"{low} to {high}%"
