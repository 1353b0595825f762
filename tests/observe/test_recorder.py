"""When rows are written: that of the first step at once, those of later steps once their numbers are there."""

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
