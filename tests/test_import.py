"""The package's face: every public name is there, and importing it is cheap."""

import subprocess
import sys

import pytest

import sdl_explorer

HEAVY = ("torch", "panel", "panel_material_ui", "holoviews", "bokeh", "datashader", "sklearn", "transformers", "matplotlib")
GUI = ("panel", "panel_material_ui", "holoviews", "bokeh", "datashader", "ipywidgets")
ENGINE = [name for name, module in sdl_explorer._HOME.items() if ".app." not in module]


def modules_after(*statements: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after these statements."""
    program = "; ".join(["import sys", *statements, "print(*{name.partition('.')[0] for name in sys.modules})"])
    return set(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split())


def test_import_loads_nothing_heavy():
    assert not modules_after("import sdl_explorer").intersection(HEAVY)


def test_library_loads_no_gui():
    loaded = modules_after(f"from sdl_explorer import {', '.join(ENGINE)}")
    assert "torch" in loaded
    assert not loaded.intersection(GUI)


@pytest.mark.parametrize("name", sdl_explorer.__all__)
def test_public_name_resolves(name):
    assert getattr(sdl_explorer, name) is not None
    assert name in dir(sdl_explorer)


def test_contract_names_are_exported():
    contract = """explore Session Explorer Activations Truth Anchors LinearBench HierarchyBench Stored capture SparseDictionary
        TopK BatchTopK ReLU JumpReLU Resample Anchor Release check_health align find_examples __version__"""
    assert set(contract.split()) <= set(sdl_explorer.__all__)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'align_all'.*LinearBench"):
        _ = sdl_explorer.align_all
