"""From what is wrong to what helps, in a browser: the overview says it, its button opens the form, repairs are tried and reported."""

import pytest
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.timeout(300)
SLOW = 60_000  # milliseconds; the machine may be shared


@pytest.fixture(scope="module")
def address():
    """Trained a little, then a third of the latents is taken out."""
    from sdl_explorer import HierarchyBench, Session, TopK
    from sdl_explorer.app.serve import _free_port, serve_session

    source = HierarchyBench(parents=2, children=2, independent=6, d_in=12)
    with Session(source, TopK(k=2), n_latents=18, dead_after=2_000, device="cpu") as session:
        session.train(150)
        session.prune(list(range(0, 18, 3)))
        session.train(10)
        port = _free_port("127.0.0.1")
        server = serve_session(session, {"page": "Overview"}, port, "127.0.0.1", False, "repair")
        yield f"http://127.0.0.1:{port}/repair"
        server.stop()


def test_from_the_problem_to_its_repair(page: Page, address):
    page.set_viewport_size({"width": 1400, "height": 1000})
    part = lambda name: page.locator(f".sdlx-{name}").first
    press = lambda name: part(name).locator("button").first.click()

    def write(field: str, text: str) -> None:
        part(field).locator("input").click()
        page.keyboard.press("Control+A")
        page.keyboard.type(text)
        page.keyboard.press("Tab")

    page.goto(address)
    dead = part("card-O2").locator(".problems > li", has_text="6 latents are dead while")
    expect(dead).to_contain_text("6 of 18 latents have not fired in 2,000 samples", timeout=SLOW)
    expect(part("card-O2 .sdlx-reading")).to_contain_text("dead (costs up to", timeout=SLOW)
    dead.get_by_role("button", name="Show 6 latents on Latents").press("Enter")  # without a mouse
    expect(page.get_by_role("tab", name="Latents")).to_have_attribute("aria-selected", "true", timeout=SLOW)
    expect(part("inspector-title")).to_have_text("Latent 0", timeout=SLOW)

    page.get_by_role("tab", name="Overview").click()
    dead.get_by_role("button", name="Open Resample, filled in").click()
    expect(page.get_by_role("tab", name="Intervene")).to_have_attribute("aria-selected", "true", timeout=SLOW)
    expect(part("resample-said")).to_have_text("6 latents selected.", timeout=SLOW)
    expect(part("resample-target")).to_contain_text("the residual", timeout=SLOW)

    for field, steps in (("repair-budget", "300"), ("repair-steps", "10")):
        write(field, steps)
    expect(part("repair-cost")).to_contain_text("150 steps; the budget holds 2 tries.", timeout=SLOW)
    press("repair-run")
    expect(part("card-R5 .sdlx-reading")).to_contain_text("each on 5 pairs of 10 steps", timeout=SLOW)
    expect(part("card-R5").locator("canvas").first).to_be_visible(timeout=SLOW)
    expect(part("repair-said")).to_contain_text("passed", timeout=SLOW)
    expect(part("repair-run").locator("button")).to_be_enabled(timeout=SLOW)
    part("card-R5").get_by_role("button", name="Table").first.click()
    expect(part("card-R5").locator(".tabulator-row").first).to_contain_text("against the sham", timeout=SLOW)

    write("trial-steps", "5")
    press("trial-run")
    expect(part("card-R6 .sdlx-reading")).to_contain_text("Resample, 5 steps: 6 treated, 6 sham, 6 untouched.", timeout=SLOW)
    expect(part("card-R6").locator("canvas").first).to_be_visible(timeout=SLOW)
    write("repair-steps", "20000")  # minutes, unless it is stopped
    write("repair-budget", "900000")
    press("repair-run")
    expect(part("repair-said")).to_contain_text("Trying repairs", timeout=SLOW)
    press("repair-stop")
    expect(part("repair-said")).to_have_text("Stopped. Nothing passed, so there is nothing to apply; the model is as it was.", timeout=SLOW)
    expect(part("status")).to_contain_text("step 160", timeout=SLOW)  # nothing of this was applied
