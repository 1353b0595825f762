"""The real command, killed with SIGKILL and launched again, ends where an uninterrupted run ends, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests import xla_flags
from tests.observe.event_reader import shown
from trainer import config
from trainer.checkpoint import Store
from trainer.workdir import Workdir

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parent.parent
STEPS, EVERY = 90, 30


def command(workdir: Path, strategy: str) -> list[str]:
    """Digits with dropout, BatchNorm and augmentation, on four devices; every step is logged."""
    return [
        *(sys.executable, "-m", "trainer", "train", "--config=configs/digits.py", f"--workdir={workdir}"),
        *(f"--config.total_steps={STEPS}", "--config.batch_size=32", "--config.logging.every_steps=1"),
        *(f"--config.evaluation.every_steps={EVERY}", f"--config.checkpoint.every_steps={EVERY}"),
        *("--config.experiment.batch_norm=true", "--config.experiment.hidden=512", "--config.evaluation.batch_size=64"),
        *("--config.optimizer.labels=(('.*/(bias|scale)','plain'),('.*/kernel','decayed'))",),
        f"--config.parallel.strategy={strategy}",
    ]


def environment(data_dir: Path) -> dict[str, str]:
    return os.environ | {
        "TFDS_DATA_DIR": str(data_dir),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(devices=4),
    }


def finish(workdir: Path, strategy: str, data_dir: Path) -> str:
    done = subprocess.run(
        command(workdir, strategy),
        cwd=REPOSITORY,
        env=environment(data_dir),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill_when(workdir: Path, strategy: str, data_dir: Path, ready: Callable[[], bool], output: Path) -> None:
    """Starts the command; stops it dead once `ready`, kills it if that is still so, else lets it go on until it is.

    Its standard output goes into the file `output`.
    """
    with (
        output.open("w") as file,
        subprocess.Popen(
            command(workdir, strategy),
            cwd=REPOSITORY,
            env=environment(data_dir),
            stdout=file,
            stderr=subprocess.DEVNULL,
        ) as process,
    ):
        try:
            while True:
                assert process.poll() is None, "the run ended before it could be killed"
                if ready():
                    process.send_signal(signal.SIGSTOP)
                    time.sleep(0.05)
                    if ready():
                        break
                    process.send_signal(signal.SIGCONT)
                time.sleep(0.001)
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL


def final_state(workdir: Path) -> list[np.ndarray]:
    """Every array of the last checkpoint, read as NumPy without any of this project's code."""
    folder = (workdir / "checkpoints" / str(STEPS) / "state").absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return jax.tree.leaves(checkpointer.restore(folder, restore_args=as_numpy))


def logged_steps(workdir: Path) -> int:
    file = workdir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def event_steps(workdir: Path) -> list[int]:
    """The steps of every train/loss that TensorBoard shows."""
    return sorted(step for tag, step in shown(workdir / "tensorboard") if tag == "train/loss")


def assert_same_run(workdir: Path, uninterrupted: Path) -> None:
    found, expected = final_state(workdir), final_state(uninterrupted)
    assert len(found) == len(expected) > 20
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (workdir / "metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()
    assert event_steps(workdir) == list(range(1, STEPS + 1))


@pytest.fixture(scope="module", params=["data", pytest.param("pmap", marks=pytest.mark.exhaustive)])
def uninterrupted(request, tmp_path_factory, data_dir):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    finish(workdir, request.param, data_dir)
    return workdir, request.param


def test_kills_between_saves_and_in_the_middle_of_one_lose_nothing(uninterrupted, tmp_path, data_dir):
    expected, strategy = uninterrupted
    workdir, output = tmp_path / "run", tmp_path / "output"
    kill_when(workdir, strategy, data_dir, lambda: logged_steps(workdir) >= EVERY * 3 // 2, output)
    killed_at = logged_steps(workdir)
    assert killed_at % EVERY, "killed at a save"
    before = set(workdir.glob("checkpoints/*"))

    def torn() -> list[Path]:
        return [path for path in workdir.glob("checkpoints/*.orbax-checkpoint-tmp") if path not in before]

    kill_when(workdir, strategy, data_dir, lambda: bool(torn()), output)
    assert f"resumed from step {killed_at // EVERY * EVERY}" in output.read_text()
    (step,) = [int(path.name.split(".")[0]) for path in torn()]
    shown = finish(workdir, strategy, data_dir)
    assert "resumed from step " in shown
    assert f"resumed from step {step}" not in shown
    assert_same_run(workdir, expected)
    assert not list(workdir.glob("checkpoints/*.orbax-checkpoint-tmp"))


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.exhaustive)],  # test_watch.py sends it
)
def test_a_signal_ends_the_command_in_good_order(signum, code, tmp_path, data_dir):
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        [*command(workdir, "data"), "--config.total_steps=1000000"],
        cwd=REPOSITORY,
        env=environment(data_dir),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while logged_steps(workdir) < 10:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    step = Store(Workdir(workdir).checkpoints, config.Checkpoint()).steps()[-1]
    assert f"stopped by {signum.name} at step {step}, which is saved" in stderr
    assert "Traceback" not in stderr


def test_ctrl_c_before_the_first_step_ends_the_command_at_once(tmp_path, data_dir):
    processes = {}
    for delay in (0.3, 0.8, 1.3, 1.8):  # in the imports of NumPy, of JAX, and of what makes the model and the data
        process = subprocess.Popen(
            [*command(tmp_path / str(delay), "data"), "--config.total_steps=1000000"],
            cwd=REPOSITORY,
            env=environment(data_dir),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        processes[delay] = (*process.communicate(timeout=60), process.returncode)
    assert {delay: result[1:] for delay, result in processes.items()} == dict.fromkeys(
        processes, ("\ninterrupted\n", 130)
    )
