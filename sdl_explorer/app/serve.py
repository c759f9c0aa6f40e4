"""The served app: every visitor has a session of their own, bounded, and cleaned up when they leave."""

import atexit
import gc
import logging
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import panel as pn
from panel.io.resources import get_dist_path

from sdl_explorer.app.entry import session_of
from sdl_explorer.app.explorer import Explorer
from sdl_explorer.app.facts import failure
from sdl_explorer.session import Session
from sdl_explorer.state import ExplorerState
from sdl_explorer.widgets.kit import Text

log = logging.getLogger(__name__)
FIRST_LOOK = Path(__file__).resolve().parent.parent / "assets" / "first_look"
MOST_VISITORS = 24
MOST_STEPS = 20_000  # a press of Play or Train, where sessions belong to visitors
VISITOR_BYTES = 200_000_000  # of commits
E1 = "Load a model, or start from one of 0 examples. None is bundled with this installation; `sdl-explorer open PATH` shows your own."
FULL = f"{MOST_VISITORS} visitors are here already, which is the limit of this server. Try again in a few minutes."

_guests: list[list[Session]] = []  # for each visitor the sessions that are theirs alone
_counting = threading.Lock()


def serve(
    what=None, port: int = 5006, address: str = "127.0.0.1", show: bool | None = None, device: str = "auto", activations=None
) -> None:
    """Serve the explorer at http://address:port/ until interrupted.

    `what` is anything that `explore` takes (a checkpoint with its `activations`); its visitors share one session. None is
    the bundled trained run, and every visitor gets a copy that is theirs alone. `port=0` takes a free one; `show` opens
    a browser.
    """
    port = port or _free_port(address)
    make = _maker(what, device, activations)
    if what is None:
        _warm(device)
    print(f"SDL Explorer at http://{address}:{port}/ (stop with Ctrl+C)", flush=True)
    _serve(make, "/", port, address, bool(show), threaded=False)


def start(what=None, port: int = 0, address: str = "127.0.0.1", device: str = "auto", **options):
    """The same in a thread: (server, address). `server.stop()` ends it; `options` are Bokeh's."""
    port = port or _free_port(address)
    return _serve(_maker(what, device), "/", port, address, show=False, threaded=True, **options), f"http://{address}:{port}/"


def _maker(what, device: str, activations=None) -> Callable:
    """What makes a visitor's page."""
    if what is None:
        return lambda: _visit(lambda: _bundled(device), owned=True)
    session = session_of(what) if isinstance(what, Session) else session_of(what, activations=activations, device=device)
    return lambda: _visit(lambda: session, owned=False)


def serve_session(session: Session, state: dict, port: int, address: str, show: bool, token: str, **options):
    """Serve one session under a path that holds the token; returns the server, which runs in a thread."""
    port = port or _free_port(address)

    def make():
        own = ExplorerState()
        own.restore(state)
        return _visit(lambda: session, owned=False, state=own)

    print(f"http://{address}:{port}/{token}\nFrom another machine: ssh -L {port}:{address}:{port} {socket.gethostname()}", flush=True)
    secret = {"use_index": False, "redirect_root": False}  # the root would lead to the path
    return _serve(make, f"/{token}", port, address, show, threaded=True, **secret, **options)


def _serve(make: Callable, path: str, port: int, address: str, show: bool, threaded: bool, **options):
    _extension()
    origins = [f"{host}:{port}" for host in dict.fromkeys((address, "localhost", "127.0.0.1", socket.gethostname()))]
    return pn.serve(
        {path: make}, port=port, address=address, websocket_origin=origins, show=show, threaded=threaded, title="SDL Explorer",
        verbose=False, **options,
    )  # fmt: skip


def _extension() -> None:
    pn.extension("tabulator", reconnect=True, throttled=True)


def _visit(open_session: Callable[[], Session], owned: bool, state: ExplorerState | None = None):
    """One visitor's page. What it holds is let go when the visitor leaves."""
    _extension()
    _stay_here()
    guest = _arrive()
    if guest is None:
        return Text(FULL, role="alert")
    try:
        session = open_session()
        if owned:
            guest.append(session)
        explorer = Explorer(session, state)
        explorer.desk.most_steps = MOST_STEPS if owned else None
        page = explorer.__panel__().__panel__()
    except Exception as error:  # the page says why; it is never blank
        log.exception("a visitor's page")
        _leave(guest)
        return Text(failure(error), role="alert")
    pn.state.on_session_destroyed(_goodbye(explorer, page, guest))
    return page


def _stay_here() -> None:
    """Stylesheets come from this server. Panel says so only when it writes the page's HTML; what is made before, and added by
    another thread after, would ask the internet.
    """
    if pn.state.curdoc is not None:
        pn.state.curdoc.template_variables.setdefault("dist_url", get_dist_path())


def _goodbye(explorer: Explorer, page, guest: list[Session]) -> Callable:
    """The hook lives in a module: globals of a served script are gone when it runs."""

    def hook(session_context):
        release_refs(page)
        explorer.close()
        threading.Thread(target=_leave, args=(guest,), name="sdlx-goodbye").start()  # closing waits for the step in progress

    return hook


def visitors() -> int:
    """How many are here."""
    return len(_guests)


def _arrive() -> list[Session] | None:
    """A new guest's list of own sessions; None when the house is full."""
    with _counting:
        if len(_guests) >= MOST_VISITORS:
            return None
        _guests.append([])
        return _guests[-1]


def _leave(guest: list[Session]) -> None:
    with _counting:
        _guests[:] = [one for one in _guests if one is not guest]
    for session in guest:
        folder = session.folder
        session.close()
        if folder is not None:
            shutil.rmtree(folder.parent, ignore_errors=True)


@atexit.register
def _close_the_house() -> None:
    for guest in list(_guests):
        _leave(guest)


def _bundled(device: str) -> Session:
    """A copy of the bundled run that can be trained on."""
    if not (FIRST_LOOK / "run.json").exists():
        raise FileNotFoundError(E1)
    folder = Path(tempfile.mkdtemp(prefix="sdl-explorer-")) / "first_look"
    shutil.copytree(FIRST_LOOK, folder)
    session = session_of(folder, device=device)
    session.budget = VISITOR_BYTES
    return session


def _warm(device: str) -> None:
    """Make one page and throw it away: the first visitor need not wait for imports."""
    guest = _arrive()
    try:
        guest.append(_bundled(device))
        explorer = Explorer(guest[0])
        page = explorer.__panel__().__panel__()
        page.get_root()
        explorer.desk.settle()
        explorer.close()
        release_refs(page)
    finally:
        _leave(guest)
    gc.collect()
    gc.freeze()  # what is there now stays: no need to look through it while somebody waits


def release_refs(component) -> None:
    """Cut what a component watches on objects that outlive it: `pmui.Page` watches the process-wide `pn.state.busy` and so
    keeps the whole page alive. Reads param's private attributes; the leak test covers it.
    """
    private = component._param__private
    for _, watcher in list(private.ref_watchers):
        (watcher.cls if watcher.inst is None else watcher.inst).param.unwatch(watcher)
    private.ref_watchers = []


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]
