"""Repairs that are tried on a branch: the budget, how far it is, what passed, and what applies it."""

import panel as pn
import panel_material_ui as pmui

from sdl_explorer.views.words import count, plural
from sdl_explorer.widgets.job import JobLine
from sdl_explorer.widgets.kit import Text, button, sheet

RUNS = 5  # pairs of a try
ABOUT = (
    "Tries what the top problems advise, one after another on a branch: pairs of runs with and without it, beside a sham that resets the "
    "same latents at random. The model stays as it is until you press Apply."
)
PAUSE = "Pause training first: repairs are judged on the model as it is."
STARTING = "Looking for what is wrong…"


class RepairForm(pn.viewable.Viewer):
    """*Try repairs*, *Stop*, and *Apply* for what passed."""

    def __init__(self, host):
        super().__init__()
        self.host, self._starting = host, False
        settings = {"size": "small", "margin": (6, 8)}
        self.budget = pmui.IntInput(
            label="Budget (training steps)", value=20_000, start=1, end=host.most_steps or 1_000_000, step=1_000, width=190, **settings,
            css_classes=["sdlx-repair-budget"],
        )  # fmt: skip
        self.steps = pmui.IntInput(
            label="Steps a run", value=200, start=1, end=20_000, step=50, width=130, **settings, css_classes=["sdlx-repair-steps"]
        )
        self.run = button("Try repairs", "repair-run", self._run)
        self.job = JobLine(host, "repair")
        self.apply = button("Apply what passed", "repair-apply", self._apply, variant="contained", visible=False)
        self.said = Text("", role="status", css_classes=["sdlx-repair-said"])
        self.cost = Text("", tone="quiet", css_classes=["sdlx-repair-cost"])
        for one in (self.budget, self.steps):
            one.param.watch(lambda event: self.refresh(), "value")
        form = pn.FlexBox(self.budget, self.steps, self.run, self.job.cancel, self.apply, align_items="center", margin=0)
        self._view = sheet(Text("Repair", tag="h2"), self.said, form, self.cost, self.job.progress, name="repair")

    def __panel__(self):
        return self._view

    def refresh(self) -> None:
        host, snapshot = self.host, self.host.snapshot
        mine, found = self.job.refresh(), host.session.last_repair
        busy = snapshot.job is not None or snapshot.running
        cost, budget = 3 * RUNS * max(self.steps.value or 0, 0), self._budget()
        tries = budget // cost if cost else 0
        holds = f"the budget holds {plural(tries, 'try', 'tries')}."
        self.cost.text = f"A try takes {RUNS} pairs of three runs, {count(cost)} steps; {holds}"
        self.run.disabled = self._starting or busy or not tries
        stale = found is not None and not found.fits(host.session)
        self.apply.visible = found is not None and bool(found.kept) and not found.applied and not mine
        self.apply.disabled = stale or busy or not host.session.writable
        self.said.text = f"Trying repairs: {snapshot.job.done:.0%}. The model stays as it is." if mine else self._say(stale)

    def _say(self, stale: bool) -> str:
        found = self.host.session.last_repair
        if self._starting:
            return STARTING
        if self.host.snapshot.running:
            return PAUSE
        if found is None:
            return ABOUT
        if not found.n_verdicts:
            return found.reading
        if found.applied:
            return f"Applied: {', '.join(commit.kind for commit in found.applied)}. Earlier commits are on the timeline."
        stopped = "Stopped. " if found.stopped else ""
        if not found.kept:
            return f"{stopped}Nothing passed, so there is nothing to apply; the model is as it was."
        passed = f"{stopped}{plural(len(found.kept), 'repair')} passed: {', '.join(plan.intervention for plan in found.kept)}."
        if stale:
            return f"{passed} They were judged at step {count(found.step)}, and the model has changed since: try again."
        return f"{passed} Each was judged on top of those before it, so they are applied together. Nothing has changed yet."

    def _budget(self) -> int:
        """A typed number may be out of bounds."""
        return min(max(self.budget.value or 0, 0), self.budget.end)

    async def _run(self, event=None) -> None:
        budget, steps = self._budget(), self.steps.value
        self._starting = True
        self.refresh()
        try:
            await self.host.do(lambda: self.host.session.repair(budget, n_steps=steps, runs=RUNS, apply=False))
        finally:
            self._starting = False
            self.refresh()

    async def _apply(self, event=None) -> None:
        found = self.host.session.last_repair
        kinds = ", ".join(plan.intervention for plan in found.kept)
        await self.host.do(
            found.apply, self.host.session, said=f"Applied: {kinds}. Earlier commits on the timeline are the model before it."
        )
