"""Encoded images: what is decoded and cropped, by whom, and TFDS's own image data sets by their names."""

import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from experiments.image_classification import EncodedImageClassification, ImageClassification
from tests import image_sets
from trainer import config, train
from trainer.data import ArraySource, batch_spec, take
from trainer.data.images import EncodedImage, EncodedImages
from trainer.data.memory import fits_in_memory, load_into_memory
from trainer.data.mixture import Mixture
from trainer.data.stream import eval_batches, train_batches
from trainer.data.tfds import TfdsSource, prepare
from trainer.errors import UserError
from trainer.program import build_program

SIZE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TFDS folder with small `cifar10`, `cifar100` and `imagenet2012`."""
    folder = tmp_path_factory.mktemp("image_sets")
    image_sets.cifar("cifar10", folder, 20, 8)
    image_sets.cifar("cifar100", folder, 20, 8)
    image_sets.imagenet(folder)
    return folder


def task(folder: Path, **settings: Any) -> EncodedImageClassification:
    defaults: dict[str, Any] = {"dataset": "imagenet2012", "data_dir": str(folder), "classes": 1000}
    defaults |= {"size": SIZE, "shorter": 20, "widths": (4,), "hidden": 8}
    return EncodedImageClassification(**defaults | settings)


def original(data: bytes) -> np.ndarray:
    """The image by Pillow, RGB."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_png_images_of_cifar_are_read_as_they_were_written(folder, name):
    source = ImageClassification(dataset=name, data_dir=str(folder)).source("train")
    batch = take(source, np.arange(20))
    assert (batch["image"].shape, batch["image"].dtype) == ((20, 32, 32, 3), np.uint8)
    stored = TfdsSource(name, "train", ("image", "label"), str(folder), encoded=("image",))
    for i in range(20):
        assert stored[i]["label"] == batch["label"][i]
        np.testing.assert_array_equal(original(stored[i]["image"]), batch["image"][i])
    assert isinstance(load_into_memory(source, 1 << 20), ArraySource)


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """Linear interpolation at the centres of the new pixels, in float64."""
    for axis in (0, 1):
        count = pixels.shape[axis]
        places = np.clip((np.arange(size) + 0.5) * count / size - 0.5, 0, count - 1)
        below = np.floor(places).astype(int)
        share = (places - below).reshape([-1, 1, 1] if axis == 0 else [1, -1, 1])
        above = np.minimum(below + 1, count - 1)
        pixels = pixels.take(below, axis).astype(np.float64) * (1 - share) + pixels.take(above, axis) * share
    return pixels


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(("top", "left", "lines", "columns"), [(0, 0, 30, 41), (5, 7, 16, 16), (3, 20, 10, 21)])
def test_a_crop_is_the_rectangle_resized_linearly(kind, top, left, lines, columns):
    data = image_sets.encoded(image_sets.smooth(np.random.default_rng(0), 30, 41), kind)
    found = EncodedImage(data, SIZE, 20).crop(top, left, lines, columns)
    assert (found.shape, found.dtype) == ((SIZE, SIZE, 3), np.uint8)
    expected = resized(original(data)[top : top + lines, left : left + columns], SIZE)
    # Decoders of JPEG round their cosine transform and colours in different ways, and Pillow's is another one.
    np.testing.assert_allclose(found, expected, atol=0.51 if kind == "PNG" else 3)


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_crop_of_many_pixels_is_made_of_their_means(kind, factor):
    small = image_sets.smooth(np.random.default_rng(0), 20, 24)
    large = np.repeat(np.repeat(small, factor, 0), factor, 1)
    found = EncodedImage(image_sets.encoded(large, kind, **({"quality": 98} if kind == "JPEG" else {})), SIZE, 20).crop(
        2 * factor, 4 * factor, SIZE * factor, SIZE * factor
    )
    np.testing.assert_allclose(found, small[2 : 2 + SIZE, 4 : 4 + SIZE], atol=1 if kind == "PNG" else 12)
    assert np.abs(found.astype(int) - small[2 : 2 + SIZE, 4 : 4 + SIZE]).mean() < 2


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_every_pixel_of_a_block_counts_in_its_mean_whatever_the_format(kind, factor):
    side = SIZE * factor
    pixels = np.random.default_rng(0).integers(0, 256, (side + 5, side + 3, 3), np.uint8)
    data = image_sets.encoded(pixels, kind, **({"lossless": True} if kind == "WEBP" else {}))
    means = pixels[:side, :side].reshape(SIZE, factor, SIZE, factor, 3).mean((1, 3))
    np.testing.assert_allclose(EncodedImage(data, SIZE, SIZE).crop(0, 0, side, side), means, atol=0.51)


def test_a_centre_larger_than_the_resized_image_is_refused_where_the_decoder_is_made():
    for make in (lambda: EncodedImage(b"", 20, 19), lambda: EncodedImages(ArraySource({"image": np.zeros(1)}), 20, 19)):
        with pytest.raises(UserError, match="no centre of 20 pixels: shorter is 19, and must be at least 20"):
            make()


def test_an_evaluation_sees_the_centre_whose_share_of_the_shorter_side_is_size_by_shorter():
    pixels = image_sets.smooth(np.random.default_rng(0), 40, 72)
    found = EncodedImage(image_sets.encoded(pixels, "PNG"), SIZE, 20).decode()
    halves = pixels[4:36, 20:52].reshape(SIZE, 2, SIZE, 2, 3).mean((1, 3))
    np.testing.assert_allclose(found, halves, atol=1)
    whole = EncodedImage(image_sets.encoded(pixels[:, :40], "PNG"), 40, 40).decode()
    np.testing.assert_array_equal(whole, pixels[:, :40])


@pytest.mark.parametrize("colours", ["L", "LA", "P", "RGBA", "CMYK"])
def test_every_kind_of_colours_becomes_rgb(colours):
    pixels = image_sets.smooth(np.random.default_rng(1), 20, 20)
    file, kind = io.BytesIO(), "JPEG" if colours == "CMYK" else "PNG"
    image = Image.fromarray(pixels).convert(colours)
    image.save(file, kind)
    found = EncodedImage(file.getvalue(), 20, 20).decode()
    # OpenCV and Pillow mix cyan, magenta, yellow and black in slightly different ways.
    np.testing.assert_allclose(found, np.asarray(image.convert("RGB")), atol=30 if colours == "CMYK" else 1)


def test_a_picture_is_not_turned_by_the_orientation_that_a_camera_noted():
    pixels, exif = image_sets.smooth(np.random.default_rng(0), 20, 20), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    plain, noted = (image_sets.encoded(pixels, "JPEG", **given) for given in ({}, {"exif": exif}))
    np.testing.assert_array_equal(EncodedImage(noted, 20, 20).decode(), EncodedImage(plain, 20, 20).decode())


def by_opencv(data: bytes, factor: int = 1) -> np.ndarray:
    flag = {1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4}[factor]
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    assert pixels is not None
    return pixels[:, :, ::-1]


@pytest.mark.parametrize("colours", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("how", [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}])
def test_every_kind_of_jpeg_has_the_bits_that_opencv_gives_it_at_full_size_and_reduced(colours, how):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).convert(colours).save(file, "JPEG", quality=90, **how)
    for factor in (1,) if colours == "CMYK" else (1, 2, 4):  # OpenCV takes other means of its subsampled colours
        side = 64 // factor
        found = EncodedImage(file.getvalue(), side, side).crop(0, 0, 64, 64)
        np.testing.assert_array_equal(found, by_opencv(file.getvalue(), factor))


def test_a_jpeg_that_libjpeg_turbo_warns_of_is_still_read():
    data = image_sets.encoded(image_sets.smooth(np.random.default_rng(0), 40, 40), "JPEG")
    noisy = data[:-2] + b"\0\0\0" + data[-2:]  # "extraneous bytes before marker 0xd9"
    with pytest.raises(ValueError, match="extraneous bytes"):
        simplejpeg.decode_jpeg(noisy)
    np.testing.assert_array_equal(EncodedImage(noisy, 40, 40).decode(), by_opencv(data))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("kept", [0, 2, 3, 20, 40, 200, -40])
def test_a_file_that_is_no_image_or_is_cut_is_refused_in_one_line(kind, kept):
    data = image_sets.encoded(image_sets.smooth(np.random.default_rng(0), 20, 20), kind)
    for wrong in (data[:kept], b"not an image"):
        with pytest.raises(UserError, match=r"an image of [\d,]+ bytes is .*no JPEG, PNG or WebP image"):
            EncodedImage(wrong, SIZE, 20).decode()


def test_random_crops_lie_inside_with_the_area_and_shape_asked_for(monkeypatch):
    seen: list[tuple[float, ...]] = []
    monkeypatch.setattr(EncodedImage, "crop", lambda self, *place: seen.append(place))
    image = EncodedImage(image_sets.encoded(np.zeros((30, 50, 3), np.uint8), "PNG"), SIZE, 20)
    for seed in range(3000):
        image.random_crop(np.random.default_rng(seed), 0.1)
    top, left, lines, columns = np.array(seen).T
    assert min(top.min(), left.min()) >= 0
    assert (top + lines).max() <= 30 + 1e-9
    assert (left + columns).max() <= 50 + 1e-9
    area, ratio, largest = lines * columns / 1500, columns / lines, 4 / 3 * 30 / 50
    np.testing.assert_allclose(area.mean(), (0.1 + largest) / 2, rtol=0.03)  # uniform
    np.testing.assert_allclose(area.std(), (largest - 0.1) / np.sqrt(12), rtol=0.05)
    assert 3 / 4 - 1e-9 <= ratio.min() < 0.8
    assert 1.3 < ratio.max() <= 4 / 3 + 1e-9


def test_the_same_crops_come_from_threads_and_workers_and_other_ones_in_each_epoch(folder):
    experiment = task(folder)
    source = experiment.source("train")
    settings: dict[str, Any] = {"seed": 3, "batch_size": 8, "start": 0, "stop": 4, "augment": experiment.augment}
    batches = list(train_batches(source, threads=1, **settings))
    others: tuple[dict[str, Any], ...] = ({"threads": 4}, {"workers": 2, "threads": 1})
    for other in others:
        for found, expected in zip(train_batches(source, **settings | other), batches, strict=True):
            assert found.keys() == expected.keys() == {"image", "label", "mask"}
            for name in found:
                np.testing.assert_array_equal(found[name], expected[name])
    epochs = [np.concatenate([b["image"] for b in part]) for part in (batches[:2], batches[2:])]
    labels = [np.concatenate([b["label"] for b in part]) for part in (batches[:2], batches[2:])]
    assert sorted(labels[0]) == sorted(labels[1]) == list(range(16))
    first, second = (images[np.argsort(label)] for images, label in zip(epochs, labels, strict=True))
    assert (first != second).any((1, 2, 3)).sum() > 12
    stored = TfdsSource("imagenet2012", "train", ("image", "label"), str(folder), encoded=("image",))
    by_label = {int(example["label"]): example["image"] for example in (stored[i] for i in range(16))}
    rng = np.random.Generator(np.random.Philox(key=[3, 0], counter=[0, 0, 0, 1]))  # of the first position
    expected = EncodedImage(by_label[int(batches[0]["label"][0])], SIZE, 20).random_crop(rng)
    np.testing.assert_array_equal(batches[0]["image"][0], expected)


def test_encoded_images_are_not_kept_in_memory_and_evaluations_decode_their_centres(folder):
    experiment = task(folder)
    source = experiment.source("validation")
    assert not fits_in_memory(source, 1 << 40)
    assert load_into_memory(source, 1 << 40) is source
    assert batch_spec(source, 4)["image"].shape == (4, SIZE, SIZE, 3)
    (batch,) = eval_batches(source, 8)
    np.testing.assert_array_equal(batch["image"], np.stack([source[i]["image"].decode() for i in range(8)]))
    np.testing.assert_array_equal(batch["image"], take(source, np.arange(8))["image"])


def test_a_mixture_leaves_images_encoded(folder):
    experiment = task(folder)
    parts = {split: (experiment.source(split), 1.0) for split in ("train", "validation")}
    mixed = Mixture(parts)
    batch = next(train_batches(mixed, seed=0, batch_size=8, start=0, stop=1, augment=experiment.augment))
    assert batch["image"].shape == (8, SIZE, SIZE, 3)
    in_memory = load_into_memory(mixed, 1 << 40)
    assert isinstance(in_memory, Mixture)
    assert in_memory.take(np.arange(2))["image"].dtype == object


def test_images_of_several_sizes_without_a_crop_are_refused_by_name():
    class Shrunk(EncodedImage):
        def decode(self) -> np.ndarray:
            return original(self.data)

    files = [image_sets.encoded(np.zeros((8, 8 + i, 3), np.uint8), "PNG") for i in range(2)]
    source = EncodedImages(ArraySource({"image": np.array([0, 1])}), 8, 8)
    mixed = [{"image": Shrunk(data, 8, 8)} for data in files]
    assert isinstance(source[0]["image"], EncodedImage)
    with pytest.raises(UserError, match=r"entry 'image' of the data has examples of different shapes: \(8, 8, 3\)"):
        take(mixed, np.arange(2))
    with pytest.raises(UserError, match="entry 'image' of the data is encoded in some examples, and a int in others"):
        take([mixed[0], {"image": 3}], np.arange(2))


@pytest.mark.slow
def test_a_run_on_photographs_trains_and_resumes_bit_for_bit(folder, tmp_path):
    def run(steps: int) -> config.Run:
        schedule = config.Schedule("linear", peak=1e-3, run_steps=6, final=1e-5)
        return config.Run(
            task(folder),
            total_steps=steps,
            batch_size=8,
            optimizer=config.Optimizer(schedule=schedule),
            evaluation=config.Evaluation("validation"),
            parallel=config.Parallel(devices=1),
        )

    whole = train(run(6), tmp_path / "whole", verbose=False)
    train(run(3), tmp_path / "halves", verbose=False)
    halves = train(run(6), tmp_path / "halves", verbose=False)
    assert [x.tobytes() for x in map(np.asarray, params(whole))] == [
        x.tobytes() for x in map(np.asarray, params(halves))
    ]
    program = build_program(config.resolve(dataclasses.replace(run(6), loading=config.Loading(in_memory_bytes=0))))
    assert program.train_spec["image"].shape == (8, SIZE, SIZE, 3)


def params(state: Any) -> list[Any]:
    return [layer[name] for _, layer in sorted(state.params.items()) for name in sorted(layer)]


def test_the_experiment_of_the_documentation_reads_a_folder_of_photographs(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class Photographs" in block)
    names: dict[str, Any] = {"__name__": "photographs"}
    exec(block, names)
    rng = np.random.default_rng(0)
    for i in range(6):
        file = tmp_path / "train" / ("cat", "dog")[i % 2] / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image_sets.encoded(image_sets.smooth(rng, 40 + i, 60 - i), "JPEG"))
    experiment = names["Photographs"](folder=str(tmp_path), size=28)
    source = experiment.source("train")
    (batch,) = train_batches(source, seed=0, batch_size=6, start=0, stop=1, augment=experiment.augment)
    assert (batch["image"].shape, batch["image"].dtype) == ((6, 28, 28, 3), np.uint8)
    assert sorted(batch["label"]) == [0, 0, 0, 1, 1, 1]
    (centres,) = eval_batches(source, 6)
    assert [source[i]["label"] for i in range(6)] == list(centres["label"])
    assert source[0]["image"].shorter == 32
    assert (centres["image"] != batch["image"]).any((1, 2, 3)).all()


def test_files_that_a_user_has_to_fetch_and_tensorflow_are_asked_for_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"'imagenet2012': .*manual.* is empty.* ILSVRC2012_img_train\.tar") as missing:
        prepare("imagenet2012", str(tmp_path))
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    (manual / "ILSVRC2012_img_train.tar").write_bytes(b"")
    with pytest.raises(UserError, match="'imagenet2012': TFDS's builder needs TensorFlow to write it") as lacking:
        prepare("imagenet2012", str(tmp_path))
    assert "\n" not in str(missing.value) + str(lacking.value)
