"""Planted parents and children: absorbed, partly absorbed, split, hedged, merged, lost, and not to be judged, with exact numbers."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from sdl_explorer.data.activations import Activations, Block
from sdl_explorer.data.bench import linear_activations
from sdl_explorer.data.hierarchy import HierarchyBench
from sdl_explorer.data.sources import stream
from sdl_explorer.diagnosis.absorption import find_absorption
from sdl_explorer.diagnosis.alignment import align
from sdl_explorer.diagnosis.families import saebench
from sdl_explorer.diagnosis.observe import observe
from sdl_explorer.diagnosis.proportions import newcombe, wilson
from sdl_explorer.models.dictionary import Latents, SparseDictionary

N = 240
PARENTS = (None, 0, 0, 0, None)  # one parent, three exclusive children, and a feature of its own


def rotation(d: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)))[0]


def family_codes(alone: bool = True) -> torch.Tensor:
    """Rows in turn: parent alone, parent with child 1, 2, 3; feature 4 on every third row; every sixth row has no family."""
    codes = torch.zeros(N, 5)
    for r in range(N):
        child = r % 4 if alone else 1 + r % 3
        if r % 6 != 5:
            codes[r, 0] = 1.0
            codes[r, child] = 1.0
        codes[r, 4] = float(r % 3 == 0)
    return codes


def planted(codes: torch.Tensor, parents=PARENTS, kind: str = "sae", d: int = 8) -> Activations:
    inputs = rotation(d)[: codes.shape[1]]
    if kind == "sae":
        return linear_activations(codes, inputs, inputs, parents=parents)
    if kind == "transcoder":
        return linear_activations(codes, inputs, rotation(d + 1, seed=1)[: codes.shape[1]], parents=parents)
    both = torch.cat([inputs, rotation(d, seed=1)[: codes.shape[1]]], dim=1) / math.sqrt(2)
    halves = tuple(Block(name, slice(i * d, (i + 1) * d), slice(i * d, (i + 1) * d)) for i, name in enumerate("ab"))
    return linear_activations(codes, both, both, parents=parents, blocks=halves)


class Rows(NamedTuple):
    """Encoder and decoder rows in units of the features, (n_latents, n_features), and biases."""

    enc: torch.Tensor
    dec: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def clean(cls, n: int = 5, spare: int = 0):
        return cls(*(torch.cat([torch.eye(n), torch.zeros(spare, n)]) for _ in range(2)), torch.zeros(n + spare))

    def on(self, data: Activations, order=None, noise: float = 0.0) -> SparseDictionary:
        W_enc, W_dec = self.enc @ data.truth.input_features, self.dec @ data.truth.target_features
        g = torch.Generator().manual_seed(3)
        W_enc, W_dec = (W + noise * torch.randn(W.shape, generator=g) for W in (W_enc, W_dec))
        order = torch.arange(len(W_enc)) if order is None else order
        return SparseDictionary(W_enc[order], W_dec[order], self.bias[order])


def absorbing(children, delta: float = 1.0, n: int = 5) -> Rows:
    """enc_parent = parent - delta * children, dec_child = child + delta * parent (Chanin et al. 2024, appendix A.2)."""
    rows = Rows.clean(n)
    for child in children:
        rows.enc[0, child] = -delta
        rows.dec[child, 0] = delta
    return rows


def hedging(p10: float = 0.2, p11: float = 0.05) -> Rows:
    """The best tied unit latent of two features: tan 2a = 2 p11 / p10 (Chanin et al. 2025)."""
    angle = 0.5 * math.atan2(2 * p11, p10)
    rows = Rows.clean()
    rows.enc[0, 0] = rows.dec[0, 0] = math.cos(angle)
    rows.enc[0, 1] = rows.dec[0, 1] = math.sin(angle)
    rows.enc[1] = rows.dec[1] = 0
    return rows


def merged() -> Rows:
    rows = Rows.clean()
    rows.enc[0, :2], rows.dec[0, :2] = 0.5, 1.0
    rows.enc[1] = rows.dec[1] = 0
    return rows


def duplicated() -> Rows:
    rows = Rows.clean(spare=1)
    rows.enc[5], rows.dec[5] = rows.enc[0], rows.dec[0] / 2
    rows.dec[0] /= 2
    return rows


def split() -> Rows:
    """Latent 0 writes the parent without child 1, latent 5 with it; latent 1 is the child's own."""
    rows = Rows.clean(spare=1)
    rows.enc[0, 1] = -1
    rows.enc[5, 0] = rows.enc[5, 1] = rows.dec[5, 0] = 1
    rows.bias[5] = -1
    return rows


def lost() -> Rows:
    rows = Rows.clean()
    rows.enc[0, 1] = -1
    return rows


def composite() -> Rows:
    """Parent and child alone have latents of their own; both together are latent 5."""
    rows = Rows.clean(spare=1)
    rows.enc[0, 1] = rows.enc[1, 0] = -1
    rows.enc[5, :2] = rows.dec[5, :2] = 1
    rows.bias[5] = -1
    return rows


def chain() -> Rows:
    """0 > 1 > 2: latent 1 writes 0 and 1, latent 2 writes all three."""
    rows = Rows.clean(4)
    rows.enc[0, 1] = rows.enc[1, 2] = -1
    rows.dec[1, 0] = rows.dec[2, 0] = rows.dec[2, 1] = 1
    return rows


def chain_codes() -> torch.Tensor:
    codes = torch.zeros(N, 4)
    for r in range(N):
        codes[r, : r % 4] = 1.0
        codes[r, 3] = r % 2
    return codes


def homeless() -> Rows:
    """No latent of the parent, and each child's latent writes it too."""
    rows = absorbing((1, 2, 3))
    rows.enc[0] = rows.dec[0] = 0
    return rows


FAMILY, NEVER_ALONE, CHAIN = (family_codes(), PARENTS), (family_codes(alone=False), PARENTS), (chain_codes(), (None, 0, 1, None))
CASES = {
    "clean": (Rows.clean(), FAMILY, ["none"] * 3),
    "absorbed by one": (absorbing((1,)), FAMILY, ["absorbed", "none", "none"]),
    "absorbed by two": (absorbing((1, 3)), FAMILY, ["absorbed", "none", "absorbed"]),
    "absorbed by all": (absorbing((1, 2, 3)), FAMILY, ["absorbed"] * 3),
    "partly": (absorbing((2,), 0.5), FAMILY, ["none", "partly absorbed", "none"]),
    "composite": (composite(), FAMILY, ["absorbed", "none", "none"]),
    "never alone": (absorbing((1, 2, 3)), NEVER_ALONE, ["absorbed"] * 3),
    "never alone, clean": (Rows.clean(), NEVER_ALONE, ["none"] * 3),
    "chain": (chain(), CHAIN, ["absorbed"] * 2),
    "hedged": (hedging(), FAMILY, ["hedged", "none", "none"]),
    "merged": (merged(), FAMILY, ["merged", "none", "none"]),
    "duplicated": (duplicated(), FAMILY, ["none"] * 3),
    "split": (split(), FAMILY, ["split", "none", "none"]),
    "lost": (lost(), FAMILY, ["lost", "none", "none"]),
    "homeless": (homeless(), FAMILY, ["not eligible"] * 3),
}


def numbers(value):
    """Every number in nested tuples and dataclasses."""
    if isinstance(value, (int, float, np.number)):
        yield float(value)
    elif isinstance(value, tuple):
        for part in value:
            yield from numbers(part)


def kinds(found) -> list[str]:
    return [edge.kind for edge in found.edges]


@pytest.mark.parametrize("kind", ["sae", "transcoder", "crosscoder"])
@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("case", CASES)
def test_kinds_whatever_the_order_of_latents_and_a_little_noise(case, noise, kind):
    rows, (codes, parents), expected = CASES[case]
    data = planted(codes, parents, kind)
    order = torch.randperm(len(rows.enc), generator=torch.Generator().manual_seed(5))
    found = find_absorption(rows.on(data, noise=noise), data)
    shuffled = find_absorption(rows.on(data, order, noise=noise), data)
    assert kinds(found) == kinds(shuffled) == expected
    assert [(e.parent, e.child) for e in found.edges] == [(p, c) for c, p in enumerate(parents) if p is not None]
    place = {int(latent): new for new, latent in enumerate(order)} | {-1: -1}
    for edge, other in zip(found.edges, shuffled.edges, strict=True):
        if case == "duplicated" and noise == 0:  # the two are one
            assert {place[i] for i in edge.evidence.latents} == set(other.evidence.latents)
        else:
            assert (place[edge.latent], place[edge.absorber]) == (other.latent, other.absorber)
        assert other.gap == edge.gap
    assert all(math.isfinite(x) for x in numbers(found.edges))


def test_full_absorption_has_exact_numbers():
    data = planted(family_codes())
    found = find_absorption(absorbing((1, 3)).on(data), data)
    active = data.truth.codes > 0
    with_child = int((active[:, 0] & active[:, 1]).sum())
    edge, seen = found.edges[0], found.edges[0].evidence
    assert (edge.latent, edge.absorber, edge.n_with, seen.hits_with, edge.recall_with) == (0, 1, with_child, 0, 0.0)
    assert edge.n_without == int((active[:, 0] & ~active[:, 1]).sum())
    assert edge.recall_without == pytest.approx(1 - int(active[:, 3].sum()) / edge.n_without)  # child 3 took its rows as well
    assert edge.gap == edge.recall_without - edge.recall_with
    assert (seen.contrast.recall_on, seen.contrast.recall_off, seen.contrast.own_on, seen.contrast.full, seen.contrast.fraction) == (
        0,
        1,
        pytest.approx(0, abs=1e-6),
        1,
        1,
    )
    absorber = seen.absorbers[0]
    assert absorber.parent_part == pytest.approx(math.sqrt(0.5)) and absorber.child_part == pytest.approx(math.sqrt(0.5))
    assert absorber.residual == pytest.approx(0, abs=1e-6)
    assert (absorber.takes, absorber.left) == (pytest.approx(1, abs=1e-6), pytest.approx(0, abs=1e-6))  # ablated, the parent is gone
    assert found.edges[1].gap < 0  # with child 2 the parent fires; without it, children 1 and 3 silence it
    assert (found.eligible_fraction, found.max_gap) == (1.0, edge.gap)
    assert found.mean_gap == pytest.approx(np.mean([e.gap for e in found.edges]))
    assert found.kinds["absorbed"] == 2 and "2 absorbed, 1 none" in repr(found)
    assert found.of(child=3) == (found.edges[2],) and found.of(parent=0) == found.edges


@pytest.mark.parametrize("delta", [0.0, 0.3, 0.4, 0.5, 0.8, 1.0])
def test_the_closed_form_of_partial_absorption(delta):
    data = planted(family_codes())
    edge = find_absorption(absorbing((1,), delta).on(data), data).edges[0]
    seen = edge.evidence
    cosine = 1 / math.sqrt(1 + delta**2)
    assert seen.contrast.own_on == pytest.approx(1 - delta, abs=1e-6) and seen.contrast.own_off == pytest.approx(1)
    assert seen.share == pytest.approx(delta, abs=1e-6)
    assert seen.contrast.fraction == pytest.approx(delta if delta >= 0.4 else 0, abs=1e-6)
    assert seen.contrast.full == float(delta == 1)
    assert seen.leak == pytest.approx(delta * cosine, abs=1e-6) and seen.hole == pytest.approx(-delta * cosine, abs=1e-6)
    assert seen.encoder_child == pytest.approx(-delta, abs=1e-6) and seen.decoder_child == pytest.approx(0, abs=1e-6)
    assert edge.kind == ("none" if delta == 0 else "absorbed" if delta == 1 else "partly absorbed")
    assert seen.contrast.written_on == pytest.approx(1)
    if delta:
        assert seen.absorbers[0].left == pytest.approx(1 - delta, abs=1e-6)
        assert seen.absorbers[0].parent_part == pytest.approx(delta * cosine)


@pytest.mark.parametrize(("p10", "p11", "parent", "child"), [(0.2, 0.05, 0.9732, 0.2298), (0.3, 0.1, 0.9571, 0.2898)])
def test_the_closed_form_of_hedging_is_not_absorption(p10, p11, parent, child):
    data = planted(family_codes())
    edge = find_absorption(hedging(p10, p11).on(data), data).edges[0]
    assert edge.kind == "hedged" and edge.absorber == -1
    assert edge.evidence.cosine == pytest.approx(parent, abs=5e-5) and edge.evidence.hole == pytest.approx(child, abs=5e-5)
    assert edge.evidence.encoder_child == edge.evidence.decoder_child == pytest.approx(child / parent, abs=1e-4)
    assert edge.gap == 0


def test_a_hedge_of_equal_parts_is_a_merger():
    assert find_absorption(hedging(0.1, 0.3).on(data := planted(family_codes())), data).edges[0].kind == "merged"


def test_duplicates_are_listed_and_split_is_told_by_recall():
    data = planted(family_codes())
    assert find_absorption(duplicated().on(data), data).edges[0].evidence.latents == (0, 5)
    edge = find_absorption(split().on(data), data).edges[0]
    assert set(edge.evidence.latents) == {0, 5}
    assert (edge.evidence.contrast.recall_on, edge.evidence.contrast.recall_off) == (1, 1)
    assert 1 in (edge.evidence.contrast.latent_on, edge.evidence.contrast.latent_off) and 0 in (
        edge.evidence.contrast.latent_on,
        edge.evidence.contrast.latent_off,
    )


def test_absorption_into_a_latent_of_both_beside_the_childs_own():
    data = planted(family_codes())
    edge = find_absorption(composite().on(data), data).edges[0]
    assert (edge.kind, edge.absorber, edge.evidence.child_latent) == ("absorbed", 5, 1)


def test_a_parent_that_is_never_alone():
    data = planted(family_codes(alone=False))
    found = find_absorption(absorbing((1, 2, 3)).on(data), data)
    assert kinds(found) == ["absorbed"] * 3 and [e.absorber for e in found.edges] == [1, 2, 3]
    assert found.edges[0].gap == 0  # its latent never fires: recall says nothing, the reconstruction does
    assert kinds(find_absorption(Rows.clean().on(data), data)) == ["none"] * 3


def test_three_levels():
    data = planted(*CHAIN)
    top, low = find_absorption(chain().on(data), data).edges
    assert (top.parent, top.child, top.kind, top.gap) == (0, 1, "absorbed", 1)
    assert {a.latent for a in top.evidence.absorbers} == {1, 2}
    assert (low.parent, low.child, low.kind, low.absorber, low.gap) == (1, 2, "absorbed", 2, 1)
    assert low.evidence.absorbers[0].parent_part == pytest.approx(1 / math.sqrt(3))
    assert low.evidence.absorbers[0].residual == pytest.approx(0, abs=1e-6)  # the grandparent's part is known


def test_siblings_that_fire_together_do_not_blame_each_other():
    source = HierarchyBench(parents=1, children=2, independent=1, d_in=8, exclusive=False, child_probability=0.4, parent_probability=0.5)
    data = source.sample(600, stream(1))
    found = find_absorption(absorbing((1,), n=4).on(data), data)
    assert kinds(found) == ["absorbed", "none"]
    assert found.edges[1].recall_with < 0.8  # child 1 is active on many of these rows
    assert found.edges[1].evidence.contrast.recall_on == 1


def test_what_cannot_be_judged_says_why_and_is_never_nan():
    data = planted(family_codes())
    dead = Rows.clean()
    dead.bias[0] = -100
    found = find_absorption(dead.on(data), data)
    assert kinds(found) == ["not eligible"] * 3 and "fires on 0%" in found.edges[0].why
    assert (found.edges[0].recall_with, found.edges[0].recall_without, found.mean_gap, found.max_gap) == (0, 0, None, None)

    nowhere = homeless()
    nowhere.dec[:4, 0] = 0
    edge = find_absorption(nowhere.on(data), data).edges[0]
    assert (edge.latent, edge.recall_with, edge.gap, edge.eligible) == (-1, None, None, False)
    assert "near enough" in edge.why
    assert edge.evidence.gap_interval == (-1, 1)

    few = find_absorption(absorbing((1,)).on(data), data.take(slice(0, 12)))
    assert kinds(few) == ["not eligible"] * 3 and "rows have the parent with the child; 10 are needed" in few.edges[0].why
    assert find_absorption(absorbing((1,)).on(data), data.take(slice(0, 12)), least=1).edges[0].gap == 1

    none = find_absorption(Rows.clean().on(data), data.take(torch.arange(5, N, 6)))  # no family in these rows
    assert [(e.n_with, e.n_without, e.recall_with) for e in none.edges] == [(0, 0, None)] * 3
    silent = Rows.clean()
    silent.bias[:] = -100
    for seen in (found, few, none, find_absorption(silent.on(data), data)):
        assert all(math.isfinite(x) for x in numbers(seen.edges))


def test_a_few_rows_are_not_read_as_many():
    data = planted(family_codes()).take(slice(0, 8))  # one or two rows of each kind
    found = find_absorption(absorbing((1,)).on(planted(family_codes())), data, least=1)
    edge = found.edges[0]
    assert edge.n_with <= 2 and edge.evidence.recall_with_interval.high > 0.6


def test_no_hierarchy_no_edges_and_no_truth_is_refused():
    data = planted(family_codes(), parents=())
    found = find_absorption(Rows.clean().on(data), data)
    assert (found.edges, found.eligible_fraction, found.mean_gap, found.max_gap) == ((), None, None, None)
    with pytest.raises(ValueError, match="truth=None"):
        find_absorption(Rows.clean().on(data), Activations(data.inputs, data.inputs))
    with pytest.raises(ValueError, match="least is 0"):
        find_absorption(Rows.clean().on(data), data, least=0)
    loop = planted(family_codes(), parents=(1, 0, None, None, None))
    with pytest.raises(ValueError, match="its own ancestor"):
        find_absorption(Rows.clean().on(loop), loop)


def noisy_pair(seed: int = 0):
    """A dictionary with a bit of everything on a noisy hierarchy in superposition."""
    source = HierarchyBench(parents=3, children=3, independent=4, d_in=12, parent_probability=0.4, magnitude_std=0.3)
    data = source.sample(500, stream(seed))
    g = torch.Generator().manual_seed(seed)
    features = data.truth.input_features
    W_dec = torch.cat([features, features[:8] + 0.3 * torch.randn(8, 12, generator=g)])
    W_dec[1] += 0.7 * W_dec[0]
    W_enc = W_dec + 0.2 * torch.randn(W_dec.shape, generator=g)
    W_enc[0] -= 0.8 * features[1]
    return SparseDictionary(W_enc, W_dec, torch.full((len(W_dec),), -0.3)), data


def test_blocks_other_findings_and_sparse_codes_do_not_matter(device):
    dictionary, data = noisy_pair()
    dictionary.to(device)
    whole = find_absorption(dictionary, data)
    small, _ = observe(dictionary, data, [find_absorption, align], block=17)
    sigma = lambda pre: Latents(*compressed(pre.relu()), n_latents=pre.shape[1])
    sparse = find_absorption(SparseDictionary(dictionary.W_enc, dictionary.W_dec, dictionary.b_enc, nonlinearity=sigma), data)
    assert len(set(kinds(whole))) > 1
    for other in (small, sparse):
        assert [(e.kind, e.latent, e.absorber, e.n_with, e.gap) for e in other.edges] == [
            (e.kind, e.latent, e.absorber, e.n_with, e.gap) for e in whole.edges
        ]
        np.testing.assert_allclose(list(numbers(other.edges)), list(numbers(whole.edges)), rtol=1e-4, atol=1e-5)


def compressed(codes):
    row, latent = codes.nonzero(as_tuple=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64, device=codes.device), (codes > 0).sum(1).cumsum(0)])
    return codes[row, latent], latent, offsets


def test_rescaled_rows_and_units_do_not_matter():
    dictionary, data = noisy_pair()
    whole = find_absorption(dictionary, data)
    a = torch.rand(dictionary.n_latents, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    rescaled = SparseDictionary(dictionary.W_enc * a, dictionary.W_dec / a, dictionary.b_enc * a[:, 0])
    units = SparseDictionary(dictionary.W_enc / 2, dictionary.W_dec * 3, dictionary.b_enc, input_scale=2, target_scale=3)
    for other in (rescaled, units):
        other = find_absorption(other, data)
        assert kinds(other) == kinds(whole)
        np.testing.assert_allclose(list(numbers(other.edges)), list(numbers(whole.edges)), rtol=1e-3, atol=1e-4)


def test_against_a_row_at_a_time():
    """Recall and both SAEBench scores from loops over rows and latents."""
    dictionary, data = noisy_pair(1)
    found = find_absorption(dictionary, data)
    with torch.no_grad():
        z, W_dec = dictionary.encode(data.inputs).dense().double(), dictionary.W_dec.double()
    codes, features = data.truth.codes.double(), data.truth.target_features.double()
    for edge in found.edges:
        seen, lineage = edge.evidence, features[[edge.parent, edge.child]]
        u = torch.linalg.pinv(lineage)[:, 0]
        full, fraction, hits = [], [], []
        for r in range(data.n):
            if not (codes[r, edge.parent] > 0 and codes[r, edge.child] > 0):
                continue
            hits.append(bool(z[r, edge.latent] > 0))
            activation = float(codes[r, edge.parent])
            parts = [(float(z[r, j] * (W_dec[j] @ u)), float(W_dec[j] @ lineage[0] / W_dec[j].norm())) for j in range(len(W_dec))]
            main = sum(parts[j][0] for j in seen.latents)
            others = [part for j, part in enumerate(parts) if j not in seen.latents]
            taken = sum(sorted([q for q, cosine in others if cosine >= 0.1 and q > 0])[-3:])
            top, cosine = max(others)
            silent = all(z[r, j] == 0 for j in seen.latents)
            full.append(silent and cosine >= 0.025 and top >= 0.4 * activation)
            if main >= activation or taken < 0.4 * activation:
                fraction.append(0.0)
            else:
                part = min(taken, activation - main)
                fraction.append(1.0 if main <= 0 else part / (part + main))
        assert (edge.n_with, edge.recall_with) == (len(hits), pytest.approx(np.mean(hits)))
        assert seen.contrast.full == pytest.approx(np.mean(full)) and seen.contrast.fraction == pytest.approx(np.mean(fraction), abs=1e-4)
    assert any(e.evidence.contrast.fraction > 0 for e in found.edges)


def test_saebench_scores_of_single_rows():
    """The two borders: a share below 0.4 counts nothing, main at or above the whole counts nothing."""
    others = torch.tensor([[0.39, 0.0], [0.5, 0.0], [0.3, 0.3], [0.9, 0.0], [0.6, 0.0]])
    cosine = torch.tensor([[0.7, 0.7], [0.7, 0.7], [0.7, 0.7], [0.02, 0.7], [0.7, 0.7]])
    main = torch.tensor([0.61, 0.5, 0.0, 0.0, 1.0])
    full, fraction = saebench(others, cosine, main, main > 0, torch.ones(5))
    assert full.tolist() == [False, False, False, False, False]
    torch.testing.assert_close(fraction, torch.tensor([0, 0.5, 1.0, 0.0, 0.0]))


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (3, 7), (81, 263)])
def test_wilson_equals_scipys(hits, n):
    np.testing.assert_allclose(wilson(hits, n), tuple(binomtest(hits, n).proportion_ci(method="wilson")), atol=1e-12)
    assert wilson(0, 0) == (0, 1)


@pytest.mark.parametrize(
    ("hits", "n", "other", "m", "low", "high"),
    [(56, 70, 48, 80, 0.0524, 0.3339), (9, 10, 3, 10, 0.1705, 0.8090), (10, 10, 0, 20, 0.6791, 1.0)],
)
def test_newcombe_equals_his_table(hits, n, other, m, low, high):
    np.testing.assert_allclose(newcombe(hits, n, other, m), (low, high), atol=5e-5)  # Newcombe 1998, table II, method 10
    assert newcombe(0, 0, 1, 5) == (-1, 1)
