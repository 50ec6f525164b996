import re
from html.parser import HTMLParser

import pytest
import report_fixture as fixture
from hypothesis import given
from hypothesis import strategies as st

from kvbench import findings, plots, report, roofline_plot, svg, texts
from kvbench.errors import UserError


class Page(HTMLParser):
    """Elements, attributes and text of a page, as a browser would see them."""

    VOID = frozenset(["meta", "link", "input", "br", "img"])

    def __init__(self, source):
        super().__init__()
        self.elements, self.open, self.text = [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self):
        return " ".join("".join(self.text).split())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def rendered(tmp_path, cells=None, outputs=None, figures=True, **more):
    paths = fixture.write(tmp_path, cells, outputs)
    drawn = []
    names = dict.fromkeys(cell["workload"] for cell in (fixture.stats() if cells is None else cells))
    for name in names if figures else ():
        drawn.append(tmp_path / f"bars-{name}.svg")
        plots.draw(paths["stats"], name, "{}", drawn[-1], tmp_path / f"bars-{name}.png")
    if figures:
        drawn.append(tmp_path / "roofline.svg")
        roofline_plot.draw(paths["stats"], "{}", drawn[-1], tmp_path / "roofline.png")
    provenance = {"script": "report", "code": "0123456789abcdef"}
    inputs = report.Inputs(**(paths | {"plots": drawn, "provenance": provenance} | more))
    report.write(inputs, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return rendered(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(source):
    return Page(source)


def test_everything_opened_is_closed(page):
    assert page.open == []


def test_what_models_and_data_wrote_never_becomes_markup(page):
    assert len(page.all("script")) == 1 and not page.all("img")
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert fixture.EVIL in page.words and "{{ 7*7 }}" in page.words and "</script><!--" in page.words


def test_only_our_script_may_run_and_nothing_is_fetched(source, page):
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy
    addresses = [a.get(key) for _, a in page.elements for key in ("src", "href", "action", "data") if a.get(key)]
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert not re.search(r"url\((?!#)|@import", source)


def test_control_and_direction_characters_are_shown_by_name(source, page):
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\u2028\u202e]", source)
    assert "␀␇" in page.words and "⟦U+202E⟧" in page.words and "⟦U+2028⟧" in page.words


def test_ids_are_unique_and_references_lead_somewhere(source, page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = re.findall(r'(?:href="|url\()#([\w-]+)', source)
    assert wanted and set(wanted) <= set(ids)


def test_the_headline_names_the_gain_and_its_price(page):
    assert (
        "knorm-0.8 decodes 63% more tokens a second than the baseline on chat, with 80% less cache;"
        " none of its 6 texts equals the baseline’s." in page.words
    )
    assert "7 comparisons of throughput: 4 faster than the baseline, 2 slower and 1 indistinguishable" in page.words


def test_every_cell_is_in_the_table(page):
    for method in fixture.METHODS:
        assert page.words.count(method) >= 2
    assert "out of memory: prefill needs 93.2 GiB, the device has 79.2 GiB" in page.words
    assert "indistinguishable from the baseline: expected-attention-0.5" in page.words
    assert "53.7 to 55.9" in page.words and "Not measured here:" in page.words


def test_limits_stand_beside_what_they_limit(page):
    found = ["TTFT", "Fastest possible TTFT", "TPOT", "Fastest possible TPOT", "MBU", "MFU"]
    row = page.words.split("Every repeat")[1].split("Repeats")[0]
    assert [row.index(title) for title in found] == sorted(row.index(title) for title in found)
    assert "TPOT ms Fastest possible TPOT ms" in " ".join(row.replace("ms", " ms ").split())
    assert "How near the device’s limits" in page.words and "multiplies float32 at 500 GFLOP/s" in page.words


def test_no_roofline_where_nothing_has_limits(tmp_path):
    page = Page(rendered(tmp_path, fixture.stats(fixture.GPU, "article")))
    assert "How near the device’s limits" not in page.words and "no roofline to draw" not in page.words


def test_missing_cells_say_what_would_bring_them(page):
    assert "3 of 12 cells have no numbers" in page.words
    assert "rm -f results/prefill/smollm2-135m/finch-0.5/long.json" in page.words
    assert "No rerun changes this" in page.words


def test_sources_and_counts_are_told(page):
    for part in (
        "Apache-2.0",
        "not stated by the source",
        "17,671",
        "11,012",
        "2 no messages",
        "4,711 bytes",
    ):
        assert part in page.words
    assert "code of report" in page.words and "0123456789abcdef" in page.words
    assert "torch 2.13.0, transformers 5.2.0, kvpress 0.5.5" in page.words
    assert "LlamaForCausalLM, context 8,192, float32" in page.words


def test_texts_say_where_they_part(page):
    assert "parts at token 14 of 21" in page.words and "equal to the baseline" in page.words
    assert "finch-0.5 has no texts, unsupported: FinchPress needs a delimiter" in page.words
    assert "(empty)" in page.words
    assert page.all("ins") and page.all("del")


def test_texts_of_any_direction_set_their_own(page):
    blocks = [a for _, a in page.elements if "text" in a.get("class", "").split()]
    assert blocks and all(block.get("dir") == "auto" for block in blocks)


def test_a_rerun_gives_identical_bytes(tmp_path, source):
    assert rendered(tmp_path) == source


def test_no_outputs_no_figures_no_dataset(tmp_path):
    page = Page(rendered(tmp_path, outputs=[], figures=False, prompts_counts=None, dataset_manifest=None))
    assert "No variant wrote a text in this run." in page.words
    assert "its texts were not compared" in page.words
    assert not page.all("svg")


def test_a_model_without_tokenizer(tmp_path):
    rows = [[fixture.outputs("finch-0.5")[0] | {"method": method} for _ in range(1)] for method in fixture.METHODS]
    page = Page(rendered(tmp_path, outputs=rows))
    assert "baseline has no texts, unsupported" in page.words


def test_all_cells_failed(tmp_path):
    cells = fixture.stats()
    for cell in cells:
        fixture._blank(cell, "failed" if cell["workload"] == "chat" else "oom", "boom")
        cell["device"] = cell["engine"] = cell["attention"] = None
    page = Page(rendered(tmp_path, cells))
    assert "Nothing was measured: 6 failed and 6 out of memory." in page.words
    assert "12 of 12 cells have no numbers" in page.words


def test_a_failed_baseline_leaves_nothing_to_compare(tmp_path):
    cells = fixture.stats()
    for cell in cells:
        if cell["method"] == "baseline":
            fixture._blank(cell, "failed", "boom")
    page = Page(rendered(tmp_path, cells))
    assert "none of them with a baseline to compare with" in page.words
    assert "% more" not in page.words


def test_variants_without_baseline(tmp_path):
    cells = [cell | {"baseline": None} for cell in fixture.stats() if cell["method"] != "baseline"]
    page = Page(rendered(tmp_path, cells, [fixture.outputs("knorm-0.8")]))
    assert "no baseline to compare with" in page.words


def two_models():
    cells = []
    for model in ("a", "b"):
        for cell in fixture.stats(fixture.GPU):
            base = cell["baseline"] and f"{model}/baseline"
            names = {"model": model, "variant": f"{model}/{cell['method']}", "baseline": base}
            cells.append(cell | names)
    return cells


def test_several_models_keep_to_their_own_baselines(tmp_path):
    outputs = [
        [row | {"model": model} for row in fixture.outputs(method)]
        for model in ("a", "b")
        for method in fixture.METHODS
    ]
    cells = two_models()
    collected = texts.collect([row for rows in outputs for row in rows], cells, {"a": "same", "b": "same"})
    assert {(t.variant, t.baseline) for t in collected.tallies} >= {("b/knorm-0.8", "b/baseline")}
    assert collected.variants[0] == "a/baseline" and len(collected.prompts[0].cards) == 10
    assert "a/knorm-0.8 decodes 63% more" in Page(rendered(tmp_path, cells, outputs)).words


@pytest.mark.parametrize(("tokenizers", "unit"), [({"a": "x", "b": "x"}, "token"), ({"a": "x"}, "words")])
def test_tokens_are_compared_only_between_equal_tokenizers(tokenizers, unit):
    cells = [c for c in two_models() if (c["model"], c["method"]) in {("a", "baseline"), ("b", "snapkv-0.5")}]
    cells = [c | {"baseline": "a/baseline" if c["model"] == "b" else None} for c in cells]
    rows = [r | {"model": "a"} for r in fixture.outputs("baseline")]
    rows += [r | {"model": "b"} for r in fixture.outputs("snapkv-0.5")]
    collected = texts.collect(rows, cells, tokenizers)
    assert unit in collected.prompts[0].cards[1].note
    assert (collected.tallies[0].tokens is None) == (unit == "words")


def test_a_prompt_that_a_method_refused_has_its_reason(tmp_path):
    rows = fixture.outputs("snapkv-0.5")
    rows[0] |= {
        "status": "unsupported",
        "status_reason": "shorter than the window",
        "text": None,
        "token_ids": None,
    }
    page = Page(rendered(tmp_path, outputs=[fixture.outputs("baseline"), rows]))
    assert "unsupported: shorter than the window" in page.words


def test_texts_of_a_padded_batch_stand_beside_the_same_prompts_alone(tmp_path):
    outputs = []
    for method in fixture.METHODS[:3]:
        alone = fixture.outputs(method)
        batch = [row | {"way": "batch", "text": f"{row['text']}!" * (method != "baseline")} for row in alone]
        batch[0] |= {"text": alone[0]["text"]}
        outputs.append(batch + alone)
    outputs[2][1] |= {"status": "unsupported", "status_reason": "no", "text": None, "token_ids": None}
    page = Page(rendered(tmp_path, outputs=outputs))
    told = "differ from the same prompt’s alone: 4 of 6 for baseline, 5 of 6 for knorm-0.8 and 4 of 5 for snapkv-0.5."
    assert told in page.words
    names = [a["data-variant"] for a in page.all("article")][:6]
    assert names == [f"{m}, {way}" for m in fixture.METHODS[:3] for way in ("padded batch", "alone")]
    for way in ("padded batch", "alone"):  # a row of the table has no space between its cells
        assert f"knorm-0.8 {way}baseline" in page.words


def test_where_nothing_was_padded_nothing_is_said_of_it(page):
    assert "padded batch" not in page.words and ", alone" not in page.words


def test_one_cold_run_claims_no_speed(tmp_path):
    cells = fixture.stats(fixture.GPU, "article")
    for cell in cells:
        for column in ("article_tokens_per_s", "ttft_s"):
            cell[f"{column}_low"] = cell[f"{column}_high"] = None
    page = Page(rendered(tmp_path, cells))
    assert "Too few runs a cell: no difference in speed can be told from noise" in page.words
    assert "No variant cuts the cache more than knorm-0.8 (80% less" in page.words
    assert "perhaps noise" in page.words and "(63% more)" in page.words


def test_overlapping_intervals_are_no_finding():
    cells = fixture.stats()
    for cell in cells:
        if cell["decode_tokens_per_s"]:
            cell["decode_tokens_per_s_low"], cell["decode_tokens_per_s_high"] = 1.0, 100.0
    assert findings.headline(cells, [], {}).startswith("No variant decodes clearly faster than its baseline.")


def test_a_simulated_gain_is_called_so():
    cells = fixture.stats()
    for cell in cells:
        cell["simulated"] = cell["method"] == "knorm-0.8"
    assert findings.headline(cells, [], {}).startswith("knorm-0.8 (simulated) decodes 63% more")


def test_what_fits_is_told_beside_the_baseline_of_the_same_device(tmp_path):
    cells = [cell | {"largest_batch": None, "longest_prompt_tokens": None} for cell in fixture.stats()]
    assert "Fits" not in Page(rendered(tmp_path, cells)).words
    for cell in cells:
        if cell["status"] == "ok":
            pressed = cell["method"] == "knorm-0.8"
            cell |= {"largest_batch": 478 if pressed else 256, "longest_prompt_tokens": 7680 if pressed else 4096}
    words, rows = Page(rendered(tmp_path, cells)).words, cells[0]["batch_size"]
    assert f"baseline a batch of 256, or {rows} prompts of 4,096 tokens" in words
    assert f"knorm-0.8 a batch of 478 (87% more), or {rows} prompts of 7,680 tokens (88% more)" in words
    for cell in cells:
        cell["device"] = cell["method"]
    assert f"a batch of 478, or {rows} prompts of 7,680 tokens" in Page(rendered(tmp_path, cells)).words


def test_what_a_method_with_a_window_came_to_is_told(tmp_path):
    cells = fixture.stats()
    for cell in cells:
        cell["block_size"] = 256 if cell["workload"] == "long" else None
        cell.update(dict.fromkeys(("window", "kept_fraction_end")))
        if cell["method"] == "knorm-0.8":
            cell.update(window=64, kept_fraction_end=0.21)
    page = Page(rendered(tmp_path, cells))
    assert (
        "knorm-0.8 keeps 19.9% of the prompt’s cache, a compression of 5.03×, and 21.0% at the last token; its window"
        " has 64 tokens and blocks of 256 tokens." in page.words
    )
    assert page.words.count("its window has 64 tokens") == 2  # once a workload
    assert "Cache that can be read" in page.words and "Windowtokens" in page.words
    plain = Page(rendered(tmp_path, fixture.stats()))
    assert "its window has" not in plain.words and "Window" not in plain.words


def test_long_texts_are_cut_with_a_count():
    assert texts.clip("x" * 20_000) == "x" * 20_000
    assert texts.clip("x" * 25_000).endswith("… 5,000 more characters")


@given(st.text())
def test_visible_keeps_every_other_character(text):
    shown = texts.visible(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    assert [c for c in text if c.isalnum()] == [c for c in shown if c.isalnum()] or "⟦" in shown


def test_missing_manifest_has_a_remedy(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        rendered(tmp_path, model_manifests=[tmp_path / "no.json"])


def test_svg_keeps_to_itself(tmp_path):
    hostile = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="9"'
        ' viewBox="0 0 9 9" onload="alert(1)"><style>*{fill:red}</style><script>alert(1)</script>'
        '<foreignObject/><g id="paper"/><g id="a" style="fill: #1f2328; clip-path: url(#c)"/>'
        '<use xlink:href="#a"/><use href="https://example.org/x.svg#a"/>'
        '<path style="fill: url(https://example.org/)"/></svg>'
    )
    (tmp_path / "x.svg").write_text(hostile)
    inlined = svg.inline(tmp_path / "x.svg", "f1", {"#1f2328": "var(--ink)"})
    assert 'id="f1-a"' in inlined and 'href="#f1-a"' in inlined and "url(#f1-c)" in inlined
    assert "fill: var(--ink)" in inlined and "<ns0" not in inlined
    for gone in ("script", "onload", "example.org", "<style", "foreignObject", "paper", 'width="'):
        assert gone not in inlined


def test_flatten_names_what_is_nested():
    nested = {"a": {"b": 1, "c": [1, 2]}, "d": None, "e": [{"f": 2}], "g": []}
    assert report.flatten(nested) == [
        ("a.b", "1"),
        ("a.c", "1, 2"),
        ("d", "none"),
        ("e[0].f", "2"),
        ("g", "none"),
    ]
