"""The notebooks run from top to bottom, at small size, and say what their text says."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FACTS = {
    "01_first_look": """
        assert session.step == 400 and session.head == before, session
        kinds = [c.kind for c in session.commits]
        assert {"start", "settings", "run", "resample", "anchor"} <= set(kinds), kinds
        assert health.n_dead >= 1 and len(plan.latents) >= 1
        assert control.n == 5 and control.sham and control.difference("unexplained_variance").high < 0
        assert (found.decoder[worst] > 0.95).all() and found.recovery(side="decoder") > found.recovery(side="encoder")
        assert found.anchored_features.sum() == 2
        assert slider.value == session.lr == 3e-3
        slider.value = 1e-3
        assert session.lr == 1e-3 and session.stale
        session.lr = 1e-2
        assert slider.value == 1e-2
        assert explorer.selection and explorer.state.primary_latent in explorer.selection
    """,
    "02_real_activations": """
        assert source.width_in == 384 and 7_000 < source.n < 11_000 and source.split_by == "document"
        assert session.step == 400 and {"anchor", "resample"} <= {c.kind for c in session.commits}
        assert health.unexplained_variance < 0.4 and round(health.l0) == 16
        assert len(silent) >= 10 and (~health.alive).sum() < 0.7 * len(silent)
        assert len(pure) == 6 and all(len(set(tokens(i, "top"))) == 1 for i in pure)
        assert explorer.selection == tuple(mixed)
        assert (session.find(align, anchors=anchors).decoder > found.decoder + 0.1).all()
        assert (loaded.W_dec - session.dictionary.W_dec).abs().max() < 1e-5
        assert again.preflight.verdict == "fits" and again.step == 50
    """,
}
pytestmark = [pytest.mark.notebook, pytest.mark.timeout(400)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_its_facts_hold(path, tmp_path, monkeypatch):
    pytest.importorskip("transformers" if "real" in path.stem else "ipywidgets")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(path, 4)
    facts = "\n".join(line.strip() for line in FACTS[path.stem].strip().splitlines())
    notebook.cells.append(nbformat.v4.new_code_cell(facts + "\nprint('the facts hold')"))
    NotebookClient(notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "the facts hold" in notebook.cells[-1].outputs[-1].text
    shown = [output.data for cell in code for output in cell.outputs if output.output_type in ("execute_result", "display_data")]
    assert any("Explorer(" in data.get("text/plain", "") and "text/html" in data for data in shown)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_short_asks_questions_and_holds_no_outputs(path):
    cells = nbformat.read(path, 4).cells
    assert len(cells) <= 25
    assert "?" in cells[0].source.splitlines()[0]
    for cell in cells:
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 12, cell.source
            assert not cell.outputs and cell.execution_count is None
        else:
            assert re.match(r"#{1,2} .*\?$", cell.source.splitlines()[0]), cell.source


def test_the_readme_names_each_notebook():
    readme = (ROOT / "README.md").read_text()
    assert len(NOTEBOOKS) == 2
    assert all(f"notebooks/{path.name}" in readme for path in NOTEBOOKS)
