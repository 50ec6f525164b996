"""The roofline figure: every mark in its place, no text over another, the same bytes on every run."""

import itertools
import warnings
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import report_fixture as fixture
from matplotlib import pyplot as plt

from kvbench import placing, roofline_plot, sheets
from kvbench.results import COLOURS, INK, MUTED, PAPER

SVG = "{http://www.w3.org/2000/svg}"
H100 = {"copy_bytes_per_s": 2.94e12, "matmul_flops_per_s": 7.1e14, "device": fixture.GPU, "dtype": "torch.bfloat16"}
BATCHES = [(64, 1024), (32, 4096), (8, 16384), (1, 1024), (16, 1024), (64, 4096), (4, 32768), (2, 512)]


def cell(method: str, batch: int, prompt: int, kept: float, reached: float) -> dict[str, Any]:
    """A cell of Qwen3-8B's size on an H100 that reaches a share of its limits."""
    step = 15.2e9 + 147456 * batch * prompt * kept, 15.2e9 * batch + 5.9e5 * batch * prompt * kept
    prompts = 15.2e9 + 147456 * batch * prompt, 13.9e9 * batch * prompt
    least = [max(moved / 2.94e12, done / 7.1e14) for moved, done in (prompts, step)]
    known = fixture._cell("baseline" if kept == 1 else "knorm-0.8", "chat", fixture.GPU, "standard")
    names = {"model": "qwen3-8b", "method": method, "variant": method, "workload": f"{batch}x{prompt}"}
    prefill = {"fastest_ttft_s": least[0], "prefill_bytes": prompts[0], "prefill_flops": prompts[1]}
    decode = {"fastest_tpot_s": least[1], "decode_step_bytes": step[0], "decode_step_flops": step[1]}
    return known | names | prefill | decode | H100 | {"ttft_s": least[0] / reached, "tpot_s": least[1] / reached}


def h100(workloads: int, methods: int) -> list[dict[str, Any]]:
    kept = [1.0, *(0.9 - 0.07 * index for index in range(methods - 1))]
    return [
        cell("baseline" if index == 0 else f"press-{index}", batch, prompt, share, 0.8 - 0.03 * index)
        for batch, prompt in BATCHES[:workloads]
        for index, share in enumerate(kept)
    ]


def failed() -> list[dict[str, Any]]:
    cells = fixture.stats()
    for one in cells:
        fixture._blank(one, "failed", "boom")
    return cells


CASES = {
    "default": fixture.stats(),
    "three workloads": h100(3, 4),
    "one cell": h100(1, 1),
    "many": h100(8, 12),
    "two devices": h100(3, 2) + fixture.stats(),
    "nothing": failed(),
    "article": fixture.stats(fixture.GPU, "article"),
}


def texts(cells: list[dict[str, Any]]) -> list[Any]:
    with plt.rc_context(sheets.STYLE):
        figure = roofline_plot.roofline(cells)
        figure.draw_without_rendering()
        found = [text for text in figure.findobj(plt.Text) if text.get_text().strip() and text.get_visible()]
        boxes = [(text.get_text(), text.get_window_extent(), figure.bbox) for text in found]
        plt.close(figure)
    return boxes


@pytest.mark.parametrize("name", CASES)
def test_no_text_overlaps_or_leaves_the_page(name: str) -> None:
    boxes = texts(CASES[name])
    for text, box, page in boxes:
        assert box.x0 >= page.x0 and box.x1 <= page.x1 and box.y0 >= page.y0 and box.y1 <= page.y1, text
    for (text, one, _), (under, other, _) in itertools.combinations(boxes, 2):
        across, up = min(one.x1, other.x1) - max(one.x0, other.x0), min(one.y1, other.y1) - max(one.y0, other.y0)
        assert across <= 0.5 or up <= 0.5, (text, under)


@pytest.mark.parametrize(("name", "workloads"), [("default", 2), ("three workloads", 3), ("many", 8)])
def test_every_workload_has_both_its_labels(name: str, workloads: int) -> None:
    found = [text for text, *_ in texts(CASES[name])]
    assert sum(", prefill " in text for text in found) == sum(", decode " in text for text in found) == workloads


def test_every_text_is_in_an_ink_that_follows_dark_mode() -> None:
    with plt.rc_context(sheets.STYLE):
        figure = roofline_plot.roofline(CASES["default"])
        found = [text for text in figure.findobj(plt.Text) if text.get_text().strip()]
        plt.close(figure)
    assert {text.get_color() for text in found} == {INK, MUTED}


def test_a_label_says_how_much_of_the_possible_was_reached() -> None:
    found = [text for text, *_ in texts(h100(1, 4))]
    assert "64x1024, decode 71 to 80%" in found and "64x1024, prefill 71 to 80%" in found
    assert "copies 2.94 TB/s" in found and "multiplies bfloat16 at 710 TFLOP/s" in found


def test_a_mark_stands_at_its_work_and_its_speed() -> None:
    (row,) = h100(1, 1)
    prefill, decode = roofline_plot.marks_of(row)
    assert (prefill.phase, decode.phase) == ("prefill", "decode")
    assert decode.intensity == row["decode_step_flops"] / row["decode_step_bytes"]
    assert decode.reached == row["decode_step_flops"] / row["tpot_s"]
    assert decode.share == pytest.approx(0.8)
    assert decode.reached == pytest.approx(0.8 * roofline_plot._roof(row).over(decode.intensity))
    assert len(list(roofline_plot.marks_of(row | {"decode_step_bytes": None}))) == 1


def test_colours_that_begin_again_are_hollow() -> None:
    cells = h100(1, 12)
    styles = placing.styles(cells)
    assert len(set(styles.values())) == 12
    assert styles["press-8"] == (COLOURS[0], False)
    assert placing.marker("o", *styles["press-8"])["markerfacecolor"] == PAPER


def test_what_has_no_mark_is_said() -> None:
    assert any("3 cells have no mark" in text for text, *_ in texts(CASES["default"]))
    assert any("no roofline to draw" in text for text, *_ in texts(CASES["nothing"]))


def test_a_rerun_gives_identical_bytes(tmp_path: Path) -> None:
    stats = fixture.write(tmp_path)["stats"]
    drawn = []
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            roofline_plot.draw(stats, '{"code": "abc"}', tmp_path / "r.svg", tmp_path / "r.png")
        drawn.append(((tmp_path / "r.svg").read_bytes(), (tmp_path / "r.png").read_bytes()))
    assert drawn[0] == drawn[1]
    tree = ElementTree.parse(tmp_path / "r.svg")
    assert '{"code": "abc"}' in "".join(tree.getroot().itertext())
    assert "decode step" in {"".join(element.itertext()).strip() for element in tree.iter(f"{SVG}text")}


@pytest.mark.parametrize(
    ("value", "expected"),
    [(2.94e12, "2.94 TB/s"), (7.1e14, "710 TB/s"), (9.996e11, "1 TB/s"), (27.04e9, "27 GB/s"), (5.0, "5 B/s")],
)
def test_rates_are_written_with_three_digits(value: float, expected: str) -> None:
    assert roofline_plot.si(value, "B/s") == expected
