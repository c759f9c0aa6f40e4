"""The loss as a function of a few latents, all others held: what the landscape is drawn of, in double precision."""

from copy import deepcopy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.observe import FIRES, block_rows
from sdl_explorer.models.dictionary import Nonlinearity, Pointwise, SparseDictionary
from sdl_explorer.models.methods.gated import GatedRectified
from sdl_explorer.models.methods.jumprelu import JumpRectified
from sdl_explorer.models.methods.relu import Rectified
from sdl_explorer.models.methods.topk import BatchTopKSelection, TopKSelection

OWN = (Rectified, JumpRectified, BatchTopKSelection, GatedRectified, Pointwise)  # a code depends on its own pre-activation alone
ROUNDING = 1e-12  # a loss below it, over that of no code at all, is 0


@dataclass(frozen=True)
class Local:
    """n rows, m latents that may move, and what is left of the targets without them. All in the units of the weights.

        loss = sum_r weights_r |x_r - (what the held latents write) - codes W_dec|^2 / sum_r weights_r

    Under Top-k the m latents compete with the last few of the others that were kept, the `rivals` (n, s), for `slots` places:
    `remains[t]` (n, d_out) is what is left of the targets where the t strongest rivals keep theirs. Otherwise s = 0.
    """

    inputs: Float[Tensor, "n d_in"]
    weights: Float[Tensor, " n"]
    remains: Float[Tensor, "t n d_out"]
    rivals: Float[Tensor, "n s"]
    slots: int
    sigma: Nonlinearity
    part: SparseDictionary  # the m latents alone
    scale: float  # of the targets: a loss over its square is in the units of the rows

    @classmethod
    def of(cls, dictionary: SparseDictionary, rows: Activations, weights: Tensor, latents: list[int]) -> "Local":
        """The core of a dictionary around these latents, for raw rows."""
        core, rows = dictionary.core, dictionary.normalised(rows)
        sigma, chosen = core.nonlinearity, torch.tensor(latents, device=core.device)
        if not isinstance(sigma, (*OWN, TopKSelection)):
            raise ValueError(
                f"probe_landscape: {type(sigma).__name__} codes all latents of a row together, and the loss around some of them alone is "
                "not known. Use a dictionary with ReLU, JumpReLU, Gated or a Top-k, or rewrite this one."
            )
        around = _compete if isinstance(sigma, TopKSelection) else _alone
        parts = []
        for start in range(0, rows.n, block_rows(core.n_latents)):
            stop = start + block_rows(core.n_latents)
            inputs, targets = (side[start:stop].to(core.W_enc) for side in (rows.inputs, rows.targets))
            parts.append((core.centred(inputs), *around(core, inputs, targets, chosen)))
        inputs, remains, rivals = zip(*parts, strict=True)
        own = deepcopy(sigma).cpu().double()
        for name, tensor in core.per_latent().items():
            _put(own, name, tensor.detach()[chosen].cpu().double())
        sides = (t.detach()[chosen].cpu().double() for t in (core.W_enc, core.W_dec, core.b_enc))
        return cls(
            inputs=torch.cat(inputs).cpu().double(),
            weights=weights.double(),
            remains=torch.cat(remains, dim=1).cpu().double(),
            rivals=torch.cat(rivals).cpu().double(),
            slots=sigma.k - _fixed(sigma.k, len(latents), core.n_latents) if isinstance(sigma, TopKSelection) else len(latents),
            sigma=own,
            part=SparseDictionary(*sides, nonlinearity=own).eval(),
            scale=dictionary.target_scale,
        )

    n = property(lambda self: len(self.inputs))
    m = property(lambda self: self.part.n_latents)
    W_enc = property(lambda self: self.part.W_enc.detach())
    W_dec = property(lambda self: self.part.W_dec.detach())

    def pre(self, W_enc: Tensor) -> Tensor:
        """(..., n, m) pre-activations with these encoder rows (..., m, d_in)."""
        return self.inputs @ W_enc.transpose(-1, -2) + self.part.b_enc.detach()

    def codes(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (..., n, m), and how many rivals keep their place (..., n)."""
        if not isinstance(self.sigma, TopKSelection):
            return self.sigma(pre, inputs=None, dictionary=self.part), torch.zeros(pre.shape[:-1], dtype=torch.int64)
        rivals = self.rivals.expand(*pre.shape[:-1], -1)
        field = torch.cat([pre.detach(), rivals], dim=-1)
        places = min(self.slots, field.shape[-1])
        kept = torch.zeros_like(field, dtype=torch.bool).scatter(-1, field.topk(places, dim=-1).indices, True)
        return torch.where(kept[..., : self.m], pre.relu(), 0.0), kept[..., self.m :].sum(dim=-1)

    def loss(self, W_enc: Tensor, W_dec: Tensor) -> Tensor:
        """(...) with these rows (..., m, d_in) and (..., m, d_out).

        |R - C W|^2 = |R|^2 - 2 <C, R W^T> + <C^T C, W W^T>, row by row, so that nothing of size ... x n x d_out is made.
        """
        codes, kept = self.codes(self.pre(W_enc))
        projected = self._of_state(torch.stack([(left @ W_dec.transpose(-1, -2)).expand(codes.shape) for left in self.remains]), kept)
        written = ((codes @ (W_dec @ W_dec.transpose(-1, -2))) * codes).sum(dim=-1)
        return self._mean(self._squares(kept) - 2 * (codes * projected).sum(dim=-1) + written)

    def profiled(self, codes: Tensor, kept: Tensor) -> Tensor:
        """(...) the least loss over the decoder rows of these latents, for codes (..., n, m): least squares."""
        weighted = codes * self.weights[:, None]
        gram = weighted.transpose(-1, -2) @ codes
        projected = torch.zeros(*codes.shape[:-2], self.m, self.remains.shape[-1], dtype=torch.float64)
        for t, left in enumerate(self.remains):
            projected += (weighted * (kept == t)[..., None]).transpose(-1, -2) @ left
        inverse = torch.linalg.pinv(gram, rtol=1e-10, hermitian=True)
        explained = (inverse * (projected @ projected.transpose(-1, -2))).sum(dim=(-1, -2)) / self.weights.sum()
        total = self._mean(self._squares(kept)) * self.scale**2
        left = total - explained
        return torch.where(left > ROUNDING * total, left, 0.0) / self.scale**2

    def written(self, W_enc: Tensor, W_dec: Tensor) -> Tensor:
        """(..., n, d_out) what remains of the targets is this less than what remains without any rival: all that these rows change."""
        codes, kept = self.codes(self.pre(W_enc))
        given = self.remains[0] - self.remains[kept, torch.arange(self.n)]
        return codes @ W_dec + given

    def energy(self, written: Tensor) -> Tensor:
        """(...) mean square of (..., n, d_out)."""
        return self._mean(written.square().sum(dim=-1))

    def fires(self, W_enc: Tensor, codes: Tensor) -> Tensor:
        """bool (..., n, m), above rounding."""
        return codes > FIRES * self.inputs.norm(dim=1)[:, None] * W_enc.norm(dim=-1)[..., None, :]

    def _mean(self, squares: Tensor) -> Tensor:
        return (squares @ self.weights) / self.weights.sum() / self.scale**2

    def _squares(self, kept: Tensor) -> Tensor:
        """(..., n) |what remains|^2 where so many rivals keep their place."""
        return self.remains.square().sum(dim=-1)[kept, torch.arange(self.n)]

    def _of_state(self, values: Tensor, kept: Tensor) -> Tensor:
        """Of (t, ..., n, m) the entry that each (..., n) calls for."""
        if len(values) == 1:
            return values[0]
        return values.gather(0, kept[None, ..., None].expand(1, *values.shape[1:]))[0]


def _alone(core: SparseDictionary, inputs: Tensor, targets: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    latents, reconstruction, _ = core(inputs)
    mine = latents.by_latent(chosen) @ core.W_dec[chosen]
    return (targets - reconstruction + mine)[None].double(), inputs.new_zeros(len(inputs), 0)


def _compete(core: SparseDictionary, inputs: Tensor, targets: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    pre = core.pre(inputs)
    pre[:, chosen] = -torch.inf
    k, others = core.nonlinearity.k, core.n_latents - len(chosen)
    values, indices = pre.topk(min(k, others), dim=1)
    values, fixed = values.relu(), _fixed(k, len(chosen), core.n_latents)
    left = (targets - core.b_dec).double()
    for place in range(fixed):
        left = left - values[:, place, None].double() * core.W_dec[indices[:, place]].double()
    remains = [left]
    for place in range(fixed, values.shape[1]):
        remains.append(remains[-1] - values[:, place, None].double() * core.W_dec[indices[:, place]].double())
    return torch.stack(remains), values[:, fixed:]


def _fixed(k: int, m: int, n_latents: int) -> int:
    """How many of the other latents keep their places whatever m latents do."""
    return min(max(k - m, 0), n_latents - m)


def _put(module: Nonlinearity, name: str, value: Tensor) -> None:
    """A parameter or buffer by its name, with another number of rows."""
    if name in dict(module.named_parameters()):
        setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    else:
        setattr(module, name, value)
