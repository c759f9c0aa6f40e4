"""The control pairs behind the scoreboard: what runs them, stops them, and how far they are."""

import panel as pn
import panel_material_ui as pmui

from sdl_explorer.views.words import count
from sdl_explorer.widgets.kit import Text, button, sheet

PAIRS = (
    "Each pair trains with and without the last intervention, with the same seed and data order; a sham arm resets the same latents at "
    "random. There is no intervention on this branch yet."
)
SHAMS = {
    "realign": ", and a sham that turns the same encoder rows in random directions",
    "anchor": ", and a sham that holds the same latents to random directions",
    "release": "; it resets nothing, so there is no sham",
}
RESET = ", and a sham that resets the same latents at random"


class ControlForm(pn.viewable.Viewer):
    """Runs the pairs behind the scoreboard."""

    def __init__(self, host):
        super().__init__()
        self.host = host
        self.steps = pmui.IntInput(
            label="Steps a run", value=500, start=1, end=20_000, step=100, width=130, size="small", margin=(6, 8),
            css_classes=["sdlx-control-steps"],
        )  # fmt: skip
        self.pairs = pmui.IntInput(
            label="Pairs", value=5, start=1, end=30, width=90, size="small", margin=(6, 8), css_classes=["sdlx-pairs"]
        )
        self.run = button("Run the control pairs", "control", self._run)
        self.cancel = button("Stop", "control-stop", self._cancel, visible=False)
        self.progress = pmui.LinearProgress(
            value=0, variant="determinate", sizing_mode="stretch_width", visible=False, margin=(2, 10), css_classes=["sdlx-job"]
        )
        self.said = Text("", role="status", css_classes=["sdlx-control-said"])
        form = pn.FlexBox(self.steps, self.pairs, self.run, self.cancel, align_items="center", margin=0)
        self._view = sheet(Text("Control pairs", tag="h2"), self.said, form, self.progress, name="control-form")

    def __panel__(self):
        return self._view

    def refresh(self) -> None:
        job, last = self.host.snapshot.job, self.host.last_intervention()
        self.progress.visible = self.cancel.visible = job is not None
        if job is not None:
            self.progress.value = int(100 * job.done)
        self.run.disabled = last is None or job is not None or self.host.snapshot.running or not self.host.session.writable
        if job is not None:
            self.said.text = f"{job.name}: {job.done:.0%}"
        elif last is None:
            self.said.text = PAIRS
        else:
            self.said.text = f"With and without the {last.kind} of step {count(last.step)}{SHAMS.get(last.kind, RESET)}."

    def _cancel(self, event) -> None:
        self.host.session.stop(wait=False)  # not behind the pairs themselves

    async def _run(self, event=None) -> None:
        await self.host.do(self.host.session.control, self.steps.value, self.pairs.value)
