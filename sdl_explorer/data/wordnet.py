"""Glosses of English nouns with the tree above them: WordNet's `data.noun` (Miller 1995), which Debian's package wordnet-base holds.

A concept is a node of the hypernym tree, and its rows are the glosses of everything below it. A row's label is its path in the
tree, "animal > bird > bird of prey", so that any source with labels can carry a tree: `Concepts` reads it out of the names.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sdl_explorer.data.activations import Examples
from sdl_explorer.data.concepts import SEPARATOR
from sdl_explorer.data.minilm import load_minilm
from sdl_explorer.data.shards import MANIFEST
from sdl_explorer.data.store import Stored, as_labels

CATEGORIES = (
    "animal",
    "body part",
    "building",
    "chemical compound",
    "clothing",
    "disease",
    "feeling",
    "food",
    "furniture",
    "geographical area",
    "language",
    "musical instrument",
    "person",
    "plant",
    "sport",
    "vehicle",
    "weapon",
)
SAME = 0.9  # share of the rows of the concept above from which a concept is not told apart from it
_EXAMPLE = re.compile(r';\s*"')  # glosses end in quoted examples of use


@dataclass(frozen=True)
class Nouns:
    """Noun synsets in the order of the file. `parents` holds places in that order, the first hypernym first."""

    words: tuple[tuple[str, ...], ...]
    glosses: tuple[str, ...]
    parents: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        below: list[list[int]] = [[] for _ in self.words]
        for child, above in enumerate(self.parents):
            for parent in above:
                below[parent].append(child)
        return tuple(map(tuple, below))

    def descendants(self, synset: int) -> tuple[int, ...]:
        """Everything below a synset, by every hypernym, ascending; not the synset itself."""
        found, waiting = set(), [synset]
        while waiting:
            new = set(self.children[waiting.pop()]) - found
            found |= new
            waiting += new
        return tuple(sorted(found))

    def find(self, word: str) -> int:
        """The synset of a word with the most descendants: of "plant" the living one, not the factory."""
        meant = [i for i, words in enumerate(self.words) if word in words]
        if not meant:
            raise ValueError(f"Nouns: no noun {word!r} in {len(self):,} synsets; words are as WordNet spells them, with spaces.")
        return max(meant, key=lambda i: (len(self.descendants(i)), -i))

    def definition(self, synset: int) -> str:
        """The gloss without its examples of use."""
        return _EXAMPLE.split(self.glosses[synset])[0]


def read_nouns(path) -> Nouns:
    """The synsets of a `data.noun` file of WordNet 3.x (wndb(5WN)): words, gloss, and hypernyms, instances (@i) included.

    Raises FileNotFoundError with where to get the file, and ValueError with the line for a file that is cut short or is something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"read_nouns: {path} does not exist. It is in Debian's package wordnet-base, /usr/share/wordnet/data.noun: "
            "apt-get install wordnet-base, or, without root, make wordnet."
        )
    offsets: dict[int, int] = {}
    words, glosses, above = [], [], []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.startswith(b"  "):  # the licence
                continue
            try:
                offset, names, pointers, gloss = _parse(line.decode("utf-8"))
            except (ValueError, IndexError) as error:
                raise ValueError(
                    f"read_nouns: line {number} of {path} is no noun synset ({line[:40]!r}). The file is cut short or not WordNet's "
                    "data.noun; fetch it again."
                ) from error
            offsets[offset] = len(words)
            words.append(names)
            glosses.append(gloss)
            above.append(pointers)
    if not words:
        raise ValueError(f"read_nouns: {path} holds no synsets; it is empty or not WordNet's data.noun. Fetch it again.")
    for names, pointers in zip(words, above, strict=True):
        lost = [pointer for pointer in pointers if pointer not in offsets]
        if lost:
            raise ValueError(
                f"read_nouns: the hypernym {lost[0]:08d} of {names[0]!r} is not in {path}, which has {len(words):,} synsets. "
                "The file is cut short; fetch it again."
            )
    return Nouns(tuple(words), tuple(glosses), tuple(tuple(offsets[pointer] for pointer in pointers) for pointers in above))


def _parse(line: str) -> tuple[int, tuple[str, ...], tuple[int, ...], str]:
    """offset file n w_cnt (word id)* p_cnt (symbol offset pos source/target)* | gloss; w_cnt is hexadecimal."""
    fields, bar, gloss = line.partition(" | ")
    if not bar or not line.endswith("\n"):
        raise ValueError("no gloss, or no end")
    parts = fields.split()
    if len(parts[0]) != 8 or parts[2] != "n":
        raise ValueError("not a noun")
    n_words = int(parts[3], 16)
    pointers = parts[4 + 2 * n_words :]
    if n_words < 1 or len(pointers) != 1 + 4 * int(pointers[0]):
        raise ValueError("wrong number of words or pointers")
    names = tuple(name.replace("_", " ") for name in parts[4 : 4 + 2 * n_words : 2])
    up = tuple(int(pointers[i + 1]) for i in range(1, len(pointers), 4) if pointers[i] in ("@", "@i") and pointers[i + 2] == "n")
    return int(parts[0]), names, up, gloss.strip()


@dataclass(frozen=True)
class Glosses:
    """Rows to be embedded. `texts` is what a model reads, `shown` the word before it, `paths` where each stands in the tree."""

    texts: tuple[str, ...]
    shown: tuple[str, ...]
    paths: tuple[str, ...]


def draw_glosses(nouns: Nouns, n: int = 6_000, categories: Sequence[str] = CATEGORIES, least: int = 30, seed: int = 0) -> Glosses:
    """`n` glosses from below the categories, each with the path of its concepts.

    Small categories are taken whole and the others share the rest equally. A synset below several categories is left out, and one
    with the definition of another. From its category down a synset has one path, by its first hypernym inside the category; a
    concept is a node of that tree with at least `least` of the rows drawn, and at most 90 % of those of the concept above.
    """
    generator = np.random.default_rng(seed)
    roots = [nouns.find(name) for name in categories]
    inside = [{root, *nouns.descendants(root)} for root in roots]
    homes = Counter(i for ids in inside for i in ids)
    said = Counter(nouns.definition(i) for i in homes)
    fit = [
        [i for i in sorted(ids) if homes[i] == 1 and said[nouns.definition(i)] == 1 and i != root]
        for root, ids in zip(roots, inside, strict=True)
    ]
    shares = _share_out(n, [len(ids) for ids in fit])
    lines = {}
    for root, ids, around, share in zip(roots, fit, inside, shares, strict=True):
        for i in generator.permutation(ids)[:share]:
            lines[int(i)] = _lineage(nouns, int(i), root, around)
    counts = Counter(line[:depth] for line in lines.values() for depth in range(1, len(line) + 1))
    drawn = sorted(lines)
    texts = tuple(nouns.definition(i) for i in drawn)
    return Glosses(
        texts,
        tuple(f"{nouns.words[i][0]}: {text}" for i, text in zip(drawn, texts, strict=True)),
        tuple(SEPARATOR.join(nouns.words[k][0] for k in _told_apart(lines[i], counts, least)) for i in drawn),
    )


def _share_out(n: int, sizes: Sequence[int]) -> list[int]:
    """How many of each: the same number, or all where there are fewer; n in all."""
    if n > sum(sizes):
        raise ValueError(f"draw_glosses: n is {n:,}, and {sum(sizes):,} glosses are below one of these categories alone. Ask for fewer.")
    shares = [0] * len(sizes)
    for done, i in enumerate(sorted(range(len(sizes)), key=lambda i: sizes[i])):
        shares[i] = min(sizes[i], (n - sum(shares)) // (len(sizes) - done))
    return shares


def _lineage(nouns: Nouns, synset: int, root: int, inside: set[int]) -> tuple[int, ...]:
    """Synsets from the root down to this one, by the first hypernym inside; the synset itself is the last."""
    line = [synset]
    while line[-1] != root:
        line.append(next(parent for parent in nouns.parents[line[-1]] if parent in inside))
    return tuple(reversed(line))


def _told_apart(line: tuple[int, ...], counts: Counter, least: int) -> tuple[int, ...]:
    """The synsets of a line that are concepts; the root always is."""
    kept, above = [line[0]], counts[line[:1]]
    for depth in range(2, len(line) + 1):
        if least <= (rows := counts[line[:depth]]) <= SAME * above:
            kept.append(line[depth - 1])
            above = rows
    return tuple(kept)


def embed_glosses(glosses: Glosses, folder, batch_size: int = 64) -> Stored:
    """all-MiniLM-L6-v2's sentence embeddings (the mean over tokens, to norm 1) of the glosses, labelled by their paths.

    Kept in `folder`, which is read again where it holds these glosses; ValueError where it holds others. About 15 ms a gloss on one core.
    """
    folder = Path(folder)
    labels, label_names = as_labels(glosses.paths, ())
    if (folder / MANIFEST).exists():
        kept = Stored(folder)
        same = kept.examples is not None and [d[0] for d in kept.examples.documents] == list(glosses.shown)
        if not same or kept.labels is None or kept.label_names != label_names or not torch.equal(kept.labels, labels):
            raise ValueError(f"embed_glosses: {folder} holds other glosses. Give each choice of glosses a folder of its own.")
        return kept
    model, tokenizer = load_minilm()
    model.eval()
    order = sorted(range(len(glosses.texts)), key=lambda i: len(glosses.texts[i]))  # of like length together: less padding
    rows = torch.empty(len(order), model.config.hidden_size)
    with torch.no_grad(), tqdm(total=len(order), desc="embedding", unit="gloss", leave=False) as progress:
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            batch = tokenizer([glosses.texts[i] for i in some], padding=True, truncation=True, max_length=256, return_tensors="pt")
            mask = batch["attention_mask"][..., None]
            mean = (model(**batch).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)
            rows[some] = torch.nn.functional.normalize(mean, dim=1)
            progress.update(len(some))
    source = Stored(rows, labels=labels, label_names=label_names, examples=Examples.from_strings(glosses.shown))
    return Stored(source.save(folder))
