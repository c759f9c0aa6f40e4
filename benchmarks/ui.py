"""How long a person waits: `make bench-ui`. Needs Chromium and a quiet machine.

first screen   from asking for the page to the tiles with their numbers and the first drawn plot of the bundled run, warm server
stopping       from pressing Stop to the word "Stopping…", and to the end of training
"""

import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

from playwright.sync_api import Browser, Page, sync_playwright

VISITS = 7
DRAWN = """() => {
  const inside = root => [...root.querySelectorAll('*')].some(e => e.tagName === 'CANVAS' || (e.shadowRoot && inside(e.shadowRoot)));
  return inside(document);
}"""


def main() -> None:
    port = free_port()
    command = [sys.executable, "-m", "sdl_explorer.cli", "serve", "--port", str(port), "--no-show"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(f"http://127.0.0.1:{port}/")
            measure(f"http://127.0.0.1:{port}/")
        finally:
            server.terminate()


def measure(address: str) -> None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    executable = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        seconds = [visit(browser, address) for _ in range(VISITS + 1)][1:]
        print(f"first screen  median {statistics.median(seconds):.2f} s, from {min(seconds):.2f} to {max(seconds):.2f} s ({VISITS} visits)")
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        first_screen(page, address)
        said, ended = stopping(page)
        print(f"stopping      said after {said * 1e3:.0f} ms, training ended after {ended * 1e3:.0f} ms")
        browser.close()


def visit(browser: Browser, address: str) -> float:
    """One first screen in a context of its own, so that nothing is cached and no former page goes on polling."""
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    page = context.new_page()
    took = first_screen(page, address)
    page.wait_for_timeout(3_000)  # for the rest of the page, or it would be in the way of the next visit
    context.close()
    return took


def first_screen(page: Page, address: str) -> float:
    began = time.perf_counter()
    page.goto(address)
    page.get_by_role("button", name=re.compile(r"Recovered: \d")).wait_for()
    page.wait_for_function(DRAWN)
    return time.perf_counter() - began


def stopping(page: Page) -> tuple[float, float]:
    page.get_by_role("button", name="Play").click()
    stop = page.get_by_role("button", name="Stop")
    stop.wait_for()
    page.wait_for_timeout(2_000)
    began = time.perf_counter()
    stop.click()
    page.get_by_text("Stopping").first.wait_for()
    said = time.perf_counter() - began
    page.get_by_role("button", name="Play").wait_for()
    return said, time.perf_counter() - began


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(address: str, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            urlopen(address, timeout=30).read()
            return
        except (URLError, OSError):
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


if __name__ == "__main__":
    main()
