"""The served app for browser tests: the bundled run, one server for a module."""

import pytest


@pytest.fixture(scope="module")
def served():
    """The address of the app, as `sdl-explorer serve` serves it, in a thread."""
    from sdl_explorer.app.serve import start

    server, address = start(None, port=0)
    yield address
    server.stop()
