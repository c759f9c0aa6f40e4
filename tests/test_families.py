"""Every member of the open families, found by reflection: a new member is tested without another edit."""

import inspect
import sys
from importlib.metadata import EntryPoint
from types import ModuleType

import param
import pytest
import torch

from sdl_explorer import registry
from sdl_explorer.data.activations import Activations
from sdl_explorer.data.sources import PARTS, Source
from sdl_explorer.models.methods import Context, Method
from sdl_explorer.training.interventions import Intervention

NOT_OURS = {"name"}


def ours(family) -> list[type]:
    return [cls for cls in registry.members(family).values() if cls.__module__.startswith("sdl_explorer.")]


def callable_alone(cls) -> bool:
    """Whether the signature asks for nothing."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(p.default is not p.empty or p.kind in kinds for p in inspect.signature(cls).parameters.values())


FAMILIES = [Source, Method, Intervention]
MEMBERS = [cls for family in FAMILIES for cls in ours(family)]
SOURCES = [cls for cls in ours(Source) if callable_alone(cls)]


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_abstract_and_documented(family):
    assert family not in registry.members(family).values()
    assert inspect.getdoc(family)


def test_the_known_members_are_found():
    assert {"TopK", "BatchTopK", "ReLU", "JumpReLU"} <= set(registry.members(Method))
    assert {"LinearBench", "HierarchyBench", "Stored"} <= set(registry.members(Source))
    assert {"Resample", "Anchor", "Release"} <= set(registry.members(Intervention))


@pytest.mark.parametrize("cls", MEMBERS)
def test_member_is_final_documented_and_lives_in_its_family(cls):
    assert cls.__doc__, f"{cls.__name__} has no docstring of its own"
    assert not [other for other in MEMBERS if other is not cls and issubclass(other, cls)], f"{cls.__name__} has members below it"


@pytest.mark.parametrize("cls", MEMBERS)
def test_settings_have_docs_and_numbers_have_bounds(cls):
    """They make tooltips, sliders and validation."""
    for name, setting in cls.param.objects().items():
        if name in NOT_OURS or name.startswith("_"):
            continue
        assert setting.doc, f"{cls.__name__}.{name} has no doc"
        if isinstance(setting, param.Number):
            assert setting.bounds is not None, f"{cls.__name__}.{name} has no bounds"


@pytest.mark.parametrize("cls", ours(Method))
def test_method_needs_no_argument_and_takes_a_step(cls):
    method = cls(**({"k": 2} if "k" in cls.param else {}))
    assert cls() is not None
    dictionary = method.build(d_in=6, d_out=5, n_latents=8, generator=torch.Generator().manual_seed(0))
    batch = Activations(torch.randn(16, 6), torch.randn(16, 5))
    encoding = dictionary(batch.inputs)
    context = Context(step=0, samples_since_fired=torch.zeros(8, dtype=torch.int64), pins=None, generator=torch.Generator())
    terms = method.objective(dictionary, encoding, batch, context)
    total = sum(terms.values())
    assert total.shape == () and total.isfinite()
    total.backward()
    assert dictionary.W_dec.grad is not None and dictionary.W_dec.grad.isfinite().all()
    with torch.no_grad():
        method.after_step(dictionary, encoding, context)


@pytest.mark.parametrize("cls", ours(Method))
def test_loss_is_a_mean_over_the_batch(cls):
    """A batch and the same batch doubled give the same loss."""
    method = cls(**({"k": 2} if "k" in cls.param else {}))
    dictionary = method.build(d_in=6, d_out=6, n_latents=8, generator=torch.Generator().manual_seed(0))
    context = Context(step=0, samples_since_fired=torch.zeros(8, dtype=torch.int64), pins=None, generator=torch.Generator())
    rows = torch.randn(16, 6)
    once, twice = (method.objective(dictionary, dictionary(x), Activations(x, x), context) for x in (rows, torch.cat([rows, rows])))
    for name in once:
        torch.testing.assert_close(twice[name], once[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", ours(Method))
def test_flags_say_what_sigma_does(cls):
    """homogeneous: sigma(a z) = a sigma(z); masks_only: sigma(z)_i is 0 or z_i."""
    method = cls(**({"k": 2} if "k" in cls.param else {}))
    dictionary = method.build(d_in=6, d_out=6, n_latents=8, generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        pre = torch.randn(32, 8)
        sigma = lambda z: _dense(dictionary.nonlinearity(z, inputs=torch.zeros(32, 6), dictionary=dictionary))
        if cls.masks_only:
            assert torch.all((sigma(pre) == 0) | (sigma(pre) == pre))
        if cls.homogeneous:
            torch.testing.assert_close(sigma(3.0 * pre), 3.0 * sigma(pre))


@pytest.mark.parametrize("cls", SOURCES)
def test_source_batches_are_pure_functions(cls):
    source = cls()
    first, again, other = source.batch(3, 4), cls().batch(3, 4), source.batch(3, 4, order=1)
    assert torch.equal(first.inputs, again.inputs) and torch.equal(first.targets, again.targets)
    assert not torch.equal(first.inputs, other.inputs)
    assert first.inputs.shape == (4, source.width_in) and first.targets.shape == (4, source.width_out)
    assert source.fingerprint() == cls().fingerprint() != cls(seed=1).fingerprint()


@pytest.mark.parametrize("cls", SOURCES)
def test_source_parts_are_different_rows(cls):
    source = cls()
    drawn = [source.sample(8, torch.Generator().manual_seed(0), part=part).inputs for part in PARTS]
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert torch.equal(drawn[2], source.sample(8, torch.Generator().manual_seed(0)).inputs)


def test_unknown_member_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'Topk' is no method\. There are: .*TopK"):
        registry.member(Method, "Topk")


def test_entry_points_bring_members_and_a_broken_one_is_named(monkeypatch):
    module = ModuleType("foreign_methods")
    exec("from sdl_explorer.models.methods import Method\nclass Foreign(Method):\n    'A member of another package.'", module.__dict__)
    monkeypatch.setitem(sys.modules, "foreign_methods", module)
    entries = [EntryPoint("a", "foreign_methods", "sdl_explorer.methods"), EntryPoint("b", "not_there", "sdl_explorer.methods")]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries if group == "sdl_explorer.methods" else [])
    monkeypatch.setattr(registry, "_loaded", set())
    with pytest.warns(RuntimeWarning, match=r"not_there.*does not load.*left out"):
        assert "Foreign" in registry.members(Method)
    assert "Foreign" in registry.members(Method)  # and it is told once


def _dense(latents):
    return latents.dense() if hasattr(latents, "dense") else latents
