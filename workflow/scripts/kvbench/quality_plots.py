"""Figures of what compression does to the next token's distribution: KL by kept fraction, and by distance."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvbench import placing, scores, sheets, words
from kvbench.quality_words import nats
from kvbench.results import FAINT, INK, MUTED, unique
from kvbench.scores import CORPORA, FLOORS, Scores
from kvbench.words import Row

HEIGHT, ABOVE, BELOW = 3.5, 0.28, 0.45  # inches of a panel, over it and under it
LEFT, GAP, WIDEST = 0.62, 0.32, 5.0
FAR = 30.0  # a noise floor so many times below the least mark is named, not drawn
APART = 10.0  # pixels between marks side by side
NEAR = 40  # pixels from a mark within which its label may stand

Spot = tuple[float, float]
"""A place on the page, in pixels."""


@dataclass(frozen=True)
class Panel:
    """The axes of one corpus, for the variants of one family; a family's variants share a baseline's model."""

    page: placing.Page
    corpus: str
    family: Sequence[Row]
    style: dict[str, tuple[str, bool]]

    @property
    def axes(self) -> Axes:
        """The axes to draw on."""
        return self.page.axes

    def name(self, row: Row) -> str:
        """What a row's variant is called here."""
        return _label(row, self.family)


def draw(quality: str | Path, figure: str, provenance: str, svg: str | Path, png: str | Path) -> None:
    """Write a figure, ``kl-by-kept-fraction`` or ``kl-by-distance``, byte for byte the same on every run.

    Raises
    ------
    UserError : the table cannot be read.
    """
    make = {"kl-by-kept-fraction": by_kept_fraction, "kl-by-distance": by_distance}[figure]
    with plt.rc_context(sheets.STYLE):
        sheets.save(make(scores.read(quality)), provenance, svg, png)


def by_kept_fraction(found: Scores) -> Figure:
    """Mean KL of each variant beside the share of the cache that it keeps, a panel a corpus."""
    rows = {
        (variant["variant"], corpus): row
        for variant in found.variants
        for corpus in found.corpora
        if (row := _compressed(found, variant, corpus)) is not None and row["kept_fraction"]
    }
    if not rows:
        return sheets.nothing("No variant has both a KL divergence and a kept fraction.")
    note = (
        "Marks: mean over tokens. Whiskers: 95% interval over documents. Marks that would cover one another stand side"
        " by side; those without a name near them are in the list."
    )
    panels = _panels(found, "KL divergence by kept fraction", [note, *_notes(found)])
    limits = _limits(found, list(rows.values()))
    for panel in panels:
        _upwards(panel.axes, limits)
        _kept_axis(panel.axes, [row["kept_fraction"] for row in rows.values()])
        own = [rows[key] for v in panel.family if (key := (v["variant"], panel.corpus)) in rows]
        own.sort(key=lambda row: -row["value"])
        _marks(panel, found, own)
        if panel.corpus == found.corpora[-1]:
            top, step = panel.axes.bbox.y1, _line_height(panel)
            _names(panel, own, [(panel.axes.bbox.x1, top - (place + 0.5) * step) for place in range(len(own))])
    return panels[0].page.figure


def by_distance(found: Scores) -> Figure:
    """Mean KL of each variant by distance from the prefix's end, a line a variant, a panel a corpus."""
    lines = {
        (variant["variant"], corpus): line
        for variant in found.variants
        for corpus in found.corpora
        if (line := _line(found, variant, corpus))
    }
    if not lines:
        return sheets.nothing("No variant has a KL divergence by distance.")
    notes = ["Marks: mean over tokens. Whiskers: 95% interval over documents.", *_notes(found)]
    panels = _panels(found, "KL divergence by distance from the prefix’s end", notes)
    limits = _limits(found, [row for line in lines.values() for row in line])
    for panel in panels:
        _upwards(panel.axes, limits)
        _distance_axis(panel.axes, found.distances(panel.corpus))
        own = [lines[key] for v in panel.family if (key := (v["variant"], panel.corpus)) in lines]
        ends = _lines(panel, own)
        _floor(panel, found)
        if panel.corpus == found.corpora[-1]:
            _names(panel, [line[-1] for line in own], ends)
    return panels[0].page.figure


def _line(found: Scores, variant: Row, corpus: str) -> list[Row]:
    """A variant's KL at every distance; nothing where it lacks one."""
    parts = [_compressed(found, variant, f"{corpus}/{bucket}") for bucket in found.distances(corpus)]
    rows = [row for row in parts if row is not None]
    return rows if len(rows) == len(parts) else []


def _compressed(found: Scores, variant: Row, part: str) -> Row | None:
    row = found.row(variant["variant"], "kl_mean", part)
    return row if row is not None and row["reference"] not in FLOORS and row["value"] > 0 else None


def _label(variant: Row, family: Sequence[Row]) -> str:
    """A variant's name, without the model's where all have the same."""
    models = unique(row["model"] for row in family)
    name = str(variant["variant"])
    name = name.removeprefix(f"{models[0]}/") if len(models) == 1 else name
    return words.shorten(name, 28) + " (simulated)" * bool(variant.get("simulated"))


def _notes(found: Scores) -> list[str]:
    """The noise floors in figures, and who has no mark."""
    floors = {variant["variant"]: found.floors(variant["variant"], "all") for variant in found.variants}
    said = [
        (f"{label}: " if sum(map(bool, floors.values())) > 1 else "")
        + words.listing([f"{nats(row['value'])} in {FLOORS[row['reference']]}" for row in rows])
        for label, rows in floors.items()
        if rows
    ]
    gone = [
        f"{variant['variant']} ({words.STATUS_WORDS.get(row['status'], row['status'])})"
        for variant in found.variants
        if (row := found.gaps(variant["variant"]).get("distribution"))
    ]
    listed = [
        ("Noise floor, the full cache against itself, over all corpora", "; ".join(said)),
        ("Without a mark", ", ".join(gone)),
    ]
    return [f"{about}: {text}." for about, text in listed if text]


def _panels(found: Scores, title: str, notes: Sequence[str]) -> list[Panel]:
    """The page with its title and notes, a row of empty panels for each family, and room for names at the right."""
    families = {
        model: family
        for model, family in found.families().items()
        if any(_compressed(found, row, corpus) for row in family for corpus in found.corpora)
    }
    subtitle = f"{', '.join(families)} · KL(full ‖ compressed) in nats, lower is better, logarithmic"
    above = ABOVE if len(families) == 1 else ABOVE + 0.22
    height = max(HEIGHT, 0.17 * max(len(family) for family in families.values()))
    sheet = sheets.sheet(title, subtitle, notes, len(families) * (above + height + BELOW))
    names = max(sheets.text_width(sheet.figure, _label(row, family)) for family in families.values() for row in family)
    room = sheets.WIDTH - LEFT - GAP * (len(found.corpora) - 1) - names - 0.6
    width = min(room / len(found.corpora), WIDEST)
    panels = []
    for (model, family), step in zip(families.items(), itertools.count(), strict=False):
        down = sheet.top + step * (above + height + BELOW) + above
        if len(families) > 1:
            sheet.write(model, sheets.MARGIN, down - 0.46, fontsize=10)
        for column, corpus in enumerate(found.corpora):
            axes = sheet.figure.add_axes(sheet.box(LEFT + column * (width + GAP), down, width, height))
            axes.set_title(CORPORA[corpus], loc="left", fontsize=10, fontweight="bold", pad=6)
            _frame(axes, named=column == 0)
            panels.append(Panel(placing.Page(sheet.figure, axes), corpus, family, placing.styles(found.variants)))
    return panels


def _frame(axes: Axes, named: bool) -> None:
    axes.set_facecolor("none")
    axes.spines[:].set_visible(False)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=8, labelleft=named)


def _limits(found: Scores, rows: Sequence[Row]) -> tuple[float, float]:
    """Ends of the logarithmic axis: a decade at least, every whisker, and the noise floor unless it is far below."""
    ends = [end for row in rows for end in (row["value"], row["low"], row["high"]) if end is not None and end > 0]
    floors = [row["value"] for v in found.variants for c in found.corpora if (row := _greatest(found, v, c))]
    least = min(ends)
    ends += [floor for floor in floors if floor * FAR > least]
    middle, wide = math.sqrt(min(ends) * max(ends)), max(max(ends) / min(ends), 10.0) ** 0.5
    return placing.padded([middle / wide, middle * wide], 0.1, 0.06)


def _greatest(found: Scores, variant: Row, part: str) -> Row | None:
    """The noise floor that variants are compared with."""
    row = found.row(variant["variant"], "kl_mean", part)
    return row if row is not None and row["reference"] in FLOORS and row["value"] > 0 else None


def _upwards(axes: Axes, limits: tuple[float, float]) -> None:
    axes.set_yscale("log")
    axes.set_ylim(limits)
    ticks = placing.decades(*limits)
    if len(ticks) < 3:
        steps = [factor * tick for tick in placing.decades(limits[0] / 10, limits[1]) for factor in (1, 2, 5)]
        ticks = [tick for tick in steps if limits[0] <= tick <= limits[1]]
    axes.set_yticks(ticks, [f"{tick:.10g}" if tick >= 0.0009 else nats(tick).replace("1.0 × ", "") for tick in ticks])
    axes.minorticks_off()


def _kept_axis(axes: Axes, kept: Sequence[float]) -> None:
    axes.set_xscale("log")
    low, high = min(kept), max(kept)
    room = max(1.4, (4 * low / high) ** 0.5)  # a factor of four at least
    axes.set_xlim(low / room, high * room)
    ticks = [2.0**-power for power in range(12) if low / room <= 2.0**-power <= high * room]
    axes.set_xticks(ticks, [f"{100 * tick:.3g}%" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("kept fraction of the cache, logarithmic", fontsize=8, loc="left")


def _distance_axis(axes: Axes, buckets: Sequence[str]) -> None:
    axes.set_xlim(-0.4, len(buckets) - 0.6)
    axes.set_xticks(range(len(buckets)), [bucket.replace("-", "–") for bucket in buckets])
    axes.set_xlabel("tokens from the prefix’s end", fontsize=8, loc="left")


def _floor(panel: Panel, found: Scores) -> None:
    """The noise floor as a band up from the axis, or named at its lower end where it lies far below."""
    row = next((row for variant in panel.family if (row := _greatest(found, variant, panel.corpus))), None)
    if row is None:
        return
    page, (left, right), (bottom, _) = panel.page, panel.axes.get_xlim(), panel.axes.get_ylim()
    (start, low), (end, _) = page.pixel(left, bottom), page.pixel(right, bottom)
    spots = range(round(start) + 3, round(end), 6)
    if row["value"] <= bottom:
        page.write(f"noise floor far below: {nats(row['value'])}", [(x, low, 1.0, 2.0) for x in spots], color=MUTED)
        return
    panel.axes.axhspan(bottom, row["value"], facecolor=FAINT, linewidth=0, zorder=0.2)
    panel.axes.axhline(row["value"], color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)), zorder=0.5)
    _, y = page.pixel(left, row["value"])
    page.block((start, y), (end, y), half=1)
    page.write("noise floor", [(x, y, 1.0, up) for up in (-2.0, 2.0) for x in spots], color=MUTED)


def _marks(panel: Panel, found: Scores, rows: Sequence[Row]) -> None:
    """Each variant's mark with its whisker, and its name where there is room near it."""
    page = panel.page
    spots = [page.pixel(row["kept_fraction"], row["value"]) for row in rows]
    ends = [_whisker(page, row, row["kept_fraction"]) for row in rows]
    taken = [(x, min(low, y - 6), max(high, y + 6)) for (x, y), (low, high) in zip(spots, ends, strict=True)]
    shifts = placing.beside(taken, APART)
    spots = [(x + shift, y) for (x, y), shift in zip(spots, shifts, strict=True)]
    for row, spot, whisker in zip(rows, spots, ends, strict=True):
        _mark(panel, row, spot, whisker)
    _floor(panel, found)
    for row, spot in zip(rows, spots, strict=True):
        page.write(panel.name(row), placing.around([spot], NEAR))


def _whisker(page: placing.Page, row: Row, x: float) -> tuple[float, float]:
    """Where a whisker begins and ends upwards, in pixels; at the mark where there is no interval."""
    bottom = page.axes.get_ylim()[0]
    low, high = (row["value"] if row[end] is None else max(row[end], bottom) for end in ("low", "high"))
    return page.pixel(x, low)[1], page.pixel(x, high)[1]


def _mark(panel: Panel, row: Row, spot: Spot, whisker: tuple[float, float], size: float = 8) -> None:
    """A mark and its whisker, at pixels, and no label over either."""
    (x, y), (low, high) = spot, whisker
    panel.page.block((x, y), (x, y), half=6)
    panel.page.block((x, low), (x, high), half=3)
    data = panel.axes.transData.inverted()
    (across, up), (_, begin), (_, end) = (data.transform((x, place)) for place in (y, low, high))
    panel.axes.plot([across], [up], **_marker(panel, row, size), zorder=4)
    panel.axes.plot([across, across], [begin, end], color=INK, linewidth=1.1, solid_capstyle="butt", zorder=4.5)


def _marker(panel: Panel, row: Row, size: float) -> dict[str, Any]:
    return placing.marker("o", *panel.style[row["method"]]) | {"markersize": size}


def _lines(panel: Panel, lines: Sequence[Sequence[Row]]) -> list[Spot]:
    """A line a variant, its marks a little beside the others'; where each ends."""
    page, ends = panel.page, []
    step = min(6.0, 0.6 * (page.pixel(1, 1)[0] - page.pixel(0, 1)[0]) / len(lines))
    for index, line in enumerate(lines):
        shift = (index - (len(lines) - 1) / 2) * step
        spots = [(x + shift, y) for x, y in (page.pixel(place, row["value"]) for place, row in enumerate(line))]
        data = [panel.axes.transData.inverted().transform(spot) for spot in spots]
        panel.axes.plot(*zip(*data, strict=True), color=panel.style[line[0]["method"]][0], linewidth=1.4, zorder=2)
        for place, (row, spot) in enumerate(zip(line, spots, strict=True)):
            _mark(panel, row, spot, _whisker(page, row, place), size=6)
        for start, end in itertools.pairwise(spots):
            page.block(start, end, half=2)
        ends.append(spots[-1])
    return ends


def _line_height(panel: Panel) -> float:
    """Pixels from one name in the list to the next."""
    return placing.SIZE * 1.35 / 72 * panel.page.figure.dpi


def _names(panel: Panel, rows: Sequence[Row], ends: Sequence[Spot]) -> None:
    """Names with their marks right of the panel, one under the other, each led to from where its line ends."""
    box, data = panel.axes.bbox, panel.axes.transData.inverted()
    heights = placing.spread([y for _, y in ends], _line_height(panel), box.y0, box.y1)
    for row, (x, y), height in zip(rows, ends, heights, strict=True):
        if x < box.x1:
            path = [data.transform(spot) for spot in ((x + 6, y), (box.x1 + 2, height), (box.x1 + 9, height))]
            panel.axes.plot(*zip(*path, strict=True), color=MUTED, linewidth=0.6, clip_on=False, zorder=1)
        across, up = data.transform((box.x1 + 16, height))
        panel.axes.plot([across], [up], **_marker(panel, row, 6), clip_on=False)
        across, up = data.transform((box.x1 + 24, height))
        panel.axes.text(across, up, panel.name(row), va="center", ha="left")
