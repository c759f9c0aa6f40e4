"""P6, the view of find_redundant: planted spare latents, with what it must draw, say, tabulate and select."""

from dataclasses import replace
from itertools import combinations

import holoviews as hv
import numpy as np
import pytest
import torch

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis import scores
from sdl_explorer.diagnosis.redundancy import find_redundant
from sdl_explorer.diagnosis.scores import DetectorScore
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.views import latent_points, redundancy
from sdl_explorer.views.look import Look
from sdl_explorer.views.redundancy import spares
from sdl_explorer.views.theme import SPARES
from sdl_explorer.views.words import NOT_COMPUTED, PIXELS
from tests.test_redundant import N, planted
from tests.test_theme import BACKGROUND, MACHADO, THEMES, ciede2000, contrast, lab

STATUS = ["duplicate"] * 4 + ["used", "dead", "used", "dense", "weak"]


@pytest.fixture(autouse=True)
def worth(monkeypatch):
    """What the detectors are worth, planted."""
    right = lambda name, precision: (DetectorScore(name, 0.0, 1.0, 400, 100, 100, precision, 0.6, 0.8, 0.25),)
    known = {"duplicate": right("duplicate", 0.9), "dead": right("dead", 0.8)}
    monkeypatch.setattr(scores, "_table", lambda: known)
    return lambda name, precision: known.update({name: right(name, precision)})


@pytest.fixture(scope="module")
def found():
    """As `planted` says, and latent 6 fires on two rows of 2,000."""
    return find_redundant(*planted())


def title_of(element) -> str:
    return hv.Store.lookup_options("bokeh", element, "plot").kwargs["title"]


def marks_of(element):
    return next(e for e in element.traverse(lambda e: e, [hv.Points]) if "latent" in e and len(e))


def test_each_latent_stands_at_its_rate_and_at_what_it_adds(found):
    marks = marks_of(spares(found))
    assert marks["latent"].tolist() == spares.ids(found).tolist() == list(range(9))
    assert marks["status"].tolist() == STATUS
    assert marks["marker"].tolist() == [SPARES[s].marker for s in STATUS] and marks["fill"].tolist()[:5] == [0, 0, 0, 0, 0.75]
    live = np.arange(9) != 5
    assert marks["x"][live] == pytest.approx(np.log10(found.firing_rate[live]))
    assert marks["x"][5] == pytest.approx(np.log10(1 / N) - 0.5)  # the gutter of the silent
    adds = live & (found.explained > 10 ** marks["y"][live].min())
    assert adds.sum() >= 6 and marks["y"][adds] == pytest.approx(np.log10(found.explained[adds]))
    assert (marks["y"][~live] < marks["y"][adds].min()).all()  # and the gutter of those that add nothing
    x0, x1 = hv.Store.lookup_options("bokeh", spares(found), "plot").kwargs["xlim"]
    assert ((marks["x"] > x0) & (marks["x"] < x1)).all() and np.isfinite(marks["y"]).all()


def test_it_says_candidate_and_what_the_detectors_are_worth(found):
    said = spares.reading(found)
    assert said.startswith("9 latents: 1 dead, 4 duplicate candidates, 1 dense, 1 weak, 2 in use; 2 clusters, on 2 000 rows.")
    assert "Largest cluster: latents 0, 1, decoder rows each at 0.9 or nearer to another (by chance fewer than 0.01 pairs so near)." in said
    assert f"Removing latent {found.explained.argmax()} would cost most: {found.explained.max():.1%} of the variance." in said
    regime = "recall 0.60 on benches at mean coherence below 1 (chance 0.25)."
    assert f'Detector "duplicate": precision 0.90, {regime} Detector "dead": precision 0.80, {regime}' in said
    assert "No claim" not in title_of(spares(found))


def test_it_claims_nothing_where_the_detector_is_wrong_more_often_than_right(found, worth):
    worth("duplicate", 0.4)
    assert "No claim about duplicates here: precision 0.40" in title_of(spares(found))


def test_the_table_lists_clusters_first_and_holds_no_nan(found):
    table = spares.table(found)
    assert table["latent"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert table["cluster"].tolist() == [0, 0, 1, 1, -1, -1, -1, -1, -1]
    assert table["with latents"].tolist() == ["1", "0", "3", "2", *[""] * 5]
    assert table["status"].tolist() == [SPARES[s].word for s in STATUS]
    assert not table.isna().any(axis=None)
    numbers = table.set_index("latent").loc[np.arange(9)]
    for column, array in (("explained", found.explained), ("loss of removing", found.loss), ("firing rate", found.firing_rate)):
        assert numbers[column].tolist() == array.tolist()
    moved = find_redundant(*planted(order=torch.tensor([8, 3, 5, 1, 7, 0, 2, 6, 4])))
    table = spares.table(moved)
    assert [set(table["latent"][:2]), set(table["latent"][2:4])] == [{1, 6}, {3, 5}] and table["cluster"].tolist()[4:] == [-1] * 5


def test_a_cluster_is_joined_and_selected_latents_have_rings(found):
    lines = lambda latent: len(next(iter(spares(found, Look(primary_latent=latent)).traverse(lambda e: e, [hv.Segments]))))
    assert [lines(latent) for latent in (0, 3, 4, None)] == [1, 1, 0, 0]
    ringed = spares(found, Look(selected_latents=(2, 7), primary_latent=2))
    assert {e.label for e in ringed.traverse(lambda e: e, [hv.Points])} >= {"Selected (2)", "Primary"}


def test_a_large_cluster_is_named_in_part():
    rows = Activations(*[torch.randn(50, 4, generator=torch.Generator().manual_seed(0))] * 2)
    W = torch.eye(4)[:1].expand(9, 4).contiguous()
    some = find_redundant(SparseDictionary(W, W / 9), rows)
    assert "Largest cluster: latents 0, 1, 2, 3, 4, 5 and 3 more, decoder rows" in spares.reading(some)
    assert spares.table(some)["with latents"].tolist()[::8] == ["1, 2, 3, 4, 5, 6 and 2 more", "0, 1, 2, 3, 4, 5 and 2 more"]


def test_a_silent_dictionary_and_one_latent_alone_are_drawn(found):
    rows = Activations(*[torch.randn(50, 4, generator=torch.Generator().manual_seed(0))] * 2)
    for bias, n in ((-99.0, 3), (0.0, 1)):
        W = torch.eye(4)[:n]
        some = find_redundant(SparseDictionary(W, W.clone(), torch.full((n,), bias)).eval(), rows)
        assert np.isfinite(marks_of(spares(some))["y"]).all()
        assert "nan" not in spares.reading(some) and not spares.table(some).isna().any(axis=None)
    assert spares.empty(None) == spares.reading(None) == NOT_COMPUTED and len(spares.table(None)) == 0


def test_a_raster_keeps_the_spare_and_the_selected_on_top(found, monkeypatch):
    monkeypatch.setattr(latent_points, "MAX_POINTS", 8)
    monkeypatch.setattr(redundancy, "MAX_POINTS", 8)
    look = Look(selected_latents=(4,))
    element = spares(found, look)
    assert marks_of(element)["latent"].tolist() == spares.ids(found, look).tolist() == [0, 1, 2, 3, 4, 7, 8]
    image = element.traverse(lambda e: e, [hv.Image])[0]
    assert np.nansum(image.dimension_values("latents")) == 9 and PIXELS in title_of(element)


def test_a_latent_that_fires_here_is_not_dead_whatever_was_counted(found):
    assert marks_of(spares(replace(found, dead=np.ones(9, dtype=bool))))["status"].tolist() == STATUS


@pytest.mark.parametrize("theme", THEMES)
def test_tokens_can_be_told_apart(theme):
    assert len({(t.marker, t.hollow) for t in SPARES.values()}) == len({t.shape for t in SPARES.values()}) == len(SPARES)
    for one, other in combinations(SPARES.values(), 2):
        assert contrast(one.colour(theme), BACKGROUND[theme]) >= 3, one.name
        for deficiency in MACHADO:
            assert ciede2000(lab(one.colour(theme), deficiency), lab(other.colour(theme), deficiency)) >= 10, (deficiency, one, other)
