"""`prepare` of the kernel's files: splits, errors, and kills from which it goes on."""

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tensorflow_datasets as tfds

from experiments.datasets import linux_source
from experiments.datasets.linux_source import LinuxSource, split_of
from experiments.packed_language_model import PackedLanguageModel
from tests.text.kernel_tree import files, settings, small_parts, write_archive
from trainer.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("archive") / "linux.tar.xz")


def test_files_are_split_98_1_1_by_a_hash_of_their_paths():
    found = Counter(split_of(f"kernel/dir_{i % 97}/file_{i}.c") for i in range(100_000))
    assert found["validation"] == pytest.approx(1000, abs=4 * 1000**0.5)
    assert found["test"] == pytest.approx(1000, abs=4 * 1000**0.5)
    assert found["train"] == 100_000 - found["validation"] - found["test"]
    # These never change, or every test score would.
    assert [split_of(path) for path in ("kernel/fork.c", "fs/btrfs/ctree.c", "fs/xfs/xfs_log_recover.c")] == [
        "train",
        "test",
        "validation",
    ]


def test_each_c_and_header_file_is_an_example_byte_for_byte(archive, tmp_path, monkeypatch):
    small_parts(monkeypatch.setattr)
    LinuxSource(data_dir=tmp_path, archive=str(archive)).download_and_prepare(file_format="array_record")
    builder = tfds.builder("linux_source", data_dir=tmp_path)
    found: dict[str, Any] = {name: builder.as_data_source(split=name) for name in ("train", "validation", "test")}
    texts = {example["path"].decode(): (example["text"], split) for split, own in found.items() for example in own}
    assert texts == {path: (content, split_of(path)) for path, content in files().items()}
    assert builder.info.splits["train"].num_shards > 3
    known = dict(builder.info.metadata.items())
    assert known["kernel"] == "6.1.7"
    assert known["package"] == "unknown"  # another archive than Debian's
    assert known["sha256"] == hashlib.sha256(archive.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, Any]:
    """The kernel's files in their order, and each file of the packed rows; TFDS's own would name the folder."""
    found = [
        file for file in (folder / "packed_text").rglob("*") if file.is_file() and file.name != "dataset_info.json"
    ]
    packed = {str(file.relative_to(folder)): file.read_bytes() for file in found}
    builder = tfds.builder("linux_source", data_dir=folder)
    # Examples, because protocol buffers store the entries of one in any order.
    return packed | {split: list(builder.as_data_source(split=split)) for split in ("train", "validation", "test")}


@pytest.mark.slow
def test_a_killed_prepare_goes_on_and_writes_the_same_bytes(archive, tmp_path, monkeypatch):
    small_parts(monkeypatch.setattr)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    PackedLanguageModel(**settings(tmp_path / "whole", archive)).prepare()
    # In the kernel's files, in the packed rows of the training split, in the shards; each launch goes on.
    for step, place in ((3, "after"), (9, "before"), (14, "after"), (1, "before")):
        command = [sys.executable, "-m", "tests.text.kernel_tree", str(tmp_path / "killed"), str(archive)]
        done = subprocess.run([*command, str(step), place], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
    PackedLanguageModel(**settings(tmp_path / "killed", archive)).prepare()
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not [
        file for file in (tmp_path / "killed").rglob("*") if ".partial/" in str(file) or "incomplete" in file.name
    ]


def test_what_was_made_of_another_archive_is_made_again(archive, tmp_path, monkeypatch):
    small_parts(monkeypatch.setattr)
    other = write_archive(tmp_path / "other.tar.xz", 300)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linux_source, "_package_version", stop)
        patch.setattr(linux_source, "ARCHIVE", str(other))
        with pytest.raises(KeyboardInterrupt):  # all is written, and not yet in its place
            LinuxSource(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    LinuxSource(data_dir=tmp_path, archive=str(archive)).download_and_prepare(file_format="array_record")
    info = tfds.builder("linux_source", data_dir=tmp_path).info
    assert sum(split.num_examples for split in info.splits.values()) == len(files())


def test_the_version_of_debians_package_is_kept(tmp_path, monkeypatch):
    other, query = write_archive(tmp_path / "other.tar.xz"), tmp_path / "bin" / "dpkg-query"
    query.parent.mkdir()
    query.write_text('#!/bin/sh\nprintf "6.1.7-1 for %s" "$3"\n')
    query.chmod(0o755)
    monkeypatch.setattr(linux_source, "ARCHIVE", str(other))
    monkeypatch.setenv("PATH", f"{query.parent}{os.pathsep}{os.environ['PATH']}")
    LinuxSource(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    info = tfds.builder("linux_source", data_dir=tmp_path).info
    assert info.metadata["package"] == "6.1.7-1 for linux-source-6.1"


def test_an_archive_that_cannot_be_read_is_one_line(archive, tmp_path):
    broken = tmp_path / "broken.tar.xz"
    for content in (archive.read_bytes()[:-4000], b"no archive", b""):
        broken.write_bytes(content)
        with pytest.raises(UserError, match=r"broken\.tar\.xz cannot be read: "):
            LinuxSource(data_dir=tmp_path, archive=str(broken)).download_and_prepare(file_format="array_record")


def test_an_archive_without_a_file_for_each_split_is_refused(tmp_path):
    few = write_archive(tmp_path / "few.tar.xz", 1)
    with pytest.raises(UserError, match=r"few\.tar\.xz has no C or header file for the split 'validation'"):
        LinuxSource(data_dir=tmp_path, archive=str(few)).download_and_prepare(file_format="array_record")


def test_a_second_process_that_prepares_the_same_is_refused(archive, tmp_path):
    lock = tmp_path / "linux_source" / "1.0.0.partial.lock"
    lock.parent.mkdir()
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another process is writing .*partial: wait for it"):
            LinuxSource(data_dir=tmp_path, archive=str(archive)).download_and_prepare(file_format="array_record")
