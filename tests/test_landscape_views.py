"""The page on the landscape and the theorems: what each card must draw, say and tabulate, and where the page stands."""

import asyncio
import re
from dataclasses import replace
from itertools import combinations

import holoviews as hv
import numpy as np
import pytest
import torch

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.anchors import Anchors
from sdl_explorer.data.bench import linear_activations
from sdl_explorer.diagnosis.landscape import probe_landscape
from sdl_explorer.diagnosis.landscape_kick import FATES
from sdl_explorer.diagnosis.theory import check_theory
from sdl_explorer.diagnosis.theory_cards import Assumption
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods.topk import TopKSelection
from sdl_explorer.views import words
from sdl_explorer.views.landscape import biconvex_slice, region_map
from sdl_explorer.views.landscape_kicks import FATE_TOKENS, kick_test
from sdl_explorer.views.look import Look
from sdl_explorer.views.theory import MET, VERDICTS, theorem_sides, theory_html
from tests.test_theme import BACKGROUND, MACHADO, THEMES, ciede2000, contrast, lab

TRAP = SparseDictionary(torch.tensor([[1.0, 1], [0, 0]]), torch.tensor([[0.5, 0.5], [0, 0]]), nonlinearity=TopKSelection(1)).eval()
AXES = torch.eye(2)
ROWS = linear_activations(torch.diag(torch.full((2,), 2**0.5)), AXES, AXES)


@pytest.fixture(scope="module")
def trap():
    return probe_landscape(TRAP, ROWS, grid=32, n_kicks=8, n_steps=100)


@pytest.fixture(scope="module")
def theory():
    return check_theory(TRAP, ROWS)


def drawn(element, kind=hv.Points) -> list:
    return [e for e in element.traverse(lambda e: e, [kind]) if len(e) and np.isfinite(e.dimension_values(0).astype(float)).any()]


def labelled(element, label: str):
    return next(e for e in drawn(element) if e.label == label)


# the landscape -------------------------------------------------------------------------------------------------------


def test_the_map_shows_the_loss_the_borders_and_the_best(trap):
    element = region_map(None, trap, Look())
    image = drawn(element, hv.Image)[0]
    assert image.dimension_values("loss", flat=False) == pytest.approx(trap.map.profiled)
    star = labelled(element, "least loss on the map")
    assert (star["x"].item(), star["y"].item()) == trap.map.best[1:]
    assert element.traverse(lambda e: e, [hv.VLine])[0].data == pytest.approx(np.pi / 4)  # the silent row has no angle
    numbers = drawn(element, hv.Labels)[0]
    for x, y, number in zip(numbers["x"], numbers["y"], numbers["text"], strict=True):
        cell = trap.map.region[int(y / (2 * np.pi) * 32), int(x / (2 * np.pi) * 32)]
        assert cell == int(number) - 1
    edges = drawn(element, hv.Segments)[0]
    differing = (trap.map.region[:, 1:] != trap.map.region[:, :-1]).sum() + (trap.map.region[1:] != trap.map.region[:-1]).sum()
    assert len(edges) == differing


def test_the_sentence_has_the_trap_in_words(trap):
    said = region_map.reading(None, trap, Look())
    assert said.startswith("Latents 0 and 1: latent 1 is silent. Loss 1 on 2 rows; with their decoder rows at least squares 1, and 0 at")
    assert "9 regions" in said and "5 more in the table" in said
    table = region_map.table(None, trap, Look())
    assert len(table) == 9 and table["share of the map"].sum() == pytest.approx(1)
    assert table.set_index("sets").loc["∅ | ∅", "least loss"] == pytest.approx(2)
    assert "2-D slice; most directions are not shown" in hv.Store.lookup_options("bokeh", region_map(None, trap), "plot").kwargs["title"]


def test_the_slice_says_that_it_is_no_bowl(trap):
    said = biconvex_slice.reading(None, trap, Look())
    assert "the loss of feature 0 and feature 1 alone is convex along the encoder and along the decoder" in said
    assert "along a diagonal it rises" in said
    table = biconvex_slice.table(None, trap, Look())
    assert len(table) == trap.slice.loss.size
    centre = table[(table["encoder"] == 0) & (table["decoder"] == 0)]
    assert centre["loss"].item() == pytest.approx(0.5)  # the mean of two unit features, each half of it written


def test_every_kick_is_a_mark_of_its_fate(trap):
    kicks, table = trap.kicks, kick_test.table(None, trap, Look())
    assert len(table) == 8 * 4 and set(table["kick"]) == {"size 0.1", "size 0.3", "size 1", "random directions"}
    for arm, (_, rows) in zip((*kicks.arms, kicks.random), table.groupby("kick", sort=False), strict=True):
        assert rows["loss at the end"].tolist() == arm.end.tolist()
        assert rows["fate"].tolist() == [FATES[i] for i in arm.fate]
    sized = [e for e in drawn(kick_test(None, trap, Look())) if hv.Store.lookup_options("bokeh", e, "style").kwargs.get("size") == 10]
    assert sum(map(len, sized)) == len(table)
    said = kick_test.reading(None, trap, Look())
    assert said.startswith(f"A kick {trap.verdict}: {kicks.reason}.") and "of 8 restarts in random directions" in said


@pytest.mark.parametrize("card", [region_map, biconvex_slice, kick_test], ids=lambda card: card.id)
def test_without_a_latent_there_are_words(card):
    assert card.empty(None, None, Look()) == card.reading(None, None, Look()) == words.NO_SELECTION
    hv.render(card(None, None, Look()), backend="bokeh")


# the theorems --------------------------------------------------------------------------------------------------------


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", html, flags=re.S))


def test_a_card_has_all_that_was_checked(theory):
    html = theory_html(theory, Look())
    articles = html.split("<article")[1:]
    assert len(articles) == 7
    for card, article in zip(theory, articles, strict=True):
        said = text_of("<article" + article)
        for part in (card.statement, card.source, f"tolerance {card.tolerance:g}", VERDICTS[card.verdict].word, card.witness.text):
            assert re.sub(r"\s+", " ", part).replace("<", "&lt;").replace(">", "&gt;") in said, part
        assert article.count("<li>") == len(card.assumptions)
        for one in card.assumptions:
            assert f"{MET[one.met][0]} {MET[one.met][1]} : " in said.replace("  ", " ")


def test_no_card_holds_where_an_assumption_fails(theory):
    assert [card.verdict for card in theory].count("holds") >= 1  # T5: the trap is a partial minimum
    html = theory_html(theory, Look())
    for card, article in zip(theory, html.split("<article")[1:], strict=True):
        if card.failed:
            assert card.verdict == "assumption not met" and ">Holds<" not in article and "✗" in article
        else:
            assert "✗" not in article


def test_text_from_data_is_escaped(theory):
    evil = replace(theory[0], reason="<img src=x onerror=alert(1)>", assumptions=(Assumption("<b>", "</li><script>", None),))
    html = theory_html([evil], Look())
    assert "<img" not in html and "<script" not in html and "&lt;script&gt;" in html


def test_sides_and_verdicts_are_drawn_and_tabulated(theory):
    element = theorem_sides(theory, Look())
    labels = drawn(element, hv.Labels)[0]["text"].tolist()
    assert labels == [f"{VERDICTS[card.verdict].shape} {card.verdict}" for card in theory]
    table = theorem_sides.table(theory, Look())
    assert table["theorem"].tolist() == [f"T{i}" for i in range(1, 8)]
    assert table["slack"].tolist() == pytest.approx([card.slack for card in theory], nan_ok=True)
    said = theorem_sides.reading(theory, Look())
    assert all(f"{card.id} {card.title}: {card.verdict}." in said for card in theory)
    blank = check_theory(TRAP, Activations(ROWS.inputs, ROWS.inputs))
    hv.render(theorem_sides(blank, Look()), backend="bokeh")
    assert theorem_sides.reading(blank, Look()).startswith("7 not checkable.")


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("tokens", [VERDICTS, FATE_TOKENS], ids=["verdicts", "fates"])
def test_tokens_can_be_told_apart(theme, tokens):
    assert len({(t.marker, t.hollow) for t in tokens.values()}) == len({t.shape for t in tokens.values()}) == len(tokens)
    for one in tokens.values():
        assert contrast(one.colour(theme), BACKGROUND[theme]) >= 3, one.name
    for deficiency in MACHADO:
        for one, other in combinations(sorted({t.colour(theme) for t in tokens.values()}), 2):
            assert ciede2000(lab(one, deficiency), lab(other, deficiency)) >= 10, (deficiency, one, other)


# the page ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def explorer():
    from sdl_explorer import Explorer, LinearBench, Session, TopK

    with Session(LinearBench(n_features=8, d_in=6, sparsity=0.85), TopK(k=2), n_latents=10, batch_size=32) as session:
        session.train(20)
        explorer = Explorer(session)
        yield explorer
        explorer.close()


@pytest.mark.slow
def test_the_page_follows_the_primary_latent(explorer):
    frame = explorer.__panel__()
    assert "Landscape" in frame.tabs.options
    explorer.state.page = "Landscape"
    explorer.desk.settle()
    assert [card.view.id for card in frame.shown.cards] == ["L1", "L3", "L2", "T"]
    for latent in (2, 5):
        explorer.selection = (latent,)
        explorer.desk.settle()
        found = explorer.session.find(probe_landscape, latents=latent)
        assert found.latents[0] == latent
        for card in frame.shown.cards[:3]:
            assert card.reading.text == card.view.reading(None, found, explorer.look())
    cards = frame.shown.parts[-1]
    assert cards.cards.html == theory_html(explorer.session.find(check_theory), explorer.look())
    assert "computed at step 20" in cards.stamp.text
    chosen = next(card for card in explorer.session.find(check_theory) if card.witness.features)
    cards._pick(f"{chosen.id} features")
    assert explorer.state.selected_features == chosen.witness.features
    for nonsense in ("", "T9 features", "T1 text", "T1"):
        cards._pick(nonsense)
    assert explorer.state.selected_features == chosen.witness.features


@pytest.mark.slow
def test_seeds_are_trained_where_something_is_anchored(explorer):
    frame = explorer.__panel__()
    explorer.state.page = "Landscape"
    explorer.desk.settle()
    cards = frame.shown.parts[-1]
    assert cards.seeds.disabled and "anchor some latents" in cards.said.text
    with pytest.raises(ValueError, match="nothing is anchored here"):
        explorer.session.train_seeds(5)
    explorer.session.anchor(Anchors.from_truth(explorer.session.source.sample(4, torch.Generator()), [0, 1]), weight=1.0)
    explorer.desk.settle()
    assert not cards.seeds.disabled and cards.said.text == ""
    before = explorer.session.dictionary.W_dec.clone()
    seeds = explorer.session.train_seeds(2, runs=5)
    assert len(seeds.free) == 5 and seeds is explorer.session.last_seeds
    assert torch.equal(explorer.session.dictionary.W_dec, before) and explorer.session.snapshot.job is None
    card = explorer.session.find(check_theory)[6]
    assert card.numbers["seeds"] == 5 and card.numbers["features that no anchor is about"] == 6
    explorer.desk.settle()
    assert "spread with anchors" in cards.cards.html


def test_a_sheet_stands_alone(explorer):
    sheet = explorer.landscape()
    assert sheet.title == "Landscape" and sheet.__panel__() is not None


def test_stop_ends_the_seeds(explorer):
    from sdl_explorer.control import Stopped

    explorer.session.anchor(Anchors.from_truth(explorer.session.source.sample(4, torch.Generator()), [2]), weight=1.0)

    async def run():
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(None, explorer.session.train_seeds, 100_000)
        while explorer.session.snapshot.job is None and not work.done():
            await asyncio.sleep(0.01)
        explorer.session.stop(wait=False)
        with pytest.raises(Stopped, match="nothing is kept"):
            await work

    asyncio.run(run())
    assert explorer.session.snapshot.job is None
