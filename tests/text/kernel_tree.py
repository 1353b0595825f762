"""A small tree of C files in a tar.xz, in the place of the kernel's, and `prepare` on it in small parts."""

import io
import os
import signal
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WORDS = [
    "static",
    "int",
    "void",
    "struct",
    "return",
    "if",
    "for",
    "device",
    "buffer",
    "lock",
    "size",
    "flags",
    "NULL",
    "err",
]
ODD = {
    "drivers/latin1.c": b"/* M\xfcller */\n",
    "drivers/zero.h": b"\x00\x01\xff\xfe\n\n\n",
    "drivers/unknown.h": "/* ▁ ⁇ <s> <unk> é 漢字 */".encode(),
    "drivers/tabs.c": b"\t\t \t  x\r\n\f\v" * 40,
    "drivers/one.h": b"x",
}


def files(count: int = 400) -> dict[str, bytes]:
    """Path and content of each C and header file."""
    rng = np.random.default_rng(0)
    made = dict(ODD)
    for number in range(count):
        lines = []
        for _ in range(int(rng.integers(1, 30))):
            indent = "\t" * int(rng.integers(0, 3))
            lines.append(indent + " ".join(rng.choice(WORDS, int(rng.integers(1, 8)))) + f"_{number % 7};")
        made[f"kernel/dir_{number % 9}/file_{number}.{'c' if number % 3 else 'h'}"] = "\n".join(lines).encode()
    return made


def write_archive(file: Path, count: int = 400) -> Path:
    """Writes the tree, with other files among the C files, and a top folder as Debian's archive has it."""
    others = {
        "Makefile": b"# SPDX\nVERSION = 6\nPATCHLEVEL = 1\nSUBLEVEL = 7\nEXTRAVERSION =\n",
        "kernel/Makefile": b"VERSION = 99\n",
        "README": b"no C",
        "empty.c": b"",
    }
    with tarfile.open(file, "w:xz", preset=0) as tar:
        for path, content in {**others, **files(count)}.items():
            member = tarfile.TarInfo(f"linux-source-6.1/{path}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("linux-source-6.1/kernel/link.c")
        link.type, link.linkname = tarfile.SYMTYPE, "../Makefile"
        tar.addfile(link)
    return file


def settings(data_dir: Path, archive: Path) -> dict[str, Any]:
    """The settings of `PackedLanguageModel` that read the tree."""
    return {"data_dir": str(data_dir), "archive": str(archive), "vocab": 400, "length": 16}


def small_parts(change: Callable[[object, str, int], None] = setattr) -> None:
    """Makes every part of `prepare` small, so that the tree has several."""
    from experiments.datasets import linux_source, packed_text

    change(linux_source, "PART_BYTES", 20_000)
    for name, size in {"PART_BYTES": 15_000, "SAMPLE_BYTES": 60_000, "SHARD_BYTES": 40_000}.items():
        change(packed_text, name, size)


if __name__ == "__main__":  # data_dir, archive, number of the task after whose end the process is killed
    from experiments.datasets.parts import UnfinishedFolder
    from experiments.packed_language_model import PackedLanguageModel

    small_parts()
    commit, tasks = UnfinishedFolder.commit, iter(range(10**6))

    def commit_and_die(self: UnfinishedFolder, task: str, entry: Any) -> None:
        """Dies by SIGKILL when a task has ended, or just before."""
        last = next(tasks) == int(sys.argv[3])
        if last and sys.argv[4] == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        commit(self, task, entry)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    UnfinishedFolder.commit = commit_and_die
    PackedLanguageModel(**settings(Path(sys.argv[1]), Path(sys.argv[2]))).prepare()
