"""The family of methods: a recipe of parameters, sigma and loss terms. One file per family member."""

from typing import NamedTuple

import param
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import normalize

from sdl_explorer.data.anchors import Pins
from sdl_explorer.models.dictionary import Encoding, Nonlinearity, SparseDictionary
from sdl_explorer.models.kernels import project_rows
from sdl_explorer.models.terms import tie_distance


class Context(NamedTuple):
    """What a loss term may read besides the batch."""

    step: int
    samples_since_fired: Tensor
    pins: Pins | None
    generator: Generator
    dead_after: int = 100_000  # samples of silence that make a latent dead

    @property
    def dead(self) -> Tensor:
        """Which latents are dead, bool (n_latents,)."""
        return self.samples_since_fired >= self.dead_after


def pre_activations(dictionary: SparseDictionary, encoding: Encoding, inputs: Tensor) -> Tensor:
    """Those of the encoding, or computed where it kept none."""
    return dictionary.pre(inputs) if encoding.pre is None else encoding.pre


class Method(param.Parameterized):
    """Parameters + sigma + loss terms. Abstract; a concrete method is final and callable with no argument.

    `tuned` names the settings that sigma carries too: a change of one reaches a live model by `retune`.

    `tie` says what the encoder is to the decoder, for models whose inputs and targets have one width:

        "untied"   two matrices
        "tied"     one: W_enc is W_dec, the same parameter, with the gradients of both
        "soft"     two, and the loss gains tie_weight * sum_i |W_enc_i - W_dec_i|^2
    """

    __abstract = True

    homogeneous = False  # sigma(a z) = a sigma(z) for a > 0
    masks_only = True  # sigma(z)_i in {0, z_i}
    tuned: tuple[str, ...] = ()

    unit_norm = param.Boolean(False, doc="Keep decoder rows at norm 1 and project their gradient onto the sphere.")
    init_norm = param.Number(
        1.0,
        bounds=(0, 10),
        inclusive_bounds=(False, True),
        constant=True,
        doc="Norm of the rows at the start. Small rows turn fast, and grow.",
    )
    tie = param.Selector(default="untied", objects=["untied", "tied", "soft"], doc="Encoder rows: free, the decoder's, or pulled there.")
    tie_weight = param.Number(0.1, bounds=(0, None), doc="Strength of the pull of a soft tie.")

    def build(self, d_in: int, d_out: int, n_latents: int, generator: Generator) -> SparseDictionary:
        """Random decoder rows of norm `init_norm`; the encoder starts as the decoder where both have one width, and is it where tied."""
        self.check(n_latents)
        self._check_widths(d_in, d_out)
        rows = lambda width: self.init_norm * normalize(torch.randn(n_latents, width, generator=generator), dim=1)
        W_dec = rows(d_out)
        W_enc = W_dec.clone() if d_in == d_out else rows(d_in)
        if self.tie == "tied":
            W_enc = W_dec = nn.Parameter(W_dec)
        return SparseDictionary(W_enc, W_dec, nonlinearity=self.nonlinearity(n_latents))

    def fits(self, dictionary: SparseDictionary) -> None:
        """Refuse to train a dictionary whose size or tie is not the one that the settings say."""
        self.check(dictionary.n_latents)
        self._check_widths(dictionary.d_in, dictionary.d_out)
        if dictionary.tied and self.tie != "tied":
            raise ValueError(
                f"{type(self).__name__}: tie is {self.tie!r} and this dictionary is tied, one parameter for both sides. "
                "Set tie='tied', or give rewrites.untied(dictionary)."
            )
        if self.tie == "tied" and not dictionary.tied:
            raise ValueError(
                f"{type(self).__name__}: tie is 'tied' and this dictionary has an encoder of its own, which would be lost. "
                "Set tie='soft', or start a new dictionary."
            )

    def _check_widths(self, d_in: int, d_out: int) -> None:
        if self.tie != "untied" and d_in != d_out:
            raise ValueError(
                f"{type(self).__name__}: tie is {self.tie!r}, which needs inputs and targets of one width; they have {d_in} and {d_out}. "
                "Set tie='untied'."
            )

    def check(self, n_latents: int) -> None:
        """Refuse settings that do not fit a dictionary of this size."""
        if n_latents < 1:
            raise ValueError(f"{type(self).__name__}: n_latents is {n_latents}; a dictionary needs at least one latent.")
        if self.unit_norm and self.init_norm != 1:
            raise ValueError(
                f"{type(self).__name__}: init_norm is {self.init_norm:g} and unit_norm keeps decoder rows at norm 1. Set unit_norm=False, "
                "or leave init_norm out."
            )

    def nonlinearity(self, n_latents: int) -> Nonlinearity:
        raise TypeError(f"{type(self).__name__} has no nonlinearity(); a Method needs one.")

    def retune(self, nonlinearity: Nonlinearity) -> None:
        """Carry changed settings into a live sigma."""
        for name in self.tuned:
            setattr(nonlinearity, name, getattr(self, name))

    def objective(self, dictionary: SparseDictionary, encoding: Encoding, batch, context: Context) -> dict[str, Tensor]:
        """Named, weighted terms; their sum is what training descends. Training gives a dictionary's `core` and rows in its
        units, so a coefficient means the same on data of any scale where the dictionary holds that scale."""
        raise TypeError(f"{type(self).__name__} has no objective(); a Method needs one.")

    def weight_terms(self, dictionary: SparseDictionary) -> dict[str, Tensor]:
        """Named, weighted terms of the weights alone, which training adds to those of `objective`."""
        return {"tie": self.tie_weight * tie_distance(dictionary)} if self.tie == "soft" else {}

    def constrain_gradients(self, dictionary: SparseDictionary) -> None:
        """no_grad, between backward and the optimiser: with `unit_norm`, drop the part along each decoder row."""
        if self.unit_norm and dictionary.W_dec.grad is not None:
            project_rows(dictionary.W_dec.grad, dictionary.W_dec)

    def after_step(self, dictionary: SparseDictionary, encoding: Encoding, context: Context) -> None:
        """no_grad: norm constraint, threshold average, schedules."""
        if self.unit_norm:
            dictionary.W_dec.div_(dictionary.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))

    def __repr__(self) -> str:
        changed = ", ".join(f"{k}={v!r}" for k, v in self.param.values(onlychanged=True).items() if k != "name")
        return f"{type(self).__name__}({changed})"

    __str__ = __repr__
