"""report.html: the whole run on one page that asks the network for nothing."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from kvbench import (
    conditions,
    files,
    findings,
    intervals,
    quality_report,
    quality_words,
    scores,
    svg,
    tables,
    texts,
    words,
)
from kvbench.manifest import load_manifest
from kvbench.results import (
    CELL_COLUMNS,
    INKS,
    OUTPUT_COLUMNS,
    baseline_of,
    colours,
    device,
    is_baseline,
    read_rows,
    unique,
)
from kvbench.words import Row

DATA = ("templates",)
TEMPLATES = Path(__file__).parent / DATA[0]

VERSIONS = ("torch", "transformers", "kvpress")
# Shown in places of their own, or too long to be read.
ELSEWHERE = {"script", "variant", "protocol", "loading", "workload", "model_files", "model_revision", "model_config"}

# Measured only by a protocol or a setting that asks for them, or of a method that has them.
ASKED_FOR = ("article", "largest", "longest", "kept_fraction_end", "window", "block_size")

# Left to the CSV: the uncompressed size is in the compression factor, allocated bytes where they differ.
TABLE_COLUMNS = [column for column in words.QUANTITIES if column != "kv_cache_full_bytes"]


@dataclass(frozen=True)
class Inputs:
    """Paths of what the report shows, and what the report itself was made by.

    The counts and the dataset's manifest are None when no model reads prompts.
    """

    stats: str
    measurements: str
    quality: str
    outputs: Sequence[str]
    prompts_counts: str | None
    dataset_manifest: str | None
    model_manifests: Sequence[str]
    plots: Sequence[str]
    plan: str
    provenance: dict[str, Any]


def write(inputs: Inputs, output: str | Path) -> None:
    """Render the report.

    Raises
    ------
    UserError : an input is missing or cannot be read.
    """
    page = render(context(inputs))
    with files.atomic(output) as path:
        path.write_text(page, "utf-8")


def render(values: Mapping[str, Any]) -> str:
    """The page: template, style and script in one file, all text escaped, no script but ours allowed."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(visible=texts.visible, n=words.number, pretty=_pretty, size=_size)
    script = (TEMPLATES / "report.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        values,
        style=Markup((TEMPLATES / "report.css").read_text("utf-8")),
        script=Markup(script),
        script_hash=digest,
    )


def context(inputs: Inputs) -> dict[str, Any]:
    """Everything the template shows, by name."""
    rows = read_rows(inputs.stats)
    repeats = read_rows(inputs.measurements, CELL_COLUMNS[:4])
    outputs = [row for path in inputs.outputs for row in read_rows(path, OUTPUT_COLUMNS)]
    config = files.read_json(inputs.plan)["config"]
    models = [load_manifest(Path(path)) for path in inputs.model_manifests]
    tokenizers = {model.name: str(model.tokenizer) for model in models if model.tokenizer is not None}
    collected = texts.collect(outputs, rows, tokenizers)
    judged = scores.read(inputs.quality)
    names = unique(row["workload"] for row in rows)
    made_by = _made_by(inputs)
    return {
        "headline": findings.headline(rows, collected.tallies, _prices(judged)),
        "verdicts": " ".join(filter(None, [findings.verdict_counts(rows), quality_words.tally_words(judged)])),
        "models": models,
        "dataset": load_manifest(Path(inputs.dataset_manifest)) if inputs.dataset_manifest else None,
        "counts": files.read_json(inputs.prompts_counts) if inputs.prompts_counts else None,
        "facts": _facts(rows, made_by),
        "workloads": [_workload(rows, index, name, repeats, inputs.plots) for index, name in enumerate(names)],
        "quality": quality_report.section(judged, config, inputs.plots),
        "verdict_of": {row["variant"]: "" for row in rows}
        | {row["variant"]: quality_words.verdict_words(judged, row) for row in judged.variants},
        "roofline": _roofline(rows, inputs.plots),
        "curves": _curves(inputs.plots),
        "texts": collected,
        "missing": findings.missing(rows, str(config.get("results", "results"))),
        "cells": len(rows),
        "intervals": [
            (count, words.interval_words(count), intervals.by_chance(count, count))
            for count in unique(row.get("repeats") for row in rows if row["status"] == "ok")
        ],
        "protocols": unique(row["protocol"] for row in rows),
        "cpu": any(words.is_cpu(row["device"]) for row in rows),
        "dtypes": {
            model.name: ", ".join(unique(row.get("dtype") for row in repeats if row["model"] == model.name))
            for model in models
        },
        "config": config,
        "provenance": made_by,
    }


def _prices(judged: scores.Scores) -> dict[str, str]:
    """What each variant costs in quality, in words, where that was judged."""
    return {row["variant"]: price for row in judged.variants if (price := quality_words.price(judged, row["variant"]))}


def _made_by(inputs: Inputs) -> list[tuple[str, str]]:
    """Code, versions and devices as the run's files record them; what differs between files is listed."""
    found: dict[str, dict[str, None]] = {}
    sources = [inputs.stats, inputs.measurements, inputs.quality, *inputs.outputs]
    for record in [inputs.provenance, *(tables.provenance_of(path) for path in sources)]:
        script = str(record.get("script", ""))
        for name, value in flatten({key: record[key] for key in record if key not in ELSEWHERE}):
            found.setdefault(f"{name} of {script}" if name == "code" and script else name, {})[value] = None
    return [(name, ", ".join(values)) for name, values in sorted(found.items())]


def _facts(rows: Sequence[Row], made_by: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The setting of the run in pairs for the page's head."""

    def all_of(column: str) -> str:
        return ", ".join(str(value) for value in unique(row.get(column) for row in rows))

    known = {name.removeprefix("versions."): value for name, value in made_by}
    found = [
        ("Models", all_of("model")),
        ("Device", all_of("device")),
        ("Engine", all_of("engine")),
        ("Attention kernel", all_of("attention")),
        ("Protocol", all_of("protocol")),
        ("Repeats", ", ".join(str(n) for n in unique(row["repeats"] for row in rows if row["repeats"]))),
        ("Versions", ", ".join(f"{name} {known[name]}" for name in VERSIONS if name in known)),
    ]
    return [(name, value) for name, value in found if value]


def _workload(
    rows: Sequence[Row], index: int, name: str, repeats: Sequence[Row], plots: Sequence[str]
) -> dict[str, Any]:
    cells = [row for row in rows if row["workload"] == name]
    figure = next((path for path in plots if Path(path).stem == f"bars-{name}"), None)
    main = words.throughput_column(cells[0])
    family = main.split("_")[0]  # the article's throughput brings its warm one to the front with it
    ordered = sorted(TABLE_COLUMNS, key=lambda column: not column.startswith(family))
    columns = [column for column in ordered if _worth_showing(column, cells)]
    dots, span = _strips(cells, repeats)
    palette = colours(rows)
    return {
        "name": name,
        "span": span,
        "cold": cells[0]["protocol"] == "article",
        "words": words.workload_words(cells[0]),
        "figure": Markup(svg.inline(figure, f"figure-{index}", INKS)) if figure else None,
        "findings": findings.workload_findings(cells, name),
        "conditions": conditions.of_workload(cells),
        "columns": [_heading(column, cells) for column in columns],
        "rows": [
            _table_row(row, cells, columns) | {"dots": dots[place], "colour": palette[row["method"]]}
            for place, row in enumerate(cells)
        ],
        "unmeasured": [
            words.QUANTITIES[column].name(device(cells))
            for column in TABLE_COLUMNS
            if all(row.get(column) is None for row in cells) and not column.startswith(ASKED_FOR)
        ],
    }


def _roofline(rows: Sequence[Row], plots: Sequence[str]) -> Markup | None:
    """The roofline figure, where a cell has a mark on it."""
    figure = next((path for path in plots if Path(path).stem == "roofline"), None)
    if figure is None or all(row.get("fastest_ttft_s") is None for row in rows):
        return None
    return Markup(svg.inline(figure, "roofline", INKS))


def _curves(plots: Sequence[str]) -> list[tuple[str, Markup]]:
    """Name and figure of every training."""
    named = [
        (Path(path).stem.removeprefix("retrofit-"), path) for path in plots if Path(path).name.startswith("retrofit-")
    ]
    return [(name, Markup(svg.inline(path, f"curve-{place}", INKS))) for place, (name, path) in enumerate(named)]


def _table_row(row: Row, cells: Sequence[Row], columns: Sequence[str]) -> dict[str, Any]:
    base = baseline_of(row, cells)
    return {
        "label": row["variant"],
        "baseline": is_baseline(row, cells),
        "simulated": bool(row.get("simulated")),
        "status": row["status"],
        "why": words.missing_words(row, 300),
        "repeats": row.get("repeats"),
        "cells": [_cell(row, base, column, cells) for column in columns],
    }


def _worth_showing(column: str, cells: Sequence[Row]) -> bool:
    if column == "kv_cache_allocated_bytes":
        return any(row.get(column) is not None and row[column] != row["kv_cache_bytes"] for row in cells)
    return any(row.get(column) is not None for row in cells)


def _heading(column: str, cells: Sequence[Row]) -> dict[str, str]:
    _, unit = _scale(column, cells)
    return {
        "title": words.QUANTITIES[column].name(device(cells)),
        "unit": unit,
    }


def _scale(column: str, cells: Sequence[Row]) -> tuple[float, str]:
    """Divisor and unit of a column; a limit has those of the time that it limits, so that the two can be compared."""
    shown = column.removeprefix("fastest_")
    return words.scale(words.QUANTITIES[column].kind, [row.get(shown) for row in cells])


def _cell(row: Row, base: Row | None, column: str, cells: Sequence[Row]) -> dict[str, Any]:
    """One number of the table with its interval, its exact value and its difference."""
    measured = words.QUANTITIES[column]
    value = row.get(column)
    if value is None:
        return {"value": "–", "sort": "", "interval": "", "exact": "", "change": "", "judged": ""}
    shown = [other.get(column) for other in cells]
    divisor, _ = _scale(column, cells)
    largest = max(number for number in shown if number is not None) / divisor

    def written(number: float) -> str:
        return words.number(number / divisor, words.digits(measured.kind), largest)

    low, high = row.get(f"{column}_low"), row.get(f"{column}_high")
    change = words.compare(row, base, column) if measured.better else None
    good = change.good(measured.better) if change else None
    return {
        "value": written(value),
        "sort": repr(value),
        "interval": "" if low is None or high is None or low == high else f"{written(low)} to {written(high)}",
        "exact": f"{value:,.0f} bytes" if measured.kind == "bytes" else repr(value),
        "change": "" if change is None else change.words if change.clear else f"({change.words})",
        "judged": "" if good is None else "better" if good else "worse",
    }


def _strips(cells: Sequence[Row], repeats: Sequence[Row]) -> tuple[list[list[tuple[float, str]]], str]:
    """Each cell's repeats as places (percent) on one scale with their throughput, and the scale's ends."""
    column = words.throughput_column(cells[0])
    measured: dict[tuple[str, str], list[float]] = {}
    for repeat in repeats:
        if repeat["workload"] == cells[0]["workload"] and repeat.get(column) is not None:
            measured.setdefault((repeat["model"], repeat["method"]), []).append(repeat[column])
    found = [measured.get((cell["model"], cell["method"]), []) for cell in cells]
    every = [value for values in found for value in values]
    if not every:
        return [[] for _ in cells], ""
    low, high = min(every), max(every)
    dots = [[(100 * (value - low) / ((high - low) or 1), words.number(value)) for value in values] for values in found]
    return dots, f"{words.number(low)} to {words.number(high)} tok/s"


def flatten(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested mappings and lists as pairs of a dotted name and a text."""
    if isinstance(value, Mapping) and value:
        return [pair for key in value for pair in flatten(value[key], f"{name}.{key}" if name else str(key))]
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return [pair for index, item in enumerate(value) for pair in flatten(item, f"{name}[{index}]")]
    if isinstance(value, list):
        return [(name, ", ".join(str(item) for item in value) or "none")]
    return [(name, "none" if value is None or value == {} else str(value))]


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _size(value: int) -> str:
    divisor, unit = words.scale("bytes", [value])
    return f"{words.number(value / divisor)} {unit}"
