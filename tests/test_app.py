"""The explorer without a browser: what it knows, what it shows in words, and that a button and a cell do the same."""

import asyncio
import gc
import threading
import time
import weakref

import numpy as np
import pandas as pd
import pytest
import torch


def shown(explorer, page: str = "Overview"):
    """A frame that shows the page, settled."""
    frame = explorer.__panel__()
    explorer.state.page = page
    explorer.desk.settle()
    return frame


def card(frame, view: str):
    return next(c for c in frame.shown.cards if c.view.id == view)


def part(frame, kind: str):
    return next(p for p in frame.shown.parts if type(p).__name__ == kind)


def press(handler, *arguments):
    asyncio.run(handler(*arguments))


def test_importing_the_library_imports_no_gui():
    import subprocess
    import sys

    code = "import sdl_explorer, sys; print([m for m in ('panel', 'holoviews', 'bokeh') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("page", ["Overview", "Alignment", "Latents", "Intervene", "Absorption", "Landscape", "Compare"])
def test_every_card_of_a_page_says_something(explorer, page):
    frame = shown(explorer, page)
    assert frame.pages[page].shown
    assert [p.shown for p in frame.pages.values()].count(True) == 1
    for one in (card for card in frame.shown.cards if card._view.visible):
        said = one.reading.text or one.words.text
        assert said, one.view
        assert "nan" not in said.lower().split(), one.view
        if one.reading.text:
            assert f"computed at step {explorer.session.step}" in one.stamp.text


def test_first_primary_is_the_worst_feature_and_nobodys_action(explorer):
    from sdl_explorer import align

    shown(explorer)
    alignment = explorer.session.find(align)
    assert explorer.state.primary_feature == int(np.argmin(alignment.decoder))
    assert explorer.state.primary_latent == alignment.decoder_latent[explorer.state.primary_feature]
    assert [name for name in ("can_undo", "can_redo") if getattr(explorer.state, name)] in ([], ["can_undo"])


def test_selection_is_one_object_and_follows_its_match(explorer):
    from sdl_explorer import align

    frame = shown(explorer, "Alignment")
    explorer.selection = [5, 3]
    assert explorer.selection == (5, 3)
    alignment = explorer.session.find(align)
    assert explorer.state.primary_feature == alignment.per_latent.decoder_feature[5]
    assert frame.inspector.title.text == "Latent 5"
    explorer.desk.select(features=(2,))
    assert explorer.selection == (int(alignment.decoder_latent[2]),)
    with pytest.raises(ValueError, match="latent 24 does not exist"):
        explorer.selection = [24]
    assert explorer.selection == (int(alignment.decoder_latent[2]),)


def test_brushing_a_plot_and_the_state_agree_both_ways(explorer):
    frame = shown(explorer, "Alignment")
    scatter = card(frame, "A2")
    frame.page.get_root()
    (source,) = scatter._link._sources.values()
    source.selected.indices = [4, 7]
    assert explorer.selection == (4, 7)
    explorer.selection = (9,)
    assert list(source.selected.indices) == [9]
    explorer.selection = ()
    assert list(source.selected.indices) == []
    assert len(scatter._link._sources) == 1  # drawn in place: a zoom survives


def test_the_numbers_on_screen_are_attributes(explorer):
    from sdl_explorer import align, check_health

    frame = shown(explorer)
    health, alignment = explorer.session.find([check_health, align])
    table = explorer.latent_table
    assert (table["status"] == "dead").sum() == health.n_dead
    assert len(explorer.feature_table) == alignment.n_features
    assert part(frame, "Tiles")._tiles[1].number == str(health.n_dead)
    pd.testing.assert_frame_equal(explorer.desk.cached_table(), table)
    assert explorer.log["step"].tolist() == [c.step for c in reversed(explorer.session.commits)]


def test_a_poll_without_news_draws_nothing(explorer, monkeypatch):
    frame = shown(explorer)
    drawn = []
    monkeypatch.setattr(frame, "refresh", lambda: drawn.append(1))
    explorer.desk.poll()
    assert not drawn
    explorer.session.train(1)
    explorer.desk.poll()
    assert drawn


def test_a_blocked_cell_moves_the_figures_but_a_worker_does_not(explorer):
    frame = shown(explorer)
    explorer.session.train(5)  # the pulse of the cell polls
    assert f"step {explorer.session.step} " in frame.run_bar.status.text + " "
    before = frame.run_bar.status.text
    worker = threading.Thread(target=explorer.session.train, args=(5,), name="sdlx-command")
    worker.start()
    worker.join()
    assert frame.run_bar.status.text == before


def test_only_the_page_in_front_computes(explorer):
    from sdl_explorer.diagnosis.drift import measure_drift

    shown(explorer)
    assert explorer.desk.findings.now(measure_drift) is None
    explorer.state.page = "Intervene"
    explorer.desk.settle()
    assert explorer.desk.findings.now(measure_drift) is not None


def test_the_preview_is_the_plan_that_is_applied(explorer):
    session, desk = explorer.session, explorer.desk
    frame = shown(explorer, "Intervene")
    weights = session.dictionary.W_enc.clone()
    explorer.selection = (1, 2, 3)
    form = part(frame, "ResampleForm")
    form.which.value = "the selected latents"
    press(form._preview)
    plan, preview = desk.plan, part(frame, "Preview")
    assert torch.equal(session.dictionary.W_enc, weights)
    assert preview.said.text == "3 latents will change. Nothing has changed yet."
    preview._chosen([0])
    preview._drop(None)
    assert len(desk.plan.latents) == 2
    press(desk.apply_plan)
    assert session.head.kind == "resample"
    kept = [i for i in plan.latents.tolist() if i in session.head.latents]
    assert len(kept) == 2
    rows = [plan.latents.tolist().index(i) for i in kept]
    assert torch.equal(session.dictionary.W_enc[kept], plan.W_enc[rows])
    assert desk.plan is None
    assert "Applied" in desk.message


def test_a_plan_of_another_step_cannot_be_applied(explorer):
    frame = shown(explorer, "Intervene")
    explorer.selection = (1,)
    form = part(frame, "ResampleForm")
    form.which.value = "the selected latents"
    press(form._preview)
    explorer.session.train(1)
    preview = part(frame, "Preview")
    assert preview.apply.disabled
    assert "Preview again" in preview.said.text


def test_no_dead_latents_says_so_and_disables_the_button(explorer):
    frame = shown(explorer, "Intervene")
    explorer.desk.snapshot = explorer.session.snapshot
    form = part(frame, "ResampleForm")
    if not explorer.desk.dead():
        assert form.said.text == "✓ No latent has been silent for 2 000 samples. Nothing to resample."
        assert form.preview.label == "Disabled: no dead latents"
        assert form.preview.disabled


def test_anchor_form_holds_true_features(explorer):
    frame = shown(explorer, "Intervene")
    explorer.desk.select(features=(3,))
    frame.call("anchor")
    form = part(frame, "AnchorForm")
    assert form.which.value == [explorer.desk.anchor_sources()["true features"][3]]
    press(form._preview)
    press(explorer.desk.apply_plan)
    assert explorer.session.head.kind == "anchor"
    assert list(explorer.desk.held()) == list(explorer.session.head.latents)


def test_a_refused_command_is_said_and_changes_nothing(explorer):
    frame = shown(explorer)
    head = explorer.session.head
    press(explorer.desk.do, explorer.session.release)
    assert "Release" in frame.message.text
    assert explorer.session.head == head


def test_untrained_session_says_so():
    from sdl_explorer import explore

    explorer = explore(torch.randn(400, 6), n_latents=24)
    frame = shown(explorer)
    assert frame.run_bar.alert.text == "Nothing trained yet. [▸▸ Train 500 steps]"
    assert not explorer.session.running
    assert explorer.session.step == 0
    explorer.close()
    explorer.session.close()


def test_without_truth_it_opens_on_overview_and_says_what_is_missing():
    from sdl_explorer import explore

    explorer = explore(torch.randn(400, 6), n_latents=24)
    frame = shown(explorer)
    assert card(frame, "R2").title.text == card(frame, "R2").view.question
    assert explorer.state.page == "Overview"
    assert explorer.desk.recovery() is None
    shown(explorer, "Alignment")
    explorer.desk.settle()
    assert card(frame, "A2").title.text == "How well does each row match what fires its latent?"
    assert "τ" not in frame.inspector.facts.text
    assert frame.banner.visible
    assert frame.banner.text == "No ground truth: recovery cannot be computed. Add anchors or class means →"
    with pytest.raises(ValueError, match="feature_table compares with true features"):
        _ = explorer.feature_table
    form = part(shown(explorer, "Intervene"), "ResampleForm")  # stored rows share a mean, and latents compete for k places
    assert (form.intervention().target, form.intervention().scale) == ("residual", 1.0)
    assert "share a mean" in form.why.text and "compete for k places" in form.why.text
    explorer.close()
    explorer.session.close()


def test_divergence_pauses_and_offers_the_last_finite_commit(explorer):
    from sdl_explorer.training.run import Diverged

    session, frame = explorer.session, explorer.__panel__()
    assert part(frame, "Tiles")._tiles[0].number.isdigit()  # there at once: the first screen has its numbers
    frame = shown(explorer)
    session.lr = 1e20
    with pytest.raises(Diverged):
        session.train(200)
    explorer.desk.poll()
    while explorer.desk.findings.busy:
        time.sleep(0.02)
        explorer.desk.poll()
    spoilt = f"Not a number at step {session.snapshot.diverged.step}. [Go to last finite commit]"
    assert card(frame, "A2").words.text == spoilt
    assert [t.share for t in part(frame, "Tiles")._tiles] == [spoilt] * 4
    assert part(frame, "Tiles")._tiles[0].title == "Recovered"
    assert frame.inspector.facts.text == spoilt
    assert spoilt in frame.inspector.examples.html
    bar = frame.run_bar
    assert bar.alert.text.startswith("Diverged at step ")
    assert bar.repair.visible
    assert bar.lower.visible
    assert bar.repair.label == f"Revert to {session.snapshot.diverged.last_finite.step}"
    press(bar._lower, None)
    assert torch.isfinite(session.dictionary.W_enc).all()
    assert not bar.repair.visible
    assert session.lr < 1e20


def test_one_failing_card_leaves_the_others(explorer, monkeypatch):
    frame = shown(explorer, "Alignment")
    first, *others = frame.shown.cards

    def fail(*found):
        raise FloatingPointError("Not a number")

    monkeypatch.setattr(first.view, "draw", fail)
    explorer.selection = (1,)
    assert first.words.text == "Not a number at step 30. [Go to last finite commit]"
    assert all(not one.words.visible for one in others)


def test_filter_selects_and_the_strictest_is_named(explorer):
    from sdl_explorer import align

    frame = shown(explorer)
    explorer.desk.filter(("firing_rate", ">", 2.0), ("latent", ">", 3))
    assert frame.filters.said.text.startswith("0 of 24 latents. The strictest filter is firing_rate > 2.0 (removes 24).")
    explorer.desk.filter(("latent", ">", 20))
    assert explorer.selection == (21, 22, 23)
    assert explorer.state.primary_latent == 21
    assert explorer.state.primary_feature == explorer.session.find(align).per_latent.decoder_feature[21]
    assert frame.inspector.facts.text.startswith("3 selected; showing latent 21.")
    explorer.desk.clear_filters()
    assert explorer.selection == ()
    assert not frame.filters._view.visible


def test_a_box_of_latents_is_counted_and_can_be_cleared(explorer):
    frame = shown(explorer)
    explorer.desk.select(latents=(5, 3, 8))
    assert frame.filters._view.visible
    (chip,) = frame.filters._chips.objects
    assert chip.label == "3 latents selected ×"
    assert frame.inspector.facts.text.startswith("3 selected; showing latent 5.")
    chip.clicks += 1
    assert explorer.selection == ()
    assert not frame.filters._view.visible
    explorer.selection = (4,)
    assert not frame.filters._view.visible
    assert "selected" not in frame.inspector.facts.text


def test_settings_wait_for_apply_and_follow_a_cell(explorer):
    frame = shown(explorer)
    field = frame.settings._fields["Session", "lr"][0]
    field.value = 5e-4
    assert explorer.session.lr == 1e-3
    assert not frame.settings.apply.disabled
    press(frame.settings._apply, None)
    assert explorer.session.lr == 5e-4
    assert "settings" in [c.kind for c in explorer.session.commits]
    explorer.session.lr = 2e-3
    explorer.session.train(1)
    assert field.value == 2e-3


def test_a_new_run_starts_untrained_and_leaves_the_old_one(explorer):
    frame = shown(explorer)
    old, step = explorer.session, explorer.session.step
    form = frame.settings.new_run
    form.n_latents.value, form.seed.value = 40, 7
    press(form._start)
    assert (explorer.session.n_latents, explorer.session.seed, explorer.session.step) == (40, 7, 0)
    assert explorer.session.method.k == old.method.k
    assert old.step == step
    assert explorer.state.n_latents == 40
    explorer.desk.settle()
    assert frame.run_bar.alert.text == "Nothing trained yet. [▸▸ Train 500 steps]"
    assert frame.title.text.startswith("HierarchyBench")


def test_restoring_a_saved_view(explorer):
    explorer.selection = (4,)
    explorer.state.tau = 0.7
    saved = explorer.state.to_dict()
    explorer.selection = ()
    assert explorer.restore(saved | {"lens": 1}) == ("lens",)
    assert (explorer.selection, explorer.state.tau) == ((4,), 0.7)


def test_rows_of_a_table_are_walked_by_keys(explorer):
    frame = shown(explorer, "Alignment")
    explorer.state.twins = ("A2",)
    explorer.desk.poll()
    twin = card(frame, "A2")._twin
    for move, latent in (("home", 0), ("down", 1), ("pagedown", 13), ("up", 12), ("end", 23), ("down", 23)):
        twin._move(move)
        assert explorer.selection == (latent,)
        assert twin.table.page == latent // twin.table.page_size + 1


def test_text_from_data_stays_text(explorer):
    from sdl_explorer.widgets.kit import Text

    assert "textContent" in Text._esm.read_text()
    assert "innerHTML" not in Text._esm.read_text()


def test_settings_of_a_bridge_go_both_ways(session):
    ipywidgets = pytest.importorskip("ipywidgets")
    from sdl_explorer.widgets.bridge import link

    slider = ipywidgets.FloatText()
    cut = link(slider, session, "lr")
    assert slider.value == session.lr
    slider.value = 0.02
    assert session.lr == 0.02
    session.lr = 0.03
    assert slider.value == 0.03
    cut()
    slider.value = 0.5
    assert session.lr == 0.03
    with pytest.raises(ValueError, match="has no setting 'rate'"):
        link(slider, session, "rate")


def test_explore_takes_what_people_have(tmp_path, session):
    from sdl_explorer import Explorer, explore
    from sdl_explorer.app.entry import session_of

    rows = torch.randn(200, 12)
    np.save(tmp_path / "rows.npy", rows.numpy())
    session.dictionary.save(tmp_path / "dictionary.safetensors")
    assert session_of(session) is session
    for what in (rows, rows.numpy(), tmp_path / "rows.npy"):
        with session_of(what, n_latents=40) as made:
            assert (made.source.width_in, made.n_latents, made.step) == (12, 40, 0)
    with pytest.warns(UserWarning, match="does not fit"):  # the rows are noise
        made = session_of(tmp_path / "dictionary.safetensors", activations=rows)
    with made:
        assert made.n_latents == 24
        assert made.preflight is not None
    with pytest.raises(FileNotFoundError, match="there is nothing at"):
        explore(tmp_path / "missing")
    with pytest.raises(ValueError, match="no activations to look at"):
        explore(session.dictionary)
    with pytest.raises(TypeError, match="is nothing to explore"):
        explore(3)
    assert isinstance(explore(session), Explorer)


def test_what_a_visitor_held_is_let_go():
    import panel as pn
    import panel_material_ui as pmui

    from sdl_explorer.app.serve import release_refs

    page = pmui.Page(title="")
    gone = weakref.ref(page)
    watchers = len(pn.state._param__private.watchers.get("busy", {}).get("value", []))
    release_refs(page)
    assert len(pn.state._param__private.watchers.get("busy", {}).get("value", [])) == watchers - 1
    del page
    gc.collect()
    assert gone() is None


def methods():
    from sdl_explorer import registry
    from sdl_explorer.models.methods import Method

    return registry.members(Method).values()


@pytest.mark.parametrize("kind", methods(), ids=lambda kind: kind.__name__)
def test_every_method_has_fields_in_the_rail_and_an_empty_one_can_be_filled(kind):
    from sdl_explorer import Explorer, LinearBench, Session
    from sdl_explorer.widgets.settings import Settings

    method = kind(**({"k": 2} if "k" in kind.param else {}))
    with Session(LinearBench(n_features=6, d_in=8, sparsity=0.8), method, n_latents=12, device="cpu") as session:
        explorer = Explorer(session)
        rail = Settings(explorer.desk)
        rail.refresh()
        assert (kind.__name__, "k") in rail._fields or "k" not in kind.param
        if "l0_target" in kind.param:
            rail._fields[kind.__name__, "l0_target"][0].value = 4.0
            assert rail.waiting.text == "Waiting: l0 target = 4"
        explorer.close()


def test_show_serves_the_session_under_a_path_that_cannot_be_guessed(explorer, capsys):
    server = explorer.show(open=False)
    try:
        address, forward = capsys.readouterr().out.splitlines()
        assert _answer(address) == 200
        assert len(address.rsplit("/", 1)[1]) >= 16
        assert "ssh -L" in forward
        assert _answer(address.rsplit("/", 1)[0] + "/") == 404
    finally:
        server.stop()


def _answer(address: str, seconds: float = 30) -> int:
    """The status that a server in a thread answers with, once it listens."""
    from urllib.error import HTTPError, URLError
    from urllib.request import urlopen

    until = time.monotonic() + seconds
    while True:
        try:
            return urlopen(address, timeout=60).status
        except HTTPError as error:
            return error.code
        except URLError:
            assert time.monotonic() < until, f"nothing listens at {address}"
            time.sleep(0.05)
