"""The page Landscape in a browser: its cards, a theorem's witness that selects, a latent that moves the map, dark, a clean console."""

import pytest
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.timeout(180)
SLOW = 60_000  # milliseconds; the machine may be shared


@pytest.fixture(scope="module")
def address():
    """A small bench, trained a little."""
    from sdl_explorer import LinearBench, Session, TopK
    from sdl_explorer.app.serve import _free_port, serve_session

    with Session(LinearBench(n_features=12, d_in=8, sparsity=0.9), TopK(k=2), n_latents=14) as session:
        session.train(200)
        port = _free_port("127.0.0.1")
        server = serve_session(session, {"page": "Landscape"}, port, "127.0.0.1", False, "landscape")
        yield f"http://127.0.0.1:{port}/landscape"
        server.stop()


def test_the_page_shows_the_landscape_and_the_theorems(page: Page, address: str):
    part = lambda name: page.locator(f".sdlx-{name}").first

    page.goto(address)
    for card in ("L1", "L3", "L2", "T"):
        expect(part(f"card-{card}").locator("canvas").first).to_be_visible(timeout=SLOW)
    expect(part("theory").locator("article")).to_have_count(7, timeout=SLOW)
    expect(part("card-L1 .sdlx-reading")).to_contain_text("with their decoder rows at least squares", timeout=SLOW)
    expect(part("card-L3 .sdlx-reading")).to_contain_text("restarts in random directions", timeout=SLOW)
    expect(part("card-L2 .sdlx-reading")).to_contain_text("convex along the encoder and along the decoder", timeout=SLOW)
    first = part("theory").locator("article").first
    expect(first).to_contain_text("Assumption not met")
    expect(first).to_contain_text("not met: 1 - S <= 1/n")
    expect(part("seeds").get_by_role("button")).to_be_disabled()  # nothing is anchored

    part("theory").get_by_role("button", name="Select 1 feature").first.click()  # a witness is selected, and the map follows its latent
    latent = page.locator(".sdlx-inspector-title").get_by_role("heading").inner_text().removeprefix("Latent ")
    expect(part("card-L1 .sdlx-reading")).to_contain_text(f"Latents {latent} and ", timeout=SLOW)
    part("card-L1").get_by_role("button", name="Table").first.click()
    expect(part("card-L1").locator(".tabulator-row").first).to_contain_text("|", timeout=SLOW)

    page.get_by_role("button", name="Toggle theme").click()
    expect(page.locator("body")).to_have_css("background-color", "rgb(18, 18, 18)", timeout=SLOW)
    expect(part("card-L3").locator("canvas").first).to_be_visible(timeout=SLOW)
