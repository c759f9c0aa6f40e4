"""Realign: the direction that fires a latent, its rate and size kept, everything else untouched, and a pull that is a pull."""

import copy
import itertools
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.anchors import Anchors, Pulls
from sdl_explorer.data.bench import LinearBench
from sdl_explorer.data.sources import stream
from sdl_explorer.diagnosis.compare import score
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods import BatchTopK, JumpReLU, ReLU, TopK
from sdl_explorer.models.terms import pull_distance
from sdl_explorer.session import Session
from sdl_explorer.training import realign
from sdl_explorer.training.commits import CommitStore
from sdl_explorer.training.interventions import Anchor, Release
from sdl_explorer.training.loop import train
from sdl_explorer.training.realign import Realign, measure_responses
from sdl_explorer.training.state import Schedule, TrainState

KINDS = {
    "sae": LinearBench(n_features=16, d_in=10, sparsity=0.8, max_interference=0.6),
    "transcoder": LinearBench(n_features=16, d_in=10, d_out=7, sparsity=0.8, max_interference=0.6, kind="transcoder"),
    "crosscoder": LinearBench(n_features=16, d_in=5, sparsity=0.8, max_interference=1.0, kind="crosscoder"),
}
METHODS = {"ReLU": ReLU(l1=0.05), "JumpReLU": JumpReLU(l0=0.02), "BatchTopK": BatchTopK(k=3), "TopK": TopK(k=3)}
N = 2_000


@lru_cache
def _trained(method: str, kind: str, steps: int) -> TrainState:
    source, recipe = KINDS[kind], METHODS[method]
    dictionary = recipe.build(source.width_in, source.width_out, 24, torch.Generator().manual_seed(0))
    state = TrainState.start(dictionary, Schedule(lr=1e-2), dead_after=100_000)
    list(itertools.islice(train(state, recipe, source, batch_size=64), steps))
    return state


def trained(method="ReLU", kind="sae", device="cpu", steps=60) -> TrainState:
    """24 latents after some steps, with moments everywhere; a copy of its own for each caller."""
    made = _trained(method, kind, steps)
    state = TrainState.start(copy.deepcopy(made.dictionary).to(device), made.schedule, dead_after=made.dead_after)
    for mine, theirs in zip(state.dictionary.parameters(), made.dictionary.parameters(), strict=True):
        state.optimiser.state[mine] = {k: t.clone().to(device) for k, t in made.optimiser.state[theirs].items()}
    return replace(state, step=made.step, samples_since_fired=made.samples_since_fired.clone().to(device))


def choose(kind="sae", n=N) -> Activations:
    return KINDS[kind].sample(n, stream("choose"), "choose")


def planned(state, kind="sae", rows=None, **settings):
    return Realign(**{"least": 20} | settings).plan(state, choose(kind) if rows is None else rows, stream(0))


def codes(state: TrainState, rows: Activations) -> torch.Tensor:
    with torch.no_grad():
        return state.dictionary.eval().encode(rows.inputs.to(state.dictionary.device)).dense().cpu()


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    names = {id(p): name for name, p in state.dictionary.named_parameters()}
    moments = {f"{names[id(p)]}/{k}": v for p, slots in state.optimiser.state.items() for k, v in slots.items()}
    return {
        k: t.detach().clone() for k, t in (dict(state.dictionary.state_dict()) | moments | {"silent": state.samples_since_fired}).items()
    }


def close(a, b, **tolerance):
    torch.testing.assert_close(a.detach().cpu(), b.detach().cpu(), **tolerance)


# directions ----------------------------------------------------------------------------------------------------------


def test_a_response_that_is_known_is_the_direction():
    """One feature a row, with values 1 to 4; latent i reads a mixture and fires on feature i alone, z = value - 0.5.

    E[z x] / E[z] = e_i * sum (v - 0.5) v / sum (v - 0.5) = 25/8 e_i, and E[x] = 10/12 in each coordinate.
    """
    x = torch.cat([torch.eye(3) * value for value in (1.0, 2.0, 3.0, 4.0)])
    reads = torch.tensor([[1.0, -0.4, 0.1], [-0.7, 1.0, 0.1], [0.1, -0.3, 1.0]])
    state = TrainState.start(SparseDictionary(reads, torch.eye(3), torch.full((3,), -0.5)))
    plan = planned(state, rows=Activations(x, x), least=4)
    expected = normalize(25 / 8 * torch.eye(3) - 10 / 12, dim=1)
    close(plan.changed_pulls.directions, expected)
    close(normalize(plan.W_enc, dim=1), expected)
    kept = planned(state, rows=Activations(x, x), least=4, refit="norm")
    close(kept.W_enc, expected * reads.norm(dim=1, keepdim=True))
    plan.apply(state)
    z = codes(state, Activations(x, x))
    assert torch.equal(z > 0, x > 0) and z.sum(dim=0).tolist() == pytest.approx([8.0] * 3, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_directions_are_those_that_health_measures(kind, method, device):
    """An independent implementation in the findings; for a transcoder the response lives on the input side."""
    state = trained(method, kind, device)
    planned(state, kind).apply(state)
    plan_latents = state.pulls.latents.cpu().numpy()
    fresh = trained(method, kind, device)
    with torch.no_grad():  # the same codes, the encoder's rows replaced: what health calls agreement is then 1
        found = measure_responses(fresh.dictionary, choose(kind))
    close(state.pulls.directions, found.directions[state.pulls.latents])
    before = check_health(fresh.dictionary, choose(kind))
    reads = normalize(fresh.dictionary.W_enc.detach(), dim=1)
    cosine = (reads * found.directions).sum(dim=1).cpu().numpy()
    assert cosine[plan_latents] == pytest.approx(before.encoder_response[plan_latents], abs=1e-3)


def test_blocks_do_not_matter(monkeypatch):
    """But for TopK, whose sweeps end somewhere in a flat valley: rounding decides where, within a small part of a row's norm."""
    for method in METHODS:
        state = trained(method)
        whole = planned(state)
        with monkeypatch.context() as patched:
            patched.setattr(realign, "CELLS", 3 * N)
            parts = planned(state)
        close(parts.changed_pulls.directions, whole.changed_pulls.directions, rtol=1e-4, atol=1e-5)
        for name in ("W_enc", "b_enc"):
            close(getattr(parts, name), getattr(whole, name), rtol=1e-4, atol=0.15 if method == "TopK" else 1e-5)


# rate and size -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refit", ["size", "norm"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["ReLU", "JumpReLU", "BatchTopK"])
def test_rate_and_size_are_kept(method, kind, refit, device):
    state, rows = trained(method, kind, device), choose(kind)
    before, norms = codes(state, rows), state.dictionary.W_enc.norm(dim=1)
    plan = planned(state, kind, refit=refit)
    plan.apply(state)
    after, latents = codes(state, rows), plan.latents.cpu()
    change = (after > 0).sum(dim=0) - (before > 0).sum(dim=0)
    assert change[latents].abs().max() <= 1
    if refit == "norm":
        close(plan.W_enc.norm(dim=1), norms[plan.latents])
    else:
        close(after.sum(dim=0)[latents], before.sum(dim=0)[latents], rtol=2e-2, atol=0.5)
        assert (plan.W_enc.norm(dim=1) - norms[plan.latents]).abs().max() > 0.01


@pytest.mark.parametrize("refit", ["size", "norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_competing_latents_keep_their_rates(kind, refit, device):
    """TopK: all n * k places are taken before and after, so the counts can agree, and the sweeps find how."""
    state, rows = trained("TopK", kind, device), choose(kind)
    before = (codes(state, rows) > 0).sum(dim=0)
    unrefitted = trained("TopK", kind, device)
    plan = planned(state, kind, refit=refit)
    with torch.no_grad():
        d = unrefitted.dictionary
        d.W_enc[plan.latents] = plan.changed_pulls.directions * d.W_enc[plan.latents].norm(dim=1, keepdim=True)
    plan.apply(state)
    latents = plan.latents.cpu()
    off = lambda s: ((codes(s, rows) > 0).sum(dim=0) - before)[latents].abs().float().mean()
    assert off(state) < 0.03 * before[latents].float().mean()
    assert off(unrefitted) > 10 * off(state)


def test_more_places_than_latents():
    """k = n_latents is ReLU, and so is its refit."""
    state, relu = trained(), trained()
    state.dictionary.nonlinearity = TopK(k=24).nonlinearity(24)
    a, b = planned(state, refit="norm"), planned(relu, refit="norm")
    close(a.W_enc, b.W_enc)
    close(a.b_enc, b.b_enc, rtol=1e-3, atol=1e-4)


def test_a_latent_that_fires_everywhere_still_does():
    x = torch.randn(50, 4, generator=stream(1)) + torch.tensor([6.0, 0, 0, 0])
    state = TrainState.start(SparseDictionary(torch.eye(4)[:1], torch.eye(4)[:1]))
    plan = planned(state, rows=Activations(x, x))
    plan.apply(state)
    assert (codes(state, Activations(x, x)) > 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_keeping_the_size_loses_less_than_keeping_the_norm(method):
    error = {refit: planned(trained(method, steps=200), refit=refit).expected["error after"] for refit in ("size", "norm")}
    assert error["size"] < error["norm"]


# what is changed, and what is not ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_other_rows_and_moments_are_bit_identical(method, device):
    state = trained(method, device=device)
    before = everything(state)
    plan = planned(state, latents=[3, 8, 17])
    after_planning = everything(state)
    assert all(torch.equal(after_planning[k], before[k]) for k in before), "planning changes nothing"
    plan.apply(state)
    chosen, after = plan.latents.tolist(), everything(state)
    others = [i for i in range(24) if i not in chosen]
    for name in before:
        if before[name].ndim == 0 or len(before[name]) != 24:
            assert torch.equal(after[name], before[name]), name
        else:
            assert torch.equal(after[name][others], before[name][others]), name
            assert "/exp_avg" not in name or not after[name][chosen].any(), name
    assert torch.equal(after["W_dec"], before["W_dec"]), "decoder rows stay"
    assert torch.equal(state.dictionary.W_enc[plan.latents], plan.W_enc) and torch.equal(state.dictionary.b_enc[plan.latents], plan.b_enc)
    assert plan.expected["error after"] == pytest.approx(
        (state.dictionary.eval()(choose().inputs.to(device)).reconstruction.cpu() - choose().targets).square().sum(dim=1).mean().item(),
        rel=1e-4,
    )


def test_seldom_dead_and_pinned_latents_are_left_alone():
    state = trained()
    count = measure_responses(state.dictionary, choose()).count
    least = int(count.median()) + 1
    Anchor(anchors=Anchors.from_rows(torch.eye(10)[:1]), latents=[int(count.argmax())]).plan(state, choose(), stream(0)).apply(state)
    dead = int(count.argsort()[-2])
    state.samples_since_fired[dead] = 200_000
    count = measure_responses(state.dictionary, choose()).count
    expected = [i for i in range(24) if count[i] >= least and i != dead and i not in state.pins.latents]
    plan = planned(state, least=least)
    assert plan.latents.tolist() == expected
    seldom = int((count[[i for i in range(24) if i != dead and i not in state.pins.latents]] < least).sum())
    assert f"{seldom} fired on fewer than {least} of 2,000 choose rows" in plan.reading
    plan.apply(state)
    assert len(state.pins) == 1, "the anchor is held on"
    held = int(state.pins.latents[0])
    planned(state, latents=[held, dead]).apply(state)
    assert state.pins is None and held in state.pulls.latents and dead in state.pulls.latents, "both were asked for by name"


def test_anchoring_a_pulled_latent_ends_its_pull():
    state = trained()
    planned(state, latents=[3, 8]).apply(state)
    Anchor(anchors=Anchors.from_rows(torch.eye(10)[:1]), latents=[3]).plan(state, choose(), stream(0)).apply(state)
    assert state.pulls.latents.tolist() == [8] and state.pins.latents.tolist() == [3]


def test_a_second_realign_follows_the_first():
    state = trained()
    planned(state, latents=[3, 8], pull=0.5).apply(state)
    planned(state, latents=[8, 9], pull=0.25).apply(state)
    assert state.pulls.latents.tolist() == [3, 8, 9] and state.pulls.weight.tolist() == [0.5, 0.25, 0.25]
    planned(state, latents=[3], pull=0).apply(state)
    assert state.pulls.latents.tolist() == [8, 9], "without a pull a row is set and free"


def test_dropped_latents_are_not_pulled():
    state = trained()
    plan = planned(state, latents=[3, 8]).drop([3])
    plan.apply(state)
    assert state.pulls.latents.tolist() == [8] and [row.latent for row in plan.rows] == [8]


# the pull ------------------------------------------------------------------------------------------------------------


def test_the_pull_is_a_distance_of_directions_and_turns_without_stretching():
    dictionary = SparseDictionary(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.eye(2))
    pulls = Pulls(torch.tensor([1, 0]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0.5, 7.0]))
    loss = pull_distance(dictionary, pulls)
    assert loss.item() == pytest.approx(0.5 * 2)  # latent 1: |e2 - e1|^2 = 2; latent 0 is there already
    loss.backward()
    close((dictionary.W_enc.grad * dictionary.W_enc).sum(dim=1), torch.zeros(2))
    close(dictionary.W_enc.grad[0], torch.zeros(2))
    assert dictionary.W_dec.grad is None


def test_a_strong_pull_holds_and_release_lets_go():
    kept = {}
    for pull in (0.0, 10.0):
        state = trained()
        plan = planned(state, pull=pull)
        plan.apply(state)
        steps = list(itertools.islice(train(state, METHODS["ReLU"], KINDS["sae"], batch_size=64), 60))
        kept[pull] = (normalize(state.dictionary.W_enc[plan.latents], dim=1) * normalize(plan.W_enc, dim=1)).sum(dim=1).mean().item()
        assert ("pull" in steps[-1].losses) == (pull > 0)
    assert kept[10.0] > 0.999 > kept[0.0] + 0.01
    before = everything(state)
    Release().plan(state, choose(), stream(0)).apply(state)
    assert state.pulls is None and all(torch.equal(t, before[k]) for k, t in everything(state).items())
    assert "pull" not in next(train(state, METHODS["ReLU"], KINDS["sae"], batch_size=64)).losses


def test_pulls_survive_a_commit(tmp_path):
    state = trained()
    store = CommitStore(tmp_path, 10**9)
    settings = {"method": {"class": "ReLU", "settings": {}}}
    without = store.write(state, settings, parent=None, message="", python="", kind="manual", latents=(), metrics={})
    assert store.load(without, "cpu").pulls is None
    planned(state, latents=[3, 8], pull=0.3).apply(state)
    commit = store.write(state, settings, parent=None, message="", python="", kind="realign", latents=(3, 8), metrics={})
    found = store.load(commit, "cpu").pulls
    for name in ("latents", "directions", "weight"):
        assert torch.equal(getattr(found, name), getattr(state.pulls, name))


def test_no_latent_is_pulled_twice():
    with pytest.raises(ValueError, match="pulled twice"):
        Pulls(torch.tensor([0, 0]), torch.eye(2), torch.ones(2))


# refusals ------------------------------------------------------------------------------------------------------------


def test_what_it_cannot_do():
    state = trained()
    with pytest.raises(ValueError, match=r"none of 24 latents fired on 3000 of 2,000 choose rows \(the most: \d+\)"):
        planned(state, least=3_000)
    with pytest.raises(ValueError, match="latent 24 does not exist"):
        planned(state, latents=[24])
    state.dictionary.nonlinearity = SparseDictionary(torch.eye(2), torch.eye(2), nonlinearity=torch.sigmoid).nonlinearity
    with pytest.raises(ValueError, match="cannot refit the bias under Pointwise"):
        planned(state)
    rows = torch.nn.Parameter(torch.eye(4))
    with pytest.raises(ValueError, match="tied to its decoder"):
        planned(TrainState.start(SparseDictionary(rows, rows)))
    state = trained()
    state.dictionary.W_dec.data[0] = torch.nan
    with pytest.raises(ValueError, match="not finite; revert"):
        planned(state)


@pytest.mark.parametrize("wrong", [{"pull": -1}, {"refit": "bias"}, {"least": 0}, {"choose_rows": 0}])
def test_settings_have_bounds(wrong):
    with pytest.raises(ValueError):
        Realign(**wrong)


# in a session --------------------------------------------------------------------------------------------------------


@pytest.fixture
def session(monkeypatch):
    monkeypatch.setattr("sdl_explorer.studies.JUDGE_ROWS", 1_000)
    source = LinearBench(n_features=40, d_in=32, sparsity=0.9, max_interference=0.3)
    with Session(source, TopK(k=4), 64, batch_size=128, lr=3e-3, warmup_steps=0) as session:
        yield session.train(400)


@pytest.mark.slow
def test_encoder_recovery_rises_against_its_control(session):
    """The agreement of encoder and response is set by Realign and is no evidence; the cosine to the truth is."""
    session.realign(pull=0.3, choose_rows=20_000)
    assert session.head.kind == "realign" and session.head.python == "session.realign(choose_rows=20000, pull=0.3)"
    control = session.control(60, runs=5)
    assert control.primary == "recovery_encoder" and control.sham
    assert control.verdict("recovery_encoder") == "improved", control.treated["recovery_encoder"]
    assert control.difference("recovery_encoder", "sham").low > 0.5
    assert control.treated["recovery_encoder"].mean() > 0.9 > 0.1 > control.untreated["recovery_encoder"].mean()
    assert (control.treated["unexplained_variance"] > control.untreated["unexplained_variance"]).all(), "and this is what it costs"


def test_the_line_in_the_log_does_the_same(session):
    twin = session.branch()
    with twin:
        session.realign([1, 2, 5], pull=0.2, least=5, refit="norm", choose_rows=3_000)
        exec(session.head.python, {"session": twin})
        assert torch.equal(twin.dictionary.W_enc, session.dictionary.W_enc)
        assert score(twin.dictionary, twin._judge_rows(500)) == score(session.dictionary, session._judge_rows(500))
