"""Steps a second of `trainer train` on the CPU, with huge pages for glibc's `malloc` and without.

    python -m benchmarks.huge_pages [--rounds=3] [--steps=150] [--config=FILE --config.any.field=value …]

In each round, in turn: the real command, with GLIBC_TUNABLES=glibc.malloc.hugetlb=1 and as it is. The rate is that
between the rows of a third of the steps and the last. By default: `configs/shakespeare.py`. It also prints the largest
resident memory of each side. The kernel must have huge pages on request: "[madvise]" in
/sys/kernel/mm/transparent_hugepage/enabled. Where it says "[always]", both sides have them.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import header

SIDES = {"huge pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, "as it is": dict[str, str]()}


def measure(config: list[str], steps: int, environment: dict[str, str]) -> tuple[float, float]:
    """Steps a second, and the largest resident memory in MiB."""
    first = steps // 3
    flags = [f"--config.logging.every_steps={first}", f"--config.total_steps={3 * first}", "--compilation-cache=off"]
    flags += ["--config.evaluation.every_steps=1000000", "--config.checkpoint.every_steps=1000000"]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer", "train", *config, *flags, f"--workdir={folder}/run"],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        )
        assert process.stdout is not None
        with process.stdout:
            seen = [time.perf_counter() for line in process.stdout if line.startswith("step ") and "ETA" in line]
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or len(seen) < 3:
        raise RuntimeError(f"exit code {process.returncode}, {len(seen)} rows")
    return 2 * first / (seen[-1] - seen[-3]), usage.ru_maxrss / 1024


def main() -> None:
    """Prints the rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    options, rest = parser.parse_known_args()
    config = rest or ["--config=configs/shakespeare.py"]
    print(header())
    print("transparent huge pages:", Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip())
    ratios = []
    for _ in range(options.rounds):
        found = {side: measure(config, options.steps, environment) for side, environment in SIDES.items()}
        texts = [f"{side} {rate:.1f} steps/s, {peak:.0f} MiB" for side, (rate, peak) in found.items()]
        print("; ".join(texts), flush=True)
        ratios.append(found["huge pages"][0] / found["as it is"][0])
    print(f"huge pages / as it is: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
