"""Labels survive what runs survive: reopening, branches, a kill in the middle of a write; and the pair that a person judges."""

import json

import pytest
import torch

from sdl_explorer import HierarchyBench, Session, SparseDictionary, Stored, TopK, realise_pair
from sdl_explorer.data.sources import stream
from sdl_explorer.diagnosis.candidates import suspect_absorption
from sdl_explorer.labels import CONFIRMED, REJECTED, Label, LabelStore
from sdl_explorer.models.methods.topk import TopKSelection
from sdl_explorer.views.candidates import candidate_forest
from sdl_explorer.views.words import NO_CANDIDATES


def edge(parent=0, child=1, says=CONFIRMED, **more) -> Label:
    return Label((parent, child), says, **more)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "labels.jsonl"


def test_the_last_word_counts_and_an_empty_one_takes_it_back(path):
    for store in (LabelStore(), LabelStore(path)):
        store.add(edge())
        store.add(edge(2, 3, note="zwei\nLines – ✓"))
        store.add(edge(says=REJECTED, step=7))
        assert dict(store) == {(0, 1): edge(says=REJECTED, step=7), (2, 3): edge(2, 3, note="zwei\nLines – ✓")}
        store.add(edge(says=""))
        assert list(store) == [(2, 3)] and len(store.history) == 4 and store.get((0, 1)) is None
    assert LabelStore(path).history == store.history and path.read_bytes().count(b"\n") == 4


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_a_kill_in_the_middle_of_a_write_leaves_whole_lines(path, cut):
    store = LabelStore(path)
    store.add(edge())
    whole = path.read_bytes()
    store.add(edge(2, 3, note="é" * 30))
    line = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + line[:cut])  # not even a character need be whole
    opened = LabelStore(path)
    assert opened.history == (edge(),)
    opened.add(edge(4, 5))
    assert LabelStore(path).history == (edge(), edge(4, 5)) and path.read_bytes().startswith(whole)


WRONG = ('{"about": [0]}', '{"about": 3, "says": "x"}', '{"about": ["a"], "says": "x"}')


@pytest.mark.parametrize("line", ["not JSON", "[1, 2]", *(one.replace("{", '{"format_version": 1, ') for one in WRONG)])
def test_a_damaged_line_is_named(path, line):
    LabelStore(path).add(edge())
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(ValueError, match=r"labels.jsonl, line 2: .* is no label .*mend the line or remove it"):
        LabelStore(path)


def test_a_file_of_a_later_version_is_refused(path):
    path.write_text(json.dumps({"format_version": 99, "about": [0], "says": "x"}) + "\n")
    with pytest.raises(ValueError, match=r"line 1: format_version is 99, .* upgrade it"):
        LabelStore(path)


def test_another_reader_sees_new_lines(path):
    writer, reader = LabelStore(path), LabelStore(path)
    writer.add(edge())
    assert dict(reader) == dict(writer) and len(reader) == 1


# in a session --------------------------------------------------------------------------------------------------------


@pytest.fixture
def session():
    with Session(HierarchyBench(parents=1, children=1, independent=2, d_in=4), TopK(k=1), n_latents=8, batch_size=16) as session:
        yield session


def test_labels_survive_saving_opening_branching_and_copying(session, tmp_path):
    made = session.label((2, 5), CONFIRMED, note="looks right")
    assert made == Label((2, 5), CONFIRMED, "looks right", session.step, session.head.id) == session.labels[2, 5]
    session.save(tmp_path / "run")
    session.label(3, "odd")
    version = session.version
    session.label((2, 5), REJECTED)
    assert session.version > version  # whoever looks at it sees it
    with session.branch() as twin:
        twin.label(1, "mine")
        assert set(twin.labels) == {(2, 5), (3,), (1,)} and (1,) not in session.labels
    with Session.open(tmp_path / "run") as follower:
        assert {about: label.says for about, label in follower.labels.items()} == {(2, 5): REJECTED, (3,): "odd"}
        session.label(4, "later")
        assert (4,) in follower.labels
        with pytest.raises(PermissionError, match="label: this session follows"):
            follower.label(1, "no")
    session.close()
    with Session.open(tmp_path / "run") as opened:
        assert set(opened.labels) == {(2, 5), (3,), (4,)}
        opened.save(tmp_path / "copy")
        opened.label(4, "")
    assert set(LabelStore(tmp_path / "copy" / "labels.jsonl")) == {(2, 5), (3,)}
    assert set(LabelStore(tmp_path / "run" / "labels.jsonl")) == {(2, 5), (3,), (4,)}


@pytest.mark.parametrize("about", [8, (1, 1), (), -1])
def test_only_latents_that_exist_are_labelled(session, about):
    with pytest.raises(ValueError, match="label"):
        session.label(about, CONFIRMED)
    assert not session.labels


# the linear programme of one pair ------------------------------------------------------------------------------------


def two(cosine: float, **settings) -> SparseDictionary:
    rows = torch.tensor([[1.0, 0.0, 0.0], [cosine, (1 - cosine**2) ** 0.5, 0.0], [0.0, 0.0, 1.0]])
    return SparseDictionary(rows, rows.clone(), **settings)


@pytest.mark.parametrize("cosine", [-0.3, 0.0, 0.6, 0.95])
def test_the_margin_is_that_of_two_directions(cosine):
    found = realise_pair(two(cosine), 0, 1)
    assert found.realisation.realisable and found.n_directions == 2 and not found.competes
    assert 0.4 * ((1 - cosine) / 2) ** 0.5 < found.realisation.margin <= ((1 - cosine) / 2) ** 0.5 + 1e-6  # a row along their difference
    assert str(found).startswith(f"Realisable (margin {found.realisation.margin:.3g}")
    assert "which stand in for true features" in str(found) and "competition" not in str(found)


def test_one_direction_cannot_be_told_from_itself():
    found = realise_pair(two(1.0), 0, 1)
    assert found.realisation.verdict == "not realisable" and "Not realisable:" in str(found)


def test_competition_is_named_and_what_does_not_apply_is_refused():
    found = realise_pair(two(0.5, nonlinearity=TopKSelection(1)), 1, 0)
    assert found.competes and "competition between latents is left out" in str(found)
    with pytest.raises(ValueError, match="decoder rows are no inputs"):
        realise_pair(SparseDictionary(torch.eye(3), torch.ones(3, 2)), 0, 1)
    for pair in ((0, 0), (0, 3), (-1, 1)):
        with pytest.raises(ValueError, match="give two different ones"):
            realise_pair(two(0.5), *pair)


# the card ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def absorbing():
    """Rows without truth, of a tree whose parents are absorbed by two children each."""
    source = HierarchyBench()
    W_enc, W_dec = source.features.clone(), source.features.clone()
    for parent in (0, 4, 8):
        for child in (parent + 1, parent + 2):
            W_enc[parent] -= source.features[child]
            W_dec[child] += source.features[parent]
    rows = source.sample(20_000, stream(0, "rows")).inputs
    with Session(Stored(rows), dictionary=SparseDictionary(W_enc, W_dec)) as session:
        yield session


@pytest.mark.slow
def test_a_person_confirms_and_rejects_and_the_table_says_so(absorbing):
    import asyncio

    from sdl_explorer import Explorer
    from sdl_explorer.widgets.pair import PairForm

    explorer = Explorer(absorbing)
    frame = explorer.__panel__()
    explorer.state.page = "Absorption"
    explorer.desk.settle()
    part = next(part for part in frame.shown.parts if isinstance(part, PairForm))
    cards = {card.view.id: card for card in frame.shown.cards}
    part.refresh()
    parent, child = part.edge().parent, part.edge().child
    assert part.said.text.endswith(f"latent {child} instead of latent {parent}. Not labelled.")
    assert (part.confirm.disabled, part.reject.disabled, part.back.disabled) == (False, False, True)
    asyncio.run(part._label(CONFIRMED))
    explorer.desk.settle()
    part.refresh()
    assert part.said.text.endswith("Labelled confirmed at step 0.") and part.confirm.disabled and not part.back.disabled
    assert absorbing.labels[parent, child].says == CONFIRMED
    assert " Labelled: 1 confirmed." in cards["H5"].reading.text and "Labelled confirmed at step 0." in cards["H6"].reading.text
    table = candidate_forest.table(*cards["H5"]._kept.values, explorer.look())
    assert table.set_index(["parent", "latent"])["label"].to_dict()[parent, child] == CONFIRMED
    assert (table["label"] == "").sum() == len(table) - 1
    asyncio.run(part._realise())
    part.refresh()
    assert part.found.text == str(realise_pair(absorbing.dictionary, parent, child)) and "ealisable" in part.found.text
    other = next(c for c in explorer.desk.value(suspect_absorption).candidates if (c.parent, c.child) != (parent, child))
    explorer.desk.select(latents=(other.child,))
    part.refresh()
    assert part.said.text.endswith("Not labelled.") and part.found.text == ""
    explorer.close()


@pytest.mark.slow
def test_without_a_candidate_there_is_nothing_to_judge():
    from sdl_explorer import Explorer
    from sdl_explorer.widgets.pair import PairForm

    with Session(Stored(torch.randn(200, 6, generator=torch.Generator().manual_seed(0))), n_latents=6, method=TopK(k=1)) as session:
        explorer = Explorer(session)
        frame = explorer.__panel__()
        explorer.state.page = "Absorption"
        explorer.desk.settle()
        part = next(part for part in frame.shown.parts if isinstance(part, PairForm))
        part.refresh()
        assert part.said.text == NO_CANDIDATES
        assert all(one.disabled for one in (part.confirm, part.reject, part.back, part.realise))
        explorer.close()


@pytest.mark.slow
def test_what_is_said_of_a_latent_is_in_its_table_and_in_the_inspector(session):
    from sdl_explorer import Explorer

    explorer = Explorer(session)
    explorer.__panel__()
    explorer.selection = (3,)
    explorer.desk.settle()
    assert "label" not in explorer.latent_table and "Labelled" not in " ".join(explorer.desk.inspect()[0])
    session.label((2, 5), CONFIRMED)
    session.label(3, "odd", "fires on names")
    table = explorer.latent_table
    assert table["label"].tolist() == ["", "", "", "odd", *[""] * 4] and table["note"][3] == "fires on names"
    assert explorer.desk.inspect()[0][-1] == f"Labelled odd at step {session.step}. fires on names"
    explorer.close()
