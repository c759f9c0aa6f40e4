"""Keys that are heard anywhere on the page, and the theme of the system."""

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.timeout(300)
SLOW = 60_000
FOCUSED = """() => {
  let node = document.activeElement
  while (node && node.shadowRoot && node.shadowRoot.activeElement) { node = node.shadowRoot.activeElement }
  const host = node.getRootNode().host
  return node.tagName + " " + (host ? host.className : node.closest(".sdlx-search")?.className || "")
}"""


def test_a_dark_system_gets_a_dark_page_and_keys_are_heard(open_page, served: str):
    page = open_page(color_scheme="dark")
    page.goto(served)
    expect(page.locator(".sdlx-tiles")).to_contain_text("Recovered", timeout=SLOW)
    expect(page.locator("body")).to_have_css("background-color", "rgb(18, 18, 18)", timeout=SLOW)
    expect(page.locator(".sdlx-undo").first.get_by_role("button")).to_be_disabled()

    page.keyboard.press("2")
    expect(page.get_by_role("tab", name="Alignment")).to_have_attribute("aria-selected", "true", timeout=SLOW)
    page.get_by_role("tab", name="Compare").click()  # a tab that was clicked keeps the focus, and the page its keys
    title = page.locator(".sdlx-inspector-title")
    expect(title).to_contain_text("Latent ", timeout=SLOW)
    latent = title.get_by_role("heading").inner_text()
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("tab", name="Landscape")).to_have_attribute("aria-selected", "true", timeout=SLOW)
    page.keyboard.press("2")
    expect(page.get_by_role("tab", name="Alignment")).to_have_attribute("aria-selected", "true", timeout=SLOW)
    expect(title).to_have_text(latent)  # the arrow was the tabs' alone
    page.keyboard.press("/")
    assert page.evaluate(FOCUSED).startswith("INPUT")
    page.keyboard.type("5")
    page.keyboard.press("Enter")
    expect(page.locator(".sdlx-inspector-title")).to_have_text("Latent 5", timeout=SLOW)

    page.keyboard.press("Tab")  # out of the search field
    page.keyboard.press("A")  # the form comes into view, and the next Tab goes on from it
    expect(page.get_by_role("tab", name="Intervene")).to_have_attribute("aria-selected", "true", timeout=SLOW)
    expect(page.get_by_role("heading", name="Anchor", exact=True)).to_be_focused(timeout=SLOW)
