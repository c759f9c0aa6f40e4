"""`Session` owns a model in training: settings are parameters, facts are properties, methods are commands.

Nothing here knows a GUI. One lane thread per device touches the tensors; commands run between two steps.
"""

import copy
import shutil
import tempfile
import warnings
import weakref
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import param
import torch

from sdl_explorer.archive import CONSTANT, read_control, read_record, write_control, write_record
from sdl_explorer.data.anchors import Anchors
from sdl_explorer.data.sources import Source, stream
from sdl_explorer.diagnosis.continuation import continued_method
from sdl_explorer.diagnosis.preflight import Preflight, preflight
from sdl_explorer.labels import LabelStore
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods import Method, TopK
from sdl_explorer.models.rewrites import scaled
from sdl_explorer.models.start import started_on
from sdl_explorer.settings import check_kinds, check_start, check_widths, device_of, size_of
from sdl_explorer.studies import Studies
from sdl_explorer.training.commits import Commit, CommitStore
from sdl_explorer.training.folder import RunLock, read_json, restore_source, settings_of, write_json
from sdl_explorer.training.history import Recorder
from sdl_explorer.training.interventions import Anchor, Intervention, Release, Resample
from sdl_explorer.training.optim import ramped, ramps_of
from sdl_explorer.training.plan import Plan
from sdl_explorer.training.prune import Prune
from sdl_explorer.training.realign import Realign
from sdl_explorer.training.run import CHOOSE_ROWS, SETTINGS, Run, completed, method_of
from sdl_explorer.training.split import Split
from sdl_explorer.training.state import Schedule, TrainState
from sdl_explorer.training.unabsorb import Unabsorb

LABELS = "labels.jsonl"
MOMENT_STEPS = 100


class Session(Studies):
    """A source, a method and a dictionary in training.

    Settings describe the next step: a change only marks the session stale, and the next command writes it as
    a commit. `n_latents=None` means `expansion_factor` (4) times source.width_in. Where rows are stored, new weights start
    centred on their mean, which is far from zero in most networks: the biases hold it (`centre`). With `normalise` they
    hold the scale of the data too, so that learning rates and penalties mean the same on any data (see
    `models.start.started_on`). A given `dictionary` is trained on in place, with its own centre and scales; without a
    `method` the session then holds its measured L0 (see `continued_method`) and fills the optimiser's moments at rate 0
    for 100 steps. With `rescale`, the input scale that its preflight asks for is set first.
    """

    def __init__(
        self,
        source: Source,
        method: Method | None = None,
        n_latents: int | None = None,
        dictionary: SparseDictionary | None = None,
        *,
        expansion_factor: float | int | None = None,
        rescale: bool = False,
        **settings,
    ):
        check_kinds(source, method, settings)
        device = device_of(settings.pop("device", "auto"))
        settings.setdefault("dead_after", source.dead_after)
        found = None
        if dictionary is not None:
            if n_latents not in (None, dictionary.n_latents):
                raise ValueError(f"Session: n_latents is {n_latents} and the dictionary has {dictionary.n_latents}; leave n_latents out.")
            check_start(settings)
            check_widths(dictionary, source)
            rows = source.sample(CHOOSE_ROWS, stream(settings.get("seed", 0), "preflight"), "choose")
            found = preflight(dictionary, rows, getattr(source, "hooks", ()))
            if rescale and found.scale != 1:
                dictionary = scaled(dictionary, found.scale)
                found = preflight(dictionary, rows, getattr(source, "hooks", ()))
            if found.verdict != "fits":
                way_out = "rescale=True scales them" if found.scale != 1 else "use activations of the place that it was trained on"
                warnings.warn(f"{found.stamp} Every number below is about this misfit; {way_out}.", stacklevel=2)
            method = continued_method(dictionary, rows) if method is None else method
            n_latents = dictionary.n_latents
        method = TopK() if method is None else type(method)(**settings_of(method))
        n_latents = size_of(source.width_in, n_latents, expansion_factor)
        method.check(n_latents)
        ramps = ramps_of(settings.get("ramps", {}), method, n_latents)
        super().__init__(source=source, method=method, n_latents=n_latents, device=device, **settings)
        self._prepare(found)
        hold = 0 if dictionary is None else MOMENT_STEPS
        if dictionary is None:
            dictionary = method.build(source.width_in, source.width_out, n_latents, stream(self.seed, "weights"))
            dictionary = self._placed(dictionary, self.seed)
        weights = copy.deepcopy(dictionary).to(device=self.device, dtype=torch.float32).requires_grad_(True)
        method.fits(weights)
        ramped(method, ramps, 0).retune(weights.nonlinearity)
        weights.provenance = weights.provenance | {"kind": source.sample(1, stream(self.seed, "kind"), "choose").kind}
        state = TrainState.start(weights, seed=self.seed, **self._beginning(method, hold))
        origin = "trained elsewhere" if hold else "untrained"
        self._run = self._run_in_memory(state, self._settings())
        self._call(lambda: self._run.commit("start", f"start: {self.n_latents} latents, {origin}, {self.method}"))

    @classmethod
    def _around(cls, source: Source, settings: dict[str, Any], found: Preflight | None = None, **constant) -> "Session":
        """A session of settings that exist, which still lacks its run."""
        session = cls.__new__(cls)
        values = {k: settings[k] for k in SETTINGS} | constant
        param.Parameterized.__init__(session, source=source, method=method_of(settings), **values)
        session._prepare(found)
        session._order, session._threads = settings["order"], settings["threads"]
        return session

    def _run_in_memory(self, state: TrainState, settings: dict[str, Any]) -> Run:
        """A run whose commits lie in a folder that goes with the session."""
        folder = tempfile.mkdtemp(prefix="sdl-explorer-")
        self._temporary = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Run(self.source, state, settings, CommitStore(Path(folder) / "commits", self.budget))

    # commands ------------------------------------------------------------------------------------------------------

    def train(self, n: int, only=None) -> "Session":
        """`n` steps, waiting. Ends early only on stop(), an interrupt, or a loss that is not finite (raises)."""
        self._wait(self._begin(n, only, converge=False))
        return self

    def start(self, n: int, only=None, converge: bool = False) -> Future:
        """The same without waiting; with `converge`, pause when the loss changed by less than 0.01 % in 500 steps."""
        return self._begin(n, only, converge)

    def stop(self, wait: bool = True) -> None:
        """End the run, or the control pairs, within one step; with `wait`, return when the run has ended."""
        self._stop.set()
        with self._publishing:
            self.snapshot = replace(self.snapshot, stopping=self.snapshot.running, version=self.snapshot.version + 1)
        if wait and self._future is not None:
            self._future.exception()  # waits; whoever started the run gets the error

    def plan(self, intervention: Intervention) -> Plan:
        """What `apply` would do, chosen on the choose rows; changes nothing."""
        return self._call(lambda: self._run.plan(intervention))

    def apply(self, change: Plan | Intervention) -> Commit:
        """Apply a plan, or plan and apply an intervention; two commits, before and after."""
        self._require_writer("apply")

        def command() -> Commit:
            plan = change if isinstance(change, Plan) else self._run.plan(change)
            self._take_settings()
            return self._run.apply(plan)

        return self._call(command)

    def resample(self, latents=None, **settings) -> Commit:
        """Restart latents (None: the dead ones) from badly reconstructed inputs; see `Resample`."""
        return self.apply(Resample(latents=latents, **settings))

    def anchor(self, anchors: Anchors, latents=None, weight: float = 0.1, hard: bool = False) -> Commit:
        """Hold latents to known directions; see `Anchor`."""
        return self.apply(Anchor(anchors=anchors, latents=latents, weight=weight, hard=hard))

    def realign(self, latents=None, **settings) -> Commit:
        """Turn encoder rows to what fires their latents (None: all that are alive and not pinned); see `Realign`."""
        return self.apply(Realign(latents=latents, **settings))

    def split(self, latents=None, **settings) -> Commit:
        """Give one direction of latents that stand for two (None: all such) to spare ones; see `Split`."""
        return self.apply(Split(latents=latents, **settings))

    def unabsorb(self, latents=None, **settings) -> Commit:
        """Take parents out of latents that write them too (None: all that look like it); see `Unabsorb`."""
        return self.apply(Unabsorb(latents=latents, **settings))

    def prune(self, latents) -> Commit:
        """Take latents out; see `Prune`."""
        return self.apply(Prune(latents=latents))

    def release(self, latents=None) -> Commit:
        """Let go of pinned and of pulled latents (None: all)."""
        return self.apply(Release(latents=latents))

    def commit(self, message: str = "") -> Commit:
        """Write the state; durable when it returns, where the session is bound to a folder."""
        self._require_writer("commit")

        def command() -> Commit:
            before = self.head
            self._take_settings()
            if not message and self.head is not before:  # the change of settings is the commit
                return self.head
            return self._run.commit("manual", message or f"step {self._run.state.step}", "session.commit()")

        return self._call(command)

    def revert(self, commit: Commit | str) -> "Session":
        """Check out a commit: weights, moments, counters, settings. Nothing is deleted; training branches there."""
        self._require_writer("revert")
        target = self._run.store[commit]
        if self.running:
            self.stop()

        def command() -> None:
            self._run.revert(target)
            self._show_settings()
            self._note({"diverged": None, "error": None, "converged": None})

        self._call(command)
        return self

    def restart(self) -> "Session":
        """Back to the same initial weights."""
        return self.revert(next(iter(self._run.store)))

    def branch(self, commit: Commit | str | None = None) -> "Session":
        """A new session, in memory, that starts at a commit (None: the current state)."""
        target = None if commit is None else self._run.store[commit]
        run = self._run

        def taken() -> tuple[TrainState, dict[str, Any], Recorder]:
            state, settings = run.state_of(target) if target else (copy.deepcopy(run.state), run.settings)
            return state, settings, run.recorder.truncated(state.step)

        state, settings, recorder = self._call(taken)
        constant = {k: getattr(self, k) for k in (*CONSTANT, "device", "anchors")}
        twin = Session._around(self.source, settings, self.preflight, **constant)
        twin._run = twin._run_in_memory(state, settings)
        twin._run.recorder = recorder
        twin.labels = self.labels.copy()
        twin._call(lambda: twin._run.commit("start", f"branch at step {state.step} of {self.head.id}"))
        return twin

    # the folder ----------------------------------------------------------------------------------------------------

    def save(self, folder) -> Path:
        """Bind the session to a run folder; commits first if the step moved."""
        self._require_writer("save")
        target = Path(folder).expanduser().resolve()
        return self._call(lambda: self._save(target))

    @classmethod
    def open(cls, folder, source: Source | None = None, take_over: bool = False, device: str = "auto") -> "Session":
        """The session of a run folder, at its last commit. A second opener follows, read-only."""
        folder = Path(folder).expanduser().resolve()
        record = read_record(folder)
        source, settings = restore_source(record["source"], folder, source), completed(record["session"])
        constant = {k: record[k] for k in (*CONSTANT, "anchors")}
        session = cls._around(source, settings, record["preflight"], device=device_of(device), **constant)
        session.last_control = read_control(folder)
        session.labels = LabelStore(folder / LABELS)
        session.folder = folder
        session._lock = RunLock(folder, take_over)
        try:
            store = CommitStore(folder / "commits", session.budget)
            head = store[read_json(folder / "head.json", "commit")["commit"]]
            weights = store.load_dictionary(head).to(session.device)
            session._run = Run(session.source, TrainState.start(weights, seed=session.seed), settings, store)
            session._call(session._check_out)
        except BaseException:
            session._lock.release()
            raise
        return session

    def close(self) -> None:
        """Stop, and give the folder up. What was read stays readable; nothing can be trained or written."""
        self.stop()
        self._closed = True
        self._give_up()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Session({type(self.source).__name__}, {self.method}, n_latents={self.n_latents}, step={self.step}, device={self.device!r})"

    __str__ = __repr__

    def _placed(self, weights: SparseDictionary, seed: int) -> SparseDictionary:
        """New weights where the settings have them start."""
        stored = "mean" if self.source.n is not None else "none"
        start = {"centre": stored if self.centre == "auto" else self.centre, "normalise": self.normalise, "pre_bias": self.pre_bias}
        if start == {"centre": "none", "normalise": False, "pre_bias": False}:
            return weights
        return started_on(weights, self.source.sample(CHOOSE_ROWS, stream(seed, "centre"), "train"), **start)

    def _beginning(self, method: Method, hold: int = 0) -> dict[str, Any]:
        """What `TrainState.start` takes of the settings."""
        ramps = ramps_of(self.ramps, method, self.n_latents)
        schedule = Schedule(self.lr, self.warmup_steps, self.decay_steps, hold, self.decay, ramps)
        return {"schedule": schedule} | {name: getattr(self, name) for name in ("dead_after", "optimiser", "clip_norm", "precision")}

    def _save(self, folder: Path) -> Path:
        if (folder / "run.json").exists() and folder != self.folder:
            raise ValueError(f"save: {folder} already holds a run; Session.open it, or save to another folder.")
        self._take_settings()
        run = self._run
        if run.moved:
            run.commit("manual", f"step {run.state.step}", f"session.save({str(folder)!r})")
        if folder == self.folder:
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        lock = RunLock(folder)
        try:
            if not lock.held:
                raise PermissionError(f"save: {folder} is being written by {lock.writer}; save to another folder.")
            run.store.copy_to(folder / "commits")
            write_json(folder / "history.json", {"points": run.recorder.points}, indent=None)
            write_json(folder / "head.json", {"commit": self.head.id})
            self.labels.save(folder / LABELS)
            if self.last_control is not None:
                write_control(folder, self.last_control)
            constant = {k: getattr(self, k) for k in CONSTANT}
            write_record(folder, self.source, run.settings, constant, self.preflight, self.anchors)
        except BaseException:
            lock.release()
            raise
        self._give_up()
        self._lock, self.folder = lock, folder
        run.store = CommitStore(folder / "commits", self.budget)
        return folder
