"""A card answers one question: a sentence, a plot, its table, and words when there is nothing to draw."""

import logging
import time
from dataclasses import fields

import holoviews as hv
import panel as pn

from sdl_explorer.views.look import Look
from sdl_explorer.views.view import Chosen, View
from sdl_explorer.views.words import count, not_finite
from sdl_explorer.widgets.kit import CardMenu, Text, Words, row, sheet, stack
from sdl_explorer.widgets.selection import PlotLink
from sdl_explorer.widgets.table_twin import TableTwin

log = logging.getLogger(__name__)
REST = 4.0  # while training, a plot is drawn again after this many times as long as the last time took: Stop must be heard
SELECTION = {"selected_latents", "selected_features"}
FIELDS = {field.name for field in fields(Look)}


class WatchedLook(Look):
    """A look that remembers which of its fields were read."""

    @classmethod
    def of(cls, look: Look) -> "WatchedLook":
        watched = cls(**{field.name: getattr(look, field.name) for field in fields(look)})
        object.__setattr__(watched, "reads", {"theme"})
        return watched

    def __getattribute__(self, name: str):
        value = object.__getattribute__(self, name)
        if name in FIELDS and "reads" in object.__getattribute__(self, "__dict__"):
            self.reads.add(name)
        return value


class Card(pn.viewable.Viewer):
    """One view in its frame. `refresh` compares what it would draw with what it has drawn and does nothing if equal."""

    def __init__(self, host, view: View):
        super().__init__()
        self.host, self.view = host, view
        self._drawn = self._element = self._kept = self._made = self._frame = None
        self.reading = Words(host, "", role="status", css_classes=["sdlx-reading"])
        self.stamp = Text("Waiting for the first numbers.", tone="quiet", css_classes=["sdlx-stamp"])
        # words that may be all there is from the first are there from the first: a browser misses what comes in the batch of its card
        waits = any(isinstance(one, Chosen) for one in view.of)
        self.words = Words(host, "", visible=waits, css_classes=["sdlx-words"])
        self.about = Text("", tone="quiet", visible=False)
        self.menu = CardMenu(self._act, label=view.question)
        self._link = PlotLink(host)
        self._reads: set[str] = set()
        self._free_at = 0.0
        self._redraw = None
        self._plot, self._table = stack(), stack(visible=False, margin=(0, 10))
        self._twin = None
        self.title = Text(view.question, tag="h2", css_classes=["sdlx-title"])
        self._view = sheet(
            row(self.title, self.menu),
            self.reading,
            self.words,
            self._plot,
            self._table,
            self.about,
            self.stamp,
            name=f"card-{view.id}",
        )

    def __panel__(self):
        return self._view

    def refresh(self) -> None:
        """Bring the card up to date with what is known now."""
        found = self.host.gather(self.view)
        look = self.host.look()
        twin = self.view.id in self.host.state.twins
        self._stamp(found)
        if self._drawn is not None:
            key, *seen = self._drawn
            same = seen == [twin, self._read_of(look)]
            if same and (key == found.key or (self.host.snapshot.running and time.monotonic() < self._free_at)):
                return
        if found.pending and self._kept is None:
            self.stamp.text = "Being computed…"
            return  # the skeleton stands: title and stamp
        if not found.pending:
            self._kept = found
        begun, watched = time.monotonic(), WatchedLook.of(look)
        try:
            self._fill(self._kept, watched, twin)
        except Exception as error:  # one card fails, the page stays
            log.exception("card %s", self.view.id)
            self._say(not_finite(self.host.snapshot.step) if isinstance(error, FloatingPointError) else self.host.failure(error))
        self._reads = watched.reads
        self._drawn = (found.key, twin, self._read_of(look))
        self._free_at = time.monotonic() + REST * (time.monotonic() - begun)

    def _read_of(self, look: Look) -> tuple:
        """What the view read of the look the last time it drew: a curve that knows no selection is not drawn for one."""
        names = self._reads | (SELECTION if self._link.linked else set())
        return tuple((name, getattr(look, name)) for name in sorted(names))

    def _fill(self, found, look, twin: bool) -> None:
        diverged = self.host.snapshot.diverged
        if found.error is not None:
            self._say(self.host.failure(found.error) if diverged is None else not_finite(diverged.step))
            return
        self.title.text = self.view.title(*found.values, look)
        why = self.view.empty(*found.values, look)
        if why is not None:
            self._say(why)
            return
        self.reading.text = self.view.reading(*found.values, look)
        self.words.visible = False
        self._plot.visible = True
        self._draw(found, look)
        self._show_table(found, look, twin)

    def _draw(self, found, look) -> None:
        """In place while the layers are the same; a plot of another make otherwise."""
        self._element = self._link.attach(self.view(*found.values, look))
        make = (look.theme, _make(self._element))
        if make == self._made:
            self._redraw.event(counter=self._redraw.counter + 1)
            return
        self._made, self._redraw = make, hv.streams.Counter()
        if isinstance(self._element, hv.Layout):
            panels = [
                hv.DynamicMap(lambda counter, at=at: self._element.values()[at], streams=[self._redraw]) for at in range(len(self._element))
            ]
            plot = hv.Layout(panels).cols(1).opts(shared_axes=True, merge_tools=True, toolbar="above", backend="bokeh")
        else:
            plot = hv.DynamicMap(lambda counter: self._element, streams=[self._redraw])
        self._plot.objects = [pn.pane.HoloViews(plot, sizing_mode="stretch_width", linked_axes=False, css_classes=["sdlx-plot"])]

    def _show_table(self, found, look, twin: bool) -> None:
        self.menu.twin = twin
        if twin:
            if self._twin is None:
                self._twin = TableTwin(self.host, f"Table: {self.view.question}")
                self._table.append(self._twin)
            frame = self.view.table(*found.values, look)
            if self._frame is None or not frame.equals(self._frame):
                self._frame = frame
                self._twin.show(frame)
            self._twin.sync()
        self._table.visible = twin

    def _say(self, why: str) -> None:
        """Words instead of a plot."""
        self.words.text, self.words.visible = why, True
        self.reading.text = ""
        self._plot.visible = self._table.visible = False

    def _stamp(self, found) -> None:
        if found.step is None:
            return
        text = f"computed at step {count(found.step)}"
        if found.note:
            text += f" · {found.note}"
        now = self.host.snapshot.step
        if found.step != now:
            text += f" · the model is at step {count(now)} now"
        self.stamp.text = text
        stale = found.step != now and not self.host.snapshot.running
        wanted = [*(c for c in self._view.css_classes if c != "sdlx-stale"), *(["sdlx-stale"] if stale else [])]
        if wanted != self._view.css_classes:
            self._view.css_classes = wanted
            self._plot.styles = {"opacity": "0.55"} if stale else {}

    def _act(self, action: str) -> None:
        if action == "table":
            twins = self.host.state.twins
            self.host.state.twins = tuple(t for t in twins if t != self.view.id) if self.view.id in twins else (*twins, self.view.id)
        elif action == "about":
            self.about.text = " ".join((self.view.__doc__ or "").split())
            self.about.visible = not self.about.visible
        elif action == "python":
            self.menu.copy(self.python())
        elif self._kept is not None and self._kept.error is None:
            self.menu.download(self.view.table(*self._kept.values, self.host.look()).to_csv(index=False), f"{self.view.id}.csv")

    def python(self) -> str:
        """Lines that give this card's table in a fresh cell."""
        return self.host.python(self.view)


def _make(element) -> tuple:
    """What a plot cannot change in place: its height and the kinds of its layers. Layers of a kind may come and go."""
    if isinstance(element, hv.Layout):
        return ("Layout", *(_make(part) for part in element))
    layers = element if isinstance(element, hv.Overlay) else [element]
    return (_height(element), type(element).__name__, *sorted({type(layer).__name__ for layer in layers}))


def _height(element):
    return hv.Store.lookup_options("bokeh", element, "plot").kwargs.get("height")
