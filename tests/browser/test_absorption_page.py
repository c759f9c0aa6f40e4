"""The page on absorption in a browser: its tab, words beside colours, a row that selects, dark, a clean console; and without truth."""

import re

import pytest
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.timeout(300)
SLOW = 30_000  # milliseconds; the machine may be shared


@pytest.fixture(scope="module")
def addresses():
    """A small tree whose dictionary is planted: every parent absorbed by its first two children. The second has the same rows, no truth."""
    from sdl_explorer import HierarchyBench, Session, SparseDictionary, Stored
    from sdl_explorer.app.serve import _free_port, serve_session
    from sdl_explorer.data.sources import stream

    source = HierarchyBench()
    W_enc, W_dec = source.features.clone(), source.features.clone()
    for parent in (0, 4, 8):
        for child in (parent + 1, parent + 2):
            W_enc[parent] -= source.features[child]
            W_dec[child] += source.features[parent]
    dictionary = SparseDictionary(W_enc, W_dec)
    rows = source.sample(20_000, stream(0, "rows")).inputs
    with Session(source, dictionary=dictionary) as known, Session(Stored(rows), dictionary=dictionary) as unknown:
        servers, found = [], []
        for session in (known, unknown):
            port = _free_port("127.0.0.1")
            servers.append(serve_session(session, {"page": "Absorption"}, port, "127.0.0.1", False, "absorption"))
            found.append(f"http://127.0.0.1:{port}/absorption")
        yield found
        for server in servers:
            server.stop()


def part(page: Page, name: str):
    return page.locator(f".sdlx-{name}").first


def test_the_page_shows_what_was_absorbed(page: Page, addresses):
    page.goto(addresses[0])
    for card in ("H1", "H2", "H3", "H4"):
        expect(part(page, f"card-{card}").locator("canvas").first).to_be_visible(timeout=SLOW)
        expect(part(page, f"card-{card} .sdlx-reading")).to_contain_text(" under parent ", timeout=SLOW)
    expect(page.get_by_role("tab")).to_have_text(["Overview", "Alignment", "Latents", "Intervene", "Absorption", "Landscape", "Compare"])
    expect(part(page, "card-H1 .sdlx-reading")).to_contain_text("9 parent-child edges: 6 absorbed")
    expect(part(page, "card-H5 .sdlx-reading")).to_contain_text("6 candidates", timeout=SLOW)
    part(page, "card-H1").get_by_role("button", name="Table").first.click()  # a row is a selection, without a mouse too
    rows = part(page, "card-H1").locator(".tabulator-row")
    expect(rows).to_have_count(9, timeout=SLOW)
    expect(rows.first).to_contain_text("absorbed")
    child = rows.last.locator(".tabulator-cell[tabulator-field=child]").inner_text()
    page.get_by_role("group", name="Table: Which children").focus()
    page.keyboard.press("End")
    expect(part(page, "card-H2 .sdlx-reading")).to_contain_text(f"{child} under parent", timeout=SLOW)


def test_without_truth_there_are_candidates_in_the_dark_too(open_page, addresses):
    page = open_page(color_scheme="dark")
    page.goto(addresses[1])
    for card in ("H5", "H6"):
        expect(part(page, f"card-{card}").locator("canvas").first).to_be_visible(timeout=SLOW)
        expect(part(page, f"card-{card} .sdlx-reading")).to_contain_text(re.compile("[Cc]andidate"), timeout=SLOW)
    expect(part(page, "card-H1")).to_be_hidden()
    expect(page.locator("body")).to_have_css("background-color", "rgb(18, 18, 18)", timeout=SLOW)
    expect(part(page, "absorbed-anchor").locator("button")).to_be_disabled(timeout=SLOW)
    part(page, "absorbed-split").locator("button").click()  # the form, with the latent in it; nothing is applied
    expect(page.get_by_role("tab", name="Intervene")).to_have_attribute("aria-selected", "true", timeout=SLOW)
    expect(part(page, "unabsorb-said")).to_contain_text("1 latent selected", timeout=SLOW)
