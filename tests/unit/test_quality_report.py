"""The report's section on quality: what it says follows from the numbers, and it is whole without them."""

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import quality_fixture as made
import quality_page
import report_fixture
from test_report import Page

from kvbench import quality, quality_report, quality_stats, quality_words, report, retrieval, texts
from kvbench.outputs import OUTPUTS
from kvbench.scores import Scores, read

Row = dict[str, Any]


@pytest.fixture(scope="module")
def scores(quality_table: Path) -> Scores:
    return read(quality_table)


@pytest.fixture(scope="module")
def page(quality_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("page")
    report.write(quality_page.inputs(folder, quality_table), folder / "report.html")
    return Page((folder / "report.html").read_text("utf-8"))


def rendered(folder: Path, rows: list[Row], **more: Any) -> Page:
    """A page without figures whose quality.parquet has these rows."""
    pq.write_table(pa.Table.from_pylist(rows, quality_stats.QUALITY), folder / "q.parquet")
    given = quality_page.inputs(folder, **more)
    report.write(dataclasses.replace(given, quality=str(folder / "q.parquet")), folder / "report.html")
    return Page((folder / "report.html").read_text("utf-8"))


def said(scores: Scores) -> dict[str, str]:
    return {finding.about: finding.text for finding in quality_words.findings(scores)}


def changed(scores: Scores, variant: str, metric: str, **values: Any) -> Scores:
    """The same figures, but for those of one variant and metric (its overall row included by its name)."""
    return Scores(
        [row | values if (row["variant"], row["metric"]) == (variant, metric) else row for row in scores.rows]
    )


def test_the_page_is_whole_and_its_references_lead_somewhere(page: Page) -> None:
    assert page.open == [] and len(page.all("svg")) == 6
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) and "quality" in ids
    assert len(page.all("script")) == 1 and not page.all("img")


def test_words_name_who_is_as_good_who_is_worse_and_who_collapsed(scores: Scores) -> None:
    words = said(scores)
    assert words["Indistinguishable from the baseline"].startswith("expected-attention-0.5 (KL 1.1 × 10⁻⁴ nats, ")
    worse = words["Worse than the baseline"]
    assert worse.index("adakv") < worse.index("snapkv-0.5 (KL 0.0489") < worse.index("random-0.5")  # the least KL first
    assert "adakv-snapkv-0.5 (simulated) (KL 0.0229 nats)" in worse and "expected" not in worse
    assert words["Collapsed texts"].startswith("knorm-0.8 (9 of 10, and 1 of the baseline’s, KL 0.982 nats, ")
    assert "Not decided" not in words and "Better than the baseline" not in words


def test_words_on_random_pruning_and_noise(scores: Scores) -> None:
    words = said(scores)
    assert words["Against pruning at random"] == (
        "snapkv-0.5 and expected-attention-0.5: ahead of random-0.5 in KL, needle, multi-key needle,"
        " variable tracking and common words; adakv-snapkv-0.5 (simulated): ahead of random-0.5 in KL."
    )
    assert words["Noise floor"].startswith("baseline against itself has a KL of 1.1 × 10⁻⁹ nats in another batch shape")
    assert "expected-attention-0.5’s, is 0.98 times the greater" in words["Noise floor"]
    assert "distribution and texts of finch-0.5: unsupported, FinchPress needs a delimiter" in words["Without figures"]
    assert "retrieval of adakv-snapkv-0.5: out of memory" in words["Without figures"]


def test_what_changed_weights_cost_by_themselves_is_told(scores: Scores) -> None:
    assert "Changed weights" not in said(scores)
    row = scores.row("snapkv-0.5", "kl_mean", "all")
    assert row is not None
    dense = {**row, "metric": "kl_dense", "value": 0.0021, "verdict": None, "difference": None}
    dense["control_difference"] = None
    with_dense = Scores([*scores.rows, dense])
    assert said(with_dense)["Changed weights"] == (
        "snapkv-0.5 has a KL to the original of 0.00210 nats with nothing evicted, 0.0489 as it runs."
    )
    table = quality_report.section(with_dense, {}, [])["table"]
    place = [column.title for column in table["columns"]].index("KL, nothing evicted")
    assert [row["cells"][place]["value"] for row in table["rows"] if row["label"] == "snapkv-0.5"] == ["0.00210"]
    assert {row["cells"][place]["value"] for row in table["rows"]} == {"0.00210", "–"}


def test_what_is_not_decided_is_not_called_equal(scores: Scores) -> None:
    open_ = changed(scores, "expected-attention-0.5", "kl_mean", verdict="unknown")
    open_ = changed(open_, "expected-attention-0.5", "overall", verdict="unknown")
    words = said(open_)
    assert words["Not decided"] == "expected-attention-0.5 (too few observations: KL)."
    assert "Indistinguishable from the baseline" not in words
    assert "is not decided (KL 1.1 × 10⁻⁴ nats" in quality_words.price(open_, "expected-attention-0.5")


def test_without_a_baseline_there_were_not_too_few_observations(scores: Scores) -> None:
    lone = changed(scores, "snapkv-0.5", "kl_mean", verdict="unknown", difference=None, baseline_value=None)
    lone = changed(lone, "snapkv-0.5", "overall", verdict="unknown")
    assert said(lone)["Not decided"] == "snapkv-0.5 (nothing to compare with: KL)."


def test_a_figure_beside_the_baselines_is_of_what_both_have(scores: Scores) -> None:
    of = {"value": 0.3, "baseline_value": 0.98, "difference": -0.37}  # the baseline lacks the long prompts
    gap = changed(scores, "knorm-0.8", "retrieval_accuracy", **of)
    variant = next(row for row in gap.variants if row["variant"] == "knorm-0.8")
    assert "61% against 98%" in quality_words._retrieval(gap, variant)
    assert "61.0%" in [line["value"] for line in quality_report._evidence(gap, variant)]


def test_an_open_verdict_without_figures_leaves_the_headline_to_the_texts(scores: Scores) -> None:
    only_texts = Scores([row for row in scores.rows if row["metric"] in ("collapsed", "overall")])
    assert quality_words.price(changed(only_texts, "snapkv-0.5", "overall", verdict="unknown"), "snapkv-0.5") == ""


def test_what_else_is_worse_is_named_where_kl_and_retrieval_are_not(scores: Scores) -> None:
    alike = changed(scores, "snapkv-0.5", "kl_mean", verdict="indistinguishable")
    alike = changed(alike, "snapkv-0.5", "retrieval_accuracy", verdict="indistinguishable")
    assert quality_words.price(alike, "snapkv-0.5").endswith("against 98%, top-1 agreement, perplexity)")


def test_behind_random_is_said_too(scores: Scores) -> None:
    behind = changed(scores, "snapkv-0.5", "kl_mean", control_low=0.1, control_high=0.2)
    assert "snapkv-0.5: ahead of random-0.5 in needle" in said(behind)["Against pruning at random"]
    assert "behind random-0.5 in KL" in said(behind)["Against pruning at random"]
    alike = changed(scores, "snapkv-0.5", "kl_mean", control_low=-0.1, control_high=0.2)
    assert "not told apart from random-0.5 in KL" in said(alike)["Against pruning at random"]


def test_a_task_that_the_baseline_fails_is_no_evidence(scores: Scores) -> None:
    rows = [
        row | {"value": 0.02, "baseline_value": 0.02, "verdict": None}
        if row["metric"] == "retrieval_accuracy" and row["slice"] == "multikey" and row["status"] == "ok"
        else row
        for row in scores.rows
    ]
    hard = Scores(rows)
    assert said(hard)["Too hard for the baseline"] == "multi-key needle (2% right for baseline)."
    assert "multi-key" not in said(hard)["Worse than the baseline"]
    assert "multi-key" not in quality_words.price(hard, "knorm-0.8")


def test_the_headline_names_quality_beside_speed(page: Page) -> None:
    assert (
        "knorm-0.8 decodes 63% more tokens a second than the baseline on chat, with 80% less cache; its texts collapsed"
        " (9 of 10, and 1 of the baseline’s, KL 0.982 nats, multi-key needle 1% against 98%)." in page.words
    )
    assert "Quality of 5 variants: 1 indistinguishable from the baseline, 3 worse and 1 collapsed." in page.words


@pytest.mark.parametrize(
    ("variant", "start"),
    [
        ("snapkv-0.5", "; worse than the baseline in quality (KL 0.0489 nats, "),
        ("expected-attention-0.5", "; indistinguishable from the baseline in quality (KL 1.1 × 10⁻⁴ nats, "),
        ("baseline", ""),
        ("finch-0.5", ""),
        ("of another run", ""),
    ],
)
def test_the_price_of_a_variant(scores: Scores, variant: str, start: str) -> None:
    price = quality_words.price(scores, variant)
    assert price.startswith(start) and bool(price) == bool(start)


def test_the_table_has_figures_intervals_and_differences(scores: Scores) -> None:
    table = quality_report.section(scores, made.plan()["config"], [])["table"]
    titles = [(column.title, column.unit) for column in table["columns"]]
    assert titles[0] == ("KL", "mean, nats") and ("Needle", "% right") in titles and ("Collapsed", "texts") in titles
    row = next(row for row in table["rows"] if row["label"] == "snapkv-0.5")
    assert (row["verdict"], row["judged"], row["kept"]) == ("worse", "worse", "50%")
    kl, needle = row["cells"][0], row["cells"][titles.index(("Needle", "% right"))]
    assert kl["value"] == "0.0489" and kl["interval"] == "0.0418 to 0.0548"
    assert [(c.against, c.text, c.judged) for c in kl["changes"]] == [
        ("baseline", "+0.0488", "worse"),
        ("random", "−0.244", ""),
    ]
    assert needle["value"] == "63.3" and needle["changes"][0].text == "−34.6 points"
    collapsed = row["cells"][titles.index(("Collapsed", "texts"))]
    assert collapsed["value"] == "1 of 10" and collapsed["changes"][0].text == "(±0 points)"
    base = next(row for row in table["rows"] if row["baseline"])
    assert base["cells"][0]["why"] == "noise floor" and base["verdict"] == "baseline"
    finch = next(row for row in table["rows"] if row["label"] == "finch-0.5")
    assert {cell["why"] for cell in finch["cells"]} == {"unsupported", "failed"} and finch["verdict"] == "unsupported"


def test_the_evidence_is_what_the_verdicts_rest_on(scores: Scores, page: Page) -> None:
    lines = quality_report.section(scores, {}, [])["evidence"]
    assert {line["figure"] for line in lines if line["label"] == "snapkv-0.5"} == {
        *("KL", "top-1 agreement", "perplexity", "needle", "multi-key needle", "variable tracking", "common words"),
        "collapsed texts",
    }
    assert not any(line["label"] in ("baseline", "finch-0.5") for line in lines)
    kl = next(line for line in lines if (line["label"], line["figure"]) == ("snapkv-0.5", "KL"))
    assert (kl["p"], kl["verdict"], kl["control"]) == ("0.001", "worse", "−0.244")
    assert "lies within the margin on both sides and comes from at least 6 documents: 0.01 nats of KL" in page.words


def test_settings_are_said(page: Page) -> None:
    assert "A prefix of 64 tokens is compressed, and the 24 tokens after it are read with the full cache" in page.words
    assert "a window is of one conversation or chapter alone, cut wherever in its text" in page.words
    assert "prompts of 512 and 1,024 tokens at 3 depths, 40 samples each; the question is no part of what" in page.words


def test_the_tables_of_speed_name_the_verdict(page: Page) -> None:
    assert "knorm-0.8 collapsed 89.4" in page.words.replace("0.8collapsed", "0.8 collapsed").replace("d89", "d 89")


def test_collapsed_texts_are_marked_and_counted_as_in_the_table(page: Page, scores: Scores) -> None:
    marked = page.words.count("collapsed · ")
    rows = [row for row in scores.rows if row["metric"] == "collapsed" and row["status"] == "ok"]
    assert marked == sum(round(row["value"] * row["n"]) for row in rows) > 5
    cards = [a for a in page.all("article") if a["data-variant"] == "knorm-0.8"]
    assert sum(float(card["data-distance"]) > 1 for card in cards) == 8  # one of the nine fell with its baseline
    assert all(float(a["data-distance"]) == 0 for a in page.all("article") if a["data-variant"] == "baseline")
    assert "2 of 6 texts collapsed" in page.words


def test_reasons_and_names_are_escaped(scores: Scores, tmp_path: Path) -> None:
    evil = f"{report_fixture.EVIL}\x00\u202e{{{{ 7*7 }}}}"
    rows = [row | {"status_reason": evil} if row["status"] != "ok" else row for row in scores.rows]
    page = rendered(tmp_path, rows)
    assert len(page.all("script")) == 1 and "<script>alert(1)</script>␀⟦U+202E⟧{{ 7*7 }}" in page.words


def test_without_any_row_the_page_is_whole(tmp_path: Path) -> None:
    page = rendered(tmp_path, [])
    assert page.open == [] and "No figure of quality came out of this run" in page.words
    assert "none of its 10 texts equals the baseline’s" in page.words  # the headline falls back on the texts
    assert "Quality of" not in page.words


def test_random_weights_are_not_judged(tmp_path: Path) -> None:
    reason = "random weights have no tokenizer, and their text would mean nothing"
    for stage, schema in (("quality", quality.QUALITY), ("retrieval", retrieval.RETRIEVAL), ("outputs", OUTPUTS)):
        for method in made.METHODS:
            row = {"model": made.MODEL, "method": method, "status": "unsupported", "status_reason": reason}
            made.parquet([row], schema, tmp_path / stage / made.MODEL / f"{method}.parquet")
    page = rendered(tmp_path, quality_stats.merge(made.plan(), tmp_path))
    assert "No figure of quality came out of this run" in page.words
    assert f"distribution, retrieval and texts of every variant: unsupported, {reason}" in page.words
    assert "Verdict" not in page.words


def test_what_of_a_stage_did_not_come_out_is_named(scores: Scores) -> None:
    def lacking(part: str, **more: Any) -> Row:
        row = next(
            r for r in scores.rows if (r["variant"], r["slice"]) == ("snapkv-0.5", part.split("/", maxsplit=1)[0])
        )
        blank = dict.fromkeys(("value", "low", "high", "n", "difference", "verdict"))
        return row | blank | {"slice": part, "status": "unsupported", "status_reason": "too long"} | more

    points = Scores([*scores.rows, lacking("needle/4096/0"), lacking("needle/4096/1")])
    assert list(points.gaps("snapkv-0.5")) == ["needle at 4,096 tokens"]
    assert "needle at 4,096 tokens of snapkv-0.5: unsupported, too long" in said(points)["Without figures"]
    kept = [r for r in scores.rows if (r["variant"], r["slice"].split("/")[0]) != ("snapkv-0.5", "needle")]
    task = Scores([*kept, lacking("needle"), lacking("needle/512/0")])
    assert list(task.gaps("snapkv-0.5")) == ["needle"]
    row = next(r for r in quality_report.section(task, {}, [])["table"]["rows"] if r["label"] == "snapkv-0.5")
    assert [cell["why"] for cell in row["cells"]].count("unsupported") == 1
    dtype = [r for r in scores.rows if r["reference"] != "dtype"]
    floor = next(r for r in scores.rows if r["reference"] == "dtype")
    floors = Scores([*dtype, floor | {"status": "failed", "status_reason": "boom", "value": None}])
    assert list(floors.gaps("baseline")) == ["noise floor in another dtype"]


@pytest.mark.parametrize("off", [{"windows": 0}, {"retrieval": {"samples": 0, "tasks": []}}])
def test_a_stage_that_the_config_leaves_out_is_left_out(off: Row, tmp_path: Path) -> None:
    table = quality_page.quality(tmp_path, **off)
    found = read(table)
    section = quality_report.section(found, made.plan(**off)["config"], quality_page.quality_figures(tmp_path, table))
    titles = {column.title for column in section["table"]["columns"]}
    assert ("KL" in titles) == ("windows" not in off) and ("Needle" in titles) == ("windows" in off)
    assert len(section["figures"]) == (1 if "windows" in off else 2)
    assert len(section["settings"]) == 1
    assert "Noise floor" not in said(found) or "windows" not in off


def test_both_ways_of_the_articles_protocol_have_their_columns(scores: Scores) -> None:
    batch = [row | {"slice": "outputs/batch"} for row in scores.rows if row["slice"] == "outputs"]
    table = quality_report.section(Scores([*scores.rows, *batch]), {}, [])["table"]
    assert [column.unit for column in table["columns"]][-2:] == ["padded batch", "texts, padded batch"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, "0"), (1.09e-9, "1.1 × 10⁻⁹"), (0.00099, "9.9 × 10⁻⁴"), (0.0489, "0.0489"), (1.5, "1.50")],
)
def test_nats(value: float, expected: str) -> None:
    assert quality_words.nats(value) == expected


def test_percent_says_all_and_none_only_where_that_is_meant() -> None:
    assert [quality_words.percent(share) for share in (0.0, 0.001, 0.5, 0.999, 1.0)] == ["0", "1", "50", "99", "100"]


def test_a_prompt_is_farther_the_less_it_shares() -> None:
    rows = [row for method in made.METHODS for row in made.outputs(method)]
    collected = texts.collect(rows, quality_page.cells(), {})
    cards = {card.variant: card for card in collected.prompts[1].cards}
    assert cards["baseline"].distance == cards["expected-attention-0.5"].distance == 0
    assert 0 < cards["snapkv-0.5"].distance < cards["knorm-0.8"].distance
    assert [tally.collapsed for tally in collected.tallies if tally.variant == "knorm-0.8"] == [9]
