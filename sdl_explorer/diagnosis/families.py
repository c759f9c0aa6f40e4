"""Who writes a parent's direction, with each child and without: the sums behind `find_absorption`."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdl_explorer.data.activations import Truth
from sdl_explorer.diagnosis.cosines import CELLS, cosines_of, unit
from sdl_explorer.diagnosis.observe import Accumulator, Rows, Stream
from sdl_explorer.models.dictionary import SparseDictionary

TWIN = 0.9  # cosine of two decoder rows from which they are latents of one feature
TWINS = 8  # at most
NEAR = 32  # latents that are looked at for each feature: those whose decoder rows are nearest to it
MAIN_COSINE, FULL_COSINE, ENOUGH = 0.1, 0.025, 0.4  # of SAEBench's absorption scores (Karvonen et al. 2025)
CELLS_OF = {"alone": (0,), "without": (0, 1), "only": (2,), "with": (2, 3)}  # 2 * [child active] + [a sibling active]


class Family(NamedTuple):
    """The parent-child edges of a truth: (n_edges,) ids, and each edge's lineage: parent, child, then the parent's ancestors."""

    parent: Tensor
    child: Tensor
    lineage: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, truth: Truth) -> "Family":
        edges = [(int(parent), child) for child, parent in enumerate(truth.parents) if parent is not None]
        lineage = tuple((parent, child, *_ancestors(truth.parents, parent)) for parent, child in edges)
        columns = torch.tensor(edges, dtype=torch.int64).reshape(-1, 2)
        return cls(columns[:, 0], columns[:, 1], lineage)


def _ancestors(parents, feature: int) -> list[int]:
    found: list[int] = []
    while (above := parents[feature]) is not None:
        if above == feature or above in found:
            raise ValueError(f"find_absorption: feature {feature} is its own ancestor in truth.parents; a hierarchy is a forest.")
        found.append(feature := int(above))
    return found


class Candidates(NamedTuple):
    """The latents that one edge's rows are searched for, from the weights alone.

    latents   (n_edges, c) ids, each once an edge; -1 pads
    cosine    (n_edges, c) of decoder rows with the parent's direction
    writes    (n_edges, c) what a code of 1 writes along the parent: W_dec_j / target_scale . u, where u is dual to the parent in
              its lineage: u . parent = 1, u . child = u . ancestor = 0 (pseudo-inverse). For orthogonal features u is the parent.
    main      (n_edges, TWINS) the parent's latents, places in `latents`, best cosine first; -1 pads
    child     (n_edges,) the child's best latent
    dual      (n_edges, d_out) u
    """

    latents: Tensor
    cosine: Tensor
    writes: Tensor
    main: Tensor
    child: Tensor
    dual: Tensor

    @classmethod
    def of(cls, dictionary: SparseDictionary, truth: Truth, family: Family) -> "Candidates":
        directions = truth.target_features.to(dictionary.device).float()
        features, place = torch.cat([family.parent, family.child]).unique(return_inverse=True)
        near_parent, near_child = nearest(dictionary.W_dec, directions[features], NEAR)[place.to(dictionary.device)].chunk(2)
        latents = torch.cat([near_parent, near_child], dim=1)
        repeated = torch.cat([torch.zeros_like(near_parent, dtype=torch.bool), (near_child[:, :, None] == near_parent[:, None]).any(2)], 1)
        targets = truth.target_features.detach().cpu().double().numpy()
        dual = np.stack([np.linalg.pinv(targets[list(members)])[:, 0] for members in family.lineage])
        dual = torch.as_tensor(dual, dtype=torch.float32, device=dictionary.device)
        cosine, writes = (torch.zeros(latents.shape, device=dictionary.device) for _ in range(2))
        twin = torch.zeros_like(near_parent, dtype=torch.bool)
        step = max(1, CELLS // (latents.shape[1] * dictionary.d_out))
        for edges in torch.arange(len(latents)).split(step):
            rows = dictionary.W_dec[latents[edges]].float()
            writes[edges] = torch.einsum("ecd,ed->ec", rows, dual[edges]) / dictionary.target_scale
            rows = unit(rows.flatten(0, 1)).view_as(rows)
            cosine[edges] = torch.einsum("ecd,ed->ec", rows, directions[family.parent[edges]])
            twin[edges] = torch.einsum("ecd,ed->ec", rows[:, : near_parent.shape[1]], rows[:, 0]) >= TWIN
        twin[:, 0] = True
        places = torch.arange(near_parent.shape[1], device=dictionary.device).expand_as(near_parent)
        main = torch.where(twin, places, len(places[0])).sort(dim=1).values[:, :TWINS]
        main = torch.where(main < len(places[0]), main, -1)
        latents, writes = latents.masked_fill(repeated, -1), writes.masked_fill(repeated, 0)
        return cls(latents, cosine.masked_fill(repeated, -1), writes, main, near_child[:, 0], dual)


def nearest(rows: Tensor, directions: Tensor, k: int) -> Tensor:
    """Ids (n, min(k, n_rows)) of the rows with the largest cosines to each unit direction, best first, then by id."""
    values = torch.empty(len(directions), 0, device=rows.device)
    ids = values.long()
    for block in torch.arange(len(rows), device=rows.device).split(max(1, CELLS // len(directions))):
        top, at = cosines_of(rows[block], directions).topk(min(k, len(block)), dim=1)
        values, ids = torch.cat([values, top], dim=1), torch.cat([ids, block[at]], dim=1)
        values, at = values.topk(min(k, values.shape[1]), dim=1)
        ids = ids.gather(1, at)
    ids, at = ids.sort(dim=1)
    return ids.gather(1, values.gather(1, at).sort(dim=1, descending=True, stable=True).indices)


class FamilySums(Accumulator):
    """Per edge and cell of parent-active rows, over those rows; a cell is 2 * [child active] + [one of its siblings active].

    n, activation = sum 1, sum c_p
    written       = sum u . (recon - b_dec)             all latents' writing along the parent
    taken         = sum_r z_j writes_j                  (n_edges, 4, c) that of each candidate
    fired         = sum [z_j fires]                     (n_edges, 4, TWINS) of each latent of the parent
    any           = sum [one of them fires]
    main          = sum m,  m = sum over the parent's latents of z_j writes_j; and sum m^2, sum m c_p, sum c_p^2 behind its spread
    full, fraction   sums of SAEBench's two scores (Karvonen et al. 2025), with the true activation c_p as the projection
    """

    def __init__(self, stream: Stream, truth: Truth):
        super().__init__(stream)
        dictionary = stream.dictionary
        self.family = Family.of(truth)
        self.n_edges = len(self.family.lineage)
        self.count = torch.zeros(dictionary.n_latents, dtype=torch.int64)
        if self.n_edges == 0:
            return
        self.codes = truth.codes
        self.of = Candidates.of(dictionary, truth, self.family)
        self.sums: dict[str, Tensor] = {}
        self._over: dict[tuple[str, str], np.ndarray] = {}
        self.groups, self.group = (x.to(dictionary.device) for x in self.family.parent.unique(return_inverse=True))

    def add(self, rows: Rows) -> None:
        self.count += rows.count.cpu()
        if self.n_edges == 0:
            return
        device = rows.inputs.device
        codes = self.codes[rows.start : rows.start + rows.n].to(device)
        parent, child = self.family.parent.to(device), self.family.child.to(device)
        active = codes > 0
        row, edge = active[:, parent].nonzero(as_tuple=True)
        with_child = active[:, child]
        children = torch.zeros(rows.n, len(self.groups), dtype=torch.int64, device=device).index_add_(1, self.group, with_child.long())
        with_child = with_child[row, edge].long()
        cell = 4 * edge + 2 * with_child + (children[row, self.group[edge]] > with_child)
        step = max(1, CELLS // (self.of.latents.shape[1] + rows.reconstruction.shape[1]))
        for some in torch.arange(len(row), device=device).split(step):
            self._add_pairs(rows, codes, row[some], edge[some], cell[some])

    def _add_pairs(self, rows: Rows, codes: Tensor, row: Tensor, edge: Tensor, cell: Tensor) -> None:
        z, dictionary = rows.codes, self.stream.dictionary
        activation = codes[row, self.family.parent.to(row.device)[edge]].float()
        written = rows.reconstruction[row] - dictionary.b_dec.float() / dictionary.target_scale
        latents, cosine = self.of.latents[edge], self.of.cosine[edge]
        taken = z[row[:, None], latents.clamp_min(0)] * self.of.writes[edge]  # repeated latents write 0
        place = self.of.main[edge]
        known = place >= 0
        own = taken.new_zeros(len(taken), taken.shape[1] + 1, dtype=torch.bool).scatter_(1, place + 1, True)[:, 1:]
        fired = known & (z[row[:, None], latents.gather(1, place.clamp_min(0))] > 0)
        main = torch.where(own, taken, 0).sum(dim=1)
        others = torch.where(own, 0, taken)
        full, fraction = saebench(others, cosine, main, fired.any(dim=1), activation)
        parts = {
            "n": torch.ones_like(activation),
            "activation": activation,
            "activation_square": activation.square(),
            "written": (written * self.of.dual[edge]).sum(dim=1),
            "taken": taken,
            "fired": fired.float(),
            "any": fired.any(dim=1).float(),
            "main": main,
            "main_square": main.square(),
            "main_activation": main * activation,
            "full": full.float(),
            "fraction": fraction,
        }
        cells, place = cell.unique(return_inverse=True)
        for name, values in parts.items():
            sums = values.new_zeros(len(cells), *values.shape[1:]).index_add_(0, place, values).cpu().double()
            if name not in self.sums:
                self.sums[name] = torch.zeros(4 * self.n_edges, *values.shape[1:], dtype=torch.float64)
            self.sums[name][cells.cpu()] += sums

    def over(self, name: str, cells: str) -> np.ndarray:
        """A sum over "with", "without", "only" (the child, no sibling) or "alone" (no child), (n_edges, ...)."""
        if (name, cells) not in self._over:
            values = self.sums[name].numpy()
            self._over[name, cells] = values.reshape(self.n_edges, 4, *values.shape[1:])[:, list(CELLS_OF[cells])].sum(axis=1)
        return self._over[name, cells]


def saebench(others: Tensor, cosine: Tensor, main: Tensor, fired: Tensor, activation: Tensor) -> tuple[Tensor, Tensor]:
    """Full absorption (bool) and absorption fraction of rows, as SAEBench defines them (Karvonen et al. 2025).

        full      no latent of the parent fires, and the largest other contribution is at least 0.4 c_p, at a cosine of at least 0.025
        A         = sum of the 3 largest contributions of others with a cosine of at least 0.1;  M = main
        fraction  = 0 if M >= c_p or A < 0.4 c_p, 1 if M <= 0, else min(A, c_p - M) / (min(A, c_p - M) + M)

    others (n, c) contributions along the parent, 0 for its own latents; cosine (n, c); main, fired, activation (n,).
    """
    largest, at = others.max(dim=1)
    enough = ENOUGH * (1 - 1e-5) * activation  # a share of exactly 0.4 counts, whatever its rounding
    full = ~fired & (cosine.gather(1, at[:, None])[:, 0] >= FULL_COSINE) & (largest >= enough)
    absorbed = torch.where(cosine >= MAIN_COSINE, others, 0).clamp_min(0).topk(min(3, others.shape[1]), dim=1).values.sum(dim=1)
    missing = torch.minimum(absorbed, activation - main)
    fraction = torch.where(main <= 0, 1.0, missing / (missing + main))
    return full, torch.where((main >= activation) | (absorbed < enough), 0.0, fraction)
