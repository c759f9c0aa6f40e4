"""A card for each theorem; a witness can be selected."""

import panel as pn

from sdl_explorer.diagnosis.theory import check_theory
from sdl_explorer.views.theory import theory_html
from sdl_explorer.widgets.kit import Html, Text, sheet


class TheoryCards(pn.viewable.Viewer):
    def __init__(self, host):
        super().__init__()
        self.host, self._drawn, self._cards = host, None, []
        self.title = Text("What does each theorem assume, and what does it say?", tag="h2", css_classes=["sdlx-title"])
        self.stamp = Text("Waiting for the first numbers.", tone="quiet", css_classes=["sdlx-stamp"])
        self.cards = Html("", on_pick=self._pick, css_classes=["sdlx-theory"])
        self._view = sheet(self.title, self.cards, self.stamp, name="card-theory")

    def __panel__(self):
        return self._view

    def needs(self):
        return [check_theory], []

    def refresh(self) -> None:
        found, look = self.host.findings.now(check_theory), self.host.look()
        key = (found and found.serial, look.theme, self.host.snapshot.step)
        if found is None or key == self._drawn:
            return
        self._drawn = key
        if found.error is not None:
            self.cards.html, self.stamp.text = "", self.host.missing(self.host.failure(found.error))
            return
        self._cards = found.value
        self.cards.html = theory_html(self._cards, look)
        now = self.host.snapshot.step
        self.stamp.text = f"computed at step {found.step}" + (f" · the model is at step {now} now" if found.step != now else "")

    def _pick(self, pick: str) -> None:
        card, _, kind = pick.partition(" ")
        chosen = next((c for c in self._cards if c.id == card), None)
        ids = getattr(chosen.witness, kind, ()) if chosen is not None and kind in ("features", "latents") else ()
        if ids:
            self.host.select(**{kind: ids})
