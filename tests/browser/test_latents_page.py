"""The page on latents in a browser: a click on a point, a brush, rows and keys select, and every card follows; the console stays clean."""

import re

import pytest
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.timeout(240)
SLOW = 30_000  # milliseconds; the machine may be shared
POINT = """latent => {
  const views = Object.values(Bokeh.index).length ? Object.values(Bokeh.index) : [...Bokeh.index]
  const ours = view => view.model?.renderers?.find?.(r => r.data_source?.data.latent && r.data_source.data.effective)
  while (views.length) {
    const view = views.pop()
    if (ours(view)) {
      const data = ours(view).data_source.data, row = Array.from(data.latent).indexOf(latent)
      const box = view.el.getBoundingClientRect()
      return [box.x + view.frame.x_scale.compute(data.x[row]), box.y + view.frame.y_scale.compute(data.y[row])]
    }
    views.push(...view.children())
  }
}"""  # where a latent's point is on the page


@pytest.fixture(scope="module")
def served_run():
    """A small tree with few latents, so that some mean several things."""
    from sdl_explorer import HierarchyBench, Session, TopK, trace_patterns
    from sdl_explorer.app.serve import _free_port, serve_session

    with Session(HierarchyBench(parents=2, children=2, independent=4, d_in=12), TopK(k=2), n_latents=10) as session:
        session.train(100)
        port = _free_port("127.0.0.1")
        server = serve_session(session, {"page": "Latents"}, port, "127.0.0.1", False, "latents")
        yield f"http://127.0.0.1:{port}/latents", session.find(trace_patterns)
        server.stop()


def places(page: Page) -> list:
    """Where the ten points are, once the page no longer moves."""
    before, now = None, [page.evaluate(POINT, latent) for latent in range(10)]
    while now != before or None in now:
        page.wait_for_timeout(300)
        before, now = now, [page.evaluate(POINT, latent) for latent in range(10)]
    return now


def test_what_is_selected_is_what_every_card_shows(page: Page, served_run):
    address, patterns = served_run
    worst = int(patterns.effective_features.argmax())
    page.set_viewport_size({"width": 1400, "height": 1000})
    part = lambda name: page.locator(f".sdlx-{name}").first
    title = part("inspector-title")

    page.goto(address)
    for card in ("P2", "P1", "P3"):
        expect(part(f"card-{card}").locator("canvas").first).to_be_visible(timeout=SLOW)
    means = f"Most meanings: latent {worst}, {patterns.effective_features[worst]:.2f} features in effect"
    expect(part("card-P2 .sdlx-reading")).to_contain_text(means, timeout=SLOW)
    expect(part("card-P4 .sdlx-words")).to_have_text("Select 2 to 40 latents.", timeout=SLOW)
    expect(title).to_contain_text(re.compile(r"Latent \d"), timeout=SLOW)

    page.mouse.click(*places(page)[worst])
    expect(title).to_have_text(f"Latent {worst}", timeout=SLOW)
    for card in ("P1", "P3"):
        expect(part(f"card-{card} .sdlx-reading")).to_contain_text(f"Latent {worst}", timeout=SLOW)
    expect(part("card-P5")).to_contain_text(f"What does latent {worst} fire on?", timeout=SLOW)

    across, down = zip(*places(page), strict=True)  # a box around everything
    page.mouse.move(min(across) - 9, min(down) - 9)
    page.mouse.down()
    page.mouse.move(max(across) + 9, max(down) + 9, steps=4)
    page.mouse.up()
    expect(part("card-P4 .sdlx-reading")).to_contain_text("10 selected latents", timeout=SLOW)
    expect(part("card-P4").locator("canvas").first).to_be_visible(timeout=SLOW)

    part("card-P2").get_by_role("button", name="Table").first.click()  # a row is a selection, without a mouse too
    expect(part("card-P2").locator(".tabulator-row")).to_have_count(10, timeout=SLOW)
    page.get_by_role("group", name="Table: How many things").focus()
    page.keyboard.press("End")
    expect(title).to_have_text("Latent 9", timeout=SLOW)
    expect(part("card-P4 .sdlx-words")).to_have_text("Select 2 to 40 latents.", timeout=SLOW)
    page.get_by_role("heading", name="How many things does each latent mean?").click()  # out of the table: the keys are the page's
    page.keyboard.press("ArrowLeft")
    expect(title).to_have_text("Latent 8", timeout=SLOW)
