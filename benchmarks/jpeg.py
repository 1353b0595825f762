"""Photographs per CPU-second, decoded and cropped in worker processes; `python -m benchmarks.data --jpeg`."""

import argparse
import contextlib
import io
import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from benchmarks.reading import settled
from experiments.image_classification import EncodedImageClassification
from trainer.data.stream import train_batches
from trainer.data.tfds import prepare

PHOTOGRAPHS, BATCH, WORKERS, SIZE = 512, 64, 2, 224
BATCHES = 16  # of a loader in a round
LOADERS = ("torchvision, Pillow", "torchvision, decode_jpeg")  # of benchmarks/torch_jpeg.py


def photographs() -> list[bytes]:
    """JPEG files of 500×375 or 375×500 pixels, as most of ImageNet's: parts of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    rng, found = np.random.default_rng(0), []
    scenes = [Image.fromarray(scene) for scene in load_sample_images().images]
    for i in range(PHOTOGRAPHS):
        scene, (width, height) = scenes[i % len(scenes)], ((500, 375), (375, 500))[i % 4 == 3]
        share = min(scene.width / width, scene.height / height) * rng.uniform(0.6, 1)
        left, top = rng.uniform(0, scene.width - share * width), rng.uniform(0, scene.height - share * height)
        box = (left, top, left + share * width, top + share * height)
        file = io.BytesIO()
        scene.resize((width, height), Image.Resampling.BICUBIC, box=box).save(file, "JPEG", quality=95)
        found.append(file.getvalue())
    return found


class BenchmarkPhotographs(tfds.core.GeneratorBasedBuilder):
    """`photographs` as a TFDS data set."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"image": tfds.features.Image(encoding_format="jpeg"), "label": np.int64}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[Any]:
        return ((i, {"image": data, "label": i}) for i, data in enumerate(photographs()))


def harness_batches(folder: str) -> Iterator[Any]:
    """Batches without end, as the harness reads them for a training of a ResNet on ImageNet."""
    prepare("benchmark_photographs", folder)
    task = EncodedImageClassification(dataset="benchmark_photographs", data_dir=folder, size=SIZE)
    settings: dict[str, Any] = {"augment": task.augment, "workers": WORKERS, "threads": 1}
    return iter(train_batches(task.source("train"), seed=0, batch_size=BATCH, start=0, stop=10**9, **settings))


def harness_side(batches: Iterator[Any]) -> Callable[[], float]:
    """A function that reads a round's batches and returns their CPU-seconds."""

    def read() -> float:
        began = settled()
        for batch in itertools.islice(batches, BATCHES):
            assert batch["image"].shape == (BATCH, SIZE, SIZE, 3)
        return settled() - began

    return read


@contextlib.contextmanager
def torch_sides(python: str) -> Iterator[dict[str, Callable[[], float]]]:
    """The same for each loader of PyTorch, in a process of the interpreter `python`."""
    with tempfile.TemporaryDirectory() as folder:
        for i, data in enumerate(photographs()):
            (Path(folder) / f"{i:04}.jpg").write_bytes(data)
        script = str(Path(__file__).with_name("torch_jpeg.py"))
        command = [python, script, folder, *map(str, (BATCH, WORKERS, SIZE))]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            asked, answers = process.stdin, process.stdout

            def side(name: str) -> Callable[[], float]:
                def read() -> float:
                    asked.write(f"{name}\t{BATCHES}\n")
                    return float(answers.readline())

                return read

            print(answers.readline(), end="")
            yield {name: side(name) for name in LOADERS}
            asked.close()


def jpeg_table(options: argparse.Namespace) -> None:
    """Photographs per CPU-second: JPEG decoded, cropped at random and resized to 224×224, by 2 worker processes.

    Both sides decode the same files, the harness from ArrayRecord and PyTorch's DataLoader from a folder. The CPU time
    is that of the process and its workers between two moments at which all that is read ahead is read. PyTorch runs in
    the interpreter of --torch_python, and is left out without it.
    """
    rounds = min(options.rounds, 6)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        batches = harness_batches(folder)
        stack.callback(getattr(batches, "close", lambda: None))
        sides = {"harness": harness_side(batches)}
        if options.torch_python and shutil.which(options.torch_python):
            sides |= stack.enter_context(torch_sides(options.torch_python))
        else:
            print("--torch_python names no interpreter with torch and torchvision: DataLoader is left out")
        for read in sides.values():
            read()  # everything is started then
        seconds = dict.fromkeys(sides, 0.0)
        for name in list(sides) * rounds:
            seconds[name] += sides[name]()
    rates = {name: rounds * BATCHES * BATCH / own for name, own in seconds.items()}
    print(f"JPEG, 500×375 pixels to {SIZE}×{SIZE}, batches of {BATCH}, {WORKERS} workers")
    for name, rate in rates.items():
        best = max(value for other, value in rates.items() if other != "harness") if len(rates) > 1 else rate
        print(f"  {name:26} {rate:8,.0f} photographs per CPU-second, {rate / best:.2f} of torchvision's best")
