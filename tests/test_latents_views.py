"""The page on latents: planted meanings, with what each card must draw, say and tabulate, with truth and without."""

from dataclasses import replace

import holoviews as hv
import numpy as np
import pytest
import torch

from sdl_explorer.data.activations import Activations, Truth
from sdl_explorer.data.anchors import Anchors
from sdl_explorer.diagnosis import scores
from sdl_explorer.diagnosis.causes import trace_causes
from sdl_explorer.diagnosis.groups import NONE, trace_groups
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.diagnosis.meanings import suspect_polysemantic
from sdl_explorer.diagnosis.observe import observe
from sdl_explorer.diagnosis.pairs import MOST, count_pairs
from sdl_explorer.diagnosis.patterns import trace_patterns
from sdl_explorer.diagnosis.recovery import score_recovery
from sdl_explorer.diagnosis.scores import DetectorScore
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.views import words
from sdl_explorer.views.causes import UNKNOWN, ridges
from sdl_explorer.views.cofiring import cofiring
from sdl_explorer.views.look import Look
from sdl_explorer.views.patterns import NO_TRUE, response_profile, selectivity
from sdl_explorer.views.theme import PATTERNS, STATUSES
from tests.test_theme import BACKGROUND, THEMES, contrast

N, WIDTH = 240, 8


def bench(noise: float = 0.0) -> Activations:
    """Four exclusive features, one in each row: feature 0 at 1, feature 1 at 3, features 2 and 3 at 2."""
    codes = torch.zeros(N, 4)
    for row in range(N):
        codes[row, row % 4] = (1.0, 3.0, 2.0, 2.0)[row % 4]
    features = torch.eye(WIDTH)[:4]
    inputs = codes @ features + noise * torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(0))
    return Activations(inputs, inputs, Truth(codes, features, features))


def planted(rows: Activations, order=range(5)) -> SparseDictionary:
    """0 reads features 0 and 1, which have two strengths; 1 is feature 2, 2 is feature 3, 3 is silent, 4 is feature 2 again."""
    f = rows.truth.input_features
    W = torch.stack([(f[0] + f[1]) / 2**0.5, f[2], f[3], -f.sum(dim=0) / 2, f[2]])[list(order)]
    return SparseDictionary(W, W.clone(), torch.full((5,), -0.2))


def without_truth(rows: Activations) -> Activations:
    return replace(rows, truth=None)


def labelled(element, kind=hv.Points) -> dict:
    return {e.label: e for e in element.traverse(lambda e: e, [kind]) if e.label}


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """What the detector is worth, planted: right in seven cases of ten at any coherence."""
    known = {"polysemantic": (DetectorScore("polysemantic", 0.0, 1.0, 400, 100, 100, 0.7, 0.7, 0.8, 0.25),)}
    monkeypatch.setattr(scores, "_table", lambda: known)
    return known


@pytest.fixture(scope="module")
def rows():
    return bench()


@pytest.fixture(scope="module")
def patterns(rows):
    return trace_patterns(planted(rows), rows)


# P2 ------------------------------------------------------------------------------------------------------------------


def test_every_latent_stands_at_its_rate_and_its_number_of_meanings(rows, patterns):
    element = selectivity(patterns, None, None, None, Look(selected_latents=(0,), primary_latent=0))
    base = element.traverse(lambda e: e, [hv.Points])[0]
    table = selectivity.table(patterns, None, None, None)
    assert list(base["latent"]) == list(selectivity.ids(patterns, None, None, None)) == list(range(5))
    assert list(base["y"]) == list(table["effective"]) == list(patterns.effective_features)
    # it fires on half of the rows, three parts of whose drive are feature 1's: 1 / (9/16 + 1/16)
    assert table["effective"].tolist() == pytest.approx([1.6, 1, 1, 0, 1], abs=1e-5)
    assert table["status"].tolist() == ["poly", "mono", "mono", "dead", "mono"]
    assert base["x"][[0, 1]] == pytest.approx(np.log10([0.5, 0.25]))
    assert base["x"][3] == pytest.approx(np.log10(1 / N) - 0.5)  # the gutter of the silent
    assert list(base["marker"]) == [PATTERNS[s].marker for s in table["status"]]
    assert set(labelled(element)) >= {"Selected (1)", "Primary"}
    assert selectivity.reading(patterns, None, None, None) == (
        "5 latents: 1 dead, 1 polysemantic, 3 monosemantic. Most meanings: latent 0, 1.60 features in effect; median 1.00."
    )
    assert selectivity.title(patterns, None, None, None) == selectivity.question


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_another_order_of_the_latents_moves_the_points_with_them(noise):
    rows, order = bench(noise), [4, 0, 3, 2, 1]
    table = selectivity.table(trace_patterns(planted(rows, order), rows), None, None, None)
    assert table["status"].tolist() == ["mono", "poly", "dead", "mono", "mono"]
    assert table["effective"].tolist() == pytest.approx([1, 1.6, 0, 1, 1], abs=0.1 if noise else 1e-5)


def test_without_truth_groups_stand_in_and_the_card_says_so(rows):
    bare = without_truth(rows)
    labels = replace(bare, labels=torch.arange(N) % 4, label_names=("a", "b", "c", "d"))
    dictionary = planted(rows)
    groups, health = trace_groups(dictionary, labels), check_health(dictionary, bare)
    element = selectivity(None, groups, health, None, Look())
    table = selectivity.table(None, groups, health, None)
    assert list(element.traverse(lambda e: e, [hv.Points])[0]["y"]) == groups.effective_groups.tolist() == table["effective"].tolist()
    assert table["status"].tolist() == ["alive", "alive", "alive", "dead", "alive"]
    assert "poly" not in set(table["status"])  # nobody knows
    assert groups.effective_groups[1:] == pytest.approx([1, 1, 0, 1])
    assert groups.chance == pytest.approx(4)
    assert selectivity.title(None, groups, health, None) == "Over how many labels does each latent spread?"
    said = selectivity.reading(None, groups, health, None)
    assert "Activation over 4 labels: median 1.00; a latent that fires alike everywhere has 4.00." in said
    assert NO_TRUE in said
    assert hv.render(element, backend="bokeh").yaxis[0].axis_label == "labels in effect"


def two_kinds() -> tuple[SparseDictionary, Activations]:
    """Latent 0 fires on two kinds of rows with nothing in common, latent 1 on one."""
    x = 0.05 * torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(0))
    x[torch.arange(N), torch.arange(N) % 4] += 1.0
    W = torch.zeros(2, WIDTH)
    W[0, :2], W[1, 2] = 0.5**0.5, 1.0
    return SparseDictionary(W, W.clone(), torch.full((2,), -0.3)), Activations(x, x)


def test_without_truth_candidates_are_named_where_the_detector_is_right_more_often_than_not(table):
    dictionary, rows = two_kinds()
    found = [f(dictionary, rows) for f in (trace_groups, check_health, suspect_polysemantic)]
    points = selectivity.table(None, *found)
    assert points["status"].tolist() == ["candidate", "alive"]
    assert points["score"].tolist() == found[-1].score.tolist()
    assert f"Detector: {found[-1].reading}." in selectivity.reading(None, *found)
    assert "precision 0.70" in selectivity.reading(None, *found)
    table["polysemantic"] = (replace(table["polysemantic"][0], precision=0.4),)
    assert selectivity.table(None, *found)["status"].tolist() == ["alive", "alive"]
    assert "no claim about 2 latents" in selectivity.reading(None, *found)


@pytest.mark.parametrize("theme", THEMES)
def test_patterns_stand_out_from_the_background(theme):
    assert all(contrast(token.colour(theme), BACKGROUND[theme]) >= 3 for token in PATTERNS.values())


def test_a_raster_of_many_latents_keeps_the_selected_ones_on_top(patterns):
    each = {k: np.tile(v, 4000) for k, v in vars(patterns).items() if isinstance(v, np.ndarray) and v.shape == (5,)}
    many = replace(patterns, **each, fires=type(patterns.fires)((20_000, 4)))
    look = Look(selected_latents=(7,), primary_latent=19_999)
    element = selectivity(many, None, None, None, look)
    assert np.nansum(element.traverse(lambda e: e, [hv.Image])[0].dimension_values("latents")) == 20_000
    ids = selectivity.ids(many, None, None, None, look)
    assert {7, 19_999} <= set(ids)
    assert list(element.traverse(lambda e: e, [hv.Points])[0]["latent"]) == list(ids)


def test_tokens_of_patterns_are_those_of_statuses_where_they_mean_the_same():
    for name in ("dead", "unseen"):
        assert PATTERNS[name] is STATUSES[name]
    assert len({(t.marker, t.shape) for t in PATTERNS.values()}) == len(PATTERNS)


# groups --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 7, None])
def test_anchors_labels_and_clusters_find_the_same_groups(rows, block):
    bare, dictionary = without_truth(rows), planted(rows)
    anchors = Anchors.from_truth(rows)
    by_anchor = observe(dictionary, bare, [(trace_groups, {"anchors": anchors})], block=block)[0]
    by_label = observe(dictionary, replace(bare, labels=torch.arange(N) % 4), [trace_groups], block=block)[0]
    by_cluster = observe(dictionary, bare, [(trace_groups, {"n_clusters": 4})], block=block)[0]
    assert (by_anchor.of, by_label.of, by_cluster.of) == ("anchors", "labels", "clusters")
    assert NONE not in by_anchor.names  # every row is near one
    for found in (by_anchor, by_label, by_cluster):
        assert found.sizes.tolist() == [60] * 4
        # codes 2^-1/2 - 0.2 and 3 * 2^-1/2 - 0.2 on as many rows
        weak, strong = 0.5**0.5 - 0.2, 3 * 0.5**0.5 - 0.2
        assert found.effective_groups[0] == pytest.approx((weak + strong) ** 2 / (weak**2 + strong**2), rel=1e-5)
        profile = found.profile(0)
        assert profile.share == pytest.approx(np.array([strong, weak]) / (weak + strong), rel=1e-5)
        assert profile.responses == pytest.approx([strong, weak], rel=1e-5)
        assert profile.context.tolist() == [1, 1]
        assert len(found.profile(3).groups) == 0


def test_rows_near_no_anchor_are_a_group_of_their_own(rows):
    found = trace_groups(planted(rows), without_truth(rows), anchors=Anchors.from_truth(rows, [2]))
    assert found.names == ("feature 2", NONE)
    assert found.sizes.tolist() == [60, 180]
    assert found.effective_groups[[1, 2]] == pytest.approx([1, 1])


def test_groups_of_constant_rows_and_wrong_settings():
    same = torch.ones(9, WIDTH)
    found = trace_groups(SparseDictionary(torch.eye(WIDTH)[:3], torch.eye(WIDTH)[:3]), Activations(same, same))
    assert found.n_groups == 1
    labelled = replace(Activations(same, same), labels=torch.zeros(9, dtype=torch.int64))  # labels that say nothing
    assert trace_groups(SparseDictionary(torch.eye(WIDTH), torch.eye(WIDTH)), labelled).of == "clusters"
    assert found.effective_groups == pytest.approx(np.ones(3))
    with pytest.raises(ValueError, match="n_clusters is 0"):
        trace_groups(SparseDictionary(torch.eye(WIDTH), torch.eye(WIDTH)), Activations(same, same), n_clusters=0)
    with pytest.raises(ValueError, match="latent 3 does not exist"):
        found.profile(3)


# P1 ------------------------------------------------------------------------------------------------------------------


def test_a_profile_draws_the_pattern_of_the_primary(patterns):
    look = Look(primary_latent=0, primary_feature=1)
    element, table = response_profile(patterns, None, look), response_profile.table(patterns, None, look)
    base = element.traverse(lambda e: e, [hv.Points])[0]
    assert list(base["feature"]) == table["feature"].tolist() == [1, 0]
    found = patterns.profile(0)
    assert list(base["response"]) == table["alone"].tolist() == found.responses.mean(axis=0).tolist()
    assert table["share"].tolist() == pytest.approx([0.75, 0.25], abs=1e-6)
    assert list(base["fill"]) == [1, 1]
    assert list(labelled(element)["Selected"].dimension_values("feature")) == [1]
    assert response_profile.reading(patterns, None, look) == (
        "Latent 0: 2 true features fire it alone; feature 1 has 75% of what drives it in rows; 1.60 in effect."
    )
    assert "▲ polysemantic" in hv.render(element, backend="bokeh").title.text


def test_a_latent_that_seldom_wins_in_rows_is_hollow():
    codes = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    inputs = codes @ torch.eye(2)
    rows = Activations(inputs, inputs, Truth(codes, torch.eye(2), torch.eye(2)))
    W = torch.tensor([[1.0, -2.0], [0.0, 1.0]])  # feature 1 silences latent 0
    base = response_profile(trace_patterns(SparseDictionary(W, W), rows), None, Look(primary_latent=0)).traverse(lambda e: e, [hv.Points])[
        0
    ]
    assert (list(base["feature"]), list(base["fill"]), list(base["context"])) == ([0], [0], [0.25])


def test_a_profile_says_why_there_is_none(rows, patterns):
    assert response_profile.empty(patterns, None, Look()) == words.NO_SELECTION
    assert response_profile.empty(patterns, None, Look(primary_latent=3)) == f"Never fired in {N} samples."
    assert response_profile.empty(None, None, Look(primary_latent=3)) == words.NOT_COMPUTED
    groups = trace_groups(planted(rows), without_truth(rows), n_clusters=4)
    look = Look(primary_latent=0)
    assert response_profile.reading(None, groups, look).startswith(
        "Latent 0: the mean rows of 2 of 4 clusters fire it; 79% of its activation is on cluster "
    )
    assert "feature" not in response_profile.table(None, groups, look)  # a group cannot be selected as a feature


# P3 ------------------------------------------------------------------------------------------------------------------


def test_two_humps_are_two_meanings(rows):
    causes, look = trace_causes(planted(rows), rows, latent=0), Look(primary_latent=0, primary_feature=1)
    found, table = causes.ridges(), ridges.table(None, causes, look)
    assert found.features.tolist() == [0, 1]
    assert found.counts.sum(axis=1).tolist() == [60, 60]
    for feature, code in ((0, 0.5**0.5 - 0.2), (1, 3 * 0.5**0.5 - 0.2)):
        (bin_,) = np.flatnonzero(found.counts[feature])
        assert found.edges[bin_] - 1e-6 <= code <= found.edges[bin_ + 1] + 1e-6
    assert table["rows"].sum() == len(causes.row) == 120
    assert table[table["cause"] == 0]["rows"].tolist() == [60]
    element = ridges(None, causes, look)
    blocks = element.traverse(lambda e: e, [hv.Rectangles])[0]
    assert list(blocks["rows"]) == table["rows"].tolist()
    assert list(labelled(element)["median"]["feature"]) == [0, 1]
    assert ridges.reading(None, causes, look) == (
        "Latent 0 fires on 120 of 240 rows: feature 0 is behind 50% (median code 0.507); feature 1 is behind 50% (median code 1.92)."
    )


def test_further_causes_are_one_ridge_and_no_row_is_lost():
    codes = torch.eye(WIDTH).repeat(3, 1)[: 2 * WIDTH + 3]
    rows = Activations(codes, codes, Truth(codes, torch.eye(WIDTH), torch.eye(WIDTH)))
    W = torch.ones(1, WIDTH)
    causes = trace_causes(SparseDictionary(W, W), rows, latent=0)
    found = causes.ridges(most=3)
    assert found.features.tolist() == [0, 1, 2, -2]
    assert found.counts.sum(axis=1).tolist() == [3, 3, 3, 10]
    assert ridges.table(None, causes, Look(primary_latent=0))["name"].iloc[-1] == "2 other features"


def test_without_truth_there_is_one_ridge(rows):
    causes, look = trace_causes(planted(rows), without_truth(rows), latent=0), Look(primary_latent=0)
    assert (causes.names, set(causes.feature.tolist()), len(causes.row)) == ((), {-1}, 120)
    assert UNKNOWN in ridges.reading(None, causes, look)
    assert UNKNOWN in hv.render(ridges(None, causes, look), backend="bokeh").title.text
    assert set(ridges.table(None, causes, look)["name"]) == {UNKNOWN}


def test_no_ridge_without_a_latent_or_for_a_silent_one(rows):
    silent = trace_causes(planted(rows), rows, latent=3)
    assert ridges.empty(None, silent, Look()) == words.NO_SELECTION
    assert ridges.empty(None, None, Look(primary_latent=3)) == words.NOT_COMPUTED
    assert ridges.empty(None, silent, Look(primary_latent=3)) == f"Never fired in {N} samples."
    assert silent.ridges().counts.shape == (0, 24)


# P4 ------------------------------------------------------------------------------------------------------------------


def together(n=60) -> tuple[SparseDictionary, Activations]:
    """Latent 1 fires on a third of latent 0's rows and nowhere else; 2 apart from both; 3 never."""
    x = torch.zeros(n, 4)
    x[::2, 0], x[::6, 1], x[1::2, 2] = 1.0, 2.0, 1.0
    return SparseDictionary(torch.eye(4), torch.eye(4)), Activations(x, x)


@pytest.mark.parametrize("block", [1, 11, None])
def test_conditional_rates_are_asymmetric(block):
    pairs = observe(*together(), [(count_pairs, {"latents": (2, 0, 3, 1)})], block=block)[0]
    place = {latent: k for k, latent in enumerate(pairs.latents.tolist())}
    rate = lambda j, k: pairs.conditional[place[j], place[k]]
    assert (rate(1, 0), rate(0, 1), rate(0, 2), rate(3, 0)) == (1, pytest.approx(1 / 3), 0, 0)
    assert abs(place[0] - place[1]) == 1
    assert pairs.fired[[place[i] for i in range(4)]].tolist() == [30, 10, 30, 0]


def test_the_matrix_shows_the_finding(rows):
    pairs, look = count_pairs(*together(), latents=(0, 1, 2)), Look(selected_latents=(0, 1, 2), primary_latent=0)
    cells = cofiring(None, pairs, look).traverse(lambda e: e, [hv.Rectangles])[0]
    assert list(cells["share"]) == pairs.conditional.ravel().tolist()
    assert (list(cells["given"][:3]), list(cells["also"][:3])) == ([pairs.latents[0]] * 3, pairs.latents.tolist())
    table = cofiring.table(None, pairs, look)
    assert len(table) == 6
    assert table.iloc[0].to_dict() == {"given": 1, "also": 0, "share": 1.0, "rows with both": 10, "rows of the given": 10}
    assert cofiring.reading(None, pairs, look) == (
        "3 selected latents on 60 rows. Most together: when latent 1 fires, latent 0 does on 100% of 10 rows; the other way 33% of 30."
    )
    for few in ((), (1,)):
        assert cofiring.empty(None, pairs, Look(selected_latents=few)) == words.NO_PAIRS == "Select 2 to 40 latents."


@pytest.mark.parametrize("block", [5, None])
def test_above_forty_the_strongest_are_kept_and_the_card_says_so(block):
    x = torch.rand(30, 50, generator=torch.Generator().manual_seed(0)) + torch.arange(50)
    scale = torch.linspace(2, 0.5, 50)[:, None]  # encoder and decoder scaled inversely: strength is not the code's alone
    dictionary = SparseDictionary(torch.eye(50) * scale, torch.eye(50) / scale)
    pairs = observe(dictionary, Activations(x, x), [(count_pairs, {"latents": tuple(range(50))})], block=block)[0]
    assert sorted(pairs.latents.tolist()) == list(range(50 - MOST, 50))
    assert sorted(pairs.strength) == pytest.approx(x.sum(dim=0)[50 - MOST :].tolist(), rel=1e-4)
    look = Look(selected_latents=tuple(range(50)))
    assert cofiring.reading(None, pairs, look).startswith("The 40 strongest of 50 selected latents.")
    hv.render(cofiring(None, pairs, look), backend="bokeh")


def test_pairs_of_a_latent_that_is_not_there():
    with pytest.raises(ValueError, match="latent 4 does not exist; there are 4"):
        count_pairs(*together(), latents=(1, 4))
    assert count_pairs(*together()).both.shape == (0, 0)


# A4 ------------------------------------------------------------------------------------------------------------------


def test_verdicts_and_residuals_of_planted_features(rows):
    dictionary = SparseDictionary(planted(rows).W_enc.detach(), planted(rows).W_dec.detach())
    found = score_recovery(dictionary, rows, tau=0.9)
    assert found.verdicts.tolist() == ["merged with 1", "merged with 1", "split into 2", "recovered"]
    # read by 2^-1/2 and written by half of both; nothing is left of one latent's, and two latents write feature 2 twice
    assert found.residual == pytest.approx([0.5**0.5, 0.5**0.5, 1, 0], abs=1e-5)
    shifted = replace(rows, inputs=rows.inputs + 5, targets=rows.inputs + 5)  # a constant of the rows that the decoder's bias holds
    with torch.no_grad():
        dictionary.b_dec.fill_(5.0)
        dictionary.b_enc.copy_(-5 * dictionary.W_enc.sum(dim=1))
    assert score_recovery(dictionary, shifted, tau=0.9).residual == pytest.approx(found.residual, abs=1e-4)


# the page ------------------------------------------------------------------------------------------------------------


def opened(explorer):
    frame = explorer.__panel__()
    explorer.state.page = "Latents"
    explorer.desk.settle()
    return frame, {card.view.id: card for card in frame.shown.cards}


@pytest.mark.slow
def test_cards_of_the_page_follow_the_selection(explorer):
    frame, cards = opened(explorer)
    assert list(cards) == ["P2", "P1", "P3", "P4", "P6"]
    assert cards["P4"].words.text == words.NO_PAIRS
    explorer.selection = (3, 5, 8)
    explorer.desk.settle()
    session, look = explorer.session, explorer.look()
    patterns = session.find(trace_patterns)
    assert cards["P2"].reading.text == selectivity.reading(patterns, None, session.find(check_health), None, look)
    causes, pairs = session.find(trace_causes, latent=3), session.find(count_pairs, latents=(3, 5, 8))
    for card, said, why in (
        (cards["P1"], response_profile.reading(patterns, None, look), response_profile.empty(patterns, None, look)),
        (cards["P3"], ridges.reading(None, causes, look), ridges.empty(None, causes, look)),
        (cards["P4"], cofiring.reading(None, pairs, look), None),
    ):
        assert (card.words.text if card.words.visible else card.reading.text) == (why or said)
    assert cards["P3"].python().splitlines()[-1] == "explorer.session.find(trace_causes, latent=3)"
    assert frame.shown.parts[-1].title.text == "What does latent 3 fire on?"
    frame.page.get_root()
    (source,) = cards["P2"]._link._sources.values()
    source.selected.indices = [4, 7]
    assert explorer.selection == (4, 7)


def test_the_truth_table_has_the_verdicts_of_the_finding(explorer):
    frame = explorer.__panel__()
    explorer.state.page = "Alignment"
    explorer.desk.settle()
    card = next(c for c in frame.shown.cards if c.view.id == "A4")
    scored = explorer.session.find(score_recovery, tau=explorer.state.tau)
    table = explorer.feature_table.sort_values("feature")
    assert table["verdict"].tolist() == scored.verdicts.tolist()
    assert table["residual"].tolist() == scored.residual.tolist()
    assert card.view.table(*card._kept.values, explorer.look()).equals(explorer.feature_table)
    explorer.state.tau = 0.5
    explorer.desk.settle()
    assert card._kept.values[-1].tau == 0.5


def test_a_setting_that_fails_is_said_on_its_card_and_the_page_stays(explorer, monkeypatch):
    _, cards = opened(explorer)
    whole = explorer.session.find

    def find(finding, **settings):
        if finding is trace_causes:
            raise ValueError("trace_causes: broken for a test.")
        return whole(finding, **settings)

    monkeypatch.setattr(explorer.session, "find", find)
    explorer.selection = (2,)
    explorer.desk.settle()
    assert cards["P3"].words.text == "trace_causes: broken for a test."
    assert cards["P2"].reading.text


def test_the_page_works_without_truth():
    from sdl_explorer import explore

    explorer = explore(torch.randn(300, 6, generator=torch.Generator().manual_seed(0)), n_latents=12)
    _, cards = opened(explorer)
    explorer.selection = (1, 2)
    explorer.desk.settle()
    assert cards["P2"].title.text == "Over how many clusters does each latent spread?"
    for card in cards.values():
        assert card.reading.text or card.words.text
        assert "nan" not in card.reading.text.lower().split()
    assert not any(card.words.visible and "truth" in card.words.text for card in cards.values())
    explorer.close()
    explorer.session.close()
