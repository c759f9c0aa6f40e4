"""The main job in the served app: look, train, resample, train on, compare, anchor, revert; with a clean console."""

import re

import pytest
from playwright.sync_api import Locator, Page, expect

pytestmark = pytest.mark.timeout(600)
SLOW = 60_000  # milliseconds; the machine may be shared
WEBGL = """() => {
  const roots = [document]
  let n = 0
  while (roots.length) {
    for (const node of roots.pop().querySelectorAll("*")) {
      if (node.shadowRoot) { roots.push(node.shadowRoot) }
      if (node.tagName === "CANVAS" && (node.getContext("webgl") || node.getContext("webgl2"))) { n += 1 }
    }
  }
  return n
}"""


def part(page: Page, name: str) -> Locator:
    return page.locator(f".sdlx-{name}").first


def turn_to(page: Page, title: str) -> None:
    page.get_by_role("tab", name=title, exact=True).click()
    expect(part(page, f"page-{title.lower()}")).to_be_visible(timeout=SLOW)


def status(page: Page, what: str) -> int:
    """A number of the run bar."""
    line = part(page, "status").locator(".sdlx-line").inner_text()
    return int(re.search(rf"{what} (\d[\d ]*)", line).group(1).replace(" ", ""))


def dead(page: Page) -> int:
    return status(page, "dead")


def step(page: Page) -> int:
    return status(page, "step")


def train(page: Page, steps: int = 500) -> None:
    """Press Train and wait for the end of the run."""
    goal = step(page) + steps
    part(page, "train").get_by_role("button").click()
    expect(part(page, "status")).to_contain_text(f"step {goal:,}".replace(",", " ") + " ·", timeout=4 * SLOW)
    expect(part(page, "live")).to_have_text("○ paused", timeout=SLOW)


def test_main_job(page: Page, served: str):
    page.goto(served)

    # a trained run is there, with its truth beside it
    expect(part(page, "card-R2").locator("canvas").first).to_be_visible(timeout=SLOW)
    assert [tab.inner_text() for tab in page.get_by_role("tab").all()] == [
        "Overview",
        "Alignment",
        "Latents",
        "Intervene",
        "Absorption",
        "Landscape",
        "Compare",
    ]
    expect(part(page, "tiles")).to_contain_text("Recovered", timeout=SLOW)
    expect(part(page, "inspector-title")).to_contain_text("Latent ", timeout=SLOW)
    assert step(page) >= 500
    was_dead = dead(page)
    assert was_dead >= 5

    # train, see that the dead stay dead
    train(page)
    assert dead(page) >= was_dead - 2
    was_dead = dead(page)

    # see them: the tile is a filter
    part(page, "tiles").get_by_role("button", name=re.compile("^Dead")).click()
    expect(part(page, "chip")).to_contain_text("status == dead", timeout=SLOW)
    expect(part(page, "facts")).to_contain_text("Dead", timeout=SLOW)
    part(page, "clear-all").get_by_role("button").click()

    # preview: nothing changes
    turn_to(page, "Intervene")
    before = step(page)
    part(page, "resample-preview").get_by_role("button").click()
    expect(part(page, "plan-said")).to_contain_text("Nothing has changed yet", timeout=SLOW)
    expect(part(page, "card-R3").locator("canvas").first).to_be_visible(timeout=SLOW)
    assert step(page) == before
    assert part(page, "timeline").get_by_role("button", name=re.compile("resample")).count() == 0

    # apply: a commit; then train on in place
    part(page, "apply").get_by_role("button").click()
    expect(part(page, "message")).to_contain_text("Applied", timeout=SLOW)
    expect(part(page, "timeline").locator("button.resample")).to_have_count(1, timeout=SLOW)
    train(page)
    assert dead(page) < was_dead

    # the control pairs beside it
    turn_to(page, "Compare")
    part(page, "pairs").locator("input").fill("5")
    part(page, "control-steps").locator("input").fill("20")
    part(page, "control-steps").locator("input").press("Enter")
    part(page, "control").get_by_role("button").click()
    expect(part(page, "card-C3").locator("canvas").first).to_be_visible(timeout=4 * SLOW)
    expect(part(page, "card-C3").locator(".sdlx-reading")).to_contain_text("5", timeout=SLOW)

    # anchor two true features
    turn_to(page, "Intervene")
    field = part(page, "anchor-which").get_by_role("combobox")
    field.click()
    for place in (0, 1):
        page.get_by_role("menuitem").nth(place).click()
    page.mouse.click(600, 8)  # beside the menu closes it
    expect(part(page, "anchor-said")).to_contain_text("2 directions chosen", timeout=SLOW)
    part(page, "anchor-preview").get_by_role("button").click()
    expect(part(page, "plan-said")).to_contain_text("2 latents will change", timeout=SLOW)
    part(page, "apply").get_by_role("button").click()
    expect(part(page, "card-N1").locator("canvas").first).to_be_visible(timeout=SLOW)

    # realign: the preview says what it sets, the timeline marks it, and what is pulled can be let go
    part(page, "realign-preview").get_by_role("button").click()
    expect(part(page, "card-R3").locator(".sdlx-reading")).to_contain_text("because this sets it: that is no evidence", timeout=SLOW)
    part(page, "apply").get_by_role("button").click()
    expect(part(page, "timeline").locator("button.realign")).to_have_count(1, timeout=SLOW)
    expect(part(page, "held-said")).to_contain_text("pulled to measured directions, with weight 0.1", timeout=SLOW)

    # a setting of the optimiser: folded at first, and refused with a reason
    fold = part(page, "fold-optimiser").get_by_role("button")
    expect(fold).to_have_attribute("aria-expanded", "false")
    fold.focus()
    page.keyboard.press("Enter")
    clip = part(page, "set-clip-norm").locator("input")
    for value, said in (("-1", "clip_norm"), ("2", "Settings take effect from here: clip norm = 2")):
        clip.fill(value)
        clip.press("Enter")
        part(page, "apply-settings").get_by_role("button").click()
        expect(part(page, "message")).to_contain_text(said, timeout=SLOW)
    expect(part(page, "timeline").locator("button.settings")).to_have_count(2, timeout=SLOW)  # the bundled run has one

    # revert to the commit before the resample: nothing is deleted
    commits = part(page, "timeline").get_by_role("button").count()
    part(page, "timeline").get_by_role("button").first.click()
    part(page, "checkout").get_by_role("button").click()
    expect(part(page, "status")).to_contain_text("step 0 ·", timeout=SLOW)
    assert part(page, "timeline").get_by_role("button").count() >= commits

    assert page.evaluate(WEBGL) == 0


def test_stop_says_so_at_once_and_stops(page: Page, served: str):
    page.goto(served)
    expect(part(page, "status")).to_contain_text("step", timeout=SLOW)
    play = part(page, "play").get_by_role("button")
    play.click()
    expect(play).to_contain_text("Stop", timeout=SLOW)
    page.wait_for_timeout(500)
    play.click()
    expect(part(page, "live")).to_have_text("○ paused", timeout=SLOW)
    stopped = step(page)
    page.wait_for_timeout(500)
    assert step(page) == stopped
