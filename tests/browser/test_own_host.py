"""Nothing on a page comes from another host: not at its address, not in another theme. `page` fails at any such request."""

from urllib.parse import urlsplit

import pytest
from bokeh.document import Document
from bokeh.models import ImportedStyleSheet
from panel.io.state import set_curdoc
from playwright.sync_api import Page, expect

from sdl_explorer import LinearBench, Session, TopK
from sdl_explorer.app.serve import _free_port, _visit, serve_session

pytestmark = pytest.mark.timeout(180)
SLOW = 60_000  # milliseconds; the machine may be shared


@pytest.fixture(scope="module")
def session():
    with Session(LinearBench(n_features=12, d_in=8, sparsity=0.9), TopK(k=2), n_latents=14) as session:
        yield session


def test_stylesheets_are_of_this_server_before_the_page_is_written(session):
    document = Document()
    with set_curdoc(document):
        root = _visit(lambda: session, owned=False).get_root(document)
    sheets = {sheet.url for sheet in root.select({"type": ImportedStyleSheet})}
    assert sheets
    assert [url for url in sheets if urlsplit(url).netloc] == []


def test_a_page_opened_by_its_address_asks_no_other_host(page: Page, session):
    port = _free_port("127.0.0.1")
    server = serve_session(session, {"page": "Absorption"}, port, "127.0.0.1", False, "here")
    page.goto(f"http://127.0.0.1:{port}/here")
    expect(page.locator(".sdlx-page-absorption .sdlx-card:visible").first).to_be_visible(timeout=SLOW)
    expect(page.locator(".sdlx-inspector-title")).to_contain_text("Latent ", timeout=SLOW)
    page.get_by_role("button", name="Toggle theme").click()
    expect(page.locator("body")).to_have_css("background-color", "rgb(18, 18, 18)", timeout=SLOW)
    page.get_by_role("tab", name="Latents").click()  # parts that are made in the dark
    expect(page.locator(".sdlx-page-latents canvas").first).to_be_visible(timeout=SLOW)
    page.wait_for_load_state("networkidle")
    server.stop()
