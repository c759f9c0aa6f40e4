"""The primary latent up close: status, norms, rate, matches on both sides, and what it fires on."""

import panel as pn
import panel_material_ui as pmui

from sdl_explorer.diagnosis.alignment import align
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.views.words import NO_SELECTION, count
from sdl_explorer.widgets.kit import Html, Text, Words, button, stack


class Inspector(pn.viewable.Viewer):
    """Follows `state.primary_latent`."""

    def __init__(self, host):
        super().__init__()
        self.host = host
        self._drawn = None
        self.title = Text("Inspector", tag="h2", css_classes=["sdlx-inspector-title"])
        self.search = pmui.TextInput(label="Latent", placeholder="id", width=110, size="small", css_classes=["sdlx-search"])
        self.search.param.watch(self._search, "value")
        self.facts = Words(host, "", role="status", css_classes=["sdlx-facts"])
        self.feature = Text("", css_classes=["sdlx-feature"])
        self.examples_title = Text("What it fires on", tag="h3", visible=False)
        self.examples = Html("", css_classes=["sdlx-examples"])
        self._view = stack(
            self.title,
            pn.FlexBox(
                self.search,
                button("Worst", "worst", lambda event: self.host.select_worst()),
                button("Random", "random", lambda event: self.host.select_random()),
                button("Newest dead", "newest-dead", lambda event: self.host.select_newest_dead()),
                align_items="center",
                margin=(0, 6),
                sizing_mode="stretch_width",
            ),
            self.facts,
            self.feature,
            self.examples_title,
            self.examples,
            margin=(6, 4),
            css_classes=["sdlx-inspector"],
        )

    def __panel__(self):
        return self._view

    def needs(self):
        return [f for f in (align, check_health) if self.host.knows(f)], []

    def refresh(self) -> None:
        state, latent = self.host.state, self.host.state.primary_latent
        lines, feature_lines = self.host.inspect()
        here = latent is not None and state.page != "Latents"  # that page has the same cards, and room for them
        examples = self.host.example_cards() if here else ""
        selected = len(state.selected_latents)
        if latent is not None and selected > 1:
            lines = [f"{count(selected)} selected; showing latent {latent}.", *lines]
        if self._drawn == (latent, lines, feature_lines, examples, here, state.theme):
            return
        self._drawn = (latent, lines, feature_lines, examples, here, state.theme)
        self.search.value = "" if latent is None else str(latent)
        self.title.text = "Inspector" if latent is None else f"Latent {latent}"
        self.facts.text = NO_SELECTION if latent is None else "\n".join(lines)
        self.feature.text = "\n".join(feature_lines)
        self.examples_title.visible = here
        self.examples.html = examples

    def _search(self, event) -> None:
        typed = (event.new or "").strip()
        if typed in ("", str(self.host.state.primary_latent)):
            return
        try:
            self.host.select(latents=(int(typed),))
        except ValueError:
            self.host.say(f"There is no latent {typed}; ids run from 0 to {self.host.session.n_latents - 1}.", "warning")
