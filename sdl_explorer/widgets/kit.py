"""Small parts of our own. Text reaches the page as text, never as markup, so no string from data can run."""

import functools
from pathlib import Path

import panel as pn
import panel_material_ui as pmui
import param
from panel.custom import Child, JSComponent

ESM = Path(__file__).parent / "esm"
BUTTONS = """
button { font: inherit; font-size: 13px; min-height: 26px; min-width: 26px; padding: 2px 10px; border-radius: 6px; cursor: pointer;
  color: inherit; background: transparent; border: 1px solid color-mix(in srgb, currentColor 45%, transparent) }
button:hover { background: color-mix(in srgb, currentColor 9%, transparent) }
button:focus-visible { outline: 2px solid currentColor; outline-offset: 2px }
button[aria-pressed=true] { background: color-mix(in srgb, currentColor 16%, transparent) }
"""

GROWS = ":host { max-height: none !important }"  # else a Column in a scrolling one ends with the window, and lies over the next


def served() -> bool:
    """Is this the page of a server? There a part may come later; in a notebook it would bring the whole script of Material UI."""
    return pn.state.curdoc is not None and bool(pn.state.curdoc.session_context)


def stack(*parts, **params) -> pn.Column:
    """Parts under each other. Not pmui's: each of its boxes costs the browser a React root, and takes the stylesheets of parts
    that come later from the internet.
    """
    return _sparing(pn.Column(*parts, **{"sizing_mode": "stretch_width", "margin": 0, "stylesheets": [GROWS], **params}))


def row(*parts, **params) -> pn.Row:
    """Parts beside each other."""
    return _sparing(pn.Row(*parts, **{"sizing_mode": "stretch_width", "margin": 0, **params}))


def sheet(*parts, name: str) -> pmui.Paper:
    """Parts under each other in an outline: a card. Pmui's, since a Bokeh plot several columns down from a React root is laid out
    before it has a size.
    """
    look = {"elevation": 0, "variant": "outlined", "sizing_mode": "stretch_width", "margin": (8, 10)}
    return _sparing(pmui.Paper(*parts, **look, css_classes=["sdlx-card", f"sdlx-{name}"]))


def _sparing(box):
    """Leave out what is hidden until it is first shown: the page is there sooner."""
    parts = list(box.objects)
    hidden = [part for part in parts if not part.visible] if served() else []

    def show(event) -> None:
        if event.obj not in box.objects:
            after = [part for part in parts[parts.index(event.obj) :] if part in box.objects]
            box.insert(box.objects.index(after[0]) if after else len(box.objects), event.obj)

    for part in hidden:
        box.remove(part)
        part.param.watch(show, "visible")
    return box


def button(label: str, name: str, click, **more) -> pmui.Button:
    """A button that tests and styles find as `sdlx-name`."""
    look = {"size": "small", "variant": "outlined", "margin": (4, 3), "css_classes": [f"sdlx-{name}"]}
    return pmui.Button(label=label, on_click=click, **{**look, **more})


class Text(JSComponent):
    """One piece of live text. `role="status"` has it read aloud when it changes. `call()` brings it into view."""

    text = param.String(default="", doc="What it says; shown as it is, without markup.")
    tag = param.Selector(default="div", objects=["div", "h1", "h2", "h3", "p", "span"], doc="The element it is.")
    role = param.String(default="", doc="ARIA role, for instance 'status' or 'alert'; empty for none.")
    tone = param.Selector(default="normal", objects=["normal", "quiet", "number", "warning", "badge"], doc="How it looks.")
    actions = param.List(default=[], item_type=str, doc="Expressions; what they match in the text is a button.")
    called = param.Boolean(default=False, doc="It is to come into view; the browser takes it back.")

    _esm = ESM / "text.js"
    _stylesheets = [
        """
        .sdlx-line { margin: 0; color: inherit; font-size: 14px; line-height: 1.45;
          overflow-wrap: anywhere; white-space: pre-line }
        .sdlx-line.quiet { font-size: 12.5px; opacity: .85 }
        .sdlx-line.number { font-variant-numeric: tabular-nums }
        .sdlx-line.warning { font-weight: 600 }
        .sdlx-line.badge { font-size: 12.5px; display: inline-block; padding: 1px 10px;
          border: 1px solid currentColor; border-radius: 12px }
        h1.sdlx-line { font-size: 21px; font-weight: 600 }
        h2.sdlx-line { font-size: 16px; font-weight: 600 } h3.sdlx-line { font-size: 14px; font-weight: 600 }
        .sdlx-line:focus { outline: none }
        """
    ]

    def __init__(self, text="", **params):
        super().__init__(**{"text": text, "sizing_mode": "stretch_width", "margin": (2, 10), **params})

    def call(self) -> None:
        """Scroll to it and put the focus there; the next Tab goes on from it."""
        self.called = True


class Words(Text):
    """Fixed words whose [actions] are buttons: the host carries them out."""

    _stylesheets = [*Text._stylesheets, BUTTONS]

    def __init__(self, host, text="", **params):
        super().__init__(text, actions=list(host.actions), **params)
        self._host = host

    def _handle_msg(self, msg):
        action = msg.get("act") if isinstance(msg, dict) else None
        if isinstance(action, str):
            pn.state.execute(functools.partial(self._host.act, action))


class Fold(pn.viewable.Viewer):
    """Parts under a heading that opens and closes them; closed at first."""

    def __init__(self, label: str, *parts, name: str):
        super().__init__()
        self.heading = Disclosure(label=label, css_classes=[f"sdlx-fold-{name}"])
        self.body = stack(*parts, visible=False)
        self.heading.param.watch(lambda event: setattr(self.body, "visible", event.new), "open")
        self._view = stack(self.heading, self.body)

    def __panel__(self):
        return self._view


class Disclosure(JSComponent):
    """The heading of a fold: a button that says whether it is open."""

    label = param.String(default="", doc="What it opens.")
    open = param.Boolean(default=False, doc="It is open.")

    _esm = ESM / "disclosure.js"
    _stylesheets = [
        BUTTONS
        + "h3 { margin: 0 } button { border-color: transparent; padding: 2px 4px; font-size: 14px; font-weight: 600; text-align: left }"
    ]

    def __init__(self, **params):
        super().__init__(**{"sizing_mode": "stretch_width", "margin": (4, 6), **params})


class Html(JSComponent):
    """Markup that a view wrote and escaped itself (example cards, tiles); a click on `data-pick` calls `on_pick`."""

    html = param.String(default="", doc="Markup whose data parts are escaped already.")

    _esm = ESM / "html.js"

    def __init__(self, html="", on_pick=lambda pick: None, **params):
        self._on_pick = on_pick
        super().__init__(**{"html": html, "sizing_mode": "stretch_width", "margin": (2, 10), **params})

    def _handle_msg(self, msg):
        if isinstance(msg, dict) and isinstance(msg.get("pick"), str):
            self._on_pick(msg["pick"])


class RowKeys(JSComponent):
    """A table that the keyboard can walk: one tab stop; arrows, Page and Home/End move the row."""

    table = Child()
    label = param.String(default="Table", doc="Accessible name.")

    MOVES = ("up", "down", "pageup", "pagedown", "home", "end")
    _esm = ESM / "row_keys.js"
    _stylesheets = [".frame:focus-visible { outline: 2px solid currentColor; outline-offset: 1px }"]

    def __init__(self, table, on_move, **params):
        self._on_move = on_move
        super().__init__(**{"table": table, "sizing_mode": "stretch_width", **params})

    def _handle_msg(self, msg):
        if isinstance(msg, dict) and msg.get("move") in self.MOVES:
            self._on_move(msg["move"])


class Keys(JSComponent):
    """Single-key shortcuts, heard on the app's root element and never while a field, slider, menu or table has focus."""

    active = param.Boolean(default=True, doc="Listen.")
    follow = param.Boolean(default=True, doc="Say so when JupyterLab or the operating system asks for dark.")

    _esm = ESM / "keys.js"

    def __init__(self, on_key, **params):
        self._on_key = on_key
        super().__init__(**{"width": 0, "height": 0, "margin": 0, **params})

    def _handle_msg(self, msg):
        key = msg.get("key") if isinstance(msg, dict) else None
        if isinstance(key, str) and len(key) < 24:
            self._on_key(key)


class PageTabs(JSComponent):
    """The pages as ARIA tabs whose names are exactly their titles."""

    value = param.String(default="", doc="The page in front.")
    options = param.List(default=[], item_type=str, doc="Titles.")

    _esm = ESM / "page_tabs.js"
    _stylesheets = [
        """
        .tabs { display: flex; gap: 4px; border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent) }
        button { font: inherit; font-size: 14px; padding: 9px 16px; color: inherit; background: transparent; border: 0;
          border-bottom: 3px solid transparent; cursor: pointer }
        button[aria-selected=true] { border-bottom-color: currentColor; font-weight: 600 }
        button:hover { background: color-mix(in srgb, currentColor 8%, transparent) }
        button:focus-visible { outline: 2px solid currentColor; outline-offset: -3px }
        """
    ]


class CardMenu(JSComponent):
    """Table, and what leaves the page: CSV and Python."""

    label = param.String(default="", doc="The card's question.")
    twin = param.Boolean(default=False, doc="The table is shown.")

    ACTIONS = ("table", "csv", "python", "about")
    _esm = ESM / "card_menu.js"
    _stylesheets = [
        BUTTONS
        + """
        .bar { position: relative; display: flex; gap: 6px; align-items: center; justify-content: flex-end; white-space: nowrap }
        .said { font-size: 12.5px }
        .menu { position: absolute; right: 0; top: 32px; z-index: 20; display: flex; flex-direction: column; padding: 4px;
          border-radius: 6px;
          background: var(--sdlx-paper, Canvas); border: 1px solid color-mix(in srgb, currentColor 40%, transparent) }
        .menu[hidden] { display: none }
        .menu button { border: 0; text-align: left }
        """
    ]

    def __init__(self, on_action, **params):
        self._on_action = on_action
        super().__init__(**{"margin": (4, 10), "width": 130, **params})

    def _handle_msg(self, msg):
        if isinstance(msg, dict) and msg.get("do") in self.ACTIONS:
            self._on_action(msg["do"])

    def download(self, csv: str, name: str) -> None:
        self._send_msg({"csv": csv, "name": name})

    def copy(self, python: str) -> None:
        self._send_msg({"python": python})


class CommitTicks(JSComponent):
    """Commits as a list of buttons."""

    commits = param.List(default=[], doc="Dicts: id, step, glyph, label, kind, current, ghost.")
    picked = param.String(default="", doc="The commit that is inspected.")

    _esm = ESM / "timeline.js"
    _stylesheets = [
        BUTTONS
        + """
        ol { display: flex; gap: 4px; margin: 0; padding: 3px; list-style: none; overflow-x: auto; scrollbar-width: thin }
        button { white-space: nowrap; font-variant-numeric: tabular-nums }
        button.current { border: 2px solid currentColor; font-weight: 600 }
        button.ghost { border-style: dashed; opacity: .7 }
        """
    ]

    def __init__(self, on_pick, **params):
        self._on_pick = on_pick
        super().__init__(**{"sizing_mode": "stretch_width", "margin": (2, 10), **params})

    def _handle_msg(self, msg):
        if isinstance(msg, dict) and any(msg.get("commit") == one["id"] for one in self.commits):
            self._on_pick(msg["commit"])
