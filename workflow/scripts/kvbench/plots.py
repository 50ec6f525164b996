"""The bar figure: peak memory, KV cache, throughput and TTFT of every variant on one workload."""

import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.text import Text  # noqa: E402

from kvbench import files, words  # noqa: E402
from kvbench.errors import UserError  # noqa: E402
from kvbench.results import (  # noqa: E402
    FAINT,
    INK,
    MUTED,
    PAPER,
    baseline_of,
    colours,
    device,
    read_rows,
    unique,
)
from kvbench.words import Row  # noqa: E402

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kvbench",
    "font.family": "sans-serif",
    # The first is bundled with matplotlib, so a layout is the same everywhere; the rest are for the reader.
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 9,
    "text.parse_math": False,
    "text.color": INK,
    "ytick.labelcolor": INK,
    "hatch.linewidth": 0.6,
}

WIDTH, MARGIN, GAP = 12.6, 0.12, 0.28  # inches
BAR = 0.62  # of a row's height


@dataclass(frozen=True)
class Line:
    """One line of the figure: a variant's row, or a model's heading when several are shown."""

    text: str
    row: Row | None
    base: Row | None = None


def draw(stats: str | Path, workload: str, provenance: str, svg: str | Path, png: str | Path) -> None:
    """Write the figure of ``workload`` as SVG and PNG, byte for byte the same on every run.

    Raises
    ------
    UserError : no cell of the stats has this workload, or the stats cannot be read.
    """
    rows = read_rows(stats)
    if not any(row["workload"] == workload for row in rows):
        known = ", ".join(unique(row["workload"] for row in rows)) or "none"
        raise UserError(f"{stats} has no workload {workload!r}", f"Name one that it has: {known}")
    about = json.dumps(json.loads(provenance), sort_keys=True)
    with plt.rc_context(STYLE):
        figure = bars(rows, workload)
        with files.atomic(svg) as path:
            figure.savefig(path, format="svg", metadata={"Date": None, "Description": about})
        with files.atomic(png) as path:
            figure.savefig(
                path, format="png", dpi=160, metadata={"Software": None, "Description": about}
            )
        plt.close(figure)


def bars(rows: Sequence[Row], workload: str) -> Figure:
    """One row a variant, one panel a quantity; ``rows`` are all of the run, so that colours agree."""
    lines = _lines(rows, workload)
    cells = [line.row for line in lines if line.row is not None]
    panels = [
        words.QUANTITIES[column]
        for column in (
            "peak_generation_bytes",
            "kv_cache_bytes",
            words.throughput_column(cells[0]),
            "ttft_s",
        )
    ]
    figure, left, top, notes = _page(lines, cells, rows)
    height = figure.get_figheight()
    bottom = 0.14 + 0.17 * len(notes)
    width = (WIDTH - left - MARGIN - GAP * (len(panels) - 1)) / len(panels)
    palette = colours(rows)
    for index, panel in enumerate(panels):
        axes = figure.add_axes(
            (
                (left + index * (width + GAP)) / WIDTH,
                bottom / height,
                width / WIDTH,
                (height - top - bottom) / height,
            )
        )
        _frame(axes, lines, named=index == 0)
        _panel(axes, panel, lines, palette, width)
    _gaps(figure, lines, left, bottom, top)
    return figure


def _lines(rows: Sequence[Row], workload: str) -> list[Line]:
    cells = [row for row in rows if row["workload"] == workload]
    models = unique(row["model"] for row in cells)
    lines = []
    for model in models:
        if len(models) > 1:
            lines.append(Line(model, None))
        for row in cells:
            if row["model"] == model:
                mark = " (simulated)" if row.get("simulated") else ""
                name = row["variant"].removeprefix(f"{model}/") if len(models) > 1 else row["variant"]
                lines.append(Line(words.shorten(name, 40) + mark, row, baseline_of(row, rows)))
    return lines


def _page(
    lines: Sequence[Line], cells: Sequence[Row], rows: Sequence[Row]
) -> tuple[Figure, float, float, list[str]]:
    """The empty page with its titles and notes: figure, left margin and top margin (inches), notes."""
    first = cells[0]
    several = len(unique(row["model"] for row in cells)) > 1
    facts = [listing for listing in _facts(cells) if listing]
    subtitle = textwrap.wrap(" · ".join(facts), 175)
    notes = [part for note in _notes(cells, lines) for part in textwrap.wrap(note, 220)]
    pitch = 0.33 if len(lines) <= 14 else 0.25
    top = 0.36 + 0.19 * len(subtitle) + 0.42
    height = top + pitch * len(lines) + 0.14 + 0.17 * len(notes)
    figure = plt.figure(figsize=(WIDTH, height), facecolor=PAPER)
    figure.patch.set_gid("paper")

    def write(text: str, inches_from_top: float, **style: Any) -> None:
        figure.text(MARGIN / WIDTH, 1 - inches_from_top / height, text, va="top", **style)

    write(f"{first['workload']}: {words.workload_words(first)}", 0.1, fontsize=12, fontweight="bold")
    for index, part in enumerate(subtitle):
        write(part, 0.36 + 0.19 * index, color=MUTED)
    for index, note in enumerate(notes):
        write(note, height - 0.06 - 0.17 * (len(notes) - index), color=MUTED, fontsize=8)
    names = max(_width(figure, line.text, fontsize=9, fontweight="bold" if several else "normal") for line in lines)
    return figure, MARGIN + names + 0.12, top, notes


def _facts(cells: Sequence[Row]) -> list[str]:
    def all_of(column: str) -> str:
        return ", ".join(str(value) for value in unique(row.get(column) for row in cells))

    return [
        all_of("model"),
        f"engine {all_of('engine')}",
        f"protocol {all_of('protocol')}",
        all_of("device"),
    ]


def _notes(cells: Sequence[Row], lines: Sequence[Line]) -> list[str]:
    counts = unique(row.get("repeats") for row in cells if row["status"] == "ok")
    if not counts:
        return ["Nothing was measured on this workload."]
    if cells[0]["protocol"] == "article":
        notes = ["Bars: the first run, cold, as the article times it; no interval."]
    elif counts == [1]:
        notes = ["Bars: one run, no interval."]
    else:
        low, high = min(counts), max(counts)
        repeats = f"{low}" if low == high else f"{low} to {high}"
        notes = [f"Bars: median of {repeats} repeats. Whiskers: {words.interval_words(low)}."]
    if any(line.base for line in lines):
        labels = words.listing(unique(line.base["variant"] for line in lines if line.base))
        notes[0] += (
            f" Dashed line: {labels}, which the changes are against."
            " In parentheses: may be noise (intervals overlap, or too few repeats)."
        )
    if any(_outlined(row) for row in cells):
        notes.append("Hatched outline: bytes allocated beyond those that live tokens take.")
    simulated = unique(row["variant"] for row in cells if row.get("simulated"))
    if simulated:
        notes.append(f"Hatched bar, simulated ({', '.join(simulated)}): masks only, frees no byte.")
    return notes


def _width(figure: Figure, text: str, **style: Any) -> float:
    """Inches that ``text`` takes."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    ink = Text(0, 0, text, figure=figure, **style)
    return float(ink.get_window_extent(renderer).width / figure.dpi)


def _frame(axes: Axes, lines: Sequence[Line], named: bool) -> None:
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_facecolor("none")
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.set_yticks(range(len(lines)), [line.text if named else "" for line in lines])
    for text, line in zip(axes.get_yticklabels(), lines, strict=True):
        text.set_fontweight("bold" if line.row is None else "normal")
    axes.spines[:].set_visible(False)
    for first, last in _runs(y for y, line in enumerate(lines) if line.row and line.row["status"] == "ok"):
        axes.plot([0, 0], [first - 0.5, last + 0.5], color=MUTED, linewidth=1, clip_on=False)


def _runs(rows: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of each run of neighbouring rows."""
    runs: list[tuple[int, int]] = []
    for y in rows:
        runs[-1:] = [(runs[-1][0], y)] if runs and runs[-1][1] == y - 1 else [*runs[-1:], (y, y)]
    return runs


def _outlined(row: Row) -> bool:
    live, allocated = row.get("kv_cache_bytes"), row.get("kv_cache_allocated_bytes")
    return live is not None and allocated is not None and allocated > live


def _panel(
    axes: Axes, panel: words.Quantity, lines: Sequence[Line], palette: dict[str, str], width: float
) -> None:
    """Bars, whiskers and labels of one quantity, on an axis that leaves room for every label."""
    measured = [(y, line) for y, line in enumerate(lines) if line.row and line.row["status"] == "ok"]
    values = {y: line.row[panel.column] for y, line in measured if line.row.get(panel.column) is not None}
    divisor, unit = words.scale(panel.kind, values.values())
    unit_of = device([line.row for line in lines if line.row])
    better = f", {panel.better} is better" if panel.better else ""
    axes.set_title(panel.name(unit_of), loc="left", fontsize=10, fontweight="bold", pad=17)
    axes.text(0, 1, f"{unit}{better}", transform=axes.transAxes, va="bottom", color=MUTED, fontsize=8)
    largest = max(values.values(), default=0.0)
    ends, labels = {}, {}
    for y, line in measured:
        if y not in values:
            labels[y] = ("not measured", "")
            ends[y] = 0.0
            continue
        ends[y] = _bar(axes, panel, line, y, divisor, palette)
        labels[y] = (words.number(values[y] / divisor, words.digits(panel.kind), largest / divisor), _change(line, panel))
    _fit(axes, ends, labels, width)
    _references(axes, panel, lines, divisor)


def _bar(
    axes: Axes, panel: words.Quantity, line: Line, y: int, divisor: float, palette: dict[str, str]
) -> float:
    """Draw one bar with its whisker and outline; returns where its ink ends, in the panel's unit."""
    row = line.row
    assert row is not None
    value = row[panel.column] / divisor
    end = value
    hatch = "////" if row.get("simulated") else None
    axes.barh(y, value, BAR, color=palette[row["method"]], edgecolor=PAPER, linewidth=0, hatch=hatch)
    if panel.column == "kv_cache_bytes" and _outlined(row):
        end = row["kv_cache_allocated_bytes"] / divisor
        outline = {"fill": False, "edgecolor": palette[row["method"]], "linewidth": 0.9, "hatch": "xxxx"}
        axes.barh(y, end - value, BAR, left=value, **outline)
    low, high = row.get(f"{panel.column}_low"), row.get(f"{panel.column}_high")
    if low is not None and high is not None and high > low:
        axes.plot([low / divisor, high / divisor], [y, y], color=INK, linewidth=1.1, solid_capstyle="butt")
        for x in (low, high):
            axes.plot([x / divisor] * 2, [y - 0.13, y + 0.13], color=INK, linewidth=1.1)
        end = max(end, high / divisor)
    return float(end)


def _change(line: Line, panel: words.Quantity) -> str:
    if line.row is None:
        return ""
    change = words.compare(line.row, line.base, panel.column)
    if change is None or not change.words:
        return ""
    return change.words if change.clear else f"({change.words})"


def _fit(axes: Axes, ends: dict[int, float], labels: dict[int, tuple[str, str]], width: float) -> None:
    """Set the x-axis so that each label fits right of its bar, and write the labels."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    pad, space = 0.06, 0.07
    halo = {"facecolor": PAPER, "linewidth": 0, "pad": 0.8}
    value_width = {y: _width(figure, value, fontweight="bold") for y, (value, _) in labels.items()}
    taken = {
        y: pad + value_width[y] + (space + _width(figure, change, fontsize=8) if change else 0)
        for y, (_, change) in labels.items()
    }
    limit = max((ends[y] * width / max(width - taken[y], 0.3) for y in ends), default=1.0) or 1.0
    axes.set_xlim(0, limit)
    for y, (value, change) in labels.items():
        inches = limit / width
        x = ends[y] + pad * inches
        axes.text(x, y, value, va="center_baseline", fontweight="bold", bbox=halo)
        if change:
            x += (value_width[y] + space) * inches
            axes.text(x, y, change, va="center_baseline", color=MUTED, fontsize=8, bbox=halo)


def _references(axes: Axes, panel: words.Quantity, lines: Sequence[Line], divisor: float) -> None:
    """A dashed line at each baseline's value, along the rows that are compared with it."""
    spans: dict[float, list[int]] = {}
    for y, line in enumerate(lines):
        if line.row and line.row["status"] == "ok" and line.base and line.base.get(panel.column):
            spans.setdefault(line.base[panel.column] / divisor, []).append(y)
    for x, ys in spans.items():
        for first, last in _runs(ys):
            axes.plot([x, x], [first - 0.5, last + 0.5], color=MUTED, lw=0.8, ls=(0, (3, 3)), zorder=0.5)


def _gaps(figure: Figure, lines: Sequence[Line], left: float, bottom: float, top: float) -> None:
    """Say across all panels why a cell has no bars."""
    height = figure.get_figheight()
    width = WIDTH - left - MARGIN
    box = (left / WIDTH, bottom / height, width / WIDTH, (height - top - bottom) / height)
    axes = figure.add_axes(box, zorder=2)
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    for y, line in enumerate(lines):
        if line.row is not None and line.row["status"] != "ok":
            axes.axhspan(y - BAR / 2, y + BAR / 2, facecolor=FAINT, linewidth=0)
            text = words.missing_words(line.row, 120)
            axes.text(0.08, y, text, va="center_baseline", color=MUTED, fontstyle="italic")
