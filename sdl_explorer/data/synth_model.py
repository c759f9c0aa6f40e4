"""The fixed part of a SynthSAEBench model: what its settings and its seed give, and its files.

    synthetic_model_config.json      the settings, as sae_lens.synthetic names them
    synthetic_model.safetensors      feature_vectors (n, d), bias (d), firing_probabilities (n), and with correlations
                                     correlation_factor (n, rank), correlation_diag (n)
    hierarchy.json                   {"roots": [node, ...]}; a node: feature_index (or null), children, and two flags

Each part is drawn from a generator of its own (seed, seed + 1, ...) by the rules of sae_lens 6.54, so one configuration
means one model in both libraries. Magnitudes are not in the files: they come from the configuration.
Reference: SynthSAEBench (Chanin et al. 2026), https://decoderesearch.github.io/SAELens.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from torch.nn.functional import normalize

CONFIG, WEIGHTS, HIERARCHY = "synthetic_model_config.json", "synthetic_model.safetensors", "hierarchy.json"
LARGEST_SHARED = 0.99  # of a feature's variance in the copula; the rest is its own
FIRING = {  # settings of each kind, with the defaults of the format
    "zipfian": {"exponent": 1.0, "max_prob": 0.3, "min_prob": 0.01},
    "linear": {"max_prob": 0.3, "min_prob": 0.01},
    "random": {"max_prob": 0.5, "min_prob": 0.01},
    "constant": {"probability": 0.1},
}
OURS = {"exponent": "exponent", "max_prob": "max_probability", "min_prob": "min_probability", "probability": "max_probability"}
TREES = {  # the format's name, ours, the format's default
    "total_root_nodes": ("n_roots", 100),
    "max_depth": ("depth", 2),
    "mutually_exclusive_portion": ("exclusive_portion", 0.0),
    "mutually_exclusive_min_depth": ("exclusive_from", 0),
    "mutually_exclusive_max_depth": ("exclusive_to", None),
    "compensate_probabilities": ("compensate", False),
    "scale_children_by_parent": ("scale_children", False),
}
KNOWN = {
    *("num_features", "hidden_dim", "firing_probability", "hierarchy", "orthogonalization", "correlation"),
    *("std_firing_magnitudes", "mean_firing_magnitudes", "bias", "dtype", "seed"),
}


class Forest(NamedTuple):
    """The trees as arrays over features: parent and group of exclusive siblings (-1: none), whether a feature scales with
    its parent, and the children of feature i, children[first[i] : first[i] + n_children[i]]. `tops` have no parent."""

    parent: Int[Tensor, " n_features"]
    group: Int[Tensor, " n_features"]
    scaled: Bool[Tensor, " n_features"]
    children: Int[Tensor, " n_children"]
    first: Int[Tensor, " n_features"]
    n_children: Int[Tensor, " n_features"]
    tops: Int[Tensor, " n_tops"]

    @classmethod
    def of(cls, roots: list[dict], n_features: int) -> "Forest":
        """From nodes. An organising node (feature_index null) passes its own parent on to its children."""
        parent, group, scaled = [-1] * n_features, [-1] * n_features, [False] * n_features
        seen: set[int] = set()
        n_groups = 0
        waiting = [(root, -1, False, -1) for root in roots]
        while waiting:
            node, above, scales, siblings = waiting.pop()
            feature, below = node.get("feature_index"), node.get("children") or []
            if feature is not None:
                if not 0 <= feature < n_features or feature in seen:
                    why = "appears twice" if feature in seen else f"is not one of {n_features} features"
                    raise ValueError(f"hierarchy: feature_index {feature} {why}; a feature has one place, from 0 to {n_features - 1}.")
                seen.add(feature)
                parent[feature], group[feature], scaled[feature] = above, siblings, scales and above >= 0
                above = feature
            own = -1
            if node.get("mutually_exclusive_children", False):
                if len(below) < 2:
                    raise ValueError(f"hierarchy: node {feature} excludes among {len(below)} children; exclusion needs at least two.")
                own, n_groups = n_groups, n_groups + 1
            waiting += [(child, above, node.get("scale_children_by_parent", False), own) for child in below]
        above = torch.tensor(parent)
        order = above.argsort(stable=True)
        counts = torch.bincount(above + 1, minlength=n_features + 1)
        n_tops, n_children = int(counts[0]), counts[1:]
        first = n_children.cumsum(0) - n_children
        return cls(above, torch.tensor(group), torch.tensor(scaled), order[n_tops:], first, n_children, order[:n_tops])

    def compensated(self, p: Float[Tensor, " n_features"]) -> Float[Tensor, " n_features"]:
        """Probabilities to draw with, so that about `p` is left after the gating: each child's over its parent's, times
        1 + the expected number of competing siblings; at most 1."""
        base = p.double()
        above = torch.where(self.parent >= 0, base[self.parent.clamp_min(0)], 1.0)
        sums = torch.zeros(len(p) + 1, dtype=torch.float64).index_add_(0, self.group + 1, base)
        rivals = torch.where(self.group >= 0, sums[self.group + 1] - base, 0.0).clamp_min(0)
        wanted = base * torch.where(above > 0, (1 + rivals / above) / above, 1.0)
        return wanted.clamp_max(1.0).float()


@dataclass(frozen=True)
class SynthModel:
    """Everything about a model that no draw changes."""

    vectors: Float[Tensor, "n_features d_in"]
    bias: Float[Tensor, " d_in"]
    probabilities: Float[Tensor, " n_features"]
    mean: Float[Tensor, " n_features"]
    std: Float[Tensor, " n_features"]
    factor: Float[Tensor, "n_features rank"]
    own: Float[Tensor, " n_features"]  # variance of each feature's own part in the copula
    roots: list[dict]
    forest: Forest


def build_model(s: dict[str, Any]) -> SynthModel:
    """The model of these settings."""
    n, seed = s["n_features"], s["seed"]
    roots = grow_trees(s)
    vectors, bias = draw_directions(n, s["d_in"], s["bias"], seed)
    if s["orthogonal_steps"]:
        vectors = spread(vectors, s["orthogonal_steps"], s["orthogonal_lr"])
    return _assembled(s, roots, vectors, bias, *draw_correlation(n, s["rank"], s["correlation_scale"], seed + 4))


def _assembled(s, roots, vectors, bias, factor, own, stored: Tensor | None = None) -> SynthModel:
    n, seed = s["n_features"], s["seed"]
    forest = Forest.of(roots, n)
    p = draw_probabilities(s)
    p = forest.compensated(p) if s["compensate"] and roots else p
    if stored is not None:
        if factor.shape[1] and not torch.allclose(stored, p, rtol=1e-4, atol=1e-7):
            raise ValueError(
                f"{WEIGHTS}: firing_probabilities differ by up to {(stored - p).abs().max():.2g} from what {CONFIG} gives, and with "
                "correlations sae_lens draws by the configuration. Store the configured ones, or drop the correlation tensors."
            )
        p = stored
    mean, std = draw_magnitudes(s["mean_magnitude"], n, seed + 2), draw_magnitudes(s["std_magnitude"], n, seed + 1)
    scaling = forest.parent[forest.scaled]
    if len(scaling) and not (mean[scaling] > 0).all():
        raise ValueError("SynthBench: scale_children divides by the mean magnitude of a parent, and one is 0. Raise mean_magnitude.")
    return SynthModel(vectors, bias, p, mean, std, factor, own, roots, forest)


# parts ---------------------------------------------------------------------------------------------------------------


def draw_probabilities(s: dict[str, Any]) -> Float[Tensor, " n_features"]:
    """Firing probabilities before compensation, by kind: max * rank^-exponent rescaled to [min, max], a line, uniform, or max."""
    n, low, high = s["n_features"], s["min_probability"], s["max_probability"]
    if s["firing"] == "constant":
        return torch.full((n,), high)
    if not 0 < low <= high:
        raise ValueError(f"SynthBench: probabilities from {low:g} to {high:g}; min_probability is above 0 and at most max_probability.")
    if s["firing"] == "random":
        return low + (high - low) * torch.rand(n, generator=Generator().manual_seed(s["seed"]))
    if s["firing"] == "linear" or n == 1:
        return torch.linspace(high, low, n)
    shape = 1.0 / torch.arange(1, n + 1, dtype=torch.float32) ** s["exponent"]
    return low + (high - low) * (shape - shape[-1]) / (shape[0] - shape[-1])


def draw_magnitudes(spec: float | dict[str, Any], n: int, seed: int) -> Float[Tensor, " n"]:
    """A number for all features, or one of the format's generators by name."""
    if not isinstance(spec, dict):
        return torch.full((n,), float(spec))
    given = dict(spec)
    kind = given.pop("generator_name", None)
    try:
        match kind:
            case "constant":
                return torch.full((n,), float(given.pop("value", 1.0)))
            case "linear":
                return torch.linspace(given["start"], given["end"], n)
            case "exponential":
                return given["start"] * (given["end"] / given["start"]) ** torch.linspace(0, 1, n)
            case "folded_normal":
                noise = torch.randn(n, generator=Generator().manual_seed(seed))
                values = (given.get("mean", 0.0) + given.get("std", 0.1) * noise).abs()
                limits = {"min": given.get("min_value"), "max": given.get("max_value")}
                return values.clamp(**limits) if any(v is not None for v in limits.values()) else values
    except KeyError as missing:
        raise ValueError(f"magnitudes: {kind} without {missing}; it needs start and end.") from missing
    raise ValueError(f"magnitudes: generator_name is {kind!r}; it is one of constant, linear, exponential, folded_normal.")


def draw_directions(n: int, d: int, bias: float, seed: int) -> tuple[Float[Tensor, "n d"], Float[Tensor, " d"]]:
    """Random unit rows, and a bias of the given norm."""
    generator = Generator().manual_seed(seed)
    rows = normalize(torch.randn(n, d, generator=generator), dim=1)
    return rows, bias * normalize(torch.randn(d, generator=generator), dim=0) if bias else torch.zeros(d)


def spread(rows: Float[Tensor, "n d"], steps: int, lr: float) -> Float[Tensor, "n d"]:
    """Adam on sum_{i != j} <w_i, w_j>^2 + n sum_i (|w_i|^2 - 1)^2, then unit rows.

    The gradient is 4 W (W^T W) with its diagonal part replaced: d^2 n of work, where the Gram matrix has d n^2.
    """
    rows = rows.clone().requires_grad_(True)
    adam = torch.optim.Adam([rows], lr=lr)
    for _ in range(steps):
        with torch.no_grad():
            norms = rows.pow(2).sum(dim=1, keepdim=True)
            rows.grad = 4 * (rows @ (rows.T @ rows) + (len(rows) * (norms - 1) - norms) * rows)
        adam.step()
    return normalize(rows.detach(), dim=1)


def draw_correlation(n: int, rank: int, scale: float, seed: int) -> tuple[Float[Tensor, "n rank"], Float[Tensor, " n"]]:
    """F (entries N(0, scale^2)) and diag with F F^T + diag of unit diagonal; rows of F that take more than 0.99 are shortened."""
    factor = scale * torch.randn(n, rank, generator=Generator().manual_seed(seed))
    shared = factor.pow(2).sum(dim=1)
    factor = factor * torch.where(shared > LARGEST_SHARED, LARGEST_SHARED / shared, 1.0).sqrt()[:, None]
    return factor, 1 - factor.pow(2).sum(dim=1)


def grow_trees(s: dict[str, Any]) -> list[dict]:
    """Nodes, breadth first: the first features are the roots, each inner node takes the next `branching` ones."""
    rng = random.Random(s["seed"] + 3)
    most = s["branching_max"] or s["branching"]
    unused = iter(range(s["n_features"]))
    roots = level = [_node(i) for _, i in zip(range(s["n_roots"]), unused, strict=False)]
    inner = []
    for depth in range(s["depth"]):
        below = []
        for node in level:
            wanted = s["branching"] if s["branching_max"] is None else rng.randint(s["branching"], most)
            node["children"] = [_node(i) for _, i in zip(range(wanted), unused, strict=False)]
            node["scale_children_by_parent"] = s["scale_children"]
            inner.append((node, depth))
            below += node["children"]
        level = below
    last = s["exclusive_to"]
    eligible = [node for node, at in inner if s["exclusive_from"] <= at and (last is None or at <= last) and len(node["children"]) >= 2]
    for i in rng.sample(range(len(eligible)), int(len(eligible) * s["exclusive_portion"])):
        eligible[i]["mutually_exclusive_children"] = True
    return roots


def _node(feature: int) -> dict:
    flags = {"mutually_exclusive_children": False, "scale_children_by_parent": False, "feature_id": None}
    return {"feature_index": feature, **flags, "children": []}


# files ---------------------------------------------------------------------------------------------------------------


def write_model(folder: Path, model: SynthModel, s: dict[str, Any]) -> None:
    """All files of the format, for sae_lens.synthetic.SyntheticModel.load_from_disk."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"feature_vectors": model.vectors, "bias": model.bias, "firing_probabilities": model.probabilities}
    if model.factor.shape[1]:
        tensors |= {"correlation_factor": model.factor, "correlation_diag": model.own}
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config_of(s), indent=2))
    (folder / HIERARCHY).unlink(missing_ok=True)
    if model.roots:
        (folder / HIERARCHY).write_text(json.dumps({"roots": model.roots}, indent=2))


def read_model(folder: Path, s: dict[str, Any]) -> SynthModel:
    """The model in a folder, whose settings are `s`."""
    tensors = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}
    shapes = {"feature_vectors": (s["n_features"], s["d_in"]), "bias": (s["d_in"],), "firing_probabilities": (s["n_features"],)}
    for name, shape in shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            found = tuple(tensors[name].shape) if name in tensors else "not there"
            raise ValueError(f"{folder / WEIGHTS}: {name} is {found} and {CONFIG} asks for {shape}; the files belong to two models.")
    path = folder / HIERARCHY
    roots = json.loads(path.read_text())["roots"] if path.is_file() else grow_trees(s)
    correlation = [tensors.get(name) for name in ("correlation_factor", "correlation_diag")]
    if correlation[0] is None or correlation[1] is None:
        correlation = draw_correlation(s["n_features"], s["rank"], s["correlation_scale"], s["seed"] + 4)
    return _assembled(s, roots, tensors["feature_vectors"], tensors["bias"], *correlation, stored=tensors["firing_probabilities"])


def config_of(s: dict[str, Any]) -> dict[str, Any]:
    """The format's configuration of our settings."""
    branching = s["branching"] if s["branching_max"] is None else [s["branching"], s["branching_max"]]
    trees = {theirs: s[ours] for theirs, (ours, _) in TREES.items()} | {"branching_factor": branching}
    correlation = {"rank": s["rank"], "correlation_scale": s["correlation_scale"], "seed": None}
    orthogonal = {"num_steps": s["orthogonal_steps"], "lr": s["orthogonal_lr"], "chunk_size": 1024}
    firing = {name: s[OURS[name]] for name in FIRING[s["firing"]]}
    return {
        "num_features": s["n_features"],
        "hidden_dim": s["d_in"],
        "firing_probability": {**firing, "generator_name": s["firing"]},
        "hierarchy": trees if s["n_roots"] else None,
        "orthogonalization": orthogonal if s["orthogonal_steps"] else None,
        "correlation": correlation if s["rank"] else None,
        "std_firing_magnitudes": s["std_magnitude"],
        "mean_firing_magnitudes": s["mean_magnitude"],
        "bias": s["bias"],
        "dtype": "float32",
        "seed": s["seed"],
    }


def read_settings(folder: Path) -> dict[str, Any]:
    """Our settings of a folder's configuration."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; give a folder that sae_lens or SynthBench.save wrote a synthetic model to.")
    config = json.loads(path.read_text())
    if unknown := sorted(set(config) - KNOWN):
        raise ValueError(f"{path}: {unknown[0]!r} is no setting of this format (sae_lens 6.54); it knows {', '.join(sorted(KNOWN))}.")
    if config.get("dtype", "float32") != "float32":
        raise ValueError(f"{path}: dtype is {config['dtype']}; models are read in float32. Write it again in float32.")
    firing = dict(config["firing_probability"])
    kind = firing.pop("generator_name", None)
    if kind not in FIRING:
        raise ValueError(f"{path}: firing probabilities are {kind!r}; they can be {', '.join(FIRING)}.")
    trees, correlation, seed = config.get("hierarchy"), config.get("correlation"), config.get("seed")
    s = {
        "n_features": config["num_features"],
        "d_in": config["hidden_dim"],
        "firing": kind,
        **{OURS[name]: firing.get(name, default) for name, default in FIRING[kind].items()},
        "mean_magnitude": _without_nulls(config.get("mean_firing_magnitudes", 1.0)),
        "std_magnitude": _without_nulls(config.get("std_firing_magnitudes", 0.0)),
        **{ours: trees.get(theirs, default) for theirs, (ours, default) in TREES.items() if trees},
        "rank": 0,
        "bias": float(config.get("bias", 1.0)),
        "orthogonal_steps": 0,
        "seed": 0 if seed is None else seed,
    }
    if correlation:
        s |= {"rank": correlation.get("rank", 32), "correlation_scale": correlation.get("correlation_scale", 0.1)}
    if spreading := config.get("orthogonalization"):
        s |= {"orthogonal_steps": spreading.get("num_steps", 200), "orthogonal_lr": spreading.get("lr", 0.01)}
    if trees:
        few, most = (
            trees["branching_factor"] if isinstance(trees.get("branching_factor"), list) else (trees.get("branching_factor", 100), None)
        )
        s |= {"branching": few, "branching_max": most}
    else:
        s["n_roots"] = 0
    drawn = [s[name] for name in ("mean_magnitude", "std_magnitude") if isinstance(s[name], dict)]
    if seed is None and any(spec.get("generator_name") == "folded_normal" for spec in drawn):
        raise ValueError(f"{path}: magnitudes are random and seed is null, so the file does not say what they are. Give it a seed.")
    return s


def _without_nulls(spec: Any) -> Any:
    return {k: v for k, v in spec.items() if v is not None} if isinstance(spec, dict) else spec
