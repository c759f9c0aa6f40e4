"""The published tables and figures as commands: whole on a tiny bench, true where the answer is known."""

import json
import re

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from sdl_explorer.cli import app
from sdl_explorer.experiments import anchoring, cells, figures, tables
from sdl_explorer.experiments.figures import antipodal, fig4
from sdl_explorer.experiments.reproduce import NAMES, reproduce
from sdl_explorer.experiments.tables import SIZES, TABLES, Size

TINY = Size(20, 30, 1.0, 40, 6, 32, 1e-2, 2)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(SIZES, "small", TINY)
    monkeypatch.setattr(cells, "ROWS", 300)
    monkeypatch.setattr(figures, "ROWS", 300)
    monkeypatch.setattr(figures, "SEEDS", (0, 1))


@pytest.mark.slow
def test_table1_by_one_command(tiny, tmp_path):
    outcome = CliRunner().invoke(app, ["reproduce", "table1", "--folder", str(tmp_path), "--device", "cpu"])
    assert outcome.exit_code == 0, outcome.output
    table = pd.read_csv(tmp_path / "table1.csv")
    assert len(table) == 21 and table["failed"].isna().all()
    assert table.loc[table["row"] == "TopK", "M_GT published"].round(6).tolist() == [0.849, 0.8763]
    assert {"M_GT encoder", "M_GT decoder", "M_GT response", "unexplained variance", "L0", "dead"} <= set(table.columns)
    realigned = table["row"].str.endswith(" + realign")
    assert set(table.loc[~realigned, "M_GT verdict"]) <= {"reproduced", "differs", "contradicts itself"}
    assert realigned.sum() == 7 and set(table.loc[realigned, "M_GT verdict"]) == {"not specified"}
    assert table.loc[table["row"] == "Crosscoder", "M_GT verdict"].tolist() == ["contradicts itself"] * 2
    manifest = json.loads((tmp_path / "table1.json").read_text())
    assert len(manifest["cells"]) == 21 and manifest["cells"][1]["n_anchors"] == 2
    assert [cell.get("pull", 0) > 0 for cell in manifest["cells"]] == realigned.tolist()
    page = (tmp_path / "table1.md").read_text()
    assert "this is not the published size" in page and "TopK(k=1)" in page
    figure = (tmp_path / "table1.html").read_text()
    assert "Bokeh" in figure and not re.search(r"<(script|link rel=.stylesheet.)[^>]*(src|href)=.http", figure)  # no network is needed


def test_every_table_asks_for_what_was_printed():
    for name, table in TABLES.items():
        for size in SIZES.values():
            made = {(cell.labels["row"], cell.labels["anchored"]) for cell in table.cells(size)}
            ours = {(f"{row} + realign", False) for row, _ in table.printed} if name == "table1" else set()
            assert made == set(table.printed) | ours, name
            names = [cell.name for cell in table.cells(size)]
            assert len(set(names)) == len(names)


def test_the_paper_size_is_the_papers():
    cells_of = {name: TABLES[name].cells(SIZES["paper"]) for name in TABLES}
    first = cells_of["table1"][0].source
    assert (first.n_features, first.d_in, first.sparsity, first.max_interference) == (1000, 768, 0.99, 0.1)
    assert {cell.n_latents for cell in cells_of["table1"]} == {16_000}
    assert [c.source.n_features for c in cells_of["table4"]][::2] == list(range(800, 1500, 100))
    assert [c.method.k for c in cells_of["table7"]][::2] == [32, 64, 128]
    assert [round(1 - c.source.sparsity, 6) for c in cells_of["table6"]][:6:2] == [0.005, 0.01, 0.1]
    assert {cell.n_anchors for cell in cells_of["table5"]} == {0, 100}


def test_figure_4_has_no_loss_and_no_recovery(tmp_path):
    table = fig4("small", tmp_path, "cpu", lambda text: None).table.set_index("A")
    assert table["loss"].max() < 1e-12 and table["largest residual of a feature"].max() < 1e-5
    assert table.loc["rotation by 45°", "M_IP encoder"] == pytest.approx(2**-0.5, abs=1e-6)
    assert (table[["M_GT encoder", "M_GT decoder"]] == 0).all().all()


def test_the_antipodal_dictionary_reconstructs_anything():
    mixing = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)) + 2 * torch.eye(3)
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(antipodal(mixing)(rows).reconstruction, rows, rtol=1e-4, atol=1e-4)


def test_figure_6_is_table_1_at_every_threshold(tiny, tmp_path, monkeypatch):
    few = [cell for cell in TABLES["table1"].cells(TINY) if cell.labels["row"] == "TopK"]
    monkeypatch.setitem(TABLES, "table1", TABLES["table1"]._replace(cells=lambda size: few))
    table = reproduce("fig6", "small", tmp_path, "cpu").table
    one = table[(table["model"] == "TopK") & (table["side"] == "decoder") & (table["scoring"] == "heldout")].sort_values("tau")
    assert one["share"].is_monotonic_decreasing and one["share"].iloc[0] == 1.0
    kept = json.loads((tmp_path / "runs" / few[0].name / "result.json").read_text())["numbers"]
    assert one.loc[(one["tau"] - 0.95).abs().idxmin(), "share"] == pytest.approx(kept["M_GT decoder"])


@pytest.mark.slow
def test_figure_7_branches_from_one_state(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "small", TINY._replace(steps=40))
    monkeypatch.setattr(figures, "minilm_rows", lambda folder, rows: tables.bench(TINY))  # the other data are read elsewhere
    table = reproduce("fig7", "small", tmp_path, "cpu").table
    for _, run in table.groupby(["data", "seed"]):
        off, on = (run[run["arm"] == arm].set_index("step") for arm in ("off", "on"))
        assert off["loss"].iloc[:20].equals(on["loss"].iloc[:20])  # the same until the branch
        assert len(off) == len(on) == 40
    ends = json.loads((tmp_path / "runs" / "bench-0.json").read_text())["ends"]
    assert ends["off"]["resampled"] == 0
    monkeypatch.setattr(figures, "_resampled", lambda *_: pytest.fail("a finished run was made again"))
    assert reproduce("fig7", "small", tmp_path, "cpu").table.equals(table)


@pytest.fixture
def digits(tmp_path):
    """Scikit-learn's digits as a folder of images, and a tiny vision transformer with random weights."""
    transformers = pytest.importorskip("transformers")
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    for i in range(120):
        folder = tmp_path / "images" / f"digit {data.target[i]}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((data.images[i] * 15.9).astype("uint8")).convert("RGB").save(folder / f"{i}.png")
    size = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    transformers.ViTModel(transformers.ViTConfig(**size)).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    return tmp_path / "images", tmp_path / "vit"


@pytest.mark.slow
def test_anchoring_on_images(digits, tmp_path, monkeypatch):
    images, model = digits
    small = {"rows": None, "n_latents": 24, "k": 2, "steps": 4, "batch_size": 32}
    monkeypatch.setattr(anchoring, "sizes", lambda size: small)
    monkeypatch.setattr(anchoring, "SEEDS", (0, 1))
    monkeypatch.setattr(anchoring, "ENOUGH", 5)
    table = reproduce("anchoring", "small", tmp_path / "out", "cpu", images=images, model=str(model)).table
    assert len(table) == 2 * 2 * 3
    assert table[["M_IP heldout", "M_IP heldout_strict", "M_IP all"]].notna().all().all()
    assert (table["M_IP heldout"] >= table["M_IP heldout_strict"] - 1e-6).all()
    alike = table[table["arm"] == "none"]  # without anchors there is nothing to leave out
    assert (alike["M_IP heldout"] - alike["M_IP heldout_strict"]).abs().max() < 1e-6


def test_what_is_unknown_or_does_not_belong_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'table2' at 'small' is unknown"):
        reproduce("table2", "small", tmp_path)
    with pytest.raises(ValueError, match="images belongs to anchoring"):
        reproduce("fig4", "small", tmp_path, images="somewhere")
    with pytest.raises(ValueError, match="--images needs --model"):
        reproduce("anchoring", "small", tmp_path, images=tmp_path)
    assert {"table1", "table-v2", "table4", "table5", "table6", "table7", "fig4", "fig6", "fig7", "anchoring"} == set(NAMES)
