"""What can be done about a parent that was absorbed: each button opens a form that exists, or trains; nothing is applied by itself."""

from typing import NamedTuple

import panel as pn

from sdl_explorer.diagnosis.absorption import find_absorption
from sdl_explorer.diagnosis.candidates import suspect_absorption
from sdl_explorer.views.absorption import chosen
from sdl_explorer.views.candidates import chosen_candidate
from sdl_explorer.views.words import NO_ABSORBERS, NO_CANDIDATES, NOT_COMPUTED
from sdl_explorer.widgets.kit import Text, button, row, sheet

STEPS = 500


class Case(NamedTuple):
    """The edge in front: the latent that holds the parent too, the parent as a true feature where it is known, and words."""

    child: int
    parent: int | None
    words: str


class Absorbed(pn.viewable.Viewer):
    """Anchor the parent, split off the child, train on."""

    def __init__(self, host):
        super().__init__()
        self.host = host
        self.said = Text("", role="status", css_classes=["sdlx-absorbed-said"])
        self.anchor = button("Anchor parent", "absorbed-anchor", self._anchor)
        self.split = button("Split off child", "absorbed-split", self._split)
        self.retrain = button(f"Train {STEPS} steps", "absorbed-train", self._train)
        buttons = row(self.anchor, self.split, self.retrain, sizing_mode=None)
        self._view = sheet(Text("What can be done about it?", tag="h2"), self.said, buttons, name="absorbed")

    def __panel__(self):
        return self._view

    def case(self) -> Case | None:
        """The absorbed edge that the cards show, of the truth where parents are known, else the candidate."""
        look = self.host.look()
        if self.host.has_families:
            found = self.host.value(find_absorption)
            edges = [] if found is None else [edge for edge in found.edges if edge.absorber >= 0]
            if found is None or not edges:
                return None
            edge = chosen(found, look, sorted(edges, key=lambda e: -(e.gap or 0.0)))
            words = f"Latent {edge.absorber} writes {found.names[edge.parent]} where {found.names[edge.child]} is active."
            return Case(edge.absorber, edge.parent, words)
        suspects = self.host.value(suspect_absorption)
        if suspects is None or not suspects.candidates:
            return None
        edge = suspects.candidates[chosen_candidate(suspects, look)]
        return Case(edge.child, None, f"A candidate, no more: latent {edge.child} may have taken latent {edge.parent}'s place.")

    def refresh(self) -> None:
        case, session = self.case(), self.host.session
        self.said.text = self._none() if case is None else case.words
        self.anchor.disabled = case is None or case.parent is None or not session.writable
        self.split.disabled = case is None or not session.writable
        self.retrain.disabled = self.host.snapshot.running or not session.writable

    def _none(self) -> str:
        """Why no edge is in front."""
        known = self.host.has_families
        if self.host.value(find_absorption if known else suspect_absorption) is None:
            return NOT_COMPUTED
        return NO_ABSORBERS if known else NO_CANDIDATES

    def _anchor(self, event=None) -> None:
        case = self.case()
        if case is not None and case.parent is not None:
            self.host.select(features=(case.parent,))
            self.host.call("anchor")

    def _split(self, event=None) -> None:
        case = self.case()
        if case is not None:
            self.host.select(latents=(case.child,))
            self.host.call("unabsorb")

    async def _train(self, event=None) -> None:
        await self.host.do(self.host.session.start, STEPS)
