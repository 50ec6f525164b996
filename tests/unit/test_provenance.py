"""Fingerprints change when the code that can reach a result does, and at nothing else."""

from pathlib import Path

import pytest

from conftest import SCRIPTS
from kvbench import provenance

FILES = {
    "job.py": "from kvbench import used\nused.f()\n",
    "kvbench/__init__.py": "",
    "kvbench/used.py": (
        'DATA = ("pages",)\n\ndef f():\n    """Doc."""\n    from kvbench.lazy import g\n    return g()\n'
    ),
    "kvbench/lazy.py": "import json\n\ndef g():\n    return 1  # why\n",
    "kvbench/unused.py": "X = 1\n",
    "kvbench/pages/page.html": "<p>",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def after(tree: Path, name: str, text: str) -> bool:
    """Whether writing ``text`` to a file changes the fingerprint."""
    before = provenance.fingerprint.__wrapped__(tree / "job.py")
    (tree / name).write_text(text)
    return provenance.fingerprint.__wrapped__(tree / "job.py") != before


def test_reach(tree: Path) -> None:
    found = {path.relative_to(tree).as_posix() for path in provenance.reachable(tree / "job.py")}
    assert found == set(FILES) - {"kvbench/unused.py"}


ON_DEVICE = "measure outputs quality retrieval evaluate_tasks"
TRAINING = "corpus retrofit"


@pytest.mark.parametrize(
    ("module", "scripts"),
    [
        ("sheets", "plots roofline quality_plots curve"),
        ("roofline", "stats"),
        ("device", f"{ON_DEVICE} {TRAINING} windows rates"),
        ("architecture", f"{ON_DEVICE} {TRAINING} windows stats"),
        ("methods", f"{ON_DEVICE} {TRAINING} windows"),
        ("cache", ON_DEVICE),
        ("workload", f"{TRAINING} windows workload"),
        ("book", f"{TRAINING} windows retrieval"),
        ("dms/prose", TRAINING),
        ("windows", "windows"),
        ("needles", "retrieval"),
        ("paired", "quality_stats"),
        ("text_metrics", "quality_stats report"),
        ("grid", "evaluate_tasks"),
    ],
)
def test_the_scripts_that_a_module_can_change(module: str, scripts: str) -> None:
    path = SCRIPTS / "kvbench" / f"{module}.py"
    found = {script.stem for script in SCRIPTS.glob("*.py") if path in provenance.reachable(script)}
    assert found == set(scripts.split())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("kvbench/lazy.py", FILES["kvbench/lazy.py"].replace("# why", "# another why")),
        ("kvbench/lazy.py", FILES["kvbench/lazy.py"].replace("\n\n", "\n\n\n")),
        ("kvbench/used.py", FILES["kvbench/used.py"].replace("Doc.", "Better doc.")),
        ("kvbench/unused.py", "X = 2\n"),
        ("job.py", FILES["job.py"]),
    ],
)
def test_what_changes_nothing(tree: Path, name: str, text: str) -> None:
    assert not after(tree, name, text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("kvbench/lazy.py", FILES["kvbench/lazy.py"].replace("1", "2")),
        ("kvbench/pages/page.html", "<div>"),
        ("kvbench/__init__.py", "X = 1\n"),
        ("job.py", "from kvbench import used\n"),
    ],
)
def test_what_changes_it(tree: Path, name: str, text: str) -> None:
    assert after(tree, name, text)


def test_canonical_ignores_the_order_of_keys() -> None:
    assert provenance.canonical({"b": {"d": 1, "c": 2}, "a": "é"}) == provenance.canonical(
        {"a": "é", "b": {"c": 2, "d": 1}}
    )
