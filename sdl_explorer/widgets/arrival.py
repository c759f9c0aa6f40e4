"""What a cell displays: how it gets to the browser, and whether it has arrived."""

import sys
from contextlib import nullcontext, redirect_stdout

import panel as pn
import panel_material_ui as pmui
from bokeh.models import ImportedStyleSheet, UIElement
from panel.custom import JSComponent
from panel.io.notebook import replace_inline_css
from panel.models.esm import ReactComponent


class Arrival(JSComponent):
    """Nothing to see: it says when the browser has drawn the display that it is part of.

    A notebook's front end throws away what it is sent before that, so changes wait until `there`.
    """

    _esm = """export function render({ model }) { model.send_msg("drawn") }"""

    def __init__(self, **params):
        self.drawn = False
        super().__init__(**{"width": 0, "height": 0, "margin": 0, **params})

    def _handle_msg(self, msg):
        self.drawn = True

    @property
    def there(self) -> bool:
        """Drawn; or shown nowhere, or on a served page, which waits by itself."""
        views = (pn.state._views[ref] for ref in self._models if ref in pn.state._views)
        return self.drawn or all(comm is None for *_, comm in views)


class Cell(pmui.Column):
    """A display in a cell, which brings the script of its components once.

    In a notebook that may have no internet, Panel gives each of more than a hundred components the whole script, 1.4 MB. The browser
    keeps the first that it makes, children before parents, under the bundle's name: so the first child alone carries it. The root has to be
    such a component too: another would be wrapped in one, which sends everything. Stylesheets, which every component names, come once.
    """

    def __init__(self, view, lock, **params):
        super().__init__(pmui.Divider(visible=False), view, **{"sizing_mode": "stretch_width", "margin": 0, **params})
        self._lock, self._stdout, self._sheets = lock, sys.stdout, {}

    def _on_msg(self, ref, manager, msg):
        """JupyterLab's messages arrive on a thread of their own.

        Panel drops changes that another thread makes meanwhile, so messages and polls take turns with `lock`; and pyviz_comms
        catches what the whole process prints meanwhile, also what a cell prints.
        """
        with redirect_stdout(self._stdout), self._lock:
            super()._on_msg(ref, manager, msg)

    def _preprocess(self, root, changed=None, old_models=None):
        with root.document.models.freeze() if root.document else nullcontext():
            for model in root.select({"type": UIElement}) if pn.config.inline else ():
                model.stylesheets = [self._inlined(sheet) for sheet in model.stylesheets]
            super()._preprocess(root, changed, old_models)
        first, _ = self[0]._models[root.ref["id"]]
        for model in root.select({"type": ReactComponent}):
            if model is not first and model.esm and model.bundle == first.bundle != "url":
                model.esm = ""

    def _inlined(self, sheet):
        """The text of a stylesheet of Panel's in place of its address: one model for all components."""
        if not isinstance(sheet, ImportedStyleSheet):
            return sheet
        return self._sheets.setdefault(sheet.url, replace_inline_css(sheet))
