"""Every view draws, says and tabulates the same numbers, and has words for when there is nothing to draw."""

import re
import time
from dataclasses import fields, replace
from html.parser import HTMLParser

import holoviews as hv
import hypothesis
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import strategies as st
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations, Examples, Truth
from sdl_explorer.data.anchors import Anchors, Pins
from sdl_explorer.diagnosis.absorption import find_absorption
from sdl_explorer.diagnosis.alignment import align
from sdl_explorer.diagnosis.candidates import suspect_absorption
from sdl_explorer.diagnosis.causes import trace_causes
from sdl_explorer.diagnosis.compare import Control, Paired
from sdl_explorer.diagnosis.compared import Compared
from sdl_explorer.diagnosis.drift import measure_drift
from sdl_explorer.diagnosis.examples import find_examples
from sdl_explorer.diagnosis.explain import explain
from sdl_explorer.diagnosis.groups import trace_groups
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.diagnosis.landscape import probe_landscape
from sdl_explorer.diagnosis.meanings import suspect_polysemantic
from sdl_explorer.diagnosis.pairs import count_pairs
from sdl_explorer.diagnosis.patterns import trace_patterns
from sdl_explorer.diagnosis.probes import score_absorption
from sdl_explorer.diagnosis.recovery import score_recovery
from sdl_explorer.diagnosis.redundancy import find_redundant
from sdl_explorer.diagnosis.theory import check_theory
from sdl_explorer.diagnosis.twins import find_twins
from sdl_explorer.diagnosis.verdict import Verdict
from sdl_explorer.labels import Label, Labels
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.repair import Repair, Tried
from sdl_explorer.training.commits import Commit
from sdl_explorer.training.history import History
from sdl_explorer.training.interventions import Resample
from sdl_explorer.training.plan import Plan, PlanRow
from sdl_explorer.trial import Spill, Trial
from sdl_explorer.views import words
from sdl_explorer.views.alignment import best_match, latents_inside, match_points, recovery_curve
from sdl_explorer.views.anchors import anchor_bench
from sdl_explorer.views.compare import control_table, dumbbells, scoreboard
from sdl_explorer.views.examples import Card, cards_html, context_rows, data_uri, example_cards, examples_empty, examples_reading
from sdl_explorer.views.frame import MAX_POINTS, configure, limits, log_limits, log_ticks
from sdl_explorer.views.history import Ghosts, health_over_time, lineage, log_lines, log_reading, timeline
from sdl_explorer.views.look import Look
from sdl_explorer.views.plan import plan_preview, prediction
from sdl_explorer.views.tiles import tiles, tiles_reading
from sdl_explorer.views.truth_table import feature_table, truth_table
from sdl_explorer.views.view import Before, Chosen, Commits, find_view, view, views

N_FEATURES, WIDTH = 12, 16
VIEWS = {v.id: v for v in views()}
every_view = pytest.mark.parametrize("one", VIEWS.values(), ids=VIEWS.keys())


@pytest.fixture(autouse=True, scope="module")
def _canvas():
    configure()


def bench(n=200, seed=0) -> Activations:
    """Orthonormal features, so that a planted dictionary has known cosines."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.linalg.qr(torch.randn(WIDTH, N_FEATURES, generator=generator))[0].T.contiguous()
    codes = torch.rand(n, N_FEATURES, generator=generator) * (torch.rand(n, N_FEATURES, generator=generator) < 0.2)
    inputs = codes @ features
    return Activations(inputs, inputs, Truth(codes, features, features))


def planted(rows: Activations) -> SparseDictionary:
    """Latents 0-7 are features 0-7; 8 merges features 8 and 9; 9 writes feature 10 but reads 0; 10 never fires; 11 is feature 0 again."""
    w = rows.truth.input_features
    merged = normalize(w[8] + w[9], dim=0)
    W_dec = torch.stack([*w[:8], merged, w[10], normalize(-w.sum(0), dim=0), w[0]])
    W_enc = W_dec.clone()
    W_enc[9] = w[0]
    return SparseDictionary(W_enc, W_dec)


@pytest.fixture(scope="module")
def found():
    rows = bench()
    dictionary = planted(rows)
    pins = Pins(Anchors.from_truth(rows, [1, 2]), torch.tensor([1, 10]), torch.tensor([0.1, 0.2]), torch.tensor([False, True]))
    alignment, health = align(dictionary, rows, pins=pins), check_health(dictionary, rows)
    worse = planted(rows)
    with torch.no_grad():
        worse.W_dec[3] = worse.W_dec[8]
    family = replace(rows, truth=replace(rows.truth, parents=(None, 0, 0, *[None] * 9)))
    absorbing = planted(family)
    with torch.no_grad():  # latent 1 writes feature 0 beside its own, and latents 0 and 11 give way to it
        absorbing.W_dec[1] = normalize(family.truth.target_features[:2].sum(0), dim=0)
        absorbing.W_enc[[0, 11]] = family.truth.input_features[0] - 20 * family.truth.input_features[1]
    return {
        trace_patterns: trace_patterns(dictionary, rows),
        suspect_polysemantic: suspect_polysemantic(dictionary, rows),
        find_redundant: find_redundant(dictionary, rows),
        trace_groups: trace_groups(dictionary, replace(rows, truth=None), n_clusters=4),
        Chosen(trace_causes, "latent", "primary_latent"): trace_causes(dictionary, rows, latent=8),
        Chosen(count_pairs, "latents", "selected_latents"): count_pairs(dictionary, rows, latents=(0, 3, 8, 11)),
        Chosen(score_recovery, "tau", "tau"): score_recovery(dictionary, rows, tau=0.95),
        Chosen(probe_landscape, "latents", "primary_latent"): probe_landscape(
            dictionary, rows, latents=8, grid=8, n_kicks=2, n_steps=2, n_rows=64
        ),
        Compared: Compared("another", 0, find_twins(dictionary, rows, planted(rows))),
        check_theory: check_theory(dictionary, rows, n_segments=1),
        explain: explain(dictionary, rows, dead_after=100),
        find_absorption: find_absorption(absorbing, family),
        suspect_absorption: suspect_absorption(absorbing, family, least=5),
        Labels: (Label((0, 1), "confirmed", step=300),),
        score_absorption: score_absorption(absorbing, family, of="truth"),
        align: alignment,
        Before(align): align(worse, rows, pins=pins),
        check_health: health,
        measure_drift: measure_drift(dictionary, rows, pins=pins),
        find_examples: find_examples(dictionary, rows, n_each=3),
        History: some_history(),
        Ghosts: (some_history(60),),
        Commits: some_commits(),
        Plan: some_plan(),
        Control: some_control(),
        Repair: some_repair(),
        Trial: some_trial(),
    }


def some_history(n=120) -> History:
    steps = np.arange(0, 10 * n, 10)
    return History(
        steps, {"total": np.exp(-steps / 400) + 0.01, "error": np.exp(-steps / 400)}, np.full(n, 4.5), np.linspace(9, 2, n).round()
    )


def some_commits() -> Commits:
    return (
        Commit("aaaa", None, 0, "start: 12 latents, untrained", kind="start"),
        Commit("bbbb", "aaaa", 500, "", kind="auto", metrics={"unexplained_variance": 0.4}),
        Commit("cccc", "bbbb", 500, "resampled 3 dead latents", "session.resample([1, 2, 3])", kind="resample", latents=(1, 2, 3)),
        Commit("dddd", "cccc", 900, "ran 400 steps", kind="run"),
        Commit("eeee", "bbbb", 700, "anchored 2 latents", kind="anchor", metrics={"unexplained_variance": 0.3}),
        Commit("ffff", "eeee", 1000, "lr 0.001 -> 0.0003", kind="settings"),
    )


def some_plan(n=4, losses=True) -> Plan:
    rows = tuple(
        PlanRow(i, f"choose row {7 * i}", 7 * i, 3.0 - i / n if losses else None, i + 1, 0.95 if i == 1 else 0.3, 0.2, 0.0)
        for i in range(n)
    )
    latents = torch.arange(n)
    return Plan(
        "resample",
        latents,
        None,
        None,
        None,
        {},
        None,
        latents,
        {"error before": 2.5, "error after": 2.25},
        f"{n} latents restart.",
        rows,
        "session.resample()",
    )


def some_control(n=5) -> Control:
    rng = np.random.default_rng(0)
    arm = lambda dead, mse: {"dead": dead + 0.01 * rng.random(n), "mse": mse + 0.01 * rng.random(n), "l0": np.full(n, 4.0)}
    return Control("resample", 500, {"dead": 0.3, "mse": 2.0, "l0": 4.0}, arm(0.05, 1.0), arm(0.3, 1.0), arm(0.06, 1.0), primary="dead")


def some_repair() -> Repair:
    """One that passed, one that did not, one that could not be tried."""
    verdict = lambda id: Verdict(id, f"Something is {id}.", ("a number",), "", Resample(), 0.5, "decoder", (1,), (2,))
    passed, failed = (Paired(0.25, 0.1, 0.4, 5), Paired(0.2, 0.1, 0.3, 5)), (Paired(-0.1, -np.inf, np.inf, 1), Paired(0.0, -0.1, 0.1, 5))
    tried = (
        Tried(verdict("merged"), "Recovered: +0.250.", some_plan(), some_control(), passed, True),
        Tried(verdict("dead"), "It is not better than 200 plain steps. Recovered: -0.100.", some_plan(), some_control(), failed),
        Tried(verdict("copies"), "It could not be planned: latent 3 was changed by an earlier repair."),
    )
    return Repair(tried, 3, 2, 200, 5, 500)


def some_trial() -> Trial:
    rng = np.random.default_rng(0)
    before = {"decoder_cosine": rng.random(12), "contribution": rng.random(12)}
    after = {name: values + np.where(np.arange(12) % 3 == 0, 0.5, 0.0) for name, values in before.items()}
    return Trial("resample", 200, np.arange(12), np.arange(12) % 3, before, after, "contribution", Spill(0.1, 0.3, 4), n_permutations=200)


def given(one, found) -> list:
    return [found[key] for key in one.of]


def points_of(element) -> list[hv.Points]:
    return [e for e in element.traverse(lambda e: e, [hv.Points]) if np.isfinite(e.dimension_values(0).astype(float)).any()]


# every view ----------------------------------------------------------------------------------------------------------


def test_the_registry_holds_every_view_of_the_package():
    assert {"A2", "A3", "A4", "R2", "R3", "N1", "C1", "C3", "timeline"} <= set(VIEWS)
    assert find_view("A2") is best_match
    assert {v.id for v in views("compare")} == {"C1", "C3", "C6"}
    with pytest.raises(KeyError, match="A2"):
        find_view("Z9")


def test_an_id_is_taken_once():
    def other(found, look): ...

    with pytest.raises(ValueError, match="choose another id"):
        view("What?", id="A2", of=(), page="alignment")(other)


@every_view
def test_a_view_says_what_it_is(one):
    assert one.question.endswith("?")
    assert one.cost in ("live", "select", "job")
    assert one.of
    assert one.__doc__
    assert all(part.function is not None for part in (one.reading, one.table, one.empty))


@every_view
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_draws_on_a_canvas_of_its_theme(one, theme, found):
    figure = hv.render(one(*given(one, found), Look(theme=theme, n_latents=12, head="ffff")), backend="bokeh")
    plots = [m for m in figure.references() if type(m).__name__ in ("figure", "Figure", "Plot")] or [figure]
    background = {"light": "#FFFFFF", "dark": "#121212"}[theme]
    for plot in plots:
        assert plot.output_backend == "canvas"
        assert plot.background_fill_color == plot.border_fill_color == background
        assert plot.height >= 60
        assert np.isfinite([plot.x_range.start, plot.x_range.end, plot.y_range.start, plot.y_range.end]).all()
        sizes = [plot.title.text_font_size, *(axis.major_label_text_font_size for axis in plot.axis)]
        assert all(int(size.removesuffix("px")) >= 12 for size in sizes)


@every_view
def test_nothing_found_gives_words(one):
    nothing = [None] * len(one.of)
    why = one.empty(*nothing, Look())
    assert why
    assert one.reading(*nothing, Look()) == why
    assert len(one.table(*nothing, Look())) == 0
    text = one(*nothing, Look()).traverse(lambda e: e, [hv.Text])[0]
    assert " ".join(text.data[2].split()) == why


@pytest.mark.slow
@every_view
@pytest.mark.parametrize("selected", [(3,), (0, 1, 2)])
def test_it_draws_any_selection(one, selected, found):
    look = Look(selected_latents=selected, primary_latent=selected[0], selected_features=selected, step=300)
    hv.render(one(*given(one, found), look), backend="bokeh")


@pytest.mark.slow
@every_view
def test_it_survives_numbers_that_are_not_finite(one, found):
    broken = [spoilt(f) for f in given(one, found)]
    hv.render(one(*broken, Look()), backend="bokeh")
    assert isinstance(one.reading(*broken, Look()), str)
    assert isinstance(one.table(*broken, Look()), pd.DataFrame)


@every_view
def test_a_missing_finding_is_named(one):
    with pytest.raises(TypeError, match="pass None for a missing one"):
        one(*[None] * (len(one.of) + 1), Look())


@every_view
def test_the_look_can_be_left_out(one, found):
    assert one.reading(*given(one, found)) == one.reading(*given(one, found), Look())


def spoilt(finding):
    """The same finding with not-a-number in every float array, infinity in its first place."""
    if isinstance(finding, Control):
        bad = lambda arm: {k: np.where(np.arange(len(v)) == 0, np.nan, v) for k, v in arm.items()}
        return replace(finding, treated=bad(finding.treated), untreated=bad(finding.untreated), before={})
    if isinstance(finding, Plan):
        return replace(
            finding, rows=tuple(r._replace(loss=np.nan, nearest_cosine=np.nan) for r in finding.rows), expected={"error after": np.nan}
        )
    if isinstance(finding, list):
        return [spoilt(f) for f in finding]
    if isinstance(finding, tuple):
        return tuple(spoilt(f) if isinstance(f, History) else f for f in finding)
    if isinstance(finding, Compared):
        return replace(finding, twins=spoilt(replace(finding.twins, here=spoilt(finding.twins.here), there=spoilt(finding.twins.there))))
    return replace(finding, **{field.name: _spoilt(getattr(finding, field.name)) for field in fields(finding)})


def _spoilt(value):
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.size:
        out = np.full_like(value, np.nan)
        out.flat[0] = np.inf
        return out
    if isinstance(value, float):
        return float("nan")
    if isinstance(value, dict):
        return {k: _spoilt(v) for k, v in value.items()}
    return type(value)(*map(_spoilt, value)) if hasattr(value, "_fields") else value


# A2 ------------------------------------------------------------------------------------------------------------------


def test_one_point_per_latent_in_order(found):
    alignment, health = found[align], found[check_health]
    base = points_of(best_match(alignment, health, Look()))[0]
    assert list(base["latent"]) == list(best_match.ids(alignment, health, Look())) == list(range(12))
    table = best_match.table(alignment, health, Look())
    for column in ("x", "y", "status", "feature", "firing_rate"):
        assert list(base[column]) == list(table[column])
    assert table["x"].tolist() == alignment.per_latent.decoder_cosine.tolist()


def test_planted_latents_stand_where_they_belong(found):
    table = best_match.table(found[align], found[check_health], Look()).set_index("latent")
    assert table.loc[0, ["x", "y"]].to_numpy(dtype=float) == pytest.approx([1, 1], abs=1e-5)
    assert table.loc[8, "x"] == pytest.approx(0.5**0.5, abs=1e-5)
    assert table.loc[9, ["x", "y"]].to_numpy(dtype=float) == pytest.approx([1, 0], abs=1e-5)  # right but low
    assert table["hollow"].tolist() == [i == 9 for i in range(12)]
    assert table["status"].tolist() == ["matched", "anchored", *["matched"] * 6, "unmatched", "matched", "dead", "matched"]


def test_the_glyph_carries_shape_size_and_filling_per_point(found):
    figure = hv.render(best_match(found[align], found[check_health], Look()), backend="bokeh")
    base = figure.renderers[0]
    data = base.data_source.data
    assert list(np.asarray(data["marker"])[[0, 1, 8, 10]]) == ["circle", "star", "cross", "x"]
    assert np.asarray(data["fill"])[9] == 0 < np.asarray(data["fill"])[0]
    rate, size = found[check_health].firing_rate, np.asarray(data["size"])
    assert (size - 7) ** 2 / (size.max() - 7) ** 2 == pytest.approx(rate / rate.max(), abs=1e-6)
    assert base.glyph.marker.field == "marker"
    assert base.nonselection_glyph is None
    assert {type(tool).__name__ for tool in figure.toolbar.tools} >= {"TapTool", "BoxSelectTool", "LassoSelectTool", "HoverTool"}
    assert all(tool.description for tool in figure.toolbar.tools)


def test_the_selection_has_rings_and_the_primary_a_halo(found):
    element = best_match(found[align], found[check_health], Look(selected_latents=(3, 8), primary_latent=8))
    labelled = {e.label: e for e in points_of(element) if e.label}
    assert list(labelled["Selected (2)"]["latent"]) == [3, 8]
    assert list(labelled["Primary"]["latent"]) == [8]
    bare = best_match(found[align], found[check_health], Look())
    assert not any(e.label for e in points_of(bare))


def test_without_truth_rows_are_compared_with_what_fires_them(found):
    health = found[check_health]
    element = best_match(None, health, Look())
    base = points_of(element)[0]
    assert list(base["x"]) == list(health.decoder_response)
    assert list(base["y"]) == list(health.encoder_response)
    figure = hv.render(element, backend="bokeh")
    assert "target response" in figure.xaxis[0].axis_label
    assert figure.title.text.startswith("No truth")
    assert best_match.title(None, health, Look()) == "How well does each row match what fires its latent?"
    assert best_match.title(found[align], health, Look()) == best_match.question
    guides = lambda overlay: sum(isinstance(layer, hv.VLine | hv.HLine) for layer in overlay)
    assert (guides(element), guides(best_match(found[align], health, Look()))) == (0, 2)
    assert words.NO_TRUTH in best_match.reading(None, health, Look())


def test_reading_counts_what_is_recovered(found):
    # held out: all but 1 and 2; decoder holds 0, 3..7 and 10; 8, 9 are merged at 0.71, 11 is lost
    said = best_match.reading(found[align], found[check_health], Look())
    assert said.startswith("7 of 10 features recovered at τ 0.95 (decoder); worst: feature 11, cosine")
    assert "1 right but low" in said
    assert "1 dead" in said
    assert "1 anchored" in said


def test_box_selects_from_the_data(found):
    inside = latents_inside((0.9, -0.1, 1.1, 0.5), found[align], found[check_health], Look())
    assert inside.tolist() == [9]


def test_a_crosscoder_shows_its_worst_source_or_the_chosen_one(found):
    alignment = found[align]
    n = alignment.n_latents
    decoder, encoder = np.vstack([np.full(n, 0.9), np.full(n, 0.4)]), np.vstack([np.full(n, 0.2), np.full(n, 0.8)])
    crossed = replace(
        alignment, block_names=("early", "late"), per_latent=alignment.per_latent._replace(block_encoder=encoder, block_decoder=decoder)
    )
    assert match_points(crossed, None, Look())[["x", "y"]].iloc[0].tolist() == [0.4, 0.2]
    assert match_points(crossed, None, Look(block="early"))[["x", "y"]].iloc[0].tolist() == [0.9, 0.2]


@pytest.fixture(scope="module")
def large():
    rows = bench(16)
    generator = torch.Generator().manual_seed(1)
    W = normalize(torch.randn(20_000, WIDTH, generator=generator), dim=1)
    dictionary = SparseDictionary(W, W, torch.full((20_000,), -0.3))
    pins = Pins(Anchors.from_truth(rows, [0]), torch.tensor([5]), torch.ones(1), torch.tensor([False]))
    return {
        align: align(dictionary, rows, pins=pins, match=False),
        check_health: check_health(dictionary, rows, dead_after=10_000),
        **{Before(align): None, Chosen(score_recovery, "tau", "tau"): None},
    }


@pytest.mark.parametrize("name", ["A2", "A3", "A4"])
def test_twenty_thousand_latents_are_fast(name, large):
    one = VIEWS[name]
    start = time.perf_counter()
    hv.render(one(*given(one, large), Look(selected_latents=(7, 19_999))), backend="bokeh")
    one.reading(*given(one, large), Look())
    assert time.perf_counter() - start < 3


def test_a_raster_says_so_and_keeps_what_is_flagged_or_selected_on_top(large):
    look = Look(selected_latents=(7, 19_999), primary_latent=7)
    element = best_match(*given(best_match, large), look)
    image = element.traverse(lambda e: e, [hv.Image])[0]
    health = large[check_health]
    assert np.nansum(image.dimension_values("latents")) == 20_000  # each latent is counted once
    ids = best_match.ids(*given(best_match, large), look)
    assert list(points_of(element)[0]["latent"]) == list(ids)
    assert {5, 7, 19_999} <= set(ids)
    assert len(ids) <= MAX_POINTS
    assert health.unseen[list(set(ids) - {5, 7, 19_999})].all()
    assert words.PIXELS in hv.render(element, backend="bokeh").title.text


# A3, A4 --------------------------------------------------------------------------------------------------------------


def test_curves_are_the_recovery_of_the_finding(found):
    alignment = found[align]
    element = recovery_curve(alignment, None, Look())
    table = recovery_curve.table(alignment, None, Look())
    curves = {c.label: c for c in element.traverse(lambda e: e, [hv.Curve])}
    for side in ("encoder", "decoder", "response", "minimum"):
        assert list(curves[side]["share"]) == list(table[side])
        at = table.index[np.isclose(table["tau"], 0.5)][0]
        assert table.loc[at, side] == pytest.approx(alignment.recovery(0.5, side))
    assert list(curves["chance (random rows)"]["share"]) == list(table["chance"])
    assert not any("before" in label for label in curves)


def test_the_commit_before_is_a_ghost(found):
    element = recovery_curve(found[align], found[Before(align)], Look(side="encoder"))
    ghost = next(c for c in element.traverse(lambda e: e, [hv.Curve]) if c.label == "encoder before")
    assert list(ghost["share"]) == list(found[Before(align)].curve("encoder")[1])


def test_read_outs_are_the_metrics(found):
    said = recovery_curve.reading(found[align], None, Look(tau=0.6))
    assert "decoder: M_GT(0.60) 90.0%" in said
    assert "2 anchored features left out" in said
    assert f"M_IP {found[align].mean_best('decoder'):.3f}" in said


@pytest.mark.parametrize("scored", [False, True])
def test_verdicts_of_the_planted_features(found, scored):
    rows = truth_table(found[align], found[check_health], Look(), found[Chosen(score_recovery, "tau", "tau")] if scored else None)
    verdict = dict(zip(rows["feature"], rows["verdict"], strict=True))
    assert verdict[0] == "split into 2"
    assert {verdict[i] for i in (1, 2)} == {"anchored"}
    assert {verdict[i] for i in (3, 4, 5, 6, 7, 10)} == {"recovered"}
    assert {verdict[i] for i in (8, 9)} == {"merged with 1"}
    assert verdict[11] == "missed"
    assert rows["cos decoder"].is_monotonic_increasing
    assert rows.set_index("feature").loc[9, "best latent"] == 8


def test_recovered_rows_agree_with_the_metric(found):
    rows, alignment = truth_table(found[align], None, Look()), found[align]
    done = rows["verdict"].isin(["recovered"]) | ((rows["cos decoder"] > 0.95) & rows["verdict"].str.startswith("split"))
    assert done.sum() / (~alignment.anchored_features).sum() == pytest.approx(alignment.recovery(0.95))


def test_a_selected_row_is_the_feature_that_ids_names(found):
    element = feature_table(*given(feature_table, found), Look())
    base = next(e for e in points_of(element) if e.label == "decoder")
    ids = feature_table.ids(*given(feature_table, found), Look())
    assert points_of(element)[0] is base or list(points_of(element)[0]["feature"]) == list(ids)
    assert list(base["cosine"]) == list(feature_table.table(*given(feature_table, found), Look())["cos decoder"])


def test_what_became_of_the_features_adds_up(found):
    said = feature_table.reading(*given(feature_table, found), Look())
    head, own, others = re.fullmatch(r"(\d+) of .*? Recovered: (.*?)\. Others: (.*?)\.", said).groups()
    numbers = lambda words: sum(int(n) for n in re.findall(r"(\d+) \w", words))
    assert numbers(own) == int(head) == 7
    assert numbers(own) + numbers(others) == N_FEATURES
    assert "2 anchored" in others


# history, log --------------------------------------------------------------------------------------------------------


def test_health_panels_hold_the_table(found):
    look = Look(n_latents=12, head="ffff")
    element = health_over_time(found[History], (), found[Commits], look)
    table = health_over_time.table(found[History], (), found[Commits], look)
    panels = [overlay.traverse(lambda e: e, [hv.Curve])[0] for overlay in element]
    for curve, column in zip(panels, ("dead %", "loss", "L0"), strict=True):
        assert list(curve.dimension_values(1)) == list(table[column])
    assert table["dead %"].iloc[0] == pytest.approx(100 * 9 / 12)
    assert health_over_time.reading(found[History], (), found[Commits], look).startswith("Step 1 190: dead % 16.7")


def test_interventions_are_ticks_and_other_branches_ghosts(found):
    element = health_over_time(found[History], (), found[Commits], Look(head="ffff"))
    ticks = points_of(element)[0]
    assert list(ticks["commit"]) == ["cccc", "eeee", "ffff"]
    assert list(ticks["marker"]) == ["inverted_triangle", "star", "hex"]
    assert list(ticks["step"]) == [500, 700, 1000]
    assert ticks["alpha"][0] < ticks["alpha"][1] == ticks["alpha"][2]  # the resample lies on another branch


def test_an_untrained_run_shows_its_planned_steps():
    figure = hv.render(health_over_time(History(), (), (), Look()), backend="bokeh")
    ends = [m.x_range.end for m in figure.references() if hasattr(m, "x_range")]
    assert ends
    assert all(end >= 500 for end in ends)
    assert health_over_time.reading(History(), (), (), Look()) == words.NEVER_TRAINED


def test_lineage_follows_parents(found):
    commits = found[Commits]
    assert [c.id for c in lineage(commits, "ffff")] == ["aaaa", "bbbb", "eeee", "ffff"]
    assert [c.id for c in lineage(commits, None)][-1] == "ffff"
    assert lineage((), None) == ()


def test_the_timeline_puts_other_branches_below(found):
    rows = timeline.table(found[Commits], Look(head="ffff")).set_index("commit")
    assert rows["lane"].to_dict() == {"aaaa": 0, "bbbb": 0, "cccc": -1, "dddd": -1, "eeee": 0, "ffff": 0}
    assert rows.index[rows["head"]].tolist() == ["ffff"]
    said = timeline.reading(found[Commits], Look(head="ffff"))
    assert said == "At step 1 000, commit ffff (lr 0.001 -> 0.0003); 6 commits, 1 other branch."
    back = timeline.table(found[Commits], Look(head="bbbb")).set_index("commit")
    assert back["lane"].tolist() == [0, 0, -1, -1, -2, -2]


def test_the_log_has_one_sentence_a_commit(found):
    lines = log_lines(found[Commits], Look(head="ffff"))
    assert [line.commit for line in lines] == ["ffff", "eeee", "dddd", "cccc", "bbbb", "aaaa"]
    assert lines[3].sentence == "step 500: resampled 3 dead latents"
    assert lines[3].python == "session.resample([1, 2, 3])"
    assert lines[4].sentence == "step 500: kept by itself while training"
    said = lambda kind, message: log_lines([Commit("gggg", None, 1500, message, kind=kind)])[0].sentence
    assert said("auto", "step 1500") == "step 1 500: kept by itself while training"
    assert said("manual", "step 1500") == said("manual", "") == "step 1 500: kept by hand"
    assert said("run", "step 1500, before a change of settings") == "step 1 500: before a change of settings"
    assert said("manual", "step 15000 is next") == "step 1 500: step 15000 is next"
    assert [line.on_branch for line in lines] == [True, True, False, False, True, True]
    assert log_reading(()) == log_reading(None) == "Nothing has happened yet. Press ▸▸ to train 500 steps."
    assert log_lines(None) == ()


# plan, anchors -------------------------------------------------------------------------------------------------------


def test_the_preview_lists_the_plan_worst_first():
    plan = some_plan()
    table = plan_preview.table(plan, Look())
    assert table["unit"].tolist() == [0, 1, 2, 3]
    assert table["loss of that row"].is_monotonic_decreasing
    assert table["warning"].tolist() == ["", "duplicate", "", ""]
    assert set(table["Adam moments"]) == {"will be zeroed"}
    bars = plan_preview(plan, Look()).traverse(lambda e: e, [hv.Rectangles])[0]
    assert list(bars["x1"]) == table["loss of that row"].tolist()
    said = plan_preview.reading(plan, Look())
    assert "1 unit would be a duplicate" in said
    assert "Estimated error" in said
    assert "2.5 → 2.25" in said


def test_a_plan_without_losses_shows_what_is_near():
    plan = some_plan(losses=False)
    bars = plan_preview(plan, Look()).traverse(lambda e: e, [hv.Rectangles])[0]
    assert sorted(bars["x1"]) == pytest.approx([0.3, 0.3, 0.3, 0.95])
    assert prediction(replace(plan, expected={})) == "No prediction for this selection of rows."


def test_long_plans_name_what_is_left_out():
    figure = hv.render(plan_preview(some_plan(57), Look()), backend="bokeh")
    assert "the 30 worst of 57 units" in figure.title.text


def test_kept_moments_are_said():
    table = plan_preview.table(replace(some_plan(2), clears=torch.tensor([1])), Look())
    assert table.set_index("unit")["Adam moments"].to_dict() == {0: "kept", 1: "will be zeroed"}


def test_drift_is_the_cosine_to_the_anchor(found):
    rows = bench()
    drift = found[measure_drift]
    assert drift.decoder[0] == pytest.approx(1, abs=1e-5)
    assert drift.encoder[1] == pytest.approx(-(N_FEATURES**-0.5), abs=1e-4)
    assert np.abs(drift.overlap).max() < 1e-5
    assert len(measure_drift(planted(rows), rows)) == 0
    far = Pins(Anchors.from_truth(rows, [1]), torch.tensor([99]), torch.ones(1), torch.tensor([False]))
    with pytest.raises(ValueError, match="latent 99 is pinned"):
        measure_drift(planted(rows), rows, pins=far)


def test_the_bench_warns_of_a_dead_slot_and_of_overlap(found):
    table = anchor_bench.table(found[measure_drift], found[check_health], Look())
    assert table["warning"].tolist() == ["", "its slot is dead"]
    assert table["mode"].tolist() == ["soft", "hard"]
    assert table["slot"].tolist() == [1, 10]
    close = replace(found[measure_drift], overlap=np.array([0.93, 0.93]), nearest=np.array([1, 0]))
    assert anchor_bench.table(close, None, Look())["warning"][0] == "overlaps feature 2 at cosine 0.93"
    assert "the furthest is feature 2 in latent 10" in anchor_bench.reading(found[measure_drift], None, Look())


# compare -------------------------------------------------------------------------------------------------------------


def test_dumbbells_hold_both_cosines(found):
    before, after = found[Before(align)], found[align]
    table = dumbbells.table(before, after, Look())
    assert table.iloc[0]["feature"] == 3
    assert table["change"].is_monotonic_decreasing
    points = {e.label: e for e in points_of(dumbbells(before, after, Look()))}
    assert list(points["before"]["cosine"]) == table["before"].tolist()
    base = next(e for e in points_of(dumbbells(before, after, Look())) if "feature" in e)
    assert list(base["cosine"]) == table["after"].tolist()
    assert list(base["feature"]) == list(dumbbells.ids(before, after, Look()))
    assert "1 of 12 features gained and 0 lost" in dumbbells.reading(before, after, Look())


def test_many_features_become_a_histogram_and_both_ends():
    rng = torch.Generator().manual_seed(0)
    features = normalize(torch.randn(90, WIDTH, generator=rng), dim=1)
    codes = torch.rand(8, 90, generator=rng)
    rows = Activations(codes @ features, codes @ features, Truth(codes, features, features))
    W = [normalize(torch.randn(40, WIDTH, generator=rng), dim=1) for _ in range(2)]
    before, after = (align(SparseDictionary(w, w), rows, match=False) for w in W)
    layout = dumbbells(before, after, Look())
    histogram = layout.traverse(lambda e: e, [hv.Histogram])[0]
    assert histogram.dimension_values(1).sum() == 90
    ids = dumbbells.ids(before, after, Look())
    table = dumbbells.table(before, after, Look())
    assert ids.tolist() == table["feature"].iloc[[*range(20), *range(70, 90)]].tolist()
    hv.render(layout, backend="bokeh")


def test_what_cannot_be_compared_says_why(found):
    assert dumbbells.empty(None, found[align], Look()) == words.NO_COMMITS
    assert dumbbells.empty(found[align], None, Look()) == words.NO_TRUTH
    assert dumbbells.empty(replace(found[align], names=("other",)), found[align], Look()) == words.NO_COMMITS


def test_the_scoreboard_shows_differences_and_the_noise_of_controls():
    control = some_control()
    table = scoreboard.table(control, Look()).set_index("metric")
    assert table.loc["dead", "noise"] == pytest.approx(2 * np.std(control.untreated["dead"], ddof=1))
    assert table.loc["dead", "verdict"].startswith(("improved", "not distinguishable from resetting"))
    assert table.loc["mse", "verdict"] == "not distinguishable from 500 more steps"
    points = {e.label: e for e in points_of(scoreboard(control, Look()))}
    assert list(points["against training on alone"]["difference"]) == table["vs untreated"].tolist()
    assert list(points["against resetting at random (sham)"]["difference"]) == table["vs sham"].tolist()
    assert scoreboard.reading(control, Look()).startswith("Dead: -0.2")


def test_too_few_pairs_are_said():
    few = some_control(2)
    figure = hv.render(scoreboard(few, Look()), backend="bokeh")
    assert figure.title.text.startswith("n = 2: at least 5 seeds are needed to read this. [Run 3 more]")
    one = some_control(1)  # intervals without end
    hv.render(scoreboard(one, Look()), backend="bokeh")
    assert control_table(one)["noise"].isna().all()


# tiles ---------------------------------------------------------------------------------------------------------------


def test_tiles_count_what_the_findings_hold(found):
    recovered, dead, unseen, unexplained = tiles(found[align], found[check_health], Look(), found[History], found[Commits])
    assert (recovered.title, recovered.number, recovered.status) == ("Recovered", "7", "matched")
    assert recovered.features == (0, 3, 4, 5, 6, 7, 10)
    assert recovered.share.startswith("70.0% of 10 features")
    assert (dead.number, dead.latents, unseen.number) == ("1", (10,), "0")
    assert "silent in 200 samples: rate below 3/N at 95 %" in dead.share
    assert dead.sparkline == tuple(found[History].dead)
    assert unexplained.number == f"{found[check_health].unexplained_variance:.3f}"
    assert unexplained.sparkline == (0.4, 0.3)
    assert "Recovered: 7" in tiles_reading(tiles(found[align], found[check_health], Look()))


def test_tiles_without_truth_or_findings(found):
    first = tiles(None, found[check_health], Look())[0]
    assert (first.title, first.share) == ("Anchored and aligned", words.NO_TRUTH)
    told = tiles(replace(found[align], of="anchors"), found[check_health], Look())[0]
    assert (told.title, told.number) == ("Anchored and aligned", "9")
    assert [t.number for t in tiles(None, None, Look())] == ["—"] * 4
    for against, title in (("truth", "Recovered"), ("anchors", "Anchored and aligned")):
        first = tiles(None, None, Look(), against=against)[0]
        assert (first.title, first.share) == (title, "Not computed yet.")
    spoilt = tiles(None, None, Look(), against="truth", diverged=812)
    assert {t.share for t in spoilt} == {"Not a number at step 812. [Go to last finite commit]"}


# examples ------------------------------------------------------------------------------------------------------------

NASTY = "<img src=x onerror=alert(1)>'\"&</div><script>"


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def texts() -> tuple[SparseDictionary, Activations]:
    documents = tuple((f"a{i}", NASTY, " token", " end") for i in range(5))
    place = [(d, p) for d in range(5) for p in range(4)]
    rows = torch.zeros(20, WIDTH)
    rows[:, 0] = torch.tensor([1.0 + d if p == 1 else 0.1 for d, p in place])
    rows[:, 1] = 1e-3
    examples = Examples(documents, np.array([d for d, _ in place]), np.array([p for _, p in place]))
    labels = torch.zeros(20, dtype=torch.long)
    activations = Activations(rows, rows, labels=labels, label_names=(f"label {NASTY}",), examples=examples)
    W = torch.zeros(2, WIDTH)
    W[0, 0], W[1, 1] = 1.0, -1.0
    return SparseDictionary(W, W), activations


def test_cards_show_random_positives_first():
    dictionary, activations = texts()
    found = find_examples(dictionary, activations, n_each=3)
    cards = example_cards(found, activations, 0)
    assert list(dict.fromkeys(c.kind for c in cards)) == ["random", "top", "quantile"]
    html = cards_html(cards, Look())
    assert html.index("Random positives") < html.index("Strongest") < html.index("From weak to strong")
    top = next(c for c in cards if c.kind == "top")
    assert (top.pieces[top.focus], top.value, top.strengths[top.focus]) == (NASTY, 5.0, 1.0)


def test_context_is_tinted_by_the_activations_given():
    dictionary, activations = texts()
    found = find_examples(dictionary, activations, n_each=1)
    rows = context_rows(found, activations, 0)
    assert set(range(16, 20)) <= set(rows)  # the whole document of the strongest example
    top = next(c for c in example_cards(found, activations, 0, dict.fromkeys(rows.tolist(), 2.5)) if c.kind == "top")
    assert top.strengths == (0.5, 1.0, 0.5, 0.5)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_from_data_cannot_become_markup(theme):
    dictionary, activations = texts()
    html = cards_html(example_cards(find_examples(dictionary, activations), activations, 0), Look(theme=theme))
    bars = cards_html((Card(NASTY, 0, 1.0, NASTY, bars=((NASTY, 1.0),)),), Look(theme=theme))
    for fragment in (html, bars):
        parsed = Tags(fragment)
        assert parsed.tags <= {"div", "span", "h4"}
        assert parsed.attributes <= {"style", "class"}
        assert NASTY in parsed.text
    assert "text-decoration:underline" in html


def test_tinted_text_can_be_read():
    cards = tuple(Card("random", 0, 1.0, pieces=("x",), strengths=(s,), focus=0) for s in np.linspace(0.01, 1, 30))
    for theme in ("light", "dark"):
        for back, fore in re.findall(r"background:(#\w{6});color:(#\w{6})\b(?=;font-weight)", cards_html(cards, Look(theme=theme))):
            assert contrast(back, fore) >= 4.5


def contrast(one: str, other: str) -> float:
    def luminance(colour):
        srgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        return float(np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def test_generated_data_shows_active_features(found):
    rows = bench()
    cards = example_cards(found[find_examples], rows, 3)
    for card in cards:
        assert ("feature 3", pytest.approx(card.value, abs=1e-4)) in card.bars
        assert [v for _, v in card.bars] == sorted((v for _, v in card.bars), reverse=True)
    assert "feature 3" in cards_html(cards, Look())


def test_thumbnails_are_png_in_the_page():
    image = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    import base64
    import io

    from PIL import Image

    decoded = Image.open(io.BytesIO(base64.b64decode(data_uri(image).split(",")[1])))
    assert (np.asarray(decoded) == image).all()
    assert "data:image/png" in cards_html((Card("top", 0, 1.0, pieces=("cat",), strengths=(1.0,), focus=0, thumbnail=image),), Look())


def test_why_there_is_no_card(found):
    examples = found[find_examples]
    assert examples_empty(examples, Look()) == "Select a latent: click a point, or press / to search. [Worst] [Random]"
    assert examples_empty(examples, Look(primary_latent=10)) == "Never fired in 200 samples."
    assert examples_empty(None, Look(primary_latent=1)) == words.NOT_COMPUTED
    assert examples_reading(examples, Look(primary_latent=0)).startswith(f"Latent 0 fired on {examples.n_fires[0]} of 200 samples")


# words and ranges ----------------------------------------------------------------------------------------------------


def test_fixed_copy():
    assert words.no_dead(100_000) == "No latent has been silent for 100 000 samples. Nothing to resample."
    assert words.too_few_pairs(1) == "n = 1: at least 5 seeds are needed to read this. [Run 4 more]"
    assert words.not_finite(812) == "Not a number at step 812. [Go to last finite commit]"
    assert words.never_fired(100_000) == "Never fired in 100 000 samples."


@hypothesis.given(st.floats(-12, 12), st.floats(0.02, 30))
def test_a_logarithmic_axis_has_a_few_round_ticks(low, decades):
    within = 10**low, 10 ** (low + decades)
    ticks = log_ticks(within)
    assert (2 if decades < 1 else 1) <= len(ticks) <= 6
    assert within[0] * (1 - 1e-9) <= min(ticks) and max(ticks) <= within[1] * (1 + 1e-9)
    assert ticks == sorted(set(ticks))


@pytest.mark.parametrize("values", [[], [np.nan], [3.0], [0.0], [-1, 2], [np.inf, 1.0], [1e-12, 1e9]])
def test_ranges_hold_what_is_finite(values):
    known = [v for v in values if np.isfinite(v)]
    low, high = limits(values)
    assert low < high
    assert all(low <= v <= high for v in known)
    low, high = log_limits(values)
    assert 0 < low < high
    assert all(low <= v <= high for v in known if v > 0)


def test_a_dynamic_map_follows_the_ranges_and_the_theme(found):
    looks = iter([Look(), Look(theme="dark", tau=0.5)])
    health, alignment = found[check_health], found[align]
    low = replace(alignment, per_latent=alignment.per_latent._replace(decoder_cosine=np.full(12, -0.9, dtype=np.float32)))
    findings = iter([alignment, low])
    tick = hv.streams.Counter()
    dynamic = hv.DynamicMap(lambda counter: best_match(next(findings), health, next(looks)), streams=[tick])
    figure = hv.renderer("bokeh").get_plot(dynamic).state
    assert figure.x_range.start > -0.5
    tick.event(counter=1)
    assert figure.x_range.start < -0.9
    assert figure.background_fill_color == "#121212"
