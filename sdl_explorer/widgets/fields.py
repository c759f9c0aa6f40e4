"""A setting as a field: kind, bounds, choices and words all come from its parameter."""

import panel as pn
import panel_material_ui as pmui
import param
from bokeh.models import CustomJSTickFormatter

MAIN = ("k", "l1", "l0", "l0_target")  # settings of methods that say how sparse codes are
LOOK = {"size": "small", "margin": (5, 10)}


def offered(owner) -> list[str]:
    """The settings of an object that can have a field, in the order in which they were declared."""
    parameters = owner.param.objects("existing")
    return [name for name, p in parameters.items() if name != "name" and isinstance(p, tuple(_MAKERS)) and not p.constant]


def field(owner, name: str, label: str = "", css: str = "set", choices: dict | None = None, **look):
    """A field that holds `owner.name`. Its `value` is what the parameter takes; empty is None.

    A typed number may be out of bounds: the parameter refuses it, with a reason. `choices` are words for a selector's objects.
    """
    parameter = owner.param[name]
    make = next(make for kind, make in _MAKERS.items() if isinstance(parameter, kind))
    shown = {"label": label or spoken(name), "css_classes": [f"sdlx-{css}-{name.replace('_', '-')}"], **LOOK, **look}
    return make(parameter, getattr(owner, name), choices, {**shown, "description": parameter.doc or None})


def spoken(name: str) -> str:
    return name.replace("_", " ")


def said(name: str, value) -> str:
    """'lr = 0.01', 'l0 target = none', 'ramps = k from 64 in 1000 steps'"""
    return f"{spoken(name)} = {_word(value)}"


def _word(value) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, dict):
        return ", ".join(f"{spoken(name)} from {_word(start)} in {steps} steps" for name, (start, steps) in value.items()) or "none"
    return ", ".join(map(_word, value)) or "none" if isinstance(value, list | tuple) else str(value)


class Numbers(pn.viewable.Viewer):
    """A list of numbers as text: '0.25, 0.5'."""

    value = param.List(default=[], doc="The numbers.")

    def __init__(self, value, **look):
        super().__init__(value=list(value))
        self._text = pmui.TextInput(value=_word(value) if value else "", **look)
        self._text.param.watch(self._read, "value")
        self.param.watch(self._show, "value")

    def __panel__(self):
        return self._text

    def _read(self, event) -> None:
        """What is no number stays text, which the setting refuses with a reason."""
        self.value = [_number(part.strip()) for part in (event.new or "").split(",") if part.strip()]

    def _show(self, event) -> None:
        if [_number(part.strip()) for part in self._text.value.split(",") if part.strip()] != event.new:
            self._text.value = _word(event.new) if event.new else ""


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _choice(parameter, value, choices, look):
    words = choices or {str(one): one for one in parameter.objects}
    return pmui.Select(options=words, value=value, **look)


def _switch(parameter, value, choices, look):
    return pmui.Checkbox(value=value, **look)


def _whole(parameter, value, choices, look):
    return whole(value, **_ends(parameter), **look)


def _real(parameter, value, choices, look):
    return real(value, step=max(abs(value or 0) / 10, 1e-6), **_ends(parameter), **look)


class _Empty:
    """Tells the browser of an empty field: Panel leaves out what is None, and the browser then takes 0."""

    def _get_properties(self, doc):
        properties = super()._get_properties(doc)
        properties["data"].value = self.value
        return properties


class Whole(_Empty, pmui.IntInput):
    """A whole number, or none."""


class Real(_Empty, pmui.FloatInput):
    """A number, or none."""


def whole(value: int | None, **look) -> Whole:
    return Whole(**{"value": value, "step": 1, "format": _digits(), **look})


def real(value: float | None, **look) -> Real:
    return Real(**{"value": value, "format": _digits(), **look})


def _digits() -> CustomJSTickFormatter:
    """All digits of a number, and nothing for none: the usual format makes 0.00003 and none to 0.0."""
    return CustomJSTickFormatter(code="return tick == null ? '' : tick.toLocaleString('en', { maximumSignificantDigits: 12 })")


def _ends(parameter) -> dict:
    """Where its buttons stop, and what an empty field says."""
    low, high = parameter.bounds or (None, None)
    return {"start": low, "end": high, "placeholder": "none" if parameter.allow_None else ""}


def _list(parameter, value, choices, look):
    return Numbers(value, **look)


_MAKERS = {param.Selector: _choice, param.Boolean: _switch, param.Integer: _whole, param.Number: _real, param.List: _list}
