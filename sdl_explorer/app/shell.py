"""The frame: app bar, left rail, pages, inspector, run bar."""

import logging

import panel as pn
import panel_material_ui as pmui

from sdl_explorer.app import pages
from sdl_explorer.state import PAGES
from sdl_explorer.views.words import NO_TRUTH
from sdl_explorer.widgets.arrival import Arrival
from sdl_explorer.widgets.filters import FilterChips
from sdl_explorer.widgets.inspector import Inspector
from sdl_explorer.widgets.kit import Keys, PageTabs, Text, Words, button, row, served, stack
from sdl_explorer.widgets.run_bar import RunBar
from sdl_explorer.widgets.settings import Settings
from sdl_explorer.widgets.timeline import Timeline

log = logging.getLogger(__name__)
FIRST = 2  # parts of a page that are on the first screen
UNDO = "Undoes what you see. To undo a change to the model, use the timeline."
HELP = """Space plays and pauses · . one step · Shift+. the chosen number of steps · ← → previous and next latent · 1 to 7 pages
/ search a latent · A anchor the primary · R preview a resample · T tables · Esc close, then clear · Ctrl+Z undoes what you see
In a table: ↑ ↓ PgUp PgDn Home End move the row, and the row is the selection."""
ON_BAR = {"variant": "text", "margin": (4, 2), "sx": {"color": "#FFFFFF", "&.Mui-disabled": {"color": "rgba(255, 255, 255, 0.65)"}}}
NAMES = {"sizing_mode": None, "styles": {"color": "#FFFFFF"}, "align": "center"}


class Frame(pn.viewable.Viewer):
    """The whole explorer in one page, served or in a cell."""

    def __init__(self, host):
        super().__init__()
        self.host = host
        self.run_bar, self.timeline, self.inspector = RunBar(host), Timeline(host), Inspector(host)
        self.settings, self.filters = Settings(host), FilterChips(host)
        self.pages = {title: pages.make(host, title) for title in PAGES}
        self.tabs = PageTabs(value=host.state.page, options=list(host.pages), sizing_mode="stretch_width", css_classes=["sdlx-tabs"])
        self.tabs.param.watch(lambda event: self._turn(event.new), "value")
        self.banner = Words(host, NO_TRUTH, tone="warning", visible=False, css_classes=["sdlx-banner"])
        self.message = Text("", role="status", tone="warning", visible=False, css_classes=["sdlx-message"])
        self.help = Text(HELP, tone="quiet", visible=False, css_classes=["sdlx-help-text"])
        self.live = Text("", tone="badge", **NAMES, css_classes=["sdlx-live"])
        self.title = Text("", tag="h1", **NAMES, css_classes=["sdlx-run-name"])
        self.undo = button("⟲ Undo", "undo", lambda event: self._step(host.state.undo), **ON_BAR, description=UNDO)
        self.redo = button("⟳ Redo", "redo", lambda event: self._step(host.state.redo), **ON_BAR, description=UNDO)
        self.question = button("? Help", "help", lambda event: self._toggle_help(), **ON_BAR)
        self.keys, self.arrival = Keys(self._key, active=host.state.keyboard), Arrival()
        self._later = {part: stack() for part in (self.settings, self.filters, self.timeline, self.inspector)}
        self._actions, self._whole = row(sizing_mode=None), False
        if not served():
            self._complete()
            for title in host.pages:
                self.pages[title].show(True)
        fill = {"sizing_mode": "stretch_both"} if served() else {}
        content = pmui.Column(
            *self.pages.values(), sizing_mode="stretch_both" if served() else "stretch_width", margin=0, scroll="y" if served() else False
        )
        self.page = pmui.Page(
            title="",
            meta_title="SDL Explorer",
            header=[self.title, self.live, pn.HSpacer(), self._actions],
            sidebar=[self._later[self.settings]],
            sidebar_width=280,
            sidebar_open=served(),
            contextbar=[self._later[self.inspector]],
            contextbar_width=360,
            contextbar_open=served(),
            contextbar_variant="persistent",
            dark_theme=host.state.theme == "dark",
            busy_indicator=None,
            sx={
                "& .MuiDrawer-docked": {"pointerEvents": "none"},
                "& .MuiDrawer-paper": {"pointerEvents": "auto"},
            },  # closed ones cover the page
            main=[
                stack(
                    self.tabs,
                    self.help,
                    self.message,
                    self.banner,
                    self._later[self.filters],
                    content,
                    self._later[self.timeline],
                    self.run_bar,
                    self.keys,
                    self.arrival,
                    **fill,
                )
            ],
            css_classes=["sdlx-app"],
        )
        self.page.param.watch(lambda event: self._dress(event.new), "dark_theme")

    def __panel__(self):
        return self.page

    @property
    def shown(self):
        return self.pages[self.host.state.page]

    def needs(self):
        """Findings of the page in front and of the inspector."""
        now, before = self.shown.needs(self.host)
        extra, _ = self.inspector.needs()
        return [*dict.fromkeys([*now, *extra])], before

    def refresh(self) -> None:
        host, state, snapshot = self.host, self.host.state, self.host.snapshot
        if self.arrival.drawn:
            self._complete()
        for title, page in self.pages.items():
            page.show(title == state.page, most=None if self._whole else FIRST)
        self.tabs.param.update(options=list(host.pages), value=state.page)
        self.title.text = host.name_of_run()
        self.live.text = host.live_word()
        self.undo.disabled, self.redo.disabled = not state.can_undo, not state.can_redo
        self.message.text, self.message.visible = host.message, bool(host.message)
        self.banner.visible = not host.has_truth and state.page == "Alignment"
        self.page.dark_theme = state.theme == "dark"
        for part in (self.run_bar, self.shown, *(self._later if self._whole else ())):
            try:
                part.refresh()
            except Exception as error:  # one part fails, the frame stays, and says so
                log.exception("refresh of %s", type(part).__name__)
                self.message.text, self.message.visible = f"{type(part).__name__}: {host.failure(error)}", True
        self.keys.active = state.keyboard and not snapshot.stopping

    def _complete(self) -> None:
        """What stands around the page comes when a browser has drawn the page itself: the first screen is there sooner."""
        if not self._whole:
            self._whole = True
            self._actions.objects = [self.undo, self.redo, self.question]
            for part, place in self._later.items():
                place.append(part)

    def _turn(self, page: str) -> None:
        if page in PAGES and page != self.host.state.page:
            self.host.state.page = page
            self.host.poll()

    def _dress(self, dark: bool) -> None:
        self.host.state.theme = "dark" if dark else "light"
        self.host.poll()

    def _follow_dark(self) -> None:
        with self.host.state.unrecorded():
            self._dress(True)

    def _step(self, step) -> None:
        step()
        self.host.poll()

    def _toggle_help(self) -> None:
        self.help.visible = not self.help.visible

    def _key(self, key: str) -> None:
        """Single keys. A and R open forms, never apply."""
        host, state = self.host, self.host.state
        if key.startswith("page "):
            at = int(key.removeprefix("page ")) - 1
            if at < len(host.pages):
                self._turn(host.pages[at])
        elif key in ("undo", "redo"):
            self._step(getattr(state, key))
        elif key in ("previous", "next"):
            host.step_primary(-1 if key == "previous" else 1)
        elif key == "help":
            self._toggle_help()
        elif key == "dark":
            pn.state.onload(self._follow_dark)  # a browser that is still building the page would lose it
        elif key == "escape":
            self._escape()
        elif key == "T":
            state.twins = () if state.twins else tuple(card.view.id for card in self.shown.cards)
            host.poll()
        elif key in ("A", "R"):
            self.call("anchor" if key == "A" else "resample")
        elif key in ("Space", "step", "run"):
            pn.state.execute(getattr(self.run_bar, {"Space": "toggle", "step": "step_once", "run": "train_on"}[key]))

    def call(self, form: str, advice=None) -> None:
        """A, R and advice: the form with the selection in it; nothing is planned or applied."""
        self._turn("Intervene")
        self.shown.call(form, advice)

    def _escape(self) -> None:
        if self.help.visible:
            self.help.visible = False
        elif self.host.plan is not None:
            self.host.plan = None
        elif self.host.message:
            self.host.message = ""
        else:
            self.host.select(latents=())
        self.host.poll()
