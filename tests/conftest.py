"""Fixtures of every test: devices, a deterministic torch, and a browser whose console has to stay clean."""

import os
import re
import shutil
from urllib.parse import urlsplit

for name in [name for name in os.environ if name.startswith(("PANEL_", "BOKEH_"))]:
    del os.environ[name]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA needs it to be deterministic

import pytest  # noqa: E402
import torch  # noqa: E402

# sdl_explorer itself is imported inside fixtures and tests only: the jaxtyping hook has to come first
torch.set_num_threads(1)

DEVICES = [pytest.param("cpu"), *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
LOCAL_HOSTS = {"", "127.0.0.1", "localhost"}
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
]


SLOW_KINDS = {
    "tests/browser/": "browser",
    "tests/oracle/": "oracle",
    "tests/test_notebook": "notebook",
    "tests/test_repair.py": "slow",
    "tests/test_trial.py": "slow",
}


def pytest_collection_modifyitems(items):
    """Marks by place and by what is built; quick tests first, browsers last."""
    for item in items:
        place = item.path.relative_to(item.config.rootpath).as_posix()
        for prefix, marker in SLOW_KINDS.items():
            if place.startswith(prefix):
                item.add_marker(marker)
        if "explorer" in item.fixturenames:
            item.add_marker("slow")
    order = [None, "slow", "notebook", "browser"]
    items.sort(key=lambda item: max((order.index(mark.name) for mark in item.iter_markers() if mark.name in order), default=0))


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    """Each device that is here."""
    return request.param


@pytest.fixture(autouse=True)
def _deterministic():
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)


@pytest.fixture
def few_rows(monkeypatch):
    """Sessions choose and judge on 500 rows."""
    for name in ("training.run.CHOOSE_ROWS", "session.CHOOSE_ROWS", "studies.JUDGE_ROWS"):
        monkeypatch.setattr(f"sdl_explorer.{name}", 500)


@pytest.fixture
def session():
    """A little trained on parents with children."""
    from sdl_explorer import HierarchyBench, Session, TopK

    source = HierarchyBench(parents=2, children=2, independent=4, d_in=12)
    with Session(source, TopK(k=2), n_latents=24, dead_after=2_000, device="cpu") as session:
        session.train(30)
        yield session


@pytest.fixture
def explorer(session):
    """The whole app; whoever builds it takes a second or more, so those tests are slow ones."""
    from sdl_explorer import Explorer

    explorer = Explorer(session)
    yield explorer
    explorer.close()


@pytest.fixture(scope="module")
def chromium():
    """A headless browser: $CHROMIUM, else the system's Chromium or Chrome, else Playwright's own.

    One a module, since Playwright's event loop would be in the way of asyncio elsewhere.
    """
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    executable = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """`open_page(ignore=(), **options) -> Page`, in a context of its own: as many viewers as a test wants.

    The test fails at its end when a page wrote an error to its console, raised, or asked another host
    for anything. `ignore` holds regular expressions of messages that another project's page writes.
    """
    problems, contexts = [], []

    def open_page(ignore=(), **options):
        def note(message: str) -> None:
            if not any(re.search(pattern, message) for pattern in ignore):
                problems.append(message)

        context = chromium.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: note(f"console: {m.text} ({m.location.get('url', '')})") if m.type == "error" else None)
        page.on("pageerror", lambda error: note(f"page error: {error}"))
        page.on("request", lambda r: note(f"external request: {r.url}") if _external(r.url) else None)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems, "the browser complained:\n" + "\n".join(dict.fromkeys(problems))


@pytest.fixture
def page(open_page):
    """One page that has to stay clean."""
    return open_page()


def _external(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in {"http", "https", "ws", "wss"} and (parts.hostname or "") not in LOCAL_HOSTS
