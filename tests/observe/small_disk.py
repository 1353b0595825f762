"""A disk of a few hundred kB that really fills: a tmpfs, mounted in a namespace of its own for one command.

    python -m tests.observe.small_disk MOUNTPOINT stop|continue

writes rows into a `MetricsLog` there until the disk is full and, after room was made, until it is closed. It prints
what was observed as JSON.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import HostError
from trainer.observe.log import MetricsLog

STEPS = 1500


def command_on(mountpoint: Path, size: str, command: str) -> list[str]:
    """A command line that runs a shell command with a tmpfs of `size` at `mountpoint`, which only it can see.

    Skips the test if this machine lets nobody mount; that is the only case in which it proves nothing.
    """
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare here, so no disk of a given size can be mounted")
    user = [] if os.geteuid() == 0 else ["-r"]
    place = shlex.quote(str(mountpoint))
    mounted = ["unshare", *user, "-m", "sh", "-ec", f"mount -t tmpfs -o size={size} none {place}; {{}}"]
    trial = subprocess.run([*mounted[:-1], mounted[-1].format("true")], capture_output=True, text=True, check=False)
    if trial.returncode:
        pytest.skip(f"nothing can be mounted here: {trial.stderr.strip()}")
    return [*mounted[:-1], mounted[-1].format(command)]


def row(step: int) -> tuple[dict[str, float], dict[str, float]]:
    """Values and timing of a step."""
    return {"train/loss": 1 / step, "train/accuracy": step / 7}, {"examples_per_second": 100.0 + step}


def main(folder: Path, on_error: Any) -> dict[str, Any]:
    """Writes a log on the disk at `folder`, which fills."""
    said: list[str] = []
    slowest, stopped_at, error = 0.0, 0, ""
    with closing(MetricsLog(folder, 0, on_error=on_error, report=said.append)) as log:
        for step in range(1, STEPS + 1):
            start = time.perf_counter()
            try:
                log.write(step, *row(step))
            except HostError as raised:
                stopped_at, error = step, str(raised)
                break
            slowest = max(slowest, time.perf_counter() - start)
        text = (folder / "metrics.jsonl").read_text()
        full = {"whole": text.endswith("\n"), "rows": text.count("\n"), "said": list(said)}
        if on_error == "continue":
            log.sync()  # still full
            full["said after a sync"] = list(said)
        event_files = [file.name for file in (folder / "tensorboard").glob("events*")]
        subprocess.run(["mount", "-o", "remount,size=8m", str(folder)], check=True)
        if on_error == "continue":
            log.sync()
            log.write(STEPS + 1, *row(STEPS + 1))
    return {
        **full,
        "slowest": slowest,
        "stopped at": stopped_at,
        "error": error,
        "at the end": said,
        "event files when full": len(event_files),
        "metrics": (folder / "metrics.jsonl").read_text(),
        "timings": (folder / "timing.jsonl").read_text().count("\n"),
        "events": _events(folder),
    }


def _events(folder: Path) -> list[tuple[str, int, float]]:
    from tests.observe.event_reader import shown

    return [(tag, step, value) for (tag, step), value in shown(folder / "tensorboard").items()]


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2])))
