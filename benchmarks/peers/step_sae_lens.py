"""sae-lens: `SAETrainer.step`, its own trainer, with its defaults (its sparse activations fail on the CPU: no view of sparse tensors)."""
# ruff: noqa: TID253

import torch
from job import LR, Job
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

KINDS = {
    "relu": (StandardTrainingSAE, StandardTrainingSAEConfig, lambda job: {"l1_coefficient": job.penalty}),
    "jumprelu": (
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        lambda job: {"l0_coefficient": job.penalty, "jumprelu_init_threshold": 1e-3, "jumprelu_bandwidth": 1e-3},
    ),
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, lambda job: {"k": job.k}),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, lambda job: {"k": float(job.k)}),
}


def build(job: Job):
    kind, config, settings = KINDS[job.method]
    sae = kind(config(d_in=job.d, d_sae=job.m, dtype="float32", device=job.device, **settings(job)))
    with torch.no_grad():
        sae.W_enc.copy_(job.directions().T)
        sae.W_dec.copy_(job.directions())
        sae.b_enc.fill_(job.bias)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=job.n,
            lr=LR,
            lr_end=LR,
            device=job.device,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae,
        iter(()),
    )
    x = job.rows()

    def step():
        output = trainer.step(x)
        trainer.n_training_steps += 1
        codes = output.feature_acts
        return (codes.values() > 0).sum() / job.n if codes.is_sparse else trainer.act_freq_scores.sum() / trainer.n_frac_active_samples

    return step
