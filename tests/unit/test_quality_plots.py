"""The figures of quality: every mark and field in its place, no text over another, the same bytes on every run."""

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quality_page
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from kvbench import placing, quality_plots, retrieval_plot, sheets
from kvbench.scores import Scores, read

PRESSES = "snapkv expected-attention tova streaming-llm keydiff knorm random lagkv adakv-snapkv compactor".split()
COSTS = [0.1307, 0.1346, 0.157, 0.182, 0.2996, 0.477, 1.07, 0.14, 0.09, 0.135]
COLUMNS = "control status_reason verdict simulated low high baseline_value control_low control_high".split()
LENGTHS, DEPTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768), (0, 0.25, 0.5, 0.75, 1)
MAKERS = (quality_plots.by_kept_fraction, quality_plots.by_distance, retrieval_plot.heat_maps)


def run(methods: dict[str, tuple[float, float]], models: tuple[str, ...] = ("smollm2",), floor: float = 2e-6) -> Scores:
    """Rows of many variants: mean KL and kept fraction of each, drawn a little apart by corpus and distance."""
    rows, rng = [], np.random.default_rng(0)
    for model in models:
        start = "" if len(models) == 1 else f"{model}/"
        for method, (kl, kept) in {"baseline": (floor, 1.0), **methods}.items():
            known = dict.fromkeys(COLUMNS) | {"model": model, "method": method, "variant": start + method, "n": 50}
            known |= {"baseline": None if method == "baseline" else f"{start}baseline", "status": "ok"}
            known |= {"kept_fraction": kept}
            reference = "dtype" if method == "baseline" else "full"
            for corpus, bucket in itertools.product(("all", "own", "book"), ("", "/1-16", "/17-64", "/65-128")):
                value = kl * rng.uniform(0.7, 1.4)
                ends = {"value": value, "low": value * 0.8, "high": value * 1.3}
                rows.append(known | ends | {"metric": "kl_mean", "slice": corpus + bucket, "reference": reference})
            rows.append(known | {"metric": "retrieval_accuracy", "slice": "needle", "reference": None, "value": 0.5})
            for length, depth in itertools.product(LENGTHS, DEPTHS):
                point = {"slice": f"needle/{length}/{depth:g}", "value": float(rng.uniform())}
                rows.append(known | {"metric": "retrieval_accuracy", "reference": None} | point)
            rows.append(known | {"metric": "overall", "slice": "all", "reference": None, "value": None})
    return Scores(rows)


DENSE = run({name: (kl, 0.234) for name, kl in zip(PRESSES, COSTS, strict=True)})
SWEPT = run(
    {f"{name}-{kept}": (kl / kept, kept) for name, kl in zip(PRESSES[:3], COSTS, strict=False) for kept in (0.5, 0.1)},
    ("qwen3-8b", "llama-3.1-8b-instruct"),
    1e-2,
)
ONE = run({"knorm-0.8": (0.4, 0.2)})
NONE = Scores([])


@pytest.fixture(scope="module")
def fixture(quality_table: Path) -> Scores:
    return read(quality_table)


def texts(make: Callable[[Scores], Figure], scores: Scores) -> list[Any]:
    with plt.rc_context(sheets.STYLE):
        figure = make(scores)
        figure.draw_without_rendering()
        found = [text for text in figure.findobj(plt.Text) if text.get_text().strip() and text.get_visible()]
        boxes = [(text.get_text(), text.get_window_extent(), figure.bbox) for text in found]
        plt.close(figure)
    return boxes


def check(boxes: list[Any]) -> None:
    for text, box, page in boxes:
        assert box.x0 >= page.x0 and box.x1 <= page.x1 and box.y0 >= page.y0 and box.y1 <= page.y1, text
    for (text, one, _), (under, other, _) in itertools.combinations(boxes, 2):
        across, up = min(one.x1, other.x1) - max(one.x0, other.x0), min(one.y1, other.y1) - max(one.y0, other.y0)
        assert across <= 0.5 or up <= 0.5, (text, under)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("scores", [DENSE, ONE, NONE], ids=["dense", "one", "none"])
def test_no_text_overlaps_or_leaves_the_page(make: Any, scores: Scores) -> None:
    check(texts(make, scores))


@pytest.mark.parametrize("make", MAKERS[:2])
def test_nor_where_models_are_several(make: Any) -> None:
    boxes = texts(make, SWEPT)
    check(boxes)
    words = [text for text, *_ in boxes]
    assert words.count("qwen3-8b") == 1 and words.count("snapkv-0.1") >= 2  # once a model, without the model's name


@pytest.mark.parametrize("make", MAKERS)
def test_the_fixture_in_each_figure(make: Any, fixture: Scores) -> None:
    check(texts(make, fixture))


@pytest.mark.parametrize("make", MAKERS[:2])
def test_every_variant_has_its_name(make: Any) -> None:
    words = [text for text, *_ in texts(make, DENSE)]
    assert set(PRESSES) <= set(words)


def test_where_there_is_nothing_it_is_said() -> None:
    assert [text for text, *_ in texts(quality_plots.by_distance, NONE)] == [
        "No variant has a KL divergence by distance."
    ]
    assert "No variant has an accuracy" in texts(retrieval_plot.heat_maps, NONE)[0][0]


def test_the_noise_floor_is_a_band_or_named_where_it_is_far_below() -> None:
    def floor_words(scores: Scores) -> list[str]:
        return [text for text, *_ in texts(quality_plots.by_kept_fraction, scores) if text.startswith("noise floor")]

    assert floor_words(SWEPT) == ["noise floor"] * 4  # two models, two corpora
    assert all(text.startswith("noise floor far below: ") for text in floor_words(DENSE))


def test_marks_stand_at_their_kept_fraction_and_their_kl() -> None:
    with plt.rc_context(sheets.STYLE):
        figure = quality_plots.by_kept_fraction(ONE)
    marks = [line.get_xydata()[0] for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert marks[0] == pytest.approx([0.2, ONE.value("knorm-0.8", "kl_mean", "own")])
    plt.close(figure)


def test_who_has_no_mark_is_said_and_why(fixture: Scores) -> None:
    words = " ".join(text for text, *_ in texts(quality_plots.by_kept_fraction, fixture))
    assert "Without a mark: finch-0.5 (unsupported)." in words
    assert "adakv-snapkv-0.5 (simulated)" in words
    assert "1.1 × 10⁻⁹ in another batch shape and 1.1 × 10⁻⁴ in another dtype" in words


def test_each_field_has_its_percentage_and_the_samples_are_counted(fixture: Scores) -> None:
    words = [text for text, *_ in texts(retrieval_plot.heat_maps, fixture)]
    assert words.count("out of memory") == 4 and words.count("failed") == 4  # a task each
    fields = [text for text in words if text.isdigit() and int(text) <= 100]
    assert len(fields) == 5 * (3 * 6 + 2)  # five variants, three tasks of 2 × 3 fields and words at two lengths
    value = fixture.value("snapkv-0.5", "retrieval_accuracy", "needle/512/0.5")
    assert value is not None and f"{100 * value:.0f}" in fields
    assert "n = 40 samples a field. Darker: fewer are right. –: did not come out." in words


def test_narrow_maps_keep_their_titles_apart(fixture: Scores) -> None:
    check(texts(retrieval_plot.heat_maps, Scores([row for row in fixture.rows if "/1024" not in row["slice"]])))


def test_a_rerun_gives_identical_bytes(quality_table: Path, tmp_path: Path) -> None:
    drawn = []
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for name in quality_page.KL:
                quality_plots.draw(quality_table, name, "{}", tmp_path / f"{name}.svg", tmp_path / f"{name}.png")
            picture = tmp_path / "retrieval.svg"
            retrieval_plot.draw(quality_table, '{"code": "abc"}', picture, picture.with_suffix(".png"))
        drawn.append([path.read_bytes() for path in sorted(tmp_path.iterdir())])
    assert len(drawn[0]) == 6 and drawn[0] == drawn[1]
    assert '"code": "abc"' in (tmp_path / "retrieval.svg").read_text("utf-8").replace("&quot;", '"')


@given(st.lists(st.floats(-1e3, 1e3), max_size=30), st.floats(1, 50))
def test_spread_labels_are_apart_in_their_order_and_within(places: list[float], apart: float) -> None:
    low, high = -2000.0, 2000.0
    found = placing.spread(places, apart, low, high)
    ordered = [place for _, place in sorted(zip(places, found, strict=True))]
    assert all(later - earlier >= apart * 0.999 for earlier, later in itertools.pairwise(ordered))
    assert all(low - 1e-6 <= place <= high + 1e-6 for place in found)


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 100), st.floats(0, 40)), max_size=12))
def test_marks_beside_each_other_do_not_meet(marks: list[tuple[float, float, float]]) -> None:
    spots = [(x, low, low + tall) for x, low, tall in marks]
    shifts = placing.beside(spots, 10.0)
    moved = [(x + shift, low, high) for (x, low, high), shift in zip(spots, shifts, strict=True)]
    for (x, low, high), (other, below, above) in itertools.combinations(moved, 2):
        assert abs(x - other) >= 9.999 or low >= above or below >= high
    assert shifts[:1] in ([], [0.0])
