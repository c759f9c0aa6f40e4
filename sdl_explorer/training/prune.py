"""Prune: take latents out."""

from dataclasses import replace

import param
import torch
from torch import Generator

from sdl_explorer.data.activations import Activations
from sdl_explorer.training.interventions import Intervention, expected_errors, named_latents, row_losses
from sdl_explorer.training.plan import Plan, PlanRow
from sdl_explorer.training.state import TrainState


class Prune(Intervention):
    """Take latents out: they read nothing and write nothing, and nothing moves them any more.

        W_enc_i = 0     b_enc_i = -1     W_dec_i = 0

    so pre_i = -1 on every row, latent i fires nowhere and has no gradient. It stays a place in the dictionary: silent for long
    enough it counts as dead, and `Resample` may give it something to do. Optimiser moments of the rows are cleared.

    Raises ValueError where no latent is named.
    """

    latents = param.Parameter(None, doc="Which latents; they have to be named.")

    @torch.no_grad()
    def plan(self, state: TrainState, choose: Activations, generator: Generator) -> Plan:
        dictionary = state.dictionary
        if self.latents is None:
            raise ValueError("Prune: no latents named; give the ones to take out, Prune(latents=[3, 7]).")
        latents = named_latents("Prune", self.latents, dictionary.n_latents).to(dictionary.device)
        rows = tuple(PlanRow(int(i), "nothing", None, None, int(i), 0.0, 0.0, -1.0) for i in latents)
        plan = Plan(
            "prune",
            latents,
            torch.zeros_like(dictionary.W_enc[latents]),
            torch.full_like(dictionary.b_enc[latents], -1.0),
            torch.zeros_like(dictionary.W_dec[latents]),
            {},
            state.pins,
            latents,
            {},
            f"{len(latents)} latents are taken out: they fire on nothing and write nothing.",
            rows,
            f"session.prune({latents.tolist()})",
        )
        losses, _ = row_losses(dictionary, choose)
        return replace(plan, expected=expected_errors(plan, state, choose, float(losses.mean())))
