"""`Desk`: what one viewer's displays share. It polls the session and carries out what is asked."""

import asyncio
import contextvars
import functools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import panel as pn
from panel.io.callbacks import PeriodicCallback

from sdl_explorer.app.actions import ACTIONS, command
from sdl_explorer.app.facts import failure
from sdl_explorer.app.findings import in_worker
from sdl_explorer.app.reader import Reader
from sdl_explorer.diagnosis.alignment import align
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.diagnosis.verdict import Verdict
from sdl_explorer.state import ExplorerState, keep, matched_feature, matched_latent, strictest, worst_pair
from sdl_explorer.training.interventions import Intervention

log = logging.getLogger(__name__)
PERIOD = 200  # milliseconds between looks at the session
BRIEFLY = 0.3  # seconds that a new display waits for its first numbers
IDLE = 10  # looks between two checks whether another process has written


class Desk(Reader):
    """Everything on screen is a copy taken at a poll; nothing pushes. Widgets call it `host`."""

    actions = tuple(ACTIONS)  # what is a button in fixed words

    def __init__(self, session, state: ExplorerState | None = None):
        super().__init__(session, state)
        self._commands = ThreadPoolExecutor(2, thread_name_prefix="sdlx-command")
        self.lock = threading.RLock()
        self._displays: list = []
        self._timer = self._seen = None
        self._pointed = self.state.primary_latent is not None
        self._ticks = 0
        self.message, self.tone = "", "normal"
        self.own: list = []  # sessions that were started here, and end here
        self.most_steps: int | None = None  # a press of Play or Train; None: no limit
        session.pulses.append(self._pulse)

    def open(self, session) -> None:
        """Look at this session from now on."""
        self.findings.close()
        self.session.pulses.remove(self._pulse)
        nothing = {"selected_latents": (), "primary_latent": None, "selected_features": (), "primary_feature": None, "compare": None}
        self.state.param.update(**nothing)
        self._take(session)
        self._pointed = False
        session.pulses.append(self._pulse)
        self.poll()

    def close(self) -> None:
        """Stop polling and let go of the session, which stays open; those started here end."""
        if self._timer is not None and self._timer.running:
            self._timer.stop()
        if self._pulse in self.session.pulses:
            self.session.pulses.remove(self._pulse)
        self._displays.clear()
        self.findings.close()
        self._commands.shutdown(wait=False, cancel_futures=True)
        if self.own:  # closing waits for the step in progress, the event loop must not
            threading.Thread(target=lambda: [session.close() for session in self.own], name="sdlx-close").start()

    # polling -------------------------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Bring every display up to date with the session and the state; cheap when nothing has changed."""
        if not self.lock.acquire(blocking=False):
            return  # another thread of this notebook is at it
        try:
            self._ticks += 1
            if self._ticks % IDLE == 0 and not self.session.writable:
                self.session.version  # noqa: B018 - a follower looks whether the writer has committed
            self.snapshot = self.session.snapshot
            self.findings.collect()
            if not self._pointed:
                self._point_at_worst()
            displays = [display for display in self._displays if display.arrival.there]
            looks = tuple(self.state.param.values().items())
            drawn = tuple(display.arrival.drawn for display in displays)
            seen = (self.snapshot.version, self.findings.serial, looks, id(self.plan), self.message, drawn)
            if seen != self._seen:
                self._seen = seen
                with pn.io.hold():
                    for display in displays:
                        display.refresh()
            for display in displays:
                self.findings.want(*display.needs(), self.snapshot)
        finally:
            self.lock.release()

    def _pulse(self) -> None:
        """A cell is waiting for training in its own thread; our own workers must not touch figures."""
        if not in_worker() and self._displays:
            self.poll()

    def settle(self, seconds: float = 60.0) -> None:
        """For scripts and tests: poll until every display shows the model as it is now."""
        for _ in range(50):
            self.poll()
            if not self.findings.busy:
                return
            if not self.findings.wait(seconds):
                raise TimeoutError(f"Explorer: the findings were not there after {seconds:g} s.")

    def show(self, display) -> None:
        """Keep a display up to date from now on."""
        self.findings.want(*display.needs(), self.session.snapshot)
        self.findings.wait(BRIEFLY)
        self._displays.append(display)
        self._seen = None
        if self._timer is None:
            self._timer = PeriodicCallback(callback=self.poll, period=PERIOD, background=True, log=False)
            document = pn.state.curdoc
            if document is not None and document.session_context:
                pn.state.onload(self._timer.start)
            else:  # a context of its own: else the task inherits the document of whichever view was clicked
                contextvars.Context().run(self._timer.start)
        self.poll()

    # commands ------------------------------------------------------------------------------------------------------

    async def do(self, command: Callable, *args, said: str = "") -> bool:
        """Run a command of the session beside the event loop, and say how it went."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._commands, functools.partial(command, *args))
        except Exception as error:
            log.info("command failed", exc_info=True)
            self.say(failure(error), "warning")
            return False
        self.say(said)
        return True

    def say(self, message: str, tone: str = "normal") -> None:
        self.message, self.tone = message, tone
        self.poll()

    async def act(self, action: str) -> None:
        """Carry out an [action] of fixed words."""
        do = command(action)
        if do is not None:
            await do(self)

    def call(self, form: str, advice: Intervention | None = None) -> None:
        """Bring the form of an intervention into view, with what is selected in it; nothing is planned or applied."""
        for display in self._displays:
            display.call(form, advice)

    def propose(self, verdict: Verdict) -> None:
        """The same with what a verdict is about, and with the settings of its advice."""
        advice = verdict.advice
        self.select(latents=verdict.latents if advice.latents is None else advice.latents)
        self.call(type(advice).__name__.lower(), advice)

    async def preview(self, make: Callable[[], Intervention]) -> None:
        """Plan an intervention that `make` builds from the form; nothing changes."""

        def plan() -> None:
            intervention = make()
            self.plan_step = self.session.step
            self.plan = self.session.plan(intervention)

        await self.do(plan)

    async def apply_plan(self) -> None:
        """Apply the plan that is previewed, as it is."""
        plan = self.plan
        if await self.do(self.session.apply, plan, said=f"Applied: {plan.reading} One commit back on the timeline is the model before it."):
            self.plan = None
            self.state.compare = None
            self.poll()

    # looking -------------------------------------------------------------------------------------------------------

    def select(self, latents=None, features=None, page: str | None = None) -> None:
        """One user action: select latents, or true features, and what they match; on another page where one is named."""
        alignment = self.value(align)
        if latents is not None:
            chosen = tuple(int(i) for i in latents)
            primary = chosen[0] if chosen else None
            feature = matched_feature(primary, alignment)
            matches = () if feature is None else (feature,)
            changes = {"selected_latents": chosen, "primary_latent": primary, "selected_features": matches, "primary_feature": feature}
        else:
            chosen = tuple(int(i) for i in features)
            primary = chosen[0] if chosen else None
            matches = (matched_latent(feature, alignment) for feature in chosen)
            latents = tuple(dict.fromkeys(match for match in matches if match is not None))
            changes = {"selected_features": chosen, "primary_feature": primary, "selected_latents": latents}
            changes["primary_latent"] = matched_latent(primary, alignment)
        self.state.param.update(**changes, page=page or self.state.page)
        self.poll()

    def _point_at_worst(self) -> None:
        """The first primary is the worst thing, never latent 0; it is nobody's action, so there is nothing to undo."""
        if self.value(check_health) is not None and (self.value(align) is not None or not self.knows(align)):
            self._pointed = True
            if self.state.primary_latent is None:
                with self.state.unrecorded():
                    self.state.param.update(**self._worst())

    def select_worst(self) -> None:
        """Select the worst thing."""
        self.state.param.update(**self._worst())
        self.poll()

    def _worst(self) -> dict:
        """The true feature with the lowest best match and the latent nearest to it; without truth, the latent that writes
        something unlike what fires it."""
        feature, latent = worst_pair(self.value(align))
        health = self.value(check_health)
        if latent is None and health is not None and health.alive.any():
            alive = np.flatnonzero(health.alive)
            latent = int(alive[np.argmin(health.decoder_response[alive])])
        if latent is None:
            return {}
        features = () if feature is None else (feature,)
        return {"selected_latents": (latent,), "primary_latent": latent, "selected_features": features, "primary_feature": feature}

    def select_random(self) -> None:
        self.select(latents=(int(np.random.default_rng().integers(self.session.n_latents)),))

    def select_newest_dead(self) -> None:
        dead, silent = self.dead(), self.snapshot.samples_since_fired
        if dead:
            self.select(latents=(min(dead, key=lambda i: silent[i]),))
        else:
            self.say("No latent is dead.")

    def step_primary(self, by: int) -> None:
        at = self.state.primary_latent
        self.select(latents=((0 if at is None else at + by) % self.session.n_latents,))

    def filter(self, *filters) -> None:
        """Keep these filters, and select the latents that pass them."""
        table, chosen = self.cached_table(), ExplorerState(filters=filters).filters
        latents = self.state.selected_latents if table is None else tuple(np.flatnonzero(keep(chosen, table)).tolist())
        changes = {"filters": chosen, "selected_latents": latents if chosen else ()}
        if chosen and self.state.primary_latent not in latents:
            primary = latents[0] if latents else None
            feature = matched_feature(primary, self.value(align))
            features = () if feature is None else (feature,)
            changes |= {"primary_latent": primary, "primary_feature": feature, "selected_features": features}
        self.state.param.update(**changes)
        self.poll()

    def clear_filters(self) -> None:
        self.filter()

    def relax(self) -> None:
        """Drop the filter that removes most latents."""
        filters, table = self.state.filters, self.cached_table()
        if filters and table is not None:
            worst, _ = strictest(filters, table)
            self.filter(*(one for one in filters if one != worst))
