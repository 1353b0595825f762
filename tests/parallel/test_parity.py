"""The same run under every strategy and on every number of devices gives the same numbers."""

import functools
import logging
from contextlib import redirect_stdout
from io import StringIO

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.tasks import Task, make_run
from trainer import config
from trainer.build import build
from trainer.data.stream import stream
from trainer.errors import UserError
from trainer.loop import train
from trainer.parallel.sharded import Sharded

STEPS = 8


@functools.cache
def losses_and_params(strategy: str, devices: int, dropout: float, microbatches: int = 1):
    """Losses of the first steps and the parameters after them, with BatchNorm, augmentation and a masked row."""
    task = Task(dropout=dropout, noise=0.3)
    parallel = config.Parallel(strategy=strategy, devices=devices)
    run = config.resolve(make_run(experiment=task, microbatches=microbatches, parallel=parallel))
    parts = build(run)
    state = parts.parallel.create(parts.make_state)
    losses = []
    for batch in stream(parts.train_source, seed=0, batch_size=run.batch_size, start=0, stop=STEPS):
        batch["mask"][3] = 0  # replicas then have different weights
        state, metrics = parts.train_step(state, parts.parallel.put(batch))
        losses.append(float(metrics["loss"].total / metrics["loss"].weight))
    return np.array(losses), jax.device_get((state.params, state.collections))


def assert_same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found[1], expected[1])


@pytest.mark.parametrize("devices", [2, 4])
def test_sharded_with_dropout_and_batch_norm_is_one_device(devices):
    assert_same(losses_and_params("data", devices, 0.5), losses_and_params("data", 1, 0.5))


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_pmapped_with_statistics_across_replicas_is_one_device(devices):
    assert_same(losses_and_params("pmap", devices, 0.0), losses_and_params("data", 1, 0.0))


def test_pmapped_draws_dropout_masks_for_each_replica():
    found, expected = losses_and_params("pmap", 2, 0.5)[0], losses_and_params("data", 1, 0.5)[0]
    assert np.abs(found - expected).max() > 1e-3


def test_microbatches_have_the_same_rows_under_both_strategies():
    # BatchNorm's statistics are those of a microbatch, so equal numbers mean equal microbatches.
    assert_same(losses_and_params("pmap", 2, 0.0, 4), losses_and_params("data", 1, 0.0, 4))
    assert_same(losses_and_params("data", 4, 0.0, 4), losses_and_params("data", 1, 0.0, 4))


@pytest.mark.parametrize("strategy", ["data", "pmap"])
def test_steps_consume_their_state(strategy):
    parts = build(config.resolve(make_run(parallel=config.Parallel(strategy=strategy))))
    state = parts.parallel.create(parts.make_state)
    batch = next(iter(stream(parts.train_source, seed=0, batch_size=16, start=0, stop=1)))
    kernel = state.params["dense"]["kernel"]
    parts.train_step(state, parts.parallel.put(batch))
    assert kernel.is_deleted()


@pytest.mark.parametrize("strategy", ["data", "pmap"])
def test_train_and_evaluation_step_compile_once_in_a_run(strategy, tmp_path, caplog):
    run = make_run(
        6,
        parallel=config.Parallel(strategy=strategy),
        evaluation=config.Evaluation(every_steps=2, batch_size=8),
        checkpoint=config.Checkpoint(every_steps=3),
    )
    with jax.log_compiles(), caplog.at_level(logging.WARNING), redirect_stdout(StringIO()):
        train(run, tmp_path / "run")
    messages = [record.getMessage().split() for record in caplog.records]
    compiled = [words[4] for words in messages if words[:3] == ["Finished", "XLA", "compilation"]]
    # jax.pmap calls all that it compiles `_fun`.
    ours = ["jit(_fun)", "jit(_fun)"] if strategy == "pmap" else ["jit(evaluation)", "jit(update)"]
    assert sorted(name for name in compiled if name in ours) == ours


def test_rules_shard_the_state_and_its_moments_alike():
    rules = ((r"(.*/)?dense/kernel", (None, "data")), (".*", ()))
    numbers = []
    for parallel in (config.Parallel(rules=rules), config.Parallel(devices=1)):
        parts = build(config.resolve(make_run(parallel=parallel)))
        state = parts.parallel.create(parts.make_state)
        batches = stream(parts.train_source, seed=0, batch_size=16, start=0, stop=3)
        for batch in batches:
            state, _ = parts.train_step(state, parts.parallel.put(batch))
        numbers.append((state, jax.device_get(state.params)))
    sharded = numbers[0][0]
    for leaf in (sharded.params["dense"]["kernel"], sharded.opt_state.nu["dense"]["kernel"]):
        assert leaf.sharding.spec == PartitionSpec(None, "data")
        assert leaf.addressable_shards[0].data.shape == (8, 4)
    assert sharded.params["head"]["kernel"].sharding.is_fully_replicated
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), numbers[0][1], numbers[1][1])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("a", (None, None, "data")), "names 3 dimensions"),
        (("a", ("model",)), "axis 'model'; the mesh has"),
        (("a", ("data",)), "does not divide over axis 'data' of size 4"),
    ],
)
def test_a_rule_that_does_not_fit_is_an_error_with_the_path(rule, message):
    with pytest.raises(UserError, match=message):
        Sharded(jax.devices(), (rule,)).shardings({"a": jax.ShapeDtypeStruct((3, 5), np.float32)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 6}, "batch_size 6 does not divide over 4 devices: it must be a multiple of 4"),
        ({"batch_size": 24, "microbatches": 4}, "must be a multiple of 16"),
        ({"evaluation": config.Evaluation(batch_size=6)}, "evaluation.batch_size 6 does not divide"),
        ({"parallel": config.Parallel(devices=9)}, "XLA_FLAGS=--xla_force_host_platform_device_count=9"),
    ],
)
def test_batches_and_devices_that_do_not_fit(settings, message):
    with pytest.raises(UserError, match=message):
        build(config.resolve(make_run(**settings)))
