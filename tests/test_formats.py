"""Checkpoint formats: what is written comes back bit-equal, owners' files mean what their formulas say, and bad files are refused."""

import errno
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save, save_file

from sdl_explorer.models import atomic
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.formats import formats, native
from sdl_explorer.models.methods.jumprelu import JumpRectified
from sdl_explorer.models.methods.relu import Rectified
from sdl_explorer.models.methods.topk import BatchTopKSelection, TopKSelection
from sdl_explorer.models.rewrites import scaled, uncentred

D, F, K = 6, 10, 3


def sigmas(n_latents=F):
    jump = JumpRectified(n_latents, 0.05)
    jump.threshold.data = torch.rand(n_latents)
    batch = BatchTopKSelection(K)
    batch.threshold.fill_(0.37)
    batch.n_averaged.fill_(41)
    relu = Rectified()
    relu.log_scale.fill_(-0.25)
    return {"relu": relu, "topk": TopKSelection(K), "batchtopk": batch, "jumprelu": jump}


def make(name="relu", d_in=D, d_out=D, centred=False, n_latents=F):
    torch.manual_seed(0)
    sigma = sigmas(n_latents)[name]
    W_enc, W_dec = torch.randn(n_latents, d_in), torch.randn(n_latents, d_out) * torch.rand(n_latents, 1) * 3
    b_enc, b_dec = torch.randn(n_latents) * 0.5 - 0.3, torch.randn(d_out)
    return SparseDictionary(W_enc, W_dec, b_enc, b_dec, sigma, subtract_b_dec=centred).eval()


def rows(d=D):
    """Ordinary rows, and one on which almost every pre-activation is negative."""
    return torch.cat([torch.randn(30, d, generator=torch.Generator().manual_seed(1)), torch.full((1, d), -0.05)])


def same_function(a, b, x, **tolerance):
    with torch.no_grad():
        za, zb = a.encode(x).dense(), b.encode(x).dense()
        torch.testing.assert_close(za, zb, **tolerance)
        assert ((za > 0) == (zb > 0)).all()
        torch.testing.assert_close(a(x).reconstruction, b(x).reconstruction, **tolerance)


# native ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sigmas())
@pytest.mark.parametrize("place", ["d.safetensors", "folder", "new/deep/folder"])
def test_native_round_trip_is_bit_equal(tmp_path, name, place):
    dictionary = make(name, centred=True)
    assert dictionary.save(tmp_path / place) == tmp_path / place
    loaded = SparseDictionary.load(tmp_path / place)
    assert type(loaded.nonlinearity) is type(dictionary.nonlinearity)
    assert loaded.nonlinearity.settings() == dictionary.nonlinearity.settings()
    assert loaded.subtract_b_dec
    assert not loaded.training
    for key, value in dictionary.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
        assert loaded.state_dict()[key].dtype == value.dtype
    assert isinstance(loaded.W_enc, torch.nn.Parameter)
    assert loaded.provenance["library"] == "sdl_explorer"


def test_native_keeps_provenance_and_settings(tmp_path):
    dictionary = make("jumprelu")
    dictionary.provenance = {"format": "saelens", "metadata": {"unknown": [1, {"deep": None}]}}
    dictionary.save(tmp_path / "a.safetensors")
    assert SparseDictionary.load(tmp_path / "a.safetensors").provenance == dictionary.provenance


def test_loading_a_double_gives_float32(tmp_path):
    make("jumprelu").double().save(tmp_path / "a")
    loaded = SparseDictionary.load(tmp_path / "a")
    assert {v.dtype for v in loaded.state_dict().values()} == {torch.float32}


def test_run_folder_reads_as_its_head(tmp_path):
    first, second = make("topk"), make("relu")
    first.save(tmp_path / "commits" / "c1")
    second.save(tmp_path / "commits" / "c2")
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "head.json").write_text('{"commit": "c1"}')
    assert isinstance(SparseDictionary.load(tmp_path).nonlinearity, TopKSelection)
    (tmp_path / "head.json").write_text('{"commit": "c2"}')
    assert isinstance(SparseDictionary.load(tmp_path).nonlinearity, Rectified)
    with pytest.raises(FileExistsError, match="run folder"):
        first.save(tmp_path)
    (tmp_path / "head.json").write_text('{"commit": "../../elsewhere"}')
    with pytest.raises(ValueError, match="commit is"):
        SparseDictionary.load(tmp_path)


def test_a_function_as_nonlinearity_is_not_saved(tmp_path):
    dictionary = SparseDictionary(torch.randn(F, D), torch.randn(F, D), nonlinearity=torch.tanh)
    with pytest.raises(TypeError, match="Python function"):
        dictionary.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["native", "saelens"])
def test_nan_is_not_saved(tmp_path, format):
    dictionary = make()
    dictionary.W_dec.data[3, 2] = torch.nan
    with pytest.raises(ValueError, match="W_dec holds 1 values"):
        dictionary.save(tmp_path / "a", format)
    assert list(tmp_path.iterdir()) == []


def broken_native(tmp_path, change=lambda record, tensors: None):
    """A native file with something wrong in it."""
    dictionary = make("jumprelu")
    record, tensors = native.dictionary_record(dictionary), native.dictionary_tensors(dictionary)
    change(record, tensors)
    path = tmp_path / "d.safetensors"
    save_file(tensors, path, {"sdl_explorer": json.dumps(record)})
    return path


def put(where, key, value):
    where[key] = value


BROKEN = {
    "missing tensor": (lambda r, t: t.pop("b_enc"), "b_enc is missing"),
    "missing matrix": (lambda r, t: t.pop("W_enc"), "W_enc is missing"),
    "missing state": (lambda r, t: t.pop("nonlinearity.threshold"), "threshold is missing"),
    "extra tensor": (lambda r, t: put(t, "W_skip", torch.ones(2)), "W_skip is not part"),
    "wrong shape": (lambda r, t: put(t, "b_dec", torch.ones(D + 1)), "b_dec has shape"),
    "wrong rows": (lambda r, t: put(t, "W_dec", torch.ones(F + 1, D)), "W_dec has shape"),
    "no matrix": (lambda r, t: put(t, "W_enc", torch.ones(F)), "must be a matrix"),
    "NaN": (lambda r, t: t["W_enc"].fill_(torch.nan), "W_enc holds 60 values"),
    "NaN threshold": (lambda r, t: t["nonlinearity.threshold"].fill_(torch.nan), "threshold holds"),
    "integer threshold": (lambda r, t: put(t, "nonlinearity.threshold", torch.ones(F, dtype=torch.int64)), "it must be like torch.float32"),
    "unknown class": (lambda r, t: put(r["nonlinearity"], "class", "os.system"), "'os.system' is unknown"),
    "function": (lambda r, t: put(r["nonlinearity"], "class", "Pointwise"), "'Pointwise' is unknown"),
    "unknown setting": (lambda r, t: put(r["nonlinearity"]["settings"], "path", "/"), "setting 'path'"),
    "giant setting": (lambda r, t: put(r["nonlinearity"]["settings"], "n_latents", 10**15), "threshold has shape"),
    "text setting": (lambda r, t: put(r["nonlinearity"]["settings"], "n_latents", "many"), "cannot be made"),
    "newer": (lambda r, t: put(r, "format_version", 3), "Update sdl_explorer"),
    "no version": (lambda r, t: r.pop("format_version"), "format_version is None"),
    "no flag": (lambda r, t: r.pop("subtract_b_dec"), "subtract_b_dec is None"),
    "no nonlinearity": (lambda r, t: r.pop("nonlinearity"), "nonlinearity is None"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_native_files_say_what_is_wrong(tmp_path, case):
    change, message = BROKEN[case]
    with pytest.raises(ValueError, match=message):
        SparseDictionary.load(broken_native(tmp_path, change))


def test_k_above_n_latents_is_refused(tmp_path):
    dictionary = make("topk")
    dictionary.nonlinearity.k = F + 1
    dictionary.save(tmp_path / "a")
    with pytest.raises(ValueError, match="k is 11 and n_latents 10"):
        SparseDictionary.load(tmp_path / "a")


class Explosive:
    def __reduce__(self):
        return (os._exit, (3,))


def test_files_that_are_no_dictionary(tmp_path):
    path = tmp_path / "d.safetensors"
    with pytest.raises(FileNotFoundError, match="nothing at"):
        SparseDictionary.load(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        SparseDictionary.load(path)
    path.write_bytes(pickle.dumps(Explosive()))
    with pytest.raises(ValueError, match="pickle"):
        SparseDictionary.load(path)
    torch.save({"W_enc": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="pickle"):
        SparseDictionary.load(path)
    path.write_bytes(b"just some text, longer than a header")
    with pytest.raises(ValueError, match="not a safetensors file"):
        SparseDictionary.load(path)
    whole = broken_native(tmp_path).read_bytes()
    for cut in (5, 9, 200, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"truncated|not a safetensors|damaged"):
            SparseDictionary.load(path)
    path.write_bytes(save({"W_enc": torch.ones(2)}))
    with pytest.raises(ValueError, match="Looked for native"):
        SparseDictionary.load(path)
    with pytest.raises(ValueError, match="no sdl_explorer entry"):
        SparseDictionary.load(path, "native")
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Explosive()))
    with pytest.raises(ValueError, match="never opened"):
        SparseDictionary.load(tmp_path / "x.pt")
    with pytest.raises(ValueError, match="native, saelens"):
        SparseDictionary.load(path, "sealens")


def test_each_format_recognises_only_its_own(tmp_path):
    for name in formats():
        make().save(tmp_path / name, name)
        assert [f.name for f in formats().values() if f.recognises(tmp_path / name)] == [name]


# atomic writing --------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    """Every file that is opened for writing takes half of what it is given, then the disk is full."""

    def fsync(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", fsync)


@pytest.mark.parametrize("format", ["native", "saelens"])
def test_a_full_disk_leaves_the_former_checkpoint(tmp_path, format, full_disk, monkeypatch):
    with monkeypatch.context() as room:
        room.setattr(atomic.os, "fsync", lambda handle: None)
        make("topk").save(tmp_path / "a", format)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(OSError, match="No space left") as caught:
        make("relu").save(tmp_path / "a", format)
    assert caught.value.errno == errno.ENOSPC
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert isinstance(SparseDictionary.load(tmp_path / "a").nonlinearity, TopKSelection)


def test_a_folder_comes_back_when_the_last_rename_fails(tmp_path, monkeypatch):
    atomic.replace_directory(tmp_path / "a", lambda folder: (folder / "x").write_text("old"))
    rename = os.rename

    def failing(source, target):
        if source.name != "a" and target.name == "a" and not (source / "x").read_text() == "old":
            raise OSError(errno.EACCES, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(atomic.os, "rename", failing)
    with pytest.raises(OSError, match="Permission denied"):
        atomic.replace_directory(tmp_path / "a", lambda folder: (folder / "x").write_text("new"))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "old"


def test_replacing_leaves_no_litter(tmp_path):
    for text in ("one", "two"):
        atomic.write_file(tmp_path / "deep" / "file", text.encode())
        atomic.replace_directory(tmp_path / "deep" / "folder", lambda folder, text=text: (folder / text).write_text(text))
    assert (tmp_path / "deep" / "file").read_text() == "two"
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == [
        "deep",
        "deep/file",
        "deep/folder",
        "deep/folder/two",
    ]


def test_an_error_in_the_writer_changes_nothing(tmp_path):
    atomic.replace_directory(tmp_path / "a", lambda folder: (folder / "x").write_text("old"))

    def writer(folder):
        (folder / "x").write_text("half")
        raise KeyError("no such thing")

    with pytest.raises(KeyError):
        atomic.replace_directory(tmp_path / "a", writer)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "old"


# SAELens: our reader against the owner's formulas ---------------------------------------------------------------------


def sae_folder(path, architecture, d_out=None, scaler=None, dtype=torch.float32, **changes):
    """A directory as sae-lens writes it; W_enc is (d_in, d_sae)."""
    torch.manual_seed(3)
    out = d_out or D
    tensors = {
        "W_enc": torch.randn(D, F),
        "W_dec": torch.randn(F, out) * (torch.rand(F, 1) * 3 + 0.1),
        "b_enc": torch.randn(F) * 0.5 - 0.3,
        "b_dec": torch.randn(out),
    }
    if "jumprelu" in architecture:
        tensors["threshold"] = torch.rand(F)
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    if "batchtopk" in architecture:
        tensors["topk_threshold"] = torch.tensor(0.8, dtype=torch.float64)
    config = {"architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu"}
    config |= {"apply_b_dec_to_input": d_out is None, "normalize_activations": "none", "reshape_activations": "none"}
    config |= {"metadata": {"sae_lens_version": "6.54.12", "sae_lens_training_version": "6.2.0", "hook_name": "blocks.4", "odd key": [1]}}
    config |= {"d_out": d_out} if d_out else {}
    config |= {"k": K, "rescale_acts_by_decoder_norm": False} if "topk" in architecture else {}
    config = {key: value for key, value in (config | changes).items() if value is not ...}
    path.mkdir(parents=True, exist_ok=True)
    (path / "cfg.json").write_text(json.dumps(config))
    if scaler is not None:
        (path / "activation_scaler.json").write_text(json.dumps(scaler))
    save_file(tensors, path / "sae_weights.safetensors")
    return config, {name: value.float() for name, value in tensors.items()}


def owner(config, t, x):
    """Latents and output by the owner's documented formulas."""
    pre = (x - t["b_dec"] if config["apply_b_dec_to_input"] else x) @ t["W_enc"] + t["b_enc"]
    m = t["W_dec"].norm(dim=1) if config.get("rescale_acts_by_decoder_norm") else torch.ones(F)
    pre = pre * m
    if config["architecture"] == "topk":
        kept = torch.zeros_like(pre).scatter(1, pre.topk(K, dim=1).indices, 1.0)
        codes = pre.relu() * kept
    elif "threshold" in t or "topk_threshold" in t:
        codes = pre.relu() * (pre > t.get("threshold", t.get("topk_threshold")))
    else:
        codes = pre.relu()
    return codes, (codes / m) @ t["W_dec"] + t["b_dec"]


ARCHITECTURES = [
    ("standard", {}),
    ("standard", {"apply_b_dec_to_input": False}),
    ("jumprelu", {}),
    ("jumprelu", {"apply_b_dec_to_input": False}),
    ("topk", {}),
    ("topk", {"rescale_acts_by_decoder_norm": True}),
    ("topk", {"rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False}),
    ("batchtopk", {}),
    ("batchtopk", {"rescale_acts_by_decoder_norm": True, "k": 3.0}),
    ("matryoshka_batchtopk", {"rescale_acts_by_decoder_norm": True}),
    ("transcoder", {"d_out": D}),
    ("transcoder", {"d_out": D + 3}),
    ("jumprelu_transcoder", {"d_out": D + 3}),
]


@pytest.mark.parametrize(("architecture", "changes"), ARCHITECTURES)
def test_saelens_reads_as_its_formula_says(tmp_path, architecture, changes):
    config, tensors = sae_folder(tmp_path / "s", architecture, **changes)
    dictionary = SparseDictionary.load(tmp_path / "s")
    codes, output = owner(config, tensors, rows())
    assert (codes > 0).sum(dim=1).min() < K  # a row with fewer than k positive pre-activations
    encoding = dictionary(rows())
    torch.testing.assert_close(encoding.latents.dense(), codes, rtol=1e-6, atol=1e-6)
    assert ((encoding.latents.dense() > 0) == (codes > 0)).all()
    torch.testing.assert_close(encoding.reconstruction, output, rtol=1e-5, atol=1e-5)
    assert dictionary.provenance["kind"] == ("transcoder" if "transcoder" in architecture else "sae")
    assert dictionary.provenance["version"] == "6.2.0"
    assert dictionary.provenance["hook_name"] == "blocks.4"


def test_square_dictionaries_are_not_transposed(tmp_path):
    dictionary = make("relu", d_in=F, d_out=F, centred=True)
    dictionary.save(tmp_path / "s", "saelens")
    assert torch.equal(SparseDictionary.load(tmp_path / "s").W_enc, dictionary.W_enc)
    weights = native.read_tensors(tmp_path / "s" / "sae_weights.safetensors")[0]
    assert torch.equal(weights["W_enc"].T, dictionary.W_enc)
    assert torch.equal(weights["W_dec"], dictionary.W_dec)


@pytest.mark.parametrize("s", [7.3, 0.1])
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [a for a in ARCHITECTURES if a[0] in ("standard", "topk", "batchtopk", "jumprelu")] + [("transcoder", {"d_out": D + 3})],
)
def test_an_unfinished_input_scale_is_folded(tmp_path, architecture, changes, s):
    changes = changes | {"normalize_activations": "expected_average_only_in"}
    config, tensors = sae_folder(tmp_path / "s", architecture, scaler={"scaling_factor": s, "has_whitening": False}, **changes)
    codes, output = owner(config, tensors, rows() * s)
    encoding = SparseDictionary.load(tmp_path / "s")(rows())
    units = s if config.get("rescale_acts_by_decoder_norm") else 1  # values are pre * m, and m shrank by s
    torch.testing.assert_close(encoding.latents.dense() * units, codes, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoding.reconstruction * s, output, rtol=1e-4, atol=1e-4)


REFUSED = {
    "no factor": ({"normalize_activations": "expected_average_only_in"}, None, "unfinished"),
    "null factor": ({"normalize_activations": "expected_average_only_in"}, {"scaling_factor": None}, "unfinished"),
    "zero factor": ({"normalize_activations": "expected_average_only_in"}, {"scaling_factor": 0.0}, "unfinished"),
    "contradiction": ({}, {"scaling_factor": 3.0}, "which|Delete the one"),
    "layer norm": ({"normalize_activations": "layer_norm"}, None, "of its own for each row"),
    "row norm": ({"normalize_activations": "constant_norm_rescale"}, None, "of its own for each row"),
    "whitening": ({"normalize_activations": "covariance_whitening"}, None, "whitening"),
    "whitening too": ({}, {"scaling_factor": None, "has_whitening": True}, "whitening"),
    "unknown scale": ({"normalize_activations": "sqrt"}, None, "'sqrt'"),
    "architecture": ({"architecture": "temporal"}, None, "'temporal' is not read"),
    "no architecture": ({"architecture": ""}, None, "'' is not read"),
    "before 6": ({"activation_fn": "relu", "metadata": {}}, None, "before version 6"),
    "width": ({"d_in": D + 1}, None, "W_enc has shape"),
    "count": ({"d_sae": "ten"}, None, "d_sae is 'ten'"),
    "flag": ({"apply_b_dec_to_input": "yes"}, None, "apply_b_dec_to_input is 'yes'"),
    "metadata": ({"metadata": 3}, None, "metadata is 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_saelens_folders_that_are_refused(tmp_path, case):
    changes, scaler, message = REFUSED[case]
    sae_folder(tmp_path / "s", **({"architecture": "standard"} | changes), scaler=scaler)
    with pytest.raises(ValueError, match=message):
        SparseDictionary.load(tmp_path / "s")


@pytest.mark.parametrize("k", [0, F + 1, 2.5, "4", None, True])
def test_saelens_topk_needs_a_whole_k(tmp_path, k):
    sae_folder(tmp_path / "s", "topk", k=k)
    with pytest.raises(ValueError, match=r"cfg.json: k is"):
        SparseDictionary.load(tmp_path / "s")


def test_saelens_damage_names_the_file(tmp_path):
    folder = tmp_path / "s"
    sae_folder(folder, "jumprelu")
    weights = (folder / "sae_weights.safetensors").read_bytes()
    for content, message in ((weights[:-7], "truncated"), (b"", "empty"), (pickle.dumps(Explosive()), "pickle")):
        (folder / "sae_weights.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=f"sae_weights.safetensors.*{message}"):
            SparseDictionary.load(folder)
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"sae_weights.safetensors is missing"):
        SparseDictionary.load(folder)
    (folder / "cfg.json").write_text("{not json")
    with pytest.raises(ValueError, match=r"cfg.json is not JSON"):
        SparseDictionary.load(folder)
    sae_folder(folder, "jumprelu")
    tensors = native.read_tensors(folder / "sae_weights.safetensors")[0]
    for change, message in (
        ({"scaling_factor": torch.ones(F)}, "scaling_factor is not part"),
        ({"threshold": torch.full((F,), torch.nan)}, "threshold holds 10 values"),
    ):
        save_file(tensors | change, folder / "sae_weights.safetensors")
        with pytest.raises(ValueError, match=message):
            SparseDictionary.load(folder)
    save_file({k: v for k, v in tensors.items() if k != "threshold"}, folder / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="threshold is missing"):
        SparseDictionary.load(folder)


def test_saelens_defaults_become_assumptions(tmp_path):
    sae_folder(tmp_path / "s", "topk", apply_b_dec_to_input=..., rescale_acts_by_decoder_norm=..., metadata=...)
    dictionary = SparseDictionary.load(tmp_path / "s")
    assert dictionary.subtract_b_dec
    said = " ".join(dictionary.provenance["assumptions"])
    assert "apply_b_dec_to_input" in said
    assert "rescale_acts_by_decoder_norm" in said
    assert "sae_lens_version" in said


def test_saelens_log_threshold_is_exponentiated(tmp_path):
    _, tensors = sae_folder(tmp_path / "s", "jumprelu")
    logged = {k: v for k, v in tensors.items() if k != "threshold"} | {"log_threshold": tensors["threshold"].log()}
    save_file(logged, tmp_path / "s" / "sae_weights.safetensors")
    torch.testing.assert_close(SparseDictionary.load(tmp_path / "s").nonlinearity.threshold.data, tensors["threshold"])


def test_saelens_negative_threshold_selects_as_zero_does(tmp_path):
    config, tensors = sae_folder(tmp_path / "s", "jumprelu")
    tensors["threshold"][:4] = -0.5
    save_file(tensors, tmp_path / "s" / "sae_weights.safetensors")
    torch.testing.assert_close(SparseDictionary.load(tmp_path / "s").encode(rows()).dense(), owner(config, tensors, rows())[0])


def test_saelens_zero_decoder_row_stays_silent(tmp_path):
    _, tensors = sae_folder(tmp_path / "s", "topk", rescale_acts_by_decoder_norm=True)
    tensors["W_dec"][2] = 0
    save_file(tensors, tmp_path / "s" / "sae_weights.safetensors")
    encoding = SparseDictionary.load(tmp_path / "s")(rows())
    assert encoding.reconstruction.isfinite().all()
    assert (encoding.latents.dense()[:, 2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_saelens_half_precision_files_become_float32(tmp_path, dtype):
    config, tensors = sae_folder(tmp_path / "s", "jumprelu", dtype=dtype)
    dictionary = SparseDictionary.load(tmp_path / "s")
    assert {v.dtype for v in dictionary.state_dict().values()} == {torch.float32}
    assert torch.equal(dictionary.nonlinearity.threshold.data, tensors["threshold"])
    torch.testing.assert_close(dictionary.encode(rows()).dense(), owner(config, tensors, rows())[0], rtol=1e-6, atol=1e-6)


def test_saelens_sparsity_comes_along(tmp_path):
    sae_folder(tmp_path / "s", "standard")
    save_file({"sparsity": torch.linspace(-9, -1, F)}, tmp_path / "s" / "sparsity.safetensors")
    assert SparseDictionary.load(tmp_path / "s").provenance["log10_firing_rate"][:2] == [-9, -8.1111]
    with pytest.raises(FileExistsError, match=r"sparsity.safetensors"):
        make().save(tmp_path / "s", "saelens")


# SAELens: our writer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sigmas())
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("n_latents", [F, D])
def test_saelens_round_trip_in_eval_mode(tmp_path, name, centred, n_latents):
    dictionary = make(name, centred=centred, n_latents=n_latents)
    dictionary.save(tmp_path / "s", "saelens")
    loaded = SparseDictionary.load(tmp_path / "s")
    same_function(dictionary, loaded, rows(), rtol=0, atol=0)
    config = json.loads((tmp_path / "s" / "cfg.json").read_text())
    assert config["metadata"]["sae_lens_version"] == "6.0.0"
    assert config["metadata"]["sae_lens_training_version"] is None
    assert loaded.provenance["library"] == "sdl_explorer"
    if name == "jumprelu":
        assert loaded.nonlinearity.bandwidth == 0.05


@pytest.mark.parametrize("name", ["relu", "jumprelu", "batchtopk"])
@pytest.mark.parametrize("d_out", [D, D + 2])
def test_saelens_transcoders(tmp_path, name, d_out):
    dictionary = make(name, d_out=d_out, centred=d_out == D)
    dictionary.provenance = {"kind": "transcoder"}
    dictionary.save(tmp_path / "s", "saelens")
    config = json.loads((tmp_path / "s" / "cfg.json").read_text())
    assert config["architecture"] == ("transcoder" if name == "relu" else "jumprelu_transcoder")
    assert config["apply_b_dec_to_input"] is False
    assert config["d_out"] == d_out
    same_function(dictionary, SparseDictionary.load(tmp_path / "s"), rows(), rtol=1e-5, atol=1e-5)


def test_saelens_metadata_survives(tmp_path):
    _, tensors = sae_folder(tmp_path / "a", "jumprelu", reshape_activations="hook_z")
    dictionary = SparseDictionary.load(tmp_path / "a")
    dictionary.save(tmp_path / "b")  # through the native form as well
    SparseDictionary.load(tmp_path / "b").save(tmp_path / "c", "saelens")
    config = json.loads((tmp_path / "c" / "cfg.json").read_text())
    assert config["metadata"].pop("sdl_explorer")["nonlinearity"] == "JumpRectified"
    assert config["metadata"] == {
        "sae_lens_version": "6.54.12",
        "sae_lens_training_version": "6.2.0",
        "hook_name": "blocks.4",
        "odd key": [1],
    }
    assert config["reshape_activations"] == "hook_z"
    for name, value in native.read_tensors(tmp_path / "c" / "sae_weights.safetensors")[0].items():
        assert torch.equal(value, tensors[name]), name
    assert SparseDictionary.load(tmp_path / "c").provenance["library"] == "sae_lens"


def test_what_saelens_cannot_hold_is_refused(tmp_path):
    crosscoder = make()
    crosscoder.provenance = {"kind": "crosscoder"}
    negative = make("jumprelu")
    negative.nonlinearity.threshold.data[0] = -1
    function = SparseDictionary(torch.randn(F, D), torch.randn(F, D), nonlinearity=torch.tanh)
    for dictionary, message in (
        (make("topk", d_out=D + 1), "no topk transcoder"),
        (crosscoder, "no crosscoder"),
        (negative, "negative"),
        (function, "Pointwise"),
    ):
        with pytest.raises(ValueError, match=message):
            dictionary.save(tmp_path / "s", "saelens")
    assert list(tmp_path.iterdir()) == []


# rewrites ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sigmas())
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("s", [7.3, 0.1])
def test_scaled_is_exact(name, centred, s):
    dictionary, x = make(name, centred=centred), rows() / s
    raw = scaled(dictionary, s)
    with torch.no_grad():
        codes, expected = dictionary.encode(x * s).dense(), dictionary(x * s).reconstruction
        assert (codes > 0).any()
        torch.testing.assert_close(raw.encode(x).dense(), codes, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(raw(x).reconstruction * s, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(raw.b_enc, dictionary.b_enc)


@pytest.mark.parametrize("name", sigmas())
def test_uncentred_is_exact(name):
    dictionary = make(name, centred=True)
    same_function(dictionary, uncentred(dictionary), rows(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("s", [0, -1.0, float("inf"), float("nan")])
def test_scaled_needs_a_positive_factor(s):
    with pytest.raises(ValueError, match="positive finite"):
        scaled(make(), s)
