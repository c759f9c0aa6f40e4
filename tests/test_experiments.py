"""Grids of runs: cells are made once, resumed, judged alike; failures are named; published numbers get a verdict."""

import numpy as np
import pandas as pd
import pytest
import torch

from sdl_explorer import LinearBench, Session, TopK
from sdl_explorer.experiments import cells as cells_module
from sdl_explorer.experiments.cells import Cell, draw_anchors, measure, run_cell, run_cells, summarise
from sdl_explorer.experiments.published import TABLE1, TABLE4, TABLE6, verdict
from sdl_explorer.experiments.sweep import sweep, sweep_file


@pytest.fixture(autouse=True)
def few_judge_rows(monkeypatch):
    monkeypatch.setattr(cells_module, "ROWS", 500)


def bench(**changed):
    return LinearBench(**{"n_features": 12, "d_in": 10, "sparsity": 0.9, "max_interference": 0.5} | changed)


def cell(**changed):
    settings = {"labels": {"row": "TopK", "anchored": False}, "source": bench(), "method": TopK(k=2), "n_latents": 24, "steps": 30}
    return Cell(**settings | {"settings": {"batch_size": 32}} | changed)


def test_a_cell_is_trained_once_and_an_interrupted_one_gives_the_same_numbers(tmp_path, monkeypatch):
    whole = run_cell(cell(), tmp_path / "whole", "cpu")
    run_cell(cell(steps=12), tmp_path / "cut", "cpu")
    (tmp_path / "cut" / "result.json").unlink()
    assert run_cell(cell(), tmp_path / "cut", "cpu") == whole
    monkeypatch.setattr(Session, "train", lambda *_: pytest.fail("a finished cell was trained again"))
    assert run_cell(cell(), tmp_path / "whole", "cpu") == whole


def test_a_folder_of_other_settings_is_refused(tmp_path):
    run_cell(cell(), tmp_path, "cpu")
    with pytest.raises(ValueError, match="other settings"):
        run_cell(cell(steps=31), tmp_path, "cpu")


def test_anchors_hold_from_the_first_step_and_are_left_out_of_the_numbers(tmp_path):
    anchored = cell(n_anchors=3, steps=150, anchor_weight=10.0, settings={"batch_size": 32, "lr": 0.03, "warmup_steps": 0})
    run_cell(anchored, tmp_path, "cpu")
    with Session.open(tmp_path / "run", device="cpu") as session:
        pins = session.pins
        assert pins.latents.tolist() == [0, 1, 2]
        rows = torch.nn.functional.normalize(session.dictionary.W_dec[:3], dim=1)
        assert (rows * draw_anchors(anchored).targets).sum(dim=1).min() > 0.95
        found = session.find(cells_module.align, n=500)
        assert found.anchored_features.sum() == 3
        numbers = measure(session)
    assert numbers["M_GT decoder"] == found.recovery(scoring="heldout")
    assert numbers["M_IP as published"] == pytest.approx(np.abs(found.scores("encoder", "heldout", signed=False)).mean())


def test_a_failing_cell_is_named_and_the_others_go_on(tmp_path):
    table = run_cells([cell(labels={"k": 99}, method=TopK(k=99)), cell(labels={"k": 2})], tmp_path, "cpu")
    assert table["failed"].tolist() == ["ValueError: TopK: k is 99 and n_latents 24; k can be at most n_latents.", ""]
    assert table["unexplained variance"].notna().tolist() == [False, True]


def test_summary_is_mean_and_interval_over_seeds():
    table = pd.DataFrame({"k": [1, 1, 1, 2], "seed": [0, 1, 2, 0], "failed": [""] * 4, "x": [1.0, 2.0, 3.0, 5.0]})
    summary = summarise(table, ["k"]).set_index("k")
    assert summary.loc[1, "x"] == 2.0
    assert summary.loc[1, "x ±"] == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)  # t(0.975, 2) * sd / sqrt(n)
    assert summary.loc[2, "seeds"] == 1 and np.isnan(summary.loc[2, "x ±"])
    assert cells_module.readable(summary.reset_index())["x"].tolist() == ["2 ± 2.5", "5"]


def test_sweep_crosses_the_grid_and_leaves_the_session_alone(tmp_path):
    session = Session(bench(), TopK(k=2), n_latents=24, device="cpu", batch_size=32)
    table = sweep(session, {"method.k": [1, 3], "n_latents": [12, 16]}, seeds=[0, 1], steps=10, folder=tmp_path)
    assert len(table) == 8 and set(table["failed"]) == {""}
    assert table.groupby("method.k")["L0"].max().tolist() == sorted(table.groupby("method.k")["L0"].max())
    assert session.step == 0 and session.method.k == 2
    with Session.open(tmp_path / "3_12_seed-1" / "run", device="cpu") as one:
        assert (one.method.k, one.n_latents, one.seed, one.step, one.batch_size) == (3, 12, 1, 10, 32)
    with pytest.raises(ValueError, match=r"no setting 'method\.kk'.*method\.k"):
        sweep(session, {"method.kk": [1]}, folder=tmp_path)


def test_sweep_file_writes_its_tables(tmp_path):
    file = tmp_path / "grid.toml"
    file.write_text(
        "steps = 5\nseeds = [0, 1]\nn_latents = 16\n[source]\nn_features = 12\nd_in = 10\nmax_interference = 0.5\n"
        "[method]\nk = 2\n[grid]\nlr = [0.001, 0.01]\n"
    )
    table, summary = sweep_file(file, device="cpu")
    assert len(table) == 4 and summary["seeds"].tolist() == [2, 2]
    assert pd.read_csv(tmp_path / "grid" / "summary.csv")["lr"].tolist() == [0.001, 0.01]


def test_verdicts():
    assert verdict(0.876, 0.88, "M_GT") == "reproduced"
    assert verdict(0.0, 0.5, "M_GT") == "differs"
    assert verdict(None, 0.5, "M_IP") == "not specified"
    assert verdict(0.5, 0.5, "M_IP", "why") == "contradicts itself"


def test_published_numbers_are_those_of_the_paper():
    """Spot checks, and the arithmetic behind two of the contradictions."""
    assert round(TABLE1["BatchTopK", True].M_GT, 6) == 0.8938 and round(TABLE1["Transcoder", False].M_GT, 6) == 0.2360
    crosscoder = TABLE1["Crosscoder", False].M_GT * 1000
    assert abs(crosscoder - round(crosscoder)) > 0.1 and TABLE1["Crosscoder", False].contradicted
    assert all((TABLE4[n, True].M_GT * n) == pytest.approx(round(TABLE4[n, True].M_GT * n), abs=0.06) for n in range(800, 1500, 100))
    for method in ("ReLU", "JumpReLU", "TopK", "BatchTopK", "Matryoshka"):
        assert TABLE6[(method, 0.01), True][:2] == TABLE1[method, True][:2]
