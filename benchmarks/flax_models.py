"""Three models of Flax's examples, unchanged: this harness against the loop of `benchmarks.flax_loop`.

    python -m benchmarks.flax_models [--rounds=9] [--models vae resnet lm1b]

For the VAE, ImageNet's ResNet-18 with 16 filters and the lm1b transformer, it prints two ratios of the harness to the
loop. The first is that of the times from the start of the process to the line of the first step, without a compilation
cache: the median over 7 launches of each side, in turn. The second is that of the steps a second, once the harness has
compiled its evaluation in the background. For it the processes of all sides run at once, but all except one are stopped
by SIGSTOP: in each round every side makes the same number of steps, in an order that turns round from one round to the
next. The ratio is that of the median times. Whole launches one after the other differ by a tenth, because a shared
machine does.

Both sides log every 50 steps, and evaluate and save nothing. The harness computes the norm of the gradient in every
step, to stop at a NaN, so the loop is also measured with it ("loop-norm"). The files are those of
`tests/flax_examples/`, with models from Flax's source distribution. The VAE has this harness's own `adam`, and
`optax.adam` in the loop.
"""

import argparse
import importlib.metadata
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import header

ROOT = Path(__file__).parents[1]
EXAMPLES = {"vae": "vae", "resnet": "imagenet", "lm1b": "lm1b"}
SIDES = ("loop", "harness", "loop-norm")
LAUNCHES = 7
EVERY = 50
# The steps before the measured ones, and the steps of a side in each round.
MEASURED = {"vae": (1000, 500), "resnet": (100, 50), "lm1b": (100, 50)}


def fetch(folder: Path) -> None:
    """Puts the experiments and the models of Flax into a folder."""
    version = importlib.metadata.version("flax")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "flax", f"flax=={version}"]
    subprocess.run([*pip, "--dest", str(folder)], check=True, capture_output=True)
    with tarfile.open(folder / f"flax-{version}.tar.gz") as archive:
        for name, example in EXAMPLES.items():
            member = archive.extractfile(f"flax-{version}/examples/{example}/models.py")
            assert member is not None
            (folder / f"{name}_models.py").write_bytes(member.read())
            shutil.copy(ROOT / "tests" / "flax_examples" / f"{name}.py", folder)


class Side:
    """A process that trains, and the lines of its steps."""

    def __init__(self, command: list[str], folder: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self.process = subprocess.Popen(command, cwd=folder, env=environment, **pipes)

    def run_to(self, step: int) -> float:
        """Lets the process run until the line of a step, and stops it; returns the seconds that it took."""
        began = time.perf_counter()
        self.process.send_signal(signal.SIGCONT)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            words = line.replace("/", " ").split()
            if words[:2] == ["step", str(step)]:
                self.process.send_signal(signal.SIGSTOP)
                return time.perf_counter() - began
        raise SystemExit(f"{self.process.args} ended before step {step}")

    def kill(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()


def command(side: str, name: str, steps: int, every: int, workdir: Path) -> list[str]:
    """The command of a side that makes so many steps, and prints a line of every so many."""
    if side == "harness":
        shutil.rmtree(workdir, ignore_errors=True)
        flags = [f"--config={name}.py", f"--workdir={workdir}", "--compilation-cache=off"]
        flags += [f"--config.total_steps={steps}", f"--config.logging.every_steps={every}"]
        flags += [f"--config.{part}.every_steps=1000000" for part in ("evaluation", "checkpoint")]
        return [sys.executable, "-m", "trainer", "train", *flags]
    norm = ["norm"] if side == "loop-norm" else []
    return [sys.executable, "-m", "benchmarks.flax_loop", name, str(steps), str(every), *norm]


def measure_launches(name: str, folder: Path) -> float:
    """The harness's median time to the line of the first step, divided by the loop's."""
    times: dict[str, list[float]] = {"loop": [], "harness": []}
    for number in range(LAUNCHES):
        for side, found in list(times.items())[:: -1 if number % 2 else 1]:
            process = Side(command(side, name, 1000, 1, folder / "run"), folder)
            found.append(process.run_to(1))
            process.kill()
    medians = {side: statistics.median(found) for side, found in times.items()}
    print(f"{name}: first step after {medians['loop']:.2f} s of the loop, {medians['harness']:.2f} s", flush=True)
    return medians["harness"] / medians["loop"]


def measure_steps(name: str, folder: Path, rounds: int) -> dict[str, float]:
    """The median seconds that each side takes for the steps of a round."""
    first, steps = MEASURED[name]
    total = first + rounds * steps + EVERY  # not to be at the end, where a run is saved
    processes: dict[str, Side] = {}
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    try:
        for side in SIDES:
            processes[side] = Side(command(side, name, total, EVERY, folder / "run"), folder)
            processes[side].run_to(first)
        for number in range(rounds):
            for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                times[side].append(processes[side].run_to(first + (number + 1) * steps))
            print(f"{name}: " + ", ".join(f"{side} {steps / times[side][-1]:.2f}" for side in SIDES), flush=True)
    finally:
        for process in processes.values():
            process.kill()
    return {side: statistics.median(found) for side, found in times.items()}


def main() -> None:
    """Prints the ratios of each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", nargs="+", choices=list(EXAMPLES), default=list(EXAMPLES))
    options = parser.parse_args()
    print(header())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        fetch(folder)
        resnet = folder / "resnet.py"
        resnet.write_text(resnet.read_text().replace("filters: int = 64", "filters: int = 16"))
        for name in options.models:
            launch = measure_launches(name, folder)
            times = measure_steps(name, folder, options.rounds)
            print(f"{name}: launch to first step {launch:.3f} (bar: 1.15)", end=", ")
            print(f"steps/s {times['loop'] / times['harness']:.3f} of the loop's (bar: 0.98)", end=", ")
            print(f"{times['loop-norm'] / times['harness']:.3f} of the loop with the norm", flush=True)


if __name__ == "__main__":
    main()
