"""Realign: turn encoder rows to what fires their latents, refit length and bias, and pull them there while training goes on."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import param
import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.nn.functional import embedding_bag, linear, normalize

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.anchors import Pulls
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods.jumprelu import JumpRectified
from sdl_explorer.models.methods.relu import Rectified
from sdl_explorer.models.methods.topk import BatchTopKSelection, TopKSelection
from sdl_explorer.training.interventions import Intervention, evaluating, expected_errors, named_latents, row_losses
from sdl_explorer.training.plan import Plan, PlanRow
from sdl_explorer.training.state import TrainState

CELLS = 2**22  # of one block of pre-activations, by rows or by latents
SWEEPS, SETTLING = 10, 4  # of the refit where latents compete for k places; the last ones leave the lengths alone
DAMPING = 0.7  # of a sweep's bias, since all latents move at once; lengths move by the square root of what they lack
KNOWN = (Rectified, JumpRectified, BatchTopKSelection, TopKSelection)


class Realign(Intervention):
    """Turn the encoder row of a latent to its response on choose rows, and pull it there from now on.

        u_i = unit(E[z_i x_p] / E[z_i] - E[x_p])     W_enc_i = length_i * u_i     loss += pull * |unit(W_enc_i) - u_i|^2

    The bias is refitted so that the latent fires on as many choose rows as before. `refit="size"` chooses the row's length
    so that the sum of its codes stays as well: at the same length a direction that fits better gives larger codes, and too
    large codes are most of what is lost. `refit="norm"` keeps the length all the same. Thresholds stay. ReLU, JumpReLU and
    BatchTopK (at its inference threshold) have a closed form:

        cut_i = the value that u_i x_p exceeds on exactly n_i choose rows, n_i the firings before; theta_i sigma's threshold
        length_i = (sum z_i - theta_i n_i) / sum_fired (u_i x_p - cut_i)     b_enc_i = theta_i - length_i * cut_i

    In TopK the latents compete: latent i fires where pre_i exceeds the k-th largest of the *others*, so each sweep refits
    every latent against the others as they are, ten times. Counts then agree to about one in a hundred, and up to what k
    itself allows: with every place taken by a positive value they sum to k a row, whatever they summed to before.

    Latents that fired on fewer than `least` choose rows have no direction worth the name and are left alone; so are dead and
    pinned ones where none are named. A named latent's pin ends. Optimiser moments of the rows are cleared; decoder rows stay.
    The directions are measured, not told: no feature is held out for them. Afterwards the agreement of encoder and response
    says nothing, because this sets it: compare true recovery, unexplained variance and L0 with an equally long control.

    Raises ValueError for a tied encoder, for a sigma that it cannot refit, and where no latent fired often enough.
    """

    latents = param.Parameter(None, doc="Which latents; None: all that are alive, not pinned, and fired often enough.")
    pull = param.Number(0.1, bounds=(0, None), doc="Strength of the pull to the measured direction while training goes on.")
    refit = param.Selector(
        default="size",
        objects=["size", "norm"],
        doc="Keep the size of the codes, or the norm of the encoder row; either keeps the firing rate.",
    )
    least = param.Integer(100, bounds=(1, None), doc="Choose rows on which a latent must have fired.")
    choose_rows = param.Integer(65_536, bounds=(1, None), doc="Choose rows to measure on, where there are as many.")

    @torch.no_grad()
    def plan(self, state: TrainState, choose: Activations, generator: Generator) -> Plan:
        dictionary = state.dictionary
        if why := refusal(dictionary):
            raise ValueError(why)
        losses, _ = row_losses(dictionary, choose)
        if not losses.isfinite().all():
            raise ValueError("Realign: the loss of some choose rows is not finite; revert to the last finite commit first.")
        found = measure_responses(dictionary, choose)
        latents, seldom = self._latents(state, found, len(choose))
        refitted = refit_rows(dictionary, choose, latents, found, keep_norm=self.refit == "norm")
        pulls = None
        if self.pull > 0:
            weight = torch.full((len(latents),), float(self.pull), device=dictionary.device)
            pulls = Pulls(latents, found.directions[latents], weight)
        left = f" {seldom} fired on fewer than {self.least} of {len(choose):,} choose rows and are left alone;" if seldom else ""
        cosine = float((normalize(dictionary.W_enc[latents], dim=1) * found.directions[latents]).sum(dim=1).mean())
        held = f"pulled there with weight {self.pull:g}" if pulls else "free to leave"
        plan = Plan(
            "realign",
            latents,
            refitted.W_enc,
            refitted.b_enc,
            None,
            {},
            state.pins,
            latents,
            {},
            f"{len(latents)} encoder rows turn to what fires their latents (mean cosine so far {cosine:.2f}) and are {held};{left} "
            f"firing counts change by {refitted.off:.1%} on average; Adam moments of those latents will be zeroed.",
            _preview(dictionary, latents, refitted, found),
            self._command(),
            changed_pulls=pulls,
        )
        return replace(plan, expected=expected_errors(plan, state, choose, float(losses.mean())))

    def _latents(self, state: TrainState, found: "Responses", n: int) -> tuple[Tensor, int]:
        """The latents to realign, and how many of those asked for fired too seldom."""
        dictionary, often = state.dictionary, found.count >= self.least
        if self.latents is None:
            wanted = ~state.dead
            if state.pins is not None:
                wanted[state.pins.latents] = False
        else:
            wanted = torch.zeros_like(state.dead)
            wanted[named_latents("Realign", self.latents, dictionary.n_latents).to(dictionary.device)] = True
        latents = (wanted & often).nonzero().flatten()
        if len(latents) == 0:
            most = int(found.count[wanted].max()) if wanted.any() else 0
            raise ValueError(
                f"Realign: none of {int(wanted.sum())} latents fired on {self.least} of {n:,} choose rows (the most: {most}), which is too "
                "few to measure a direction. Train on, raise choose_rows, or lower least."
            )
        return latents, int((wanted & ~often).sum())

    def _command(self) -> str:
        settings = {k: v for k, v in self.param.values(onlychanged=True).items() if k != "name"}
        if settings.get("latents") is not None:
            settings["latents"] = [int(i) for i in torch.as_tensor(settings["latents"]).flatten()]
        return f"session.realign({', '.join(f'{k}={v!r}' for k, v in settings.items())})"


class Responses(NamedTuple):
    """Per latent: the rows on which it fired, the sum of its codes, and its unit response (zeros: never fired)."""

    count: Int[Tensor, " n_latents"]
    total: Float[Tensor, " n_latents"]
    directions: Float[Tensor, "n_latents d_in"]


class Refit(NamedTuple):
    """New encoder rows and biases; `off`: mean |change of the firing count| / count."""

    W_enc: Float[Tensor, "k d_in"]
    b_enc: Float[Tensor, " k"]
    off: float


@torch.no_grad()
def measure_responses(dictionary: SparseDictionary, rows: Activations) -> Responses:
    """One pass in blocks of rows. Of the response only the direction is kept: sum_r z_i (x_p - mean x_p), normalised."""
    sums = torch.stack([x.double().sum(dim=0) for x in rows.inputs.split(4_096)])
    mean = sums.sum(dim=0).div(len(rows)).to(dictionary.W_enc)
    count = torch.zeros(dictionary.n_latents, dtype=torch.int64, device=dictionary.device)
    total, moment = torch.zeros_like(dictionary.b_enc), torch.zeros_like(dictionary.W_enc)
    with evaluating(dictionary):
        for inputs in _blocks(dictionary, rows):
            row, latent, value = dictionary.encode(inputs).entries()
            order = latent.argsort(stable=True)
            fired = torch.bincount(latent, minlength=len(count))
            some = fired.nonzero().flatten()
            starts = fired[some].cumsum(0) - fired[some]
            weighted = torch.cat([inputs - mean, torch.ones_like(inputs[:, :1])], dim=1)
            sums = embedding_bag(row[order], weighted, starts, mode="sum", per_sample_weights=value[order])
            moment[some] += sums[:, :-1]
            total[some] += sums[:, -1]
            count += fired
    return Responses(count, total, normalize(moment, dim=1))


@torch.no_grad()
def refit_rows(dictionary: SparseDictionary, rows: Activations, latents: Tensor, found: Responses, keep_norm: bool) -> Refit:
    """The encoder rows of `latents` along their responses, with firing counts kept, and length or sum of codes."""
    if isinstance(dictionary.nonlinearity, TopKSelection):
        return _refit_competing(dictionary, rows, latents, found, keep_norm)
    directions, inputs = found.directions[latents], dictionary.centred(rows.inputs.to(dictionary.W_enc))
    count, total = found.count[latents], found.total[latents]
    parts = [_cut(p := linear(directions[i], inputs), p, count[i]) for i in _split(len(latents), len(inputs))]
    cut, excess = (torch.cat(side) for side in zip(*parts, strict=True))
    theta, length = _threshold(dictionary)[latents], dictionary.W_enc[latents].norm(dim=1)
    if not keep_norm:
        length = torch.where(excess > 0, (total - theta * count) / excess, length)
    return Refit(length[:, None] * directions, theta - length * cut, 0.0)


def _refit_competing(dictionary: SparseDictionary, rows: Activations, latents: Tensor, found: Responses, keep_norm: bool) -> Refit:
    """Sweeps over latents that compete for k places, each against the others as they are."""
    directions, count, total = found.directions[latents], found.count[latents], found.total[latents]
    length, bias = dictionary.W_enc[latents].norm(dim=1), dictionary.b_enc[latents].clone()
    W_enc, b_enc = dictionary.W_enc.clone(), dictionary.b_enc.clone()
    inputs = dictionary.centred(rows.inputs.to(W_enc))
    for sweep in range(SWEEPS + 1):
        W_enc[latents], b_enc[latents] = length[:, None] * directions, bias
        last, first_out, fired = _places(inputs, W_enc, b_enc, dictionary.nonlinearity.k)
        if sweep == SWEEPS:
            break
        for i in _split(len(latents), len(inputs)):
            pre = linear(W_enc[latents[i]], inputs) + bias[i, None]
            others = torch.where(pre >= last, first_out, last).clamp_(min=0)
            cut, excess = _cut(pre - others, pre, count[i])
            bias[i] -= DAMPING * cut
            if not keep_norm and sweep < SWEEPS - SETTLING:
                length[i] *= torch.where(excess > 0, total[i] / excess, 1.0).clamp(0.5, 2).sqrt()
    off = ((fired[latents] - count).abs() / count).mean()
    return Refit(W_enc[latents], b_enc[latents], float(off))


def _places(inputs: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per row the smallest pre-activation that has a place and the largest that has none, and per latent its firings."""
    n_latents = len(W_enc)
    last, first_out, fired = [], [], torch.zeros(n_latents, dtype=torch.int64, device=W_enc.device)
    for block in _split(len(inputs), n_latents):
        values, indices = linear(inputs[block], W_enc, b_enc).topk(min(k + 1, n_latents), dim=1)
        last.append(values[:, k - 1])
        first_out.append(values[:, k] if k < n_latents else torch.full_like(values[:, 0], -torch.inf))
        fired += torch.bincount(indices[:, :k][values[:, :k] > 0], minlength=n_latents)
    return torch.cat(last), torch.cat(first_out), fired


def _cut(margins: Float[Tensor, "k n"], codes: Float[Tensor, "k n"], count: Int[Tensor, " k"]) -> tuple[Tensor, Tensor]:
    """What exactly `count` of a row's margins exceed, and the sum over those of code - cut."""
    n, most = margins.shape[1], int(count.max())
    top = margins.topk(min(most + 1, n), dim=1)
    at = lambda place: top.values.gather(1, place[:, None])[:, 0]
    last = at(count - 1)
    spacing = (at(torch.zeros_like(count)) - last) / n
    first_out = torch.where(count < n, at(count.clamp(max=top.values.shape[1] - 1)), last - spacing)
    cut = (last + first_out) / 2
    counted = torch.arange(top.values.shape[1], device=margins.device) < count[:, None]
    return cut, ((codes.gather(1, top.indices) - cut[:, None]) * counted).sum(dim=1)


def _threshold(dictionary: SparseDictionary) -> Float[Tensor, " n_latents"]:
    """What each pre-activation must exceed to fire."""
    sigma = dictionary.nonlinearity
    threshold = torch.zeros_like(dictionary.b_enc) if isinstance(sigma, Rectified) else sigma.threshold.detach().clamp(min=0)
    return threshold.expand(dictionary.n_latents)


def _blocks(dictionary: SparseDictionary, rows: Activations) -> Iterator[Tensor]:
    for block in _split(len(rows), dictionary.n_latents):
        yield rows.inputs[block].to(dictionary.W_enc)


def _split(length: int, width: int) -> list[slice]:
    """Slices of a length such that each times the width holds at most CELLS."""
    size = max(1, CELLS // width)
    return [slice(start, start + size) for start in range(0, length, size)]


def _preview(dictionary: SparseDictionary, latents: Tensor, refitted: Refit, found: Responses) -> tuple[PlanRow, ...]:
    """One line a latent; the nearest other latent is the one whose encoder row, after, is nearest."""
    after = normalize(dictionary.W_enc, dim=1)
    after[latents] = found.directions[latents]
    best = []
    for block in _split(len(latents), len(after)):
        cosines = after[latents[block]] @ after.T
        best.append(torch.stack(cosines.scatter_(1, latents[block, None], -torch.inf).max(dim=1), dim=1))
    nearest = torch.cat(best).tolist()
    lengths, biases, counts = refitted.W_enc.norm(dim=1).tolist(), refitted.b_enc.tolist(), found.count[latents].tolist()
    turned = (normalize(dictionary.W_enc[latents], dim=1) * found.directions[latents]).sum(dim=1).tolist()
    return tuple(
        PlanRow(i, f"response on {n:,} rows", None, None, int(other), cosine, length, bias, before)
        for i, n, (cosine, other), length, bias, before in zip(latents.tolist(), counts, nearest, lengths, biases, turned, strict=True)
    )


def refusal(dictionary: SparseDictionary) -> str:
    """Why the rows of this dictionary cannot be realigned; empty where they can."""
    if dictionary.tied:
        return (
            "Realign: the encoder of this dictionary is tied to its decoder, so it has no row of its own to turn. "
            "Give it one with rewrites.untied(dictionary)."
        )
    if not isinstance(dictionary.nonlinearity, KNOWN):
        return (
            f"Realign: it cannot refit the bias under {type(dictionary.nonlinearity).__name__}; it knows "
            f"{', '.join(sigma.__name__ for sigma in KNOWN)}. Convert the dictionary to one of these first."
        )
    return ""
