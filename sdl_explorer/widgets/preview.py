"""What a change would do, row by row, and what applies it; what is held, and what lets it go."""

import panel as pn
import panel_material_ui as pmui

from sdl_explorer.training.interventions import Release
from sdl_explorer.views.plan import plan_table
from sdl_explorer.views.words import count, plural
from sdl_explorer.widgets.kit import Text, button, sheet, stack
from sdl_explorer.widgets.table_twin import TableTwin

LISTED = 64  # pulled rows that are listed one by one


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


class Held(pn.viewable.Viewer):
    """Which latents are held, to what, and *Release*: pins to directions that we are told, pulls to measured ones."""

    makes = Release

    def __init__(self, host):
        super().__init__()
        self.host = host
        self._shown: tuple = ()
        self.which = pmui.MultiChoice(label="Held latents", options=[], width=420, margin=(6, 8), css_classes=["sdlx-held"])
        self.release = button("Release", "release", self._release, disabled=True)
        self.said = Text("", role="status", css_classes=["sdlx-held-said"])
        self.which.param.watch(lambda event: setattr(self.release, "disabled", not event.new), "value")
        form = pn.FlexBox(self.which, self.release, align_items="center", margin=0)
        self._card = sheet(Text("Release", tag="h2"), self.said, form, name="release")
        self._card.visible = False
        self._view = stack(self._card)

    def __panel__(self):
        return self._view

    def refresh(self) -> None:
        pinned, pulled = self.host.held(), self.host.pulled()
        self._card.visible = bool(pinned or pulled)
        selected = [latent for latent in self.host.state.selected_latents if latent in pulled]
        if self._shown == (pinned, pulled, selected):
            return
        self._shown = (pinned, pulled, selected)
        self.said.text = _say(pinned, pulled)
        options = {f"latent {latent} → {name}": (latent,) for latent, name in pinned.items()}
        if len(pulled) > 1:
            options[f"all {count(len(pulled))} pulled rows"] = tuple(pulled)
        if selected:
            options[f"{plural(len(selected), 'pulled row')} of the selected latents"] = tuple(selected)
        if len(pulled) <= LISTED:
            options |= {f"latent {latent} → its response": (latent,) for latent in pulled}
        if self.which.options != options:
            self.which.param.update(options=options, value=[])

    def settings(self):
        return {"latents": list(dict.fromkeys(latent for group in self.which.value for latent in group))}

    async def _release(self, event) -> None:
        await self.host.do(self.host.session.release, self.settings()["latents"], said="Released.")


def _say(pinned: dict[int, str], pulled: dict[int, float]) -> str:
    """'2 latents are pinned to anchors. 88 encoder rows are pulled to measured directions, with weight 0.1.'"""
    said = [f"{plural(len(pinned), 'latent is', 'latents are')} held to anchors."] if pinned else []
    if pulled:
        low, high = min(pulled.values()), max(pulled.values())
        weight = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        said.append(f"{plural(len(pulled), 'encoder row is', 'encoder rows are')} pulled to measured directions, with weight {weight}.")
    return " ".join(said)
