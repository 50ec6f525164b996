"""From the quality jobs' files to one table: what each variant costs against its baseline, with intervals."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from kvbench import observations, paired, summaries, tables, verdicts
from kvbench.observations import Observed
from kvbench.verdicts import DISTRIBUTION, RETRIEVAL, TEXT, Metric

_COUNTED = ("n", "documents")
_NUMBERS = (
    "value low high n documents baseline_value difference difference_low difference_high p p_holm"
    " control_difference control_low control_high kept_fraction"
).split()

QUALITY = pa.schema(
    [(name, pa.string()) for name in ("model", "method", "variant", "baseline", "control", "metric", "slice")]
    + [(name, pa.string()) for name in ("reference", "status", "status_reason")]
    + [(name, pa.int64() if name in _COUNTED else pa.float64()) for name in _NUMBERS]
    + [("simulated", pa.bool_()), ("verdict", pa.string())]
)
"""quality.parquet: one row a variant, metric and slice; intervals are 95%."""

STAGES = ("quality", "retrieval", "outputs")
"""Folders of the jobs' files, one file a variant."""

OVERALL = "overall"
"""The metric of the rows that hold nothing but a variant's verdict."""

SAME_BUDGET = 0.05
"""How far apart the kept fractions of a variant and its random control may be,"""
SAME_SHARE = 0.25
"""and how far as a share of the variant's: twice as many tokens are no control of a strong compression."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A variant of the plan; ``random`` if it prunes blindly, so that others are held against it."""

    model: str
    method: str
    label: str
    baseline: str | None
    random: bool


@dataclass(frozen=True)
class Seen:
    """Everything that was observed of a variant; a stage that the config leaves out is empty."""

    distribution: dict[str, Observed]
    retrieval: Observed | None
    texts: Observed | None

    @property
    def kept(self) -> float | None:
        """Kept fraction, from the windows if there are any."""
        found = [o.kept for o in (*self.distribution.values(), self.retrieval) if o is not None]
        return next((kept for kept in found if kept is not None), None)

    @property
    def simulated(self) -> bool | None:
        """Whether the method frees no byte."""
        found = [o.simulated for o in (*self.distribution.values(), self.retrieval, self.texts) if o is not None]
        return next((simulated for simulated in found if simulated is not None), None)


def write(plan: dict[str, Any], folder: Path, output: Path, provenance: dict[str, Any]) -> None:
    """Write quality.parquet from the files of ``folder`` that the plan calls for."""
    table = pa.Table.from_pylist(merge(plan, folder), QUALITY)
    tables.write(output, table, provenance | _machine(plan, folder))


def _machine(plan: dict[str, Any], folder: Path) -> Row:
    """What the first variant's jobs ran on; all of a run have the same but for a change since."""
    cell = plan["cells"][0]
    files = [folder / stage / cell["model"] / f"{cell['method']}.parquet" for stage in STAGES]
    return next((tables.machine_of(file) for file in files if file.exists()), {})


def merge(plan: dict[str, Any], folder: Path) -> list[Row]:
    """The rows of quality.parquet.

    Parameters
    ----------
    plan : ``cells``, each with model, method, variant and baseline; and the resolved ``config``.
    folder : the results folder that holds ``quality``, ``retrieval`` and ``outputs``, as far as the config wants them.
    """
    variants = list(_variants(plan))
    by_label = {variant.label: variant for variant in variants}
    seen = {variant.label: _see(variant, by_label, plan["config"], folder) for variant in variants}
    rows = [row for variant in variants for row in _rows(variant, seen, variants, plan["config"])]
    _adjust(rows)
    for row in rows:
        row["verdict"] = verdicts.of_metric(row)
    return rows + [_overall(variant, rows) for variant in variants]


def _variants(plan: dict[str, Any]) -> Iterator[Variant]:
    methods = plan["config"]["methods"]
    for cell in {cell["variant"]: cell for cell in plan["cells"]}.values():
        spec = methods[cell["method"]]
        random = isinstance(spec, dict) and spec.get("press") == "RandomPress"
        baseline = cell["baseline"] if cell["baseline"] != cell["variant"] else None
        yield Variant(cell["model"], cell["method"], cell["variant"], baseline, random)


def _see(variant: Variant, by_label: dict[str, Variant], config: dict[str, Any], folder: Path) -> Seen:
    def file(stage: str, of: Variant) -> Path:
        return folder / stage / of.model / f"{of.method}.parquet"

    base = by_label.get(variant.baseline or "")
    quality = config["quality"]
    return Seen(
        observations.distribution(file("quality", variant)) if quality["windows"] else {},
        observations.retrieval(file("retrieval", variant)) if quality["retrieval"]["samples"] else None,
        observations.texts(file("outputs", variant), file("outputs", base) if base else None)
        if config["outputs"]["prompts"]
        else None,
    )


def _rows(variant: Variant, seen: dict[str, Seen], variants: list[Variant], config: dict[str, Any]) -> Iterator[Row]:
    """Every row of a variant but its overall one."""
    own, base = seen[variant.label], seen.get(variant.baseline or "")
    control = _control(variant, seen, variants)
    other = seen.get(control or "")
    known = {
        "model": variant.model,
        "method": variant.method,
        "variant": variant.label,
        "baseline": variant.baseline,
        "control": control,
        "is_baseline": any(v.baseline == variant.label for v in variants),
        "simulated": own.simulated,
    }
    for reference, mine in own.distribution.items():
        against = (_floor(base), other.distribution.get("full") if other else None) if reference == "full" else NOTHING
        extra = {"reference": reference, "kept_fraction": mine.kept}
        yield from _stage(known | extra, DISTRIBUTION, mine, against, ["all"])
    if own.retrieval is not None:
        against = (base.retrieval if base else None, other.retrieval if other else None)
        extra = {"reference": None, "kept_fraction": own.retrieval.kept}
        yield from _stage(known | extra, RETRIEVAL, own.retrieval, against, config["quality"]["retrieval"]["tasks"])
    if own.texts is not None:
        against = (base.texts if base else None, other.texts if other else None)
        extra = {"reference": None, "kept_fraction": own.kept}
        yield from _stage(known | extra, TEXT, own.texts, against, ["outputs"])


Against = tuple[Observed | None, Observed | None]
NOTHING: Against = (None, None)


def _floor(base: Seen | None) -> Observed | None:
    """The greater noise floor of an uncompressed variant."""
    measured = [o for o in base.distribution.values() if o.status == "ok"] if base else []
    return max(measured, key=lambda o: float(o.frame["kl"].mean()), default=None)


def _control(variant: Variant, seen: dict[str, Seen], variants: list[Variant]) -> str | None:
    """Label of the random variant whose kept fraction is nearest, if it is near enough.

    Of the same model, or (a retrofit) of the one that its baseline is of.
    """
    kept = seen[variant.label].kept
    if variant.random or kept is None:
        return None
    distances = {
        other.label: abs(found - kept)
        for other in variants
        if other.random
        and (other.model == variant.model or (other.baseline is not None and other.baseline == variant.baseline))
        and (found := seen[other.label].kept) is not None
    }
    nearest = min(distances, key=lambda label: distances[label], default=None)
    return nearest if nearest is not None and distances[nearest] <= min(SAME_BUDGET, SAME_SHARE * kept) else None


def _stage(
    known: Row, metrics: tuple[Metric, ...], mine: Observed, against: Against, headlines: list[str]
) -> Iterator[Row]:
    """The rows of one stage; what did not come out of it has its status, the whole stage under its headline slices."""
    gaps = mine.gaps if mine.status == "ok" else dict.fromkeys(headlines, (mine.status, mine.reason))
    for metric in metrics:
        for name, (status, reason) in gaps.items():
            level = "whole" if name in headlines else "part"
            about = {"metric": metric.name, "slice": name, "level": level, "status": status, "status_reason": reason}
            yield dict.fromkeys(_NUMBERS) | known | about
    if mine.status == "ok":
        yield from _summed(known | {"status": "ok", "status_reason": None}, metrics, mine, against)


def _summed(known: Row, metrics: tuple[Metric, ...], mine: Observed, against: Against) -> Iterator[Row]:
    baseline, control = (
        o.frame.reindex(mine.frame.index) if o is not None and o.status == "ok" else None for o in against
    )
    compared = summaries.Compared(mine.frame, baseline, control)
    for metric in metrics:
        for part in observations.slices(mine.frame, metric):
            row = summaries.summary(metric, part, compared)
            if row is not None:
                yield known | {"metric": metric.name, "slice": part.name, "level": part.level} | row


def _adjust(rows: list[Row]) -> None:
    """Holm's correction; a family is a metric's tests over all variants of a model, at one level of slices."""
    families: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        families.setdefault((row["model"], row["metric"], row["level"]), []).append(row)
    for family in families.values():
        for row, adjusted in zip(family, paired.holm([row["p"] for row in family]), strict=True):
            row["p_holm"] = adjusted


def _overall(variant: Variant, rows: list[Row]) -> Row:
    own = [row for row in rows if row["variant"] == variant.label]
    deciding = [
        row
        for row in own
        if row["metric"] in verdicts.DECIDES and row["level"] == "whole" and row["slice"] != "outputs/batch"
    ]
    deciding += _lost_points(variant, own, rows)
    first = next((row for row in own if row["status"] == "ok"), own[0] if own else {})
    judged = bool(first) and first["status"] == "ok" and not first["is_baseline"]
    names = {"model": variant.model, "method": variant.method, "variant": variant.label, "baseline": variant.baseline}
    about = {key: first.get(key) for key in ("control", "status", "status_reason", "kept_fraction", "simulated")}
    verdict = verdicts.overall(deciding) if judged else None
    return names | about | {"metric": OVERALL, "slice": "all", "verdict": verdict}


def _lost_points(variant: Variant, own: list[Row], rows: list[Row]) -> list[Row]:
    """Points of retrieval that the baseline has and the variant lacks; what is left of a task is its easier part."""
    asked = {row["slice"] for row in rows if row["variant"] == variant.baseline and row["status"] == "ok"}
    return [
        row
        for row in own
        if row["metric"] == "retrieval_accuracy"
        and row["level"] == "part"
        and row["status"] != "ok"
        and row["slice"] in asked
    ]
