"""What the primary latent fires on: random positives first, then the strongest, then from weak to strong."""

import panel as pn

from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.views.words import NO_SELECTION
from sdl_explorer.widgets.kit import Html, Text, Words, sheet


class ExampleCards(pn.viewable.Viewer):
    """Follows `state.primary_latent`."""

    def __init__(self, host):
        super().__init__()
        self.host, self._drawn = host, None
        self.title = Text("What does this latent fire on?", tag="h2", css_classes=["sdlx-title"])
        self.words = Words(host, NO_SELECTION, css_classes=["sdlx-words"])
        self.cards = Html("", css_classes=["sdlx-examples"])
        self._view = sheet(self.title, self.words, self.cards, name="card-P5")

    def __panel__(self):
        return self._view

    def needs(self):
        return [check_health], []

    def refresh(self) -> None:
        latent, markup = self.host.state.primary_latent, self.host.example_cards()
        if self._drawn == (latent, markup):
            return
        self._drawn = (latent, markup)
        self.title.text = "What does this latent fire on?" if latent is None else f"What does latent {latent} fire on?"
        self.words.text, self.words.visible = NO_SELECTION if latent is None else "Being computed…", not markup
        self.cards.html = markup
