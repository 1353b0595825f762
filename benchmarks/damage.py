"""Every damage × every file of a workdir, and single-bit flips: each launch goes on bit for bit, or says why not.

    python -m benchmarks.damage [--flips=400] [--seed=0] [--real=12] [--write]

A small run of `configs/toy.py` has three checkpoints and is about to make four more steps, as a kill in its last save
leaves it. Each trial damages a copy and launches it. The last state, the metrics, the settings and the table of
parameters must then equal those of a run without damage, or the launch ends in one line and leaves all as it was. Most
trials share a compiled program in this process; `--real` of them also go through the command. `--write` renews the
table in docs/guarantees.md. The exit code is 1 if a trial fails.
"""

import argparse
import faulthandler
import json
import logging
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import header
from configs.toy import get_config
from trainer import config
from trainer.checkpoint import Store
from trainer.errors import HostError, UserError
from trainer.experiment import Experiment
from trainer.loop import train_program
from trainer.observe.progress import Progress
from trainer.observe.rows import row_or_none
from trainer.program import Program, build_program

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "guarantees.md"
BEGIN, END = "<!-- made by benchmarks/damage.py -->", "<!-- end of what benchmarks/damage.py made -->"
STEPS, NEWEST, SMALL = 16, 12, 1024  # updates of the run, step of the newest checkpoint, bytes of a small file
FLAGS = (
    f"--config.total_steps={STEPS}",
    "--config.checkpoint.every_steps=4",
    "--config.checkpoint.keep_last=4",
    "--config.evaluation.every_steps=4",
    "--config.logging.every_steps=1",
)
# How a trial can end.
UNNOTICED, SAID, EARLIER, REFUSED, FAILED = "same", "said", "earlier", "refused", "FAILED"


class Outcome(NamedTuple):
    """How a trial ended: one of the five words, and the lines about the damage."""

    kind: str
    text: str


class Case(NamedTuple):
    """A run without damage, and a workdir that a kill in its last save left."""

    program: Program
    killed: Path
    leaves: dict[str, bytes]  # the last state
    files: dict[str, bytes]  # metrics.jsonl, config.json and params.txt at the end
    checksums: dict[str, int]  # of the last checkpoint


def make_case(folder: Path, experiment: Experiment | None = None) -> Case:
    """Trains the run in `folder`, of `experiment` if there is one, and makes the killed workdir beside it."""
    run = get_config()
    run.experiment = experiment or run.experiment
    run.total_steps, run.logging.every_steps, run.evaluation.every_steps = STEPS, 1, 4
    run.checkpoint.every_steps, run.checkpoint.keep_last = 4, 4
    program = build_program(config.resolve(run))
    _, leaves = launch(program, folder / "whole")
    killed = Path(shutil.copytree(folder / "whole", folder / "killed"))
    shutil.rmtree(killed / "checkpoints" / str(STEPS))
    with subprocess.Popen((sys.executable, "-c", "")) as ended:
        pass
    holder = {"host": socket.gethostname(), "pid": ended.pid, "began": "1"}
    (killed / ".lock").write_text(json.dumps(holder))
    files = {name: (folder / "whole" / name).read_bytes() for name in ("metrics.jsonl", "config.json", "params.txt")}
    return Case(program, killed, leaves, files, checksums(folder / "whole"))


def launch(program: Program, folder: Path) -> tuple[list[str], dict[str, bytes]]:
    """The notes and warnings of a launch, and the bytes of each array of its last state."""
    shown = StringIO()
    faulthandler.dump_traceback_later(60, exit=True)  # a launch that hangs ends the benchmark
    try:
        state = train_program(program, folder, Progress(STEPS, shown))
    finally:
        faulthandler.cancel_dump_traceback_later()
    paths = jax.tree_util.tree_leaves_with_path(state)
    return said(shown.getvalue()), {jax.tree_util.keystr(keys): np.asarray(x).tobytes() for keys, x in paths}


def said(shown: str) -> list[str]:
    """The lines of a launch that tell of damage."""
    return [line for line in shown.splitlines() if re.match("note:|warning:", line)]


def checksums(folder: Path) -> dict[str, int]:
    """The checksum of each array of the last checkpoint."""
    return dict(Store(folder / "checkpoints", config.Checkpoint()).metadata(STEPS).checksums)


# Damages


def delete(path: Path) -> None:
    """Removes a file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def empty(path: Path) -> None:
    """Leaves a file or a folder without content."""
    is_folder = path.is_dir()
    delete(path)
    path.mkdir() if is_folder else path.write_bytes(b"")


def halve(path: Path) -> None:
    """Cuts a file to its first half, and removes every second file below a folder."""
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file())[::2]:
            file.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])


def garbage(path: Path) -> None:
    """Puts random bytes in place of those of a file, or a file of them into a folder."""
    noise = random.Random(path.name)
    if path.is_dir():
        (path / "stray").write_bytes(noise.randbytes(64))
    else:
        path.write_bytes(noise.randbytes(max(path.stat().st_size, 64)))


def other_type(path: Path) -> None:
    """Puts a folder in place of a file, or a file in place of a folder."""
    is_folder = path.is_dir()
    delete(path)
    path.write_bytes(b"a file") if is_folder else path.mkdir()


def link(path: Path) -> None:
    """Moves a file or a folder out of the workdir, and leaves a link to it."""
    outside = next(p for p in path.parents if p.name == "run").with_name("outside")
    outside.mkdir()
    path.rename(outside / path.name)
    path.symlink_to(outside / path.name)


def pipe(path: Path) -> None:
    """Puts a named pipe in place of a file or a folder; who opens it as a file waits for ever."""
    delete(path)
    os.mkfifo(path)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "deleted": delete,
    "empty": empty,
    "half": halve,
    "garbage": garbage,
    "other type": other_type,
    "link": link,
    "pipe": pipe,
}


# Places


def places(folder: Path) -> Iterator[Path]:
    """Every file and folder of a workdir, but only the newest of the checkpoints."""
    for path in sorted(folder.rglob("*")):
        names = path.relative_to(folder).parts
        if names[0] != "checkpoints" or len(names) == 1 or names[1] == str(NEWEST):
            yield path


def row_name(path: Path, folder: Path) -> str:
    """The row of the table for a place, without the names that differ from run to run."""
    name = path.relative_to(folder).as_posix() + ("/" if path.is_dir() else "")
    name = re.sub(r"^checkpoints/\d+", "checkpoints/STEP", name)
    name = re.sub(r"[0-9a-f]{32}", "*", name)
    return re.sub(r"(events\.out\.tfevents\.).*", r"\1*", name)


# Trials


def try_it(case: Case, damage: Callable[[Path], object], place: str, folder: Path, *, is_real: bool = False) -> Outcome:
    """How a launch ends after a copy of the killed workdir, in `folder`/run, was damaged at `place`."""
    shutil.rmtree(folder, ignore_errors=True)
    workdir = Path(shutil.copytree(case.killed, folder / "run"))
    damage(workdir / place)
    before, outside = content(workdir), content(folder / "outside")
    kept = readable(workdir / "metrics.jsonl")
    leaves: dict[str, bytes] | None = None
    try:
        if is_real:
            lines = command(workdir)
        else:
            lines, leaves = launch(case.program, workdir)
    except (UserError, HostError) as error:
        if "\n" in str(error) or content(workdir) != before:
            return Outcome(FAILED, f"something changed, or it is not one line: {error}")
        return Outcome(REFUSED, str(error))
    except Exception as error:
        return Outcome(FAILED, f"{type(error).__name__}: {error}")
    text = "; ".join(lines)
    if problem := difference(case, workdir, leaves, kept if place == "metrics.jsonl" else None):
        return Outcome(FAILED, f"{problem} differs ({text})")
    if content(folder / "outside") != outside:
        return Outcome(FAILED, "the target of the link was changed")
    if len(lines) > 1:
        return Outcome(FAILED, f"more than one line: {text}")
    if not lines:
        return Outcome(UNNOTICED, "")
    return Outcome(EARLIER if "is not used and was moved" in text else SAID, text)


def difference(case: Case, workdir: Path, leaves: dict[str, bytes] | None, kept: set[bytes] | None) -> str:
    """The first difference from a run without damage; "" for none.

    A damaged metrics.jsonl has to hold its readable rows, `kept`, and the new ones.
    """
    if leaves is not None and leaves != case.leaves:
        return "the last state"
    if checksums(workdir) != case.checksums:
        return "the last checkpoint"
    for name, whole in case.files.items():
        now = (workdir / name).read_bytes()
        if name == "metrics.jsonl" and kept is not None:
            # A lost row of an evaluation of the newest checkpoint is owed, and made again.
            rows = [(row, json.loads(row)) for row in whole.splitlines()]
            new = [row for row, values in rows if values["step"] > NEWEST or _is_owed(values)]
            expected = [row for row, _ in rows if row in kept or row in new]
            if now.splitlines() not in ([row for row, _ in rows], expected):
                return name
        elif now != whole:
            return name
    return ""


def _is_owed(row: dict[str, Any]) -> bool:
    return row["step"] == NEWEST and any(name.startswith("test/") for name in row)


def readable(file: Path) -> set[bytes]:
    """The lines of a file that are rows of metrics."""
    if not file.is_file() or file.is_symlink():
        return set()
    return {line for line in file.read_bytes().splitlines() if row_or_none(line) is not None}


def content(folder: Path) -> dict[str, Any]:
    """The type and the bytes of everything below a folder, but for the lock."""
    found = {}
    for path in folder.rglob("*"):
        if path.name != ".lock":
            kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "file" if path.is_file() else "other"
            found[str(path.relative_to(folder))] = kind, path.read_bytes() if kind == "file" else None
    return found


def command(workdir: Path) -> list[str]:
    """The notes and warnings of a real launch; raises `UserError` if it is refused in one line."""
    line = (sys.executable, "-m", "trainer", "train", "--config=configs/toy.py", *FLAGS, f"--workdir={workdir}")
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode in (2, 3) and re.fullmatch("error: .*\n", done.stderr):
        raise UserError(done.stderr.removeprefix("error: ").rstrip())
    if done.returncode or done.stderr:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr}")
    return said(done.stdout)


def flip(bit: int) -> Callable[[Path], None]:
    """A damage that flips one bit of a file, counted from its beginning."""

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)

    return damage


def flips(case: Case, count: int, seed: int) -> Iterator[tuple[str, int]]:
    """Places and bits: a quarter in small files, each as likely; the others as likely as their file is large."""
    rng = random.Random(seed)
    files = [path for path in places(case.killed / "checkpoints" / str(NEWEST)) if path.is_file()]
    files.sort(key=lambda path: (row_name(path, case.killed), path.stat().st_size))  # other names differ by the run
    files = [path for path in files if path.stat().st_size]
    small = [path for path in files if path.stat().st_size < SMALL]
    for i in range(count):
        if i % 4 == 0:
            path = rng.choice(small)
        else:
            (path,) = rng.choices(files, [file.stat().st_size for file in files])
        yield str(path.relative_to(case.killed)), rng.randrange(8 * path.stat().st_size)


# The page


def table_of(cells: dict[tuple[str, str], list[Outcome]]) -> str:
    """The outcomes as a Markdown table: a row for each place, a column for each damage."""
    rows = list(dict.fromkeys(place for place, _ in cells))
    lines = [f"| file | {' | '.join(DAMAGES)} |", f"|---|{'---|' * len(DAMAGES)}"]
    for place in rows:
        kinds = [sorted({outcome.kind for outcome in cells.get((place, damage), [])}) for damage in DAMAGES]
        lines.append(f"| `{place}` | {' | '.join(' or '.join(k) for k in kinds)} |")
    return "\n".join(lines)


def write_page(text: str) -> None:
    """Renews the part of docs/guarantees.md between the two comments."""
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def main() -> int:
    """Makes the trials, and prints the table and the flips."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", type=int, default=12, help="trials of each kind that are also made by the command")
    parser.add_argument("--write", action="store_true", help="renew the table in docs/guarantees.md")
    options = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # as the command does
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="damage-") as name:
        case = make_case(Path(name))
        text = _all(case, Path(name) / "trial", options)
    print(header(), "", text, f"\n{time.monotonic() - began:.0f} s", sep="\n")
    if options.write:
        write_page(text)
    return 1 if FAILED in text else 0


def _all(case: Case, folder: Path, options: argparse.Namespace) -> str:
    cells: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    trials = [(place, name) for place in places(case.killed) for name in DAMAGES]
    for place, name in trials:
        key = row_name(place, case.killed), name
        cells[key].append(_shown(case, DAMAGES[name], place.relative_to(case.killed), folder, f"{key[0]} {name}"))
    ends = Counter(outcome.kind for outcomes in cells.values() for outcome in outcomes)
    real: Counter[str] = Counter()
    for place, name in trials[:: max(len(trials) // max(options.real, 1), 1)] if options.real else []:
        relative = place.relative_to(case.killed)
        real[_shown(case, DAMAGES[name], relative, folder, f"command: {relative} {name}", is_real=True).kind] += 1
    flipped: list[tuple[str, Outcome]] = []
    for place, bit in flips(case, options.flips, options.seed):
        flipped.append((place, _shown(case, flip(bit), Path(place), folder, f"flip {len(flipped)} {place} {bit}")))
    found = Counter(outcome.kind for _, outcome in flipped)
    files = len({place for place, _ in flipped})
    return (
        f"{table_of(cells)}\n\n{len(trials)} trials: {_counted(ends)}. "
        f"{real.total()} of the trials were repeated with the command `python -m trainer train` in a new process: "
        f"{_counted(real)}. The others share one compiled program in one process.\n\n"
        f"Flips of one bit, seed {options.seed}: {len(flipped)} in {files} files of the newest step. "
        f"{found[EARLIER] + found[SAID]} were detected, {found[UNNOTICED]} were harmless, "
        f"{found[FAILED] + found[REFUSED]} ended otherwise; after each the run went on to the same state and metrics."
    )


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def _shown(
    case: Case, damage: Callable[[Path], None], place: Path, folder: Path, name: str, *, is_real: bool = False
) -> Outcome:
    outcome = try_it(case, damage, str(place), folder, is_real=is_real)
    print(f"{name}: {outcome.kind} {outcome.text}"[:600], file=sys.stderr, flush=True)
    return outcome


if __name__ == "__main__":
    sys.exit(main())
