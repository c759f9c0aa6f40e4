"""What a session does in its lane: commands, steps and readers take turns, and whoever looks reads what was published."""

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as StillRunning
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.anchors import Pins, Pulls
from sdl_explorer.data.sources import stream
from sdl_explorer.diagnosis.cached import CachedFindings
from sdl_explorer.diagnosis.compare import Control
from sdl_explorer.diagnosis.preflight import Preflight
from sdl_explorer.diagnosis.theory_seeds import Seeds
from sdl_explorer.labels import LabelStore
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.settings import Settings, count
from sdl_explorer.training.commits import Commit
from sdl_explorer.training.folder import RunLock, read_json, write_json
from sdl_explorer.training.history import History
from sdl_explorer.training.interventions import named_latents
from sdl_explorer.training.lane import lane_of
from sdl_explorer.training.run import SETTINGS, Diverged, settings_from
from sdl_explorer.training.snapshot import Job, Snapshot
from sdl_explorer.training.state import threads_for

PUBLISH_EVERY = 0.15


class Running(Settings):
    """A run in its lane: its facts, and how commands, steps and readers take turns."""

    def _prepare(self, found: Preflight | None) -> None:
        """The moving parts that no file holds."""
        self.preflight = found
        self.pulses: list[Callable[[], None]] = []
        self.last_control: Control | None = None
        self.last_seeds: Seeds | None = None
        self.labels = LabelStore()
        self.folder: Path | None = None
        self._lock: RunLock | None = None
        self._temporary: weakref.finalize | None = None
        self._closed = False
        self._lane = lane_of(self.device)
        self._threads = threads_for(self.source.width_in, self.n_latents, self.batch_size, torch.get_num_threads())
        self._order = 0
        self._stop = threading.Event()
        self._future: Future | None = None
        self._training_now = False
        self._target = 0
        self._copy: tuple[int, dict[str, Any]] | None = None
        self._findings = CachedFindings()
        self._rows: dict[int, Any] = {}
        self._guard = threading.RLock()
        self._starting = threading.Lock()
        self._publishing = threading.Lock()
        self._head_seen = b""
        self.snapshot = Snapshot(n_latents=self.n_latents)

    # facts -----------------------------------------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        """ "sae", "transcoder" or "crosscoder": what the data makes of the model."""
        return self._judge_rows(1).kind

    @property
    def expansion_factor(self) -> float:
        """n_latents / source.width_in"""
        return self.n_latents / self.source.width_in

    @property
    def step(self) -> int:
        self._follow()
        return self._run.state.step

    @property
    def running(self) -> bool:
        return self._training_now

    @property
    def stale(self) -> bool:
        """Settings were changed and no command has written them yet."""
        return self._settings() != self._run.settings

    @property
    def commits(self) -> tuple[Commit, ...]:
        self._follow()
        return tuple(self._run.store)

    @property
    def head(self) -> Commit:
        """The commit that training goes on from."""
        self._follow()
        return self._run._require_head()

    @property
    def version(self) -> int:
        """Grows with every change that a viewer could see."""
        self._follow()
        return self.snapshot.version

    @property
    def history(self) -> History:
        return self._run.recorder.history()

    @property
    def ghosts(self) -> tuple[History, ...]:
        """Curves of branches that were left by a revert."""
        return self._run.ghosts

    @property
    def pins(self) -> Pins | None:
        return self._view()["pins"]

    @property
    def pulls(self) -> Pulls | None:
        """Encoder rows that are pulled to measured directions; see `Realign`."""
        self._follow()
        return self._run.state.pulls

    @property
    def writable(self) -> bool:
        return not self._closed and (self._lock is None or self._lock.held)

    @property
    def writer(self) -> str:
        """Who writes the run folder."""
        return "this session" if self._lock is None else self._lock.writer

    @property
    def disk_used(self) -> int:
        """Bytes that the commits take; `budget` limits them."""
        return self._run.store.size

    @property
    def dictionary(self) -> SparseDictionary:
        """A detached copy in eval mode, made between two steps, once a version."""
        return self._view()["dictionary"]

    # in the lane -----------------------------------------------------------------------------------------------------

    def _call(self, command: Callable[[], Any]) -> Any:
        def whole() -> Any:
            self._set_threads()
            result = command()
            self._publish()
            return result

        return self._lane.call(self, whole)

    @contextmanager
    def _job(self, name: str) -> Iterator[Callable[[float], None]]:
        """Long work beside training: `tell(done)` publishes how far it is, and stop() ends it."""
        if not self.running:
            self._stop.clear()
        try:
            yield lambda done: self._note({"job": Job(name, done)})
        finally:
            self._note({"job": None})

    def _drain(self, work: Iterator[None]) -> Any:
        """Work in turns with the lane's other sessions, waiting for its result."""
        return self._wait(self._lane.start(self, work))

    def _set_threads(self) -> None:
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)

    def _begin(self, n: int, only, converge: bool) -> Future:
        self._require_writer("train")
        n = count("train: n", n)
        if only is not None:
            only = named_latents("train(only=)", only, self.n_latents).tolist()
        with self._starting:
            if self.running:
                raise RuntimeError(f"train: already training up to step {self._target}; call stop() first.")
            self._stop.clear()
            self._training_now, self._target = True, self._run.state.step + n
            self._future = self._lane.start(self, self._training(n, only, converge))
        return self._future

    def _training(self, n: int, only, converge: bool) -> Iterator[None]:
        """The work of one run; the lane advances it."""
        published, clock = self._run.state.step, time.perf_counter()
        outcome: dict[str, Any] = {}

        def pulse() -> None:
            nonlocal published, clock
            self._set_threads()
            elapsed = time.perf_counter() - clock
            if elapsed > PUBLISH_EVERY:
                self._run.check_finite()
                rate = (self._run.state.step - published) / elapsed
                published, clock = self._run.state.step, time.perf_counter()
                self._publish(rate=rate)

        try:
            self._set_threads()
            self._publish(diverged=None, converged=None, error=None)
            self._take_settings()
            outcome["converged"] = yield from self._run.advance(n, only, self._stop.is_set, pulse, converge)
        except Exception as error:
            outcome |= {"error": str(error), "diverged": error if isinstance(error, Diverged) else None}
            raise
        finally:
            self._training_now = False  # before the future is done: who waited for it reads the last snapshot
            self._publish(**outcome)

    def _settings(self) -> dict[str, Any]:
        """The settings of the next step, as JSON."""
        values = {k: getattr(self, k) for k in SETTINGS} | {"order": self._order, "threads": self._threads}
        values["ramps"] = {name: list(pair) for name, pair in self.ramps.items()}
        return settings_from(self.method, values)

    def _take_settings(self) -> None:
        if self._run.store.budget != self.budget:
            self._run.store.budget = self.budget
            if self.folder is not None:
                write_json(self.folder / "run.json", read_json(self.folder / "run.json") | {"budget": self.budget})
        self._run.take_settings(self._settings())

    def _show_settings(self) -> None:
        """Put the settings in force back on the parameters."""
        settings = self._run.settings
        self._order, self._threads = settings["order"], settings["threads"]
        changeable = [name for name, p in self.method.param.objects("existing").items() if not p.constant]
        self.method.param.update(**{k: v for k, v in settings["method"]["settings"].items() if k in changeable})
        self.param.update(**{k: settings[k] for k in SETTINGS})

    def _give_up(self) -> None:
        """Release the folder, or remove the temporary one."""
        if self._lock is not None:
            self._lock.release()
        if self._temporary is not None:
            self._temporary()
        self._lock = self._temporary = None

    def _check_out(self) -> None:
        """The head commit of the folder, as its writer or as a follower."""
        self._head_seen = self._head_written()
        if self.writable:
            self._run.store.sweep()
        try:
            self._run.check_out(self.folder, exact=self.writable)
        except FileNotFoundError:
            if self._head_written() == self._head_seen:
                raise
            self._check_out()  # the writer went on meanwhile, and thinned that commit
        self._show_settings()

    def _head_written(self) -> bytes:
        return (self.folder / "head.json").read_bytes()

    def _follow(self) -> None:
        """A follower looks whether the writer has committed."""
        if not self.writable and not self._closed and self._head_written() != self._head_seen:
            self._call(self._check_out)

    def _note(self, changes: dict[str, Any]) -> None:
        """Publish changes of the latest snapshot, from whichever thread."""
        with self._publishing:
            self.snapshot = replace(self.snapshot, **changes, version=self.snapshot.version + 1)

    def _publish(self, **changes) -> None:
        """Publish the state; in the lane, between two steps."""
        state, points, running = self._run.state, self._run.recorder.points, self.running
        last = points[-1] if points else {}
        silent = state.samples_since_fired.cpu().numpy().copy()
        flags = {"running": running, "stopping": running and self._stop.is_set(), "rate": self.snapshot.rate if running else 0.0}
        facts = {
            "step": state.step,
            "target": self._target if running else state.step,
            "queue": self._lane.ahead(self),
            "dead": int((silent >= state.dead_after).sum()),
            "samples_since_fired": silent,
            "losses": {k: v for k, v in last.items() if k not in ("step", "l0", "dead")},
            "l0": last.get("l0", float("nan")),
        }
        self._note(facts | flags | changes)

    # reading ---------------------------------------------------------------------------------------------------------

    def _view(self) -> dict[str, Any]:
        """The weights, counters and pins of one moment, copied in the lane once a generation."""
        self._follow()

        def command() -> dict[str, Any]:
            if self._copy is None or self._copy[0] != self._run.generation:
                self._copy = (self._run.generation, self._run.view())
            return self._copy[1]

        return self._lane.call(self, command)

    def _known(self, view: dict[str, Any], rows: Activations) -> dict[str, Any]:
        """What findings are told beside the weights."""
        told = {name: view[name] for name in ("samples_since_fired", "dead_after", "pins")}
        return told | {"anchors": self.anchors if rows.truth is None else None, "seeds": self.last_seeds}

    @property
    def _root(self) -> Path:
        """The run folder, or the one that goes with the session."""
        return self._run.store.folder.parent

    def _judge_rows(self, n: int):
        with self._guard:
            if n not in self._rows:
                self._rows[n] = self.source.sample(n, stream(self.seed, "judge"), "judge")
            return self._rows[n]

    def _wait(self, future: Future) -> Any:
        """Wait for lane work; keep open figures moving; an interrupt stops at the next step."""
        try:
            while True:
                try:
                    return future.result(timeout=0.25)
                except StillRunning:
                    if future.done():
                        raise
                    self._pulse()
        except BaseException:
            if not future.done():  # an interrupt, or a pulse that failed
                self._stop.set()
                future.exception()
            raise
        finally:
            self._pulse()

    def _pulse(self) -> None:
        for pulse in list(self.pulses):
            pulse()

    def _require_writer(self, verb: str) -> None:
        if self._closed:
            raise PermissionError(f"{verb}: this session is closed. Open its folder again with Session.open, or start a new Session.")
        if not self.writable:
            raise PermissionError(
                f"{verb}: this session follows {self.folder}, which {self.writer} writes. Close it, go on in memory with branch(), or, "
                "if its host is gone, Session.open(..., take_over=True)."
            )
