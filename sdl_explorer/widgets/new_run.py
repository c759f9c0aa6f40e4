"""New run: the same data, another method, size or start. The run in front stays as it is."""

import panel as pn
import panel_material_ui as pmui

from sdl_explorer.models.methods import Method
from sdl_explorer.registry import members
from sdl_explorer.session import Session
from sdl_explorer.widgets.fields import LOOK, field, real, whole
from sdl_explorer.widgets.kit import Fold, Text, button, stack

MOST_LATENTS = 4_096  # where sessions belong to visitors
WIDTH = 220
GROUPS = {
    "a penalty on the codes": ("ReLU", "JumpReLU", "Gated"),
    "a number of latents a row": ("TopK", "TopKAux", "BatchTopK", "BatchTopKAux"),
    "several widths or sizes at once": ("Matryoshka", "MultiTopK"),
    "a search": ("Pursuit",),
}
OTHERS = "others"
START = ("normalise", "centre", "pre_bias")  # of the session: where new weights start


def grouped() -> dict[str, list[str]]:
    """Every method under what makes its codes sparse; those of other packages stand last."""
    known = members(Method)
    groups = {title: [name for name in names if name in known] for title, names in GROUPS.items()}
    rest = [name for name in known if not any(name in names for names in groups.values())]
    return groups | ({OTHERS: rest} if rest else {})


class NewRun(pn.viewable.Viewer):
    """What only takes effect from the first step: the method and its tie, the size, the start, the seed."""

    def __init__(self, host):
        super().__init__()
        self.host = host
        session, look = host.session, {"width": WIDTH, **LOOK}
        self.method = pmui.Select(
            label="Method", groups=grouped(), value=type(session.method).__name__, **look, css_classes=["sdlx-new-method"]
        )
        self.about = Text("", tone="quiet", css_classes=["sdlx-new-about"])
        self.k = field(_example("k"), "k", "k", css="new", width=WIDTH)
        most = MOST_LATENTS if host.most_steps else None
        self.n_latents = whole(session.n_latents, label="Latents", start=1, end=most, **look, css_classes=["sdlx-new-latents"])
        self.expansion = real(
            self._factor(), label="Expansion factor", start=0, step=1, description="Latents for each column of the inputs.", **look,
            css_classes=["sdlx-new-expansion"],
        )  # fmt: skip
        self.seed = whole(session.seed, label="Seed", start=0, **look, css_classes=["sdlx-new-seed"])
        self.tie = field(_example("tie"), "tie", css="new", width=WIDTH)
        self.origin = {name: field(session, name, css="new", width=WIDTH) for name in START}
        self.tie.disabled = session.source.width_in != session.source.width_out
        self.origin["pre_bias"].disabled = host.sample.kind != "sae"
        self.start = button("New run", "new-run", self._start, size="medium", margin=(6, 10))
        self._seen: tuple = ()
        self.refresh()
        self.method.param.watch(lambda event: self._take_method(), "value")
        self.n_latents.param.watch(lambda event: self._follow(), "value")
        self.expansion.param.watch(self._expand, "value")
        self._view = stack(
            Text("New run", tag="h2"),
            Text("Another method, size, start or seed on the same data; untrained.", tone="quiet"),
            self.method,
            self.about,
            self.k,
            self.n_latents,
            self.expansion,
            self.seed,
            Fold("Tie and start", self.tie, *self.origin.values(), name="start"),
            self.start,
        )

    def __panel__(self):
        return self._view

    @property
    def kind(self) -> type[Method]:
        return members(Method)[self.method.value]

    def refresh(self) -> None:
        """Follow the method in front while the form stays as it is."""
        method = self.host.session.method
        seen = (method, *(getattr(method, name, None) for name in ("k", "tie")))
        if self._seen != seen:
            self._seen = seen
            self._take_method()

    def make(self) -> Session:
        """The new session. A method of the same kind keeps its settings, and the ramps that go with them."""
        old = self.host.session
        if self.host.most_steps is not None and (self.n_latents.value or 0) > MOST_LATENTS:
            raise ValueError(f"New run: {self.n_latents.value} latents; at most {MOST_LATENTS} here, where visitors share a machine.")
        same = type(old.method) is self.kind
        kept = {name: value for name, value in old.method.param.values().items() if name != "name"} if same else {}
        own = {name: one.value for name, one in (("k", self.k), ("tie", self.tie)) if name in self.kind.param}
        settings = {name: getattr(old, name) for name, p in old.param.objects("existing").items() if not p.constant and name != "name"}
        settings |= {name: one.value for name, one in self.origin.items()} | ({} if same else {"ramps": {}})
        method = self.kind(**kept | own)
        return Session(old.source, method, self.n_latents.value, seed=self.seed.value, device=old.device, **settings)

    def _take_method(self) -> None:
        """What the method is in its own words, and which of the fields it has."""
        kind, now = self.kind, self.host.session.method
        self.about.text = (kind.__doc__ or "").strip().partition("\n")[0]
        few = max(1, min(self.k.value or 32, (self.n_latents.value or 8) // 8))
        for name, one, otherwise in (("k", self.k, few), ("tie", self.tie, "untied")):
            one.visible = name in kind.param
            one.value = getattr(now, name, otherwise)

    def _factor(self) -> float:
        return round((self.n_latents.value or 0) / self.host.session.source.width_in, 4)

    def _follow(self) -> None:
        """The factor follows the number of latents; it may have been the other way round."""
        if self._latents(self.expansion.value) != self.n_latents.value:
            self.expansion.value = self._factor()

    def _expand(self, event) -> None:
        latents = self._latents(event.new)
        if latents is not None and abs((event.new or 0) - self._factor()) > 1e-3:
            self.n_latents.value = latents

    def _latents(self, factor) -> int | None:
        return max(1, round(factor * self.host.session.source.width_in)) if factor else None

    async def _start(self, event=None) -> None:
        made: list[Session] = []
        if await self.host.do(lambda: made.append(self.make())):
            self.host.own.append(made[0])
            self.host.open(made[0])


def _example(name: str) -> Method:
    """A method that has this setting."""
    return next(kind() for kind in members(Method).values() if name in kind.param)
