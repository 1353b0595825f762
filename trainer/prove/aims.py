"""The choice of the next kill: a phase, a step, a moment in it and a signal, spread so that every phase is hit."""

import itertools
import math
import signal
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.observe.phase_log import read_phase_log
from trainer.prove.launch import SAVING, Aim, Hit

PHASES = ("compile", "restore", "data", "step", "evaluate", SAVING)
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
# A kill adds 1 to the phase in which it came, and this much to the phase at which it was aimed.
_AIM_WEIGHT = 0.3


class Aims:
    """Chooses kills, given what the undisturbed run did and where the earlier kills came."""

    def __init__(self, rng: np.random.Generator, undisturbed: Path, total_steps: int) -> None:
        """Reads the trace that the undisturbed launch left in a folder."""
        self._rng, self._total = rng, total_steps
        self._lengths: dict[str, list[float]] = defaultdict(list)  # seconds of each phase
        self._steps: dict[str, list[int]] = defaultdict(list)  # at which the undisturbed run was in each phase
        self._counts: dict[tuple[str, signal.Signals], float] = defaultdict(float)
        for phase, step, seconds in _phases(read_phase_log(undisturbed)[0]):
            self._steps[phase].append(step)
            self._lengths[phase].append(seconds)

    def learn(self, launch: Path) -> None:
        """Takes the lengths of the phases of a launch from its trace, if it lived long enough to write one."""
        if (launch / "process_0.jsonl").exists():
            for phase, _, seconds in _phases(read_phase_log(launch)[0]):
                self._lengths[phase].append(seconds)

    def count(self, aim: Aim, hit: Hit) -> None:
        """Counts where a kill was aimed at and where it came."""
        self._counts[aim.phase, aim.signum] += _AIM_WEIGHT
        for phase in {hit.phase, SAVING if hit.saving else hit.phase}:
            self._counts[phase, aim.signum] += 1

    def choose(self, start: int, kills_left: int, processes: int) -> Aim:
        """The next kill of a run that will go on after step `start` (0: from the beginning).

        It comes early enough that, on average, the kills that are left are used up before the last step.
        """
        pace = max(1, math.ceil(2 * (self._total - start) / (kills_left + 1)))
        possible = {phase: steps for phase in PHASES if (steps := self._possible(phase, start, pace))}
        pairs = [(phase, signum) for phase in possible for signum in SIGNALS]
        fewest = min(self._counts[pair] for pair in pairs)
        phase, signum = self._pick([pair for pair in pairs if self._counts[pair] <= fewest + _AIM_WEIGHT])
        step = self._pick(possible[phase])
        everyone = processes > 1 and signum == signal.SIGKILL and self._rng.random() < 0.5
        delay = self._rng.random() * self._pick(self._lengths[phase])
        last = min(self._total, step + max(pace, self._spacing(phase)))
        return Aim(phase, step, last, delay, signum, int(self._rng.integers(processes)), everyone)

    def _possible(self, phase: str, start: int, pace: int) -> list[int]:
        """The steps to choose from, none if the launch will not be in the phase."""
        if phase == "compile":
            return [0, start + 1] if start < self._total else [0]
        if phase == "restore":
            return [0] if start else []
        owed = phase == "evaluate"  # the evaluation of the restored step may be owed
        steps = sorted({step for step in self._steps[phase] if start - owed < step <= self._total})
        near = [step for step in steps if step <= start + pace]
        return near or steps[:1]

    def _spacing(self, phase: str) -> int:
        steps = [0, *sorted({step for step in self._steps[phase] if step <= self._total})]
        return max((b - a for a, b in itertools.pairwise(steps)), default=1)

    def _pick(self, items: Sequence[Any]) -> Any:
        return items[int(self._rng.integers(len(items)))]


def _phases(lines: Sequence[dict[str, Any]]) -> list[tuple[str, int, float]]:
    """Each phase with its step and its seconds, and then `SAVING` with those of each finished save.

    The last phase, which may have been cut short, is left out.
    """
    phases = [(line["phase"], line["step"], line["time"]) for line in lines if "phase" in line]
    found = [(a[0], a[1], b[2] - a[2]) for a, b in itertools.pairwise(phases)]
    began = {line[SAVING]: line["time"] for line in lines if SAVING in line}
    ended = {line["saved"]: line["time"] for line in lines if "saved" in line}
    return found + [(SAVING, step, max(ended[step] - began[step], 0.0)) for step in began if step in ended]
