"""Commits: every change of the model can be undone, branched and replayed.

One folder a commit:

    commits/<id>/commit.json             the record, settings and scalars of the state (format_version)
    commits/<id>/dictionary.safetensors  the weights, a native dictionary file
    commits/<id>/training.safetensors    optimiser moments, counters and pins; thinned commits lack it

A commit is written beside its place, synced and renamed, so that a killed process leaves whole commits only.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sdl_explorer.data.anchors import Anchors, Pins, Pulls
from sdl_explorer.models.atomic import replace_directory, write_file
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.formats.files import read_json, read_tensors, tensor_bytes
from sdl_explorer.training.optim import Schedule, name_of, optimiser_for, progress
from sdl_explorer.training.state import TrainState

FORMAT_VERSION = 1
PULLS = ("latents", "directions", "weight")
HEADERS = 8_192  # bytes; an upper bound for the headers of both tensor files


@dataclass(frozen=True)
class Commit:
    """One point of the model's history. `kind`: start, run, auto, settings, manual, or an intervention's name."""

    id: str
    parent: str | None
    step: int
    message: str
    python: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    kind: str = "manual"
    latents: tuple[int, ...] = ()
    created: float = 0.0


class BudgetError(OSError):
    """A commit would exceed the disk budget."""


class CommitStore:
    """The commits of one run in `folder`, oldest first.

    `budget` (bytes) is never exceeded: the automatic commits are thinned first (all but the newest lose their
    moments, then the oldest go), and a commit that still does not fit raises `BudgetError`.
    """

    def __init__(self, folder: Path, budget: int):
        self.folder, self.budget = Path(folder), budget
        self._commits: dict[str, Commit] = {}
        self.refresh()

    def __iter__(self) -> Iterator[Commit]:
        return iter(list(self._commits.values()))

    def __len__(self) -> int:
        return len(self._commits)

    def __getitem__(self, commit: "Commit | str") -> Commit:
        key = commit.id if isinstance(commit, Commit) else commit
        matches = [c for c in self._commits.values() if c.id.startswith(key)] if key else []
        if len(matches) != 1:
            known = ", ".join(f"{c.id} (step {c.step})" for c in list(self._commits.values())[-5:])
            raise ValueError(f"commit {key!r}: {len(matches)} commits of {self.folder} match; the newest are {known or 'none'}.")
        return matches[0]

    def refresh(self) -> None:
        """Read what another process has written or thinned since."""
        records = {}
        for path in self.folder.glob("[!.]*/commit.json"):
            try:
                record = _read_record(path)
            except FileNotFoundError:  # thinned by its writer since the folder was listed
                continue
            records[record["order"]] = Commit(**record["commit"] | {"latents": tuple(record["commit"]["latents"])})
        self._commits = {records[order].id: records[order] for order in sorted(records)}

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return _folder_size(self.folder)

    def has_moments(self, commit: Commit) -> bool:
        return (self.folder / commit.id / "training.safetensors").exists()

    def lineage(self, commit: Commit) -> list[Commit]:
        """The commit and its ancestors, newest first."""
        line = [commit]
        while line[-1].parent in self._commits:
            line.append(self._commits[line[-1].parent])
        return line

    def write(self, state: TrainState, settings: dict[str, Any], **fields) -> Commit:
        """Make the state durable; returns after the files are synced and renamed."""
        _refuse_nonfinite(state)
        order = self._next_order()
        identity = repr((order, fields["parent"], state.step, fields["message"], state.seed))
        commit = Commit(id=hashlib.sha256(identity.encode()).hexdigest()[:8], step=state.step, created=time.time(), **fields)
        record = {
            "format_version": FORMAT_VERSION,
            "order": order,
            "commit": asdict(commit),
            "settings": settings,
            "state": _scalars(state),
        }
        text = json.dumps(record)
        self._make_room(_nbytes(state) + len(text), commit)

        def fill(folder: Path) -> None:
            state.dictionary.save(folder / "dictionary.safetensors")
            tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in _tensors(state).items()}
            (folder / "training.safetensors").write_bytes(tensor_bytes(tensors))
            (folder / "commit.json").write_text(text)

        replace_directory(self.folder / commit.id, fill)
        self._commits[commit.id] = commit
        return commit

    def settings(self, commit: Commit) -> dict[str, Any]:
        return self._record(commit)["settings"]

    def load_dictionary(self, commit: Commit) -> SparseDictionary:
        return SparseDictionary.load(self.folder / commit.id / "dictionary.safetensors")

    def load(self, commit: Commit, device) -> TrainState:
        """The state as it was: weights, moments, counters, pins, seed, step. Needs its moments."""
        scalars = self._record(commit)["state"]
        dictionary = self.load_dictionary(commit).to(device).train()
        stored, _ = read_tensors(self.folder / commit.id / "training.safetensors")
        tensors = {name: tensor.to(device) for name, tensor in stored.items()}
        schedule = Schedule(**scalars["schedule"])
        told = scalars.get("optimiser", {"name": "adam", "group": {}})
        optimiser = optimiser_for(told["name"], dictionary, schedule.lr)
        optimiser.param_groups[0].update(told["group"])
        names = dict(dictionary.named_parameters())
        for key, value in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "adam":  # whichever optimiser; the key is older than the others
                slot, _, name = rest.partition("/")
                optimiser.state[names[name]][slot] = value
        return TrainState(
            dictionary,
            optimiser,
            schedule,
            scalars["step"],
            tensors["samples_since_fired"],
            _pins(tensors, scalars["pins"]),
            scalars["seed"],
            scalars["dead_after"],
            pulls=_pulls(tensors),
            clip_norm=scalars.get("clip_norm"),
            precision=scalars.get("precision", "auto"),
        )

    def copy_to(self, folder: Path) -> None:
        """The same commits in another folder."""

        def copy(new: Path) -> None:
            shutil.copytree(self.folder, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))

        replace_directory(folder, copy)

    def forget(self, commit: Commit) -> None:
        """Remove a commit; its children now follow its parent."""
        parent = self._commits[commit.id].parent  # which may have moved since `commit` was read
        for child in [c for c in self._commits.values() if c.parent == commit.id]:
            record = self._record(child)
            record["commit"]["parent"] = parent
            write_file(self.folder / child.id / "commit.json", json.dumps(record).encode())
        hidden = self.folder / f".{commit.id}.tmp"
        os.replace(self.folder / commit.id, hidden)  # gone in one piece, whatever happens to the files
        shutil.rmtree(hidden, ignore_errors=True)
        self.refresh()

    def sweep(self) -> None:
        """Remove what a killed writer left half done. For the writer alone."""
        for path in self.folder.glob(".*.tmp"):
            shutil.rmtree(path, ignore_errors=True)

    def _record(self, commit: Commit) -> dict[str, Any]:
        return _read_record(self.folder / commit.id / "commit.json")

    def _next_order(self) -> int:
        orders = [_read_record(path)["order"] for path in self.folder.glob("[!.]*/commit.json")]
        return max(orders, default=-1) + 1

    def thin(self) -> None:
        """Only the newest automatic commit keeps moments. For the writer, once that one is the head: a follower reads the head."""
        for commit in self._automatic()[:-1]:
            (self.folder / commit.id / "training.safetensors").unlink(missing_ok=True)

    def _make_room(self, needed: int, commit: Commit) -> None:
        """Thin as far as needed, or not at all where that would not be enough."""
        excess = self.size + needed - self.budget
        thinned = []
        for old in self._automatic():
            if excess > 0 and old.id != commit.parent:
                thinned.append(old)
                excess -= _folder_size(self.folder / old.id)
        if excess > 0:
            raise BudgetError(
                f"commit at step {commit.step}: needs {needed / 1e6:.1f} MB beside {self.size / 1e6:.1f} MB kept, and session.budget is "
                f"{self.budget / 1e6:.1f} MB. Raise session.budget, or save to a new folder."
            )
        for old in thinned:
            self.forget(old)

    def _automatic(self) -> list[Commit]:
        """The every-500 commits from which no intervention or change of settings starts, oldest first."""
        starts = {c.parent for c in self._commits.values() if c.kind not in ("auto", "run", "manual")}
        return [c for c in self._commits.values() if c.kind == "auto" and c.id not in starts]


def _refuse_nonfinite(state: TrainState) -> None:
    for name, tensor in state.dictionary.named_parameters():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"commit at step {state.step}: {name} is not finite; revert to an earlier commit instead.")


def _scalars(state: TrainState) -> dict[str, Any]:
    pins = state.pins
    return {
        "step": state.step,
        "seed": state.seed,
        "dead_after": state.dead_after,
        "schedule": asdict(state.schedule),
        "clip_norm": state.clip_norm,
        "precision": state.precision,
        "optimiser": {"name": name_of(state.optimiser), "group": progress(state.optimiser)},
        "pins": None if pins is None else {"names": list(pins.anchors.names), "features": list(pins.anchors.features)},
    }


def _tensors(state: TrainState) -> dict[str, torch.Tensor]:
    names = {id(p): name for name, p in state.dictionary.named_parameters()}
    tensors = {"samples_since_fired": state.samples_since_fired}
    for parameter, slots in state.optimiser.state.items():
        tensors |= {f"adam/{slot}/{names[id(parameter)]}": value for slot, value in slots.items()}
    if state.pins is not None:
        pins = state.pins
        tensors |= {
            "pins/inputs": pins.anchors.inputs,
            "pins/targets": pins.anchors.targets,
            "pins/latents": pins.latents,
            "pins/weight": pins.weight,
            "pins/hard": pins.hard,
        }
    if state.pulls is not None:
        tensors |= {f"pulls/{name}": getattr(state.pulls, name) for name in PULLS}
    return tensors


def _pins(tensors: dict[str, torch.Tensor], names: dict[str, Any] | None) -> Pins | None:
    if names is None:
        return None
    anchors = Anchors(tensors["pins/inputs"], tensors["pins/targets"], tuple(names["names"]), tuple(names["features"]))
    return Pins(anchors, tensors["pins/latents"], tensors["pins/weight"], tensors["pins/hard"])


def _pulls(tensors: dict[str, torch.Tensor]) -> Pulls | None:
    return Pulls(*(tensors[f"pulls/{name}"] for name in PULLS)) if "pulls/latents" in tensors else None


def _nbytes(state: TrainState) -> int:
    weights = sum(t.nbytes for t in state.dictionary.state_dict().values())
    return weights + sum(t.nbytes for t in _tensors(state).values()) + HEADERS


def _folder_size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # thinned since the folder was listed
            total += path.stat().st_size if path.is_file() else 0
    return total


def _read_record(path: Path) -> dict[str, Any]:
    record = read_json(path)
    if record.get("format_version", 0) > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version is {record['format_version']} and this sdl_explorer reads up to {FORMAT_VERSION}; upgrade it."
        )
    missing = {"order", "commit", "settings", "state"} - set(record)
    if missing:
        raise ValueError(f"{path}: {sorted(missing)[0]!r} is missing; the file is damaged. Remove its folder to go on without this commit.")
    return record
