"""`sweep`: real cells that are really killed, stopped and shared, and a table of their results."""

import csv
import logging
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
from trainer.commands.arguments import load_config, override
from trainer.config import Sweep
from trainer.lock import began
from trainer.prove.compare import newest_step, read_state, state_differences
from trainer.sweep.cells import make_cells
from trainer.sweep.results import Results
from trainer.sweep.workdirs import write_settings

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
        config_file(tmp_path, steps=3000, every=200),
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
        *(config_file(tmp_path, steps=3000, every=200), f"--workdir={tmp_path / 'out'}", "--metric=test/accuracy"),
        *("--mode=max", f"--grid={PEAK}=1e-5,1e-2", "--halving=2", "--first-rung=30", "--compile-once"),
    ]
    best = tmp_path / "out" / f"{PEAK}=0.01"
    with start(*given) as process:
        line_about(process, rf"{PEAK}=0.01: at step 30 ")
        line_about(process, rf"{PEAK}=0.01: process \d+ trains to step 3,000$")
        wait_for(lambda: "200" in steps_saved(best), process)
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


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder for a config, in the root of the repository."""
    monkeypatch.chdir(ROOT)
    return tmp_path


def test_runs_of_other_seeds_and_rates_are_compiled_once(here, caplog):
    keys = []
    for seed, peak in ((0, "1e-2"), (1, "3e-3")):
        given = ["train", config_file(here, steps=3, every=3), f"--workdir={here / str(seed)}", "--compile-once"]
        caplog.clear()
        with caplog.at_level(logging.DEBUG, logger="jax._src.compiler"):
            assert run([*given, f"--config.seed={seed}", f"--config.{PEAK}={peak}"]) == 0
        keys.append(set(re.findall(r"jit_(?:init|train_step)-[0-9a-f]{16,}", caplog.text)))
    assert len(keys[0]) == 2
    assert keys[0] == keys[1]


def test_the_report_of_a_sweep_that_has_not_begun_changes_nothing(here, capsys):
    assert (
        run(["sweep", config_file(here, steps=4, every=2), f"--workdir={here}/out", "--grid=seed=0,1", "--report"]) == 0
    )
    assert "2 open" in capsys.readouterr().out
    assert [path.name for path in here.iterdir()] == ["config.py"]


def test_a_halving_reads_each_cell_a_few_times_however_many_there_are(here, capsys, monkeypatch):
    reads = []
    read = Results._read
    monkeypatch.setattr(Results, "_read", lambda *given: reads.append(given) or read(*given))
    given = [config_file(here, steps=4, every=2), f"--workdir={here}/out", "--report", "--halving=2"]
    counts = []
    for values in ("1,2", "1,2,3,4,5,6,7,8"):
        reads.clear()
        assert run(["sweep", *given, f"--grid={PEAK}={values}"]) == 0
        counts.append(len(reads))
    assert counts[1] == 4 * counts[0]


GET_SWEEP = """

def get_sweep(size):
    return Sweep(grid={"seed": (0, 1), "experiment.examples": (int(size),)}, metric="test/accuracy", mode="max")
"""


def test_the_config_file_gives_what_the_flags_may_replace(here, capsys):
    config = config_file(here, steps=4, every=2, more=GET_SWEEP).replace("config.py", "config.py:48")
    (here / "config.py").write_text((here / "config.py").read_text().replace("get_config()", "get_config(size)"))
    given = ["sweep", config, f"--workdir={here}/out", "--report"]
    assert run(given) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^experiment.examples +seeds +test/accuracy +steps +cells$", shown, re.MULTILINE)
    assert "2 open" in shown
    assert run([*given, "--grid=seed=0,1,2", f"--grid={PEAK}=1,2", "--metric=test/loss", "--mode=min"]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"^experiment.examples +{PEAK} +seeds +test/loss", shown, re.MULTILINE)
    assert shown.count("3 open") == 2


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a mistake."""
    assert run(["sweep", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ")


def test_a_config_file_whose_sweep_is_none_is_one_line(here, capsys):
    config = config_file(here, steps=4, every=2, more='\n\ndef get_sweep():\n    return {"seed": (0, 1)}\n')
    found = error_of(capsys, config, f"--workdir={here}/out")
    assert found == f"get_sweep in '{here}/config.py' returned a dict; a Sweep is expected\n"


def test_cells_that_have_begun_keep_their_settings(here, capsys):
    given = [config_file(here, steps=4, every=2), f"--workdir={here}/out", "--grid=seed=0,1"]
    cells, _ = make_cells(load_config(str(here / "config.py")), Sweep(grid={"seed": "0,1"}), override)
    results = Results(here / "out", "test/loss", "min")
    write_settings(cells, results)
    assert run(["sweep", *given, "--report", "--config.batch_size=8"]) == 0  # nothing has begun
    (results.workdir(cells[1]) / "checkpoints" / "2").mkdir(parents=True)
    before = (results.workdir(cells[0]) / "config.json").read_bytes()
    assert run(["sweep", *given, "--report", "--config.logging.every_steps=2"]) == 0  # changes no update
    capsys.readouterr()
    found = error_of(capsys, *given, "--config.batch_size=8")
    assert found.startswith(f"workdir {here}/out/seed=0 holds a run with other settings: batch_size was 16, is 8; ")
    assert found.endswith("; choose another --workdir for the sweep\n")
    assert (results.workdir(cells[0]) / "config.json").read_bytes() == before


def test_the_workdir_of_a_run_is_no_folder_for_a_sweep(here, capsys):
    (here / "config.json").write_text("{}")
    found = error_of(capsys, config_file(here, steps=4, every=2), f"--workdir={here}", "--grid=seed=0,1")
    assert found == f"--workdir={here} is the workdir of a run; a sweep needs a folder of its own\n"
