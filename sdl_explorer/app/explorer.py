"""`Explorer`: a session in a cell or in the served app. `explore` is the one line from data to it."""

import secrets

import pandas as pd
import panel as pn

from sdl_explorer.app import pages
from sdl_explorer.app.desk import Desk
from sdl_explorer.app.entry import session_of
from sdl_explorer.app.facts import labelled, latent_table
from sdl_explorer.app.shell import Frame
from sdl_explorer.diagnosis.alignment import align
from sdl_explorer.diagnosis.compare import Control, scoreboard
from sdl_explorer.diagnosis.compared import Compared
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.diagnosis.recovery import score_recovery
from sdl_explorer.session import Session
from sdl_explorer.state import ExplorerState
from sdl_explorer.views.look import Look
from sdl_explorer.views.truth_table import truth_table
from sdl_explorer.widgets.arrival import Arrival, Cell
from sdl_explorer.widgets.log import log_table


def extension(inline: bool = True) -> None:
    """Load Panel's part of a notebook. `inline` puts its scripts into the notebook: no internet is needed then.

    The first display does this by itself.
    """
    if not pn.extension._loaded:
        pn.extension("tabulator", inline=inline)


def explore(what, dictionary=None, targets=None, **settings) -> "Explorer":
    """Open the explorer on activations, a checkpoint, a run or a session.

        explore(tensor)                          activations; an untrained, paused session that says so
        explore("activations.npy", "sae/")       a checkpoint on activations, after a preflight; with rescale=True it reads
                                                 rows at the scale that the preflight asks for
        explore("runs/first")                    a run folder
        explore(session)

    `what` is a tensor, an array, `Activations`, a `Source`, a `SparseDictionary` (then `activations=`), a path to any of
    these, or a `Session`. `targets` are a transcoder's. Further settings are those of `Session`: n_latents, method, lr, ...
    """
    return Explorer(session_of(what, dictionary, targets, **settings))


class Explorer(pn.viewable.Viewer):
    """Shows a session: as the last line of a cell, with `.servable()`, or with `.show()`.

    Several explorers can look at one session. `state` is the looking; every number on screen is an attribute here.
    """

    def __init__(self, session: Session, state: ExplorerState | None = None, **params):
        super().__init__(**params)
        self.desk = Desk(session, state)

    session = property(lambda self: self.desk.session, doc="The model.")
    state = property(lambda self: self.desk.state, doc="The looking.")

    def __panel__(self):
        frame = Frame(self.desk)
        self.desk.show(frame)
        return frame

    def _repr_mimebundle_(self, include=None, exclude=None):
        extension()
        return Cell(self._create_view(), self.desk.lock)._repr_mimebundle_(include, exclude)

    def __repr__(self) -> str:
        return f"Explorer({self.session!r})"

    def __str__(self) -> str:
        return repr(self)

    # pages ---------------------------------------------------------------------------------------------------------

    def overview(self):
        """Is this dictionary healthy, and what is wrong first?"""
        return Sheet(self.desk, "Overview")

    def alignment(self):
        """Which true features were learned, by which latent, and how well?"""
        return Sheet(self.desk, "Alignment")

    def latents(self):
        """Does each latent mean one thing, several, or nothing?"""
        return Sheet(self.desk, "Latents")

    def intervene(self):
        """What can be repaired, and what would it change?"""
        return Sheet(self.desk, "Intervene")

    def absorption(self):
        """Which latents go silent where a more special one takes over?"""
        return Sheet(self.desk, "Absorption")

    def landscape(self):
        """Why did training stop here, and do the theorems apply to this model?"""
        return Sheet(self.desk, "Landscape")

    def compare(self):
        """Did it help more than simply training on?"""
        return Sheet(self.desk, "Compare")

    # numbers -------------------------------------------------------------------------------------------------------

    @property
    def latent_table(self) -> pd.DataFrame:
        """One row per latent: status, rate, norms, best matches, and labels where latents have some."""
        health, alignment = self._find()
        return labelled(latent_table(self.session.dictionary, health, alignment, self.state.tau), self.session.labels.in_force)

    @property
    def feature_table(self) -> pd.DataFrame:
        """One row per true feature (or anchor): verdict, best latents, cosines. Worst first."""
        health, alignment = self._find()
        if alignment is None:
            raise ValueError(
                "feature_table compares with true features, and these activations have none (truth=None). Use LinearBench or "
                "HierarchyBench, or give the session anchors."
            )
        look = self.desk.look()
        scored = self.session.find(score_recovery, tau=look.tau) if self.desk.knows(score_recovery) else None
        return truth_table(alignment, health, look, scored)

    @property
    def log(self) -> pd.DataFrame:
        """One sentence per commit, newest first, with the Python that did it."""
        return log_table(self.session.commits, self.desk.look())

    def scoreboard(self, before=None, controls: int = 0, n_steps: int = 500) -> pd.DataFrame:
        """The numbers before and now. `before` is a commit (None: before the last intervention).

        With `controls`, that many pairs are trained for `n_steps` with and without the last intervention, and the table is
        that of the control: each arm, the paired difference with its 95 % interval, and the verdict.
        """
        if controls:
            control: Control = self.session.control(n_steps, runs=controls)
            return control.table()
        pair = self.desk.compared()
        if before is None and pair is None:
            raise ValueError("scoreboard: no intervention on this branch yet, so there is nothing before it; pass before=, a commit.")
        with self.session.branch(before if before is not None else pair[0]) as twin:
            then = scoreboard(*self._find(twin))
        now = scoreboard(*self._find())
        return pd.DataFrame({"before": then, "now": now}).assign(change=lambda table: table["now"] - table["before"])

    def compare_with(self, other, **settings) -> Compared:
        """Which latents another dictionary has too: `session.compare_with`, shown on the page Compare."""
        compared = self.session.compare_with(other, **settings)
        self.desk.poll()
        return compared

    def _find(self, session: Session | None = None):
        session = session or self.session
        if not self.desk.knows(align):
            return session.find(check_health), None
        return tuple(session.find([check_health, align]))

    # looking -------------------------------------------------------------------------------------------------------

    @property
    def selection(self) -> tuple[int, ...]:
        """The selected latents. Assign ids to select them in every open view; the first becomes the primary.

        explorer.selection = (3, 17)
        """
        return self.state.selected_latents

    @selection.setter
    def selection(self, latents) -> None:
        self.desk.select(latents=tuple(latents))

    def look(self) -> Look:
        """How the cards look at the findings: `view(*found, explorer.look())` draws the card's plot."""
        return self.desk.look()

    def restore(self, state: dict) -> tuple[str, ...]:
        """Open what `explorer.state.to_dict()` wrote; returns the names that were dropped."""
        dropped = self.state.restore(state)
        self.desk.poll()
        return dropped

    def close(self) -> None:
        """Stop following the session, which stays open."""
        self.desk.close()

    def show(self, port: int = 0, address: str = "127.0.0.1", open: bool = True, **options):
        """Serve this session on loopback under a path that cannot be guessed, for a notebook that cannot reach its kernel.

        Every visitor gets an explorer of their own on the same session. On another machine, forward the port first:
        `ssh -L PORT:127.0.0.1:PORT host`. Returns the server.
        """
        from sdl_explorer.app.serve import serve_session

        return serve_session(self.session, self.state.to_dict(), port, address, open, secrets.token_urlsafe(16), **options)


class Sheet(pn.viewable.Viewer):
    """One page alone, as an object of a cell."""

    def __init__(self, desk: Desk, title: str):
        super().__init__()
        self.desk, self.title = desk, title

    def __panel__(self):
        display = _Alone(self.desk, self.title)
        self.desk.show(display)
        return pn.Column(display.page, display.arrival, sizing_mode="stretch_width", margin=0)

    def _repr_mimebundle_(self, include=None, exclude=None):
        extension()
        return Cell(self._create_view(), self.desk.lock)._repr_mimebundle_(include, exclude)


class _Alone:
    """Keeps one page up to date whichever page the state has in front."""

    def __init__(self, desk: Desk, title: str):
        self.desk, self.page, self.arrival = desk, pages.make(desk, title, visible=True), Arrival()
        self.page.show(True)

    def needs(self):
        return self.page.needs(self.desk)

    def refresh(self) -> None:
        self.page.refresh()

    def call(self, form: str, advice=None) -> None:
        self.page.call(form, advice)
