"""One lane thread per device and process: it alone touches the tensors of all sessions, in turn.

Work is an iterator. Commands run whole, between two steps; runs and jobs advance in slices of at most 50 ms or
one step each, round robin, so that nobody starves behind a long run.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import torch

SLICE = 0.05


class Task:
    """An iterator in a lane and the future of what it returns."""

    def __init__(self, owner: object, work: Iterator[Any]):
        self.owner, self.work, self.future = owner, work, Future()

    def advance(self, until: float) -> bool:
        """Run until the clock or the end; True when it is over."""
        try:
            while True:
                next(self.work)
                if time.perf_counter() >= until:
                    return False
        except StopIteration as end:
            self.future.set_result(end.value)
        except BaseException as error:  # the waiting caller gets it; the lane must outlive any task
            self.future.set_exception(error)
        return True


class Lane:
    """The FIFO of commands and the ring of running work of one device."""

    def __init__(self, name: str):
        self._wake = threading.Condition()
        self._commands: deque[Task] = deque()
        self._running: deque[Task] = deque()
        self._thread = threading.Thread(target=self._loop, name=f"sdl-lane-{name}", daemon=True)
        self._thread.start()

    def call(self, owner: object, command: Callable[[], Any]) -> Any:
        """Run a command between two steps and wait for its result; from the lane itself, run it now."""
        if threading.current_thread() is self._thread:
            return command()
        return self._submit(self._commands, Task(owner, _once(command))).result()

    def start(self, owner: object, work: Iterator[Any]) -> Future:
        """Advance `work` in slices until it ends."""
        return self._submit(self._running, Task(owner, work))

    def ahead(self, owner: object) -> int:
        """How many other owners have work in the ring."""
        with self._wake:
            return len({id(task.owner) for task in self._running if task.owner is not owner})

    def _submit(self, queue: deque[Task], task: Task) -> Future:
        with self._wake:
            queue.append(task)
            self._wake.notify()
        return task.future

    def _loop(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._commands or self._running)
                task = self._commands.popleft() if self._commands else self._running[0]
                is_command = task not in self._running
            over = task.advance(float("inf") if is_command else time.perf_counter() + SLICE)
            if not is_command:
                with self._wake:
                    self._running.popleft()
                    if not over:
                        self._running.append(task)
            del task  # an idle lane must not keep the last session alive


def _once(command: Callable[[], Any]) -> Iterator[Any]:
    return command()
    yield  # makes this a generator that returns the command's value


_lanes: dict[str, Lane] = {}
_guard = threading.Lock()


def lane_of(device: str) -> Lane:
    """The lane of a device, started when first asked for; "cuda" and "cuda:0" share one."""
    device = str(torch.empty(0, device=device).device)
    with _guard:
        if device not in _lanes:
            _lanes[device] = Lane(device)
        return _lanes[device]
