"""`prove-resume`: real runs that are really killed, and a comparison that misses nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests import xla_flags
from trainer.commands import run
from trainer.observe.phase_log import PhaseLog
from trainer.prove.aims import PHASES, SIGNALS, Aims
from trainer.prove.compare import compare, newest_step, read_tree, state_differences
from trainer.prove.launch import SAVING, Aim, Hit, ProcessLayout, Trail, run_launch
from trainer.prove.proof import Proof

ROOT = Path(__file__).parents[2]
CONFIG = "--config=tests/commands/prove_config.py"
STEPS, EVERY = 12, 3


def prove(*arguments: str, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"XLA_FLAGS": xla_flags()}
    command = [sys.executable, "-m", "trainer", "prove-resume", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=seconds
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a proof with four kills."""
    folder = tmp_path_factory.mktemp("proof") / "kept"
    result = prove(CONFIG, "--kills=4", "--seed=1", f"--keep={folder}")
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    return folder, result.stdout


@pytest.fixture
def copied(kept: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of that folder, to be damaged."""
    shutil.copytree(kept[0], tmp_path / "kept")
    return tmp_path / "kept"


def check(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = run(["prove-resume", f"--check={folder}"])
    return code, capsys.readouterr().out


def killed_runs(folder: Path) -> list[Path]:
    return sorted(folder.glob("killed-*"))


@pytest.mark.slow
def test_a_run_that_is_killed_four_times_equals_the_undisturbed_one(kept, capsys):
    folder, output = kept
    assert check(folder, capsys)[0] == 0
    assert re.search(r"^4 of 4 kills: final state \(\d\d arrays\), ids of \d+ batches, ", output, re.MULTILINE)
    assert output.strip().splitlines()[-1].count("are equal, bit for bit") == 1
    rows = re.findall(r"^killed-\d/launch-\d+ .*(SIGKILL|SIGTERM)  .* (137|143|0) +\d+\.\d$", output, re.MULTILINE)
    assert len(rows) == 4
    assert {code for name, code in rows if name == "SIGKILL"} <= {"137"}


@pytest.mark.slow
def test_each_launch_restored_what_orbax_alone_reads(kept):
    folder, _ = kept
    restored = 0
    for launch in folder.glob("killed-*/launch-*"):
        before = json.loads((launch / "before.json").read_text())
        trace = launch / "process_0.jsonl"
        for line in map(json.loads, trace.read_text().splitlines() if trace.exists() else ()):
            if "restored" in line:
                restored += 1
                assert (line["restored"], line["digests"]) == (before["step"], before["digests"])
    assert restored > 0


def save_changed_state(workdir: Path) -> str:
    """Flips the lowest bit of a number of the newest checkpoint, which Orbax saves again; returns its path."""
    step = newest_step(workdir)
    assert step is not None
    place, tree = workdir / "checkpoints" / str(step) / "state", read_tree(workdir, step)
    kernel = np.array(tree["params"]["dense"]["kernel"])
    kernel.view(np.uint32)[2, 5] ^= 1
    tree["params"]["dense"]["kernel"] = kernel
    shutil.rmtree(place)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(place.absolute(), tree)
    return "params/dense/kernel[2, 5]"


@pytest.mark.slow
def test_one_flipped_bit_of_the_final_state_is_reported(copied, capsys):
    path = save_changed_state(killed_runs(copied)[0] / "run")
    code, output = check(copied, capsys)
    assert code == 1
    assert output.startswith(f"different: final state: {path} is ")
    assert len(output.splitlines()) == 1


@pytest.mark.slow
def test_one_changed_digit_of_one_metric_is_reported(copied, capsys):
    file = killed_runs(copied)[0] / "run" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    place = next(i for i, line in enumerate(lines) if '"step": 7,' in line and "train/grad_norm" in line)
    row = json.loads(lines[place])
    row["train/grad_norm"] = float(np.nextafter(row["train/grad_norm"], np.inf))
    lines[place] = json.dumps(row) + "\n"
    file.write_text("".join(lines))
    code, output = check(copied, capsys)
    assert code == 1
    assert output.startswith("different: metrics.jsonl, row 7 (step ")
    assert "train/grad_norm is " in output


@pytest.mark.slow
def test_two_swapped_examples_of_one_batch_are_reported(copied, capsys):
    file, text = next(
        (file, text)
        for file in sorted(killed_runs(copied)[0].glob("launch-*/process_0.jsonl"))
        for text in file.read_text().splitlines(keepends=True)
        if '"batch"' in text
    )
    line = json.loads(text)
    line["ids"][3], line["ids"][8] = line["ids"][8], line["ids"][3]
    file.write_text(file.read_text().replace(text, json.dumps(line) + "\n"))
    code, output = check(copied, capsys)
    assert code == 1
    place = f"batch of step {line['batch']} in {file.parent.name}, example 3"
    assert output == f"different: {place}: id {line['ids'][8]} undisturbed, {line['ids'][3]} killed\n"


@pytest.mark.slow
def test_a_step_whose_batch_nobody_read_is_reported(copied, capsys):
    for file in killed_runs(copied)[0].glob("launch-*/process_0.jsonl"):
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(line for line in lines if '"batch": 7,' not in line))
    assert check(copied, capsys) == (1, "different: batch of step 7: no launch read example 0\n")


@pytest.mark.slow
def test_a_lost_evaluation_is_reported(copied, capsys):
    file = killed_runs(copied)[0] / "run" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(x for x in lines if not ('"step": 6,' in x and "test/examples" in x)))
    code, output = check(copied, capsys)
    assert code == 1
    expected = "different: evaluation of step 6 on 'test': it has 0 rows in metrics.jsonl of the killed run\n"
    assert output.startswith(expected)


@pytest.mark.slow
@pytest.mark.parametrize("tolerance", [None, 1e-4])
def test_an_evaluation_that_was_made_twice_is_reported(copied, tolerance):
    killed = killed_runs(copied)[0]
    file = killed / "run" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    place = next(i for i, line in enumerate(lines) if '"step": 6,' in line and "test/examples" in line)
    file.write_text("".join([*lines[: place + 1], *lines[place:]]))
    differences = compare(copied / "undisturbed", killed, tolerance=tolerance).differences
    assert differences == ["evaluation of step 6 on 'test': it has 2 rows in metrics.jsonl of the killed run"]


@pytest.mark.slow
def test_a_restore_of_other_bits_is_reported(copied, capsys):
    file = next(
        file for file in sorted(copied.glob("killed-*/launch-*/process_0.jsonl")) if '"restored"' in file.read_text()
    )
    text = next(x for x in file.read_text().splitlines() if '"restored"' in x)
    line = json.loads(text)
    line["digests"]["params/head/bias"] = "0" * 64
    file.write_text(file.read_text().replace(text, json.dumps(line)))
    code, output = check(copied, capsys)
    assert code == 1
    assert f"restore in {file.parent.name}: params/head/bias of step {line['restored']} differs" in output


@pytest.mark.slow
def test_the_first_state_that_init_from_made_is_no_restore(copied, capsys):
    folder = killed_runs(copied)[0] / "launch-001"
    with (folder / "process_0.jsonl").open("a") as file:  # as `Session.initial_state` traces such a state
        file.write(json.dumps({"restored": 0, "digests": {"params/head/bias": "0" * 64}, "time": 0.0}) + "\n")
    assert json.loads((folder / "before.json").read_text())["step"] is None
    assert check(copied, capsys)[0] == 0


@pytest.mark.slow
def test_a_relaunch_that_begins_anew_in_place_of_its_checkpoint_is_reported(kept, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    layout, killed = ProcessLayout(devices=1), tmp_path / "killed-1"
    proof = Proof(
        [f"{CONFIG}:forgetful"], STEPS, [layout], 1, 0, tmp_path, tolerance=0.0, limit=120, show=lambda text: None
    )
    for _ in range(2):  # the second launch finds the checkpoint of step 12
        assert proof._launch(killed, layout, None).code == 0
    text = f"step 1 came first and nothing was restored, the newest checkpoint on disk was {STEPS}"
    assert compare(kept[0] / "undisturbed", killed).differences == [f"restore in launch-002: {text}"]


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_read_is_reported(copied, capsys):
    workdir = killed_runs(copied)[0] / "run"
    for file in (workdir / "checkpoints" / str(STEPS) / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    code, output = check(copied, capsys)
    assert code == 1
    assert output.startswith("different: final state: the checkpoint of the killed run cannot be read: ")


@pytest.mark.slow
def test_losses_of_other_topologies_may_differ_by_the_tolerance_and_no_more(copied):
    killed = killed_runs(copied)[0]
    file = killed / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    next(row for row in rows if row["step"] == 5 and "train/loss" in row)["train/loss"] *= 1 + 5e-5
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    near = compare(copied / "undisturbed", killed, tolerance=1e-4)
    assert near.differences == []
    assert near.apart == pytest.approx(5e-5, rel=1e-3)
    (text,) = compare(copied / "undisturbed", killed, tolerance=1e-5).differences
    assert text.startswith("metrics.jsonl, row 5 (step ")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_each_relaunch_may_come_up_on_another_topology():
    lists = ("--processes=1,2", "--devices=1,2", "--strategies=data,fsdp,pmap")
    result = prove(CONFIG, "--kills=3", "--seed=0", *lists)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    assert re.search(
        r"^3 of 3 kills, 12 process layouts: the state at every restore and the ids of ", result.stdout, re.M
    )


@pytest.mark.slow
def test_a_relaunch_that_fails_by_itself_fails_the_proof():
    result = prove(f"{CONFIG}:broken", "--kills=4")
    assert (result.returncode, result.stderr) == (1, "")
    assert "ended with exit code 2 by itself:\n" in result.stdout
    assert "RuntimeError: this relaunch is broken (" in result.stdout


@pytest.mark.slow
def test_the_compilation_cache_of_the_launches_is_that_of_the_flag():
    result = prove(CONFIG, "--kills=1", "--compilation-cache=README.md")
    assert result.returncode == 2
    assert "the undisturbed run ended with exit code 2:" in result.stderr
    assert "--compilation-cache=README.md cannot be made a folder: File exists" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_a_proof_that_is_stopped_leaves_no_process(tmp_path, processes):
    keep = tmp_path / "kept"
    command = [sys.executable, "-m", "trainer", "prove-resume", f"{CONFIG}:slow", f"--keep={keep}"]
    proof = subprocess.Popen([*command, f"--processes={processes}"], cwd=ROOT, stderr=subprocess.PIPE)
    trace = keep / "undisturbed" / "launch-001" / f"process_{processes - 1}.jsonl"
    while not (trace.exists() and '"batch"' in trace.read_text()):
        assert proof.poll() is None
        time.sleep(0.05)
    assert running_with(str(keep))
    proof.send_signal(signal.SIGTERM)
    _, stderr = proof.communicate(timeout=30)
    assert (proof.returncode, stderr) == (143, b"\ninterrupted\n")
    assert running_with(str(keep)) == []


def running_with(text: str) -> list[int]:
    """The ids of the processes with this text in their command line."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in file.read_bytes():
                found.append(int(file.parent.name))
        except OSError:  # it has just ended
            continue
    return [pid for pid in found if pid != os.getpid()]


# A real process that writes a trace, as a training would, with phases of known lengths.
TRACED = """
import sys, time
from trainer.observe.phase_log import PhaseLog
trace = PhaseLog(sys.argv[1])
for step in range(1, 10_000):
    for phase, seconds in (("data", 0.001), ("step", 0.01), ("evaluate", 0.03)):
        trace.phase(phase, step)
        time.sleep(seconds)
    trace.saving(step)
    trace.phase("step", step)
    time.sleep(0.02)
    trace.saved(step)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "signum"),
    [
        pytest.param(phase, signum, marks=() if phase == SAVING else pytest.mark.exhaustive)
        for phase in ("data", "evaluate", SAVING)
        for signum in SIGNALS
    ],
)
def test_a_signal_comes_in_the_phase_that_it_was_aimed_at(tmp_path, phase, signum):
    aim = Aim(phase, 20, 9_000, 0.005, signum, 0)
    end = run_launch([sys.executable, "-c", TRACED, str(tmp_path)], ProcessLayout(), tmp_path, aim=aim, limit=60)
    assert end.code == 128 + signum
    assert end.hit is not None
    assert end.hit.saving if phase == SAVING else end.hit.phase == phase
    assert end.hit.step >= 20


def trace_of_an_undisturbed_run(folder: Path) -> None:
    trace = PhaseLog(folder)
    trace.phase("compile", 0)
    trace.phase("restore", 0)
    for step in range(1, STEPS + 1):
        trace.phase("data", step)
        trace.phase("step", step)
        if step % EVERY == 0:
            trace.phase("save", step)
            trace.saving(step)
            trace.phase("evaluate", step)
            trace.saved(step)
    trace.phase("data", STEPS + 1)
    trace.close()


def test_kills_are_spread_over_all_phases_and_signals_and_lie_within_the_run(tmp_path):
    trace_of_an_undisturbed_run(tmp_path)
    aims = Aims(np.random.default_rng(0), tmp_path, STEPS)
    chosen = []
    for i in range(36):
        start = (i % 4) * EVERY
        aim = aims.choose(start, 36 - i, processes=2)
        assert aim.step in (0, *range(start, STEPS + 1))
        assert aim.step <= aim.last <= STEPS
        assert aim.process in (0, 1)
        assert not (aim.everyone and aim.signum == signal.SIGTERM)
        aims.count(aim, Hit(aim.phase, aim.step, saving=aim.phase == SAVING))
        chosen.append((aim.phase, aim.signum))
    counts = [chosen.count((phase, signum)) for phase in PHASES for signum in SIGNALS]
    assert min(counts) >= 2
    assert max(counts) <= 4


def test_a_fresh_run_is_not_killed_in_a_restore_and_a_finished_one_in_no_step(tmp_path):
    trace_of_an_undisturbed_run(tmp_path)
    fresh, finished = (Aims(np.random.default_rng(0), tmp_path, STEPS) for _ in range(2))
    assert {fresh.choose(0, 5, 1).phase for _ in range(200)}.isdisjoint({"restore"})
    assert {finished.choose(STEPS, 5, 1).phase for _ in range(200)} <= {"compile", "restore", "evaluate"}


def test_a_trail_knows_phase_and_save(tmp_path):
    trace, trail = PhaseLog(tmp_path), Trail(tmp_path / "process_0.jsonl")
    trace.phase("save", 4)
    trace.saving(4)
    trace.phase("evaluate", 4)
    assert trail.read()
    assert (trail.pid, trail.hit()) == (os.getpid(), Hit("evaluate", 4, saving=True))
    assert trail.is_in("evaluate", 4)
    assert trail.is_in(SAVING, 3)
    assert not trail.is_in("evaluate", 5)
    assert not trail.is_in(SAVING, 4, delay=60)
    trace.saved(4)
    assert trail.read()
    assert trail.hit() == Hit("evaluate", 4, saving=False)
    assert not trail.read()
    trace.close()


def test_differences_name_path_index_and_both_values():
    a: dict[str, Any] = {
        "w": np.zeros((2, 3), np.float32),
        "only": np.ones(1),
        "cast": np.ones(2, np.float32),
        "n": np.int32(3),
    }
    b: dict[str, Any] = {"w": a["w"].copy(), "new": np.ones(1), "cast": np.ones(2, np.float64), "n": np.int32(4)}
    b["w"][1, 2] = -0.0  # equal as numbers, not as bits
    assert list(state_differences(a, a)) == []
    assert list(state_differences(a, b)) == [
        "final state: w[1, 2] is 0.0 (bytes 00000000) undisturbed, -0.0 (bytes 00000080) killed",
        "final state: only is there undisturbed, missing killed",
        "final state: cast is float32[2] undisturbed, float64[2] killed",
        "final state: n is 3 (bytes 03000000) undisturbed, 4 (bytes 04000000) killed",
        "final state: new is missing undisturbed, there killed",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kills=0",), "--kills is 0; it must be at least 1"),
        (("--workdir=runs/a",), "name a folder to keep them in with --keep=DIR"),
        ((), "give --config=FILE"),
        ((CONFIG, "--processes=2,0"), "--processes is '2,0'; numbers from 1 on are expected, separated by commas"),
        ((CONFIG, "--devices=x"), "--devices is 'x'; numbers from 1 on are expected"),
        ((CONFIG, "--strategies=fspd"), "parallel.strategy is 'fspd'; did you mean 'fsdp'?"),
        ((CONFIG, f"--keep={ROOT}"), "is not empty; name a new folder"),
        ((f"--check={ROOT / 'docs'}",), "holds nothing that prove-resume --keep left"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert run(["prove-resume", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
