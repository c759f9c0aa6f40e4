"""The left rail: what the data and the model are, and settings of the next step."""

import importlib.util

import panel as pn

from sdl_explorer.widgets.fields import MAIN, field, offered, said
from sdl_explorer.widgets.kit import Fold, Text, button, stack
from sdl_explorer.widgets.new_run import NewRun
from sdl_explorer.widgets.ramps import Ramps

TRAIN = ("lr", "batch_size", "warmup_steps", "dead_after")  # of the session, always in view
OPTIMISER = ("optimiser", "clip_norm", "decay_steps", "decay")  # first in their fold; what else a session has follows
LEFT_OUT = ("budget",)  # of commits: a visitor may not raise it
LABELS = {"dead_after": "dead after (samples)", "decay_steps": "decay over (steps)"}
OPTIMISERS = {"adam": "Adam", "signsgd": "schedule-free sign descent"}
WITHOUT = "Schedule-free sign descent needs the package schedulefree, which is not here: pip install 'sdl-explorer[optim]'."
WIDTH = 220


class Settings(pn.viewable.Viewer):
    """Edits wait here until *Apply from here* writes a commit; nothing changes a live model silently.

    A setting that a cell changes shows up here at the next poll, unless its field holds an edit of its own. A change that is
    refused leaves every setting as it was.
    """

    def __init__(self, host):
        super().__init__()
        self.host = host
        self._session = None
        self.data, self.model = Text("", tone="quiet", css_classes=["sdlx-data"]), Text("", tone="quiet", css_classes=["sdlx-model"])
        self._fields: dict[tuple[str, str], tuple] = {}
        self._column = stack()
        self.method, self.optimiser = Fold("More of the method", name="method"), Fold("Optimiser", name="optimiser")
        self.apply = button("Apply from here", "apply-settings", self._apply, disabled=True, variant="contained", margin=(6, 10))
        self.waiting = Text("", tone="quiet", role="status", css_classes=["sdlx-waiting"])
        self.new_run: NewRun | None = None  # made with the fields: the first screen does not wait for it
        self._view = stack(
            Text("Data", tag="h2"),
            self.data,
            Text("Model", tag="h2"),
            self.model,
            Text("Train", tag="h2"),
            self._column,
            self.method,
            self.optimiser,
            self.apply,
            self.waiting,
            margin=(6, 2),
            css_classes=["sdlx-settings"],
        )

    def __panel__(self):
        return self._view

    def refresh(self) -> None:
        if self._session is not self.host.session:
            self._build()
        for widget, owner, name, seen in self._fields.values():
            value = _plain(getattr(owner, name))
            if value != seen[0]:  # changed elsewhere, for instance in a cell
                seen[0] = value
                widget.value = value
        if self.new_run is not None:
            self.new_run.refresh()
        self._mark()

    def _build(self) -> None:
        session = self._session = self.host.session
        self.data.text, self.model.text = self.host.describe_data(), self.host.describe_model()
        self._fields.clear()
        own = offered(session.method)
        main = [name for name in own if name in MAIN]
        self._column.objects = [
            *(self._add(session, name) for name in TRAIN),
            *(self._add(session.method, name) for name in main),
        ]
        self.method.body.objects = [self._add(session.method, name) for name in own if name not in MAIN]
        free = importlib.util.find_spec("schedulefree") is not None
        choices = {word: name for name, word in OPTIMISERS.items() if name == "adam" or free}
        about = () if free else (Text(WITHOUT, tone="quiet", css_classes=["sdlx-without"]),)
        first, *others = dict.fromkeys([*OPTIMISER, *(name for name in offered(session) if name not in (*TRAIN, *LEFT_OUT))])
        self.optimiser.body.objects = [
            self._add(session, first, choices),
            *about,
            *(self._add(session, name) for name in others),
            self._watch(session, "ramps", Ramps(session.method, _plain(session.ramps))),
        ]
        if self.new_run is None:
            self.new_run = NewRun(self.host)
            self._view.append(self.new_run)

    def _add(self, owner, name: str, choices: dict | None = None):
        return self._watch(owner, name, field(owner, name, LABELS.get(name, ""), choices=choices, width=WIDTH))

    def _watch(self, owner, name: str, widget):
        widget.param.watch(lambda event: self._mark(), "value")
        self._fields[type(owner).__name__, name] = (widget, owner, name, [_plain(getattr(owner, name))])
        return widget

    def _edits(self) -> list:
        return [(owner, name, widget.value) for widget, owner, name, seen in self._fields.values() if widget.value != seen[0]]

    def _mark(self) -> None:
        edits = self._edits()
        self.apply.disabled = not edits or not self.host.session.writable
        self.waiting.text = f"Waiting: {_all_said(edits)}" if edits else ""

    async def _apply(self, event) -> None:
        edits = self._edits()

        def apply(session):
            former = [(owner, name, getattr(owner, name)) for owner, name, _ in edits]
            try:
                for owner, name, value in edits:
                    setattr(owner, name, value)
                return session.commit()
            except Exception:
                for owner, name, value in former:
                    setattr(owner, name, value)
                raise

        await self.host.do(apply, self.host.session, said=f"Settings take effect from here: {_all_said(edits)}")


def _all_said(edits) -> str:
    """'lr = 0.01, l0 target = none'"""
    return ", ".join(said(name, value) for _, name, value in edits)


def _plain(value):
    """Ramps as a field holds them, whether a cell gave tuples or a file lists."""
    return {name: list(pair) for name, pair in value.items()} if isinstance(value, dict) else value
