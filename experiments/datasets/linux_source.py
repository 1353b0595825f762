"""`linux_source`: the C and header files of the Linux kernel, from the archive of the Debian package linux-source-6.1.

Licence: GPL-2.0 with the syscall note, and those that the files name.
"""

import hashlib
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from experiments.datasets.parts import PartwiseBuilder, Shard, ShardWriter, UnfinishedFolder
from trainer.errors import UserError

PACKAGE = "linux-source-6.1"
ARCHIVE = f"/usr/src/{PACKAGE}.tar.xz"
SPLITS = ("train", "validation", "test")
PART_BYTES = 64 << 20  # of text, after which a part is complete

_DESCRIPTION = """
The C and header files of the Linux kernel, one example each, in the order of the archive. Of 100 paths, about 98 are to
train on, one is for validation and one to test, by a hash of the path below the archive's top folder.
"""


class LinuxSource(PartwiseBuilder):
    """Features "path", such as b"kernel/fork.c", and "text", the bytes of the file. Empty files are left out.

    The archive is read as a stream, and no file but the current one is in memory.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, archive: str | None = None, **options: Any) -> None:
        """Reads nothing yet; `archive` is a .tar, .tar.xz, .tar.gz or .tar.bz2 file, by default Debian's."""
        self._archive = Path(archive or ARCHIVE)
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict({"path": text, "text": text}),
            homepage="https://www.kernel.org",
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def identity(self) -> Mapping[str, Any]:
        """The archive's SHA-256; raises `UserError` if there is none."""
        if not self._archive.is_file():
            raise UserError(
                f"no file {self._archive}: apt-get install --no-install-recommends {PACKAGE}, or name another archive "
                "with --config.experiment.archive="
            )
        with self._archive.open("rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "part_bytes": PART_BYTES}

    def write(self, unfinished: UnfinishedFolder) -> Mapping[str, list[Shard]]:
        """One shard a split for each part of the archive."""
        parts: list[Mapping[str, Any]] = []
        while entry := unfinished.entry(f"part-{len(parts):05}"):
            parts.append(entry)
        if not parts or not parts[-1]["is_last"]:
            self._read_on(unfinished, parts)
        shards = [shard for part in parts for shard in part["shards"]]
        splits = {
            split: [Shard(unfinished.path(name), *sizes) for own, name, *sizes in shards if own == split]
            for split in SPLITS
        }
        for split, own in splits.items():
            if not own:
                raise UserError(f"{self._archive} has no C or header file for the split {split!r}: too few files")
        kernel = next(filter(None, (part["kernel"] for part in parts)), "unknown")
        package = _package_version() if self._archive == Path(ARCHIVE) else "unknown"
        assert self.info.metadata is not None
        self.info.metadata.update(
            archive=self._archive.name, kernel=kernel, package=package, **unfinished.entry("identity")
        )
        counts = ", ".join(f"{sum(shard.examples for shard in own):,} {split}" for split, own in splits.items())
        print(f"linux_source: kernel {kernel}, Debian's package {package}; files: {counts}", flush=True)
        return splits

    def _read_on(self, unfinished: UnfinishedFolder, parts: list[Mapping[str, Any]]) -> None:
        """Adds the parts after those that are complete."""
        skipped = parts[-1]["members"] if parts else 0
        if parts:
            print(f"linux_source: goes on after {skipped:,} entries of the archive", flush=True)
        part = _Part(unfinished, len(parts), self.info.features)
        for member, path, text, share in _files(self._archive, skipped):
            part.add(member, path, text)
            if part.text_bytes >= PART_BYTES:
                parts.append(part.close(is_last=False))
                files = sum(shard[2] for one in parts for shard in one["shards"])
                print(f"linux_source: {files:,} files, {share:.0%} of the archive", flush=True)
                part = _Part(unfinished, len(parts), self.info.features)
        parts.append(part.close(is_last=True))


class _Part:
    """A part that is being written: one shard for each split that has a file in it."""

    def __init__(self, unfinished: UnfinishedFolder, number: int, features: Any) -> None:
        self._unfinished, self._number, self._features = unfinished, number, features
        self._writers: dict[str, ShardWriter] = {}
        self._members, self._kernel, self.text_bytes = 0, "", 0

    def add(self, members: int, path: str, text: bytes) -> None:
        """Adds a file, with the number of entries of the archive up to it."""
        self._members = members
        if path == "Makefile":
            self._kernel = _kernel_version(text)
            return
        split = split_of(path)
        if split not in self._writers:
            file = self._unfinished.path(f"{split}-{self._number:05}.array_record")
            self._writers[split] = ShardWriter(file, self._features)
        self._writers[split].write({"path": path, "text": text})
        self.text_bytes += len(text)

    def close(self, is_last: bool) -> Mapping[str, Any]:
        """Completes the part; its entry."""
        shards = {split: writer.close() for split, writer in self._writers.items()}
        entry = {
            "members": self._members,
            "kernel": self._kernel,
            "is_last": is_last,
            "shards": [[split, s.file.name, s.examples, s.num_bytes] for split, s in shards.items()],
        }
        self._unfinished.commit(f"part-{self._number:05}", entry)
        return entry


def split_of(path: str) -> str:
    """The split of a file by its path below the top folder of the archive."""
    place = int.from_bytes(hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()[:8], "big") % 100
    return {98: "validation", 99: "test"}.get(place, "train")


def _files(archive: Path, skipped: int) -> Iterator[tuple[int, str, bytes, float]]:
    """Number of entries so far, path, text and share of the archive that is read, for C and header files and Makefile.

    The first `skipped` entries are passed over. Raises `UserError` if the archive cannot be read.
    """
    try:
        size = archive.stat().st_size
        with archive.open("rb") as raw, tarfile.open(fileobj=raw, mode=_mode(archive)) as tar:
            for number, member in enumerate(tar, 1):
                path = member.name.removeprefix("./").partition("/")[2]
                if number <= skipped or not member.isfile() or not member.size:
                    continue
                if path.endswith((".c", ".h")) or path == "Makefile":
                    content = tar.extractfile(member)
                    assert content is not None
                    yield number, path, content.read(), raw.tell() / size
                vars(tar)["members"].clear()  # tarfile keeps a list of all
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{archive} cannot be read: {error}") from error


def _mode(archive: Path) -> Any:
    """How tarfile reads the archive as a stream."""
    return "r|" + {".xz": "xz", ".gz": "gz", ".bz2": "bz2"}.get(archive.suffix, "")


def _kernel_version(makefile: bytes) -> str:
    """Such as "6.1.192", from the Makefile at the top of the kernel's tree; "" if it does not say."""
    found = [
        re.search(rb"^%s\s*=\s*(\d+)\s*$" % name, makefile, re.M) for name in (b"VERSION", b"PATCHLEVEL", b"SUBLEVEL")
    ]
    return ".".join(match[1].decode() for match in found if match)


def _package_version() -> str:
    """The version of the installed Debian package; "unknown" if dpkg does not know it."""
    if shutil.which("dpkg-query") is None:
        return "unknown"
    command = ["dpkg-query", "--show", "--showformat=${Version}", PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
