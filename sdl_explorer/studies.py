"""What can be asked of a session: findings, and experiments that judge a change against runs without it."""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch

from sdl_explorer.archive import write_control
from sdl_explorer.comparison import other_of
from sdl_explorer.control import Stopped, last_intervention, paired
from sdl_explorer.diagnosis.compare import Control
from sdl_explorer.diagnosis.compared import Compared
from sdl_explorer.diagnosis.explain import explain
from sdl_explorer.diagnosis.theory_seeds import Seeds, seed_steps
from sdl_explorer.diagnosis.twins import find_twins
from sdl_explorer.diagnosis.verdict import Verdict
from sdl_explorer.labels import Label
from sdl_explorer.repair import Bench, Repair, try_repairs
from sdl_explorer.running import Running
from sdl_explorer.settings import count
from sdl_explorer.survey import Survey, codes_of, take_survey
from sdl_explorer.training.interventions import Intervention, named_latents
from sdl_explorer.training.run import method_of
from sdl_explorer.training.state import TrainState
from sdl_explorer.trial import Trial, conduct

JUDGE_ROWS = 10_000


class Studies(Running):
    """Findings and experiments. Each leaves the session as it was, but for a `repair` that is applied."""

    last_compared: Compared | None = None
    last_repair: Repair | None = None
    last_trial: Trial | None = None

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
        copy of the state, on `n` judge rows. stop() ends it (raises `Stopped`). The session is left as it was; `last_trial` keeps it.
        """
        steps, rows = count("trial: n_steps", n_steps), self._judge_rows(n).to(self.device)
        anchors = self.anchors if rows.truth is None else None
        with self._job("trial") as tell:
            tell(0.0)
            arms = self._run, self._settings(), intervention, candidates, steps, seed
            found = conduct(*arms, rows, anchors, self._call, self._drain, self._stop.is_set, tell)
            found.table()  # permutations take a while, and are kept
            self.last_trial = found
        return found

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
        where stop() ended it, the session is left as it was, and `Repair.apply(session)` applies what passed. `last_repair` keeps it.
        """
        budget, n_steps, runs = (count(f"repair: {name}", v) for name, v in (("budget", budget), ("n_steps", n_steps), ("runs", runs)))
        if apply:
            self._require_writer("repair")
            if self.running:
                raise ValueError(
                    "repair: the session is training, so that it will have moved on by the end; stop() it first, or set apply=False."
                )
        rows = self._judge_rows(n).to(self.device)
        given = verdicts is not None
        verdicts = self.find(explain, n=n) if verdicts is None else verdicts
        anchors, head = self.anchors if rows.truth is None else None, self.head.id
        with self._job("repair") as tell, self.branch() as twin:
            tell(0.0)
            twin._call(lambda: twin._run.take_settings(self._settings()))
            bench = Bench(twin._run, rows, anchors, twin._call, self._drain, self._stop.is_set, tell)
            self.last_repair = replace(try_repairs(bench, verdicts, budget, n_steps, runs), head=head, n=rows.n, given=given)
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
        asked = {"by": (by, "auto"), "tau": (tau, 0.7), "n": (n, JUDGE_ROWS)}
        python += "".join(f", {setting}={value!r}" for setting, (value, usual) in asked.items() if value != usual)
        python += "" if other_activations is None else ", other_activations=other_activations"
        self.last_compared = Compared(name, step, twins, python)
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
