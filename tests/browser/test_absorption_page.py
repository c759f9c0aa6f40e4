"""The page on absorption in a browser: its tab, words beside colours, a row that selects, light and dark, and a clean console."""

import re

import pytest
from playwright.sync_api import Page, expect

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame:DeprecationWarning"),  # bokeh 3.9 on pandas 3.1
    pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning"),
]
SLOW = 30_000  # milliseconds; the machine may be shared


@pytest.fixture(scope="module")
def address():
    """A small tree, trained until children absorb their parents."""
    from sdl_explorer import HierarchyBench, Session, TopK
    from sdl_explorer.app.serve import _free_port, serve_session

    with Session(HierarchyBench(), TopK(k=2), n_latents=24) as session:
        session.train(1_500)
        port = _free_port("127.0.0.1")
        server = serve_session(session, {}, port, "127.0.0.1", False, "absorption")
        yield f"http://127.0.0.1:{port}/absorption"
        server.stop()


def test_the_page_shows_what_was_absorbed(page: Page, address: str):
    said = []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    part = lambda name: page.locator(f".sdlx-{name}").first

    def open_page() -> None:
        page.goto(address)
        page.get_by_role("tab", name="Absorption", exact=True).click(timeout=SLOW)
        for card in ("H1", "H2", "H3", "H4"):
            expect(part(f"card-{card}").locator("canvas").first).to_be_visible(timeout=SLOW)
            expect(part(f"card-{card} .sdlx-reading")).to_contain_text(" under parent ", timeout=SLOW)

    open_page()
    expect(page.get_by_role("tab")).to_have_text(["Overview", "Alignment", "Latents", "Intervene", "Absorption", "Landscape", "Compare"])
    expect(part("card-H1 .sdlx-reading")).to_contain_text(re.compile(r"9 parent-child edges: \d absorbed"))
    part("card-H1").get_by_role("button", name="Table").first.click()  # a row is a selection, without a mouse too
    rows = part("card-H1").locator(".tabulator-row")
    expect(rows).to_have_count(9, timeout=SLOW)
    expect(rows.first).to_contain_text("absorbed")
    child = rows.last.locator(".tabulator-cell[tabulator-field=child]").inner_text()
    page.get_by_role("group", name="Table: Which children").focus()
    page.keyboard.press("End")
    expect(part("card-H2 .sdlx-reading")).to_contain_text(f"{child} under parent", timeout=SLOW)

    page.emulate_media(color_scheme="dark")
    open_page()
    expect(page.locator("body")).to_have_css("background-color", "rgb(18, 18, 18)", timeout=SLOW)
    assert said == []
