"""`sweep`: real cells that are really killed, stopped and shared, and a table of their results."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import xla_flags
from trainer import train
from trainer.commands import run
from trainer.commands.arguments import load_config
from trainer.lock import began
from trainer.prove.compare import newest_step, read_state, state_differences

ROOT = Path(__file__).parents[2]
PEAK = "optimizer.schedule.peak"
CONFIG = """
from tests.tasks import Task, make_run
from trainer.config import Checkpoint, Logging, Parallel, Sweep


def get_config():
    return make_run(
        {steps},
        experiment=Task(dropout=0.2),
        parallel=Parallel(devices=1),
        checkpoint=Checkpoint(every_steps={every}, best_metric=None),
        logging=Logging(every_steps=10),
    )
"""


def config_file(folder: Path, *, steps: int, every: int, more: str = "") -> str:
    (folder / "config.py").write_text(CONFIG.format(steps=steps, every=every) + more)
    return f"--config={folder / 'config.py'}"


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"XLA_FLAGS": xla_flags(), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "trainer", "sweep", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def sweep(*arguments: str) -> tuple[int, str]:
    """Exit code and standard output of a sweep that writes nothing else."""
    with start(*arguments) as process:
        out, err = process.communicate(timeout=300)
    assert err == ""
    return process.returncode, out


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    deadline = time.monotonic() + 120
    while not (found := condition()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def line_about(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    """The match of the next line of output that matches."""
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(pattern, line):
            return match
    raise AssertionError(pattern)


def steps_saved(workdir: Path) -> list[str]:
    folder = workdir / "checkpoints"
    return [path.name for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []


def undisturbed(folder: Path, **settings: Any) -> Path:
    """The workdir of the same run, trained in one go by `train`."""
    run = load_config(str(folder / "config.py"))
    run.seed, run.optimizer.schedule.peak = settings["seed"], settings.get("peak", run.optimizer.schedule.peak)
    train(run, folder / "undisturbed", verbose=False)
    return folder / "undisturbed"


def differences(workdir: Path, other: Path) -> list[str]:
    """Of the newest states of two workdirs, bit by bit."""
    steps = [newest_step(folder) for folder in (workdir, other)]
    assert steps[0] == steps[1] is not None
    return list(state_differences(*(read_state(folder, steps[0]) for folder in (workdir, other))))


@pytest.mark.slow
def test_cells_go_on_bit_for_bit_after_one_is_killed_and_then_the_sweep(tmp_path):
    given = (
        config_file(tmp_path, steps=3000, every=100),
        f"--workdir={tmp_path / 'out'}",
        "--grid=seed=0,1",
        "--jobs=2",
    )
    workdirs = [tmp_path / "out" / f"seed={seed}" for seed in (0, 1)]
    with start(*given) as process:
        pids = [int(line_about(process, rf"seed={seed}: process (\d+) trains to step 3,000")[1]) for seed in (0, 1)]
        wait_for(lambda: steps_saved(workdirs[0]), process)
        os.kill(pids[0], signal.SIGKILL)
        assert line_about(process, "seed=0: failed with exit code 137 after .* killed by SIGKILL")
        wait_for(lambda: steps_saved(workdirs[1]), process)
        process.kill()
    deadline = time.monotonic() + 20
    while began(pids[1]) is not None:  # the kernel ends the other cell with the sweep
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert all((newest_step(workdir) or 0) < 3000 for workdir in workdirs)
    code, out = sweep(*given)
    assert code == 0, out
    assert re.search(r"^ +2 +\S+ ± \S+ +3,000 +2 done$", out, re.MULTILINE)
    for seed, workdir in enumerate(workdirs):
        assert "resumed from step" in (workdir / "log.txt").read_text()
        if seed == 0:
            other = undisturbed(tmp_path, seed=seed)
            assert (workdir / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
            assert differences(workdir, other) == []


@pytest.mark.slow
def test_halving_continues_the_best_cell_from_its_checkpoint_also_after_a_signal(tmp_path):
    given = [
        *(config_file(tmp_path, steps=3000, every=100), f"--workdir={tmp_path / 'out'}", "--metric=test/accuracy"),
        *("--mode=max", f"--grid={PEAK}=1e-5,1e-2", "--halving=2", "--first-rung=30", "--compile-once"),
    ]
    best = tmp_path / "out" / f"{PEAK}=0.01"
    with start(*given) as process:
        line_about(process, rf"{PEAK}=0.01: at step 30 ")
        line_about(process, rf"{PEAK}=0.01: process \d+ trains to step 3,000$")
        wait_for(lambda: "100" in steps_saved(best), process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (143, "\nthe cells that ran are saved; the same command goes on\n")
    code, out = sweep(*given)
    assert code == 0, out
    assert f"best: {PEAK}=0.01: test/accuracy" in out
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").read_text().splitlines()))
    assert [(row["step"], row["status"]) for row in rows] == [("30", "stopped"), ("3000", "done")]
    log = (best / "log.txt").read_text()
    assert "stopped at step 30: --until=30" in log
    assert "resumed from step 30" in log
    other = undisturbed(tmp_path, seed=0, peak=1e-2)
    assert differences(best, other) == []


@pytest.mark.slow
def test_a_cell_that_diverges_is_reported_and_the_others_go_on(tmp_path):
    given = (config_file(tmp_path, steps=4, every=2), f"--workdir={tmp_path / 'out'}")
    code, out = sweep(*given, "--grid=experiment.explode_at=1,-1")
    assert code == 1
    assert re.search(r"^ +-1 +1 +\S+ +4 +1 done$", out, re.MULTILINE)
    assert re.search(
        r"^diverged: experiment.explode_at=1: exit code 1: the (loss|gradient) of step \d", out, re.MULTILINE
    )
    # `train` wrote all that it has to say into the log.
    assert "diverged/" in (tmp_path / "out" / "experiment.explode_at=1" / "log.txt").read_text()


def test_the_report_of_a_sweep_that_has_not_begun_changes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = config_file(tmp_path, steps=4, every=2)
    assert run(["sweep", config, f"--workdir={tmp_path / 'out'}", "--grid=seed=0,1", "--report"]) == 0
    assert "2 open" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["config.py"]
