"""The encoder product alone: what every method with dense pre-activations has to pay."""

import torch
from job import Job


def build(job: Job):
    x, W = job.rows(), job.directions()
    out = torch.empty(job.n, job.m, device=job.device)

    def step():
        torch.mm(x, W.T, out=out)

    return step
