"""What a result was made by: a fingerprint of the code that can reach it, and of everything else it depends on."""

import ast
import hashlib
import importlib.metadata
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = ("torch", "transformers", "kvpress", "tokenizers", "pandas", "pyarrow", "snakemake")


def canonical(value: Any) -> str:
    """JSON with sorted keys and no space: equal values give equal text, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Installed versions by package name; a package that is not installed is left out."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def fingerprint(script: Path) -> str:
    """Hash of a script's syntax tree and of every first-party module that it can reach.

    Comments, formatting and docstrings do not count, so editing them makes no result stale; imports inside
    functions do. Files that modules read beside themselves (templates, shapes) count through `data_files`.

    Parameters
    ----------
    script : a file in ``workflow/scripts``; first-party is what lies under that folder.

    Returns
    -------
    16 hex digits.
    """
    digest = hashlib.sha256()
    for path in sorted(reachable(script)):
        digest.update(path.relative_to(script.parent).as_posix().encode())
        content = path.read_bytes()
        digest.update(_parsed(content).syntax.encode() if path.suffix == ".py" else content)
    return digest.hexdigest()[:16]


def reachable(script: Path) -> set[Path]:
    """The script, and every first-party file that it imports, directly or not, or that those read beside themselves."""
    found: set[Path] = set()
    waiting = [script]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        if path.suffix == ".py":
            waiting += [file for name in _parsed(path.read_bytes()).imports for file in _files_of(name, script.parent)]
            waiting += data_files(path)
    return found


def data_files(module: Path) -> list[Path]:
    """Files that belong to a module: those in folders that its ``DATA`` constant names (a tuple of folder names)."""
    folders = _parsed(module.read_bytes()).data
    return [p for folder in folders for p in sorted((module.parent / folder).rglob("*")) if p.is_file()]


class _Parsed(NamedTuple):
    """What a module's text says: its syntax without docstrings, the names it imports, the folders of its ``DATA``."""

    syntax: str
    imports: frozenset[str]
    data: tuple[str, ...]


@cache
def _parsed(text: bytes) -> _Parsed:
    """Parse a module's text, once for all the scripts that can reach it."""
    tree = ast.parse(text)
    imports, data = _imports(tree), _data(tree)
    return _Parsed(_syntax(tree), imports, data)


def _data(tree: ast.Module) -> tuple[str, ...]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "DATA" for t in node.targets):
            return tuple(ast.literal_eval(node.value))
    return ()


def _imports(tree: ast.Module) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def _files_of(module: str, root: Path) -> list[Path]:
    """The module's own file and the packages' above it, which run when it is imported."""
    parts = module.split(".")
    packages = [root.joinpath(*parts[:n], "__init__.py") for n in range(1, len(parts) + 1)]
    return [file for file in [*packages, root.joinpath(*parts).with_suffix(".py")] if file.is_file()]


def _syntax(tree: ast.Module) -> str:
    """The tree as text, from which docstrings are taken."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                del body[0]
    return ast.dump(tree)
