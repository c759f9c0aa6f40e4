"""WordNet's nouns: a file of a few made-up synsets, and the tree of concepts that labels carry."""

import numpy as np
import pytest
import torch

from sdl_explorer.data import wordnet
from sdl_explorer.data.activations import Activations, Truth
from sdl_explorer.data.concepts import Concepts
from sdl_explorer.data.store import Stored
from sdl_explorer.data.wordnet import Glosses, draw_glosses, embed_glosses, read_nouns

LICENCE = "  1 This software and database is being provided to you, the LICENSEE  \n"
# name -> (words, hypernyms with their symbols, gloss)
TREE = {
    1: (["thing"], [], 'whatever there is; "a thing of beauty"'),
    2: (["beast", "living_beast"], [(1, "@")], "a made-up animal"),
    3: (["flyer"], [(2, "@")], 'a beast that flies; "the flyer flew"; "it flies"'),
    4: (["swimmer"], [(2, "@")], "a beast; swims"),
    5: (["duck"], [(3, "@"), (4, "@")], "flies and swims"),
    6: (["tool"], [(1, "@")], "a made-up tool"),
    7: (["hammer"], [(6, "@")], "hits nails"),
    8: (["old_hammer"], [(7, "@i")], "a hammer of long ago"),
    9: (["beast"], [(6, "@")], "a machine for lifting"),
}


def line(offset, words, above, gloss) -> str:
    names = " ".join(f"{word} 0" for word in words)
    pointers = " ".join(f"{symbol} {parent:08d} n 0000" for parent, symbol in [*above, (1, "%p")])
    return f"{offset:08d} 03 n {len(words):02x} {names} {len(above) + 1:03d} {pointers} | {gloss}  \n"


def write(path, tree=None, licence=LICENCE):
    path.write_text(licence + "".join(line(offset, *entry) for offset, entry in (tree or TREE).items()))
    return path


@pytest.fixture
def nouns(tmp_path):
    return read_nouns(write(tmp_path / "data.noun"))


def test_synsets_words_glosses_and_edges(nouns):
    assert len(nouns) == len(TREE)
    assert nouns.words[1] == ("beast", "living beast")
    assert nouns.parents == ((), (0,), (1,), (1,), (2, 3), (0,), (5,), (6,), (5,))
    assert nouns.definition(2) == "a beast that flies"
    assert nouns.definition(3) == "a beast; swims"


def test_descendants_go_by_every_hypernym_and_a_word_means_its_largest_synset(nouns):
    assert nouns.descendants(1) == (2, 3, 4)
    assert nouns.descendants(3) == (4,)
    assert nouns.descendants(0) == tuple(range(1, 9))
    assert nouns.find("beast") == 1
    with pytest.raises(ValueError, match="no noun 'yeti' in 9 synsets"):
        nouns.find("yeti")


def test_a_missing_file_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="wordnet-base"):
        read_nouns(tmp_path / "data.noun")


def test_a_file_that_is_cut_short_inside_a_line(tmp_path):
    path = write(tmp_path / "data.noun")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"line 10 of .*cut short"):
        read_nouns(path)


def test_a_file_that_is_cut_short_between_lines(tmp_path):
    last_first = dict(reversed(TREE.items()))
    del last_first[1]
    with pytest.raises(ValueError, match=r"hypernym 00000001 of .* is not in .*cut short"):
        read_nouns(write(tmp_path / "data.noun", last_first))


@pytest.mark.parametrize(
    "text", ["", LICENCE, "word,gloss\ndog,an animal\n", "00001740 29 v 01 breathe 0 000 | draw air\n", "\x00\x01\xff"]
)
def test_a_foreign_file(tmp_path, text):
    path = tmp_path / "data.noun"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"read_nouns: .*data\.noun"):
        read_nouns(path)


def big_tree() -> dict:
    """Two categories: beasts of two kinds, one with a chain of one kind below it, and tools."""
    tree = {
        1: (["thing"], [], "all"),
        2: (["beast"], [(1, "@")], "beasts"),
        3: (["tool"], [(1, "@")], "tools"),
        4: (["flyer"], [(2, "@")], "flying"),
        5: (["swimmer"], [(2, "@")], "swimming"),
        6: (["bird"], [(4, "@")], "birds"),
    }
    for i in range(20):
        tree[100 + i] = ([f"bird_{i}"], [(6, "@")], f"bird number {i}")
        tree[200 + i] = ([f"fish_{i}"], [(5, "@")], f"fish number {i}")
        tree[300 + i] = ([f"tool_{i}"], [(3, "@")], f"tool number {i}")
    tree[400] = (["swiss_beast"], [(2, "@"), (3, "@")], "both")
    tree[401] = (["twin_a"], [(5, "@")], "the same words")
    tree[402] = (["twin_b"], [(5, "@")], "the same words")
    return tree


def test_drawn_glosses_have_one_path_of_concepts_that_can_be_told_apart(tmp_path):
    nouns = read_nouns(write(tmp_path / "data.noun", big_tree()))
    glosses = draw_glosses(nouns, 50, ("beast", "tool"), least=5)
    assert len(set(glosses.texts)) == len(glosses.paths) == 50
    assert not {"both", "the same words", "beasts", "tools"} & set(glosses.texts)
    assert set(glosses.paths) == {"beast > flyer", "beast > swimmer", "tool"}  # all but one of the flyers are birds
    at = glosses.texts.index("bird number 3") if "bird number 3" in glosses.texts else glosses.texts.index("bird number 4")
    assert glosses.paths[at] == "beast > flyer" and glosses.shown[at].startswith("bird ")
    assert sum(path == "tool" for path in glosses.paths) == 20  # the smaller category whole
    assert draw_glosses(nouns, 50, ("beast", "tool"), least=5) == glosses
    with pytest.raises(ValueError, match="n is 5,000, and 63 glosses"):
        draw_glosses(nouns, 5_000, ("beast", "tool"))


class Reader(torch.nn.Module):
    """Stands for the transformer: the embedding of a token is its id."""

    class config:
        hidden_size = 3

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, input_ids, attention_mask):
        self.calls += 1
        hidden = torch.stack([input_ids.float(), torch.ones_like(input_ids), input_ids.float() ** 2], dim=2)
        return type("Output", (), {"last_hidden_state": hidden})


def tokens(texts, padding, truncation, max_length, return_tensors):
    ids = [[len(word) for word in text.split()] for text in texts]
    longest = max(map(len, ids))
    padded = torch.tensor([[*row, *[99] * (longest - len(row))] for row in ids])
    return {"input_ids": padded, "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])}


def test_embeddings_are_means_over_tokens_kept_and_read_again(tmp_path, monkeypatch):
    reader = Reader()
    monkeypatch.setattr(wordnet, "load_minilm", lambda: (reader, tokens))
    texts = tuple(" ".join(["abc"[: 1 + (i + j) % 3] for j in range(1 + i % 4)]) for i in range(12))
    paths = tuple("a > b" if i % 2 else "a" for i in range(12))
    glosses = Glosses(texts, tuple(f"w{i}: {text}" for i, text in enumerate(texts)), paths)
    source = embed_glosses(glosses, tmp_path / "rows", batch_size=5)
    rows = source.sample(12, torch.Generator(), "train").inputs
    ids = [torch.tensor([len(word) for word in text.split()]).float() for text in texts]
    expected = torch.stack([torch.tensor([i.mean(), 1.0, (i**2).mean()]) for i in ids])
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(rows, expected[source.part("train")])
    assert source.label_names == ("a", "a > b") and source.examples.piece(3) == f"w3: {texts[3]}"
    calls = reader.calls
    assert embed_glosses(glosses, tmp_path / "rows").fingerprint() == source.fingerprint()
    assert reader.calls == calls
    with pytest.raises(ValueError, match="holds other glosses"):
        embed_glosses(Glosses(texts, glosses.shown, tuple(reversed(paths))), tmp_path / "rows")


def test_labels_are_a_tree_of_concepts():
    names = ("animal > bird > owl", "animal > fish", "tool", "animal > bird")
    concepts = Concepts.from_labels([0, 1, 2, 3, 0, 7], names)
    assert concepts.paths == ("animal", "animal > bird", "animal > bird > owl", "animal > fish", "label 7", "tool")
    assert concepts.names == ("animal", "bird", "owl", "fish", "label 7", "tool")
    assert concepts.parents == (None, 0, 1, 0, None, None)
    assert concepts.children(0) == (1, 3)
    expected = np.array(
        [[1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]]
    )
    np.testing.assert_array_equal(concepts.member, expected.astype(bool))


def test_concepts_of_a_truth_have_its_directions():
    codes = torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    truth = Truth(codes, torch.eye(2), torch.eye(2), parents=(None, 0), names=("p", "c"))
    concepts = Concepts.from_truth(Activations(codes, codes, truth=truth))
    assert concepts.names == ("p", "c") and concepts.parents == (None, 0)
    np.testing.assert_array_equal(concepts.member, [[True, False], [True, True]])
    with pytest.raises(ValueError, match="no truth"):
        Concepts.from_truth(Activations(codes, codes))


def test_a_stored_source_keeps_the_tree(tmp_path):
    source = Stored(torch.randn(20, 4), labels=["a > b"] * 10 + ["c"] * 10)
    kept = Stored(source.save(tmp_path / "rows"))
    concepts = Concepts.from_labels(kept.labels, kept.label_names)
    assert concepts.paths == ("a", "a > b", "c")
    np.testing.assert_array_equal(concepts.member.sum(axis=0), [10, 10, 10])
