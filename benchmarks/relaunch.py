"""How long a launch takes to its first step, without and with the compilation cache.

    python -m benchmarks.relaunch [--rounds=3] [--config=FILE --config.any.field=value …]

In each round, in turn: a cold launch with an empty cache, and a warm relaunch that restores its checkpoint. The times
are those of the real command, from its start to the line of the first step. By default: `configs/shakespeare.py` with a
decoder of twelve layers, on one device.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import header

DECODER = (
    "--config=configs/shakespeare.py",
    "--config.experiment.sample=0",
    "--config.experiment.dtype=bfloat16",
    "--config.experiment.layers=12",
    "--config.experiment.heads=12",
    "--config.experiment.width=72",
    "--config.experiment.mlp_width=288",
    "--config.experiment.vocab=3264",
    "--config.experiment.length=128",
    "--config.batch_size=8",
    "--config.evaluation.batch_size=8",
    "--config.optimizer.clip_norm=1.0",
    "--config.optimizer.schedule.warmup=2",
    "--config.optimizer.schedule.run_steps=1000",
)


def launch(arguments: list[str], steps: int = 1000) -> float:
    """Seconds from the start of the command to the line of its first step; it is killed four steps later."""
    flags = ("--config.logging.every_steps=1", f"--config.total_steps={steps}", "--config.checkpoint.every_steps=2")
    command = [sys.executable, "-m", "trainer", "train", *arguments, *flags]
    began, lines, taken = time.perf_counter(), 0, 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step"):
                taken, lines = taken or time.perf_counter() - began, lines + 1
            if lines == 5:
                process.kill()
    if not taken:
        raise RuntimeError(f"no step: {command}")
    return taken


def main() -> None:
    """Prints the times and their ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    options, rest = parser.parse_known_args()
    print(header())
    cold, warm = [], []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            flags = [
                *(rest or DECODER),
                f"--workdir={Path(folder) / 'run'}",
                f"--compilation-cache={Path(folder) / 'cache'}",
            ]
            cold.append(launch(flags))
            warm.append(launch(flags))
        print(f"cold {cold[-1]:.2f} s, warm {warm[-1]:.2f} s")
    ratio = statistics.median(w / c for w, c in zip(warm, cold, strict=True))
    print(f"warm / cold: {ratio:.3f} (bar: 0.35)")


if __name__ == "__main__":
    main()
