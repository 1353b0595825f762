"""`sweep`: a run with many combinations of settings, and a comparison of their results."""

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.commands.arguments import child_flags, load_config_and_sweep, override
from trainer.errors import UserError

if TYPE_CHECKING:  # these import JAX
    from trainer.config import Sweep
    from trainer.sweep.cells import Cell
    from trainer.sweep.results import Results

DESCRIPTION = (
    "Trains a run with each combination of some settings, each in a workdir of its own in --workdir, and compares the "
    "results. The same command goes on after a kill; started on several machines that share the folder, it shares the "
    "work. get_sweep() of the config file may give what the flags give."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the settings that vary, how the cells are compared, and where and how they run."""
    many: dict[str, Any] = {"action": "append", "default": []}
    grid = "values of a setting, such as optimizer.schedule.peak=1e-3,3e-3; with several, all combinations are trained"
    drawn = (
        "draw a setting at random from LOW:HIGH, LOW:HIGH:log, or values, such as optimizer.schedule.peak=1e-4:1e-2:log"
    )
    parser.add_argument("--grid", metavar="PATH=VALUE,VALUE", help=grid, **many)
    parser.add_argument("--random", metavar="PATH=LOW:HIGH[:log]", help=drawn, **many)
    parser.add_argument("--trials", metavar="N", type=int, help="how many random draws (default 1)")
    parser.add_argument("--search-seed", metavar="N", type=int, help="of the random draws (default 0)")
    metric = "what to compare by, such as test/accuracy (default: checkpoint.best_metric, or the loss)"
    parser.add_argument("--metric", metavar="NAME", help=metric)
    parser.add_argument("--mode", metavar="max|min", help="whether the best value is the largest or the smallest")
    halving = "successive halving: at each rung the best 1/ETA of the cells go on, each to ETA times as many steps"
    parser.add_argument("--halving", metavar="ETA", type=int, help=halving)
    parser.add_argument("--first-rung", metavar="STEP", type=int, help="the first step at which --halving compares")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="cells trained at a time (default 1)")
    parser.add_argument(
        "--cell", metavar="I", type=int, help="train only this cell, counted from 0: for an array of jobs"
    )
    once = "cells that differ only in seed, values of schedules and weight decays share a compiled program"
    parser.add_argument("--compile-once", action="store_true", help=once)
    parser.add_argument("--report", action="store_true", help="only show the results so far")


def start(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Trains the cells that are left, writes results.csv and results.png, and shows the table.

    The exit code is that of the cells that failed if all failed alike, else 1; with --cell that of the cell.
    """
    _check(options)
    import jax

    jax.config.update("jax_platforms", "cpu")  # the devices of this machine belong to the cells
    from trainer.sweep.cells import make_cells
    from trainer.sweep.halving import check_halving, targets
    from trainer.sweep.results import Results, exit_code, metric_and_mode
    from trainer.sweep.workdirs import check_workdirs, write_settings

    run, file_sweep = load_config_and_sweep(options.config)
    sweep = _sweep(options, file_sweep)
    for path in (*sweep.grid, *sweep.random):
        if any(flag.lstrip("-").removeprefix("no").split("=")[0] == f"config.{path}" for flag in overrides):
            raise UserError(f"{path} varies and is also given by --config.{path}: give one of them")
    cells, duplicate_count = make_cells(_common_run(run, overrides), sweep, override)
    if options.cell is not None and not 0 <= options.cell < len(cells):
        raise UserError(f"--cell is {options.cell}; the sweep has the cells 0 to {len(cells) - 1}")
    if sweep.halving is not None:
        check_halving(cells, sweep.halving, sweep.first_rung)
    results = Results(_folder(options.workdir), *metric_and_mode(cells[0].run, sweep.metric, sweep.mode))

    def steps() -> Mapping[str, int]:
        return targets(cells, results.value, results.mode, sweep.halving, sweep.first_rung)

    chosen = cells if options.cell is None else [cells[options.cell]]
    check_workdirs(cells, results)
    if not options.report:
        if duplicate_count:
            print(f"{duplicate_count} draws gave cells that are there already")
        print(
            f"{len(cells)} cells in {results.folder}, {len(chosen)} for this process, {options.jobs} at a time",
            flush=True,
        )
        write_settings(chosen, results)
        _train(options, chosen, results, steps)
    last_steps = steps()  # reads the results of all cells
    _show(cells, results, last_steps)
    return exit_code([failure for cell in chosen if (failure := _failure(results, cell, last_steps[cell.name]))])


def _check(options: argparse.Namespace) -> None:
    """Raises `UserError` for flags that are out of range or that contradict each other."""
    if options.config is None:
        raise UserError("give --config=FILE")
    if options.workdir is None:
        raise UserError("give --workdir=DIR, the folder that the cells are kept in")
    for name, least in (("jobs", 1), ("trials", 1), ("search_seed", 0)):
        if (number := getattr(options, name)) is not None and number < least:
            raise UserError(f"--{name.replace('_', '-')} is {number}; it must be at least {least}")
    if options.cell is not None and options.report:
        raise UserError("--report shows all cells: leave out --cell")


def _sweep(options: argparse.Namespace, file_sweep: Any) -> "Sweep":
    """The sweep of the config file with what the flags give; raises `UserError`."""
    from trainer import config

    sweep = config.Sweep() if file_sweep is None else file_sweep
    if not isinstance(sweep, config.Sweep):
        raise UserError(f"get_sweep in {options.config!r} returned a {type(sweep).__name__}; a Sweep is expected")
    given: dict[str, Any] = {
        name: dict(getattr(sweep, name)) | _axes(name, getattr(options, name)) for name in ("grid", "random")
    }
    for name in ("trials", "search_seed", "metric", "mode", "halving", "first_rung"):
        if (value := getattr(options, name)) is not None:
            given[name] = value
    sweep = dataclasses.replace(sweep, **given)
    if options.trials is not None and not sweep.random:
        raise UserError("--trials counts random draws; give --random PATH=LOW:HIGH")
    if sweep.first_rung is not None and sweep.halving is None:
        raise UserError("--first-rung is for --halving=ETA")
    if sweep.halving is not None and options.cell is not None:
        alone = "decides by the results of all cells which go on"
        raise UserError(f"--halving {alone}: start the command without --cell in each job, and they share the cells")
    return sweep


def _axes(name: str, texts: Sequence[str]) -> dict[str, str]:
    """The values by path that flags give; raises `UserError` for a flag without values, and for a second one."""
    axes = {}
    for text in texts:
        path, equals, values = text.partition("=")
        path = path.strip().removeprefix("config.")
        if not (path and equals and values.strip()):
            expected = "PATH=VALUE,VALUE" if name == "grid" else "PATH=LOW:HIGH"
            raise UserError(f"--{name} is {text!r}; {expected} is expected, such as {_EXAMPLES[name]}")
        if path in axes:
            raise UserError(f"--{name} {path} is given twice: give all its values at once")
        axes[path] = values
    return axes


_EXAMPLES = {"grid": "seed=0,1,2", "random": "optimizer.schedule.peak=1e-4:1e-2:log"}


def _common_run(run: Any, overrides: Sequence[str]) -> Any:
    """Applies the overrides to the run of the config file, and returns it: what all cells have in common."""
    from trainer import config

    config.check_types(run)
    return override(run, overrides)


def _folder(path: str) -> Path:
    """The folder of the sweep; raises `UserError` if it cannot be one."""
    from trainer.files import is_bucket

    if is_bucket(path):
        raise UserError(f"--workdir={path} is in a bucket, which has no locks: a sweep needs a folder")
    folder = Path(path)
    if (folder / "config.json").exists():
        raise UserError(f"--workdir={path} is the workdir of a run; a sweep needs a folder of its own")
    if found := next((place for place in (folder, *folder.parents) if place.exists() and not place.is_dir()), None):
        raise UserError(f"--workdir={path}: {found} is no folder")
    return folder


def _train(options: argparse.Namespace, cells: "Sequence[Cell]", results: "Results", steps: Any) -> None:
    """Trains the cells; raises KeyboardInterrupt if a signal came."""
    from trainer.sweep.cells import constants
    from trainer.sweep.pool import Pool

    flags = [*(["--compile-once"] if options.compile_once else []), *child_flags(options)]

    def command(cell: "Cell", until: int) -> list[str]:
        stop = [] if until == cell.run.total_steps else [f"--until={until}"]
        return [sys.executable, "-m", "trainer", "train", f"--workdir={results.workdir(cell)}", *stop, *flags]

    alike = constants if options.compile_once else None
    with Pool(results, command, options.jobs, lambda text: print(text, flush=True), alike) as pool:
        pool.run(cells, steps)
    if pool.signum is not None:
        error = KeyboardInterrupt("the cells that ran are saved; the same command goes on")
        error.signum = pool.signum  # pyrefly: ignore[missing-attribute] - read for the exit code
        raise error


def _failure(results: "Results", cell: "Cell", step: int) -> Any:
    return None if results.metrics(cell, step) is not None else results.failure(cell)


def _show(cells: "Sequence[Cell]", results: "Results", steps: Mapping[str, int]) -> None:
    """Prints the table, and writes it with the CSV file and the plot."""
    from trainer.files import host_error, write_text
    from trainer.sweep import report

    found = report.outcomes(cells, results, steps)
    groups = report.ranked(found, results)
    print("\n" + report.table_text(groups, results), end="")
    if not results.folder.is_dir():
        return
    try:
        write_text(results.folder / "results.csv", report.csv_text(found))
        if importlib.util.find_spec("matplotlib") is not None:
            report.figure(groups, results).savefig(results.folder / "results.png")
    except OSError as error:
        raise host_error(results.folder, error) from error
    drawn = "results.png" if importlib.util.find_spec("matplotlib") else "no plot: pip install 'belief-trainer[sweep]'"
    print(f"written to {results.folder}: results.csv, {drawn}")
