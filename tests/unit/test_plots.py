import itertools
import random
import warnings
from xml.etree import ElementTree

import pytest
import report_fixture as fixture
from matplotlib import pyplot as plt

from kvbench import intervals, plots, sheets, words
from kvbench.errors import UserError
from kvbench.results import BASELINE_COLOUR, baseline_of, colours, read_rows

SVG = "{http://www.w3.org/2000/svg}"


def drawn(tmp_path, cells, workload="chat"):
    stats = fixture.write(tmp_path, cells)["stats"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.draw(stats, workload, '{"code": "abc"}', tmp_path / "b.svg", tmp_path / "b.png")
    return ElementTree.parse(tmp_path / "b.svg")


def texts(tree):
    return ["".join(element.itertext()).strip() for element in tree.iter(f"{SVG}text")]


def overlaps(cells, workload="chat"):
    """Pairs of texts whose boxes overlap, and texts that leave the page."""
    with plt.rc_context(sheets.STYLE):
        figure = plots.bars(cells, workload)
        figure.draw_without_rendering()
        found = [text for text in figure.findobj(plt.Text) if text.get_text().strip() and text.get_visible()]
        boxes = [(text.get_text(), text.get_window_extent()) for text in found]
        page = figure.bbox
        plt.close(figure)
    outside = [t for t, b in boxes if b.x0 < page.x0 or b.x1 > page.x1 or b.y0 < page.y0 or b.y1 > page.y1]
    clashes = [
        (a, b)
        for (a, one), (b, other) in itertools.combinations(boxes, 2)
        if min(one.x1, other.x1) - max(one.x0, other.x0) > 0.5 and min(one.y1, other.y1) - max(one.y0, other.y0) > 0.5
    ]
    return clashes, outside


def many(count, models=("qwen3-8b", "smollm2-135m")):
    cells = []
    for model, index in itertools.product(models, range(count)):
        cell = fixture._cell("baseline" if index == 0 else "knorm-0.8", "chat", fixture.GPU, "standard")
        name = "baseline" if index == 0 else f"a-press-with-a-long-name-{index:02}"
        base = None if index == 0 else f"{model}/baseline"
        cells.append(cell | {"model": model, "method": name, "variant": f"{model}/{name}", "baseline": base})
    return cells


@pytest.mark.parametrize(
    "cells",
    [fixture.stats(), fixture.stats(fixture.GPU, "article"), many(2), many(20), many(40, ("one",))],
    ids=["cpu", "article", "two models", "forty", "forty of one model"],
)
def test_no_text_overlaps_or_leaves_the_page(cells):
    assert overlaps(cells) == ([], [])


def test_a_rerun_gives_identical_bytes(tmp_path):
    drawn(tmp_path, fixture.stats())
    first = (tmp_path / "b.svg").read_bytes(), (tmp_path / "b.png").read_bytes()
    plt.figure()  # other figures in the process change nothing
    drawn(tmp_path, fixture.stats())
    plt.close("all")
    assert first == ((tmp_path / "b.svg").read_bytes(), (tmp_path / "b.png").read_bytes())


def test_the_svg_keeps_text_as_text_and_its_provenance(tmp_path):
    tree = drawn(tmp_path, fixture.stats())
    assert {"knorm-0.8", "63% more", "80% less", "KV cache"} <= set(texts(tree))
    assert "chat: batch 4 × 256 prompt + 32 new tokens" in texts(tree)
    assert '{"code": "abc"}' in "".join(tree.getroot().itertext())


def test_a_cpu_shows_its_resident_set_and_a_gpu_its_vram(tmp_path):
    assert "Peak memory (resident set)" in texts(drawn(tmp_path, fixture.stats()))
    assert "Peak VRAM" in texts(drawn(tmp_path, fixture.stats(fixture.GPU)))


def test_the_article_protocol_shows_its_own_throughput(tmp_path):
    found = texts(drawn(tmp_path, fixture.stats(fixture.GPU, "article")))
    assert "Throughput, article’s way" in found and "Decode throughput" not in found


def test_missing_cells_say_why(tmp_path):
    cells = fixture.stats()
    fixture._blank(cells[0], "failed", None)
    found = texts(drawn(tmp_path, cells))
    assert "unsupported: FinchPress supports batches of 1 alone, the workload has 4 prompts" in found
    assert "failed" in found
    assert not any("% more" in text or "% less" in text for text in found), "no baseline, no change"


def test_nothing_measured_is_still_a_figure(tmp_path):
    cells = fixture.stats()
    for cell in cells:
        fixture._blank(cell, "failed", "boom")
        cell["device"] = cell["engine"] = cell["attention"] = None
    assert "Nothing was measured on this workload." in texts(drawn(tmp_path, cells))


def test_a_value_that_was_not_measured_is_no_bar(tmp_path):
    cells = fixture.stats()
    cells[1]["ttft_s"] = None
    assert "not measured" in texts(drawn(tmp_path, cells))


def test_simulated_methods_are_hatched_and_named(tmp_path):
    tree = drawn(tmp_path, fixture.stats())
    assert "adakv-snapkv-0.5 (simulated)" in texts(tree)
    assert "Hatched bar, simulated (adakv-snapkv-0.5): masks only, frees no byte." in texts(tree)
    assert tree.find(f".//{SVG}pattern") is not None


def test_names_are_never_read_as_mathematics(tmp_path):
    cells = fixture.stats()
    cells[1]["variant"] = r"$\alpha$<b>&"
    assert r"$\alpha$<b>&" in texts(drawn(tmp_path, cells))


def test_unknown_workload_and_unreadable_stats(tmp_path):
    stats = fixture.write(tmp_path)["stats"]
    with pytest.raises(UserError, match=r"no workload 'chats'.*chat, long"):
        plots.draw(stats, "chats", "{}", tmp_path / "b.svg", tmp_path / "b.png")
    assert not (tmp_path / "b.svg").exists()
    with pytest.raises(UserError, match="is missing"):
        read_rows(tmp_path / "nothing.parquet")
    (tmp_path / "broken.parquet").write_text("no")
    with pytest.raises(UserError, match="is no Parquet file"):
        read_rows(tmp_path / "broken.parquet")


def test_colours_follow_the_method():
    cells = many(9)
    palette = colours(cells)
    assert palette["baseline"] == BASELINE_COLOUR
    assert len({palette[f"a-press-with-a-long-name-{index:02}"] for index in range(1, 8)}) == 7


def test_a_baseline_of_another_model():
    cells = many(2)
    cells[3]["baseline"] = "qwen3-8b/baseline"
    assert baseline_of(cells[3], cells) is cells[0]
    cells[0]["status"] = "oom"
    assert baseline_of(cells[3], cells) is None


@pytest.mark.parametrize(
    ("value", "base", "expected"),
    [
        (50.47, 30.88, "63% more"),
        (1.79296875, 9.0, "80% less"),
        (1271.04, 564.47, "125% more"),
        (23.68, 30.88, "23% less"),
        (1.0, 1.0, "no change"),
        (1.0001, 1.0, "<0.1% more"),
        (0.996, 1.0, "0.4% less"),
        (20.0, 1.0, "1,900% more"),
        (0.0, 1.0, "100% less"),
        (1.0, 0.0, ""),
    ],
)
def test_change_in_words(value, base, expected):
    assert words.change_words(value, base) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1271.04, "1,271"), (3.4913, "3.49"), (9.996, "10.0"), (0, "0"), (0.0123, "0.0123"), (999.6, "1,000")],
)
def test_numbers(value, expected):
    assert words.number(value) == expected


def test_numbers_side_by_side_have_the_same_decimals():
    assert [words.number(value, 4, 30.88) for value in (30.88, 9.0, 1.79296875, 0.004)] == [
        "30.88",
        "9.00",
        "1.79",
        "0.0040",
    ]


def row(value, spread, column="decode_tokens_per_s", **more):
    known = {"device": fixture.CPU, "protocol": "standard", "repeats": 5}
    interval = {} if spread is None else {f"{column}_low": value - spread, f"{column}_high": value + spread}
    return known | {column: value} | interval | more


@pytest.mark.parametrize(
    ("mine", "base", "column", "verdict"),
    [
        (row(12, 1), row(10, 0.5), "decode_tokens_per_s", "more"),
        (row(8, 1), row(10, 0.5), "decode_tokens_per_s", "less"),
        (row(12, 1), row(10, 1), "decode_tokens_per_s", "indistinguishable"),
        (row(12, None), row(10, 1), "decode_tokens_per_s", "unknown"),
        (row(12, 1, repeats=3), row(10, 0.5), "decode_tokens_per_s", "more"),
        (row(12, 1, repeats=3), row(10, 0.5, repeats=3), "decode_tokens_per_s", "unknown"),
        (row(12, 1, device=fixture.GPU), row(10, 0.5), "decode_tokens_per_s", "elsewhere"),
        (row(9, None, "kv_cache_bytes"), row(9, None, "kv_cache_bytes"), "kv_cache_bytes", "equal"),
        (row(8, None, "kv_cache_bytes"), row(9, None, "kv_cache_bytes"), "kv_cache_bytes", "less"),
    ],
)
def test_a_difference_is_claimed_only_when_the_intervals_part(mine, base, column, verdict):
    change = words.compare(mine, base, column)
    assert change is not None and change.verdict == verdict


def test_a_peak_is_a_count_on_a_gpu_and_a_sample_on_a_cpu():
    column = "peak_generation_bytes"
    cpu, gpu = [
        words.compare(row(8, None, column, device=d), row(9, None, column, device=d), column)
        for d in (fixture.CPU, fixture.GPU)
    ]
    assert (cpu.verdict, gpu.verdict) == ("unknown", "less")


def test_intervals_say_what_they_are():
    assert words.interval_words(5) == "range of the repeats, a 94% interval of the median"
    assert words.interval_words(6) == "95% interval of the median"
    assert words.interval_words(1) == "no interval"


def test_intervals_of_one_distribution_part_as_often_as_is_said():
    assert intervals.by_chance(5, 5) == pytest.approx(2 / 252)
    assert intervals.by_chance(0, 5) == 1
    draw, parted, count = random.Random(0), 0, 40_000
    for _ in range(count):
        one, other = (intervals.interval([draw.random() for _ in range(n)]) for n in (12, 9))
        parted += one[1] < other[0] or other[1] < one[0]
    assert parted / count == pytest.approx(intervals.by_chance(12, 9), rel=0.25)


def test_cells_of_another_device_share_what_is_counted_and_nothing_that_is_timed():
    from kvbench import findings

    here = {"device": fixture.GPU, "protocol": "standard", "repeats": 6, "status": "ok", "model": "m", "workload": "w"}
    base = row(10, 0.1) | here | {"variant": "baseline", "baseline": "baseline", "kv_cache_bytes": 100}
    other = row(20, 0.1) | here | {"variant": "knorm", "baseline": "baseline", "kv_cache_bytes": 20, "device": "other"}
    assert words.compare(other, base, "decode_tokens_per_s").verdict == "elsewhere"
    assert words.compare(other, base, "kv_cache_bytes").verdict == "less"
    said = findings.headline([base, other], [], {})
    assert "no speeds can be compared" in said and "cuts the cache more than knorm (80% less)" in said
    assert "1 measured on another device" in findings.verdict_counts([base, other])
