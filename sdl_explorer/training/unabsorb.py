"""Unabsorb: take the parent out of a latent that writes it with its own feature, and let the parent's latent fire there again."""

from dataclasses import replace

import param
import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations
from sdl_explorer.training.firings import Firings
from sdl_explorer.training.interventions import BLOCK, Intervention, expected_errors, named_latents, row_losses
from sdl_explorer.training.plan import Plan, PlanRow
from sdl_explorer.training.state import TrainState


class Unabsorb(Intervention):
    """Give an absorbed parent back to its own latent.

    With p the parent's latent, a the one that absorbed it, and unit rows of the decoder w_p, w_a,

        u = unit(w_a - (w_a w_p) w_p)        W_dec_a = |W_dec_a| u        W_enc_a = length * u, its bias stays
        W_enc_p = W_enc_p - (W_enc_p u) u    for each u taken out of p's absorbers: the hole is filled

    so that a writes what is its own, with codes that sum to what it wrote along u, and p no longer avoids it. In a transcoder,
    where u is no direction of the inputs, both encoder rows use the response of a instead, without the part along p's.
    Without `parents`, p is the latent whose decoder row is nearest to w_a, at a cosine between `cosine` and 0.95, and which
    fires on at most `together` of a's rows, with a hole: W_enc_p u < 0. Optimiser moments of the rows are cleared.

    u is at a right angle to the parent because nothing tells us the angle, and {parent, child} gives the same data as the exclusive
    pair {parent, parent + child}: without truth these pairs are candidates.

    Raises ValueError where no pair is found, and for a tied encoder, which has no hole of its own.
    """

    latents = param.Parameter(None, doc="Which latents have absorbed a parent; None: all that look like it.")
    parents = param.List([], item_type=int, doc="The parent's latent of each of them; empty: the nearest that is silent with it.")
    cosine = param.Number(0.3, bounds=(0, 1), doc="Smallest decoder cosine of a parent that is looked for.")
    together = param.Number(0.2, bounds=(0, 1), doc="Largest share of the absorber's rows on which that parent fires.")
    least = param.Integer(20, bounds=(1, None), doc="Choose rows on which an absorber that is looked for has fired.")

    @torch.no_grad()
    def plan(self, state: TrainState, choose: Activations, generator: Generator) -> Plan:
        dictionary = state.dictionary
        if dictionary.tied:
            raise ValueError(
                "Unabsorb: the encoder is tied to the decoder, so a parent has no hole. Give it one with rewrites.untied(dictionary)."
            )
        firings = Firings(dictionary, choose)
        pairs = self._pairs(state, firings)
        absorbers, parents = list(pairs), list(dict.fromkeys(pairs.values()))
        latents = torch.tensor([*absorbers, *parents], device=dictionary.device)
        W_enc, W_dec = dictionary.W_enc.detach().clone(), dictionary.W_dec.detach().clone()
        taken: dict[int, list[Tensor]] = {p: [] for p in parents}
        for a, p in pairs.items():
            writes = own_part(dictionary.W_dec[a], dictionary.W_dec[p])
            reads = writes if choose.kind == "sae" else own_part(_response(firings, a), _response(firings, p))
            W_enc[a] = _length(firings, a, writes, reads) * reads
            W_dec[a] = dictionary.W_dec[a].norm() * writes
            taken[p].append(reads)
        for p, directions in taken.items():
            basis = torch.linalg.qr(torch.stack(directions, dim=1)).Q
            W_enc[p] -= basis @ (basis.T @ W_enc[p])
        names = ", ".join(f"{a} of {p}" for a, p in list(pairs.items())[:8])
        plan = Plan(
            "unabsorb",
            latents,
            W_enc[latents],
            dictionary.b_enc[latents],
            W_dec[latents],
            {name: rows[latents] for name, rows in dictionary.per_latent().items()},
            state.pins,
            latents,
            {},
            f"{len(absorbers)} latents give up the parent that they write ({names}{', ...' if len(pairs) > 8 else ''}), and {len(parents)} "
            "parents' latents read it there again; Adam moments of all of them will be zeroed.",
            _preview(dictionary, pairs, latents, W_enc, W_dec),
            f"session.unabsorb({absorbers}, parents={list(pairs.values())})",
        )
        losses, _ = row_losses(dictionary, choose)
        return replace(plan, expected=expected_errors(plan, state, choose, float(losses.mean())))

    def _pairs(self, state: TrainState, firings: Firings) -> dict[int, int]:
        """Absorber -> parent's latent."""
        n = state.dictionary.n_latents
        named = None if self.latents is None else named_latents("Unabsorb", self.latents, n).tolist()
        if self.parents:
            parents = [int(named_latents("Unabsorb(parents=)", [p], n)) for p in self.parents]
            if named is None or len(named) != len(parents) or set(named) & set(parents):
                raise ValueError(
                    f"Unabsorb: {len(named or [])} latents and {len(parents)} parents; give one parent for each latent, and no latent on "
                    "both sides."
                )
            return dict(zip(named, parents, strict=True))
        pairs = self._candidates(state, firings, named)
        if not pairs:
            raise ValueError(
                f"Unabsorb: no latent has a neighbour at a decoder cosine of {self.cosine:g} to 0.95 that fires on at most "
                f"{self.together:.0%} of its rows and avoids it. Name latents and parents, or look at find_absorption."
            )
        return pairs

    def _candidates(self, state: TrainState, firings: Firings, named: list[int] | None) -> dict[int, int]:
        """Absorber -> the nearest of its neighbours with more, or nearer, neighbours of its own; of two equal ones the more frequent."""
        near = self._neighbours(state, firings)
        rank = {i: (round(sum(found.values()), 3), int(firings.count[i])) for i, found in near.items()}
        above = {a: {p: c for p, c in found.items() if rank[p] > rank[a]} for a, found in near.items()}
        pairs = {a: max(found, key=lambda p: found[p]) for a, found in above.items() if found and (named is None or a in named)}
        return {a: p for a, p in pairs.items() if p not in pairs}

    def _neighbours(self, state: TrainState, firings: Firings) -> dict[int, dict[int, float]]:
        """For each latent those that are near, silent with it, and avoid what is its own, with their decoder cosines."""
        dictionary, often = state.dictionary, firings.count >= self.least
        writes, near = normalize(dictionary.W_dec, dim=1), {}
        for block in often.nonzero().flatten().split(BLOCK):
            cosines = writes[block] @ writes.T
            close = (cosines >= self.cosine) & (cosines < 0.95) & often
            for a, row, some in zip(block.tolist(), cosines, close, strict=True):
                others = some.nonzero().flatten()
                apart = others[firings.share(a, others) <= self.together].tolist()
                avoids = lambda p, a=a: float(dictionary.W_enc[p] @ own_part(dictionary.W_dec[a], dictionary.W_dec[p])) < 0
                near[a] = {p: float(row[p]) for p in apart if dictionary.d_in != dictionary.d_out or avoids(p)}
        return {a: {p: c for p, c in found.items() if a in near[p]} for a, found in near.items()}


def own_part(row: Tensor, parent: Tensor) -> Tensor:
    """unit(w_a - (w_a w_p) w_p): the row without its part along the parent's."""
    row, parent = normalize(row, dim=0), normalize(parent, dim=0)
    return normalize(row - (row @ parent) * parent, dim=0)


def _response(firings: Firings, latent: int) -> Tensor:
    rows, value = firings.of(latent)
    return (value[:, None] * (firings.inputs[rows] - firings.inputs.mean(dim=0))).sum(dim=0)


def _length(firings: Firings, latent: int, writes: Tensor, reads: Tensor) -> Tensor:
    """The encoder length at which the codes sum to what the latent wrote along its own part."""
    dictionary, (rows, value) = firings.dictionary, firings.of(latent)
    kept = (value.sum() * normalize(dictionary.W_dec[latent], dim=0) @ writes) - len(rows) * dictionary.b_enc[latent]
    excess = (firings.inputs[rows] @ reads).sum()
    return kept / excess if excess > 0 and kept > 0 else dictionary.W_enc[latent].norm()


def _preview(dictionary, pairs: dict[int, int], latents: Tensor, W_enc: Tensor, W_dec: Tensor) -> tuple[PlanRow, ...]:
    """One line a latent, its nearest other one afterwards, and how far its encoder row turned."""
    after = normalize(W_dec, dim=1)
    cosines = after[latents] @ after.T
    cosines[torch.arange(len(latents)), latents] = -torch.inf
    cosine, nearest = (side.tolist() for side in cosines.max(dim=1))
    turned = torch.cosine_similarity(W_enc[latents], dictionary.W_enc[latents], dim=1).tolist()
    rows = []
    for at, i in enumerate(latents.tolist()):
        origin = f"without parent {pairs[i]}" if i in pairs else "its holes filled"
        norm, bias = float(W_enc[i].norm()), float(dictionary.b_enc[i])
        rows.append(PlanRow(i, origin, None, None, int(nearest[at]), cosine[at], norm, bias, turned[at]))
    return tuple(rows)
