"""A survey: the rows are encoded once, their codes kept beside the run block by block, and every streaming finding filled together.

    surveys/<key>/survey.json                      dictionary, data, rows, seed and device; the key is its digest
    surveys/<key>/block-<first row>.safetensors    codes of one block

A pass that was ended in the middle goes on after the last stored block: it reads the same codes, decodes them in the same
order, and comes to the same numbers, bit for bit on the CPU. Findings that are asked for later read the codes too.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.sources import Source
from sdl_explorer.diagnosis.absorption import find_absorption
from sdl_explorer.diagnosis.alignment import align
from sdl_explorer.diagnosis.cached import CachedFindings
from sdl_explorer.diagnosis.candidates import suspect_absorption
from sdl_explorer.diagnosis.causes import trace_causes
from sdl_explorer.diagnosis.drift import measure_drift
from sdl_explorer.diagnosis.examples import find_examples
from sdl_explorer.diagnosis.explain import explain
from sdl_explorer.diagnosis.groups import trace_groups
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.diagnosis.meanings import suspect_polysemantic
from sdl_explorer.diagnosis.observe import MOST_ROWS, Kept
from sdl_explorer.diagnosis.patterns import trace_patterns
from sdl_explorer.diagnosis.recovery import score_recovery
from sdl_explorer.diagnosis.redundancy import find_redundant
from sdl_explorer.diagnosis.theory import check_theory
from sdl_explorer.models.atomic import write_file
from sdl_explorer.models.dictionary import Latents, SparseDictionary
from sdl_explorer.models.formats.files import read_tensors, tensor_bytes
from sdl_explorer.training.folder import write_json
from sdl_explorer.training.state import threads_for

ALWAYS = (check_health, find_examples, find_redundant, suspect_polysemantic, suspect_absorption, trace_groups)
COMPARED = (align,)  # with true features or anchors
WITH_TRUTH = (check_theory, trace_patterns, score_recovery, find_absorption, trace_causes)
WITH_PINS = (measure_drift,)
LAST = (explain,)  # made of what the others found
BY_ITSELF = {
    "find_twins": "it compares with another dictionary",
    "count_pairs": "it counts the latents that somebody chose",
    "precision_on_spikes": "it judges candidates that are given; those of a survey's findings have theirs in `on_spikes`",
    "measure_contributions": "find_redundant has the same as `explained` and `firing_rate`",
    "score_absorption": "it fits probes",
    "probe_landscape": "it trains two latents again from where they are kicked",
}
KEEP_CODES = 1_000_000_000  # bytes of one survey; later blocks are encoded again where that is not enough
KEEP_SURVEYS = 4  # of a run, the newest


@dataclass(frozen=True, repr=False)
class Survey:
    """What one pass over `n_samples` rows found: `survey[check_health]`, or by name, `survey["check_health"]`.

    left_out  findings that these rows cannot fill, and why
    n_kept    rows whose codes were there before this pass: 0 the first time, all of them after a whole one
    """

    n_samples: int
    found: dict[str, Any]
    left_out: dict[str, str]
    n_kept: int

    def __getitem__(self, finding: Callable | str) -> Any:
        name = finding if isinstance(finding, str) else finding.__name__
        if name in self.found:
            return self.found[name]
        own = f"{BY_ITSELF.get(name, 'it is no part of a survey')}; call session.find"
        raise KeyError(f"survey: no {name}, since {self.left_out.get(name, own)}. Here are {', '.join(self.found)}.")

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __repr__(self) -> str:
        lines = [f"Survey of {self.n_samples:,} rows ({self.n_kept:,} of them were kept):", *map(repr, self.found.values())]
        return "\n  ".join(lines)


def findings_for(rows: Activations, anchors, pins=None) -> tuple[list[Callable], dict[str, str]]:
    """The findings that these rows can fill, and why not the others."""
    truth = rows.truth is not None
    there = ((COMPARED, truth or anchors is not None), (WITH_TRUTH, truth), (WITH_PINS, pins is not None and len(pins) > 0))
    fits = [finding for findings, some in there for finding in findings if some]
    left_out = {finding.__name__: "these rows have no true features" for finding in (*COMPARED, *WITH_TRUTH) if finding not in fits}
    left_out |= {finding.__name__: "nothing is pinned" for finding in WITH_PINS if finding not in fits}
    return [*ALWAYS, *fits, *LAST], left_out


def take_survey(
    findings: CachedFindings,
    view: dict[str, Any],
    rows: Activations,
    known: dict[str, Any],
    pulse: Callable[[float], None],
    kept: "KeptCodes | None",
) -> Survey:
    """Fill all findings that the rows allow; `view` has the dictionary and the key under which results are remembered."""
    dictionary = view["dictionary"]
    wanted, left_out = findings_for(rows, known["anchors"], known["pins"])
    with threads(dictionary, rows.n):
        results = findings.find(wanted, view["key"], dictionary, rows, known, {}, pulse, lambda: kept)
    found = {finding.__name__: result for finding, result in zip(wanted, results, strict=True)}
    return Survey(rows.n, found, left_out, 0 if kept is None else kept.n_read)


def codes_of(root: Path, dictionary: SparseDictionary, source: Source, seed: int, n: int, writes: bool = False) -> "KeptCodes | None":
    """The codes of a survey in a run folder; None where there is none. With `writes` there is one then, and the oldest make room."""
    surveys = root / "surveys"
    if not writes and not surveys.exists():
        return None
    what = about(dictionary, source, seed, n)
    folder = surveys / hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    if not (folder / "survey.json").exists():
        if not writes:
            return None
        others = sorted((path.parent for path in surveys.glob("*/survey.json")), key=lambda path: path.stat().st_mtime)
        for old in others[: max(0, len(others) + 1 - KEEP_SURVEYS)]:
            shutil.rmtree(old)
        write_json(folder / "survey.json", what)
    return KeptCodes(folder, dictionary.device, writes)


class KeptCodes(Kept):
    """The codes of one dictionary on some rows, as files in a folder; read-only where `writes` is False. `n_read` rows were there."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu", writes: bool = True):
        self.folder, self.device, self.writes, self.n_read = folder, device, writes, 0
        self.room = KEEP_CODES - sum(path.stat().st_size for path in folder.glob("block-*.safetensors"))
        self._parts: list[dict[str, Tensor]] = []

    def read(self, start: int) -> list[Latents] | None:
        try:
            tensors, about = read_tensors(self._path(start))
        except FileNotFoundError:
            return None
        parts: list[dict[str, Tensor]] = [{} for _ in range(int(about["parts"]))]
        for name, tensor in tensors.items():
            place, _, side = name.partition(".")
            parts[int(place)][side] = tensor.to(self.device)
        latents = [_unpacked(part, int(about["n_latents"])) for part in parts]
        self.n_read += sum(part.n for part in latents)
        return latents

    def add(self, latents: Latents) -> None:
        if self.writes and self.room >= 0:
            self._n_latents = latents.n_latents
            self._parts.append(_packed(latents))
            self.room -= sum(tensor.nbytes for tensor in self._parts[-1].values())

    def write(self, start: int) -> None:
        parts, self._parts = self._parts, []
        if parts and self.room >= 0:
            tensors = {f"{i}.{side}": tensor for i, part in enumerate(parts) for side, tensor in part.items()}
            write_file(self._path(start), tensor_bytes(tensors, {"n_latents": str(self._n_latents), "parts": str(len(parts))}))

    def _path(self, start: int) -> Path:
        return self.folder / f"block-{start:010d}.safetensors"


def _packed(latents: Latents) -> dict[str, Tensor]:
    """Entries as they came, so that sums over them come out the same; dense codes whole, or as entries where half are 0 or more."""
    if latents.is_sparse:
        indices, offsets = latents.layout
        return _on_cpu(values=latents.values, indices=indices.int(), offsets=offsets)
    there = latents.values != 0
    count = there.sum(dim=1)
    if 2 * int(count.sum()) > there.numel():
        return _on_cpu(dense=latents.values)
    offsets = torch.cat([count.new_zeros(1), count.cumsum(0)])
    return _on_cpu(entries=latents.values[there], indices=there.nonzero()[:, 1].int(), offsets=offsets)


def _on_cpu(**tensors: Tensor) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _unpacked(part: dict[str, Tensor], n_latents: int) -> Latents:
    if "dense" in part:
        return Latents(part["dense"])
    latents = Latents(part["values" if "values" in part else "entries"], part["indices"].long(), part["offsets"], n_latents)
    return latents if "values" in part else Latents(latents.dense())


def about(dictionary: SparseDictionary, source: Source, seed: int, n: int) -> dict[str, Any]:
    """What the codes of a survey are of."""
    sigma = dictionary.nonlinearity
    settings = [type(sigma).__name__, sigma.settings(), repr(getattr(sigma, "function", None))]
    scales = [dictionary.input_scale, dictionary.target_scale, dictionary.subtract_b_dec]
    digest = hashlib.sha256(json.dumps([settings, scales]).encode())
    for name, tensor in sorted(dictionary.state_dict().items()):
        digest.update(name.encode() + repr(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    device = dictionary.device.type
    return {"dictionary": digest.hexdigest(), "data": source.fingerprint(), "rows": n, "seed": seed, "device": device}


@contextmanager
def threads(dictionary: SparseDictionary, n: int) -> Iterator[None]:
    """As many threads as the size of a block earns, in this thread; the number comes back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads_for(dictionary.d_in, dictionary.n_latents, min(n, MOST_ROWS), before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
