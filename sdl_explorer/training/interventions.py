"""Changes of a live model as plans: the preview *is* the plan that is applied.

An `Intervention` holds settings alone. `plan` reads the state and the choose rows and changes nothing; the
`Plan` it returns holds the new rows, the pins and the latents whose optimiser moments are cleared.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import param
import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.anchors import Anchors, Pins
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.terms import squared_error
from sdl_explorer.training.plan import Plan, PlanRow, random_like
from sdl_explorer.training.state import TrainState

BLOCK = 2_048


class Intervention(param.Parameterized):
    """Settings of a change, with bounds and docs: they make the dialog. Abstract.

    `choose_rows` is how many choose rows a plan reads; None: as many as the run takes. A run gives the rows in the units
    of the weights, and the dictionary's `core`, as training does.
    """

    __abstract = True

    choose_rows: Any = None

    def plan(self, state: TrainState, choose: Activations, generator: Generator) -> Plan:
        raise TypeError(f"{type(self).__name__} has no plan(); an Intervention needs one.")


class Resample(Intervention):
    """Re-initialise latents from badly reconstructed inputs (Bricken et al. 2023).

    One choose row s is drawn per latent with probability proportional to the squared loss
    |x_r - recon|^4 (`pick="loss2"`), or the worst rows are taken in turn (`pick="worst"`). Then

        W_dec_i = unit(t_s)     W_enc_i = scale * mean alive |W_enc| * unit(x_s)     b_enc_i = 0

    with t_s the target row (`target="input"`; for an SAE the input itself) or the residual x_r - recon
    (`target="residual"`). Rows are taken as the encoder sees them (minus b_dec where the model subtracts
    it). `noise` adds a random unit direction times noise before normalising. A tied encoder gets W_dec_i, whatever the
    scale. Per-latent parameters of sigma get the
    mean of the alive latents; optimiser moments of exactly these rows are cleared.
    """

    latents = param.Parameter(None, doc="Which latents; None: all that are dead.")
    pick = param.Selector(default="loss2", objects=["loss2", "worst"], doc="How target rows are chosen.")
    target = param.Selector(default="input", objects=["input", "residual"], doc="What the new decoder row writes.")
    scale = param.Number(0.2, bounds=(0, 10), inclusive_bounds=(False, True), doc="Encoder norm, in mean alive norms.")
    noise = param.Number(0.0, bounds=(0, 10), doc="Norm of a random direction added to the unit row.")

    @torch.no_grad()
    def plan(self, state: TrainState, choose: Activations, generator: Generator) -> Plan:
        dictionary = state.dictionary
        latents = _chosen("Resample", self.latents, state)
        losses, reconstruct = row_losses(dictionary, choose)
        picks = self._picks(losses * _has_direction(dictionary, choose), len(latents), generator)
        inputs = choose.inputs[picks.to(choose.inputs.device)].to(dictionary.device)
        targets = choose.targets[picks.to(choose.targets.device)].to(dictionary.device)
        written = targets - reconstruct(inputs) if self.target == "residual" else dictionary.centred(targets)
        read = written if self.target == "residual" and choose.kind == "sae" else dictionary.centred(inputs)

        same = read.shape == written.shape and torch.equal(read, written)
        W_enc = _noisy(read, self.noise, generator)
        W_dec = W_enc.clone() if same else _noisy(written, self.noise, generator)
        alive = _alive(state, latents)
        W_enc = W_dec if dictionary.tied else self.scale * dictionary.W_enc[alive].norm(dim=1).mean() * W_enc

        nearest = _nearest(dictionary, W_dec, latents)
        rows = tuple(
            PlanRow(int(i), f"choose row {int(s)}", int(s), float(losses[s]), j, c, float(e.norm()), 0.0)
            for i, s, (j, c), e in zip(latents, picks, nearest, W_enc, strict=True)
        )
        plan = Plan(
            "resample",
            latents,
            W_enc,
            torch.zeros_like(dictionary.b_enc[latents]),
            W_dec,
            _mean_sigma(dictionary, alive, len(latents)),
            state.pins,
            latents,
            {},
            f"{len(latents)} latents restart from {'the worst' if self.pick == 'worst' else 'loss-weighted'} "
            f"{'residuals' if self.target == 'residual' else 'inputs'}; their Adam moments will be zeroed.",
            rows,
            self._command(latents),
        )
        return replace(plan, expected=expected_errors(plan, state, choose, float(losses.mean())))

    def _picks(self, losses: Tensor, n: int, generator: Generator) -> Tensor:
        if not losses.isfinite().all():
            raise ValueError("Resample: the loss of some choose rows is not finite; revert to the last finite commit first.")
        weights = (losses / losses.max()).square()  # of the largest, since squares of small losses may round to zero
        usable = int((weights > 0).sum())
        if usable == 0:
            raise ValueError("Resample: every choose row is reconstructed exactly, so no input is worth a latent. Nothing to resample.")
        if self.pick == "worst":
            return losses.argsort(descending=True)[:usable][torch.arange(n) % usable]
        return torch.multinomial(weights, n, replacement=n > usable, generator=generator)

    def _command(self, latents: Tensor) -> str:
        changed = {k: v for k, v in self.param.values(onlychanged=True).items() if k not in ("name", "latents")}
        settings = "".join(f", {k}={v!r}" for k, v in changed.items())
        return f"session.resample({[int(i) for i in latents]}{settings})"


class Anchor(Intervention):
    """Hold latents to known directions (arXiv 2512.05534, eq. 25-26).

    Soft: the loss gains weight * (|W_enc_i - a|^2 + |W_dec_i - b|^2). Hard: both rows are set to the anchor
    and do not move. `latents=None` takes dead latents first, then the best decoder match of each anchor. A
    dead latent starts at its anchor, with the mean alive encoder norm and sigma, a live one is pulled there. A tied
    latent starts at b, and is pulled to the mean of a and b.
    Latents that are pinned already are taken only by name. Optimiser moments of those rows are cleared.
    """

    anchors = param.ClassSelector(
        default=None, class_=Anchors, doc="The directions, Anchors.from_truth(...), .from_labels(...) or .from_rows(...)."
    )
    latents = param.Parameter(None, doc="One latent per anchor; None: dead latents first, then best matches.")
    weight = param.Number(0.1, bounds=(0, None), doc="Strength of the pull.")
    hard = param.Boolean(False, doc="Fix the rows instead of pulling them.")

    @torch.no_grad()
    def plan(self, state: TrainState, choose: Activations, generator: Generator) -> Plan:
        dictionary, anchors = state.dictionary, self.anchors
        if anchors is None or len(anchors) == 0:
            raise ValueError("Anchor: no anchors given; pass Anchors.from_truth(...), .from_labels(...) or .from_rows(...).")
        widths = (anchors.inputs.shape[1], anchors.targets.shape[1])
        if widths != (dictionary.d_in, dictionary.d_out):
            raise ValueError(
                f"Anchor: the anchors have widths {widths} (inputs, targets) and the dictionary ({dictionary.d_in}, {dictionary.d_out}); "
                "build them from this session's data."
            )
        device = dictionary.device
        latents = self._slots(state, anchors)
        k = len(latents)
        pins = Pins(anchors, latents.cpu(), torch.full((k,), float(self.weight)), torch.full((k,), self.hard)).to(device)
        inputs, targets = pins.anchors.inputs, pins.anchors.targets

        restart = state.dead[latents] | self.hard
        alive = _alive(state, latents[state.dead[latents]])
        scale = 1.0 if self.hard else dictionary.W_enc[alive].norm(dim=1).mean()
        restarted = lambda new, old: torch.where(restart.view(-1, *[1] * (old.ndim - 1)), new, old[latents])
        W_dec = restarted(targets, dictionary.W_dec)
        W_enc = W_dec if dictionary.tied else restarted(inputs * scale, dictionary.W_enc)
        b_enc = restarted(torch.zeros((), device=device), dictionary.b_enc)
        fresh = _mean_sigma(dictionary, alive, k)
        sigma = {name: restarted(fresh[name], old) for name, old in dictionary.per_latent().items()}
        nearest = _nearest(dictionary, targets, latents)
        rows = tuple(
            PlanRow(int(i), name, None, None, j, c, float(e.norm()), float(b))
            for i, name, (j, c), e, b in zip(latents, anchors.names, nearest, W_enc, b_enc, strict=True)
        )
        n_dead = int(state.dead[latents].sum())
        plan = Plan(
            "anchor",
            latents,
            W_enc,
            b_enc,
            W_dec,
            sigma,
            state.pins,
            latents,
            {},
            f"{k} latents ({n_dead} of them dead) are {'fixed' if self.hard else f'pulled with weight {self.weight:g}'} to {k} anchors"
            f"{_overlap_warning(anchors)}; their Adam moments will be zeroed.",
            rows,
            "",
            pins,
        )
        losses, _ = row_losses(dictionary, choose)
        return replace(plan, expected=expected_errors(plan, state, choose, float(losses.mean())), python=self._command(anchors, latents))

    def _slots(self, state: TrainState, anchors: Anchors) -> Tensor:
        device, k = state.dictionary.device, len(anchors)
        if self.latents is not None:
            latents = _chosen("Anchor", self.latents, state)
            if len(latents) != k:
                raise ValueError(f"Anchor: {len(latents)} latents for {k} anchors; give one latent per anchor, or latents=None.")
            return latents
        pinned = set() if state.pins is None else set(state.pins.latents.tolist())
        free = state.dictionary.n_latents - len(pinned)
        if k > free:
            raise ValueError(f"Anchor: {k} anchors and only {free} latents that are not pinned; anchor fewer directions, or release some.")
        dead = [i for i in state.dead.nonzero().flatten().tolist() if i not in pinned][:k]
        slots, taken = list(dead), pinned | set(dead)
        unit = normalize(state.dictionary.W_dec, dim=1)
        for target in anchors.targets[len(dead) :].to(device):
            ranked = (unit @ target).argsort(descending=True).tolist()
            best = next(i for i in ranked if i not in taken)
            slots.append(best)
            taken.add(best)
        return torch.tensor(slots, dtype=torch.long, device=device)

    def _command(self, told: Anchors, latents: Tensor) -> str:
        made = f"Anchors.from_truth(session.source.sample(1, torch.Generator()), {list(told.features)})"
        if not told.features or min(told.features) < 0:
            made = f"anchors  # {', '.join(told.names)}"
        arguments = f"latents={[int(i) for i in latents]}, weight={self.weight!r}, hard={self.hard!r}"
        if made.startswith("anchors"):
            return f"session.anchor(anchors, {arguments})  # anchors: {', '.join(told.names)}"
        return f"session.anchor({made}, {arguments})"


class Release(Intervention):
    """Let go of pinned and of pulled latents (None: all of them); their rows stay where they are."""

    latents = param.Parameter(None, doc="Which pinned or pulled latents; None: all.")

    def plan(self, state: TrainState, choose: Activations, generator: Generator) -> Plan:
        pinned = [] if state.pins is None else state.pins.latents.tolist()
        pinned += [] if state.pulls is None else state.pulls.latents.tolist()
        chosen = pinned if self.latents is None else [int(i) for i in _chosen("Release", self.latents, state)]
        free = [i for i in chosen if i not in pinned]
        if free or not chosen:
            subject = f"latent {free[0]} is not pinned" if free else "no latent is pinned"
            raise ValueError(f"Release: {subject}; pinned latents: {pinned}.")
        latents = torch.tensor(chosen, dtype=torch.long, device=state.dictionary.device)
        return Plan(
            "release", latents, None, None, None, {}, state.pins, latents[:0], {},
            f"{len(chosen)} latents are no longer held to a direction.", (), f"session.release({chosen})",
        )  # fmt: skip


@contextmanager
def evaluating(dictionary: SparseDictionary) -> Iterator[SparseDictionary]:
    """Eval mode for the moment, the former mode afterwards."""
    mode = dictionary.training
    try:
        yield dictionary.eval()
    finally:
        dictionary.train(mode)


def _alive(state: TrainState, restarting: Tensor) -> Tensor:
    """The latents whose mean a restart follows: neither dead nor restarting, or all where none is left."""
    alive = ~state.dead
    alive[restarting] = False
    return alive if alive.any() else torch.ones_like(alive)


def _mean_sigma(dictionary: SparseDictionary, alive: Tensor, n: int) -> dict[str, Tensor]:
    """Per-latent parameters of sigma for n restarted latents: the mean of the alive ones."""
    return {name: t[alive].mean(dim=0).expand(n, *t.shape[1:]).clone() for name, t in dictionary.per_latent().items()}


def _has_direction(dictionary: SparseDictionary, choose: Activations) -> Tensor:
    """Which choose rows are zero neither as input nor as target, as the encoder sees them; bool on the CPU."""
    directed = lambda rows: (dictionary.centred(rows.to(dictionary.device)).norm(dim=1) > 0).cpu()
    return directed(choose.inputs) & directed(choose.targets)


def _chosen(who: str, latents, state: TrainState) -> Tensor:
    if latents is None:
        chosen = state.dead.nonzero().flatten()
        if len(chosen) == 0:
            raise ValueError(
                f"{who}: no latent has been silent for {state.dead_after:,} samples. Nothing to do; name latents to do it anyway."
            )
        return chosen
    return named_latents(who, latents, state.dictionary.n_latents).to(state.dictionary.device)


def named_latents(who: str, latents, n_latents: int) -> Tensor:
    """The given latent numbers, int64 on the CPU; ValueError where they are not some of 0 to n_latents - 1, each once."""
    try:
        chosen = torch.as_tensor(latents).flatten().cpu()
    except (TypeError, ValueError, RuntimeError):
        chosen = torch.zeros(0)
    if len(chosen) == 0 or chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise ValueError(f"{who}: latents is {latents!r}; give a non-empty list of latent numbers, or None.")
    outside = chosen[(chosen < 0) | (chosen >= n_latents)]
    if len(outside):
        raise ValueError(f"{who}: latent {int(outside[0])} does not exist; there are {n_latents} (0 to {n_latents - 1}).")
    if len(chosen.unique()) < len(chosen):
        raise ValueError(f"{who}: a latent is named twice in {chosen.tolist()}; name each once.")
    return chosen.long()


@torch.no_grad()
def row_losses(dictionary: SparseDictionary, choose: Activations):
    """Squared error of each choose row on the CPU, and the reconstruction of any rows."""

    def reconstruct(inputs: Tensor) -> Tensor:
        with evaluating(dictionary):
            return dictionary(inputs).reconstruction

    parts = []
    for start in range(0, len(choose), BLOCK):
        inputs, targets = (t[start : start + BLOCK].to(dictionary.device) for t in (choose.inputs, choose.targets))
        parts.append((reconstruct(inputs) - targets).square().sum(dim=1).cpu())
    return torch.cat(parts), reconstruct


def expected_errors(plan: Plan, state: TrainState, choose: Activations, before: float) -> dict[str, float]:
    """Estimate: the plan on a copy of the dictionary, over at most one block of choose rows."""
    trial = copy.deepcopy(state.dictionary)
    trial_state = replace(state, dictionary=trial, optimiser=torch.optim.SGD(trial.parameters(), lr=0.0))
    trial_state.samples_since_fired = state.samples_since_fired.clone()
    plan.apply(trial_state)
    rows = slice(0, BLOCK)
    with torch.no_grad(), evaluating(trial):
        after = squared_error(trial(choose.inputs[rows].to(trial.device)).reconstruction, choose.targets[rows].to(trial.device))
    with torch.no_grad(), evaluating(state.dictionary) as now:
        same_rows = squared_error(now(choose.inputs[rows].to(trial.device)).reconstruction, choose.targets[rows].to(trial.device))
    return {"error before": float(same_rows), "error after": float(after), "error on all choose rows": before}


def _nearest(dictionary: SparseDictionary, rows: Tensor, latents: Tensor) -> list[tuple[int, float]]:
    """For each new decoder row, the other latent nearest to it and their cosine."""
    cosines = normalize(rows, dim=1) @ normalize(dictionary.W_dec, dim=1).T
    cosines[:, latents] = -torch.inf
    values, indices = cosines.max(dim=1)
    return [(int(i), float(v)) for i, v in zip(indices, values, strict=True)]


def _noisy(rows: Tensor, noise: float, generator: Generator) -> Tensor:
    unit = normalize(rows, dim=1)
    return unit if noise == 0 else normalize(unit + noise * random_like(unit, generator), dim=1)


def _overlap_warning(anchors: Anchors) -> str:
    overlap = (anchors.targets @ anchors.targets.T).fill_diagonal_(-1)
    largest = float(overlap.max())
    if len(anchors) < 2 or largest < 0.9:
        return ""
    i, j = divmod(int(overlap.argmax()), len(anchors))
    return f" (warning: {anchors.names[i]!r} and {anchors.names[j]!r} overlap at cosine {largest:.2f})"
