"""Repairs: settings, a preview that *is* the plan, rows that can be dropped, and one button that applies it."""

import panel as pn
import panel_material_ui as pmui

from sdl_explorer.data.store import Stored
from sdl_explorer.training.interventions import Anchor, Resample
from sdl_explorer.views.plan import plan_table
from sdl_explorer.views.words import NO_ANCHORS, count, no_dead, plural
from sdl_explorer.widgets.kit import Text, button, sheet, stack
from sdl_explorer.widgets.table_twin import TableTwin

DEAD, SELECTED = "the dead latents", "the selected latents"
DEAD_FIRST, PRIMARY = "dead latents first, then best matches", "the selected latents, in order"
TRUE, CLASS, GIVEN = "true features", "class means", "given anchors"
PICKS = {"loss-weighted rows (Bricken et al. 2023)": "loss2", "the worst rows": "worst"}
TARGETS = {"the input": "input", "the residual": "residual"}
PAIRS = (
    "Each pair trains with and without the last intervention, with the same seed and data order; a sham arm resets the same latents at "
    "random. There is no intervention on this branch yet."
)

COMPETING = (
    "Encoder scale 1: latents compete for k places here, and at the usual 0.2 times the mean norm restarted ones seldom win a place and "
    "die again."
)
SHARED = "The residual: stored rows share a mean, which a copied input would bring into every restarted latent."


def proposed(session) -> tuple[dict, str]:
    """The form's scale and target, and why where they are not those of Bricken et al. 2023."""
    settings, why = {"scale": Resample.param.scale.default, "target": Resample.param.target.default}, []
    if "k" in session.method.param:
        settings["scale"] = 1.0
        why.append(COMPETING)
    if isinstance(session.source, Stored):
        settings["target"] = "residual"
        why.append(SHARED)
    return settings, " ".join(why)


class ResampleForm(pn.viewable.Viewer):
    """Settings of `Resample` and *Preview*."""

    form = "resample"

    def __init__(self, host):
        super().__init__()
        self.host = host
        settings = {"size": "small", "margin": (6, 8)}
        self.which = pmui.Select(label="Restart", options=[DEAD, SELECTED], width=190, **settings, css_classes=["sdlx-resample-which"])
        self.number = pmui.TextInput(label="At most", placeholder="all", width=90, **settings, css_classes=["sdlx-resample-count"])
        self.pick = pmui.Select(label="from", options=PICKS, width=290, **settings, css_classes=["sdlx-resample-pick"])
        start, why = proposed(host.session)
        self.target = pmui.Select(
            label="New directions copy", options=TARGETS, value=start["target"], width=170, **settings, css_classes=["sdlx-resample-target"]
        )
        self.scale, self.noise = (
            pmui.FloatInput(
                label=label, value=value, start=0, end=10, step=0.05, width=130, **settings,
                description=Resample.param[name].doc, css_classes=[f"sdlx-resample-{name}"],
            )
            for label, name, value in (("Encoder scale", "scale", start["scale"]), ("Noise", "noise", 0.0))
        )  # fmt: skip
        self.why = Text(why, tone="quiet", visible=bool(why))
        self.said = Text("", role="status", css_classes=["sdlx-resample-said"])
        self.preview = button("Preview", "resample-preview", self._preview)
        self.which.param.watch(lambda event: self.refresh(), "value")
        form = pn.FlexBox(
            self.which, self.number, self.pick, self.target, self.scale, self.noise, self.preview, align_items="center", margin=0
        )
        self._view = sheet(Text("Resample", tag="h2"), self.said, form, self.why, name="resample")

    def __panel__(self):
        return self._view

    def refresh(self) -> None:
        dead, selected = self.host.dead(), self.host.state.selected_latents
        nothing = not dead if self.which.value == DEAD else not selected
        if self.which.value == SELECTED:
            self.said.text = f"{plural(len(selected), 'latent')} selected." if selected else "Select latents in any plot or table first."
        elif dead:
            self.said.text = (
                f"{plural(len(dead), 'latent')} silent for {count(self.host.session.dead_after)} samples: rate below 3/N at 95 %."
            )
        else:
            self.said.text = "✓ " + no_dead(self.host.session.dead_after)
        self.preview.label = "Disabled: no dead latents" if nothing and self.which.value == DEAD else "Preview"
        self.preview.disabled = nothing or not self.host.session.writable

    def intervention(self) -> Resample:
        latents = self.host.dead() if self.which.value == DEAD else self.host.state.selected_latents
        settings = {name: getattr(self, name).value for name in ("pick", "target", "scale", "noise")}
        most = (self.number.value or "").strip()
        if most and not (most.isdigit() and int(most) > 0):
            raise ValueError(f"Resample: at most {most!r} latents; give a whole number from 1, or leave it empty for all of them.")
        return Resample(latents=[int(i) for i in latents][: int(most) if most else None], **settings)

    def take_selection(self) -> None:
        """Restart what is selected, or the dead ones where nothing is."""
        self.which.value = SELECTED if self.host.state.selected_latents else DEAD

    async def _preview(self, event=None) -> None:
        await self.host.preview(self.intervention)


class AnchorForm(pn.viewable.Viewer):
    """Which directions, which latents, how strongly, and *Preview*."""

    form = "anchor"

    def __init__(self, host):
        super().__init__()
        self.host, self._sources = host, None
        settings = {"size": "small", "margin": (6, 8)}
        self.source = pmui.Select(label="Directions from", options=[], width=170, **settings, css_classes=["sdlx-anchor-source"])
        self.which = pmui.MultiChoice(label="Directions", options=[], width=360, margin=(6, 8), css_classes=["sdlx-anchor-which"])
        self.slots = pmui.Select(label="Hold", options=[DEAD_FIRST, PRIMARY], width=290, **settings, css_classes=["sdlx-anchor-slots"])
        self.weight = pmui.FloatInput(
            label="Weight", value=Anchor.param.weight.default, start=0, step=0.05, width=110, **settings,
            description=Anchor.param.weight.doc, css_classes=["sdlx-anchor-weight"],
        )  # fmt: skip
        self.hard = pmui.Checkbox(label="Hard: fix the rows", value=False, margin=(6, 8), css_classes=["sdlx-anchor-hard"])
        self.preview = button("Preview", "anchor-preview", self._preview)
        self.said = Text("", role="status", css_classes=["sdlx-anchor-said"])
        self.source.param.watch(lambda event: self._list(), "value")
        self.which.param.watch(lambda event: self.refresh(), "value")
        form = pn.FlexBox(self.source, self.which, self.slots, self.weight, self.hard, self.preview, align_items="center", margin=0)
        self._view = sheet(Text("Anchor", tag="h2"), self.said, form, name="anchor")

    def __panel__(self):
        return self._view

    def refresh(self) -> None:
        sources = self.host.anchor_sources()
        if sources != self._sources:
            self._sources = sources
            self.source.param.update(options=list(sources), value=next(iter(sources), None))
            self._list()
        if not sources:
            self.said.text, self.preview.disabled = NO_ANCHORS, True
            return
        chosen, slots = len(self.which.value), len(self.host.state.selected_latents)
        short = self.slots.value == PRIMARY and slots != chosen
        if not chosen:
            self.said.text = "Choose the directions to hold latents to."
        elif short:
            self.said.text = f"{plural(chosen, 'direction')} and {plural(slots, 'selected latent')}: give one latent per direction."
        else:
            self.said.text = f"{plural(chosen, 'direction')} chosen."
        self.preview.disabled = not chosen or short or not self.host.session.writable

    def take_selection(self) -> None:
        """The primary true feature, where there is one."""
        self.refresh()
        feature = self.host.state.primary_feature
        if feature is not None and TRUE in self.source.options:
            self.source.value = TRUE
            self.which.value = [self._sources[TRUE][feature]]

    def _list(self) -> None:
        names = self._sources.get(self.source.value, [])
        self.which.options = names
        self.which.value = [name for name in self.which.value if name in names]

    def intervention(self) -> Anchor:
        places = [self._sources[self.source.value].index(name) for name in self.which.value]
        anchors = self.host.anchors_of(self.source.value, places)
        latents = [int(i) for i in self.host.state.selected_latents] if self.slots.value == PRIMARY else None
        return Anchor(anchors=anchors, latents=latents, weight=self.weight.value, hard=self.hard.value)

    async def _preview(self, event=None) -> None:
        await self.host.preview(self.intervention)


class Preview(pn.viewable.Viewer):
    """The plan, its rows, *Apply*, *Drop* and *Discard*. A plan made at another step cannot be applied."""

    def __init__(self, host, card):
        super().__init__()
        self.host, self.card, self._shown = host, card, None
        self.table = TableTwin(host, "Rows of the preview", on_rows=self._chosen, rows=8, multiple=True)
        self._rows: list[int] = []
        self.said = Text("", role="status", css_classes=["sdlx-plan-said"])
        self.apply = button("Apply", "apply", self._apply, variant="contained")
        self.drop = button("Drop the chosen rows", "drop", self._drop)
        self.discard = button("Discard", "discard", self._discard)
        buttons = pn.Row(self.apply, self.drop, self.discard, margin=0)
        rows = sheet(Text("Rows of the preview", tag="h2"), self.table, self.said, buttons, name="preview")
        self._view = stack(card, rows, visible=False, css_classes=["sdlx-preview-block"])

    def __panel__(self):
        return self._view

    def refresh(self) -> None:
        plan = self.host.plan
        self._view.visible = plan is not None
        if plan is None:
            self._shown = None
            return
        if plan is not self._shown:
            self._shown, self._rows = plan, []
            self.table.show(plan_table(plan))
        self.card.refresh()
        stale = self.host.plan_step != self.host.snapshot.step
        self.said.text = (
            f"This preview was made at step {count(self.host.plan_step)}; the model has moved on. Preview again."
            if stale
            else f"{plural(len(plan.latents), 'latent')} will change. Nothing has changed yet."
        )
        self.apply.disabled = stale or self.host.snapshot.running or not len(plan.latents)
        self.drop.disabled = stale or not self._rows

    def _chosen(self, rows: list[int]) -> None:
        self._rows = rows
        self.drop.disabled = not rows

    def _drop(self, event) -> None:
        units = self.table.table.value["unit"].iloc[self._rows]
        self.host.plan = self.host.plan.drop([int(unit) for unit in units])
        self.host.poll()

    def _discard(self, event) -> None:
        self.host.plan = None
        self.host.poll()

    async def _apply(self, event) -> None:
        await self.host.apply_plan()


class Pinned(pn.viewable.Viewer):
    """Which latents are held, and *Release*."""

    def __init__(self, host):
        super().__init__()
        self.host = host
        self.which = pmui.MultiChoice(label="Held latents", options=[], width=360, margin=(6, 8), css_classes=["sdlx-held"])
        self.release = button("Release", "release", self._release, disabled=True)
        self.which.param.watch(lambda event: setattr(self.release, "disabled", not event.new), "value")
        self._view = pn.Row(self.which, self.release, visible=False, margin=(0, 10))

    def __panel__(self):
        return self._view

    def refresh(self) -> None:
        held = self.host.held()
        self._view.visible = bool(held)
        options = {f"latent {latent} → {name}": latent for latent, name in held.items()}
        if self.which.options != options:
            self.which.param.update(options=options, value=[])

    async def _release(self, event) -> None:
        await self.host.do(self.host.session.release, list(self.which.value), said="Released.")


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
            self.said.text = (
                f"With and without the {last.kind} of step {count(last.step)}, and a sham that resets the same latents at random."
            )

    def _cancel(self, event) -> None:
        self.host.session.stop(wait=False)  # not behind the pairs themselves

    async def _run(self, event=None) -> None:
        await self.host.do(self.host.session.control, self.steps.value, self.pairs.value)
