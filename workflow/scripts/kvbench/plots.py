"""The bar figure: peak memory, KV cache, throughput and TTFT of every variant on one workload."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvbench import sheets, words
from kvbench.errors import UserError
from kvbench.results import (
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
from kvbench.sheets import MARGIN, WIDTH, Sheet, text_width
from kvbench.words import Row

GAP, HEADING = 0.28, 0.42  # inches between panels, and over each
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
    with plt.rc_context(sheets.STYLE):
        sheets.save(bars(rows, workload), provenance, svg, png)


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
    page, left = _page(lines, cells, rows)
    top = page.top + HEADING
    size = (WIDTH - left - MARGIN - GAP * (len(panels) - 1)) / len(panels), page.height - top - page.bottom
    palette = colours(rows)
    for index, panel in enumerate(panels):
        axes = page.figure.add_axes(page.box(left + index * (size[0] + GAP), top, *size))
        _frame(axes, lines, named=index == 0)
        _panel(axes, panel, lines, palette)
    _gaps(page, lines, page.box(left, top, WIDTH - left - MARGIN, size[1]))
    return page.figure


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


def _page(lines: Sequence[Line], cells: Sequence[Row], rows: Sequence[Row]) -> tuple[Sheet, float]:
    """The empty page with its titles and notes, and its left margin (inches)."""
    first = cells[0]
    several = len(unique(row["model"] for row in cells)) > 1
    title = f"{first['workload']}: {words.workload_words(first)}"
    pitch = 0.33 if len(lines) <= 14 else 0.25
    page = sheets.sheet(
        title, " · ".join(fact for fact in _facts(cells) if fact), _notes(cells, lines), HEADING + pitch * len(lines)
    )
    weight = "bold" if several else "normal"
    names = max(text_width(page.figure, line.text, fontsize=9, fontweight=weight) for line in lines)
    return page, MARGIN + names + 0.12


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


@dataclass(frozen=True)
class Panel:
    """One quantity's axes, and how values are drawn there: their divisor to the shown unit, their colours."""

    axes: Axes
    quantity: words.Quantity
    divisor: float
    palette: dict[str, str]


def _panel(axes: Axes, quantity: words.Quantity, lines: Sequence[Line], palette: dict[str, str]) -> None:
    """Bars, whiskers and labels of one quantity, on an axis that leaves room for every label."""
    rows = {y: line.row for y, line in enumerate(lines) if line.row and line.row["status"] == "ok"}
    values = {y: row[quantity.column] for y, row in rows.items() if row.get(quantity.column) is not None}
    divisor, unit = words.scale(quantity.kind, values.values())
    panel = Panel(axes, quantity, divisor, palette)
    name = quantity.name(device([line.row for line in lines if line.row]))
    better = f", {quantity.better} is better" if quantity.better else ""
    axes.set_title(name, loc="left", fontsize=10, fontweight="bold", pad=17)
    axes.text(0, 1, f"{unit}{better}", transform=axes.transAxes, va="bottom", color=MUTED, fontsize=8)
    largest = max(values.values(), default=0.0) / divisor
    ends, labels = dict.fromkeys(rows, 0.0), dict.fromkeys(rows, ("not measured", ""))
    for y, value in values.items():
        ends[y] = _bar(panel, rows[y], y)
        text = words.number(value / divisor, words.digits(quantity.kind), largest)
        labels[y] = (text, _change(lines[y], quantity))
    _fit(axes, ends, labels)
    _references(panel, lines)


def _bar(panel: Panel, row: Row, y: int) -> float:
    """Draw one bar with its whisker and outline; returns where its ink ends, in the panel's unit."""
    axes, column, divisor = panel.axes, panel.quantity.column, panel.divisor
    colour = panel.palette[row["method"]]
    value = end = row[column] / divisor
    hatch = "////" if row.get("simulated") else None
    axes.barh(y, value, BAR, color=colour, edgecolor=PAPER, linewidth=0, hatch=hatch)
    if column == "kv_cache_bytes" and _outlined(row):
        end = row["kv_cache_allocated_bytes"] / divisor
        axes.barh(y, end - value, BAR, left=value, fill=False, edgecolor=colour, linewidth=0.9, hatch="xxxx")
    low, high = row.get(f"{column}_low"), row.get(f"{column}_high")
    if low is not None and high is not None and high > low:
        axes.plot([low / divisor, high / divisor], [y, y], color=INK, linewidth=1.1, solid_capstyle="butt")
        for x in (low, high):
            axes.plot([x / divisor] * 2, [y - 0.13, y + 0.13], color=INK, linewidth=1.1)
        end = max(end, high / divisor)
    return float(end)


def _change(line: Line, quantity: words.Quantity) -> str:
    if line.row is None:
        return ""
    change = words.compare(line.row, line.base, quantity.column)
    if change is None or not change.words:
        return ""
    return change.words if change.clear else f"({change.words})"


def _fit(axes: Axes, ends: dict[int, float], labels: dict[int, tuple[str, str]]) -> None:
    """Set the x-axis so that each label fits right of its bar, and write the labels."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    width = axes.get_position().width * WIDTH
    pad, space = 0.06, 0.07
    halo = {"facecolor": PAPER, "linewidth": 0, "pad": 0.8}
    value_width = {y: text_width(figure, value, fontweight="bold") for y, (value, _) in labels.items()}
    taken = {
        y: pad + value_width[y] + (space + text_width(figure, change, fontsize=8) if change else 0)
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


def _references(panel: Panel, lines: Sequence[Line]) -> None:
    """A dashed line at each baseline's value, along the rows that are compared with it."""
    column = panel.quantity.column
    spans: dict[float, list[int]] = {}
    for y, line in enumerate(lines):
        if line.row and line.row["status"] == "ok" and line.base and line.base.get(column):
            spans.setdefault(line.base[column] / panel.divisor, []).append(y)
    style: dict[str, Any] = {"color": MUTED, "linewidth": 0.8, "linestyle": (0, (3, 3)), "zorder": 0.5}
    for x, ys in spans.items():
        for first, last in _runs(ys):
            panel.axes.plot([x, x], [first - 0.5, last + 0.5], **style)


def _gaps(page: Sheet, lines: Sequence[Line], box: tuple[float, float, float, float]) -> None:
    """Say across all panels why a cell has no bars."""
    axes = page.figure.add_axes(box, zorder=2)
    axes.set_axis_off()
    axes.set_xlim(0, box[2] * WIDTH)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    for y, line in enumerate(lines):
        if line.row is not None and line.row["status"] != "ok":
            axes.axhspan(y - BAR / 2, y + BAR / 2, facecolor=FAINT, linewidth=0)
            text = words.missing_words(line.row, 120)
            axes.text(0.08, y, text, va="center_baseline", color=MUTED, fontstyle="italic")
