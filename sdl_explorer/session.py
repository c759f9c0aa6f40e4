"""`Session` owns a model in training: settings are parameters, facts are properties, methods are commands.

Nothing here knows a GUI. One lane thread per device touches the tensors; commands run between two steps.
"""

import copy
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import param
import torch

from sdl_explorer.archive import CONSTANT, read_control, read_record, write_control, write_record
from sdl_explorer.comparison import other_of
from sdl_explorer.control import Stopped, last_intervention, paired
from sdl_explorer.data.anchors import Anchors
from sdl_explorer.data.sources import Source, stream
from sdl_explorer.diagnosis.compare import Control
from sdl_explorer.diagnosis.compared import Compared
from sdl_explorer.diagnosis.continuation import continued_method
from sdl_explorer.diagnosis.explain import explain
from sdl_explorer.diagnosis.preflight import Preflight, preflight
from sdl_explorer.diagnosis.theory_seeds import Seeds, seed_steps
from sdl_explorer.diagnosis.twins import find_twins
from sdl_explorer.diagnosis.verdict import Verdict
from sdl_explorer.labels import Label, LabelStore
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods import Method, TopK
from sdl_explorer.models.rewrites import scaled
from sdl_explorer.models.start import started_on
from sdl_explorer.repair import Bench, Repair, try_repairs
from sdl_explorer.running import Running, count
from sdl_explorer.settings import check_kinds, check_start, check_widths, device_of, size_of
from sdl_explorer.survey import Survey, codes_of, take_survey
from sdl_explorer.training.commits import Commit, CommitStore
from sdl_explorer.training.folder import RunLock, read_json, restore_source, settings_of, write_json
from sdl_explorer.training.history import Recorder
from sdl_explorer.training.interventions import Anchor, Intervention, Release, Resample, named_latents
from sdl_explorer.training.optim import ramped, ramps_of
from sdl_explorer.training.plan import Plan
from sdl_explorer.training.prune import Prune
from sdl_explorer.training.realign import Realign
from sdl_explorer.training.run import CHOOSE_ROWS, SETTINGS, Run, completed, method_of
from sdl_explorer.training.split import Split
from sdl_explorer.training.state import Schedule, TrainState
from sdl_explorer.training.unabsorb import Unabsorb
from sdl_explorer.trial import Trial, conduct

JUDGE_ROWS = 10_000
LABELS = "labels.jsonl"
MOMENT_STEPS = 100


class Session(Running):
    """A source, a method and a dictionary in training.

    Settings describe the next step: a change only marks the session stale, and the next command writes it as
    a commit. `n_latents=None` means `expansion_factor` (4) times source.width_in. Where rows are stored, new weights start
    centred on their mean, which is far from zero in most networks: the biases hold it (`centre`). With `normalise` they
    hold the scale of the data too, so that learning rates and penalties mean the same on any data (see
    `models.start.started_on`). A given `dictionary` is trained on in place, with its own centre and scales; without a
    `method` the session then holds its measured L0 (see `continued_method`) and fills the optimiser's moments at rate 0
    for 100 steps. With `rescale`, the input scale that its preflight asks for is set first.
    """

    last_compared: Compared | None = None
    last_repair: Repair | None = None
    last_trial: Trial | None = None

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

    def control(self, n_steps: int, runs: int = 5) -> Control:
        """Pairs with and without the last intervention, same seed and data order, beside a sham arm.

        Arms start from the commits before and after the intervention; pair r trains `n_steps` on data order
        r + 1 and is scored on judge rows. The sham resets the same latents in random directions. stop() ends it
        early (raises `Stopped`); the pairs that were finished stay in `last_control`.
        """
        self._require_writer("control")
        n_steps, runs = count("control: n_steps", n_steps), count("control: runs", runs)
        self._call(self._take_settings)
        after = last_intervention(self._run)
        if after is None:
            raise ValueError("control: no intervention on this branch yet; resample or anchor first.")
        rows = self._judge_rows(JUDGE_ROWS).to(self.device)
        anchors = self.anchors if rows.truth is None else None
        with self._job("control") as tell:
            for done, control in paired(self._run, after, rows, anchors, n_steps, runs, self._drain, self._stop.is_set):
                tell(done)
                self.last_control = self.last_control if control is None else control
        if self.folder is not None:
            write_control(self.folder, self.last_control)
        return self.last_control

    def train_seeds(self, n_steps: int, runs: int = 5) -> Seeds:
        """Pairs of runs from other seeds, with the anchors that are held here and without; `check_theory` then reads them (T7).

        All have this session's settings and start from new weights; the anchored ones are pulled with the mean weight of this session's
        pins. The session is left as it was. stop() ends it (raises `Stopped`).
        """
        n_steps, runs, pins = count("train_seeds: n_steps", n_steps), count("train_seeds: runs", runs), self.pins
        if pins is None:
            raise ValueError("train_seeds: nothing is anchored here (pins=None); anchor some latents first.")
        method = method_of(self._settings())
        beginning = self._beginning(method)  # now: settings may change while it runs
        begin = lambda weights, seed: TrainState.start(self._placed(weights, seed).to(self.device), seed=seed, **beginning)
        settings = {"batch_size": self.batch_size, "seed": self.seed, "begin": begin}
        settings |= {"n_steps": n_steps, "runs": runs, "weight": float(pins.weight.mean())}
        with self._job("seeds") as tell:

            def told(done: float) -> None:
                if self._stop.is_set():
                    raise Stopped(f"train_seeds: stopped at {done:.0%}; nothing is kept.")
                if self.snapshot.job is None or done - self.snapshot.job.done > 0.02:
                    tell(done)

            self.last_seeds = self._drain(seed_steps(self.source, method, self.n_latents, pins.anchors, tell=told, **settings))
        return self.last_seeds

    def trial(self, intervention: Intervention, candidates, n_steps: int = 200, *, seed: int = 0, n: int = JUDGE_ROWS) -> Trial:
        """One run in which chance gives each candidate the intervention, its sham (random directions) or nothing; see `Trial`.

        `intervention` changes single latents (Resample, Realign, Anchor, Prune); its `latents` are the candidates. All happens to a
        copy of the state, on `n` judge rows. stop() ends it (raises `Stopped`). The session is left as it was.
        """
        steps, rows = count("trial: n_steps", n_steps), self._judge_rows(n).to(self.device)
        anchors = self.anchors if rows.truth is None else None
        with self._job("trial") as tell:
            tell(0.0)
            arms = self._run, self._settings(), intervention, candidates, steps, seed
            self.last_trial = conduct(*arms, rows, anchors, self._call, self._drain, self._stop.is_set, tell)
        return self.last_trial

    def repair(
        self,
        budget: int = 20_000,
        *,
        n_steps: int = 200,
        runs: int = 5,
        n: int = JUDGE_ROWS,
        verdicts: list[Verdict] | None = None,
        apply: bool = True,
    ) -> Repair:
        """Try the verdicts' interventions (None: those of `explain`) and keep what is better than as many steps and than its sham.

        `budget`: training steps to spend in all. A try takes `runs` pairs of three arms of `n_steps`, judged on `n` judge rows. All
        trying happens on a branch; at the end what passed is applied to this session, an intervention a commit. With `apply=False`, or
        where stop() ended it, the session is left as it was, and `Repair.apply(session)` applies what passed.
        """
        budget, n_steps, runs = (count(f"repair: {name}", v) for name, v in (("budget", budget), ("n_steps", n_steps), ("runs", runs)))
        if apply:
            self._require_writer("repair")
            if self.running:
                raise ValueError(
                    "repair: the session is training, so that it will have moved on by the end; stop() it first, or set apply=False."
                )
        rows = self._judge_rows(n).to(self.device)
        verdicts = self.find(explain, n=n) if verdicts is None else verdicts
        anchors, head = self.anchors if rows.truth is None else None, self.head.id
        with self._job("repair") as tell, self.branch() as twin:
            tell(0.0)
            twin._call(lambda: twin._run.take_settings(self._settings()))
            bench = Bench(twin._run, rows, anchors, twin._call, self._drain, self._stop.is_set, tell)
            self.last_repair = replace(try_repairs(bench, verdicts, budget, n_steps, runs), head=head)
        if apply and not self.last_repair.stopped:
            self.last_repair.apply(self)
        return self.last_repair

    def find(self, finding, *, n: int = JUDGE_ROWS, progress: Callable[[float], None] | None = None, **settings):
        """One finding's result, or a list of results from one pass over `n` judge rows; cached by state and settings.

        Runs in the caller's thread. `progress(done)` is called between blocks; an exception in it cancels.
        """
        findings = finding if isinstance(finding, list) else [finding]
        view, rows = self._view(), self._judge_rows(n)
        kept = lambda: codes_of(self._root, view["dictionary"], self.source, self.seed, rows.n)
        results = self._findings.find(findings, view["key"], view["dictionary"], rows, self._known(view, rows), settings, progress, kept)
        return results if isinstance(finding, list) else results[0]

    def survey(self, rows: int = JUDGE_ROWS, *, progress: Callable[[float], None] | None = None) -> Survey:
        """Encode this many judge rows once and fill every streaming finding; `find` on as many rows then reads the codes.

        They are kept in the run folder, so that a survey that was ended goes on where it was. Runs in the caller's thread;
        stop(), or an exception in `progress(done)`, ends it between blocks (stop() raises `Stopped`).
        """
        view, activations = self._view(), self._judge_rows(count("survey: rows", rows))
        kept = codes_of(self._root, view["dictionary"], self.source, self.seed, activations.n, writes=self.writable)
        with self._job("survey") as tell:

            def pulse(done: float) -> None:
                tell(done)
                if progress is not None:
                    progress(done)
                if self._stop.is_set():
                    raise Stopped(f"survey: stopped at {done:.0%}; the same call goes on from there.")

            return take_survey(self._findings, view, activations, self._known(view, activations), pulse, kept)

    def compare_with(self, other, *, by: str = "auto", tau: float = 0.7, n: int = JUDGE_ROWS, other_activations=None) -> Compared:
        """Which latents another dictionary has too (`find_twins`), on `n` judge rows; the last one stays in `last_compared`.

        `other`: a commit or its id, a run folder or any file that `SparseDictionary.load` reads, a `Session`, a dictionary, or
        ("free" | "anchored", r), run r of the last `train_seeds`. Runs in the caller's thread; stop() ends it (raises `Stopped`).
        """
        if self.running:
            raise ValueError("compare_with: the session is training, so that it will have moved on by the end; stop() it first.")
        dictionary, name, python = other_of(other, self._run.store, self.last_seeds)
        if dictionary.device.type != torch.device(self.device).type:
            dictionary = copy.deepcopy(dictionary).to(self.device)
        settings = {"other": dictionary, "by": by, "tau": tau, "other_activations": other_activations}
        step = self.step
        with self._job("comparison") as tell:

            def pulse(done: float) -> None:
                tell(done)
                if self._stop.is_set():
                    raise Stopped(f"compare_with: stopped at {done:.0%}; what was compared before stays.")

            tell(0.0)
            twins = self.find(find_twins, n=n, progress=pulse, **settings)
        self.last_compared = Compared(name, step, twins, python if by == "auto" else f"{python}, by={by!r}")
        return self.last_compared

    def label(self, about, says: str, note: str = "") -> Label:
        """Say something of a latent, or of a pair (parent, child): "confirmed", "rejected", any word; "" takes it back.

        `labels` has what is in force. They are kept beside the commits, and a branch or a saved copy has them too.
        """
        self._require_writer("label")
        ids = tuple(named_latents("label(about=)", about, self.n_latents).tolist())
        label = self.labels.add(Label(ids, says, note, self.step, self.head.id))
        self._note({})
        return label

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
