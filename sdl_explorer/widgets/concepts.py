"""The cards about labelled concepts: they are there where rows have labels, and one of them opens the concept that is chosen."""

from dataclasses import replace

import panel_material_ui as pmui

from sdl_explorer.views.concepts import openable, opened
from sdl_explorer.views.view import find_view
from sdl_explorer.widgets.card import Card


class LabelCard(Card):
    """A card about labelled concepts; it is not there where rows have no labels."""

    def refresh(self) -> None:
        self._view.visible = self.host.sample.labels is not None
        if self._view.visible:
            super().refresh()


class ChildrenCard(LabelCard):
    """The children of one concept, with a menu of concepts."""

    def __init__(self, host):
        super().__init__(host, find_view("H8"))
        self.concept = pmui.Select(label="Concept", options={}, width=420, size="small", css_classes=["sdlx-concept"])
        self.concept.param.watch(self._open, "value")
        self._view.insert(1, self.concept)

    def _fill(self, found, look, twin: bool) -> None:
        values = found.values
        if found.error is None and values[0] is not None and values[0].n_concepts:
            options = {one.path: one.concept for one in openable(values[0])}
            chosen = self.concept.value if self.concept.value in options.values() else opened(values[0]).concept
            if options != self.concept.options or chosen != self.concept.value:
                self.concept.param.update(options=options, value=chosen)
            found = replace(found, values=(replace(values[0], opened=chosen),))
        super()._fill(found, look, twin)

    def _open(self, event) -> None:
        if self._drawn is not None:
            self._drawn = None
            self.refresh()
