"""How long a run takes from a signal to its end, with its state saved: by default a state of 400 MB.

    python -m benchmarks.signals [--rounds=3] [--width=832]

The real command trains a decoder of four layers, makes some steps, and gets SIGTERM at a random moment of a step. The
time is that until its process has ended, with the newest state on disk (`grace_seconds` is 20).
"""

import argparse
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import header

FLAGS = (
    "--config=configs/shakespeare.py",
    "--config.experiment.layers=4",
    "--config.experiment.heads=8",
    "--config.experiment.length=16",
    "--config.batch_size=1",
    "--config.total_steps=100000",
    "--config.logging.every_steps=1",
    "--config.checkpoint.every_steps=100000",
    "--config.evaluation.every_steps=None",
)


def end(arguments: list[str], delay: float) -> tuple[float, str]:
    """Seconds from SIGTERM, `delay` seconds after the fifth step, to the end, and what the run said."""
    command = [sys.executable, "-m", "trainer", "train", *FLAGS, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        steps = 0
        while steps < 5:
            steps += process.stdout.readline().startswith("step")
        time.sleep(delay)
        began = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
        process.wait()
        return time.perf_counter() - began, process.stderr.read()


def main() -> None:
    """Prints the time of each round and the median."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=832)
    options = parser.parse_args()
    print(header())
    rng, times = random.Random(0), []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            workdir = Path(folder) / "run"
            widths = (f"width={options.width}", f"mlp_width={4 * options.width}")
            flags = [f"--workdir={workdir}", *(f"--config.experiment.{width}" for width in widths)]
            seconds, said = end(flags, rng.uniform(0, 1))
            if not re.search(r"stopped by SIGTERM at step \d+, which is saved", said):
                raise RuntimeError(said)
            size = sum(file.stat().st_size for file in (workdir / "checkpoints").rglob("*") if file.is_file())
            times.append(seconds)
            print(f"{size / 1e6:,.0f} MB saved and ended {seconds:.1f} s after SIGTERM")
    print(f"median {statistics.median(times):.1f} s")


if __name__ == "__main__":
    main()
