"""What is known about the model right now: findings computed off the event loop, one job at a time, and how old they are."""

import itertools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

log = logging.getLogger(__name__)
WORKER = "sdlx-findings"
KEPT = 32  # answers to `ask`
REST = 2.0  # while training, pause this many times as long as the last job took


@dataclass(frozen=True)
class Found:
    """One finding, or why there is none, and the step and commit that it was computed on."""

    value: Any
    error: Exception | None
    step: int
    commit: str
    version: int
    serial: int


class Findings:
    """Keeps the newest result per finding, at the model as it is and at commits that are compared with.

    `want` starts what is missing or stale; `collect` takes in what has arrived. Both return at once. A session copies the
    weights between two steps and caches results itself.
    """

    def __init__(self, session):
        self.session = session
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=WORKER)
        self._now: dict[Callable, Found] = {}
        self._at: dict[tuple[Callable, str], Found] = {}
        self._job: Future | None = None
        self._asked: OrderedDict[tuple, Future] = OrderedDict()
        self._waiting: set[tuple] = set()
        self._free_at = 0.0
        self.serial = 0

    def now(self, finding: Callable) -> Found | None:
        return self._now.get(finding)

    def at(self, finding: Callable, commit: str) -> Found | None:
        return self._at.get((finding, commit))

    @property
    def busy(self) -> bool:
        return self._job is not None or bool(self._waiting)

    def want(self, findings, before=(), snapshot=None) -> None:
        """Compute `findings` on the model as it is, and `before` = [(finding, commit id)], if nobody is at it already."""
        if self._job is not None:
            return
        snapshot = snapshot or self.session.snapshot
        stale = [f for f in findings if (known := self._now.get(f)) is None or known.version != snapshot.version]
        missing = [pair for pair in before if pair not in self._at]
        if not stale and not missing:
            return
        fresh = any(self._now.get(f) is None for f in stale)
        if not missing and not fresh and snapshot.running and time.monotonic() < self._free_at:
            return
        self._job = self._pool.submit(self._compute, stale, missing)

    def ask(self, key: tuple, compute: Callable[[], Any], default=None):
        """The value under this key, computed once beside the event loop; `default` until it is there, or where that failed."""
        if key not in self._asked:
            self._asked[key] = self._pool.submit(compute)
            self._waiting.add(key)
            while len(self._asked) > KEPT:
                self._waiting.discard(self._asked.popitem(last=False)[0])
        future = self._asked[key]
        if not future.done():
            return default
        if future.exception() is not None:
            log.warning("%s: %s", key[0], future.exception())
            return default
        return future.result()

    def collect(self) -> bool:
        """True when something has arrived since the last call."""
        arrived = {key for key in self._waiting if self._asked[key].done()}
        self._waiting -= arrived
        if self._job is not None and self._job.done():
            job, self._job = self._job, None
            now, at, seconds = job.result()
            self._now |= {finding: _kept(self._now.get(finding), found) for finding, found in now.items()}
            self._at |= at
            self._free_at = time.monotonic() + REST * seconds
        elif not arrived:
            return False
        self.serial += 1
        return True

    def wait(self, seconds: float) -> bool:
        """Wait this long for what is running, and take in what has arrived; is all of it here?"""
        running = [future for future in (self._job, *(self._asked[key] for key in self._waiting)) if future is not None]
        late = wait(running, timeout=seconds).not_done
        self.collect()
        return not late

    def forget(self) -> None:
        """Another session: nothing is known."""
        self.collect()
        self._now, self._at = {}, {}
        self.serial += 1

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compute(self, stale, missing):
        begun = time.monotonic()
        now = {}
        if stale:
            snapshot, head = self.session.snapshot, self.session.head
            now = self._run(self.session, stale, snapshot.step, head.id, snapshot.version)
        at = {}
        for commit in dict.fromkeys(commit for _, commit in missing):
            wanted = [finding for finding, which in missing if which == commit]
            try:
                with self.session.branch(commit) as twin:
                    found = self._run(twin, wanted, twin.step, commit, -1)
            except Exception as error:
                found = {finding: self._failed(error, 0, commit, -1) for finding in wanted}
            at |= {(finding, commit): one for finding, one in found.items()}
        return now, at, time.monotonic() - begun

    def _run(self, session, findings, step: int, commit: str, version: int) -> dict[Callable, Found]:
        """One pass for all; if that fails, one by one, so that one finding's failure stays its own."""
        try:
            values = session.find(list(findings))
            return {f: Found(value, None, step, commit, version, next(_SERIAL)) for f, value in zip(findings, values, strict=True)}
        except Exception:
            found = {}
            for finding in findings:
                try:
                    found[finding] = Found(session.find(finding), None, step, commit, version, next(_SERIAL))
                except Exception as error:
                    found[finding] = self._failed(error, step, commit, version)
            return found

    @staticmethod
    def _failed(error: Exception, step: int, commit: str, version: int) -> Found:
        return Found(None, error, step, commit, version, next(_SERIAL))


def _kept(former: Found | None, found: Found) -> Found:
    """The same value again (the model has not moved) keeps its serial, so that nothing is drawn twice."""
    same = former is not None and former.error is None and former.value is found.value
    return replace(found, serial=former.serial) if same else found


def in_worker() -> bool:
    """Is this one of our own threads, where no figure may be touched?"""
    return threading.current_thread().name.startswith("sdlx-")


_SERIAL = itertools.count(1)
