"""SynthSAEBench (Chanin et al. 2026): many features in superposition, with trees, correlations and a long tail, and the answer known."""

import hashlib
import json
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import param
import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.nn.functional import embedding_bag, normalize

from sdl_explorer.data.activations import Activations, Truth
from sdl_explorer.data.sources import Generated, stream
from sdl_explorer.data.synth_model import Forest, SynthModel, build_model, read_model, read_settings, write_model

ROWS = 1024  # of the top level's noise at a time: they bound what is held, and are part of what a seed means
NOT_MODEL = ("name", "device", "folder")


class Cells(NamedTuple):
    """What is active, as one entry a cell: codes[row, feature] = value > 0."""

    row: Int[Tensor, " n_cells"]
    feature: Int[Tensor, " n_cells"]
    value: Float[Tensor, " n_cells"]

    def at(self, which: Tensor) -> "Cells":
        return Cells(*(part[which] for part in self))


class _Tables(NamedTuple):
    """The model on its device, as the draws read it."""

    directions: Tensor
    bias: Tensor
    threshold: Tensor
    mean: Tensor
    std: Tensor
    factor: Tensor
    own: Tensor
    forest: Forest


class SynthBench(Generated):
    """x = sum_i c_i d_i + b, with c >= 0 sparse, hierarchical and correlated (SynthSAEBench; as sae_lens.synthetic draws it).

        g ~ N(0, F F^T + diag);  feature i fires where g_i > Phi^-1(1 - p_i)
        c_i = relu(N(mean_i, std_i^2)) where it fires
        top down:  of exclusive siblings that fire one survives;  c_i = 0 unless its parent's c > 0;
                   with `scale_children`  c_i *= c_parent / mean_parent

    p falls as a power law, and is raised for children (`compensate`) so that about the configured rate is left after the
    gating. Directions are random unit rows, spread by `orthogonal_steps` of Adam. The defaults are a small model; `full()` is
    SynthSAEBench-16k-v2. Only cells whose parent is active are looked at, so a batch costs what its top level costs.

    `folder` holds a model in the format of sae_lens, which then gives every setting but the device; `save` writes one. One
    configuration and seed mean one model in both libraries, and different draws from it. A training batch has no truth: its
    codes would be n * n_features numbers that no training reads. Codes of a direction that is not of unit norm in the
    files are multiplied by its norm.
    """

    n_features = param.Integer(1024, bounds=(1, None), constant=True, doc="True features.")
    d_in = param.Integer(128, bounds=(1, None), constant=True, doc="Width of the inputs.")
    firing = param.Selector(
        default="zipfian",
        objects=["zipfian", "linear", "random", "constant"],
        constant=True,
        doc="How firing probabilities run over the features; constant: max_probability.",
    )
    exponent = param.Number(0.5, bounds=(0, None), inclusive_bounds=(False, True), constant=True, doc="Power of the Zipfian law.")
    max_probability = param.Number(0.4, bounds=(0, 1), constant=True, doc="Probability of the most frequent feature.")
    min_probability = param.Number(1e-3, bounds=(0, 1), constant=True, doc="Probability of the rarest feature.")
    mean_magnitude = param.Parameter(
        {"generator_name": "linear", "start": 5.0, "end": 4.0},
        constant=True,
        doc="Mean activation of an active feature: a number, or a generator of sae_lens (constant, linear, exponential, folded_normal).",
    )
    std_magnitude = param.Parameter(
        {"generator_name": "folded_normal", "mean": 0.5, "std": 0.5}, constant=True, doc="Its standard deviation, given in the same way."
    )
    n_roots = param.Integer(8, bounds=(0, None), constant=True, doc="Trees; 0: every feature is free.")
    branching = param.Integer(4, bounds=(2, None), constant=True, doc="Children of an inner feature.")
    branching_max = param.Integer(
        None, bounds=(2, None), allow_None=True, constant=True, doc="Where given, children are branching to this many, at random."
    )
    depth = param.Integer(3, bounds=(1, None), constant=True, doc="Levels below a root.")
    exclusive_portion = param.Number(
        1.0, bounds=(0, 1), constant=True, doc="Share of the inner features whose children exclude each other."
    )
    exclusive_from = param.Integer(0, bounds=(0, None), constant=True, doc="First depth at which children may exclude each other.")
    exclusive_to = param.Integer(None, bounds=(0, None), allow_None=True, constant=True, doc="Last such depth; None: no limit.")
    compensate = param.Boolean(True, constant=True, doc="Raise the probabilities of children by what the gating takes.")
    scale_children = param.Boolean(True, constant=True, doc="A child's activation is multiplied by its parent's over the parent's mean.")
    rank = param.Integer(8, bounds=(0, None), constant=True, doc="Shared factors of the firing; 0: independent.")
    correlation_scale = param.Number(0.1, bounds=(0, None), constant=True, doc="Standard deviation of a feature's loading on a factor.")
    bias = param.Number(0.5, bounds=(0, None), constant=True, doc="Norm of the bias.")
    orthogonal_steps = param.Integer(100, bounds=(0, None), constant=True, doc="Steps that spread the directions.")
    orthogonal_lr = param.Number(3e-4, bounds=(0, None), constant=True, doc="Their learning rate.")
    device = param.String("cpu", constant=True, doc="Where rows are drawn: cpu, cuda or cuda:N. Each kind draws its own rows.")
    folder = param.String(None, allow_None=True, constant=True, doc="A model in the format of sae_lens to read.")

    def __init__(self, folder: str | Path | None = None, **settings):
        if folder is not None:
            read = read_settings(Path(folder))
            for name in settings.keys() & read.keys():
                if settings[name] != read[name]:
                    raise ValueError(
                        f"SynthBench: {name} is {settings[name]!r} and the model in {folder} has {read[name]!r}; leave it out."
                    )
            settings |= read | {"folder": str(folder)}
        super().__init__(**settings)
        if self.branching_max is not None and self.branching_max < self.branching:
            raise ValueError(f"SynthBench: branching_max is {self.branching_max} and branching {self.branching}; it is at least that.")
        if self.folder is None:
            build_model(self._model_settings | {"orthogonal_steps": 0})  # settings that cannot be are refused at once
        else:
            self.model  # noqa: B018  a broken folder too

    @classmethod
    def full(cls, **changes) -> "SynthBench":
        """SynthSAEBench-16k-v2: 16,384 features in 768 dimensions. Spreading them takes some 4 TFLOP, once a process; a saved
        model has its directions in the folder."""
        published = {"n_features": 16_384, "d_in": 768, "min_probability": 5e-4, "n_roots": 128, "rank": 25, "seed": 42}
        return cls(**published | changes)

    @property
    def width_in(self) -> int:
        return self.d_in

    @cached_property
    def model(self) -> SynthModel:
        """Directions, probabilities, magnitudes, correlations and trees; built once."""
        return build_model(self._model_settings) if self.folder is None else read_model(Path(self.folder), self._model_settings)

    @property
    def features(self) -> Float[Tensor, "n_features d_in"]:
        """The true directions, unit rows."""
        return self._tables.directions

    @property
    def firing_probabilities(self) -> Float[Tensor, " n_features"]:
        """Of the draw, before parents and siblings gate it."""
        return self.model.probabilities

    def save(self, folder: str | Path) -> Path:
        """Write the model in the format of sae_lens; returns the folder."""
        write_model(Path(folder), self.model, self._model_settings)
        return Path(folder)

    def fingerprint(self) -> str:
        settings = self._model_settings | {"device": torch.device(self.device).type}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        if self.folder is not None:
            for tensor in (getattr(self.model, field.name) for field in fields(self.model)):
                digest.update(tensor.numpy().tobytes() if isinstance(tensor, Tensor) else repr(tensor).encode())
        return f"{type(self).__name__}:{digest.hexdigest()[:16]}"

    def batch(self, index: int, size: int, order: int = 0) -> Activations:
        return self._activations(size, self._fire(size, self._generator(stream(self.seed, "batch", order, index))))

    def draw(self, n: int, generator: Generator) -> Activations:
        cells = self._fire(n, self._generator(generator))
        codes = torch.zeros(n, self.n_features, device=self.device)
        codes[cells.row, cells.feature] = cells.value
        truth = Truth(codes, self.features, self.features, **self._tree)
        return self._activations(n, cells, truth)

    # drawing -----------------------------------------------------------------------------------------------------------

    def _activations(self, n: int, cells: Cells, truth: Truth | None = None) -> Activations:
        order = cells.row.argsort(stable=True)
        counts = torch.bincount(cells.row, minlength=n)
        _, feature, value = cells.at(order)
        starts = counts.cumsum(0) - counts
        inputs = embedding_bag(feature, self.features, starts, mode="sum", per_sample_weights=value) + self._tables.bias
        return Activations(inputs, inputs, truth)

    def _fire(self, n: int, generator: Generator) -> Cells:
        """Level by level: the features without a parent, then the children of what is active."""
        shared = torch.randn(n, self._tables.factor.shape[1], generator=generator, device=self.device)
        levels = [self._fire_tops(shared, generator)]
        while len(levels[-1].row):
            levels.append(self._fire_children(levels[-1], shared, generator))
        return Cells(*(torch.cat(parts) for parts in zip(*levels, strict=True)))

    def _fire_tops(self, shared: Tensor, generator: Generator) -> Cells:
        tops, loadings, own, threshold = self._tops
        places = []
        for start in range(0, len(shared), ROWS):
            rows = shared[start : start + ROWS]
            g = torch.randn(len(rows), len(tops), generator=generator, device=self.device)
            fired = g.mul_(own).addmm_(rows, loadings) > threshold
            places.append(fired.nonzero() + torch.tensor([start, 0], device=self.device))
        row, place = torch.cat(places).T
        return self._valued(row, tops[place], 1.0, generator)

    def _fire_children(self, above: Cells, shared: Tensor, generator: Generator) -> Cells:
        t, forest = self._tables, self._tables.forest
        counts = forest.n_children[above.feature]
        source = torch.arange(len(counts), device=self.device).repeat_interleave(counts)
        place = torch.arange(len(source), device=self.device) - (counts.cumsum(0) - counts)[source]
        row, feature = above.row[source], forest.children[forest.first[above.feature[source]] + place]
        g = (shared[row] * t.factor[feature]).sum(dim=1)
        g += t.own[feature] * torch.randn(len(row), generator=generator, device=self.device)
        fired = (g > t.threshold[feature]).nonzero()[:, 0]
        ratio = torch.where(forest.scaled[feature], above.value[source] / t.mean[above.feature[source]], 1.0)
        return self._valued(row[fired], feature[fired], ratio[fired], generator)

    def _valued(self, row: Tensor, feature: Tensor, ratio: Tensor | float, generator: Generator) -> Cells:
        """The activations of what fired, times `ratio`; zeros are not active, and one of exclusive siblings survives."""
        t = self._tables
        noise = torch.randn(len(row), generator=generator, device=self.device)
        value = (t.mean[feature] + t.std[feature] * noise).relu() * ratio
        cells = Cells(row, feature, value).at((value > 0).nonzero()[:, 0])
        group = t.forest.group[cells.feature]
        if not (group >= 0).any():
            return cells
        shuffled = cells.at(torch.randperm(len(group), generator=generator, device=self.device))
        group = t.forest.group[shuffled.feature]
        alone = shuffled.feature + self.n_features  # a key of its own: groups are fewer than features
        key = shuffled.row * 2 * self.n_features + torch.where(group >= 0, group, alone)
        key, order = key.sort(stable=True)
        first = torch.ones_like(key, dtype=torch.bool)
        first[1:] = key[1:] != key[:-1]
        return shuffled.at(order[first])

    @cached_property
    def _tables(self) -> _Tables:
        model = self.model
        norms = model.vectors.norm(dim=1)
        parts = (
            normalize(model.vectors, dim=1),
            model.bias,
            torch.special.ndtri(1 - model.probabilities.double()).float(),
            model.mean * norms,
            model.std * norms,
            model.factor,
            model.own.sqrt(),
        )
        forest = Forest._make(part.to(self.device) for part in model.forest)
        return _Tables._make([*(part.to(self.device) for part in parts), forest])

    @cached_property
    def _tops(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        t, tops = self._tables, self._tables.forest.tops
        return tops, t.factor[tops].T.contiguous(), t.own[tops], t.threshold[tops]

    @cached_property
    def _tree(self) -> dict[str, Any]:
        """Parent and name of each feature, in order."""
        parents = tuple(None if p < 0 else p for p in self.model.forest.parent.tolist())
        inside = {p for p in parents if p is not None}
        names = tuple(f"{'child' if p is not None else 'root' if i in inside else 'free'} {i}" for i, p in enumerate(parents))
        return {"parents": parents, "names": names}

    @property
    def _model_settings(self) -> dict[str, Any]:
        return {k: v for k, v in self.param.values().items() if k not in NOT_MODEL}

    def _generator(self, generator: Generator) -> Generator:
        """The same stream on the device of the draws."""
        if torch.device(self.device).type == "cpu":
            return generator
        return Generator(self.device).manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
