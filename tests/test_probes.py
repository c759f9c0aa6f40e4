"""SAEBench's absorption of concepts: planted answers, what must not change it, and dictionaries with nothing to absorb."""

from dataclasses import replace

import holoviews as hv
import numpy as np
import pytest
import torch

from sdl_explorer import SparseDictionary, TopK, score_absorption
from sdl_explorer.data.activations import Activations, Examples, Truth
from sdl_explorer.diagnosis.logistic import MainLatents, f1_score
from sdl_explorer.diagnosis.observe import observe
from sdl_explorer.views.concepts import NO_LABELS, children, concepts, openable, opened
from sdl_explorer.views.look import Look

N, SHARE, WIDTH = 500, 0.04, 6  # rows with the parent; of them with the child; columns
DELTAS = (0.0, 0.3, 0.4, 0.5, 0.8, 1.0)
FRACTION = {0.0: 0, 0.3: 0, 0.4: 0.4, 0.5: 0.5, 0.8: 0.8, 1.0: 1}  # delta from a share of 0.4 on


def features() -> torch.Tensor:
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)))[0][:3]


def planted(noise=0.0, share=SHARE, order=None) -> Activations:
    """A parent f0, its child f1 in `share` of its rows, and as many rows of f2 alone; labelled, with truth, each row with a text."""
    codes = torch.zeros(2 * N, 3)
    codes[:N, 0] = 1
    codes[: round(N * share), 1] = 1
    codes[N:, 2] = 1
    rows = torch.randperm(2 * N, generator=torch.Generator().manual_seed(2)) if order is None else order
    codes = codes[rows]
    inputs = codes @ features() + noise * torch.randn(2 * N, WIDTH, generator=torch.Generator().manual_seed(3))
    labels = torch.where(codes[:, 2] > 0, 2, codes[:, 1].long())
    truth = Truth(codes, features(), features(), parents=(None, 0, None), names=("parent", "child", "other"))
    texts = Examples.from_strings(["only parent", "with child", "other"][i] for i in labels)
    return Activations(inputs, inputs, truth, labels, ("parent", "parent > child", "other"), texts)


def absorbing(delta: float) -> SparseDictionary:
    """e0 = f0 - delta f1, w1 = f1 + delta f0: perfect reconstruction for every delta (arXiv 2409.14507, A.2)."""
    f0, f1, f2 = features()
    return SparseDictionary(torch.stack([f0 - delta * f1, f1, f2]), torch.stack([f0, f1 + delta * f0, f2]))


@pytest.mark.parametrize(
    ("delta", "settings"),
    [*((delta, {}) for delta in DELTAS), (1.0, {"most_main": 1}), (0.4, {"folds": 2, "most_rows": 900, "least": 10})],
    ids=str,
)
def test_the_closed_form_table(delta, settings):
    found = score_absorption(absorbing(delta), planted(), of="truth", **settings)
    parent = found.of("parent")
    (taken,) = parent.below
    assert taken.fraction == pytest.approx(FRACTION[delta], abs=1e-5)
    assert taken.full == (delta == 1)
    assert taken.recall == (delta < 1)
    assert parent.main == (0,) and parent.probe_f1 == 1
    assert parent.n_tested == parent.n
    assert parent.fraction == pytest.approx(FRACTION[delta] * taken.n / parent.n, abs=1e-6)
    if FRACTION[delta]:
        assert (taken.latent, taken.n_taken) == (1, taken.n)
        assert taken.share == pytest.approx(delta, abs=1e-5)
        assert parent.absorbers == ((1, taken.n / parent.n),)
        assert set(taken.texts) == {"with child"}
        table = found.children("parent")
        assert table["latent"].tolist() == [1] and table["examples"][0] == "\n".join(["with child"] * 3)
    else:
        assert (taken.latent, taken.n_taken, taken.share, taken.rows) == (-1, 0, 0, ())
    for other in ("child", "other"):
        assert found.of(other).fraction == 0 and found.of(other).recall == 1


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_labels_with_fitted_probes(noise):
    """Not exact: a probe of the parent leans away from what is no parent."""
    rows = planted(noise)
    for delta in (0.0, 1.0):
        found = score_absorption(absorbing(delta), rows)
        parent = found.of("parent")
        assert parent.probe_f1 > 0.99 and parent.main[0] == 0
        assert parent.below[0].name == "child" and parent.below[0].n == round(N * SHARE)
        if delta == 0:
            assert parent.fraction == parent.full == 0 and parent.recall == 1
        if delta == 1:
            assert parent.below[0].fraction > 0.95 and parent.below[0].latent == 1
            assert parent.recall == pytest.approx(1 - SHARE, abs=0.03) and parent.recall < 1


def test_a_child_with_many_rows_is_a_main_latent_unless_only_one_is_allowed():
    """SAEBench calls this splitting; with one main latent it counts as absorption."""
    rows = planted(share=0.4)
    many, one = (score_absorption(absorbing(1.0), rows, of="truth", most_main=most).of("parent") for most in (10, 1))
    assert sorted(many.main) == [0, 1] and many.fraction == 0 and many.recall == 1
    assert one.main == (0,) and one.full == pytest.approx(0.4) and one.fraction == pytest.approx(0.4) and one.recall == pytest.approx(0.6)


def assert_same(a, b, ids=None):
    """`ids[i]`: what latent i of b is called in a."""
    name = lambda latent: latent if ids is None or latent < 0 else int(ids[latent])
    assert len(a.concepts) == len(b.concepts) and a.n_left_out == b.n_left_out
    for x, y in zip(a.concepts, b.concepts, strict=True):
        assert (x.concept, x.path, x.parent, x.n, x.n_tested) == (y.concept, y.path, y.parent, y.n, y.n_tested)
        assert x.main == tuple(map(name, y.main))
        for field in ("probe_f1", "main_f1", "recall", "full", "fraction"):
            assert getattr(x, field) == pytest.approx(getattr(y, field), abs=1e-4)
        assert sorted(x.absorbers) == sorted((name(i), share) for i, share in y.absorbers)
        assert [(t.concept, t.n, t.n_taken) for t in x.below] == [(t.concept, t.n, t.n_taken) for t in y.below]
        assert [t.latent for t in x.below] == [name(t.latent) for t in y.below]


def messy(seed=0) -> tuple[SparseDictionary, Activations]:
    """More latents than features, noise, and a parent that two latents share."""
    generator = torch.Generator().manual_seed(seed)
    base = absorbing(0.6)
    extra = 0.4 * torch.randn(5, WIDTH, generator=generator)
    dictionary = SparseDictionary(
        torch.cat([base.W_enc, extra]), torch.cat([base.W_dec, torch.randn(5, WIDTH, generator=generator)]), b_enc=torch.full((8,), -0.05)
    )
    return dictionary, planted(0.1, share=0.2)


@pytest.mark.parametrize("of", ["labels", "truth"])
def test_permuting_latents_permutes_the_finding(of):
    dictionary, rows = messy()
    ids = torch.randperm(8, generator=torch.Generator().manual_seed(5))
    permuted = SparseDictionary(dictionary.W_enc[ids], dictionary.W_dec[ids], dictionary.b_enc[ids], dictionary.b_dec)
    assert_same(score_absorption(dictionary, rows, of=of), score_absorption(permuted, rows, of=of), ids)


def test_lengths_and_scales_change_nothing():
    dictionary, rows = messy()
    found = score_absorption(dictionary, rows)
    s = torch.linspace(0.2, 5, 8)[:, None]
    stretched = SparseDictionary(dictionary.W_enc * s, dictionary.W_dec / s, dictionary.b_enc * s[:, 0], dictionary.b_dec)
    assert_same(found, score_absorption(stretched, rows))
    scaled = SparseDictionary(
        dictionary.W_enc / 3, dictionary.W_dec * 7, dictionary.b_enc, dictionary.b_dec, input_scale=3.0, target_scale=7.0
    )
    assert_same(found, score_absorption(scaled, rows))


@pytest.mark.parametrize("block", [13, 5_000])
def test_blocks_of_any_size_give_the_same(block):
    dictionary, rows = messy()
    (found,) = observe(dictionary, rows, [score_absorption], block=block)
    assert_same(score_absorption(dictionary, rows), found)


def test_an_untrained_dictionary_absorbs_nothing_and_says_how_little_it_knows():
    """In 64 dimensions no random row is near a concept: a score of 0 is no merit."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0][:3]
    codes = planted().truth.codes
    inputs = codes @ directions + 0.1 * torch.randn(len(codes), 64, generator=generator)
    rows = Activations(inputs, inputs, labels=planted().labels, label_names=planted().label_names)
    untrained = TopK(k=2).build(d_in=64, d_out=64, n_latents=32, generator=generator)
    found = score_absorption(untrained, rows, most_main=1)
    trained = score_absorption(SparseDictionary(directions, directions), rows, most_main=1)
    assert found.n_concepts == trained.n_concepts == 3
    assert found.mean_full == found.mean_fraction == 0
    assert found.mean_recall < trained.mean_recall - 0.2
    assert f"recall {found.mean_recall:.2f}" in repr(found)


def test_a_dictionary_that_never_fires_has_numbers():
    silent = SparseDictionary(torch.zeros(4, WIDTH), torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0)))
    found = score_absorption(silent, planted(0.1))
    assert found.mean_recall == 0 and found.mean_full == found.mean_fraction == 0
    assert np.isfinite(found.table()[["probe F1", "main F1", "recall", "full", "fraction"]].to_numpy()).all()


def test_labels_that_are_noise_are_not_judged():
    dictionary, rows = messy()
    labels = torch.randint(0, 4, (rows.n,), generator=torch.Generator().manual_seed(0))
    found = score_absorption(dictionary, Activations(rows.inputs, rows.inputs, labels=labels))
    assert len(found.concepts) == 4 and found.n_concepts == 0
    assert found.mean_fraction is found.mean_full is found.mean_recall is None
    assert "none with a probe of F1 above 0.6" in repr(found)


def test_what_cannot_be_asked():
    dictionary, rows = messy()
    bare = Activations(rows.inputs, rows.inputs)
    with pytest.raises(ValueError, match=r"no labels\. Give Stored or capture labels="):
        score_absorption(dictionary, bare)
    with pytest.raises(ValueError, match="no truth"):
        score_absorption(dictionary, bare, of="truth")
    with pytest.raises(ValueError, match='"labels" or "truth"'):
        score_absorption(dictionary, rows, of="anchors")
    with pytest.raises(ValueError, match="folds=1"):
        score_absorption(dictionary, rows, folds=1)
    found = score_absorption(dictionary, rows, least=150)
    assert found.n_left_out == 1
    with pytest.raises(ValueError, match="no concept 'child' among 2 with enough rows"):
        found.of("child")


def test_main_latents_are_those_that_tell_the_concept():
    """Two latents share the rows out: both are needed; a third that always fires brings nothing."""
    from scipy import sparse

    mine = np.arange(200) < 80
    codes = np.zeros((200, 5))
    codes[:40, 3] = codes[40:80, 1] = 1
    codes[:, 2] = 0.5
    found = MainLatents.choose(sparse.csr_array(codes), mine, most=10, jump=0.03)
    assert set(found.latents) == {1, 3}
    assert f1_score(mine, found.predict(sparse.csr_array(codes))) == 1
    np.testing.assert_array_equal(found.fire(sparse.csr_array(codes)), mine)
    assert len(MainLatents.choose(sparse.csr_array(codes), mine, most=1, jump=0.03).latents) == 1


# what the cards show -------------------------------------------------------------------------------------------------


def test_a_concept_is_opened_and_its_absorbers_can_be_selected():
    found, look = score_absorption(absorbing(1.0), planted(), of="truth"), Look()
    marks, *_ = [e for e in children(found, look).traverse(lambda e: e, [hv.Points]) if "latent" in e]
    assert marks["latent"].tolist() == children.ids(found, look).tolist() == [1]
    assert marks["fraction"].tolist() == [1.0]
    said = children.reading(found, look)
    assert said.startswith("parent: its main latents 0 fire on 96% of its rows; fraction 0.04. On child, latent 1 writes 100% of it")
    assert "“with child”" in said
    table = children.table(found, look)
    assert (table["child"].tolist(), table["latent"].tolist(), table["rows taken"].tolist()) == (["child"], [1], [round(N * SHARE)])
    assert [one.name for one in openable(found)] == ["parent"]
    assert opened(replace(found, opened=0)).name == "parent"


def test_concepts_stand_by_their_fraction_with_their_recall_beside():
    found, look = score_absorption(absorbing(0.8), planted(share=0.2), of="truth", most_main=1), Look()
    element = concepts(found, None, look)
    (bars,) = element.traverse(lambda e: e, [hv.Rectangles])
    (recall,) = [e for e in element.traverse(lambda e: e, [hv.Points]) if len(e)]
    assert bars["concept"].tolist()[0] == "parent" and bars["fraction"].tolist() == pytest.approx([0.16, 0, 0], abs=1e-4)
    assert recall["recall"].tolist() == [1, 1, 1]
    assert concepts.reading(found, None, look).endswith("Most absorbed: parent, fraction 0.16, by latents 1.")


def test_without_labels_the_cards_say_so():
    assert children.empty(None) == concepts.empty(None, None) == NO_LABELS
    silent = score_absorption(absorbing(1.0), planted(), least=300)
    assert "None of" not in concepts.reading(silent, None, Look())
    nobody = replace(silent, concepts=())
    assert concepts.empty(nobody, None).startswith("None of 0 labelled concepts has a probe with F1 above 0.6")
