"""Interventions: the recipes to the letter, and nothing else changes."""

import itertools

import pytest
import torch
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.anchors import Anchors
from sdl_explorer.data.bench import LinearBench
from sdl_explorer.data.sources import stream
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods import JumpReLU, Method, ReLU, TopK
from sdl_explorer.training.interventions import Anchor, Release, Resample
from sdl_explorer.training.loop import train
from sdl_explorer.training.plan import Plan
from sdl_explorer.training.state import Schedule, TrainState

KINDS = {
    "sae": LinearBench(n_features=16, d_in=10, sparsity=0.8, max_interference=0.6),
    "transcoder": LinearBench(n_features=16, d_in=10, d_out=7, sparsity=0.8, max_interference=0.6, kind="transcoder"),
    "crosscoder": LinearBench(n_features=16, d_in=5, sparsity=0.8, max_interference=1.0, kind="crosscoder"),
}
DEAD = [1, 6, 13]
OTHERS = [i for i in range(14) if i not in DEAD]


def trained(device="cpu", kind="sae", method: Method | None = None, steps=5) -> TrainState:
    """14 latents of which 1, 6 and 13 count as dead, with moments everywhere."""
    source, method = KINDS[kind], method or ReLU(l1=0.01)
    dictionary = method.build(source.width_in, source.width_out, 14, torch.Generator().manual_seed(0)).to(device)
    state = TrainState.start(dictionary, Schedule(lr=1e-2), dead_after=1_000)
    list(itertools.islice(train(state, method, source, batch_size=32), steps))
    state.samples_since_fired[DEAD] = 5_000
    return state


def choose(kind="sae", n=300) -> Activations:
    return KINDS[kind].sample(n, stream("choose"), "choose")


def planned(intervention, state, kind="sae", seed=0) -> Plan:
    return intervention.plan(state, choose(kind), stream(seed))


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    names = {id(p): name for name, p in state.dictionary.named_parameters()}
    moments = {f"{names[id(p)]}/{k}": v for p, slots in state.optimiser.state.items() for k, v in slots.items()}
    found = dict(state.dictionary.state_dict()) | moments | {"silent": state.samples_since_fired}
    if state.pins is not None:
        found |= {"pins": state.pins.latents, "pinned to": state.pins.anchors.inputs, "weight": state.pins.weight}
    return {name: t.detach().clone() for name, t in found.items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def close(a, b, **tolerance):
    torch.testing.assert_close(a.cpu(), b.cpu(), **tolerance)


# Resample ------------------------------------------------------------------------------------------------------------


def test_resample_is_the_published_recipe(device):
    """Bricken et al. 2023: decoder := unit input, encoder := the same at 0.2 * mean alive norm, bias 0, moments of those rows 0."""
    state = trained(device)
    before = everything(state)
    plan = planned(Resample(), state)
    assert plan.latents.tolist() == DEAD
    plan.apply(state)
    d, rows = state.dictionary, choose().inputs
    alive = before["W_enc"][OTHERS].norm(dim=1).mean()
    for i, row in zip(DEAD, plan.rows, strict=True):
        assert row.latent == i and row.origin == f"choose row {row.source_row}"
        x = normalize(rows[row.source_row], dim=0)
        close(d.W_dec[i].detach(), x)
        close(d.W_enc[i].detach(), 0.2 * alive.cpu() * x)
        assert row.encoder_scale == pytest.approx(0.2 * alive.item())
        assert d.b_enc[i] == 0 and row.bias == 0 and state.samples_since_fired[i] == 0

    after = everything(state)
    for name in before:
        if name.endswith("/step") or name in ("b_dec", "b_dec/exp_avg", "b_dec/exp_avg_sq", "nonlinearity.log_scale"):
            assert torch.equal(after[name], before[name]), name
        else:
            assert torch.equal(after[name][OTHERS], before[name][OTHERS]), name
            assert "/exp_avg" not in name or not after[name][DEAD].any(), name


@pytest.mark.slow
def test_rows_are_drawn_in_proportion_to_the_squared_loss():
    """A dictionary that writes nothing has loss |x|^2 = 1, 2, 3; their squares are 1 : 4 : 9."""
    dictionary = SparseDictionary(torch.ones(2, 3), torch.zeros(2, 3))
    state = TrainState.start(dictionary)
    x = torch.diag(torch.tensor([1.0, 2.0, 3.0]).sqrt())
    rows = Activations(x, x)
    n, counts = 300, torch.zeros(3)
    for seed in range(n):
        counts[Resample(latents=[0]).plan(state, rows, torch.Generator().manual_seed(seed)).rows[0].source_row] += 1
        if seed == 0:
            assert [r.loss for r in Resample(latents=[0], pick="worst").plan(state, rows, torch.Generator()).rows] == pytest.approx([3.0])
    expected = torch.tensor([1.0, 4.0, 9.0]) / 14
    error = 4 * (expected * (1 - expected) / n).sqrt()
    assert ((counts / n - expected).abs() < error).all(), counts / n


def test_no_row_is_drawn_twice_while_there_are_enough():
    state = trained()
    rows = [r.source_row for r in planned(Resample(latents=list(range(14))), state).rows]
    assert len(set(rows)) == 14
    few = Activations(*(choose().inputs[:3],) * 2)
    assert len(Resample(latents=list(range(14))).plan(state, few, stream(0)).rows) == 14


def test_the_worst_rows_are_taken_in_turn():
    state = trained()
    with torch.no_grad():
        x = choose().inputs
        losses = (state.dictionary(x).reconstruction - x).square().sum(1)
    plan = planned(Resample(pick="worst"), state)
    assert [r.source_row for r in plan.rows] == losses.argsort(descending=True)[:3].tolist()
    assert [r.loss for r in plan.rows] == pytest.approx(losses.sort(descending=True).values[:3].tolist(), rel=1e-5)


def test_a_row_without_direction_is_never_taken():
    """Where biases reconstruct zero badly, an empty row has a loss, and a latent made from it would stay dead."""
    state = trained()
    with torch.no_grad():
        state.dictionary.b_dec.fill_(100.0)
    x = choose().inputs.clone()
    x[10:] = 0
    for pick in ("loss2", "worst"):
        plan = Resample(latents=list(range(14)), pick=pick).plan(state, Activations(x, x), stream(0))
        assert all(r.source_row < 10 for r in plan.rows)
        close(plan.W_dec.norm(dim=1), torch.ones(14))


@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_come_from_the_same_row(kind, device):
    state, rows = trained(device, kind), choose(kind)
    plan = planned(Resample(), state, kind)
    for j, row in enumerate(plan.rows):
        close(normalize(plan.W_enc[j], dim=0), normalize(rows.inputs[row.source_row], dim=0))
        close(plan.W_dec[j], normalize(rows.targets[row.source_row], dim=0))


@pytest.mark.parametrize("kind", KINDS)
def test_the_residual_as_target(kind, device):
    state, rows = trained(device, kind), choose(kind)
    plan = planned(Resample(target="residual"), state, kind)
    with torch.no_grad():
        residual = rows.targets - state.dictionary(rows.inputs.to(device)).reconstruction.cpu()
    for j, row in enumerate(plan.rows):
        close(plan.W_dec[j], normalize(residual[row.source_row], dim=0))
        read = residual if kind == "sae" else rows.inputs
        close(normalize(plan.W_enc[j], dim=0), normalize(read[row.source_row], dim=0))


def test_rows_are_taken_as_the_encoder_sees_them():
    dictionary = SparseDictionary(torch.randn(14, 10), torch.randn(14, 10), b_dec=torch.randn(10), subtract_b_dec=True)
    state = TrainState.start(dictionary)
    plan = planned(Resample(latents=[2]), state)
    expected = normalize(choose().inputs[plan.rows[0].source_row] - dictionary.b_dec, dim=0)
    close(plan.W_dec[0], expected.detach())
    close(normalize(plan.W_enc[0], dim=0), expected.detach())


def test_scale_and_noise():
    state = trained()
    plain, large, noisy = (planned(Resample(latents=[3], **s), state) for s in ({}, {"scale": 2.0}, {"noise": 0.5}))
    close(large.W_enc, 10 * plain.W_enc)
    assert torch.equal(large.W_dec, plain.W_dec)
    close(noisy.W_dec.norm(dim=1), torch.ones(1))
    assert noisy.rows[0].source_row == plain.rows[0].source_row
    cosine = (noisy.W_dec @ plain.W_dec.T).item()
    assert 1 / (1 + 0.5**2) ** 0.5 - 0.2 < cosine < 0.999, "a unit direction of length 0.5 was added"
    close(normalize(noisy.W_enc, dim=1), noisy.W_dec)


def test_latents_of_a_jumprelu_get_the_mean_alive_threshold(device):
    state = trained(device, method=JumpReLU(l0=0.01))
    with torch.no_grad():
        state.dictionary.nonlinearity.threshold.copy_(torch.arange(14.0))
    planned(Resample(), state).apply(state)
    threshold = state.dictionary.nonlinearity.threshold
    close(threshold[DEAD].detach(), torch.full((3,), sum(OTHERS) / 11))
    assert threshold[OTHERS].tolist() == [float(i) for i in OTHERS]


def test_the_same_seed_plans_the_same_and_names_its_command():
    state = trained()
    a, b, c = planned(Resample(), state), planned(Resample(), state), planned(Resample(), state, seed=1)
    assert torch.equal(a.W_dec, b.W_dec) and a.rows == b.rows
    assert not torch.equal(a.W_dec, c.W_dec)
    assert a.python == "session.resample([1, 6, 13])"
    assert planned(Resample(latents=[2], noise=0.1, pick="worst"), state).python == "session.resample([2], noise=0.1, pick='worst')"


def test_resampling_ends_the_pin_of_a_latent():
    state = trained()
    planned(Anchor(anchors=Anchors.from_rows(torch.eye(10)[:2]), latents=[3, 6]), state).apply(state)
    planned(Resample(latents=[6]), state).apply(state)
    assert state.pins.latents.tolist() == [3]


# Anchor, Release -----------------------------------------------------------------------------------------------------


def test_anchors_take_dead_latents_first_and_then_the_best_matches(device):
    state = trained(device)
    directions = torch.cat([torch.eye(10)[:3], state.dictionary.W_dec[[9, 4]].detach().cpu()])
    plan = planned(Anchor(anchors=Anchors.from_rows(directions), weight=0.3), state)
    assert plan.latents.tolist() == [1, 6, 13, 9, 4]
    before = everything(state)
    plan.apply(state)
    d = state.dictionary
    alive = before["W_enc"][OTHERS].norm(dim=1).mean().cpu()
    close(d.W_dec[DEAD].detach(), torch.eye(10)[:3])
    close(d.W_enc[DEAD].detach(), alive * torch.eye(10)[:3])
    assert d.b_enc[DEAD].tolist() == [0, 0, 0]
    for name in ("W_enc", "W_dec", "b_enc"):
        assert torch.equal(getattr(d, name)[OTHERS], before[name][OTHERS]), "live latents are pulled, not moved"
    for name in ("W_enc", "W_dec", "b_enc"):
        assert not everything(state)[f"{name}/exp_avg"][[1, 6, 13, 9, 4]].any()
    assert state.pins.latents.tolist() == [1, 6, 13, 9, 4]
    assert state.pins.weight.tolist() == pytest.approx([0.3] * 5) and not state.pins.any_hard
    close(state.pins.anchors.targets, normalize(directions, dim=1))


def test_an_anchored_dead_latent_of_a_jumprelu_can_fire():
    state = trained(method=JumpReLU(l0=0.01))
    with torch.no_grad():
        state.dictionary.nonlinearity.threshold[DEAD] = 1e6
    direction = torch.eye(10)[:1]
    planned(Anchor(anchors=Anchors.from_rows(direction)), state).apply(state)
    assert state.dictionary.encode(direction).dense()[0, 1] > 0


def test_no_latent_serves_two_anchors_unless_named():
    state = trained()
    state.samples_since_fired.zero_()
    row = state.dictionary.W_dec[[9]].detach()
    assert len(set(planned(Anchor(anchors=Anchors.from_rows(row.repeat(3, 1))), state).latents.tolist())) == 3
    planned(Anchor(anchors=Anchors.from_rows(row)), state).apply(state)
    second = planned(Anchor(anchors=Anchors.from_rows(row + 0.01)), state)
    assert second.latents.tolist() != [9], "a pin is not taken over silently"
    planned(Anchor(anchors=Anchors.from_rows(torch.eye(10)[:1]), latents=[9]), state).apply(state)
    assert len(state.pins) == 1
    close(state.pins.anchors.inputs, torch.eye(10)[:1])


def test_hard_anchors_fix_both_rows(device):
    state = trained(device)
    planned(Anchor(anchors=Anchors.from_rows(3 * torch.eye(10)[:2]), latents=[4, 8], hard=True), state).apply(state)
    for rows in (state.dictionary.W_enc, state.dictionary.W_dec):
        close(rows[[4, 8]].detach(), torch.eye(10)[:2])
    list(itertools.islice(train(state, ReLU(), KINDS["sae"], batch_size=32), 4))
    close(state.dictionary.W_dec[[4, 8]].detach(), torch.eye(10)[:2], atol=0, rtol=0)


def test_anchors_of_a_transcoder_have_two_sides():
    state = trained(kind="transcoder")
    g = torch.Generator().manual_seed(0)
    anchors = Anchors.from_rows(torch.randn(2, 10, generator=g), torch.randn(2, 7, generator=g))
    plan = planned(Anchor(anchors=anchors, latents=[1, 6]), state, "transcoder")
    close(normalize(plan.W_enc, dim=1), anchors.inputs)
    close(plan.W_dec, anchors.targets)


def test_overlapping_anchors_are_said():
    state = trained()
    rows = torch.eye(10)[:2].clone()
    rows[1, 0] = 10.0
    assert "overlap at cosine 1.00" in planned(Anchor(anchors=Anchors.from_rows(rows, names=("a", "b"))), state).reading


def test_the_command_of_an_anchor_can_be_run():
    state, truth = trained(), choose()
    plan = planned(Anchor(anchors=Anchors.from_truth(truth, [3, 9]), latents=[2, 5], weight=1.5), state)

    class session:
        source = KINDS["sae"]
        anchor = staticmethod(lambda anchors, **kw: (anchors, kw))

    anchors, kw = eval(plan.python, {"session": session, "Anchors": Anchors, "torch": torch})
    close(anchors.inputs, Anchors.from_truth(truth, [3, 9]).inputs)
    assert kw == {"latents": [2, 5], "weight": 1.5, "hard": False}


def test_release():
    state = trained()
    planned(Anchor(anchors=Anchors.from_rows(torch.eye(10)[:3])), state).apply(state)
    before = everything(state)
    planned(Release(latents=[6]), state).apply(state)
    assert state.pins.latents.tolist() == [1, 13]
    planned(Release(), state).apply(state)
    assert state.pins is None
    after = everything(state)
    assert all(torch.equal(after[k], before[k]) for k in after), "rows and moments stay where they are"


# plans ---------------------------------------------------------------------------------------------------------------


def every_intervention(state):
    yield Resample()
    yield Resample(latents=[2, 5], target="residual", pick="worst", noise=0.3)
    yield Anchor(anchors=Anchors.from_rows(torch.eye(10)[:4]))
    yield Anchor(anchors=Anchors.from_rows(torch.eye(10)[:4]), hard=True)
    planned(Anchor(anchors=Anchors.from_rows(torch.eye(10)[5:6]), latents=[0]), state).apply(state)
    yield Release()


def test_planning_changes_nothing_and_the_preview_is_what_is_applied(device):
    state = trained(device)
    for intervention in every_intervention(state):
        mode = state.dictionary.training
        before = everything(state)
        plan = planned(intervention, state)
        assert same(everything(state), before) and state.dictionary.training == mode
        expected_pins = plan.pins
        plan.apply(state)
        if plan.W_enc is not None:
            for name in ("W_enc", "b_enc", "W_dec"):
                assert torch.equal(getattr(state.dictionary, name)[plan.latents], getattr(plan, name))
            x = choose().inputs.to(device)
            with torch.no_grad():
                error = (state.dictionary(x).reconstruction - x).square().sum(1).mean().item()
            assert plan.expected["error after"] == pytest.approx(error, rel=1e-5)
        pins = lambda p: None if p is None else (p.latents.tolist(), p.weight.tolist(), p.hard.tolist())
        assert pins(state.pins) == pins(expected_pins)
        assert plan.reading and plan.python.startswith("session.")


def test_the_preview_warns_of_duplicates():
    state = trained()
    rows = torch.cat([state.dictionary.W_dec[[9]].detach(), torch.eye(10)[:1]])
    plan = planned(Anchor(anchors=Anchors.from_rows(rows), latents=[1, 6]), state)
    assert plan.rows[0].nearest_latent == 9 and plan.rows[0].nearest_cosine == pytest.approx(1, abs=1e-5)
    assert plan.rows[1].nearest_latent not in (1, 6)


def test_dropped_latents_are_left_alone():
    state = trained()
    planned(Anchor(anchors=Anchors.from_rows(torch.eye(10)[:1]), latents=[6]), state).apply(state)
    state.samples_since_fired[6] = 5_000
    before = everything(state)
    plan = planned(Resample(), state).drop([6, 11])
    assert plan.latents.tolist() == [1, 13] and [r.latent for r in plan.rows] == [1, 13]
    assert "1 of them dropped" in plan.reading, "11 was never in it"
    assert plan.pins.latents.tolist() == [6]
    plan.apply(state)
    after = everything(state)
    assert torch.equal(after["W_dec"][6], before["W_dec"][6]) and torch.equal(after["W_dec/exp_avg"][6], before["W_dec/exp_avg"][6])
    assert state.pins.latents.tolist() == [6], "the pin of a latent that stays, stays"
    anchored = planned(Anchor(anchors=Anchors.from_rows(torch.eye(10)[3:6]), latents=[2, 3, 4]), state).drop([3])
    anchored.apply(state)
    assert state.pins.latents.tolist() == [6, 2, 4]
    close(state.pins.anchors.inputs, torch.eye(10)[[0, 3, 5]])


def test_pins_that_came_after_the_preview_stay():
    state = trained()
    plan = planned(Resample(), state)
    planned(Anchor(anchors=Anchors.from_rows(torch.eye(10)[:1]), latents=[3]), state).apply(state)
    plan.apply(state)
    assert state.pins.latents.tolist() == [3]


def test_a_sham_keeps_norms_and_randomises_directions(device):
    state = trained(device)
    plan = planned(Resample(), state)
    sham = plan.sham(stream("sham"))
    close(sham.W_enc.norm(dim=1), plan.W_enc.norm(dim=1))
    close(sham.W_dec.norm(dim=1), plan.W_dec.norm(dim=1))
    assert (sham.W_dec * plan.W_dec).sum(1).abs().max() < 0.95
    close(normalize(sham.W_enc, dim=1), sham.W_dec)  # one direction for both sides, as in the plan
    assert torch.equal(sham.latents, plan.latents) and torch.equal(sham.b_enc, plan.b_enc)


def test_a_sham_of_anchors_pulls_to_random_directions_and_moves_the_same_rows():
    state = trained()
    plan = planned(Anchor(anchors=Anchors.from_rows(torch.eye(10)[:2]), latents=[6, 3], weight=0.7), state)
    sham = plan.sham(stream("sham"))
    assert torch.equal(sham.W_dec[1], plan.W_dec[1]) and torch.equal(sham.W_enc[1], plan.W_enc[1]), "latent 3 is alive: it stays"
    close(sham.W_dec[0], sham.pins.anchors.targets[0])
    close(normalize(sham.W_enc[0], dim=0), sham.pins.anchors.inputs[0])
    close(sham.W_enc.norm(dim=1), plan.W_enc.norm(dim=1))
    assert (sham.pins.anchors.inputs * torch.eye(10)[:2]).sum(1).abs().max() < 0.95
    assert sham.pins.latents.tolist() == [6, 3] and sham.pins.weight.tolist() == pytest.approx([0.7, 0.7])
    assert torch.equal(plan.pins.anchors.inputs, torch.eye(10)[:2]), "the plan itself is as it was"


def test_a_reset_works_before_the_first_step():
    state = trained(steps=0)
    planned(Resample(), state).apply(state)
    assert not state.optimiser.state


def test_when_all_latents_are_dead_they_are_each_others_scale():
    state = trained()
    state.samples_since_fired[:] = 5_000
    norms = state.dictionary.W_enc.norm(dim=1).mean().item()
    assert planned(Resample(), state).rows[0].encoder_scale == pytest.approx(0.2 * norms)


# errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Resample, lambda latents: Anchor(anchors=Anchors.from_rows(torch.eye(10)[:2]), latents=latents)])
@pytest.mark.parametrize(
    ("latents", "message"),
    [
        ([3, 14], "latent 14 does not exist; there are 14"),
        ([-1, 3], "latent -1 does not exist"),
        ([3, 3], "named twice"),
        ([], "non-empty list"),
        ([0.0, 1.0], "non-empty list"),
        ([True, False], "non-empty list"),
        ("all", "non-empty list"),
        ([[1], [2, 3]], "non-empty list"),
    ],
)
def test_latents_that_are_none(kind, latents, message):
    with pytest.raises(ValueError, match=message):
        planned(kind(latents=latents), trained())


def test_wrong_anchors():
    state = trained()
    with pytest.raises(ValueError, match=r"widths \(4, 4\).*\(10, 10\)"):
        planned(Anchor(anchors=Anchors.from_rows(torch.eye(4))), state)
    with pytest.raises(ValueError, match="3 latents for 2 anchors"):
        planned(Anchor(anchors=Anchors.from_rows(torch.eye(10)[:2]), latents=[1, 2, 3]), state)
    with pytest.raises(ValueError, match="no anchors given"):
        planned(Anchor(), state)
    with pytest.raises(ValueError, match="15 anchors and only 14 latents"):
        planned(Anchor(anchors=Anchors.from_rows(torch.randn(15, 10))), state)


def test_nothing_is_dead():
    state = trained()
    state.samples_since_fired.zero_()
    with pytest.raises(ValueError, match="no latent has been silent for 1,000 samples"):
        planned(Resample(), state)


def test_nothing_is_left_to_explain():
    state = TrainState.start(SparseDictionary(torch.eye(3), torch.eye(3)))
    rows = Activations(*(torch.rand(5, 3),) * 2)
    with pytest.raises(ValueError, match="reconstructed exactly"):
        Resample(latents=[0]).plan(state, rows, stream(0))


def test_a_model_that_is_not_finite_is_not_planned_on():
    state = trained(method=TopK(k=2))
    with torch.no_grad():
        state.dictionary.W_dec[0] = torch.nan
    with pytest.raises(ValueError, match="not finite; revert"):
        planned(Resample(latents=[3]), state)


def test_release_of_a_latent_that_is_free():
    state = trained()
    with pytest.raises(ValueError, match="no latent is pinned"):
        planned(Release(), state)
    planned(Anchor(anchors=Anchors.from_rows(torch.eye(10)[:1]), latents=[3]), state).apply(state)
    with pytest.raises(ValueError, match="latent 2 is not pinned; pinned latents: "):
        planned(Release(latents=[2]), state)


@pytest.mark.parametrize("wrong", [{"pick": "best"}, {"target": "output"}, {"scale": 0}, {"noise": -1}])
def test_settings_have_bounds(wrong):
    with pytest.raises(ValueError):
        Resample(**wrong)
