"""A page: a question, and the cards that answer it. Its cards are made when it is first shown."""

import logging

import panel as pn

from sdl_explorer.widgets.kit import Text, stack

log = logging.getLogger(__name__)


class Page(pn.viewable.Viewer):
    """`parts` makes the page's content: viewers with `refresh()`."""

    def __init__(self, title: str, question: str, parts, visible: bool = True):
        super().__init__()
        self.title, self._make, self.parts, self._here = title, parts, None, 0
        self._question = Text(question, tag="p", css_classes=["sdlx-question"])
        self._view = stack(visible=visible, css_classes=["sdlx-page", f"sdlx-page-{title.lower()}"])

    def __panel__(self):
        return self._view

    @property
    def shown(self) -> bool:
        return self._view.visible

    def show(self, shown: bool, most: int | None = None) -> None:
        """Show it, its first `most` parts at first, or hide it."""
        if shown and self.parts is None:
            try:
                self.parts = self._make()
            except Exception as error:  # the frame and the other pages stay
                log.exception("page %s", self.title)
                self.parts = ()
                self._view.append(Text(f"This page could not be made: {error}", role="alert", tone="warning"))
        if shown and self._here < len(self.parts[:most]):
            self._here = len(self.parts[:most])
            self._view.objects = [self._question, *self.parts[:most]]
        if self._view.visible != shown:
            self._view.visible = shown

    def refresh(self) -> None:
        for part in (self.parts or ())[: self._here]:
            part.refresh()

    def call(self, form: str, advice=None) -> bool:
        """Bring the form of an intervention into view, with what is selected, and with the settings of an advice; False where there
        is none."""
        for part in (self.parts or ())[: self._here]:
            if hasattr(part, "intervention") and part.makes.__name__.lower() == form:
                part.take_selection() if advice is None else part.take(advice)
                part.title.call()
                return True
        return False

    @property
    def cards(self) -> list:
        """Parts that draw a view."""
        return [part for part in self.parts or () if hasattr(part, "view")]

    def needs(self, host) -> tuple[list, list]:
        """Findings that the page's cards read now, and those at the commit that they compare with."""
        now, before = [], []
        for part in self.parts or ():
            wants = part.needs() if hasattr(part, "needs") else host.needs(part.view) if hasattr(part, "view") else ([], [])
            now += wants[0]
            before += wants[1]
        return list(dict.fromkeys(now)), list(dict.fromkeys(before))
