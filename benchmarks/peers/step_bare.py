"""The method's formula in dense torch with the same optimiser: what a loop written by hand costs."""

import torch
from job import LR, Job, Missing
from torch.nn.functional import linear


def build(job: Job):
    if job.method not in ("relu", "topk"):
        raise Missing
    W_enc, W_dec = (torch.nn.Parameter(job.directions()) for _ in range(2))
    b_enc = torch.nn.Parameter(torch.full((job.m,), job.bias, device=job.device))
    b_dec = torch.nn.Parameter(torch.zeros(job.d, device=job.device))
    optimiser = torch.optim.Adam([W_enc, W_dec, b_enc, b_dec], lr=LR, fused=True)
    x = job.rows()

    def step():
        pre = linear(x, W_enc, b_enc)
        if job.method == "topk":
            values, indices = pre.topk(job.k, dim=1)
            codes = torch.zeros_like(pre).scatter(1, indices, values.relu())
        else:
            codes = pre.relu()
        loss = (codes @ W_dec + b_dec - x).square().sum(dim=1).mean()
        if job.method == "relu":
            loss = loss + job.penalty * (codes @ W_dec.norm(dim=1)).mean()
        optimiser.zero_grad()
        loss.backward()
        if job.method == "topk":
            with torch.no_grad():
                W_dec.grad -= (W_dec.grad * W_dec).sum(dim=1, keepdim=True) * W_dec
        optimiser.step()
        if job.method == "topk":
            with torch.no_grad():
                W_dec.div_(W_dec.norm(dim=1, keepdim=True))
        return (codes > 0).sum() / job.n

    return step
