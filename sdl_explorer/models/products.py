"""Pre-activations a piece at a time: exact in float32, or bounded from above at the price of a bfloat16 product.

    upper bound of x . W_i + b_i  =  x^ . W^_i + b_i + |x| e_i,      e_i >= (rho |W_i| + (1 + rho) |W_i - W^_i|)

with ^ for rounding to bfloat16 and rho the largest |x - x^| / |x| of the rows: a product of slightly wider
matrices, [x^, 1, 1, |x|] and [W^, b in two parts, e]. The latents of the largest bounds are candidates; their
float32 pre-activations decide, and are certain where they reach the bounds of all others.
"""

import os
import warnings
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sdl_explorer.models.dictionary import SparseDictionary

GROUP = 16  # members of a group whose maximum stands for them
BLOCK = 512  # rows whose pre-activations are held at a time on the CPU
TILE = 2**23  # pre-activations that are, where latents are taken in turn
ROWS = 512  # of a batch that earn what the rounding of the weights costs
CANDIDATES = "SDL_EXPLORER_CANDIDATES"  # the environment variable that forces "float32" or "bfloat16"
HALF = torch.bfloat16
ULP = 2.0**-8  # relative error of a rounding to bfloat16, at most

with warnings.catch_warnings():  # torch says once in a process that its sparse tensors may change
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.zeros(2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0), (1, 1))


def machine_has_bfloat16() -> bool:
    """Does this CPU multiply bfloat16 matrices by instructions of their own (amx_bf16, avx512_bf16)?"""
    facts = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(facts.get("amx_bf16") or facts.get("avx512_bf16"))


def in_bfloat16(inputs: Tensor, dictionary: SparseDictionary) -> bool:
    """Do candidates come from a bfloat16 product? A fixed property of the machine, unless the environment says which; never for
    a handful of rows."""
    forced = os.environ.get(CANDIDATES, "")
    if forced not in ("", "float32", "bfloat16"):
        raise ValueError(f"{CANDIDATES} is {forced!r}; it may be 'float32' or 'bfloat16'. Unset it to let the machine decide.")
    fits = inputs.device.type == "cpu" and inputs.dtype == dictionary.W_enc.dtype == torch.float32 and len(inputs) >= ROWS
    return fits and (forced == "bfloat16" or (forced == "" and machine_has_bfloat16()))


def in_mixed_precision(inputs: Tensor) -> bool:
    """Does torch.autocast ask for bfloat16 on an accelerator? The CPU bounds what it rounds, and needs no leave."""
    return inputs.device.type != "cpu" and torch.is_autocast_enabled(inputs.device.type)


class Exact:
    """x W_enc^T + b_enc of the rows x, already centred, in their own dtype."""

    def __init__(self, x: Float[Tensor, "n d_in"], W: Float[Tensor, "m d_in"], b: Float[Tensor, " m"]):
        self.x, self.W, self.b = x, W, b
        self.n, self.m, self.device = len(x), len(W), x.device

    @classmethod
    def of(cls, inputs: Float[Tensor, "n d_in"], dictionary: SparseDictionary, gain: Float[Tensor, " m"] | None = None) -> "Exact":
        """Of raw inputs; with `gain`, latent i's are multiplied by gain_i."""
        W, b = dictionary.W_enc.detach(), dictionary.b_enc.detach()
        return cls(dictionary.centred(inputs), *((W, b) if gain is None else (W * gain[:, None], b * gain)))

    def rows(self, chosen: Tensor) -> "Exact":
        return Exact(self.x[chosen], self.W, self.b)

    def empty(self, size: int) -> Tensor:
        return self.x.new_empty(size)

    def into(self, out: Tensor, rows: slice, latents: slice) -> Tensor:
        return torch.addmm(self.b[latents], self.x[rows], self.W[latents].T, out=out)

    def at(self, indices: Int[Tensor, " entries"], offsets: Int[Tensor, " rows"], rows: slice = slice(None)) -> Float[Tensor, " entries"]:
        """Those of single entries: row r has the latents indices[offsets[r]:offsets[r + 1]]."""
        x = self.x[rows]
        pattern = torch.sparse_csr_tensor(offsets, indices, x.new_zeros(len(indices)), (len(x), self.m))
        return torch.sparse.sampled_addmm(pattern, x, self.W.T, beta=0.0).values() + self.b[indices]

    def where(self, flat: Int[Tensor, " entries"]) -> Float[Tensor, " entries"]:
        """Those of single entries at flat indices that are ordered by row."""
        return self.at(flat % self.m, torch.searchsorted(flat // self.m, torch.arange(self.n + 1, device=self.device)))


class Rounded(Exact):
    """The same from factors rounded to bfloat16: what mixed precision selects by."""

    def __init__(self, exact: Exact):
        super().__init__(exact.x.to(HALF), exact.W.to(HALF), exact.b.to(HALF))


class Upper:
    """Numbers in bfloat16 whose `ceiling` is at least x . W_i + b_i - floor_i, to float32's own rounding; floor is one for all or for each.

    Rows are taken about their mean first, which makes the bounds close where the data lie far from zero.
    """

    def __init__(self, exact: Exact, floor: Tensor | float = 0.0):
        self.n, self.m, self.device = exact.n, exact.m, exact.device
        mean = exact.x.mean(dim=0)
        x = exact.x - mean
        rounded, norm = x.to(HALF), x.norm(dim=1)
        rho = ((x - rounded).norm(dim=1) / norm.clamp_min(1e-30)).amax()
        ones = torch.ones(self.n, 2, dtype=HALF)
        self._x = torch.cat([rounded, ones, _up(norm)[:, None], ones.new_zeros(self.n, 5)], dim=1)

        noise = x.shape[1] * 2.0**-23  # of two float32 sums, this product's and the exact one's
        self._W = torch.empty(self.m, x.shape[1] + 8, dtype=HALF)
        for rows in torch.arange(self.m).split(BLOCK):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            W, W_rounded = exact.W[part], self._W[part, : x.shape[1]]
            W_rounded.copy_(W)
            slack = (rho + noise) * W.norm(dim=1) + (1 + rho) * (W - W_rounded).norm(dim=1)
            bias = exact.b[part] + W @ mean - (floor[part] if isinstance(floor, Tensor) and floor.ndim > 0 else floor)
            high = bias.to(HALF)
            low = bias - high
            self._W[part, x.shape[1] :] = torch.stack([high, _up(low), _up(slack), *[torch.zeros_like(high)] * 5], dim=1)

    def empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=HALF)

    def into(self, out: Tensor, rows: slice, latents: slice) -> Tensor:
        return torch.mm(self._x[rows], self._W[latents].T, out=out)


def _up(values: Tensor) -> Tensor:
    """In bfloat16, and not smaller."""
    return (values + values.abs() * (2 * ULP)).to(HALF)


def ceiling(bounds: Tensor) -> Tensor:
    """In float32, and not smaller than the number that was rounded to it."""
    bounds = bounds.float()
    return bounds + bounds.abs() * (2 * ULP)


def with_spare(k: int, most: int) -> int:
    """How many candidates k winners are looked for among."""
    return min(k + max(16, k), most)


def blocks(product: Exact | Upper) -> Iterator[tuple[slice, Tensor]]:
    """(rows, all latents' scores), a block that stays in cache at a time; the next one overwrites it.

    An accelerator takes all rows at once, so that it never waits for the host.
    """
    size = product.n if product.device.type != "cpu" else min(product.n, BLOCK)
    buffer = product.empty(size * product.m).view(size, product.m)
    for begin in range(0, product.n, size):
        rows = slice(begin, min(begin + size, product.n))
        yield rows, product.into(buffer[: rows.stop - begin], rows, slice(None))


def tiles(product: Exact | Upper) -> Iterator[tuple[slice, Tensor]]:
    """(latents, all rows' scores), as `blocks` across: each weight is read once, not once for each block."""
    n, m = product.n, product.m
    width = m if product.device.type != "cpu" else min(m, max(GROUP, TILE // n // GROUP * GROUP))
    buffer = product.empty(n * width)
    for begin in range(0, m, width):
        latents = slice(begin, min(begin + width, m))
        yield latents, product.into(buffer[: n * (latents.stop - begin)].view(n, -1), slice(None), latents)
