"""The heat maps of retrieval: what share each variant still finds, by length and depth, a map a task."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from kvbench import scores, sheets, words
from kvbench.quality_words import percent
from kvbench.results import FAINT, MUTED, unique
from kvbench.scores import TASKS, Scores
from kvbench.words import Row

FIELD = 0.215  # inches of a field's height
NARROWEST, WIDEST = 0.36, 0.85  # inches of a field's width
DEPTHS = 0.46  # inches left of the first map, for its depths
GAP, BETWEEN = 0.22, 0.2  # inches between maps, across and down
HEADING, UNDER = 0.28, 0.12  # inches over all maps and under them
DARK, LIGHT = "#000000", "#fdfdfd"  # no inks of the page: a field keeps its colours in dark mode


@dataclass(frozen=True)
class Task:
    """A column of maps: its fields, and where it begins (inches from the page's left edge)."""

    name: str
    lengths: list[int]
    depths: list[float | None]
    left: float


@dataclass(frozen=True)
class Grid:
    """The columns, the width of a field and that of the page, in inches."""

    tasks: list[Task]
    field: float
    width: float

    @property
    def pitch(self) -> float:
        """Inches from one variant's maps to the next one's."""
        return FIELD * max(len(task.depths) for task in self.tasks) + BETWEEN


def draw(quality: str | Path, provenance: str, svg: str | Path, png: str | Path) -> None:
    """Write the figure as SVG and PNG, byte for byte the same on every run.

    Raises
    ------
    UserError : the table cannot be read.
    """
    with plt.rc_context(sheets.STYLE):
        sheets.save(heat_maps(scores.read(quality)), provenance, svg, png)


def heat_maps(found: Scores) -> Figure:
    """A row of maps a variant, a column a task; in each field the percentage of samples that were right."""
    if not any(found.points(task) for task in found.tasks):
        return sheets.nothing("No variant has an accuracy of retrieval.")
    several = len(found.families()) > 1
    names = {variant["variant"]: _label(variant) for variant in found.variants}
    grid = _grid(found, [*names.values(), *(_about(variant, several) for variant in found.variants)])
    models = ", ".join(unique(variant["model"] for variant in found.variants))
    subtitle = f"{models} · right answers in percent, by prompt tokens (across) and depth (down, 0% is the beginning)"
    room = HEADING + grid.pitch * len(names) + UNDER
    sheet = sheets.sheet("What is still found", subtitle, [_note(found)], room, grid.width)
    for index, variant in enumerate(found.variants):
        down = sheet.top + HEADING + index * grid.pitch
        sheet.write(names[variant["variant"]], sheets.MARGIN, down + 0.02)
        sheet.write(_about(variant, several), sheets.MARGIN, down + 0.2, color=MUTED, fontsize=8)
        for task in grid.tasks:
            width, height = grid.field * len(task.lengths), FIELD * len(task.depths)
            axes = sheet.figure.add_axes(sheet.box(task.left, down, width, height))
            _frame(axes, task, named=task is grid.tasks[0], last=index == len(names) - 1)
            if index == 0:
                axes.set_title(TASKS[task.name], loc="left", fontsize=10, fontweight="bold", pad=6)
            _fields(axes, found, variant, task)
    return sheet.figure


def _label(variant: Row) -> str:
    """A variant's name without its model's."""
    name = str(variant["variant"]).removeprefix(f"{variant['model']}/")
    return words.shorten(name, 30) + " (simulated)" * bool(variant.get("simulated"))


def _about(variant: Row, several: bool) -> str:
    """What stands under a variant's name: its model where there are several, and what it keeps."""
    kept = variant["kept_fraction"]
    parts = [variant["model"] if several else "", f"keeps {100 * kept:.3g}%" if kept is not None else ""]
    return ", ".join(part for part in parts if part)


def _grid(found: Scores, names: Sequence[str]) -> Grid:
    """Columns as wide as the page allows, or a wider page where fields would be too narrow for their numbers."""
    points = {task: points for task in found.tasks if (points := found.points(task))}
    figure = plt.figure()
    left = sheets.MARGIN + max(sheets.text_width(figure, name) for name in names) + DEPTHS
    titles = {task: sheets.text_width(figure, TASKS[task], fontsize=10, fontweight="bold") for task in points}
    plt.close(figure)
    lengths = {task: sorted({length for length, _ in own}) for task, own in points.items()}
    across = sum(len(own) for own in lengths.values())
    field = (sheets.WIDTH - left - GAP * (len(points) - 1) - sheets.MARGIN) / across
    field = min(max(field, NARROWEST), WIDEST)
    tasks = []
    for task, own in points.items():
        depths = sorted({depth for _, depth in own}, key=lambda depth: depth or 0.0)
        tasks.append(Task(task, lengths[task], depths, left))
        left += max(field * len(lengths[task]), titles[task]) + GAP
    return Grid(tasks, field, max(sheets.WIDTH, left - GAP + sheets.MARGIN))


def _note(found: Scores) -> str:
    counts = {
        row["n"]
        for row in found.rows
        if row["metric"] == "retrieval_accuracy" and "/" in row["slice"] and row["status"] == "ok"
    }
    low, high = min(counts), max(counts)
    count = f"{low}" if low == high else f"{low} to {high}"
    return f"n = {count} samples a field. Darker: fewer are right. –: did not come out."


def _frame(axes: Axes, task: Task, named: bool, last: bool) -> None:
    axes.set_xlim(0, len(task.lengths))
    axes.set_ylim(len(task.depths), 0)
    axes.set_facecolor("none")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8, pad=3, labelcolor=MUTED)
    depths = ["" if depth is None or not named else f"{100 * depth:.3g}%" for depth in task.depths]
    axes.set_yticks([row + 0.5 for row in range(len(depths))], depths)
    lengths = [f"{length:,}" if last else "" for length in task.lengths]
    axes.set_xticks([column + 0.5 for column in range(len(lengths))], lengths)


def _fields(axes: Axes, found: Scores, variant: Row, task: Task) -> None:
    """A map, or why there is none."""
    gap = found.gap(variant["variant"], "retrieval_accuracy", task.name)
    if gap is not None:
        axes.add_patch(Rectangle((0, 0), len(task.lengths), len(task.depths), facecolor=FAINT, linewidth=0))
        status = words.STATUS_WORDS.get(gap["status"], str(gap["status"]))
        middle = len(task.lengths) / 2, len(task.depths) / 2
        axes.text(*middle, status, ha="center", va="center_baseline", color=MUTED, fontsize=8, fontstyle="italic")
        return
    for row, depth in enumerate(task.depths):
        for column, length in enumerate(task.lengths):
            part = f"{task.name}/{length}" + ("" if depth is None else f"/{depth:g}")
            _field(axes, column, row, found.value(variant["variant"], "retrieval_accuracy", part))


def _field(axes: Axes, column: int, row: int, accuracy: float | None) -> None:
    colour = FAINT if accuracy is None else to_hex(colormaps["cividis"](accuracy))
    axes.add_patch(Rectangle((column + 0.02, row + 0.04), 0.96, 0.92, facecolor=colour, linewidth=0))
    ink = MUTED if accuracy is None else LIGHT if accuracy < 0.5 else DARK
    text = "–" if accuracy is None else percent(accuracy)
    axes.text(column + 0.5, row + 0.5, text, ha="center", va="center_baseline", color=ink, fontsize=8)
