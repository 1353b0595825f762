"""When the host waits for the devices, and when rows are written."""

import time
from io import StringIO
from typing import Any

import jax
import jax.numpy as jnp

from tests.tasks import make_run
from trainer import config
from trainer.metrics import Mean
from trainer.observe.log import NoLog
from trainer.observe.progress import Progress
from trainer.observe.recorder import Recorder


def test_the_first_step_of_a_launch_is_waited_for_and_shown_and_later_ones_are_not():
    matrix = jnp.eye(512)

    @jax.jit
    def slow(value: Any) -> Any:  # half a second or more, in which the host goes on
        return jax.lax.fori_loop(0, 500, lambda _, x: x @ matrix, matrix * value)[0, 0]

    slow = slow.lower(1.0).compile()

    def metrics_of(step: int) -> dict[str, Any]:
        return {"loss": Mean.single(slow(float(step))), "grad_norm": Mean.single(1.0)}

    stream = StringIO()
    run, devices = config.resolve(make_run(20)), jax.devices()[:1]
    recorder = Recorder(run, 3, lambda step: True, devices, NoLog(), Progress(20, stream))
    recorder.add(4, metrics_of(4))
    assert stream.getvalue().startswith("step  4/20  loss 4.0000")
    recorder.add(5, metrics_of(5))
    assert "step  5/20" not in stream.getvalue()
    assert recorder.flush() == 5
    assert "step  5/20  loss 5.0000" in stream.getvalue()


def test_a_row_is_written_when_two_later_steps_are_dispatched_although_the_host_waits_less_often():
    stream = StringIO()
    run = config.resolve(make_run(100))
    recorder = Recorder(run, 0, lambda step: step % 5 == 0, jax.devices()[:1], NoLog(), Progress(100, stream))
    for step in range(1, 51):
        recorder.add(step, {"loss": Mean.single(jnp.float32(step)), "grad_norm": Mean.single(1.0)})
        assert stream.getvalue().count("loss") == (step - 2) // 5 * (step > 2)


def test_on_one_cpu_the_host_runs_ahead_of_short_steps_and_not_of_long_ones():
    @jax.jit
    def long(x: Any, times: int) -> Any:
        x = jax.lax.fori_loop(0, times, lambda _, x: x @ x, x)
        return x, {"loss": Mean.single(x[0, 0]), "grad_norm": Mean.single(1.0)}

    state, short = jax.block_until_ready(long(jnp.eye(512), 30))
    began = time.perf_counter()
    jax.block_until_ready(long(state, 30))
    times = int(30 * 0.15 / (time.perf_counter() - began)) + 1  # 0.15 s

    run = config.resolve(make_run(100))
    recorder = Recorder(run, 0, lambda step: False, jax.devices()[:1], NoLog(), Progress(100, StringIO()))
    for step in range(1, 70):
        recorder.add(step, short)
    totals, ahead = [], []
    for step in range(recorder.flush() + 1, 95):
        state, metrics = long(state, times)
        recorder.add(step, metrics)
        totals.append(metrics["loss"].total)
        ahead.append(sum(not total.is_ready() for total in totals))
    assert max(ahead[:16]) >= 10
    assert max(ahead[16:]) <= 6  # 2, and half a second of steps
