"""A sweep in a process of its own, over cells that a short script stands in for: `python -m tests.sweep.many`."""

import sys
from pathlib import Path

from tests.tasks import make_run
from trainer import config
from trainer.commands.arguments import override
from trainer.sweep.cells import Cell, make_cells
from trainer.sweep.halving import targets
from trainer.sweep.pool import Pool
from trainer.sweep.results import Results

STEPS = 20
# Trains nothing: notes its process and its times, and writes the row of an evaluation.
SCRIPT = """
import json, os, pathlib, sys, time
workdir, until, seconds = pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
began = time.time()
(workdir / "pid").write_text(str(os.getpid()))
time.sleep(seconds)
with (workdir / "metrics.jsonl").open("a") as file:
    file.write(json.dumps({"step": until, "test/accuracy": 0.5}) + "\\n")
with (workdir / "launches").open("a") as file:
    file.write(f"{began} {time.time()}\\n")
"""


def cells_of(seeds: int) -> list[Cell]:
    return make_cells(make_run(STEPS), config.Sweep(grid={"seed": range(seeds)}), override)[0]


def train_all(folder: Path, cells: list[Cell], seconds: float, jobs: int = 1) -> list[str]:
    """Runs the script for each cell; returns the lines that are shown."""
    results, shown = Results(folder, "test/accuracy", "max"), list[str]()

    def command(cell: Cell, until: int) -> list[str]:
        return [sys.executable, "-S", "-c", SCRIPT, str(results.workdir(cell)), str(until), str(seconds)]

    with Pool(results, command, jobs, shown.append) as pool:
        pool.run(cells, lambda: targets(cells, results.value, results.mode))
    return shown


if __name__ == "__main__":
    print("\n".join(train_all(Path(sys.argv[1]), cells_of(int(sys.argv[2])), float(sys.argv[3]))))
