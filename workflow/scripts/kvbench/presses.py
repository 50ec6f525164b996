"""What kvpress offers, read from its source without importing it.

Importing kvpress costs seconds (it pulls torch and transformers in) and every Snakemake call checks the config,
so the catalogue of presses is taken from the installed package's syntax trees. Nothing is registered by hand: a
press that a newer kvpress brings is known as soon as it is installed.
"""

import ast
import importlib.util
import re
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from kvbench.errors import UserError

_SCALARS: dict[str, tuple[type, ...]] = {"float": (float, int), "int": (int,), "bool": (bool,), "str": (str,)}
ABSTRACT = {"BasePress", "ScorerPress"}


@dataclass(frozen=True)
class Argument:
    """One constructor argument of a press: its annotation as written and whether it must be given."""

    name: str
    annotation: ast.expr
    required: bool


@dataclass
class Press:
    """A press class: its bases by name, its constructor arguments (inherited ones first), and its own methods.

    ``ratio`` says whether its compression ratio can be set; None where the class itself has none.
    """

    name: str
    bases: list[str]
    arguments: dict[str, Argument] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    own_init: bool = False
    methods: set[str] = field(default_factory=set)
    ratio: bool | None = None


def check(spec: dict[str, Any], where: str) -> list[str]:
    """Compare a method's spec ``{"press": Class, "args": {...}}`` with the catalogue.

    Parameters
    ----------
    spec : class name and arguments; an argument that is itself a press is such a spec again. The outermost may have
        ``kept_tokens``, a budget in place of every compression ratio.
    where : the config key of the spec, for the messages.

    Returns
    -------
    One message for each problem, naming key, value and what would be right; empty if the press can be built.
    """
    press = {key: value for key, value in spec.items() if key != "kept_tokens"}
    problems = _check_press(press, where)
    return problems if problems or spec.get("kept_tokens") is None else _check_budget(press, where)


def _check_budget(spec: dict[str, Any], where: str) -> list[str]:
    name, ratio = spec["press"], _given_ratio(spec, where)
    if not catalogue()[name].ratio:
        return [f"{where}.kept_tokens: {name} has no compression_ratio that a budget could set"]
    return [f"{ratio}: the budget in kept_tokens sets it; leave one of them out"] if ratio else []


def _given_ratio(spec: dict[str, Any], where: str) -> str | None:
    """Where a spec or a press inside it gives a compression ratio, if any does."""
    for key, value in (spec.get("args") or {}).items():
        if key == "compression_ratio":
            return f"{where}.args.{key}"
        if isinstance(value, dict) and (found := _given_ratio(value, f"{where}.args.{key}")):
            return found
    return None


def _check_press(spec: dict[str, Any], where: str) -> list[str]:
    known = catalogue()
    name = spec.get("press")
    if not isinstance(name, str) or name not in known or name in ABSTRACT:
        return [f"{where}.press: kvpress has no press {name!r}{nearest(str(name), known.keys() - ABSTRACT)}"]
    press, given = known[name], spec.get("args") or {}
    if not isinstance(given, dict):
        return [f"{where}.args: {given!r} is no mapping of argument names to values"]
    unknown = set(spec) - {"press", "args"}
    problems = [f"{where}.{key}: not a key of a press; it has press and args" for key in sorted(unknown)]
    for key, value in given.items():
        if key in press.arguments:
            problems += _check_value(value, press.arguments[key].annotation, f"{where}.args.{key}", key)
        else:
            takes = ", ".join(press.arguments) or "none"
            hint = nearest(key, press.arguments)
            problems.append(f"{where}.args.{key}: {name} takes no argument {key!r}{hint} (it takes: {takes})")
    missing = [a.name for a in press.arguments.values() if a.required and a.name not in given]
    problems += [f"{where}.args: {name} needs the argument {key!r}" for key in missing]
    return problems


def nearest(word: str, choices: Any) -> str:
    """``; did you mean 'x'?`` for the closest spelling among ``choices``, or an empty string."""
    match = get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""


@cache
def catalogue() -> dict[str, Press]:
    """Every public press of the installed kvpress by class name.

    Raises
    ------
    UserError : kvpress is not installed.
    """
    package = importlib.util.find_spec("kvpress")
    if package is None or not package.submodule_search_locations:
        raise UserError("kvpress is not installed in this environment", "Run `make setup`, or pip install kvpress")
    classes: dict[str, Press] = {}
    for path in sorted(Path(package.submodule_search_locations[0], "presses").glob("*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef):
                classes[node.name] = _read_class(node)
    presses = {name: press for name, press in classes.items() if _is_a(name, "BasePress", classes)}
    return {
        name: replace(press, arguments=_arguments(press, classes), ratio=_ratio(press, classes))
        for name, press in presses.items()
    }


def is_plain_scorer(name: str) -> bool:
    """Whether a press only scores, and leaves to ScorerPress how many tokens are kept and when."""
    if name == "ScorerPress":
        return True
    press = catalogue().get(name)
    decides = {"compress", "compression_ratio", "forward_hook", "__call__"}
    return press is not None and not press.methods & decides and any(map(is_plain_scorer, press.bases))


def _read_class(node: ast.ClassDef) -> Press:
    methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
    press = Press(node.name, bases, methods=methods, ratio=_own_ratio(node))
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            name = item.target.id
            if name.startswith("_") or _keyword(item.value, "init") is False:
                press.hidden.add(name)
            else:
                press.arguments[name] = Argument(name, item.annotation, item.value is None)
        elif isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return replace(press, arguments=_signature(item), hidden=set(), own_init=True)
    return press


def _own_ratio(node: ast.ClassDef) -> bool | None:
    """Whether a class's compression ratio can be set: a field can, a property by what its setter does."""
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            if item.target.id == "compression_ratio":
                return True
        elif isinstance(item, ast.FunctionDef) and item.name == "compression_ratio" and len(item.args.args) == 2:
            return not any(isinstance(statement, ast.Raise) for statement in item.body)
    return None


def _ratio(press: Press, classes: dict[str, Press]) -> bool | None:
    if press.ratio is not None:
        return press.ratio
    found = [_ratio(classes[base], classes) for base in press.bases if base in classes]
    return next((ratio for ratio in found if ratio is not None), None)


def _signature(init: ast.FunctionDef) -> dict[str, Argument]:
    arguments = init.args.args[1:]
    required = len(arguments) - len(init.args.defaults)
    anything = ast.Name("object")
    return {a.arg: Argument(a.arg, a.annotation or anything, i < required) for i, a in enumerate(arguments)}


def _keyword(call: ast.expr | None, name: str) -> Any:
    if isinstance(call, ast.Call):
        for keyword in call.keywords:
            if keyword.arg == name and isinstance(keyword.value, ast.Constant):
                return keyword.value.value
    return None


def _arguments(press: Press, classes: dict[str, Press]) -> dict[str, Argument]:
    inherited: dict[str, Argument] = {}
    for base in press.bases:
        if base in classes and not press.own_init:
            inherited |= _arguments(classes[base], classes)
    return {k: a for k, a in (inherited | press.arguments).items() if k not in press.hidden}


def _is_a(name: str, ancestor: str, classes: dict[str, Press]) -> bool:
    return name == ancestor or (name in classes and any(_is_a(base, ancestor, classes) for base in classes[name].bases))


def _check_value(value: Any, annotation: ast.expr, where: str, name: str) -> list[str]:
    wanted = ast.unparse(annotation)
    if "Press" in wanted:
        if wanted.lower().startswith("list["):
            if not isinstance(value, list):
                return [f"{where}: {value!r} is no list of presses"]
            return [p for i, item in enumerate(value) for p in _check_nested(item, wanted, f"{where}[{i}]")]
        return _check_nested(value, wanted, where)
    if not _fits(value, annotation):
        return [f"{where}: {value!r} is not of type {wanted}"]
    if "compression_ratio" in name:
        ratios = value if isinstance(value, list) else [value]
        return [f"{where}: ratio {r} is outside [0, 1)" for r in ratios if not (r is None or 0 <= r < 1)]
    return []


def _check_nested(value: Any, wanted: str, where: str) -> list[str]:
    if value is None and "None" in wanted.replace("Optional", "None"):
        return []
    if not isinstance(value, dict):
        return [f"{where}: {value!r} is no press; write {{press: <class name>, args: {{...}}}}"]
    kinds = [kind for kind in catalogue() if re.search(rf"\b{kind}\b", wanted)]
    name = value.get("press")
    if name in catalogue() and kinds and not any(_is_a(name, kind, catalogue()) for kind in kinds):
        return [f"{where}: {name} is no {' or '.join(kinds)}, which is what goes here"]
    return _check_press(value, where)


def _fits(value: Any, annotation: ast.expr) -> bool:
    """Whether a YAML value fits an annotation; an annotation this does not know fits everything."""
    match annotation:
        case ast.Name(id=name) if name in _SCALARS:
            return isinstance(value, _SCALARS[name]) and (name == "bool" or not isinstance(value, bool))
        case ast.Constant(value=None):
            return value is None
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _fits(value, left) or _fits(value, right)
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return value is None or _fits(value, inner)
        case ast.Subscript(value=ast.Name(id="list" | "List"), slice=inner):
            return isinstance(value, list) and all(_fits(item, inner) for item in value)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=ast.Tuple(elts=options)):
            return any(isinstance(o, ast.Constant) and o.value == value for o in options)
    return True
