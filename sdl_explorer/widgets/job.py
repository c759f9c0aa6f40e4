"""How far a job is, and what stops it."""

import panel_material_ui as pmui

from sdl_explorer.widgets.kit import button


class JobLine:
    """The progress of one kind of job and its *Stop*; both are there while it runs."""

    def __init__(self, host, name: str):
        self.host, self.name = host, name
        self.cancel = button("Stop", f"{name}-stop", self._cancel, visible=False)
        self.progress = pmui.LinearProgress(
            value=0, variant="determinate", sizing_mode="stretch_width", visible=False, margin=(2, 10), css_classes=["sdlx-job"]
        )

    def refresh(self) -> bool:
        """Bring both up to date: does it run?"""
        job = self.host.snapshot.job
        mine = job is not None and job.name == self.name
        self.cancel.visible = self.progress.visible = mine
        if mine:
            self.progress.value = int(100 * job.done)
        return mine

    def _cancel(self, event) -> None:
        self.host.session.stop(wait=False)  # not behind the job itself
