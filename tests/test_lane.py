"""The lane: commands between two steps, running work in turn, and nobody kept alive or starved."""

import gc
import itertools
import threading
import time
import weakref

import pytest
import torch

from sdl_explorer.training.lane import SLICE, Lane, lane_of


@pytest.fixture(scope="module")
def lane() -> Lane:
    return Lane("test")


def counting(log, name, n, seconds=0.0):
    for _ in range(n):
        log.append(name)
        time.sleep(seconds)
        yield
    return (name, n)


def test_work_returns_its_value_or_its_error(lane):
    assert lane.start(object(), counting([], "a", 3)).result(5) == ("a", 3)
    assert lane.call(object(), lambda: 42) == 42
    with pytest.raises(KeyError, match="nothing"):
        lane.call(object(), lambda: {}["nothing"])

    def failing():
        yield
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lane.start(object(), failing()).result(5)
    assert lane.call(object(), lambda: "alive") == "alive"


def test_all_work_is_done_by_one_thread_and_calls_from_it_run_at_once(lane):
    threads = {lane.call(object(), threading.current_thread) for _ in range(3)}
    assert threads != {threading.current_thread()} and len(threads) == 1
    assert lane.call(object(), lambda: lane.call(object(), lambda: "nested")) == "nested"


def test_running_work_advances_in_turn_in_slices(lane):
    log, a, b = [], object(), object()
    futures = [lane.start(owner, counting(log, name, 40, SLICE / 10)) for owner, name in ((a, "a"), (b, "b"))]
    assert lane.ahead(a) <= 1
    for future in futures:
        future.result(20)
    turns = [log[0], *(y for x, y in itertools.pairwise(log) if x != y)]
    assert len(turns) >= 6, "they took turns"
    longest = max(len(list(turn)) for _, turn in itertools.groupby(log))
    assert longest <= 25, "a slice is about ten of these steps"


def test_a_command_runs_between_two_steps_of_long_work(lane):
    log, stop = [], threading.Event()

    def long():
        while not stop.is_set():
            log.append("step")
            yield

    future = lane.start(object(), long())
    waits = []
    for _ in range(5):
        began = time.perf_counter()
        lane.call(object(), lambda: log.append("command"))
        waits.append(time.perf_counter() - began)
    assert not future.done()
    stop.set()
    future.result(5)
    assert log.count("command") == 5 and min(waits) < 10 * SLICE


def test_ahead_counts_other_owners_once(lane):
    gate, mine, others = threading.Event(), object(), [object(), object()]

    def waiting():
        while not gate.is_set():
            yield

    futures = [lane.start(owner, waiting()) for owner in (mine, others[0], others[0], others[1])]
    seen = [lane.call(object(), lambda: lane.ahead(mine)) for _ in range(3)]
    gate.set()
    for future in futures:
        future.result(5)
    assert seen == [2, 2, 2] and lane.ahead(mine) == 0


def test_an_idle_lane_keeps_nobody_alive(lane):
    class Owner:
        pass

    owner = Owner()
    lane.call(owner, lambda: None)
    lane.start(owner, counting([], "a", 2)).result(5)
    gone = weakref.ref(owner)
    del owner
    for _ in range(20):
        gc.collect()
        if gone() is None:
            break
        time.sleep(0.01)
    assert gone() is None


def test_a_device_has_one_lane(device):
    assert lane_of(device) is lane_of(device)
    if device == "cuda":
        assert lane_of("cuda") is lane_of(f"cuda:{torch.cuda.current_device()}") is not lane_of("cpu")
