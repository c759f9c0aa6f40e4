"""The page on absorption: planted families, with what each card must draw, say and tabulate; and where the page stands."""

from dataclasses import replace
from itertools import combinations

import holoviews as hv
import numpy as np
import pytest
import torch

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.bench import linear_activations
from sdl_explorer.diagnosis import scores
from sdl_explorer.diagnosis.absorption import find_absorption
from sdl_explorer.diagnosis.candidates import suspect_absorption
from sdl_explorer.diagnosis.edges import KINDS
from sdl_explorer.diagnosis.scores import DetectorScore
from sdl_explorer.diagnosis.spiked import OnSpikes
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.views import words
from sdl_explorer.views.absorbers import causal_check, decomposition
from sdl_explorer.views.absorption import MAX_EDGES, edge_table, holes, recalls, tree, worst_first
from sdl_explorer.views.candidates import candidate_forest, candidate_pair
from sdl_explorer.views.look import Look
from sdl_explorer.views.theme import EDGES
from sdl_explorer.widgets.absorbed import Absorbed
from tests.test_theme import BACKGROUND, MACHADO, THEMES, ciede2000, contrast, lab

N, WIDTH = 400, 60
CARDS = (holes, recalls, decomposition, causal_check)
every_card = pytest.mark.parametrize("card", CARDS, ids=lambda card: card.id)


def family(n_children: int = 3, deep: bool = False) -> Activations:
    """Parent 0 and its children, one of them or none at a time; `deep` makes feature 2 the child of feature 1."""
    n = n_children + 1
    codes = torch.zeros(N, n)
    for r in range(N):
        codes[r, [0, r % n]] = 1.0
        if deep and r % n == 2:
            codes[r, 1] = 1.0
    directions = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))[0][:n]
    parents = (None, 0, 1 if deep else 0, *[0] * (n_children - 2))
    names = ("animal", *(f"kind {i}" for i in range(1, n)))
    return linear_activations(codes, directions, directions, parents=parents, names=names)


def absorbing(rows: Activations, children, delta: float = 1.0) -> SparseDictionary:
    """W_enc_parent = parent - delta * children, W_dec_child = child + delta * parent (Chanin et al. 2024, appendix A.2)."""
    W_enc, W_dec = rows.truth.input_features.clone(), rows.truth.target_features.clone()
    for child in children:
        W_enc[0] -= delta * rows.truth.input_features[child]
        W_dec[child] += delta * rows.truth.target_features[0]
    return SparseDictionary(W_enc, W_dec)


@pytest.fixture(scope="module")
def found():
    rows = family()
    return find_absorption(absorbing(rows, (1, 3)), rows)


def drawn(element, kind=hv.Points) -> list:
    return [e for e in element.traverse(lambda e: e, [kind]) if len(e) and np.isfinite(e.dimension_values(0).astype(float)).any()]


def title_of(element) -> str:
    return hv.Store.lookup_options("bokeh", element, "plot").kwargs["title"]


def labelled(element, label: str):
    return next(e for e in drawn(element) if e.label == label)


# what the cards show -------------------------------------------------------------------------------------------------


def test_the_tree_marks_each_child_with_its_recall_and_kind(found):
    marks = drawn(holes(found, Look()))[0]
    assert marks["feature"].tolist() == holes.ids(found, Look()).tolist() == [1, 3, 2]  # the absorbed ones first
    assert marks["recall"].tolist() == [0, 0, 1]
    assert marks["kind"].tolist() == ["absorbed", "absorbed", "none"]
    assert marks["marker"].tolist() == ["diamond", "diamond", "circle"]
    left, right = drawn(holes(found, Look()), hv.Labels)
    assert left["text"].tolist() == ["animal", "kind 1", "kind 3", "kind 2"]
    assert right["text"].tolist() == ["◆ absorbed: latent 1", "◆ absorbed: latent 3", "● fine"]
    assert len(np.unique(left["x"])) == 2  # indented


def test_the_sentence_is_the_finding_s_own(found):
    said = holes.reading(found, Look())
    assert said.startswith("3 parent-child edges: 2 absorbed, 1 fine. Worst: kind 1 under animal (absorbed): ")
    assert found.edges[0].why in said
    assert found.edges[2].why in recalls.reading(found, Look(primary_feature=3))
    assert found.edges[1].why in recalls.reading(found, Look(primary_feature=2))


def test_both_recalls_stand_with_their_intervals(found):
    element = recalls(found, Look())
    without, with_child = labelled(element, "without the child"), labelled(element, "with the child")
    order = [found.edges[0], found.edges[2], found.edges[1]]
    assert with_child["recall"].tolist() == [e.recall_with for e in order]
    assert without["recall"].tolist() == [e.recall_without for e in order]
    spans = drawn(element, hv.Segments)
    assert spans[0]["x0"].tolist() == [e.evidence.recall_without_interval.low for e in order]
    assert spans[1]["x1"].tolist() == [e.evidence.recall_with_interval.high for e in order]
    assert f"fires on 0% of {order[0].n_with} rows with the child" in recalls.reading(found, Look())


@pytest.mark.parametrize("delta", [0.4, 1.0])
def test_the_absorber_s_row_is_taken_apart_and_put_to_zero(delta):
    rows = family()
    found = find_absorption(absorbing(rows, (2,), delta), rows)
    row = decomposition.table(found, Look()).iloc[0]
    norm = (1 + delta**2) ** 0.5
    assert (row["latent"], row["parent part"], row["child part"]) == (2, pytest.approx(delta / norm), pytest.approx(1 / norm))
    assert row["rest"] == pytest.approx(0, abs=1e-6)
    check = causal_check.table(found, Look()).iloc[0]
    assert (check["latent"], check["with it"], check["no child"]) == (2, pytest.approx(1, abs=1e-6), pytest.approx(1, abs=1e-6))
    assert check["without it"] == pytest.approx(1 - delta, abs=1e-6)  # what the parent's own latent still writes
    element = causal_check(found, Look())
    assert labelled(element, "absorber's code at zero")["written"].tolist() == [check["without it"]]
    assert labelled(element, "all latents")["written"].tolist() == [check["with it"]]
    assert f"{1 - delta:.2f} of the parent is written instead of 1.00" in causal_check.reading(found, Look())


def test_a_selected_feature_chooses_the_edge(found):
    assert decomposition.reading(found, Look(primary_feature=3)).startswith("kind 3 under animal: latent 3 writes")
    assert decomposition.reading(found, Look(primary_feature=0)).startswith("kind 1 under animal")  # the parent: its worst child
    assert decomposition.reading(found, Look(primary_feature=99)).startswith("kind 1 under animal")
    assert "The encoder of the parent's latent 0 avoids the child: cosine -0.58" in decomposition.reading(found, Look())
    ring = labelled(holes(found, Look(primary_feature=3)), "Selected")
    assert ring["feature"].tolist() == [3]


def test_the_table_has_every_edge_and_points_at_features(found):
    table = holes.table(found, Look())
    assert table["feature"].tolist() == [1, 3, 2]
    assert table["why"].tolist() == [found.edges[i].why for i in (0, 2, 1)]
    assert table["absorber"].tolist() == [1, 3, -1]
    assert table["gap"].tolist() == [found.edges[i].gap for i in (0, 2, 1)]


def test_the_order_of_latents_changes_ids_alone(found):
    rows = family()
    order = torch.tensor([2, 0, 3, 1])
    straight = absorbing(rows, (1, 3))
    shuffled = find_absorption(SparseDictionary(straight.W_enc[order], straight.W_dec[order]), rows)
    same = ["child", "kind", "recall with child", "recall without child", "gap"]
    assert edge_table(shuffled)[same].equals(edge_table(found)[same])
    assert edge_table(shuffled)["absorber"].tolist() == [3, 2, -1]


def test_a_child_that_is_a_parent_stands_below_its_own():
    rows = family(deep=True)
    found = find_absorption(absorbing(rows, ()), rows)
    assert [(feature, depth) for feature, depth, _ in tree(found.edges)] == [(0, 0), (1, 1), (2, 2), (3, 1)]


def test_many_edges_are_cut_and_it_says_so():
    rows = family(MAX_EDGES + 5)
    found = find_absorption(absorbing(rows, (MAX_EDGES + 5,)), rows)
    for card in (holes, recalls):
        title = hv.Store.lookup_options("bokeh", card(found, Look()), "plot").kwargs["title"]
        assert f"{MAX_EDGES} of {MAX_EDGES + 5} edges drawn, worst first; the table has all." in title
        assert len(card.table(found, Look())) == MAX_EDGES + 5
    assert holes.ids(found, Look())[0] == MAX_EDGES + 5


def test_kinds_come_before_gaps(found):
    some = [found.edges[1]._replace(kind=kind, gap=gap) for kind in reversed(KINDS) for gap in (None, 0.1, 0.4)]
    ordered = worst_first(some)
    assert [e.kind for e in ordered] == [kind for kind in KINDS for _ in range(3)]
    assert [e.gap for e in ordered[:3]] == [0.4, 0.1, None]


# nothing to show -----------------------------------------------------------------------------------------------------


@every_card
def test_no_truth_no_family_and_nothing_eligible_have_words(card):
    rows = family()
    dictionary = absorbing(rows, (1,))
    assert card.empty(None, Look()) == words.NO_FAMILY_TRUTH
    flat = find_absorption(dictionary, replace(rows, truth=replace(rows.truth, parents=())))
    assert card.empty(flat, Look()) == card.reading(flat, Look()) == words.NO_FAMILIES
    few = find_absorption(dictionary, rows, least=N)
    why = card.empty(few, Look())
    assert why.startswith("None of the 3 parent-child edges can be judged yet. kind 1 under animal (not eligible): 100 rows have")
    assert why.endswith("[▸▸ Train 500 steps]")
    for found in (None, flat, few):
        assert len(card.table(found, Look())) == 0
        hv.render(card(found, Look()), backend="bokeh")


@pytest.mark.parametrize("card", [decomposition, causal_check], ids=lambda card: card.id)
def test_without_an_absorber_there_is_nothing_to_take_apart(card):
    rows = family()
    clean = find_absorption(absorbing(rows, ()), rows)
    assert card.empty(clean, Look()) == card.reading(clean, Look()) == words.NO_ABSORBERS
    assert holes.reading(clean, Look()).startswith("3 parent-child edges: 3 fine.")


# without truth -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def suspected():
    rows = family()
    found = suspect_absorption(absorbing(rows, (1, 3)), replace(rows, truth=None))
    return replace(found, coherence=0.05)  # four latents alone are crowded; among many they would not be


def test_the_forest_of_candidates_says_candidate_everywhere(suspected):
    look = Look()
    marks = drawn(candidate_forest(suspected, (), look))[0]
    assert marks["latent"].tolist() == candidate_forest.ids(suspected, (), look).tolist()
    assert marks["latent"].tolist()[0] == 0 and set(marks["latent"].tolist()[1:3]) == {1, 3}
    dashed = [p for p in candidate_forest(suspected, (), look).traverse(lambda e: e, [hv.Path]) if len(p)]
    assert hv.Store.lookup_options("bokeh", dashed[0], "style").kwargs["line_dash"] == "dashed"
    table = candidate_forest.table(suspected, (), look)
    assert table["kind"].tolist()[:2] == ["candidate"] * 2 and table["attenuation"].tolist()[:2] == pytest.approx([0, 0], abs=1e-5)
    said = candidate_forest.reading(suspected, (), look)
    assert said.startswith("2 candidates. 6 pairs of near latents examined on 400 rows.") and "may have taken latent 0's place" in said
    assert "absorbed" not in said


def test_the_pair_follows_the_selected_latent_and_shows_three_numbers(suspected):
    for child in (1, 3):
        look = Look(primary_latent=child)
        said = candidate_pair.reading(suspected, (), look)
        assert f"latent {child} may have taken latent 0's place" in said and said.startswith("Candidate:")
        assert "keeps 0.00 of its usual 1, and both write 1.00 of it (cosine 0.71)" in said
        assert f"Latent 0 fires on 0% of latent {child}'s 100 rows" in said
        child_rows = labelled(candidate_pair(suspected, (), look), "the child fires")
        assert child_rows["child"] == pytest.approx(np.full(100, 2**0.5)) and child_rows["parent"] == pytest.approx(np.zeros(100))
        table = candidate_pair.table(suspected, (), look)
        assert (table["rows of"] == "the child").sum() == 100 and len(table) == 300
    assert f"Candidate: latent {suspected.candidates[0].child} instead of latent 0" in str(
        title_of(candidate_pair(suspected, (), Look(primary_latent=2)))
    )


def test_the_containment_layer_is_grey_and_no_candidate(suspected):
    rows = family()
    half = replace(rows, inputs=rows.inputs * (torch.arange(N) % 8 < 4)[:, None], truth=None)
    found = replace(suspect_absorption(absorbing(rows, (3,)), replace(half, targets=half.inputs)), coherence=0.05)
    assert {(p.inner, p.outer) for p in found.contained} == {(1, 0), (2, 0)}
    kinds = candidate_forest.table(found, (), Look()).set_index("latent")["kind"]
    assert kinds[1] == kinds[2] == "fires inside it" and kinds[3] == "candidate"
    title = title_of(candidate_forest(found, (), Look()))
    assert title == "1 candidate, 2 latents inside another"


def test_without_a_candidate_and_where_latents_crowd_it_says_so(suspected):
    rows = family()
    clean = suspect_absorption(absorbing(rows, ()), rows)
    for card in (candidate_forest, candidate_pair):
        assert card.empty(clean, (), Look()).startswith(words.NO_CANDIDATES)
        assert card.empty(None, (), Look()) == words.NOT_COMPUTED
        assert len(card.table(clean, (), Look())) == 0 and card.reading(clean, (), Look()) == card.empty(clean, (), Look())
    crowded = replace(suspected, crosstalk=0.4, coherence=0.3)
    for card in (candidate_forest, candidate_pair):
        assert words.crowded(0.4, 0.3) in card.reading(crowded, (), Look())
    spiked = replace(suspected, on_spikes=OnSpikes("absorbed", 3, 4, 1, 4, 12))
    assert " Precision on spike-ins here: 0.75 (3 of 4, 95 %:" in candidate_forest.reading(spiked, (), Look())
    assert "No claim here: latents crowd each other" in title_of(candidate_forest(crowded, (), Look()))


@pytest.mark.parametrize("precision", [0.9, 0.4])
def test_candidates_are_claimed_only_where_the_detector_is_confident(suspected, monkeypatch, precision):
    measured = DetectorScore("absorption", 0.0, 0.1, 100, 40, 30, precision, 0.7, 0.95, 0.1)
    monkeypatch.setattr(scores, "_table", lambda: {"absorption": (measured,)})
    said = [card.reading(suspected, (), Look(primary_latent=1)) for card in (candidate_forest, candidate_pair)]
    titles = [title_of(card(suspected, (), Look())) for card in (candidate_forest, candidate_pair)]
    for text in said:
        assert f'Detector "absorption": precision {precision:.2f}, recall 0.70 on benches' in text
        assert text.startswith("No claim") is ("may have taken" not in text) is (precision < 0.5)
    assert all(("No claim" in title) is (precision < 0.5) for title in titles)


def test_many_candidates_are_drawn_in_part_and_the_table_has_all():
    rows = family(40)
    found = suspect_absorption(absorbing(rows, range(1, 41)), rows, least=5)
    assert len(found.candidates) == 40
    title = title_of(candidate_forest(found, (), Look()))
    assert "40 candidates" in title and "20 and 0 drawn" in title
    assert len(candidate_forest.table(found, (), Look())) == 40


# colours -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", THEMES)
def test_kinds_can_be_told_apart(theme):
    assert tuple(EDGES) == KINDS
    assert len({(t.marker, t.hollow) for t in EDGES.values()}) == len({t.shape for t in EDGES.values()}) == len(EDGES)
    for one in EDGES.values():
        assert contrast(one.colour(theme), BACKGROUND[theme]) >= 3, one.name
    colours = sorted({one.colour(theme) for one in EDGES.values()})
    assert len(colours) == 6
    for deficiency in MACHADO:
        for one, other in combinations(colours, 2):
            assert ciede2000(lab(one, deficiency), lab(other, deficiency)) >= 10, (deficiency, one, other)


# the page ------------------------------------------------------------------------------------------------------------


def test_the_page_is_there_where_concepts_have_parents(explorer):
    frame = explorer.__panel__()
    assert frame.tabs.options == ["Overview", "Alignment", "Latents", "Intervene", "Absorption", "Landscape", "Compare"]
    explorer.desk.settle()
    assert explorer.desk.value(find_absorption) is None  # computed when the page is opened
    explorer.state.page = "Absorption"
    explorer.desk.settle()
    assert [card.view.id for card in frame.shown.cards] == ["H1", "H2", "H3", "H4", "H5", "H6", "H7", "H8"]
    found = explorer.desk.value(find_absorption)
    assert found is explorer.session.find(find_absorption)
    for card in frame.shown.cards[:4]:
        assert (card.reading.text or card.words.text) == (
            card.view.empty(found, explorer.look()) or card.view.reading(found, explorer.look())
        )
    explorer.session.train(5)
    frame.shown.cards[0].refresh()
    explorer.desk.snapshot = explorer.session.snapshot
    frame.shown.cards[0].refresh()
    assert "computed at step 30 · the model is at step 35 now" in frame.shown.cards[0].stamp.text


def test_a_row_of_the_tree_is_a_selection(explorer):
    frame = explorer.__panel__()
    explorer.state.page = "Absorption"
    explorer.desk.settle()
    frame._key("T")
    explorer.desk.settle()
    assert set(explorer.state.twins) == {"H1", "H2", "H3", "H4", "H5", "H6", "H7", "H8"}
    explorer.desk.select(features=(2,))
    assert explorer.state.primary_feature == 2


def test_buttons_open_the_forms_with_the_edge_in_front(explorer, monkeypatch):
    """Anchor parent, Split off child: the selection is theirs, and nothing is planned."""
    frame = explorer.__panel__()
    explorer.state.page = "Absorption"
    explorer.desk.settle()
    part = next(part for part in frame.shown.parts if isinstance(part, Absorbed))
    found, called = explorer.desk.value(find_absorption), []
    edge = found.edges[0]._replace(kind="absorbed", absorber=5)
    monkeypatch.setattr(explorer.desk, "value", lambda finding: replace(found, edges=(edge,)) if finding is find_absorption else None)
    monkeypatch.setattr(explorer.desk, "call", called.append)
    part.refresh()
    assert part.said.text == "Latent 5 writes parent 0 where child 0.0 is active."
    assert not (part.anchor.disabled or part.split.disabled or part.retrain.disabled)
    part._anchor()
    assert explorer.state.primary_feature == 0
    part._split()
    assert explorer.state.selected_latents == (5,) and called == ["anchor", "unabsorb"]
    assert explorer.desk.plan is None and explorer.session.head.kind != "unabsorb"
    for value, said in ((None, words.NOT_COMPUTED), (replace(found, edges=()), words.NO_ABSORBERS)):
        monkeypatch.setattr(explorer.desk, "value", lambda finding, value=value: value)
        part.refresh()
        assert part.anchor.disabled and part.split.disabled and part.said.text == said


def test_without_truth_the_buttons_follow_the_candidate():
    from sdl_explorer import Explorer, Session, Stored

    rows = family()
    with Session(Stored(rows.inputs, keep=torch.ones(N, dtype=torch.bool)), dictionary=absorbing(rows, (1, 3))) as session:
        explorer = Explorer(session)
        frame = explorer.__panel__()
        explorer.state.page = "Absorption"
        explorer.desk.settle()
        part = next(part for part in frame.shown.parts if isinstance(part, Absorbed))
        part.refresh()
        found = session.find(suspect_absorption, least=2)
        assert part.anchor.disabled
        assert part.split.disabled == (not session.find(suspect_absorption).candidates)
        assert {c.parent for c in found.candidates} == {0}
        explorer.close()


def test_flat_data_and_data_without_truth_have_the_candidates():
    from sdl_explorer import Explorer, LinearBench, Session, Stored, TopK

    flat = LinearBench(n_features=8, d_in=6)
    for source in (flat, Stored(flat.sample(400, torch.Generator().manual_seed(0)).inputs)):
        with Session(source, TopK(k=2), n_latents=12) as session:
            explorer = Explorer(session)
            frame = explorer.__panel__()
            explorer.state.page = "Absorption"
            explorer.desk.settle()
            assert [card.view.id for card in frame.shown.cards] == ["H7", "H8", "H5", "H6", "H1", "H2", "H3", "H4"]
            assert [card._view.visible for card in frame.shown.cards] == [False, False, True, True, *[False] * 4]
            frame.refresh()
            found = explorer.desk.value(suspect_absorption)
            assert (found is session.find(suspect_absorption) and explorer.desk.value(find_absorption) is None) or source is flat
            for card in frame.shown.cards[2:4]:
                view, look = card.view, explorer.look()
                assert (card.reading.text or card.words.text) == (view.empty(found, (), look) or view.reading(found, (), look))
            explorer.close()
