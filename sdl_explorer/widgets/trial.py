"""A trial: chance gives each candidate an intervention, its sham or nothing, in a copy of the model."""

from collections.abc import Sequence

import numpy as np
import panel as pn
import panel_material_ui as pmui

from sdl_explorer.trial import ARMS, LEAST
from sdl_explorer.views.words import count, plural
from sdl_explorer.widgets.intervene import DEAD, NONE_SELECTED, SELECTED, Form
from sdl_explorer.widgets.job import JobLine
from sdl_explorer.widgets.kit import Text, button, sheet

TOGETHER = ("Release", "Split", "Unabsorb")  # one latent is not one unit there
ALL = "all latents"
ABOUT = "The settings are those of its form above. All happens in a copy: the model stays as it is."
PAUSE = "Pause training first: a trial is judged on the model as it is."
STARTING = "Measuring all latents before anything changes…"
MOST = 3_000  # permutations take time and memory for each of them
FEWEST = LEAST * len(ARMS)


class TrialForm(pn.viewable.Viewer):
    """Which intervention, which candidates, how many steps, *Run the trial* and *Stop*."""

    def __init__(self, host, forms: list[Form]):
        super().__init__()
        self.host, self._starting = host, False
        self.forms = {form.makes.__name__: form for form in forms if "latents" in form.makes.param}
        names = [name for name in self.forms if name not in TOGETHER]
        settings = {"size": "small", "margin": (6, 8)}
        self.which = pmui.Select(
            label="Intervention", options=names, value=names[0], width=170, **settings, css_classes=["sdlx-trial-which"]
        )
        self.candidates = pmui.Select(
            label="Candidates", options=[DEAD, SELECTED, ALL], value=ALL, width=190, **settings, css_classes=["sdlx-trial-candidates"]
        )
        most = host.most_steps or 100_000
        self.steps = pmui.IntInput(
            label="Steps", value=200, start=1, end=most, step=50, width=120, **settings, css_classes=["sdlx-trial-steps"]
        )
        self.seed = pmui.IntInput(
            label="Seed of the draw", value=0, start=0, step=1, width=140, **settings, css_classes=["sdlx-trial-seed"]
        )
        self.run, self.job = button("Run the trial", "trial-run", self._run), JobLine(host, "trial")
        self.said = Text("", role="status", css_classes=["sdlx-trial-said"])
        for one in (self.which, self.candidates):
            one.param.watch(lambda event: self.refresh(), "value")
        form = pn.FlexBox(self.which, self.candidates, self.steps, self.seed, self.run, self.job.cancel, align_items="center", margin=0)
        about = Text(ABOUT, tone="quiet")
        self._view = sheet(Text("Trial", tag="h2"), self.said, form, about, self.job.progress, name="trial")

    def __panel__(self):
        return self._view

    def chosen(self) -> Sequence[int]:
        """The candidates."""
        if self.candidates.value == DEAD:
            return self.host.dead()
        return self.host.state.selected_latents if self.candidates.value == SELECTED else range(self.host.session.n_latents)

    def refresh(self) -> None:
        mine, job, n = self.job.refresh(), self.host.snapshot.job, len(self.chosen())
        self.run.disabled = self._starting or job is not None or self.host.snapshot.running or n < FEWEST
        if mine:
            self.said.text = f"Trial: {job.done:.0%}. The model stays as it is."
        elif self._starting:
            self.said.text = STARTING
        elif self.host.snapshot.running:
            self.said.text = PAUSE
        elif self.candidates.value == SELECTED and not n:
            self.said.text = NONE_SELECTED
        elif n < FEWEST:
            self.said.text = f"{plural(n, 'candidate')}: at least {FEWEST} are needed, {LEAST} in each of {len(ARMS)} arms."
        else:
            of_them = f", of which {count(MOST)} are drawn at random" if n > MOST else ""
            self.said.text = (
                f"{plural(n, 'candidate')}{of_them}: chance gives a third of them {self.which.value}, a third its sham in random "
                "directions, and a third nothing."
            )

    async def _run(self, event=None) -> None:
        host, form, candidates = self.host, self.forms[self.which.value], [int(i) for i in self.chosen()]
        steps, seed = min(max(self.steps.value or 1, 1), self.steps.end), max(self.seed.value or 0, 0)  # typed numbers may be out of bounds
        if len(candidates) > MOST:
            candidates = sorted(np.random.default_rng(seed).choice(candidates, MOST, replace=False).tolist())

        def job() -> None:
            settings = {name: value for name, value in form.settings().items() if name != "latents"}
            host.session.trial(form.makes(**settings), candidates, steps, seed=seed)

        self._starting = True
        self.refresh()
        try:
            await host.do(job)
        finally:
            self._starting = False
            self.refresh()
