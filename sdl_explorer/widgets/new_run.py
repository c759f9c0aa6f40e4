"""New run: the same data, another method, size or seed. The run in front stays as it is."""

import panel as pn
import panel_material_ui as pmui

from sdl_explorer.models.methods import Method
from sdl_explorer.registry import members
from sdl_explorer.session import Session
from sdl_explorer.widgets.kit import Text, button, stack

MOST_LATENTS = 4_096  # where sessions belong to visitors


class NewRun(pn.viewable.Viewer):
    """What only takes effect from the first step: sigma, number of latents, seed."""

    def __init__(self, host):
        super().__init__()
        self.host = host
        session, style = host.session, {"size": "small", "width": 220, "margin": (5, 10)}
        self.method = pmui.Select(
            label="Method", options=list(members(Method)), value=type(session.method).__name__, **style, css_classes=["sdlx-new-method"]
        )
        self.n_latents = pmui.IntInput(
            label="Latents", value=session.n_latents, start=1, end=MOST_LATENTS if host.most_steps else None, **style,
            css_classes=["sdlx-new-latents"],
        )  # fmt: skip
        self.seed = pmui.IntInput(label="Seed", value=session.seed, start=0, **style, css_classes=["sdlx-new-seed"])
        self.start = button("New run", "new-run", self._start, size="medium", margin=(6, 10))
        self._view = stack(
            Text("New run", tag="h2"), Text("Another method, size or seed on the same data; starts untrained.", tone="quiet"),
            self.method, self.n_latents, self.seed, self.start,
        )  # fmt: skip

    def __panel__(self):
        return self._view

    def make(self) -> Session:
        """The new session. A method of the same kind keeps its settings."""
        old, kind = self.host.session, members(Method)[self.method.value]
        kept = {k: v for k, v in old.method.param.values().items() if k != "name"} if type(old.method) is kind else {}
        settings = {name: getattr(old, name) for name in ("batch_size", "lr", "warmup_steps", "dead_after", "anchors", "budget")}
        return Session(old.source, kind(**kept), self.n_latents.value, seed=self.seed.value, device=old.device, **settings)

    async def _start(self, event=None) -> None:
        made: list[Session] = []
        if await self.host.do(lambda: made.append(self.make())):
            self.host.own.append(made[0])
            self.host.open(made[0])
