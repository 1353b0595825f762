"""Three models of Flax's examples, unchanged: this harness against the loop of `benchmarks.flax_loop`.

    python -m benchmarks.flax_models [--rounds=5] [--steps=250]

In each round, in turn, for the VAE, ImageNet's ResNet-18 with 16 filters and the lm1b transformer: the time from the
start of the process to the line of the first step, without a compilation cache, and the steps a second after it. Both
sides log every 50 steps. The files are those of `tests/flax_examples/`, with models from Flax's source distribution.
"""

import argparse
import importlib.metadata
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from benchmarks import header

ROOT = Path(__file__).parents[1]
EXAMPLES = {"vae": "vae", "resnet": "imagenet", "lm1b": "lm1b"}
EVERY = 50


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


def measure(command: list[str], folder: Path, steps: int) -> tuple[float, float]:
    """Seconds to the line of the first step, and steps a second from the first 50 to the last."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    began, seen = time.perf_counter(), dict[int, float]()
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            words = line.replace("/", " ").split()
            if words[:1] == ["step"] and words[1].isdecimal():
                seen.setdefault(int(words[1]), time.perf_counter() - began)
            if steps in seen:
                process.kill()
    return seen[min(seen)], (steps - EVERY) / (seen[steps] - seen[EVERY]) if steps > EVERY else 0.0


def main() -> None:
    """Prints the ratios of each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=250)
    options = parser.parse_args()
    print(header())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        fetch(folder)
        resnet = folder / "resnet.py"
        resnet.write_text(resnet.read_text().replace("filters: int = 64", "filters: int = 16"))
        for name in EXAMPLES:
            launches, rates = [], []
            for number in range(options.rounds):
                pair = {}
                for side in ("loop", "harness"):
                    times = []
                    for steps, every in ((1, 1), (options.steps, EVERY)):
                        loop = [sys.executable, "-m", "benchmarks.flax_loop", name, str(steps), str(every)]
                        workdir = f"--workdir=run-{name}-{number}-{steps}"
                        flags = [f"--config.logging.every_steps={every}", "--compilation-cache=off", workdir]
                        harness = [sys.executable, "-m", "trainer", "train", f"--config={name}.py", *flags]
                        times.append(measure(loop if side == "loop" else harness, folder, steps))
                    pair[side] = times[0][0], times[1][1]
                launches.append(pair["harness"][0] / pair["loop"][0])
                rates.append(pair["harness"][1] / pair["loop"][1])
                texts = [f"{side} {first:.2f} s, {rate:.1f} steps/s" for side, (first, rate) in pair.items()]
                print(f"{name}: {'; '.join(texts)}", flush=True)
            print(f"{name}: launch to first step {statistics.median(launches):.3f} (bar: 1.15)", end=", ")
            print(f"steps/s {statistics.median(rates):.3f} of the loop's (bar: 0.98)", flush=True)


if __name__ == "__main__":
    main()
