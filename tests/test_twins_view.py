"""C6, two dictionaries side by side: what the view draws, says and tabulates of planted pairs, and what a session can be compared with."""

from dataclasses import replace
from itertools import combinations

import holoviews as hv
import numpy as np
import pytest
import torch

from sdl_explorer import HierarchyBench, Session, SparseDictionary, TopK, find_twins
from sdl_explorer.control import Stopped
from sdl_explorer.diagnosis.compared import Compared
from sdl_explorer.views import latent_points, twins
from sdl_explorer.views.look import Look
from sdl_explorer.views.theme import TWINS
from sdl_explorer.views.twins import counterparts, shared_latents
from sdl_explorer.views.words import NOT_COMPARED, PIXELS
from tests.test_theme import BACKGROUND, MACHADO, THEMES, ciede2000, contrast, lab
from tests.test_twins import FEATURES, ROWS, SPLIT, dictionary

KINDS = ["split", "shared", "shared", "novel", "part", "part", "silent"]


@pytest.fixture(scope="module")
def compared():
    """Here: feature 0 whole, 1, 2, 3, twice 4, and one that is silent. There: 0 in two halves, 1, 2, 4 once, and 5, which is not here."""
    here, there = dictionary(FEATURES[[0, 1, 2, 3, 4, 4, 11]]), dictionary(SPLIT[[0, 1, 2, 3, 5, 6]])
    with torch.no_grad():
        here.b_enc[6] = -99.0
    found = find_twins(here, ROWS, there)
    return Compared("commit a41f of step 500", 900, found, "'a41f'")


def title_of(element) -> str:
    return hv.Store.lookup_options("bokeh", element, "plot").kwargs["title"]


def marks_of(element, column="latent"):
    return next(e for e in element.traverse(lambda e: e, [hv.Points]) if column in e and len(e))


def test_each_latent_stands_at_its_rate_and_its_similarity(compared):
    found = compared.twins
    assert found.here.kind.tolist()[:4] == KINDS[:4] and found.here.kind[6] == "silent"
    marks = marks_of(shared_latents(compared))
    assert marks["latent"].tolist() == shared_latents.ids(compared).tolist() == list(range(7))
    assert marks["y"].tolist() == found.here.similarity.tolist() == shared_latents.table(compared)["similarity"].tolist()[:7]
    assert marks["x"][:6] == pytest.approx(np.log10(found.here.firing_rate[:6]))
    assert marks["marker"].tolist() == [TWINS[kind].marker for kind in found.here.kind]
    only = marks_of(shared_latents(compared), "nearest")
    assert only["there"].tolist() == [5] and "latent" not in only  # it is not one of ours: nothing to select
    assert only["x"] == pytest.approx(np.log10(found.there.firing_rate[[5]]))


def test_the_table_has_the_pairs_and_what_is_only_there(compared):
    table = shared_latents.table(compared)
    assert table["latent"].tolist()[:7] == list(range(7)) and not table.isna().any(axis=None)
    assert table["there"].tolist()[:3] == ["0, 1", "2", "3"]
    assert sorted(table["there"][[4, 5]]) == ["4", "4"] and table["there"][6] == ""
    assert table["kind"].tolist()[7:] == ["Novel there"] and table["there"].tolist()[7:] == ["5"]
    assert table.loc[7, "latent"] == compared.twins.there.best[5]  # a row that is selected selects a latent that exists
    assert [len(one) for one in counterparts(compared.twins)] == [2, 1, 1, 1, 1, 1, 0]


def test_counts_stand_in_the_title_and_nothing_is_unsaid(compared):
    title, said = title_of(shared_latents(compared)), shared_latents.reading(compared)
    here, there = title.splitlines()
    assert here.startswith("Here 7 latents: ") and "1 split there" in here and "1 novel" in here and "1 silent" in here
    assert there.startswith("There 6 latents: ") and "2 merged here" in there and "1 novel" in there
    start = "Compared with commit a41f of step 500, by cosine of decoder rows at 0.7 or more, on 3 000 rows. Here 7 latents"
    assert said.startswith(start) and f"nothing in common have {compared.twins.chance:.2f}." in said
    assert "nothing follows" in shared_latents.reading(replace(compared, twins=replace(compared.twins, chance=0.8)))


def test_nothing_compared_a_raster_and_a_selection(compared, monkeypatch):
    assert shared_latents.empty(None) == shared_latents.reading(None) == NOT_COMPARED and len(shared_latents.table(None)) == 0
    labels = {e.label for e in shared_latents(compared, Look(selected_latents=(1, 2), primary_latent=1)).traverse(lambda e: e, [hv.Points])}
    assert {"Selected (2)", "Primary"} <= labels
    monkeypatch.setattr(latent_points, "MAX_POINTS", 6)
    monkeypatch.setattr(twins, "MAX_POINTS", 6)
    element = shared_latents(compared, Look(selected_latents=(1,)))
    assert {0, 1, 3, 6} <= set(marks_of(element)["latent"]) and 2 not in marks_of(element)["latent"]
    assert PIXELS in title_of(element)


def test_by_activations_and_without_anything_alive():
    found = find_twins(dictionary(FEATURES), ROWS, dictionary(FEATURES[:4]), by="activations")
    assert "correlation of activations" in shared_latents.reading(Compared("other", 0, found))
    silent = SparseDictionary(FEATURES[:2], FEATURES[:2], torch.full((2,), -99.0))
    said = Compared("other", 0, find_twins(silent, ROWS, silent))
    assert "No latent fires here." in shared_latents.reading(said)
    assert np.isfinite(marks_of(shared_latents(said))["y"]).all() and not shared_latents.table(said).isna().any(axis=None)


@pytest.mark.parametrize("theme", THEMES)
def test_tokens_can_be_told_apart(theme):
    assert len({t.marker for t in TWINS.values()}) == len({t.shape for t in TWINS.values()}) == len(TWINS)
    for one, other in combinations(TWINS.values(), 2):
        assert contrast(one.colour(theme), BACKGROUND[theme]) >= 3, one.name
        for deficiency in MACHADO:
            assert ciede2000(lab(one.colour(theme), deficiency), lab(other.colour(theme), deficiency)) >= 10, (deficiency, one, other)


# what a session can be compared with ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session():
    with Session(HierarchyBench(parents=2, children=2, independent=4, d_in=12), TopK(k=2), n_latents=16, batch_size=64) as session:
        session.train(20)
        yield session


def test_a_commit_a_folder_a_session_and_a_dictionary(session, tmp_path):
    start = session.commits[0].id
    found = session.compare_with(start, n=500)
    assert found is session.last_compared and found.name == f"commit {start} of step 0" and found.step == session.step
    assert (
        found.twins.here.kinds == session.find(find_twins, other=session._run.store.load_dictionary(session.commits[0]), n=500).here.kinds
    )
    assert found.python == f"{start!r}, n=500"
    session.dictionary.save(tmp_path / "sae")
    own = {"shared": 16, "silent": 0} | {"split": 0, "part": 0, "novel": 0}
    with session.branch() as twin:
        for other, name in (
            (tmp_path / "sae", "sae"),
            (twin, "another session of 16 latents"),
            (session.dictionary, "another dictionary of"),
        ):
            found = session.compare_with(other, n=500)
            silent = found.twins.here.kinds["silent"]
            assert found.twins.here.kinds == own | {"shared": 16 - silent, "silent": silent} and found.name.startswith(name)
    assert session.compare_with(start, n=500, by="activations").python == f"{start!r}, by='activations', n=500"


@pytest.mark.parametrize(
    ("other", "kind", "says"),
    [
        ("no-such-run", FileNotFoundError, "is no commit"),
        (("free", 0), ValueError, "no other seeds"),
        (3, TypeError, "int is no dictionary"),
        (SparseDictionary(torch.eye(5), torch.eye(5)), ValueError, "Pass other_activations="),
    ],
)
def test_what_cannot_be_compared_says_why(session, other, kind, says):
    before = session.last_compared
    with pytest.raises(kind, match=says):
        session.compare_with(other, n=100)
    assert session.last_compared is before and session.snapshot.job is None


def test_stop_ends_it_and_keeps_what_was_there(session, monkeypatch):
    before, find = session.last_compared, session.find

    def stopped(finding, *, progress, **settings):
        session.stop(wait=False)
        progress(0.5)
        return find(finding, **settings)

    monkeypatch.setattr(session, "find", stopped)
    with pytest.raises(Stopped, match="stopped at 50%"):
        session.compare_with(session.commits[0], n=100)
    assert session.last_compared is before and session.snapshot.job is None


@pytest.mark.slow
def test_the_card_offers_compares_and_selects(session):
    from sdl_explorer import Anchors, Explorer
    from sdl_explorer.widgets.twins import FILE, TwinCard

    explorer = Explorer(session)
    session.last_compared = None
    frame = explorer.__panel__()
    explorer.state.page = "Compare"
    explorer.desk.settle()
    card = next(part for part in frame.shown.parts if isinstance(part, TwinCard))
    card.refresh()
    assert card.words.text == NOT_COMPARED and card.other.value == session.commits[0].id
    assert list(card.other.options.values()) == [*(c.id for c in reversed(session.commits)), FILE]
    found = explorer.compare_with(card.other.value, n=500)
    assert card.reading.text == shared_latents.reading(found, explorer.look())
    assert card.python() == f"explorer.compare_with({session.commits[0].id!r}, n=500)"
    frame.page.get_root()
    (source,) = card._link._sources.values()
    source.selected.indices = [3, 5]
    assert explorer.selection == (3, 5)
    session.train(1)
    explorer.desk.settle()
    assert "the model is at step 21 now" in card.stamp.text
    session.anchor(Anchors.from_truth(explorer.desk.sample, [0]))
    session.train_seeds(2, 1)
    card.refresh()
    assert {"free 0", "anchored 0"} <= set(card.other.options.values())
    assert session.compare_with(("free", 0), n=500).name == "other seed 1 without anchors, 2 steps"
    explorer.desk.most_steps = 100  # a server's files are not its visitors'
    card.refresh()
    assert FILE not in card.other.options.values()
    explorer.close()
