"""Gated against its published formula in plain torch: codes, loss, who gets which gradient, rewrites and files."""

import pytest
import torch

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.bench import LinearBench
from sdl_explorer.data.hierarchy import HierarchyBench
from sdl_explorer.data.store import Stored
from sdl_explorer.diagnosis.continuation import continued_method
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods import Context, Gated
from sdl_explorer.models.rewrites import scaled, shifted, uncentred
from sdl_explorer.session import Session
from sdl_explorer.training.loop import train
from sdl_explorer.training.state import Schedule, TrainState

D_IN, D_OUT, N_LATENTS, N = 6, 5, 14, 200


def built(d_out=D_OUT, centred=False) -> SparseDictionary:
    """Weights at which the two paths disagree: latents that the gate lets through and the magnitude does not, and the reverse."""
    dictionary = Gated().build(D_IN, d_out, N_LATENTS, torch.Generator().manual_seed(0)).train()
    dictionary.subtract_b_dec = centred
    with torch.no_grad():
        for p in dictionary.parameters():
            p.add_(0.4 * torch.randn(p.shape))
    return dictionary


def published(dictionary, x):
    """pi_gate, pi_mag and codes in the paper's own terms, with W_mag in full."""
    centred = x - dictionary.b_dec if dictionary.subtract_b_dec else x
    W_mag = dictionary.nonlinearity.r.exp()[:, None] * dictionary.W_enc
    gate = centred @ dictionary.W_enc.T + dictionary.b_enc
    magnitude = centred @ W_mag.T + dictionary.nonlinearity.b_mag
    return gate, magnitude, (gate > 0).float() * magnitude.relu()


def losses_of(method, dictionary, x, targets):
    context = Context(0, torch.zeros(N_LATENTS, dtype=torch.long), None, torch.Generator())
    return method.objective(dictionary, dictionary(x), Activations(x, targets), context)


@pytest.mark.parametrize(("d_out", "centred"), [(D_OUT, False), (D_IN, True)])
def test_codes_are_the_published_ones(d_out, centred):
    dictionary, x = built(d_out, centred), torch.randn(N, D_IN)
    gate, magnitude, codes = published(dictionary, x)
    assert ((gate > 0) & (magnitude < 0)).sum() > 20 and ((gate < 0) & (magnitude > 0)).sum() > 20
    torch.testing.assert_close(dictionary(x).pre, gate)
    torch.testing.assert_close(dictionary.encode(x).dense(), codes)
    assert not Gated.masks_only and not Gated.homogeneous
    assert not torch.allclose(codes, torch.where(codes != 0, gate, 0.0)), "codes are not masked pre-activations"


def test_loss_and_gradients_are_the_published_ones():
    dictionary, reference = built(), built()
    reference.load_state_dict(dictionary.state_dict())
    x, targets = torch.randn(N, D_IN), torch.randn(N, D_OUT)
    losses = losses_of(Gated(l1=0.3), dictionary, x, targets)

    gate, _, codes = published(reference, x)
    error = ((codes @ reference.W_dec + reference.b_dec - targets) ** 2).sum(1).mean()
    l1 = 0.3 * (gate.relu() * reference.W_dec.norm(dim=1)).sum(1).mean()
    through = gate.relu() @ reference.W_dec.detach() + reference.b_dec.detach()
    aux = ((through - targets) ** 2).sum(1).mean()
    for name, expected in {"error": error, "l1": l1, "gate": aux}.items():
        torch.testing.assert_close(losses[name], expected)
    sum(losses.values()).backward()
    (error + l1 + aux).backward()
    for (name, ours), theirs in zip(dictionary.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_each_path_is_trained_by_its_own_terms():
    """The error trains magnitudes and not the gate's bias; the gate's two terms train the gate, not r, b_mag or the decoder."""
    x, targets = torch.randn(N, D_IN), torch.randn(N, D_OUT)
    touched = {}
    for name in ("error", "l1", "gate"):
        dictionary = built()
        losses_of(Gated(l1=0.3), dictionary, x, targets)[name].backward()
        touched[name] = {k for k, p in dictionary.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-5}
    assert touched["error"] == {"W_enc", "W_dec", "b_dec", "nonlinearity.r", "nonlinearity.b_mag"}
    assert touched["l1"] == {"W_enc", "b_enc", "W_dec"}
    assert touched["gate"] == {"W_enc", "b_enc"}


def test_r_and_b_mag_belong_to_latents():
    dictionary = built()
    assert set(dictionary.per_latent()) == {"r", "b_mag"}
    fresh = Gated().build(D_IN, D_OUT, N_LATENTS, torch.Generator().manual_seed(0))
    x = torch.randn(N, D_IN)
    torch.testing.assert_close(fresh.encode(x).dense(), fresh.pre(x).relu()), "it starts as a ReLU"


def test_rewrites_keep_the_function():
    """Both paths follow when an input scale or a mean is folded in, though the magnitude has a bias of its own."""
    dictionary, x = built().eval(), torch.randn(N, D_IN)
    s, mean_in, mean_out = 3.7, torch.randn(D_IN), torch.randn(D_OUT)
    with torch.no_grad():
        codes = dictionary.encode(x).dense()
        moved = shifted(dictionary, mean_in, mean_out)
        torch.testing.assert_close(moved.encode(x + mean_in).dense(), codes, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moved(x + mean_in).reconstruction, dictionary(x).reconstruction + mean_out, rtol=1e-4, atol=1e-5)
        both = shifted(scaled(dictionary, s), mean_in, mean_out)
        torch.testing.assert_close(both(x / s + mean_in).reconstruction, dictionary(x).reconstruction / s + mean_out, rtol=1e-4, atol=1e-5)
        centred = built(D_IN, centred=True).eval()
        torch.testing.assert_close(uncentred(centred)(x).reconstruction, centred(x).reconstruction, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sae", "transcoder", "crosscoder"])
@pytest.mark.slow
def test_it_learns_as_sae_transcoder_and_crosscoder(kind):
    source = LinearBench(n_features=12, d_in=8, sparsity=0.8, max_interference=0.7, kind=kind)
    reached = {}
    for l1 in (0.02, 0.5):
        method = Gated(l1=l1)
        dictionary = method.build(source.width_in, source.width_out, 24, torch.Generator().manual_seed(0))
        steps = train(TrainState.start(dictionary, Schedule(lr=1e-2)), method, source, batch_size=64)
        taken = [next(steps) for _ in range(200)]
        errors = [step.losses["error"].item() for step in taken]
        assert sum(errors[-20:]) < 0.25 * sum(errors[:20])
        reached[l1] = taken[-1].l0.item()
    assert reached[0.02] > reached[0.5] > 1, "the penalty makes codes sparser"


@pytest.mark.slow
def test_an_unlocked_decoder_shrinks_and_a_held_one_does_not():
    """Why unit_norm is the default: the penalty pulls on decoder norms, and nothing in the loss holds them."""
    source, norms = LinearBench(n_features=12, d_in=8, sparsity=0.8, max_interference=0.7), {}
    for unit_norm in (True, False):
        method = Gated(l1=0.5, unit_norm=unit_norm)
        state = TrainState.start(method.build(8, 8, 16, torch.Generator().manual_seed(0)), Schedule(lr=1e-2))
        steps = train(state, method, source, batch_size=64)
        for _ in range(300):
            next(steps)
        norms[unit_norm] = state.dictionary.W_dec.detach().norm(dim=1).mean().item()
        if unit_norm:
            held = continued_method(state.dictionary, source.sample(4_000, torch.Generator().manual_seed(1), "choose"))
    assert Gated().unit_norm and norms[True] == pytest.approx(1.0) and norms[False] < 0.8
    assert isinstance(held, Gated) and held.unit_norm
    assert held.l1 == pytest.approx(0.5, rel=0.1), "a checkpoint tells the penalty that made it"


def test_a_session_trains_saves_and_goes_on_bit_for_bit(tmp_path):
    rows = torch.randn(400, 6) + 5
    source, settings = Stored(rows), {"batch_size": 32, "dead_after": 200}
    with Session(source, Gated(), 12, device="cpu", **settings) as session:
        x = source.sample(100, torch.Generator().manual_seed(0), "train").inputs
        torch.testing.assert_close(session.dictionary.nonlinearity.b_mag, session.dictionary.b_enc, msg="centred on the mean in both paths")
        assert session.dictionary.encode(x).fired().float().mean() > 0.2
        session.train(5)
        session.resample([1, 4])
        session.save(tmp_path / "run")
    with Session.open(tmp_path / "run", device="cpu") as again, Session(source, Gated(), 12, device="cpu", **settings) as whole:
        again.train(20)
        whole.train(5).resample([1, 4])
        whole.train(20)
        assert again.step == whole.step == 25
        assert all(map(torch.equal, again.dictionary.state_dict().values(), whole.dictionary.state_dict().values()))


def test_native_file(tmp_path):
    dictionary, x = built().eval(), torch.randn(N, D_IN)
    loaded = SparseDictionary.load(dictionary.save(tmp_path / "d.safetensors"))
    assert torch.equal(loaded.encode(x).dense(), dictionary.encode(x).dense())
    assert all(map(torch.equal, loaded.state_dict().values(), dictionary.state_dict().values()))


def test_resampled_latents_get_the_mean_magnitude_of_the_others():
    source = HierarchyBench(parents=2, children=2, independent=2, d_in=8)
    with Session(source, Gated(), 16, device="cpu", batch_size=64) as session:
        session.train(60)
        before = session.dictionary
        session.resample([3, 5])
        after, others = session.dictionary, [i for i in range(16) if i not in (3, 5)]
        alive = torch.ones(16, dtype=torch.bool)
        for name, old in before.per_latent().items():
            assert torch.equal(after.per_latent()[name][others], old[others])
            assert not torch.equal(after.per_latent()[name][[3, 5]], old[[3, 5]])
            torch.testing.assert_close(after.per_latent()[name][3], old[alive].mean(), rtol=0.2, atol=0.05)
