"""Split: a latent that stands for two directions keeps one of them and gives the other to a spare latent."""

from dataclasses import replace
from typing import NamedTuple

import param
import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations
from sdl_explorer.training.firings import Firings, copies
from sdl_explorer.training.interventions import Intervention, expected_errors, named_latents, row_losses
from sdl_explorer.training.plan import Plan, PlanRow
from sdl_explorer.training.state import TrainState

SWEEPS = 20


class Lines(NamedTuple):
    """Two directions that rows lie along, which of them each row belongs to, and the share of the squares that one and two explain."""

    directions: Float[Tensor, "2 d"]
    place: Int[Tensor, " m"]
    one: float
    two: float


class Split(Intervention):
    """Give half of a latent that stands for two directions to a spare one.

    On the choose rows where latent i fires, t = x_r - recon + z_i W_dec_i is what all other latents leave for it to write. One
    direction explains the share `one` of the squares of t, two that share the rows out explain `two`:

        one = max_u sum relu(t u)^2 / sum |t|^2      two = max_{u,v} sum max(relu(t u), relu(t v))^2 / sum |t|^2

    (k-means for lines, from the direction in which the rows differ most). A merged pair has 1/2 and 1, a latent with one meaning
    two nearly equal shares. The latent takes u, the spare v, in decoder and encoder (the encoder of a transcoder: the response of
    those rows); lengths keep the sum of the codes that these rows need; decoder norms, biases and thresholds are the latent's. Spares
    are dead latents, then such as fire on no choose row, then copies (both rows at cosine 0.95 with another latent). The widest
    gap two - one comes first where there are fewer spares than latents. Optimiser moments of all these rows are cleared.

    Without truth two directions are a candidate, not a finding: two faces of one concept look the same.

    Raises ValueError where no latent has two directions, and where none is spare.
    """

    latents = param.Parameter(None, doc="Which latents; None: all with two directions.")
    spares = param.List([], item_type=int, doc="Which latents take the second direction; empty: dead ones and copies.")
    gain = param.Number(0.15, bounds=(0, 1), doc="Share of the squares that a second direction has to add.")
    least = param.Integer(20, bounds=(2, None), doc="Choose rows that each direction needs.")

    @torch.no_grad()
    def plan(self, state: TrainState, choose: Activations, generator: Generator) -> Plan:
        dictionary = state.dictionary
        firings = Firings(dictionary, choose)
        found = self._found(state, firings)
        spares = self._spares(state, firings, set(found))[: len(found)]
        widest = sorted(found, key=lambda i: found[i].one - found[i].two)[: len(spares)]
        latents = torch.tensor([*widest, *spares], device=dictionary.device)
        of = torch.tensor([*widest, *widest], device=dictionary.device)
        halves = [(i, half) for half in (0, 1) for i in widest]
        made = [_half(firings, i, found[i], half, same_side=choose.kind == "sae") for i, half in halves]
        W_enc, W_dec = (torch.stack(side) for side in zip(*made, strict=True))
        left = f" {len(found) - len(widest)} more have no spare." if len(found) > len(widest) else ""
        mean = lambda side: sum(getattr(found[i], side) for i in widest) / len(widest)
        plan = Plan(
            "split",
            latents,
            W_dec if dictionary.tied else W_enc,
            dictionary.b_enc[of],
            W_dec,
            {name: rows[of] for name, rows in dictionary.per_latent().items()},
            state.pins,
            latents,
            {},
            f"{len(widest)} latents keep one of two directions and {len(widest)} spare ones take the other: one explains "
            f"{mean('one'):.0%} of what is theirs to write, two {mean('two'):.0%}.{left} Adam moments of those latents will be zeroed.",
            self._preview(state, latents, halves, found, W_enc, W_dec),
            f"session.split({widest}, spares={spares})",
        )
        losses, _ = row_losses(dictionary, choose)
        return replace(plan, expected=expected_errors(plan, state, choose, float(losses.mean())))

    def _found(self, state: TrainState, firings: Firings) -> dict[int, Lines]:
        """The latents to split, by number."""
        if self.latents is None:
            held = set() if state.pins is None else set(state.pins.latents.tolist())
            asked = [i for i in range(state.dictionary.n_latents) if i not in held]
        else:
            asked = named_latents("Split", self.latents, state.dictionary.n_latents).tolist()
        often = [i for i in asked if int(firings.count[i]) >= 2 * self.least]
        lines = {i: two_lines(firings.left_for(i)) for i in often}
        enough = lambda found: int(torch.bincount(found.place, minlength=2).min()) >= self.least
        found = {i: one for i, one in lines.items() if enough(one) and one.two - one.one >= self.gain}
        if not found:
            best = max((one.two - one.one for one in lines.values()), default=0.0)
            raise ValueError(
                f"Split: none of {len(asked)} latents has two directions: a second one adds at most {best:.2f} of the squares, and gain is "
                f"{self.gain:g}, or fewer than {self.least} choose rows have it. Name others, or lower gain or least."
            )
        return found

    def _spares(self, state: TrainState, firings: Firings, splitting: set[int]) -> list[int]:
        if self.spares:
            spares = named_latents("Split(spares=)", self.spares, state.dictionary.n_latents).tolist()
            return [i for i in spares if i not in splitting]
        silent = (firings.count == 0).nonzero().flatten().tolist()
        order = dict.fromkeys([*state.dead.nonzero().flatten().tolist(), *silent, *copies(state.dictionary)])
        spares = [i for i in order if i not in splitting]
        if not spares:
            raise ValueError(
                "Split: no latent is spare: none is dead, silent on the choose rows or a copy. Name some with spares=[...], or make the "
                "dictionary wider."
            )
        return spares

    def _preview(self, state, latents, halves, found, W_enc, W_dec) -> tuple[PlanRow, ...]:
        """One line a latent; the nearest among the latents that stay."""
        cosines = normalize(W_dec, dim=1) @ normalize(state.dictionary.W_dec, dim=1).T
        cosines[:, latents] = -torch.inf
        cosine, nearest = (side.tolist() for side in cosines.max(dim=1))
        rows = []
        for at, (i, half) in enumerate(halves):
            n = int((found[i].place == half).sum())
            origin = f"direction {half + 1} of latent {i}, {n:,} rows"
            norm, bias = float(W_enc[at].norm()), float(state.dictionary.b_enc[i])
            rows.append(PlanRow(int(latents[at]), origin, None, None, nearest[at], cosine[at], norm, bias))
        return tuple(rows)


def _half(firings: Firings, latent: int, found: Lines, half: int, same_side: bool) -> tuple[Tensor, Tensor]:
    """Encoder and decoder row of one of the two directions."""
    dictionary, mine = firings.dictionary, found.place == half
    direction, norm = found.directions[half], dictionary.W_dec[latent].norm()
    inputs = firings.inputs[firings.of(latent)[0][mine]]
    written = (firings.left_for(latent)[mine] @ direction).relu()
    reads = direction if same_side else normalize((written[:, None] * (inputs - firings.inputs.mean(dim=0))).sum(dim=0), dim=0)
    norm = norm if norm > 0 else torch.ones_like(norm)
    excess = (inputs @ reads).sum()
    wanted = written.sum() / norm - len(inputs) * dictionary.b_enc[latent]
    length = wanted / excess if excess > 0 and wanted > 0 else dictionary.W_enc[latent].norm()
    return length * reads, norm * direction


def two_lines(rows: Float[Tensor, "m d"]) -> Lines:
    """One and two directions of rows, each row with the one it lies along; see `Split`."""
    total = rows.square().sum().clamp_min(torch.finfo(rows.dtype).tiny)
    first, apart = _line(rows), normalize(rows, dim=1)
    apart = apart - apart.mean(dim=0)
    axis = apart[apart.square().sum(dim=1).argmax()]
    for _ in range(SWEEPS):
        axis = normalize(apart.T @ (apart @ axis), dim=0)
    place = (apart @ axis > 0).long()
    for _ in range(SWEEPS):
        directions = torch.stack([_line(rows[place == half]) for half in (0, 1)])
        along = rows @ directions.T
        moved = along.argmax(dim=1)
        if torch.equal(moved, place):
            break
        place = moved
    both = (rows @ directions.T).max(dim=1).values.relu().square().sum()
    return Lines(directions, place, float((rows @ first).relu().square().sum() / total), float(both / total))


def _line(rows: Float[Tensor, "m d"]) -> Float[Tensor, " d"]:
    """argmax over unit u of sum relu(rows u)^2, from their sum."""
    line = normalize(rows.sum(dim=0), dim=0)
    for _ in range(SWEEPS):
        line = normalize(rows.T @ (rows @ line).relu(), dim=0)
    return line
