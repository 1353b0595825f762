"""The promises in the docstrings of the configs, against the results of their whole runs.

    python -m benchmarks.accuracy [configs/digits.py …]

Each config is trained and evaluated by the README's commands, in a folder of its own. The data sets must be prepared.
About half an hour on two cores for all. The exit code is 1 if a promise is not kept.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import header
from trainer.observe import table

# The metric, what is promised, and whether more is better.
PROMISES = {
    "configs/digits.py": ("accuracy", 0.97, True),
    "configs/fashion_mnist.py": ("accuracy", 0.91, True),
    "configs/fashion_mnist_resnet18.py": ("accuracy", 0.93, True),
    "configs/finetune_digits.py": ("accuracy", 0.97, True),
    "configs/shakespeare.py": ("bits_per_byte", 2.5, False),
    "configs/shakespeare_muon.py": ("bits_per_byte", 2.35, False),
}
SOURCES = {"configs/finetune_digits.py": "configs/fashion_mnist.py"}  # trained before, for `init_from`


def reached(config: str, metric: str) -> tuple[float, float]:
    """The metric that `evaluate` prints after the whole run, and the seconds of training."""
    with tempfile.TemporaryDirectory() as folder:
        workdir, first, flags = f"--workdir={Path(folder) / 'run'}", Path(folder) / "first", []
        command = [sys.executable, "-m", "trainer"]
        if config in SOURCES:
            train = [*command, "train", f"--config={SOURCES[config]}", f"--workdir={first}"]
            subprocess.run(train, stdout=subprocess.DEVNULL, check=True)
            flags = [f"--init-from={first}@best"]
        began = time.perf_counter()
        train = [*command, "train", f"--config={config}", workdir, *flags]
        subprocess.run(train, stdout=subprocess.DEVNULL, check=True)
        seconds = time.perf_counter() - began
        shown = subprocess.run([*command, "evaluate", workdir], capture_output=True, text=True, check=True).stdout
    found = re.search(rf"^test {metric}: ([\d.]+)$", shown, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"no {metric}: {shown}")
    return float(found[1]), seconds


def main() -> int:
    """Prints a line for each config."""
    print(header())
    rows, kept = [], True
    for config in sys.argv[1:] or PROMISES:
        metric, promise, more = PROMISES[config]
        value, seconds = reached(config, metric)
        kept &= value >= promise if more else value <= promise
        rows.append((config, metric, f"{'≥' if more else '≤'} {promise}", f"{value:.4f}", f"{seconds:.0f}"))
    print(table(("config", "metric", "promised", "reached", "seconds"), rows), end="")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
