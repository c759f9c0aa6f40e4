"""Several visitors of one server: nobody stops another's run, and nothing stays behind when they leave."""

import re
import tempfile
import time
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.timeout(300)
SLOW = 60_000  # milliseconds; the machine may be shared


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory):
    """A server that notices soon when a visitor has gone, and keeps temporary files in a place of its own."""
    from sdl_explorer.app.serve import start

    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("visitors"))
    server, address = start(None, unused_session_lifetime_milliseconds=8_000, check_unused_sessions_milliseconds=500)
    yield address
    server.stop()
    tempfile.tempdir = before


def step(page: Page) -> int:
    line = page.locator(".sdlx-status .sdlx-line").first.inner_text()
    return int(re.search(r"step (\d[\d ]*)", line).group(1).replace(" ", ""))


def test_two_visitors_and_nothing_left(open_page, forgetful: str):
    from sdl_explorer.app.serve import visitors

    already = visitors()  # of servers that other tests have stopped
    one, two = open_page(), open_page()
    for page in (one, two):
        page.goto(forgetful)
        expect(page.locator(".sdlx-status")).to_contain_text("step", timeout=SLOW)
    assert visitors() == already + 2
    at = step(two)
    one.locator(".sdlx-play").get_by_role("button").click()
    expect(one.locator(".sdlx-live")).to_have_text("● live", timeout=SLOW)
    two.locator(".sdlx-one-step").get_by_role("button").click()
    expect(two.locator(".sdlx-status")).to_contain_text(f"step {at + 1:,}".replace(",", " "), timeout=SLOW)
    expect(two.locator(".sdlx-live")).to_have_text("○ paused", timeout=SLOW)
    assert one.locator(".sdlx-live .sdlx-line").inner_text() == "● live"

    one.close()  # in the middle of training
    two.close()
    place = Path(tempfile.gettempdir())
    end = time.monotonic() + 60
    while time.monotonic() < end and (visitors() > already or any(place.glob("sdl-explorer-*"))):
        time.sleep(0.2)
    assert visitors() == already
    assert not list(place.glob("sdl-explorer-*"))
