"""A card for each theorem; a witness can be selected."""

import panel as pn

from sdl_explorer.diagnosis.theory import check_theory
from sdl_explorer.views.theory import theory_html
from sdl_explorer.widgets.kit import Html, Text, button, row, sheet

STEPS, PAIRS = 500, 5
SEEDS = f"T7: train {PAIRS} pairs of seeds, {STEPS} steps each"
NO_PINS = "T7 compares seeds with anchors and without; anchor some latents on the Intervene page first."


class TheoryCards(pn.viewable.Viewer):
    def __init__(self, host):
        super().__init__()
        self.host, self._drawn, self._cards = host, None, []
        self.title = Text("What does each theorem assume, and what does it say?", tag="h2", css_classes=["sdlx-title"])
        self.stamp = Text("Waiting for the first numbers.", tone="quiet", css_classes=["sdlx-stamp"])
        self.cards = Html("", on_pick=self._pick, css_classes=["sdlx-theory"])
        self.seeds = button(SEEDS, "seeds", self._train)
        self.cancel = button("Stop", "seeds-stop", lambda event: host.session.stop(wait=False), visible=False)
        self.said = Text("", role="status", tone="quiet", css_classes=["sdlx-seeds-said"])
        self._view = sheet(self.title, self.cards, row(self.seeds, self.cancel), self.said, self.stamp, name="card-theory")

    def __panel__(self):
        return self._view

    def needs(self):
        return [check_theory], []

    def refresh(self) -> None:
        self._show_job()
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

    def _show_job(self) -> None:
        job, held = self.host.snapshot.job, self.host.pins() is not None
        self.seeds.disabled = not held or job is not None or self.host.snapshot.running or not self.host.has_truth
        self.cancel.visible = job is not None and job.name == "seeds"
        self.said.text = f"{job.name}: {job.done:.0%}" if self.cancel.visible else "" if held else NO_PINS

    async def _train(self, event=None) -> None:
        await self.host.do(self.host.session.train_seeds, STEPS, PAIRS)

    def _pick(self, pick: str) -> None:
        card, _, kind = pick.partition(" ")
        chosen = next((c for c in self._cards if c.id == card), None)
        ids = getattr(chosen.witness, kind, ()) if chosen is not None and kind in ("features", "latents") else ()
        if ids:
            self.host.select(**{kind: ids})
