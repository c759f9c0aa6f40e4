"""session.survey: one pass for all findings, in blocks, which goes on where it was ended."""

import importlib
import json
import pkgutil
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
import torch
from scipy.sparse import issparse
from torch.testing import assert_close
from typer.testing import CliRunner

import sdl_explorer
from sdl_explorer import cli
from sdl_explorer import survey as surveying
from sdl_explorer.control import Stopped
from sdl_explorer.data.activations import Activations
from sdl_explorer.data.anchors import Anchors
from sdl_explorer.data.bench import LinearBench
from sdl_explorer.data.hierarchy import HierarchyBench
from sdl_explorer.data.store import Stored
from sdl_explorer.diagnosis import causes as causing
from sdl_explorer.diagnosis import observe as observing
from sdl_explorer.diagnosis.alignment import align
from sdl_explorer.diagnosis.causes import trace_causes
from sdl_explorer.diagnosis.cofiring import CoFiring
from sdl_explorer.diagnosis.drift import measure_drift
from sdl_explorer.diagnosis.examples import find_examples
from sdl_explorer.diagnosis.explain import explain
from sdl_explorer.diagnosis.groups import trace_groups
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.diagnosis.observe import encoded, evaluating, observe
from sdl_explorer.diagnosis.pairs import count_pairs
from sdl_explorer.diagnosis.patterns import trace_patterns
from sdl_explorer.diagnosis.redundancy import find_redundant
from sdl_explorer.models.dictionary import Latents
from sdl_explorer.models.methods import BatchTopK, JumpReLU, ReLU, TopK
from sdl_explorer.session import Session
from sdl_explorer.trial import measure_contributions

FINDINGS = [*surveying.ALWAYS, *surveying.COMPARED, *surveying.WITH_TRUTH, *surveying.LAST]


def leaves(value, path=""):
    """Every number, text and array of a result."""
    if is_dataclass(value):
        for field in fields(value):
            yield from leaves(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from leaves(part, f"{path}.{name}")
    elif isinstance(value, tuple | list):
        for i, part in enumerate(value):
            yield from leaves(part, f"{path}[{i}]")
    elif issparse(value):
        yield f"{path}.places", np.stack(value.tocoo().coords)
        yield f"{path}.data", value.data
    elif not callable(value) and type(value).__module__ in ("builtins", "numpy"):
        yield path, value


def assert_same(a, b, exact=False):
    for (path, x), (_, y) in zip(leaves(a), leaves(b), strict=True):
        if exact or not np.issubdtype(np.asarray(x).dtype, np.floating):
            np.testing.assert_array_equal(x, y, err_msg=path)
        else:
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.fixture
def small(monkeypatch):
    """Blocks of 32 rows."""
    monkeypatch.setattr(observing, "MOST_ROWS", 32)


def make(**settings):
    settings = {"batch_size": 64, "seed": 0, "n_latents": 24} | settings
    source = settings.pop("source", None) or HierarchyBench(magnitude_std=0.3)
    return Session(source, settings.pop("method", TopK(k=4)), **settings)


class Enough(Exception):
    pass


def until(share):
    def progress(done):
        if done >= share:
            raise Enough

    return progress


def test_a_survey_equals_each_finding_alone(small):
    session = make()
    session.train(20)
    survey = session.survey(200)
    assert survey.n_samples == 200
    assert list(survey) == [f.__name__ for f in FINDINGS]
    fresh = make()
    fresh.train(20)
    for finding in FINDINGS:
        assert_same(survey[finding], fresh.find(finding, n=200))
        assert session.find(finding, n=200) is survey[finding]
    assert survey["check_health"] is survey[check_health]
    assert len(repr(survey).splitlines()) == 1 + len(FINDINGS)


def test_every_finding_is_in_a_survey_or_says_why_not():
    there = set()
    for module in pkgutil.walk_packages(sdl_explorer.__path__, "sdl_explorer."):
        if module.name.startswith("sdl_explorer.diagnosis.") or module.name == "sdl_explorer.trial":
            members = vars(importlib.import_module(module.name)).values()
            there |= {member.__name__ for member in members if hasattr(member, "accumulator") and callable(member)}
    surveyed = {finding.__name__ for finding in (*FINDINGS, *surveying.WITH_PINS)}
    assert surveyed | set(surveying.BY_ITSELF) == there
    assert not surveyed & set(surveying.BY_ITSELF)


def test_contributions_are_what_find_redundant_explains():
    data = HierarchyBench(magnitude_std=0.3).sample(300, torch.Generator().manual_seed(0))
    dictionary = TopK(k=4).build(20, 20, 24, torch.Generator().manual_seed(1)).eval()
    redundancy, contributions = observe(dictionary, data, [find_redundant, measure_contributions])
    np.testing.assert_allclose(contributions["contribution"], redundancy.explained, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(contributions["firing_rate"], redundancy.firing_rate)


def test_pins_are_in_the_survey_of_who_has_some(small):
    session = make()
    session.anchor(Anchors.from_truth(session.source.sample(1, torch.Generator()), [0, 3]))
    survey = session.survey(100)
    assert len(survey[measure_drift]) == 2
    assert_same(survey[measure_drift], measure_drift(session.dictionary, session.source.sample(9, torch.Generator()), session.pins))
    assert session.find(measure_drift, n=100) is survey[measure_drift]


def test_a_finding_is_fed_and_answered_once_for_all_who_ask(monkeypatch):
    fed, answered = [], []
    add, result = check_health.accumulator.add, check_health.accumulator.result
    monkeypatch.setattr(check_health.accumulator, "add", lambda self, rows: fed.append(self) or add(self, rows))
    monkeypatch.setattr(check_health.accumulator, "result", lambda self: answered.append(self) or result(self))
    data = HierarchyBench().sample(40, torch.Generator().manual_seed(0))
    dictionary = TopK(k=4).build(20, 20, 24, torch.Generator().manual_seed(1)).eval()
    health, verdicts, later = observe(dictionary, data, [check_health, explain, (check_health, {"dead_after": 1_000})])
    assert health is not later
    assert (health.dead_after, later.dead_after) == (None, 1_000)
    one, two = ({id(part) for part in parts if part.dead_after != 1_000} for parts in (fed, answered))
    assert len(two) == 1
    assert two <= one
    assert_same(verdicts, observe(dictionary, data, [explain])[0])


@pytest.mark.parametrize("complete", [True, False])
def test_causes_of_every_latent_are_those_of_each_one(monkeypatch, complete):
    data = HierarchyBench(magnitude_std=0.3).sample(300, torch.Generator().manual_seed(0))
    data = replace(data, truth=replace(data.truth, complete=complete))
    dictionary = ReLU().build(20, 20, 24, torch.Generator().manual_seed(1)).eval()
    with torch.no_grad():
        dictionary.b_enc[5] = -100.0
    each = [trace_causes(dictionary, data, latent=i) for i in range(24)]
    monkeypatch.setattr(causing, "TERMS", 50)
    monkeypatch.setattr(causing, "CELLS", 100)
    every = trace_causes(dictionary, data)
    assert every.n_latents == 24
    assert len(every.of(5).row) == 0 < len(every.of(4).row)
    for i, alone in enumerate(each):
        assert_same(every.of(i), alone)
    overlap = dictionary.W_enc.detach() @ data.truth.input_features.T
    drive = (data.truth.codes[every.row] * overlap[np.repeat(np.arange(24), np.diff(every.offsets))]).relu()
    if complete:
        assert_close(torch.as_tensor(every.share), drive.max(dim=1).values / drive.sum(dim=1).clamp_min(1e-12), rtol=1e-5, atol=1e-6)
        assert torch.equal(torch.as_tensor(every.feature).long(), torch.where(drive.amax(dim=1) > 0, drive.argmax(dim=1), -1))
    with pytest.raises(ValueError, match="latent 24 does not exist"):
        every.of(24)


def test_causes_of_every_latent_hold_as_many_codes_as_there_is_room_for(monkeypatch):
    data = HierarchyBench().sample(100, torch.Generator().manual_seed(0))
    dictionary = TopK(k=4).build(20, 20, 24, torch.Generator().manual_seed(1)).eval()
    monkeypatch.setattr("sdl_explorer.diagnosis.candidates_pairs.MOST_CODES", 200)
    some = trace_causes(dictionary, data)
    assert 50 <= some.n_samples < 100
    assert len(some.row) <= 200
    assert_same(some.of(3), trace_causes(dictionary, data.take(slice(some.n_samples)), latent=3))


@pytest.mark.parametrize("dense", [0, 1_000, np.inf])
def test_what_fires_together_is_counted_by_sparse_and_by_dense_products(monkeypatch, dense):
    """The last blocks are sparse: both ways add up."""
    monkeypatch.setattr("sdl_explorer.diagnosis.cofiring.DENSE", dense)
    data = HierarchyBench(magnitude_std=0.3).sample(300, torch.Generator().manual_seed(0))
    data.inputs[200:] *= 1e-3
    dictionary = ReLU().build(20, 20, 24, torch.Generator().manual_seed(1)).eval()
    with torch.no_grad():
        dictionary.b_enc.copy_(torch.linspace(-0.02, 0.0, 24))
        fired = (dictionary.encode(data.inputs).dense() > 0).double()
    stream = observing.Stream(dictionary, data)
    cofiring = CoFiring(stream)
    with evaluating(dictionary):
        for rows in encoded(dictionary, data, block=30):
            cofiring.add(rows)
    together, codes = cofiring.result(), data.truth.codes.double()
    np.testing.assert_array_equal(together.count.toarray(), (fired.T @ (codes > 0).double()).numpy())
    np.testing.assert_allclose(together.total.toarray(), (fired.T @ codes).numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(together.fired, fired.sum(dim=0).numpy())
    np.testing.assert_array_equal(together.active, (codes > 0).sum(dim=0).numpy())


@pytest.mark.parametrize("of", ["anchors", "labels", "clusters"])
def test_groups_in_blocks_of_any_size(monkeypatch, of):
    data = HierarchyBench(magnitude_std=0.3).sample(300, torch.Generator().manual_seed(0))
    data = replace(data, labels=torch.arange(300) % 3 if of == "labels" else None)
    dictionary = ReLU().build(20, 20, 24, torch.Generator().manual_seed(1)).eval()
    anchors = Anchors.from_truth(data, range(4)) if of == "anchors" else None
    whole, split = (observe(dictionary, data, [(trace_groups, {"anchors": anchors, "n_clusters": 4})], block=b)[0] for b in (300, 7))
    assert whole.of == split.of == of
    assert_same(whole, split)
    monkeypatch.setattr("sdl_explorer.diagnosis.rows.SPARSE", 2.0)  # by entries, not by sums over dense codes
    assert_same(whole, trace_groups(dictionary, data, anchors=anchors, n_clusters=4))


@pytest.mark.parametrize(("method", "block"), [(TopK(k=4), 7), (BatchTopK(k=4), 64), (ReLU(), 20), (JumpReLU(), 100)])
def test_blocks_of_any_size_give_the_same_numbers(method, block):
    data = HierarchyBench(magnitude_std=0.3).sample(300, torch.Generator().manual_seed(0))  # no two codes are equal
    dictionary = method.build(20, 20, 24, torch.Generator().manual_seed(1)).eval()
    whole, split = (observe(dictionary, data, FINDINGS, block=b) for b in (300, block))
    for a, b in zip(whole, split, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("method", [TopK(k=8), BatchTopK(k=8), ReLU(), JumpReLU()])
@pytest.mark.parametrize("firing", [0.02, 0.3])
def test_wide_blocks_give_the_codes_of_narrow_ones(monkeypatch, method, firing):
    """Where sigma selects, and where it does not since too many latents fire."""
    monkeypatch.setattr(observing, "BLOCK_BYTES", 300 * 512 * 4)
    data = LinearBench(n_features=64, d_in=32, sparsity=0.9).sample(4_100, torch.Generator().manual_seed(0))
    dictionary = method.build(32, 32, 512, torch.Generator().manual_seed(1)).eval()
    with evaluating(dictionary):
        pre = dictionary.pre(data.inputs)
        dictionary.b_enc.sub_(pre.flatten().kthvalue(int((1 - firing) * pre.numel())).values)
        wide, narrow = list(encoded(dictionary, data)), list(encoded(dictionary, data, block=300))
        selects = isinstance(method, TopK) or firing < 0.03
        assert [rows.n for rows in wide[:2]] == ([4_096, 4] if selects else [300, 300])
        assert [rows.start for rows in narrow[:2]] == [0, 300]
        assert [rows.start for rows in wide] == list(np.cumsum([0, *(rows.n for rows in wide)])[:-1])
        assert_close(torch.cat([r.codes for r in wide]), torch.cat([r.codes for r in narrow]), rtol=1e-4, atol=1e-5)
        assert_close(torch.cat([r.reconstruction for r in wide]), torch.cat([r.reconstruction for r in narrow]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sparse", [0.0, 2.0])
def test_codes_of_some_latents(monkeypatch, sparse):
    monkeypatch.setattr("sdl_explorer.diagnosis.rows.SPARSE", sparse)
    data = HierarchyBench().sample(40, torch.Generator().manual_seed(0))
    chosen = torch.tensor([3, 0, 3, 23, 7])
    for method in (TopK(k=4), ReLU()):
        dictionary = method.build(20, 20, 24, torch.Generator().manual_seed(1))
        with evaluating(dictionary):
            (rows,) = encoded(dictionary, data)
            assert_close(rows.codes_of(chosen), rows.codes[:, chosen])
            latent, row, value = rows.entries
            assert_close(rows.codes[row, latent], value)
            assert (latent.diff() >= 0).all()
            assert_close(rows.first, torch.searchsorted(latent, torch.arange(24)))


@pytest.mark.parametrize(("method", "share"), [(TopK(k=4), 0.3), (BatchTopK(k=4), 0.6), (ReLU(), 0.9), (JumpReLU(threshold=0.3), 1.0)])
def test_a_survey_that_was_ended_goes_on_with_the_same_bits(small, monkeypatch, tmp_path, method, share):
    monkeypatch.setattr(observing, "BLOCK_BYTES", 4 * 24 * 10)
    whole = make(method=method).survey(150)
    first = make(method=method)
    first.save(tmp_path / "run")
    with pytest.raises(Enough):
        first.survey(150, progress=until(share))
    first.close()
    (folder,) = (tmp_path / "run" / "surveys").iterdir()
    assert not list(folder.glob(".*"))
    with Session.open(tmp_path / "run") as second:
        survey = second.survey(150)
    assert 0 < survey.n_kept < 150 or (share, survey.n_kept) == (1.0, 150)
    for finding in FINDINGS:
        assert_same(whole[finding], survey[finding], exact=True)


def test_a_survey_is_kept_beside_the_run_and_found_again(small, monkeypatch, tmp_path):
    session = make()
    session.save(tmp_path / "run")
    assert session.survey(100).n_kept == 0
    session.close()
    with Session.open(tmp_path / "run") as again:
        encodings = []
        add = surveying.KeptCodes.add
        monkeypatch.setattr(surveying.KeptCodes, "add", lambda self, latents: encodings.append(latents.n) or add(self, latents))
        causes = again.find(trace_causes, n=100, latent=3)
        assert not encodings
        assert again.survey(100).n_kept == 100
        assert not encodings
        again.train(1)
        assert again.survey(100).n_kept == 0
        assert sum(encodings) == 100
    assert causes.n_samples == 100
    assert_same(causes, make().find(trace_causes, n=100, latent=3), exact=True)


def test_a_killed_survey_goes_on_from_the_command_line(small, tmp_path):
    session = make()
    session.save(tmp_path / "run")
    expected = session.branch().survey(150)
    with pytest.raises(Enough):
        session.survey(150, progress=until(0.5))
    session.close()
    (folder,) = (tmp_path / "run" / "surveys").iterdir()
    (folder / ".block-0000000096.safetensors.dead.tmp").write_bytes(b"half a block")  # what a kill leaves of a write
    told = CliRunner().invoke(cli.app, ["survey", str(tmp_path / "run"), "--rows", "150"])
    assert told.exit_code == 0, told.output
    assert "Survey of 150 rows (96 of them were kept)" in told.output
    assert repr(expected[check_health]) in told.output
    refused = CliRunner().invoke(cli.app, ["survey", str(tmp_path / "nothing")])
    assert refused.exit_code == 1
    assert "not a run folder" in refused.output


def test_stop_ends_a_survey_and_a_follower_reads_it(small, tmp_path):
    session = make()
    session.save(tmp_path / "run")
    with pytest.raises(Stopped, match="goes on from there"):
        session.survey(100, progress=lambda done: done > 0 and session._stop.set())
    assert session.snapshot.job is None
    with Session.open(tmp_path / "run") as follower:
        assert not follower.writable
        assert follower.survey(100).n_kept > 0
        assert len(list((tmp_path / "run").glob("surveys/*/block-*"))) == 1
    session.close()


def test_old_surveys_make_room(small, tmp_path):
    session = make()
    session.save(tmp_path / "run")
    for n in range(10, 10 + surveying.KEEP_SURVEYS + 2):
        session.survey(n)
    kept = [json.loads(path.read_text())["rows"] for path in (tmp_path / "run").glob("surveys/*/survey.json")]
    assert sorted(kept) == [12, 13, 14, 15]
    session.close()


def test_what_does_not_fit_on_the_disk_is_encoded_again(small, monkeypatch, tmp_path):
    monkeypatch.setattr(surveying, "KEEP_CODES", 3_000)
    session = make()
    session.save(tmp_path / "run")
    first = session.survey(200)
    session.close()
    with Session.open(tmp_path / "run") as again:
        second = again.survey(200)
    assert 0 < second.n_kept < 200
    for finding in FINDINGS:
        assert_same(first[finding], second[finding], exact=True)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_codes_survive_the_file_bit_for_bit(tmp_path, share):
    g = torch.Generator().manual_seed(0)
    dense = torch.randn(6, 9, generator=g) * (torch.rand(6, 9, generator=g) < share)
    dense[2] = 0
    offsets = torch.tensor([0, 2, 2, 3, 5, 5, 6])
    sparse = Latents(torch.randn(6, generator=g), torch.tensor([8, 1, 3, 0, 2, 5]), offsets, 9)
    kept = surveying.KeptCodes(tmp_path)
    kept.add(Latents(dense))
    kept.add(sparse)
    kept.write(7)
    assert kept.read(0) is None
    first, second = kept.read(7)
    assert not first.is_sparse
    assert torch.equal(first.values, dense)
    assert second.n_latents == 9
    for a, b in zip((second.values, *second.layout), (sparse.values, *sparse.layout), strict=True):
        assert torch.equal(a, b)


def test_without_truth_what_needs_it_is_left_out(small):
    rows = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    survey = make(source=Stored(rows)).survey(10_000)
    assert survey.n_samples == 30  # all that the part has
    assert list(survey) == [f.__name__ for f in (*surveying.ALWAYS, *surveying.LAST)]
    with pytest.raises(KeyError, match=r"no align, since these rows have no true features.*check_health"):
        survey[align]
    with pytest.raises(KeyError, match=r"no count_pairs, since it counts the latents that somebody chose; call session\.find"):
        survey[count_pairs]
    with pytest.raises(KeyError, match="no measure_drift, since nothing is pinned"):
        survey[measure_drift]
    assert "30 rows" in repr(survey)
    with pytest.raises(ValueError, match="survey: rows is 0"):
        make().survey(0)


def test_another_dictionary_has_another_key():
    source = HierarchyBench()
    dictionary = TopK(k=4).build(20, 20, 24, torch.Generator().manual_seed(0))
    first = surveying.about(dictionary, source, 0, 100)
    assert first == surveying.about(dictionary, source, 0, 100)
    dictionary.nonlinearity.k = 5
    other_k = surveying.about(dictionary, source, 0, 100)
    dictionary.nonlinearity.k = 4
    with torch.no_grad():
        dictionary.b_dec[0] += 1e-7
    assert len({json.dumps(a) for a in (first, other_k, surveying.about(dictionary, source, 0, 100))}) == 3


def test_threads_are_a_function_of_the_size():
    before = torch.get_num_threads()
    with surveying.threads(TopK(k=2).build(8, 8, 16, torch.Generator()), 100):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_a_million_features_stay_small():
    """Co-firing and examples hold what occurred, not n_latents x n_features."""
    n, n_features, d = 16, 1_000_000, 4
    g = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(n_features, d, generator=g), dim=1)
    from sdl_explorer.data.bench import linear_activations

    codes = torch.zeros(n, n_features)
    codes[torch.arange(n).repeat_interleave(3), torch.randint(n_features, (3 * n,), generator=g)] = 1.0
    data = linear_activations(codes, features, features)
    dictionary = TopK(k=2).build(d, d, 64, g).eval()
    health, examples, patterns = observe(dictionary, data, [check_health, find_examples, trace_patterns])
    assert health.n_samples == examples.n_samples == patterns.n_samples == n
    assert patterns.context.nnz <= 2 * 3 * n
    assert patterns.n_features == n_features


def test_the_codes_of_a_transcoder(small, tmp_path):
    session = make(source=LinearBench(n_features=16, d_in=12, kind="transcoder", d_out=10, max_interference=0.9))
    session.save(tmp_path / "run")
    first = session.survey(100)
    session.close()
    with Session.open(tmp_path / "run") as again:
        second = again.survey(100)
    assert second.n_kept == 100
    assert_same(first[check_health], second[check_health], exact=True)
    assert_same(first[align], second[align], exact=True)


def test_rows_of_activations_alone_need_no_folder():
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    health, _ = observe(TopK(k=2).build(5, 5, 9, torch.Generator()), Activations(x, x), [check_health, find_examples], kept=None)
    assert health.n_samples == 20
