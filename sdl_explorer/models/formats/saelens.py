"""The SAELens v6 directory, read and written: cfg.json and sae_weights.safetensors.

    m      = |W_dec rows|,   x_c = x - b_dec if apply_b_dec_to_input else x
    pre    = x_c @ W_enc + b_enc                       W_enc (d_in, d_sae): transposed at the border
    standard, transcoder              relu(pre)
    jumprelu, jumprelu_transcoder     relu(pre) * (pre > threshold)
    gated                             (pre > 0) * relu(x_c @ (W_enc * exp(r_mag)) + b_mag), with b_gate for b_enc
    topk                              relu(top-k of pre), or of pre * m with rescale_acts_by_decoder_norm
    output                            latents @ W_dec + b_dec   (latents / m with the flag)

Where the flag is on, norms are folded (W_enc * m, b_enc * m, W_dec / m), so latents are the ones that SAELens
reports. Thresholds and weights are float32 whatever the file holds. A BatchTopK dictionary, nested
(Matryoshka) or not, is written as jumprelu with one constant threshold, as its owner library does; reading that gives
a JumpReLU dictionary, and `metadata` says what it was trained as.
What the format cannot hold is refused with the reason. Reference: https://decoderesearch.github.io/SAELens.
"""

import json
from pathlib import Path
from typing import NoReturn

from torch import Tensor

import sdl_explorer
from sdl_explorer.models.atomic import replace_directory, write_file
from sdl_explorer.models.dictionary import Nonlinearity, SparseDictionary
from sdl_explorer.models.formats.base import Format, kind_of, provenance
from sdl_explorer.models.formats.files import check_tensor, check_tensors, number, read_json, read_tensors, tensor_bytes
from sdl_explorer.models.methods.gated import GatedRectified
from sdl_explorer.models.methods.jumprelu import JumpRectified
from sdl_explorer.models.methods.matryoshka import NestedSelection, RankedSelection
from sdl_explorer.models.methods.relu import Rectified
from sdl_explorer.models.methods.topk import BatchTopKSelection, TopKSelection
from sdl_explorer.models.rewrites import folded, uncentred

CONFIG, WEIGHTS, SCALER, SPARSITY = "cfg.json", "sae_weights.safetensors", "activation_scaler.json", "sparsity.safetensors"
_VERSION = "6.0.0"
_TRANSCODERS = ("transcoder", "jumprelu_transcoder")
_BATCHED = ("batchtopk", "matryoshka_batchtopk")  # training checkpoints; the inference export is jumprelu
_READ = ("standard", "topk", "jumprelu", "gated", *_TRANSCODERS, *_BATCHED)
_BEFORE_V6 = ("activation_fn", "activation_fn_str", "hook_point")
_WRITTEN = {  # nonlinearity: architecture of an SAE, of a transcoder
    Rectified: ("standard", "transcoder"),
    JumpRectified: ("jumprelu", "jumprelu_transcoder"),
    BatchTopKSelection: ("jumprelu", "jumprelu_transcoder"),
    NestedSelection: ("jumprelu", "jumprelu_transcoder"),
    TopKSelection: ("topk", None),
    RankedSelection: ("topk", None),
    GatedRectified: ("gated", None),
}


class SAELens(Format):
    name = "saelens"
    looks_for = f"a folder with {CONFIG} and {WEIGHTS}"

    def recognises(self, path: Path) -> bool:
        return (path / CONFIG).is_file() or (path / WEIGHTS).is_file()

    def read(self, path: Path) -> SparseDictionary:
        config = _Config(path / CONFIG)
        tensors = _tensors(config, path / WEIGHTS)
        if (factor := _input_scale(config, path / SCALER)) is not None:
            _fold_scale(tensors, factor, config.rescaled)
            config.assume(f"the input scale {factor:.6g} of {SCALER} is folded into the weights")
        if config.rescaled:
            _fold_norms(tensors)
            config.assume(
                "decoder norms are folded into the encoder; latent values are pre-activation times decoder norm, as SAELens reports them"
            )
        dictionary = SparseDictionary(
            tensors["W_enc"].T.contiguous(),
            tensors["W_dec"],
            tensors["b_enc"],
            tensors["b_dec"],
            _nonlinearity(config, tensors),
            subtract_b_dec=config.centred,
        )
        dictionary.provenance = _provenance(config, path)
        return dictionary

    def write(self, dictionary: SparseDictionary, path: Path) -> None:
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"save: {path} is a file and this format is a folder. Choose another path.")
        if path.is_dir() and (others := sorted({p.name for p in path.iterdir()} - {CONFIG, WEIGHTS})):
            raise FileExistsError(
                f"save: {path} holds other files ({', '.join(others[:3])}), which replacing it would lose. Choose a new folder."
            )
        config, tensors = exported(dictionary)

        def fill(folder: Path) -> None:
            write_file(folder / CONFIG, json.dumps(config, indent=1).encode(), durable=False)
            write_file(folder / WEIGHTS, tensor_bytes(tensors), durable=False)

        replace_directory(path, fill)


def exported(dictionary: SparseDictionary) -> tuple[dict, dict[str, Tensor]]:
    """The configuration and the tensors that SAELens reads as this dictionary in eval mode; scales are folded."""
    architecture = _architecture(dictionary)
    dictionary = folded(dictionary)
    transcoder = architecture in _TRANSCODERS
    if transcoder and dictionary.subtract_b_dec:
        dictionary = uncentred(dictionary)  # SAELens never centres a transcoder's input
    origin, sigma = dictionary.provenance, dictionary.nonlinearity
    config = {
        "architecture": architecture,
        "d_in": dictionary.d_in,
        "d_sae": dictionary.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": dictionary.subtract_b_dec,
        "normalize_activations": "none",
        "reshape_activations": origin.get("reshape_activations", "none"),
        "metadata": _metadata(dictionary),
    }
    tensors = {"W_enc": dictionary.W_enc.T, "b_enc": dictionary.b_enc, "W_dec": dictionary.W_dec, "b_dec": dictionary.b_dec}
    if transcoder:
        config["d_out"] = dictionary.d_out
    if isinstance(sigma, TopKSelection):
        config |= {"k": sigma.k, "rescale_acts_by_decoder_norm": False}
    if isinstance(sigma, (JumpRectified, BatchTopKSelection)):
        tensors["threshold"] = sigma.threshold.expand(dictionary.n_latents)
    if isinstance(sigma, GatedRectified):
        tensors |= {"b_gate": tensors.pop("b_enc"), "b_mag": sigma.b_mag, "r_mag": sigma.r}
    return config, {name: value.detach().cpu().float().clone().contiguous() for name, value in tensors.items()}


def _architecture(dictionary: SparseDictionary) -> str:
    sigma, kind = dictionary.nonlinearity, kind_of(dictionary)
    if kind == "crosscoder":
        raise ValueError("save: SAELens has no crosscoder, and this dictionary is one. Save it as native.")
    if type(sigma) not in _WRITTEN:
        raise ValueError(
            f"save: SAELens cannot hold the nonlinearity {type(sigma).__name__}; "
            f"written are {', '.join(member.__name__ for member in _WRITTEN)}. Save it as native."
        )
    architecture = _WRITTEN[type(sigma)][kind == "transcoder"]
    if architecture is None:
        raise ValueError(
            f"save: SAELens has no {_WRITTEN[type(sigma)][0]} transcoder, and no other selects the same latents. Save it as native."
        )
    if "threshold" in dict(sigma.named_parameters()) and (sigma.threshold < 0).any():
        raise ValueError(
            f"save: {int((sigma.threshold < 0).sum())} thresholds are negative, and SAELens has no negative latents. Save it as native."
        )
    return architecture


def _metadata(dictionary: SparseDictionary) -> dict:
    """What the source said, with the version keys that keep SAELens from misreading or claiming the file."""
    origin, sigma = dictionary.provenance, dictionary.nonlinearity
    metadata = dict(origin.get("metadata", {}))
    for key in ("model_name", "hook_name", "hook_name_out"):
        if origin.get(key) is not None:
            metadata.setdefault(key, origin[key])
    if _major(metadata.get("sae_lens_version")) < 6:
        metadata["sae_lens_version"] = _VERSION
    metadata.setdefault("sae_lens_training_version", None)
    if isinstance(sigma, BatchTopKSelection):
        nested = {"matryoshka_widths": sigma.widths} if isinstance(sigma, NestedSelection) else {}
        trained = "matryoshka_batchtopk" if nested else "batchtopk"
        metadata |= {"training_architecture": trained, "training_architecture_details": {"k": sigma.k} | nested}
    ours = {"version": sdl_explorer.__version__, "nonlinearity": type(sigma).__name__, "settings": sigma.settings()}
    return metadata | {
        "sdl_explorer": ours | ({"threshold_batches": int(sigma.n_averaged)} if isinstance(sigma, BatchTopKSelection) else {})
    }


class _Config:
    """cfg.json with its defaults made explicit; each default that is used becomes an assumption."""

    def __init__(self, path: Path):
        self.path, self.raw, self.assumptions = path, read_json(path), []
        metadata = self.raw.get("metadata") or {}
        self.metadata = dict(metadata) if isinstance(metadata, dict) else self._refuse("metadata", "an object")
        if "sae_lens_version" in self.raw:
            self.metadata.setdefault("sae_lens_version", self.raw["sae_lens_version"])
        ours = self.metadata.get("sdl_explorer")
        self.ours = ours if isinstance(ours, dict) else {}
        self._check_version()
        self.architecture = str(self.raw.get("architecture"))
        if self.architecture not in _READ:
            raise ValueError(f"{path}: architecture {self.architecture!r} is not read here; {', '.join(_READ)} are. Open it with sae-lens.")
        self.d_in, self.d_sae = self.size("d_in"), self.size("d_sae")
        self.transcoder = self.architecture in _TRANSCODERS
        self.d_out = self.size("d_out") if self.transcoder else self.d_in
        self.centred = self.flag("apply_b_dec_to_input", not self.transcoder)
        if self.transcoder and self.centred:
            raise ValueError(
                f"{path}: apply_b_dec_to_input is true, and a transcoder's input cannot be centred with its output bias. Set it to false."
            )
        top = self.architecture == "topk" or self.architecture in _BATCHED
        self.rescaled = top and self.flag("rescale_acts_by_decoder_norm", self.architecture != "topk")
        self.k = self._k() if top else 0
        self.reshape = self.raw.get("reshape_activations", "none")
        if self.reshape == "hook_z":
            self.assume("inputs are hook_z activations with the heads flattened")

    def assume(self, sentence: str) -> None:
        self.assumptions.append(sentence)

    def size(self, key: str) -> int:
        value = self.raw.get(key)
        return value if type(value) is int and value > 0 else self._refuse(key, "a whole number from 1")

    def flag(self, key: str, default: bool) -> bool:
        if key not in self.raw:
            self.assume(f"{CONFIG} does not say {key}; taken as {str(default).lower()}, the default of SAELens")
        value = self.raw.get(key, default)
        return value if isinstance(value, bool) else self._refuse(key, "true or false")

    def _k(self) -> int:
        k = number(self.raw.get("k"))
        if k is None or not 0 < k <= self.d_sae or (self.architecture == "topk" and not k.is_integer()):
            self._refuse("k", f"a number from 1 to d_sae = {self.d_sae}, whole for topk")
        if not k.is_integer():
            self.assume(f"k is {k} latents per row on average; training goes on with {max(1, round(k))}")
        return max(1, round(k))

    def _check_version(self) -> None:
        if _major(self.metadata.get("sae_lens_version")) >= 6:
            return
        if old := [key for key in _BEFORE_V6 if key in self.raw]:
            raise ValueError(f"{self.path}: {old[0]} is a key of SAELens before version 6. Open it with sae-lens and save it again.")
        self.assume(f"{CONFIG} has no sae_lens_version from 6.0.0; its keys are read as version 6")

    def _refuse(self, key: str, limit: str) -> NoReturn:
        raise ValueError(
            f"{self.path}: {key} is {self.raw.get(key)!r}; it must be {limit}. Correct the file or write it again with sae-lens."
        )


def _major(version) -> int:
    head = str(version or "").split(".")[0]
    return int(head) if head.isdigit() else 0


def _tensors(config: _Config, path: Path) -> dict[str, Tensor]:
    tensors, _ = read_tensors(path)
    if "log_threshold" in tensors and "jumprelu" in config.architecture:
        tensors["threshold"] = tensors.pop("log_threshold").float().exp()
        config.assume("log_threshold of an old training checkpoint is exponentiated")
    shapes = {
        "W_enc": (config.d_in, config.d_sae),
        "W_dec": (config.d_sae, config.d_out),
        "b_enc": (config.d_sae,),
        "b_dec": (config.d_out,),
    }
    if "jumprelu" in config.architecture:
        shapes["threshold"] = (config.d_sae,)
    if config.architecture in _BATCHED:
        shapes["topk_threshold"] = ()
    if config.architecture == "gated":
        shapes |= dict.fromkeys(("b_gate", "b_mag", "r_mag"), shapes["b_enc"])
        del shapes["b_enc"]
    check_tensors(path, tensors, shapes)
    if config.architecture == "gated":
        tensors["b_enc"] = tensors.pop("b_gate")
    return {name: value.float() for name, value in tensors.items()}


def _input_scale(config: _Config, path: Path) -> float | None:
    """The factor that training multiplied the input by and that is not yet in the weights."""
    kind = config.raw.get("normalize_activations", "none")
    if kind in ("layer_norm", "constant_norm_rescale"):
        raise ValueError(
            f"{config.path}: normalize_activations is {kind!r}, a scale of its own for each row: no weights hold that. Use sae-lens."
        )
    scaler = read_json(path) if path.exists() else {}
    if kind == "covariance_whitening" or scaler.get("has_whitening"):
        raise ValueError(f"{config.path}: whitening is not in the weights yet. Finish this checkpoint with sae-lens, which folds it.")
    if kind not in ("none", "expected_average_only_in"):
        raise ValueError(
            f"{config.path}: normalize_activations is {kind!r}; none and expected_average_only_in are read. Open it with sae-lens."
        )
    stored = scaler.get("scaling_factor")
    if kind == "none" and stored in (None, 1):
        return None
    if kind == "none":
        raise ValueError(f"{path}: scaling_factor is {stored!r} and {CONFIG} says that nothing is scaled. Delete the one that is wrong.")
    factor = number(stored)
    if factor is None or factor <= 0:
        raise ValueError(
            f"{path}: scaling_factor is {stored!r}, and normalize_activations is expected_average_only_in: this checkpoint is "
            "unfinished, and without a positive factor nobody knows the scale of its inputs. Finish it with sae-lens."
        )
    return factor


def _fold_scale(tensors: dict[str, Tensor], s: float, rescaled: bool) -> None:
    """Trained on s*x -> raw x. A threshold on pre * |W_dec row| shrinks with the decoder (SAELens #763)."""
    if rescaled and "topk_threshold" in tensors:
        tensors["topk_threshold"] = tensors["topk_threshold"] / s
    tensors["W_enc"] = tensors["W_enc"] * s
    tensors["W_dec"], tensors["b_dec"] = tensors["W_dec"] / s, tensors["b_dec"] / s


def _fold_norms(tensors: dict[str, Tensor]) -> None:
    """Rank by pre * m -> rank by pre. A zero decoder row ranks as 0 and writes nothing, so its latent stays silent."""
    m = tensors["W_dec"].norm(dim=1)
    tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * m, tensors["b_enc"] * m
    tensors["W_dec"] = tensors["W_dec"] / m.where(m > 0, 1.0)[:, None]


def _nonlinearity(config: _Config, tensors: dict[str, Tensor]) -> Nonlinearity:
    if config.architecture == "topk":
        return TopKSelection(config.k)
    if config.architecture in _BATCHED:
        if config.architecture != "batchtopk":
            config.assume("the nested widths of the training are not kept; eval mode is the same, and training goes on as BatchTopK")
        sigma = BatchTopKSelection(config.k)
        sigma.threshold.copy_(tensors["topk_threshold"])
        sigma.n_averaged.fill_(int(tensors["topk_threshold"] > 0))
        return sigma
    if config.architecture == "gated":
        sigma = GatedRectified(config.d_sae)
        sigma.r.data, sigma.b_mag.data = tensors["r_mag"], tensors["b_mag"]
        return sigma
    if "threshold" not in tensors:
        return Rectified()
    sigma = JumpRectified(config.d_sae, **_bandwidth(config))
    sigma.threshold.data = tensors["threshold"].clamp(min=0)  # under the ReLU a negative threshold selects as zero does
    return sigma


def _bandwidth(config: _Config) -> dict[str, float]:
    settings = config.ours.get("settings")
    value = number(config.raw.get("jumprelu_bandwidth", settings.get("bandwidth") if isinstance(settings, dict) else None))
    return {"bandwidth": value} if value is not None and value > 0 else {}


def _provenance(config: _Config, path: Path) -> dict:
    metadata = config.metadata
    trained = metadata.get("sae_lens_training_version")
    by_us = bool(config.ours) and trained is None
    known = {key: metadata.get(key, config.raw.get(key)) for key in ("model_name", "hook_name", "hook_name_out")}
    origin = provenance(
        "saelens",
        "sdl_explorer" if by_us else "sae_lens",
        config.ours.get("version") if by_us else trained or metadata.get("sae_lens_version"),
        kind="transcoder" if config.transcoder else "sae",
        architecture=config.architecture,
        reshape_activations=config.reshape,
        metadata=metadata,
        assumptions=config.assumptions,
        **known,
    )
    if (path / SPARSITY).exists():
        log_rate = read_tensors(path / SPARSITY)[0].get("sparsity")
        if log_rate is None:
            raise ValueError(f"{path / SPARSITY}: tensor sparsity is missing. Delete the file or copy it again.")
        check_tensor(path / SPARSITY, "sparsity", log_rate, (config.d_sae,))
        origin["log10_firing_rate"] = [round(value, 4) for value in log_rate.tolist()]
    return origin
