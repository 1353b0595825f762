"""Python looks for no garbage until the first step, and then as before."""

import gc

import pytest

from trainer.commands import run
from trainer.garbage import gc_paused, pause_gc, resume_gc
from trainer.session import Session


@pytest.fixture(autouse=True)
def enabled_before_and_after():
    assert gc.isenabled()
    yield
    resume_gc()
    gc.enable()


def test_a_short_pause_within_a_long_one_does_not_end_it():
    pause_gc()
    with gc_paused():
        assert not gc.isenabled()
    assert not gc.isenabled()
    resume_gc()
    assert gc.isenabled()


def test_a_pause_that_the_user_began_is_left_alone():
    gc.disable()
    pause_gc()
    with gc_paused():
        pass
    resume_gc()
    assert not gc.isenabled()


def test_training_pauses_until_its_first_step(monkeypatch, tmp_path):
    record, is_enabled = Session.record, []

    def note(session, step, state, metrics):
        is_enabled.append(gc.isenabled())
        record(session, step, state, metrics)

    monkeypatch.setattr(Session, "record", note)
    steps = ("--config.total_steps=3", "--config.optimizer.schedule.warmup=1")
    assert run(["train", "--config=configs/diabetes.py", f"--workdir={tmp_path}/run", *steps]) == 0
    assert is_enabled == [False, True, True]
    assert gc.isenabled()


def test_a_command_that_fails_ends_its_pause():
    assert run(["train", "--config=configs/diabetes.py", "--config.total_stepz=3"]) == 2
    assert gc.isenabled()
