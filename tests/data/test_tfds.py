"""TFDS data sets on disk, and this repository's builders, against the files that they are made of."""

import gzip
import hashlib
import io
import json
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits
from tensorboardX.record_writer import RecordWriter
from tensorflow_datasets.core.download import downloader

from experiments.datasets.fashion_mnist_local import DEFAULT_FOLDER, FOLDER_VARIABLE, read_idx
from trainer.data import batch_spec, take
from trainer.data.memory import load_into_memory
from trainer.data.tfds import TfdsSource, prepare
from trainer.errors import HostError, NotPreparedError, UserError

FEATURES = ("image", "label")
REPOSITORY = Path(__file__).parents[2]


class ManyFeatures(tfds.core.GeneratorBasedBuilder):
    """A data set with more features than a model needs, some of which no device can hold."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "text": tfds.features.Text(),
            "number": tfds.features.Scalar(np.int64),
            "vector": tfds.features.Tensor(shape=(3,), dtype=np.float32),
            "picture": tfds.features.Image(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(6):
            vector, picture = np.full(3, i / 4, np.float32), io.BytesIO(b"not a picture, so that decoding it fails")
            yield i, {"text": f"example {i}", "number": i * i, "vector": vector, "picture": picture}


@pytest.fixture(scope="module")
def many_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many_features")
    prepare("many_features", str(folder))
    return folder


def rows(batch: Mapping[str, Any]) -> list[bytes]:
    """The examples of a batch as a sorted list: TFDS shuffles what it writes."""
    columns = [np.asarray(batch[name]).astype(np.float64).reshape(len(batch["label"]), -1) for name in FEATURES]
    return sorted(row.tobytes() for row in np.concatenate(columns, axis=1))


def whole(name: str, split: str, folder: Path) -> dict[str, np.ndarray]:
    source = TfdsSource(name, split, FEATURES, str(folder))
    return take(source, np.arange(len(source)))


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.mark.parametrize(("split", "examples"), [("train", 1438), ("test", 359)])
def test_a_split_of_digits_has_its_examples_as_images_and_labels(data_dir, split, examples):
    source = TfdsSource("digits", split, FEATURES, str(data_dir))
    assert len(source) == examples
    batch = take(source, np.arange(examples))
    assert (batch["image"].shape, batch["image"].dtype) == ((examples, 8, 8, 1), np.uint8)
    assert (batch["label"].shape, batch["label"].dtype) == ((examples,), np.int32)
    assert (batch["image"].max(), set(batch["label"])) == (16, set(range(10)))


def test_train_and_test_of_digits_are_together_every_scan_of_scikit_learn_once(data_dir):
    pixels, labels = load_digits(return_X_y=True)
    train, test = rows(whole("digits", "train", data_dir)), rows(whole("digits", "test", data_dir))
    # Equal to 1,797 scans that all differ, so that nothing is in both splits.
    assert len(set(rows({"image": pixels, "label": labels}))) == 1797
    assert sorted(train + test) == rows({"image": pixels, "label": labels})
    assert test == rows({"image": pixels[4::5], "label": labels[4::5]})


def test_many_examples_in_one_read_are_those_read_singly(data_dir):
    source = TfdsSource("digits", "test", FEATURES, str(data_dir))
    indices = [358, 0, 17, 17, 3]
    for index, example in zip(indices, source.__getitems__(indices), strict=True):
        single = source[index]
        assert tuple(example) == tuple(single) == FEATURES
        np.testing.assert_array_equal(example["image"], single["image"])
        assert example["label"] == single["label"]


def test_slices_of_a_split_cut_it_without_overlap_or_gap(data_dir):
    train = whole("digits", "train", data_dir)
    parts = [whole("digits", split, data_dir) for split in ("train[:10%]", "train[10%:]")]
    assert [len(part["label"]) for part in parts] == [144, 1294]
    for name in FEATURES:
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), train[name])


def test_a_sum_of_splits_has_the_examples_of_both(data_dir):
    both = whole("digits", "train+test", data_dir)
    assert len(both["label"]) == 1797
    assert rows(both) == sorted(rows(whole("digits", "train", data_dir)) + rows(whole("digits", "test", data_dir)))


def test_only_the_features_asked_for_are_given_in_the_order_asked(data_dir):
    assert list(TfdsSource("digits", "test", ("label",), str(data_dir))[0]) == ["label"]
    assert list(TfdsSource("digits", "test", ("label", "image"), str(data_dir))[0]) == ["label", "image"]


@pytest.mark.parametrize("split", ["trian", "trian[:10%]", "test+trian"])
def test_an_unknown_split_is_refused_with_the_nearest_name(data_dir, split):
    with pytest.raises(UserError, match="data set 'digits' has no split 'trian'; did you mean 'train'"):
        TfdsSource("digits", split, FEATURES, str(data_dir))


@pytest.mark.parametrize("split", ["train[:200%]", "train[:x]", "train[:10%]+nothing", "train[9999:]"])
def test_an_impossible_slice_is_refused_in_one_line_that_names_it(data_dir, split):
    with pytest.raises(UserError) as refusal:
        TfdsSource("digits", split, FEATURES, str(data_dir))
    assert split in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_slice_that_ends_before_it_starts_is_refused_in_one_line_that_names_it(data_dir):
    with pytest.raises(UserError, match=r"train\[50:20\]"):
        len(TfdsSource("digits", "train[50:20]", FEATURES, str(data_dir)))


def test_an_unknown_feature_is_refused_with_the_nearest_name(data_dir):
    with pytest.raises(UserError, match="data set 'digits' has no feature 'lable'; did you mean 'label'"):
        TfdsSource("digits", "train", ("image", "lable"), str(data_dir))


@pytest.mark.parametrize("name", ["digits", "digits:1.0.0", "no_such_data_set"])
def test_a_data_set_that_is_not_there_is_not_prepared_and_the_error_says_where(tmp_path, name):
    with pytest.raises(NotPreparedError, match=f"data set '{name}' is not prepared in {tmp_path}"):
        TfdsSource(name, "train", FEATURES, str(tmp_path))


def test_another_version_than_the_one_on_disk_is_not_prepared(data_dir):
    assert len(TfdsSource("digits:1.0.0", "test", FEATURES, str(data_dir))) == 359
    with pytest.raises(NotPreparedError, match=r"digits:9\.9\.9"):
        TfdsSource("digits:9.9.9", "test", FEATURES, str(data_dir))


def test_a_folder_with_a_description_but_no_split_is_not_prepared(data_dir, tmp_path):
    version = tmp_path / "digits" / "1.0.0"
    version.mkdir(parents=True)
    for name in ("dataset_info.json", "features.json"):
        description = json.loads((data_dir / "digits" / "1.0.0" / name).read_text())
        description.pop("splits", None)
        (version / name).write_text(json.dumps(description))
    with pytest.raises(NotPreparedError):
        TfdsSource("digits", "train", FEATURES, str(tmp_path))


def test_preparing_again_touches_no_file(data_dir):
    before = files(data_dir / "digits")
    assert sum("array_record" in name for name in before) == 2
    prepare("digits", str(data_dir))
    assert files(data_dir / "digits") == before


def test_preparing_an_unknown_data_set_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(UserError, match="TFDS knows no data set 'digist'; did you mean 'digits'"):
        prepare("digist", str(tmp_path))


def test_a_data_set_is_read_by_its_name_without_its_builders_code_and_without_decoding_unneeded_features(many_features):
    program = f"""
import sys
from trainer.data.tfds import TfdsSource

source = TfdsSource("many_features", "train", ("number", "vector"), {str(many_features)!r})
for example in source.__getitems__(range(len(source))):
    print(sorted(example), int(example["number"]), example["vector"].tolist())
foreign = [name for name in sys.modules if name.split(".")[0] in ("tests", "experiments", "tensorflow")]
assert not foreign, foreign
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = [f"['number', 'vector'] {i * i} {[i / 4] * 3}" for i in range(6)]
    assert sorted(done.stdout.splitlines()) == sorted(expected)


def test_a_feature_that_no_device_can_hold_is_refused_unless_it_is_left_out(many_features):
    with pytest.raises(UserError, match="entry 'text'"):
        batch_spec(TfdsSource("many_features", "train", ("text", "number"), str(many_features)), 2)
    assert set(batch_spec(TfdsSource("many_features", "train", ("number",), str(many_features)), 2)) == {
        "number",
        "mask",
    }


def test_a_data_set_loads_into_memory_as_it_is_on_disk(many_features):
    source = TfdsSource("many_features", "train", ("number", "vector"), str(many_features))
    loaded = load_into_memory(source, 1 << 20)
    assert loaded is not source
    assert [int(loaded[i]["number"]) for i in range(6)] == [int(source[i]["number"]) for i in range(6)]
    assert sorted(int(loaded[i]["number"]) for i in range(6)) == [0, 1, 4, 9, 16, 25]
    assert all((loaded[i]["vector"] == np.sqrt(loaded[i]["number"]) / 4).all() for i in range(6))


def test_a_data_set_prepared_as_tfrecord_is_refused_in_one_line_that_names_the_format(many_features, tmp_path):
    # TFDS needs TensorFlow to write this format, so the records of the ArrayRecord files are written out again.
    version = tmp_path / "many_features" / "1.0.0"
    version.mkdir(parents=True)
    builder = tfds.builder_from_directory(many_features / "many_features" / "1.0.0")
    info = json.loads((Path(builder.data_dir) / "dataset_info.json").read_text())
    (version / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    (version / "features.json").write_text((Path(builder.data_dir) / "features.json").read_text())
    writer = RecordWriter(str(version / "many_features-train.tfrecord-00000-of-00001"))
    for record in builder.as_data_source(split="train", deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES):
        writer.write(record)
    writer.close()

    with pytest.raises(UserError, match=r"many_features.*as TFRECORD, which has no random access") as refusal:
        TfdsSource("many_features", "train", ("number",), str(tmp_path))
    assert "\n" not in str(refusal.value)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def fashion(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """A folder with four small files, and what is in them."""
    rng = np.random.default_rng(0)
    splits = {}
    for split, prefix, examples in (("train", "train", 30), ("test", "t10k", 12)):
        images = rng.integers(0, 256, (examples, 28, 28), np.uint8)
        labels = rng.integers(0, 10, examples, np.uint8)
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
        splits[split] = {"image": images[..., None], "label": labels}
    return splits


def test_fashion_mnist_comes_back_from_its_idx_files_exactly(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    splits = fashion(tmp_path)
    prepare("fashion_mnist_local", str(tmp_path / "tfds"))
    for split, expected in splits.items():
        found = whole("fashion_mnist_local", split, tmp_path / "tfds")
        assert (found["image"].shape, found["image"].dtype) == (expected["image"].shape, np.uint8)
        assert rows(found) == rows(expected)


def test_without_its_folder_fashion_mnist_says_what_to_install_and_the_next_prepare_starts_afresh(
    tmp_path, monkeypatch
):
    folder = tmp_path / "fashion"
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    with pytest.raises(UserError, match=f"no folder {folder}: install .* dataset-fashion-mnist, .* FASHION_MNIST_DIR"):
        prepare("fashion_mnist_local", str(tmp_path / "tfds"))
    with pytest.raises(NotPreparedError):
        TfdsSource("fashion_mnist_local", "train", FEATURES, str(tmp_path / "tfds"))
    folder.mkdir()
    fashion(folder)
    prepare("fashion_mnist_local", str(tmp_path / "tfds"))
    assert len(TfdsSource("fashion_mnist_local", "test", FEATURES, str(tmp_path / "tfds"))) == 12


def test_images_without_as_many_labels_are_refused_with_both_shapes(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    fashion(tmp_path)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.zeros(11, np.uint8))
    with pytest.raises(UserError, match=r"t10k images are \(12, 28, 28\), labels \(11,\)"):
        prepare("fashion_mnist_local", str(tmp_path / "tfds"))
    with pytest.raises(NotPreparedError):
        TfdsSource("fashion_mnist_local", "train", FEATURES, str(tmp_path / "tfds"))


@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 3, 4), (0, 28, 28)])
def test_an_idx_file_is_read_in_its_shape(tmp_path, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    write_idx(tmp_path / "a.gz", array)
    found = read_idx(tmp_path / "a.gz")
    assert (found.shape, found.dtype) == (array.shape, np.uint8)
    np.testing.assert_array_equal(found, array)


IDX = bytes([0, 0, 8, 2]) + struct.pack(">2I", 3, 50) + bytes(150)
BROKEN = {
    "empty": (b"", "no.* IDX"),
    "no gz": (IDX, "not a whole gz file"),
    "cut": (gzip.compress(IDX)[:-9], "not a whole gz file"),
    "cut to its header": (gzip.compress(IDX)[:5], "not a whole gz file"),
    "wrong checksum": (gzip.compress(IDX)[:-8] + bytes(8), "not a whole gz file"),
    "wrong magic": (gzip.compress(b"\1" + IDX[1:]), "not an IDX file of unsigned bytes"),
    "floats": (gzip.compress(b"\0\0\x0d" + IDX[3:]), "not an IDX file of unsigned bytes"),
    "cut dimensions": (gzip.compress(IDX[:9]), "not an IDX file of unsigned bytes"),
    "a byte short": (gzip.compress(IDX[:-1]), r"holds 149 bytes; its header says \(3, 50\)"),
    "a byte too much": (gzip.compress(IDX + b"\0"), r"holds 151 bytes; its header says \(3, 50\)"),
}


@pytest.mark.parametrize(("content", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_not_a_whole_idx_file_is_refused_by_its_name(tmp_path, content, reason):
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(content)
    with pytest.raises(UserError, match=reason) as refusal:
        read_idx(file)
    assert str(file) in str(refusal.value)


def test_a_file_with_any_byte_damaged_is_refused_by_its_name(tmp_path):
    file = tmp_path / "train-images-idx3-ubyte.gz"
    content = gzip.compress(IDX)
    for place in range(10, len(content)):  # the first ten bytes hold the time and such, which no checksum covers
        file.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        with pytest.raises(UserError, match="train-images"):
            read_idx(file)


def test_a_missing_file_is_refused_by_its_name(tmp_path):
    with pytest.raises(UserError, match=f"no file {tmp_path}/absent.gz"):
        read_idx(tmp_path / "absent.gz")


SHA256 = {
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
}


def test_debians_files_are_the_ones_known_with_all_images_and_balanced_classes():
    folder = Path(DEFAULT_FOLDER)
    if not folder.is_dir():
        pytest.skip(f"no {folder}: the Debian package dataset-fashion-mnist is not installed")
    assert {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in SHA256} == SHA256
    for prefix, examples in (("train", 60_000), ("t10k", 10_000)):
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        assert (images.shape, labels.shape) == ((examples, 28, 28), (examples,))
        assert np.bincount(labels).tolist() == [examples // 10] * 10


class EncodedImages(tfds.core.GeneratorBasedBuilder):
    """A data set with an `Image` feature, as most of TFDS's have."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(5, 4, 3)), "label": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(3):
            file = io.BytesIO()
            Image.fromarray(pixels(i)).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "label": i}


def pixels(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (5, 4, 3), dtype=np.uint8)


def test_encoded_images_are_decoded_without_tensorflow(tmp_path):
    prepare("encoded_images", str(tmp_path))
    source = TfdsSource("encoded_images", "train", ("image", "label"), str(tmp_path))
    assert len(source) == 3
    for example in (source[i] for i in range(3)):
        np.testing.assert_array_equal(example["image"], pixels(int(example["label"])))


class Fetched(ManyFeatures):
    """A data set whose files lie at an address at which nobody listens."""

    VERSION = tfds.core.Version("1.0.0")

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        dl_manager.download("http://127.0.0.1:9/file")
        return {"train": self._generate_examples()}


def test_a_file_that_cannot_be_fetched_is_one_line_that_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(downloader, "MAX_RETRIES", 1)  # ten take minutes
    with pytest.raises(HostError, match=r"^data set 'fetched': http://127.0.0.1:9/file cannot be fetched: is there a "):
        prepare("fetched", str(tmp_path))
