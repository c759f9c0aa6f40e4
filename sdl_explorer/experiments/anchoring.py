"""Class-mean anchors on real activations: do they help with the classes that were *not* anchored?

Arms of a pair share seed, data order and length: class means of half the classes, as many random directions, or nothing. Class
means share a large common component, so that an anchored latent can stand in for a held-out class: the runs are made with centred
and with plain class means, and recovery is given in three scorings (arXiv 2512.05534, section 8 and eq. 22-26).
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from sdl_explorer.data.anchors import Anchors
from sdl_explorer.data.capture import capture
from sdl_explorer.data.sources import stream
from sdl_explorer.data.store import Stored
from sdl_explorer.diagnosis.alignment import align
from sdl_explorer.diagnosis.compare import paired
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.experiments.minilm import minilm_rows
from sdl_explorer.experiments.outcome import Outcome, markdown_table
from sdl_explorer.models.atomic import write_file
from sdl_explorer.models.methods import TopK
from sdl_explorer.session import Session
from sdl_explorer.views.reproduced import lines

ARMS = ("class means", "random", "none")
SCORINGS = ("heldout", "heldout_strict", "all")
SEEDS = (0, 1, 2)
WEIGHT = 1.0  # the paper's, on CLIP
ANCHORS = 30  # likewise; half of the classes where there are fewer
ENOUGH = 20  # rows of a class, for a mean


def sizes(size: str) -> dict:
    """Rows read, and the dictionary trained on them."""
    small = {"rows": 4_000, "n_latents": 256, "k": 8, "steps": 200, "batch_size": 256}
    laptop = {"rows": None, "n_latents": 2_048, "k": 16, "steps": 800, "batch_size": 1_024}
    return {"small": small, "laptop": laptop, "paper": laptop | {"n_latents": 16_384, "steps": 5_000}}[size]


def anchoring(size: str, folder: Path, device: str, say: Callable[[str], None], images=None, model=None) -> Outcome:
    """Both kinds of class means, three arms, three seeds, on MiniLM's tokens by topic, or on a folder of images by subfolder."""
    setting = sizes(size)
    source = image_rows(images, model, folder / "activations") if images else minilm_rows(folder / "activations", rows=setting["rows"])
    rows = []
    for centred in (True, False):
        classes = class_means(source, centred)
        for seed in SEEDS:
            order = torch.randperm(len(classes), generator=stream(seed, "classes")).tolist()
            chosen = order[: min(ANCHORS, len(classes) // 2)]
            for arm in ARMS:
                say(f"{'centred' if centred else 'plain'} class means, seed {seed}, {arm}")
                kept = folder / "runs" / f"{'centred' if centred else 'plain'}-{seed}-{arm.replace(' ', '-')}.json"
                if not kept.exists():
                    write_file(kept, json.dumps(_arm(arm, source, classes, chosen, seed, setting, device)).encode())
                rows.append({"centred": centred, "seed": seed, "arm": arm, **json.loads(kept.read_text())})
    table = pd.DataFrame(rows)
    words = (
        f"Size `{size}`: {source.n} rows, {setting}; {len(chosen)} of {len(classes)} classes anchored with weight {WEIGHT:g}, the others "
        "held out; cosine of a held-out class mean with its best decoder row. `heldout`: over all latents; `heldout_strict`: without the "
        "anchored ones; `all`: all classes. Differences are paired over seeds, with 95 % intervals."
    )
    differences = pd.DataFrame(_differences(table))
    page = "\n".join(
        ["# anchoring: class means on real activations", "", words, "", markdown_table(table), "", markdown_table(differences), ""]
    )
    shown = table.assign(run=table["arm"] + table["centred"].map({True: ", centred", False: ", plain"}), dashed=~table["centred"])
    figure = lines(shown, "seed", "M_IP heldout_strict", "run", "Mean best cosine of held-out classes, anchored latents left out")
    return Outcome(table, page, figure, {"size": size, "setting": setting, "weight": WEIGHT, "seeds": SEEDS, "classes": classes.names})


def class_means(source: Stored, centred: bool) -> Anchors:
    """The mean rows of every class with enough rows, unit length."""
    rows = source.sample(50_000, stream(0, "class means"), "choose")
    labels, counts = torch.unique(rows.labels, return_counts=True)
    often = labels[counts >= ENOUGH].tolist()
    if len(often) < 4:
        raise ValueError(f"anchoring: {len(often)} classes have {ENOUGH} rows or more; it needs at least 4, half of them held out.")
    return Anchors.from_labels(rows, often, centre=centred)


def _arm(arm: str, source: Stored, classes: Anchors, chosen: list[int], seed: int, setting: dict, device: str) -> dict[str, float]:
    """One run, and its numbers on judge rows."""
    held_out = classes.take([i for i in range(len(classes)) if i not in chosen])
    method = TopK(k=setting["k"])
    with Session(
        source, method, setting["n_latents"], seed=seed, batch_size=setting["batch_size"], device=device, anchors=classes
    ) as session:
        if arm != "none":
            anchors = classes.take(chosen) if arm == "class means" else _random(classes, len(chosen), seed)
            session.anchor(anchors, latents=range(len(chosen)), weight=WEIGHT)
        session.train(setting["steps"])
        others, everything = session.find(align, anchors=held_out), session.find(align)
        health = session.find(check_health)
    numbers = {"unexplained variance": health.unexplained_variance, "L0": health.l0, "dead": health.n_dead / health.n_latents}
    for scoring in SCORINGS:
        found = everything if scoring == "all" else others
        numbers |= {f"M_GT {scoring}": found.recovery(scoring=scoring), f"M_IP {scoring}": found.mean_best(scoring=scoring)}
    return {name: float(value) for name, value in numbers.items()}


def _random(like: Anchors, n: int, seed: int) -> Anchors:
    """Random directions on both sides, the control for "any pull would do"."""
    draw = lambda width: torch.randn(n, width, generator=stream(seed, "random anchors"))
    return Anchors.from_rows(draw(like.inputs.shape[1]), draw(like.targets.shape[1]), [f"random {i}" for i in range(n)])


def _differences(table: pd.DataFrame):
    for centred in (True, False):
        part = table[table["centred"] == centred].pivot(index="seed", columns="arm")
        for measure in ("M_IP heldout", "M_IP heldout_strict", "unexplained variance"):
            for other in ("none", "random"):
                found = paired(part[measure]["class means"].to_numpy(), part[measure][other].to_numpy())
                words = {1: "higher with class means", -1: "lower with class means", 0: "not distinguishable"}[found.sign]
                one = {
                    "centred": centred,
                    "measure": measure,
                    "against": other,
                    "difference": found.mean,
                    "low": found.low,
                    "high": found.high,
                }
                yield one | {"verdict": words}


def image_rows(images, model, folder: Path) -> Stored:
    """What the last layer of a vision transformer (Hugging Face: a name or a folder) computes on a folder of images, a row a patch;
    subfolders are the classes.
    """
    if model is None:
        raise ValueError("anchoring: --images needs --model, a vision transformer's name or folder, such as openai/clip-vit-base-patch32.")
    try:
        from transformers import AutoImageProcessor, AutoModel
    except ImportError as error:
        raise ImportError('anchoring: images need transformers. Install it with: pip install "sdl-explorer[models]"') from error
    network = AutoModel.from_pretrained(model, use_safetensors=True)
    network = getattr(network, "vision_model", network)
    layers = [name for name, part in network.named_modules() if re.search(r"(Encoder)?Layer$", type(part).__name__)]
    if not layers:
        raise ValueError(f"anchoring: {type(network).__name__} has no part called ...Layer; give a vision transformer.")
    return capture(network, Path(images).expanduser(), layers[-1], tokenizer=AutoImageProcessor.from_pretrained(model), folder=folder)
