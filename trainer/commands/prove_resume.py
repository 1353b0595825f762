"""`prove-resume`: a run that is killed at random moments and relaunched, compared with an undisturbed one."""

import argparse
import itertools
import json
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from trainer.commands.arguments import child_flags, resolve_arguments
from trainer.errors import UserError
from trainer.observe import table

if TYPE_CHECKING:  # these import JAX
    from trainer.prove.launch import ProcessLayout
    from trainer.prove.proof import Proof

DESCRIPTION = (
    "Trains a run undisturbed, then again while it kills the real process at random moments and relaunches it, and "
    "compares the final state, the example ids of every batch, every metric and every evaluation, bit for bit. The "
    "exit code is 1 if anything differs."
)
_COLUMNS = ("launch", "processes × devices", "signal", "phase", "step", "exit code", "seconds")
_SHOWN = 5  # differences


def add_options(parser: argparse.ArgumentParser) -> None:
    """The kills, the process layouts of the launches, limits, and the folders to keep or to check again."""
    parser.add_argument("--kills", metavar="N", type=int, default=20, help="how many kills (default 20)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the moments of the kills (default 0)")
    lists = {"metavar": "N,N,…", "default": ""}
    parser.add_argument("--devices", help="CPU devices of each process (default: the devices of this machine)", **lists)
    processes = "processes (default 1); a list: each launch picks one value at random"
    parser.add_argument("--processes", help=processes, **lists)
    parser.add_argument("--strategies", metavar="NAME,…", default="", help="values of parallel.strategy")
    tolerance = "with several process layouts: how far losses may be apart, relative to their size (default 1e-4)"
    parser.add_argument("--tolerance", metavar="X", type=float, default=1e-4, help=tolerance)
    limit = "how long a launch may make no progress, or outlive its signal (default 600)"
    parser.add_argument("--limit", metavar="SECONDS", type=float, default=600, help=limit)
    parser.add_argument("--keep", metavar="DIR", help="keep every workdir, trace and output in this new folder")
    parser.add_argument("--check", metavar="DIR", help="only compare again what --keep left in this folder")


def start(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Makes the proof and shows it; the exit code is 1 if anything differs."""
    for name, least in (("kills", 1), ("seed", 0), ("tolerance", 0)):
        if not getattr(options, name) >= least:
            raise UserError(f"--{name} is {getattr(options, name):g}; it must be at least {least}")
    if not options.limit > 0:
        raise UserError(f"--limit is {options.limit:g}; it must be above 0")
    if options.workdir is not None:
        raise UserError("prove-resume makes workdirs of its own; name a folder to keep them in with --keep=DIR")
    keep = Path(options.keep) if options.keep else None
    if keep is not None and keep.is_dir() and any(keep.iterdir()):
        raise UserError(f"--keep={keep} is not empty; name a new folder")
    if options.check:
        return _check(Path(options.check))
    if options.config is None:
        raise UserError("give --config=FILE")
    layouts = _layouts(options)
    import jax

    jax.config.update("jax_platforms", "cpu")  # the devices of this machine belong to the launches
    run = resolve_arguments(options, overrides).run
    for strategy in filter(None, dict.fromkeys(layout.strategy for layout in layouts)):
        resolve_arguments(options, [*overrides, f"--config.parallel.strategy={strategy}"])  # raises for an unknown name
    from trainer.prove.proof import Proof

    began = time.monotonic()
    folder = keep.absolute() if keep is not None else Path(tempfile.mkdtemp(prefix="prove-resume-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--keep={keep} cannot be made: {error.strerror}; name a new folder") from error
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _interrupt)  # raise instead of dying, so that the child processes are ended first
    proof = Proof(
        [f"--config={options.config}", *child_flags(options), *overrides],
        run.total_steps,
        layouts,
        options.kills,
        options.seed,
        folder,
        tolerance=options.tolerance,
        limit=options.limit,
        show=lambda text: print(text, flush=True),
        keeps=keep is not None,
    )
    try:
        differences = proof.run()
        return _report(proof, differences, time.monotonic() - began)
    finally:
        if keep is None:
            shutil.rmtree(folder)


def _interrupt(signum: int, _: FrameType | None) -> NoReturn:
    error = KeyboardInterrupt("interrupted")
    error.signum = signum  # pyrefly: ignore[missing-attribute] - read for the exit code
    raise error


def _layouts(options: argparse.Namespace) -> list["ProcessLayout"]:
    from trainer.prove.launch import ProcessLayout

    processes, devices = (_numbers(name, getattr(options, name)) for name in ("processes", "devices"))
    strategies = [name.strip() for name in options.strategies.split(",") if name.strip()]
    chosen = itertools.product(processes or [1], devices or [None], strategies or [None])
    return [ProcessLayout(*choice) for choice in chosen]


def _numbers(name: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--{name} is {text!r}; numbers from 1 on are expected, separated by commas")
    return [int(part) for part in parts]


def _report(proof: "Proof", differences: Sequence[str], seconds: float) -> int:
    """Shows the table of kills, how many came in each phase, and the result; returns the exit code."""
    from trainer.prove.proof import hits, kill_rows

    right = ("step", "exit code", "seconds")
    print("\n" + table(_COLUMNS, kill_rows(proof.kills), right=right))
    counts = hits(proof.kills)
    phases = sorted({phase for phase, _ in counts})
    rows = [(phase, *(str(counts[phase, signum]) for signum in ("SIGKILL", "SIGTERM"))) for phase in phases]
    print(table(("phase", "SIGKILL", "SIGTERM"), rows, right=("SIGKILL", "SIGTERM")))
    print(f"{seconds:.0f} s, {seconds / max(len(proof.kills), 1):.1f} s a kill")
    if differences:
        return _show_differences(differences)
    print(proof.summary())
    return 0


def _show_differences(differences: Sequence[str]) -> int:
    for text in differences[:_SHOWN]:
        print(f"different: {text}")
    if len(differences) > _SHOWN:
        print(f"and {len(differences) - _SHOWN:,} more differences")
    return 1


def _check(folder: Path) -> int:
    """Compares the folders that a proof kept, and shows the result; returns the exit code."""
    from trainer.prove.compare import KILLED, SETTINGS, UNDISTURBED, compare

    settings, killed = folder / SETTINGS, sorted(folder.glob(f"{KILLED}*"))
    if not settings.exists() or not killed:
        raise UserError(f"--check={folder} holds nothing that prove-resume --keep left")
    tolerance = json.loads(settings.read_text())["tolerance"]
    results = [compare(folder / UNDISTURBED, one, tolerance=tolerance) for one in killed]
    differences = [text for result in results for text in result.differences]
    if differences:
        return _show_differences(differences)
    print(f"{len(killed)} killed runs are equal to the undisturbed one")
    return 0
