"""ExplorerState: validation, one undo per user action, and a saved form that survives changed defaults."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from sdl_explorer.state import HISTORY, ExplorerState, Filter, keep, matched_feature, matched_latent, strictest, worst_pair


def test_values_become_immutable_tuples_without_repeats():
    state = ExplorerState()
    state.selected_latents = [3, np.int64(1), 3]
    assert state.selected_latents == (3, 1)
    assert all(type(i) is int for i in state.selected_latents)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("selected_latents", [-1]),
        ("selected_latents", [1.5]),
        ("selected_latents", [True]),
        ("selected_latents", [10]),
        ("primary_latent", 10),
        ("primary_feature", 4),
        ("page", "Loss"),
        ("tau", 1.5),
        ("filters", [("status", "~", "dead")]),
        ("compare", ["a", "b", "c"]),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(name, value):
    state = ExplorerState(n_latents=10, n_features=4, selected_latents=[2])
    before = state.to_dict()
    with pytest.raises(ValueError):
        setattr(state, name, value)
    assert state.to_dict() == before
    assert not state.can_undo


def test_an_id_beyond_the_dictionary_names_the_limit():
    with pytest.raises(ValueError, match="latent 96 does not exist; there are 96"):
        ExplorerState(n_latents=96, selected_latents=[96])


def test_one_user_action_is_one_undo():
    state = ExplorerState()
    state.param.update(selected_latents=[1, 2], primary_latent=1, page="Alignment")
    state.tau = 0.8
    state.undo()
    assert (state.tau, state.page) == (0.95, "Alignment")
    state.undo()
    assert (state.selected_latents, state.primary_latent, state.page) == ((), None, "Overview")
    assert not state.can_undo
    state.redo()
    state.redo()
    assert (state.selected_latents, state.tau) == ((1, 2), 0.8)


def test_a_new_action_ends_redo_and_history_is_bounded():
    state = ExplorerState()
    for i in range(HISTORY + 20):
        state.primary_latent = i
    for _ in range(HISTORY + 20):
        state.undo()
    assert state.primary_latent == 19
    state.primary_latent = 5
    assert not state.can_redo


def test_theme_is_no_view_action():
    state = ExplorerState()
    state.theme = "dark"
    assert not state.can_undo


def test_saved_state_is_json_whole_and_opens_again():
    state = ExplorerState(selected_latents=[4, 2], primary_latent=4, filters=[("status", "==", "dead")], compare=("a", "b"), tau=0.5)
    saved = json.loads(json.dumps(state.to_dict()))
    assert saved["v"] == 1
    assert set(saved) == {"v", *ExplorerState.KEPT}
    other = ExplorerState()
    assert other.restore(saved) == ()
    assert other.to_dict() == state.to_dict()


def test_restoring_is_one_action_and_says_what_it_dropped():
    state = ExplorerState(n_latents=10)
    dropped = state.restore({"v": 2, "lens": 3, "selected_latents": [50], "tau": 0.7, "page": "Compare"})
    assert set(dropped) == {"lens", "selected_latents"}
    assert (state.tau, state.page) == (0.7, "Compare")
    state.undo()
    assert (state.tau, state.page) == (0.95, "Overview")


def test_filters_keep_rows_and_name_the_strictest():
    table = pd.DataFrame({"status": ["dead", "mono", "mono"], "firing_rate": [0.0, 0.1, 0.2]})
    filters = ExplorerState(filters=[("status", "==", "mono"), ("firing_rate", ">", 0.15)]).filters
    assert keep(filters, table).tolist() == [False, False, True]
    assert strictest(filters, table) == (Filter("firing_rate", ">", 0.15), 2)
    assert keep([Filter("not computed yet", ">", 1)], table).all()


def test_links_follow_the_decoder_match():
    alignment = SimpleNamespace(
        decoder=np.array([0.9, 0.2, 0.5]),
        decoder_latent=np.array([2, 0, -1]),
        per_latent=SimpleNamespace(decoder_feature=np.array([1, -1, 0])),
    )
    assert [matched_feature(i, alignment) for i in (0, 1, 2, None)] == [1, None, 0, None]
    assert [matched_latent(i, alignment) for i in (0, 2, None)] == [2, None, None]
    assert worst_pair(alignment) == (1, 0)
    assert worst_pair(None) == (None, None)
    assert matched_feature(0, None) is None
