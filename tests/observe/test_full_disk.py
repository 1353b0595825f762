"""A disk that fills up while metrics are written, and has room again later."""

import json
import shlex
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.observe.small_disk import STEPS, command_on, row
from trainer.observe.log import MetricsLog

ROOT = Path(__file__).parents[2]


def on_a_full_disk(tmp_path: Path, on_error: str) -> dict[str, Any]:
    mountpoint = tmp_path / "disk"
    mountpoint.mkdir()
    python = f"{shlex.quote(sys.executable)} -m tests.observe.small_disk {shlex.quote(str(mountpoint))} {on_error}"
    command = command_on(mountpoint, "200k", python)
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=100)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def undisturbed(folder: Path, steps: range) -> str:
    with closing(MetricsLog(folder, 0)) as log:
        for step in steps:
            log.write(step, *row(step))
    return (folder / "metrics.jsonl").read_text()


def test_told_to_go_on_a_run_writes_every_row_once_there_is_room_again(tmp_path):
    found = on_a_full_disk(tmp_path, "continue")
    assert found["stopped at"] == 0
    assert found["whole"]
    assert 0 < found["rows"] < STEPS  # the disk was full
    warnings = found["said"]
    places = [text.partition(": ")[2].partition(": ")[0].rpartition("/")[2] for text in warnings]
    assert sorted(places) == ["metrics.jsonl", "tensorboard", "timing.jsonl"]  # a line for each, not for each row
    assert all("No space left on device" in text for text in warnings)
    assert found["said after a sync"] == warnings  # the outage goes on: nothing new to say
    assert len(found["at the end"]) == 6  # each is written again
    assert found["event files when full"] == 1
    assert found["slowest"] < 1
    assert found["metrics"] == undisturbed(tmp_path, range(1, STEPS + 2))
    assert found["timings"] == STEPS + 1
    expected = {
        (tag, step, float(np.float32(value)))
        for step in range(1, STEPS + 2)
        for part in row(step)
        for tag, value in part.items()
    }
    assert {tuple(event) for event in found["events"]} == expected


def test_told_to_stop_a_run_ends_at_the_first_row_that_cannot_be_written_and_leaves_whole_rows(tmp_path):
    found = on_a_full_disk(tmp_path, "stop")
    assert 0 < found["stopped at"] < STEPS
    assert "metrics.jsonl: No space left on device" in found["error"]
    assert found["whole"]
    assert found["rows"] == found["stopped at"] - 1
    warned = [text for text in found["at the end"] if text.startswith("warning")]
    assert not any("metrics.jsonl" in text for text in warned)  # the error was raised, once
    assert found["metrics"] == undisturbed(tmp_path, range(1, found["stopped at"] + 1))  # closing found room


_TRAINING = """
cd {root}
{python} -m trainer train --config={config} --workdir={disk}/run > {out} 2> {err} & trainer=$!
i=0
while ! grep -q 'metrics.jsonl: No space left' {out} {err}; do
  i=$((i + 1)); [ $i -lt 900 ]
  sleep 0.1
done
cp {disk}/run/metrics.jsonl {full}
mount -o remount,size=64m {disk}
code=0; wait $trainer || code=$?
cp -r {disk}/run {copy}
exit $code
"""

_CONFIG = """
import sys
sys.path.insert(0, {root!r})
from tests.tasks import Task, make_run
from trainer import config

def get_config():
    return make_run(
        4000,
        checkpoint=config.Checkpoint(every_steps=3500, on_error={on_error!r}),
        evaluation=config.Evaluation(every_steps=4000, batch_size=8),
        parallel=config.Parallel(devices=1),
    )
"""


@pytest.mark.slow
def test_a_training_whose_disk_fills_goes_on_and_ends_with_the_rows_of_one_whose_disk_does_not(tmp_path):
    disk, config = tmp_path / "disk", tmp_path / "config.py"
    disk.mkdir()
    config.write_text(_CONFIG.format(root=str(ROOT), on_error="continue"))
    files = {name: tmp_path / name for name in ("out", "err", "full", "copy")}
    script = _TRAINING.format(root=ROOT, python=sys.executable, config=config, disk=disk, **files)
    result = subprocess.run(command_on(disk, "300k", script), capture_output=True, text=True, check=False, timeout=200)
    assert result.returncode == 0, files["err"].read_text() + result.stderr
    straight = tmp_path / "straight"
    command = [sys.executable, "-m", "trainer", "train", f"--config={config}", f"--workdir={straight}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    expected = (straight / "metrics.jsonl").read_bytes()
    assert 0 < files["full"].stat().st_size < len(expected)
    assert (files["copy"] / "metrics.jsonl").read_bytes() == expected
    assert "done: " in files["out"].read_text()
