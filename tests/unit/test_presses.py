"""The catalogue that is read from kvpress's source equals what importing it shows."""

import inspect
from types import SimpleNamespace

import kvpress
import pytest

from kvbench import presses

CLASSES = [c for c in vars(kvpress).values() if isinstance(c, type) and issubclass(c, kvpress.BasePress)]


def test_every_press_is_in_the_catalogue() -> None:
    assert {c.__name__ for c in CLASSES} == set(presses.catalogue())


@pytest.mark.parametrize("press", CLASSES, ids=lambda c: c.__name__)
def test_a_press_takes_the_arguments_that_its_constructor_takes(press: type) -> None:
    signature = inspect.signature(press).parameters.values()
    public = {p.name: p.default is inspect.Parameter.empty for p in signature if not p.name.startswith("_")}
    assert {a.name: a.required for a in presses.catalogue()[press.__name__].arguments.values()} == public


def test_no_import_of_kvpress_is_needed() -> None:
    import subprocess
    import sys

    probe = "import sys; from kvbench import presses; presses.catalogue(); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", probe], text=True).strip() == "False"


@pytest.mark.parametrize("press", CLASSES, ids=lambda c: c.__name__)
def test_whether_a_ratio_can_be_set_is_what_setting_it_shows(press: type) -> None:
    settable = presses.catalogue()[press.__name__].ratio
    made = press.__new__(press)
    made.__dict__["press"] = SimpleNamespace()
    if settable:
        made.compression_ratio = 0.25
        assert made.compression_ratio == 0.25
    elif settable is False:
        with pytest.raises(AttributeError):
            made.compression_ratio = 0.25
    else:
        assert not hasattr(press, "compression_ratio")
