"""The same run under every strategy and on every number of devices gives the same numbers."""

import dataclasses
import functools
import logging
from collections import Counter
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import pytest

from tests.tasks import Task, make_run
from trainer import config
from trainer.data import take
from trainer.data.stream import train_batches
from trainer.errors import UserError
from trainer.evaluation import evaluate_split
from trainer.program import Program, build_program

STEPS, BATCH = 20, 16
SHARDED = ("data", "zero1", "fsdp", "tensor", "fsdp_tensor")
DEVICES = (2, 4, 8)
CASES = [  # strategy, devices, dropout; on one device the sharded ones are one program
    *[(strategy, devices, 0.3) for strategy in SHARDED for devices in DEVICES],
    *[("zero1_tensor", devices, 0.3) for devices in (4, 8)],
    *[("pmap", devices, 0.0) for devices in (1, *DEVICES)],
]
# Each way to shard once: "zero1_tensor" shards as "zero1" and "tensor" do.
OFTEN = [*[(strategy, 4) for strategy in ("zero1_tensor", "fsdp", "fsdp_tensor", "pmap")], ("data", 8)]
OUTCOMES = [pytest.param(*case, marks=[] if case[:2] in OFTEN else [pytest.mark.exhaustive]) for case in CASES]
# An axis of size 1 shards nothing, so one list serves every strategy.
RULES = (
    (r"dense/kernel", ("fsdp", "tensor")),
    (r"head/kernel", ("tensor", None)),
    (r"norm/.*", ("tensor",)),
    (r"head/bias", ()),
)


@dataclasses.dataclass
class Outcome:
    """The results of a run, on the host."""

    losses: np.ndarray  # of each step
    numbers: Any  # parameters, batch statistics and EMA params, after the last step
    evaluated: list[dict[str, float]]  # in the middle and at the end
    compiled: Counter[str]  # how often each program was
    stays: bool  # whether each step reuses the buffers of its state


class _Compilations(logging.Handler):
    """Counts compilations by the name of the program."""

    def __init__(self) -> None:
        super().__init__()
        self.programs: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        words = record.getMessage().split()
        if words[:3] == ["Finished", "XLA", "compilation"]:
            self.programs[words[4]] += 1


@contextmanager
def counting_compilations():
    handler, logger = _Compilations(), logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        jax.config.update("jax_log_compiles", True)  # in every thread: steps are compiled ahead
        yield handler.programs
    finally:
        jax.config.update("jax_log_compiles", False)
        logger.removeHandler(handler)


def program_of(strategy: str, devices: int, dropout: float, **settings: Any) -> Program:
    """BatchNorm, augmentation, microbatches and EMA params; every leaf sharded that can be."""
    rules = RULES if "tensor" in strategy else ()
    parallel = config.Parallel(strategy=strategy, devices=devices, rules=rules, min_shard_size=0)
    settings = {"experiment": Task(dropout=dropout, noise=0.3), "microbatches": 2, "parallel": parallel} | settings
    optimizer = dataclasses.replace(make_run().optimizer, ema_decay=0.9)
    return build_program(config.resolve(make_run(STEPS, **{"optimizer": optimizer} | settings)))


def batches(program: Program):
    """The batches of the run. Each lacks some examples, and the last its second half, so all of some replicas."""
    for i, batch in enumerate(train_batches(program.train_source, seed=0, batch_size=BATCH, start=0, stop=STEPS)):
        mask = np.arange(BATCH) < BATCH // 2 if i == STEPS - 1 else np.arange(BATCH) % 7 != i % 7
        yield program.strategy.shard_batch({**batch, "mask": mask.astype(np.float32)})


def addresses(tree: Any) -> list[list[int]]:
    """The address of every array on every device."""
    return [[s.data.unsafe_buffer_pointer() for s in leaf.addressable_shards] for leaf in jax.tree.leaves(tree)]


@functools.cache
def outcome(strategy: str, devices: int, dropout: float) -> Outcome:
    program = program_of(strategy, devices, dropout)
    with counting_compilations() as compiled:
        state = program.init()
        losses, evaluated, stays = [], [], True
        for i, batch in enumerate(batches(program), 1):
            before, old = addresses(state), state
            state, metrics = program.train_step(state, batch)
            losses.append(float(metrics["loss"].total / metrics["loss"].weight))
            stays &= addresses(state) == before and all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
            if i in (STEPS // 2, STEPS):
                evaluated.append(evaluate_split(program, state, program.main_evaluation.source))
    jax.tree.map(lambda x, like: assert_same_sharding(x, like), state, program.state)
    numbers = jax.device_get((state.params, state.collections, state.ema))
    return Outcome(np.array(losses), numbers, evaluated, compiled, stays)


def assert_same_sharding(x: jax.Array, like: Any) -> None:
    assert x.sharding.is_equivalent_to(like.sharding, x.ndim)


def assert_same(found: Outcome, expected: Outcome) -> None:
    """To float32 rounding.

    On one device, initial parameters that are changed by one unit in the last place (2⁻²³) change the losses of these
    20 steps by up to 2e-7 of their value, and parameters and statistics by up to 4e-7 of the largest of their array.
    """
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-6)

    def same(a: np.ndarray, b: np.ndarray) -> None:
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())

    jax.tree.map(same, found.numbers, expected.numbers)
    for metrics, wanted in zip(found.evaluated, expected.evaluated, strict=True):
        assert metrics == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("strategy", "devices", "dropout"), OUTCOMES)
def test_losses_parameters_and_evaluations_are_those_of_one_device(strategy, devices, dropout):
    assert_same(outcome(strategy, devices, dropout), outcome("data", 1, dropout))


@pytest.mark.parametrize("strategy", SHARDED[1:])
def test_on_one_device_every_sharded_strategy_is_the_same_program(strategy):
    assert lowered(strategy) == lowered("data")


@functools.cache
def lowered(strategy: str) -> list[str]:
    program = program_of(strategy, 1, 0.3)
    main = program.main_evaluation
    specs: Any = ((program.train_step, program.train_spec), (main.step, main.spec))
    return [step.lower(program.state, program.strategy.abstract_batch(spec)).as_text() for step, spec in specs]


@pytest.mark.parametrize(("strategy", "devices", "dropout"), OUTCOMES)
def test_train_and_evaluation_step_compile_once(strategy, devices, dropout):
    compiled = outcome(strategy, devices, dropout).compiled
    # jax.pmap names every program `_fun`.
    ours = {"jit(_fun)": 2} if strategy == "pmap" else {"jit(eval_step)": 1, "jit(train_step)": 1}
    assert {
        name: compiled[name] for name in ("jit(_fun)", "jit(eval_step)", "jit(train_step)") if compiled[name]
    } == ours


@pytest.mark.parametrize(("strategy", "devices", "dropout"), OUTCOMES)
def test_steps_consume_their_state_and_put_the_next_in_its_place(strategy, devices, dropout):
    assert outcome(strategy, devices, dropout).stays


def test_pmapped_draws_dropout_masks_for_each_replica():
    # Both replicas hold the same examples. First the mask keeps those of one replica, then those of the other.
    program = program_of("pmap", 2, 0.3, experiment=Task(dropout=0.3, batch_norm=False), microbatches=1)
    examples = take(program.train_source, np.arange(BATCH) % (BATCH // 2))
    losses = []
    for replica in (0, 1):
        mask = (np.arange(BATCH) // (BATCH // 2) == replica).astype(np.float32)
        batch = program.strategy.shard_batch({**examples, "mask": mask})
        _, metrics = program.train_step(program.init(), batch)
        losses.append(float(metrics["loss"].total))
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize(
    ("strategy", "devices"), [("pmap", 4), pytest.param("pmap", 8, marks=pytest.mark.exhaustive), ("fsdp", 4)]
)
def test_a_step_of_sgd_is_the_gradient_of_one_device(strategy, devices):
    # Not n times the gradient: replicas sum the loss, and each weighs as many examples as it has.
    optimizer = config.Optimizer(name="sgd", b1=0.0, schedule=config.Schedule(peak=1.0))
    program = program_of(strategy, devices, 0.0, experiment=Task(batch_norm=False), optimizer=optimizer, microbatches=1)
    task, examples = program.run.experiment, take(program.train_source, np.arange(BATCH))
    batch = {**examples, "mask": (np.arange(BATCH) < 5).astype(np.float32)}
    device_batch = jax.device_put(batch)
    state = program.init()
    params = jax.device_get(state.params)

    def mean_loss(params):
        variables = {"params": params}
        metrics, _ = task.loss(variables, device_batch, key=jax.random.key(0), train=True)
        return metrics["loss"].total / 5

    gradient = jax.device_get(jax.jit(jax.grad(mean_loss))(params))
    after, metrics = program.train_step(state, program.strategy.shard_batch(batch))
    jax.tree.map(
        lambda new, old, g: np.testing.assert_allclose(new, old - g, rtol=0, atol=1e-6 * np.abs(old - g).max()),
        jax.device_get(after.params),
        params,
        gradient,
    )
    length = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(gradient)))
    assert float(metrics["grad_norm"].total) == pytest.approx(length, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 12}, "batch_size 12 does not divide over 8 batch shards: it must be a multiple of 8"),
        ({"batch_size": 24, "microbatches": 4}, "must be a multiple of 32"),
        (  # 8 devices
            {"batch_size": 18, "parallel": config.Parallel("fsdp_tensor", rules=((".*", ()),))},
            "batch_size 18 does not divide over 4 batch shards: it must be a multiple of 4",
        ),
        ({"evaluation": config.Evaluation(batch_size=12)}, "evaluation.batch_size 12 does not divide"),
        ({"parallel": config.Parallel(devices=9)}, "XLA_FLAGS=--xla_force_host_platform_device_count=9"),
        ({"parallel": config.Parallel("pmap", fsdp=2)}, "parallel.fsdp is 2, which strategy 'pmap' does not use"),
    ],
)
def test_batches_and_devices_that_do_not_fit(settings, message):
    with pytest.raises(UserError, match=message):
        build_program(config.resolve(make_run(**settings)))


def test_rows_split_over_fsdp_but_not_over_tensor():
    rules = ((".*", ()),)
    run = make_run(batch_size=12, evaluation=config.Evaluation(), parallel=config.Parallel("fsdp_tensor", rules=rules))
    run.parallel.tensor = 2
    assert build_program(config.resolve(run)).strategy.batch_shards == 4
