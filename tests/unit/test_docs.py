"""The documents say what the code has."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from kvbench import config, files, options

ROOT = Path(__file__).parent.parent.parent
SECTIONS: dict[str, type[BaseModel]] = {
    "Top level": config.Config,
    "`dataset`": options.Dataset,
    "`models`": options.Model,
    "`workloads`": options.Workload,
    "`protocol`": options.Protocol,
    "`outputs`": options.Outputs,
    "`quality`": options.Quality,
    "`quality.retrieval`": options.Retrieval,
    "`retrofits`": options.Retrofit,
}


def section(title: str) -> str:
    text = (ROOT / "config/README.md").read_text("utf-8")
    return re.split(r"^## ", text.split(f"## {title}\n", 1)[1], maxsplit=1, flags=re.M)[0]


@pytest.mark.parametrize("title", SECTIONS)
def test_every_key_is_described_with_its_default(title: str) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section(title), re.M))
    fields = SECTIONS[title].model_fields
    assert list(rows) == list(fields)
    for key, field in fields.items():
        if isinstance(field.default, str | int | float) and not isinstance(field.default, bool):
            assert rows[key] == f"`{field.default}`", key


def test_every_source_is_described() -> None:
    assert re.findall(r"^\| `(\w+)` \|", section("Sources"), re.M) == list(options.SOURCES)


def test_every_shape_that_comes_with_kvbench_is_named() -> None:
    shapes = {path.stem.replace("--", "/") for path in (ROOT / "workflow/scripts/kvbench/shapes").glob("*.json")}
    assert shapes == set(re.findall(r"`([\w.-]+/[\w.-]+)`", section("Sources").split("| `random`")[1]))


def test_the_schema_is_that_of_the_config() -> None:
    assert files.read_json(ROOT / "config/schema.json") == config.schema(), "run `make schema`"


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_names_its_schema(path: Path) -> None:
    assert path.read_text("utf-8").startswith("# yaml-language-server: $schema=schema.json\n")
    assert path.name in (ROOT / "config/README.md").read_text("utf-8")
