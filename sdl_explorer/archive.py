"""What a run folder holds beside its commits: what the session is, its data, its anchors and its last control.

run.json               source, settings, sizes, preflight; written last, so a folder without it is no run
anchors.safetensors    directions that were given to compare with
control.json           the pairs of the last control
labels.jsonl           what people said of latents (`labels.LabelStore`)
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from sdl_explorer.data.anchors import Anchors
from sdl_explorer.data.sources import Source
from sdl_explorer.diagnosis.compare import Control
from sdl_explorer.diagnosis.preflight import Preflight
from sdl_explorer.models.atomic import write_file
from sdl_explorer.models.formats.files import tensor_bytes
from sdl_explorer.training.folder import read_json, source_record, write_json

LATER = {"normalise": False, "centre": "auto", "pre_bias": False}  # older folders lack them
CONSTANT = ("n_latents", "seed", "budget", *LATER)
ARMS = ("treated", "untreated", "sham")


def write_record(
    folder: Path, source: Source, settings: dict[str, Any], constant: dict[str, Any], found: Preflight | None, anchors: Anchors | None
) -> None:
    """The record of a session whose commits are in `folder` already."""
    record = {"source": source_record(source, folder), "session": settings, **constant}
    if anchors is not None:
        rows = {"inputs": anchors.inputs, "targets": anchors.targets}
        write_file(folder / "anchors.safetensors", tensor_bytes({k: v.detach().cpu().clone().contiguous() for k, v in rows.items()}))
        record["anchors"] = {"names": list(anchors.names), "features": list(anchors.features)}
    if found is not None:
        record["preflight"] = asdict(found)
    write_json(folder / "run.json", record)


def read_record(folder: Path) -> dict[str, Any]:
    """The record, with `preflight` and `anchors` as what they were (None where there are none)."""
    needed = [name for name in CONSTANT if name not in LATER]
    record = LATER | read_json(folder / "run.json", "source", "session", *needed)
    found, told = record.get("preflight"), record.get("anchors")
    record["preflight"] = found and Preflight(**{k: tuple(v) if isinstance(v, list) else v for k, v in found.items()})
    record["anchors"] = told and _read_anchors(folder / "anchors.safetensors", told)
    return record


def write_control(folder: Path, control: Control) -> None:
    arms = {arm: {k: v.tolist() for k, v in getattr(control, arm).items()} for arm in ARMS}
    write_json(folder / "control.json", asdict(control) | arms)


def read_control(folder: Path) -> Control | None:
    if not (folder / "control.json").exists():
        return None
    record = read_json(folder / "control.json", "intervention", "n_steps", "before", "primary", *ARMS)
    arms = {arm: {k: np.array(v) for k, v in record[arm].items()} for arm in ARMS}
    return Control(**{k: v for k, v in record.items() if k != "format_version"} | arms)


def _read_anchors(path: Path, told: dict[str, list]) -> Anchors:
    with safe_open(path, framework="pt") as file:
        return Anchors(file.get_tensor("inputs"), file.get_tensor("targets"), tuple(told["names"]), tuple(told["features"]))
