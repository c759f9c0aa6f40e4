"""`Reader`: what one viewer knows about a session. It reads snapshots and findings and changes nothing."""

import html

import numpy as np
import pandas as pd

from sdl_explorer.app.copied import lines_of
from sdl_explorer.app.facts import Gathered, describe_data, describe_model, failure, feature_lines, latent_lines, latent_table
from sdl_explorer.app.findings import Findings
from sdl_explorer.data.activations import Activations
from sdl_explorer.data.anchors import Anchors, Pins
from sdl_explorer.data.sources import stream
from sdl_explorer.diagnosis.absorption import find_absorption
from sdl_explorer.diagnosis.alignment import align
from sdl_explorer.diagnosis.compare import Control
from sdl_explorer.diagnosis.compared import Compared
from sdl_explorer.diagnosis.examples import activations_of, find_examples
from sdl_explorer.diagnosis.groups import trace_groups
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.diagnosis.meanings import suspect_polysemantic
from sdl_explorer.diagnosis.patterns import trace_patterns
from sdl_explorer.diagnosis.probes import score_absorption
from sdl_explorer.diagnosis.recovery import score_recovery
from sdl_explorer.labels import Labels
from sdl_explorer.repair import Repair
from sdl_explorer.state import PAGES, ExplorerState
from sdl_explorer.studies import JUDGE_ROWS
from sdl_explorer.training.commits import Commit
from sdl_explorer.training.history import History
from sdl_explorer.training.interventions import Plan
from sdl_explorer.trial import Trial
from sdl_explorer.views.examples import cards_html, context_rows, example_cards, examples_empty, examples_reading
from sdl_explorer.views.look import Look
from sdl_explorer.views.view import Before, Chosen, Commits
from sdl_explorer.views.words import NOT_COMPUTED, not_finite
from sdl_explorer.widgets.intervene import CLASS, GIVEN, TRUE

INTERVENTIONS = ("resample", "anchor", "realign", "release", "prune", "split", "unabsorb")
NEED_TRUTH = (find_absorption, trace_patterns, score_recovery)
STAND_IN = (trace_groups, suspect_polysemantic)
KINDS = {"sae": "SAE", "transcoder": "Transcoder", "crosscoder": "Crosscoder"}


class Reader:
    """One viewer of one session: `state` holds the looking, `session` the model, `findings` what was computed on it."""

    def __init__(self, session, state: ExplorerState | None = None):
        self.state = state if state is not None else ExplorerState()
        self._take(session)

    def _take(self, session) -> None:
        self.session, self.findings, self.snapshot = session, Findings(session), session.snapshot
        self.sample = session.source.sample(256, stream(0, "explorer"), "judge")
        self.plan: Plan | None = None
        self.plan_step = 0
        self._table: tuple = (None, None)
        self._held: tuple[str, Pins | None] = ("", None)
        self._pulled: tuple[str, dict[int, float]] = ("", {})
        self._anchor_rows: tuple[Anchors | None, dict[str, Anchors]] | None = None
        self._shown_examples: tuple = (None, "")
        self._judged: Activations | None = None
        self.state.param.update(n_latents=session.n_latents, n_features=self.sample.truth.n_features if self.has_truth else None)

    def judge_rows(self) -> Activations:
        """The rows that findings read; the same ones that the session judges on."""
        if self._judged is None:
            self._judged = self.session.source.sample(JUDGE_ROWS, stream(self.session.seed, "judge"), "judge")
        return self._judged

    # the session ---------------------------------------------------------------------------------------------------

    @property
    def has_truth(self) -> bool:
        return self.sample.truth is not None

    def untrained(self) -> bool:
        return self.snapshot.step == 0 and len(self.session.commits) <= 1 and self.session.preflight is None

    def dead(self) -> tuple[int, ...]:
        """Latents silent for the whole window."""
        return tuple(np.flatnonzero(self.snapshot.samples_since_fired >= self.session.dead_after).tolist())

    def pins(self) -> Pins | None:
        """What is held. Pins change with commits alone, so that the lane is asked once a commit."""
        head = self.session.head.id
        if self._held[0] != head:
            self._held = (head, self.session.pins)
        return self._held[1]

    def held(self) -> dict[int, str]:
        """Pinned latents and the names of what holds them."""
        pins = self.pins()
        return {} if pins is None else dict(zip(pins.latents.tolist(), pins.anchors.names, strict=True))

    def pulled(self) -> dict[int, float]:
        """Latents whose encoder row is pulled to a measured direction, and how strongly."""
        head = self.session.head.id
        if self._pulled[0] != head:
            pulls = self.session.pulls
            self._pulled = (head, {} if pulls is None else dict(zip(pulls.latents.tolist(), pulls.weight.tolist(), strict=True)))
        return self._pulled[1]

    def last_intervention(self) -> Commit | None:
        """The newest intervention on the way to the checked-out commit."""
        commits = {commit.id: commit for commit in self.session.commits}
        at = self.session.head
        while at is not None and at.kind not in INTERVENTIONS:
            at = commits.get(at.parent)
        return at

    def compared(self) -> tuple[str, str] | None:
        """The commits before and after: what the viewer chose, else around the last intervention; None where there is none."""
        if self.state.compare is not None:
            return self.state.compare
        last = self.last_intervention()
        return None if last is None or last.parent is None else (last.parent, self.session.head.id)

    # what a view is called with ------------------------------------------------------------------------------------

    def look(self) -> Look:
        state = self.state
        names = ("selected_latents", "primary_latent", "selected_features", "primary_feature", "tau", "side", "theme")
        return Look(**{name: getattr(state, name) for name in names}, head=self.session.head.id, n_latents=self.session.n_latents)

    def knows(self, finding) -> bool:
        """Can this finding say anything here? Alignment needs truth, anchors or pins, concepts need labels; some stand in where
        there is no truth."""
        if finding is align:
            return bool(self.against)
        if finding is score_absorption:
            return self.sample.labels is not None
        return not self.has_truth if finding in STAND_IN else self.has_truth or finding not in NEED_TRUTH

    @property
    def has_families(self) -> bool:
        """Whether the truth names parents and children."""
        return self.has_truth and any(parent is not None for parent in self.sample.truth.parents)

    @property
    def pages(self) -> tuple[str, ...]:
        """The pages that can show something."""
        return PAGES

    @property
    def against(self) -> str:
        """What latents are compared with: "truth", "anchors", or nothing."""
        if self.has_truth:
            return "truth"
        return "anchors" if self.session.anchors is not None or self.pins() is not None else ""

    def missing(self, otherwise: str = NOT_COMPUTED) -> str:
        """Why a number is not there."""
        diverged = self.snapshot.diverged
        return otherwise if diverged is None else not_finite(diverged.step)

    def needs(self, view) -> tuple[list, list]:
        """Findings that a view wants now, and (finding, commit) pairs at the commit it compares with."""
        pair, now, before = self.compared(), [], []
        for one in view.of:
            if isinstance(one, Before):
                if pair is not None and self.knows(one.finding):
                    before.append((one.finding, pair[0]))
            elif hasattr(one, "accumulator") and self.knows(one):
                now.append(one)
        return now, before

    def gather(self, view) -> Gathered:
        """The values that a view is called with; None for what is not there."""
        values, keys, pending, errors, step = [], [], False, [], self.snapshot.step
        for one in view.of:
            if isinstance(one, Chosen):
                value, key, wanted, error = self._chosen(one)
                pending |= wanted
                values.append(value)
                keys.append(key)
                errors.append(error)
            elif isinstance(one, Before) or hasattr(one, "accumulator"):
                found, wanted = self._found(one)
                pending |= wanted and found is None
                values.append(found and found.value)
                keys.append(found and found.serial)
                if found is not None:
                    errors.append(found.error)
                    step = step if isinstance(one, Before) else found.step
            else:
                value, key = self._record(one)
                values.append(value)
                keys.append(key)
                step = value.step if isinstance(value, Compared | Repair | Trial) else step
        note = "" if self.session.preflight is None else self.session.preflight.verdict
        return Gathered(tuple(keys), tuple(values), pending, next((e for e in errors if e), None), step, note)

    def _found(self, one):
        """A finding, and whether it is to be expected."""
        finding, pair = (one.finding if isinstance(one, Before) else one), self.compared()
        if not self.knows(finding) or (isinstance(one, Before) and pair is None):
            return None, False
        return (self.findings.at(finding, pair[0]) if isinstance(one, Before) else self.findings.now(finding)), True

    def _chosen(self, one: Chosen):
        """A finding about what is looked at, as old as the health: value, key, whether it is on its way, and what went wrong."""
        setting, health = getattr(self.look(), one.field), self.findings.now(check_health)
        if setting is None or setting == () or not self.knows(one.finding):
            return None, None, False, None
        if health is None or health.error is not None:
            return None, None, health is None, health and health.error
        key = (one, setting, health.serial)
        arrived = self.findings.ask(key, lambda: self._about(one, setting))
        return (None, key, True, None) if arrived is None else (arrived[0], (*key, "there"), False, arrived[1])

    def _about(self, one: Chosen, setting):
        try:
            return self.session.find(one.finding, **{one.setting: setting}), None
        except Exception as error:  # said on the card
            return None, error

    def _record(self, one):
        """A record of training, and a key that changes when it does."""
        session, version = self.session, self.snapshot.version
        if one is History:
            return session.history, version
        if one is Commits:
            return session.commits, version
        if one is Pins:
            return self.pins(), session.head.id
        if one is Plan:
            return self.plan, id(self.plan)
        if one is Repair:
            return session.last_repair, id(session.last_repair)
        if one is Trial:
            return session.last_trial, id(session.last_trial)
        if one is Control:
            return session.last_control, id(session.last_control)
        if one is Labels:
            labels = session.labels.in_force
            return labels, labels
        if one is Compared:
            return session.last_compared, id(session.last_compared)
        if getattr(one, "__name__", "") == "Ghosts" or "History" in str(one):
            return session.ghosts, version
        raise TypeError(f"Explorer: a view asks for {one!r}, which is no finding and no record; declare it in `of` as views/view.py says.")

    def value(self, finding):
        """The newest result of a finding, or None."""
        found = self.findings.now(finding)
        return None if found is None else found.value

    def recovery(self) -> float | None:
        """Share of the true features recovered, as on the cards; None without truth."""
        alignment = self.value(align)
        return None if alignment is None or not self.has_truth else alignment.recovery(self.state.tau, self.state.side)

    # tables and words ----------------------------------------------------------------------------------------------

    def cached_table(self) -> pd.DataFrame | None:
        """The latent table of the newest findings, or the one before it, or None before they are there."""
        health, alignment, tau = self.value(check_health), self.value(align), self.state.tau
        if health is None:
            return None
        key = (id(health), id(alignment), tau)
        if self._table[0] != key:
            made = self.findings.ask(("table", *key), lambda: latent_table(self.session.dictionary, health, alignment, tau))
            if made is not None:
                self._table = (key, made)
        return self._table[1]

    def inspect(self) -> tuple[list[str], list[str]]:
        """What the inspector says about the primary latent, and about its feature."""
        latent, table = self.state.primary_latent, self.cached_table()
        if latent is None:
            return [], []
        if table is None:
            return [self.missing()], []
        alignment = self.value(align)
        word = "anchor" if alignment is not None and alignment.of == "anchors" else "feature"
        lines, label = latent_lines(table.iloc[latent], word), self.session.labels.get((latent,))
        if label is not None:
            lines.append(f"Labelled {label.says} at step {label.step}." + (f" {label.note}" if label.note else ""))
        return lines, feature_lines(self.state.primary_feature, alignment)

    def example_cards(self) -> str:
        """Markup of what the primary latent fires on; escaped by the view."""
        latent, health = self.state.primary_latent, self.findings.now(check_health)
        if latent is None or health is None:
            return ""
        if health.error is not None:
            return _paragraph(self.missing(failure(health.error)))
        look = Look(primary_latent=latent, theme=self.state.theme)
        shown = self._shown_examples[1] if self._shown_examples[0] == latent else ""
        return self.findings.ask(("examples", health.serial, look), lambda: self._examples(look), default=shown)

    def _examples(self, look: Look) -> str:
        try:
            markup = self._example_markup(look)
        except (ValueError, OSError) as error:  # weights that are not finite, data that is gone
            return _paragraph(self.missing(failure(error)))
        self._shown_examples = (look.primary_latent, markup)
        return markup

    def _example_markup(self, look: Look) -> str:
        found, rows, latent = self.session.find(find_examples), self.judge_rows(), look.primary_latent
        why = examples_empty(found, look)
        if why is not None:
            return _paragraph(why)
        dictionary, around = self.session.dictionary, context_rows(found, rows, latent)
        tints = activations_of(dictionary, rows.to(dictionary.device), latent, around).tolist() if rows.examples is not None else ()
        cards = example_cards(found, rows, latent, dict(zip(around.tolist(), tints, strict=False)))
        return _paragraph(examples_reading(found, look)) + cards_html(cards, look)

    def name_of_run(self) -> str:
        name = self.session.folder.name if self.session.folder is not None else type(self.session.source).__name__
        return f"{name} · {KINDS[self.sample.kind]}"

    def live_word(self) -> str:
        if not self.session.writable:
            return "● following"
        return "● live" if self.snapshot.running else "○ paused"

    def describe_data(self) -> str:
        return describe_data(self.session.source, self.sample)

    def describe_model(self) -> str:
        return describe_model(self.session)

    def failure(self, error: Exception) -> str:
        return failure(error)

    def python(self, view) -> str:
        """Lines that give a card's numbers in a cell that has the session."""
        return lines_of(self, view)

    # anchors -------------------------------------------------------------------------------------------------------

    def anchor_sources(self) -> dict[str, list[str]]:
        """Where directions can come from, and their names."""
        return {source: list(anchors.names) for source, anchors in self._anchors().items()}

    def anchors_of(self, source: str, places: list[int]) -> Anchors:
        return self._anchors()[source].take(places)

    def _anchors(self) -> dict[str, Anchors]:
        """Made once, and again where a cell has given the session other anchors."""
        given = self.session.anchors
        if self._anchor_rows is None or self._anchor_rows[0] is not given:
            rows = {TRUE: Anchors.from_truth(self.sample)} if self.has_truth else {}
            rows |= {} if given is None else {GIVEN: given}
            rows |= {} if self.sample.labels is None else {CLASS: Anchors.from_labels(self.judge_rows())}
            self._anchor_rows = (given, rows)
        return self._anchor_rows[1]


def _paragraph(text: str) -> str:
    return f'<p style="margin:4px 0;font-size:13px">{html.escape(text)}</p>'
