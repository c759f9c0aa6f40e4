"""dictionary-learning: `update` of its own trainers."""

import sys
import types

import torch
from job import LR, Job

# Its readers of language models need nnsight, whose dependencies would swap torch for another build; no trainer does.
sys.modules["nnsight"] = types.ModuleType("nnsight")
sys.modules["nnsight"].LanguageModel = None

from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer  # noqa: E402
from dictionary_learning.trainers.jumprelu import JumpReluTrainer  # noqa: E402
from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate  # noqa: E402
from dictionary_learning.trainers.top_k import TopKTrainer  # noqa: E402


def build(job: Job):
    kinds = {
        "relu": (StandardTrainerAprilUpdate, {"l1_penalty": job.penalty}),
        "jumprelu": (JumpReluTrainer, {"sparsity_penalty": job.penalty, "target_l0": job.l0}),
        "topk": (TopKTrainer, {"k": job.k}),
        "batchtopk": (BatchTopKTrainer, {"k": job.k}),
    }
    kind, settings = kinds[job.method]
    common = {"steps": 10**6, "activation_dim": job.d, "dict_size": job.m, "layer": 0, "lm_name": "none", "lr": LR, "device": job.device}
    trainer = kind(**common, **settings)
    with torch.no_grad():
        if job.method == "jumprelu":
            trainer.ae.W_enc.copy_(job.directions().T)
            trainer.ae.W_dec.copy_(job.directions())
            trainer.ae.b_enc.fill_(job.bias)
        else:
            trainer.ae.encoder.weight.copy_(job.directions())
            trainer.ae.decoder.weight.copy_(job.directions().T)
            trainer.ae.encoder.bias.fill_(job.bias)
    x, count = job.rows(), iter(range(1, 10**6))  # step 0 also takes a geometric median

    def step():
        trainer.update(next(count), x)

    return step
