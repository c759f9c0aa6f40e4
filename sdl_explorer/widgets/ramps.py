"""Ramps: which numbers of the method start elsewhere, from where, and over how many steps."""

import panel as pn
import panel_material_ui as pmui
import param

from sdl_explorer.widgets.fields import LOOK, MAIN, real, spoken, whole
from sdl_explorer.widgets.kit import Text, button, stack

ABOUT = "Ramps: a number of the method goes in a straight line from a start to its own value, counted from step 0 of the run."
STEPS = 1_000


class Ramps(pn.viewable.Viewer):
    """`value` is what `Session.ramps` takes: {"k": [256, 1000]}; a row is one of its entries."""

    value = param.Dict(default={}, doc="Per number of the method its start and the steps it takes.")

    def __init__(self, method, value: dict):
        super().__init__()
        self.method, self._reading, self._rows = method, False, []
        self._list = stack()
        self.add = button("Add a ramp", "ramp-add", self._add, margin=(4, 10))
        self._view = stack(Text(ABOUT, tone="quiet"), self._list, self.add)
        self.param.watch(self._show, "value")
        self.value = value

    def __panel__(self):
        return self._view

    @property
    def numbers(self) -> list[str]:
        """Settings that can be ramped: numbers that the method holds and that may change, the main ones first."""
        parameters = self.method.param.objects("existing").items()
        found = [n for n, p in parameters if isinstance(p, param.Number) and not p.constant and getattr(self.method, n) is not None]
        return sorted(found, key=lambda name: name not in MAIN)

    def _show(self, event) -> None:
        """Rows for a value that came from elsewhere."""
        if not self._reading:
            self._rows = [_Row(self, name, *pair) for name, pair in event.new.items()]
            self._lay()

    def _lay(self) -> None:
        self._list.objects = [row.view for row in self._rows]
        self.add.disabled = len(self._rows) >= len(self.numbers)

    def read(self, event=None) -> None:
        """The value that the rows say; the last of two rows about one number counts."""
        self._reading = True
        try:
            self.value = dict(row.entry() for row in self._rows)
        finally:
            self._reading = False

    def _add(self, event=None) -> None:
        taken = {row.setting.value for row in self._rows}
        free = next(name for name in self.numbers if name not in taken)
        self._rows.append(_Row(self, free, getattr(self.method, free), STEPS))
        self._lay()
        self.read()

    def remove(self, row: "_Row") -> None:
        self._rows = [one for one in self._rows if one is not row]
        self._lay()
        self.read()


class _Row:
    """One ramp: the number, its start, its steps, and × to drop it."""

    def __init__(self, ramps: Ramps, name: str, start, steps):
        self.ramps = ramps
        look = {"size": LOOK["size"], "margin": (5, 4)}
        options = {spoken(one): one for one in dict.fromkeys([*ramps.numbers, name])}
        step = 1 if isinstance(ramps.method.param[name], param.Integer) else max(abs(start) / 10, 0.001)
        self.setting = pmui.Select(label="Ramp", options=options, value=name, width=180, **look, css_classes=["sdlx-ramp-setting"])
        self.start = real(start, label="from", step=step, width=105, **look, css_classes=["sdlx-ramp-start"])
        self.steps = whole(steps, label="in steps", start=1, step=100, width=130, **look, css_classes=["sdlx-ramp-steps"])
        drop = button("×", "ramp-drop", lambda event: ramps.remove(self), description="Drop this ramp", width=40)
        for one in (self.setting, self.start, self.steps):
            one.param.watch(ramps.read, "value")
        self.view = stack(pn.Row(self.setting, drop, margin=0), pn.Row(self.start, self.steps, margin=0), margin=(2, 6))

    def entry(self) -> tuple[str, list]:
        """The number and its pair. An empty start is the number's own value; a whole one stays whole."""
        name, method = self.setting.value, self.ramps.method
        start = getattr(method, name) if self.start.value is None else self.start.value
        whole = isinstance(method.param[name], param.Integer) and start == int(start)
        return name, [int(start) if whole else start, self.steps.value]
