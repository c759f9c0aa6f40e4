"""sdl_explorer: `next()` of the loop that the app runs."""

import torch
from job import LR, Job

from sdl_explorer.data.activations import Activations
from sdl_explorer.models.methods import BatchTopK, JumpReLU, ReLU, TopK
from sdl_explorer.training.loop import train
from sdl_explorer.training.state import Schedule, TrainState


def build(job: Job):
    methods = {
        "relu": lambda: ReLU(l1=job.penalty),
        "jumprelu": lambda: JumpReLU(l0=job.penalty),
        "topk": lambda: TopK(k=job.k),
        "batchtopk": lambda: BatchTopK(k=job.k),
    }
    method = methods[job.method]()
    dictionary = method.build(job.d, job.d, job.m, torch.Generator()).to(job.device)
    with torch.no_grad():
        dictionary.W_enc.copy_(job.directions())
        dictionary.W_dec.copy_(job.directions())
        dictionary.b_enc.fill_(job.bias)
    x = job.rows()
    steps = train(TrainState.start(dictionary, Schedule(lr=LR)), method, Repeated(Activations(x, x)), batch_size=job.n)
    return lambda: next(steps).l0


class Repeated:
    """A source of one batch."""

    def __init__(self, batch):
        self._batch = batch

    def batch(self, step, size, order):
        return self._batch
