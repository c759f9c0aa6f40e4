"""What a cell displays: each script and each stylesheet is sent once."""

import threading

import panel as pn
import panel_material_ui as pmui
import pytest
from bokeh.models import ImportedStyleSheet, UIElement
from panel.models.esm import ReactComponent

from sdl_explorer.widgets.arrival import Cell


@pytest.fixture
def inline():
    """As in JupyterLab: everything is in the page, nothing on the internet."""
    before = pn.config.inline
    pn.config.inline = True
    yield
    pn.config.inline = before


def displayed(view):
    cell = Cell(view, threading.RLock())
    (bundle, _) = cell._repr_mimebundle_()
    ((root, *_),) = cell._models.values()
    return bundle["text/html"], root


def scripts(root):
    return [model.esm for model in root.select({"type": ReactComponent}) if model.esm]


def test_a_display_brings_a_script_once_whatever_is_on_it(inline, monkeypatch):
    monkeypatch.setattr(pn.extension, "_loaded", True)
    few, root = displayed(pmui.Button(label="one"))
    many, of_many = displayed(pn.Column(*(pmui.Button(label=f"button {i}") for i in range(20))))
    assert len(scripts(root)) == len(scripts(of_many)) == 1
    assert len(many) < len(few) + 200_000 < 3_000_000


def test_a_display_asks_nobody_for_stylesheets(inline, monkeypatch):
    monkeypatch.setattr(pn.extension, "_loaded", True)
    _, root = displayed(pn.Column(pn.pane.Markdown("words"), pmui.Button(label="one"), pn.widgets.TextInput()))
    sheets = [sheet for model in root.select({"type": UIElement}) for sheet in model.stylesheets]
    assert sheets
    assert not [sheet.url for sheet in sheets if isinstance(sheet, ImportedStyleSheet)]


def test_what_is_added_later_brings_no_script(inline, monkeypatch):
    monkeypatch.setattr(pn.extension, "_loaded", True)
    column = pn.Column(pmui.Button(label="one"))
    _, root = displayed(column)
    column.append(pmui.Button(label="two"))
    assert len(scripts(root)) == 1
    assert len([*root.select({"type": ReactComponent})]) == 4  # the cell, what carries the script, two buttons
