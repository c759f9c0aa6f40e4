"""overcomplete: its modules, with the order of operations of its `train_sae`, and fused Adam."""

import importlib.util
import sys
import types
from pathlib import Path

import torch
from job import LR, Job

# Its top level imports vision models and torchvision; the sparse autoencoders below it do not need them.
package = types.ModuleType("overcomplete")
package.__path__ = [str(Path(importlib.util.find_spec("overcomplete").origin).parent)]
sys.modules["overcomplete"] = package

from overcomplete.sae.base import SAE  # noqa: E402
from overcomplete.sae.batchtopk_sae import BatchTopKSAE  # noqa: E402
from overcomplete.sae.jump_sae import JumpSAE, heaviside, rectangle_kernel  # noqa: E402
from overcomplete.sae.losses import mse_l1  # noqa: E402
from overcomplete.sae.topk_sae import TopKSAE  # noqa: E402
from overcomplete.sae.trackers import DeadCodeTracker  # noqa: E402


def build(job: Job):
    encoder = Encoder(job.d, job.m).to(job.device)
    common = {"encoder_module": encoder, "device": job.device}
    kinds = {
        "relu": lambda: SAE(job.d, job.m, **common),
        "jumprelu": lambda: JumpSAE(job.d, job.m, kernel="rectangle", **common),
        "topk": lambda: TopKSAE(job.d, job.m, top_k=job.k, **common),
        "batchtopk": lambda: BatchTopKSAE(job.d, job.m, top_k=job.k * job.n, **common),
    }
    model = kinds[job.method]().train()
    with torch.no_grad():
        encoder.linear.weight.copy_(job.directions())
        encoder.linear.bias.fill_(job.bias)
        model.dictionary._weights.copy_(job.directions())
        if job.method == "jumprelu":
            model.thresholds.fill_(-7.0)  # exp(-7): about the threshold that the others start with
    optimiser = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    x, tracker = job.rows(), DeadCodeTracker(job.m, job.device)

    def step():
        optimiser.zero_grad()
        pre, z, recon = model(x)
        if job.method == "relu":
            loss = mse_l1(x, recon, pre, z, model.get_dictionary(), penalty=job.penalty)
        else:
            loss = (x - recon).square().mean()
        if job.method == "jumprelu":
            active = heaviside(pre, model.thresholds.exp(), rectangle_kernel, model.bandwidth)
            loss = loss + job.penalty * active.sum(dim=1).mean()
        tracker.update(z)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        return (z > 0).sum() / job.n

    return step


class Encoder(torch.nn.Module):
    """Linear and ReLU: its default has a batch norm between, which no other contender has."""

    def __init__(self, d: int, m: int):
        super().__init__()
        self.linear = torch.nn.Linear(d, m)

    def forward(self, x):
        pre = self.linear(x)
        return pre, pre.relu()
