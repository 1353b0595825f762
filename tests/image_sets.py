"""Small data sets with the names and exactly the features of TFDS's own, of random images."""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def encoded(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    """An image file, such as a "PNG" or a "JPEG"."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def smooth(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Random colours that change slowly, so that JPEG keeps them; uint8 [height, width, 3]."""
    coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def write(name: str, folder: Path, splits: Mapping[str, list[dict[str, Any]]]) -> None:
    """Writes the examples of each split as ArrayRecord, with the features that TFDS's builder of that name declares."""
    features = tfds.builder(name, data_dir=str(folder)).info.features

    def info(self: Any) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=features)

    def split_generators(self: Any, dl_manager: Any) -> dict[str, Iterator[Any]]:
        return {split: enumerate(examples) for split, examples in splits.items()}

    members = {
        "VERSION": tfds.core.Version("9.9.9"),
        "_info": info,
        "_split_generators": split_generators,
        "_generate_examples": None,
    }
    with tfds.core.registered.skip_registration():
        kind: Any = type(name.capitalize(), (tfds.core.GeneratorBasedBuilder,), members)
    kind(data_dir=str(folder), file_format="array_record").download_and_prepare()


def cifar(name: str, folder: Path, train: int = 64, test: int = 32) -> None:
    """`cifar10` or `cifar100` of random noise."""
    rng = np.random.default_rng(0)
    classes = int(name.removeprefix("cifar"))

    def example(i: int) -> dict[str, Any]:
        pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
        coarse = {"coarse_label": i % 20} if classes == 100 else {}
        return {"id": f"{i:05d}", "image": encoded(pixels, "PNG"), "label": i % classes, **coarse}

    write(name, folder, {split: [example(i) for i in range(n)] for split, n in (("train", train), ("test", test))})


def imagenet(folder: Path, train: int = 16, validation: int = 8) -> None:
    """`imagenet2012` of smooth photographs, each of another size; the first of each split is grey, the second a PNG."""
    rng = np.random.default_rng(0)

    def example(i: int) -> dict[str, Any]:
        pixels = smooth(rng, 40 + 3 * i, 70 - 2 * i)
        shown = pixels[..., 0] if i == 0 else pixels
        return {"image": encoded(shown, "PNG" if i == 1 else "JPEG"), "label": i, "file_name": f"n{i:08d}.JPEG"}

    sizes = (("train", train), ("validation", validation))
    write("imagenet2012", folder, {split: [example(i) for i in range(n)] for split, n in sizes})
