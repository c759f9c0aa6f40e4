"""Forms of the interventions: settings, what they say about the model as it is, and *Preview*."""

from typing import Any

import panel as pn
import panel_material_ui as pmui

from sdl_explorer.training.interventions import Anchor, Intervention, Resample
from sdl_explorer.training.realign import Realign, refusal
from sdl_explorer.views.words import count, no_dead, plural
from sdl_explorer.widgets.fields import field, offered
from sdl_explorer.widgets.kit import Fold, Text, button, sheet

EVERY = "all that qualify"
NONE_SELECTED = "Select latents in any plot or table first."
DEAD, SELECTED = "the dead latents", "the selected latents"
DEAD_FIRST, PRIMARY = "dead latents first, then best matches", "the selected latents, in order"
TRUE, CLASS, GIVEN = "true features", "class means", "given anchors"
PICKS = {"loss-weighted rows (Bricken et al. 2023)": "loss2", "the worst rows": "worst"}
TARGETS = {"the input": "input", "the residual": "residual"}
COMPETING = (
    "Encoder scale 1: latents compete for k places here, and at the usual 0.2 times the mean norm restarted ones seldom win a place and "
    "die again."
)
SHARED = "The residual: stored rows share a mean, which a copied input would bring into every restarted latent."
NO_DIRECTIONS = (
    "No directions to hold latents to: these activations have no true features and no labels, and the session was given no anchors. "
    "In Python: session.anchors = Anchors.from_rows(...)."
)
TURNS = "Turns encoder rows to what fires their latents, and keeps how often those fire."
FREE = "Without a pull the rows are free, and training takes them back."
TRADE = (
    "It buys identifiability for some reconstruction: a row that is a feature's own direction also reads every feature that overlaps "
    "with it. Encoder and response agree afterwards because this sets them, which is no evidence. What is: recovery of true features, "
    "unexplained variance and L0 beside equally long training, from the control pairs on the Compare page."
)


def proposed(session) -> tuple[dict, str]:
    """The form's scale and target, and why where they are not those of Bricken et al. 2023."""
    settings, why = {"scale": Resample.param.scale.default, "target": Resample.param.target.default}, []
    if "k" in session.method.param:
        settings["scale"] = 1.0
        why.append(COMPETING)
    if session.source.n is not None:
        settings["target"] = "residual"
        why.append(SHARED)
    return settings, " ".join(why)


class Form(pn.viewable.Viewer):
    """Settings of one intervention and *Preview*. `makes` is the intervention; `title` is what keys and actions call; `fields` hold
    its settings by name, but for the latents."""

    makes: type[Intervention]
    title: Text
    fields: dict[str, Any] = {}

    def settings(self) -> dict[str, Any]:
        """What the fields hold, under the names that `makes` has for it."""
        raise TypeError(f"{type(self).__name__} has no settings(); a form needs them.")

    def refresh(self) -> None:
        """Say what the settings mean for the model as it is."""

    def take_selection(self) -> None:
        """Take in what is selected."""

    def take(self, advice: Intervention) -> None:
        """Take in what is selected, and the settings of an intervention."""
        self.take_selection()
        for name, one in self.fields.items():
            one.value = getattr(advice, name)

    def intervention(self) -> Intervention:
        return self.makes(**self.settings())

    async def _preview(self, event=None) -> None:
        await self.host.preview(self.intervention)


class ResampleForm(Form):
    """Restart latents."""

    makes = Resample

    def __init__(self, host):
        super().__init__()
        self.host = host
        self.title = Text("Resample", tag="h2")
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
        self.fields = {"pick": self.pick, "target": self.target, "scale": self.scale, "noise": self.noise}
        self.why = Text(why, tone="quiet", visible=bool(why))
        self.said = Text("", role="status", css_classes=["sdlx-resample-said"])
        self.preview = button("Preview", "resample-preview", self._preview)
        self.which.param.watch(lambda event: self.refresh(), "value")
        form = pn.FlexBox(
            self.which, self.number, self.pick, self.target, self.scale, self.noise, self.preview, align_items="center", margin=0
        )
        self._view = sheet(self.title, self.said, form, self.why, name="resample")

    def __panel__(self):
        return self._view

    def refresh(self) -> None:
        dead, selected = self.host.dead(), self.host.state.selected_latents
        nothing = not dead if self.which.value == DEAD else not selected
        if self.which.value == SELECTED:
            self.said.text = f"{plural(len(selected), 'latent')} selected." if selected else NONE_SELECTED
        elif dead:
            self.said.text = (
                f"{plural(len(dead), 'latent')} silent for {count(self.host.session.dead_after)} samples: rate below 3/N at 95 %."
            )
        else:
            self.said.text = "✓ " + no_dead(self.host.session.dead_after)
        self.preview.label = "Disabled: no dead latents" if nothing and self.which.value == DEAD else "Preview"
        self.preview.disabled = nothing or not self.host.session.writable

    def settings(self):
        latents = self.host.dead() if self.which.value == DEAD else self.host.state.selected_latents
        settings = {name: one.value for name, one in self.fields.items()}
        most = (self.number.value or "").strip()
        if most and not (most.isdigit() and int(most) > 0):
            raise ValueError(f"Resample: at most {most!r} latents; give a whole number from 1, or leave it empty for all of them.")
        return {"latents": [int(i) for i in latents][: int(most) if most else None], **settings}

    def take(self, advice):
        super().take(advice)
        self.number.value = ""

    def take_selection(self) -> None:
        """Restart what is selected, or the dead ones where nothing is."""
        self.which.value = SELECTED if self.host.state.selected_latents else DEAD


class AnchorForm(Form):
    """Which directions, which latents, and how strongly."""

    makes = Anchor

    def __init__(self, host):
        super().__init__()
        self.host, self._sources = host, None
        self.title = Text("Anchor", tag="h2")
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
        self._view = sheet(self.title, self.said, form, name="anchor")

    def __panel__(self):
        return self._view

    def refresh(self) -> None:
        sources = self.host.anchor_sources()
        if sources != self._sources:
            self._sources = sources
            self.source.param.update(options=list(sources), value=next(iter(sources), None))
            self._list()
        if not sources:
            self.said.text, self.preview.disabled = NO_DIRECTIONS, True
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

    def settings(self):
        places = [self._sources[self.source.value].index(name) for name in self.which.value]
        anchors = self.host.anchors_of(self.source.value, places)
        latents = [int(i) for i in self.host.state.selected_latents] if self.slots.value == PRIMARY else None
        return {"anchors": anchors, "latents": latents, "weight": self.weight.value, "hard": self.hard.value}


class PlainForm(Form):
    """Any intervention: a field a setting, and which latents where it asks for them."""

    labels: dict[str, str] = {}
    choices: dict[str, dict] = {}  # words for the objects of a selector
    folded: tuple[str, ...] = ()  # settings that few people change

    def __init__(self, host, makes: type[Intervention]):
        super().__init__()
        self.host, self.makes = host, makes
        name, defaults = makes.__name__.lower(), makes()
        self.title = Text(makes.__name__, tag="h2")
        self.fields = {
            one: field(defaults, one, self.labels.get(one, ""), name, self.choices.get(one), width=200, margin=(6, 8))
            for one in offered(defaults)
        }
        self.which = pmui.Select(
            label="Latents", options=[EVERY, SELECTED], width=190, size="small", margin=(6, 8), css_classes=[f"sdlx-{name}-which"],
            visible="latents" in makes.param,
        )  # fmt: skip
        self.said, self.why = Text("", role="status", css_classes=[f"sdlx-{name}-said"]), Text("", tone="quiet", visible=False)
        self.preview = button("Preview", f"{name}-preview", self._preview)
        for one in (self.which, *self.fields.values()):
            one.param.watch(lambda event: self.refresh(), "value")
        shown = [one for setting, one in self.fields.items() if setting not in self.folded]
        form = pn.FlexBox(self.which, *shown, self.preview, align_items="center", margin=0)
        rest = pn.FlexBox(*(self.fields[setting] for setting in self.folded), align_items="center", margin=0)
        folds = [Fold("More settings", rest, name=name)] if self.folded else []
        self._view = sheet(self.title, self.said, form, *folds, self.why, name=name)

    def __panel__(self):
        return self._view

    def settings(self):
        latents = {"latents": self._selected()} if self.which.visible else {}
        return latents | {name: one.value for name, one in self.fields.items()}

    def refresh(self) -> None:
        chosen, selected = self.which.value == SELECTED, len(self.host.state.selected_latents)
        refused, nothing = self.refused(), chosen and not selected
        about = plural(selected, "latent") + " selected." if chosen else self.about()
        self.said.text = refused or (NONE_SELECTED if nothing else about)
        self.preview.disabled = bool(refused) or nothing or not self.host.session.writable

    def take_selection(self) -> None:
        self.which.value = SELECTED if self.host.state.selected_latents else EVERY

    def about(self) -> str:
        """What it does, in a sentence."""
        return (self.makes.__doc__ or "").strip().partition("\n")[0]

    def refused(self) -> str:
        """Why it cannot be applied here; empty where it can."""
        return ""

    def _selected(self) -> list[int] | None:
        return [int(i) for i in self.host.state.selected_latents] if self.which.value == SELECTED else None


class RealignForm(PlainForm):
    """Which rows turn, how strongly they are held there, and what that costs."""

    labels = {"pull": "Pull", "refit": "Refit keeps", "least": "Fired at least (rows)", "choose_rows": "Measure on (rows)"}
    folded = ("refit", "least", "choose_rows")
    choices = {"refit": {"the size of the codes": "size", "the norm of the row": "norm"}}

    def __init__(self, host):
        super().__init__(host, Realign)
        self.fields["pull"].step = 0.01
        self.fields["least"].step, self.fields["choose_rows"].step = 10, 1_024
        self.why.param.update(text=TRADE, visible=True)

    def about(self):
        return TURNS if self.fields["pull"].value else f"{TURNS} {FREE}"

    def refused(self):
        session = self.host.session
        return self.host.findings.ask(("realign", id(session)), lambda: refusal(session.dictionary), default="")


OWN: dict[str, type[Form]] = {"Resample": ResampleForm, "Anchor": AnchorForm, "Realign": RealignForm}


def form_of(host, makes: type[Intervention]) -> Form:
    """The form of an intervention: one of its own, or a field a setting."""
    own = OWN.get(makes.__name__)
    return PlainForm(host, makes) if own is None else own(host)
