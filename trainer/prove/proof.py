"""The proof: an undisturbed run, then runs that are killed and relaunched until they are finished, compared with it."""

import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.errors import UserError
from trainer.observe.phase_log import digests_of
from trainer.prove.aims import Aims
from trainer.prove.compare import (
    BEFORE,
    KILLED,
    LAUNCH,
    READ_ERRORS,
    RUN,
    SETTINGS,
    UNDISTURBED,
    Compared,
    compare,
    newest_step,
    read_state,
)
from trainer.prove.launch import SAVING, Aim, End, ProcessLayout, run_launch


class Kill(NamedTuple):
    """One kill, as its row of the table shows it."""

    launch: str
    layout: ProcessLayout
    aim: Aim
    end: End


@dataclass
class Proof:
    """A proof, with a folder of its own. `run` makes the whole proof.

    Attributes:
      arguments: those of `train`: the config and its overrides, without a workdir.
      total_steps: the updates of the run.
      layouts: each launch comes up on one of them, chosen at random; the undisturbed run on the first.
      kill_count: how many kills there shall be.
      seed: of everything random.
      folder: an empty folder, for the workdirs, the traces and the output of every launch.
      tolerance: of losses, relative, if there are several process layouts.
      limit: seconds without progress, or after the signal, until a launch counts as stuck.
      show: gets a line of text for the undisturbed run, for each kill, and for each run that was killed and finished.
      kills: those that were made.
      compared: the comparison of each run that was killed and finished.
      keeps: whether the folders of such runs stay; those with a difference always stay.
    """

    arguments: Sequence[str]
    total_steps: int
    layouts: Sequence[ProcessLayout]
    kill_count: int
    seed: int
    folder: Path
    tolerance: float
    limit: float
    show: Callable[[str], None]
    kills: list[Kill] = field(default_factory=list)
    compared: list[Compared] = field(default_factory=list)
    keeps: bool = True

    def run(self) -> list[str]:
        """Makes the proof; returns every difference, none if it holds."""
        rng = np.random.default_rng(self.seed)
        (self.folder / SETTINGS).write_text(json.dumps({"tolerance": self._tolerance}))
        with _shared_compilations(self.folder / "compiled"):
            undisturbed = self.folder / UNDISTURBED
            end = self._launch(undisturbed, self.layouts[0], None)
            if end.code:
                raise UserError(f"the undisturbed run ended with exit code {end.code}:\n{_errors(undisturbed)}")
            self.show(f"undisturbed: {self.total_steps:,} steps in {end.seconds:.1f} s")
            aims = Aims(rng, undisturbed / f"{LAUNCH}001", self.total_steps)
            number, differences = 0, list[str]()
            while not differences and (len(self.kills) < self.kill_count or number == 0):
                number += 1
                differences = self._round(self.folder / f"{KILLED}{number}", aims, rng)
            return differences

    @property
    def _tolerance(self) -> float | None:
        """None if all launches have the same layout, so that every bit must be equal."""
        return self.tolerance if len(self.layouts) > 1 else None

    def _round(self, folder: Path, aims: Aims, rng: np.random.Generator) -> list[str]:
        """One run that is killed and relaunched until it is finished; returns what differs from the undisturbed run."""
        while True:
            layout = self.layouts[int(rng.integers(len(self.layouts)))]
            start = newest_step(folder / RUN) or 0
            left = self.kill_count - len(self.kills)
            aim = aims.choose(start, left, layout.processes) if left else None
            end = self._launch(folder, layout, aim)
            launch = sorted(folder.glob(f"{LAUNCH}*"))[-1]
            aims.learn(launch)
            if aim is not None and (hit := end.hit) is not None:
                if hit.step > self.total_steps:  # it waited for the last save: no batch is left to wait for
                    hit = hit._replace(phase="end", step=self.total_steps)
                end = end._replace(hit=hit)
                self.kills.append(Kill(f"{folder.name}/{launch.name}", layout, aim, end))
                aims.count(aim, hit)
                self.show(f"kill {len(self.kills)} of {self.kill_count}: {_text(self.kills[-1])}")
            if problem := self._problem(aim, end, folder):
                return [f"{folder.name}/{launch.name} {problem}:\n{_errors(folder)}"]
            if end.code == 0:
                break
        compared = compare(self.folder / UNDISTURBED, folder, tolerance=self._tolerance)
        self.compared.append(compared)
        self.show(f"{folder.name}: finished, " + (compared.differences[0] if compared.differences else "equal"))
        if not self.keeps and not compared.differences:
            shutil.rmtree(folder)
        return compared.differences

    def _launch(self, folder: Path, layout: ProcessLayout, aim: Aim | None) -> End:
        """Launches the real command on the workdir in `folder`, after it noted what the newest checkpoint holds."""
        launch = folder / f"{LAUNCH}{len(list(folder.glob(f'{LAUNCH}*'))) + 1:03}"
        command = [sys.executable, "-m", "trainer", "train", *self.arguments]
        command += [f"--workdir={folder / RUN}", f"--trace={launch}"]
        command += [f"--config.parallel.strategy={layout.strategy}"] if layout.strategy else []
        launch.mkdir(parents=True)
        (launch / BEFORE).write_text(json.dumps(_before(folder / RUN)))
        return run_launch(command, layout, launch, aim=aim, limit=self.limit)

    def _problem(self, aim: Aim | None, end: End, folder: Path) -> str:
        """The text for an exit code that nothing explains, else "" """
        expected = {0} if aim is None or end.hit is None else {128 + aim.signum}
        if aim is not None and aim.signum == signal.SIGTERM and newest_step(folder / RUN) == self.total_steps:
            expected.add(0)  # it came so late that the run finished
        cause = f" after {aim.signum.name}" if aim is not None and end.hit is not None else " by itself"
        return "" if end.code in expected else f"ended with exit code {end.code}{cause}"

    def summary(self) -> str:
        """One line for a proof that holds."""
        arrays = max(compared.arrays for compared in self.compared)
        batches, rows, evaluations = (
            sum(getattr(compared, name) for compared in self.compared) for name in ("batches", "rows", "evaluations")
        )
        done = f"{len(self.kills)} of {self.kill_count} kills"
        runs = f" ({len(self.compared)} runs)" if len(self.compared) > 1 else ""
        if len(self.layouts) == 1:
            state = f"final state ({arrays} arrays), ids of {batches} batches, {rows} rows of metrics"
            return f"{done}: {state} and {evaluations} evaluations are equal, bit for bit{runs}"
        equal = f"the state at every restore and the ids of {batches} batches are equal, bit for bit"
        apart = max(compared.apart for compared in self.compared)
        near = f"the losses of {rows} rows are at most {apart:.1e} of their size apart"
        layouts = f"{len(self.layouts)} process layouts"
        return f"{done}, {layouts}: {equal}; {near}; no evaluation of {evaluations} is lost{runs}"


def _before(workdir: Path) -> dict[str, Any]:
    """The newest checkpoint of a workdir, the sums of its arrays, and the problem if Orbax cannot read them."""
    step, sums, problem = newest_step(workdir), dict[str, str](), ""
    if step is not None:
        try:
            sums = digests_of(read_state(workdir, step))
        except READ_ERRORS as error:
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
    return {"step": step, "digests": sums, "problem": problem}


def kill_rows(kills: Sequence[Kill]) -> list[tuple[str, ...]]:
    """The rows of the table of kills: launch, layout, signal, phase, step, exit code and seconds."""
    return [
        (
            kill.launch,
            str(kill.layout),
            kill.aim.signum.name + (" to all" if kill.aim.everyone else ""),
            _place(kill),
            f"{kill.end.hit.step}",
            f"{kill.end.code}",
            f"{kill.end.seconds:.1f}",
        )
        for kill in kills
        if kill.end.hit is not None
    ]


def hits(kills: Sequence[Kill]) -> Counter[tuple[str, str]]:
    """How many signals came in each phase: (phase, name of the signal) → number."""
    counts: Counter[tuple[str, str]] = Counter()
    for kill in kills:
        if kill.end.hit is not None:
            name = kill.aim.signum.name
            counts[kill.end.hit.phase, name] += 1
            counts[SAVING, name] += kill.end.hit.saving
    return counts


def _place(kill: Kill) -> str:
    assert kill.end.hit is not None
    return kill.end.hit.phase + (" + saving" if kill.end.hit.saving else "")


def _text(kill: Kill) -> str:
    assert kill.end.hit is not None
    where = f"{_place(kill)} at step {kill.end.hit.step}"
    return f"{kill.aim.signum.name} in {where}, exit code {kill.end.code}, {kill.end.seconds:.1f} s"


def _errors(folder: Path) -> str:
    """The end of the standard error of a run's newest launch."""
    launch = sorted(folder.glob(f"{LAUNCH}*"))[-1]
    lines = (launch / "stderr").read_text(errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-30:]) or "  (it wrote no error)"


@contextmanager
def _shared_compilations(folder: Path) -> Iterator[None]:
    """While entered, child processes share what they compile, unless the user has named a folder for it."""
    name = "JAX_COMPILATION_CACHE_DIR"
    if name in os.environ:
        yield
        return
    settings = {name: str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    os.environ.update(settings)
    try:
        yield
    finally:
        for setting in settings:
            del os.environ[setting]
