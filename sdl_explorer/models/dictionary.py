"""One module for every SDL model: latents = sigma(W_enc x + b_enc), reconstruction = W_dec^T latents + b_dec.

SAE, transcoder or crosscoder is a property of the data; a variant is a `Method` (arXiv 2512.05534, eq. 1-4).
"""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sdl_explorer.data.activations import Activations


class Latents:
    """The codes of n rows over n_latents: dense (n, n_latents), or sparse with `values`, `indices` and
    `offsets` (row r owns entries offsets[r]:offsets[r + 1]; rows may differ in count).

    The raw output of sigma, not times a decoder norm. `bags` knows a faster decoder for large ones
    (`kernels.Bags`).
    """

    def __init__(
        self, values: Tensor, indices: Tensor | None = None, offsets: Tensor | None = None, n_latents: int | None = None, bags: Any = None
    ):
        self.values, self.indices, self.offsets, self.bags = values, indices, offsets, bags
        self.n_latents = int(values.shape[1]) if n_latents is None else n_latents

    @classmethod
    def rows_of(cls, values: Tensor, indices: Tensor, n_latents: int) -> "Latents":
        """The same number of entries in each row: values and indices are (n, k)."""
        n, k = values.shape
        offsets = torch.arange(n + 1, device=values.device) * k
        return cls(values.reshape(-1), indices.reshape(-1), offsets, n_latents)

    @property
    def is_sparse(self) -> bool:
        return self.indices is not None

    @property
    def n(self) -> int:
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    @property
    def layout(self) -> tuple[Tensor, Tensor]:
        """`indices` and `offsets` (sparse only)."""
        if self.indices is None or self.offsets is None:
            raise TypeError("Latents: dense codes have no indices and offsets; read .values, or entries() of either kind.")
        return self.indices, self.offsets

    @property
    def row(self) -> Tensor:
        """The row of each stored entry (sparse only)."""
        return torch.repeat_interleave(torch.arange(self.n, device=self.values.device), self.layout[1].diff())

    @property
    def l0(self) -> Tensor:
        """Mean number of latents above zero per row, a 0-d tensor."""
        return (self.values > 0).sum() / max(self.n, 1)

    def dense(self) -> Float[Tensor, "n n_latents"]:
        if not self.is_sparse:
            return self.values
        codes = self.values.new_zeros(self.n, self.n_latents)
        return codes.index_put((self.row, self.layout[0]), self.values)

    def by_latent(self, rows) -> Float[Tensor, "n chosen"]:
        """The codes of the given latents alone, one column each."""
        rows = torch.as_tensor(rows, device=self.values.device)
        if not self.is_sparse:
            return self.values[:, rows]
        place = torch.full((self.n_latents,), -1, device=self.values.device)
        place[rows] = torch.arange(len(rows), device=self.values.device)
        column = place[self.layout[0]]
        kept = column >= 0
        codes = self.values.new_zeros(self.n, len(rows))
        return codes.index_put((self.row[kept], column[kept]), self.values[kept])

    def entries(self, threshold: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(row, latent, value) of every code above zero, or above a threshold of shape (n, 1), by row."""
        if self.is_sparse:
            row, latent, value = self.row, self.layout[0], self.values
            kept = value > (0 if threshold is None else threshold.reshape(-1)[row])
            return row[kept], latent[kept], value[kept]
        row, latent = (self.values > (0 if threshold is None else threshold)).nonzero(as_tuple=True)
        return row, latent, self.values[row, latent]

    def fired(self) -> Tensor:
        """Which latents are above zero in some row, bool (n_latents,)."""
        if not self.is_sparse:
            return (self.values > 0).any(dim=0)
        return self.values.new_zeros(self.n_latents).scatter_reduce_(0, self.layout[0], self.values, "amax") > 0

    def detach(self) -> "Latents":
        return Latents(self.values.detach(), self.indices, self.offsets, self.n_latents)

    def __repr__(self) -> str:
        return f"Latents(n={self.n}, n_latents={self.n_latents}, {'sparse' if self.is_sparse else 'dense'}, l0={self.l0.item():.3g})"


class Encoding(NamedTuple):
    latents: Latents
    reconstruction: Tensor
    pre: Tensor | None  # None where nothing of size n x n_latents is kept


class Nonlinearity(nn.Module):
    """sigma. Called as `sigma(pre, inputs=, dictionary=)`; returns dense codes or `Latents`.

    Its constructor takes JSON values (`settings()` gives them back), so that a checkpoint names it by class.
    Per-latent parameters and buffers have n_latents rows. One that offers `select(inputs, dictionary) ->
    Latents | None` is asked first; `pre` is computed only where it answers None.
    """

    homogeneous = False  # sigma(a z) = a sigma(z) for a > 0
    masks_only = False  # sigma(z)_i in {0, z_i}
    explains_rows = False  # codes are coefficients of a fit of x by the rows of W_enc, whose lengths then matter

    def settings(self) -> dict:
        return {}

    def forward(self, pre: Tensor, *, inputs: Tensor, dictionary: "SparseDictionary") -> "Tensor | Latents":
        raise TypeError(f"{type(self).__name__} has no forward(); a nonlinearity needs one.")

    def absorb(self, shift: Tensor) -> None:
        """no_grad: W_enc x has grown by `shift` (n_latents,) and b_enc has taken it up, so `pre` is what it was. One that
        reads W_enc x without b_enc adjusts itself to give the same codes."""


class Pointwise(Nonlinearity):
    """Any function of the pre-activations; it can be used and diagnosed, but not saved."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, pre, *, inputs, dictionary):
        return self.function(pre)


class SparseDictionary(nn.Module):
    """Anybody's weights as a dictionary; row i of `W_enc` (n_latents, d_in) and of `W_dec` (n_latents, d_out)
    belongs to latent i.

        pre    = (input_scale * x - (b_dec if subtract_b_dec else 0)) @ W_enc.T + b_enc
        latents = sigma(pre)
        recon   = (latents @ W_dec + b_dec) / target_scale

    `nonlinearity=None` is ReLU; a missing bias becomes zeros. One `nn.Parameter` given for both matrices ties them.
    The two scales are numbers that never train: rows come and go as the data have them, and the weights are in units of
    their own (`core`, `normalised`). One number a side, so directions and cosines are those of the data.
    """

    nonlinearity: Any  # a Nonlinearity; a method knows which, and reads that member's own attributes

    def __init__(
        self,
        W_enc,
        W_dec,
        b_enc=None,
        b_dec=None,
        nonlinearity=None,
        *,
        subtract_b_dec: bool = False,
        input_scale: float | int = 1.0,
        target_scale: float | int = 1.0,
    ):
        super().__init__()
        W_enc, W_dec = _matrix("W_enc", W_enc), _matrix("W_dec", W_dec)
        n_latents, d_out = W_dec.shape
        if W_enc.shape[0] != n_latents:
            raise ValueError(
                f"SparseDictionary: W_enc has {W_enc.shape[0]} rows and W_dec {n_latents}; both hold one row per "
                "latent, (n_latents, d_in) and (n_latents, d_out). Transpose the one that does not."
            )
        if n_latents == 0:
            raise ValueError("SparseDictionary: n_latents is 0; a dictionary needs at least one latent.")
        if subtract_b_dec and W_enc.shape[1] != d_out:
            raise ValueError(f"SparseDictionary: subtract_b_dec needs d_in = d_out; they are {W_enc.shape[1]} and {d_out}.")
        input_scale, target_scale = _scale("input_scale", input_scale), _scale("target_scale", target_scale)
        if subtract_b_dec and input_scale != target_scale:
            raise ValueError(
                f"SparseDictionary: subtract_b_dec needs one scale for both sides; they are {input_scale:g} and {target_scale:g}."
            )
        self.W_enc, self.W_dec = _parameter(W_enc), _parameter(W_dec)
        self.b_enc = nn.Parameter(_vector("b_enc", b_enc, n_latents, W_enc))
        self.b_dec = nn.Parameter(_vector("b_dec", b_dec, d_out, W_dec))
        if nonlinearity is None:
            from sdl_explorer.models.methods.relu import Rectified  # the default lives with its family

            nonlinearity = Rectified()
        self.nonlinearity = nonlinearity if isinstance(nonlinearity, Nonlinearity) else Pointwise(nonlinearity)
        self.subtract_b_dec = bool(subtract_b_dec)
        self.input_scale, self.target_scale = input_scale, target_scale
        self.provenance: dict = {}  # where the weights come from; the readers of checkpoints fill it

    @property
    def tied(self) -> bool:
        """Whether W_enc *is* W_dec: one parameter by two names, which training, copies and native files keep one."""
        return self.W_enc is self.W_dec

    @property
    def n_latents(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @property
    def device(self) -> torch.device:
        return self.W_enc.device

    @property
    def core(self) -> "SparseDictionary":
        """The same weights for rows in their own units: target_scale * self(x) is core(input_scale * x).

        Not a copy: parameters and sigma are shared, the scales are 1. Training and interventions work on it.
        """
        if self.input_scale == self.target_scale == 1:
            return self
        core = copy(self)
        core.input_scale = core.target_scale = 1.0
        return core

    def normalised(self, activations: Activations) -> Activations:
        """Raw rows in the units of the weights, for `core`; the targets of an SAE stay its inputs."""
        if self.input_scale == self.target_scale == 1:
            return activations
        inputs = self.input_scale * activations.inputs
        same = activations.targets is activations.inputs and self.input_scale == self.target_scale
        return replace(activations, inputs=inputs, targets=inputs if same else self.target_scale * activations.targets)

    def centred(self, inputs: Tensor) -> Tensor:
        """What the encoder's rows are multiplied with."""
        inputs = inputs if self.input_scale == 1 else self.input_scale * inputs
        return inputs - self.b_dec if self.subtract_b_dec else inputs

    def pre(self, inputs: Float[Tensor, "n d_in"], latents=None) -> Tensor:
        """Pre-activations of all latents, or of the given rows alone."""
        W_enc, b_enc = (self.W_enc, self.b_enc) if latents is None else (self.W_enc[latents], self.b_enc[latents])
        return F.linear(self.centred(inputs), W_enc, b_enc).to(W_enc.dtype)  # which autocast may have left

    def encode(self, inputs: Float[Tensor, "n d_in"]) -> Latents:
        return self._encode(inputs)[0]

    def decode(self, latents: Latents | Tensor) -> Float[Tensor, "n d_out"]:
        written = self._sums(Latents(latents) if isinstance(latents, Tensor) else latents) + self.b_dec
        return written if self.target_scale == 1 else written / self.target_scale

    def forward(self, inputs: Float[Tensor, "n d_in"]) -> Encoding:
        latents, pre = self._encode(inputs)
        return Encoding(latents, self.decode(latents), pre)

    def _sums(self, latents: Latents) -> Tensor:
        """latents @ W_dec"""
        if not latents.is_sparse:
            return latents.values @ self.W_dec
        if latents.bags is not None:
            return latents.bags.decode(latents.values, self.W_dec)
        indices, offsets = latents.layout
        return F.embedding_bag(
            indices,
            self.W_dec,
            offsets,
            mode="sum",
            per_sample_weights=latents.values,
            include_last_offset=True,
        )

    def _encode(self, inputs: Tensor) -> tuple[Latents, Tensor | None]:
        if inputs.shape[-1] != self.d_in:
            raise ValueError(f"encode: the inputs have {inputs.shape[-1]} columns and this dictionary reads d_in={self.d_in}.")
        select = getattr(self.nonlinearity, "select", None)
        selected = None if select is None else select(inputs, self)
        if selected is not None:
            return selected, None
        pre = self.pre(inputs)
        codes = self.nonlinearity(pre, inputs=inputs, dictionary=self)
        return codes if isinstance(codes, Latents) else Latents(codes), pre

    def per_latent(self) -> dict[str, Tensor]:
        """The nonlinearity's parameters and buffers that have one row per latent, by name."""
        named = dict(self.nonlinearity.named_parameters()) | dict(self.nonlinearity.named_buffers())
        return {name: t for name, t in named.items() if t.ndim > 0 and t.shape[0] == self.n_latents}

    @classmethod
    def load(cls, path, format: str = "auto") -> "SparseDictionary":
        """A file, a dictionary folder, a SAELens directory or a run folder; eval mode, float32, CPU."""
        from sdl_explorer.models.formats import read_dictionary  # formats build dictionaries, so they import this module

        return read_dictionary(Path(path), format)

    def save(self, path, format: str = "native") -> Path:
        """Write the dictionary ("native" or "saelens"); makes parents and replaces atomically."""
        from sdl_explorer.models.formats import write_dictionary

        return write_dictionary(self, Path(path), format)

    def extra_repr(self) -> str:
        sizes = f"n_latents={self.n_latents}, d_in={self.d_in}, d_out={self.d_out}, subtract_b_dec={self.subtract_b_dec}"
        scaled = self.input_scale != 1 or self.target_scale != 1
        return f"{sizes}, input_scale={self.input_scale:.6g}, target_scale={self.target_scale:.6g}" if scaled else sizes


def _matrix(name: str, value) -> Tensor:
    value = value if isinstance(value, Tensor) else torch.as_tensor(value)
    if value.ndim != 2 or not value.is_floating_point():
        raise ValueError(
            f"SparseDictionary: {name} is {value.dtype} of shape {tuple(value.shape)}; give a floating-point matrix, a row per latent."
        )
    return value


def _scale(name: str, value) -> float:
    value = float(value)
    if not 0 < value < float("inf"):
        raise ValueError(f"SparseDictionary: {name} is {value}; a scale is a positive finite number.")
    return value


def _parameter(value: Tensor) -> nn.Parameter:
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach().clone())


def _vector(name: str, value, size: int, like: Tensor) -> Tensor:
    if value is None:
        return torch.zeros(size, dtype=like.dtype, device=like.device)
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device).detach().clone()
    if value.shape != (size,):
        raise ValueError(f"SparseDictionary: {name} has shape {tuple(value.shape)}; it must be ({size},).")
    return value
