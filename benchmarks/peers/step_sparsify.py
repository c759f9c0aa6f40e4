"""eai-sparsify: its coder, with the order of operations of its trainer, which needs a language model, and fused Adam."""

import torch
from job import LR, Job, Missing
from sparsify import SparseCoder, SparseCoderConfig


def build(job: Job):
    if job.method != "topk":
        raise Missing
    coder = SparseCoder(job.d, SparseCoderConfig(num_latents=job.m, k=job.k), device=job.device)
    with torch.no_grad():
        coder.encoder.weight.copy_(job.directions())
        coder.W_dec.copy_(job.directions())
    optimiser = torch.optim.Adam(coder.parameters(), lr=LR, fused=True)
    silent = torch.zeros(job.m, dtype=torch.long, device=job.device)
    x = job.rows()

    def step():
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x, dead_mask=silent > 10_000_000)
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()
        fired = torch.zeros_like(silent, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        silent.add_(job.n)[fired] = 0
        return (out.latent_acts > 0).sum() / job.n

    return step
