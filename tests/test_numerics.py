"""Updates that are dropped: on every strategy alike, counted, exact over a resume, and never silent."""

import dataclasses
import functools
import io
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tasks import Task, make_run
from trainer import config, train
from trainer.data.order import Order
from trainer.data.stream import train_batches
from trainer.determinism import check_determinism
from trainer.errors import DivergedError
from trainer.guard import RECENT, Guard, drop_bad_update, spike_limit
from trainer.metrics import Mean, Moments
from trainer.observe.log import NoLog
from trainer.observe.progress import Progress
from trainer.observe.recorder import Recorder
from trainer.program import Program, build_program
from trainer.replay import replay
from trainer.state import TrainState

STEPS = 6
ORDER = Order(200, 0)(np.arange(200))
BAD = int(ORDER[2 * 16 + 5])  # in batch 3
SKIP = config.Numerics(on_nonfinite="skip", max_skips=3)


@functools.cache
def program_of(strategy: str, policy: str = "skip", bad: int = BAD, microbatches: int = 1) -> Program:
    parallel = config.Parallel(strategy=strategy, devices=1 if strategy == "one" else 4)
    if strategy == "one":
        parallel = config.Parallel(devices=1)
    if strategy == "fsdp":
        parallel = dataclasses.replace(parallel, min_shard_size=0)
    run = make_run(
        20,
        experiment=Task(examples=200, explode_at=bad),
        parallel=parallel,
        numerics=dataclasses.replace(SKIP, on_nonfinite=policy),
        microbatches=microbatches,
        optimizer=dataclasses.replace(make_run().optimizer, ema_decay=0.9),
    )
    return build_program(config.resolve(run))


def batches(program: Program, start: int, stop: int = STEPS):
    shares = train_batches(
        program.train_source,
        seed=0,
        batch_size=16,
        start=start,
        stop=stop,
        local_positions=program.strategy.local_positions(16),
    )
    return map(program.strategy.shard_batch, shares)


def go(program: Program, state: TrainState, start: int = 0, stop: int = STEPS):
    """The state after each step, on the host, and the metrics of each."""
    states, metrics = [jax.device_get(state)], []
    for batch in batches(program, start, stop):
        state, found = program.train_step(state, batch)
        states.append(jax.device_get(state))
        metrics.append({name: mean.compute() for name, mean in found.items()})
    return states, metrics


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(("strategy", "microbatches"), [("one", 1), ("one", 2), ("data", 1), ("fsdp", 1), ("pmap", 1)])
def test_a_bad_update_changes_nothing_but_the_step_and_the_counts(strategy, microbatches):
    program = program_of(strategy, microbatches=microbatches)
    states, metrics = go(program, program.init())
    for part in ("params", "opt_state", "collections", "ema"):
        equal(getattr(states[3], part), getattr(states[2], part))
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (states[4].params, states[3].params)), strict=True))
    assert [m["skipped"] for m in metrics] == [0, 0, 1, 0, 0, 0]
    assert [m["skipped_in_row"] for m in metrics] == [0, 0, 1, 0, 0, 0]
    assert [m["skipped_so_far"] for m in metrics] == [0, 0, 1, 1, 1, 1]
    assert [int(s.step) for s in states] == list(range(STEPS + 1))
    assert int(states[-1].opt_state.count) == int(states[-1].guard.count) == STEPS - 1
    rates = [m["learning_rate"] for m in metrics]  # the schedule counts updates, as the optimizer does
    assert rates[3] == rates[2]


def test_a_resume_in_the_middle_is_exact():
    program = program_of("one")
    states, _ = go(program, program.init())
    for start in (2, 3):
        middle = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), states[start], program.state)
        again, _ = go(program, middle, start)
        equal(again[-1], states[-1])


def test_without_a_bad_update_the_numbers_are_those_of_stop():
    finals = {}
    for policy in ("stop", "skip"):
        program = program_of("one", policy, bad=-1)
        finals[policy] = go(program, program.init())
    assert finals["stop"][0][0].guard is None
    assert "skipped" not in finals["stop"][1][0]
    for part in ("params", "opt_state", "collections", "ema"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9),
            *(getattr(finals[policy][0][-1], part) for policy in ("stop", "skip")),
        )


def fresh() -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    guard = Guard(jnp.zeros(RECENT, jnp.float32), zero, zero, zero)
    return TrainState(zero, {"w": jnp.zeros(())}, {}, (), None, guard)


@functools.partial(jax.jit, static_argnums=(3,))
def drop(state: TrainState, loss: Mean, norm, spike):
    after = dataclasses.replace(state, step=state.step + 1, params={"w": state.params["w"] + 1}, guard=None)
    return drop_bad_update(state, after, loss, norm, spike)


@pytest.mark.parametrize("quantile", [0.5, 0.99, 1.0])
@pytest.mark.parametrize("shift", [0.0, -30.0])
def test_the_limit_is_numpys_quantile_of_the_last_128_kept_losses(quantile, shift):
    rng, state, kept = np.random.default_rng(0), fresh(), []
    for step in range(300):
        loss = np.float32(rng.lognormal() + shift + 1000 * (step % 37 == 36 and step > 150))
        weight = 0.0 if step % 50 == 20 else 4.0
        limit = np.inf
        if len(kept) >= RECENT:
            middle = np.quantile(np.asarray(kept[-RECENT:], np.float64), quantile)
            limit = middle + 0.5 * abs(middle)
            np.testing.assert_allclose(float(spike_limit(state.guard, quantile, 1.5)), limit, rtol=1e-5)
        state, metrics = drop(state, Mean(jnp.float32(loss * weight), jnp.float32(weight)), 1.0, (quantile, 1.5))
        is_bad = weight > 0 and loss > limit
        assert metrics["skipped"].compute() == is_bad
        if weight and not is_bad:
            kept.append(loss)
    assert int(state.guard.count) == len(kept)
    assert int(state.guard.dropped) == 300 - int(state.params["w"]) > 0


@pytest.mark.parametrize(("loss", "norm"), [(np.nan, 1.0), (np.inf, 1.0), (1.0, np.nan), (1.0, np.inf)])
def test_a_bad_loss_or_gradient_is_dropped_and_not_remembered(loss, norm):
    state, metrics = drop(fresh(), Mean(jnp.float32(loss), jnp.float32(1)), norm, None)
    assert metrics["skipped"].compute() == 1
    assert (int(state.guard.count), int(state.guard.in_row), float(state.params["w"])) == (0, 1, 0.0)
    assert np.isfinite(np.asarray(state.guard.losses)).all()


def recorded(numerics: config.Numerics, steps: list[dict[str, float]]) -> str:
    stream = io.StringIO()
    run = config.resolve(make_run(20, numerics=numerics))
    recorder = Recorder(run, 0, lambda step: False, jax.devices()[:1], NoLog(), Progress(20, stream))
    try:
        for step, numbers in enumerate(steps, 1):
            recorder.add(step, {name: Mean.single(value) for name, value in ({"grad_norm": 1.0} | numbers).items()})
        recorder.flush()
    except DivergedError as error:
        return stream.getvalue() + f"stopped: {error}\n"
    return stream.getvalue()


def test_each_skipped_update_is_shown_and_too_many_in_a_row_end_the_run():
    bad = [{"loss": np.nan, "skipped": 1, "skipped_in_row": n} for n in (1, 2, 3)]
    good = {"loss": 1.0, "skipped": 0, "skipped_in_row": 0}
    shown = recorded(SKIP, [good, bad[0], bad[1], good, bad[0]])
    assert shown.splitlines() == [
        f"step {step}: the loss is nan: the update is skipped ({n} in a row)" for step, n in ((2, 1), (3, 2), (5, 1))
    ]
    assert recorded(SKIP, bad).splitlines()[-1] == (
        "stopped: step 3: the loss is nan, and 3 updates in a row were skipped"
    )


def test_a_spike_is_shown_with_its_limit():
    numerics = config.Numerics(spike_quantile=0.99, spike_factor=2.0)
    spike = {"loss": 9.1, "skipped": 1, "skipped_in_row": 1, "spike_limit": 6.0}
    text = "step 1: the loss is 9.1, above 6, 2 × the 0.99 quantile of the losses before: the update is skipped"
    assert recorded(numerics, [spike]) == text + " (1 in a row)\n"
    stop = recorded(numerics, [{"loss": np.nan, "skipped": 1, "skipped_in_row": 1, "spike_limit": 6.0}])
    assert stop == "stopped: the loss of step 1 is nan\n"


def test_a_run_that_already_skips_is_not_told_to_skip(tmp_path):
    run = make_run(5, experiment=Task(examples=200, explode_at=BAD), parallel=config.Parallel(devices=1))
    run.numerics = config.Numerics(on_nonfinite="skip", max_skips=1)
    with pytest.raises(DivergedError, match=r"the loss is inf, and 1 updates in a row were skipped; .* again") as error:
        train(run, tmp_path / "run", verbose=False)
    assert "on_nonfinite" not in str(error.value)


def test_a_spike_that_ends_the_run_is_told_from_a_number_that_is_not_finite(tmp_path):
    numerics = config.Numerics(spike_quantile=0.01, max_skips=1)
    run = make_run(200, parallel=config.Parallel(devices=1), numerics=numerics, logging=config.Logging(every_steps=50))
    with pytest.raises(DivergedError, match=r"the loss is .*, above .*, and 1 updates in a row were skipped") as error:
        train(run, tmp_path / "run", verbose=False)
    assert "; recomputed, all is finite and the loss is a spike again; " in str(error.value)
    assert "on_nonfinite" not in str(error.value)
    result = replay(tmp_path / "run" / "diverged" / str(error.value.step))
    assert result.is_finite
    assert "all is finite: the loss is a spike, above the limit of numerics.spike_quantile" in result.text
    assert "suspect" not in result.text


@dataclasses.dataclass
class HostNoise(Task):
    """Adds noise that no seed decides to the loss."""

    def loss(self, variables, batch, *, key, train) -> Any:
        metrics, collections = super().loss(variables, batch, key=key, train=train)
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        noise = jax.pure_callback(lambda: np.float32(next(NOISE)), shape)
        loss = Mean(metrics["loss"].total * noise, metrics["loss"].weight)
        return metrics | {"loss": loss, "moments": Moments.of(loss.total, loss.weight)}, collections


NOISE = itertools.count(1)  # another number at each call, in every pass


def test_a_run_repeats_itself_and_one_with_noise_of_the_host_does_not():
    run = config.resolve(make_run(20, parallel=config.Parallel(devices=1)))
    assert check_determinism(run, 2) == (
        True,
        "2 steps twice: every metric and every array of the state equal, bit for bit",
    )
    noisy = dataclasses.replace(run, experiment=HostNoise())
    is_equal, text = check_determinism(noisy, 2)
    assert not is_equal
    assert re.match(r"step 1: the metric loss differs first: its sum is [\d.]+, then [\d.]+\n", text)
    assert "after 2 steps params/" in text
