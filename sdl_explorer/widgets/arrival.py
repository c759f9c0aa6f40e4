"""What a cell displays: how it gets to the browser, and whether it has arrived."""

import sys
from contextlib import redirect_stdout

import panel as pn
import panel_material_ui as pmui
from panel.custom import JSComponent
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


class Cell(pn.Column):
    """A display in a cell, which brings the script of its components once.

    In a notebook that may have no internet, Panel gives each of some fifty components the whole script, 1.4 MB. The browser keeps
    the first under the bundle's name, so the first component alone carries it.
    """

    def __init__(self, view, lock, **params):
        super().__init__(pmui.Divider(visible=False), view, **{"sizing_mode": "stretch_width", "margin": 0, **params})
        self._lock, self._stdout = lock, sys.stdout

    def _on_msg(self, ref, manager, msg):
        """JupyterLab's messages arrive on a thread of their own.

        Panel drops changes that another thread makes meanwhile, so messages and polls take turns with `lock`; and pyviz_comms
        catches what the whole process prints meanwhile, also what a cell prints.
        """
        with redirect_stdout(self._stdout), self._lock:
            super()._on_msg(ref, manager, msg)

    def _preprocess(self, root, changed=None, old_models=None):
        super()._preprocess(root, changed, old_models)
        first, _ = self[0]._models[root.ref["id"]]
        for model in root.select({"type": ReactComponent}):
            if model is not first and model.esm and model.bundle == first.bundle != "url":
                model.esm = ""
