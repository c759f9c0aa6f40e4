"""SynthBench against sae_lens.synthetic: the same structure from one configuration, the same statistics, and each other's files."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.synthetic import SyntheticModel, SyntheticModelConfig
from sae_lens.synthetic.evals import eval_sae_on_synthetic_data, mean_correlation_coefficient
from sae_lens.synthetic.feature_dictionary import FeatureDictionary

from sdl_explorer.data.sources import stream
from sdl_explorer.data.synth import SynthBench
from sdl_explorer.data.synth_model import CONFIG
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods.relu import Rectified

N = 40_000
CASES = {
    "published": {"n_features": 120, "d_in": 24, "n_roots": 4, "depth": 2, "rank": 6, "min_probability": 0.02},
    "strong correlations": {"n_features": 60, "d_in": 24, "n_roots": 0, "rank": 3, "correlation_scale": 0.5, "min_probability": 0.05},
    "plain trees": {
        "n_features": 80,
        "d_in": 24,
        "n_roots": 3,
        "branching": 2,
        "branching_max": 5,
        "exclusive_portion": 0.5,
        "compensate": False,
        "scale_children": False,
        "rank": 0,
        "firing": "constant",
        "std_magnitude": 0.7,
        "mean_magnitude": {"generator_name": "exponential", "start": 3.0, "end": 0.5},
    },
    "random rates": {"n_features": 50, "d_in": 24, "n_roots": 2, "depth": 1, "firing": "random", "min_probability": 0.05, "rank": 4},
    "correlated trees": {
        "n_features": 60,
        "d_in": 24,
        "n_roots": 6,
        "depth": 1,
        "branching": 3,
        "rank": 3,
        "correlation_scale": 0.5,
        "compensate": False,
        "max_probability": 0.5,
        "min_probability": 0.2,
    },
    "wide magnitudes": {  # so that the scaling of children shows in the moments
        "n_features": 30,
        "d_in": 24,
        "n_roots": 4,
        "depth": 1,
        "rank": 0,
        "firing": "constant",
        "exclusive_portion": 0.0,
        "std_magnitude": 3.0,
    },
    "straight line": {"n_features": 50, "d_in": 24, "n_roots": 0, "rank": 0, "firing": "linear", "bias": 0.0, "std_magnitude": 0.0},
}


@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    """Ours, and theirs read from our files."""
    bench = SynthBench(**CASES[request.param], seed=7)
    return bench, SyntheticModel.load_from_disk(bench.save(tmp_path / "ours"))


def structure(model: SyntheticModel) -> dict[str, torch.Tensor]:
    generator, dictionary = model.activation_generator, model.feature_dict
    found = {
        "vectors": dictionary.feature_vectors.detach(),
        "bias": dictionary.bias.detach(),
        "probabilities": generator.firing_probabilities,
        "mean": generator.mean_firing_magnitudes,
        "std": generator.std_firing_magnitudes,
    }
    if model.correlation_matrix is not None:
        found |= {"factor": model.correlation_matrix.correlation_factor, "own": model.correlation_matrix.correlation_diag}
    return found


def same(bench: SynthBench, model: SyntheticModel, **tolerance) -> None:
    for name, tensor in structure(model).items():
        torch.testing.assert_close(getattr(bench.model, name), tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
    roots = model.hierarchy.to_dict()["roots"] if model.hierarchy else []
    assert bench.model.roots == roots


def test_one_configuration_is_one_model(pair):
    """Drawn from the configuration alone, by both: nothing of ours is read. Spreading takes other sums, hence the tolerance."""
    bench, read = pair
    same(bench, SyntheticModel(SyntheticModelConfig.from_dict(read.cfg.to_dict())), rtol=1e-4, atol=1e-5)


def test_they_read_what_we_write(pair):
    same(*pair, rtol=1e-6, atol=1e-7)


def test_we_read_what_they_write(pair, tmp_path):
    bench, model = pair
    model.save(tmp_path / "theirs")
    again = SynthBench(tmp_path / "theirs")
    same(again, model, rtol=1e-6, atol=1e-7)
    assert again._model_settings == bench._model_settings
    assert torch.equal(again.batch(0, 100).inputs, bench.batch(0, 100).inputs)
    again.save(tmp_path / "again")
    theirs, ours = (SyntheticModelConfig.from_dict(json.loads((tmp_path / name / CONFIG).read_text())) for name in ("theirs", "again"))
    assert theirs == ours


def moments(codes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Means over rows with the standard errors of those means."""
    active, codes = (codes > 0).double(), codes.double()
    together = active.T @ active / len(codes)
    product, square = codes.T @ codes / len(codes), codes.square().T @ codes.square() / len(codes)
    mean, second = codes.mean(dim=0), codes.square().mean(dim=0)
    l0 = active.sum(dim=1)
    fourth = codes.pow(4).mean(dim=0)
    values = {"rate": active.mean(dim=0), "mean": mean, "second": second, "together": together, "product": product, "l0": l0.mean()[None]}
    variances = {
        "rate": values["rate"] * (1 - values["rate"]),
        "mean": second - mean**2,
        "second": fourth - second**2,
        "together": together * (1 - together),
        "product": square - product**2,
        "l0": l0.var()[None],
    }
    return {name: (value, (variances[name].clamp_min(0) / len(codes))) for name, value in values.items()}


def test_draws_have_the_same_statistics(pair):
    """Firing rates, magnitudes (first and second moment), pairs that fire together and their products, exclusion, L0: within
    6 standard errors of the difference in every entry, and not all of them far below one."""
    bench, model = pair
    torch.manual_seed(11)
    theirs = torch.cat([model.activation_generator.sample(10_000) for _ in range(N // 10_000)])
    ours = torch.cat([bench.sample(10_000, stream("oracle", i)).truth.codes for i in range(N // 10_000)])
    for name, (value, variance) in moments(ours).items():
        other, other_variance = moments(theirs)[name]
        rare = 20 / N  # below twenty events the normal approximation is none
        error = (variance + other_variance).sqrt()
        off = (value - other).abs() / error.clamp_min(1e-12)
        counted = (value + other > rare) | (name == "l0")
        assert (off[counted] < 6).all(), f"{name}: {off[counted].max():.1f} standard errors"
        assert ((value - other).abs()[~counted] < 40 / N * max(1.0, float(ours.max()) ** 2)).all()
        if name == "rate":
            assert 0.4 < off[counted].square().mean() < 2.0 or len(off) < 60
    never_ours, never_theirs = (moments(codes)["together"][0] == 0 for codes in (ours, theirs))
    groups = bench.model.forest.group
    siblings = (groups[:, None] == groups[None]) & (groups[:, None] >= 0) & ~torch.eye(len(groups), dtype=torch.bool)
    assert never_ours[siblings].all() and never_theirs[siblings].all()
    assert siblings.any() == bool(bench.n_roots and bench.exclusive_portion)


def test_rows_equal_theirs_for_the_same_codes(pair):
    bench, model = pair
    data = bench.sample(500, stream(1))
    with torch.no_grad():
        expected = model.feature_dict(data.truth.codes)
    torch.testing.assert_close(data.inputs, expected, rtol=1e-4, atol=1e-4)
    assert mean_correlation_coefficient(bench.features, model.feature_dict.feature_vectors.detach()) == pytest.approx(1.0, abs=1e-5)


def test_the_published_configuration_is_the_default_one_at_full_size():
    """SynthSAEBench-16k: the names and numbers of the published configuration give our `full()`."""
    published = {
        "num_features": 16_384,
        "hidden_dim": 768,
        "firing_probability": {"generator_name": "zipfian", "exponent": 0.5, "max_prob": 0.4, "min_prob": 5e-4},
        "hierarchy": {
            "total_root_nodes": 128,
            "branching_factor": 4,
            "max_depth": 3,
            "mutually_exclusive_portion": 1.0,
            "compensate_probabilities": True,
            "scale_children_by_parent": True,
        },
        "orthogonalization": None,
        "correlation": {"rank": 25, "correlation_scale": 0.1},
        "std_firing_magnitudes": {"generator_name": "folded_normal", "mean": 0.5, "std": 0.5},
        "mean_firing_magnitudes": {"generator_name": "linear", "start": 5.0, "end": 4.0},
        "bias": 0.5,
        "seed": 42,
    }
    model = SyntheticModel(SyntheticModelConfig.from_dict(published))
    bench = SynthBench.full(orthogonal_steps=0)
    same(bench, model, rtol=1e-5, atol=1e-6)
    theirs = model.activation_generator.sample(1_000)
    ours = bench.sample(1_000, stream(0)).truth.codes
    assert (ours > 0).sum(dim=1).double().mean() == pytest.approx((theirs > 0).sum(dim=1).double().mean().item(), rel=0.03)


class Replayed:
    """An activation generator that gives the codes of given blocks, in order."""

    def __init__(self, blocks):
        self.blocks = iter(blocks)

    def sample(self, n: int) -> torch.Tensor:
        block = next(self.blocks)
        assert len(block) == n
        return block


def test_the_benchmark_scores_as_they_do():
    """The same dictionary on the same rows: F1, precision, recall, MCC, uniqueness, L0, dead latents."""
    spec = importlib.util.spec_from_file_location("benchmark_synth", Path(__file__).parents[2] / "benchmarks" / "synth.py")
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = benchmark
    spec.loader.exec_module(benchmark)
    bench = SynthBench(**CASES["published"], seed=7)
    noisy = bench.features[:30] + 0.2 * torch.randn(30, 24, generator=stream("noise"))
    noisy[28:] *= -1  # the best |cosine| of a row that points the other way
    sae = StandardSAE(StandardSAEConfig(d_in=24, d_sae=30, apply_b_dec_to_input=False))
    sae.W_dec.data, sae.W_enc.data, sae.b_enc.data, sae.b_dec.data = noisy, noisy.T.clone(), torch.full((30,), -2.0), bench.model.bias
    sae.b_enc.data[5] = -1e4
    ours = benchmark.score(SparseDictionary(noisy.clone(), noisy.clone(), sae.b_enc.data, bench.model.bias, Rectified()), bench, 6_000)
    generator = stream("synth", "judge")
    blocks = [bench.sample(benchmark.BLOCK, generator).truth.codes for _ in range(3)]
    dictionary = FeatureDictionary(120, 24, bias=False, initializer=None)
    dictionary.feature_vectors.data, dictionary.bias.data = bench.features, bench.model.bias
    theirs = eval_sae_on_synthetic_data(sae, dictionary, Replayed(blocks), num_samples=6_000, batch_size=benchmark.BLOCK)
    expected = {
        "l0": theirs.sae_l0,
        "f1": theirs.classification.f1_score,
        "precision": theirs.classification.precision,
        "recall": theirs.classification.recall,
        "mcc": theirs.mcc,
        "uniqueness": theirs.uniqueness,
        "dead": theirs.dead_latents / 30,
        "explained_variance": theirs.explained_variance,
    }
    assert ours == pytest.approx(expected, rel=1e-3)
    assert 0.1 < ours["f1"] < 0.9 and ours["dead"] >= 1 / 30
