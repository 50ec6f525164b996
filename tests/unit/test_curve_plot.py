"""The training curve: every line labelled, no label on another, the same bytes on every run."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib import pyplot as plt

from kvbench import curve_plot, report, sheets
from kvbench.errors import UserError


def rows(steps: int, corpora: tuple[str, ...] = ("conversations", "book")) -> list[dict[str, Any]]:
    found = []
    for step in range(0, steps + 1, max(1, steps // 6)):
        asked = 1 + 3 * min(1, step / max(1, 0.7 * steps))
        shared = {"step": step, "seconds": step / 10, "asked_compression": asked}
        nothing = {"kl_off": None, "top1_agreement": None}
        found.append(shared | nothing | {"corpus": "train", "kl": 1e-3 * step, "kept_fraction": 1 / asked})
        for place, corpus in enumerate(corpora):
            cost = {"kl": 1.1e-3 * step * (1 + place / 50), "kl_off": 2e-4 * step, "top1_agreement": 0.9}
            found.append(shared | cost | {"corpus": corpus, "kept_fraction": 1 / asked + place / 200})
    return found


CASES = {"usual": rows(1200), "one step": rows(1), "one corpus": rows(90, ("file",)), "not begun": rows(0)}


@pytest.mark.parametrize("case", CASES)
def test_labels_name_every_line_and_stay_apart(case: str) -> None:
    with plt.rc_context(sheets.STYLE):
        drawn = curve_plot.figure(CASES[case], case)
        drawn.canvas.draw()
        for axes in drawn.axes:
            labels = [text for text in axes.texts if text.get_text()]
            boxes = [text.get_window_extent() for text in labels]
            assert len(labels) == len(axes.lines)
            for place, box in enumerate(boxes):
                assert not any(box.overlaps(other) for other in boxes[:place])
                assert box.x1 <= drawn.bbox.x1 and box.y0 >= 0
    plt.close(drawn)


def test_the_same_curve_gives_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "curve.parquet"
    pq.write_table(pa.Table.from_pylist(CASES["usual"]), path)
    made = []
    for _ in range(2):
        curve_plot.draw(path, "mine", "{}", tmp_path / "curve.svg", tmp_path / "curve.png")
        made.append((tmp_path / "curve.svg").read_bytes() + (tmp_path / "curve.png").read_bytes())
    assert made[0] == made[1] and "Training of mine" in (tmp_path / "curve.svg").read_text("utf-8")


def test_a_curve_without_rows_is_said(tmp_path: Path) -> None:
    path = tmp_path / "curve.parquet"
    pq.write_table(pa.Table.from_pylist(CASES["usual"]).slice(0, 0), path)
    with pytest.raises(UserError, match="has no rows"):
        curve_plot.draw(path, "mine", "{}", tmp_path / "x.svg", tmp_path / "x.png")


def test_the_report_finds_the_curves_among_its_figures(tmp_path: Path) -> None:
    path = tmp_path / "curve.parquet"
    pq.write_table(pa.Table.from_pylist(CASES["usual"]), path)
    curve_plot.draw(path, "mine-4x", "{}", tmp_path / "retrofit-mine-4x.svg", tmp_path / "x.png")
    ((name, drawing),) = report._curves([str(tmp_path / "bars-chat.svg"), str(tmp_path / "retrofit-mine-4x.svg")])
    assert name == "mine-4x" and drawing.startswith("<svg") and "Training of mine-4x" in drawing
