"""The cards for repairs and trials: what they run is a job that leaves the model alone, and what they say is what it gave."""

import asyncio

import pytest
import torch
from torch.nn.functional import normalize

from sdl_explorer.data.hierarchy import HierarchyBench
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods import TopK
from sdl_explorer.session import Session

SOURCE = HierarchyBench(parents=0, independent=8, d_in=8, independent_probability=0.1, magnitude_std=0.3)
W = SOURCE.sample(1, torch.Generator()).truth.input_features
STEPS, TRY = 5, 5 * 15  # of one arm, and of one try

pytestmark = pytest.mark.filterwarnings("ignore:Preflight")  # the cases begin broken


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch):
    monkeypatch.setattr("sdl_explorer.training.run.CHOOSE_ROWS", 1_500)
    monkeypatch.setattr("sdl_explorer.session.CHOOSE_ROWS", 400)


def merged() -> SparseDictionary:
    """Four pairs of features in four latents, and four that are silent."""
    rows = torch.cat([normalize(W[:4] + W[4:], dim=1), torch.zeros(4, 8)])
    return SparseDictionary(rows, rows.clone(), nonlinearity=TopK(k=3).nonlinearity(8))


def whole() -> SparseDictionary:
    return SparseDictionary(W.clone(), W.clone(), nonlinearity=TopK(k=3).nonlinearity(8))


class Display:
    """A form and the card of what it gives."""

    def __init__(self, desk, form, view: str):
        from sdl_explorer.views.view import find_view
        from sdl_explorer.widgets.arrival import Arrival
        from sdl_explorer.widgets.card import Card

        self.arrival, self.form, self.card = Arrival(), form, Card(desk, find_view(view))

    def needs(self):
        return [], []

    def refresh(self) -> None:
        self.form.refresh()
        self.card.refresh()


@pytest.fixture
def open_on():
    from sdl_explorer import Explorer
    from sdl_explorer.widgets.intervene import form_of
    from sdl_explorer.widgets.repair import RepairForm
    from sdl_explorer.widgets.trial import TrialForm

    opened = []

    def open_on(dictionary, view: str):
        from sdl_explorer.training.interventions import Resample
        from sdl_explorer.training.prune import Prune
        from sdl_explorer.training.split import Split

        settings = {"batch_size": 32, "dead_after": 10_000, "lr": 1e-3, "warmup_steps": 0, "device": "cpu"}
        explorer = Explorer(Session(SOURCE, TopK(k=3), dictionary=dictionary, **settings).train(3))
        opened.append(explorer)
        desk = explorer.desk
        forms = [form_of(desk, kind) for kind in (Resample, Prune, Split)] if view == "R6" else []
        form = TrialForm(desk, forms) if view == "R6" else RepairForm(desk)
        display = Display(desk, form, view)
        desk.show(display)
        return explorer, form, display.card

    yield open_on
    for explorer in opened:
        explorer.close()
        explorer.session.close()


def press(handler):
    asyncio.run(handler())


def weights(session) -> dict:
    return {name: tensor.clone() for name, tensor in session.dictionary.state_dict().items()}


def same(session, before: dict) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in session.dictionary.state_dict().items())


# repair --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_passed_waits_for_apply(open_on):
    explorer, form, card = open_on(merged(), "R5")
    session, desk = explorer.session, explorer.desk
    before, commits = weights(session), session.commits
    assert form.said.text.startswith("Tries what the top problems advise") and not form.apply.visible
    assert card.words.text == "No repair was tried yet. Press Try repairs."
    form.budget.value, form.steps.value = TRY - 1, STEPS
    assert form.run.disabled and form.cost.text.endswith("75 steps; the budget holds 0 tries.")
    form.budget.value = 2 * TRY
    assert not form.run.disabled

    press(form._run)
    assert same(session, before) and session.commits == commits and session.snapshot.job is None
    assert form.said.text == (
        "1 repair passed: split. Each was judged on top of those before it, so they are applied together. Nothing has changed yet."
    )
    assert form.apply.visible and not form.apply.disabled and not form.run.disabled and not form.job.cancel.visible
    assert "\nKept: 4 latents stand for two features or more" in card.reading.text and "computed at step 3" in card.stamp.text
    python = "explorer.session.repair(75, n_steps=5, runs=5, n=10000, apply=False).table()"
    assert card.python() == python
    table = card.view.table(*card._kept.values, desk.look())
    (kept,) = table[table["kept"]].to_dict("records")
    assert (kept["problem"], kept["advice"]) == ("Polysemantic", "Split") and kept["vs untreated low"] > 0 and kept["vs sham low"] > 0

    press(form._apply)
    assert form.said.text == "Applied: split. Earlier commits are on the timeline." and not form.apply.visible
    assert session.head.kind == "split" and (session.dictionary.W_dec @ W.T).max(dim=0).values.min() > 0.98


@pytest.mark.slow
def test_a_model_that_moved_on_takes_no_old_repair(open_on):
    explorer, form, card = open_on(merged(), "R5")
    form.budget.value, form.steps.value = TRY, STEPS
    press(form._run)
    explorer.session.train(1)
    explorer.desk.poll()
    assert form.apply.disabled and form.said.text.endswith("They were judged at step 3, and the model has changed since: try again.")
    assert "the model is at step 4 now" in card.stamp.text


def test_stop_and_failure_leave_the_model_as_it_was(open_on, monkeypatch):
    explorer, form, card = open_on(merged(), "R5")
    session = explorer.session
    before, commits = weights(session), session.commits
    form.budget.value, form.steps.value = 2 * TRY, STEPS
    seen = []

    def stop_at_once():
        explorer.desk.poll()
        seen.append((form.job.cancel.visible, form.run.disabled, form.said.text))
        form.job._cancel(None)

    session.pulses.append(stop_at_once)
    press(form._run)
    session.pulses.remove(stop_at_once)
    assert seen[0] == (True, True, "Trying repairs: 0%. The model stays as it is.")
    assert form.said.text == "Stopped. Nothing passed, so there is nothing to apply; the model is as it was."
    assert "Stopped before the rest." in card.words.text and same(session, before) and session.commits == commits

    def broken(*_, **__):
        raise RuntimeError("out of order")

    monkeypatch.setattr(session, "repair", broken)
    former = session.last_repair
    press(form._run)
    assert explorer.desk.message == "out of order" and session.last_repair is former
    assert not form.run.disabled and same(session, before)


def test_a_healthy_model_has_nothing_to_repair(open_on):
    explorer, form, card = open_on(whole(), "R5")
    press(form._run)
    assert form.said.text == card.words.text == "Nothing to repair: explain has no verdict here."
    assert not form.apply.visible and explorer.session.step == 3


# trial ---------------------------------------------------------------------------------------------------------------


def test_a_trial_says_what_pruning_does(open_on):
    explorer, form, card = open_on(whole(), "R6")
    session, desk = explorer.session, explorer.desk
    before = weights(session)
    assert form.which.options == ["Resample", "Prune"], "a split changes two latents at once"
    assert card.words.text.startswith("No trial yet.")
    form.candidates.value = "the selected latents"
    assert form.run.disabled and form.said.text == "Select latents in any plot or table first."
    explorer.selection = (0, 1, 2)
    assert form.run.disabled and form.said.text == "3 candidates: at least 6 are needed, 2 in each of 3 arms."
    explorer.selection = range(7)
    form.which.value, form.steps.value = "Prune", 1
    assert form.said.text.startswith("7 candidates: chance gives a third of them Prune")

    press(form._run)
    found = session.last_trial
    assert found.n_units == 7 and same(session, before) and session.snapshot.job is None and session.step == 3
    assert card.reading.text.startswith("Prune, 1 step: 3 treated, 2 sham, 2 untouched. It ")
    table = card.view.table(*card._kept.values, desk.look()).set_index("outcome")
    assert table.index[0] == found.primary.replace("_", " ") and table["treated"].tolist() == [3] * 4
    assert table.loc["firing rate", "vs nothing"] == pytest.approx(found.effect("firing_rate", "nothing").mean)
    assert card.python().endswith("explorer.session.trial(Prune(), [0, 1, 2, 3, 4, 5, 6], 1, seed=0, n=10000).table()")
    assert not form.run.disabled


def test_many_candidates_are_drawn_from(open_on, monkeypatch):
    explorer, form, _ = open_on(whole(), "R6")
    monkeypatch.setattr("sdl_explorer.widgets.trial.MOST", 6)
    form.candidates.value, form.which.value, form.steps.value = "all latents", "Prune", 1
    form.refresh()
    assert form.said.text.startswith("8 candidates, of which 6 are drawn at random: chance gives a third of them Prune")
    press(form._run)
    assert explorer.session.last_trial.n_units == 6


def test_a_refused_trial_is_said(open_on):
    explorer, form, _ = open_on(whole(), "R6")
    form.forms["Resample"].number.value = "many"
    form.which.value = "Resample"
    press(form._run)
    assert "at most 'many' latents" in explorer.desk.message and explorer.session.last_trial is None and not form.run.disabled


def test_a_commit_that_keeps_the_state_leaves_a_repair_as_it_is():
    with Session(SOURCE, TopK(k=3), dictionary=merged(), batch_size=32, dead_after=500) as session:
        session.train(3)  # no commit holds what is judged
        found = session.repair(TRY, n_steps=STEPS, apply=False, n=400)
        assert found.fits(session)
        session.commit("kept by hand")
        assert found.fits(session)
        session.resample([0])
        assert session.step == found.step and not found.fits(session)
        session.revert(session.commits[1])
        assert found.fits(session)
        session.train(1)
        assert not found.fits(session)
