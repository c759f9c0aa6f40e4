"""The Linear Representation Bench at the size of arXiv 2512.05534, without anchors."""

import os

import pytest
import torch

from sdl_explorer import LinearBench, Session, TopK, align


@pytest.fixture
def all_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
@pytest.mark.timeout(900)
def test_topk_recovers_nearly_all_features_in_decoder_and_response_and_none_in_the_encoder():
    source = LinearBench(n_features=1000, d_in=768, sparsity=0.99, max_interference=0.1)
    with Session(source, TopK(k=10), n_latents=2000, batch_size=512, lr=1e-3) as session:
        session.train(1500)
        # A latent fires on 1 % of the rows and its response is a mean over those: 10,000 rows leave it at a cosine of 0.95
        found = session.find(align, n=50_000)
    assert found.recovery(tau=0.95, side="decoder") > 0.99
    assert found.recovery(tau=0.95, side="response") > 0.99
    assert found.recovery(tau=0.95, side="encoder") < 0.01
    assert 0.70 < found.mean_best("encoder") < 0.80
