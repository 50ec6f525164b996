"""quality.parquet as the report and its figures read it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kvbench import results
from kvbench.verdicts import DISTRIBUTION, RETRIEVAL, TEXT
from kvbench.words import Row

COLUMNS = "model method variant baseline control metric slice reference status value low high n verdict".split()

CORPORA = {"own": "the baseline’s own text", "conversations": "conversations", "book": "a book"}
TASKS = {
    "needle": "Needle",
    "multikey": "Multi-key needle",
    "variables": "Variable tracking",
    "words": "Common words",
}
FLOORS = {"batch": "another batch shape", "dtype": "another dtype"}

_RETRIEVAL = {metric.name for metric in RETRIEVAL}
STAGES = {
    metric.name: stage
    for stage, metrics in (("distribution", DISTRIBUTION), ("retrieval", RETRIEVAL), ("texts", TEXT))
    for metric in metrics
}


def read(path: str | Path) -> "Scores":
    """The figures of quality.parquet.

    Raises
    ------
    UserError : the file is missing, no Parquet, or lacks a column.
    """
    return Scores(results.read_rows(path, COLUMNS))


@dataclass(frozen=True)
class Scores:
    """Every figure of quality of a run; those that came out can be looked up by variant, metric and slice."""

    rows: Sequence[Row]

    @cached_property
    def _found(self) -> dict[tuple[str, str, str], list[Row]]:
        found: dict[tuple[str, str, str], list[Row]] = {}
        for row in self.rows:
            if row["status"] == "ok":
                found.setdefault((row["variant"], row["metric"], row["slice"]), []).append(row)
        return found

    @cached_property
    def _lacking(self) -> dict[tuple[str, str, str], Row]:
        return {(row["variant"], row["metric"], row["slice"]): row for row in self.rows if row["status"] != "ok"}

    @cached_property
    def variants(self) -> list[Row]:
        """One row a variant, that of its overall verdict, in the order of the run."""
        overall = {row["variant"]: row for row in self.rows if row["metric"] == "overall"}
        return [overall[label] for label in results.unique(row["variant"] for row in self.rows) if label in overall]

    @property
    def measured(self) -> bool:
        """Whether there is any figure at all."""
        return any(row["value"] is not None for row in self.rows)

    def is_baseline(self, variant: Row) -> bool:
        """Whether other variants are compared with this one."""
        return results.is_baseline(variant, self.variants)

    def families(self) -> dict[str, list[Row]]:
        """Variants by the model of the baseline that they are held against: a retrofit stands beside its base."""
        models = {str(row["variant"]): str(row["model"]) for row in self.variants}
        found: dict[str, list[Row]] = {}
        for row in self.variants:
            found.setdefault(models.get(str(row.get("baseline")), str(row["model"])), []).append(row)
        return found

    def row(self, variant: str, metric: str, part: str) -> Row | None:
        """A figure that came out; of the noise floors, the greater, which the others are compared with."""
        found = self._found.get((variant, metric, part), [])
        if len(found) > 1:
            greater = max(self.floors(variant, "all"), key=lambda row: float(row["value"]))["reference"]
            found = [row for row in found if row["reference"] == greater]
        return found[0] if found else None

    def value(self, variant: str, metric: str, part: str) -> float | None:
        """The value of `row`."""
        row = self.row(variant, metric, part)
        return row["value"] if row else None

    def floors(self, variant: str, part: str) -> list[Row]:
        """Mean KL of an uncompressed cache against itself, by reference; empty for other variants."""
        return [row for row in self._found.get((variant, "kl_mean", part), []) if row["reference"] in FLOORS]

    @property
    def corpora(self) -> list[str]:
        """Corpora that have a figure, the known ones first."""
        return _ordered({part for _, metric, part in self._found if metric == "kl_mean" and "/" not in part}, CORPORA)

    @property
    def tasks(self) -> list[str]:
        """Retrieval tasks of the run, whether they came out or not."""
        named = {row["slice"] for row in self.rows if row["metric"] in _RETRIEVAL and "/" not in row["slice"]}
        return _ordered(named, TASKS)

    def distances(self, corpus: str) -> list[str]:
        """Buckets of distance from the prefix's end, near ones first."""
        start = f"{corpus}/"
        buckets = {part.removeprefix(start) for _, _, part in self._found if part.startswith(start)}
        return sorted(buckets, key=lambda bucket: int(bucket.split("-")[0]))

    def points(self, task: str) -> list[tuple[int, float | None]]:
        """Lengths and depths at which a task was set."""
        parts = {part for _, metric, part in self._found if metric in _RETRIEVAL and part.startswith(f"{task}/")}
        split = [part.split("/") for part in parts]
        found = [(int(part[1]), float(part[2]) if len(part) > 2 else None) for part in split]
        return sorted(found, key=lambda point: (point[0], point[1] or 0.0))

    def gap(self, variant: str, metric: str, part: str) -> Row | None:
        """A figure that did not come out, with the status and the reason."""
        return self._lacking.get((variant, metric, part))

    def gaps(self, variant: str) -> dict[str, Row]:
        """What of a variant did not come out, a row of each: a whole stage, or what of it by its name."""
        own = [row for row in self.rows if row["variant"] == variant and row["metric"] in STAGES]
        known = {STAGES[row["metric"]] for row in own if row["status"] == "ok"}
        lacking = [row for row in own if row["status"] != "ok"]
        tasks = {row["slice"] for row in lacking}
        found: dict[str, Row] = {}
        for row in lacking:
            stage, (task, *point) = STAGES[row["metric"]], row["slice"].split("/")
            if stage not in known:
                found.setdefault(stage, row)
            elif row["reference"] in FLOORS:
                found.setdefault(f"noise floor in {FLOORS[row['reference']]}", row)
            elif not point or task in tasks:
                found.setdefault(TASKS.get(task, task).lower(), row)
            else:
                found.setdefault(f"{TASKS.get(task, task).lower()} at {int(point[0]):,} tokens", row)
        return found


def _ordered(names: set[str], known: dict[str, str]) -> list[str]:
    """Those names that are known, in the order of the known."""
    return [name for name in known if name in names]
