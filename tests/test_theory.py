"""Theory cards: planted cases with exact answers, and no "holds" where an assumption fails."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations, Truth
from sdl_explorer.data.anchors import Anchors, Pins
from sdl_explorer.data.bench import LinearBench, linear_activations
from sdl_explorer.data.store import Stored
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.diagnosis.observe import observe
from sdl_explorer.diagnosis.theory import check_theory
from sdl_explorer.diagnosis.theory_seeds import Seeds, measure_spread, train_seeds
from sdl_explorer.models.dictionary import Nonlinearity, SparseDictionary
from sdl_explorer.models.methods.gated import GatedRectified
from sdl_explorer.models.methods.jumprelu import JumpRectified
from sdl_explorer.models.methods.topk import BatchTopKSelection, TopK, TopKSelection
from sdl_explorer.session import Session

VERDICTS = {"holds", "violated", "assumption not met", "not checkable"}
HALF = 0.5**0.5
TURN = torch.tensor([[HALF, HALF], [-HALF, HALF]])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def unit_rows(n, d, seed=0):
    return normalize(torch.randn(n, d, generator=seeded(seed)), dim=1)


def alone(features, weights=None):
    """One row a feature, at the strength that makes M_d what is asked for."""
    n = len(features)
    weights = torch.ones(n) if weights is None else torch.tensor(weights)
    return linear_activations(torch.diag((n * weights).sqrt()), features, features)


def sparse_rows(features, rate, n=20_000, seed=0):
    mask = torch.rand(n, len(features), generator=seeded(seed)) < rate
    return linear_activations(mask * (0.5 + torch.rand(n, len(features), generator=seeded(seed + 1))), features, features)


def noisy(activations, size):
    inputs = activations.inputs + size * torch.randn(activations.inputs.shape, generator=seeded(9))
    return Activations(inputs, inputs, activations.truth)


def cards(dictionary, activations, **settings):
    found = {card.id: card for card in check_theory(dictionary, activations, **settings)}
    assert list(found) == ["T1", "T2", "T3", "T4", "T5", "T6", "T7"]
    for card in found.values():
        assert card.verdict in VERDICTS and card.n_samples == activations.n
        assert card.verdict != "holds" or all(a.met for a in card.assumptions)
        assert (card.verdict == "assumption not met") == bool(card.failed)
    return found


def permuted(dictionary, order):
    sigma = dictionary.nonlinearity
    if isinstance(sigma, JumpRectified):
        sigma = JumpRectified(len(order))
        sigma.threshold.data.copy_(dictionary.nonlinearity.threshold[order])
    rows = (p.detach()[order] for p in (dictionary.W_enc, dictionary.W_dec, dictionary.b_enc))
    return SparseDictionary(*rows, dictionary.b_dec.detach(), sigma).eval()


def rescaled(dictionary, sizes):
    """Encoder rows times a, decoder rows over a."""
    sizes = torch.tensor(sizes)[:, None]
    return SparseDictionary(
        dictionary.W_enc.detach() * sizes, dictionary.W_dec.detach() / sizes, nonlinearity=dictionary.nonlinearity
    ).eval()


def jump(W_enc, thresholds, W_dec=None):
    sigma = JumpRectified(len(W_enc))
    sigma.threshold.data.copy_(torch.as_tensor(thresholds).expand(len(W_enc)))
    return SparseDictionary(W_enc, W_enc.clone() if W_dec is None else W_dec, nonlinearity=sigma).eval()


def antipodal(mixing):
    inverse = torch.linalg.inv(mixing.double()).float().T
    return SparseDictionary(torch.cat([mixing, -mixing]), torch.cat([inverse, -inverse])).eval()


class Lying(Nonlinearity):
    """Says that it masks, and bends."""

    homogeneous = True
    masks_only = True

    def __init__(self, power):
        super().__init__()
        self.power = power

    def forward(self, pre, *, inputs, dictionary):
        return pre.relu() ** self.power


# T1 -------------------------------------------------------------------------------------------------------------------


def test_the_papers_own_bench_does_not_meet_the_first_theorem():
    """n=1000, S=0.99: 1 - S = 0.01 exceeds 1/n = 0.001, and the bound is vacuous."""
    bench = LinearBench(n_features=1000, d_in=768, sparsity=0.99)
    weights = unit_rows(40, 768)
    found = cards(SparseDictionary(weights, weights).eval(), bench.sample(1000, seeded()), n_segments=1)["T1"]
    assert found.verdict == "assumption not met"
    assert [a.asks for a in found.failed] == ["1 - S <= 1/n"]
    assert found.right > 100 * found.numbers["C_N, a lower bound of C"]


@pytest.mark.parametrize("noise", [0.0, 1e-5])
def test_the_losses_agree_on_very_sparse_rows(noise):
    features = unit_rows(32, 24)
    rows = noisy(sparse_rows(features, 1e-3), noise)
    weights = unit_rows(40, 24, seed=1)
    dictionary = SparseDictionary(weights, weights).eval()
    card = cards(dictionary, rows)["T1"]
    assert card.verdict == "holds"
    errors = (rows.inputs - dictionary(rows.inputs).reconstruction.detach()).square().sum(dim=1).double()
    codes, active = rows.truth.codes.double(), (rows.truth.codes > 0).sum(dim=1)
    residual = (features - dictionary(features).reconstruction.detach()).square().sum(dim=1).double()
    own = [(codes[active == 1][:, d] > 0).sum() / len(codes) * codes[:, d][codes[:, d] > 0].square().mean() for d in range(32)]
    assert card.numbers["L"] == pytest.approx(errors.mean().item(), rel=1e-5)
    assert card.numbers["L~"] == pytest.approx(float(torch.stack(own) @ residual), rel=1e-5)
    assert card.numbers["share of L with 2 or more"] == pytest.approx(float(errors[active > 1].sum() / errors.sum()), rel=1e-4)
    rate = float((codes > 0).double().mean(dim=0).max())
    assert card.right == pytest.approx(32**2 * errors.max().item() * rate**2, rel=1e-5)
    assert card.left <= card.right and card.slack == card.right - card.left


def test_weights_of_features_never_seen_alone_come_from_the_rates():
    """P(only d) = p_d prod (1 - p_j): within Monte Carlo error of the count where that can be had."""
    features = unit_rows(40, 24)
    rows = sparse_rows(features, 0.1, n=3000)
    dictionary = SparseDictionary(features, features).eval()
    counted = cards(dictionary, sparse_rows(features, 0.1, n=60_000), n_segments=1)["T1"].numbers
    computed = cards(dictionary, rows, n_segments=1)["T1"].numbers
    assert "rates" in computed["L~ is"] and "counted" in counted["L~ is"]
    assert computed["L~"] == pytest.approx(counted["L~"], rel=0.15)


FEATURES = unit_rows(16, 12, seed=3)


def together(rows):
    codes = rows.truth.codes.clone()
    codes[:, 1] = codes[:, 0]
    return linear_activations(codes, FEATURES, FEATURES)


def below_zero(rows):
    codes = rows.truth.codes.clone()
    codes[0, 0] = -1
    return linear_activations(codes, FEATURES, FEATURES)


@pytest.mark.parametrize(
    ("damage", "asks"),
    [
        (together, "features are active independently"),
        (below_zero, "feature activations are >= 0"),
        (lambda rows: noisy(rows, 0.1), "rows are sums of features, x_p = W_p x and x_r = W_r x"),
        (lambda rows: sparse_rows(FEATURES, 0.2), "1 - S <= 1/n"),
    ],
)
def test_each_assumption_of_the_data_can_fail_alone(damage, asks):
    rows = sparse_rows(FEATURES, 2e-3)
    dictionary = SparseDictionary(FEATURES, FEATURES).eval()
    assert cards(dictionary, rows)["T1"].verdict == "holds"
    found = cards(dictionary, damage(rows))["T1"]
    assert found.verdict == "assumption not met"
    assert [a.asks for a in found.failed] == [asks] and asks in found.reason


def test_each_assumption_of_the_model_can_fail_alone():
    rows = sparse_rows(FEATURES, 2e-3)
    bias = SparseDictionary(FEATURES, FEATURES, b_dec=torch.full((12,), 1e-3)).eval()
    assert [a.asks for a in cards(bias, rows)["T1"].failed] == ["no biases"]
    found = cards(jump(FEATURES, 0.1), rows)["T1"]
    assert [a.asks for a in found.failed] == ["sigma(a z) = a sigma(z)"]
    assert "at most one active" in found.numbers["L~ is"]


# T2 -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [None, TopKSelection(3)])
@pytest.mark.parametrize("moved", [0.0, 0.05])
def test_convex_in_each_block(sigma, moved):
    rows = alone(FEATURES)
    weights = FEATURES + moved * torch.randn(16, 12, generator=seeded(2))
    card = cards(SparseDictionary(weights, 0.5 * weights, nonlinearity=sigma).eval(), rows, n_segments=20)["T2"]
    assert card.verdict == "holds" and card.left <= 1e-9
    assert card.numbers["largest drop below the chord in W_enc"] > 1e-3  # segments long enough to see a curve


def test_biases_leave_the_blocks_convex():
    """b_enc reads a constant and b_dec moves the targets: the residual stays affine in each block."""
    biases = 0.1 * torch.randn(28, generator=seeded(6))
    card = cards(SparseDictionary(FEATURES, 0.5 * FEATURES, biases[:16], biases[16:]).eval(), alone(FEATURES), n_segments=20)["T2"]
    assert card.verdict == "holds" and card.numbers["largest drop below the chord in W_enc"] > 1e-3


@pytest.mark.parametrize("order", [list(range(16)), list(range(16))[::-1]])
def test_a_sigma_that_bends_violates_convexity(order):
    dictionary = permuted(SparseDictionary(FEATURES, 0.5 * FEATURES, nonlinearity=Lying(0.3)).eval(), order)
    card = cards(dictionary, alone(FEATURES), n_segments=20)["T2"]
    assert card.verdict == "violated" and card.left > 1e-6 and "W_enc" in card.witness.text
    assert card.numbers["largest in W_dec"] <= 1e-9


def test_regions_that_are_not_fixed_by_the_weights():
    rows = alone(FEATURES)
    assert cards(SparseDictionary(FEATURES, FEATURES, nonlinearity=BatchTopKSelection(2)).eval(), rows)["T2"].verdict == "not checkable"
    assert cards(SparseDictionary(FEATURES, FEATURES, nonlinearity=torch.relu).eval(), rows)["T2"].verdict == "not checkable"
    assert cards(SparseDictionary(FEATURES, FEATURES, nonlinearity=GatedRectified(16)).eval(), rows)["T2"].verdict == "assumption not met"


# T3 -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [list(range(16)), [5, 3, 1, 0, 2, 4, *range(15, 5, -1)]])
def test_the_constructed_solution_has_the_loss_of_its_closed_form(order):
    """sum_d M_d |sum_{k != d, <w_k, w_d> > 0} <w_k, w_d> w_k|^2 for ReLU, whatever the dictionary is."""
    features, weights = FEATURES[order], torch.linspace(0.5, 2, 16)[order]
    card = cards(SparseDictionary(unit_rows(20, 12), unit_rows(20, 12)).eval(), alone(features, weights.tolist()))["T3"]
    gram = (features.double() @ features.double().T).fill_diagonal_(0)
    error = (gram.relu() @ features.double()).square().sum(dim=1)
    assert card.left == pytest.approx(float(weights.double() @ error), rel=1e-5)
    assert card.right == pytest.approx(16**2 * float(gram.max()) ** 2 * float(weights.sum()), rel=1e-5)
    assert card.verdict == "holds"
    i, j = card.witness.features[:2]
    assert gram[i, j] == gram.max()
    assert card.left <= card.numbers["M^2 sum M_d (K_d - 1)^2"] <= card.right


def test_the_constructed_solution_is_exact_under_competition_or_a_threshold():
    rows, weights = alone(FEATURES), unit_rows(16, 12)
    largest = float((FEATURES @ FEATURES.T).fill_diagonal_(-1).max())
    for dictionary in (SparseDictionary(weights, weights, nonlinearity=TopKSelection(1)).eval(), jump(weights, largest + 0.01)):
        card = cards(dictionary, rows)["T3"]
        assert card.verdict == "holds" and card.left == pytest.approx(0, abs=1e-12)


def test_the_construction_needs_room_and_its_own_latents():
    rows = alone(FEATURES)
    few = cards(SparseDictionary(FEATURES[:15], FEATURES[:15]).eval(), rows)["T3"]
    assert [a.asks for a in few.failed] == ["n_latents >= n_features"] and math.isnan(few.left)
    off = cards(jump(FEATURES, 1.2), rows)["T3"]
    assert off.verdict == "assumption not met" and "own feature" in off.reason
    assert off.left == pytest.approx(16, rel=1e-5)  # the loss of the zero model


def test_a_sigma_that_lifts_small_overlaps_breaks_the_bound():
    """Two features with overlap 0.05 under z = sqrt(pre): L~ = 2 * 0.05 exceeds n^2 M^2 sum M = 8 * 0.0025."""
    features = torch.tensor([[1.0, 0], [0.05, (1 - 0.05**2) ** 0.5]])
    card = cards(SparseDictionary(features, features, nonlinearity=Lying(0.5)).eval(), alone(features))["T3"]
    assert card.verdict == "violated"
    assert (card.left, card.right) == (pytest.approx(0.1, rel=1e-5), pytest.approx(0.02, rel=1e-5))


# T4 -------------------------------------------------------------------------------------------------------------------

CROSS = torch.cat([torch.eye(2), -torch.eye(2)])


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
@pytest.mark.parametrize("noise", [0.0, 1e-5])
def test_zero_loss_and_zero_recovery(order, noise):
    """Figure 4: [A; -A] reconstructs everything through a ReLU, and is no feature."""
    card = cards(permuted(antipodal(TURN), order), noisy(alone(CROSS), noise))["T4"]
    assert card.verdict == "holds" and card.left < 1e-4 and card.right < 1e-6
    assert card.numbers["M_GT decoder"] == card.numbers["M_GT encoder"] == 0
    assert card.numbers["M_IP decoder"] == pytest.approx(HALF) and card.numbers["M_IP encoder"] == pytest.approx(HALF)
    assert "every feature is reconstructed and the loss is zero; 0% of the features" in card.reason


def test_zero_loss_with_recovery():
    card = cards(SparseDictionary(CROSS, CROSS).eval(), alone(CROSS))["T4"]
    assert card.verdict == "holds" and card.right == 0 and card.numbers["M_GT decoder"] == 1


def test_competition_breaks_the_antipodal_solution():
    """Top-1 in place of ReLU: L~ = 2 with M_d = 1."""
    broken = antipodal(TURN)
    broken.nonlinearity = TopKSelection(1)
    card = cards(broken.eval(), alone(CROSS))["T4"]
    assert card.verdict == "holds" and card.numbers["L~"] == pytest.approx(2, rel=1e-5)
    assert card.left == pytest.approx(HALF, rel=1e-5) == card.right and "is not reconstructed" in card.reason


def test_one_feature_of_many_not_reconstructed():
    features = torch.eye(8)
    card = cards(SparseDictionary(features[:7], features[:7]).eval(), alone(features, [1.0] * 7 + [0.01]))["T4"]
    assert card.verdict == "holds" and card.witness.features == (7,)
    assert card.right == pytest.approx(1) and card.left == pytest.approx((0.01 / 7.01) ** 0.5, rel=1e-5)
    assert card.numbers["features not reconstructed"] == 1


def test_a_sigma_that_is_not_homogeneous_breaks_the_equivalence():
    """Right at unit strength, wrong at the strengths of the rows."""
    card = cards(SparseDictionary(torch.eye(4), torch.eye(4), nonlinearity=Lying(2.0)).eval(), alone(torch.eye(4)))["T4"]
    assert card.verdict == "violated" and card.right == 0 and card.left == pytest.approx(1)  # at strength 2: |2 - 4| / 2


def test_a_feature_that_never_occurs():
    rows = sparse_rows(torch.eye(4), torch.tensor([0.1, 0.1, 0.1, 0.0]))
    found = cards(SparseDictionary(torch.eye(4), torch.eye(4)).eval(), rows)["T4"]
    assert [a.asks for a in found.failed] == ["every feature occurs alone, M_d > 0"]


# T5 -------------------------------------------------------------------------------------------------------------------

TRAP = SparseDictionary(torch.tensor([[1.0, 1], [0, 0]]), torch.tensor([[0.5, 0.5], [0, 0]]), nonlinearity=TopKSelection(1)).eval()


@pytest.mark.parametrize("dictionary", [TRAP, permuted(TRAP, [1, 0]), rescaled(TRAP, [3.0, 1.0])])
@pytest.mark.parametrize("noise", [0.0, 1e-5])
def test_the_two_neuron_trap(dictionary, noise):
    """Example 3.5: loss 1, both gradients zero, and jointly as well nothing lower nearby: one latent is rank one."""
    card = cards(dictionary, noisy(alone(torch.eye(2)), noise))["T5"]
    assert card.verdict == "holds" and card.numbers["L~"] == pytest.approx(1, rel=1e-6)
    assert card.numbers["the partial minimum is"] == "this model"
    assert card.numbers["gradient of W_dec here"] < 1e-6 and card.numbers["gradient of W_enc here"] < 1e-6
    assert card.numbers["joint second-order test here"] == "passed"
    assert card.numbers["margin here"] == pytest.approx(HALF)


def pair(overlap):
    return torch.tensor([[1.0, 0], [overlap, (1 - overlap**2) ** 0.5]])


def merged(overlap, ratio=(1.0, 1.0)):
    """One latent for two features: <row, w_d> as asked, the decoder its least squares."""
    features = pair(overlap)
    row = torch.linalg.solve(features, torch.tensor(ratio))
    z = features @ row
    return SparseDictionary(torch.stack([row, torch.zeros(2)]), torch.stack([z @ features / z.square().sum(), torch.zeros(2)]),
                            nonlinearity=TopKSelection(1)).eval()  # fmt: skip


@pytest.mark.parametrize(("overlap", "test"), [(0.3, "passed"), (-0.3, "saddle")])
@pytest.mark.parametrize("flip", [False, True])
def test_partial_is_not_local(overlap, test, flip):
    """Both blocks are optimal for either sign. At a negative overlap the pair lies on the lower eigenvector, a saddle."""
    dictionary = permuted(merged(overlap), [1, 0]) if flip else merged(overlap)
    card = cards(dictionary, alone(pair(overlap)))["T5"]
    assert card.verdict == "holds" and card.numbers["the partial minimum is"] == "this model"
    assert card.left < 1e-6 and card.numbers["L~"] == pytest.approx(1 - overlap, rel=1e-5)
    assert card.numbers["joint second-order test here"] == test
    lower = min(_descended(dictionary, alone(pair(overlap)), seed) for seed in range(5))
    assert (lower < 1 - overlap - 0.1) == (test == "saddle")  # plain descent from a small kick agrees


def _descended(dictionary, rows, seed):
    """L~ after gradient descent from a kick of 0.02 on the weights of latent 0 or 1, whichever is on, inside its region."""
    i = int(dictionary.W_enc.norm(dim=1).argmax())
    features = rows.truth.input_features
    e, w = (t.detach()[i].clone() + 0.02 * torch.randn(2, generator=seeded(seed)) for t in (dictionary.W_enc, dictionary.W_dec))
    for t in (e, w):
        t.requires_grad_()
    optimiser = torch.optim.SGD([e, w], lr=0.05)
    for _ in range(300):
        optimiser.zero_grad()
        loss = (features - torch.outer(features @ e, w)).square().sum()
        if (features @ e).min() <= 0:
            break
        loss.backward()
        optimiser.step()
    return loss.item()


@pytest.mark.parametrize(("weights", "loss"), [((1.0, 1.0), 0.700), ((1.0, 3.0), 0.873)])
def test_the_construction_of_a_partial_minimum(weights, loss):
    """Inner product 0.3: least squares of an arbitrary encoder are not stationary, and a partial minimum exists elsewhere."""
    arbitrary = merged(0.3, ratio=(1.0, 2.0))
    card = cards(arbitrary, alone(pair(0.3), weights))["T5"]
    assert card.verdict == "holds" and card.numbers["the partial minimum is"] == "the construction"
    assert card.numbers["gradient of W_enc here"] > 0.01
    assert card.left < 1e-9 and card.numbers["L~"] == pytest.approx(loss, abs=1e-3)
    assert card.numbers["joint second-order test of the construction"] == "passed"


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_pattern_without_a_partial_minimum(order):
    """Orthonormal features with M = (1, 3) in one latent: no positive eigenvector, so the statement as printed fails."""
    dictionary = permuted(SparseDictionary(torch.tensor([[1.0, 1], [-1, -1]]), torch.tensor([[0.5, 0.5], [0, 0]])).eval(), order)
    card = cards(dictionary, alone(torch.eye(2), [1.0, 3.0]))["T5"]
    assert card.verdict == "violated" and card.witness.latents == (order.index(0),) and card.witness.features == (0, 1)
    assert cards(dictionary, alone(torch.eye(2)))["T5"].verdict == "holds"  # equal weights: Example 3.5


def test_what_the_spurious_minimum_assumes():
    rows = alone(torch.eye(2))
    asks = lambda dictionary, rows: [a.asks for a in cards(dictionary, rows)["T5"].failed]
    both = torch.tensor([[1.0, 1], [1, 1]])
    assert asks(SparseDictionary(both, both / 4).eval(), rows) == ["the pattern is a partition of the features"]
    assert asks(SparseDictionary(torch.eye(2), torch.eye(2)).eval(), rows) == ["the pattern is polysemantic"]
    assert "n_latents >= n_features" in asks(SparseDictionary(both[:1], both[:1]).eval(), rows)[0]
    biased = SparseDictionary(both, both / 4, b_enc=torch.tensor([0.0, -3]), b_dec=torch.tensor([0.1, 0])).eval()
    assert asks(biased, rows) == ["no biases"]
    twins = torch.tensor([[1.0, 0], [1, 0]])
    assert "no two target features are parallel" in asks(
        SparseDictionary(both, both / 4, nonlinearity=TopKSelection(1)).eval(), alone(twins)
    )


# T6 -------------------------------------------------------------------------------------------------------------------


def angles(*degrees):
    turned = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([turned.cos(), turned.sin()], dim=1)


BREEDS = angles(30.0, 55, 80, 120, 190, 255, 320)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 3, 1, 0]])
@pytest.mark.parametrize("turned", [0.0, 0.3])
def test_a_parent_can_lose_a_breed(order, turned):
    """Four breeds of a dog under one row; the weakest, at 120 degrees, can go."""
    rows = angles(65.0 + turned, 190, 255, 320)[order]
    card = cards(jump(rows, 0.5), alone(BREEDS))["T6"]
    assert card.verdict == "holds" and (card.left, card.right) == (1, 1)
    assert card.witness.features == (3,) and card.witness.latents == (order.index(0),)
    assert card.numbers["linear programmes"] == card.numbers["realisable by programme"] == 1
    assert card.numbers["least margin"] > 0.01


def test_tied_children_are_left_to_the_programme():
    card = cards(jump(torch.ones(1, 2), 0.5), alone(torch.eye(2)))["T6"]
    assert card.verdict == "holds" and card.witness.features[0] in (0, 1)


def test_a_bias_is_a_threshold():
    dictionary = SparseDictionary(angles(65.0), angles(65.0), b_enc=torch.tensor([-0.5])).eval()
    assert cards(dictionary, alone(BREEDS))["T6"].verdict == "holds"


def test_absorption_needs_a_threshold_parents_and_no_competition():
    rows = alone(BREEDS)
    plain = cards(SparseDictionary(angles(65.0), angles(65.0)).eval(), rows)["T6"]
    assert [a.asks for a in plain.failed] == ["thresholds of the parents are above zero"]
    top = cards(SparseDictionary(angles(65.0), angles(65.0), nonlinearity=TopKSelection(1)).eval(), rows)["T6"]
    assert "latents compete" in top.reason
    single = cards(jump(BREEDS, 0.99), rows)["T6"]
    assert "a parent has two children or more" in [a.asks for a in single.failed]
    twins = torch.cat([BREEDS, BREEDS[:1]])
    assert "M < 1" in [a.asks for a in cards(jump(angles(65.0), 0.5), alone(twins))["T6"].failed]


# T7 -------------------------------------------------------------------------------------------------------------------


def runs_of(anchored, free, n=5, d=2):
    """Planted seeds: the same rows in another order, turned by such an angle now one way and now the other, with anchors and without."""
    plain = torch.cat([torch.eye(d), -torch.eye(d)])

    def runs(angle):
        for r in range(n):
            rows = plain[torch.randperm(2 * d, generator=seeded(r))]
            rows[:, :2] = rows[:, :2] @ turn(angle * (-1) ** r)
            yield SparseDictionary(rows, rows).eval()

    return Seeds(tuple(runs(anchored)), tuple(runs(free)), Anchors.from_rows(torch.eye(d)[:1]), 0)


def turn(angle):
    return torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])


def pinned(dictionary, latents):
    anchors = Anchors.from_rows(dictionary.W_dec.detach()[latents])
    return Pins(anchors, torch.tensor(latents), torch.ones(len(latents)), torch.zeros(len(latents), dtype=torch.bool))


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
@pytest.mark.parametrize("moved", [0.0, 1e-4])
def test_an_anchor_fixes_the_antipodal_decoder(order, moved):
    """Z of Figure 4 is a ring of four features, of rank 3: one row is free, two numbers, and any one anchor takes them."""
    dictionary = permuted(antipodal(TURN), order)
    pins = pinned(dictionary, [2])
    dictionary.W_dec.data.add_(moved * torch.randn(4, 2, generator=seeded(1)))
    card = cards(dictionary, alone(CROSS), pins=pins, seeds=runs_of(0.1, 0.3))["T7"]
    assert card.verdict == "holds" and (card.left, card.right) == (0, 2)
    both = cards(dictionary, alone(CROSS), pins=pinned(dictionary, [0, 1]))["T7"]
    assert both.verdict == "not checkable" and "n = 0; of 2 free numbers of the decoder 0 remain" in both.reason
    assert (both.left, both.right) == (0, 2) and both.numbers["numbers that the anchors fix"] == 4


def test_anchors_and_latents_that_never_fire():
    """Ten latents, six of them silent on every feature: 24 numbers are free, and an anchor takes four where it holds a silent one."""
    rows = torch.cat([torch.eye(4), -torch.eye(4), -torch.eye(4)[:2]])
    dictionary = SparseDictionary(rows, rows).eval()
    some = runs_of(0.1, 0.3, d=4)
    free = lambda latents: cards(dictionary, alone(torch.eye(4)), pins=pinned(dictionary, latents), seeds=some)["T7"]
    assert (free([5]).left, free([5]).right, free([5]).verdict) == (20, 24, "holds")
    assert (free([0]).left, free([0]).right, free([0]).verdict) == (24, 24, "violated")  # its feature had fixed it
    assert free([0, 5, 9]).left == 16


@pytest.mark.parametrize(("anchored", "free", "verdict"), [(0.1, 0.3, "holds"), (0.3, 0.1, "violated"), (0.3, 0.3, "not checkable")])
def test_the_spread_over_seeds_decides(anchored, free, verdict):
    dictionary = antipodal(TURN)
    card = cards(dictionary, alone(CROSS), pins=pinned(dictionary, [2]), seeds=runs_of(anchored, free))["T7"]
    assert card.verdict == verdict and card.left < card.right
    assert card.numbers["difference"] == pytest.approx(card.numbers["spread with anchors"] - card.numbers["spread without anchors"])
    assert card.numbers["seeds"] == 5 and card.numbers["features that no anchor is about"] == 3


def test_four_seeds_are_too_few():
    dictionary = antipodal(TURN)
    card = cards(dictionary, alone(CROSS), pins=pinned(dictionary, [2]), seeds=runs_of(0.1, 0.3, n=4))["T7"]
    assert card.verdict == "not checkable" and "at least 5 seeds, with anchors and without: n = 4" in card.reason
    none = cards(dictionary, alone(CROSS), pins=pinned(dictionary, [2]), seeds=runs_of(0.1, 0.3, n=1))["T7"]
    assert none.verdict == "not checkable" and math.isnan(none.numbers["difference"])


def test_the_spread_is_the_mean_distance_of_pairs():
    """Rows turned by known angles: 1 - cos of each difference; the order of latents and their lengths do not matter."""
    angles = torch.tensor([0.0, 0.1, 0.3])
    rows = [torch.tensor([[0.0, 2.0], [float(a.cos()), float(a.sin())]]) for a in angles]
    turned = tuple(SparseDictionary(r, r).eval() for r in rows)
    same = tuple(SparseDictionary(rows[0][[1, 0]] * 3, rows[0][[1, 0]] * 3).eval() for _ in rows)
    spread = measure_spread(Seeds(same, turned, Anchors.from_rows(torch.eye(2)[1:]), 0), torch.eye(2))
    own = [1 - math.cos(a) for a in (0.1, 0.3, 0.2)]
    assert spread.n_features == 1 and spread.anchored == pytest.approx(0, abs=1e-7)
    assert spread.free == pytest.approx(sum(own) / 3, abs=1e-6) and spread.difference == pytest.approx(-sum(own) / 3, abs=1e-6)
    left_out = [-own[2], -own[1], -own[0]]  # without the first seed the second and third remain, and so on
    mean = sum(left_out) / 3
    error = (2 / 3 * sum((x - mean) ** 2 for x in left_out)) ** 0.5 * 4.302653
    assert (spread.low, spread.high) == pytest.approx((spread.difference - error, spread.difference + error), rel=1e-4)


def test_pairs_of_runs_have_the_settings_of_the_session(monkeypatch):
    """Those without anchors are what a session of another seed trains."""
    monkeypatch.setattr("sdl_explorer.session.CHOOSE_ROWS", 200)
    monkeypatch.setattr("sdl_explorer.training.run.CHOOSE_ROWS", 200)
    source = Stored(3 + 5 * LinearBench(n_features=6, d_in=5, sparsity=0.8).sample(400, seeded()).inputs)
    settings = {"batch_size": 16, "lr": 2e-2, "decay": "cosine", "decay_steps": 4, "clip_norm": 0.5, "warmup_steps": 2, "normalise": True}
    settings |= {"ramps": {"k": [4, 3]}, "centre": "median", "dead_after": 50}
    with Session(source, TopK(k=2), 7, **settings) as session, Session(source, TopK(k=2), 7, seed=1, **settings) as other:
        anchors = Anchors.from_rows(torch.eye(5)[:2])
        session.anchor(anchors, latents=[0, 1], weight=1.0)
        seeds = session.train_seeds(3, runs=1)
        other._order = 1
        expected = other.train(3).dictionary
    (free,), (anchored,) = seeds.free, seeds.anchored
    for name, tensor in expected.state_dict().items():
        assert torch.equal(free.state_dict()[name], tensor), name
    assert free.input_scale == anchored.input_scale == expected.input_scale != 1
    assert torch.nn.functional.cosine_similarity(anchored.W_enc[:2], torch.eye(5)[:2]).min() > 0.9


def test_pairs_of_runs_share_their_start_and_differ_by_the_anchors():
    bench = LinearBench(n_features=6, d_in=5, sparsity=0.8)
    rows = bench.sample(20, seeded())
    settings = {"n_steps": 4, "runs": 2, "batch_size": 16, "weight": 1.0}
    seeds = train_seeds(bench, TopK(k=2), 7, Anchors.from_truth(rows, [1, 3]), **settings)
    again = train_seeds(bench, TopK(k=2), 7, Anchors.from_truth(rows, [1, 3]), **settings)
    for one, other in zip((*seeds.anchored, *seeds.free), (*again.anchored, *again.free), strict=True):
        assert torch.equal(one.W_dec, other.W_dec)
    reached = torch.nn.functional.cosine_similarity(seeds.anchored[0].W_dec[:2], rows.truth.target_features[[1, 3]])
    assert reached.min() > 0.99 and not torch.equal(seeds.free[0].W_dec, seeds.free[1].W_dec)
    with pytest.raises(ValueError, match="give at least one anchor"):
        train_seeds(bench, TopK(k=2), 1, Anchors.from_truth(rows, [1, 3]), n_steps=1)
    with pytest.raises(ValueError, match="both are at least 1"):
        train_seeds(bench, TopK(k=2), 7, Anchors.from_truth(rows, [1]), n_steps=0)
    with pytest.raises(ValueError, match="give them in pairs"):
        Seeds(seeds.anchored, (), seeds.anchors, 4)


def test_a_pin_that_is_not_reached_is_no_constraint():
    dictionary = SparseDictionary(CROSS, CROSS).eval()
    pins = pinned(dictionary, [1])
    dictionary.W_dec.data[1] = torch.tensor([1.0, 1])
    assert cards(dictionary, alone(CROSS), pins=pins)["T7"].verdict == "assumption not met"
    assert cards(dictionary, alone(CROSS))["T7"].verdict == "not checkable"
    few = SparseDictionary(CROSS[:1], CROSS[:1]).eval()
    with pytest.raises(ValueError, match="latent 1 is pinned"):
        check_theory(few, alone(CROSS), pins=pins)


# all ------------------------------------------------------------------------------------------------------------------


def test_without_truth_nothing_is_checkable():
    inputs = torch.randn(50, 4, generator=seeded())
    found = cards(SparseDictionary(torch.eye(4), torch.eye(4)).eval(), Activations(inputs, inputs))
    for card in found.values():
        assert card.verdict == "not checkable" and "truth=None" in card.reason
        assert card.statement and "2512.05534" in card.source


def same(one, other, rel=1e-5):
    for a, b in zip(one.values(), other.values(), strict=True):
        assert a.verdict == b.verdict
        assert [x.met for x in a.assumptions] == [x.met for x in b.assumptions]
        if a.id != "T2":  # random segments
            assert (a.left, a.right) == pytest.approx((b.left, b.right), rel=rel, abs=1e-9, nan_ok=True)


def test_permuting_latents_rescaling_and_blocks_change_no_card():
    rows = sparse_rows(FEATURES, 1e-2, n=300)
    weights = unit_rows(20, 12)
    dictionary = SparseDictionary(weights, 0.5 * weights).eval()
    found = cards(dictionary, rows)
    same(found, cards(permuted(dictionary, torch.randperm(20, generator=seeded(4)).tolist()), rows))
    same(found, cards(rescaled(dictionary, [0.5, 2.0] * 10), rows))
    for block in (1, 7, 500):
        several = observe(dictionary, rows, [check_health, check_theory], block=block)[1]
        same(found, {card.id: card for card in several})


def test_permuting_features_changes_no_card():
    order = torch.randperm(16, generator=seeded(5))
    rows = sparse_rows(FEATURES, 2e-3, n=3000)
    weights = unit_rows(20, 12)
    dictionary = SparseDictionary(weights, 0.5 * weights).eval()
    moved = Truth(rows.truth.codes[:, order], FEATURES[order], FEATURES[order])
    same(cards(dictionary, rows), cards(dictionary, Activations(rows.inputs, rows.inputs, moved)))


def test_scales_of_a_dictionary_are_folded():
    rows = sparse_rows(FEATURES, 2e-3, n=3000)
    weights = unit_rows(20, 12)
    plain = SparseDictionary(weights, 0.5 * weights).eval()
    scaled = SparseDictionary(weights / 4, 1.5 * weights, input_scale=4.0, target_scale=3.0).eval()
    same(cards(plain, rows), cards(scaled, rows))


def test_a_dictionary_that_never_fires_has_numbers():
    dictionary = SparseDictionary(torch.zeros(4, 4), torch.eye(4)).eval()
    found = cards(dictionary, alone(torch.eye(4)))
    assert found["T4"].right == pytest.approx(1) and found["T4"].left == pytest.approx(1)
    assert found["T1"].numbers["L~"] == pytest.approx(4) and found["T2"].verdict == "assumption not met"


@pytest.mark.parametrize(("settings", "words"), [({"tolerance": 0.0}, "between 0 and 1"), ({"n_segments": 0}, "one segment")])
def test_settings_out_of_range(settings, words):
    with pytest.raises(ValueError, match=words):
        check_theory(TRAP, alone(torch.eye(2)), **settings)
