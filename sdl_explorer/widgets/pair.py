"""The candidate pair in front: a person confirms or rejects it, and asks whether an encoder can have its pattern."""

import functools

import panel as pn

from sdl_explorer.diagnosis.candidates import Candidate, suspect_absorption
from sdl_explorer.diagnosis.realisable_pair import realise_pair
from sdl_explorer.labels import CONFIRMED, REJECTED
from sdl_explorer.views.candidates import chosen_candidate
from sdl_explorer.views.words import NO_CANDIDATES, NOT_COMPUTED, count
from sdl_explorer.widgets.kit import Text, button, row, sheet

NO_INPUTS = "Realisable? does not apply here: it shows decoder rows to the encoder, and inputs and targets differ."


class PairForm(pn.viewable.Viewer):
    """Confirm, reject, take back: labels, which the table of candidates shows. Realisable?: the linear programme of the pair."""

    def __init__(self, host):
        super().__init__()
        self.host = host
        self.said = Text("", role="status", css_classes=["sdlx-pair-said"])
        self.found = Text("", role="status", css_classes=["sdlx-pair-found"])
        self.confirm = button("Confirm", "pair-confirm", functools.partial(self._label, CONFIRMED))
        self.reject = button("Reject", "pair-reject", functools.partial(self._label, REJECTED))
        self.back = button("Take the label back", "pair-back", functools.partial(self._label, ""))
        self.realise = button("Realisable?", "pair-realise", self._realise)
        self._tested: tuple[tuple[int, int], int, str] | None = None
        buttons = row(self.confirm, self.reject, self.back, self.realise, sizing_mode=None)
        self._view = sheet(Text("Is this candidate right?", tag="h2"), self.said, buttons, self.found, name="pair")

    def __panel__(self):
        return self._view

    def edge(self) -> Candidate | None:
        """The candidate that the cards show."""
        found = self.host.value(suspect_absorption)
        return None if found is None or not found.candidates else found.candidates[chosen_candidate(found, self.host.look())]

    def refresh(self) -> None:
        edge, session = self.edge(), self.host.session
        label = None if edge is None else session.labels.get((edge.parent, edge.child))
        self.said.text = self._words(edge, label)
        says = label.says if label else ""
        for one, own in ((self.confirm, CONFIRMED), (self.reject, REJECTED), (self.back, "")):
            one.disabled = edge is None or not session.writable or says == own
        inputs = self.host.sample.targets is self.host.sample.inputs
        self.realise.disabled = edge is None or not inputs
        self.found.text = self._result(edge) if inputs else NO_INPUTS

    def _words(self, edge: Candidate | None, label) -> str:
        found = self.host.value(suspect_absorption)
        if edge is None:
            return NOT_COMPUTED if found is None else NO_CANDIDATES
        said = f"Labelled {label.says} at step {count(label.step)}." if label else "Not labelled."
        return f"{'Candidate' if found.confident else 'No claim'}: latent {edge.child} instead of latent {edge.parent}. {said}"

    def _result(self, edge: Candidate | None) -> str:
        if edge is None or self._tested is None or self._tested[0] != (edge.parent, edge.child):
            return ""
        _, (step, commit), words = self._tested
        now = self.host.snapshot.step
        if step != now:
            return f"{words} Computed at step {count(step)}; the model is at step {count(now)} now."
        return words if commit == self.host.session.head.id else f"{words} Computed before the last commit."

    async def _label(self, says: str, event=None) -> None:
        edge = self.edge()
        if edge is not None:
            await self.host.do(self.host.session.label, (edge.parent, edge.child), says)

    async def _realise(self, event=None) -> None:
        edge = self.edge()
        if edge is not None:
            await self.host.do(self._test, edge.parent, edge.child)

    def _test(self, parent: int, child: int) -> None:
        session = self.host.session
        place = session.step, session.head.id
        self._tested = ((parent, child), place, f"{realise_pair(session.dictionary, parent, child)}")
