"""What a session can be compared with: whatever names another dictionary."""

from pathlib import Path
from typing import NamedTuple

from sdl_explorer.diagnosis.theory_seeds import Seeds
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.training.commits import Commit, CommitStore

ARMS = {"free": "without anchors", "anchored": "with anchors"}


class Other(NamedTuple):
    """A dictionary to compare with, what it is called, and how Python names it."""

    dictionary: SparseDictionary
    name: str
    python: str


def other_of(what, store: CommitStore, seeds: Seeds | None) -> Other:
    """The dictionary that `what` names.

        a commit of this run, or its id            a path to a run folder or to any file that `SparseDictionary.load` reads
        ("free" | "anchored", r)                   the r-th run of the session's last `train_seeds`
        a `SparseDictionary`, or anything with a `dictionary` (a `Session`)

    Raises FileNotFoundError for a text that is neither, ValueError and TypeError for the rest.
    """
    if isinstance(what, Commit) or (isinstance(what, str) and _is_commit(what, store)):
        commit = store[what]
        return Other(store.load_dictionary(commit), f"commit {commit.id} of step {commit.step}", repr(commit.id))
    if isinstance(what, str | Path):
        path = Path(what).expanduser()
        if not path.exists():
            known = ", ".join(commit.id for commit in list(store)[-5:])
            raise FileNotFoundError(
                f"compare_with: {str(what)!r} is no commit (the newest are {known}) and no file; give one of them, a run folder or a "
                "checkpoint."
            )
        return Other(SparseDictionary.load(path), path.name, repr(str(what)))
    if isinstance(what, tuple):
        return _seed(what, seeds)
    dictionary = getattr(what, "dictionary", what)
    if not isinstance(dictionary, SparseDictionary):
        raise TypeError(f"compare_with: {type(what).__name__} is no dictionary; give a commit, a path, a Session or a SparseDictionary.")
    word = "another session" if dictionary is not what else "another dictionary"
    return Other(dictionary, f"{word} of {dictionary.n_latents} latents", "other")


def _is_commit(text: str, store: CommitStore) -> bool:
    return any(commit.id == text for commit in store)


def _seed(what: tuple, seeds: Seeds | None) -> Other:
    arm, r = what
    if seeds is None:
        raise ValueError("compare_with: no other seeds are trained yet; train_seeds does, once something is anchored.")
    if arm not in ARMS or not 0 <= r < len(seeds.free):
        raise ValueError(
            f"compare_with: {what!r} is no seed; there are ('free', r) and ('anchored', r), r from 0 to {len(seeds.free) - 1}."
        )
    return Other(getattr(seeds, arm)[r], f"other seed {r + 1} {ARMS[arm]}, {seeds.n_steps} steps", repr(what))
