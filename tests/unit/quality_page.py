"""A run with quality as the report reads it: the fixture's tables, its quality.parquet and every figure."""

import json
from pathlib import Path
from typing import Any

import quality_fixture as made
import report_fixture

from kvbench import plots, quality_plots, quality_stats, report, retrieval_plot, roofline_plot

KL = ("kl-by-kept-fraction", "kl-by-distance")


def cells() -> list[dict[str, Any]]:
    """The stats of `report_fixture`, with the random control beside snapkv."""
    found = []
    for cell in report_fixture.stats():
        found.append(cell)
        if cell["method"] == "snapkv-0.5":
            found.append(cell | {"method": "random-0.5", "variant": "random-0.5"})
    return found


def quality(folder: Path, **config: Any) -> Path:
    """Write the jobs' files and quality.parquet under a results folder; its path."""
    made.write(folder)
    quality_stats.write(made.plan(**config), folder, folder / "quality.parquet", {"script": "quality_stats"})
    return folder / "quality.parquet"


def speed_figures(folder: Path) -> list[Path]:
    """Draw the figures of the stats in a results folder; their paths."""
    drawn = []
    for workload in report_fixture.WORKLOADS:
        drawn.append(folder / f"bars-{workload}.svg")
        plots.draw(folder / "stats.parquet", workload, "{}", drawn[-1], drawn[-1].with_suffix(".png"))
    drawn.append(folder / "roofline.svg")
    roofline_plot.draw(folder / "stats.parquet", "{}", drawn[-1], folder / "roofline.png")
    return drawn


def quality_figures(folder: Path, table: Path) -> list[Path]:
    """Draw the figures of a quality.parquet; their paths."""
    drawn = [folder / f"{name}.svg" for name in (*KL, "retrieval")]
    for name, path in zip(KL, drawn, strict=False):
        quality_plots.draw(table, name, "{}", path, folder / f"{name}.png")
    retrieval_plot.draw(table, "{}", drawn[-1], folder / "retrieval.png")
    return drawn


def inputs(folder: Path, table: Path | None = None, **more: Any) -> report.Inputs:
    """What the report is made of; with ``table``, that quality.parquet and its figures."""
    paths = report_fixture.write(folder, cells(), [made.outputs(method) for method in made.METHODS])
    paths["plan"].write_text(json.dumps(made.plan()), "utf-8")
    drawn = [] if table is None else speed_figures(folder) + quality_figures(folder, table)
    paths |= {} if table is None else {"quality": table}
    return report.Inputs(**(paths | {"plots": drawn, "provenance": {"script": "report", "code": "abc"}} | more))
