"""Forms: every setting that the library has can be reached, says what it is, and a refused one changes nothing."""

import asyncio
import importlib.util

import numpy as np
import pytest
import torch


def session_of(method=None, **settings):
    from sdl_explorer import HierarchyBench, Session, TopK

    source = HierarchyBench(parents=2, children=2, independent=4, d_in=12)
    return Session(source, method or TopK(k=2), **{"n_latents": 24, "dead_after": 2_000, "device": "cpu"} | settings)


@pytest.fixture
def rail(explorer):
    from sdl_explorer.widgets.settings import Settings

    rail = Settings(explorer.desk)
    rail.refresh()
    return rail


def shown(explorer, page: str = "Intervene"):
    frame = explorer.__panel__()
    explorer.state.page = page
    explorer.desk.settle()
    return frame


def part(frame, kind: str):
    return next(p for p in frame.shown.parts if type(p).__name__ == kind)


def card(frame, view: str):
    return next(c for c in frame.shown.cards if c.view.id == view)


def press(handler, *arguments):
    asyncio.run(handler(*arguments))


def everything(session) -> dict:
    """Every setting, of the session and of its method."""
    mine = {name: value for name, value in session.param.values().items() if name not in ("name", "source", "method")}
    return mine | {f"method.{name}": value for name, value in session.method.param.values().items() if name != "name"}


def interventions():
    from sdl_explorer import registry
    from sdl_explorer.training.interventions import Intervention

    return [kind for kind in registry.members(Intervention).values() if kind.__module__.startswith("sdl_explorer.")]


def methods():
    from sdl_explorer import registry
    from sdl_explorer.models.methods import Method

    return registry.members(Method).values()


# interventions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", interventions(), ids=lambda kind: kind.__name__)
def test_every_intervention_has_a_form_with_every_setting(kind, explorer):
    frame = shown(explorer)
    explorer.selection = (3, 5)
    press(explorer.desk.do, explorer.session.realign)
    explorer.desk.poll()
    form = next(p for p in frame.shown.parts if getattr(p, "makes", None) is kind)
    frame.call("anchor")  # with the feature that is selected
    assert set(form.settings()) == {name for name in kind.param if name != "name"}


def test_an_intervention_of_another_package_gets_a_form_by_itself(explorer):
    import param

    from sdl_explorer.training.interventions import Intervention, Release
    from sdl_explorer.widgets.intervene import form_of

    class LetGo(Intervention):
        """Lets latents go, a little."""

        latents = param.Parameter(None, doc="Which.")
        share = param.Number(0.5, bounds=(0, 1), doc="How much.")
        order = param.Selector(default="first", objects=["first", "last"], doc="In which order.")

        def plan(self, state, choose, generator):
            return Release(latents=self.latents).plan(state, choose, generator)

    form = form_of(explorer.desk, LetGo)
    form.refresh()
    assert form.said.text == "Lets latents go, a little."
    form.fields["share"].value, form.fields["order"].value = 0.25, "last"
    made = form.intervention()
    assert (made.latents, made.share, made.order) == (None, 0.25, "last")
    explorer.selection = (4, 7)
    form.take_selection()
    assert form.intervention().latents == [4, 7]
    explorer.selection = ()
    form.refresh()
    assert form.preview.disabled
    assert form.said.text == "Select latents in any plot or table first."


def test_realign_is_previewed_as_what_it_is_applied_and_undone(explorer):
    from torch.nn.functional import cosine_similarity

    session, frame = explorer.session, shown(explorer)
    before = session.dictionary.W_enc.detach().clone()
    form = part(frame, "RealignForm")
    form.fields["least"].value, form.fields["pull"].value, form.fields["choose_rows"].value = 20, 0.03, 4_096
    press(form._preview)
    plan, r3 = explorer.desk.plan, part(frame, "Preview").card
    assert torch.equal(session.dictionary.W_enc, before)
    table = r3.view.table(plan, explorer.look())
    turned = cosine_similarity(before[plan.latents], plan.W_enc, dim=1).numpy()
    assert table.set_index("unit")["cosine so far"][plan.latents.tolist()].to_numpy() == pytest.approx(turned, abs=1e-5)
    assert table["cosine so far"].is_monotonic_increasing
    said = r3.reading.text
    assert f"{len(plan.latents)} encoder rows turn to what fires their latents" in said
    assert "because this sets it: that is no evidence" in said
    assert "Estimated error" in said
    press(explorer.desk.apply_plan)
    assert session.head.kind == "realign"
    assert torch.equal(session.dictionary.W_enc[plan.latents], plan.W_enc)
    explorer.desk.poll()
    assert [t["glyph"] for t in frame.timeline.ticks.commits if t["kind"] == "realign"] == ["▲"]
    session.revert(session.head.parent)  # one commit back on the timeline
    assert torch.equal(session.dictionary.W_enc, before)
    assert session.pulls is None


def test_pulls_are_listed_and_released(explorer):
    session, frame = explorer.session, shown(explorer)
    held = part(frame, "Held")
    assert not held._card.visible
    press(explorer.desk.do, lambda: session.realign(least=20, pull=0.03))
    pulled = session.pulls.latents.tolist()
    assert list(explorer.desk.pulled()) == pulled
    assert held._card.visible
    assert held.said.text == f"{len(pulled)} encoder rows are pulled to measured directions, with weight 0.03."
    explorer.selection = (pulled[1], pulled[2])
    held.which.value = [
        held.which.options["2 pulled rows of the selected latents"],
        held.which.options[f"latent {pulled[0]} → its response"],
    ]
    press(held._release, None)
    assert session.pulls.latents.tolist() == pulled[3:]
    held.which.value = [held.which.options[f"all {len(pulled) - 3} pulled rows"]]
    press(held._release, None)
    assert session.pulls is None
    assert not held._card.visible


def test_pins_and_pulls_are_told_apart(explorer):
    from sdl_explorer import Anchors

    session, frame = explorer.session, shown(explorer)
    anchors = Anchors.from_truth(explorer.desk.sample, [0])
    press(explorer.desk.do, lambda: session.anchor(anchors, latents=[3], weight=0.2))
    press(explorer.desk.do, lambda: session.realign(latents=[5], least=1, pull=0.1))
    held = part(frame, "Held")
    assert held.said.text == "1 latent is held to anchors. 1 encoder row is pulled to measured directions, with weight 0.1."
    assert set(held.which.options) == {
        f"latent 3 → {anchors.names[0]}",
        "latent 5 → its response",
        "1 pulled row of the selected latents",
    } - (set() if 5 in explorer.selection else {"1 pulled row of the selected latents"})


def refusing():
    from sdl_explorer import TopK
    from sdl_explorer.models.methods import Pursuit

    return {"tied": TopK(k=2, tie="tied"), "pursuit": Pursuit(k=2)}


@pytest.mark.parametrize(("method", "why"), [("tied", "tied to its decoder"), ("pursuit", "cannot refit the bias under OMP")])
def test_realign_says_beforehand_where_it_cannot(method, why):
    from sdl_explorer import Explorer

    with session_of(refusing()[method]) as session:
        session.train(3)
        explorer = Explorer(session)
        form = part(shown(explorer), "RealignForm")
        assert why in form.said.text
        assert form.preview.disabled
        explorer.close()


@pytest.mark.slow
def test_a_realign_is_compared_with_controls(explorer):
    session, frame = explorer.session, shown(explorer, "Compare")
    press(explorer.desk.do, lambda: session.realign(least=20))
    form = part(frame, "ControlForm")
    form.refresh()
    assert "the realign of step 30" in form.said.text
    assert "turns the same encoder rows in random directions" in form.said.text
    form.steps.value, form.pairs.value = 5, 1
    press(form._run)
    explorer.desk.settle()
    assert session.last_control.intervention == "realign"
    assert "n = 1: at least 5 seeds are needed to read this. [Run 4 more]" in card(frame, "C3").reading.text
    press(explorer.desk.act, "Run 4 more")
    assert session.last_control.n == 5
    assert session.last_control.primary == "recovery_encoder"


# actions of fixed words ----------------------------------------------------------------------------------------------


def test_bracketed_actions_do_what_they_say(explorer, monkeypatch):
    started = []
    monkeypatch.setattr(explorer.session, "start", started.append)
    desk, frame = explorer.desk, shown(explorer, "Overview")
    explorer.selection = ()
    assert "[Worst]" in frame.inspector.facts.text
    press(desk.act, "Worst")
    assert explorer.selection
    press(desk.act, "Random")
    assert explorer.state.primary_latent is not None
    desk.filter(("firing_rate", ">", 2.0), ("latent", ">", 3))
    press(desk.act, "Relax")
    assert [one.label for one in explorer.state.filters] == ["latent > 3"]
    press(desk.act, "Clear all")
    assert explorer.state.filters == ()
    press(desk.act, "Anchor")
    assert explorer.state.page == "Intervene"
    assert part(frame, "AnchorForm").title.called
    press(desk.act, "▸▸ Train 500 steps")
    assert started == [500]
    before = explorer.state.to_dict()
    for nonsense in ("", "Format the disk", "[Worst", ".*"):
        press(desk.act, nonsense)
    assert explorer.state.to_dict() == before


def test_divergence_is_left_by_its_action(explorer):
    from sdl_explorer.training.run import Diverged

    session = explorer.session
    session.lr = 1e20
    with pytest.raises(Diverged):
        session.train(200)
    explorer.desk.poll()
    press(explorer.desk.act, "Go to last finite commit")
    assert torch.isfinite(session.dictionary.W_enc).all()


def test_every_action_in_brackets_has_a_command():
    import inspect
    import re

    from sdl_explorer.app.actions import command
    from sdl_explorer.views import words

    fixed = [value for name, value in vars(words).items() if name.isupper() and isinstance(value, str)]
    fixed += [words.too_few_pairs(1), words.not_finite(3)]
    bracketed = {action for text in fixed for action in re.findall(r"\[([^\]]+)\]", text)}
    assert bracketed and all(inspect.iscoroutinefunction(command(action)) for action in bracketed)
    assert command("Add anchors or class means →") is not None
    assert "page 5" not in words.NO_COMMITS


# settings of the session ---------------------------------------------------------------------------------------------


def test_every_setting_of_a_session_is_in_the_rail_or_in_a_new_run(rail):
    from sdl_explorer import Session

    in_rail = {name for owner, name in rail._fields if owner == "Session"}
    in_new_run = {"method", "n_latents", "seed", *rail.new_run.origin}
    elsewhere = {"name", "source", "device", "anchors", "budget"}  # where the data come from, and what a visitor may not raise
    assert in_rail | in_new_run | elsewhere == set(Session.param)
    assert not in_rail & in_new_run
    assert {name for name in in_rail if Session.param[name].constant} == set()
    assert {name for name in rail.new_run.origin if not Session.param[name].constant} == set()


@pytest.mark.parametrize("kind", methods(), ids=lambda kind: kind.__name__)
def test_every_setting_of_a_method_is_in_the_rail(kind):
    from sdl_explorer import Explorer
    from sdl_explorer.widgets.settings import Settings

    with session_of(kind(**({"k": 2} if "k" in kind.param else {}))) as session:
        explorer = Explorer(session)
        rail = Settings(explorer.desk)
        rail.refresh()
        there = {name for owner, name in rail._fields if owner == kind.__name__}
        assert there == {name for name in kind.param if name != "name" and not kind.param[name].constant}
        assert rail.apply.disabled and rail.waiting.text == ""  # what the fields hold is what the settings are
        explorer.close()


CHANGES = {
    ("Session", "lr"): 2e-3,
    ("Session", "batch_size"): 256,
    ("Session", "warmup_steps"): 7,
    ("Session", "dead_after"): 5_000,
    ("Session", "clip_norm"): 1.5,
    ("Session", "decay_steps"): 900,
    ("Session", "decay"): "cosine",
    ("Session", "precision"): "float32",
    ("Session", "ramps"): {"k": [6, 50]},
    ("TopK", "k"): 3,
    ("TopK", "unit_norm"): False,
    ("TopK", "tie_weight"): 0.2,
    ("TopK", "tie"): "soft",
}


def test_settings_wait_are_applied_together_and_reach_training(rail, explorer):
    session = explorer.session
    assert set(CHANGES) | {("Session", "optimiser")} == set(rail._fields)
    for key, value in CHANGES.items():
        rail._fields[key][0].value = value
    assert session.lr == 1e-3
    assert rail.waiting.text.startswith("Waiting: lr = 0.002, batch size = 256, warmup steps = 7, dead after = 5000")
    assert "ramps = k from 6 in 50 steps" in rail.waiting.text
    press(rail._apply, None)
    rail.refresh()
    assert rail.waiting.text == "" and rail.apply.disabled
    for (owner, name), value in CHANGES.items():
        assert getattr(session if owner == "Session" else session.method, name) == value, name
    assert session.head.kind == "settings"
    session.train(1)
    rail._fields["Session", "clip_norm"][0].value = None  # and back to none
    press(rail._apply, None)
    assert session.clip_norm is None


@pytest.mark.parametrize(
    ("edits", "why"),
    [
        ({("Session", "lr"): 5e-4, ("TopK", "k"): 25}, "k is 25"),
        ({("Session", "lr"): 5e-4, ("Session", "batch_size"): 0}, "batch_size"),
        ({("Session", "lr"): 5e-4, ("Session", "clip_norm"): 0.0}, "clip_norm"),
        ({("Session", "warmup_steps"): 5, ("Session", "lr"): None}, "lr"),
        ({("Session", "decay"): "cosine", ("Session", "ramps"): {"k": [99, 10]}}, "k is 99"),
        ({("Session", "decay"): "cosine", ("Session", "ramps"): {"k": [4, None]}}, "number of steps"),
        ({("Session", "decay"): "cosine", ("TopK", "tie"): "tied"}, "would be lost"),
    ],
)
def test_a_refused_setting_leaves_everything_as_it_was_and_says_why(rail, explorer, edits, why):
    session = explorer.session
    before, head = everything(session), session.head
    for key, value in edits.items():
        rail._fields[key][0].value = value
    press(rail._apply, None)
    assert why in explorer.desk.message
    assert everything(session) == before
    assert session.head == head
    assert not session.stale
    assert not rail.apply.disabled  # the edit is still there to be mended


def test_ramps_are_rows_that_come_and_go(rail, explorer):
    session, ramps = explorer.session, rail._fields["Session", "ramps"][0]
    ramps._add()
    assert ramps.value == {"k": [2, 1_000]}
    row = ramps._rows[0]
    row.start.value, row.steps.value = 12.0, 40
    assert ramps.value == {"k": [12, 40]} and isinstance(ramps.value["k"][0], int)
    ramps._add()
    assert ramps.value == {"k": [12, 40], "tie_weight": [0.1, 1_000]}
    assert ramps.add.disabled
    ramps.remove(ramps._rows[1])
    assert ramps.value == {"k": [12, 40]}
    press(rail._apply, None)
    assert session.ramps == {"k": [12, 40]}
    session.ramps = {"k": (8, 40)}  # a cell
    rail.refresh()
    assert ramps.value == {"k": [8, 40]} and len(ramps._rows) == 1 and ramps._rows[0].start.value == 8
    assert rail.apply.disabled
    ramps.remove(ramps._rows[0])
    press(rail._apply, None)
    assert session.ramps == {}


def test_the_schedule_free_optimiser_is_offered_where_its_package_is(explorer, monkeypatch):
    from sdl_explorer.widgets.settings import WITHOUT, Settings

    def offered() -> tuple[set, list]:
        rail = Settings(explorer.desk)
        rail.refresh()
        return set(rail._fields["Session", "optimiser"][0].options.values()), [getattr(one, "text", "") for one in rail.optimiser.body]

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "schedulefree" else find(name, *rest))
    options, said = offered()
    assert options == {"adam"} and WITHOUT in said
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object() if name == "schedulefree" else find(name, *rest))
    options, said = offered()
    assert options == {"adam", "signsgd"} and WITHOUT not in said


def test_schedule_free_training_from_the_rail(rail, explorer):
    pytest.importorskip("schedulefree")
    rail._fields["Session", "optimiser"][0].value = "signsgd"
    press(rail._apply, None)
    assert explorer.session.optimiser == "signsgd"
    explorer.session.train(2)


# new run -------------------------------------------------------------------------------------------------------------


def test_every_method_of_ours_stands_in_a_group():
    from sdl_explorer.widgets.new_run import OTHERS, grouped

    groups = grouped()
    assert sorted(name for names in groups.values() for name in names) == sorted(kind.__name__ for kind in methods())
    ours = [kind.__name__ for kind in methods() if kind.__module__.startswith("sdl_explorer.")]
    assert not set(groups.get(OTHERS, ())) & set(ours)


def test_the_expansion_factor_and_the_number_of_latents_are_one(rail, explorer):
    form = rail.new_run
    assert form.expansion.value == 2.0
    form.n_latents.value = 40
    assert form.expansion.value == pytest.approx(40 / 12, abs=1e-4) and form.n_latents.value == 40
    form.expansion.value = 8
    assert form.n_latents.value == 96 and form.expansion.value == 8
    form.expansion.value = 0.01
    assert form.n_latents.value == 1


@pytest.mark.parametrize("kind", methods(), ids=lambda kind: kind.__name__)
def test_a_new_run_of_every_method(kind, rail, explorer):
    form = rail.new_run
    form.method.value = kind.__name__
    assert form.about.text and form.about.text == kind.__doc__.strip().partition("\n")[0]
    assert form.k.visible == ("k" in kind.param)
    form.tie.value = "soft"
    with form.make() as made:
        assert type(made.method) is kind and made.method.tie == "soft"
        assert made.n_latents == 24
        if "k" in kind.param:
            assert made.method.k == 2  # of the method in front
        made.train(1)


def test_a_new_run_keeps_the_settings_of_training_and_starts_where_the_form_says(rail, explorer):
    session = explorer.session
    session.lr, session.decay, session.clip_norm, session.ramps = 5e-4, "cosine", 2.0, {"k": [4, 10]}
    session.commit()
    rail.refresh()
    form = rail.new_run
    form.seed.value, form.origin["normalise"].value, form.origin["centre"].value = 3, True, "median"
    form.k.value = 5
    with form.make() as made:
        assert (made.lr, made.decay, made.clip_norm, made.ramps) == (5e-4, "cosine", 2.0, {"k": [4, 10]})
        assert (made.seed, made.normalise, made.centre, made.method.k) == (3, True, "median", 5)
        assert np.isfinite(made.train(2).snapshot.losses["error"])
    form.method.value = "ReLU"
    with form.make() as made:
        assert made.ramps == {}  # those of another method


def test_a_visitors_new_run_is_bounded(rail, explorer):
    from sdl_explorer.widgets.new_run import MOST_LATENTS

    explorer.desk.most_steps = 100
    rail.new_run.n_latents.value = MOST_LATENTS + 1
    press(rail.new_run._start)
    assert str(MOST_LATENTS) in explorer.desk.message
    assert explorer.desk.own == []
