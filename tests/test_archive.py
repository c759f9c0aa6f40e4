"""What a run folder holds beside its commits comes back."""

import numpy as np
import torch

from sdl_explorer import Anchors, HierarchyBench, Session, SparseDictionary, Stored, TopK
from sdl_explorer.data.sources import stream


def test_preflight_anchors_and_the_last_control_come_back(tmp_path):
    bench = HierarchyBench()
    rows = bench.sample(600, stream("archive"))
    W = rows.truth.input_features
    anchors = Anchors.from_rows(W[:3], names=("a", "b", "c"))
    with Session(Stored(rows.inputs), dictionary=SparseDictionary(W, W), batch_size=64, anchors=anchors) as session:
        session.resample([0])
        session.save(tmp_path / "run")
        control = session.control(3, runs=2)
    with Session.open(tmp_path / "run") as opened:
        assert opened.preflight == session.preflight and opened.preflight.stamp.startswith("Preflight on")
        assert opened.anchors.names == anchors.names and torch.equal(opened.anchors.inputs, anchors.inputs)
        again = opened.last_control
    assert (again.intervention, again.n_steps, again.primary, again.before) == ("resample", 3, control.primary, control.before)
    for arm in ("treated", "untreated", "sham"):
        assert {k: v.tolist() for k, v in getattr(again, arm).items()} == {k: v.tolist() for k, v in getattr(control, arm).items()}
    assert again.difference("mse") == control.difference("mse")


def test_a_run_without_them_has_none(tmp_path):
    with Session(HierarchyBench(), TopK(k=2), n_latents=8) as session:
        session.save(tmp_path / "run")
    with Session.open(tmp_path / "run") as opened:
        assert opened.preflight is None and opened.anchors is None and opened.last_control is None
        assert np.isfinite(opened.dictionary.W_enc.numpy()).all()
