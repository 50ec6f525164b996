"""Marks and labels on a figure's axes, none of which covers another."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvbench import sheets
from kvbench.results import COLOURS, MUTED, PAPER, colours
from kvbench.words import Row

SIZE = 9  # points of a label

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

    def write(self, text: str, places: Iterable[Place], **style: Any) -> bool:
        """Write at the first place that is free; a label that finds none is left out. Whether it was written."""
        width = sheets.text_width(self.figure, text, fontsize=SIZE) * self.figure.dpi + 4
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
                return True
        return False

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


def decades(low: float, high: float) -> list[float]:
    """Powers of ten between two values."""
    return [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]


def padded(values: Sequence[float], below: float, above: float) -> tuple[float, float]:
    """Ends of a logarithmic axis that leave these shares of it free."""
    low, high = min(values), max(values)
    span = max(high / low, 10.0) ** (1 / (1 - below - above))
    return low / span**below, high * span**above


def styles(rows: Sequence[Row]) -> dict[str, tuple[str, bool]]:
    """Each method's colour, and whether its marks are filled: they are hollow where colours begin again."""
    palette = colours(rows)
    coloured = [method for method, colour in palette.items() if colour in COLOURS]
    return {
        method: (colour, method not in coloured or coloured.index(method) < len(COLOURS))
        for method, colour in palette.items()
    }


def marker(shape: str, colour: str, filled: bool) -> dict[str, Any]:
    """How matplotlib draws a mark of a method's style."""
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


def around(spots: Sequence[tuple[float, float]], farthest: int = 200) -> Iterator[Place]:
    """Places near one of several points: to the right and below first, then farther away, up to so many pixels."""
    sides = ((1, -0.4), (1, 0), (0, -1), (1, -1), (-1, -0.4), (-1, 0), (-1, -1), (0, 1), (-1, 1), (1, 1))
    for distance in range(8, farthest, 8):
        for (x, y), (right, up) in itertools.product(spots, sides):
            yield x, y, right * distance, up * distance


def beside(spots: Sequence[tuple[float, float, float]], apart: float) -> list[float]:
    """How far to shift marks sideways so that none covers another: 0 or a multiple of ``apart``, nearest first.

    Parameters
    ----------
    spots : of each mark where it lies across and where it begins and ends upwards, in pixels.
    """
    placed: list[tuple[float, float, float]] = []
    shifts = []
    for x, bottom, top in spots:
        ways = (apart * sign * step for step in itertools.count() for sign in (1, -1))
        shift = next(
            s for s in ways if not any(abs(x + s - p) < apart and bottom < t and b < top for p, b, t in placed)
        )
        placed.append((x + shift, bottom, top))
        shifts.append(shift)
    return shifts


def spread(places: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Places between two ends of a line, in their order, moved as little as need be for each two to be so far apart."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    runs: list[tuple[float, int]] = []  # the middle of a run of labels, and how many they are

    def within(middle: float, count: int) -> float:
        return max(min(middle, high - count / 2 * apart), low + count / 2 * apart)

    for index in order:
        middle, count = within(places[index], 1), 1
        while runs and runs[-1][0] + (runs[-1][1] + count) / 2 * apart > middle:
            other, more = runs.pop()
            middle, count = (middle * count + other * more) / (count + more), count + more
            middle = within(middle, count)
        runs.append((middle, count))
    found = [middle + (step - (count - 1) / 2) * apart for middle, count in runs for step in range(count)]
    return [place for _, place in sorted(zip(order, found, strict=True))]
