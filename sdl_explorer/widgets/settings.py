"""The left rail: what the data and the model are, and settings of the next step."""

import panel as pn
import panel_material_ui as pmui
import param

from sdl_explorer.widgets.kit import Text, button, stack
from sdl_explorer.widgets.new_run import NewRun

NUMBERS = (param.Number, param.Integer)
TRAIN = ("lr", "batch_size", "warmup_steps")


class Settings(pn.viewable.Viewer):
    """Edits wait here until *Apply from here* writes a commit; nothing changes a live model silently.

    A setting that a cell changes shows up here at the next poll, unless its field holds an edit of its own.
    """

    def __init__(self, host):
        super().__init__()
        self.host = host
        self._session = None
        self.data, self.model = Text("", tone="quiet", css_classes=["sdlx-data"]), Text("", tone="quiet", css_classes=["sdlx-model"])
        self._fields: dict[tuple[str, str], tuple] = {}
        self._column = stack()
        self.apply = button("Apply from here", "apply-settings", self._apply, disabled=True, variant="contained", margin=(6, 10))
        self.waiting, self.new_run = Text("", tone="quiet"), NewRun(host)
        self._view = stack(
            Text("Data", tag="h2"),
            self.data,
            Text("Model", tag="h2"),
            self.model,
            Text("Train", tag="h2"),
            self._column,
            self.apply,
            self.waiting,
            self.new_run,
            margin=(6, 2),
            css_classes=["sdlx-settings"],
        )

    def __panel__(self):
        return self._view

    def refresh(self) -> None:
        if self._session is not self.host.session:
            self._build()
        for widget, owner, name, seen in self._fields.values():
            value = getattr(owner, name)
            if value != seen[0]:  # changed elsewhere, for instance in a cell
                seen[0] = value
                widget.value = value
        self._mark()

    def _build(self) -> None:
        session = self._session = self.host.session
        self.data.text, self.model.text = self.host.describe_data(), self.host.describe_model()
        owners = [(session, name) for name in TRAIN] + [
            (session.method, name)
            for name, p in session.method.param.objects("existing").items()
            if isinstance(p, NUMBERS) and not p.constant
        ]
        self._fields.clear()
        for owner, name in owners:
            widget = _field(owner, name)
            widget.param.watch(lambda event: self._mark(), "value")
            self._fields[type(owner).__name__, name] = (widget, owner, name, [getattr(owner, name)])
        self._column.objects = [widget for widget, *_ in self._fields.values()]

    def _edits(self) -> dict:
        return {key: (owner, name, widget.value) for key, (widget, owner, name, seen) in self._fields.items() if widget.value != seen[0]}

    def _mark(self) -> None:
        edits = self._edits()
        self.apply.disabled = not edits or not self.host.session.writable
        self.waiting.text = f"Waiting: {_said(edits.values())}" if edits else ""

    async def _apply(self, event) -> None:
        edits = list(self._edits().values())

        def apply(session):
            for owner, name, value in edits:
                setattr(owner, name, value)
            return session.commit()

        await self.host.do(apply, self.host.session, said=f"Settings take effect from here: {_said(edits)}")


def _said(edits) -> str:
    """'lr = 0.01, l0 target = none'"""
    return ", ".join(f"{name.replace('_', ' ')} = {'none' if value is None else f'{value:g}'}" for _, name, value in edits)


def _field(owner, name: str):
    """A number field with the parameter's own bounds and doc."""
    parameter = owner.param[name]
    low, high = parameter.bounds or (None, None)
    kind = pmui.IntInput if isinstance(parameter, param.Integer) else pmui.FloatInput
    step = 1 if kind is pmui.IntInput else max(abs(getattr(owner, name) or 0) / 10, 1e-6)
    return kind(
        label=name.replace("_", " "), value=getattr(owner, name), start=low, end=high, step=step, description=parameter.doc or None,
        width=220, size="small", margin=(5, 10), css_classes=[f"sdlx-set-{name.replace('_', '-')}"],
    )  # fmt: skip
