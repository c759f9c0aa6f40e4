"""Train, stop, step, and what the run is doing: always visible."""

import functools

import panel as pn
import panel_material_ui as pmui

from sdl_explorer.views.words import NEVER_TRAINED, count
from sdl_explorer.widgets.kit import Text, Words, button, row, stack

CHOICES = (1, 50, 500, 2_000, 5_000)
ENDLESS = 1_000_000
AT_ONCE = "if (play.data.label.includes('Stop')) { play.data.label = 'Stopping…' }"  # before the server hears of it


def say_rate(snapshot) -> str:
    """'212 it/s · ETA 18 s' while running, else nothing."""
    if not snapshot.running or not snapshot.rate:
        return ""
    eta = (snapshot.target - snapshot.step) / snapshot.rate
    left = f"ETA {eta:.0f} s" if eta < 90 else f"ETA {count(round(eta / 60))} min"
    return f"{count(round(snapshot.rate))} it/s" + (f" · {left}" if snapshot.target - snapshot.step < ENDLESS // 2 else "")


def say_status(snapshot, recovery: float | None) -> str:
    """The line of the run bar."""
    end = f"/{count(snapshot.target)}" if snapshot.running and snapshot.target - snapshot.step < ENDLESS // 2 else ""
    loss = snapshot.losses.get("total", sum(snapshot.losses.values())) if snapshot.losses else None
    parts = [
        f"step {count(snapshot.step)}{end}",
        say_rate(snapshot),
        "" if loss is None else f"loss {loss:.4g}",
        "" if not snapshot.losses else f"L0 {snapshot.l0:.1f}",
        f"dead {snapshot.dead}",
        "" if recovery is None else f"recovery {recovery:.1%}",
        f"waiting for {snapshot.queue} other run{'s' if snapshot.queue > 1 else ''}" if snapshot.queue else "",
    ]
    return " · ".join(part for part in parts if part)


class RunBar(pn.viewable.Viewer):
    def __init__(self, host):
        super().__init__()
        self.host = host
        self.restart = button("↺ Restart", "restart", self._restart)
        self.play = button("▶ Play", "play", self.toggle)
        self.play.js_on_click(args={"play": self.play}, code=AT_ONCE)
        self.one = button("▶| 1 step", "one-step", self.step_once)
        self.train = button("▸▸ Train 500 steps", "train", self.train_on, variant="contained")
        self.count = pmui.Select(
            label="Steps", options=list(CHOICES), value=500, width=95, size="small", margin=(2, 6), css_classes=["sdlx-steps"]
        )
        self.count.param.watch(lambda event: setattr(self.train, "label", self._train_label()), "value")
        self.status = Text("", tone="number", css_classes=["sdlx-status"])
        self.alert = Words(host, "", role="alert", tone="warning", visible=False, css_classes=["sdlx-alert"])
        self.repair = button("Revert", "alert-revert", self._revert, visible=False)
        self.lower = button("lr ÷ 10", "alert-lr", self._lower, visible=False)
        self.go_on = button("Continue anyway", "alert-continue", self.train_on, visible=False)
        self._view = stack(
            row(self.alert, self.repair, self.lower, self.go_on),
            pn.FlexBox(
                self.restart, self.play, self.one, self.train, self.count, self.status,
                align_items="center", sizing_mode="stretch_width", margin=0,
            ),
            css_classes=["sdlx-run-bar"],
        )  # fmt: skip

    def __panel__(self):
        return self._view

    def refresh(self) -> None:
        snapshot, session = self.host.snapshot, self.host.session
        self.status.text = say_status(snapshot, self.host.recovery())
        label = "▶ Play"
        if snapshot.running:
            label = "Stopping…" if snapshot.stopping else "■ Stop"
        self.play.label = label
        blocked = not session.writable or (snapshot.job is not None and not snapshot.running)  # one Stop serves training and jobs
        for one in (self.restart, self.one, self.train):
            one.disabled = blocked or snapshot.running
        self.play.disabled = blocked or label == "Stopping…"
        self._warn(snapshot, session)

    def _warn(self, snapshot, session) -> None:
        text, diverged, converged = "", snapshot.diverged is not None, snapshot.converged is not None
        if diverged:
            text = f"Diverged at step {count(snapshot.diverged.step)} (lr {snapshot.diverged.lr:g})."
            last = snapshot.diverged.last_finite
            self.repair.label = "Revert" if last is None else f"Revert to {count(last.step)}"
        elif converged:
            text = "Loss changed < 0.01 % over 500 steps – paused."
        elif snapshot.error:
            text = snapshot.error
        elif not session.writable:
            text = f"Read only: {session.writer} writes this run."
        elif self.host.untrained():
            text = NEVER_TRAINED
        self.alert.text, self.alert.visible = text, bool(text)
        self.repair.visible = self.lower.visible = diverged
        self.go_on.visible = converged

    def _train_label(self) -> str:
        n = self.count.value
        return f"▸▸ Train {count(n)} step{'s' if n > 1 else ''}"

    def _most(self, n: int) -> int:
        return n if self.host.most_steps is None else min(n, self.host.most_steps)

    # commands ------------------------------------------------------------------------------------------------------

    async def train_on(self, event=None) -> None:
        await self.host.do(self.host.session.start, self._most(self.count.value))

    async def step_once(self, event=None) -> None:
        await self.host.do(self.host.session.start, 1)

    async def toggle(self, event=None) -> None:
        """Play until it converges or somebody stops it; stop within one step."""
        if self.host.session.running:
            self.play.label, self.play.disabled = "Stopping…", True
            self.host.session.stop(wait=False)  # not behind other commands
            self.host.poll()
        else:
            await self.host.do(functools.partial(self.host.session.start, converge=True), self._most(ENDLESS))

    async def _restart(self, event) -> None:
        await self.host.do(self.host.session.restart)

    async def _revert(self, event) -> None:
        await self.host.do(self.host.session.revert, self.host.snapshot.diverged.last_finite)

    async def _lower(self, event) -> None:
        def lower(session, last) -> None:
            session.revert(last)
            session.lr = session.lr / 10

        await self.host.do(lower, self.host.session, self.host.snapshot.diverged.last_finite)
