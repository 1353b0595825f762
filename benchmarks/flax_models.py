"""Three models of Flax's examples, unchanged: this harness against the loop of `benchmarks.flax_loop`.

    python -m benchmarks.flax_models [--rounds=5]

In each round, in turn, for the VAE, ImageNet's ResNet-18 with 16 filters and the lm1b transformer: the time from the
start of the process to the line of the first step, without a compilation cache, and the steps a second once the harness
has compiled its evaluation in the background. Both sides log every 50 steps, and evaluate and save nothing. The harness
computes the norm of the gradient in every step, to stop at a NaN, so the loop is also measured with it ("loop-norm").
The files are those of `tests/flax_examples/`, with models from Flax's source distribution. The VAE has this harness's
own `adam`, and `optax.adam` in the loop.
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
MEASURED = {"vae": (800, 1900), "resnet": (100, 250), "lm1b": (100, 250)}  # the first and the last step of the measured


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


def measure(command: list[str], folder: Path, first: int, last: int) -> tuple[float, float]:
    """Seconds to the line of step 1, and steps a second between the lines of the first and the last measured step."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    began, seen = time.perf_counter(), dict[int, float]()
    null = subprocess.DEVNULL
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=null, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            words = line.replace("/", " ").split()
            if words[:1] == ["step"] and words[1].isdecimal():
                seen.setdefault(int(words[1]), time.perf_counter() - began)
            if last in seen:
                process.kill()
    return seen[min(seen)], (last - first) / (seen[last] - seen[first]) if last > first else 0.0


def main() -> None:
    """Prints the ratios of each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(header())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        fetch(folder)
        resnet = folder / "resnet.py"
        resnet.write_text(resnet.read_text().replace("filters: int = 64", "filters: int = 16"))
        for name in EXAMPLES:
            launches, rates, equal_rates = [], [], []
            for number in range(options.rounds):
                pair = {side: _measure_side(side, name, folder, number) for side in ("loop", "harness", "loop-norm")}
                launches.append(pair["harness"][0] / pair["loop"][0])
                rates.append(pair["harness"][1] / pair["loop"][1])
                equal_rates.append(pair["harness"][1] / pair["loop-norm"][1])
                texts = [f"{side} {first:.2f} s, {rate:.1f} steps/s" for side, (first, rate) in pair.items()]
                print(f"{name}: {'; '.join(texts)}", flush=True)
            print(f"{name}: launch to first step {statistics.median(launches):.3f} (bar: 1.15)", end=", ")
            print(f"steps/s {statistics.median(rates):.3f} of the loop's (bar: 0.98)", end=", ")
            print(f"{statistics.median(equal_rates):.3f} of the loop with the norm", flush=True)


def _measure_side(side: str, name: str, folder: Path, number: int) -> tuple[float, float]:
    """Seconds to the first step, of one launch, and steps a second, of another."""
    times = []
    for (first, last), every in (((1, 1), 1), (MEASURED[name], EVERY)):
        if side == "harness":
            flags = [f"--config={name}.py", f"--workdir=run-{name}-{number}-{last}", "--compilation-cache=off"]
            flags += [f"--config.logging.every_steps={every}", "--config.evaluation.every_steps=1000000"]
            flags.append("--config.checkpoint.every_steps=1000000")
            command = [sys.executable, "-m", "trainer", "train", *flags]
        else:
            command = [sys.executable, "-m", "benchmarks.flax_loop", name, str(last), str(every)]
            command += ["norm"] if side == "loop-norm" else []
        times.append(measure(command, folder, first, last))
    return times[0][0], times[1][1]


if __name__ == "__main__":
    main()
