"""A workdir: it holds one run, says how that can go on, and is tried before anything is computed."""

import copy
import dataclasses
import errno
import json
import os
import re
import resource
import shutil
import signal
import socket
import time
from contextlib import nullcontext

import pytest

from tests.tasks import Task, make_run
from trainer import config
from trainer.errors import UserError
from trainer.lock import began
from trainer.workdir import Workdir

DESCENT = config.Schedule("cosine", warmup=1)
SHALLOW = dataclasses.replace(DESCENT, final=1e-4)


def holding(path, run: config.Run) -> Workdir:
    """A workdir with a run and a checkpoint of it."""
    workdir = Workdir(path)
    (workdir.checkpoints / "4").mkdir(parents=True)
    workdir.write(config.resolve(run), "")
    return workdir


def with_schedules(steps: int, rate: config.Schedule, decay: config.Schedule | None = None) -> config.Run:
    groups = {"decayed": config.Group(decay_schedule=copy.copy(decay)), "plain": config.Group()}
    return make_run(steps, optimizer=dataclasses.replace(make_run().optimizer, schedule=copy.copy(rate), groups=groups))


@pytest.mark.parametrize("decay", [None, config.Schedule("wsd", descent=2)], ids=["rate", "rate-and-decay"])
def test_way_out_names_every_schedule_that_follows_the_length_and_leads_to_a_run_that_works(decay, tmp_path):
    folder = holding(tmp_path / "run", with_schedules(4, SHALLOW, decay))
    longer = with_schedules(6, SHALLOW, decay)
    with pytest.raises(UserError, match=r"\(run_steps follows total_steps: .* keeps the schedule as it was\)") as error:
        folder.check_run(config.resolve(longer))
    flags = re.findall(r"--config\.(\S+)\.run_steps=4", str(error.value))
    assert flags == ["optimizer.schedule", "optimizer.groups.decayed.decay_schedule"][: 1 + (decay is not None)]
    for path in flags:
        config.schedules_of(longer.optimizer)[path].run_steps = 4
    folder.check_run(config.resolve(longer))


def test_way_out_that_would_train_at_a_rate_of_0_is_not_given(tmp_path):
    folder = holding(tmp_path / "run", with_schedules(4, DESCENT))
    with pytest.raises(UserError) as error:
        folder.check_run(config.resolve(with_schedules(6, DESCENT)))
    held = f"workdir {tmp_path}/run holds a run with other settings: optimizer.schedule.run_steps was 4, is 6 "
    reason = (
        "(run_steps follows total_steps, and its old value cannot be kept: optimizer.schedule is 0 from step 5 to the "
        "last step, 6,"
    )
    assert str(error.value).startswith(held + reason)
    assert "--config" not in str(error.value)


def test_setting_that_is_gone_locks_no_run(tmp_path):
    folder = holding(tmp_path / "run", make_run())
    folder.config_file.write_text(folder.config_file.read_text().replace('"noise": 0.0', '"noise": 0.0, "nosie": 0'))
    folder.check_run(config.resolve(make_run()))
    assert folder.stored_run() == config.resolve(make_run())


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "gpt2"}', "", "[" * 100_000])
def test_config_json_of_another_program_is_left_alone(text, tmp_path):
    folder = Workdir(tmp_path)
    folder.config_file.write_text(text)
    with pytest.raises(UserError, match=f"^{folder.config_file} is not .*; choose another --workdir"):
        folder.check()
    assert folder.config_file.read_text() == text


@pytest.mark.parametrize(
    "name", ["config.json", ".lock", "checkpoints", "tensorboard", "metrics.jsonl", ".config.json.tmp"]
)
def test_a_link_in_a_workdir_is_not_followed(name, tmp_path):
    folder = holding(tmp_path / "run", make_run())
    target = tmp_path / "elsewhere"
    target.write_text("precious")
    place = folder.path / name
    if place.is_dir():
        place.rename(tmp_path / "moved")
    place.unlink(missing_ok=True)
    place.symlink_to(target)
    with pytest.raises(UserError, match=f"^{place} is a link, which is not followed in a workdir"):
        folder.check()
    with pytest.raises(UserError, match="symbolic links") if name == ".lock" else nullcontext(), folder.locked():
        pass
    assert target.read_text() == "precious"


def test_a_second_run_is_refused_with_the_name_of_the_first(tmp_path):
    with Workdir(tmp_path / "run").locked():
        who = f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(UserError, match=f"another process is training in workdir .*run \\({who}\\)"):
            Workdir(tmp_path / "run").locked().__enter__()
    with Workdir(tmp_path / "run").locked():
        pass


DEAD = {"host": socket.gethostname(), "pid": 2**22 - 3, "began": "1"}
AWAY = {"host": "another", "pid": 1, "began": "1"}
ALIVE = {"host": socket.gethostname(), "pid": os.getppid(), "began": began(os.getppid())}


@pytest.mark.parametrize("flocks", [True, False], ids=["flocks", "no-flocks"])
@pytest.mark.parametrize(
    ("holder", "age", "held"),
    [(DEAD, 0, False), (AWAY, 5, True), (AWAY, 300, False), (ALIVE, 0, True), ("garbage", 0, False), (None, 0, False)],
)
def test_a_lock_is_free_when_its_process_is_gone(holder, age, held, flocks, tmp_path, monkeypatch):
    def none(*_):  # there is no file system without flocks here
        raise OSError(errno.ENOLCK, "No locks available")

    if not flocks:
        monkeypatch.setattr("fcntl.flock", none)
    lock = tmp_path / ".lock"
    if holder is not None:
        lock.write_text(json.dumps(holder))
        os.utime(lock, (time.time() - age,) * 2)
    with pytest.raises(UserError, match="another process is training") if held else nullcontext():
        with Workdir(tmp_path).locked():
            assert json.loads(lock.read_text())["pid"] == os.getpid()
            if not flocks:
                with pytest.raises(UserError, match=f"process {os.getpid()} on"):
                    Workdir(tmp_path).locked().__enter__()
        assert lock.read_text() == ""


def test_launches_that_are_refused_do_not_keep_the_lock_of_a_dead_host_alive(tmp_path):
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps(AWAY))
    os.utime(lock, (time.time() - 50,) * 2)
    beaten = lock.stat().st_mtime_ns
    for _ in range(3):
        with pytest.raises(UserError, match="process 1 on another\\); if that host is gone, launch again 60 s after"):
            Workdir(tmp_path).locked().__enter__()
        assert lock.stat().st_mtime_ns == beaten


@pytest.mark.parametrize("change", ["moved", "removed", "replaced", "kept"])
def test_a_workdir_that_is_no_longer_there_is_noticed(change, tmp_path):
    workdir = Workdir(tmp_path / "run")
    with workdir.locked():
        if change in ("moved", "replaced"):
            workdir.path.rename(tmp_path / "moved")
        if change == "removed":
            shutil.rmtree(workdir.path)
        if change == "replaced":
            workdir.path.mkdir()
        assert workdir.is_replaced() == (change != "kept")
        assert workdir.beside().path.parent == tmp_path


def test_run_without_a_checkpoint_may_begin_anew_with_other_settings(tmp_path):
    folder = Workdir(tmp_path)
    folder.write(config.resolve(make_run(experiment=Task(noise=0.5))), "")
    folder.check_run(config.resolve(make_run()))


def test_disk_on_which_nothing_can_be_written_is_found_when_the_workdir_is_opened(tmp_path):
    workdir = Workdir(tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # files can be made, and not written
        with pytest.raises(UserError, match=f"^nothing can be written in workdir {workdir.path}: File too large$"):
            workdir.locked().__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


def test_opening_a_workdir_leaves_only_its_lock(tmp_path):
    with Workdir(tmp_path / "run").locked():
        assert [file.name for file in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.parametrize("path", ["/proc/run", "/dev/null/run"])
def test_impossible_workdir_is_one_line(path):
    with pytest.raises(UserError, match=f"^nothing can be written in workdir {path}: ") as error:
        Workdir(path).locked().__enter__()
    assert "\n" not in str(error.value)
