"""Spare latents on the page Latents, another dictionary's on the page Compare, in a browser: words, rows that select, a clean console."""

import re

import pytest
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.timeout(240)
SLOW = 30_000  # milliseconds; the machine may be shared


@pytest.fixture(scope="module")
def address():
    """A dictionary that is the truth, with feature 0 twice; then latent 3 is taken out."""
    import torch

    from sdl_explorer import HierarchyBench, Session, SparseDictionary
    from sdl_explorer.app.serve import _free_port, serve_session

    source = HierarchyBench(parents=2, children=2, independent=4, d_in=12)
    rows = torch.cat([source.features, source.features[:1]])
    n, writes = len(rows), rows.clone()
    writes[[0, -1]] /= 2
    with Session(source, dictionary=SparseDictionary(rows, writes)) as session:
        session.prune([3])
        port = _free_port("127.0.0.1")
        server = serve_session(session, {"page": "Latents"}, port, "127.0.0.1", False, "spare")
        yield f"http://127.0.0.1:{port}/spare", n
        server.stop()


def part(page: Page, name: str):
    return page.locator(f".sdlx-{name}").first


def test_spare_and_shared_latents_are_told_and_rows_select_them(open_page, address):
    address, n = address
    page = open_page(color_scheme="dark")
    page.set_viewport_size({"width": 1400, "height": 1000})
    page.goto(address)
    spare, title = part(page, "card-P6"), part(page, "inspector-title")
    expect(spare.locator("canvas").first).to_be_visible(timeout=SLOW)
    reading = spare.locator(".sdlx-reading")
    expect(reading).to_contain_text("2 duplicate candidates", timeout=SLOW)
    expect(reading).to_contain_text(re.compile(r'Largest cluster: latents 0, \d+.*Detector "duplicate": precision .*Detector "dead":'))
    spare.get_by_role("button", name="Table").first.click()
    expect(spare.locator(".tabulator-row")).to_have_count(n, timeout=SLOW)
    expect(spare.locator(".tabulator-row").first).to_contain_text("Duplicate candidate")
    page.get_by_role("group", name="Table: Which latents could it do without?").focus()
    page.keyboard.press("Home")
    expect(title).to_have_text("Latent 0", timeout=SLOW)
    page.keyboard.press("ArrowDown")
    expect(title).to_have_text(f"Latent {n - 1}", timeout=SLOW)

    page.get_by_role("tab", name="Compare").click()
    shared = part(page, "card-C6")
    expect(shared.locator(".sdlx-words")).to_contain_text("Nothing is compared yet.", timeout=SLOW)
    part(page, "twin-run").locator("button").click()
    reading = shared.locator(".sdlx-reading")
    expect(reading).to_contain_text("Compared with commit", timeout=SLOW)  # the one before latent 3 was taken out
    expect(reading).to_contain_text(re.compile(r"Here \d+ latents: .*1 silent; there \d+ latents: .*1 novel"))
    expect(shared.locator("canvas").first).to_be_visible(timeout=SLOW)
    shared.get_by_role("button", name="Table").first.click()
    expect(shared.locator(".tabulator-row")).to_have_count(n + 1, timeout=SLOW)
    expect(shared.locator(".tabulator-row").last).to_contain_text("Novel there")
    page.get_by_role("group", name="Table: Which latents does another").focus()
    page.keyboard.press("Home")
    expect(title).to_have_text("Latent 0", timeout=SLOW)
