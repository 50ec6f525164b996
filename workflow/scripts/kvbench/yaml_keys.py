"""Keys given twice in a YAML file, of which a parser keeps the last in silence."""

from pathlib import Path
from typing import Any

import yaml


class _Strict(yaml.SafeLoader):
    duplicates: list[str]


def _mapping(loader: _Strict, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key, _ in node.value:
        if key.value in seen and key.value != "<<":
            loader.duplicates.append(
                f"line {key.start_mark.line + 1}: the key {key.value!r} is given twice; rename or remove one"
            )
        seen.add(key.value)
    loader.flatten_mapping(node)
    return dict(loader.construct_pairs(node, deep=True))


_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def duplicate_keys(path: Path) -> list[str]:
    """One message for each key that a YAML file gives twice in one mapping, with its line."""
    loader = _Strict(path.read_text("utf-8"))
    loader.duplicates = []
    try:
        loader.get_single_data()
    except yaml.YAMLError:
        return []  # what is read as JSON, tabs and all, or what Snakemake has its own words for
    finally:
        loader.dispose()
    return [f"{path.name} {problem}" for problem in loader.duplicates]
