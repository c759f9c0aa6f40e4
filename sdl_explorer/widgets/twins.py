"""The card that compares latents with another dictionary: what to compare with, the job, and its view."""

import functools

import panel as pn
import panel_material_ui as pmui

from sdl_explorer.diagnosis.twins import BY
from sdl_explorer.views.history import sentence
from sdl_explorer.views.view import find_view
from sdl_explorer.widgets.card import Card
from sdl_explorer.widgets.job import JobLine
from sdl_explorer.widgets.kit import Text, button

MEASURES = dict(zip(("by what fits", "by decoder cosine", "by correlation of activations"), BY, strict=True))
FILE = "file"


class TwinCard(Card):
    """Which latents another commit, seed, run or checkpoint has too."""

    def __init__(self, host):
        super().__init__(host, find_view("C6"))
        look = {"size": "small", "margin": (6, 8)}
        self.other = pmui.Select(label="Compare with", options={}, width=360, **look, css_classes=["sdlx-twin-other"])
        self.path = pmui.TextInput(label="Run folder or checkpoint", width=300, visible=False, **look, css_classes=["sdlx-twin-path"])
        self.by = pmui.Select(label="Measure", options=MEASURES, width=230, **look, css_classes=["sdlx-twin-by"])
        self.run = button("Compare latents", "twin-run", self._run)
        self.job = JobLine(host, "comparison")
        self.said = Text("", role="status", tone="quiet", css_classes=["sdlx-twin-said"])
        self.other.param.watch(lambda event: setattr(self.path, "visible", event.new == FILE), "value")
        form = pn.FlexBox(self.other, self.path, self.by, self.run, self.job.cancel, align_items="center", margin=0)
        self._view.insert(1, form)
        self._view.insert(2, self.said)
        self._view.insert(3, self.job.progress)
        self._offered: dict[str, str] = {}
        self._offer()

    def refresh(self) -> None:
        self._offer()
        mine, job = self.job.refresh(), self.host.snapshot.job
        self.said.text = f"Comparing: {job.done:.0%}" if mine else "Stop training first." if self.host.snapshot.running else ""
        self.run.disabled = job is not None or self.host.snapshot.running
        super().refresh()

    def _offer(self) -> None:
        """Commits, newest first, the seeds that are trained, and files where the session is the user's own."""
        offered = {f"{sentence(commit)} ({commit.id})": commit.id for commit in reversed(self.host.session.commits)}
        seeds = self.host.session.last_seeds
        for r in range(0 if seeds is None else len(seeds.free)):
            offered |= {f"other seed {r + 1} without anchors": f"free {r}", f"other seed {r + 1} with anchors": f"anchored {r}"}
        if self.host.most_steps is None:  # else the server's files would be any visitor's
            offered["another run, or a checkpoint…"] = FILE
        if offered != self._offered:
            self._offered, chosen = offered, self.other.value
            self.other.param.update(options=offered, value=chosen if chosen in offered.values() else self._usual())

    def _usual(self) -> str:
        """The commit before the last intervention; without one, the first."""
        pair, commits = self.host.compared(), self.host.session.commits
        return commits[0].id if pair is None else pair[0]

    async def _run(self, event=None) -> None:
        arm, _, r = self.other.value.partition(" ")
        other = self.path.value.strip() if arm == FILE else (arm, int(r)) if r else arm
        if not other:
            self.host.say("Compare latents: name a run folder or a checkpoint first.", "warning")
            return
        await self.host.do(functools.partial(self.host.session.compare_with, other, by=self.by.value))
