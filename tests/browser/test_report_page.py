"""The report in a real browser; skipped where there is none."""

import shutil

import pytest
import quality_fixture as made
import quality_page
import report_fixture as fixture

from kvbench import report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path"),
    pytest.mark.xdist_group("page"),
]

WRITERS = len(made.METHODS) - 1  # one of them is unsupported

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


# how far each number of the last figure, the heat maps, stands out from the field it is written on
CONTRASTS = r"""() => {
  const map = [...document.querySelectorAll('#quality figure svg')].pop();
  const light = (colour) => {
    const [red, green, blue] = colour.match(/[\d.]+/g).slice(0, 3).map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const fields = [...map.querySelectorAll('path')].map((path) => [path.getBoundingClientRect(), path]);
  const found = [];
  for (const text of map.querySelectorAll('text')) {
    const { x, y, width, height } = text.getBoundingClientRect();
    const [across, down] = [x + width / 2, y + height / 2];
    const over = ([box]) => box.left < across && across < box.right && box.top < down && down < box.bottom;
    const field = fields.filter(over).pop();
    if (!field || !/^\d+$/.test(text.textContent.trim())) continue;
    const [one, other] = [text, field[1]].map((element) => light(getComputedStyle(element).fill));
    found.push((Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05));
  }
  return found;
}"""


@pytest.fixture(scope="module")
def address(tmp_path_factory, quality_table):
    folder = tmp_path_factory.mktemp("page")
    report.write(quality_page.inputs(folder, quality_table), folder / "report.html")
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, address):
    """Open the report in a fresh context; complaints and requests are kept on the page."""
    contexts = []

    def open_page(width=1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.complaints, page.requests = [], []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("dialog", lambda dialog: page.complaints.append("dialog"))
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(address)
        page.wait_for_load_state("networkidle")
        return page

    yield open_page
    for context in contexts:
        context.close()


def overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


def shown(page, selector):
    return page.locator(f"{selector}:visible").count()


def test_no_complaint_and_no_request_but_the_file(visit, address):
    page = visit()
    page.get_by_role("button", name="Open all").click()
    assert page.complaints == []
    assert page.requests == [address]


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_the_page_never_scrolls_sideways(visit, width):
    page = visit(width)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert overflow(page) <= 0


def test_filter_by_prompt_variant_and_words(visit):
    page = visit()
    prompts, cards = len(made.PROMPTS), len(made.PROMPTS) * WRITERS
    page.get_by_role("button", name="Open all").click()
    assert (shown(page, ".prompt"), shown(page, ".card")) == (prompts, cards)
    page.locator("select[name=prompt]").select_option("2")
    assert (shown(page, ".prompt"), shown(page, ".card")) == (1, WRITERS)
    page.locator("select[name=prompt]").select_option("")
    page.get_by_label("snapkv-0.5", exact=True).uncheck()
    assert shown(page, ".card") == cards - prompts
    page.get_by_role("searchbox").fill("GNP.exe")
    assert (shown(page, ".prompt"), shown(page, ".card")) == (1, 1)
    assert page.locator("output").inner_text() == f"1 of {prompts} prompts shown"
    page.get_by_role("searchbox").fill("in no text at all")
    assert shown(page, ".prompt") == 0


def test_tables_sort_by_value_with_missing_cells_last(visit):
    page = visit()
    table = page.locator("table.cells").first
    names = table.locator("tbody th")
    first = names.all_inner_texts()
    heading = table.get_by_role("button", name="Decode throughput")
    heading.focus()
    page.keyboard.press("Enter")
    assert names.all_inner_texts()[0].startswith("adakv-snapkv-0.5")
    assert names.all_inner_texts()[-1] == "finch-0.5"
    page.keyboard.press("Enter")
    assert names.all_inner_texts()[0] == "knorm-0.8"
    assert names.all_inner_texts()[-1] == "finch-0.5"
    assert table.locator("th[aria-sort=descending]").count() == 1
    assert sorted(names.all_inner_texts()) == sorted(first)


def test_dark_mode_changes_the_page_and_the_figures(visit):
    def colours(page):
        return page.evaluate(
            "[getComputedStyle(document.body).backgroundColor,"
            " getComputedStyle(document.querySelector('figure svg text')).fill]"
        )

    light, dark = colours(visit(color_scheme="light")), colours(visit(color_scheme="dark"))
    assert light == ["rgb(255, 255, 255)", "rgb(31, 35, 40)"]
    assert dark == ["rgb(15, 19, 24)", "rgb(230, 233, 237)"]


def test_without_scripts_the_page_is_whole(visit):
    page = visit(java_script_enabled=False)
    assert page.locator("figure svg").count() == len(fixture.WORKLOADS) + 1 + 3
    assert shown(page, "table.cells tbody tr") == 2 * len(made.METHODS)
    assert page.locator(".card").count() == WRITERS * len(made.PROMPTS)
    assert shown(page, ".filters") == 0
    page.locator(".prompt > summary").nth(1).click()
    assert shown(page, ".card") == 2 * WRITERS


def test_nothing_that_a_model_wrote_ran(visit):
    page = visit()
    assert page.evaluate("document.scripts.length") == 1
    assert page.evaluate("document.images.length") == 0
    assert fixture.EVIL in page.locator("#texts").text_content()


def test_figures_do_not_share_ids(visit):
    page = visit()
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


def test_printed_it_is_black_on_white_and_without_filters(visit):
    page = visit(color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert shown(page, ".filters") == 0


def test_a_long_text_is_scrolled_to_where_it_parts(visit):
    page = visit()
    page.get_by_role("button", name="Open all").click()
    mark = page.locator(".prompt[data-rank='3'] .card[data-variant='snapkv-0.5'] .mark")
    page.wait_for_function(
        "mark => { const text = mark.closest('.text').getBoundingClientRect();"
        " const at = mark.getBoundingClientRect(); return at.top >= text.top && at.bottom <= text.bottom; }",
        arg=mark.element_handle(),
    )


def prompts(page):
    return page.evaluate("[...document.querySelectorAll('.prompt')].map(p => p.dataset.rank)")


def distances(page):
    return page.evaluate(
        "[...document.querySelectorAll('.prompt')].map(prompt => {"
        " const cards = [...prompt.querySelectorAll('.card:not(.baseline)')].filter(card => !card.hidden);"
        " return cards.reduce((sum, card) => sum + Number(card.dataset.distance), 0) / (cards.length || 1); })"
    )


def test_texts_sort_by_the_worst_of_the_variants_shown(visit):
    page = visit()
    before = prompts(page)
    assert before == [str(rank) for rank in range(len(made.PROMPTS))]
    page.locator("select[name=order]").select_option("worst")
    found = distances(page)
    assert found == sorted(found, reverse=True) and prompts(page) != before
    cards = page.locator(".prompt").first.locator(".card")
    assert cards.first.get_attribute("data-variant") == "baseline"
    assert float(cards.nth(1).get_attribute("data-distance")) > 1  # a collapsed one
    assert page.locator(".prompt[open]").first.get_attribute("data-rank") == prompts(page)[0]
    for label in ("knorm-0.8", "random-0.5"):
        page.get_by_label(label, exact=True).uncheck()
    found = distances(page)
    assert found == sorted(found, reverse=True)
    page.locator("select[name=order]").select_option("")
    assert prompts(page) == before
    first = page.locator(".prompt").first.locator(".card")
    assert [first.nth(i).get_attribute("data-variant") for i in range(2)] == ["baseline", "knorm-0.8"]


def test_collapsed_texts_are_marked(visit):
    page = visit()
    page.get_by_role("button", name="Open all").click()
    assert shown(page, ".card[data-variant='knorm-0.8'] .fallen") == 9
    assert shown(page, ".card[data-variant='snapkv-0.5'] .fallen") == 1  # as the baseline


def test_the_quality_table_sorts_and_its_details_open(visit):
    page = visit()
    table = page.locator("#quality table.scores").first
    names = table.locator("tbody th")
    table.get_by_role("button", name="KL mean, nats").click()
    assert names.all_inner_texts()[0] == "expected-attention-0.5" and names.all_inner_texts()[-1] == "finch-0.5"
    page.get_by_text("How a verdict comes about").click()
    assert page.locator("#quality details[open] tbody tr").count() > 30
    assert page.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_heat_maps_keep_their_colours_and_their_numbers_are_readable(visit, scheme):
    page = visit(color_scheme=scheme)
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) >= 100 and min(contrasts) > 4
